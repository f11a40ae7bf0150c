//! The helper: a process that answers the questions of one connection from root, and then ends.
//!
//! systemd starts one helper per connection (`Accept=yes`). So no helper outlives an upgrade, and a helper that hangs
//! blocks no other.

use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use rustix::net::sockopt::socket_peercred;

use super::protocol::{Answer, MOST_ANSWER, MOST_QUESTION, Question, Received, receive, send, send_working};
use super::{Error, content, is_able, processes};

/// How long the service may take to send a question, and to read the answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// The interval of the reports that the helper is at work.
const REPORT: Duration = Duration::from_secs(1);

/// Answers the questions on standard input, which is the connection.
pub fn serve() -> ExitCode {
    match answer_all() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn answer_all() -> io::Result<()> {
    let stream = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let peer = socket_peercred(&stream)?;
    if !peer.uid.is_root() {
        let user = peer.uid.as_raw();
        return Err(io::Error::other(format!(
            "cannot answer user {user}: only root may ask"
        )));
    }
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    loop {
        let answer = match receive(&stream, MOST_QUESTION) {
            Ok(Received::Message(question)) => answer(question, &stream),
            // Every answer has this helper's version, so the service sees the difference. The helper cannot parse
            // further questions.
            Ok(Received::OtherVersion | Received::Working) => {
                return send(&stream, &Answer::Failed(Error::Version.to_string()), MOST_ANSWER);
            }
            Err(error) => {
                return match error.kind() {
                    // The service has no more questions, or not for some time. Then it connects again.
                    ErrorKind::UnexpectedEof | ErrorKind::WouldBlock | ErrorKind::TimedOut => Ok(()),
                    _ => Err(error),
                };
            }
        };
        let answer = answer.unwrap_or_else(|error| {
            eprintln!("{error}");
            Answer::Failed(error.to_string())
        });
        send(&stream, &answer, MOST_ANSWER)?;
    }
}

fn answer(question: Question, stream: &UnixStream) -> Result<Answer, Error> {
    if !is_able() {
        return Err(Error::Unable);
    }
    let mut last = Instant::now();
    let at_work = || {
        if last.elapsed() < REPORT {
            return Ok(());
        }
        last = Instant::now();
        // If this fails, the service does not wait for the answer any more.
        send_working(stream).map_err(|error| Error::Failed(error.to_string()))
    };
    Ok(match question {
        Question::OpenFiles { process, owner } => Answer::OpenFiles(processes::open_files(process, owner)?),
        Question::Locker { files } => Answer::Locker(processes::locker(&files, at_work)?),
        Question::DataAtLeast { process, file } => {
            Answer::DataAtLeast(content::data_at_least(process, &file, at_work)?)
        }
    })
}
