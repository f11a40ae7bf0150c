//! backupd: backs up running QEMU virtual machines for callers on the system bus.
//!
//! One library, two programs: `backupd` (the service) and `backupctl` (its command line). A call enters at the top of
//! this table and moves down. A module uses only modules further down; `tests/project/structure.rs` checks that.
//!
//! | module | is |
//! | --- | --- |
//! | `bus` | D-Bus messages into calls, results into replies, changes into signals |
//! | `service` | request handling: parse, resolve, authorise, plan, start |
//! | `backups` | operations on stored backups: delete, merge, prune, check |
//! | `job` | the state machine that runs a plan, its journal, and recovery |
//! | `image` | the programs that read images (`qemu-img`, `qemu-storage-daemon`), confined: restore, export, verify |
//! | `targets` | files and devices that a backup is written to: prepared, published, discarded |
//! | `plan` | a request with every default made explicit. Pure |
//! | `catalog` | SQLite: jobs, their journal and history, backups, checkpoints; and the manifest in a store |
//! | `checkpoint` | dirty bitmaps: their owners, the bases that they give, and which to remove. Pure |
//! | `domain` | the known virtual machines, their disks and their monitors |
//! | `access` | authorisation: polkit, the table of permissions, the audit record |
//! | `config` | the configuration file |
//! | `store` | stores: staging, publishing, reading, locking, replacing and removing backups |
//! | `qcow2` | the headers of qcow2 images |
//! | `definition` | `<domainbackup>` and `<domaincheckpoint>` documents |
//! | `qmp` | the QEMU Machine Protocol |
//! | `quota` | limits for each user, and for all users |
//! | `socket` | UNIX sockets at paths that other users can change |
//! | `files` | identities of files, and renames that file systems support differently |
//! | `path` | files at paths that other users can change |
//! | `digest` | digests of files |
//! | `model` | plain values: identifiers, formats, digests, the manifest. Pure |
//! | `error` | the kinds of failure, and the value that carries one to the caller |
//! | `offload` | blocking work off the runtime |
//! | `activity` | idle time of the service |
//! | `supervisor` | notifications to systemd |
//! | `fault` | points at which a test ends the service |
//! | `turns` | limits on concurrent work, shared fairly between users |
//! | `size` | sizes in bytes, as people write them |
//! | `text` | invisible characters in text |
//! | `names` | names on the bus |
//! | `clock` | the time of day |

pub mod access;
pub mod activity;
pub mod backups;
pub mod bus;
pub mod catalog;
pub mod checkpoint;
pub mod clock;
pub mod config;
pub mod definition;
pub mod digest;
pub mod domain;
pub mod error;
pub mod fault;
pub mod files;
pub mod image;
pub mod job;
pub mod model;
pub mod names;
pub mod offload;
pub mod path;
pub mod plan;
pub mod qcow2;
pub mod qmp;
pub mod quota;
pub mod service;
pub mod size;
pub mod socket;
pub mod store;
pub mod supervisor;
pub mod targets;
pub mod text;
mod turns;
