//! Leaving the bus without losing a call, and the check that the service still answers.
//!
//! Until it gives up its name, the service gets every call that is sent to the name; afterwards the bus holds calls back
//! and has the service started for them. The bus handles messages in order, so the reply to `ReleaseName` comes after the
//! last call that the service got by its name: when the reply is there and all before it is let in, it is known whether
//! anybody called. If somebody did, the name is taken again, and the service goes on as if it had never thought of
//! leaving; what the bus held back meanwhile, it delivers as soon as the name has an owner.
//!
//! With systemd there is a second thing to get right. The bus does not start the service itself but asks systemd, once for
//! all the calls that it holds back; and to start a unit that is active is nothing. So a call that comes after the name was
//! given up and before systemd knows that the service ends would wait for nobody. `STOPPING=1` makes systemd keep further
//! starts until the service has ended; but there is no way back from it: the unit is deactivating from then on, will be
//! killed when its time is over, and is not even sent a signal when it is to be stopped. Said *before* the name is given
//! up, it would let calls in that the service must answer and has no time for: a subscription, a domain, a backup. Said
//! *after*, it leaves a gap. So it is said after, when nobody has called, and systemd is asked whether it was asked to
//! start anything in the gap: it counts the jobs that it ever installed, those that turn out to be nothing too. The
//! order is
//!
//! 1. read systemd's count;
//! 2. give up the name and let in what had come: if somebody called, take the name again and go on;
//! 3. `STOPPING=1`, and wait until systemd has taken note of it (`BARRIER=1`);
//! 4. read the count again. Whatever start systemd saw before this is counted, whatever it sees later is kept. If the count
//!    is the same, end. If it is not, or cannot be read, end with the status by which systemd starts the service again
//!    ([`crate::supervisor::START_AGAIN`]), which then gets what the bus holds back. A start of another unit has the same
//!    effect, and does no harm.
//!
//! Nobody can hold back calls to the unique name, which some libraries use once they know it. Those that come before the
//! name is given up are like all others; later ones are refused for as long as there is a connection
//! ([`super::Published::close`]), and then by the bus. Such a caller has been told by then that the name has no owner.

use std::time::Duration;

use zbus::fdo::{DBusProxy, ReleaseNameReply, RequestNameFlags, RequestNameReply};
use zbus::names::WellKnownName;
use zbus::proxy::MethodFlags;
use zbus::wire::OwnedVariant;
use zbus::{Connection, Proxy};

use super::Published;
use super::standard::{PEER, PROPERTIES};
use crate::names::{BUS_NAME, ROOT_PATH};

/// How long systemd may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
const SYSTEMD: &str = "org.freedesktop.systemd1";
const SYSTEMD_PATH: &str = "/org/freedesktop/systemd1";
const SYSTEMD_MANAGER: &str = "org.freedesktop.systemd1.Manager";

/// Takes the name that callers know.
pub(super) async fn take_name(connection: &Connection) -> zbus::Result<()> {
    let bus = DBusProxy::new(connection).await?;
    let flags = RequestNameFlags::DO_NOT_QUEUE;
    match bus.request_name(name(), flags).await? {
        RequestNameReply::PrimaryOwner | RequestNameReply::AlreadyOwner => Ok(()),
        RequestNameReply::Exists | RequestNameReply::InQueue => Err(zbus::Error::NameTaken),
    }
}

/// Whether the bus starts the service for a call.
pub(super) async fn is_started_on_demand(connection: &Connection) -> zbus::Result<bool> {
    let bus = DBusProxy::new(connection).await?;
    let names = bus.list_activatable_names().await?;
    Ok(names.iter().any(|name| name.as_str() == BUS_NAME))
}

fn name() -> WellKnownName<'static> {
    WellKnownName::from_static_str_unchecked(BUS_NAME)
}

impl Published {
    /// Gives up the name. When this returns, whatever was sent to it before is let in.
    pub async fn withdraw(&self) -> zbus::Result<()> {
        let bus = DBusProxy::new(&self.connection).await?;
        match bus.release_name(name()).await? {
            ReleaseNameReply::Released => {}
            ReleaseNameReply::NonExistent | ReleaseNameReply::NotOwner => {
                tracing::debug!("the name was not the service's");
            }
        }
        self.door.let_all_in().await;
        Ok(())
    }

    /// Takes the name again.
    pub async fn stay(&self) -> zbus::Result<()> {
        take_name(&self.connection).await
    }

    /// How many jobs systemd has ever installed; nothing where it does not say.
    pub async fn jobs_of_systemd(&self) -> Option<u32> {
        let count = async {
            let systemd = Proxy::new(&self.connection, SYSTEMD, SYSTEMD_PATH, PROPERTIES).await?;
            let asked = (SYSTEMD_MANAGER, "NInstalledJobs");
            let flags = MethodFlags::NO_AUTO_START;
            let count: Option<OwnedVariant> = systemd.call_with_flags("Get", flags, &asked).await?;
            let count = count.ok_or(zbus::Error::InvalidReply)?;
            u32::try_from(count)
        };
        match tokio::time::timeout(PATIENCE, count).await {
            Ok(Ok(count)) => Some(count),
            Ok(Err(error)) => {
                tracing::debug!(%error, "systemd does not say how many jobs it had");
                None
            }
            Err(_) => {
                tracing::debug!("systemd does not answer");
                None
            }
        }
    }

    /// Asks the service whether it still answers.
    pub fn prober(&self) -> Prober {
        Prober(self.connection.clone())
    }
}

/// Calls the service as anybody does.
pub struct Prober(Connection);

impl Prober {
    /// Returns when a call has gone to the bus, come in at the door, been answered by a task of its own, and the answer has
    /// come back.
    pub async fn probe(&self) -> zbus::Result<()> {
        let own = self.0.unique_name().ok_or(zbus::Error::Unsupported)?;
        self.0
            .call_method(Some(own), ROOT_PATH, Some(PEER), "Ping", &())
            .await
            .map(drop)
    }
}
