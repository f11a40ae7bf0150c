//! Lists stored backups: one row each, as a tree of bases and dependents.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use backupd::backups::{Stored, read_store};
use backupd::model::Disk;
use serde_json::{Value, json};
use zbus::OwnedObjectPath;

use crate::error::{Error, Result, Status};
use crate::job::nothing_if_empty;
use crate::list::print;
use crate::output::{Table, complain, escape};
use crate::owner;
use crate::proxy::Service;
use crate::units;

/// A disk on the bus: name, file, format, virtual size, length, digest, base.
type DiskTuple = (String, String, String, u64, u64, String, String);

/// An entry of `ListBackups`.
pub type BackupTuple = (
    OwnedObjectPath,
    String,
    String,
    String,
    String,
    String,
    String,
    String,
    u64,
    String,
    String,
    Vec<DiskTuple>,
    String,
    bool,
);

/// The image of a disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Image {
    pub disk: String,
    /// The name of the file.
    pub file: String,
    /// `qcow2` or `raw`.
    pub format: String,
    /// The size that the guest sees, in bytes.
    pub virtual_size: u64,
    /// The size of the file in bytes, if known.
    pub length: Option<u64>,
    /// The digest of the file; empty if not known.
    pub digest: String,
    /// The id of the base; empty for a full image.
    pub parent: String,
}

impl Image {
    fn of(disk: Disk) -> Self {
        let digest = disk.digest().map(|digest| digest.to_string());
        Self {
            disk: disk.name,
            file: disk.file,
            format: disk.format.as_str().to_owned(),
            virtual_size: disk.virtual_size,
            length: disk.length,
            digest: digest.unwrap_or_default(),
            parent: disk.parent.map(|parent| parent.backup).unwrap_or_default(),
        }
    }
}

/// A backup in a store.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Backup {
    pub path: String,
    /// The id, which is the name of the backup's directory.
    pub id: String,
    /// The name from the document, or empty.
    pub name: String,
    pub domain: String,
    /// The UUID of the domain, or empty.
    pub uuid: String,
    pub store: String,
    /// `full`, `incremental` or `differential`.
    pub kind: String,
    /// The id of the base, or empty.
    pub parent: String,
    /// The point in time, in µs since the epoch.
    pub time: u64,
    /// `complete`, `damaged` or `missing`.
    pub state: String,
    /// The problem, or empty.
    pub problem: String,
    /// Whether it is protected from deletion.
    pub protected: bool,
    pub disks: Vec<Image>,
    /// The id of the service that made it, or empty.
    pub service: String,
    /// Whether keep rules apply to it; `None` if no service was asked.
    pub own: Option<bool>,
}

impl From<BackupTuple> for Backup {
    fn from(tuple: BackupTuple) -> Self {
        let (path, id, name, domain, uuid, store, kind, parent, time, state, problem, disks, service, own) =
            tuple;
        let disks = disks
            .into_iter()
            .map(
                |(disk, file, format, virtual_size, length, digest, parent)| Image {
                    disk,
                    file,
                    format,
                    virtual_size,
                    length: Some(length).filter(|length| *length > 0),
                    digest,
                    parent,
                },
            )
            .collect();
        Self {
            path: path.to_string(),
            id,
            name,
            domain,
            uuid,
            store,
            kind,
            parent,
            time,
            state,
            problem,
            // An own query sets it.
            protected: false,
            disks,
            service,
            own: Some(own),
        }
    }
}

/// `backupctl backups`
pub async fn list(
    service: &Service,
    domain: Option<&str>,
    store: Option<&str>,
    json: bool,
) -> Result<Status> {
    let backups = service.backups(domain, store).await?;
    print_list(&backups, json)
}

/// `backupctl backups --from`
pub fn list_store(path: &Path, domain: Option<&str>, json: bool) -> Result<Status> {
    // The path may lead over symbolic links, because the user's own rights apply.
    let path = path
        .canonicalize()
        .map_err(|error| Error::Usage(format!("{}: {error}", path.display())))?;
    let inventory = read_store(&path)?;
    let store = path.display().to_string();
    let stored = inventory
        .backups
        .into_iter()
        .map(|stored| Backup::of(stored, &store));
    let of_domain = |backup: &Backup| {
        domain.is_none_or(|domain| backup.domain == domain || backup.uuid.eq_ignore_ascii_case(domain))
    };
    let backups: Vec<Backup> = stored.filter(of_domain).collect();
    for problem in &inventory.problems {
        complain(&format!("backupctl: {}", escape(problem)));
    }
    print_list(&backups, json)?;
    Ok(match inventory.problems.is_empty() {
        true => Status::Completed,
        false => Status::Failed,
    })
}

