//! Nodes that come: under load, with something wrong, wiped, with a renewed certificate. Whatever goes wrong
//! is said clearly and harms nobody else.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster_tests::{Load, Node, Playground, until};
use hsm_api::admin::{JoinRequest, JoinTokenRequest, MemberRole};
use hsm_api::client::Retry;
use hsm_api::{ClientError, ErrorCode, SecretText};

use crate::common::{CONTEXT, open, open_everywhere, seal, seal_under};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fourth_node_joins_under_load() -> Result<()> {
    let mut cluster = Playground::start(3).await?;
    let mut acknowledged = Vec::new();
    for _ in 0..4 {
        acknowledged.push(seal(&cluster.client("trading-1")?, CONTEXT, b"before the fourth").await?);
        cluster.client("admin")?.rotate(CONTEXT, None).await?;
    }
    let load = Load::start(&cluster)?;
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
    let report = load.stop().await;
    ensure!(
        report.failed == 0,
        "{} failures: {:#?}",
        report.failed,
        report.failures
    );
    ensure!(report.decrypted > 50, "hardly any load: {report:?}");
    // It counts: the next version needs it too.
    let version = cluster.client("admin")?.rotate(CONTEXT, None).await?.version;
    let sealed = seal_under(&client, CONTEXT, b"by the fourth", version).await?;
    open_everywhere(&cluster, "trading-1", CONTEXT, &[sealed]).await?;
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
        .with_retry(Retry::Until(Duration::from_secs(20)))
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

    // Another replication key.
    let secret = cluster.dir().join("secrets/replication.key");
    let right = std::fs::read(&secret)?;
    std::fs::write(&secret, "5a".repeat(32))?;
    restart(&cluster, &fourth, &config).await?;
    std::fs::write(&secret, &right)?;
    let outcome = join(&cluster, &fourth, |_| ()).await?;
    check_refused(outcome, &[InvalidArgument, Conflict], "TOKEN_REPLICATION_KEY")?;
    check_unharmed(&cluster).await?;

    // Nothing of all this stands in the way of the right one.
    restart(&cluster, &fourth, &config).await?;
    join(&cluster, &fourth, |_| ()).await??;
    fourth.wait_ready(Duration::from_secs(30)).await?;
    // And once more: a member stays one.
    let outcome = join(&cluster, &fourth, |_| ()).await?;
    check_refused(outcome, &[ErrorCode::AlreadyInitialised], "already")?;
    cluster.passed();
    Ok(())
}

async fn restart(cluster: &Playground, node: &Node, config: &str) -> Result<()> {
    node.kill().await?;
    node.set_config(config)?;
    cluster.start_node(node.number).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wiped_node_under_its_old_name_is_refused() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let third = cluster.node(3);
    let term = cluster.leader().await?.term;
    third.kill().await?;
    std::fs::remove_dir_all(third.dir.join("data"))?;
    cluster.start_node(3).await?;
    let outcome = join(&cluster, &third, |_| ()).await?;
    check_refused(
        outcome,
        &[ErrorCode::Conflict, ErrorCode::InvalidArgument],
        "hsm-node-3",
    )?;
    ensure!(!third.is_ready().await, "a wiped node is ready");
    let refused = cluster.client_on("trading-1", 3)?;
    ensure!(
        seal(&refused, CONTEXT, b"x").await.is_err(),
        "a wiped node encrypts"
    );
    // Nobody was disturbed: no election, and two of three still change things.
    let leader = cluster.leader_among(&[cluster.node(1), cluster.node(2)]).await?;
    ensure!(
        leader.term <= term + 1,
        "elections: from term {term} to {}",
        leader.term
    );
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
    let version = cluster.client("admin")?.rotate(CONTEXT, None).await?.version;
    let sealed = seal_under(&cluster.client("trading-1")?, CONTEXT, b"renewed", version).await?;
    open_everywhere(&cluster, "trading-1", CONTEXT, &[sealed]).await?;
    cluster.passed();
    Ok(())
}

/// A whole data directory put back from an older copy has forgotten what it had acknowledged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_from_an_older_copy_is_not_let_in() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let third = cluster.node(3);
    let (data, copy) = (third.dir.join("data"), cluster.scratch().join("older"));
    third.kill().await?;
    let copied = std::process::Command::new("cp")
        .arg("-a")
        .args([&data, &copy])
        .status()?;
    ensure!(copied.success(), "cp: {copied}");
    cluster.start_node(3).await?;
    third.wait_ready(Duration::from_secs(30)).await?;
    for _ in 0..5 {
        cluster.client("admin")?.rotate(CONTEXT, None).await?;
    }
    // Reports name how far each node's log is on disk; the copy has to be behind one.
    let seen = cluster
        .status(3)
        .await
        .context("no status of node 3")?
        .applied_index;
    let behind = cluster.node(1);
    until("a report of node 3", Duration::from_secs(30), async || {
        let applied = behind.metrics().await.ok()?.sum("hsm_raft_applied_index")?;
        (applied > seen as f64).then_some(())
    })
    .await
    .ok();
    third.kill().await?;
    std::fs::remove_dir_all(&data)?;
    std::fs::rename(&copy, &data)?;
    let before = third.log().len();
    // It may end at once, or stay up without ever being let in.
    let _ = cluster.start_node(3).await;
    until("its refusal in the log", Duration::from_secs(30), async || {
        let said = third.log()[before..].to_lowercase();
        ["older copy", "poison", "rolled back"]
            .iter()
            .any(|word| said.contains(word))
            .then_some(())
    })
    .await?;
    ensure!(!third.is_ready().await, "a node from an older copy is ready");
    // And it stays out when it is started again.
    third.kill().await?;
    let _ = cluster.start_node(3).await;
    let never = until("ready", Duration::from_secs(10), async || {
        third.is_ready().await.then_some(())
    })
    .await;
    ensure!(never.is_err(), "ready after a second start");
    let request = JoinTokenRequest {
        ttl_seconds: Some(60),
        node_id: None,
    };
    let client = cluster
        .client_on("admin", 1)?
        .with_retry(Retry::Until(Duration::from_secs(15)));
    client.create_join_token(&request).await?;
    cluster.passed();
    Ok(())
}
