//! A bus that starts the service at the first call: by itself, or through a stand-in for systemd.

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

/// How a bus starts the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// The bus starts the program (`Exec=`).
    Bus,
    /// The bus asks systemd (`SystemdService=`).
    Systemd,
}

const UNIT: &str = "backupd.service";
const SYSTEMD: &str = "org.freedesktop.systemd1";
/// The unit's `RestartForceExitStatus=`.
const START_AGAIN: i32 = 75;
/// How often the stand-in checks whether the service has ended.
const LOOK: Duration = Duration::from_millis(1);

/// Writes the files that a bus with its socket in `dir` needs.
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
    // The bus's helper does not stay, so the parent-death signal is not set; the service ends when the bus does.
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

/// The state of the unit as systemd sees it.
#[derive(Default)]
struct Unit {
    daemon: Option<Daemon>,
    /// The service has sent `STOPPING=1`.
    stopping: bool,
    /// Whether to start the service after it has ended.
    start_queued: bool,
    /// The number of jobs that were ever installed.
    jobs: u32,
    /// Simulates other units that are started all the time.
    busy: bool,
    /// Starts of the unit while it was active: systemd ignores them.
    starts_for_nothing: u32,
    messages: Vec<String>,
    ends: Vec<i32>,
}

/// Does what systemd does for a unit of `Type=notify` that the bus has started (checked against its sources). systemd
/// ignores a start while the unit is active, and queues it while the unit is deactivating, which begins with
/// `STOPPING=1`.
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
    /// Supervises the service of a system whose bus asks systemd; `watchdog` is the unit's `WatchdogSec=`.
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

    /// Returns the messages that the service has sent to systemd so far, a line each.
    pub fn messages(&self) -> Vec<String> {
        self.unit().messages.clone()
    }

    /// Returns how often the service has sent this message.
    pub fn said(&self, message: &str) -> usize {
        self.unit().messages.iter().filter(|it| *it == message).count()
    }

    /// Returns the exit statuses of the service so far.
    pub fn ends(&self) -> Vec<i32> {
        self.unit().ends.clone()
    }

    /// Returns how often the bus requested a start while the unit was active: no start follows, so the call behind it
    /// waits.
    pub fn starts_for_nothing(&self) -> u32 {
        self.unit().starts_for_nothing
    }

    /// From now on, every time the service reads the number of jobs, one more has been started.
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

    /// Reads the messages of the service. The stand-in does this before it handles anything from the bus.
    fn hear(&self) {
        let mut buffer = [0; 4096];
        // Closes a descriptor that comes with the message.
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
        // The service may have sent a last message before it ended.
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
