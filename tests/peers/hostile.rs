//! Peers that behave unlike any QEMU. The service neither panics nor hangs, limits its memory, and reports a precise
//! error. `tests/peers/qmp.rs` tests the rules of the client; this file tests whole sessions and the service.

mod imposters;

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::common::caller::Caller;
use crate::common::clients::USER;
use crate::common::command::raw;
use crate::common::disk::Disk;
use crate::common::peer::{Imposter, Peer};
use crate::common::proxies::{DomainProxy, JobProxy, Options, error_name};
use crate::common::proxy::Proxy;
use crate::common::storage::files_below;
use crate::common::wait::{DEADLINE, until_async, within};
use crate::common::{System, polkit};
use backupd::model::Manifest;
use backupd::qmp::{Client, Error, MAX_LINE};
use futures_util::future::join_all;
use imposters::{FAILING, FLOODED, FLOODS, REACHABLE, UNREACHABLE};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};

const MIB: usize = 1 << 20;
const DOMAIN_UNREACHABLE: &str = "org.example.Backup1.Error.DomainUnreachable";

// A session that is cut short.

/// A recorded session of a client with QEMU 7.2: the greeting, the schema (only the used part), a query of the disks,
/// and the backup of one. `> ` marks the client's lines, `< ` QEMU's.
const SESSION: &str = include_str!("hostile/session");

