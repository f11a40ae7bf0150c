//! Notifies when a file appears at a path, or is replaced, so that the service need not poll for a socket.
//!
//! Knows paths; not what the files are for. One inotify instance serves all paths, because a user may have only a few
//! instances.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use inotify::{Event, EventMask, EventStream, Inotify, WatchDescriptor, WatchMask, Watches};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

/// How long the caller waits for a probe of a path. The probe continues, and no second probe of the path begins
/// before its end.
const LOOK: Duration = Duration::from_secs(5);
/// The most restarts of a probe whose watch another task has removed.
const TRIES: usize = 8;

/// The paths that the inotify instance watches.
#[derive(Clone)]
pub(super) struct Presence(Arc<Mutex<Watched>>);

struct Watched {
    watches: Watches,
    /// By directory: the file names, and whom to notify.
    waiting: HashMap<WatchDescriptor, Vec<(OsString, Arc<Notify>)>>,
    /// Paths with a running probe. On storage that hangs, each path blocks one thread only.
    looking: HashSet<PathBuf>,
}

/// The source of all events; see [`Presence::dispatch`].
pub(super) type News = EventStream<Vec<u8>>;

/// Watches one path, from the first [`PathWatch::rearm`] on.
pub(super) struct PathWatch {
    presence: Presence,
    path: PathBuf,
    news: Arc<Notify>,
    place: Option<Place>,
    look: Option<JoinHandle<Option<Place>>>,
    is_gone: Arc<AtomicBool>,
}

/// A directory, and the file name to wait for.
type Place = (WatchDescriptor, OsString);

/// The result of [`PathWatch::rearm`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Armed {
    /// The watch is unchanged: every change since then is reported.
    Held,
    /// The watch is new: a change just before may have been missed.
    New,
    /// There is no watch.
    Blind,
}

impl Presence {
    pub fn open() -> io::Result<(Self, News)> {
        let inotify = Inotify::init()?;
        let watched = Watched {
            watches: inotify.watches(),
            waiting: HashMap::new(),
            looking: HashSet::new(),
        };
        let news = inotify.into_event_stream(vec![0; 4096])?;
        Ok((Self(Arc::new(Mutex::new(watched))), news))
    }

    /// Notifies each watch of its events, for as long as this runs.
    pub async fn dispatch(self, mut news: News) {
        while let Some(event) = news.next().await {
            match event {
                Ok(event) => self.lock().dispatch(&event),
                Err(error) => {
                    tracing::error!(%error, "inotify failed: the service connects to new monitors later");
                    return;
                }
            }
        }
    }

    pub fn path_watch(&self, path: &Path) -> PathWatch {
        PathWatch {
            presence: self.clone(),
            path: path.to_owned(),
            news: Arc::default(),
            place: None,
            look: None,
            is_gone: Arc::default(),
        }
    }

    /// Registers `news` at the directory that `watch` returns; `before` is where it is registered already. Blocks as
    /// `watch` does.
    ///
    /// The kernel has one watch per directory, and the last registration that is removed ends it. That can happen
    /// between `watch` and the lock. So `watch` runs again after the registration, which keeps the watch alive; the
    /// kernel never reuses a number.
    fn wait_at(
        &self,
        before: Option<Place>,
        news: &Arc<Notify>,
        is_gone: &AtomicBool,
        mut watch: impl FnMut() -> Option<Place>,
    ) -> Option<Place> {
        let mut added = None;
        for _ in 0..TRIES {
            let place = watch();
            let mut watched = self.lock();
            if place == added {
                return place;
            }
            if let Some(added) = added.take() {
                watched.forget(&added, news);
            }
            let new = place.clone()?;
            if is_gone.load(Ordering::Relaxed) {
                watched.remove_unneeded(&new.0);
                return None;
            }
            if place == before {
                return place;
            }
            watched
                .waiting
                .entry(new.0)
                .or_default()
                .push((new.1, news.clone()));
            added = place;
        }
        self.lock().forget(&added?, news);
        None
    }

    fn lock(&self) -> MutexGuard<'_, Watched> {
        // A panic aborts the service, so no code sees half-changed state.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watched {
    fn dispatch(&mut self, event: &Event<OsString>) {
        if event.mask.contains(EventMask::Q_OVERFLOW) {
            let all = self.waiting.values().flatten();
            return all.for_each(|(_, news)| news.notify_one());
        }
        // Events of the directory itself have no name.
        let here = self.waiting.get(&event.wd).into_iter().flatten();
        here.filter(|(name, _)| event.name.as_ref().is_none_or(|of| of == name))
            .for_each(|(_, news)| news.notify_one());
        if event.mask.contains(EventMask::IGNORED) {
            self.waiting.remove(&event.wd);
        }
    }

