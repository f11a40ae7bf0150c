//! The command line.

use std::path::PathBuf;

use clap::builder::NonEmptyStringValueParser;
use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum, ValueHint};

use crate::stored::args::{Export, Restore, Verify};
use crate::{instance, units};

/// Backs up running QEMU virtual machines through the backup service.
#[derive(Debug, Parser)]
#[command(name = "backupctl", version, max_term_width = 100)]
pub struct Cli {
    /// Write JSON instead of text
    #[arg(long, global = true, display_order = 900)]
    pub json: bool,
    /// Fail instead of asking for a password
    #[arg(long, global = true, display_order = 900)]
    pub no_ask_password: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the virtual machines that you may see
    Domains {
        /// List their disks too
        #[arg(long)]
        disks: bool,
    },
    /// Back up a virtual machine
    ///
    /// Without further options, every writable disk is copied to the default store, as it is at the start of the
    /// backup: the changes since the newest backup there if they are known, else the whole disk.
    Create(Box<Create>),
    /// List the jobs that are running or ended a short while ago
    Jobs {
        /// List all that have ended, as long as the service's history goes back
        #[arg(long)]
        all: bool,
    },
    /// Show one job
    Show {
        /// The job's number
        job: u32,
    },
    /// Follow a job until it ends, or all jobs until interrupted
    ///
    /// With a job's number, the exit status is the job's result.
    Watch {
        /// The job's number
        job: Option<u32>,
    },
    /// Cancel a job
    Cancel {
        /// The job's number
        job: u32,
        /// Cancel this disk, and with it the whole job
        #[arg(long)]
        disk: Option<String>,
    },
    /// Change the speed limit of a running job
    Speed {
        /// The job's number
        job: u32,
        /// Bytes a second for all disks together, such as 50M; 0 for no limit
        #[arg(value_parser = units::parse_size)]
        limit: u64,
    },
    /// Print the document of a job, with all defaults filled in
    Dump {
        /// The job's number
        job: u32,
    },
    /// List stored backups as a tree
    Backups {
        /// Only those of this virtual machine: its name or UUID
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        domain: Option<String>,
        /// Only those in this store
        #[arg(long, value_name = "STORE", conflicts_with = "from", value_parser = NonEmptyStringValueParser::new())]
        store: Option<String>,
        /// Read the store in this directory, without the service
        #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
        from: Option<PathBuf>,
    },
    /// Delete backups from their stores
    ///
    /// Dependents are deleted first. A backup with dependents stays, unless these are named too, or
    /// --with-dependents or --merge is given.
    Delete {
        /// The backups: their ids, or at least the date and time of each (20261101T000000Z)
        #[arg(required = true)]
        backups: Vec<String>,
        /// Delete all their dependents too
        #[arg(long)]
        with_dependents: bool,
        /// Make their dependents independent first; takes time and space
        #[arg(long, conflicts_with = "with_dependents")]
        merge: bool,
        /// Only show what would be deleted
        #[arg(long)]
        dry_run: bool,
    },
    /// Protect backups from deletion, by users and by rules
    ///
    /// A file beside each backup's manifest says so, to every service that uses the store. Needs the right to delete them.
    Protect {
        /// The backups: their ids, or the beginnings of them
        #[arg(required = true)]
        backups: Vec<String>,
    },
    /// Let backups be deleted again
    Unprotect {
        /// The backups: their ids, or the beginnings of them
        #[arg(required = true)]
        backups: Vec<String>,
    },
    /// Delete the backups that no rule keeps
    ///
    /// Without any of the --keep options, the rules of each store in the service's configuration count. The bases of a
    /// kept backup are kept.
    Prune(Prune),
    /// List the checkpoints that a virtual machine's disks have now
    Checkpoints {
        /// The virtual machine's name or UUID
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        domain: String,
    },
    /// Make a checkpoint without a backup, remove one, or show its document
    #[command(subcommand, subcommand_value_name = "ACTION")]
    Checkpoint(CheckpointCommand),
    /// Read the stores again, and update the records of backups
    ///
    /// For a service that lost its catalog, and for stores from another host. The keep rules apply only to
    /// backups that this service made: with --adopt, to all that are in the stores now.
    Rescan {
        /// Apply the keep rules to backups of other services too
        #[arg(long)]
        adopt: bool,
    },
    /// Restore disks from a backup
    ///
    /// Each disk becomes one image without a backing file, as the disk was at the backup's point in time.
    /// The backup is only read. The service reads it, if polkit allows it. With --from this program reads the store
    /// itself: that needs no service, and no right but to read the store's files.
    Restore(Box<Restore>),
    /// Verify that backups are not damaged
    ///
    /// Checks the manifests, the chain, and each image's digest and structure, of the backup and of all its bases.
    /// Nothing is changed.
    Verify(Verify),
    /// Serve a backup's disks over NBD, for reading
    ///
    /// Prints an NBD URI a disk and serves until it is interrupted. Copy files from it, or start a VM
    /// with an overlay on it.
    Export(Export),
    /// Print the completions for a shell
    #[command(hide = true)]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages into a directory
    #[command(hide = true)]
    Man {
        /// The directory
        dir: PathBuf,
    },
}

