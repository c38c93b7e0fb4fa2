//! What several tests need: sealing and opening, looking at key versions, and at what commands write.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster_tests::playground::Builder;
use cluster_tests::{Node, Playground, until};
use hsm_api::admin::{ContextInfo, KeyState};
use hsm_api::client::Retry;
use hsm_api::data::{DecryptRequest, EncryptRequest};
use hsm_api::{Base64, Client, ClientError, ErrorCode};
use serde_json::Value;

/// From an acknowledged change until a node goes by it, which takes milliseconds unless the machine stands still.
const FOLLOWED: Duration = Duration::from_secs(20);

/// The context most tests use.
pub(crate) const CONTEXT: &str = "exchange-key";

/// A cluster whose nodes have a changed configuration from its first entry on.
pub(crate) async fn formed_with(builder: Builder, change: impl Fn(&str) -> String) -> Result<Playground> {
    let cluster = builder.unformed().start().await?;
    for node in cluster.nodes() {
        node.kill().await?;
        let before = node.config()?;
        let after = change(&before);
        ensure!(
            after != before,
            "the playground's configuration has changed:\n{before}"
        );
        node.set_config(&after)?;
    }
    cluster.up().await?;
    Ok(cluster)
}

/// Whether a leader that was told to stop handed over before it let connections end, by what it has logged since. Of
/// 2.0.0-dev.1, which said that it drains in the line in which it said that it stops, it is enough that it handed over.
pub(crate) fn handed_over_first(said: &str) -> bool {
    let before = match said.split_once("\"draining connections\"") {
        Some((before, _)) => before,
        None if said.contains("not ready from now on, draining connections") => said,
        None => return false,
    };
    before.contains("leadership handed over")
}

/// What a command has written, as JSON.
pub(crate) fn json(text: &[u8]) -> Result<Value> {
    serde_json::from_slice(text).with_context(|| String::from_utf8_lossy(text).into_owned())
}

/// The permission bits of a file.
pub(crate) fn mode(path: &Path) -> Result<u32> {
    Ok(std::fs::metadata(path)
        .with_context(|| path.display().to_string())?
        .permissions()
        .mode()
        & 0o777)
}

/// Tells SoftHSM, in its configuration file, where the tokens are.
pub(crate) fn softhsm_conf(conf: &Path, tokens: &Path) -> Result<()> {
    let text = format!(
        "directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n",
        tokens.display()
    );
    std::fs::write(conf, text)?;
    Ok(())
}

/// An acknowledged encryption.
#[derive(Clone)]
pub(crate) struct Sealed {
    pub(crate) plaintext: Vec<u8>,
    pub(crate) ciphertext: Base64,
    pub(crate) key_id: String,
    pub(crate) version: u32,
}

/// Encrypts once.
pub(crate) async fn seal(client: &Client, context: &str, plaintext: &[u8]) -> Result<Sealed> {
    let answer = client
        .encrypt(&EncryptRequest::new(context, plaintext))
        .await?
        .into_body();
    Ok(Sealed {
        plaintext: plaintext.to_vec(),
        ciphertext: answer.ciphertext,
        key_id: answer.key_id,
        version: answer.key_version,
    })
}

/// Encrypts until it is done under this version: a node begins to use a version a moment after it is active.
pub(crate) async fn seal_under(
    client: &Client,
    context: &str,
    plaintext: &[u8],
    version: u32,
) -> Result<Sealed> {
    let what = format!("a ciphertext of version {version}");
    until(&what, FOLLOWED, async || {
        let sealed = seal(client, context, plaintext).await.ok()?;
        (sealed.version == version).then_some(sealed)
    })
    .await
}

/// Decrypts once; what comes out has to be what went in.
pub(crate) async fn open(client: &Client, context: &str, sealed: &Sealed) -> Result<()> {
    let answer = client
        .decrypt(&DecryptRequest::new(context, sealed.ciphertext.clone()))
        .await?;
    ensure!(
        answer.plaintext.as_slice() == sealed.plaintext,
        "version {} decrypted to something else",
        sealed.version
    );
    Ok(())
}

/// A version that a node has heard of and has not loaded yet: `docs/errors.md` says to come back in a second.
fn is_not_ready(error: &anyhow::Error) -> bool {
    let code = error.downcast_ref::<ClientError>().and_then(ClientError::code);
    code == Some(ErrorCode::KeyVersionNotReady)
}