    fn forget(&mut self, (directory, name): &Place, news: &Arc<Notify>) {
        let Some(here) = self.waiting.get_mut(directory) else {
            return;
        };
        here.retain(|(of, other)| of != name || !Arc::ptr_eq(other, news));
        if here.is_empty() {
            self.waiting.remove(directory);
            self.remove_unneeded(directory);
        }
    }

    /// Ends the kernel's watch of a directory without registrations. A probe that has just got the same watch notices
    /// it.
    fn remove_unneeded(&mut self, directory: &WatchDescriptor) {
        if !self.waiting.contains_key(directory) {
            // The directory may be removed, and the watch with it.
            let _ = self.watches.remove(directory.clone());
        }
    }
}

impl PathWatch {
    /// Watches for the path in its directory, or for the next part of the path in its nearest existing ancestor. That
    /// directory can change with each event. A probe of storage that hangs blocks one thread only.
    pub async fn rearm(&mut self) -> Armed {
        let Some(mut look) = self.look.take().or_else(|| self.begin()) else {
            return Armed::Blind;
        };
        let Ok(place) = tokio::time::timeout(LOOK, &mut look).await else {
            self.look = Some(look);
            return Armed::Blind;
        };
        let place = place.ok().flatten();
        // A directory that is created again has another watch number, even under the same name.
        if place == self.place {
            return place.map_or(Armed::Blind, |_| Armed::Held);
        }
        let aim = place.as_ref().map_or(Armed::Blind, |_| Armed::New);
        if let Some(before) = std::mem::replace(&mut self.place, place) {
            self.presence.lock().forget(&before, &self.news);
        }
        aim
    }

    /// Probes the path on a thread that may block. Returns `None` while another probe of the path runs.
    fn begin(&self) -> Option<JoinHandle<Option<Place>>> {
        let (path, before) = (self.path.clone(), self.place.clone());
        let (presence, news, is_gone) = (self.presence.clone(), self.news.clone(), self.is_gone.clone());
        let mut watched = presence.lock();
        let mut watches = watched.watches.clone();
        watched.looking.insert(path.clone()).then(|| {
            let presence = presence.clone();
            tokio::task::spawn_blocking(move || {
                let place = presence.wait_at(before, &news, &is_gone, || watch(&mut watches, &path));
                presence.lock().looking.remove(&path);
                place
            })
        })
    }

    /// Waits for an event. Events before this call count.
    pub async fn news(&self) {
        self.news.notified().await;
    }
}

impl Drop for PathWatch {
    fn drop(&mut self) {
        let mut watched = self.presence.lock();
        self.is_gone.store(true, Ordering::Relaxed);
        // A probe that ended unobserved has added one more registration.
        let is_own = |(_, news): &(OsString, Arc<Notify>)| Arc::ptr_eq(news, &self.news);
        let places = watched.waiting.iter().flat_map(|(directory, here)| {
            let own = here.iter().filter(|waiting| is_own(waiting));
            own.map(|(name, _)| (directory.clone(), name.clone()))
        });
        let places: Vec<Place> = places.collect();
        places.iter().for_each(|place| watched.forget(place, &self.news));
    }
}

/// Makes the kernel watch the nearest existing directory. Blocks.
fn watch(watches: &mut Watches, path: &Path) -> Option<Place> {
    let mask = WatchMask::CREATE
        | WatchMask::MOVED_TO
        | WatchMask::ATTRIB
        | WatchMask::DELETE_SELF
        | WatchMask::MOVE_SELF
        | WatchMask::ONLYDIR;
    let (directory, name) = nearest(path)?;
    match watches.add(directory, mask) {
        Ok(watch) => Some((watch, name.to_owned())),
        Err(error) => {
            tracing::debug!("{}: cannot be watched: {error}", directory.display());
            None
        }
    }
}

