//! A FUSE file system of the test's own, which fails or hangs on demand. A process that uses it waits as for a dead
//! server.
//!
//! This process serves the mount, so the mount ends with it; waiting operations then fail with an error.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, UNIX_EPOCH};

use fuser::{
    BackgroundSession, BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow,
    WriteFlags,
};

use super::process;
use super::wait;

/// The kernel caches no attributes: every lookup reaches the file system.
const TTL: Duration = Duration::ZERO;
const BLOCK: u32 = 4096;
const BLOCKS: u64 = 1 << 20;

/// The operation that is disturbed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// If reads are disturbed when a file is created, the kernel caches none of its data.
    Read,
    Write,
    Fsync,
    Create,
    /// Lookups and attributes of files and directories.
    Remove,
    /// Every operation, as with a server that is gone.
    Any,
}

#[derive(Clone, Copy)]
enum Effect {
    Fail(Errno),
    Hang,
    /// Each operation takes this long.
    Slow(Duration),
}

/// An operation to execute, or to fail.
type Held = Box<dyn FnOnce(&mut Tree, Option<Errno>) + Send>;

#[derive(Default)]
struct Control {
    disturbed: Option<(Operation, Effect)>,
    held: Vec<Held>,
    pace: Option<Pace>,
    affected: usize,
}

/// A device that processes one request after the other.
#[derive(Clone, Copy)]
struct Pace {
    bytes_per_second: u64,
    /// The time at which it has finished all its requests.
    done: Instant,
}

/// Features that the file system lacks, as many network file systems do.
#[derive(Debug, Clone, Copy, Default)]
pub struct Limits {
    /// It has only rename(2), which replaces the target.
    pub plain_rename: bool,
    pub no_links: bool,
    /// A file that is removed while it is open keeps a hidden name until it is closed.
    pub keeps_open_files: bool,
}

struct Node {
    entries: Option<BTreeMap<OsString, u64>>,
    /// The content: sparse, and the file has no name.
    content: File,
    mode: u16,
    links: u32,
    /// The number of open handles.
    open: usize,
    /// The directory and the hidden name that the file has until it is closed.
    kept: Option<(u64, OsString)>,
}

struct Tree {
    nodes: HashMap<u64, Node>,
    /// The number of the newest node. Numbers are never reused.
    newest: u64,
    limits: Limits,
}

struct Server {
    control: Arc<Mutex<Control>>,
    tree: Arc<Mutex<Tree>>,
}

/// The mounted file system. Dropping it resumes all waiting operations and unmounts it.
///
/// A process that waits for it can end only when it responds. So it must be dropped before the service and the VMs,
/// and created after them.
pub struct Hanging {
    path: PathBuf,
    _place: Option<tempfile::TempDir>,
    control: Arc<Mutex<Control>>,
    tree: Arc<Mutex<Tree>>,
    session: Option<BackgroundSession>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no holder of the lock panics")
}

impl Hanging {
    /// Mounts it on a new directory in `place`, which is removed with it. Root owns it, and it works.
    #[track_caller]
    pub fn mount_in(place: tempfile::TempDir, name: &str) -> Self {
        let path = place.path().join(name);
        let mut mounted = Self::mount(&path, Limits::default());
        mounted._place = Some(place);
        mounted
    }

