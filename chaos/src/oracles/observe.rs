//! Asks every node for everything that the oracles need, once all is healed. What a node does not answer is noted, and is
//! never taken for an answer.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};
use cluster_tests::{Identity, Node, Pki, until};
use hsm_api::admin::{KeyState, ListKeksResponse, RevocationsPage};
use hsm_api::client::Retry;
use hsm_api::data::{DecryptBatch, DecryptRequest, ItemResult};
use hsm_api::{Base64, Client, ErrorCode};

use super::canary;
use super::observed::{ContextState, NodeView, Observed, Opened, VersionView};
use super::tokens;
use crate::cluster::Cluster;
use crate::history::{History, Kept, plaintext};
use crate::workload::{self, access};

/// A node that is busy, or has just become ready, is asked again.
const PATIENCE: Duration = Duration::from_secs(30);
/// From the end of the workload: a destruction takes half a minute and more after a change of the leader.
const QUIET: Duration = Duration::from_secs(60);
/// Items of one request.
const BATCH: usize = 100;
/// Ciphertexts that are opened on every node, of all versions together. Of each version ten all the same, if there are as many: an
/// hour makes two thousand versions, nearly all of which are destroyed and cost no call of a token.
const MOST: usize = 6000;
const LEAST: usize = 10;
/// Rounds of digests: nodes are asked one after the other, and reports go on.
const DIGEST_ROUNDS: usize = 60;
/// For a node that has been ready before; an election makes it unready for a moment.
const READY: Duration = Duration::from_secs(10);

/// Asks every member. See the module.
///
/// # Errors
/// Only what is no node's fault: the run's own files.
pub async fn observe(cluster: &Cluster, history: &History) -> Result<Observed> {
    let playground = cluster.playground();
    let pki = playground.pki();
    let kept = sampled(history);
    let mut observed = Observed::default();
    quiet(cluster, &pki).await;
    for node in cluster.nodes() {
        let mut view = NodeView {
            node: node.number,
            ready: is_ready(&node).await,
            ..NodeView::default()
        };
        if node.pid().is_none() {
            view.silent.push("its process does not run".to_owned());
        } else {
            state(&pki, &node, &mut view).await;
            if let Err(error) = open_all(&pki, &node, history, &kept, &mut view).await {
                view.silent.push(format!("decrypt: {error:#}"));
            }
        }
        for slot in tokens::SLOTS {
            match tokens::look(playground.dir(), &node, slot).await {
                Ok(token) => view.tokens.push(token),
                Err(error) => view.silent.push(format!("{error:#}")),
            }
        }
        observed.nodes.push(view);
    }
    digests(&cluster.nodes(), &mut observed.nodes).await;
    let canaries = canary::planted(playground.dir(), &history.marker)?;
    let folder = playground.dir().to_owned();
    let searched = tokio::task::spawn_blocking(move || {
        let searched = canary::search(&folder, &canaries)?;
        anyhow::Ok((searched, canary::finds(&canaries)))
    });
    let (searched, finds) = searched.await.context("the search for secrets")??;
    (observed.searched, observed.leaked, observed.search_finds) = (searched.files, searched.leaked, finds);
    Ok(observed)
}

/// Whether it is ready, or becomes so in a moment.
async fn is_ready(node: &Node) -> bool {
    let ready = until("a ready node", READY, async || {
        // One that does not run will not be.
        (node.pid().is_none() || node.is_ready().await).then_some(())
    });
    ready.await.is_ok() && node.pid().is_some()
}

/// Until no version is on its way anywhere, and all say the same, or for as long: what was asked for last goes on when its client
/// has gone. Whether it ends at all is for the oracles to say.
async fn quiet(cluster: &Cluster, pki: &Pki) {
    let Ok(admin) = pki.identity("admin") else { return };
    let mut nodes = cluster.nodes();
    nodes.retain(|node| node.pid().is_some());
    let still = until("key versions that stay as they are", QUIET, async || {
        let mut first: Option<Vec<ContextState>> = None;
        for node in &nodes {
            let client = pki.client(Some(&admin), &[node.endpoint()]).ok()?;
            let keys = contexts(client.list_keks().await.ok()?.into_body());
            if keys.iter().any(is_on_its_way) || first.as_ref().is_some_and(|first| *first != keys) {
                return None;
            }
            first = Some(keys);
        }
        Some(())
    });
    let _ = still.await;
}

fn is_on_its_way(context: &ContextState) -> bool {
    use KeyState::{DestroyScheduled, Destroying, Pending};
    let mut versions = context.versions.iter();
    versions.any(|version| matches!(version.state, Pending | DestroyScheduled | Destroying))
}

/// Every version has some, and all together are no more than can be opened in a minute or two.
fn sampled(history: &History) -> Vec<(&str, u32, &[Kept])> {
    let each = (MOST / history.versions.len().max(1)).max(LEAST);
    history
        .versions
        .iter()
        .filter(|(_, known)| !known.kept.is_empty())
        .map(|((context, version), known)| {
            let kept = &known.kept[..known.kept.len().min(each)];
            (context.as_str(), *version, kept)
        })
        .collect()
}

fn patient(pki: &Pki, who: &Identity, node: &Node) -> Result<Client> {
    let client = pki.client(Some(who), &[node.endpoint()])?;
    Ok(client.with_retry(Retry::Until(PATIENCE)))
}

