//! The command line: commands, options and help texts.

use std::path::PathBuf;

use backupd::model;
use clap::builder::NonEmptyStringValueParser;
use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum, ValueHint};

use crate::stored::args::{Export, Restore, Verify};
use crate::{instance, units};

/// Back up running QEMU virtual machines through backupd
#[derive(Debug, Parser)]
#[command(name = "backupctl", version, max_term_width = 100)]
pub struct Cli {
    /// Write JSON instead of text
    #[arg(long, global = true, display_order = 900)]
    pub json: bool,
    /// Fail instead of asking for a password
    #[arg(long, global = true, display_order = 900)]
    pub no_ask_password: bool,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
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
    /// Without options it copies every writable disk into the default store, as the disk is at one point in time. If
    /// the changes since the newest backup there are known, it copies only these, else the whole disk.
    Create(Box<Create>),
    /// List running and recent jobs
    Jobs {
        /// List all recorded jobs
        #[arg(long)]
        all: bool,
    },
    /// Show a job
    Show {
        /// The job number
        job: u32,
    },
    /// Follow a job until it ends, or all jobs until interrupted
    ///
    /// With a job number, the exit status is the result of the job.
    Watch {
        /// The job number
        job: Option<u32>,
    },
    /// Cancel a job
    Cancel {
        /// The job number
        job: u32,
        /// Cancel this disk, and with it the whole job
        #[arg(long)]
        disk: Option<String>,
    },
    /// Change the speed limit of a running job
    Speed {
        /// The job number
        job: u32,
        /// Bytes per second for all disks together, such as 50M; 0: no limit
        #[arg(value_parser = units::parse_size)]
        limit: u64,
    },
    /// Print the document of a job, with all defaults filled in
    Dump {
        /// The job number
        job: u32,
    },
    /// List stored backups as a tree
    Backups {
        /// Only backups of this VM, by name or UUID
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        domain: Option<String>,
        /// Only backups in this store
        #[arg(long, value_name = "STORE", conflicts_with = "from", value_parser = NonEmptyStringValueParser::new())]
        store: Option<String>,
        /// Read the store in this directory, without the service
        #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
        from: Option<PathBuf>,
    },
    /// Delete backups from their stores
    ///
    /// A backup with dependents is kept, unless you name its dependents too, or give --with-dependents or --merge.
    /// Dependents are deleted before their base.
    Delete {
        /// Ids of the backups, or unique beginnings of ids
        ///
        /// The beginning needs at least date and time, as in 20261101T000000Z.
        #[arg(required = true)]
        backups: Vec<String>,
        /// Delete all their dependents too
        #[arg(long)]
        with_dependents: bool,
        /// Make dependents independent first (copies data)
        #[arg(long, conflicts_with = "with_dependents")]
        merge: bool,
        /// Print the backups without deleting them
        #[arg(long)]
        dry_run: bool,
    },
    /// Protect backups from deletion and pruning
    ///
    /// A file beside the manifest of each backup marks it as protected, for every service that uses the store. You need
    /// the permission to delete the backups.
    Protect {
        /// Ids of the backups, or unique beginnings of ids
        #[arg(required = true)]
        backups: Vec<String>,
    },
    /// End the protection of backups
    Unprotect {
        /// Ids of the backups, or unique beginnings of ids
        #[arg(required = true)]
        backups: Vec<String>,
    },
    /// Delete the backups that no keep rule keeps
    ///
    /// Without --keep options, the configured keep rules of each store apply. The bases of a kept backup are kept.
    Prune(Prune),
    /// List the checkpoints of a VM
    Checkpoints {
        /// The name or UUID of the VM
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        domain: String,
    },
    /// Create, delete or dump a checkpoint
    #[command(subcommand, subcommand_value_name = "ACTION")]
    Checkpoint(CheckpointCommand),
    /// Rescan the stores and update the catalog
    ///
    /// Use it after the catalog was lost, and for a store from another host. Keep rules apply only to backups that this
    /// service made. With --adopt, they apply to all backups that are in the stores now.
    Rescan {
        /// Apply the keep rules to backups of other services too
        #[arg(long)]
        adopt: bool,
    },
    /// Restore disks from a backup
    ///
    /// Each disk becomes one image without a backing file, as the disk was at the point in time of the backup.
    ///
    /// The service reads the backup, if polkit allows it. With --from, backupctl reads the store itself: that needs no
    /// service, only the right to read the files of the store.
    Restore(Box<Restore>),
    /// Verify that backups are not damaged
    ///
    /// It checks the backup and all its bases: the manifests, the chain, and the digest and structure of each image. It
    /// changes nothing.
    Verify(Verify),
    /// Serve the disks of a backup read-only over NBD
    ///
    /// It prints an NBD URI for each disk, and serves until you interrupt it. Copy files from it, or start a VM with an
    /// overlay on it.
    Export(Export),
    /// Print the completions for a shell
    #[command(hide = true)]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the manual pages into man1 and man5 of a directory
    #[command(hide = true)]
    Man {
        /// The directory
        dir: PathBuf,
    },
}

