//! Notifies when a file appears at a path, or is replaced, so that nobody has to poll for a socket.
//!
//! Knows paths; not the files' purpose, nor who waits. One inotify instance serves all, for a user has few of them.

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

/// How long a look at a path is waited for. It goes on afterwards, and no other one at the path is begun before its end.
const LOOK: Duration = Duration::from_secs(5);
/// How often a look begins again because others took away the watch that it had got.
const TRIES: usize = 8;

/// What the one instance watches.
#[derive(Clone)]
pub(super) struct Presence(Arc<Mutex<Watched>>);

struct Watched {
    watches: Watches,
    /// Who waits for what in a directory.
    waiting: HashMap<WatchDescriptor, Vec<(OsString, Arc<Notify>)>>,
    /// Paths that are looked at. Storage that does not answer keeps one thread a path, however often it is asked for.
    looking: HashSet<PathBuf>,
}

/// The source of all news; see [`Presence::tell`].
pub(super) type News = EventStream<Vec<u8>>;

/// Sees what happens at one path, from the first [`Sight::aim`] on.
pub(super) struct Sight {
    presence: Presence,
    path: PathBuf,
    news: Arc<Notify>,
    place: Option<Place>,
    look: Option<JoinHandle<Option<Place>>>,
    is_gone: Arc<AtomicBool>,
}

/// A directory, and what is waited for in it.
type Place = (WatchDescriptor, OsString);

/// What came of aiming at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Aim {
    /// As before: whatever happened since then is news.
    Held,
    /// From now on: what happened just before may have been missed.
    New,
    /// Nothing is seen.
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

    /// Tells everybody of their news, for as long as this runs.
    pub async fn tell(self, mut news: News) {
        while let Some(event) = news.next().await {
            match event {
                Ok(event) => self.lock().tell(&event),
                Err(error) => {
                    tracing::error!(%error, "that monitors come is not noticed at once any more");
                    return;
                }
            }
        }
    }

    pub fn sight(&self, path: &Path) -> Sight {
        Sight {
            presence: self.clone(),
            path: path.to_owned(),
            news: Arc::default(),
            place: None,
            look: None,
            is_gone: Arc::default(),
        }
    }

    /// Adds `news` to those that wait at the place that `watch` gives; it waits at `before` already. Blocks as `watch` does.
    ///
    /// The kernel has one watch of a directory, and whoever waits there last ends it. That can happen between `watch` and the lock. So
    /// `watch` is asked again once nobody ends it any more: the kernel gives no number twice.
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
        // A panic aborts the service; there is no half-changed state to be met.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watched {
    fn tell(&mut self, event: &Event<OsString>) {
        if event.mask.contains(EventMask::Q_OVERFLOW) {
            let all = self.waiting.values().flatten();
            return all.for_each(|(_, news)| news.notify_one());
        }
        // What happens to the directory itself has no name.
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

    /// Ends the kernel's watch of a directory that nobody waits for. A look that has just got the same watch notices it.
    fn remove_unneeded(&mut self, directory: &WatchDescriptor) {
        if !self.waiting.contains_key(directory) {
            // The directory may be gone, and the watch with it.
            let _ = self.watches.remove(directory.clone());
        }
    }
}

impl Sight {
    /// Aims at the path in its directory, or at the next part of it in the nearest one above that exists. That may be
    /// another after each news. Storage that does not answer keeps one thread, and nobody else.
    pub async fn aim(&mut self) -> Aim {
        let Some(mut look) = self.look.take().or_else(|| self.begin()) else {
            return Aim::Blind;
        };
        let Ok(place) = tokio::time::timeout(LOOK, &mut look).await else {
            self.look = Some(look);
            return Aim::Blind;
        };
        let place = place.ok().flatten();
        // A directory that is made again is watched by another number, even under the same name.
        if place == self.place {
            return place.map_or(Aim::Blind, |_| Aim::Held);
        }
        let aim = place.as_ref().map_or(Aim::Blind, |_| Aim::New);
        if let Some(before) = std::mem::replace(&mut self.place, place) {
            self.presence.lock().forget(&before, &self.news);
        }
        aim
    }

    /// Looks at the path on a thread that may wait for storage; nothing if another look at it has not ended.
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

    /// Waits for news; what came before this is called counts.
    pub async fn news(&self) {
        self.news.notified().await;
    }
}

impl Drop for Sight {
    fn drop(&mut self) {
        let mut watched = self.presence.lock();
        self.is_gone.store(true, Ordering::Relaxed);
        // A look that has ended without being asked for its result has added one more.
        let is_own = |(_, news): &(OsString, Arc<Notify>)| Arc::ptr_eq(news, &self.news);
        let places = watched.waiting.iter().flat_map(|(directory, here)| {
            let own = here.iter().filter(|waiting| is_own(waiting));
            own.map(|(name, _)| (directory.clone(), name.clone()))
        });
        let places: Vec<Place> = places.collect();
        places.iter().for_each(|place| watched.forget(place, &self.news));
    }
}

