//! What a run is asked for, and how the command line says it.

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::bugs::Bug;
use crate::schedule::{FaultKind, PAUSE_MS};

/// Where the nodes of the cluster find each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetworkChoice {
    /// In namespaces where that is permitted, else over relays.
    #[default]
    Auto,
    /// Each in a network namespace of its own, with an address of its own on a bridge.
    Namespaces,
    /// On the loopback interface, with a relay on every way between two of them.
    Loopback,
}

/// What a run is asked for.
#[derive(Debug, Clone)]
pub struct Options {
    /// Of the schedule of faults and of the workload.
    pub seed: u64,
    /// How long faults go on.
    pub minutes: f64,
    /// Of the cluster.
    pub nodes: u32,
    /// Each of them has to happen.
    pub faults: BTreeSet<FaultKind>,
    /// The longest pause between two faults, in milliseconds; the shortest is a quarter of it.
    pub pause_ms: u32,
    /// Asked for; the cluster says what it has become.
    pub network: NetworkChoice,
    /// Built into the nodes on purpose.
    pub bug: Option<&'static Bug>,
    /// Changes the configuration of every node before the cluster is formed.
    pub config: Option<fn(&str) -> String>,
    /// The run's folder: all that it writes, its cluster too.
    pub dir: PathBuf,
}

impl Options {
    /// `HSM_FAILPOINTS` of every node.
    #[must_use]
    pub fn failpoints(&self) -> Option<String> {
        self.bug.map(|bug| format!("{}=return", bug.failpoint()))
    }

    /// The command that does the same again, but for the folder.
    #[must_use]
    pub fn command(&self) -> String {
        let network = match self.network {
            NetworkChoice::Auto => "auto",
            NetworkChoice::Namespaces => "namespaces",
            NetworkChoice::Loopback => "loopback",
        };
        let pause = (self.pause_ms != PAUSE_MS).then(|| format!(" --pause-ms {}", self.pause_ms));
        let bug = self.bug.map(|bug| format!(" --bug {}", bug.name));
        format!(
            "chaos run --seed {} --minutes {} --nodes {} --network {network} --faults {}{}{}",
            self.seed,
            self.minutes,
            self.nodes,
            names(&self.faults),
            pause.unwrap_or_default(),
            bug.unwrap_or_default()
        )
    }

    /// As a run's folder keeps them.
    #[must_use]
    pub fn asked(&self) -> Asked {
        Asked {
            seed: self.seed,
            minutes: self.minutes,
            nodes: self.nodes,
            faults: self.faults.clone(),
            pause_ms: self.pause_ms,
            network: self.network,
            bug: self.bug.map(|bug| bug.name.to_owned()),
        }
    }
}

/// [`Options`] in the folder of a run, `options.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Asked {
    pub seed: u64,
    pub minutes: f64,
    pub nodes: u32,
    pub faults: BTreeSet<FaultKind>,
    #[serde(default = "usual_pause")]
    pub pause_ms: u32,
    pub network: NetworkChoice,
    pub bug: Option<String>,
}

/// Of runs that could not be asked for another one.
fn usual_pause() -> u32 {
    PAUSE_MS
}

impl Asked {
    /// The same for another folder.
    ///
    /// # Errors
    /// A bug that is not in the table of this version.
    pub fn into_options(self, dir: PathBuf) -> Result<Options> {
        Ok(Options {
            seed: self.seed,
            minutes: self.minutes,
            nodes: self.nodes,
            faults: self.faults,
            pause_ms: self.pause_ms,
            network: self.network,
            bug: self.bug.as_deref().map(Bug::named).transpose()?,
            config: None,
            dir,
        })
    }
}

/// Faults by their names, with commas between; `all` is every kind, `-NAME` after it leaves one out.
///
/// # Errors
/// A name that no kind has, and a list that leaves nothing.
pub fn faults(list: &str) -> Result<BTreeSet<FaultKind>> {
    let mut chosen = BTreeSet::new();
    for word in list.split(',').map(str::trim).filter(|word| !word.is_empty()) {
        if word == "all" {
            chosen.extend(FaultKind::ALL.iter().copied());
        } else if let Some(name) = word.strip_prefix('-') {
            chosen.remove(&kind(name)?);
        } else {
            chosen.insert(kind(word)?);
        }
    }
    ensure!(
        !chosen.is_empty(),
        "faults: `{list}` names none: nothing would be tried"
    );
    Ok(chosen)
}

