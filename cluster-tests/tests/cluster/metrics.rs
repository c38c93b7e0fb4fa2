//! Every node exports everything an operator needs to see, with buckets fine enough for a token.

use anyhow::{Context, Result, ensure};
use cluster_tests::alerts::{self, Alert};
use cluster_tests::metrics::Sample;
use cluster_tests::{Metrics, Playground, until};
use std::time::{Duration, Instant};

use crate::common::{CONTEXT, open, open_everywhere, seal, settled_on};

/// Half as long again as the ten seconds in which everything that repeats itself has come up.
const QUIET: Duration = Duration::from_secs(15);

/// What takes milliseconds, on a machine that stands still now and then.
const SOON: Duration = Duration::from_secs(30);

/// What has to be there on every node, whatever it does.
const EVERYWHERE: [&str; 47] = [
    "hsm_raft_role",
    "hsm_raft_term",
    "hsm_raft_leader_changes_total",
    "hsm_raft_last_log_index",
    "hsm_raft_committed_index",
    "hsm_raft_applied_index",
    "hsm_raft_snapshot_index",
    "hsm_raft_voters",
    "hsm_raft_failure_tolerance",
    "hsm_raft_quorum_ack_age_seconds",
    "hsm_staleness_seconds",
    "hsm_raft_proposals_pending",
    "hsm_raft_proposals_timed_out_total",
    "hsm_raft_append_fsync_seconds",
    "hsm_store_bytes",
    "hsm_store_live_bytes",
    "hsm_disk_free_bytes",
    "hsm_disk_below_reserve",
    "hsm_ready",
    "hsm_standby",
    "hsm_clock_seconds",
    "hsm_rotation_clock_alarm",
    "hsm_key_rotation_due",
    "hsm_keys_known_to_removed",
    "hsm_certificate_not_after_seconds",
    "hsm_keys_missing",
    "hsm_slot_unconfigured",
    "hsm_slot_state",
    "hsm_sync_age_seconds",
    "hsm_requests_total",
    "hsm_request_duration_seconds",
    "hsm_token_calls_total",
    "hsm_token_call_duration_seconds",
    "hsm_slot_job_duration_seconds",
    "hsm_batch_items_total",
    "hsm_errors_total",
    "hsm_log_lines_lost_total",
    "hsm_audit_lines_lost_total",
    "hsm_encrypt_operations_total",
    "hsm_decrypt_operations_total",
    "hsm_acl_failures_total",
    "hsm_rate_limit_hits_total",
    "hsm_active_connections",
    "hsm_connections_refused_total",
    "hsm_client_cert_refusals_total",
    "hsm_client_cert_verifications_total",
    "hsm_proxy_protocol_refusals_total",
];

/// What an alert asks for and nodes do not export would never fire, and nobody would know. `open` is what the health
/// listener shows, `whole` what the API does.
fn every_alert_finds_what_it_asks_for(alerts: &[Alert], open: &Metrics, whole: &Metrics) -> Result<()> {
    for alert in alerts {
        let selectors = alert.selectors()?;
        for asked in &selectors {
            let (alert, name) = (&alert.name, &asked.name);
            let series: Vec<&Sample> = open.all(name).collect();
            ensure!(!series.is_empty(), "{alert}: no {name}");
            // A counter's labels may have values that nothing was counted under yet.
            let is_gauge = open.kinds.get(name).is_some_and(|kind| kind == "gauge");
            for (label, values) in &asked.labels {
                let known: Vec<&String> = series.iter().filter_map(|one| one.labels.get(label)).collect();
                ensure!(!known.is_empty(), "{alert}: {name} has no label {label}");
                let unknown = values.iter().find(|value| is_gauge && !known.contains(value));
                ensure!(unknown.is_none(), "{alert}: no {name} with {label} {unknown:?}");
            }
        }
        for label in alert.grouped_by() {
            let has = |one: &Sample| one.labels.contains_key(label);
            let found = selectors.iter().any(|asked| whole.all(&asked.name).any(has));
            ensure!(
                found,
                "{}: nothing that it asks for has the label {label}",
                alert.name
            );
        }
    }
    Ok(())
}

