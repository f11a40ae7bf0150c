//! The fixture of the integration tests: a private system bus, polkit, the service and VMs. All are real, and each
//! test has its own, so that tests run in parallel. [`System`] combines the parts.
//!
//! Tests wait for conditions with a deadline (`wait`), and no process outlives its test (`process`). The tests need
//! root, which starts polkitd and the ordinary callers.

// Each test program and the benchmark compile this module separately and use different parts of it.
#![allow(dead_code)]

pub mod activation;
pub mod agent;
pub mod authority;
pub mod bus;
pub mod caller;
pub mod calls;
pub mod chain;
pub mod clients;
pub mod command;
pub mod daemon;
pub mod dialog;
pub mod dice;
pub mod disk;
pub mod eavesdropper;
pub mod guest;
pub mod hanging;
pub mod helper;
pub mod initramfs;
pub mod journal;
pub mod made;
pub mod measure;
pub mod observer;
pub mod peer;
pub mod polkit;
pub mod process;
pub mod proxies;
pub mod proxy;
pub mod raw;
pub mod recorded;
pub mod stand_in;
pub mod storage;
pub mod vm;
pub mod wait;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use backupd::fault;
use backupd::names::{BUS_NAME, DOMAIN_INTERFACE, MANAGER_INTERFACE, ROOT_PATH};
use backupd::targets::LOOK_VARIABLE;
use rustix::process::Signal;

use activation::Activation;
use bus::Bus;
use clients::{Clients, ROOT};
use daemon::{Daemon, Environment};
use journal::Journal;
use polkit::Polkit;
use vm::Vm;

/// A directory for one test, which ordinary users can enter; removed on drop.
#[track_caller]
pub fn test_directory() -> tempfile::TempDir {
    assert!(
        rustix::process::geteuid().is_root(),
        "these tests need root: they run polkitd and ordinary users"
    );
    // Short, because the path of a socket is limited to 107 bytes.
    let dir = tempfile::Builder::new()
        .prefix("bkp-")
        .tempdir()
        .expect("a temporary directory is made");
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("its mode is set");
    dir
}

/// The settings of a [`System`].
#[derive(Default)]
pub struct Setup {
    rules: String,
    stores: Vec<(String, PathBuf)>,
    config: String,
    tables: String,
    environment: Environment,
    journal: bool,
    no_polkit: bool,
    no_daemon: bool,
    activation: Option<Activation>,
    asks_helper: bool,
}

impl Setup {
    /// Adds rules for polkit (see [`polkit::allow`]).
    pub fn rules(mut self, rules: &str) -> Self {
        self.rules.push_str(rules);
        self
    }

    /// Adds a store beside the default one.
    pub fn store(mut self, name: &str, path: &Path) -> Self {
        self.stores.push((name.to_owned(), path.to_owned()));
        self
    }

    /// Adds top-level keys to the configuration file, before the tables.
    pub fn config(mut self, lines: &str) -> Self {
        self.config.push_str(lines);
        self.config.push('\n');
        self
    }

    /// Adds a table to the configuration file, with its header: `"[limits]\nkey = 1"`.
    pub fn table(mut self, lines: &str) -> Self {
        self.tables.push_str(lines);
        self.tables.push('\n');
        self
    }

