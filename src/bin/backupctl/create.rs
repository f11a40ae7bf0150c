//! `backupctl create`: builds the request, starts the backup, and waits for it.

use std::collections::HashMap;
use std::io::{self, IsTerminal};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use backupd::definition::{Definition, DiskDefinition, Position, StoreRef, Target};
use backupd::model::{self, Compression};
use serde_json::json;
use zbus::Variant;

use crate::agent::Agent;
use crate::args::Create;
use crate::document;
use crate::error::{Error, Result, Status};
use crate::files::OwnFiles;
use crate::follow::{Ending, Follow, OnInterrupt};
use crate::found;
use crate::interrupt::{Interrupt, Interrupts};
use crate::output;
use crate::proxy::{CONFIGURED, DomainDisk, Job, Service};
use crate::summary::Summary;
use crate::view::{self, View};

/// Timeout for a pending reply after a signal.
const LAST_ANSWER: Duration = Duration::from_secs(2);

pub async fn run(service: &Service, args: &Create, json: bool, ask_password: bool) -> Result<Status> {
    let prepared = Prepared::new(service, args).await?;
    let mut interrupts = Interrupts::catch().map_err(Error::Setup)?;
    let files = match args.own_files {
        true => OwnFiles::open(
            prepared.files.iter().map(|(_, path)| path.as_path()),
            args.reuse_external,
        )?,
        false => OwnFiles::default(),
    };
    let agent = Agent::start(ask_password).await;
    let (job, interrupted) = start(service, args, &prepared, &files, &mut interrupts).await?;
    // Measured from here, because the user may have needed time for a password.
    let begun = Instant::now();
    // From here on the progress uses the terminal. The starter needs no password to cancel.
    drop(agent);
    if json {
        view::event(json!({ "event": "started", "id": job.id, "path": job.path }));
    }
    if args.detach {
        files.keep();
        if !json {
            output::print(&format!("Job {} started: {}\n", job.id, job.path))?;
        }
        return Ok(Status::Completed);
    }
    let mut view = view::choose(json, io::stderr().is_terminal());
    if !json {
        let domain = output::escape(&args.domain);
        view.note(&format!("Job {} of {domain} started", job.id));
    }
    let ending = match interrupted {
        Some(Interrupt::Terminate) => Ok((Ending::Detached, None)),
        _ => follow(service, &job, view.as_mut(), interrupted, &mut interrupts).await,
    };
    let ending = match ending {
        Ok(ending) => ending,
        Err(error) => {
            // The job's fate is unknown, so its files must remain.
            files.keep();
            return Err(error);
        }
    };
    match ending {
        (Ending::Ended(outcome), snapshot) => {
            if outcome.result == "completed" {
                files.keep();
            }
            let summary = Summary {
                snapshot: &snapshot.unwrap_or_default(),
                outcome: &outcome,
                took: Some(begun.elapsed()),
                own_targets: &prepared.own_targets(args),
            };
            summary.print(json)
        }
        (Ending::Detached, _) => {
            files.keep();
            left(job.id, json);
            Ok(Status::Failed)
        }
    }
}

/// Reports that the backup continues without the client.
pub fn left(id: u32, json: bool) {
    if json {
        view::event(json!({ "event": "detached", "id": id }));
    } else {
        output::complain(&format!(
            "Job {id} continues. `backupctl watch {id}` follows it, `backupctl cancel {id}` cancels it."
        ));
    }
}

async fn follow(
    service: &Service,
    job: &Job,
    view: &mut dyn View,
    interrupted: Option<Interrupt>,
    interrupts: &mut Interrupts,
) -> Result<(Ending, Option<crate::job::Snapshot>)> {
    let mut follow = Follow::new(job, view, OnInterrupt::Backup).await?;
    if let Some(interrupt) = interrupted {
        follow.interrupt(interrupt);
    }
    let ending = follow.run(service, interrupts).await?;
    Ok((ending, Some(follow.snapshot)))
}

/// Starts the backup. If a signal arrives first, waits for the pending reply and returns job and signal. Exiting at
/// once could leave a backup that the user does not know of.
async fn start(
    service: &Service,
    args: &Create,
    prepared: &Prepared,
    files: &OwnFiles,
    interrupts: &mut Interrupts,
) -> Result<(Job, Option<Interrupt>)> {
    let mut options = options(args);
    if let Some(checkpoint) = &prepared.checkpoint {
        options.insert("checkpoint", Variant::from(checkpoint.clone()));
    }
    if args.instance {
        // An administrator's timer backs up only configured VMs.
        let (source, _) = service.source(&service.domain(&args.domain).await?).await?;
        if source != CONFIGURED {
            return Err(Error::NotConfigured(args.domain.clone()));
        }
    }
    let since = jiff::Timestamp::now();
    let call = service.create_backup(&args.domain, &prepared.document, files.descriptors(), options);
    let call = async {
        match call.await {
            Err(error) if error.is_in_doubt() => found::started(service, &args.domain, since, error).await,
            started => started,
        }
    };
    tokio::pin!(call);
    let interrupt = tokio::select! {
        job = &mut call => return Ok((job?, None)),
        interrupt = interrupts.next() => interrupt,
    };
    match tokio::time::timeout(LAST_ANSWER, call).await {
        Ok(job) => Ok((job?, Some(interrupt))),
        Err(_) => Err(Error::Interrupted),
    }
}

