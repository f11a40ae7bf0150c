//! A bus that has the service started when somebody calls it: by itself, or by systemd, for which the test stands in.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use backupd::names::BUS_NAME;
use futures_util::StreamExt;
use tokio::task::JoinHandle;
use zbus::fdo::{DBusProxy, RequestNameFlags};
use zbus::message::Type;
use zbus::wire::Variant;
use zbus::{Connection, Message, MessageStream};

use super::System;
use super::daemon::{Daemon, Environment};

/// How a bus has the service started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// The bus starts the program (`Exec=`).
    Bus,
    /// The bus asks systemd (`SystemdService=`).
    Systemd,
}

const UNIT: &str = "backupd.service";
const SYSTEMD: &str = "org.freedesktop.systemd1";
/// What the unit has in `RestartForceExitStatus=`.
const START_AGAIN: i32 = 75;
/// How often the stand-in looks for the end of the service.
const LOOK: Duration = Duration::from_millis(1);

/// Writes what a bus with its socket in `dir` has to know.
pub fn configure(dir: &Path, config: &Path) {
    let services = dir.join("services");
    fs::create_dir_all(&services).expect("a directory is made");
    let (services, bus, config) = (services.display(), dir.join("bus"), config.display());
    fs::write(
        dir.join("bus-activation.conf"),
        format!(
            "<busconfig><servicedir>{services}</servicedir><policy user=\"root\">\
             <allow own=\"{SYSTEMD}\"/><allow send_destination=\"{SYSTEMD}\"/></policy></busconfig>"
        ),
    )
    .expect("the bus's configuration is written");
    // Its parent does not stay, so it is bound to nobody's life; it ends when the bus does.
    let program = format!(
        "/usr/bin/env DBUS_SYSTEM_BUS_ADDRESS=unix:path={} RUST_LOG=backupd=debug,info {} \
         --config {config}",
        bus.display(),
        env!("CARGO_BIN_EXE_backupd"),
    );
    fs::write(
        dir.join("services").join(format!("{BUS_NAME}.service")),
        format!("[D-BUS Service]\nName={BUS_NAME}\nExec={program}\nUser=root\nSystemdService={UNIT}\n"),
    )
    .expect("the service's file is written");
}

/// What systemd knows of the unit.
#[derive(Default)]
struct Unit {
    daemon: Option<Daemon>,
    /// It has said `STOPPING=1`.
    stopping: bool,
    /// It is to be started when it has ended.
    start_queued: bool,
    /// Jobs that were ever installed.
    jobs: u32,
    /// Other units are started all the time.
    busy: bool,
    /// Starts of the unit while it was active: systemd does nothing then.
    starts_for_nothing: u32,
    messages: Vec<String>,
    ends: Vec<i32>,
}

/// Does what systemd does for a unit of `Type=notify` that the bus has started (checked against its sources: a start is
/// nothing while the unit is active, and is kept while it is deactivating, which it is from `STOPPING=1` on).
pub struct Systemd {
    unit: Arc<Mutex<Unit>>,
    task: JoinHandle<()>,
}

struct Work {
    unit: Arc<Mutex<Unit>>,
    notifications: UnixDatagram,
    connection: Connection,
    launch: Launch,
}

struct Launch {
    address: String,
    dir: PathBuf,
    config: PathBuf,
    environment: Environment,
}

impl Systemd {
    /// Looks after the service of a system whose bus asks systemd; `watchdog` is the unit's `WatchdogSec=`.
    pub async fn start(system: &System, watchdog: Option<Duration>) -> Self {
        let socket = system.dir().join("notify");
        let notifications = UnixDatagram::bind(&socket).expect("a socket is made");
        notifications
            .set_nonblocking(true)
            .expect("a socket need not block");
        let mut environment = vec![("NOTIFY_SOCKET".to_owned(), socket.display().to_string())];
        environment.extend(watchdog.map(|time| ("WATCHDOG_USEC".to_owned(), time.as_micros().to_string())));
        let connection = system.connect().await;
        let messages = MessageStream::from(&connection);
        let bus = DBusProxy::new(&connection).await.expect("the bus answers");
        let name = SYSTEMD.try_into().expect("it is a name");
        bus.request_name(name, RequestNameFlags::DO_NOT_QUEUE)
            .await
            .expect("the name is free");
        let unit = Arc::<Mutex<Unit>>::default();
        let work = Work {
            unit: unit.clone(),
            notifications,
            connection,
            launch: Launch {
                address: system.bus().address().to_owned(),
                dir: system.dir().to_owned(),
                config: system.config_path(),
                environment,
            },
        };
        Self {
            unit,
            task: tokio::spawn(work.run(messages)),
        }
    }

