//! Chooses the backups of a domain in a store to keep, by rules like restic's.
//!
//! `keep-daily N` keeps the newest backup of each of the last N days that have one. The other rules do the same for
//! hours, weeks (starting on Monday), months and years, in the caller's time zone. Each rule counts by itself: one
//! backup can be the last of its day and of its month. Pure: removes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use jiff::civil::DateTime;
use jiff::tz::{Offset, TimeZone};
use jiff::{SignedDuration, Timestamp};

use crate::config::Store;

/// How many backups each rule keeps; 0 disables the rule.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Retention {
    pub last: u32,
    pub hourly: u32,
    pub daily: u32,
    pub weekly: u32,
    pub monthly: u32,
    pub yearly: u32,
    /// Keep younger backups regardless of the rules. They do not displace older ones.
    pub at_least: Duration,
}

/// A keep rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    Last,
    Hourly,
    Daily,
    Weekly,
    Monthly,
    Yearly,
}

impl Rule {
    pub const ALL: [Self; 6] = [
        Self::Last,
        Self::Hourly,
        Self::Daily,
        Self::Weekly,
        Self::Monthly,
        Self::Yearly,
    ];

    /// Returns the rule with this key in options and the configuration.
    pub fn from_key(key: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|rule| rule.key() == key)
    }

    /// The key in options and the configuration.
    pub fn key(self) -> &'static str {
        match self {
            Self::Last => "keep-last",
            Self::Hourly => "keep-hourly",
            Self::Daily => "keep-daily",
            Self::Weekly => "keep-weekly",
            Self::Monthly => "keep-monthly",
            Self::Yearly => "keep-yearly",
        }
    }

    /// Returns the start of the period of a time. `keep-last` has no periods. An hour that occurs twice when clocks
    /// change is two periods, which differ in their offset from UTC.
    fn period(self, time: Timestamp, zone: &TimeZone) -> Option<(DateTime, Option<Offset>)> {
        let civil = zone.to_datetime(time);
        let date = civil.date();
        let first = match self {
            Self::Last => return None,
            Self::Hourly => {
                let hour = date.at(civil.hour(), 0, 0, 0);
                return Some((hour, Some(zone.to_offset(time))));
            }
            Self::Daily => date,
            Self::Weekly => {
                let days = date.weekday().to_monday_zero_offset();
                // The calendar's first week may have no Monday.
                date.checked_sub(jiff::Span::new().days(days)).unwrap_or(date)
            }
            Self::Monthly => date.first_of_month(),
            Self::Yearly => date.first_of_year(),
        };
        Some((first.at(0, 0, 0, 0), None))
    }
}

impl Retention {
    /// Returns a store's own rules.
    pub fn of_store(store: &Store) -> Self {
        Self {
            last: store.keep_last,
            hourly: store.keep_hourly,
            daily: store.keep_daily,
            weekly: store.keep_weekly,
            monthly: store.keep_monthly,
            yearly: store.keep_yearly,
            at_least: store.keep_at_least,
        }
    }

    pub fn of(&self, rule: Rule) -> u32 {
        match rule {
            Rule::Last => self.last,
            Rule::Hourly => self.hourly,
            Rule::Daily => self.daily,
            Rule::Weekly => self.weekly,
            Rule::Monthly => self.monthly,
            Rule::Yearly => self.yearly,
        }
    }

    pub fn set(&mut self, rule: Rule, count: u32) {
        let field = match rule {
            Rule::Last => &mut self.last,
            Rule::Hourly => &mut self.hourly,
            Rule::Daily => &mut self.daily,
            Rule::Weekly => &mut self.weekly,
            Rule::Monthly => &mut self.monthly,
            Rule::Yearly => &mut self.yearly,
        };
        *field = count;
    }

    /// Returns true if no rule keeps anything. Such rules must not remove backups.
    pub fn is_nothing(&self) -> bool {
        Rule::ALL.into_iter().all(|rule| self.of(rule) == 0)
    }

    /// Returns true if a backup is younger than `keep-at-least`. A backup from the future is.
    pub fn is_young(&self, instant: Timestamp, now: Timestamp) -> bool {
        let age = now.duration_since(instant);
        SignedDuration::try_from(self.at_least).is_ok_and(|least| !least.is_zero() && age < least)
    }
}

/// The condition of a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    Good,
    /// It does not displace a good backup, and is kept as long as a good one would be.
    Damaged,
    /// There is nothing to remove.
    Missing,
}

