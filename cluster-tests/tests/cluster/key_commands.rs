//! The commands about key versions on real nodes: what is listed, who has used what, and how a version is destroyed.

use anyhow::{Context, Result, ensure};
use cluster_tests::playground::Output;
use cluster_tests::{Playground, until};
use hsm_api::ErrorCode;
use serde_json::Value;

use crate::common::{CONTEXT, formed_with, open_everywhere, seal, settled_on};
use crate::key_life::{FIRST, GONE, opened_everywhere, refused_everywhere, retired};

/// As an operator types it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hsmctl_asks_for_the_name_of_what_it_destroys() -> Result<()> {
    let (cluster, sealed) = retired().await?;
    let version = "exchange-key/v1";
    let hsmctl = async |args: &[&str]| -> Result<Output> {
        let args = [args, &["--no-input", "-o", "json"]].concat();
        cluster.hsmctl(&args).await
    };
    let json = |bytes: Vec<u8>| -> Result<Value> { Ok(serde_json::from_slice(&bytes)?) };
    let destroy = ["key", "destroy", version, "--wait", "2d", "--override"];
    let unconfirmed: &[&str] = &[];
    for wrong in [unconfirmed, &["--confirm", "exchange-key/v2"]] {
        let refused = hsmctl(&[&destroy[..], wrong].concat()).await?;
        ensure!(refused.code == Some(2), "{wrong:?}: {refused:?}");
    }
    let foreseen = json(hsmctl(&[&destroy[..], &["--dry-run"]].concat()).await?.ok()?)?;
    ensure!(foreseen["dry_run"] == true, "{foreseen}");
    open_everywhere(&cluster, "trading-1", CONTEXT, std::slice::from_ref(&sealed)).await?;

    hsmctl(&[&destroy[..], &["--confirm", version]].concat())
        .await?
        .ok()?;
    // Whichever node is asked hears of it a moment later.
    let scheduled = async || -> Result<Value> {
        until("a destruction that is scheduled", GONE, async || {
            let shown = hsmctl(&["key", "show", version]).await.ok()?.ok().ok()?;
            json(shown)
                .ok()
                .filter(|shown| shown["state"] == "destroy_scheduled")
        })
        .await
    };
    let shown = scheduled().await?;
    ensure!(shown["destruction"]["wait_seconds"] == 172_800, "{shown}");
    hsmctl(&["key", "undo-destroy", version]).await?.ok()?;
    hsmctl(&["key", "disable", version]).await?.ok()?;
    refused_everywhere(&cluster, &sealed, ErrorCode::KeyVersionDisabled).await?;
    hsmctl(&["key", "enable", version]).await?.ok()?;
    opened_everywhere(&cluster, &sealed).await?;

    // Without a wait it is the nodes' default, seven days.
    hsmctl(&["key", "destroy", version, "--override", "--confirm", version])
        .await?
        .ok()?;
    let shown = scheduled().await?;
    ensure!(shown["destruction"]["wait_seconds"] == 604_800, "{shown}");
    hsmctl(&["key", "undo-destroy", version]).await?.ok()?;
    opened_everywhere(&cluster, &sealed).await?;

    // What there is, and who has used it.
    let listed = json(hsmctl(&["key", "list"]).await?.ok()?)?;
    let contexts = listed["contexts"].as_array().context("no contexts")?;
    let mine = contexts.iter().find(|context| context["context"] == CONTEXT);
    let mine = mine.with_context(|| listed.to_string())?;
    ensure!(
        mine["slot"] == "exchange" && mine["binding"] == "shared" && mine["active_version"] == 2,
        "{mine}"
    );
    let states: Vec<(Option<u64>, Option<&str>)> = mine["versions"]
        .as_array()
        .context("no versions")?
        .iter()
        .map(|held| (held["version"].as_u64(), held["state"].as_str()))
        .collect();
    ensure!(
        states == [(Some(1), Some("decrypt_only")), (Some(2), Some("active"))],
        "{mine}"
    );
    let first = &mine["versions"][0];
    ensure!(
        first["key_id"] == FIRST && first["retired_at"].is_string(),
        "{first}"
    );
    until("the uses in hsmctl key usage", GONE, async || {
        let printed = hsmctl(&["key", "usage", CONTEXT]).await.ok()?.ok().ok()?;
        let usage = json(printed).ok()?;
        let versions = usage["versions"].as_array()?;
        let first = versions.iter().find(|used| used["version"] == 1)?;
        let only_mine = versions.iter().all(|used| used["context"] == CONTEXT);
        let counted = first["encryptions"] == 1 && first["decryptions"].as_u64()? >= 6;
        let told = first["nodes"].as_array()?.len() == 3 && first["last_used"].is_string();
        let named = first["key_id"] == FIRST && first["state"] == "decrypt_only";
        (only_mine && versions.len() == 2 && counted && told && named).then_some(())
    })
    .await?;

    // That it was used is known by now.
    let unforced = ["key", "destroy", version, "--wait", "2d", "--confirm", version];
    let refused = hsmctl(&unforced).await?;
    ensure!(
        refused.code == Some(4) && refused.stderr.contains("override"),
        "{refused:?}"
    );

    // Under version 1's name every failure is 1; without an answer nothing is deleted.
    let unasked = hsmctl(&["delete-kek", "--label", FIRST]).await?;
    ensure!(unasked.code == Some(2), "{unasked:?}");
    let unknown = hsmctl(&["delete-kek", "--label", "no-such", "--confirm"]).await?;
    ensure!(unknown.code == Some(4), "{unknown:?}");
    let cleanup = hsmctl(&["cleanup-old-versions", "--dry-run", "--force"]).await?;
    let cleanup = json(cleanup.ok()?)?;
    let first = &cleanup["versions"][0];
    ensure!(
        first["key_id"] == FIRST && first["disabled"] == false,
        "{cleanup}"
    );
    cluster.passed();
    Ok(())
}

/// Other values than the defaults, of which the test above shows that they are seven days each.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn how_long_a_destruction_waits_and_what_is_recent_is_configured() -> Result<()> {
    let cluster = formed_with(Playground::builder().nodes(1), |config| {
        let keys = "keys: {destroy: {default_wait_hours: 48, recent_use_days: 0}}";
        config.replacen("logging:", &format!("{keys}\nlogging:"), 1)
    })
    .await?;
    let sealed = seal(&cluster.client("trading-1")?, CONTEXT, b"a moment ago").await?;
    cluster.client("admin")?.rotate(CONTEXT, None).await?;
    settled_on(&cluster, 1, CONTEXT, 2).await?;
    opened_everywhere(&cluster, &sealed).await?;
    let version = "exchange-key/v1";
    let json = async |args: &[&str]| -> Result<Value> {
        let args = [args, &["--no-input", "-o", "json"]].concat();
        Ok(serde_json::from_slice(&cluster.hsmctl(&args).await?.ok()?)?)
    };
    // Only what the state knows of could be in the way.
    until("the use is known", GONE, async || {
        let usage = json(&["key", "usage", CONTEXT]).await.ok()?;
        let versions = usage["versions"].as_array()?;
        let first = versions.iter().find(|used| used["version"] == 1)?;
        (first["encryptions"] == 1 && first["last_used"].is_string()).then_some(())
    })
    .await?;
    json(&["key", "destroy", version, "--confirm", version]).await?;
    let shown = json(&["key", "show", version]).await?;
    ensure!(shown["state"] == "destroy_scheduled", "{shown}");
    ensure!(shown["destruction"]["wait_seconds"] == 172_800, "{shown}");
    cluster.passed();
    Ok(())
}