/// The options of `prune`.
#[derive(Debug, Args)]
pub struct Prune {
    /// Only those of this virtual machine: its name or UUID
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub domain: Option<String>,
    /// Only those in this store
    #[arg(long, value_name = "STORE", value_parser = NonEmptyStringValueParser::new())]
    pub store: Option<String>,
    /// Keep the newest N
    #[arg(long, value_name = "N")]
    pub keep_last: Option<u32>,
    /// Keep the newest of each of the last N hours that have one
    #[arg(long, value_name = "N")]
    pub keep_hourly: Option<u32>,
    /// Keep the newest of each of the last N days that have one
    #[arg(long, value_name = "N")]
    pub keep_daily: Option<u32>,
    /// Keep the newest of each of the last N weeks that have one
    #[arg(long, value_name = "N")]
    pub keep_weekly: Option<u32>,
    /// Keep the newest of each of the last N months that have one
    #[arg(long, value_name = "N")]
    pub keep_monthly: Option<u32>,
    /// Keep the newest of each of the last N years that have one
    #[arg(long, value_name = "N")]
    pub keep_yearly: Option<u32>,
    /// Only show what would be kept and deleted
    #[arg(long)]
    pub dry_run: bool,
}

impl Prune {
    /// The rules that are given, by the names of the call's options.
    pub fn rules(&self) -> Vec<(&'static str, u32)> {
        let rules = [
            ("keep-last", self.keep_last),
            ("keep-hourly", self.keep_hourly),
            ("keep-daily", self.keep_daily),
            ("keep-weekly", self.keep_weekly),
            ("keep-monthly", self.keep_monthly),
            ("keep-yearly", self.keep_yearly),
        ];
        let given = rules.into_iter();
        given.filter_map(|(key, count)| Some((key, count?))).collect()
    }
}

/// The subcommands of `checkpoint`.
#[derive(Debug, Subcommand)]
pub enum CheckpointCommand {
    /// Make a checkpoint without a backup
    Create {
        /// The virtual machine's name or UUID
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        domain: String,
        /// Its name [default: a unique one]
        #[arg(long)]
        name: Option<String>,
        /// Its description
        #[arg(long, value_name = "TEXT")]
        description: Option<String>,
        /// Only on this disk; can be given once for each disk [default: all that can have one]
        #[arg(long)]
        disk: Vec<String>,
    },
    /// Remove a checkpoint from the disks; its backup stays
    Delete {
        /// The virtual machine's name or UUID
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        domain: String,
        /// The checkpoint's name, or the id of its backup
        #[arg(required_unless_present = "all")]
        name: Option<String>,
        /// Remove all checkpoints that this service has on the disks
        #[arg(long, conflicts_with = "name")]
        all: bool,
    },
    /// Print the document of a checkpoint
    Dump {
        /// The virtual machine's name or UUID
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        domain: String,
        /// The checkpoint's name, or the id of its backup
        name: String,
    },
}

