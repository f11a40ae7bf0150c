//! Leaves the bus without losing a call, and probes that the service still answers.
//!
//! The service owns its name until it releases it. Afterwards the bus queues calls to the name and has the service
//! started. The bus handles messages in order, so the reply to `ReleaseName` follows the last call that was sent to the
//! name. When the service has admitted all calls before that reply, it knows whether a client called. If so, it takes
//! the name again and continues. The bus then delivers the calls that it queued.
//!
//! systemd adds a second race. The bus asks systemd to start the service, once for all queued calls, and starting an
//! active unit does nothing. A call that comes after the release, and before systemd knows that the service ends, would
//! wait forever.
//! `STOPPING=1` makes systemd delay further starts until the service has ended, but it is irreversible. The unit is
//! deactivating from then on. systemd kills it after a timeout, and sends no signal for a later stop request. If the
//! service sent `STOPPING=1` *before* it releases the name, it could receive calls that it has no time for: a
//! subscription, a domain, a backup. If it sends it *after*, there is a gap.
//!
//! So the service sends it after the release, when no client has called. Then it asks systemd whether there was a start
//! request in the gap. systemd counts all jobs that it ever installed, including those without effect. The order is
//!
//! 1. read systemd's count;
//! 2. release the name and admit pending calls; if there was one, take the name again and continue;
//! 3. send `STOPPING=1`, and wait until systemd has processed it (`BARRIER=1`);
//! 4. read the count again. Every earlier start request is counted, and every later one is delayed until the service
//!    has ended. If the count is the same, the service ends. If the count differs or cannot be read, the service ends
//!    with the status that makes systemd start it again ([`crate::supervisor::RESTART`]). The new instance gets the
//!    queued calls. A start of another unit also changes the count, which is harmless.
//!
//! The bus cannot queue calls to the unique name, which some libraries use once they know it. The service handles such
//! calls normally until it releases the name. Later ones are refused: by the service while it is connected
//! ([`super::Published::close`]), then by the bus. By then such a caller has received the signal that the name has no
//! owner.

use std::time::Duration;

use zbus::fdo::{DBusProxy, ReleaseNameReply, RequestNameFlags, RequestNameReply};
use zbus::names::WellKnownName;
use zbus::proxy::MethodFlags;
use zbus::wire::OwnedVariant;
use zbus::{Connection, Proxy};

use super::Published;
use super::standard::{PEER, PROPERTIES};
use crate::names::{BUS_NAME, ROOT_PATH};

/// Timeout for systemd's answer.
const TIMEOUT: Duration = Duration::from_secs(5);
const SYSTEMD: &str = "org.freedesktop.systemd1";
const SYSTEMD_PATH: &str = "/org/freedesktop/systemd1";
const SYSTEMD_MANAGER: &str = "org.freedesktop.systemd1.Manager";

/// Takes the well-known name.
pub(super) async fn take_name(connection: &Connection) -> zbus::Result<()> {
    let bus = DBusProxy::new(connection).await?;
    let flags = RequestNameFlags::DO_NOT_QUEUE;
    match bus.request_name(name(), flags).await? {
        RequestNameReply::PrimaryOwner | RequestNameReply::AlreadyOwner => Ok(()),
        RequestNameReply::Exists | RequestNameReply::InQueue => Err(zbus::Error::NameTaken),
    }
}

/// Whether the bus starts the service on demand.
pub(super) async fn is_started_on_demand(connection: &Connection) -> zbus::Result<bool> {
    let bus = DBusProxy::new(connection).await?;
    let names = bus.list_activatable_names().await?;
    Ok(names.iter().any(|name| name.as_str() == BUS_NAME))
}

fn name() -> WellKnownName<'static> {
    WellKnownName::from_static_str_unchecked(BUS_NAME)
}

impl Published {
    /// Releases the name. When this returns, every call that was sent to the name is admitted.
    pub async fn withdraw(&self) -> zbus::Result<()> {
        let bus = DBusProxy::new(&self.connection).await?;
        match bus.release_name(name()).await? {
            ReleaseNameReply::Released => {}
            ReleaseNameReply::NonExistent | ReleaseNameReply::NotOwner => {
                tracing::debug!("the service did not own its name");
            }
        }
        self.admission.drain().await;
        Ok(())
    }

    /// Takes the name again.
    pub async fn stay(&self) -> zbus::Result<()> {
        take_name(&self.connection).await
    }

    /// The number of jobs that systemd ever installed; `None` if systemd does not report it.
    pub async fn jobs_of_systemd(&self) -> Option<u32> {
        let count = async {
            let systemd = Proxy::new(&self.connection, SYSTEMD, SYSTEMD_PATH, PROPERTIES).await?;
            let asked = (SYSTEMD_MANAGER, "NInstalledJobs");
            let flags = MethodFlags::NO_AUTO_START;
            let count: Option<OwnedVariant> = systemd.call_with_flags("Get", flags, &asked).await?;
            let count = count.ok_or(zbus::Error::InvalidReply)?;
            u32::try_from(count)
        };
        match tokio::time::timeout(TIMEOUT, count).await {
            Ok(Ok(count)) => Some(count),
            Ok(Err(error)) => {
                tracing::debug!(%error, "systemd does not report its number of jobs");
                None
            }
            Err(_) => {
                tracing::debug!("systemd does not answer");
                None
            }
        }
    }

    /// Probes whether the service still answers.
    pub fn prober(&self) -> Prober {
        Prober(self.connection.clone())
    }
}

/// Calls the service over the bus, as any client does.
pub struct Prober(Connection);

impl Prober {
    /// Returns when a `Ping` has gone to the bus and back, through the admission of calls and a task of its own.
    pub async fn probe(&self) -> zbus::Result<()> {
        let own = self.0.unique_name().ok_or(zbus::Error::Unsupported)?;
        self.0
            .call_method(Some(own), ROOT_PATH, Some(PEER), "Ping", &())
            .await
            .map(drop)
    }
}
