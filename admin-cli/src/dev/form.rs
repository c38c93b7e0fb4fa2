//! Making one cluster of the running nodes: node 1 founds it, the others join one after the other, then the
//! first keys are made. Every step looks first what is there, so that an interrupted forming continues.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use hsm_api::admin::{CreateKekRequest, JoinRequest, JoinTokenRequest, KeyState, NodeRole};
use hsm_api::client::Retry;
use hsm_api::{Client, ClientError, ErrorCode};
use tokio::time::Instant;

use super::layout::{Layout, Node};
use crate::output::note;
use crate::profile::Profile;
use crate::progress::patiently;

/// Contexts that get their first key.
const FIRST_KEYS: [&str; 2] = ["exchange-key", "2fa"];
/// One ordinary call.
const CALL: Duration = Duration::from_secs(20);
/// A joining node answers within 60 s; a second attempt fits in.
const JOIN: Duration = Duration::from_secs(120);
const KEY: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(250);

/// Makes the running nodes one cluster with its first keys.
pub(crate) async fn form(layout: &Layout, nodes: &[Node]) -> Result<()> {
    let client = administrator(layout, nodes)?;
    let mut members: Vec<&Node> = Vec::new();
    let mut outside: Vec<&Node> = Vec::new();
    for node in nodes {
        if is_member(&client, node).await? {
            members.push(node);
        } else {
            outside.push(node);
        }
    }
    if members.is_empty()
        && let Some(first) = outside.first().copied()
    {
        found(&client, first).await?;
        members.push(first);
        outside.remove(0);
    }
    for node in outside {
        join(&client, &members, node).await?;
        members.push(node);
    }
    for context in FIRST_KEYS {
        ensure_key(&client, context).await?;
    }
    Ok(())
}

/// A client that is the administrator and may ask every node.
fn administrator(layout: &Layout, nodes: &[Node]) -> Result<Client> {
    let clients = layout.pki().join("clients");
    let profile = Profile {
        endpoints: nodes.iter().map(Node::endpoint).collect(),
        ca: layout.pki().join("ca.crt"),
        cert: clients.join("admin.crt"),
        key: clients.join("admin.key"),
    };
    profile.client(CALL)
}

/// A learner is not a member yet: joining it again waits for it.
async fn is_member(client: &Client, node: &Node) -> Result<bool> {
    match client.on(&node.endpoint())?.cluster_status().await {
        Ok(answer) => Ok(!answer.cluster_id.is_empty()
            && !matches!(answer.role, NodeRole::Uninitialised | NodeRole::Learner)),
        Err(error) if error.code() == Some(ErrorCode::Uninitialised) => Ok(false),
        Err(error) => Err(error).with_context(|| format!("node {}: cluster status", node.number)),
    }
}

async fn found(client: &Client, node: &Node) -> Result<()> {
    let what = format!("node {}: makes the cluster", node.number);
    note(&what);
    let founder = client.on(&node.endpoint())?.with_retry(Retry::Until(KEY));
    match patiently(&what, founder.cluster_init()).await {
        Ok(_) => Ok(()),
        Err(error) if error.code() == Some(ErrorCode::AlreadyInitialised) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("node {}: cluster init", node.number)),
    }
}

async fn join(client: &Client, members: &[&Node], node: &Node) -> Result<()> {
    let what = format!("node {}: joins", node.number);
    note(&what);
    let joining = client.on(&node.endpoint())?.with_retry(Retry::Until(JOIN));
    let deadline = Instant::now() + JOIN;
    loop {
        let failure = match patiently(&what, join_once(client, &joining, members, node)).await {
            Ok(()) => return Ok(()),
            Err(failure) => failure,
        };
        if !is_worth_repeating(&failure) || Instant::now() >= deadline {
            return Err(failure).with_context(|| format!("node {}: cluster join", node.number));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn join_once(
    client: &Client,
    joining: &Client,
    members: &[&Node],
    node: &Node,
) -> Result<(), ClientError> {
    let token = client
        .create_join_token(&JoinTokenRequest {
            ttl_seconds: None,
            node_id: Some(node.id()),
        })
        .await?
        .into_body();
    let request = JoinRequest {
        token: token.token,
        cluster_ca_sha256: token.cluster_ca_sha256,
        leader_addresses: members.iter().map(|member| member.advertised()).collect(),
    };
    match joining.join(&request).await {
        Ok(_) => Ok(()),
        Err(error) if error.code() == Some(ErrorCode::AlreadyInitialised) => Ok(()),
        Err(error) => Err(error),
    }
}

fn is_worth_repeating(error: &ClientError) -> bool {
    if let ClientError::RefusedAfterSilence { refusal, .. } = error {
        return refusal.retryable;
    }
    error.outcome_unknown()
        || matches!(
            error,
            ClientError::Connect { .. } | ClientError::NoneAnswered { .. }
        )
        || error.api().is_some_and(|answer| answer.retryable)
}

/// What there is of a context's key.
#[derive(Debug, PartialEq, Eq)]
enum Standing {
    Active,
    /// On its way, or about to be given up.
    Pending,
    Missing,
}

async fn standing(client: &Client, context: &str) -> Result<Standing, ClientError> {
    let keks = client.list_keks().await?;
    let Some(info) = keks.contexts.iter().find(|info| info.context == context) else {
        return Ok(Standing::Missing);
    };
    if info.active_version.is_some() {
        return Ok(Standing::Active);
    }
    let pending = info
        .versions
        .iter()
        .any(|version| version.state == KeyState::Pending);
    Ok(if pending {
        Standing::Pending
    } else {
        Standing::Missing
    })
}

async fn ensure_key(client: &Client, context: &str) -> Result<()> {
    let deadline = Instant::now() + KEY;
    loop {
        let failure = match standing(client, context).await {
            Ok(Standing::Active) => return Ok(()),
            Ok(Standing::Pending) => {
                tokio::time::sleep(PAUSE).await;
                None
            }
            Ok(Standing::Missing) => {
                let what = format!("{context}: makes its first key");
                note(&what);
                let request = CreateKekRequest::new(context);
                patiently(&what, client.create_kek(&request, None)).await.err()
            }
            Err(error) => Some(error),
        };
        let refused = failure
            .as_ref()
            .and_then(ClientError::status)
            .is_some_and(|s| (400..404).contains(&s));
        if refused || Instant::now() >= deadline {
            let what = format!("{context}: create-kek");
            return match failure {
                Some(error) => Err(error).context(what),
                None => bail!("{what}: its first version is still pending after {KEY:?}"),
            };
        }
        if failure.is_some() {
            tokio::time::sleep(PAUSE).await;
        }
    }
}
