//! A history as it is read: changes are kept one by one, requests of the data plane only as what the oracles have to know of
//! them, decided line by line. Lines are in the order in which they were sent, so whatever is known of a change is known before
//! anything that was asked after it.

mod data;
mod few;
mod floors;
mod made;
mod refused;
mod uses;
mod watched;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use anyhow::{Context, Result, bail};
use hsm_api::admin::KeyState;

pub use self::few::{Few, Moment, Moments};
use self::floors::Floors;
pub(crate) use self::made::Made;
use self::uses::Uses;
use self::watched::Watched;
pub use self::watched::{Findings, TermSeen};
use super::event::{Answer, Line, Operation, Outcome};
use crate::random::Random;

/// Ciphertexts that are kept of each version.
const KEPT: usize = 50;
const SECOND: u64 = 1_000_000_000;
/// Within a second a revocation is in force on every node that is reached; two more are for a busy machine and a slow disk.
const PROMPT: u64 = 3 * SECOND;

/// A change, or a look at the state, and what came of it. Times are nanoseconds since the run began.
#[derive(Debug, Clone)]
pub struct Done {
    /// By whom.
    pub process: u32,
    /// What was asked.
    pub operation: Operation,
    /// What came of it.
    pub outcome: Outcome,
    /// Before anything was sent.
    pub invoked: u64,
    /// After its outcome was known; none while that may still be ahead.
    pub completed: Option<u64>,
    /// `X-HSM-Index` of the answer: of a change, one from which on every state has it.
    pub index: Option<u64>,
}

/// A ciphertext that was handed out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// Number of its plaintext.
    pub number: u64,
    /// In base64.
    pub ciphertext: String,
}

/// Refusals to decrypt ciphertexts of one version with one code.
#[derive(Debug, Clone, Default)]
pub struct Refusals {
    /// How many.
    pub count: u64,
    /// When the first one was known.
    pub first_at: u64,
    /// By whom.
    pub first_node: u32,
}

/// What clients had of one key version.
#[derive(Debug, Clone, Default)]
pub struct Version {
    /// Ciphertexts that were handed out.
    pub total: u64,
    /// Some of them, drawn evenly from all.
    pub kept: Vec<Kept>,
    /// Right answers to `decrypt`.
    pub opened: u64,
    /// Plaintexts that were never encrypted: where they came from.
    pub wrong: Few<String>,
    /// When, and by which node, a ciphertext was opened that was asked for last.
    pub last_opened: Option<(u64, u32)>,
    /// Refusals by their codes.
    pub refused: BTreeMap<String, Refusals>,
}

/// Somebody was let in after his revocation was acknowledged.
#[derive(Debug, Clone)]
pub struct LateAsk {
    /// Who.
    pub cn: String,
    /// By which node.
    pub node: u32,
    /// From the acknowledgement until he asked.
    pub after_ns: u64,
    /// The answer was made from a state that has the revocation, by what it says itself.
    pub knew: bool,
    /// The node said that it is out of readiness.
    pub stale: bool,
}

/// How operations ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Done.
    pub ok: u64,
    /// Certainly not done.
    pub refused: u64,
    /// Either.
    pub unknown: u64,
}

/// A history, read. See the module.
#[derive(Debug, Default)]
pub struct History {
    /// See [`super::Recorder::marker`].
    pub marker: String,
    /// In the order in which they were asked for.
    pub changes: Vec<Done>,
    /// By context and number.
    pub versions: BTreeMap<(String, u32), Version>,
    /// Requests that somebody asked whose certificate is revoked now and then, and got.
    pub asked: u64,
    /// Refusals because of the certificate.
    pub turned_away: u64,
    /// Of each node, by whether it knew and whether it called itself stale, the one that was longest after the revocation; the
    /// others say no more.
    pub late: BTreeMap<(u32, bool, bool), LateAsk>,
    /// Somebody was let in longer after his revocation than a node that is reached may take, by one that did not call itself stale;
    /// of each node one in a second at most.
    pub lingering: Moments,
    /// Refusals with `internal`, of each node one in a second at most.
    pub internal: Moments,
    /// Refusals because of certificates that nobody had wanted to revoke.
    pub turned_away_early: Few<String>,
    /// Encryptions under a version that was replaced in the state that they were made from.
    pub behind: Few<String>,
    /// Refusals to encrypt that are no matter of the moment, such as `access_denied`.
    pub refused_to_encrypt: Few<String>,
    /// Decryptions under a version that was out of use in the state that they were made from.
    pub revived: Few<String>,
    /// What was noted, with its time.
    pub notes: Vec<(u64, String)>,
    /// Ciphertexts that were handed out, in each second of the run.
    pub encrypted_in: Vec<u32>,
    /// Those that were decrypted to what they were made of, in each second.
    pub decrypted_in: Vec<u32>,
    /// What the watch saw.
    pub watched: Findings,
    /// Whenever a node had another process, term or part than before, in order.
    pub terms: Vec<TermSeen>,
    /// How everything ended.
    pub counts: Counts,
    /// The time of the last line.
    pub ended: u64,
}

