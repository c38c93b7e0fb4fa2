//! What earlier releases have left behind: a node of each is opened by this build, says and does what it did, and others
//! join it. And a cluster in which one node is still of the release before.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster_tests::Playground;
use cluster_tests::fixture::{self, Fixture};
use hsm_api::ErrorCode;
use hsm_api::admin::{KeyState, RevocationsPage};
use hsm_api::client::Retry;
use hsm_api::data::DecryptRequest;
use nix::sys::signal::Signal;

use crate::common::{CONTEXT, open, seal, settled_on, versions};

/// A start, a stop, or a report, on a busy machine.
const SOON: Duration = Duration::from_secs(60);

/// What has become of a ciphertext of a version in this state: it opens, or is refused like this.
fn refused(state: KeyState) -> Option<ErrorCode> {
    match state {
        KeyState::Pending | KeyState::Active | KeyState::DecryptOnly => None,
        KeyState::Disabled | KeyState::DestroyScheduled => Some(ErrorCode::KeyVersionDisabled),
        _ => Some(ErrorCode::KeyVersionDestroyed),
    }
}

/// Everything that was encrypted, on one node, as the versions' states have it.
async fn opens(cluster: &Playground, number: u32, fixture: &Fixture) -> Result<()> {
    for sealed in &fixture.sealed {
        let contexts = &fixture.keks.contexts;
        let version = contexts
            .iter()
            .find(|info| info.context == sealed.context)
            .and_then(|info| {
                let mut versions = info.versions.iter();
                versions.find(|held| held.version == sealed.answer.key_version)
            })
            .with_context(|| format!("no version of {:?}", sealed.answer))?;
        let what = format!(
            "version {} of {} on node {number}",
            version.version, sealed.context
        );
        let client = cluster.client_on(&sealed.profile, number)?;
        let mut request = DecryptRequest::new(sealed.context.as_str(), sealed.answer.ciphertext.clone());
        request.aad.clone_from(&sealed.aad);
        let answer = client.decrypt(&request).await;
        match (refused(version.state), answer) {
            (None, answer) => {
                let answer = answer.with_context(|| what.clone())?;
                ensure!(
                    answer.plaintext.as_slice() == sealed.plaintext.as_bytes(),
                    "{what}: decrypted to something else"
                );
            }
            (Some(code), Err(error)) => ensure!(error.code() == Some(code), "{what}: {error}"),
            (Some(code), Ok(_)) => anyhow::bail!("{what}: decrypted, and not refused with {code}"),
        }
    }
    Ok(())
}

/// The state that the release has left, as one node of this build shows it. What is counted or measured is left out.
async fn says_the_same(cluster: &Playground, number: u32, fixture: &Fixture) -> Result<()> {
    let admin = cluster.client_on("admin", number)?;
    let contexts = admin.list_keks().await?.into_body().contexts;
    ensure!(
        contexts.len() == fixture.keks.contexts.len(),
        "contexts: {contexts:#?}"
    );
    for (now, then) in contexts.iter().zip(&fixture.keks.contexts) {
        ensure!(
            (&now.context, &now.slot, &now.binding, now.active_version)
                == (&then.context, &then.slot, &then.binding, then.active_version)
                && versions(now) == versions(then),
            "{now:#?}\nwas {then:#?}"
        );
        for (now, then) in now.versions.iter().zip(&then.versions) {
            ensure!(
                (&now.key_id, &now.created_at, &now.activated_at)
                    == (&then.key_id, &then.created_at, &then.activated_at),
                "{now:#?}\nwas {then:#?}"
            );
        }
    }
    let acl = admin.acl().await?.into_body();
    ensure!(acl == fixture.acl, "{acl:#?}\nwas {:#?}", fixture.acl);
    let revoked = admin.revocations(&RevocationsPage::default()).await?.into_body();
    ensure!(
        revoked.revocations == fixture.revocations,
        "{revoked:#?}\nwas {:#?}",
        fixture.revocations
    );
    let status = admin.cluster_status().await?.into_body();
    ensure!(
        (&status.cluster_id, status.epoch) == (&fixture.status.cluster_id, fixture.status.epoch)
            && status.applied_index >= fixture.status.applied_index,
        "{status:#?}\nwas {:#?}",
        fixture.status
    );
    let revoked = cluster.client_on("trading-2", number)?;
    let answer = seal(&revoked, CONTEXT, b"revoked").await;
    let code = answer.err().and_then(|error| {
        let error = error.downcast_ref::<hsm_api::ClientError>()?;
        error.code()
    });
    ensure!(
        code == Some(ErrorCode::CertificateRevoked),
        "a revoked client: {code:?}"
    );
    Ok(())
}

