//! Verifies stored backups: checks them for damage.
//!
//! Reads each backup once, after its bases, changes nothing, and reports every fault.

use std::collections::{BTreeSet, HashMap};
use std::ops::{ControlFlow, Range};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;
use tokio_util::sync::CancellationToken;

use super::backup::{Image, Location};
use super::chain::{Links, OpenDisk, for_each_link};
use super::{Control, Error, Fault, Finding, Progress, blocking, check};
use crate::digest::{self, Reading, Sha256Hasher, Watch};
use crate::model::{self, Algorithm, Digest, Format};
use crate::qcow2::HeaderError;
use crate::store::{BackupLock, BackupName, Store};

const CHUNK: usize = 1 << 20;

/// The result of verifying one backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    pub location: Location,
    pub findings: Vec<Finding>,
    /// Disks whose image has no checksum in the manifest, because an older version created it.
    pub unrecorded: Vec<String>,
    /// Bytes of the images that were read.
    pub bytes: u64,
}

impl Verified {
    /// Returns true if the backup cannot be restored unchanged.
    pub fn is_damaged(&self) -> bool {
        self.findings.iter().any(|finding| finding.fault.is_damage())
    }

    /// Returns true if the backup was deleted before it could be verified, so nothing is known about it.
    pub fn is_removed(&self) -> bool {
        self.findings
            .iter()
            .any(|finding| finding.fault == Fault::Removed)
    }

    /// Returns true if no fault was found.
    pub fn is_good(&self) -> bool {
        self.findings.is_empty()
    }
}

/// The backups to verify, each after its bases.
#[derive(Debug)]
pub struct Survey {
    store: Arc<dyn Store>,
    backups: Vec<Surveyed>,
    bytes: u64,
}

/// A backup to verify.
#[derive(Debug)]
struct Surveyed {
    location: Location,
    /// Bytes to read.
    bytes: u64,
    /// Whether its directory existed.
    there: bool,
}

/// The images of one backup, and the faults that were found without reading all of them.
struct Look {
    images: Vec<(String, Image)>,
    findings: Vec<Finding>,
    parents: BTreeSet<String>,
    /// Keeps the backup from being removed or replaced while it is read.
    _lock: Option<Arc<BackupLock>>,
}

impl Survey {
    /// Finds the bases of `wanted`, and how much there is to read. Blocks.
    pub fn new(store: Arc<dyn Store>, wanted: &[Location]) -> Self {
        let mut survey = Self {
            store,
            backups: Vec::new(),
            bytes: 0,
        };
        let mut seen = BTreeSet::new();
        for location in wanted {
            survey.add(location, &mut seen);
        }
        survey
    }

    fn add(&mut self, wanted: &Location, seen: &mut BTreeSet<Location>) {
        // Faults of unreadable backups are reported later. Each backup is visited twice: before its bases and after
        // them.
        let mut ahead = vec![(wanted.clone(), None)];
        while let Some((location, after)) = ahead.pop() {
            if let Some(bytes) = after {
                self.bytes += bytes;
                let there = self.is_there(location.name());
                self.backups.push(Surveyed {
                    location,
                    bytes,
                    there,
                });
                continue;
            }
            if !seen.insert(location.clone()) {
                continue;
            }
            let backup = Links::new(&*self.store, &location.domain).backup(&location.id);
            let Ok(backup) = backup else {
                ahead.push((location, Some(0)));
                continue;
            };
            let manifest = &backup.manifest;
            let bytes = manifest
                .disks
                .iter()
                .filter_map(|disk| backup.file_size(disk))
                .sum();
            ahead.push((location.clone(), Some(bytes)));
            for parent in manifest.parents() {
                let parent = Location {
                    domain: location.domain.clone(),
                    id: parent.to_owned(),
                };
                if self.is_there(parent.name()) {
                    ahead.push((parent, None));
                }
            }
        }
    }

    fn is_there(&self, name: BackupName<'_>) -> bool {
        self.store.open(name).is_ok_and(|backup| backup.is_some())
    }