impl History {
    /// Reads one. The last line may be cut off: whoever wrote it may have been killed.
    ///
    /// # Errors
    /// A file that cannot be read, and another line that is none.
    pub fn read(file: &Path) -> Result<Self> {
        let input = File::open(file).with_context(|| file.display().to_string())?;
        let mut lines = BufReader::new(input).lines().enumerate().peekable();
        let mut fold = Fold::default();
        while let Some((number, line)) = lines.next() {
            let line = line.with_context(|| file.display().to_string())?;
            match serde_json::from_str(&line) {
                Ok(line) => fold.line(line),
                Err(_) if lines.peek().is_none() => break,
                Err(error) => bail!("{}: line {}: {error}", file.display(), number + 1),
            }
        }
        Ok(fold.finish())
    }

    /// Operations whose outcome is known.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.counts.ok + self.counts.refused
    }

    /// Ciphertexts that were handed out.
    #[must_use]
    pub fn encryptions(&self) -> u64 {
        self.versions.values().map(|version| version.total).sum()
    }
}

struct Begun {
    at: u64,
    process: u32,
    operation: Operation,
}

/// An answer with what its headers say.
struct Answered<'a> {
    invoked: u64,
    completed: u64,
    index: Option<u64>,
    stale: bool,
    outcome: &'a Outcome,
}

struct Fold {
    history: History,
    random: Random,
    /// Operations that are not over.
    open: HashMap<u64, Begun>,
    changes: BTreeMap<u64, Done>,
    /// Common name → when its revocation was acknowledged, and the index.
    revoked: BTreeMap<String, (u64, Option<u64>)>,
    /// Common names that somebody has wanted to revoke.
    named: BTreeSet<String>,
    /// By context.
    floors: BTreeMap<String, Floors>,
    /// Versions that are out of use → the index.
    unused: BTreeMap<(String, u32), u64>,
    uses: Uses,
    made: Made,
    /// When a node has last refused with `internal`.
    internal: BTreeMap<u32, u64>,
    /// When a node has last let somebody in for too long.
    lingered: BTreeMap<u32, u64>,
    /// When versions were seen destroyed.
    destroyed: BTreeMap<(String, u32), u64>,
    watched: Watched,
}

impl Default for Fold {
    fn default() -> Self {
        Self {
            history: History::default(),
            // The same file has the same samples, whenever it is read.
            random: Random::new(1),
            open: HashMap::new(),
            changes: BTreeMap::new(),
            revoked: BTreeMap::new(),
            named: BTreeSet::new(),
            floors: BTreeMap::new(),
            unused: BTreeMap::new(),
            uses: Uses::default(),
            made: Made::default(),
            internal: BTreeMap::new(),
            lingered: BTreeMap::new(),
            destroyed: BTreeMap::new(),
            watched: Watched::default(),
        }
    }
}

impl Fold {
    fn line(&mut self, line: Line) {
        match line {
            Line::Begun { marker } => self.history.marker = marker,
            Line::Noted { at, what } => {
                self.ended(at);
                self.history.notes.push((at, what));
            }
            Line::Sampled { at, mut sample } => {
                self.ended(at);
                let older = sample.older.as_ref();
                let key = older.map(|older| (older.context.clone(), older.version));
                // Nobody has to hold what may be out of use.
                if key.is_some_and(|key| self.uses.was_unwanted(&key)) {
                    sample.older = None;
                }
                self.watched.sample(at, &sample);
            }
            Line::Invoked {
                at,
                id,
                process,
                operation,
            } => {
                self.ended(at);
                self.begins(&operation);
                let begun = Begun {
                    at,
                    process,
                    operation,
                };
                self.open.insert(id, begun);
            }
            Line::Completed {
                at,
                id,
                index,
                stale,
                outcome,
            } => {
                self.ended(at);
                let Some(begun) = self.open.remove(&id) else {
                    return;
                };
                self.count(&outcome);
                self.made.ends(&begun.operation, at, &outcome);
                let answered = Answered {
                    invoked: begun.at,
                    completed: at,
                    index,
                    stale,
                    outcome: &outcome,
                };
                match &begun.operation {
                    Operation::Encrypt {
                        context,
                        number,
                        node,
                    } => {
                        self.encrypted(context, *number, &answered);
                        if let Outcome::Refused { code } = &outcome {
                            self.refused_to_encrypt(context, *number, *node, code, &answered);
                        }
                    }
                    Operation::Decrypt {
                        context,
                        version,
                        number,
                        node,
                    } => self.decrypted((context, *version), *number, *node, &answered),
                    Operation::Ask { cn, node } => self.asked(cn, *node, &answered),
                    changed => {
                        self.changed(changed, &answered);
                        let when = (answered.invoked, answered.completed);
                        self.uses.ends(changed, when, &outcome);
                        self.keep(id, begun, at, index, outcome);
                    }
                }
            }
        }
    }

