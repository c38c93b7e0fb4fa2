//! The replication key is replaced as an operator does it: every node is restarted with the next key beside the present one, one
//! after the other, and one command, repeated blindly, makes it the cluster's.

use std::collections::BTreeSet;
use std::fs::{self, File, Permissions};
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use cluster_tests::{failpoints, until};
use hsm_api::admin::{NodeReplicationKeys, RekeyStatus};
use tokio::time::{Instant, sleep};

use super::interruption::Death;
use super::{Done, operator};
use crate::cluster::Cluster;
use crate::history::Recorder;

/// As the playground's configuration has it.
const FROM_ENV: &str = "encryption_key_env: TOKEN_REPLICATION_KEY";
/// As it is once it was replaced: in front of the two files, each in quotes.
const FILE: &str = "encryption_key_file: ";
const PREVIOUS: &str = ", previous_encryption_key_file: ";
/// For what nobody was told of to be done or not: longer than a node holds a proposal.
const DECIDED: Duration = Duration::from_secs(20);
/// From a start to readiness, and until the records of a replacement before this one are under its key.
const READY: Duration = Duration::from_secs(120);

/// Where a configuration says it, and the file of the present key, if it is in one.
fn sources(config: &str) -> Option<(Range<usize>, Option<&str>)> {
    if let Some(at) = config.find(FROM_ENV) {
        return Some((at..at + FROM_ENV.len(), None));
    }
    let at = config.find(FILE)?;
    let mut parts = config[at..].split('"');
    let (name, present) = (parts.next()?, parts.next()?);
    let (between, previous) = (parts.next()?, parts.next()?);
    let length = name.len() + present.len() + between.len() + previous.len() + 4;
    Some((at..at + length, Some(present)))
}

fn found(config: &str) -> Result<(Range<usize>, Option<&str>)> {
    sources(config).with_context(|| format!("the configuration names no replication key:\n{config}"))
}

/// With the next key; the present one is the previous one then. `first` is what the environment has.
fn with_next(config: &str, next: &Path, first: &Path) -> Result<String> {
    let (place, present) = found(config)?;
    let present = present.map_or_else(|| first.display().to_string(), str::to_owned);
    let both = format!("{FILE}\"{}\"{PREVIOUS}\"{present}\"", next.display());
    let mut changed = config.to_owned();
    changed.replace_range(place, &both);
    Ok(changed)
}

/// With the keys that another node has.
pub(super) fn as_another(config: &str, another: &str) -> Result<String> {
    let (theirs, _) = found(another)?;
    let (own, _) = found(config)?;
    let mut changed = config.to_owned();
    changed.replace_range(own, &another[theirs]);
    Ok(changed)
}

/// A key that nobody has had, as nodes read it.
fn make_key(cluster: &Cluster, recorder: &Recorder) -> Result<PathBuf> {
    let mut bytes = [0; 32];
    File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut bytes))
        .context("/dev/urandom")?;
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let name = format!("secrets/replication-{}.key", recorder.number());
    let path = cluster.playground().dir().join(name);
    fs::write(&path, digits).with_context(|| path.display().to_string())?;
    fs::set_permissions(&path, Permissions::from_mode(0o600))?;
    Ok(path)
}

async fn restart(number: u32, config: &str, cluster: &Cluster) -> Result<()> {
    let node = cluster.node(number);
    cluster.hold_down(number, true);
    node.kill().await?;
    node.set_config(config)?;
    cluster.hold_down(number, false);
    cluster.start_stopped().await?;
    node.wait_ready(READY).await
}

/// Whether the present key is this one, and stays it once whatever was asked for has been done or dropped.
async fn stays(key: &str, cluster: &Cluster) -> Result<bool> {
    let decided = Instant::now() + DECIDED;
    loop {
        if operator::agreed(cluster).await?.replication.key != key {
            return Ok(false);
        }
        if Instant::now() >= decided {
            return Ok(true);
        }
        sleep(Duration::from_secs(1)).await;
    }
}

fn command(key: &str) -> [&str; 7] {
    [
        "cluster",
        "rekey",
        "replication",
        "--confirm",
        "replication",
        "--idempotency-key",
        key,
    ]
}

