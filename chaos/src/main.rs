//! The program `chaos`: runs of a cluster under faults, seen again, judged again, summed up, and the proof that its oracles find
//! what they are for. Everything is in the library; here are arguments, signals and exit codes.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use chaos::bugs::Bug;
use chaos::failover::FailOvers;
use chaos::folder::{self, Folder};
use chaos::network;
use chaos::options::{self, Asked, NetworkChoice, Options};
use chaos::run::Report;
use chaos::schedule::{PAUSE_MS, Stop};
use chaos::verdict::Verdict;
use chaos::{record, replay, run, selftest};
use clap::{Args, Parser};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Break a cluster under load and check what it acknowledged.
///
/// Exit codes: 0 pass, 1 violation, 2 inconclusive, 130 and 143 stopped by a signal. A run that is told to stop while faults go
/// on heals everything and is judged by what it has carried out; told again, it ends where it is.
#[derive(Parser)]
#[command(name = "chaos", version)]
enum Command {
    /// Run once. The folder is kept unless the run passes.
    Run(RunArguments),
    /// Judge the recorded history of a run again, then carry out its plan on a new cluster.
    ///
    /// The exit code is 1 if either shows a violation, else that of the new run. Interleavings are not repeated.
    Replay {
        /// Folder of the run.
        recorded: PathBuf,
        /// Folder of the new run; not there yet, or empty.
        #[arg(long)]
        dir: Option<PathBuf>,
        /// Keep that folder if the new run passes, too.
        #[arg(long)]
        keep: bool,
    },
    /// Only judge the recorded history of a run again.
    Check {
        /// Folder of the run.
        recorded: PathBuf,
    },
    /// Show that each seeded bug is found by the oracle named for it, and that the same passes without.
    ///
    /// The exit code is 1 if a bug is not found, or something is found without it, and 2 if a scenario was not carried out.
    Selftest {
        /// These bugs alone.
        #[arg(long)]
        bug: Vec<String>,
        /// Scenarios at a time: they mostly wait.
        #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=8))]
        jobs: u8,
        /// Only say which bugs there are.
        #[arg(long)]
        list: bool,
    },
    /// Print the sums of all recorded runs as a table.
    Record {
        /// The recorded runs.
        #[arg(long, default_value = record::FILE)]
        file: PathBuf,
        /// Write the table into this document, between its marks, instead.
        #[arg(long)]
        into: Option<PathBuf>,
    },
}

#[derive(Args)]
struct RunArguments {
    /// Seed of the faults and of the workload.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How long faults go on. Three fifths of it are planned, and each kind once, however long that takes; what comes besides comes
    /// while there is time. A plan that is not through a fifth and a minute after these minutes ends, and the run is inconclusive.
    #[arg(long, default_value_t = 1.0)]
    minutes: f64,
    /// Nodes of the cluster.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=9))]
    nodes: u32,
    /// Which faults, with commas between: `all`, names, and `-NAME` to leave one out. Each has to happen, else the run is
    /// inconclusive.
    #[arg(long, default_value = "all", allow_hyphen_values = true)]
    faults: String,
    /// The longest pause between two faults; the shortest is a quarter of it. Shorter pauses make room for more faults.
    #[arg(long, value_name = "MS", default_value_t = PAUSE_MS, value_parser = clap::value_parser!(u32).range(..=60_000))]
    pause_ms: u32,
    /// Where the nodes find each other.
    #[arg(long, value_enum, default_value_t)]
    network: NetworkChoice,
    /// A seeded bug to build into the nodes; see `chaos selftest --list`.
    #[arg(long)]
    bug: Option<String>,
    /// Folder of the run; not there yet, or empty.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Keep the folder of a run that passes, too.
    #[arg(long)]
    keep: bool,
    /// Add what the run shows to this file. The nodes have to say which commit they were built from, as those of
    /// scripts/chaos.sh do.
    #[arg(long)]
    record: Option<PathBuf>,
}

