//! Rotation: one version a rotation, whoever dies on the way, and never a ciphertext that a serving node
//! cannot open.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cluster_tests::Playground;
use hsm_api::data::{DecryptRequest, EncryptRequest};

use crate::common::{CONTEXT, check_settled, context_on, made, open_everywhere, seal, settled_on};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retried_rotate_makes_one_version() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let mut versions = Vec::new();
    for node in cluster.nodes() {
        let answer = cluster
            .client_on("admin", node.number)?
            .rotate(CONTEXT, Some("retried-key"))
            .await?;
        versions.push((answer.version, answer.previous_version));
    }
    assert_eq!(versions, [(2, 1), (2, 1), (2, 1)]);
    // The same key for another request is a mistake of the caller's.
    let create = hsm_api::admin::CreateKekRequest::new("order-key");
    let admin = cluster.client("admin")?;
    admin.create_kek(&create, Some("create-key")).await?;
    let other = hsm_api::admin::CreateKekRequest {
        version: Some(9),
        ..create
    };
    let refused = admin
        .create_kek(&other, Some("create-key"))
        .await
        .err()
        .and_then(|error| error.code());
    assert_eq!(refused, Some(hsm_api::ErrorCode::IdempotencyKeyReused));
    settled_on(&cluster, 1, CONTEXT, 2).await?;
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_rotates_at_once_never_share_a_number() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let mut before = check_settled(&context_on(&cluster, 1, CONTEXT).await?)?;
    for round in 0..5_u32 {
        let (one, two) = (cluster.client_on("admin", 1)?, cluster.client_on("admin", 2)?);
        let (one, two) = tokio::join!(one.rotate(CONTEXT, None), two.rotate(CONTEXT, None));
        let mut versions: Vec<u32> = [&one, &two]
            .into_iter()
            .filter_map(|outcome| outcome.as_ref().ok().map(|answer| answer.version))
            .collect();
        versions.sort_unstable();
        let one_won = versions == [before + 1];
        let both_won = versions == [before + 1, before + 2];
        ensure!(
            one_won || both_won,
            "round {round}: from {before} to {versions:?} ({one:?}, {two:?})"
        );
        before = versions.last().copied().unwrap_or(before);
        settled_on(&cluster, 3, CONTEXT, before).await?;
    }
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_rotation_a_thousand_pairs_meet_no_refusal() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let clients = (1..=3)
        .map(|node| cluster.client_on("trading-1", node))
        .collect::<Result<Vec<_>>>()?;
    let mut newest = [0; 3];
    for round in 0..4_u32 {
        let version = cluster.client("admin")?.rotate(CONTEXT, None).await?.version;
        for pair in 0..250_usize {
            let (here, there) = (pair % 3, (pair + 1 + pair / 3 % 2) % 3);
            let sealed = clients[here]
                .encrypt(&EncryptRequest::new(CONTEXT, b"pair"))
                .await
                .with_context(|| format!("round {round}, pair {pair}: encrypt on node {}", here + 1))?;
            // A follower hears of the activation a moment later; no node ever goes back.
            ensure!(
                sealed.key_version >= newest[here].max(version - 1),
                "node {} encrypts under {} after {}",
                here + 1,
                sealed.key_version,
                newest[here]
            );
            newest[here] = sealed.key_version;
            clients[there]
                .decrypt(&DecryptRequest::new(CONTEXT, sealed.ciphertext.clone()))
                .await
                .with_context(|| format!("round {round}, pair {pair}: decrypt on node {}", there + 1))?;
        }
        ensure!(newest == [version; 3], "after 250 pairs: {newest:?}");
    }
    cluster.passed();
    Ok(())
}

/// Load goes on while versions come and go: not one request fails.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rotations_under_load_fail_no_request() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let load = cluster_tests::Load::start(&cluster)?;
    let begun = Instant::now();
    let mut rotations = 0;
    while rotations < 15 || begun.elapsed() < Duration::from_secs(5) {
        cluster.client("admin")?.rotate(CONTEXT, None).await?;
        rotations += 1;
    }
    let report = load.stop().await;
    ensure!(
        report.failed == 0,
        "{} failures: {:#?}",
        report.failed,
        report.failures
    );
    ensure!(report.decrypted > 100, "hardly any load: {report:?}");
    let sealed = seal(&cluster.client("trading-1")?, CONTEXT, b"after").await?;
    open_everywhere(&cluster, "trading-1", CONTEXT, &[sealed]).await?;
    ensure!(
        made(&context_on(&cluster, 1, CONTEXT).await?) == rotations + 1,
        "versions and rotations differ"
    );
    cluster.passed();
    Ok(())
}

