//! Bugs that are in the nodes on purpose, each behind a failpoint that only builds for tests have, each with the oracle that has to
//! find it. An oracle that has never found anything shows nothing.

use anyhow::{Context, Result};

/// A seeded bug.
#[derive(Debug, PartialEq, Eq)]
pub struct Bug {
    /// As the command line takes it.
    pub name: &'static str,
    /// That has to find it.
    pub oracle: &'static str,
    /// What that has to say, at least: it looks at more than this, and a slow machine is no proof.
    pub says: &'static str,
    /// What the node does wrong.
    pub what: &'static str,
}

impl Bug {
    /// The failpoint that the node asks.
    #[must_use]
    pub fn failpoint(&self) -> String {
        format!("bug::{}", self.name)
    }

    /// The one with this name.
    ///
    /// # Errors
    /// There is none.
    pub fn named(name: &str) -> Result<&'static Self> {
        BUGS.iter().find(|bug| bug.name == name).with_context(|| {
            let known: Vec<&str> = BUGS.iter().map(|bug| bug.name).collect();
            format!("bug `{name}` is none of: {}", known.join(" "))
        })
    }

    /// Those with these names, or all if there are no names.
    ///
    /// # Errors
    /// A name that no bug has.
    pub fn chosen(names: &[String]) -> Result<Vec<&'static Self>> {
        if names.is_empty() {
            return Ok(BUGS.iter().collect());
        }
        names.iter().map(|name| Self::named(name)).collect()
    }
}

/// All of them.
pub static BUGS: [Bug; 15] = [
    Bug {
        name: "skip_vote_flush",
        oracle: "durability",
        says: "it may vote in a term once more",
        what: "a vote is answered before it is on the disk",
    },
    Bug {
        name: "skip_sync_data",
        oracle: "durability",
        says: "and its revocation was acknowledged",
        what: "entries of the log are acknowledged before they are on the disk",
    },
    Bug {
        name: "ignore_control_file",
        oracle: "durability",
        says: "whose rotation was acknowledged",
        what: "a log that ends before what was promised is taken for whole",
    },
    Bug {
        name: "keep_restarted_leaders_term",
        oracle: "durability",
        says: "nobody has elected it since",
        what: "a leader that was killed leads on in its term",
    },
    Bug {
        name: "no_deduplication",
        oracle: "register",
        says: "the request with the Idempotency-Key",
        what: "a request that is sent again is carried out again",
    },
    Bug {
        name: "reads_without_read_index",
        oracle: "register",
        says: "is not linearizable",
        what: "a node answers from its own state without asking whether it is the newest",
    },
    Bug {
        name: "reuse_node_id",
        oracle: "members",
        says: "raft id",
        what: "a node that is added gets the number of one that was removed",
    },
    Bug {
        name: "activate_before_import",
        oracle: "keys_held",
        says: "was activated although",
        what: "a version is activated before any node has imported its key",
    },
    Bug {
        name: "activate_on_majority",
        oracle: "keys_held",
        says: "was activated although",
        what: "a version is activated once a majority holds its key",
    },
    Bug {
        name: "ready_before_gate",
        oracle: "revocation",
        says: "encrypted for chaos-gone",
        what: "a node that comes back answers before it has applied what it missed",
    },
    Bug {
        name: "drop_tombstones",
        oracle: "versions",
        says: "are no unbroken row",
        what: "the row of a destroyed version goes, and its number with it",
    },
    Bug {
        name: "forget_session_copies",
        oracle: "ciphertexts",
        says: "was decrypted",
        what: "a destroyed key goes from the token and stays in the sessions",
    },
    Bug {
        name: "heartbeats_stay_off",
        oracle: "throughput",
        says: "although nothing was broken",
        what: "a leader that hands over, or tries to, sends no heartbeats when it leads again",
    },
    Bug {
        name: "end_when_deposed",
        oracle: "ends",
        says: "ended by itself: node",
        what: "a leader that hears of another one ends, and is back with the next start",
    },
    Bug {
        name: "go_away_without_tombstone",
        oracle: "readiness",
        says: "node 6 ended with exit status: 70",
        what: "a member that lags behind tells a node that it does not know yet that it was removed",
    },
];

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    #[test]
    fn a_bug_is_chosen_by_its_name() {
        assert_eq!(Bug::chosen(&[]).unwrap().len(), BUGS.len());
        for bug in &BUGS {
            assert_eq!(Bug::chosen(&[bug.name.to_owned()]).unwrap(), [bug]);
        }
        assert!(Bug::named("no_such_bug").is_err());
    }

    /// A name that the product does not ask for would be a bug that nobody can find.
    #[test]
    fn every_bug_is_asked_for_in_the_product_and_every_one_there_is_known() {
        let mut asked = BTreeSet::new();
        for part in ["hsm-core", "node", "raft-store"] {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("..")
                .join(part)
                .join("src");
            collect(&folder, &mut asked);
        }
        let known: BTreeSet<String> = BUGS.iter().map(Bug::failpoint).collect();
        assert_eq!(asked, known);
    }

    fn collect(folder: &Path, asked: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, asked);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                let points = text
                    .split("bug(\"")
                    .skip(1)
                    .filter_map(|rest| rest.split('"').next());
                asked.extend(points.map(str::to_owned));
            }
        }
    }
}