/// Returns the nearest existing ancestor of `path`, and the next part of the path below it.
fn nearest(path: &Path) -> Option<(&Path, &OsStr)> {
    let steps = path.ancestors().zip(path.ancestors().skip(1));
    let (next, directory) = steps.into_iter().find(|(_, directory)| directory.is_dir())?;
    Some((directory, next.file_name()?))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use futures_util::FutureExt;

    use super::*;

    async fn news(path_watch: &PathWatch) {
        let news = tokio::time::timeout(Duration::from_secs(30), path_watch.news());
        news.await.expect("an event");
    }

    fn open() -> Presence {
        let (presence, news) = Presence::open().unwrap();
        tokio::spawn(presence.clone().dispatch(news));
        presence
    }

    #[tokio::test]
    async fn a_file_in_a_directory_that_appears_later_is_noticed() {
        let presence = open();
        let above = tempfile::tempdir().unwrap();
        let path = above.path().join("a/b/c");
        let mut path_watch = presence.path_watch(&path);
        assert_eq!(
            (path_watch.rearm().await, path_watch.rearm().await),
            (Armed::New, Armed::Held)
        );
        for part in ["a", "a/b"] {
            fs::create_dir(above.path().join(part)).unwrap();
            news(&path_watch).await;
            assert_eq!(path_watch.rearm().await, Armed::New);
        }
        fs::write(&path, "").unwrap();
        news(&path_watch).await;
        assert_eq!(path_watch.rearm().await, Armed::Held);
        fs::rename(above.path().join("a"), above.path().join("z")).unwrap();
        fs::remove_dir_all(above.path().join("z")).unwrap();
        news(&path_watch).await;
        assert_eq!(path_watch.rearm().await, Armed::New);
        fs::create_dir(above.path().join("a")).unwrap();
        news(&path_watch).await;
    }

    #[tokio::test]
    async fn each_watch_hears_of_its_own_path_and_leaves_nothing() {
        let presence = open();
        let directory = tempfile::tempdir().unwrap();
        let mut watches = ["a", "b", "a"].map(|name| presence.path_watch(&directory.path().join(name)));
        for path_watch in &mut watches {
            assert_eq!(path_watch.rearm().await, Armed::New);
        }
        fs::write(directory.path().join("b"), "").unwrap();
        fs::write(directory.path().join("a"), "").unwrap();
        // Events arrive in order: after the last one, all have arrived.
        news(&watches[0]).await;
        news(&watches[2]).await;
        assert!(watches[1].news().now_or_never().is_some());
        assert!(
            watches[0].news().now_or_never().is_none(),
            "no event of the other path"
        );
        drop(watches);
        assert!(presence.lock().waiting.is_empty());
    }

    /// Whether the kernel has ended the watch.
    fn is_removed(presence: &Presence, (directory, _): Place) -> bool {
        presence.lock().watches.remove(directory).is_err()
    }

    #[tokio::test]
    async fn a_probe_whose_path_watch_is_dropped_leaves_no_watch() {
        let presence = open();
        let directory = tempfile::tempdir().unwrap();
        let path_watch = presence.path_watch(&directory.path().join("a"));
        let mut watches = presence.lock().watches.clone();
        let mut got = None;
        path_watch.is_gone.store(true, Ordering::Relaxed);
        let place = presence.wait_at(None, &path_watch.news, &path_watch.is_gone, || {
            got = watch(&mut watches, &path_watch.path);
            got.clone()
        });
        assert_eq!(place, None);
        assert!(presence.lock().waiting.is_empty() && is_removed(&presence, got.unwrap()));
    }

    /// Simulates storage that hangs.
    #[tokio::test]
    async fn a_probe_that_hangs_keeps_no_watch_and_gets_no_second_thread() {
        let presence = open();
        let directory = tempfile::tempdir().unwrap();
        let hanging = directory.path().join("hanging");
        presence.lock().looking.insert(hanging.clone());
        assert_eq!(presence.path_watch(&hanging).rearm().await, Armed::Blind);

        let mut other = presence.path_watch(&directory.path().join("a"));
        assert_eq!(other.rearm().await, Armed::New);
        let place = other.place.clone().unwrap();
        drop(other);
        assert!(is_removed(&presence, place));

        presence.lock().looking.remove(&hanging);
        assert_eq!(presence.path_watch(&hanging).rearm().await, Armed::New);
    }

    #[tokio::test]
    async fn a_watch_that_another_task_removes_during_the_probe_is_made_again() {
        let presence = open();
        let directory = tempfile::tempdir().unwrap();
        let mut other = Some(presence.path_watch(&directory.path().join("other")));
        assert_eq!(other.as_mut().unwrap().rearm().await, Armed::New);
        let shared = other.as_ref().unwrap().place.clone().unwrap();

        let path_watch = presence.path_watch(&directory.path().join("a"));
        let mut watches = presence.lock().watches.clone();
        let place = presence.wait_at(None, &path_watch.news, &path_watch.is_gone, || {
            let place = watch(&mut watches, &path_watch.path);
            drop(other.take());
            place
        });
        assert_ne!(place.unwrap().0, shared.0);
        fs::write(directory.path().join("a"), "").unwrap();
        news(&path_watch).await;
        assert_eq!(presence.lock().waiting.len(), 1);
        drop(path_watch);
        assert!(presence.lock().waiting.is_empty());
    }
}
