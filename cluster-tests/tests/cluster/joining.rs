//! Nodes that come: under load, with something wrong, with a renewed certificate. Whatever goes wrong is said clearly and harms
//! nobody else.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cluster_tests::{Identity, Load, Node, Pki, Playground, until};
use hsm_api::admin::{JoinRequest, JoinTokenRequest, MemberRole};
use hsm_api::client::Retry;
use hsm_api::{ClientError, ErrorCode, SecretText};
use sha2::{Digest, Sha256};

use crate::common::{CONTEXT, open, open_everywhere_soon, seal, seal_under};

/// From a start, or a join, until a node is ready, and what else takes a moment on a busy machine.
pub(crate) const READY: Duration = Duration::from_secs(60);
/// For how long a join token is good that has to be too old, and from its making until it surely is.
const SHORT_LIVED: u64 = 1;
const TOO_OLD: Duration = Duration::from_secs(2);
/// For how long one that answers nobody is watched: many times as long as it takes to let one in.
const SILENT: Duration = Duration::from_secs(3);

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
    fourth.wait_ready(READY).await?;
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
pub(crate) async fn join(
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
pub(crate) fn check_refused(
    outcome: Result<(), ClientError>,
    codes: &[ErrorCode],
    named: &str,
) -> Result<()> {
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
        cluster.node(number).wait_ready(READY).await?;
    }
    let admin = cluster.client_on("admin", 1)?.with_retry(Retry::Until(READY));
    admin.rotate(CONTEXT, None).await?;
    let members = admin.members().await?.into_body().members;
    ensure!(members.len() == 3, "{members:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_join_that_must_fail_says_why_and_harms_nobody() -> Result<()> {
    use ErrorCode::{AccessDenied, Conflict, InvalidArgument};

    let mut cluster = Playground::start(3).await?;
    let fourth = cluster.add_node(false).await?;
    let request = JoinTokenRequest {
        ttl_seconds: Some(SHORT_LIVED),
        node_id: None,
    };
    let admin = cluster.client_on("admin", 1)?.with_retry(Retry::Until(READY));
    let expired = admin.create_join_token(&request).await?.into_body().token;
    let made = Instant::now();

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

    // A token whose time is over.
    restart(&cluster, &fourth, &config).await?;
    until("the end of a token", READY, async || {
        (made.elapsed() > TOO_OLD).then_some(())
    })
    .await?;
    let outcome = join(&cluster, &fourth, |request| request.token = expired).await?;
    check_refused(outcome, &[AccessDenied], "unknown, used or expired")?;
    check_unharmed(&cluster).await?;

    // Nothing of all this stands in the way of the right one.
    let mut used = None;
    join(&cluster, &fourth, |request| used = Some(request.token.clone())).await??;
    fourth.wait_ready(READY).await?;
    // And once more: a member stays one.
    let outcome = join(&cluster, &fourth, |_| ()).await?;
    check_refused(outcome, &[ErrorCode::AlreadyInitialised], "already")?;
    // Its token lets nobody in any more.
    let used = used.context("no token")?;
    let fifth = cluster.add_node(false).await?;
    let outcome = join(&cluster, &fifth, |request| request.token = used).await?;
    check_refused(outcome, &[AccessDenied], "unknown, used or expired")?;
    let members = admin.members().await?.into_body().members;
    ensure!(members.len() == 4, "{members:?}");
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
    // It answers nobody, so it is never let in, and nobody waits for it.
    let admin = cluster.client_on("admin", 1)?.with_retry(Retry::Until(READY));
    let watched = Instant::now();
    let version = admin.rotate(CONTEXT, None).await?.version;
    let silent = until("a learner that stays one", READY, async || {
        let members = admin.members().await.ok()?.into_body().members;
        let member = members.into_iter().find(|one| one.node_id == fourth.id())?;
        (member.role == MemberRole::Voter || watched.elapsed() > SILENT).then_some(member)
    })
    .await?;
    ensure!(silent.role == MemberRole::Learner, "{silent:?}");
    let sealed = seal_under(
        &cluster.client_on("trading-1", 1)?,
        CONTEXT,
        b"without it",
        version,
    )
    .await?;
    restart(&cluster, &fourth, &right).await?;
    join(&cluster, &fourth, |_| ()).await??;
    fourth.wait_ready(READY).await?;
    open(&cluster.client_on("trading-1", fourth.number)?, CONTEXT, &sealed).await?;
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