fn print_list(backups: &[Backup], json: bool) -> Result<Status> {
    print(
        json,
        || backups.iter().map(Backup::json).collect(),
        || text(backups, Branches::of_locale(), SystemTime::now()),
    )
}

impl Backup {
    /// A backup that was read without the service.
    fn of(stored: Stored, store: &str) -> Self {
        let Stored {
            manifest,
            state,
            problem,
            protected,
        } = stored;
        let parents = manifest.parents();
        Self {
            path: String::new(),
            parent: parents.last().map(|id| (*id).to_owned()).unwrap_or_default(),
            store: store.to_owned(),
            kind: manifest.kind.as_str().to_owned(),
            time: u64::try_from(manifest.instant.as_microsecond()).unwrap_or(0),
            state: state.as_str().to_owned(),
            problem,
            protected,
            uuid: manifest
                .domain
                .uuid
                .map(|uuid| uuid.to_string())
                .unwrap_or_default(),
            domain: manifest.domain.name,
            id: manifest.id,
            name: manifest.name.unwrap_or_default(),
            disks: manifest.disks.into_iter().map(Image::of).collect(),
            service: manifest
                .service
                .map(|service| service.to_string())
                .unwrap_or_default(),
            own: None,
        }
    }

    /// The size of all images in bytes; `None` if one of them is unknown.
    fn size(&self) -> Option<u64> {
        self.disks.iter().map(|disk| disk.length).sum()
    }

    fn age(&self, now: SystemTime) -> Option<Duration> {
        let time = UNIX_EPOCH.checked_add(Duration::from_micros(self.time))?;
        now.duration_since(time).ok()
    }

    /// The stable keys of `--json`.
    fn json(&self) -> Value {
        let disks: Vec<Value> = self
            .disks
            .iter()
            .map(|disk| {
                json!({
                    "name": disk.disk, "file": disk.file, "format": disk.format, "virtual-size": disk.virtual_size,
                    "length": disk.length, "digest": nothing_if_empty(&disk.digest),
                    "parent": nothing_if_empty(&disk.parent),
                })
            })
            .collect();
        json!({
            "id": self.id,
            "path": nothing_if_empty(&self.path),
            "name": nothing_if_empty(&self.name),
            "domain": self.domain,
            "domain-uuid": nothing_if_empty(&self.uuid),
            "owner": owner::json(&self.domain),
            "store": self.store,
            "kind": self.kind,
            "parent": nothing_if_empty(&self.parent),
            "time": self.time,
            "size": self.size(),
            "state": self.state,
            "problem": nothing_if_empty(&self.problem),
            "protected": self.protected,
            "service": nothing_if_empty(&self.service),
            "own": self.own,
            "disks": disks,
        })
    }
}

