//! A node as a child process: this test binary, started again. It obeys lines on standard input.

use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hsm_node::clock;
use hsm_node::config::PeerTlsFiles;
use hsm_node::consensus::{self, Consensus, ConsensusOptions, FoundSeed, JoinRequest, RaftTiming};
use hsm_node::tls::load_cluster;
use raft_store::command::{AddRevocations, CreateJoinToken, Done, Op, ReportNode};
use raft_store::names::NodeName;
use raft_store::state::access::RevocationKey;
use raft_store::state::frozen::AclV1;
use raft_store::state::node::NodeReport;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub(crate) const CONFIG: &str = "CONSENSUS_CHILD";

/// How the parent configures a child.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Config {
    pub(crate) name: String,
    pub(crate) dir: PathBuf,
    pub(crate) listen: String,
    pub(crate) advertise: String,
    pub(crate) peers: std::collections::BTreeMap<String, String>,
    pub(crate) ca: PathBuf,
    pub(crate) cert: PathBuf,
    pub(crate) key: PathBuf,
    pub(crate) trk: u8,
}

#[test]
fn child_that_is_a_node_until_it_is_killed() {
    let Ok(config) = std::env::var(CONFIG) else { return };
    let config: Config = serde_json::from_str(&config).unwrap();
    let files = PeerTlsFiles {
        ca_path: config.ca.clone(),
        cert_path: config.cert.clone(),
        key_path: config.key.clone(),
    };
    let tls = load_cluster(&files, "test", &config.name, &[], true).unwrap();
    let trk = config.trk;
    let started = consensus::start(ConsensusOptions {
        node_name: NodeName::new(&config.name).unwrap(),
        data_dir: config.dir.clone(),
        listen: Some(config.listen.parse().unwrap()),
        advertise: config.advertise.clone(),
        api_advertise: "127.0.0.1:1".into(),
        peer_addresses: config.peers.clone(),
        cluster_name: "test".into(),
        tls: Some(Arc::new(tls)),
        notice: Duration::ZERO,
        autopilot: None,
        timing: RaftTiming {
            heartbeat: Duration::from_millis(200),
            election_min: Duration::from_millis(800),
            election_max: Duration::from_millis(1200),
            ready: Duration::from_secs(5),
            snapshot_every: 200,
            keep_logs: 100,
        },
        trk_id: Arc::new(move |cluster| {
            let mut id = [trk; 8];
            id[0] ^= cluster.0[0];
            id
        }),
        on_barrier: Mutex::new(None),
        on_fatal: Arc::new(|why| {
            println!("fatal {why}");
            std::process::exit(70);
        }),
    });
    let consensus = match started {
        Ok(consensus) => consensus,
        Err(error) => {
            println!("refused {error}");
            return;
        }
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    runtime.spawn(report(consensus.clone()));
    println!("started");
    for line in std::io::stdin().lock().lines() {
        let line = line.unwrap();
        let (number, command) = line.split_once(' ').unwrap();
        let (number, command, consensus) = (number.to_string(), command.to_string(), consensus.clone());
        runtime.spawn(async move {
            let answer = match obey(&consensus, &command).await {
                Ok(answer) => format!("{number} ok {answer}\n"),
                Err(error) => format!("{number} err {error}\n"),
            };
            let _ = std::io::stdout().lock().write_all(answer.as_bytes());
        });
    }
}

/// Without tokens there is nothing to prove: say so once the state is here.
async fn report(consensus: Consensus) {
    loop {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let (Some(node), published) = (consensus.raft_id(), consensus.published()) else {
            continue;
        };
        if !published.state.reports().contains(&node) && published.state.nodes().contains(&node) {
            let _ = send_report(&consensus, node).await;
        }
    }
}

async fn send_report(consensus: &Consensus, node: u64) -> Result<Done, consensus::ProposeError> {
    let published = consensus.published();
    let applied = published.applied.map_or(0, |id| id.index);
    let report = NodeReport {
        seq: published
            .state
            .reports()
            .get(&node)
            .map_or(1, |report| report.seq + 1),
        boot: consensus.boot(),
        incarnation: consensus.control().get().incarnation,
        clock: clock::unix_millis(),
        durable_index: applied,
        proven_at: Some(applied),
        feature_level: 1,
        slots: Default::default(),
        uses: Default::default(),
    };
    consensus
        .propose_as_node(Op::ReportNode(ReportNode { node, report }))
        .await
}

async fn obey(consensus: &Consensus, command: &str) -> Result<String, String> {
    let words: Vec<&str> = command.split(' ').collect();
    match words[..] {
        ["found"] => {
            let seed = FoundSeed {
                acl: AclV1::default(),
                revocations: vec![],
            };
            consensus
                .found(seed)
                .await
                .map(|f| f.raft_id.to_string())
                .map_err(|e| e.detail)
        }
        ["token"] => {
            let secret = [7; 32];
            let expires_at = clock::unix_millis() + 600_000;
            let op = CreateJoinToken {
                secret_hash: Sha256::digest(secret).into(),
                expires_at,
                node: None,
            };
            match consensus.propose_as_leader(Op::CreateJoinToken(op)).await {
                Ok(Done::JoinToken { number }) => Ok(consensus::join_token_text(number, &secret)),
                other => Err(format!("{other:?}")),
            }
        }
        ["join", token, ca, ref addresses @ ..] => {
            let request = JoinRequest {
                token: token.into(),
                cluster_ca_sha256: hex::decode(ca).unwrap().try_into().unwrap(),
                addresses: addresses.iter().map(|a| (*a).to_string()).collect(),
                slots: vec![],
            };
            consensus
                .join(request)
                .await
                .map(|j| j.raft_id.to_string())
                .map_err(|e| e.detail)
        }
        ["put", what] => {
            let revocations = vec![(RevocationKey::CommonName(what.into()), String::new())];
            let done = consensus
                .propose_as_leader(Op::AddRevocations(AddRevocations { revocations }))
                .await;
            done.map(|_| consensus.view().term.to_string())
                .map_err(|e| e.to_string())
        }
        // As many at once as a leader has in hand many times over, for as long as it takes; answered at once.
        ["flood", millis, what] => {
            let until = Instant::now() + Duration::from_millis(millis.parse().map_err(|_| "no number")?);
            for writer in 0..16 {
                let (consensus, what) = (consensus.clone(), what.to_owned());
                tokio::spawn(async move {
                    let mut number = 0;
                    while Instant::now() < until {
                        number += 1;
                        let key = RevocationKey::CommonName(format!("{what}-{writer}-{number}"));
                        let revocations = vec![(key, String::new())];
                        let op = Op::AddRevocations(AddRevocations { revocations });
                        if consensus.propose_as_leader(op).await.is_err() {
                            tokio::time::sleep(Duration::from_millis(5)).await;
                        }
                    }
                });
            }
            Ok(String::new())
        }
        ["report"] => {
            let node = consensus.raft_id().ok_or("no id")?;
            send_report(consensus, node)
                .await
                .map(|_| String::new())
                .map_err(|e| e.to_string())
        }
        ["all"] => {
            let published = consensus.published();
            let names = published.state.revocations().iter().map(|(key, _)| match key {
                RevocationKey::CommonName(cn) => cn.clone(),
                other => format!("{other:?}"),
            });
            Ok(names.collect::<Vec<_>>().join(" "))
        }
        ["digest"] => {
            let published = consensus.published();
            Ok(format!(
                "{} {:x}",
                published.applied.map_or(0, |id| id.index),
                published.digest
            ))
        }
        ["view"] => {
            let view = consensus.view();
            let staleness = view.staleness.map_or(-1, |age| age.as_millis() as i64);
            let leader = view.leader.unwrap_or(0);
            Ok(format!(
                "{} {} {leader} {} {} {staleness} {:?}",
                view.role.as_str(),
                view.term,
                view.last_log,
                view.applied,
                view.start_gate
            ))
        }
        _ => Err(format!("what is {command:?}?")),
    }
}