fn options(args: &Create) -> HashMap<&'static str, Variant<'static>> {
    let mut options = HashMap::new();
    if args.reuse_external {
        options.insert("reuse-external", Variant::from(true));
    }
    if let Some(bandwidth) = args.bandwidth {
        options.insert("bandwidth", Variant::from(bandwidth));
    }
    if let Some(most) = args.max_latency {
        options.insert("max-latency", Variant::from(u64::from(most)));
    }
    if args.require_all_disks {
        options.insert("require-all-disks", Variant::from(true));
    }
    if args.allow_poweroff {
        options.insert("allow-poweroff", Variant::from(true));
    }
    if let Some(incremental) = &args.incremental {
        options.insert("incremental", Variant::from(incremental.clone()));
    }
    if let Some(quiesce) = args.quiesce {
        options.insert("quiesce", Variant::from(quiesce.word()));
    }
    options
}

/// The document, and the files that it names, each with its disk.
struct Prepared {
    document: String,
    /// The value of the `checkpoint` option.
    checkpoint: Option<String>,
    files: Vec<(String, PathBuf)>,
}

impl Prepared {
    async fn new(service: &Service, args: &Create) -> Result<Self> {
        let checkpoint = match args.checkpoint.as_deref() {
            Some("no") => Some("no".to_owned()),
            Some(name) => Some(document::checkpoint(Some(name), None, &[])?),
            None => None,
        };
        let prepared = Self::document(service, args).await?;
        Ok(Self {
            checkpoint,
            ..prepared
        })
    }

    async fn document(service: &Service, args: &Create) -> Result<Self> {
        if let Some(path) = &args.definition {
            return Ok(Self {
                document: document::read(path)?,
                checkpoint: None,
                files: Vec::new(),
            });
        }
        // Only needed if the document must list every disk.
        let named =
            args.to.is_some() || args.disk.is_empty() && (args.format.is_some() || args.compress.is_some());
        let disks = match named {
            true => service.disks(&service.domain(&args.domain).await?).await?,
            false => Vec::new(),
        };
        Self::make(args, &disks)
    }

    fn make(args: &Create, disks: &[DomainDisk]) -> Result<Self> {
        let format = args.format.map(model::Format::from);
        let compress = args.compress.map(Compression::from);
        let copied = disks.iter().filter(|disk| disk.left_out.is_empty());
        let mut files: Vec<(String, PathBuf)> = Vec::new();
        if let Some(dir) = &args.to {
            for disk in copied.clone() {
                let file = file_name(&disk.name, format.unwrap_or(model::Format::Qcow2))?;
                files.push((disk.name.clone(), absolute(&dir.join(file))?));
            }
            if files.is_empty() {
                return Err(Error::Usage(format!(
                    "{} has no writable disk with a medium",
                    args.domain
                )));
            }
        }
        for disk in &args.disk {
            files.push((disk.disk.clone(), absolute(&disk.file)?));
        }
        let disk = |name: &str, target| DiskDefinition {
            // Only qcow2 supports compression.
            format: format.or(compress.map(|_| model::Format::Qcow2)),
            compress,
            target,
            ..DiskDefinition::new(name)
        };
        let mut listed = Vec::new();
        for (index, (name, path)) in (0..).zip(&files) {
            let target = match args.own_files {
                true => Target::Fd(index),
                false => target(path)?,
            };
            listed.push(disk(name, Some(target)));
        }
        if files.is_empty() {
            listed = copied.map(|copied| disk(&copied.name, None)).collect();
        }
        let definition = Definition {
            store: args.store.clone().map(|name| StoreRef {
                name,
                at: Position::default(),
            }),
            disks: (!listed.is_empty()).then_some(listed),
            ..Definition::default()
        };
        Ok(Self {
            checkpoint: None,
            document: document::backup(&definition)?,
            files,
        })
    }

    fn own_targets(&self, args: &Create) -> Vec<(String, String)> {
        let files = self.files.iter().filter(|_| args.own_files);
        files
            .map(|(disk, path)| (disk.clone(), path.display().to_string()))
            .collect()
    }
}

/// The file name for a disk. QEMU chooses the disk's name, so the file name must not lead out of the directory.
pub fn file_name(disk: &str, format: model::Format) -> Result<String> {
    if disk.is_empty() || disk.starts_with('.') || disk.contains(['/', '\0']) {
        return Err(Error::Usage(format!(
            "the name of disk \"{disk}\" cannot be a file name: use --disk to choose one"
        )));
    }
    Ok(format!("{disk}.{}", format.as_str()))
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|error| Error::Usage(format!("{}: {error}", path.display())))
}