/// What alerts compare has values that mean nothing is wrong.
fn nothing_is_wrong(metrics: &Metrics, leads: bool) -> Result<()> {
    for (name, expected) in [
        ("hsm_raft_voters", 3.0),
        ("hsm_raft_failure_tolerance", if leads { 1.0 } else { -1.0 }),
        ("hsm_standby", 0.0),
        ("hsm_key_rotation_due", 0.0),
        ("hsm_keys_known_to_removed", 0.0),
    ] {
        let shown = metrics.sum(name);
        ensure!(shown == Some(expected), "{name} is {shown:?}");
    }
    let now = jiff::Timestamp::now().as_duration().as_secs_f64();
    let clock = metrics.sum("hsm_clock_seconds").context("no clock")?;
    ensure!((now - clock).abs() < 60.0, "the clock shows {clock} at {now}");
    let free = metrics.sum("hsm_disk_free_bytes").context("no free bytes")?;
    ensure!(free > 0.0, "nothing is free on the disk");
    for listener in ["api", "cluster"] {
        let ends = metrics.with_label("hsm_certificate_not_after_seconds", "listener", listener);
        let ends = ends.with_context(|| format!("no end of the {listener} certificate"))?;
        ensure!(ends > now, "the {listener} certificate ends at {ends}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_node_exports_what_is_promised() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let alerts = alerts::shipped()?;
    let mut acknowledged = Vec::new();
    for node in cluster.nodes() {
        acknowledged.push(seal(&cluster.client_on("trading-1", node.number)?, CONTEXT, b"x").await?);
    }
    open_everywhere(&cluster, "trading-1", CONTEXT, &acknowledged).await?;
    cluster.client("admin")?.rotate(CONTEXT, None).await?;
    // A node hears of it a moment later.
    for node in cluster.nodes() {
        settled_on(&cluster, node.number, CONTEXT, 2).await?;
        until("every key", SOON, async || {
            (node.metrics().await.ok()?.sum("hsm_keys_missing")? == 0.0).then_some(())
        })
        .await?;
    }
    let leader = cluster.leader().await?;

    for node in cluster.nodes() {
        // A voter that misses a few heartbeats counts as failed for a moment.
        let tolerates = if node.number == leader.node { 1.0 } else { -1.0 };
        let metrics = until("the tolerance of three voters", SOON, async || {
            let metrics = node.metrics().await.ok()?;
            (metrics.sum("hsm_raft_failure_tolerance") == Some(tolerates)).then_some(metrics)
        })
        .await?;
        for name in EVERYWHERE {
            ensure!(metrics.has(name), "{}: no {name}", node.id());
        }
        let role = if node.number == leader.node {
            "leader"
        } else {
            "follower"
        };
        ensure!(
            metrics.with_label("hsm_raft_role", "role", role) == Some(1.0),
            "{} is no {role}",
            node.id()
        );
        nothing_is_wrong(&metrics, node.number == leader.node).with_context(|| node.id())?;
        for slot in ["exchange", "2fa"] {
            let ready = metrics
                .all("hsm_slot_state")
                .find(|sample| {
                    sample.labels.get("slot").is_some_and(|found| found == slot)
                        && sample.labels["state"] == "ready"
                })
                .with_context(|| format!("{}: no state of slot {slot}", node.id()))?;
            ensure!(ready.value == 1.0, "{}: slot {slot} is not ready", node.id());
            let missing = metrics.with_label("hsm_keys_missing", "slot", slot);
            ensure!(
                missing == Some(0.0),
                "{}: {missing:?} keys missing in {slot}",
                node.id()
            );
        }
        ensure!(
            metrics.sum("hsm_store_bytes").is_some_and(|bytes| bytes > 0.0),
            "{}: an empty store",
            node.id()
        );
        for name in [
            "hsm_request_duration_seconds",
            "hsm_token_call_duration_seconds",
            "hsm_slot_job_duration_seconds",
            "hsm_raft_append_fsync_seconds",
        ] {
            let fine = metrics
                .buckets(name)
                .iter()
                .filter_map(|bound| bound.parse::<f64>().ok())
                .filter(|bound| *bound < 0.001)
                .count();
            ensure!(
                fine >= 3,
                "{}: {name} has {fine} buckets below a millisecond",
                node.id()
            );
        }
        // Labels come from configuration, never from callers; without a certificate they name no key.
        for sample in &metrics.samples {
            for label in ["client_cn", "context", "key_id"] {
                ensure!(
                    !sample.labels.contains_key(label),
                    "{}: {}: label {label}",
                    node.id(),
                    sample.name
                );
            }
        }
        let health = node.patient().get("/health").await?.text();
        ensure!(
            health.contains("\"kek_status\":{}"),
            "{}: /health: {health}",
            node.id()
        );
        // v1's paths, on the API itself.
        let on_api = cluster.client_on("auditor", node.number)?.metrics().await?;
        let by_context = format!("hsm_encrypt_operations_total{{context=\"{CONTEXT}\"");
        ensure!(
            on_api.contains("hsm_raft_term") && on_api.contains(&by_context),
            "{}: /metrics of the API",
            node.id()
        );
        every_alert_finds_what_it_asks_for(&alerts, &metrics, &Metrics::parse(&on_api)?)
            .with_context(|| node.id())?;
    }

    // Only a leader knows its peers, and one that is gone falls behind.
    let leading = cluster.node(leader.node);
    let lags = async || -> Option<Vec<f64>> {
        let metrics = leading.metrics().await.ok()?;
        let others = metrics.all("hsm_raft_peer_lag").filter(|lag| lag.value >= 0.0);
        Some(others.map(|lag| lag.value).collect())
    };
    until("the lag of both peers", SOON, async || {
        (lags().await? == [0.0, 0.0]).then_some(())
    })
    .await?;
    cluster.others(leader.node)[0].kill().await?;
    let request = hsm_api::admin::JoinTokenRequest::default();
    cluster
        .client_on("admin", leader.node)?
        .create_join_token(&request)
        .await?;
    until("the lag of the one that is gone", SOON, async || {
        let mut lags = lags().await?;
        lags.sort_by(f64::total_cmp);
        matches!(lags[..], [at_hand, gone] if at_hand == 0.0 && gone >= 1.0).then_some(())
    })
    .await?;
    cluster.passed();
    Ok(())
}

pub(crate) fn token_calls(metrics: &Metrics, op: &str) -> f64 {
    let of_op = metrics
        .all("hsm_token_calls_total")
        .filter(|sample| sample.labels.get("op").is_some_and(|found| found == op));
    of_op.map(|sample| sample.value).sum()
}

/// What a token was asked is what operators size it by.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_request_is_one_call_of_the_token() -> Result<()> {
    const REQUESTS: u8 = 20;
    let cluster = Playground::start(1).await?;
    let (node, client) = (cluster.node(1), cluster.client("trading-1")?);
    let before = node.metrics().await?;
    let mut all = Vec::new();
    for n in 0..REQUESTS {
        all.push(seal(&client, CONTEXT, &[n]).await?);
    }
    for sealed in &all[..5] {
        open(&client, CONTEXT, sealed).await?;
    }
    let after = node.metrics().await?;
    for (op, made) in [("encrypt", f64::from(REQUESTS)), ("decrypt", 5.0)] {
        let calls = token_calls(&after, op) - token_calls(&before, op);
        ensure!(calls == made, "{made} requests made {calls} calls of {op}");
    }
    let timed = |metrics: &Metrics| {
        metrics
            .with_label("hsm_slot_job_duration_seconds_count", "operation", "encrypt")
            .unwrap_or_default()
    };
    let jobs = timed(&after) - timed(&before);
    ensure!(jobs == f64::from(REQUESTS), "{jobs} jobs were timed");
    cluster.passed();
    Ok(())
}

pub(crate) async fn an_idle_cluster_appends_nothing() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let last_log = async || -> Result<f64> {
        cluster
            .node(1)
            .metrics()
            .await?
            .sum("hsm_raft_last_log_index")
            .context("no last log index")
    };
    // What forming has left to report is reported within a few seconds; then nothing.
    let mut last = (last_log().await?, Instant::now());
    let quiet = until("quiet", QUIET * 8, async || {
        let now = last_log().await.ok()?;
        if now != last.0 {
            last = (now, Instant::now());
        }
        (last.1.elapsed() >= QUIET).then_some(())
    })
    .await;
    quiet.with_context(|| format!("the last entry, {}, is {:?} old", last.0, last.1.elapsed()))?;
    cluster.passed();
    Ok(())
}