    /// Returns the backups in the order of verification, with the bytes to read of each.
    pub fn backups(&self) -> impl Iterator<Item = (&Location, u64)> {
        let backups = self.backups.iter();
        backups.map(|surveyed| (&surveyed.location, surveyed.bytes))
    }

    /// Verifies the backups, and reports each to `tell` as soon as it is done. Stops soon after it is dropped.
    pub async fn verify(
        self,
        control: Control<'_>,
        mut tell: impl FnMut(&Verified),
    ) -> Result<Vec<Verified>, Error> {
        control.progress.set(0, self.bytes);
        let stop = control.cancel.child_token();
        let _stop_when_dropped = stop.clone().drop_guard();
        let control = Control {
            cancel: &stop,
            ..control
        };
        let mut done: HashMap<Location, usize> = HashMap::new();
        let mut all: Vec<Verified> = Vec::new();
        for Surveyed { location, there, .. } in self.backups {
            let (store, place) = (self.store.clone(), location.clone());
            let mut look = blocking(move || look(&*store, &place)).await?;
            for finding in look.findings.iter_mut().filter(|_| there) {
                // The directory existed a moment ago, so a user or a keep rule deleted it. An accident at this moment
                // is improbable.
                if finding.backup == location.id && finding.fault == Fault::Missing {
                    finding.fault = Fault::Removed;
                }
            }
            let mut verified = Verified {
                location: location.clone(),
                findings: look.findings,
                unrecorded: Vec::new(),
                bytes: 0,
            };
            for (disk, image) in look.images {
                verified.bytes += image.length;
                if image.digest.is_none() {
                    verified.unrecorded.push(disk.clone());
                }
                let fault = read(&image, control).await?;
                verified.findings.extend(fault.map(|fault| Finding {
                    backup: location.id.clone(),
                    disk: Some(disk),
                    fault,
                }));
            }
            for id in look.parents {
                let parent = Location {
                    domain: location.domain.clone(),
                    id: id.clone(),
                };
                if done.get(&parent).is_some_and(|index| all[*index].is_damaged()) {
                    verified.findings.push(Finding {
                        backup: location.id.clone(),
                        disk: None,
                        fault: Fault::LiesOnDamaged { backup: id },
                    });
                }
            }
            tell(&verified);
            done.insert(location, all.len());
            all.push(verified);
        }
        Ok(all)
    }
}

/// Checks everything except the content of the images. Blocks.
fn look(store: &dyn Store, location: &Location) -> Result<Look, Error> {
    let mut look = Look {
        images: Vec::new(),
        findings: Vec::new(),
        parents: BTreeSet::new(),
        _lock: None,
    };
    let found = |disk: Option<&model::Disk>, fault| Finding {
        backup: location.id.clone(),
        disk: disk.map(|disk| disk.name.clone()),
        fault,
    };
    let mut links = Links::new(store, &location.domain);
    let backup = match links.backup(&location.id) {
        Ok(backup) => backup,
        Err(fault) => {
            look.findings.push(found(None, fault));
            return Ok(look);
        }
    };
    look._lock = Some(backup.lock());
    look.parents = backup.manifest.parents().into_iter().map(str::to_owned).collect();
    for disk in &backup.manifest.disks {
        // The bases are checked separately. Here only the length of the chain counts.
        let linked = for_each_link(&mut links, (backup.clone(), disk.clone()), |_, _, _| Ok(()));
        // If that fails, the base's manifest is damaged, and its own check reports it.
        let below = links
            .parent(disk)
            .ok()
            .flatten()
            .map_or(Format::Qcow2, |(_, disk)| disk.format);
        match linked {
            Err(finding) if finding.backup == location.id => look.findings.push(finding),
            _ => match backup.image(disk, Some(below)) {
                Ok(image) => look.images.push((disk.name.clone(), image)),
                Err(fault) => look.findings.push(found(Some(disk), fault)),
            },
        }
    }
    Ok(look)
}

