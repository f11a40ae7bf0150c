//! Deletions, merges and prunes.

use std::collections::BTreeSet;

use jiff::SignedDuration;
use zbus::wire::Variant;

use super::Walk;
use super::ledger::{Held, Whose};
use crate::common::caller::Caller;
use crate::common::proxies::{Options, PrunedBackup};
use crate::common::wait;

/// The allowed difference of clocks before a backup counts as one from the future.
const SLACK: SignedDuration = SignedDuration::from_mins(1);

impl Walk {
    pub async fn delete(&mut self, how: &'static str) -> &'static str {
        let ours = self.ledger.of(Whose::Ours);
        if ours.is_empty() {
            return "nothing to delete";
        }
        let chosen = &ours[self.dice.roll(ours.len() as u64) as usize];
        self.delete_this(chosen, how).await;
        how
    }

    async fn delete_this(&mut self, chosen: &str, how: &'static str) {
        if how == "merge" && self.ledger.backups[chosen].store == "poor" && self.ledger.has_dependents(chosen)
        {
            self.note("merge without exchange and links");
        }
        let gone = delete(&self.caller().await, chosen, how)
            .await
            .expect("it can be deleted");
        assert!(gone.iter().any(|id| id == chosen));
        assert!(how != "merge" || gone.len() == 1, "{gone:?}");
        for id in &gone {
            assert_eq!(self.ledger.backups[id].whose, Whose::Ours, "{id}");
            self.ledger.remove(id);
        }
    }

    /// Merges in the store that cannot exchange two directories.
    pub async fn merge_by_moving(&mut self) -> &'static str {
        let mut made = Vec::new();
        for mode in ["full", "auto"] {
            self.guest(false);
            let options = Options::from([("incremental", Variant::from(mode))]);
            let job = self.start(&self.caller().await, "poor", options).await;
            let held = self.scene.now.clone();
            assert!(self.take(&job.expect("it begins"), "poor", held).await);
            made.extend(self.ledger.of(Whose::Ours).pop());
        }
        self.delete_this(&made[0], "merge").await;
        "merge"
    }

    /// Prunes a store to the newest few backups and their bases.
    pub async fn prune(&mut self) -> &'static str {
        let (store, newest) = (self.any_store(), 1 + self.dice.roll(4));
        let mut group = self.group(store);
        let kept = self.kept(&group, newest as usize);
        group.sort_unstable();
        // The service notices the neighbour's changes before it applies the rules.
        let judged = prune(&self.caller().await, &self.scene.name, store, newest).await;
        let mut ids: Vec<&str> = judged.iter().map(|judged| judged.2.as_str()).collect();
        ids.sort_unstable();
        assert_eq!(ids, group);
        for (_, _, id, _, verdict, reason) in &judged {
            let expected = ["removed", "kept"][usize::from(kept.contains(id))];
            assert_eq!(verdict, expected, "{id}: {reason}, keep {newest} in {store}");
        }
        for (_, _, id, _, verdict, _) in judged {
            if verdict == "removed" {
                self.ledger.remove(&id);
            }
        }
        "prune"
    }

    /// Returns the backups in a store with the UUID of the tested VM, in the order of creation.
    fn group(&self, store: &str) -> Vec<String> {
        let is_ours = |held: &Held| {
            held.whose == Whose::Ours || self.neighbour.is_twin && held.whose == Whose::Neighbours
        };
        let backups = self.ledger.backups.iter();
        let group = backups.filter(|(_, held)| held.store == store && is_ours(held));
        let mut ids: Vec<String> = group.map(|(id, _)| id.clone()).collect();
        ids.sort_by_key(|id| {
            let held = &self.ledger.backups[id];
            (held.sequence(), held.instant(), id.clone())
        });
        let own = ids.iter().filter(|id| self.ledger.backups[*id].whose.is_own());
        let made = self.ledger.of_in(Whose::Ours, store);
        assert!(own.eq(&made), "the numbers are not in the order of creation");
        ids
    }

    /// Returns the backups that a `keep-last` rule keeps: the newest of the group, as many again without those from
    /// the future, the backups of other services, and the bases of all these.
    fn kept(&self, group: &[String], newest: usize) -> BTreeSet<String> {
        let (mut earliest, mut all, mut sound) = (self.clock.now(), 0, 0);
        let mut kept = BTreeSet::new();
        for id in group.iter().rev() {
            let held = &self.ledger.backups[id];
            let instant = held.instant();
            let is_sound = instant.duration_since(earliest) <= SLACK;
            earliest = earliest.min(instant);
            if held.whose == Whose::Ours {
                if all < newest || is_sound && sound < newest {
                    kept.insert(id.clone());
                }
                all += 1;
                sound += usize::from(is_sound);
            } else {
                kept.insert(id.clone());
            }
        }
        let mut left: Vec<String> = kept.iter().cloned().collect();
        while let Some(id) = left.pop() {
            for parent in self.ledger.backups[&id].parents() {
                if kept.insert(parent.clone()) {
                    left.push(parent);
                }
            }
        }
        kept
    }
}

/// Deletes a backup; returns the ids of the removed ones.
pub async fn delete(caller: &Caller, id: &str, how: &'static str) -> zbus::Result<Vec<String>> {
    let path = caller.manager.get_backup(id).await?;
    let options = Options::from([(how, Variant::from(true))]);
    let interface = Some("org.example.Backup1.Backup");
    let call =
        caller
            .connection
            .call_method(Some("org.example.Backup1"), &path, interface, "Delete", &options);
    let reply = wait::within("Delete", call).await?;
    let (gone, _): (Vec<String>, u64) = reply.body().deserialize()?;
    Ok(gone)
}

pub async fn prune(caller: &Caller, domain: &str, store: &str, newest: u64) -> Vec<PrunedBackup> {
    let rules = Options::from([
        ("keep-last", Variant::from(newest)),
        ("store", Variant::from(store)),
    ]);
    let pruned = caller.manager.prune(domain, rules).await;
    pruned.expect("it can be pruned").0
}