    fn ended(&mut self, at: u64) {
        self.history.ended = self.history.ended.max(at);
    }

    fn count(&mut self, outcome: &Outcome) {
        let counts = &mut self.history.counts;
        match outcome {
            Outcome::Ok(_) => counts.ok += 1,
            Outcome::Refused { .. } => counts.refused += 1,
            Outcome::Unknown { .. } => counts.unknown += 1,
        }
    }

    fn keep(&mut self, id: u64, begun: Begun, at: u64, index: Option<u64>, outcome: Outcome) {
        let known = !matches!(outcome, Outcome::Unknown { .. });
        let done = Done {
            process: begun.process,
            operation: begun.operation,
            outcome,
            invoked: begun.at,
            completed: known.then_some(at),
            index,
        };
        self.changes.insert(id, done);
    }

    /// What an operation may bring about from now on.
    fn begins(&mut self, operation: &Operation) {
        self.uses.begins(operation);
        match operation {
            Operation::Revoke { cn } => {
                self.named.insert(cn.clone());
            }
            Operation::Unrevoke { cn } => {
                self.revoked.remove(cn);
            }
            Operation::Use {
                context,
                version,
                enable: true,
                ..
            }
            | Operation::Undo { context, version, .. } => {
                self.unused.remove(&(context.clone(), *version));
            }
            _ => {}
        }
    }

    /// What an operation has brought about.
    fn changed(&mut self, operation: &Operation, answered: &Answered<'_>) {
        let Outcome::Ok(answer) = answered.outcome else {
            return;
        };
        match (operation, answer) {
            (Operation::Revoke { cn }, _) => {
                let acknowledged = (answered.completed, answered.index);
                self.revoked.entry(cn.clone()).or_insert(acknowledged);
            }
            (
                Operation::Rotate { context, .. } | Operation::Create { context, .. },
                Answer::Rotated { version, .. },
            ) => {
                if let Some(index) = answered.index {
                    let floors = self.floors.entry(context.clone()).or_default();
                    floors.push(index, *version);
                }
            }
            // A late repeat is answered with what the version is now.
            (
                Operation::Use {
                    context,
                    version,
                    enable: false,
                    ..
                }
                | Operation::Destroy { context, version, .. },
                Answer::State {
                    state: KeyState::Disabled | KeyState::DestroyScheduled,
                },
            ) => {
                if let Some(index) = answered.index.filter(|_| !self.uses.may_end(operation)) {
                    self.unused.insert((context.clone(), *version), index);
                }
            }
            (
                Operation::Show { context, version, .. } | Operation::Destroy { context, version, .. },
                Answer::State {
                    state: KeyState::Destroyed,
                },
            ) => {
                let key = (context.clone(), *version);
                self.destroyed.entry(key).or_insert(answered.completed);
            }
            _ => {}
        }
    }

    fn finish(mut self) -> History {
        // Whatever is not over may be done yet.
        for (id, begun) in std::mem::take(&mut self.open) {
            if !begun.operation.is_data() {
                let why = "the run ended before".to_owned();
                let at = begun.at;
                self.keep(id, begun, at, None, Outcome::Unknown { why });
            }
            self.history.counts.unknown += 1;
        }
        self.history.changes = self.changes.into_values().collect();
        let mut watched = self.watched.into_findings();
        self.history.terms = std::mem::take(&mut watched.terms);
        self.history.watched = watched;
        self.history
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
#[path = "fold_tests.rs"]
mod tests;
