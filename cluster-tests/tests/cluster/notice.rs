//! The time in which balancers come to know that a node leaves: it is a learner that still has the log, and may be kept.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cluster_tests::{Node, Playground, Stalls, until};
use hsm_api::admin::{MemberRole, RemovalState, RemoveNodeRequest, RemoveNodeResponse};
use hsm_api::client::{Answer, Retry};
use hsm_api::{ClientError, ErrorCode};
use nix::sys::wait::WaitStatus;
use tokio::task::JoinHandle;

use crate::common::{CONTEXT, formed_with, open, seal_under};
use crate::members::{SOON, check_voters, members};

/// `server.drain.notice_ms` of these nodes. All that is done while a node leaves has to be done within it.
const NOTICE: Duration = Duration::from_secs(6);
/// After it the leader goes on with the log for so long (`docs/operations.md`).
const HEARD_AND_CLOSED: Duration = Duration::from_millis(700);
/// Longer than that, and a time may have been over before anybody looked.
const STOOD_STILL: Duration = Duration::from_millis(400);
/// How a node ends that was removed: `docs/operations.md`.
const REMOVED: i32 = 78;

type Removing = JoinHandle<Result<Answer<RemoveNodeResponse>, ClientError>>;

/// Three nodes, of which a follower leaves.
struct Scene {
    cluster: Playground,
    leads: Node,
    leaves: Node,
    /// Whom administrators ask.
    asked: Node,
}

impl Scene {
    async fn new() -> Result<Self> {
        let cluster = formed_with(Playground::builder(), |config| {
            config.replace("notice_ms: 500", &format!("notice_ms: {}", NOTICE.as_millis()))
        })
        .await?;
        let leads = cluster.node(cluster.leader().await?.node);
        let mut others = cluster.others(leads.number).into_iter();
        let (Some(leaves), Some(asked)) = (others.next(), others.next()) else {
            anyhow::bail!("not three nodes");
        };
        Ok(Self {
            cluster,
            leads,
            leaves,
            asked,
        })
    }

    /// Begins it, and comes back once the node votes no more and says that it is not ready.
    async fn leave(&self, key: &'static str) -> Result<Removing> {
        let said = self.leaves.log().len();
        let client = self.cluster.client_on("admin", self.asked.number)?;
        let id = self.leaves.id();
        let removing = tokio::spawn(async move {
            let request = RemoveNodeRequest::default();
            client.remove_node(&id, &request, Some(key)).await
        });
        until("a learner that drains", SOON, async || {
            let all = members(&self.cluster, std::slice::from_ref(&self.leads))
                .await
                .ok()?;
            let node = all
                .members
                .into_iter()
                .find(|one| one.node_id == self.leaves.id())?;
            let log = self.leaves.log();
            let said = log.get(said..).unwrap_or_default();
            let leaves = node.role == MemberRole::Learner && node.leaving.is_some();
            (leaves && said.contains("draining connections") && !self.leaves.is_ready().await).then_some(())
        })
        .await?;
        Ok(removing)
    }

    /// What is encrypted meanwhile, under a version made meanwhile, the node that leaves opens.
    async fn serves_what_is_new(&self) -> Result<()> {
        let admin = self.cluster.client_on("admin", self.asked.number)?;
        let newest = admin
            .with_retry(Retry::Until(NOTICE))
            .rotate(CONTEXT, None)
            .await?
            .version;
        let trading = self.cluster.client_on("trading-1", self.asked.number)?;
        let sealed = seal_under(&trading, CONTEXT, b"while one leaves", newest).await?;
        let mut last = None;
        let opened = until("a decryption by who leaves", NOTICE, async || {
            let client = self.cluster.client_on("trading-1", self.leaves.number).ok()?;
            match open(&client, CONTEXT, &sealed).await {
                Ok(()) => Some(()),
                Err(error) => {
                    last = Some(error);
                    None
                }
            }
        })
        .await;
        opened.with_context(|| format!("version {newest}: {last:?}"))
    }

    async fn is_kept(&self) -> Result<()> {
        let id = self.leaves.id();
        let removing = self.leave("and-stays").await?;
        let kept = self
            .cluster
            .hsmctl(&["cluster", "remove", &id, "--cancel"])
            .await?;
        kept.ok().context("it was not kept")?;
        let told = removing.await?;
        let code = told.as_ref().err().and_then(ClientError::code);
        ensure!(code == Some(ErrorCode::Conflict), "{told:?}");
        let ended = self.leaves.wait_ended(SOON).await?;
        ensure!(
            matches!(ended, WaitStatus::Exited(_, 0)),
            "it was kept, and ended with {ended:?}"
        );
        let log = self.leaves.log();
        ensure!(log.contains("start it again"), "it does not say what to do");
        self.cluster.start_node(self.leaves.number).await?;
        self.leaves.wait_ready(SOON).await?;
        check_voters(&self.cluster, &self.cluster.nodes()).await
    }

    async fn goes(&self) -> Result<()> {
        let begun = Instant::now();
        let removing = self.leave("and-goes").await?;
        self.serves_what_is_new().await?;
        let gone = removing.await??.into_body();
        ensure!(gone.state == RemovalState::Removed, "{gone:?}");
        // Whoever leads when it is asked begins to count after that.
        let took = begun.elapsed();
        ensure!(took >= NOTICE + HEARD_AND_CLOSED, "buried after {took:?}");
        let ended = self.leaves.wait_ended(SOON).await?;
        ensure!(
            matches!(ended, WaitStatus::Exited(_, REMOVED)),
            "it was removed, and ended with {ended:?}"
        );
        let left = self.cluster.others(self.leaves.number);
        check_voters(&self.cluster, &left).await?;
        let admin = self.cluster.client_on("admin", self.asked.number)?;
        admin.with_retry(Retry::Until(SOON)).rotate(CONTEXT, None).await?;
        Ok(())
    }
}

async fn shown() -> Result<()> {
    let scene = Scene::new().await?;
    scene.is_kept().await.context("kept")?;
    scene.goes().await.context("removed")?;
    scene.cluster.passed();
    Ok(())
}

pub(crate) async fn a_node_that_leaves_serves_until_balancers_know_and_may_be_kept_until_then() -> Result<()>
{
    // Nodes become this process's children, which may then ask how they ended.
    nix::sys::prctl::set_child_subreaper(true)?;
    let (stalls, begun) = (Stalls::watch()?, Instant::now());
    match shown().await {
        Err(error) if stalls.between(begun, Instant::now()) > STOOD_STILL => {
            println!("once more: {error:#}");
            shown().await
        }
        ended => ended,
    }
}
