//! All tests that can run in parallel, as one program. The tests are linked once, and the threads stay busy until the
//! end.
//!
//! `cargo test --test tests random_operations::` runs the tests of one file, and `push::` those of a directory. Tests
//! that measure, or that take minutes, are separate programs (`Cargo.toml`).

mod common;

mod access {
    mod audit;
    mod callers;
    mod contract_actions;
    mod dialogs;
    mod fail_closed;
    mod owners;
    mod permissions;
    mod polkit_details;
    mod privacy;
    mod rules;
}

mod cli {
    mod backupctl;
}

mod crash {
    mod host_restart;
    mod orphans;
    mod restart;
    mod storage_faults;
    mod upgrade;
}

mod freeze {
    mod freeze_limits;
    mod guest;
    mod quiesce;
}

mod incremental {
    mod chains;
    mod checkpoints;
    mod internal_snapshots;
    mod random_operations;
    mod resized;
}

mod interface {
    mod call_order;
    mod contract;
    mod definition;
    mod malformed_calls;
    mod no_reply_calls;
    mod refusals;
}

mod packaging {
    mod install;
    mod manual;
    mod unit_file;
}

mod peers {
    mod confined;
    mod foreign_peers;
    mod fuzz_corpus;
    mod hostile;
    mod look;
    mod qmp;
}

mod project {
    mod fixture;
    mod language;
    mod structure;
}

mod push {
    mod backup;
    mod bandwidth;
    mod block_graphs;
    mod changes_during_backup;
    mod create_backup_reply;
    mod data_outside_qemu;
    mod descriptors;
    mod encrypted;
    mod failure_modes;
    mod guest_writes;
    mod job_outcomes;
    mod latency;
    mod queue;
    mod root_precedence;
}

mod resources {
    mod limits;
    mod limits_held;
}

mod stored {
    mod backups;
    mod deletion;
    mod history;
    mod merging;
    mod protection;
    mod prune;
    mod restore;
    mod stale_catalog;
    mod stored_backups;
    mod verify;
}

mod targets {
    mod file_systems;
    mod foreign_headers;
    mod image_locks;
    mod refused_targets;
}

mod vms {
    mod domains;
    mod identity;
    mod monitor_paths;
    mod registered;
}