fn kind(name: &str) -> Result<FaultKind> {
    let mut kinds = FaultKind::ALL.iter().copied();
    kinds.find(|kind| kind.name() == name).with_context(|| {
        let known: Vec<&str> = FaultKind::ALL.iter().map(|kind| kind.name()).collect();
        format!("faults: `{name}` is none of: all {}", known.join(" "))
    })
}

/// As the command line takes them.
#[must_use]
pub fn names(faults: &BTreeSet<FaultKind>) -> String {
    if faults.len() == FaultKind::ALL.len() {
        return "all".to_owned();
    }
    let names: Vec<&str> = faults.iter().map(|kind| kind.name()).collect();
    names.join(",")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::faults::failpoint::points;
    use crate::schedule::{Fault, Meanwhile, plan};

    #[test]
    fn a_list_of_faults_is_read_as_it_is_written() {
        let all = faults("all").unwrap();
        assert_eq!(all.len(), FaultKind::ALL.len());
        assert_eq!(names(&all), "all");
        for kind in FaultKind::ALL {
            let one = faults(kind.name()).unwrap();
            assert_eq!(one, BTreeSet::from([*kind]));
            let others = faults(&format!("all,-{}", kind.name())).unwrap();
            assert_eq!(others.len(), all.len() - 1);
            assert!(!others.contains(kind));
            assert_eq!(faults(&names(&others)).unwrap(), others);
        }
        for wrong in [
            "",
            ",",
            "kill-everybody",
            "all,-nothing",
            "kill-leader,-kill-leader",
        ] {
            assert!(faults(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_command_to_reproduce_a_run_and_its_folder_say_the_same() {
        let options = Options {
            seed: 7,
            minutes: 0.5,
            nodes: 5,
            faults: faults("kill-leader,pause").unwrap(),
            pause_ms: 250,
            network: NetworkChoice::Loopback,
            bug: Some(&crate::bugs::BUGS[0]),
            config: None,
            dir: PathBuf::from("somewhere"),
        };
        let command = options.command();
        assert!(
            command.starts_with("chaos run --seed 7 --minutes 0.5 --nodes 5 --network loopback --faults "),
            "{command}"
        );
        assert!(command.contains(" --pause-ms 250 --bug "), "{command}");
        let kept = serde_json::to_string(&options.asked()).unwrap();
        let read: Asked = serde_json::from_str(&kept).unwrap();
        let again = read.into_options(PathBuf::from("elsewhere")).unwrap();
        assert_eq!(again.command(), command);
        assert_eq!(again.failpoints(), options.failpoints());
    }
    /// Its comment says what the seed makes of these faults; with another list it would make something else.
    #[test]
    fn the_run_of_ci_is_what_it_is_said_to_be() {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/test.sh");
        let script = std::fs::read_to_string(script).unwrap();
        let value = |name: &str| {
            let mut lines = script.lines();
            let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
            value.unwrap_or_else(|| panic!("no {name}"))
        };
        let kinds = faults(value("chaos_faults")).unwrap();
        let plan = plan(value("chaos_seed").parse().unwrap(), 1.0, &kinds, 3);
        assert_eq!(plan.steps.len(), kinds.len(), "each of them once");
        let mut seen = 0;
        for step in &plan.steps {
            let is_so = match &step.fault {
                Fault::Pause { leader, tenths, .. } => *leader && *tenths > 24,
                Fault::LostWrites { all, .. } => *all,
                Fault::TornTail { on_stopped, .. } => !on_stopped,
                Fault::JoinRemove {
                    meanwhile, rotate, ..
                } => matches!(meanwhile, Meanwhile::LeaderKilledAt(_)) && *rotate,
                Fault::Failpoint { point, .. } => {
                    let all = points();
                    all[*point as usize % all.len()].0 == "rotation::before_activate_commit"
                }
                _ => continue,
            };
            assert!(is_so, "{step:?}");
            seen += 1;
        }
        assert_eq!(seen, 5);
    }
}
