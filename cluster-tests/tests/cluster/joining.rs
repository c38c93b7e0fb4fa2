//! Nodes that come: under load, with something wrong, wiped, with a renewed certificate. Whatever goes wrong
//! is said clearly and harms nobody else.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cluster_tests::{Identity, Leader, Load, Node, Pki, Playground, Stalls, until};
use hsm_api::admin::{JoinRequest, JoinTokenRequest, MemberRole};
use hsm_api::client::Retry;
use hsm_api::{ClientError, ErrorCode, SecretText};
use nix::sys::wait::WaitStatus;
use sha2::{Digest, Sha256};

use crate::common::{CONTEXT, open, open_everywhere_soon, seal, seal_under};

/// From a start, or a join, until a node is ready, and what else takes a moment on a busy machine.
const READY: Duration = Duration::from_secs(60);

/// Until so much more than this was decrypted that the load is one.
async fn some_load(load: &Load, than: u64) -> Result<()> {
    until("some load", Duration::from_secs(60), async || {
        (load.so_far().decrypted > than + 20).then_some(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fourth_node_joins_under_load() -> Result<()> {
    let mut cluster = Playground::start(3).await?;
    let mut acknowledged = Vec::new();
    for _ in 0..4 {
        acknowledged.push(seal(&cluster.client("trading-1")?, CONTEXT, b"before the fourth").await?);
        cluster.client("admin")?.rotate(CONTEXT, None).await?;
    }
    let load = Load::start(&cluster)?;
    some_load(&load, 0).await?;
    let fourth = cluster.add_node(true).await?;
    // Whatever it serves from its first ready moment on, it serves whole.
    ensure!(fourth.is_ready().await, "not ready: {}", fourth.checks().await);
    let client = cluster.client_on("trading-1", 4)?;
    for sealed in &acknowledged {
        open(&client, CONTEXT, sealed)
            .await
            .with_context(|| format!("version {}", sealed.version))?;
    }
    let metrics = fourth.metrics().await?;
    ensure!(
        metrics.sum("hsm_keys_missing") == Some(0.0),
        "keys are missing on a ready node"
    );
    // A release build joins before much is asked.
    some_load(&load, load.so_far().decrypted).await?;
    let report = load.stop().await;
    ensure!(
        report.failed == 0,
        "{} failures: {:#?}",
        report.failed,
        report.failures
    );
    // It counts: the next version needs it too.
    let version = cluster.client("admin")?.rotate(CONTEXT, None).await?.version;
    let sealed = seal_under(&client, CONTEXT, b"by the fourth", version).await?;
    open_everywhere_soon(&cluster, "trading-1", CONTEXT, &[sealed]).await?;
    let members = cluster.client("admin")?.members().await?.into_body().members;
    ensure!(
        members.len() == 4 && members.iter().all(|member| member.role == MemberRole::Voter),
        "{members:?}"
    );
    cluster.passed();
    Ok(())
}

/// Sends a join to a node, once.
async fn join(
    cluster: &Playground,
    node: &Node,
    change: impl FnOnce(&mut JoinRequest),
) -> Result<Result<(), ClientError>> {
    let request = JoinTokenRequest {
        ttl_seconds: Some(300),
        node_id: None,
    };
    let token = cluster
        .client_on("admin", 1)?
        .with_retry(Retry::Until(READY))
        .create_join_token(&request)
        .await?
        .into_body();
    let mut request = JoinRequest {
        token: token.token,
        cluster_ca_sha256: token.cluster_ca_sha256,
        leader_addresses: (1..=3)
            .map(|number| format!("127.0.0.1:{}", cluster.node(number).cluster_port))
            .collect(),
    };
    change(&mut request);
    Ok(cluster
        .client_on("admin", node.number)?
        .join(&request)
        .await
        .map(drop))
}

/// The join is refused with one of these codes, and the message names what is wrong.
fn check_refused(outcome: Result<(), ClientError>, codes: &[ErrorCode], named: &str) -> Result<()> {
    let error = outcome
        .err()
        .with_context(|| format!("joined in spite of {named}"))?;
    let code = error.code().with_context(|| format!("{named}: {error}"))?;
    ensure!(codes.contains(&code), "{named}: {error}");
    ensure!(error.to_string().contains(named), "{named} is not named: {error}");
    Ok(())
}

/// Three voters that serve, and nobody else.
async fn check_unharmed(cluster: &Playground) -> Result<()> {
    for number in 1..=3 {
        let node = cluster.node(number);
        ensure!(node.is_ready().await, "{}: {}", node.id(), node.checks().await);
    }
    cluster.client_on("admin", 1)?.rotate(CONTEXT, None).await?;
    let members = cluster
        .client_on("admin", 1)?
        .members()
        .await?
        .into_body()
        .members;
    ensure!(members.len() == 3, "{members:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_join_that_must_fail_says_why_and_harms_nobody() -> Result<()> {
    use ErrorCode::{AccessDenied, Conflict, InvalidArgument};

    let mut cluster = Playground::start(3).await?;
    let fourth = cluster.add_node(false).await?;

    // Tokens and pins.
    let outcome = join(&cluster, &fourth, |request| {
        let text = request.token.expose().to_owned();
        let last = if text.ends_with('0') { "1" } else { "0" };
        request.token = SecretText::new(format!("{}{last}", &text[..text.len() - 1]));
    })
    .await?;
    check_refused(outcome, &[AccessDenied, InvalidArgument], "token")?;
    let outcome = join(&cluster, &fourth, |request| {
        request.token = SecretText::from("nonsense")
    })
    .await?;
    check_refused(outcome, &[InvalidArgument], "token")?;
    let outcome = join(&cluster, &fourth, |request| {
        request.cluster_ca_sha256 = "00".repeat(32)
    })
    .await?;
    check_refused(outcome, &[InvalidArgument], "CA")?;
    // The API's address in place of the cluster listener's; and what is no address.
    let api = format!("127.0.0.1:{}", cluster.node(1).api_port);
    let outcome = join(&cluster, &fourth, |request| request.leader_addresses = vec![api]).await?;
    check_refused(outcome, &[InvalidArgument], "give the address of cluster.listen")?;
    let outcome = join(&cluster, &fourth, |request| {
        request.leader_addresses = vec!["hsm-1".to_owned()]
    })
    .await?;
    check_refused(outcome, &[InvalidArgument], "hsm-1")?;
    check_unharmed(&cluster).await?;

    // A slot that is missing.
    let config = fourth.config()?;
    let without: String = config
        .lines()
        .filter(|line| {
            !line.trim_start().starts_with("\"2fa\":") && !line.trim_start().starts_with("\"2FA\":")
        })
        .map(|line| format!("{line}\n"))
        .collect();
    ensure!(
        without.len() < config.len(),
        "the playground's configuration has changed:\n{config}"
    );
    restart(&cluster, &fourth, &without).await?;
    let outcome = join(&cluster, &fourth, |_| ()).await?;
    check_refused(outcome, &[InvalidArgument, Conflict], "2fa")?;
    check_unharmed(&cluster).await?;

    // A name that is taken, with a certificate for it.
    let (cert, key) = cluster.pki().cluster_files("hsm-node-1");
    let (own_cert, own_key) = cluster.pki().cluster_files("hsm-node-4");
    let taken = config
        .replace("node_id: hsm-node-4", "node_id: hsm-node-1")
        .replace(&own_cert.display().to_string(), &cert.display().to_string())
        .replace(&own_key.display().to_string(), &key.display().to_string())
        .replace("/node4/data", "/node4/data-of-another-name");
    restart(&cluster, &fourth, &taken).await?;
    let outcome = join(&cluster, &fourth, |_| ()).await?;
    check_refused(outcome, &[Conflict, InvalidArgument], "hsm-node-1")?;
    check_unharmed(&cluster).await?;

    // A certificate of another CA: its operator has the members' digest, or the own one.
    let (ca, own) = Pki::foreign_cluster("hsm-node-4")?;
    let foreign = foreign_files(&cluster, &config, &ca, &own)?;
    restart(&cluster, &fourth, &foreign).await?;
    let outcome = join(&cluster, &fourth, |_| ()).await?;
    check_refused(outcome, &[InvalidArgument], "cluster.tls.ca_path")?;
    let digest = hex::encode(Sha256::digest(ca.der()?));
    let outcome = join(&cluster, &fourth, |request| request.cluster_ca_sha256 = digest).await?;
    let named = "install the cluster's CA here (cluster.tls.ca_path)";
    check_refused(outcome, &[InvalidArgument], named)?;
    check_unharmed(&cluster).await?;

    // Another replication key.
    let secret = cluster.dir().join("secrets/replication.key");
    let right = std::fs::read(&secret)?;
    std::fs::write(&secret, "5a".repeat(32))?;
    restart(&cluster, &fourth, &config).await?;
    std::fs::write(&secret, &right)?;
    let outcome = join(&cluster, &fourth, |_| ()).await?;
    check_refused(outcome, &[InvalidArgument, Conflict], "TOKEN_REPLICATION_KEY")?;
    // The log is written a moment later.
    until("an audit line of who came with it", READY, async || {
        let logs: Vec<String> = cluster.nodes().iter().map(Node::log).collect();
        let mut lines = logs.iter().flat_map(|log| log.lines());
        let audited = lines.any(|line| {
            line.contains("\"target\":\"audit\"")
                && line.contains("hsm-node-4")
                && line.contains("TOKEN_REPLICATION_KEY")
        });
        audited.then_some(())
    })
    .await?;
    check_unharmed(&cluster).await?;

    // Nothing of all this stands in the way of the right one.
    restart(&cluster, &fourth, &config).await?;
    join(&cluster, &fourth, |_| ()).await??;
    fourth.wait_ready(READY).await?;
    // And once more: a member stays one.
    let outcome = join(&cluster, &fourth, |_| ()).await?;
    check_refused(outcome, &[ErrorCode::AlreadyInitialised], "already")?;
    cluster.passed();
    Ok(())
}

/// It got its id, and then nobody could reach it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_join_under_a_wrong_address_is_put_right_by_joining_again() -> Result<()> {
    let mut cluster = Playground::start(3).await?;
    let fourth = cluster.add_node(false).await?;
    let right = fourth.config()?;
    let advertised = format!("  advertise: 127.0.0.1:{}\n", fourth.cluster_port);
    let wrong = right.replace(&advertised, "  advertise: 127.0.0.1:1\n");
    ensure!(right != wrong, "{right}");
    restart(&cluster, &fourth, &wrong).await?;
    {
        let mut joining = std::pin::pin!(join(&cluster, &fourth, |_| ()));
        let given = until("its raft id", READY, async || {
            let status = cluster.status(fourth.number).await?;
            (status.raft_id != 0).then_some(())
        });
        tokio::select! {
            outcome = &mut joining => anyhow::bail!("joined where nobody reaches it: {outcome:?}"),
            given = given => given?,
        }
    }
    restart(&cluster, &fourth, &right).await?;
    join(&cluster, &fourth, |_| ()).await??;
    fourth.wait_ready(READY).await?;
    let members = cluster.client("admin")?.members().await?.into_body().members;
    let address = format!("127.0.0.1:{}", fourth.cluster_port);
    ensure!(
        members.len() == 4 && members.iter().any(|member| member.cluster_address == address),
        "{members:?}"
    );
    cluster.passed();
    Ok(())
}

/// A fourth node's configuration with files of another cluster CA.
fn foreign_files(cluster: &Playground, config: &str, ca: &Identity, own: &Identity) -> Result<String> {
    let (cert, key) = cluster.pki().cluster_files("hsm-node-4");
    let mut changed = config.to_owned();
    for (path, name, pem) in [
        (cluster.pki().dir().join("cluster-ca.crt"), "ca.crt", &ca.cert),
        (cert, "own.crt", &own.cert),
        (key, "own.key", &own.key),
    ] {
        let path = path.display().to_string();
        ensure!(changed.contains(&path), "{path} is not in\n{changed}");
        let file = cluster.scratch().join(format!("foreign-{name}"));
        std::fs::write(&file, pem)?;
        changed = changed.replace(&path, &file.display().to_string());
    }
    Ok(changed)
}

async fn restart(cluster: &Playground, node: &Node, config: &str) -> Result<()> {
    node.kill().await?;
    node.set_config(config)?;
    cluster.start_node(node.number).await
}

/// Five heartbeats.
const HEARTBEATS: Duration = Duration::from_secs(1);
/// `cluster.raft.election_min_ms`.
const ELECTION: Duration = Duration::from_millis(800);

/// Until a node that belongs to no cluster any more has said, after the first so many bytes of its log, that it has turned
/// the leader away, whichever node that is.
async fn until_it_refused_the_leader(cluster: &Playground, node: &Node, after: usize) -> Result<Leader> {
    let others = cluster.others(node.number);
    let what = format!("the leader refused by {}", node.id());
    until(&what, READY, async || {
        let leader = cluster.leader_among(&others).await.ok()?;
        let named = format!("\"peer\":\"{}\"", cluster.node(leader.node).id());
        let log = node.log();
        let mut lines = log.get(after..).unwrap_or_default().lines();
        let refused = lines.any(|line| {
            line.contains("\"target\":\"audit\"")
                && line.contains(&named)
                && line.contains("this node belongs to no cluster")
        });
        refused.then_some(leader)
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wiped_node_under_its_old_name_is_refused() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let stalls = Stalls::watch()?;
    let before = cluster.leader().await?;
    let others = cluster.others(before.node);
    let wiped = others.last().context("no other node")?;
    wiped.kill().await?;
    std::fs::remove_dir_all(wiped.dir.join("data"))?;
    let said = wiped.log().len();
    cluster.start_node(wiped.number).await?;
    let started = Instant::now();
    let outcome = join(&cluster, wiped, |_| ()).await?;
    check_refused(
        outcome,
        &[ErrorCode::Conflict, ErrorCode::InvalidArgument],
        &wiped.id(),
    )?;
    let leader = until_it_refused_the_leader(&cluster, wiped, said).await?;
    let on_leader = cluster.client_on("admin", leader.node)?;
    until(
        "a second of heartbeats that it does not answer",
        READY,
        async || {
            let since = started.elapsed();
            let members = on_leader.members().await.ok()?.into_body().members;
            let member = members.iter().find(|member| member.node_id == wiped.id())?;
            let silent = |millis| Duration::from_millis(millis) >= since;
            (since >= HEARTBEATS && member.last_seen_ms.is_none_or(silent)).then_some(())
        },
    )
    .await?;
    // Nothing of the log has come to it.
    let status = cluster.status(wiped.number).await.context("no status")?;
    ensure!(status.raft_id == 0, "a wiped node has an id: {status:?}");
    let last_log = wiped.metrics().await?.sum("hsm_raft_last_log_index");
    ensure!(
        last_log.is_none_or(|last| last == 0.0),
        "a wiped node's log ends at {last_log:?}"
    );
    ensure!(!wiped.is_ready().await, "a wiped node is ready");
    let refused = cluster.client_on("trading-1", wiped.number)?;
    ensure!(
        seal(&refused, CONTEXT, b"x").await.is_err(),
        "a wiped node encrypts"
    );
    // Nobody was disturbed: it stands for no election. Who stands still for longer than the others wait may be voted out
    // by them; of that a wiped node is not the cause.
    let leader = cluster.leader_among(&cluster.others(wiped.number)).await?;
    let stood_still = stalls.between(started, Instant::now());
    ensure!(
        leader == before || stood_still >= ELECTION / 2,
        "{leader:?} after {before:?}; the machine stood still for {stood_still:?}"
    );
    // And two of three still change things.
    let request = JoinTokenRequest {
        ttl_seconds: Some(60),
        node_id: None,
    };
    cluster
        .client_on("admin", leader.node)?
        .create_join_token(&request)
        .await?;
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_renewed_cluster_certificate_changes_nothing() -> Result<()> {
    let cluster = Playground::start(3).await?;
    for node in cluster.nodes() {
        let renewed = cluster.pki().issue_cluster(&node.id())?;
        let (cert, key) = cluster.pki().cluster_files(&node.id());
        node.kill().await?;
        std::fs::write(cert, renewed.cert)?;
        std::fs::write(key, renewed.key)?;
        cluster.start_node(node.number).await?;
        cluster.wait_ready(&cluster.nodes()).await?;
    }
    // All of them are heard: a rotation needs every member.
    let admin = cluster.client("admin")?.with_retry(Retry::Until(READY));
    let version = admin.rotate(CONTEXT, None).await?.version;
    let sealed = seal_under(&cluster.client("trading-1")?, CONTEXT, b"renewed", version).await?;
    open_everywhere_soon(&cluster, "trading-1", CONTEXT, &[sealed]).await?;
    cluster.passed();
    Ok(())
}

/// How a node ends whose store is refused, or that is refused by the others: `docs/operations.md`.
const EXIT_REFUSED: i32 = 70;
const POISON: &str = "its data directory is an older copy: it ends at log index ";

/// Starts a node that must not run; until it has ended, with the code for that. Returns what it has said.
async fn ends_refused(cluster: &Playground, node: &Node) -> Result<String> {
    let before = node.log().len();
    match cluster.start_node(node.number).await {
        // It has ended before it listened; then its starter knows how.
        Err(error) => {
            let told = format!("{error:#}");
            let code = format!("exit status: {EXIT_REFUSED}");
            ensure!(told.contains(&code), "{told}");
        }
        Ok(()) => {
            let status = node.wait_ended(READY).await?;
            ensure!(
                matches!(status, WaitStatus::Exited(_, EXIT_REFUSED)),
                "it ended with {status:?}"
            );
        }
    }
    let log = node.log();
    Ok(log.get(before..).unwrap_or_default().to_owned())
}

/// A whole data directory put back from an older copy has forgotten what it had acknowledged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_from_an_older_copy_is_not_let_in() -> Result<()> {
    // Nodes are children of a program that has ended: they become this process's, which may then ask how they
    // ended.
    nix::sys::prctl::set_child_subreaper(true)?;
    let cluster = Playground::start(3).await?;
    let (stalls, begins) = (Stalls::watch()?, Instant::now());
    let leader = cluster.leader().await?;
    let node = cluster.others(leader.node)[0].clone();
    let (data, copy) = (node.dir.join("data"), cluster.scratch().join("older"));
    node.kill().await?;
    let copied = std::process::Command::new("cp")
        .arg("-a")
        .args([&data, &copy])
        .status()?;
    ensure!(copied.success(), "cp: {copied}");
    cluster.start_node(node.number).await?;
    node.wait_ready(READY).await?;
    let begun = cluster
        .status(node.number)
        .await
        .context("no status")?
        .last_log_index;
    let admin = cluster.client("admin")?.with_retry(Retry::Until(READY));
    for _ in 0..5 {
        admin.rotate(CONTEXT, None).await?;
    }
    // Whoever leads has heard that the node has more on its disk than when the copy was made.
    until("what the node acknowledges", READY, async || {
        let leader = cluster.leader_among(&cluster.others(node.number)).await.ok()?;
        let on_leader = cluster.client_on("admin", leader.node).ok()?;
        let members = on_leader.members().await.ok()?.into_body().members;
        let member = members.iter().find(|member| member.node_id == node.id())?;
        (member.matched_index? > begun).then_some(())
    })
    .await?;
    node.kill().await?;
    std::fs::remove_dir_all(&data)?;
    std::fs::rename(&copy, &data)?;

    let said = ends_refused(&cluster, &node).await?;
    ensure!(
        said.contains(&format!(
            "this node may not run with this data directory: {POISON}"
        )),
        "{said}"
    );
    // It stays so, whoever starts it again.
    let said = ends_refused(&cluster, &node).await?;
    ensure!(
        said.contains(&format!("this node may not run again: {POISON}")),
        "{said}"
    );
    // Nobody else was disturbed, and two of three still change things.
    let now = cluster.leader_among(&cluster.others(node.number)).await?;
    let stood_still = stalls.between(begins, Instant::now());
    ensure!(
        now == leader || stood_still >= ELECTION / 2,
        "{now:?} after {leader:?}; the machine stood still for {stood_still:?}"
    );
    let request = JoinTokenRequest {
        ttl_seconds: Some(60),
        node_id: None,
    };
    let on_leader = cluster.client_on("admin", now.node)?;
    on_leader
        .with_retry(Retry::Until(READY))
        .create_join_token(&request)
        .await?;
    cluster.passed();
    Ok(())
}