/// Has the kernel watch the nearest directory. Blocks.
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

/// The lowest directory on the way to `path` that exists, and what is next on that way.
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

    async fn news(sight: &Sight) {
        let news = tokio::time::timeout(Duration::from_secs(30), sight.news());
        news.await.expect("there are news");
    }

    fn open() -> Presence {
        let (presence, news) = Presence::open().unwrap();
        tokio::spawn(presence.clone().tell(news));
        presence
    }

    #[tokio::test]
    async fn what_comes_to_be_in_a_directory_that_is_not_there_is_seen() {
        let presence = open();
        let above = tempfile::tempdir().unwrap();
        let path = above.path().join("a/b/c");
        let mut sight = presence.sight(&path);
        assert_eq!((sight.aim().await, sight.aim().await), (Aim::New, Aim::Held));
        for part in ["a", "a/b"] {
            fs::create_dir(above.path().join(part)).unwrap();
            news(&sight).await;
            assert_eq!(sight.aim().await, Aim::New);
        }
        fs::write(&path, "").unwrap();
        news(&sight).await;
        assert_eq!(sight.aim().await, Aim::Held);
        fs::rename(above.path().join("a"), above.path().join("z")).unwrap();
        fs::remove_dir_all(above.path().join("z")).unwrap();
        news(&sight).await;
        assert_eq!(sight.aim().await, Aim::New);
        fs::create_dir(above.path().join("a")).unwrap();
        news(&sight).await;
    }

    #[tokio::test]
    async fn each_hears_of_its_own_path_and_nothing_stays_behind() {
        let presence = open();
        let directory = tempfile::tempdir().unwrap();
        let mut sights = ["a", "b", "a"].map(|name| presence.sight(&directory.path().join(name)));
        for sight in &mut sights {
            assert_eq!(sight.aim().await, Aim::New);
        }
        fs::write(directory.path().join("b"), "").unwrap();
        fs::write(directory.path().join("a"), "").unwrap();
        // Events come in order: after the last one, all have come.
        news(&sights[0]).await;
        news(&sights[2]).await;
        assert!(sights[1].news().now_or_never().is_some());
        assert!(sights[0].news().now_or_never().is_none(), "not of the other");
        drop(sights);
        assert!(presence.lock().waiting.is_empty());
    }

    /// Whether the kernel has no such watch any more.
    fn is_removed(presence: &Presence, (directory, _): Place) -> bool {
        presence.lock().watches.remove(directory).is_err()
    }

    #[tokio::test]
    async fn a_look_whose_sight_is_gone_leaves_no_watch() {
        let presence = open();
        let directory = tempfile::tempdir().unwrap();
        let sight = presence.sight(&directory.path().join("a"));
        let mut watches = presence.lock().watches.clone();
        let mut got = None;
        sight.is_gone.store(true, Ordering::Relaxed);
        let place = presence.wait_at(None, &sight.news, &sight.is_gone, || {
            got = watch(&mut watches, &sight.path);
            got.clone()
        });
        assert_eq!(place, None);
        assert!(presence.lock().waiting.is_empty() && is_removed(&presence, got.unwrap()));
    }

    /// As where its storage does not answer.
    #[tokio::test]
    async fn a_look_that_does_not_end_keeps_no_watch_and_gets_no_second_thread() {
        let presence = open();
        let directory = tempfile::tempdir().unwrap();
        let hanging = directory.path().join("hanging");
        presence.lock().looking.insert(hanging.clone());
        assert_eq!(presence.sight(&hanging).aim().await, Aim::Blind);

        let mut other = presence.sight(&directory.path().join("a"));
        assert_eq!(other.aim().await, Aim::New);
        let place = other.place.clone().unwrap();
        drop(other);
        assert!(is_removed(&presence, place));

        presence.lock().looking.remove(&hanging);
        assert_eq!(presence.sight(&hanging).aim().await, Aim::New);
    }

    #[tokio::test]
    async fn a_watch_that_another_takes_away_during_the_look_is_made_again() {
        let presence = open();
        let directory = tempfile::tempdir().unwrap();
        let mut other = Some(presence.sight(&directory.path().join("other")));
        assert_eq!(other.as_mut().unwrap().aim().await, Aim::New);
        let shared = other.as_ref().unwrap().place.clone().unwrap();

        let sight = presence.sight(&directory.path().join("a"));
        let mut watches = presence.lock().watches.clone();
        let place = presence.wait_at(None, &sight.news, &sight.is_gone, || {
            let place = watch(&mut watches, &sight.path);
            drop(other.take());
            place
        });
        assert_ne!(place.unwrap().0, shared.0);
        fs::write(directory.path().join("a"), "").unwrap();
        news(&sight).await;
        assert_eq!(presence.lock().waiting.len(), 1);
        drop(sight);
        assert!(presence.lock().waiting.is_empty());
    }
}