/// The options of `create`.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("place").args(["store", "to", "disk", "definition"])))]
#[command(group(ArgGroup::new("named_files").args(["to", "disk"])))]
pub struct Create {
    /// The virtual machine's name or UUID
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub domain: String,
    /// The name is the instance of a unit (backupd-backup@.service), as systemd-escape makes it
    #[arg(long, hide = true)]
    pub instance: bool,
    /// Let the service choose the files, in this store
    #[arg(long, value_name = "STORE", value_parser = NonEmptyStringValueParser::new())]
    pub store: Option<String>,
    /// Write one image a disk into this directory, as DIR/DISK.FORMAT
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub to: Option<PathBuf>,
    /// Copy only this disk, into this file or block device; can be given once for each disk
    #[arg(long, value_name = "DISK=FILE", value_parser = parse_disk, value_hint = ValueHint::FilePath)]
    pub disk: Vec<DiskFile>,
    /// Send this <domainbackup> document as it is; - reads standard input
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath,
        conflicts_with_all = ["format", "compress", "own_files"])]
    pub definition: Option<PathBuf>,
    /// The format of the images [default: qcow2]
    #[arg(long, value_enum)]
    pub format: Option<Format>,
    /// Compress the images, which have to be qcow2
    #[arg(long, value_enum, value_name = "METHOD")]
    pub compress: Option<Compress>,
    /// Copy all ("full"), or the changes since this checkpoint or backup [default: auto]
    #[arg(long, value_name = "auto|full|CHECKPOINT", conflicts_with = "named_files")]
    pub incremental: Option<String>,
    /// Name the backup's checkpoint in a store, or make none ("no") [default: as the backup]
    #[arg(long, value_name = "NAME|no", conflicts_with = "named_files")]
    pub checkpoint: Option<String>,
    /// Write at most so many bytes a second, all disks together, such as 50M
    #[arg(long, value_name = "N", value_parser = units::parse_size)]
    pub bandwidth: Option<u64>,
    /// Go slower while the guest's writes take longer than so many ms; 0: no limit [default: as configured]
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u32).range(0..=60_000))]
    pub max_latency: Option<u32>,
    /// Write into targets that exist instead of making new ones
    #[arg(long)]
    pub reuse_external: bool,
    /// Freeze the guest's file systems through its agent: try it, or fail without it
    #[arg(long, value_enum, value_name = "MODE")]
    pub quiesce: Option<Quiesce>,
    /// Let QEMU end if its guest powers off, which fails the backup
    #[arg(long)]
    pub allow_poweroff: bool,
    /// Fail if the VM has data that no backup can hold, such as a vhost-user disk
    #[arg(long)]
    pub require_all_disks: bool,
    /// Open the target files with your own rights, so that they belong to you
    #[arg(long, requires = "named_files")]
    pub own_files: bool,
    /// Don't wait until the backup has ended
    #[arg(long)]
    pub detach: bool,
}

/// One `--disk NAME=FILE`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskFile {
    /// The disk's name.
    pub disk: String,
    /// Where its data goes.
    pub file: PathBuf,
}

/// A file can have `=` in its name, a disk can't here.
pub fn parse_disk(text: &str) -> Result<DiskFile, String> {
    match text.split_once('=') {
        Some((disk, file)) if !disk.is_empty() && !file.is_empty() => Ok(DiskFile {
            disk: disk.to_owned(),
            file: file.into(),
        }),
        _ => Err("expected the disk's name, \"=\" and a file, as in vda=/backup/vda.qcow2".to_owned()),
    }
}

/// An image format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// QEMU's own format
    Qcow2,
    /// A plain copy of the disk
    Raw,
}

impl Format {
    /// The word in documents and file names.
    pub fn word(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

/// A way to compress qcow2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Compress {
    /// Fast and good
    Zstd,
    /// For readers older than QEMU 5.1
    Zlib,
}

impl Compress {
    /// The word in documents.
    pub fn word(self) -> &'static str {
        match self {
            Self::Zstd => "zstd",
            Self::Zlib => "zlib",
        }
    }
}

/// How much freezing the guest's file systems matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Quiesce {
    /// Don't
    No,
    /// Go on without if the guest can't
    Try,
    /// Fail if the guest can't
    Require,
}

impl Quiesce {
    /// The word in the call's options.
    pub fn word(self) -> &'static str {
        match self {
            Self::No => "no",
            Self::Try => "try",
            Self::Require => "require",
        }
    }
}

impl Cli {
    /// Parses the program's arguments, and checks what clap's own rules can't say.
    pub fn parse_checked(args: impl IntoIterator<Item = std::ffi::OsString>) -> Result<Self, clap::Error> {
        let mut cli = Self::try_parse_from(args)?;
        if let Command::Create(create) = &mut cli.command {
            create.check()?;
            create.resolve()?;
        }
        Ok(cli)
    }
}

impl Create {
    fn fail<T>(kind: clap::error::ErrorKind, message: String) -> Result<T, clap::Error> {
        use clap::CommandFactory;
        let mut command = Cli::command();
        command.build();
        let create = command
            .find_subcommand_mut("create")
            .map(|create| create.error(kind, &message));
        Err(create.unwrap_or_else(|| clap::Error::raw(kind, message)))
    }

    /// Puts the name in the place of what stands for it.
    fn resolve(&mut self) -> Result<(), clap::Error> {
        if self.instance {
            self.domain = match instance::name(&self.domain) {
                Ok(name) => name,
                Err(why) => return Self::fail(clap::error::ErrorKind::InvalidValue, why),
            };
        }
        Ok(())
    }

