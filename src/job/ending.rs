//! The end of the service's work on a job, and the residue that is removed afterwards.

use std::sync::Arc;

use tokio_util::sync::DropGuard;

use super::Job;
use super::bandwidth::Part;

/// How the service's work on a job ended.
pub(super) enum Ending {
    /// The job has ended. It keeps its part of a store's bandwidth while QEMU may still copy.
    Ended(Residue, Option<Part>),
    /// A later instance of the service resumes the job.
    Detached,
}

/// An ended job with residue that is not removed yet.
pub(super) struct Uncleaned {
    pub job: Arc<Job>,
    pub residue: Residue,
    /// Dropping this returns the job's part of a store's bandwidth.
    pub _part: Option<DropGuard>,
}

/// The residue that an ended job may have.
#[derive(Debug, Clone, Copy, Default)]
pub struct Residue {
    pub in_qemu: bool,
    pub on_disk: bool,
    /// In QEMU: the guest's power-off is still delayed.
    pub holds_poweroff: bool,
    /// In QEMU: QEMU may have paused the guest because the target failed.
    pub may_have_paused_guest: bool,
}