    /// Adds an environment variable of the service, for each start.
    pub fn environment(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Makes the service log to a journal of the test's own: see [`System::journal`].
    pub fn journal(mut self) -> Self {
        self.journal = true;
        self
    }

    /// A system whose service cannot look into other processes, and asks the helper: see [`helper::Helper`].
    pub fn asking_helper(mut self) -> Self {
        self.asks_helper = true;
        self
    }

    /// Leaves out polkit.
    pub fn without_polkit(mut self) -> Self {
        self.no_polkit = true;
        self
    }

    /// Leaves the service stopped: see [`System::start_daemon`].
    pub fn without_daemon(mut self) -> Self {
        self.no_daemon = true;
        self
    }

    /// Lets the first call start the service.
    pub fn on_demand(mut self, activation: Activation) -> Self {
        self.activation = Some(activation);
        self.without_daemon()
    }

    #[track_caller]
    pub fn start(self) -> System {
        let dir = test_directory();
        for part in ["etc/domains.d", "run/domains.d"] {
            fs::create_dir_all(dir.path().join(part)).expect("the configuration's directories are made");
        }
        if self.activation.is_some() {
            activation::configure(dir.path(), &dir.path().join("backupd.toml"));
        }
        let bus = match self.activation {
            Some(Activation::Systemd) => Bus::start_with(dir.path(), &["--systemd-activation"]),
            Some(Activation::Bus) | None => Bus::start(dir.path()),
        };
        let polkit = (!self.no_polkit).then(|| Polkit::start(&bus, dir.path(), &self.rules));
        let journal = self.journal.then(|| Journal::start(dir.path()));
        let mut environment = self.environment.clone();
        if self.asks_helper {
            let socket = helper::socket(dir.path()).display().to_string();
            environment.push((LOOK_VARIABLE.to_owned(), socket));
        }
        let mut system = System {
            daemon: None,
            environment,
            users: None,
            journal,
            polkit,
            clients: Clients::new(&bus, dir.path()),
            bus,
            dir,
        };
        fs::write(system.config_path(), self.configuration(system.dir()))
            .expect("the configuration is written");
        if !self.no_daemon {
            system.start_daemon();
        }
        system
    }

    fn configuration(&self, dir: &Path) -> String {
        let dir = dir.display();
        let mut text = format!(
            "state-directory = \"{dir}/state\"\n\
             domain-directories = [\"{dir}/etc/domains.d\", \"{dir}/run/domains.d\"]\n\
             {}\
             [store.default]\npath = \"{dir}/backups\"\n",
            self.config
        );
        for (name, path) in &self.stores {
            text.push_str(&format!("[store.{name}]\npath = \"{}\"\n", path.display()));
        }
        text.push_str(&self.tables);
        text
    }
}

/// A bus with polkit and the service on it. The fields are dropped in order: dependent parts first.
pub struct System {
    daemon: Option<Daemon>,
    /// Environment variables of the service.
    environment: Environment,
    /// The directory of the user database that the service sees instead of the host's.
    users: Option<PathBuf>,
    journal: Option<Journal>,
    polkit: Option<Polkit>,
    clients: Clients,
    bus: Bus,
    dir: tempfile::TempDir,
}

impl System {
    /// Starts everything with the defaults: no administrator's rules, one store.
    #[track_caller]
    pub fn start() -> Self {
        Self::setup().start()
    }

    pub fn setup() -> Setup {
        Setup::default()
    }

    /// Returns the test's directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Returns the default store's path.
    pub fn store(&self) -> PathBuf {
        self.dir().join("backups")
    }

    pub fn config_path(&self) -> PathBuf {
        self.dir().join("backupd.toml")
    }

    pub fn bus(&self) -> &Bus {
        &self.bus
    }

    pub fn bus_mut(&mut self) -> &mut Bus {
        &mut self.bus
    }

    pub fn clients(&self) -> &Clients {
        &self.clients
    }

    /// Returns the journal of the service in a system with [`Setup::journal`].
    #[track_caller]
    pub fn journal(&self) -> &Journal {
        self.journal
            .as_ref()
            .expect("the system was set up with a journal")
    }

    #[track_caller]
    pub fn daemon(&mut self) -> &mut Daemon {
        self.daemon.as_mut().expect("the service was started")
    }

    /// Starts the service, for the first time or after [`System::stop_daemon`] or a kill.
    #[track_caller]
    pub fn start_daemon(&mut self) {
        self.stop_daemon();
        let (bus, dir, config) = (&self.bus, self.dir.path(), self.config_path());
        self.daemon = Some(match (&self.journal, &self.users) {
            (Some(journal), _) => Daemon::start_journaled(bus, dir, &config, journal),
            (None, Some(users)) => Daemon::start_with_users(bus, dir, &config, users, &self.environment),
            (None, None) => Daemon::start(bus, dir, &config, &self.environment),
        });
    }