/// Counted if the key is another one afterwards, and neither the same request again nor another one, which finds nothing to
/// be replaced, has made anything else of it.
pub(super) async fn carry_out(
    (kill_leader, point): (bool, u32),
    cluster: &Cluster,
    recorder: &Recorder,
) -> Result<Done> {
    let client = operator::admin(cluster)?;
    let one_key = |status: &RekeyStatus| status.replication.former.is_none();
    let settled = operator::agreed_once("records under one key", READY, one_key, cluster).await?;
    let Some(RekeyStatus {
        replication: before, ..
    }) = settled
    else {
        return Ok(Done::not_counted(
            "the replication key",
            "records are still sealed under the key before",
        ));
    };
    let what = format!("in the place of {}", before.key);
    let next = make_key(cluster, recorder)?;
    let first = cluster.playground().dir().join("secrets/replication.key");
    let mut originals = Vec::new();
    for number in cluster.members() {
        let config = cluster.node(number).config()?;
        let changed = with_next(&config, &next, &first)?;
        originals.push((number, config));
        if let Err(error) = restart(number, &changed, cluster).await {
            // It has every key that there is. That it is not ready in time may be the lines' fault, this is not.
            if super::is_of_start(&error) {
                return Ok(Done::cluster_failed(what, &format!("{error:#}")));
            }
            let why = format!("node {number} has not come back with both keys: {error:#}");
            // Whoever waits for readiness next finds the same; another attempt begins with the keys that they had.
            for (number, config) in &originals {
                if let Err(error) = restart(*number, config, cluster).await {
                    eprintln!("node {number} with the keys that it had: {error:#}");
                }
            }
            return Ok(Done::not_counted(what, why));
        }
    }
    // Each says so of itself, a moment after its start.
    let known: BTreeSet<&String> = before.nodes.iter().flat_map(|node| &node.keys).collect();
    let has_next = |node: &NodeReplicationKeys| node.keys.iter().any(|key| !known.contains(key));
    let _ = until("the next key on every node", READY, async || {
        let nodes = client.rekey_status().await.ok()?.into_body().replication.nodes;
        nodes.iter().all(has_next).then_some(())
    })
    .await;
    let [once, anew] = [(); 2].map(|()| format!("rekey-{}", recorder.number()));
    let once = command(&once);
    let line = failpoints::RESEAL[point as usize % failpoints::RESEAL.len()];
    let death = Death::prepare(kill_leader, line, None, cluster).await?;
    let (began, killed) = tokio::join!(operator::repeated(&once, cluster), death.comes(cluster));
    let killed = killed?;
    let what = format!("{what}, leader killed: {killed:?}");
    if let Err(said) = began? {
        // Not to be repeated: the configurations have changed, and another attempt would write a third key into them.
        let stays = stays(&before.key, cluster)
            .await
            .map_err(|error| anyhow!("whether the key stays: {error:#}"))?;
        if stays {
            for (number, config) in &originals {
                // A node without the cluster's key does not start, by design: if the key was replaced after all, that is no finding.
                if let Err(error) = restart(*number, config, cluster).await {
                    bail!("node {number} with the keys that it had: {error:#}");
                }
            }
        }
        return operator::never(what, &said, cluster, recorder).await;
    }
    let done = operator::agreed(cluster).await?.replication;
    let again = operator::repeated(&once, cluster).await?;
    let another = cluster.playground().hsmctl(&command(&anew)).await?.code;
    let after = operator::agreed(cluster).await?.replication;
    let what = format!("{what}: {}; once more: {again:?}, anew: {another:?}", after.key);
    Ok(if done.key == before.key || after.key != done.key {
        let is = format!(
            "the replication key was {}, after it was replaced {}, after that was asked for again {}",
            before.key, done.key, after.key
        );
        Done::cluster_failed(what, &is)
    } else {
        Done::counted(what)
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    const CONFIG: &str =
        "cluster:\n  replication: {encryption_key_env: TOKEN_REPLICATION_KEY, more: 1}\nlast: 2\n";

    #[test]
    fn the_present_key_becomes_the_previous_one_each_time() {
        let first = Path::new("/s/replication.key");
        let once = with_next(CONFIG, Path::new("/s/a.key"), first).unwrap();
        assert_eq!(
            once,
            "cluster:\n  replication: {encryption_key_file: \"/s/a.key\", previous_encryption_key_file: \
             \"/s/replication.key\", more: 1}\nlast: 2\n"
        );
        let twice = with_next(&once, Path::new("/s/b.key"), first).unwrap();
        assert!(
            twice.contains(
                "{encryption_key_file: \"/s/b.key\", previous_encryption_key_file: \"/s/a.key\", more"
            ),
            "{twice}"
        );
        assert!(with_next("cluster: {}\n", first, first).is_err());
    }

    #[test]
    fn a_new_node_gets_the_keys_that_the_others_have() {
        let theirs = with_next(CONFIG, Path::new("/s/a.key"), Path::new("/s/first.key")).unwrap();
        assert_eq!(as_another(CONFIG, &theirs).unwrap(), theirs);
        assert_eq!(as_another(CONFIG, CONFIG).unwrap(), CONFIG);
    }
}