/// How much clocks may differ before a backup counts as from the future.
const SLACK: SignedDuration = SignedDuration::from_mins(1);

/// A backup for the rules to decide on.
#[derive(Debug, Clone)]
pub struct Candidate {
    pub id: String,
    pub instant: Timestamp,
    pub condition: Condition,
    /// This service created or adopted it. Other backups are always kept and do not count.
    pub own: bool,
    /// The ids of its bases.
    pub parents: Vec<String>,
    /// Reasons to keep it regardless of the rules.
    pub anyway: Vec<Reason>,
}

/// The reason why a backup is kept.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    Rule(Rule),
    /// A user protected it.
    Protected,
    /// It is younger than `keep-at-least`.
    Young,
    /// This kept backup depends on it.
    Base(String),
    Missing,
    /// Another service created it.
    Foreign,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rule(rule) => f.write_str(rule.key().trim_start_matches("keep-")),
            Self::Protected => f.write_str("protected"),
            Self::Young => f.write_str("keep-at-least"),
            Self::Base(id) => write!(f, "{id} depends on it"),
            Self::Missing => f.write_str("missing"),
            Self::Foreign => f.write_str("made by another service"),
        }
    }
}

/// Returns the backups whose point in time is later than `now` or than that of a backup created after them: a clock was
/// wrong. `candidates` are in the order of creation.
pub fn from_future(candidates: &[Candidate], now: Timestamp) -> BTreeSet<&str> {
    let mut earliest = now;
    let mut future = BTreeSet::new();
    for candidate in candidates.iter().rev() {
        if candidate.instant.duration_since(earliest) > SLACK {
            future.insert(candidate.id.as_str());
        }
        earliest = earliest.min(candidate.instant);
    }
    future
}

/// Returns the reasons for each kept backup; all others are removed. `candidates` are in the order of creation, which
/// decides which is newest. Times only select the day or other period.
pub fn kept<'a>(
    candidates: &'a [Candidate],
    retention: &Retention,
    zone: &TimeZone,
    now: Timestamp,
) -> BTreeMap<&'a str, BTreeSet<Reason>> {
    let mut kept: BTreeMap<&str, BTreeSet<Reason>> = BTreeMap::new();
    let future = from_future(candidates, now);
    let there = |candidate: &&&Candidate| candidate.condition != Condition::Missing;
    let counts = |candidate: &&&Candidate| candidate.own && there(candidate);
    let sound = |candidate: &&&Candidate| {
        candidate.own && candidate.condition == Condition::Good && !future.contains(candidate.id.as_str())
    };
    let newest_first: Vec<&Candidate> = candidates.iter().rev().collect();
    // Applies the rules three times. First without damaged backups and those from the future, so that they displace no
    // good one. Then also without those too young to remove, so that many at once displace no older one. Last with all.
    let all: Vec<&Candidate> = newest_first.iter().filter(counts).copied().collect();
    let sound: Vec<&Candidate> = newest_first.iter().filter(sound).copied().collect();
    let settled = sound
        .iter()
        .filter(|candidate| !candidate.anyway.contains(&Reason::Young));
    let settled: Vec<&Candidate> = settled.copied().collect();
    for of in [&sound, &settled, &all] {
        for rule in Rule::ALL {
            for id in by_rule(of, rule, retention.of(rule), zone) {
                kept.entry(id).or_default().insert(Reason::Rule(rule));
            }
        }
    }
    for candidate in newest_first {
        if candidate.condition == Condition::Missing {
            kept.entry(&candidate.id).or_default().insert(Reason::Missing);
        } else if !candidate.own {
            kept.entry(&candidate.id).or_default().insert(Reason::Foreign);
        }
    }
    for candidate in candidates {
        if candidate.condition == Condition::Missing {
            continue;
        }
        if !candidate.anyway.is_empty() {
            let reasons = kept.entry(&candidate.id).or_default();
            reasons.extend(candidate.anyway.iter().cloned());
        }
    }
    keep_bases(candidates, &mut kept);
    kept
}

fn by_rule<'a>(newest_first: &[&'a Candidate], rule: Rule, count: u32, zone: &TimeZone) -> Vec<&'a str> {
    let mut kept = Vec::new();
    let mut periods = BTreeSet::new();
    for candidate in newest_first {
        if kept.len() >= count as usize {
            break;
        }
        let period = rule.period(candidate.instant, zone);
        if period.is_none_or(|period| periods.insert(period)) {
            kept.push(candidate.id.as_str());
        }
    }
    kept
}

