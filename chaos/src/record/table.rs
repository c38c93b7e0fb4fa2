//! The sums over recorded runs, as a table for a document.

use std::collections::{BTreeMap, BTreeSet};

use super::{Entry, lines};
use crate::failover::FailOvers;
use crate::network::NetworkKind;
use crate::schedule::FaultKind;

/// Kinds of faults in a run that counts as composed of them.
const COMPOSED: usize = 10;

/// The sums as a table.
#[must_use]
pub fn table(entries: &[Entry]) -> String {
    let count = |kind: FaultKind| -> u64 {
        let counts = entries.iter().filter_map(|entry| entry.faults.get(&kind));
        counts.map(|count| u64::from(*count)).sum()
    };
    let sum = |of: fn(&Entry) -> u64| entries.iter().map(of).sum::<u64>();
    let (alone, beside): (Vec<&Entry>, Vec<&Entry>) = entries.iter().partition(|entry| kills_alone(entry));
    let (alone, beside) = (failovers(&alone), failovers(&beside));
    let commits: BTreeSet<&str> = entries.iter().map(|entry| entry.commit.as_str()).collect();
    let mut out = String::from("| what | in all recorded runs |\n|---|---|\n");
    let mut row = |what: &str, figure: String| out.push_str(&format!("| {what} | {figure} |\n"));
    row(
        "runs, each a history that every oracle has checked",
        thousands(entries.len() as u64),
    );
    row(
        "of these, with each node in a network namespace of its own",
        in_namespaces(entries),
    );
    row("minutes under faults", thousands(sum(|entry| entry.seconds) / 60));
    let composed = |whole: bool| -> u64 {
        let fits = |entry: &&Entry| is_composed(entry) && (!whole || is_whole(entry));
        entries
            .iter()
            .filter(fits)
            .map(|entry| entry.seconds)
            .sum::<u64>()
            / 60
    };
    row(
        "of these, in runs in which ten kinds of faults or more have had their effect",
        of_which_whole(composed(false), composed(true)),
    );
    let whole = entries.iter().filter(|entry| is_whole(entry));
    let kills = whole.filter_map(|entry| entry.faults.get(&FaultKind::KillLeader));
    row(
        "leaders killed, each counted only once another node had committed in a higher term",
        of_which_whole(
            count(FaultKind::KillLeader),
            kills.map(|count| u64::from(*count)).sum(),
        ),
    );
    row(
        "from the last change acknowledged before such a kill to the first one asked for after it and acknowledged, in runs of kills \
         alone",
        waited(&alone),
    );
    row(
        "the same in all other runs, in which lines, disks, clocks or tokens are bad besides",
        waited(&beside),
    );
    row(
        "encryptions and decryptions meanwhile on the nodes that were not killed, and how many of them failed, in runs of kills alone",
        format!("{}, {}", thousands(alone.asked), thousands(alone.failed)),
    );
    row(
        "the same in all other runs",
        format!("{}, {}", thousands(beside.asked), thousands(beside.failed)),
    );
    row("whole clusters killed", thousands(count(FaultKind::KillAll)));
    row(
        "partitions with the leader in the minority",
        thousands(count(FaultKind::LeaderInMinority)),
    );
    row(
        "partitions with the leader in the majority",
        thousands(count(FaultKind::LeaderInMajority)),
    );
    let named = [
        FaultKind::KillLeader,
        FaultKind::KillAll,
        FaultKind::LeaderInMinority,
        FaultKind::LeaderInMajority,
    ];
    let others: Vec<String> = FaultKind::ALL
        .iter()
        .filter(|kind| !named.contains(kind))
        .map(|kind| {
            let told = format!("{kind} {}", thousands(count(*kind)));
            if *kind == FaultKind::DiskFull {
                told + &at_least_to_the_last_byte(entries)
            } else {
                told
            }
        })
        .collect();
    row("other faults that had their effect", others.join(", "));
    row("nodes that died at each failpoint", at_points(entries));
    row(
        "planned, and left out because the time was over or the run was told to stop",
        format!(
            "{} of {}",
            thousands(sum(|entry| u64::from(entry.left_out))),
            thousands(sum(|entry| u64::from(entry.planned)))
        ),
    );
    row(
        "operations with a known outcome",
        thousands(sum(|entry| entry.operations)),
    );
    row(
        "**acknowledged and lost, answered wrongly, or another promise broken**",
        format!("**{}**", thousands(sum(|entry| entry.violations))),
    );
    row(
        "commits; seed and duration of each run are in the file",
        or_none(&commits),
    );
    out
}