/// Opened, joined by two nodes, changed, stopped and opened again.
async fn lives_on(fixture: &Fixture) -> Result<()> {
    let mut cluster = fixture.unpack().await?;
    cluster.up().await?;
    says_the_same(&cluster, 1, fixture).await?;
    opens(&cluster, 1, fixture).await?;
    for number in 2..=3 {
        cluster.add_node(true).await?;
        opens(&cluster, number, fixture).await?;
    }
    says_the_same(&cluster, 3, fixture).await?;
    let admin = cluster.client("admin")?.with_retry(Retry::Until(SOON));
    let version = admin.rotate(CONTEXT, None).await?.version;
    settled_on(&cluster, 1, CONTEXT, version).await?;
    let sealed = seal(&cluster.client_on("trading-1", 1)?, CONTEXT, b"by this build").await?;
    let first = cluster.node(1);
    first.signal(Signal::SIGTERM)?;
    first.wait_gone(SOON).await?;
    cluster.start_node(1).await?;
    first.wait_ready(SOON).await?;
    opens(&cluster, 1, fixture).await?;
    open(&cluster.client_on("trading-1", 1)?, CONTEXT, &sealed).await?;
    cluster.passed();
    Ok(())
}

/// All that there are (`scripts/fixture.sh`).
pub(crate) async fn a_node_of_each_earlier_release_is_opened_and_joined() -> Result<()> {
    for fixture in fixture::all()? {
        lives_on(&fixture)
            .await
            .with_context(|| format!("fixture {}", fixture.name))?;
    }
    Ok(())
}

/// A kind of change that only this release has is refused until the last node runs it, by name of that node, and whatever
/// the release before knew goes on.
#[cfg(feature = "failpoints")]
pub(crate) async fn what_an_older_node_does_not_know_waits_for_it() -> Result<()> {
    use std::ffi::OsStr;

    use cluster_tests::until;
    use hsm_api::admin::RekeyTransportRequest;

    let cluster = Playground::builder().unformed().start().await?;
    let report_older = [("HSM_FAILPOINTS", OsStr::new("levels::report_older=return"))];
    for node in cluster.nodes() {
        node.kill().await?;
        cluster.start_node_with(node.number, &report_older).await?;
    }
    cluster.up().await?;
    // All but one are upgraded. It was a member before: nobody is let in whose release is older than every member's.
    for node in &cluster.nodes()[..2] {
        node.signal(Signal::SIGTERM)?;
        node.wait_gone(SOON).await?;
        cluster.start_node(node.number).await?;
        node.wait_ready(SOON).await?;
    }
    let older = cluster.node(3);
    let admin = cluster.client("admin")?;
    let change = RekeyTransportRequest {
        slot: "exchange".to_owned(),
        restart: false,
    };
    // Until the others have reported what they know, they may be named in its place.
    let named = format!("{} understands", older.id());
    let what = format!("a refusal that says what {named}");
    until(&what, SOON, async || {
        let error = admin.rekey_transport(&change, None).await.err()?;
        let named = error.to_string().contains(&named);
        (error.code() == Some(ErrorCode::Conflict) && named).then_some(())
    })
    .await?;
    // Through the older node itself too.
    let through = cluster
        .client_on("admin", older.number)?
        .with_retry(Retry::Until(SOON));
    let refused = through.rekey_transport(&change, None).await.err();
    let refused = refused.context("it was not refused")?;
    ensure!(
        refused.code() == Some(ErrorCode::Conflict) && refused.to_string().contains(&named),
        "{refused}"
    );
    let version = through.rotate(CONTEXT, None).await?.version;
    for node in cluster.nodes() {
        settled_on(&cluster, node.number, CONTEXT, version).await?;
        let client = cluster.client_on("trading-1", node.number)?;
        let sealed = seal(&client, CONTEXT, b"in a mixed cluster").await?;
        open(&cluster.client_on("trading-1", older.number)?, CONTEXT, &sealed).await?;
    }

    // Upgraded.
    older.signal(Signal::SIGTERM)?;
    older.wait_gone(SOON).await?;
    cluster.start_node(older.number).await?;
    older.wait_ready(SOON).await?;
    until("the change to be taken", SOON, async || {
        admin.rekey_transport(&change, None).await.ok().map(drop)
    })
    .await?;
    cluster.passed();
    Ok(())
}