fn keep_bases<'a>(candidates: &'a [Candidate], kept: &mut BTreeMap<&'a str, BTreeSet<Reason>>) {
    let by_id: BTreeMap<&str, &Candidate> = candidates
        .iter()
        .map(|candidate| (candidate.id.as_str(), candidate))
        .collect();
    // A missing backup needs no bases.
    let needs = |id: &&str| !kept[*id].contains(&Reason::Missing);
    let mut left: Vec<&str> = kept.keys().copied().filter(needs).collect();
    while let Some(id) = left.pop() {
        let Some(candidate) = by_id.get(id) else { continue };
        for parent in &candidate.parents {
            let Some((parent, _)) = by_id.get_key_value(parent.as_str()) else {
                continue;
            };
            let reasons = kept.entry(parent).or_default();
            if reasons.is_empty() {
                left.push(parent);
            }
            reasons.insert(Reason::Base(id.to_owned()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A complete backup named by its time, such as `2026-11-23T02:00`; `<` and its bases follow.
    fn candidate(text: &str) -> Candidate {
        let (id, parents) = text.split_once('<').unwrap_or((text, ""));
        let (id, condition) = match id.split_once('!') {
            Some((id, "damaged")) => (id, Condition::Damaged),
            Some((id, _)) => (id, Condition::Missing),
            None => (id, Condition::Good),
        };
        Candidate {
            id: id.to_owned(),
            instant: format!("{id}:00Z").parse().unwrap(),
            condition,
            own: true,
            parents: parents
                .split(',')
                .filter(|parent| !parent.is_empty())
                .map(str::to_owned)
                .collect(),
            anyway: Vec::new(),
        }
    }

    fn candidates(texts: &[&str]) -> Vec<Candidate> {
        texts.iter().map(|text| candidate(text)).collect()
    }

    /// A time after all backups of the tests.
    fn now() -> Timestamp {
        "2030-01-01T00:00:00Z".parse().unwrap()
    }

    fn retention(rules: &[(Rule, u32)]) -> Retention {
        let mut retention = Retention::default();
        rules
            .iter()
            .for_each(|(rule, count)| retention.set(*rule, *count));
        retention
    }

    /// Returns the kept backups in UTC, with the reasons.
    fn decided(texts: &[&str], rules: &[(Rule, u32)]) -> Vec<String> {
        decided_in(texts, rules, &TimeZone::UTC)
    }

    fn decided_in(texts: &[&str], rules: &[(Rule, u32)], zone: &TimeZone) -> Vec<String> {
        let candidates = candidates(texts);
        let kept = kept(&candidates, &retention(rules), zone, now());
        kept.into_iter()
            .map(|(id, reasons)| {
                let reasons: Vec<String> = reasons.iter().map(Reason::to_string).collect();
                format!("{id}: {}", reasons.join(", "))
            })
            .collect()
    }

    #[test]
    fn a_backup_from_the_future_displaces_none_and_is_kept_as_long() {
        let times = [
            "2026-03-01T02:00",
            "2026-03-02T02:00",
            "2038-01-19T02:00",
            "2026-03-03T02:00",
            "2026-03-04T02:00",
        ];
        assert_eq!(
            from_future(&candidates(&times), now())
                .into_iter()
                .collect::<Vec<_>>(),
            ["2038-01-19T02:00"]
        );
        let last = |count| decided(&times, &[(Rule::Last, count)]);
        assert_eq!(last(2), ["2026-03-03T02:00: last", "2026-03-04T02:00: last"]);
        // The backup created third counts as third, and the one before it is kept too.
        assert_eq!(
            last(3),
            [
                "2026-03-02T02:00: last",
                "2026-03-03T02:00: last",
                "2026-03-04T02:00: last",
                "2038-01-19T02:00: last",
            ]
        );
        let daily = decided(&times, &[(Rule::Daily, 2)]);
        assert_eq!(daily, ["2026-03-03T02:00: daily", "2026-03-04T02:00: daily"]);
        // The newest backup has a time in the future: the clock is wrong, or was until now.
        let newest = ["2026-03-01T02:00", "2026-03-02T02:00", "2038-01-19T02:00"];
        let kept = decided(&newest, &[(Rule::Last, 1)]);
        assert_eq!(kept, ["2026-03-02T02:00: last", "2038-01-19T02:00: last"]);
    }

    #[test]
    fn a_clock_difference_of_seconds_is_tolerated() {
        let mut two = candidates(&["2026-03-01T02:00", "2026-03-01T02:01"]);
        two.reverse();
        assert_eq!(from_future(&two, now()).len(), 0);
        let mut two = candidates(&["2026-03-01T02:00", "2026-03-01T02:02"]);
        two.reverse();
        assert_eq!(from_future(&two, now()).len(), 1);
    }

    #[test]
    fn an_hour_that_occurs_twice_is_two_periods() {
        let zone = TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap();
        // 01:30, 02:30 and 02:30 again, 03:30.
        let times = [
            "2026-10-24T23:30",
            "2026-10-25T00:30",
            "2026-10-25T01:30",
            "2026-10-25T02:30",
        ];
        let kept = decided_in(&times, &[(Rule::Hourly, 3)], &zone);
        let hours = times[1..].iter().map(|time| format!("{time}: hourly"));
        assert_eq!(kept, hours.collect::<Vec<_>>());
        // A day of 25 hours is one period.
        assert_eq!(decided_in(&times, &[(Rule::Daily, 2)], &zone).len(), 1);
    }

    #[test]
    fn backups_of_another_service_are_kept_and_displace_none() {
        let mut times = candidates(&[
            "2026-11-01T02:00",
            "2026-11-02T02:00<2026-11-01T02:00",
            "2026-11-03T02:00",
        ]);
        times.push(candidate("2026-11-04T02:00"));
        times[1].own = false;
        times[3].own = false;
        let kept = kept(&times, &retention(&[(Rule::Last, 1)]), &TimeZone::UTC, now());
        let brief: Vec<(&str, usize)> = kept.iter().map(|(id, reasons)| (*id, reasons.len())).collect();
        assert_eq!(
            brief,
            [
                ("2026-11-01T02:00", 1),
                ("2026-11-02T02:00", 1),
                ("2026-11-03T02:00", 1),
                ("2026-11-04T02:00", 1)
            ]
        );
        assert!(kept["2026-11-04T02:00"].contains(&Reason::Foreign));
        assert!(kept["2026-11-03T02:00"].contains(&Reason::Rule(Rule::Last)));
        assert!(matches!(kept["2026-11-01T02:00"].first(), Some(Reason::Base(_))));
    }

    #[test]
    fn keep_last_follows_the_order_of_creation_instead_of_the_clock() {
        let times = [
            "2026-11-03T02:00",
            "2026-11-04T02:00",
            "2026-11-01T02:00",
            "2026-11-02T02:00",
        ];
        let kept = decided(&times, &[(Rule::Last, 2)]);
        assert_eq!(kept, ["2026-11-01T02:00: last", "2026-11-02T02:00: last"]);
        assert_eq!(decided(&times, &[(Rule::Last, 9)]).len(), 4);
        assert_eq!(decided(&[], &[(Rule::Last, 9)]), [""; 0]);
    }

    #[test]
    fn the_newest_of_each_day_is_kept_and_empty_days_do_not_count() {
        let times = [
            "2026-11-01T02:00",
            "2026-11-01T14:00",
            "2026-11-05T02:00",
            "2026-11-05T14:00",
            "2026-11-06T02:00",
        ];
        let kept = decided(&times, &[(Rule::Daily, 2)]);
        assert_eq!(kept, ["2026-11-05T14:00: daily", "2026-11-06T02:00: daily"]);
        let kept = decided(&times, &[(Rule::Daily, 3)]);
        assert_eq!(kept[0], "2026-11-01T14:00: daily");
    }

    #[test]
    fn hours_weeks_months_and_years_follow_the_calendar() {
        // 2026-11-01 is a Sunday.
        let times = [
            "2024-12-31T23:59",
            "2025-01-01T00:00",
            "2026-10-31T23:59",
            "2026-11-01T00:00",
            "2026-11-02T00:00",
            "2026-11-02T00:30",
        ];
        let kept = decided(&times, &[(Rule::Weekly, 2)]);
        assert_eq!(kept, ["2026-11-01T00:00: weekly", "2026-11-02T00:30: weekly"]);
        let kept = decided(&times, &[(Rule::Monthly, 3)]);
        assert_eq!(
            kept,
            [
                "2025-01-01T00:00: monthly",
                "2026-10-31T23:59: monthly",
                "2026-11-02T00:30: monthly"
            ]
        );
        let kept = decided(&times, &[(Rule::Yearly, 9)]);
        assert_eq!(
            kept,
            [
                "2024-12-31T23:59: yearly",
                "2025-01-01T00:00: yearly",
                "2026-11-02T00:30: yearly"
            ]
        );
        let kept = decided(&times, &[(Rule::Hourly, 2)]);
        assert_eq!(kept, ["2026-11-01T00:00: hourly", "2026-11-02T00:30: hourly"]);
    }

    #[test]
    fn a_week_continues_across_the_end_of_a_year() {
        // From Monday, 2024-12-30, to Sunday, 2025-01-05.
        let times = [
            "2024-12-29T12:00",
            "2024-12-30T12:00",
            "2025-01-05T12:00",
            "2025-01-06T12:00",
        ];
        let kept = decided(&times, &[(Rule::Weekly, 3)]);
        assert_eq!(
            kept,
            [
                "2024-12-29T12:00: weekly",
                "2025-01-05T12:00: weekly",
                "2025-01-06T12:00: weekly"
            ]
        );
    }

    #[test]
    fn each_rule_counts_by_itself() {
        let times = [
            "2026-09-30T02:00",
            "2026-10-31T02:00",
            "2026-11-22T02:00",
            "2026-11-23T02:00",
        ];
        let kept = decided(&times, &[(Rule::Last, 1), (Rule::Daily, 2), (Rule::Monthly, 2)]);
        assert_eq!(
            kept,
            [
                "2026-10-31T02:00: monthly",
                "2026-11-22T02:00: daily",
                "2026-11-23T02:00: last, daily, monthly",
            ]
        );
    }

    #[test]
    fn a_day_follows_the_time_zone() {
        let zone = TimeZone::fixed(jiff::tz::offset(2));
        let times = ["2026-11-22T21:30", "2026-11-22T22:30", "2026-11-23T21:30"];
        let kept = decided_in(&times, &[(Rule::Daily, 2)], &zone);
        assert_eq!(kept, ["2026-11-22T21:30: daily", "2026-11-23T21:30: daily"]);
        let kept = decided(&times, &[(Rule::Daily, 2)]);
        assert_eq!(kept, ["2026-11-22T22:30: daily", "2026-11-23T21:30: daily"]);
    }

    #[test]
    fn bases_of_kept_backups_are_kept_with_the_reason() {
        let times = [
            "2026-11-01T02:00",
            "2026-11-02T02:00<2026-11-01T02:00",
            "2026-11-03T02:00<2026-11-02T02:00",
            "2026-11-04T02:00<2026-11-01T02:00",
            "2026-11-05T02:00",
        ];
        let kept = decided(&times, &[(Rule::Last, 2)]);
        assert_eq!(
            kept,
            [
                "2026-11-01T02:00: 2026-11-04T02:00 depends on it",
                "2026-11-04T02:00: last",
                "2026-11-05T02:00: last",
            ]
        );
        let kept = decided(&times, &[(Rule::Last, 3)]);
        assert_eq!(kept[1], "2026-11-02T02:00: 2026-11-03T02:00 depends on it");
        assert!(
            kept[0].contains("2026-11-02T02:00 depends on it, 2026-11-04T02:00"),
            "{kept:?}"
        );
        // A backup with two bases, one of them unknown.
        let two = [
            "2026-11-01T02:00",
            "2026-11-02T02:00<2026-11-01T02:00,2020-01-01T00:00",
        ];
        assert_eq!(decided(&two, &[(Rule::Last, 1)]).len(), 2);
    }

    #[test]
    fn a_damaged_backup_displaces_no_good_one_and_is_kept_as_long() {
        let times = [
            "2026-11-01T02:00",
            "2026-11-02T02:00!damaged",
            "2026-11-03T02:00",
            "2026-11-03T14:00!damaged",
        ];
        let kept = decided(&times, &[(Rule::Daily, 2)]);
        assert_eq!(
            kept,
            [
                "2026-11-01T02:00: daily",
                "2026-11-02T02:00: daily",
                "2026-11-03T02:00: daily",
                "2026-11-03T14:00: daily",
            ]
        );
        let kept = decided(&times, &[(Rule::Last, 1)]);
        assert_eq!(kept, ["2026-11-03T02:00: last", "2026-11-03T14:00: last"]);
    }

    #[test]
    fn a_missing_backup_stays_on_record_and_does_not_count() {
        let times = [
            "2026-11-01T02:00",
            "2026-11-02T02:00!missing<2026-11-01T02:00",
            "2026-11-03T02:00",
        ];
        let kept = decided(&times, &[(Rule::Last, 1)]);
        assert_eq!(kept, ["2026-11-02T02:00: missing", "2026-11-03T02:00: last"]);
    }

    #[test]
    fn protected_backups_keep_their_bases_and_young_ones_displace_none() {
        let mut candidates = candidates(&[
            "2026-11-01T02:00",
            "2026-11-02T02:00<2026-11-01T02:00",
            "2026-11-03T02:00",
            "2026-11-04T02:00",
        ]);
        candidates[1].anyway = vec![Reason::Protected];
        candidates[3].anyway = vec![Reason::Young];
        let kept = kept(&candidates, &retention(&[(Rule::Last, 1)]), &TimeZone::UTC, now());
        let kept: Vec<(&str, Vec<Reason>)> = kept
            .into_iter()
            .map(|(id, reasons)| (id, reasons.into_iter().collect()))
            .collect();
        assert_eq!(
            kept,
            [
                ("2026-11-01T02:00", vec![Reason::Base("2026-11-02T02:00".into())]),
                ("2026-11-02T02:00", vec![Reason::Protected]),
                ("2026-11-03T02:00", vec![Reason::Rule(Rule::Last)]),
                ("2026-11-04T02:00", vec![Reason::Rule(Rule::Last), Reason::Young]),
            ]
        );
    }

    #[test]
    fn a_backup_is_young_until_it_reaches_the_minimum_age() {
        let mut rules = retention(&[(Rule::Last, 1)]);
        let time = |text: &str| text.parse::<Timestamp>().unwrap();
        let now = time("2026-11-04T02:00:00Z");
        assert!(!rules.is_young(now, now), "no minimum age is set");
        rules.at_least = Duration::from_secs(86_400);
        assert!(rules.is_young(time("2026-11-03T02:00:01Z"), now));
        assert!(!rules.is_young(time("2026-11-03T02:00:00Z"), now));
        assert!(rules.is_young(time("2038-01-01T00:00:00Z"), now));
        assert!(Retention { last: 0, ..rules }.is_nothing());
    }

    #[test]
    fn one_of_two_backups_of_the_same_time_is_kept() {
        let mut twins = candidates(&["2026-11-01T02:00", "2026-11-01T02:00"]);
        twins[0].id = "a".into();
        twins[1].id = "b".into();
        let kept = kept(&twins, &retention(&[(Rule::Daily, 1)]), &TimeZone::UTC, now());
        assert_eq!(kept.into_keys().collect::<Vec<_>>(), ["b"]);
    }

    #[test]
    fn every_rule_keeps_a_backup() {
        assert!(Retention::default().is_nothing());
        for rule in Rule::ALL {
            let retention = retention(&[(rule, 1)]);
            assert!(!retention.is_nothing() && retention.of(rule) == 1);
            let kept = decided(&["2026-11-01T02:00", "2026-11-01T02:10"], &[(rule, 1)]);
            assert_eq!(kept.len(), 1, "{}", rule.key());
        }
    }

    #[test]
    fn the_rules_hold_over_a_thousand_nights() {
        let first: jiff::civil::Date = "2024-01-01".parse().unwrap();
        let nights: Vec<String> = (0..1000)
            .map(|night| {
                format!(
                    "{}T02:00",
                    first.checked_add(jiff::Span::new().days(night)).unwrap()
                )
            })
            .collect();
        let texts: Vec<&str> = nights.iter().map(String::as_str).collect();
        let rules = [
            (Rule::Last, 3),
            (Rule::Daily, 7),
            (Rule::Weekly, 4),
            (Rule::Monthly, 12),
            (Rule::Yearly, 5),
        ];
        let kept = decided(&texts, &rules);
        let with = |word: &str| kept.iter().filter(|line| line.contains(word)).count();
        assert_eq!(
            (
                with("last"),
                with("daily"),
                with("weekly"),
                with("monthly"),
                with("yearly")
            ),
            (3, 7, 4, 12, 3)
        );
        assert!(kept.len() < 3 + 7 + 4 + 12 + 3);
    }
}
