//! A caller of the service in this process, as root: proxies, and every signal of the service in the order of arrival.

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

/// A signal: its name, and its arguments as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signal {
    pub path: String,
    pub name: String,
    pub arguments: Vec<String>,
}

/// Runs `work` as an ordinary user in this process, in the user's own group only. The kernel keeps credentials per
/// thread.
pub fn as_user<T: Send + 'static>(uid: u32, work: impl FnOnce() -> T + Send + 'static) -> T {
    // A new thread, which ends after the work: it never changes its user back.
    let working = std::thread::spawn(move || {
        let (user, group) = (Uid::from_raw(uid), Gid::from_raw(polkit::group(uid)));
        set_thread_groups(&[group]).expect("the groups are set");
        set_thread_res_gid(group, group, group).expect("the group is set");
        set_thread_res_uid(user, user, user).expect("the user is set");
        work()
    });
    working.join().expect("it is done")
}

/// Connects a socket to the bus as an ordinary user. The bus uses the credentials of the connecting thread (unix(7),
/// SO_PEERCRED).
pub fn socket_as(system: &System, uid: u32) -> UnixStream {
    let socket = system.dir().join("bus");
    as_user(uid, || {
        UnixStream::connect(socket).expect("the bus accepts a connection")
    })
}

/// Connects to the bus as an ordinary user.
pub async fn connect_as(system: &System, uid: u32) -> Connection {
    let connected = zbus::connection::Builder::unix_stream(socket_as(system, uid))
        .user_id(uid)
        .build();
    connected.await.expect("the bus takes the user")
}

impl Caller {
    /// Returns a caller that is root.
    pub async fn new(system: &System) -> Self {
        Self::on(system.connect().await).await
    }

    /// Returns a caller that is an ordinary user.
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

    /// Starts a backup; the service must accept it. The backup may still fail before it begins.
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

    /// Starts a job, and returns it also if its backup did not begin and the call failed with the reason.
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

    /// Runs a backup to its end; it must complete.
    pub async fn complete(&self, domain: &str, document: &str) -> JobProxy<'static> {
        let job = self.start(domain, document).await;
        assert_completed(&job).await;
        job
    }

    /// Like [`Caller::complete`], with a full backup.
    pub async fn complete_full(&self, domain: &str, document: &str) -> JobProxy<'static> {
        let full = Options::from([("incremental", Variant::from("full"))]);
        let job = self.start_with(domain, document, &[], full).await;
        assert_completed(&job).await;
        job
    }

    /// Registers a domain with a connected monitor socket.
    pub async fn register(&self, name: &str, socket: OwnedFd) -> zbus::Result<OwnedObjectPath> {
        let registering = self
            .manager
            .register_domain(name, socket.as_fd().into(), Options::new());
        wait::within("RegisterDomain", registering).await
    }

    /// Returns every signal except `PropertiesChanged` up to and including this one.
    pub async fn signals_until(&mut self, name: &str) -> Vec<Signal> {
        let mut seen = self.all_signals_until(name).await;
        seen.retain(|signal| signal.name != "PropertiesChanged");
        seen
    }

    /// Returns every signal up to and including this one.
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

    /// Returns every signal that the service has sent so far and that was not taken yet.
    pub async fn signals_so_far(&mut self) -> Vec<Signal> {
        // The bus keeps the order, so the reply to any call comes after all signals that were sent before it.
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

    /// Returns all properties of an object's interface.
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

/// Waits for the end of a job, which must be successful.
pub async fn assert_completed(job: &JobProxy<'_>) {
    let ended = wait::within("the end of the backup", job.wait())
        .await
        .expect("Wait answers");
    assert_eq!(ended, ("completed".to_owned(), String::new(), String::new()));
}

/// Waits for the end of a job, which must fail with this error of the service and this text.
pub async fn assert_failed(job: &JobProxy<'_>, error: &str, text: &str) {
    let (result, name, message) = wait::within("the end of the backup", job.wait()).await.unwrap();
    let expected = format!("org.example.Backup1.Error.{error}");
    assert_eq!((result.as_str(), name), ("failed", expected), "{message}");
    assert!(message.contains(text), "{text:?} in {message:?}");
}

/// Cancels a running job, and waits for its end.
pub async fn cancel(job: &JobProxy<'_>) {
    job.cancel().await.expect("the job can be cancelled");
    let (result, _, _) = wait::within("the end of the backup", job.wait())
        .await
        .expect("Wait answers");
    assert_eq!(result, "cancelled");
}

/// Returns names and arguments, in order.
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