    /// Takes the name of a user away, for every later start of the service. The bus and polkit still know it:
    /// dbus-daemon admits no user without a name, but other buses do.
    #[track_caller]
    pub fn take_name(&mut self, uid: u32) {
        let passwd = fs::read_to_string("/etc/passwd").expect("/etc/passwd is readable");
        let others = passwd
            .lines()
            .filter(|line| line.split(':').nth(2) != Some(&uid.to_string()));
        let others: String = others.map(|line| format!("{line}\n")).collect();
        let users = self.dir().join("users");
        fs::create_dir_all(&users).expect("the directory is made");
        fs::write(users.join("passwd"), others).expect("the users are written");
        // Other sources have names for some users too, such as `nobody`.
        fs::write(users.join("nsswitch.conf"), "passwd: files\n").expect("the source is written");
        self.users = Some(users);
    }

    /// Starts the service with an order to die at this point, as if by SIGKILL.
    #[track_caller]
    pub fn start_dying_daemon(&mut self, point: impl std::fmt::Display) {
        self.environment
            .push((fault::VARIABLE.to_owned(), point.to_string()));
        self.start_daemon();
        self.environment.pop();
    }

    /// Starts the service as if the host had restarted since the last start.
    #[track_caller]
    pub fn start_daemon_in_another_boot(&mut self) {
        self.enter_another_boot();
        self.start_daemon();
        self.environment.pop();
    }

    /// Simulates a new boot for every later start of the service.
    pub fn enter_another_boot(&mut self) {
        let name = "BACKUPD_BOOT_ID";
        let boot = uuid::Uuid::new_v4().to_string();
        self.environment.retain(|(known, _)| known != name);
        self.environment.push((name.to_owned(), boot));
    }

    /// Starts the service with an order to record the points at which it could die; see [`System::passed_points`].
    #[track_caller]
    pub fn start_recording_daemon(&mut self) {
        let points = self.points_file().display().to_string();
        self.environment.push((fault::POINTS_VARIABLE.to_owned(), points));
        self.start_daemon();
        self.environment.pop();
    }

    /// Returns the points that the service has passed since `first`, and not before, each once and in order.
    #[track_caller]
    pub fn passed_points(&self, first: &str) -> Vec<String> {
        let passed = std::fs::read_to_string(self.points_file()).unwrap();
        let mut points: Vec<String> = Vec::new();
        for point in passed.lines() {
            if !points.iter().any(|known| known == point) {
                points.push(point.to_owned());
            }
        }
        let first = points.iter().position(|point| point == first);
        points.split_off(first.expect("the first one was passed"))
    }

    fn points_file(&self) -> PathBuf {
        self.dir().join("points")
    }

    /// Waits until the service has ended and its name is free.
    #[track_caller]
    pub fn wait_for_death(&mut self) {
        let mut daemon = self.daemon.take().expect("the service was started");
        daemon.process().wait();
        self.bus.wait_for_no_owner(BUS_NAME);
    }

    /// Stops the service if it runs, and returns its exit status once its name is free.
    #[track_caller]
    pub fn stop_daemon(&mut self) -> Option<i32> {
        let status = self.daemon.take().map(|mut daemon| daemon.stop());
        self.bus.wait_for_no_owner(BUS_NAME);
        status
    }

    /// Kills the service (SIGKILL), as in a crash.
    #[track_caller]
    pub fn kill_daemon(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill();
        }
        self.bus.wait_for_no_owner(BUS_NAME);
    }

    /// Restarts polkitd with other rules.
    #[track_caller]
    pub fn set_rules(&mut self, rules: &str) {
        match &mut self.polkit {
            Some(polkit) => polkit.restart(&self.bus, rules),
            None => self.polkit = Some(Polkit::start(&self.bus, self.dir.path(), rules)),
        }
    }