/// The document contains the path as text, and the service opens it.
fn target(path: &Path) -> Result<Target> {
    if path.to_str().is_none() {
        return Err(Error::Usage(format!(
            "{} is not valid UTF-8: use --own-files",
            path.display()
        )));
    }
    // A path that the client cannot examine counts as a file. The service examines it itself.
    let block = path
        .metadata()
        .is_ok_and(|metadata| metadata.file_type().is_block_device());
    Ok(match block {
        true => Target::Block(path.to_owned()),
        false => Target::File(path.to_owned()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cli, Command};
    use backupd::definition;

    fn create(options: &str) -> Create {
        let line = format!("backupctl create web {options}");
        match Cli::parse_checked(line.split_whitespace().map(Into::into))
            .unwrap()
            .command
        {
            Command::Create(create) => *create,
            other => panic!("{other:?}"),
        }
    }

    fn disk(name: &str, node: &str, writable: bool, left_out: &str) -> DomainDisk {
        DomainDisk {
            name: name.into(),
            node: node.into(),
            size: 1,
            format: "raw".into(),
            writable,
            left_out: left_out.into(),
            encrypted: false,
        }
    }

    fn made(options: &str) -> Definition {
        let disks = [
            disk("vda", "n0", true, ""),
            disk("vdb", "n1", false, "read-only"),
            disk("cd", "", true, "no-medium"),
            disk("vdc", "", true, "vhost-user-blk-pci"),
        ];
        let document = Prepared::make(&create(options), &disks).unwrap().document;
        definition::parse(&document).unwrap()
    }

    /// The selected disks with their formats and targets.
    fn disks(definition: Definition) -> Vec<(String, Option<model::Format>, Option<Target>)> {
        let disks = definition.disks.into_iter().flatten();
        disks.map(|disk| (disk.name, disk.format, disk.target)).collect()
    }

    #[test]
    fn a_directory_gets_each_writable_disk_with_a_medium() {
        let target = Target::File("/backup/vda.raw".into());
        let expected = ("vda".to_owned(), Some(model::Format::Raw), Some(target));
        assert_eq!(disks(made("--to /backup --format raw")), [expected]);
    }

    #[test]
    fn a_relative_path_is_made_absolute() {
        let target = Target::File(std::env::current_dir().unwrap().join("x.qcow2"));
        let expected = ("vdb".to_owned(), None, Some(target));
        assert_eq!(disks(made("--disk vdb=x.qcow2")), [expected]);
    }

    #[test]
    fn a_format_alone_names_the_disks_and_leaves_the_files_to_the_store() {
        let definition = made("--store s --format raw");
        assert_eq!(definition.store.as_ref().unwrap().name, "s");
        let expected = ("vda".to_owned(), Some(model::Format::Raw), None);
        assert_eq!(disks(definition), [expected]);
    }

    #[test]
    fn compression_names_the_format_that_can_be_compressed() {
        let definition = made("--compress zstd");
        let disk = &definition.disks.as_ref().unwrap()[0];
        assert_eq!(disk.compress, Some(Compression::Zstd));
        assert_eq!(disk.format, Some(model::Format::Qcow2));
    }

    #[test]
    fn own_files_are_passed_by_index_in_order() {
        let prepared = Prepared::make(&create("--own-files --disk a=/x/a --disk b=/x/b"), &[]).unwrap();
        let definition = definition::parse(&prepared.document).unwrap();
        let expected =
            [("a", 0), ("b", 1)].map(|(name, index)| (name.to_owned(), None, Some(Target::Fd(index))));
        assert_eq!(disks(definition), expected);
        assert_eq!(prepared.files[1].1, Path::new("/x/b"));
    }

    #[test]
    fn a_disks_name_does_not_lead_out_of_the_directory() {
        for name in ["../evil", "a/b", "..", ""] {
            let result = Prepared::make(&create("--to /backup"), &[disk(name, "n", true, "")]);
            assert!(matches!(result, Err(Error::Usage(_))), "{name}");
        }
    }

    #[test]
    fn a_directory_without_disks_is_an_error() {
        let result = Prepared::make(&create("--to /backup"), &[disk("cd", "", true, "empty")]);
        assert!(matches!(result, Err(Error::Usage(_))));
    }

    #[test]
    fn options_have_the_types_of_the_interface() {
        let options = options(&create(
            "--bandwidth 5M --max-latency 10 --reuse-external --quiesce try --incremental full",
        ));
        assert_eq!(options["incremental"], Variant::from("full"));
        assert_eq!(options["bandwidth"], Variant::U64(5 << 20));
        assert_eq!(options["max-latency"], Variant::U64(10));
        assert_eq!(options["reuse-external"], Variant::Bool(true));
        assert_eq!(options["quiesce"], Variant::from("try"));
    }
}
