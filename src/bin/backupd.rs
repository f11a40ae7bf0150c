//! The service: loads its configuration, connects to the system bus, and exits on a signal or when the bus is gone.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use backupd::access::{AUDIT_DIRECTIVE, Access, Polkit};
use backupd::activity::Activity;
use backupd::backups::{self, Backups};
use backupd::bus::{self, Published};
use backupd::catalog::{self, Catalog};
use backupd::config::{self, Config, DEFAULT_STORE};
use backupd::domain::{Directories, Registry};
use backupd::job::{self, Jobs};
use backupd::service::Service;
use backupd::{image, store, supervisor, targets};
use clap::Parser;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// How long the first probe of the configured domains may delay the start. A caller that activates the service expects
/// its domains, but must not wait for one that hangs.
const FIRST_PROBE: Duration = Duration::from_secs(2);

/// Timeout for blocked threads at the end.
const LAST_THREADS: Duration = Duration::from_secs(1);

/// Backs up running QEMU virtual machines for callers on the system bus.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The configuration file [default: /etc/backupd/backupd.toml]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Thaw a guest if the service does not (internal)
    #[arg(long, hide = true)]
    thaw_guard: bool,
    /// Answer a question of the service about open files, on standard input. For backupd-look@.service.
    #[arg(long, hide = true)]
    look: bool,
}