    /// Mounts a file system with limits on `path`, which is created.
    #[track_caller]
    pub fn mount(path: &Path, limits: Limits) -> Self {
        let path = path.to_owned();
        std::fs::create_dir(&path).expect("the mount point is made");
        let control = Arc::default();
        let tree = Arc::new(Mutex::new(Tree {
            nodes: HashMap::from([(1, Node::new(true, 0o755))]),
            newest: 1,
            limits,
        }));
        let server = Server {
            control: Arc::clone(&control),
            tree: Arc::clone(&tree),
        };
        let session = fuser::spawn_mount(server, &path, &fuser::Config::default())
            .expect("a FUSE file system is mounted: /dev/fuse is needed");
        Self {
            path,
            _place: None,
            control,
            tree,
            session: Some(session),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// From now on this operation fails with `errno`, such as [`Errno::EDQUOT`].
    pub fn fail(&self, what: Operation, errno: Errno) {
        self.disturb(what, Effect::Fail(errno));
    }

    /// From now on this operation hangs, until [`Hanging::heal`].
    pub fn hang(&self, what: Operation) {
        self.disturb(what, Effect::Hang);
    }

    /// From now on each of these operations takes this long; one transfers 128 KiB at most.
    pub fn slow_down(&self, what: Operation, pause: Duration) {
        self.disturb(what, Effect::Slow(pause));
    }

    /// From now on it accepts so many bytes a second, in the order of arrival.
    pub fn limit(&self, bytes_per_second: u64) {
        let done = Instant::now();
        lock(&self.control).pace = Some(Pace {
            bytes_per_second,
            done,
        });
    }

    fn disturb(&self, what: Operation, effect: Effect) {
        let mut control = lock(&self.control);
        control.disturbed = Some((what, effect));
        control.affected = 0;
    }

    /// Waits until an operation was disturbed.
    pub async fn affected(&self) {
        self.affected_often(1).await;
    }

    /// Waits until so many operations were disturbed.
    pub async fn affected_often(&self, count: usize) {
        wait::until_async("a process to use the file system", || async {
            (lock(&self.control).affected >= count).then_some(())
        })
        .await;
    }

    /// Whether an operation waits for a reply.
    pub fn is_hanging(&self) -> bool {
        !lock(&self.control).held.is_empty()
    }

    /// Ends the disturbance and executes the waiting operations.
    pub fn heal(&self) {
        self.answer(None);
    }

    /// Ends the disturbance and fails the waiting operations, once.
    pub fn fail_held(&self, errno: Errno) {
        self.answer(Some(errno));
    }

    fn answer(&self, fault: Option<Errno>) {
        let held = {
            let mut control = lock(&self.control);
            control.disturbed = None;
            std::mem::take(&mut control.held)
        };
        for operation in held {
            operation(&mut lock(&self.tree), fault);
        }
    }
}

impl Drop for Hanging {
    fn drop(&mut self) {
        self.heal();
        // Lazily: a service or a QEMU that a failed test left running may still have a file open in it.
        let mut command = Command::new("umount");
        command.arg("--lazy").arg(&self.path);
        let output = process::run(command);
        if !output.success() {
            eprintln!("{}: {}", self.path.display(), output.stderr);
        }
        drop(self.session.take());
    }
}

impl Node {
    fn new(directory: bool, mode: u32) -> Self {
        Self {
            entries: directory.then(BTreeMap::new),
            content: tempfile::tempfile().expect("a file without a name is made"),
            mode: (mode & 0o7777) as u16,
            links: if directory { 2 } else { 1 },
            open: 0,
            kept: None,
        }
    }

    fn kind(&self) -> FileType {
        match self.entries {
            Some(_) => FileType::Directory,
            None => FileType::RegularFile,
        }
    }
}

impl Tree {
    fn node(&mut self, number: u64) -> Result<&mut Node, Errno> {
        self.nodes.get_mut(&number).ok_or(Errno::ENOENT)
    }

    fn entries(&mut self, number: u64) -> Result<&mut BTreeMap<OsString, u64>, Errno> {
        self.node(number)?.entries.as_mut().ok_or(Errno::ENOTDIR)
    }

    fn attributes(&mut self, number: u64) -> Result<FileAttr, Errno> {
        let node = self.node(number)?;
        let content = node.content.metadata()?;
        let written = content.modified()?;
        Ok(FileAttr {
            ino: INodeNo(number),
            size: content.len(),
            blocks: content.blocks(),
            atime: UNIX_EPOCH,
            mtime: written,
            ctime: written,
            crtime: UNIX_EPOCH,
            kind: node.kind(),
            perm: node.mode,
            nlink: node.links,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: BLOCK,
            flags: 0,
        })
    }

    fn find(&mut self, parent: u64, name: &OsStr) -> Result<u64, Errno> {
        self.entries(parent)?.get(name).copied().ok_or(Errno::ENOENT)
    }

    fn make(&mut self, parent: u64, name: OsString, node: Node) -> Result<FileAttr, Errno> {
        let number = self.newest + 1;
        let entries = self.entries(parent)?;
        if entries.contains_key(&name) {
            return Err(Errno::EEXIST);
        }
        entries.insert(name, number);
        self.newest = number;
        self.nodes.insert(number, node);
        self.attributes(number)
    }

    fn remove(&mut self, parent: u64, name: &OsStr) -> Result<(), Errno> {
        let number = self.find(parent, name)?;
        let node = self.node(number)?;
        if node.entries.as_ref().is_some_and(|entries| !entries.is_empty()) {
            return Err(Errno::ENOTEMPTY);
        }
        node.links -= 1;
        let stays_open = node.links == 0 && node.open > 0;
        self.entries(parent)?.remove(name);
        if stays_open && self.limits.keeps_open_files {
            let hidden = OsString::from(format!(".fuse_hidden{number:08x}"));
            self.entries(parent)?.insert(hidden.clone(), number);
            self.node(number)?.kept = Some((parent, hidden));
        }
        self.forget(number)
    }

    /// Removes a file that has no name and no open handle.
    fn forget(&mut self, number: u64) -> Result<(), Errno> {
        let node = self.node(number)?;
        if node.links == 0 && node.open == 0 {
            self.nodes.remove(&number);
        }
        Ok(())
    }

    fn link(&mut self, number: u64, parent: u64, name: OsString) -> Result<FileAttr, Errno> {
        if self.limits.no_links {
            return Err(Errno::EPERM);
        }
        if self.entries(parent)?.contains_key(&name) {
            return Err(Errno::EEXIST);
        }
        self.entries(parent)?.insert(name, number);
        self.node(number)?.links += 1;
        self.attributes(number)
    }

    fn open(&mut self, number: u64) -> Result<(), Errno> {
        self.node(number)?.open += 1;
        Ok(())
    }

    fn close(&mut self, number: u64) -> Result<(), Errno> {
        let node = self.node(number)?;
        node.open -= 1;
        if node.open == 0
            && let Some((parent, name)) = node.kept.take()
        {
            self.entries(parent)?.remove(&name);
        }
        self.forget(number)
    }

    fn rename(&mut self, from: (u64, &OsStr), to: (u64, &OsStr), keep: bool) -> Result<(), Errno> {
        let number = self.find(from.0, from.1)?;
        if self.find(to.0, to.1).is_ok() {
            if keep {
                return Err(Errno::EEXIST);
            }
            self.remove(to.0, to.1)?;
        }
        self.entries(from.0)?.remove(from.1);
        self.entries(to.0)?.insert(to.1.to_owned(), number);
        Ok(())
    }
}

impl Server {
    /// Takes the time that a device of that speed takes. No other request is answered in that time.
    fn take_time(&self, bytes: usize) {
        let done = lock(&self.control).pace.as_mut().map(|pace| {
            let time = Duration::from_secs_f64(bytes as f64 / pace.bytes_per_second as f64);
            pace.done = pace.done.max(Instant::now()) + time;
            pace.done
        });
        let left = done.map(|done| done.saturating_duration_since(Instant::now()));
        std::thread::sleep(left.unwrap_or_default());
    }

    /// Executes an operation now, or when the file system responds again.
    fn pass(&self, what: Operation, operation: impl FnOnce(&mut Tree, Option<Errno>) + Send + 'static) {
        let mut control = lock(&self.control);
        let fault = match control.disturbed {
            Some((wanted, effect)) if wanted == what || wanted == Operation::Any => {
                control.affected += 1;
                match effect {
                    Effect::Hang => return control.held.push(Box::new(operation)),
                    Effect::Fail(errno) => Some(errno),
                    Effect::Slow(pause) => {
                        let tree = Arc::clone(&self.tree);
                        // All other operations are answered.
                        std::thread::spawn(move || {
                            std::thread::sleep(pause);
                            operation(&mut lock(&tree), None);
                        });
                        return;
                    }
                }
            }
            _ => None,
        };
        drop(control);
        operation(&mut lock(&self.tree), fault);
    }
}

/// Replies with the result of `$run`, a closure of the tree, or with the error of a disturbance.
macro_rules! answer {
    ($server:expr, $what:expr, $reply:ident, $run:expr, $done:expr) => {
        $server.pass($what, move |tree, fault| {
            let run = $run;
            let result = match fault {
                Some(errno) => Err(errno),
                None => run(tree),
            };
            match result {
                Ok(value) => {
                    let done = $done;
                    done($reply, value)
                }
                Err(errno) => $reply.error(errno),
            }
        })
    };
}

const OPENED: FileHandle = FileHandle(0);
const FIRST: Generation = Generation(0);

impl Filesystem for Server {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.to_owned();
        answer!(
            self,
            Operation::Any,
            reply,
            |tree: &mut Tree| tree
                .find(parent.0, &name)
                .and_then(|number| tree.attributes(number)),
            |reply: ReplyEntry, found: FileAttr| reply.entry(&TTL, &found, FIRST)
        );
    }

    fn getattr(&self, _: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        answer!(
            self,
            Operation::Any,
            reply,
            |tree: &mut Tree| tree.attributes(number.0),
            |reply: ReplyAttr, found: FileAttr| reply.attr(&TTL, &found)
        );
    }

    fn setattr(
        &self,
        _: &Request,
        number: INodeNo,
        mode: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<std::time::SystemTime>,
        _: Option<FileHandle>,
        _: Option<std::time::SystemTime>,
        _: Option<std::time::SystemTime>,
        _: Option<std::time::SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        answer!(
            self,
            Operation::Any,
            reply,
            |tree: &mut Tree| {
                let node = tree.node(number.0)?;
                if let Some(mode) = mode {
                    node.mode = (mode & 0o7777) as u16;
                }
                if let Some(size) = size {
                    node.content.set_len(size)?;
                }
                tree.attributes(number.0)
            },
            |reply: ReplyAttr, found: FileAttr| reply.attr(&TTL, &found)
        );
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, _: u32, reply: ReplyEntry) {
        let name = name.to_owned();
        answer!(
            self,
            Operation::Create,
            reply,
            |tree: &mut Tree| tree.make(parent.0, name, Node::new(true, mode)),
            |reply: ReplyEntry, made: FileAttr| reply.entry(&TTL, &made, FIRST)
        );
    }

    fn create(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        let uncached = matches!(lock(&self.control).disturbed, Some((Operation::Read, _)));
        let flags = match uncached {
            true => FopenFlags::FOPEN_DIRECT_IO,
            false => FopenFlags::empty(),
        };
        let name = name.to_owned();
        answer!(
            self,
            Operation::Create,
            reply,
            |tree: &mut Tree| {
                let made = tree.make(parent.0, name, Node::new(false, mode))?;
                tree.open(made.ino.0)?;
                Ok::<_, Errno>(made)
            },
            |reply: ReplyCreate, made: FileAttr| {
                reply.created(&TTL, &made, FIRST, OPENED, flags);
            }
        );
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.to_owned();
        answer!(
            self,
            Operation::Remove,
            reply,
            |tree: &mut Tree| tree.remove(parent.0, &name),
            |reply: ReplyEmpty, ()| reply.ok()
        );
    }

    fn rmdir(&self, request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.unlink(request, parent, name, reply);
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (name, new_name) = (name.to_owned(), new_name.to_owned());
        let exchange = flags.contains(RenameFlags::RENAME_EXCHANGE);
        if exchange || lock(&self.tree).limits.plain_rename && !flags.is_empty() {
            return reply.error(Errno::EINVAL);
        }
        let keep = flags.contains(RenameFlags::RENAME_NOREPLACE);
        answer!(
            self,
            Operation::Any,
            reply,
            |tree: &mut Tree| tree.rename((parent.0, &name), (new_parent.0, &new_name), keep),
            |reply: ReplyEmpty, ()| reply.ok()
        );
    }

    fn link(&self, _: &Request, number: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.to_owned();
        answer!(
            self,
            Operation::Any,
            reply,
            |tree: &mut Tree| tree.link(number.0, parent.0, name),
            |reply: ReplyEntry, linked: FileAttr| reply.entry(&TTL, &linked, FIRST)
        );
    }

    fn release(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        answer!(
            self,
            Operation::Any,
            reply,
            |tree: &mut Tree| tree.close(number.0),
            |reply: ReplyEmpty, ()| reply.ok()
        );
    }

    fn open(&self, _: &Request, number: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        answer!(
            self,
            Operation::Any,
            reply,
            |tree: &mut Tree| tree.open(number.0),
            |reply: ReplyOpen, ()| reply.opened(OPENED, FopenFlags::empty())
        );
    }

    fn read(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        answer!(
            self,
            Operation::Read,
            reply,
            |tree: &mut Tree| {
                let mut data = vec![0; size as usize];
                let count = tree.node(number.0)?.content.read_at(&mut data, offset)?;
                data.truncate(count);
                Ok::<_, Errno>(data)
            },
            |reply: ReplyData, data: Vec<u8>| reply.data(&data)
        );
    }

    fn write(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let data = data.to_owned();
        self.take_time(data.len());
        answer!(
            self,
            Operation::Write,
            reply,
            |tree: &mut Tree| {
                tree.node(number.0)?.content.write_all_at(&data, offset)?;
                Ok::<_, Errno>(data.len())
            },
            |reply: ReplyWrite, count: usize| reply.written(count as u32)
        );
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        answer!(
            self,
            Operation::Any,
            reply,
            |_: &mut Tree| Ok(()),
            |reply: ReplyEmpty, ()| reply.ok()
        );
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        answer!(
            self,
            Operation::Fsync,
            reply,
            |_: &mut Tree| Ok(()),
            |reply: ReplyEmpty, ()| reply.ok()
        );
    }

    fn fsyncdir(
        &self,
        request: &Request,
        number: INodeNo,
        handle: FileHandle,
        only: bool,
        reply: ReplyEmpty,
    ) {
        self.fsync(request, number, handle, only, reply);
    }

    fn readdir(&self, _: &Request, number: INodeNo, _: FileHandle, offset: u64, reply: ReplyDirectory) {
        answer!(
            self,
            Operation::Any,
            reply,
            |tree: &mut Tree| {
                let entries = tree.entries(number.0)?.clone();
                let kind = |number: &u64| tree.nodes[number].kind();
                let listed = entries
                    .iter()
                    .map(|(name, number)| (*number, kind(number), name.clone()));
                Ok::<_, Errno>(listed.collect())
            },
            |mut reply: ReplyDirectory, entries: Vec<(u64, FileType, OsString)>| {
                for ((number, kind, name), next) in entries.iter().zip(1..).skip(offset as usize) {
                    if reply.add(INodeNo(*number), next, *kind, name) {
                        break;
                    }
                }
                reply.ok();
            }
        );
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        answer!(
            self,
            Operation::Any,
            reply,
            |_: &mut Tree| Ok(()),
            |reply: ReplyStatfs, ()| {
                reply.statfs(BLOCKS, BLOCKS, BLOCKS, BLOCKS, BLOCKS, BLOCK, 255, BLOCK);
            }
        );
    }
}