    fn check(&self) -> Result<(), clap::Error> {
        if self.compress.is_some() && self.format == Some(Format::Raw) {
            return Self::fail(
                clap::error::ErrorKind::ArgumentConflict,
                "raw images can't be compressed: --compress goes with --format qcow2 only".to_owned(),
            );
        }
        for (index, disk) in self.disk.iter().enumerate() {
            if self.disk[..index].iter().any(|earlier| earlier.disk == disk.disk) {
                return Self::fail(
                    clap::error::ErrorKind::ArgumentConflict,
                    format!("disk {:?} is given twice", disk.disk),
                );
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::parse_checked(line.split(' ').map(Into::into))
    }

    fn create(line: &str) -> Create {
        match parse(line).unwrap().command {
            Command::Create(create) => *create,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_definition_of_the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_instance_of_a_unit_is_the_name_that_it_stands_for() {
        let named = |line: &str| create(line).domain;
        assert_eq!(
            named(r"backupctl create --instance -- web\x20server-1"),
            "web server-1"
        );
        assert_eq!(named(r"backupctl create -- web\x20server-1"), r"web\x20server-1");
        let error = parse(r"backupctl create --instance web\x2").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidValue);
    }

    #[test]
    fn options_that_exclude_each_other_are_usage_errors() {
        let conflicts = [
            "--store s --to d",
            "--store s --disk a=b",
            "--to d --disk a=b",
            "--definition f --store s",
            "--definition f --to d",
            "--definition f --disk a=b",
            "--definition f --format raw",
            "--definition f --compress zstd",
            "--definition f --own-files",
            "--to d --format raw --compress zstd",
            "--disk a=b --disk a=c",
        ];
        for options in conflicts {
            let error = parse(&format!("backupctl create web {options}")).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ArgumentConflict, "{options}");
            assert_eq!(error.exit_code(), 2, "{options}");
        }
    }

    #[test]
    fn an_empty_name_is_not_every_virtual_machine() {
        for line in [
            &["prune", "", "--keep-last", "1"][..],
            &["prune", "--store", ""],
            &["backups", ""],
            &["create", ""],
            &["create", "web", "--store", ""],
            &["checkpoint", "delete", "", "--all"],
        ] {
            let line = ["backupctl"].iter().chain(line).map(Into::into);
            let error = Cli::parse_checked(line).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidValue, "{error}");
        }
    }

    #[test]
    fn what_is_missing_or_malformed_is_a_usage_error() {
        let lines = [
            "backupctl",
            "backupctl create",
            "backupctl create web --own-files",
            "backupctl create web --store s --own-files",
            "backupctl create web --disk vda",
            "backupctl create web --disk =x",
            "backupctl create web --disk a=",
            "backupctl create web --bandwidth fast",
            "backupctl create web --max-latency 60001",
            "backupctl create web --max-latency 5ms",
            "backupctl create web --format vmdk",
            "backupctl create web --quiesce maybe",
            "backupctl show",
            "backupctl show web",
            "backupctl speed 1",
            "backupctl show 4294967296",
        ];
        for line in lines {
            assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn every_option_of_create_is_read() {
        let create = create(
            "backupctl create web --disk a=x=y --disk b=z --format qcow2 --compress zlib --bandwidth 1.5M --max-latency 10 \
             --reuse-external --quiesce require --own-files --detach --json",
        );
        assert_eq!(create.disk[0].disk, "a");
        assert_eq!(create.disk[0].file, PathBuf::from("x=y"));
        assert_eq!(create.disk.len(), 2);
        assert_eq!(create.bandwidth, Some(3 << 19));
        assert_eq!(create.max_latency, Some(10));
        assert_eq!(create.compress.map(Compress::word), Some("zlib"));
        assert_eq!(create.quiesce.map(Quiesce::word), Some("require"));
        assert!(create.own_files && create.detach && create.reuse_external);
    }

    #[test]
    fn what_applies_to_all_commands_can_stand_anywhere() {
        assert!(parse("backupctl --json jobs").unwrap().json);
        assert!(parse("backupctl jobs --json").unwrap().json);
        assert!(
            parse("backupctl show 3 --no-ask-password")
                .unwrap()
                .no_ask_password
        );
    }

    #[test]
    fn a_definition_goes_with_what_is_not_in_it() {
        let create =
            create("backupctl create web --definition - --bandwidth 5M --quiesce try --reuse-external");
        assert_eq!(create.definition, Some(PathBuf::from("-")));
    }
}
