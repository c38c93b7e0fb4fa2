//! `chaos run`: kills random nodes of a playground cluster while clients encrypt, decrypt and rotate,
//! then checks on every node that each acknowledged rotation is there, and that ciphertexts of every version decrypt.
//!
//! The schedule of kills follows from the seed. Interleavings do not: a run is repeated, not replayed.
//!
//! The folder of the cluster is kept unless the run passes. SIGINT and SIGTERM end the run; its nodes are stopped and
//! its folder is removed first.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use tokio::signal::unix::{Signal, SignalKind, signal};

mod faults;
mod history;
mod playground;
mod random;
mod workload;

use faults::Killer;
use playground::Playground;
use workload::Workload;

/// Kill nodes of a cluster under load and check what they acknowledged.
#[derive(Parser)]
#[command(name = "chaos", version)]
enum Arguments {
    /// Run once.
    Run {
        /// Seed of the schedule of kills.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// How long to go on killing.
        #[arg(long, default_value_t = 1.0)]
        minutes: f64,
        /// Nodes of the cluster.
        #[arg(long, default_value_t = 3)]
        nodes: usize,
        /// First port; node i uses three ports from base + 10 (i - 1).
        #[arg(long, default_value_t = 28443)]
        base_port: u16,
    },
}

#[tokio::main]
async fn main() -> ExitCode {
    let Arguments::Run {
        seed,
        minutes,
        nodes,
        base_port,
    } = Arguments::parse();
    // From here on a signal ends the run, not the program: nodes would outlive it.
    let (Ok(mut interrupt), Ok(mut terminate)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        println!("verdict: inconclusive: signals cannot be received");
        return ExitCode::from(2);
    };
    let outcome = tokio::select! {
        outcome = run(seed, minutes, nodes, base_port) => outcome,
        // The run, dropped, stops its nodes.
        code = told_to_stop(&mut interrupt, &mut terminate) => {
            println!("verdict: inconclusive: stopped by a signal");
            return ExitCode::from(code);
        }
    };
    match outcome {
        Ok(violations) if violations.is_empty() => {
            println!("verdict: pass");
            ExitCode::SUCCESS
        }
        Ok(violations) => {
            for violation in &violations {
                println!("violation: {violation}");
            }
            println!("verdict: violation");
            println!("REPEAT WITH: chaos run --seed {seed} --minutes {minutes} --nodes {nodes}");
            ExitCode::from(1)
        }
        Err(error) => {
            println!("verdict: inconclusive: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// The exit code that shells know a signal by.
async fn told_to_stop(interrupt: &mut Signal, terminate: &mut Signal) -> u8 {
    tokio::select! {
        _ = interrupt.recv() => 130,
        _ = terminate.recv() => 143,
    }
}

async fn run(seed: u64, minutes: f64, nodes: usize, base_port: u16) -> Result<Vec<String>> {
    let mut playground = Playground::new(nodes, base_port)?;
    println!("seed {seed}: {nodes} nodes in {}", playground.dir().display());
    let outcome = test(&playground, seed, minutes).await;
    if !outcome.as_ref().is_ok_and(Vec::is_empty) {
        playground.keep();
        println!("kept: {}", playground.dir().display());
    }
    outcome
}

async fn test(playground: &Playground, seed: u64, minutes: f64) -> Result<Vec<String>> {
    playground.up()?;
    let workload = Workload::start(playground, seed)?;
    let killer = Killer::new(seed);
    let kills = killer
        .kill_for(playground, Duration::from_secs_f64(minutes * 60.0))
        .await?;
    anyhow::ensure!(
        kills.total() > 0,
        "no node was killed in {minutes} minutes: nothing was tested"
    );
    playground.all_ready().await?;
    let history = workload.stop().await?;
    println!("seed {seed}: {kills}; {}", history.summary());
    anyhow::ensure!(
        history.encryptions() > 0,
        "no encryption was acknowledged: nothing was tested"
    );
    anyhow::ensure!(
        history.rotations() > 0,
        "no rotation was acknowledged: that none is lost was not tested"
    );
    history.check(playground).await
}