async fn state(pki: &Pki, node: &Node, view: &mut NodeView) {
    let admin = match pki.identity("admin").and_then(|admin| patient(pki, &admin, node)) {
        Ok(admin) => admin,
        Err(error) => return view.silent.push(format!("{error:#}")),
    };
    match admin.list_keks().await {
        Ok(keys) => view.keys = Some(contexts(keys.into_body())),
        Err(error) => view.silent.push(format!("list keys: {error}")),
    }
    match admin.acl().await {
        Ok(acl) => view.acl = Some(access::value_of(&acl)),
        Err(error) => view.silent.push(format!("access control: {error}")),
    }
    match revoked(&admin).await {
        Ok(revoked) => view.revoked = Some(revoked),
        Err(error) => view.silent.push(format!("revocations: {error}")),
    }
}

fn contexts(keys: ListKeksResponse) -> Vec<ContextState> {
    keys.contexts
        .into_iter()
        .map(|known| ContextState {
            context: known.context,
            active: known.active_version,
            versions: known
                .versions
                .into_iter()
                .map(|version| VersionView {
                    number: version.version,
                    state: version.state,
                    activated: version.activated_at.is_some(),
                    id: version.key_uid,
                    slot: version.slot,
                })
                .collect(),
        })
        .collect()
}

async fn revoked(admin: &Client) -> Result<Vec<String>, hsm_api::ClientError> {
    let (mut names, mut page) = (Vec::new(), RevocationsPage::default());
    loop {
        let answer = admin.revocations(&page).await?.into_body();
        names.extend(answer.revocations.into_iter().filter_map(|known| known.what.cn));
        match answer.next {
            Some(next) => page.after = Some(next),
            None => return Ok(names),
        }
    }
}

async fn open_all(
    pki: &Pki,
    node: &Node,
    history: &History,
    kept: &[(&str, u32, &[Kept])],
    view: &mut NodeView,
) -> Result<()> {
    let mut clients: BTreeMap<&str, Client> = BTreeMap::new();
    for (context, version, kept) in kept {
        let who = workload::client_of(context);
        if !clients.contains_key(who) {
            clients.insert(who, patient(pki, &pki.identity(who)?, node)?);
        }
        let Some(client) = clients.get(who) else { continue };
        let mut opened = Opened {
            context: (*context).to_owned(),
            version: *version,
            right: 0,
            wrong: 0,
            refused: BTreeMap::new(),
        };
        for some in kept.chunks(BATCH) {
            open_some(client, history, some, &mut opened).await?;
        }
        view.opened.push(opened);
    }
    Ok(())
}

/// A ciphertext that is refused for now is asked for again, as a client would.
async fn open_some(client: &Client, history: &History, kept: &[Kept], opened: &mut Opened) -> Result<()> {
    let mut left: Vec<&Kept> = kept.iter().collect();
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        let items: Result<Vec<DecryptRequest>> = left
            .iter()
            .map(|kept| {
                let ciphertext: Base64 = kept.ciphertext.parse().context("a ciphertext of the history")?;
                Ok(DecryptRequest::new(opened.context.clone(), ciphertext))
            })
            .collect();
        let answer = client
            .decrypt_batch(&DecryptBatch::new(items?))
            .await?
            .into_body();
        let mut again = Vec::new();
        for (kept, item) in left.iter().zip(answer.batch) {
            match item {
                ItemResult::Ok(answer) => {
                    let wanted = plaintext(&history.marker, kept.number);
                    if answer.plaintext.as_slice() == wanted.as_bytes() {
                        opened.right += 1;
                    } else {
                        opened.wrong += 1;
                    }
                }
                ItemResult::Err(error) => {
                    let passing = error.error_code().is_some_and(ErrorCode::retryable);
                    if passing && tokio::time::Instant::now() < deadline {
                        again.push(*kept);
                    } else {
                        *opened.refused.entry(error.code).or_default() += 1;
                    }
                }
            }
        }
        if again.is_empty() {
            return Ok(());
        }
        left = again;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// A state's index and digest. Only builds with failpoints say it.
pub(super) async fn digest(node: &Node) -> Option<(u64, String)> {
    #[derive(serde::Deserialize)]
    struct StateHash {
        index: u64,
        digest: String,
    }
    let answer = node.health().get(hsm_api::paths::STATE_HASH).await.ok()?;
    let said: StateHash = serde_json::from_slice(&answer.body).ok()?;
    (said.index > 0).then_some((said.index, said.digest))
}

/// Until all that run have spoken of one index, or for as many rounds.
async fn digests(nodes: &[Node], views: &mut [NodeView]) {
    let running = nodes.iter().filter(|node| node.pid().is_some()).count();
    for _ in 0..DIGEST_ROUNDS {
        let mut indexes = Vec::new();
        for (node, view) in nodes.iter().zip(views.iter_mut()) {
            if let Some(said) = digest(node).await {
                indexes.push(said.0);
                view.digests.push(said);
            }
        }
        if indexes.len() == running && indexes.windows(2).all(|pair| pair[0] == pair[1]) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::testing::Script;
    use super::*;
    use crate::history::Version;

    #[test]
    fn every_version_is_sampled_and_the_more_there_are_the_fewer_of_each() {
        let kept = |number| Kept {
            number,
            ciphertext: String::new(),
        };
        for (versions, each) in [(10, 50), (299, 20), (599, 10), (2000, 10)] {
            let mut history = Script::default().history();
            for number in 1..=versions {
                let known = Version {
                    kept: (0..50).map(kept).collect(),
                    ..Version::default()
                };
                history.versions.insert(("c".to_owned(), number), known);
            }
            history.versions.insert(("d".to_owned(), 1), Version::default());
            let sampled = sampled(&history);
            assert_eq!(
                sampled.len(),
                versions as usize,
                "one without ciphertexts has none"
            );
            assert!(
                sampled.iter().all(|(_, _, kept)| kept.len() == each),
                "{versions}"
            );
        }
    }
}
