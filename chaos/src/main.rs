//! `chaos run`: kills random nodes of a playground cluster while clients encrypt, decrypt and rotate,
//! then checks that every acknowledged ciphertext decrypts on every node.
//!
//! The schedule of kills follows from the seed. Interleavings do not: a run is repeated, not replayed.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;

mod faults;
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
    match run(seed, minutes, nodes, base_port).await {
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

async fn run(seed: u64, minutes: f64, nodes: usize, base_port: u16) -> Result<Vec<String>> {
    let playground = Playground::up(nodes, base_port)?;
    let workload = Workload::start(&playground)?;
    let killer = Killer::new(seed);
    let kills = killer
        .kill_for(&playground, Duration::from_secs_f64(minutes * 60.0))
        .await?;
    anyhow::ensure!(
        kills.total() > 0,
        "no node was killed in {minutes} minutes: nothing was tested"
    );
    playground.all_ready().await?;
    let history = workload.stop().await;
    println!(
        "seed {seed}: {kills}; {} encryptions and {} rotations acknowledged, {} failed or unknown",
        history.ciphertexts.len(),
        history.rotations,
        history.failures
    );
    anyhow::ensure!(
        !history.ciphertexts.is_empty(),
        "nothing was acknowledged: nothing was tested"
    );
    history.check(&playground).await
}