/// Lines of before say nothing of it.
fn in_namespaces(entries: &[Entry]) -> String {
    let count = |wanted: Option<NetworkKind>| {
        let fits = entries.iter().filter(|entry| entry.network == wanted);
        fits.count() as u64
    };
    let namespaces = thousands(count(Some(NetworkKind::Namespaces)));
    match count(None) {
        0 => namespaces,
        unsaid => format!("{namespaces}; {} do not say it", thousands(unsaid)),
    }
}

/// Lines of before say nothing of it, and count as none.
fn at_least_to_the_last_byte(entries: &[Entry]) -> String {
    let met: u64 = entries
        .iter()
        .map(|entry| u64::from(entry.to_the_last_byte))
        .sum();
    match met {
        0 => String::new(),
        met => format!(" (at least {} of them to the last byte)", thousands(met)),
    }
}

/// Kills alone, however many, are not faults of every kind at once.
fn is_composed(entry: &Entry) -> bool {
    entry.faults.len() >= COMPOSED
}

/// Whether all that was planned was carried out: neither was the time over before, nor was the run told to stop.
fn is_whole(entry: &Entry) -> bool {
    entry.left_out == 0
}

/// How much there was, and how much of it in runs that have carried out all that they had planned.
fn of_which_whole(all: u64, whole: u64) -> String {
    match all - whole {
        0 => thousands(all),
        _ => format!(
            "{}; {} in runs that have carried out their whole plan",
            thousands(all),
            thousands(whole)
        ),
    }
}

/// Nothing but nodes that are killed: how long that takes is not mixed with what a slow disk or a bad line adds to it.
fn kills_alone(entry: &Entry) -> bool {
    let mut kinds = entry.asked.iter().chain(entry.faults.keys());
    kinds.all(|kind| kind.is_kill())
}

fn failovers(entries: &[&Entry]) -> FailOvers {
    let mut all = FailOvers::default();
    entries.iter().for_each(|entry| all.add(&entry.failovers));
    all
}

/// Once somebody has died at one, those at which nobody has are told too.
fn at_points(entries: &[Entry]) -> String {
    if entries.iter().all(|entry| entry.points.is_empty()) {
        return "none".to_owned();
    }
    let mut all: BTreeMap<&str, u64> = lines().into_iter().map(|name| (name, 0)).collect();
    for (name, count) in entries.iter().flat_map(|entry| &entry.points) {
        *all.entry(name).or_default() += u64::from(*count);
    }
    let told: Vec<String> = all
        .iter()
        .map(|(name, count)| format!("`{name}` {}", thousands(*count)))
        .collect();
    told.join(", ")
}

fn waited(failovers: &FailOvers) -> String {
    let unended = match failovers.unended {
        0 => String::new(),
        more => format!(", and {} without an end", thousands(more)),
    };
    let seconds = |percent| {
        let ms = failovers.percentile(percent)?;
        Some(format!("{:.2} s", ms as f64 / 1000.0))
    };
    match (seconds(50), seconds(99), seconds(100)) {
        (Some(half), Some(nearly_all), Some(all)) => {
            format!(
                "p50 {half}, p99 {nearly_all}, at most {all}, of {}{unended}",
                thousands(failovers.ms.len() as u64)
            )
        }
        _ => format!("none measured{unended}"),
    }
}

fn or_none(commits: &BTreeSet<&str>) -> String {
    if commits.is_empty() {
        return "none".to_owned();
    }
    let commits: Vec<&str> = commits.iter().copied().collect();
    commits.join(", ")
}

