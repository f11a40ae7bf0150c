//! A caller of the service in this process: root's, with proxies, and with every signal of the service that reaches it
//! in the order in which it came.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use futures_util::{FutureExt, StreamExt};
use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use zbus::wire::{OwnedObjectPath, OwnedVariant, Variant};
use zbus::{Connection, MatchRule, MessageStream};

use super::System;
use super::polkit;
use super::proxies::{JobProxy, ManagerProxy, Options, error_name};
use super::wait;

pub struct Caller {
    pub connection: Connection,
    pub manager: ManagerProxy<'static>,
    signals: MessageStream,
}

/// A signal as it came: its name and, as text, its arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signal {
    pub path: String,
    pub name: String,
    pub arguments: Vec<String>,
}

/// Does something as an ordinary user, in its own group and no other, in this process. A thread has its own user as far as
/// the kernel is concerned.
pub fn as_user<T: Send + 'static>(uid: u32, work: impl FnOnce() -> T + Send + 'static) -> T {
    // A thread of its own, which ends with that: it never changes back.
    let working = std::thread::spawn(move || {
        let (user, group) = (Uid::from_raw(uid), Gid::from_raw(polkit::group(uid)));
        set_thread_groups(&[group]).expect("the groups are set");
        set_thread_res_gid(group, group, group).expect("the group is set");
        set_thread_res_uid(user, user, user).expect("the user is set");
        work()
    });
    working.join().expect("it is done")
}

/// A socket to the bus of an ordinary user's, from this process: what the kernel says of the thread that connects is what the
/// bus goes by (unix(7), SO_PEERCRED).
pub fn socket_as(system: &System, uid: u32) -> UnixStream {
    let socket = system.dir().join("bus");
    as_user(uid, || {
        UnixStream::connect(socket).expect("the bus accepts a connection")
    })
}

/// A connection of an ordinary user's.
pub async fn connect_as(system: &System, uid: u32) -> Connection {
    let connected = zbus::connection::Builder::unix_stream(socket_as(system, uid))
        .user_id(uid)
        .build();
    connected.await.expect("the bus takes the user")
}

impl Caller {
    /// A caller that is root.
    pub async fn new(system: &System) -> Self {
        Self::on(system.connect().await).await
    }

    /// A caller that is an ordinary user.
    pub async fn of_user(system: &System, uid: u32) -> Self {
        Self::on(connect_as(system, uid).await).await
    }

    async fn on(connection: Connection) -> Self {
        let rule = MatchRule::builder()
            .msg_type(zbus::message::Type::Signal)
            .sender("org.example.Backup1")
            .build()
            .expect("a rule is made");
        let signals = MessageStream::for_match_rule(rule, &connection, std::num::NonZeroUsize::new(4096))
            .await
            .expect("signals are matched");
        let manager = ManagerProxy::new(&connection).await.expect("a proxy is made");
        Self {
            connection,
            manager,
            signals,
        }
    }