    /// Sets rules that precede the others, or removes them, while polkitd runs; it notices a moment later.
    #[track_caller]
    pub fn write_further_rules(&self, rules: Option<&str>) {
        let polkit = self.polkit.as_ref().expect("polkit was started");
        polkit.write_further_rules(rules);
    }

    /// Restarts polkitd without the project's actions, as after a bad installation, until [`System::set_rules`].
    #[track_caller]
    pub fn unregister_actions(&mut self) {
        let polkit = self.polkit.as_mut().expect("polkit was started");
        polkit.restart_without_actions(&self.bus);
    }

    /// Stops polkitd (SIGSTOP); the bus still delivers messages to it.
    #[track_caller]
    pub fn freeze_polkit(&mut self) {
        let process = self.polkit.as_mut().and_then(Polkit::process);
        process.expect("polkit runs").signal(Signal::STOP);
    }

    /// Kills polkitd (SIGKILL), stopped or not, as in a crash.
    #[track_caller]
    pub fn stop_polkit(&mut self) {
        if let Some(polkit) = &mut self.polkit {
            polkit.stop(&self.bus);
        }
    }

    /// Connects this process, as root, to the bus.
    pub async fn connect(&self) -> zbus::Connection {
        self.bus.connect().await
    }

    /// Returns a builder of a VM in the test's directory. The service does not know the VM yet.
    pub fn vm(&self, name: &str) -> vm::Builder {
        vm::Builder::new(self.dir(), name)
    }

    /// Starts a VM and configures it in the service under its own name; returns when the service is connected to it.
    #[track_caller]
    pub fn configured(&self, machine: vm::Builder) -> Vm {
        let vm = machine.start();
        self.domain_file(vm.name(), &vm);
        self.wait_for_domain(vm.name());
        vm
    }

    /// Configures a domain as `name`: writes its file in `domains.d` atomically, as managers should. Returns the
    /// file's path.
    #[track_caller]
    pub fn domain_file(&self, name: &str, vm: &Vm) -> PathBuf {
        self.write_domain_file(name, &format!("monitor = \"{}\"\n", vm.monitor_path().display()))
    }

    /// Configures a domain with any text as its file.
    #[track_caller]
    pub fn write_domain_file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir().join("etc/domains.d").join(format!("{name}.toml"));
        let new = self.dir().join("etc").join(format!("{name}.new"));
        fs::write(&new, text).expect("the domain's file is written");
        fs::rename(&new, &path).expect("the domain's file gets its name");
        path
    }

    /// Removes a domain's file, and waits until the service does not know it.
    #[track_caller]
    pub fn remove_domain_file(&self, name: &str) {
        let path = self.dir().join("etc/domains.d").join(format!("{name}.toml"));
        fs::remove_file(path).expect("the domain's file is there");
        self.wait_for_no_domain(name);
    }

    /// Waits until the service is connected to the domain's QEMU; returns the object path.
    #[track_caller]
    pub fn wait_for_domain(&self, name: &str) -> String {
        wait::until(&format!("the domain {name}"), || {
            let path = self.domain_path(name)?;
            let state = ["get-property", BUS_NAME, &path, DOMAIN_INTERFACE, "State"];
            let state = self.clients.busctl(ROOT, &state).stdout;
            ["s \"running\"", "s \"paused\""]
                .contains(&state.trim())
                .then_some(path)
        })
    }

    /// Waits until the service does not know the domain.
    #[track_caller]
    pub fn wait_for_no_domain(&self, name: &str) {
        wait::until(&format!("the domain {name} to be removed"), || {
            self.domain_path(name).is_none().then_some(())
        });
    }

    /// Returns the domain's object path, if root can see it.
    pub fn domain_path(&self, name: &str) -> Option<String> {
        let call = [
            "call",
            BUS_NAME,
            ROOT_PATH,
            MANAGER_INTERFACE,
            "GetDomain",
            "s",
            name,
        ];
        let answer = self.clients.busctl(ROOT, &call).stdout;
        Some(
            answer
                .trim()
                .strip_prefix("o \"")?
                .trim_end_matches('"')
                .to_owned(),
        )
    }
}