/// Reads all images of a disk and compares them with their recorded checksums.
pub async fn check_sums(chain: &OpenDisk, control: Control<'_>) -> Result<(), Error> {
    let stop = control.cancel.child_token();
    let _stop_when_dropped = stop.clone().drop_guard();
    let control = Control {
        cancel: &stop,
        ..control
    };
    for image in &chain.images {
        if let Some(fault) = read(image, control).await? {
            return Err(image.damaged(fault));
        }
    }
    Ok(())
}

/// Reads all of an image.
async fn read(image: &Image, control: Control<'_>) -> Result<Option<Fault>, Error> {
    let (of, counted, stop) = (image.clone(), control.progress.clone(), control.cancel.clone());
    let sum = blocking(move || checksum(&of, &counted, &stop));
    let sum = control.watch("the store", || control.progress.get().0, sum);
    let check = async {
        match image.format {
            Format::Qcow2 => check::check(image, control).await,
            Format::Raw => Ok(Ok(())),
        }
    };
    // `qemu-img check` reads only metadata, so it runs beside the checksum.
    let (sum, checked) = tokio::join!(sum, check);
    let changed = match sum? {
        Err(errno) => return Ok(Some(Fault::Header(HeaderError::Io(errno)))),
        Ok(sum) => image.digest.as_ref().is_some_and(|recorded| *recorded != sum),
    };
    Ok(match checked? {
        // A proven fault takes precedence over a check that could not run.
        Err(fault) if changed && !fault.is_damage() => Some(Fault::Checksum),
        Err(fault) => Some(fault),
        Ok(()) => changed.then_some(Fault::Checksum),
    })
}

/// Returns the file's digest by the recorded algorithm. Without a record the file is read too, to find read errors.
fn checksum(
    image: &Image,
    progress: &Progress,
    stop: &CancellationToken,
) -> Result<Result<Digest, Errno>, Error> {
    let algorithm = image.digest.as_ref().map(|digest| digest.algorithm);
    let taken = match algorithm {
        Some(Algorithm::Sha256) => in_order(&image.file, progress, stop),
        Some(Algorithm::Blake3) | None => in_parallel(&image.file, progress, stop),
    };
    match taken {
        Ok(Some(digest)) => Ok(Ok(digest)),
        Ok(None) => Err(Error::Cancelled),
        Err(errno) => Ok(Err(errno)),
    }
}

/// Returns `None` if it is stopped.
fn in_order(file: &OwnedFd, progress: &Progress, stop: &CancellationToken) -> Result<Option<Digest>, Errno> {
    let (mut hash, mut chunk, mut position) = (Sha256Hasher::default(), vec![0; CHUNK], 0);
    loop {
        if stop.is_cancelled() {
            return Ok(None);
        }
        match rustix::io::pread(file, &mut chunk, position) {
            Ok(0) => return Ok(Some(hash.finish())),
            Ok(count) => {
                hash.update(&chunk[..count]);
                position += count as u64;
                progress.add(count as u64);
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// Uses all processors. Returns `None` if it is stopped.
fn in_parallel(
    file: &OwnedFd,
    progress: &Progress,
    stop: &CancellationToken,
) -> Result<Option<Digest>, Errno> {
    let length = rustix::fs::fstat(file)?.st_size;
    let reading = Reading::new(file, u64::try_from(length).unwrap_or(0));
    let failed = CancellationToken::new();
    let threads = digest::threads().min(reading.pieces());
    digest::in_threads(threads, || {
        let worked = reading.work(&mut Watcher {
            progress,
            stops: [stop, &failed],
        });
        if worked.is_err() {
            // The digest has failed, so the other threads stop.
            failed.cancel();
        }
        worked.map(drop)
    })?;
    Ok(reading.digest())
}

struct Watcher<'a> {
    progress: &'a Progress,
    stops: [&'a CancellationToken; 2],
}

impl Watch for Watcher<'_> {
    fn read(&mut self, _: u64, bytes: &[u8]) -> ControlFlow<()> {
        self.progress.add(bytes.len() as u64);
        match self.stops.iter().any(|stop| stop.is_cancelled()) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }

    fn done(&mut self, _: Range<u64>) {}
}
