//! An idle service exits, loses no call by that, and is started by the next call. Without callers it does nothing.

mod common;

use std::time::Duration;

use backupd::names::{BUS_NAME, MANAGER_INTERFACE, ROOT_PATH};
use common::activation::{Activation, Systemd};
use common::caller::{Caller, assert_completed, cancel};
use common::clients::USER;
use common::disk::Disk;
use common::hanging::{Hanging, Operation};
use common::peer::StandIn;
use common::proxies::{JobProxy, ManagerProxy, Options, slowly};
use common::storage::files_below;
use common::wait;
use common::{Setup, System};
use futures_util::StreamExt;
use zbus::fdo::DBusProxy;
use zbus::{Connection, Message};

const MIB: u64 = 1 << 20;
/// The idle time of the service in these tests.
const IDLE: Duration = Duration::from_millis(100);
/// Long enough to exit several times.
const SEVERAL_TIMES: Duration = Duration::from_millis(500);

fn idle_exit(time: Duration) -> String {
    format!("idle-exit-seconds = {}", time.as_secs_f64())
}

fn on_demand(activation: Activation) -> Setup {
    System::setup().config(&idle_exit(IDLE)).on_demand(activation)
}

/// Returns the connection that owns the service's name.
async fn owner(connection: &Connection) -> Option<String> {
    let bus = DBusProxy::new(connection).await.unwrap();
    let owner = bus.get_name_owner(BUS_NAME.try_into().unwrap()).await;
    owner.ok().map(|name| name.to_string())
}

/// Fails if the service exits; `caller` has called it just now.
async fn assert_stays(caller: &Caller) {
    let before = owner(&caller.connection).await;
    assert!(before.is_some(), "the service is there");
    tokio::time::sleep(SEVERAL_TIMES).await;
    assert_eq!(owner(&caller.connection).await, before);
}