    pub async fn job(&self, path: OwnedObjectPath) -> JobProxy<'static> {
        JobProxy::new(&self.connection, path)
            .await
            .expect("a proxy is made")
    }

    /// Starts a backup, which must be accepted. It may fail before it has begun.
    pub async fn start(&self, domain: &str, document: &str) -> JobProxy<'static> {
        self.start_with(domain, document, &[], Options::new()).await
    }

    pub async fn start_with(
        &self,
        domain: &str,
        document: &str,
        files: &[OwnedFd],
        options: Options<'_>,
    ) -> JobProxy<'static> {
        let started = self.start_job(domain, document, files, options).await;
        started.expect("the backup is accepted")
    }

    /// A job that was made, also if its backup did not begin and the call failed with what prevented it.
    pub async fn start_job(
        &self,
        domain: &str,
        document: &str,
        files: &[OwnedFd],
        options: Options<'_>,
    ) -> zbus::Result<JobProxy<'static>> {
        let before = self.newest_job().await;
        match self.try_start(domain, document, files, options).await {
            Ok(job) => Ok(self.job(job).await),
            Err(error) => match self.newest_job().await {
                Some((number, path)) if before.is_none_or(|(before, _)| number > before) => {
                    let job = self.job(path).await;
                    assert_eq!(job.error_name().await.unwrap(), error_name(&error));
                    Ok(job)
                }
                _ => Err(error),
            },
        }
    }

    async fn newest_job(&self) -> Option<(u32, OwnedObjectPath)> {
        let jobs = self.manager.list_jobs().await.unwrap();
        jobs.into_iter()
            .map(|(number, path, _, _)| (number, path))
            .max_by_key(|(number, _)| *number)
    }

    pub async fn try_start(
        &self,
        domain: &str,
        document: &str,
        files: &[OwnedFd],
        options: Options<'_>,
    ) -> zbus::Result<OwnedObjectPath> {
        let files = files.iter().map(zbus::Fd::from).collect();
        let started = self.manager.create_backup(domain, document, files, options).await;
        started.map(|(_, path)| path)
    }

    /// Runs a backup to its end, which must be good.
    pub async fn complete(&self, domain: &str, document: &str) -> JobProxy<'static> {
        let job = self.start(domain, document).await;
        assert_completed(&job).await;
        job
    }

    /// The same, of all that the disks hold, whatever earlier backups there are.
    pub async fn complete_full(&self, domain: &str, document: &str) -> JobProxy<'static> {
        let full = Options::from([("incremental", Variant::from("full"))]);
        let job = self.start_with(domain, document, &[], full).await;
        assert_completed(&job).await;
        job
    }

    /// Hands over a monitor: a connected socket.
    pub async fn register(&self, name: &str, socket: OwnedFd) -> zbus::Result<OwnedObjectPath> {
        let registering = self
            .manager
            .register_domain(name, socket.as_fd().into(), Options::new());
        wait::within("RegisterDomain", registering).await
    }

    /// Every signal but `PropertiesChanged` that comes up to and with this one.
    pub async fn signals_until(&mut self, name: &str) -> Vec<Signal> {
        let mut seen = self.all_signals_until(name).await;
        seen.retain(|signal| signal.name != "PropertiesChanged");
        seen
    }

    /// Every signal that comes up to and with this one.
    pub async fn all_signals_until(&mut self, name: &str) -> Vec<Signal> {
        let mut seen = Vec::new();
        loop {
            let message = wait::within(&format!("the signal {name}"), self.signals.next()).await;
            seen.push(read(
                &message.expect("the bus is there").expect("a signal is read"),
            ));
            if seen.last().is_some_and(|signal| signal.name == name) {
                return seen;
            }
        }
    }

    /// Every signal that the service has sent by now and that was not taken yet.
    pub async fn signals_so_far(&mut self) -> Vec<Signal> {
        // Its answer comes after all that it sent before; any answer does.
        let peer = Some("org.freedesktop.DBus.Peer");
        let ping = self
            .connection
            .call_method(Some("org.example.Backup1"), "/", peer, "Ping", &());
        let _ = wait::within("an answer", ping).await;
        let mut seen = Vec::new();
        while let Some(message) = self.signals.next().now_or_never() {
            seen.push(read(
                &message.expect("the bus is there").expect("a signal is read"),
            ));
        }
        seen
    }

    /// All properties of an object's interface.
    pub async fn properties(&self, path: &str, interface: &str) -> HashMap<String, OwnedVariant> {
        let message = self
            .connection
            .call_method(
                Some("org.example.Backup1"),
                path,
                Some("org.freedesktop.DBus.Properties"),
                "GetAll",
                &(interface,),
            )
            .await
            .expect("properties are read");
        message.body().deserialize().expect("properties are a dictionary")
    }
}

/// Waits for the end of a job, which must be good.
pub async fn assert_completed(job: &JobProxy<'_>) {
    let ended = wait::within("the end of the backup", job.wait())
        .await
        .expect("Wait answers");
    assert_eq!(ended, ("completed".to_owned(), String::new(), String::new()));
}

/// The end of a job, which must be this error of the service's own with this in its text.
pub async fn assert_failed(job: &JobProxy<'_>, error: &str, text: &str) {
    let (result, name, message) = wait::within("the end of the backup", job.wait()).await.unwrap();
    let expected = format!("org.example.Backup1.Error.{error}");
    assert_eq!((result.as_str(), name), ("failed", expected), "{message}");
    assert!(message.contains(text), "{text:?} in {message:?}");
}

/// Cancels a job that has begun, and waits for its end.
pub async fn cancel(job: &JobProxy<'_>) {
    job.cancel().await.expect("the job can be cancelled");
    let (result, _, _) = wait::within("the end of the backup", job.wait())
        .await
        .expect("Wait answers");
    assert_eq!(result, "cancelled");
}

/// Names and arguments, in order.
pub fn brief(signals: &[Signal]) -> Vec<String> {
    signals
        .iter()
        .map(|signal| {
            format!("{} {}", signal.name, signal.arguments.join(" "))
                .trim_end()
                .to_owned()
        })
        .collect()
}

fn read(message: &zbus::Message) -> Signal {
    let (header, body) = (message.header(), message.body());
    let structure: zbus::wire::Structure<'_> = body.deserialize().expect("a signal has arguments");
    Signal {
        path: header.path().expect("a signal has a path").to_string(),
        name: header.member().expect("a signal has a name").to_string(),
        arguments: structure.fields().iter().map(text).collect(),
    }
}

fn text(value: &Variant<'_>) -> String {
    match value {
        Variant::Str(text) => text.to_string(),
        Variant::ObjectPath(path) => path.to_string(),
        Variant::U32(number) => number.to_string(),
        Variant::U64(number) => number.to_string(),
        other => format!("{other:?}"),
    }
}