#[cfg(feature = "failpoints")]
mod killed {
    use cluster_tests::failpoints::{ROTATION, kill_at};
    use cluster_tests::until;
    use hsm_api::admin::KeyState;
    use hsm_api::client::Retry;

    use super::*;
    use crate::common::in_state;

    /// From the request to the point.
    const REACHED: Duration = Duration::from_secs(15);
    /// Finished or abandoned, once the leader is dead.
    const SETTLED: Duration = Duration::from_secs(15);

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_leader_killed_at_any_step_leaves_one_active_version() -> Result<()> {
        let cluster = Playground::start(3).await?;
        let mut acknowledged = Vec::new();
        for point in ROTATION {
            let leader = cluster.leader().await?;
            let survivor = cluster.others(leader.node)[0].clone();
            for node in cluster.nodes() {
                let client = cluster.client_on("trading-1", node.number)?;
                acknowledged.push(seal(&client, CONTEXT, point.as_bytes()).await?);
            }
            kill_at(&cluster.node(leader.node), point).await?;
            let client = cluster.client_on("admin", survivor.number)?;
            let client = client.with_retry(Retry::Until(Duration::from_secs(40)));
            let rotate = tokio::spawn(async move { client.rotate(CONTEXT, Some(point)).await });
            cluster
                .node(leader.node)
                .wait_gone(REACHED)
                .await
                .with_context(|| format!("{point} not reached"))?;

            let killed = Instant::now();
            let active = until("one active version and none pending", SETTLED, async || {
                let info = context_on(&cluster, survivor.number, CONTEXT).await.ok()?;
                let quiet = in_state(&info, KeyState::Pending).is_empty();
                let led = cluster.status(survivor.number).await?.leader?.raft_id != 0;
                (quiet && led).then(|| check_settled(&info))
            })
            .await
            .with_context(|| point.to_owned())??;
            println!("{point}: version {active} after {:?}", killed.elapsed());
            // The client's retries go on under one key: they end in this version or in the next one.
            let answer = rotate
                .await?
                .with_context(|| format!("{point}: the retried rotate"))?;
            ensure!(
                answer.version >= active,
                "{point}: {} after {active}",
                answer.version
            );
            cluster.start_node(leader.node).await?;
            cluster.wait_ready(&cluster.nodes()).await?;
            let mut seen = Vec::new();
            for node in cluster.nodes() {
                let info = context_on(&cluster, node.number, CONTEXT).await?;
                check_settled(&info).with_context(|| format!("{point}: {}", node.id()))?;
                seen.push(
                    info.versions
                        .iter()
                        .map(|v| (v.version, v.state))
                        .collect::<Vec<_>>(),
                );
            }
            ensure!(
                seen.windows(2).all(|pair| pair[0] == pair[1]),
                "{point}: nodes differ: {seen:?}"
            );
            open_everywhere(&cluster, "trading-1", CONTEXT, &acknowledged)
                .await
                .with_context(|| point.to_owned())?;
        }
        cluster.passed();
        Ok(())
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_rotate_sent_once_survives_the_leaders_death() -> Result<()> {
        let cluster = Playground::start(3).await?;
        for point in [
            "rotation::before_prepare_commit",
            "rotation::before_activate_commit",
        ] {
            let leader = cluster.leader().await?;
            let follower = cluster.others(leader.node)[0].clone();
            let before = made(&context_on(&cluster, follower.number, CONTEXT).await?);
            kill_at(&cluster.node(leader.node), point).await?;
            let client = cluster.client_on("admin", follower.number)?;
            let begun = Instant::now();
            let rotate = tokio::spawn(async move { client.rotate(CONTEXT, None).await });
            cluster
                .node(leader.node)
                .wait_gone(REACHED)
                .await
                .with_context(|| format!("{point} not reached"))?;
            let answer = rotate.await?.with_context(|| format!("{point}: sent once"))?;
            let took = begun.elapsed();
            ensure!(took < Duration::from_secs(15), "{point}: took {took:?}");
            let info = settled_on(&cluster, follower.number, CONTEXT, answer.version)
                .await
                .with_context(|| point.to_owned())?;
            ensure!(made(&info) == before + 1, "{point}: not one version: {info:?}");
            cluster.start_node(leader.node).await?;
            cluster.wait_ready(&cluster.nodes()).await?;
        }
        cluster.passed();
        Ok(())
    }
}