async fn leaves(system: &System) {
    tokio::task::block_in_place(|| system.bus().wait_for_no_owner(BUS_NAME));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_idle_service_exits_and_is_started_by_the_next_call() {
    let system = on_demand(Activation::Bus).start();
    let caller = Caller::new(&system).await;
    for _ in 0..3 {
        assert!(caller.manager.list_domains().await.unwrap().is_empty());
        leaves(&system).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_stays_without_activation_and_when_configured_to() {
    let alone = System::setup().config(&idle_exit(IDLE)).start();
    let told = System::setup()
        .config("idle-exit-seconds = 0")
        .on_demand(Activation::Bus)
        .start();
    for system in [alone, told] {
        let caller = Caller::new(&system).await;
        caller.manager.list_domains().await.unwrap();
        assert_stays(&caller).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_stays_during_a_subscription() {
    let system = on_demand(Activation::Bus).start();
    let caller = Caller::new(&system).await;
    caller.manager.subscribe().await.unwrap();
    assert_stays(&caller).await;
    caller.manager.unsubscribe().await.unwrap();
    leaves(&system).await;
    let other = Caller::new(&system).await;
    other.manager.subscribe().await.unwrap();
    assert_stays(&other).await;
    // The subscription of a client that has left the bus ends.
    drop(other);
    leaves(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_stays_while_a_domain_is_registered() {
    let system = on_demand(Activation::Bus).start();
    let caller = Caller::new(&system).await;
    let (socket, qemu) = StandIn::start();
    caller.register("web", socket).await.unwrap();
    assert_stays(&caller).await;
    drop(qemu);
    leaves(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_stays_while_a_backup_runs() {
    let system = on_demand(Activation::Bus).start();
    let machine = system
        .vm("web")
        .disk(Disk::new("vda", 64 * MIB).fill(0, 64 * MIB, 0x11).slow(4 * MIB));
    let _vm = system.configured(machine);
    let caller = Caller::new(&system).await;
    let job = caller.start("web", "").await;
    assert_stays(&caller).await;
    let waiter = Caller::new(&system)
        .await
        .job(job.inner().path().clone().into())
        .await;
    let waiting = tokio::spawn(async move { waiter.wait().await });
    assert_stays(&caller).await;
    cancel(&job).await;
    let (result, ..) = wait::within("the answer", waiting).await.unwrap().unwrap();
    assert_eq!(result, "cancelled");
    leaves(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_stays_while_residue_of_a_failed_backup_remains() {
    let place = common::test_directory();
    let store = place.path().join("shaky");
    let system = on_demand(Activation::Bus)
        .store("shaky", &store)
        .table("[deadlines]\nstall-seconds = 3")
        .start();
    let storage = Hanging::mount_in(place, "shaky");
    let machine = system
        .vm("web")
        .disk(Disk::new("vda", 64 * MIB).fill(0, 64 * MIB, 0x11))
        .running();
    let vm = system.configured(machine);
    let before = vm.residue();
    let caller = Caller::new(&system).await;
    let options = slowly(16 * MIB);
    let document = "<domainbackup><store name='shaky'/></domainbackup>";
    let job = caller.start_with("web", document, &[], options).await;
    wait::until_async("some progress", async || {
        (job.progress().await.unwrap() > 0.0).then_some(())
    })
    .await;
    storage.hang(Operation::Any);
    let (result, ..) = wait::within("the end of the backup", job.wait()).await.unwrap();
    assert_eq!(result, "failed");
    assert_stays(&caller).await;
    storage.heal();
    leaves(&system).await;
    assert_eq!(vm.residue(), before);
    assert!(files_below(storage.path()).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_stays_while_a_call_is_in_flight() {
    let mut system = on_demand(Activation::Bus).start();
    system.write_domain_file("web", "monitor = \"/nowhere/web.qmp\"\n");
    let root = Caller::new(&system).await;
    root.manager.list_domains().await.unwrap();
    // polkit, which does not respond for now, is asked about this caller.
    let user = Caller::of_user(&system, USER).await;
    system.freeze_polkit();
    let asking = tokio::spawn(async move { user.manager.list_domains().await });
    assert_stays(&root).await;
    assert!(!asking.is_finished());
    tokio::task::block_in_place(|| system.stop_polkit());
    // Any reply.
    let _ = wait::within("the answer", asking).await.unwrap();
    leaves(&system).await;
}

/// Sends `ListDomains` to the bus, whether the bus is stopped or not.
async fn send_call(caller: &Caller) -> (u32, zbus::MessageStream) {
    let answers = zbus::MessageStream::from(&caller.connection);
    let call = Message::method_call(ROOT_PATH, "ListDomains")
        .destination(BUS_NAME)
        .interface(MANAGER_INTERFACE)
        .build(&())
        .unwrap();
    caller.connection.send(&call).await.unwrap();
    (call.primary_header().serial_num().into(), answers)
}

/// Checks that the reply is a list.
async fn assert_answered((serial, mut answers): (u32, zbus::MessageStream)) {
    let answer = async {
        loop {
            let message = answers.next().await.unwrap().unwrap();
            if message.header().reply_serial().map(u32::from) == Some(serial) {
                return message;
            }
        }
    };
    let answer = wait::within("the answer", answer).await;
    let listed = answer
        .body()
        .deserialize::<Vec<(zbus::OwnedObjectPath, String, String, String)>>();
    assert!(listed.is_ok(), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_during_the_release_of_the_name_keeps_the_service_running() {
    let mut system = on_demand(Activation::Bus).start();
    let caller = Caller::new(&system).await;
    let left = |system: &System| system.bus().log().matches("leaving the bus").count();
    let mut stayed = false;
    // On a busy host the bus may be stopped too late.
    for _ in 0..20 {
        caller.manager.list_domains().await.unwrap();
        let (owner_before, left_before) = (owner(&caller.connection).await, left(&system));
        // The bus handles the call first, and then the release of the name.
        system.bus_mut().freeze();
        let call = send_call(&caller).await;
        wait::until("the service to exit", || {
            (left(&system) > left_before).then_some(())
        });
        system.bus_mut().thaw();
        assert_answered(call).await;
        stayed = owner_before.is_some() && owner(&caller.connection).await == owner_before;
        if stayed {
            break;
        }
    }
    assert!(stayed, "it went on");
    assert!(system.bus().log().contains("staying on the bus"));
    leaves(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_came_before_the_service_was_stopped_is_answered() {
    let mut system = System::setup()
        .config("idle-exit-seconds = 0")
        .on_demand(Activation::Bus)
        .start();
    let caller = Caller::new(&system).await;
    caller.manager.list_domains().await.unwrap();
    let pid = system.bus().name_owner(BUS_NAME).unwrap();
    system.bus_mut().freeze();
    let call = send_call(&caller).await;
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(pid as i32).unwrap(),
        rustix::process::Signal::TERM,
    )
    .unwrap();
    wait::until("the service to stop", || {
        system.bus().log().contains("stopping").then_some(())
    });
    system.bus_mut().thaw();
    assert_answered(call).await;
    leaves(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_notifies_systemd_of_its_start_and_exit() {
    let system = on_demand(Activation::Systemd).start();
    let systemd = Systemd::start(&system, None).await;
    let caller = Caller::new(&system).await;
    for round in 1..=2 {
        caller.manager.list_domains().await.unwrap();
        wait::until_async("the service to end", async || {
            (systemd.ends().len() == round).then_some(())
        })
        .await;
    }
    assert_eq!(systemd.ends(), [0, 0]);
    // No watchdog message, because the unit has no watchdog.
    let once = ["READY=1", "STOPPING=1", "BARRIER=1"];
    assert_eq!(systemd.messages(), [once, once].concat());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_requests_a_restart_if_a_call_may_have_raced_with_its_exit() {
    let system = on_demand(Activation::Systemd).start();
    let systemd = Systemd::start(&system, None).await;
    systemd.count_a_job_at_each_look();
    let caller = Caller::new(&system).await;
    caller.manager.list_domains().await.unwrap();
    wait::until_async("the service to end and start", async || {
        (systemd.said("READY=1") == 2).then_some(())
    })
    .await;
    assert_eq!(systemd.ends()[0], 75);
}

/// Waits for a time that is sometimes longer, sometimes shorter than the service takes to exit.
async fn pause(number: usize) {
    tokio::time::sleep(Duration::from_micros(number as u64 * 7919 % 8000)).await;
}

/// Callers at independent moments, while the service exits and starts all the time. Every call gets a reply, and every
/// accepted backup is made.
async fn storm(activation: Activation) {
    const ROUNDS: usize = 200;
    const CALLERS: usize = 4;
    let system = System::setup()
        .config(&idle_exit(Duration::from_millis(2)))
        .on_demand(activation)
        .start();
    let systemd = match activation {
        Activation::Systemd => Some(Systemd::start(&system, None).await),
        Activation::Bus => None,
    };
    let machine = system.vm("web").disk(Disk::new("vda", MIB).fill(0, 65536, 0x11));
    let vm = machine.start();
    system.domain_file("web", &vm);
    let mut managers = Vec::new();
    for _ in 0..CALLERS {
        // Without signals: unread ones would delay replies.
        managers.push(ManagerProxy::new(&system.connect().await).await.unwrap());
    }
    let mut backups = 0;
    for round in 0..ROUNDS {
        let lists = managers.iter().enumerate().map(async |(number, manager)| {
            pause(round * CALLERS + number).await;
            let listed = wait::within("the list", manager.list_domains()).await;
            assert_eq!(listed.expect("the call is answered").len(), 1);
        });
        let backup = async {
            if round % 4 == 0 {
                pause(3 * round + 1).await;
                let started = managers[0].create_backup("web", "", Vec::new(), Options::new());
                let started = wait::within("the backup's start", started).await;
                let (_, path) = started.expect("the backup is accepted");
                // Another process may report how it ended.
                let job = JobProxy::new(managers[0].inner().connection(), path)
                    .await
                    .unwrap();
                assert_completed(&job).await;
                backups += 1;
            }
        };
        futures_util::join!(futures_util::future::join_all(lists), backup);
    }
    leaves(&system).await;
    let log = logs(&system);
    let lives = log.matches(" ready\n").count();
    println!(
        "{ROUNDS} rounds, {lives} lives, {backups} backups; it stayed {} times, was started again {} times, started for \
         nothing {} times",
        log.matches("staying on the bus").count(),
        systemd
            .as_ref()
            .map_or(0, |it| it.ends().iter().filter(|end| **end == 75).count()),
        systemd.as_ref().map_or(0, Systemd::starts_for_nothing),
    );
    assert!(lives > ROUNDS / 4, "it left {lives} times only");
    let stored = std::fs::read_dir(system.store().join("web")).unwrap();
    let names = stored.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert_eq!(names.filter(|name| !name.starts_with('.')).count(), backups);
}

/// Returns the whole log of all services, started by the test or by the bus.
fn logs(system: &System) -> String {
    let own = std::fs::read_to_string(system.dir().join("backupd.log")).unwrap_or_default();
    own + &system.bus().log()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_call_is_lost_when_the_bus_restarts_the_idle_service() {
    storm(Activation::Bus).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_call_is_lost_when_systemd_restarts_the_idle_service() {
    storm(Activation::Systemd).await;
}

/// The watchdog timeout in these tests. The service notifies three times as often.
const WATCHDOG: Duration = Duration::from_millis(300);

#[tokio::test(flavor = "multi_thread")]
async fn the_watchdog_is_fed_only_while_calls_come_through() {
    let mut system = System::setup()
        .config("idle-exit-seconds = 0")
        .on_demand(Activation::Systemd)
        .start();
    let systemd = Systemd::start(&system, Some(WATCHDOG)).await;
    let caller = Caller::new(&system).await;
    caller.manager.list_domains().await.unwrap();
    let fed = || systemd.said("WATCHDOG=1");
    for round in 0..2 {
        let before = fed();
        wait::until_async("the watchdog to be fed", async || {
            (fed() > before + 2).then_some(())
        })
        .await;
        let frozen = fed();
        system.bus_mut().freeze();
        tokio::time::sleep(5 * WATCHDOG).await;
        // One reply and one notification may be in transit, but not the 15 of this time.
        assert!(fed() <= frozen + 2, "round {round}: {frozen}, then {}", fed());
        system.bus_mut().thaw();
    }
    let before = fed();
    wait::until_async("the watchdog to be fed again", async || {
        (fed() > before).then_some(())
    })
    .await;
}