fn main() -> ExitCode {
    let command = Command::parse();
    // Before there is any thread: one that is there already would stay in the old namespaces.
    let done = network_of(&command)
        .and_then(|network| network.map_or(Ok(()), network::enter))
        .and_then(|()| {
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
            runtime.context("start the runtime")?.block_on(carry_out(command))
        });
    match done {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            println!("verdict: inconclusive: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// The network that a command needs; those that only look at files need none.
fn network_of(command: &Command) -> Result<Option<NetworkChoice>> {
    Ok(match command {
        Command::Run(arguments) => Some(arguments.network),
        Command::Replay { recorded, .. } => {
            let asked: Asked = Folder::at(recorded)?.read(folder::OPTIONS)?;
            Some(asked.network)
        }
        // Its scripts cut single links, which relays do everywhere alike.
        Command::Selftest { list: false, .. } => Some(NetworkChoice::Loopback),
        Command::Selftest { list: true, .. } | Command::Check { .. } | Command::Record { .. } => None,
    })
}

async fn carry_out(command: Command) -> Result<u8> {
    // From here on a signal ends what is done, not the program: nodes would outlive it.
    let mut signals = Signals {
        interrupt: signal(SignalKind::interrupt()).context("receive signals")?,
        terminate: signal(SignalKind::terminate()).context("receive signals")?,
    };
    match command {
        Command::Run(arguments) => run_once(arguments, &mut signals).await,
        Command::Replay { recorded, dir, keep } => {
            run_again(&recorded, dir.as_deref(), keep, &mut signals).await
        }
        Command::Check { recorded } => check(&recorded),
        Command::Selftest { list: true, .. } => {
            print!("{}", selftest::list());
            Ok(0)
        }
        Command::Selftest {
            bug,
            jobs,
            list: false,
        } => prove(&bug, jobs.into(), &mut signals).await,
        Command::Record { file, into } => sums(&file, into.as_deref()),
    }
}

/// A signal that comes again within this time is the same one: `timeout` sends it to a program and to its group.
const SAME_SIGNAL: Duration = Duration::from_secs(2);

/// What ends the program before its time.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    /// The exit code that shells know the signal by.
    async fn told_to_stop(&mut self) -> u8 {
        tokio::select! {
            _ = self.interrupt.recv() => 130,
            _ = self.terminate.recv() => 143,
        }
    }

    /// Does it to its end, which a signal brings nearer, and says by which exit code that is known; or ends it where it is,
    /// with the first signal if its faults have not begun, else with the second. What is dropped stops its nodes.
    async fn or_stop<T>(
        &mut self,
        folder: &Folder,
        stop: &Stop,
        what: impl Future<Output = T>,
    ) -> Result<(T, Option<u8>), u8> {
        // It has to be gone before its folder is looked at.
        let mut what = Box::pin(what);
        let mut code = tokio::select! {
            done = &mut what => return Ok((done, None)),
            code = self.told_to_stop() => code,
        };
        let has_begun = stop.tell();
        if has_begun {
            println!(
                "told to stop: no other fault begins, and what was done is judged; to end it where it is, tell it again"
            );
            let told = Instant::now();
            code = loop {
                tokio::select! {
                    done = &mut what => return Ok((done, Some(code))),
                    again = self.told_to_stop() => {
                        if told.elapsed() > SAME_SIGNAL {
                            break again;
                        }
                    }
                }
            };
        }
        drop(what);
        give_up(folder, has_begun);
        Err(code)
    }
}

/// Of what was ended where it was: the folder is kept if there is something to look at.
fn give_up(folder: &Folder, keep: bool) {
    println!("verdict: inconclusive: stopped by a signal");
    if keep {
        folder.sweep();
        println!("kept: {}", folder.path().display());
    } else {
        folder.remove();
    }
}

async fn run_once(arguments: RunArguments, signals: &mut Signals) -> Result<u8> {
    let faults = options::faults(&arguments.faults)?;
    let bug = arguments.bug.as_deref().map(Bug::named).transpose()?;
    // Now, of these binaries: at the end of an hour there may be others, and it would be too late to say what is missing.
    let record = match arguments.record {
        Some(file) => Some((file, record::commit(option_env!("HSM_BUILD_COMMIT"))?)),
        None => None,
    };
    let folder = Folder::create(arguments.dir.as_deref())?;
    let options = Options {
        seed: arguments.seed,
        minutes: arguments.minutes,
        nodes: arguments.nodes,
        faults,
        pause_ms: arguments.pause_ms,
        network: arguments.network,
        bug,
        config: None,
        dir: folder.path().to_owned(),
    };
    let command = options.command();
    let stop = Stop::default();
    let carried_out = signals
        .or_stop(&folder, &stop, run::run(&options, &folder, &stop))
        .await;
    let (report, stopped) = match carried_out {
        Ok(ended) => ended,
        Err(code) => return Ok(ended_by(code, &command)),
    };
    println!("{}", record::summary(&report));
    let replaced = told(FailOvers::of(&folder));
    let recorded = match record {
        Some((file, commit)) => record::add(&file, &options, &report, replaced, commit),
        None => Ok(()),
    };
    let keep = arguments.keep || recorded.is_err();
    let code = conclude(&report, &folder, &command, keep, stopped);
    with_record(code, recorded)
}

/// A run whose record cannot be written has not done what it was asked for; but what it has found is known by its exit code.
fn with_record(code: u8, recorded: Result<()>) -> Result<u8> {
    match recorded {
        Err(error) if code == 0 => Err(error.context("not recorded")),
        Err(error) => {
            eprintln!("not recorded: {error:#}");
            Ok(code)
        }
        Ok(()) => Ok(code),
    }
}

async fn run_again(recorded: &Path, dir: Option<&Path>, keep: bool, signals: &mut Signals) -> Result<u8> {
    let recorded = Folder::at(recorded)?;
    let judged = replay::check(&recorded);
    match &judged {
        Ok(verdict) => println!("the recorded history, judged again:\n{verdict}"),
        Err(error) => println!("the recorded history cannot be judged: {error:#}"),
    }
    let with_recorded = |code| with_recorded(code, judged.as_ref().ok());
    let folder = Folder::create(dir)?;
    let command = format!("chaos replay {}", recorded.path().display());
    let stop = Stop::default();
    let carried_out = signals
        .or_stop(&folder, &stop, replay::again(&recorded, &folder, &stop))
        .await;
    let (report, stopped) = match carried_out {
        Ok((Ok(report), stopped)) => (report, stopped),
        Ok((Err(error), _)) => {
            println!("verdict: inconclusive: {error:#}");
            return Ok(with_recorded(2));
        }
        Err(code) => return Ok(with_recorded(ended_by(code, &command))),
    };
    println!("{}", record::summary(&report));
    // A replay that has not come so far has none.
    let _ = told(FailOvers::of(&folder));
    let code = conclude(&report, &folder, &command, keep, stopped);
    Ok(with_recorded(code))
}

/// What the recorded history shows is not undone by a new run in which it has not come again.
fn with_recorded(code: u8, recorded: Option<&Verdict>) -> u8 {
    match recorded {
        Some(verdict @ Verdict::Violation(_)) => verdict.exit_code(),
        _ => code,
    }
}

/// Says how to do again what was ended where it was.
fn ended_by(code: u8, command: &str) -> u8 {
    println!("REPRODUCE WITH: {command}");
    code
}

/// Prints them, if there are any.
fn told(replaced: Result<FailOvers>) -> Result<FailOvers> {
    if let Ok(replaced) = &replaced
        && !replaced.ms.is_empty()
    {
        println!("{replaced}");
    }
    replaced
}

fn check(recorded: &Path) -> Result<u8> {
    let recorded = Folder::at(recorded)?;
    let verdict = replay::check(&recorded)?;
    told(FailOvers::of(&recorded))?;
    println!("{verdict}");
    Ok(verdict.exit_code())
}

async fn prove(bugs: &[String], jobs: usize, signals: &mut Signals) -> Result<u8> {
    let chosen = Bug::chosen(bugs)?;
    let folder = Folder::create(None)?;
    // On the heap: it has to be gone, and its nodes with it, before the folder is looked at.
    let mut proof = Box::pin(selftest::run(&chosen, jobs, &folder));
    let stopped = tokio::select! {
        code = &mut proof => Ok(code),
        code = signals.told_to_stop() => Err(code),
    };
    drop(proof);
    let code = match stopped {
        Ok(code) => code,
        Err(code) => {
            // Of each scenario that was being played there is a folder that has its bug's name.
            give_up(&folder, !folder.is_empty());
            return Ok(code);
        }
    };
    // One that went as it should has removed its own.
    if folder.is_empty() {
        folder.remove();
    } else {
        println!("kept: {}", folder.path().display());
    }
    code
}

fn sums(file: &Path, into: Option<&Path>) -> Result<u8> {
    let table = record::table(&record::read(file)?);
    match into {
        Some(document) => record::write_into(document, &table).context("the table of figures")?,
        None => print!("{table}"),
    }
    Ok(0)
}

/// Says the verdict and how to see it again; removes the folder of a run that passed and was not told to stop. The exit code: that
/// of the signal, if there was one and nothing was found wrong.
fn conclude(report: &Report, folder: &Folder, command: &str, keep: bool, stopped: Option<u8>) -> u8 {
    print!("{}", report.checked);
    let of_what = if stopped.is_some() {
        ", of what was carried out until the run was told to stop"
    } else {
        ""
    };
    println!("{}{of_what}", report.verdict);
    let passed = matches!(report.verdict, Verdict::Pass);
    if !passed {
        println!("REPRODUCE WITH: {command}");
        println!(
            "LOOK AGAIN WITH: chaos check {0}, chaos replay {0}",
            folder.path().display()
        );
    }
    if passed && !keep && stopped.is_none() {
        folder.remove();
    } else {
        println!("kept: {}", folder.path().display());
    }
    exit_code(&report.verdict, stopped)
}

/// What was found wrong is said, whoever has stopped the run.
fn exit_code(verdict: &Verdict, stopped: Option<u8>) -> u8 {
    match (verdict, stopped) {
        (Verdict::Pass | Verdict::Inconclusive(_), Some(code)) => code,
        _ => verdict.exit_code(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use nix::sys::signal::Signal::SIGUSR2;
    use nix::unistd::Pid;

    use super::*;

    #[test]
    fn a_violation_is_told_whoever_has_stopped_the_run() {
        let code = |verdict: Verdict, stopped| exit_code(&verdict, stopped);
        assert_eq!(code(Verdict::Pass, None), 0);
        assert_eq!(code(Verdict::Pass, Some(143)), 143);
        assert_eq!(code(Verdict::Inconclusive(String::new()), Some(130)), 130);
        assert_eq!(code(Verdict::Inconclusive(String::new()), None), 2);
        assert_eq!(code(Verdict::Violation(Vec::new()), Some(143)), 1);
    }

    #[test]
    fn a_violation_of_the_recorded_run_is_told_whatever_comes_of_the_new_one() {
        let violation = Verdict::Violation(Vec::new());
        let not = [Verdict::Pass, Verdict::Inconclusive(String::new())];
        for code in [0, 1, 2, 143] {
            assert_eq!(with_recorded(code, Some(&violation)), 1);
            assert_eq!(with_recorded(code, None), code);
            for verdict in &not {
                assert_eq!(with_recorded(code, Some(verdict)), code);
            }
        }
    }

    #[test]
    fn a_record_that_cannot_be_written_hides_no_violation() {
        let code = |code, recorded| with_record(code, recorded).ok();
        let full = || Err(anyhow::anyhow!("no space left"));
        assert_eq!([code(0, Ok(())), code(1, Ok(()))], [Some(0), Some(1)]);
        assert_eq!(code(0, full()), None);
        assert_eq!(
            [1, 2, 143].map(|one| code(one, full())),
            [Some(1), Some(2), Some(143)]
        );
    }

    /// In the place of those that end programs.
    fn signals() -> Signals {
        Signals {
            interrupt: signal(SignalKind::user_defined1()).unwrap(),
            terminate: signal(SignalKind::user_defined2()).unwrap(),
        }
    }

    fn raise() {
        nix::sys::signal::kill(Pid::this(), SIGUSR2).unwrap();
    }

    fn folder(root: &tempfile::TempDir) -> Folder {
        Folder::create(Some(&root.path().join("run"))).unwrap()
    }

    #[tokio::test]
    async fn a_run_whose_faults_have_not_begun_ends_with_the_first_signal_and_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let (folder, stop, mut signals) = (folder(&root), Stop::default(), signals());
        raise();
        let ended = signals
            .or_stop(&folder, &stop, std::future::pending::<()>())
            .await;
        assert_eq!(ended.map(|(_, code)| code), Err(143));
        assert!(!folder.path().exists());
    }

    #[tokio::test]
    async fn a_run_whose_faults_have_begun_ends_by_itself_after_the_first_signal() {
        let root = tempfile::tempdir().unwrap();
        let (folder, stop, mut signals) = (folder(&root), Stop::default(), signals());
        stop.faults_begin();
        raise();
        let run = async {
            while !stop.is_told() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            7
        };
        assert_eq!(signals.or_stop(&folder, &stop, run).await, Ok((7, Some(143))));
        assert!(folder.path().exists());
    }

    #[tokio::test]
    async fn a_run_ends_where_it_is_with_the_second_signal_and_is_kept() {
        let root = tempfile::tempdir().unwrap();
        let (folder, stop, mut signals) = (folder(&root), Stop::default(), signals());
        stop.faults_begin();
        let begun = Instant::now();
        let run = async {
            for _ in 0..10_000 {
                raise();
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        assert_eq!(signals.or_stop(&folder, &stop, run).await, Err(143));
        assert!(begun.elapsed() > SAME_SIGNAL, "one that comes twice is one");
        assert!(folder.path().exists());
    }
}
