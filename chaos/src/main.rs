//! The program `chaos`: runs of a cluster under faults, seen again, judged again, summed up, and the proof that its oracles find
//! what they are for. Everything is in the library; here are arguments, signals and exit codes.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use chaos::bugs::Bug;
use chaos::failover::FailOvers;
use chaos::folder::{self, Folder};
use chaos::network;
use chaos::options::{self, Asked, NetworkChoice, Options};
use chaos::run::Report;
use chaos::schedule::PAUSE_MS;
use chaos::verdict::Verdict;
use chaos::{record, replay, run, selftest};
use clap::{Args, Parser};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Break a cluster under load and check what it acknowledged.
///
/// Exit codes: 0 pass, 1 violation, 2 inconclusive, 130 and 143 stopped by a signal.
#[derive(Parser)]
#[command(name = "chaos", version)]
enum Command {
    /// Run once. The folder is kept unless the run passes.
    Run(RunArguments),
    /// Judge the recorded history of a run again, then carry out its plan on a new cluster.
    ///
    /// The exit code is that of the new run. Interleavings are not repeated.
    Replay {
        /// Folder of the run.
        recorded: PathBuf,
        /// Folder of the new run; not there yet, or empty.
        #[arg(long)]
        dir: Option<PathBuf>,
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
    /// How long faults go on.
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
    /// Add what the run shows to this file.
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
        Command::Replay { recorded, dir } => run_again(&recorded, dir.as_deref(), &mut signals).await,
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

    /// Does it, or ends it: what is dropped stops its nodes, and its folder goes.
    async fn or_stop<T>(&mut self, folder: &Folder, what: impl Future<Output = T>) -> Result<T, u8> {
        let stopped = tokio::select! {
            done = what => return Ok(done),
            code = self.told_to_stop() => code,
        };
        println!("verdict: inconclusive: stopped by a signal");
        folder.remove();
        Err(stopped)
    }
}

async fn run_once(arguments: RunArguments, signals: &mut Signals) -> Result<u8> {
    let faults = options::faults(&arguments.faults)?;
    let bug = arguments.bug.as_deref().map(Bug::named).transpose()?;
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
    let report = match signals.or_stop(&folder, run::run(&options, &folder)).await {
        Ok(report) => report,
        Err(code) => return Ok(code),
    };
    println!("{}", record::summary(&report));
    let replaced = told(FailOvers::of(&folder));
    if let Some(file) = &arguments.record {
        record::add(file, &options, &report, replaced, record::commit()?)?;
    }
    Ok(conclude(&report, &folder, &options.command(), arguments.keep))
}

async fn run_again(recorded: &Path, dir: Option<&Path>, signals: &mut Signals) -> Result<u8> {
    let recorded = Folder::at(recorded)?;
    match replay::check(&recorded) {
        Ok(verdict) => println!("the recorded history, judged again:\n{verdict}"),
        Err(error) => println!("the recorded history cannot be judged: {error:#}"),
    }
    let folder = Folder::create(dir)?;
    let report = match signals.or_stop(&folder, replay::again(&recorded, &folder)).await {
        Ok(report) => report?,
        Err(code) => return Ok(code),
    };
    println!("{}", record::summary(&report));
    // A replay that has not come so far has none.
    let _ = told(FailOvers::of(&folder));
    let command = format!("chaos replay {}", recorded.path().display());
    Ok(conclude(&report, &folder, &command, false))
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
    let code = match signals
        .or_stop(&folder, selftest::run(&chosen, jobs, &folder))
        .await
    {
        Ok(code) => code?,
        Err(code) => return Ok(code),
    };
    if code == 0 {
        folder.remove();
    } else {
        println!("kept: {}", folder.path().display());
    }
    Ok(code)
}

fn sums(file: &Path, into: Option<&Path>) -> Result<u8> {
    let table = record::table(&record::read(file)?);
    match into {
        Some(document) => record::write_into(document, &table).context("the table of figures")?,
        None => print!("{table}"),
    }
    Ok(0)
}

/// Says the verdict and how to see it again; removes the folder of a run that passed.
fn conclude(report: &Report, folder: &Folder, command: &str, keep: bool) -> u8 {
    print!("{}", report.checked);
    println!("{}", report.verdict);
    let passed = matches!(report.verdict, Verdict::Pass);
    if !passed {
        println!("REPRODUCE WITH: {command}");
        println!(
            "LOOK AGAIN WITH: chaos check {0}, chaos replay {0}",
            folder.path().display()
        );
    }
    if passed && !keep {
        folder.remove();
    } else {
        println!("kept: {}", folder.path().display());
    }
    report.verdict.exit_code()
}