/// Everything acknowledged decrypts on every node, at the first attempt: they are ready, and so hold every version that
/// was there when they became so.
pub(crate) async fn open_everywhere(
    cluster: &Playground,
    profile: &str,
    context: &str,
    all: &[Sealed],
) -> Result<()> {
    for node in cluster.nodes() {
        let client = cluster.client_on(profile, node.number)?;
        for sealed in all {
            open(&client, context, sealed)
                .await
                .with_context(|| format!("version {} on {}", sealed.version, node.id()))?;
        }
    }
    Ok(())
}

/// The same of versions that were made while the nodes served: one that lags behind a commit may say for a moment that
/// it does not have the key yet (`docs/api.md`, `X-HSM-Index`).
pub(crate) async fn open_everywhere_soon(
    cluster: &Playground,
    profile: &str,
    context: &str,
    all: &[Sealed],
) -> Result<()> {
    for node in cluster.nodes() {
        let client = cluster.client_on(profile, node.number)?;
        for sealed in all {
            let what = format!("version {} on {}", sealed.version, node.id());
            let opened = until(&what, FOLLOWED, async || {
                match open(&client, context, sealed).await {
                    Err(error) if is_not_ready(&error) => None,
                    opened => Some(opened),
                }
            });
            opened.await?.with_context(|| what.clone())?;
        }
    }
    Ok(())
}

/// A context as one node sees it.
pub(crate) async fn context_on(cluster: &Playground, number: u32, context: &str) -> Result<ContextInfo> {
    let client = cluster
        .client_on("admin", number)?
        .with_retry(Retry::Until(FOLLOWED));
    let keks = client.list_keks().await?.into_body();
    keks.contexts
        .into_iter()
        .find(|info| info.context == context)
        .with_context(|| format!("node {number} does not know {context}"))
}

/// Numbers of the versions in a state.
pub(crate) fn in_state(info: &ContextInfo, state: KeyState) -> Vec<u32> {
    info.versions
        .iter()
        .filter(|version| version.state == state)
        .map(|version| version.version)
        .collect()
}

/// A context on one node, once that node has this version active and none pending: a follower hears of an
/// activation a moment after it was acknowledged.
pub(crate) async fn settled_on(
    cluster: &Playground,
    number: u32,
    context: &str,
    version: u32,
) -> Result<ContextInfo> {
    let what = format!("version {version} of {context} active on node {number}, none pending");
    until(&what, FOLLOWED, async || {
        let info = context_on(cluster, number, context).await.ok()?;
        (check_settled(&info).ok()? == version).then_some(info)
    })
    .await
}

/// Exactly one version is active, none is pending, and no number is used twice.
pub(crate) fn check_settled(info: &ContextInfo) -> Result<u32> {
    let active = in_state(info, KeyState::Active);
    ensure!(active.len() == 1, "active versions: {active:?}");
    let pending = in_state(info, KeyState::Pending);
    ensure!(pending.is_empty(), "pending versions: {pending:?}");
    let mut numbers: Vec<u32> = info.versions.iter().map(|version| version.version).collect();
    let count = numbers.len();
    numbers.sort_unstable();
    numbers.dedup();
    ensure!(numbers.len() == count, "a number twice: {:?}", info.versions);
    ensure!(
        info.active_version == active.first().copied(),
        "active_version {:?}",
        info.active_version
    );
    Ok(active[0])
}

/// Version, key and state of each version: what all nodes have to agree on.
pub(crate) fn versions(info: &ContextInfo) -> Vec<(u32, &str, KeyState)> {
    info.versions
        .iter()
        .map(|held| (held.version, held.key_uid.as_str(), held.state))
        .collect()
}

/// A context on which all nodes agree, with one version active and none pending.
pub(crate) async fn settled_everywhere(cluster: &Playground, context: &str) -> Result<ContextInfo> {
    settled_among(cluster, &cluster.nodes(), context).await
}

/// The same, of nodes that are left.
pub(crate) async fn settled_among(
    cluster: &Playground,
    nodes: &[Node],
    context: &str,
) -> Result<ContextInfo> {
    let what = format!("the same versions of {context} on all nodes, none pending");
    until(&what, 3 * FOLLOWED, async || {
        let mut agreed: Option<ContextInfo> = None;
        for node in nodes {
            let info = context_on(cluster, node.number, context).await.ok()?;
            check_settled(&info).ok()?;
            if let Some(other) = &agreed
                && versions(other) != versions(&info)
            {
                return None;
            }
            agreed = Some(info);
        }
        agreed
    })
    .await
}

/// Versions that were made and not given up.
pub(crate) fn made(info: &ContextInfo) -> usize {
    info.versions.len() - in_state(info, KeyState::Abandoned).len()
}
