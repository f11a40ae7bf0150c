//! backupd: backs up running QEMU virtual machines for callers on the system bus.
//!
//! One library, two binaries: `backupd` (the service) and `backupctl` (its command line). A request goes
//! `bus` → `service` → `definition` → `access` → `plan` → `job` → `image` → `target` → `qcow2` → `qmp`, with `domain` telling which
//! virtual machines there are, and `backups` beside `job` what becomes of a backup when it is made. A module may use
//! those after it on that way and never those before it.

pub mod access;
pub mod activity;
pub mod backups;
pub mod bus;
pub mod catalog;
pub mod clock;
pub mod config;
pub mod definition;
pub mod digest;
pub mod domain;
pub mod error;
pub mod fault;
pub mod image;
pub mod job;
pub mod names;
pub mod offload;
pub mod path;
pub mod plan;
pub mod qcow2;
pub mod qmp;
pub mod quota;
pub mod service;
pub mod socket;
pub mod supervisor;
pub mod target;
pub mod text;
mod turns;