enum Step {
    /// A command, and its line in the session.
    Hears(Value, &'static str),
    Says(&'static str),
}

fn session() -> Vec<Step> {
    let steps = SESSION.split_inclusive('\n').map(|line| match line.split_at(2) {
        ("> ", command) => Step::Hears(serde_json::from_str(command).unwrap(), command),
        ("< ", said) => Step::Says(said),
        other => panic!("{other:?}"),
    });
    steps.collect()
}

/// Plays QEMU until it has sent or received so many bytes, then closes the connection; returns both counts.
async fn play(peer: Peer, steps: &[Step], says: usize, hears: usize) -> (usize, usize) {
    let mut stream = BufReader::new(peer.into_stream());
    let (mut said, mut heard) = (0, 0);
    for step in steps {
        match step {
            Step::Says(line) => {
                let part = &line.as_bytes()[..line.len().min(says - said)];
                stream.write_all(part).await.expect("the client reads");
                said += part.len();
                if said == says {
                    break;
                }
            }
            Step::Hears(_, expected) => {
                let mut line = Vec::new();
                let mut rest = (&mut stream).take((hears - heard) as u64);
                heard += rest.read_until(b'\n', &mut line).await.expect("the client sends");
                if heard == hears {
                    break;
                }
                assert_eq!(line, expected.as_bytes());
            }
        }
    }
    (said, heard)
}

/// The client's view of a session.
#[derive(Debug, Default, PartialEq)]
struct Seen {
    replies: usize,
    events: usize,
}

async fn follow(ours: tokio::net::UnixStream, steps: &[Step]) -> Seen {
    let mut seen = Seen::default();
    let closed = |error: &Error| assert!(matches!(error, Error::Closed(_)), "{error:?}");
    let (client, driver) = match Client::open(ours, DEADLINE).await {
        Ok(opened) => opened,
        Err(error) => {
            closed(&error);
            return seen;
        }
    };
    seen.replies += 1;
    let mut events = client.events();
    let driver = tokio::spawn(driver.run());
    let commands = steps.iter().filter_map(|step| match step {
        Step::Hears(command, _) => Some(command),
        Step::Says(_) => None,
    });
    for command in commands.skip(1) {
        let (name, arguments) = (command["execute"].as_str().unwrap(), command["arguments"].clone());
        let result = match name {
            "query-qmp-schema" => client
                .schema()
                .await
                .map(|schema| assert!(schema.command_takes("transaction", "properties"))),
            "add-fd" => {
                let descriptor = OwnedFd::from(File::open("/dev/null").unwrap());
                let added = client.execute_with_descriptor(raw(name, arguments), descriptor);
                added.await.map(drop)
            }
            _ => client.execute(raw(name, arguments)).await.map(drop),
        };
        match result {
            Ok(()) => seen.replies += 1,
            Err(error) => {
                closed(&error);
                // So does every later one.
                closed(&client.execute(raw(name, json!({}))).await.unwrap_err());
                break;
            }
        }
    }
    drop(client);
    driver.await.expect("the driver does not panic");
    while events.next().await.is_ok() {
        seen.events += 1;
    }
    seen
}

async fn cut(steps: &[Step], says: usize, hears: usize) -> (Seen, usize, usize) {
    let (ours, peer) = Peer::pair();
    let both = async { tokio::join!(follow(ours, steps), play(peer, steps, says, hears)) };
    let (seen, (said, heard)) = within("the session", both).await;
    (seen, said, heard)
}

#[tokio::test]
async fn a_session_cut_at_any_byte_ends_cleanly() {
    let steps = session();
    let (whole, all_said, all_heard) = cut(&steps, usize::MAX, usize::MAX).await;
    assert!(whole.replies > 20 && whole.events > 10, "{whole:?}");
    assert_eq!(
        whole.replies,
        steps
            .iter()
            .filter(|step| matches!(step, Step::Hears(..)))
            .count()
    );

    let mut lines = Vec::new();
    let mut end = 0;
    for step in &steps {
        if let Step::Says(line) = step {
            end += line.len();
            lines.push((end, line.contains("\"return\""), line.contains("\"event\"")));
        }
    }
    for says in 0..all_said {
        // Only complete messages count.
        let came = || lines.iter().take_while(|(end, ..)| *end <= says);
        let expected = Seen {
            replies: came().filter(|(_, reply, _)| *reply).count(),
            events: came().filter(|(_, _, event)| *event).count(),
        };
        let (seen, said, _) = cut(&steps, says, usize::MAX).await;
        assert_eq!((said, seen), (says, expected));
    }

    for hears in 0..all_heard {
        let (seen, _, heard) = cut(&steps, usize::MAX, hears).await;
        assert_eq!(heard, hears);
        assert!(
            seen.replies < whole.replies && seen.events <= whole.events,
            "{hears}: {seen:?}"
        );
    }
}

// The service.

/// Returns the only job of that domain, if its backup did not begin.
async fn failed_job(caller: &Caller, domain: &str) -> Option<JobProxy<'static>> {
    let jobs = caller.manager.list_jobs().await.unwrap();
    let job = jobs.into_iter().find(|(_, _, name, _)| name == domain)?;
    Some(caller.job(job.1).await)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_an_imposter_fails_with_the_reason_and_leaves_no_image() {
    let mut system = System::start();
    let caller = Caller::new(&system).await;
    let mut imposters = Vec::new();
    for (name, play, _) in FAILING {
        let path = system.dir().join(name);
        imposters.push(Imposter::listen(&path, play));
        system.write_domain_file(name, &format!("monitor = \"{}\"\n", path.display()));
    }
    let backups = FAILING.map(|(name, _, word)| {
        let caller = &caller;
        async move {
            let job = until_async(&format!("{name} to be reached"), || async {
                let started = caller.try_start(name, "", &[], Options::new()).await;
                match started {
                    Ok(job) => Some(caller.job(job).await),
                    Err(_) => failed_job(caller, name).await,
                }
            })
            .await;
            let ended = within(&format!("the end of the backup of {name}"), job.wait()).await;
            let (result, _, text) = ended.unwrap();
            assert_eq!(result, "failed", "{name}");
            assert!(text.contains(word) && text.len() < 1000, "{name}: {text}");
        }
    });
    join_all(backups).await;
    let left = files_below(&system.store());
    assert!(left.is_empty(), "{left:?}");
    assert!(!system.daemon().log().contains("panicked"));
    assert_eq!(system.stop_daemon(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_to_qemu_that_is_lost_at_any_point_costs_at_most_the_backup() {
    let system = System::start();
    let disk = Disk::new("vda", 8 * MIB as u64).fill(0, MIB as u64, 0x11);
    let vm = system.vm("web").disk(disk).running().start();
    let proxy = Proxy::start(&system.dir().join("proxy"), &vm.monitor_path());
    let monitor = format!("monitor = \"{}\"\n", proxy.path().display());
    system.write_domain_file("web", &monitor);
    system.wait_for_domain("web");
    let caller = Caller::new(&system).await;
    let before = vm.residue();
    let looked = proxy.passed();
    caller.complete("web", "").await;
    let all = proxy.passed();

    let (mut completed, mut lost) = (1, 0);
    let looking = (0..4).map(|part| looked * part / 4);
    let backing_up = (0..24).map(|part| looked + (all - looked) * part / 24);
    for bytes in looking.chain(backing_up) {
        proxy.cut_after(bytes);
        let job = until_async("the backup to be accepted", || async {
            match caller.start_job("web", "", &[], Options::new()).await {
                Ok(job) => Some(job),
                Err(error) => {
                    assert_eq!(error_name(&error), DOMAIN_UNREACHABLE, "{error}");
                    None
                }
            }
        })
        .await;
        let (result, name, text) = within("the end of the backup", job.wait()).await.unwrap();
        match result.as_str() {
            "completed" => completed += 1,
            "failed" => {
                lost += 1;
                assert_eq!(name, DOMAIN_UNREACHABLE, "{bytes}: {text}");
                assert!(text.contains("connection"), "{bytes}: {text}");
            }
            other => panic!("{bytes}: {other}"),
        }
        assert_eq!(vm.residue(), before, "{bytes} bytes of {all}");
    }
    assert!(lost > 0, "{completed} completed");
    let store = fs::read_dir(system.store().join("web")).unwrap();
    let backups: Vec<_> = store.map(|entry| entry.unwrap().path()).collect();
    assert_eq!(backups.len(), completed, "{backups:?}");
    for backup in backups {
        Manifest::parse(&fs::read(backup.join("manifest.json")).unwrap()).unwrap();
    }
}

/// Returns the memory of a process in KiB: the present one, or the peak (`VmHWM`).
fn memory(pid: u32, field: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.trim_start_matches(':')
        .split_whitespace()
        .next()
        .unwrap()
        .parse()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_survives_every_imposter_and_goes_on_serving_others() {
    let mut system = System::start();
    let pid = system.daemon().pid();
    let disk = Disk::new("vda", 8 * MIB as u64).fill(0, MIB as u64, 0x11);
    let _good = system.configured(system.vm("good").disk(disk));
    let caller = Arc::new(Caller::new(&system).await);

    let plays = UNREACHABLE
        .map(|(name, play, _)| (name, play))
        .into_iter()
        .chain(REACHABLE);
    let mut imposters = Vec::new();
    for (name, play) in plays {
        let path = system.dir().join(name);
        imposters.push(Imposter::listen(&path, play));
        system.write_domain_file(name, &format!("monitor = \"{}\"\n", path.display()));
    }

    let unreachable = UNREACHABLE.map(|(name, _, word)| {
        let caller = caller.clone();
        async move {
            // Until the error is known, the domain is connecting, or its last connection was closed.
            until_async(&format!("{name}: {word}"), || async {
                let refused = caller.try_start(name, "", &[], Options::new()).await.unwrap_err();
                let text = refused.to_string();
                assert!(text.len() < 1000, "{name}: {text}");
                let known = error_name(&refused) == DOMAIN_UNREACHABLE;
                (known && text.contains(word)).then_some(())
            })
            .await;
        }
    });
    let reachable = REACHABLE.map(|(name, _)| {
        let caller = caller.clone();
        async move {
            until_async(&format!("{name} to be reached"), || async {
                let path = caller.manager.get_domain(name).await.ok()?;
                let domain = DomainProxy::new(&caller.connection, path).await.unwrap();
                (domain.state().await.ok()? == "running").then_some(())
            })
            .await;
        }
    });
    tokio::join!(join_all(unreachable), join_all(reachable), async {
        for _ in 0..5 {
            caller.complete("good", "").await;
        }
    });
    caller.complete("good", "").await;

    let most = memory(pid, "VmHWM") >> 10;
    println!("{} imposters: {most} MiB at most", imposters.len());
    // A line of the greatest length, twice while its buffer grows, and room for the rest.
    assert!(most < (10 * MAX_LINE / MIB) as u64, "{most} MiB");
    let log = system.daemon().log();
    assert!(!log.contains("panicked"), "{log}");
    assert!(log.len() < MIB, "{} bytes of log", log.len());
    assert_eq!(system.daemon().pid(), pid);
    assert_eq!(system.stop_daemon(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_machines_of_one_user_do_not_fill_the_services_memory() {
    const MACHINES: usize = 32;
    const MOST_GROWTH: u64 = 128;
    let mut system = System::setup()
        .rules(&polkit::allow(USER, &["service.register-domain"]))
        .start();
    let pid = system.daemon().pid();
    let root = Caller::new(&system).await;
    let before = memory(pid, "VmHWM") >> 10;
    let flooding = FLOODS.iter().cycle().take(MACHINES).enumerate();
    let flooding = flooding.map(|(number, play)| {
        let system = &system;
        async move {
            // The calls of one connection wait for each other.
            let user = Caller::of_user(system, USER).await;
            let (ours, theirs) = Peer::pair();
            let playing = tokio::spawn(play(theirs));
            let (name, socket) = (format!("flood{number}"), OwnedFd::from(ours.into_std().unwrap()));
            let registering = user
                .manager
                .register_domain(&name, socket.as_fd().into(), Options::new());
            // Some are refused, because they send too much, and some wait for the others.
            let registered = tokio::time::timeout(DEADLINE, registering).await;
            (playing, matches!(registered, Ok(Ok(_))), user)
        }
    });
    let flooding = join_all(flooding).await;
    let registered = flooding.iter().filter(|(_, registered, _)| *registered).count();
    let of_events = MACHINES.div_ceil(FLOODS.len());
    assert!(registered >= of_events, "{registered}");
    until_async("all to have said enough", || async {
        let listed = within("an answer", root.manager.list_domains()).await.unwrap();
        assert!(listed.len() <= MACHINES);
        (FLOODED.load(Ordering::SeqCst) == of_events).then_some(())
    })
    .await;
    let most = memory(pid, "VmHWM") >> 10;
    println!("{registered} of {MACHINES} registered: from {before} to {most} MiB");
    assert!(most - before < MOST_GROWTH, "from {before} to {most} MiB");
    for (playing, ..) in &flooding {
        playing.abort();
    }
    assert_eq!(system.stop_daemon(), Some(0));
}