/// The options of `prune`.
#[derive(Debug, Args)]
pub struct Prune {
    /// Only backups of this VM, by name or UUID
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub domain: Option<String>,
    /// Only backups in this store
    #[arg(long, value_name = "STORE", value_parser = NonEmptyStringValueParser::new())]
    pub store: Option<String>,
    /// Keep the newest N backups
    #[arg(long, value_name = "N")]
    pub keep_last: Option<u32>,
    /// Keep the newest backup of each of the last N hours with one
    #[arg(long, value_name = "N")]
    pub keep_hourly: Option<u32>,
    /// Keep the newest backup of each of the last N days with one
    #[arg(long, value_name = "N")]
    pub keep_daily: Option<u32>,
    /// Keep the newest backup of each of the last N weeks with one
    #[arg(long, value_name = "N")]
    pub keep_weekly: Option<u32>,
    /// Keep the newest backup of each of the last N months with one
    #[arg(long, value_name = "N")]
    pub keep_monthly: Option<u32>,
    /// Keep the newest backup of each of the last N years with one
    #[arg(long, value_name = "N")]
    pub keep_yearly: Option<u32>,
    /// Print the decisions without deleting backups
    #[arg(long)]
    pub dry_run: bool,
}

impl Prune {
    /// The given keep rules, by the option names of the D-Bus call.
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
        /// The name or UUID of the VM
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        domain: String,
        /// The name of the checkpoint [default: a unique one]
        #[arg(long)]
        name: Option<String>,
        /// A description
        #[arg(long, value_name = "TEXT")]
        description: Option<String>,
        /// Only this disk; repeat the option for more disks
        ///
        /// Without the option, all disks that can have a checkpoint get one.
        #[arg(long)]
        disk: Vec<String>,
    },
    /// Delete a checkpoint from the disks and keep its backup
    Delete {
        /// The name or UUID of the VM
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        domain: String,
        /// The name of the checkpoint, or the id of its backup
        #[arg(required_unless_present = "all")]
        name: Option<String>,
        /// Delete all checkpoints that this service has on the disks
        #[arg(long, conflicts_with = "name")]
        all: bool,
    },
    /// Print the document of a checkpoint
    Dump {
        /// The name or UUID of the VM
        #[arg(value_parser = NonEmptyStringValueParser::new())]
        domain: String,
        /// The name of the checkpoint, or the id of its backup
        name: String,
    },
}

/// The options of `create`.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("place").args(["store", "to", "disk", "definition"])))]
#[command(group(ArgGroup::new("named_files").args(["to", "disk"])))]
pub struct Create {
    /// The name or UUID of the VM
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub domain: String,
    /// Read DOMAIN as the instance of backupd-backup@.service, as systemd-escape writes it
    #[arg(long, hide = true)]
    pub instance: bool,
    /// Write into this store
    #[arg(long, value_name = "STORE", value_parser = NonEmptyStringValueParser::new())]
    pub store: Option<String>,
    /// Write one image per disk into this directory
    ///
    /// The files are called DIR/DISK.FORMAT.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub to: Option<PathBuf>,
    /// Copy this disk to a file or block device
    ///
    /// Repeat the option for more disks. Other disks are not copied.
    #[arg(long, value_name = "DISK=FILE", value_parser = parse_disk, value_hint = ValueHint::FilePath)]
    pub disk: Vec<DiskFile>,
    /// Send this <domainbackup> document; - reads standard input
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath,
        conflicts_with_all = ["format", "compress", "own_files"])]
    pub definition: Option<PathBuf>,
    /// The format of the images [default: qcow2]
    #[arg(long, value_enum)]
    pub format: Option<Format>,
    /// Compress the images (qcow2 only)
    #[arg(long, value_enum, value_name = "METHOD")]
    pub compress: Option<Compress>,
    /// Copy the whole disks, or changes since a base [default: auto]
    ///
    /// "full" copies the whole disks. The name of a checkpoint or the id of a backup selects the base. "auto" uses the
    /// newest backup in the store as base, if the changes since then are known.
    #[arg(long, value_name = "auto|full|CHECKPOINT", conflicts_with = "named_files")]
    pub incremental: Option<String>,
    /// Name the checkpoint of the backup, or make none ("no")
    ///
    /// By default a backup in a store begins a checkpoint with the name of the backup.
    #[arg(long, value_name = "NAME|no", conflicts_with = "named_files")]
    pub checkpoint: Option<String>,
    /// Limit bytes per second for all disks together, such as 50M
    #[arg(long, value_name = "N", value_parser = units::parse_size)]
    pub bandwidth: Option<u64>,
    /// Slow down while guest writes take longer than MS milliseconds
    ///
    /// 0 disables it. The default is set in the configuration.
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u32).range(0..=60_000))]
    pub max_latency: Option<u32>,
    /// Write into existing targets
    #[arg(long)]
    pub reuse_external: bool,
    /// Freeze the guest's file systems through its agent
    #[arg(long, value_enum, value_name = "MODE")]
    pub quiesce: Option<Quiesce>,
    /// Let QEMU exit on a guest's power-off, which fails the backup
    #[arg(long)]
    pub allow_poweroff: bool,
    /// Fail if the VM has data that no backup can hold
    ///
    /// An example is a vhost-user disk, which QEMU cannot read.
    #[arg(long)]
    pub require_all_disks: bool,
    /// Open the target files as yourself, so that you own them
    #[arg(long, requires = "named_files")]
    pub own_files: bool,
    /// Don't wait for the end of the backup
    #[arg(long)]
    pub detach: bool,
}

