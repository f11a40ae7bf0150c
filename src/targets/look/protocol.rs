//! A question and its answer on a stream. Each is a frame of length, version and JSON. A frame of length 0 means that
//! the helper is still at work.

use std::io::{self, Read, Write};
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{FileId, OpenFile, Opener};

/// Increases with each change of a question or an answer, because a service that waits for its jobs can be older than
/// the helper.
const VERSION: u32 = 1;

/// The most bytes of a question: a host's block devices, or a path.
pub const MOST_QUESTION: usize = 1 << 20;
/// The most bytes of an answer: 16,384 open files.
pub const MOST_ANSWER: usize = 16 << 20;

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Question {
    OpenFiles { process: u32, owner: Option<u32> },
    Locker { files: Vec<FileId> },
    DataAtLeast { process: u32, file: PathBuf },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    OpenFiles(Vec<OpenFile>),
    Locker(Option<Opener>),
    DataAtLeast(u64),
    Failed(String),
}

#[derive(Debug)]
pub enum Received<T> {
    Message(T),
    /// The peer is at work.
    Working,
    /// A message of another version.
    OtherVersion,
}

pub fn send<T: Serialize>(mut stream: impl Write, message: &T, most: usize) -> io::Result<()> {
    let content = serde_json::to_vec(message)?;
    if content.len() > most {
        return Err(io::Error::other(format!("more than {most} bytes")));
    }
    let length = u32::try_from(content.len()).map_err(io::Error::other)?;
    let mut frame = header(length).to_vec();
    frame.extend(content);
    stream.write_all(&frame)
}

/// Reports that the helper is still at work.
pub fn send_working(mut stream: impl Write) -> io::Result<()> {
    stream.write_all(&header(0))
}

fn header(length: u32) -> [u8; 8] {
    let mut header = [0; 8];
    header[..4].copy_from_slice(&length.to_le_bytes());
    header[4..].copy_from_slice(&VERSION.to_le_bytes());
    header
}

pub fn receive<T: DeserializeOwned>(mut stream: impl Read, most: usize) -> io::Result<Received<T>> {
    let number = |stream: &mut dyn Read| {
        let mut number = [0; 4];
        stream.read_exact(&mut number)?;
        Ok::<_, io::Error>(u32::from_le_bytes(number))
    };
    let length = number(&mut stream)?;
    if number(&mut stream)? != VERSION {
        return Ok(Received::OtherVersion);
    }
    let length = usize::try_from(length).map_err(io::Error::other)?;
    if length == 0 {
        return Ok(Received::Working);
    }
    if length > most {
        return Err(io::Error::other(format!("{length} bytes, more than {most}")));
    }
    let mut content = vec![0; length];
    stream.read_exact(&mut content)?;
    Ok(Received::Message(serde_json::from_slice(&content)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sent_message_is_received() {
        let mut stream = Vec::new();
        send_working(&mut stream).unwrap();
        send(&mut stream, &Answer::DataAtLeast(7), MOST_ANSWER).unwrap();
        let mut stream = stream.as_slice();
        let first = receive::<Answer>(&mut stream, MOST_ANSWER).unwrap();
        assert!(matches!(first, Received::Working));
        let second = receive::<Answer>(&mut stream, MOST_ANSWER).unwrap();
        assert!(matches!(second, Received::Message(Answer::DataAtLeast(7))));
    }

    #[test]
    fn a_frame_of_another_version_is_not_parsed() {
        let mut stream = Vec::new();
        send(&mut stream, &Answer::DataAtLeast(7), MOST_ANSWER).unwrap();
        stream[4] += 1;
        let received = receive::<Answer>(stream.as_slice(), MOST_ANSWER).unwrap();
        assert!(matches!(received, Received::OtherVersion));
    }

    #[test]
    fn a_frame_that_is_too_long_is_refused_before_it_is_read() {
        let mut stream = Vec::new();
        send(&mut stream, &Answer::Failed("x".repeat(100)), MOST_ANSWER).unwrap();
        assert!(receive::<Answer>(stream.as_slice(), 50).is_err());
        assert!(send(Vec::new(), &Answer::Failed("x".repeat(100)), 50).is_err());
    }
}