#[derive(Debug, thiserror::Error)]
enum Fatal {
    #[error("{0}")]
    Config(#[from] config::Error),
    #[error("cannot use the default store: {0}")]
    Store(#[from] store::Error),
    #[error("{0}")]
    Catalog(#[from] catalog::Error),
    #[error("cannot recover the jobs of the previous instance: {0}")]
    Jobs(#[from] job::Error),
    #[error("{0}")]
    Backups(#[from] backups::Error),
    #[error("cannot watch the domain directories: {0}")]
    Domains(std::io::Error),
    #[error("{0}")]
    System(#[from] std::io::Error),
    #[error("cannot serve on the bus: {0}")]
    Bus(#[from] zbus::Error),
    #[error("the bus closed the connection")]
    BusLost,
}

impl Fatal {
    /// Whether every start fails in the same way until an administrator acts.
    fn is_permanent(&self) -> bool {
        match self {
            Self::Config(_) | Self::Store(_) => true,
            // The previous instance may not have ended yet.
            Self::Catalog(error) => !matches!(error, catalog::Error::InUse { .. }),
            _ => false,
        }
    }
}

/// The result of a regular end.
enum End {
    /// The service was stopped, or is unused.
    Done,
    /// A client may have called while the unused service left the bus, or another version is installed.
    StartAgain,
}

fn main() -> ExitCode {
    if let Some(status) = image::become_tethered() {
        return status;
    }
    let arguments = Arguments::parse();
    if arguments.look {
        return targets::serve_look();
    }
    start_log();
    abort_on_panic();
    if arguments.thaw_guard {
        return job::watch_frozen_guest();
    }
    match start(arguments) {
        Ok(End::Done) => ExitCode::SUCCESS,
        Ok(End::StartAgain) => supervisor::RESTART.into(),
        Err(error) => {
            tracing::error!("{error}");
            match error.is_permanent() {
                true => supervisor::DO_NOT_RESTART.into(),
                false => ExitCode::FAILURE,
            }
        }
    }
}

fn start(arguments: Arguments) -> Result<End, Fatal> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let ended = runtime.block_on(run(arguments));
    // All work is done. A thread that still blocks only closes a caller's descriptor.
    runtime.shutdown_timeout(LAST_THREADS);
    ended
}

async fn run(arguments: Arguments) -> Result<End, Fatal> {
    // First, so that no stop request is missed.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut make_room = signal(SignalKind::user_defined1())?;
    let config = Config::load(arguments.config.as_deref())?;
    if let Some(why) = image::is_confinement_incomplete() {
        tracing::warn!("{why}");
    }
    std::fs::create_dir_all(&config.state_directory)?;
    let catalog = Catalog::open(&config.state_directory.join(catalog::FILE_NAME))?;
    if let Some(store) = config.stores.get(DEFAULT_STORE) {
        store::ensure(&store.path)?;
    }
    let activity = Activity::default();
    let limits = &config.limits;
    let directories = Directories::new(config.domain_directories.clone());
    let registered = limits.of_registered_domains().keeping(&activity);
    let domains = Registry::open(directories, registered).map_err(Fatal::Domains)?;
    let boot = job::current_boot()?;
    let jobs = Jobs::new(domains.clone(), catalog.clone(), &config, boot, activity.clone());
    jobs.thaw().await?;
    let known = domains.list();
    let settled = known.iter().map(|domain| domain.settled(FIRST_PROBE));
    futures_util::future::join_all(settled).await;
    let access = Access::new(Arc::new(Polkit::start()?), limits.of_password_dialogs());
    let backups = Arc::new(Backups::new(
        domains.clone(),
        catalog,
        jobs.clone(),
        &config,
        activity.clone(),
    ));
    backups.recover().await?;
    let recovered = jobs.recover().await?;
    jobs.settle_stores();
    let at_stake = jobs.at_stake().clone();
    let service = Arc::new(Service::new(domains, jobs, backups, access, &config));
    recovered.jobs.iter().for_each(|job| service.follow(job.clone()));
    service.requeue(recovered.queued);
    let connection = zbus::connection::Builder::system().build().await?;
    let published = bus::publish(connection, service.clone(), &config, recovered.jobs, &activity).await?;
    supervisor::ready();
    tracing::info!("ready");
    let prober = published.prober();
    let watchdog = tokio::spawn(supervisor::feed_watchdog(async move || prober.probe().await));
    let idle_exit = config.idle_exit.filter(|_| published.on_demand);
    let ended = tokio::select! {
        _ = terminate.recv() => Ok(None),
        _ = interrupt.recv() => Ok(None),
        () = published.lost() => Err(Fatal::BusLost),
        left = leave((idle_exit, config.deadlines.upgrade()), (&activity, &at_stake), &mut make_room, &published) => left.map(Some).map_err(Fatal::Bus),
    };
    watchdog.abort();
    tracing::info!("stopping");
    if !matches!(ended, Ok(Some(_))) {
        supervisor::stopping().await;
        // Calls that came by the name until now are served; later ones are for the next instance. The release fails
        // only without a bus.
        let _ = published.withdraw().await;
    }
    service.close_queue();
    published.finish_calls().await;
    service.shut_down().await;
    published.close().await;
    ended.map(|left| left.unwrap_or(End::Done))
}

/// Returns when the service is unused for `idle_exit`, or has made room for another version, at the latest after
/// `upgrade`.
async fn leave(
    (idle_exit, upgrade): (Option<Duration>, Duration),
    (activity, at_stake): (&Activity, &Activity),
    make_room: &mut Signal,
    published: &Published,
) -> Result<End, zbus::Error> {
    match leave_when_idle(idle_exit, activity, make_room, published).await? {
        Some(end) => Ok(end),
        None => leave_for_upgrade(upgrade, at_stake, published).await,
    }
}

/// Returns when no job runs that a restart would end, and the name is released.
///
/// Jobs that are requested until then are started, because a user's restore matters more than the time of an upgrade.
/// Other calls do not delay the end, because any user could keep an old version running with them. After `longest` the
/// jobs end with the service. Otherwise a user with that permission could prevent an upgrade.
async fn leave_for_upgrade(
    longest: Duration,
    at_stake: &Activity,
    published: &Published,
) -> Result<End, zbus::Error> {
    tracing::info!(
        "asked to make room for another version: the service ends after the running restores, exports, verifications and \
         deletions, at the latest in {longest:?}"
    );
    let latest = tokio::time::Instant::now() + longest;
    loop {
        let rest = tokio::time::timeout_at(latest, at_stake.rest(Duration::ZERO));
        let Ok(rest) = rest.await else {
            tracing::warn!("the running jobs did not end within {longest:?}, so they end with the service");
            supervisor::stopping().await;
            published.withdraw().await?;
            return Ok(End::StartAgain);
        };
        published.withdraw().await?;
        published.settle_calls().await;
        if at_stake.lasts(rest) {
            supervisor::stopping().await;
            return Ok(End::StartAgain);
        }
        published.stay().await?;
    }
}

/// Returns when the service is unused for `time`, its name is released, and no client called in between; `bus::leave`
/// explains the order. Returns `None` if it is asked to make room before.
///
/// Configured domains are not a use of the service. Between calls it only follows their state for subscribers, and the
/// next instance connects to their monitors again. For a registered domain that is impossible.
async fn leave_when_idle(
    time: Option<Duration>,
    activity: &Activity,
    make_room: &mut Signal,
    published: &Published,
) -> Result<Option<End>, zbus::Error> {
    loop {
        let rest = async {
            match time {
                Some(time) => (activity.rest(time).await, time),
                // The bus would not start it again, or idle exit is disabled.
                None => std::future::pending().await,
            }
        };
        // Handled only while the service owns its name.
        let (rest, time) = tokio::select! {
            rest = rest => rest,
            _ = make_room.recv() => return Ok(None),
        };
        tracing::info!("the service is unused for {time:?}: leaving the bus");
        let systemd = supervisor::is_there();
        let before = if systemd {
            published.jobs_of_systemd().await
        } else {
            None
        };
        published.withdraw().await?;
        if !activity.lasts(rest) {
            tracing::info!("a client called: staying on the bus");
            published.stay().await?;
        } else if systemd {
            supervisor::stopping().await;
            let after = published.jobs_of_systemd().await;
            return Ok(Some(match before.is_some() && before == after {
                true => End::Done,
                false => End::StartAgain,
            }));
        } else {
            return Ok(Some(End::Done));
        }
    }
}

/// Aborts on a panic. Otherwise only one task would end, and its waiters would wait for ever.
fn abort_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        report(info);
        tracing::error!("{info}");
        std::process::abort();
    }));
}

/// Logs to the journal if there is one, else to standard error.
fn start_log() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    // Audit records are never filtered out.
    let filter = match AUDIT_DIRECTIVE.parse() {
        Ok(audit) => filter.add_directive(audit),
        // The directive is always valid.
        Err(_) => filter,
    };
    let registry = tracing_subscriber::registry().with(filter);
    let journal = std::env::var_os("JOURNAL_STREAM").and_then(|_| tracing_journald::layer().ok());
    match journal {
        // Fields become `BACKUPD_…=`.
        Some(journal) => registry
            .with(journal.with_field_prefix(Some("BACKUPD".into())))
            .init(),
        None => registry
            .with(tracing_subscriber::fmt::layer().with_writer(std::io::stderr))
            .init(),
    }
}