/// One `--disk NAME=FILE`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskFile {
    /// The disk's name.
    pub disk: String,
    /// The target of its data.
    pub file: PathBuf,
}

/// A file name can contain `=`; the name of a disk cannot.
pub fn parse_disk(text: &str) -> Result<DiskFile, String> {
    match text.split_once('=') {
        Some((disk, file)) if !disk.is_empty() && !file.is_empty() => Ok(DiskFile {
            disk: disk.to_owned(),
            file: file.into(),
        }),
        _ => Err("expected DISK=FILE, such as vda=/backup/vda.qcow2".to_owned()),
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

impl From<Format> for model::Format {
    fn from(format: Format) -> Self {
        match format {
            Format::Qcow2 => Self::Qcow2,
            Format::Raw => Self::Raw,
        }
    }
}

/// A compression method of qcow2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Compress {
    /// Fast and strong
    Zstd,
    /// For readers older than QEMU 5.1
    Zlib,
}

impl From<Compress> for model::Compression {
    fn from(compress: Compress) -> Self {
        match compress {
            Compress::Zstd => Self::Zstd,
            Compress::Zlib => Self::Zlib,
        }
    }
}

/// The importance of a file system freeze.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Quiesce {
    /// Do not freeze
    No,
    /// Freeze if the guest can, else continue
    Try,
    /// Freeze, or fail
    Require,
}

impl Quiesce {
    /// The word in the options of the call.
    pub fn word(self) -> &'static str {
        match self {
            Self::No => "no",
            Self::Try => "try",
            Self::Require => "require",
        }
    }
}

impl Cli {
    /// Parses the arguments, and checks rules that clap cannot express.
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

    /// Replaces the unit's instance by the name that it encodes.
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
                "raw images cannot be compressed: use --format qcow2 or remove --compress".to_owned(),
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
    fn the_instance_of_a_unit_is_decoded_to_a_name() {
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
    fn an_empty_name_does_not_select_every_vm() {
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
    fn missing_and_malformed_arguments_are_usage_errors() {
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
    fn every_option_of_create_is_parsed() {
        let create = create(
            "backupctl create web --disk a=x=y --disk b=z --format qcow2 --compress zlib --bandwidth 1.5M --max-latency 10 \
             --reuse-external --quiesce require --own-files --detach --json",
        );
        assert_eq!(create.disk[0].disk, "a");
        assert_eq!(create.disk[0].file, PathBuf::from("x=y"));
        assert_eq!(create.disk.len(), 2);
        assert_eq!(create.bandwidth, Some(3 << 19));
        assert_eq!(create.max_latency, Some(10));
        assert_eq!(create.compress, Some(Compress::Zlib));
        assert_eq!(create.quiesce.map(Quiesce::word), Some("require"));
        assert!(create.own_files && create.detach && create.reuse_external);
    }

    #[test]
    fn global_options_are_accepted_anywhere() {
        assert!(parse("backupctl --json jobs").unwrap().json);
        assert!(parse("backupctl jobs --json").unwrap().json);
        assert!(
            parse("backupctl show 3 --no-ask-password")
                .unwrap()
                .no_ask_password
        );
    }

    #[test]
    fn a_definition_allows_options_that_it_does_not_contain() {
        let create =
            create("backupctl create web --definition - --bandwidth 5M --quiesce try --reuse-external");
        assert_eq!(create.definition, Some(PathBuf::from("-")));
    }
}
