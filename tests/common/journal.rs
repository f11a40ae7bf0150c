//! The journal of a test: a socket in place of journald's, whose records are kept in memory.
//!
//! The protocol is journald's native one. A datagram is a record, or passes a descriptor of a file that contains one.
//! A record is a list of fields: `KEY=value` and a newline, or `KEY`, a newline, the value's length in eight bytes,
//! the value and a newline.

use std::fs::{self, File};
use std::io::{IoSliceMut, Read, Seek};
use std::mem::MaybeUninit;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};

use super::wait;

/// Larger than any datagram (`net.core.wmem_max`): the writer sends longer records as files.
const LONGEST: usize = 1 << 20;
/// The field of the marker records that show how far the journal was read.
const MARK: &str = "TEST_MARK";

/// One record: its fields in order. A name can occur more than once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Record(pub Vec<(String, Vec<u8>)>);

impl Record {
    /// Returns all values of a field, as text.
    pub fn all(&self, name: &str) -> Vec<String> {
        let named = self.0.iter().filter(|(field, _)| field == name);
        named
            .map(|(_, value)| String::from_utf8_lossy(value).into_owned())
            .collect()
    }

    /// Returns the value of a field that occurs exactly once.
    #[track_caller]
    pub fn one(&self, name: &str) -> String {
        let mut all = self.all(name);
        assert_eq!(all.len(), 1, "{name} in {self:?}");
        all.remove(0)
    }
}

/// The journal. Its thread ends with the test process.
pub struct Journal {
    dir: PathBuf,
    records: Arc<Mutex<Vec<Result<Record, String>>>>,
    marks: AtomicUsize,
}

impl Journal {
    /// Creates the socket in `dir`, and listens.
    #[track_caller]
    pub fn start(dir: &Path) -> Self {
        let dir = dir.join("run-systemd");
        fs::create_dir_all(dir.join("journal")).expect("the journal's directory is made");
        let socket = UnixDatagram::bind(dir.join("journal/socket")).expect("the journal's socket is made");
        let records = Arc::<Mutex<Vec<_>>>::default();
        let kept = records.clone();
        std::thread::spawn(move || {
            let mut buffer = vec![0; LONGEST];
            loop {
                // A writer checks with an empty datagram whether a journal exists.
                if let Some(record) = receive(&socket, &mut buffer).transpose() {
                    kept.lock().unwrap_or_else(PoisonError::into_inner).push(record);
                }
            }
        });
        Self {
            dir,
            records,
            marks: AtomicUsize::new(0),
        }
    }

    /// The directory that replaces /run/systemd for processes that log to this journal.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the path of the socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("journal/socket")
    }

    /// Returns all records that were written before this call.
    #[track_caller]
    pub fn records(&self) -> Vec<Record> {
        // Datagrams keep their order, so all records before the marker have been read when the marker has.
        let mark = self.marks.fetch_add(1, Ordering::SeqCst).to_string();
        let writer = UnixDatagram::unbound().expect("a socket is made");
        let sent = writer.send_to(format!("{MARK}={mark}\n").as_bytes(), self.socket());
        sent.expect("the journal listens");
        let read = wait::until("the journal to be read", || {
            let records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
            let marked = |record: &Result<Record, String>| {
                record
                    .as_ref()
                    .is_ok_and(|record| record.all(MARK) == [mark.as_str()])
            };
            let end = records.iter().position(marked)?;
            Some(records[..end].to_vec())
        });
        let whole = read.into_iter().map(|record| match record {
            Ok(record) => record,
            Err(reason) => panic!("a record that journald could not read: {reason}"),
        });
        whole.filter(|record| record.all(MARK).is_empty()).collect()
    }
}

/// Returns the record of the next datagram; `None` if it is empty.
fn receive(socket: &UnixDatagram, buffer: &mut [u8]) -> Result<Option<Record>, String> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = {
        let mut slices = [IoSliceMut::new(buffer)];
        recvmsg(socket, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC)
    };
    let received = received.map_err(|error| error.to_string())?;
    if received.flags.contains(ReturnFlags::TRUNC) {
        return Err("a datagram is too long".to_owned());
    }
    let files = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    if let Some(descriptor) = files.flatten().next() {
        let mut file = File::from(descriptor);
        let mut bytes = Vec::new();
        // The writer's file offset is shared with this descriptor.
        file.rewind()
            .and_then(|()| file.read_to_end(&mut bytes))
            .map_err(|error| error.to_string())?;
        return parse(&bytes).map(Some);
    }
    match &buffer[..received.bytes] {
        [] => Ok(None),
        bytes => parse(bytes).map(Some),
    }
}

/// Parses one record. A field that journald would drop is an error here, because the service must not rely on it.
pub fn parse(mut bytes: &[u8]) -> Result<Record, String> {
    let mut record = Record::default();
    while !bytes.is_empty() {
        let end = bytes.iter().position(|byte| *byte == b'\n');
        let line = &bytes[..end.ok_or("the last line has no end")?];
        bytes = &bytes[line.len() + 1..];
        let (name, value) = match line.iter().position(|byte| *byte == b'=') {
            Some(at) => (&line[..at], &line[at + 1..]),
            None => {
                let (length, rest) = bytes.split_first_chunk().ok_or("a length is cut off")?;
                let length =
                    usize::try_from(u64::from_le_bytes(*length)).map_err(|error| error.to_string())?;
                let (value, rest) = rest.split_at_checked(length).ok_or("a value is cut off")?;
                bytes = rest
                    .strip_prefix(b"\n")
                    .ok_or("a value is longer than its length")?;
                (line, value)
            }
        };
        record.0.push((field_name(name)?, value.to_vec()));
    }
    Ok(record)
}

fn field_name(name: &[u8]) -> Result<String, String> {
    let good = |byte: &u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || *byte == b'_';
    let text = String::from_utf8_lossy(name).into_owned();
    match name.first() {
        Some(first) if first.is_ascii_uppercase() && name.iter().all(good) && name.len() <= 64 => Ok(text),
        _ => Err(format!("{text:?} is not the name of a field")),
    }
}