/// The characters that draw the tree.
#[derive(Debug, Clone, Copy)]
pub struct Branches {
    /// For a backup with later siblings: before itself, and before its dependents.
    inner: [&'static str; 2],
    /// The same for the last sibling.
    last: [&'static str; 2],
}

impl Branches {
    const PLAIN: Self = Self {
        inner: ["|-", "| "],
        last: ["`-", "  "],
    };
    const DRAWN: Self = Self {
        inner: ["├─", "│ "],
        last: ["└─", "  "],
    };

    /// Draws lines if the locale has UTF-8 (locale(7)), in files too.
    fn of_locale() -> Self {
        let set = ["LC_ALL", "LC_CTYPE", "LANG"].map(std::env::var_os);
        let locale = set.into_iter().flatten().find(|value| !value.is_empty());
        let locale = locale.unwrap_or_default().to_string_lossy().to_ascii_lowercase();
        match locale.ends_with("utf-8") || locale.ends_with("utf8") {
            true => Self::DRAWN,
            false => Self::PLAIN,
        }
    }
}

/// Each backup after its base, with its tree lines.
fn tree<'a>(backups: &'a [Backup], branches: Branches) -> Vec<(String, &'a Backup)> {
    // Ids are unique in a store, across domains.
    let place = |of: &'a Backup, id: &'a str| (of.store.as_str(), id);
    let known: BTreeSet<_> = backups.iter().map(|backup| place(backup, &backup.id)).collect();
    let mut below: BTreeMap<_, Vec<&Backup>> = BTreeMap::new();
    let mut roots = Vec::new();
    for backup in backups {
        let parent = place(backup, &backup.parent);
        match known.contains(&parent) {
            true => below.entry(parent).or_default().push(backup),
            false => roots.push(backup),
        }
    }
    let mut lines = Vec::new();
    // Iterative, because chains can be long.
    let mut left: Vec<(String, String, &Backup)> = roots
        .into_iter()
        .rev()
        .map(|root| (String::new(), String::new(), root))
        .collect();
    while let Some((before, before_below, backup)) = left.pop() {
        let children = below.remove(&place(backup, &backup.id)).unwrap_or_default();
        for (index, child) in children.into_iter().rev().enumerate() {
            let [own, further] = if index == 0 { branches.last } else { branches.inner };
            left.push((
                format!("{before_below}{own}"),
                format!("{before_below}{further}"),
                child,
            ));
        }
        lines.push((before, backup));
    }
    lines
}

fn text(backups: &[Backup], branches: Branches, now: SystemTime) -> String {
    let mut headings = vec![
        "DOMAIN", "STORE", "BACKUP", "TIME", "AGE", "KIND", "SIZE", "STATE",
    ];
    // A host with one service needs no column for it.
    let foreign = backups.iter().any(|backup| backup.own == Some(false));
    if foreign {
        headings.push("SERVICE");
    }
    let owned = backups.iter().any(|backup| owner::of(&backup.domain).is_some());
    headings.extend(owned.then_some("OWNER"));
    let mut table = Table::new(&headings).right(&[4, 6]);
    let mut problems = String::new();
    for (before, backup) in tree(backups, branches) {
        let id = format!("{before}{}", backup.id);
        let time = units::timestamp(backup.time);
        let age = backup.age(now).map(units::age).unwrap_or_default();
        let size = backup.size().map(units::size).unwrap_or_default();
        let state = match backup.protected {
            true => format!("{}, protected", backup.state),
            false => backup.state.clone(),
        };
        let mut cells = vec![
            backup.domain.as_str(),
            &backup.store,
            &id,
            &time,
            &age,
            &backup.kind,
            &size,
            &state,
        ];
        if foreign {
            cells.push(match (backup.own, backup.service.as_str()) {
                (Some(true), _) => "this one",
                (_, "") => "unknown",
                (_, service) => service,
            });
        }
        let shown = owner::shown(owner::of(&backup.domain));
        cells.extend(owned.then_some(&*shown));
        table.cells(&cells);
        if !backup.problem.is_empty() {
            problems.push_str(&format!("{}: {}\n", escape(&backup.id), escape(&backup.problem)));
        }
    }
    let made = backups.iter().map(|backup| {
        let uuid = Some(&backup.uuid).filter(|uuid| !uuid.is_empty());
        let vm = uuid.unwrap_or(&backup.domain);
        ((backup.store.as_str(), vm.as_str()), backup.time)
    });
    problems.push_str(&future_note(made, now));
    match problems.is_empty() {
        true => table.to_string(),
        false => format!("{table}\n{problems}"),
    }
}

/// The accepted clock difference, in µs.
const CLOCK_SLACK: u128 = 60_000_000;

/// A note on how many backups have a point in time later than `now`, or than a backup of the same VM and store that was
/// made after them. Empty if there are none. `made` lists store, VM and time in µs, in the order of making.
pub fn future_note<'a>(
    made: impl DoubleEndedIterator<Item = ((&'a str, &'a str), u64)>,
    now: SystemTime,
) -> String {
    let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
    let mut earliest = BTreeMap::new();
    let mut count = 0;
    for (vm, time) in made.rev() {
        let (earliest, time) = (earliest.entry(vm).or_insert(now), u128::from(time));
        if time > earliest.saturating_add(CLOCK_SLACK) {
            count += 1;
        }
        *earliest = time.min(*earliest);
    }
    match count {
        0 => String::new(),
        1 => "1 backup is from the future: a clock was wrong. It does not count as the newest.\n".into(),
        count => {
            format!(
                "{count} backups are from the future: a clock was wrong. They do not count as the newest.\n"
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backups_from_the_future_are_counted_for_each_vm() {
        let at = |domain, minutes: u64| (("default", domain), minutes * 60_000_000);
        let note = |made: &[((&'static str, &'static str), u64)]| {
            future_note(made.iter().copied(), UNIX_EPOCH + Duration::from_secs(1000 * 60))
        };
        let made = [
            at("db", 500),
            at("web", 100),
            at("web", 900),
            at("web", 200),
            at("web", 300),
        ];
        assert!(note(&made).starts_with("1 backup is from the future"));
        assert!(note(&[at("web", 100), at("web", 2000), at("db", 2000)]).starts_with("2 backups are"));
        assert_eq!(note(&made[..2]), "");
    }

    #[test]
    fn a_table_shows_the_service_of_each_backup_if_there_are_several() {
        let of = |service: &str, own| Backup {
            service: service.into(),
            own: Some(own),
            ..backup(&format!("id-{service}"), "")
        };
        let shown = |backups: &[Backup]| text(backups, Branches::PLAIN, UNIX_EPOCH);
        assert!(!shown(&[of("a", true)]).contains("SERVICE"));
        let both = shown(&[of("a", true), of("b", false), of("", false)]);
        for word in ["SERVICE", "this one", " b\n", "unknown"] {
            assert!(both.contains(word), "{both}");
        }
    }

    fn backup(id: &str, parent: &str) -> Backup {
        Backup {
            id: id.into(),
            parent: parent.into(),
            domain: "web".into(),
            store: "default".into(),
            ..Backup::default()
        }
    }

    #[test]
    fn a_dependent_is_drawn_below_its_base() {
        let backups = [
            backup("a", ""),
            backup("b", "a"),
            backup("c", "b"),
            backup("d", "a"),
            backup("e", "gone"),
            Backup {
                store: "other".into(),
                ..backup("f", "a")
            },
        ];
        let lines: Vec<_> = tree(&backups, Branches::DRAWN)
            .into_iter()
            .map(|(before, backup)| format!("{before}{}", backup.id))
            .collect();
        assert_eq!(lines, ["a", "├─b", "│ └─c", "└─d", "e", "f"]);
        let plain = tree(&backups, Branches::PLAIN);
        assert_eq!(plain[2].0, "| `-");
    }

    #[test]
    fn a_long_chain_does_not_overflow_the_stack() {
        let backups: Vec<_> = (0..3000)
            .map(|number| backup(&number.to_string(), &format!("{}", number - 1)))
            .collect();
        assert_eq!(tree(&backups, Branches::PLAIN).len(), 3000);
    }

    #[test]
    fn a_size_is_known_if_all_images_have_one() {
        let image = |length| Image {
            length,
            ..Image::default()
        };
        let of = |disks: &[Image]| {
            let backup = Backup {
                disks: disks.to_vec(),
                ..backup("a", "")
            };
            backup.size()
        };
        assert_eq!(of(&[image(Some(1)), image(Some(2))]), Some(3));
        assert_eq!(of(&[image(Some(1)), image(None)]), None);
    }

    #[test]
    fn the_keys_of_json_are_stable() {
        let mut backup = backup("a", "");
        backup.disks.push(Image::default());
        let value = backup.json();
        let keys = |value: &Value| -> Vec<String> {
            let mut keys: Vec<_> = value.as_object().unwrap().keys().cloned().collect();
            keys.sort_unstable();
            keys
        };
        assert_eq!(
            keys(&value),
            [
                "disks",
                "domain",
                "domain-uuid",
                "id",
                "kind",
                "name",
                "own",
                "owner",
                "parent",
                "path",
                "problem",
                "protected",
                "service",
                "size",
                "state",
                "store",
                "time",
            ]
        );
        assert_eq!(
            keys(&value["disks"][0]),
            [
                "digest",
                "file",
                "format",
                "length",
                "name",
                "parent",
                "virtual-size"
            ]
        );
    }
}