    fn unit(&self) -> MutexGuard<'_, Unit> {
        self.unit.lock().expect("no panic while it is locked")
    }

    /// What the service has told until now, a line each.
    pub fn messages(&self) -> Vec<String> {
        self.unit().messages.clone()
    }

    /// How often the service said this.
    pub fn said(&self, message: &str) -> usize {
        self.unit().messages.iter().filter(|it| *it == message).count()
    }

    /// The exit statuses of the service so far.
    pub fn ends(&self) -> Vec<i32> {
        self.unit().ends.clone()
    }

    /// How often the bus had an active unit started: the call behind it waits for what nobody starts.
    pub fn starts_for_nothing(&self) -> u32 {
        self.unit().starts_for_nothing
    }

    /// From now on something is started whenever the service looks whether something was.
    pub fn count_a_job_at_each_look(&self) {
        self.unit().busy = true;
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Work {
    async fn run(self, mut messages: MessageStream) {
        let mut look = tokio::time::interval(LOOK);
        loop {
            tokio::select! {
                message = messages.next() => match message {
                    Some(Ok(message)) => self.handle(&message).await,
                    _ => return,
                },
                _ = look.tick() => {}
            }
            self.hear();
            self.look_for_the_end();
        }
    }

    fn unit(&self) -> MutexGuard<'_, Unit> {
        self.unit.lock().expect("no panic while it is locked")
    }

    /// Reads what the service has told; always before anything that comes over the bus is handled.
    fn hear(&self) {
        let mut buffer = [0; 4096];
        // A descriptor that comes along is closed with this.
        while let Ok(length) = self.notifications.recv(&mut buffer) {
            let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
            let mut unit = self.unit();
            unit.stopping |= text.lines().any(|line| line == "STOPPING=1");
            unit.messages.extend(text.lines().map(str::to_owned));
        }
    }

    async fn handle(&self, message: &Message) {
        self.hear();
        let header = message.header();
        let member = header.member().map(|member| member.to_string());
        match (message.message_type(), member.as_deref()) {
            (Type::Signal, Some("ActivationRequest")) => {
                let unit: String = message.body().deserialize().expect("a unit is named");
                assert_eq!(unit, UNIT);
                self.start_job();
            }
            (Type::MethodCall, Some("Get")) => {
                let asked: (String, String) = message.body().deserialize().expect("a property is named");
                assert_eq!(asked.1, "NInstalledJobs");
                let jobs = {
                    let mut unit = self.unit();
                    unit.jobs += u32::from(unit.busy);
                    Variant::from(unit.jobs)
                };
                let reply = Message::method_return(&header)
                    .build(&jobs)
                    .expect("a reply is made");
                self.connection.send(&reply).await.expect("the bus takes it");
            }
            _ => {}
        }
    }

    fn start_job(&self) {
        let mut unit = self.unit();
        unit.jobs += 1;
        match (&unit.daemon, unit.stopping) {
            (None, _) => self.launch(&mut unit),
            (Some(_), true) => unit.start_queued = true,
            (Some(_), false) => unit.starts_for_nothing += 1,
        }
    }

    fn look_for_the_end(&self) {
        let mut unit = self.unit();
        let Some(status) = unit.daemon.as_mut().and_then(|daemon| daemon.process().ended()) else {
            return;
        };
        // What it said last may have come meanwhile.
        drop(unit);
        self.hear();
        let mut unit = self.unit();
        unit.daemon = None;
        unit.stopping = false;
        unit.ends.push(status);
        if std::mem::take(&mut unit.start_queued) || status == START_AGAIN {
            self.launch(&mut unit);
        }
    }

    fn launch(&self, unit: &mut Unit) {
        let Launch {
            address,
            dir,
            config,
            environment,
        } = &self.launch;
        unit.daemon = Some(Daemon::start_supervised(address, dir, config, environment));
    }
}