/// `12,345`.
fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    fn measured(ms: &[u64]) -> FailOvers {
        serde_json::from_value(serde_json::json!({"ms": ms, "asked": 1_000, "failed": 1})).unwrap()
    }

    fn entry(kinds: &[FaultKind]) -> Entry {
        Entry {
            seed: 1,
            commit: "abcdef0".to_owned(),
            nodes: 3,
            network: None,
            seconds: 600,
            asked: kinds.iter().copied().collect(),
            planned: 9,
            left_out: 0,
            early: None,
            faults: kinds.iter().map(|kind| (*kind, 1)).collect(),
            points: BTreeMap::new(),
            to_the_last_byte: 0,
            failovers: FailOvers::default(),
            operations: 1,
            violations: 0,
        }
    }

    #[test]
    fn minutes_are_of_composed_faults_where_many_kinds_came() {
        let few = entry(&FaultKind::ALL[..COMPOSED - 1]);
        let mut many = entry(&FaultKind::ALL[..COMPOSED]);
        many.seconds = 1_200;
        let table = table(&[few, many]);
        assert!(table.contains("minutes under faults | 30 |"), "{table}");
        assert!(table.contains("have had their effect | 20 |"), "{table}");
        assert!(table.contains("| none measured |"), "{table}");
    }

    #[test]
    fn what_comes_of_runs_that_left_something_out_is_told_apart() {
        let whole = entry(&FaultKind::ALL[..COMPOSED]);
        let mut broken_off = whole.clone();
        (broken_off.left_out, broken_off.seconds) = (3, 1_200);
        let both = table(&[whole.clone(), broken_off]);
        for said in [
            "have had their effect | 30; 10 in runs that have carried out their whole plan |",
            "in a higher term | 2; 1 in runs that have carried out their whole plan |",
        ] {
            assert!(both.contains(said), "{said}: {both}");
        }
        let table = table(&[whole]);
        assert!(table.contains("have had their effect | 10 |"), "{table}");
    }

    #[test]
    fn a_line_that_does_not_say_its_network_counts_as_not_said() {
        let unsaid = entry(&[FaultKind::OneWay]);
        let text = serde_json::to_string(&unsaid).unwrap();
        assert!(!text.contains("network"), "{text}");
        assert_eq!(serde_json::from_str::<Entry>(&text).unwrap(), unsaid);
        let said = |network| Entry {
            network: Some(network),
            ..unsaid.clone()
        };
        let (namespaces, loopback) = (said(NetworkKind::Namespaces), said(NetworkKind::Loopback));
        let text = serde_json::to_string(&namespaces).unwrap();
        assert!(text.contains(r#""network":"namespaces""#), "{text}");
        assert_eq!(serde_json::from_str::<Entry>(&text).unwrap(), namespaces);
        let table = table(&[unsaid, namespaces, loopback]);
        assert!(
            table.contains("namespace of its own | 1; 1 do not say it |"),
            "{table}"
        );
    }

    #[test]
    fn fail_overs_of_kills_alone_are_told_apart() {
        let mut alone = entry(&[FaultKind::KillLeader, FaultKind::KillAll]);
        alone.failovers = measured(&[2_000]);
        let mut beside = entry(&[FaultKind::KillLeader]);
        // It was asked for, and made lines bad, whether it counts or not.
        beside.asked.insert(FaultKind::Delay);
        beside.failovers = measured(&[9_000, 9_000]);
        beside.failovers.unended = 3;
        let table = table(&[alone, beside]);
        for said in [
            "in runs of kills alone | p50 2.00 s, p99 2.00 s, at most 2.00 s, of 1 |",
            "bad besides | p50 9.00 s, p99 9.00 s, at most 9.00 s, of 2, and 3 without an end |",
            "failed, in runs of kills alone | 1,000, 1 |",
        ] {
            assert!(table.contains(said), "{said}: {table}");
        }
    }

    #[test]
    fn once_somebody_has_died_at_a_failpoint_all_of_them_are_told() {
        let mut died = entry(&[FaultKind::Failpoint]);
        assert_eq!(at_points(std::slice::from_ref(&died)), "none");
        died.points = BTreeMap::from([("store::after_vote".to_owned(), 2)]);
        let table = table(&[died.clone(), died]);
        for said in [
            "`store::after_vote` 4",
            "`store::after_purge` 0",
            "`membership::after_change` 0",
        ] {
            assert!(table.contains(said), "{said}: {table}");
        }
    }

    #[test]
    fn of_full_disks_those_to_the_last_byte_are_told() {
        let mut full = entry(&[FaultKind::DiskFull]);
        let reserve = table(std::slice::from_ref(&full));
        assert!(reserve.contains("disk-full 1, "), "{reserve}");
        full.to_the_last_byte = 1;
        let both = table(&[full.clone(), full]);
        assert!(
            both.contains("disk-full 2 (at least 2 of them to the last byte), "),
            "{both}"
        );
    }

    #[test]
    fn thousands_are_set_apart() {
        assert_eq!(
            [0, 999, 1000, 1_234_567].map(thousands),
            ["0", "999", "1,000", "1,234,567"]
        );
    }
}
