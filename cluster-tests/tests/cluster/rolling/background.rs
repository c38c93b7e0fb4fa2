//! What administrators do while nodes are restarted and removed, each of which has to come to something: through the balancers,
//! and each call is sent once.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster_tests::Playground;
use cluster_tests::once::Balancer;
use hsm_api::admin::{JoinTokenRequest, RevocationMatch, RevokeRequest, UnrevokeRequest};
use hsm_api::client::Retry;
use hsm_api::{Client, ClientError, ErrorCode};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::common::CONTEXT;

/// For a change that is repeated, at the nodes themselves, while a leader of an earlier release stops: that one hands over last, and
/// what it has in hand may end with an unknown outcome.
const PATIENT: Duration = Duration::from_secs(60);
/// For the answer to a call that is sent once: longer than a node looks for a leader.
const ANSWERED: Duration = Duration::from_secs(20);
/// Of this context nobody encrypts meanwhile: its first version is disabled again and again.
const UNUSED: &str = "2fa";

/// What happens to the nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Restarts,
    Removals,
    Over,
}

/// How many calls were answered well.
#[derive(Clone, Copy, Debug, Default)]
struct Calls {
    all: u64,
    /// Of them, begun while nodes left.
    in_removals: u64,
}

/// Changes and reads, until they are stopped.
pub(super) struct Background {
    stage: watch::Sender<Stage>,
    tasks: Vec<(Act, JoinHandle<Result<Calls>>)>,
}

impl Background {
    /// Of these balancers only those count behind which an administrator is taken for one: TLS passes through.
    pub(super) async fn start(
        cluster: &Playground,
        balancers: &[Balancer],
        earlier_release: bool,
        pause: Duration,
    ) -> Result<Self> {
        let patient = cluster.client("admin")?.with_retry(Retry::Until(PATIENT));
        // Its first version only decrypts from now on.
        patient.rotate(UNUSED, None).await?;
        let mut admins = Vec::new();
        for balancer in balancers.iter().filter(|balancer| balancer.passes_through) {
            let pki = cluster.pki();
            let endpoint = format!("https://127.0.0.1:{}", balancer.port);
            let who = pki.identity("admin")?;
            admins.push(pki.client_waiting(ANSWERED, true, Some(&who), &[endpoint])?);
        }
        if earlier_release {
            admins = vec![patient];
        }
        let (stage, stages) = watch::channel(Stage::Restarts);
        let start = |act: Act, admin: &Client, pause| {
            let again = act.again(admin.clone(), pause, stages.clone());
            (act, tokio::spawn(again))
        };
        let (first, last) = (admins.first(), admins.last());
        let (first, last) = first.zip(last).context("no balancer passes TLS through")?;
        // Two of these would take back each other's.
        let mut tasks = vec![start(Act::Revoke, first, pause), start(Act::Disable, last, pause)];
        for admin in &admins {
            tasks.push(start(Act::Rotate, admin, pause));
            tasks.push(start(Act::Admit, admin, pause));
            tasks.push(start(Act::Look, admin, pause / 4));
        }
        Ok(Self { stage, tasks })
    }

    /// From now on nodes leave. A removal replaces keys, by which a rotation may be refused.
    pub(super) fn nodes_leave(&self) {
        self.stage.send_replace(Stage::Removals);
    }

    /// How many calls there were.
    pub(super) async fn stop(self) -> Result<u64> {
        let removals = self.stage.send_replace(Stage::Over) == Stage::Removals;
        let mut all = 0;
        for (act, task) in self.tasks {
            let calls = task.await?.with_context(|| format!("{act:?}"))?;
            ensure!(
                calls.all > 0 && (calls.in_removals > 0 || !removals),
                "{act:?}: nothing happened meanwhile: {calls:?}"
            );
            all += calls.all;
        }
        Ok(all)
    }
}

/// What an administrator does again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    Rotate,
    /// Somebody whom nobody knows, and taken back.
    Revoke,
    /// A version that only decrypts, and puts it back into use.
    Disable,
    /// A node that will not come: a join token.
    Admit,
    /// At keys, their use as the nodes report it, rules and members.
    Look,
}

impl Act {
    /// Gives how many calls it was.
    async fn once(self, admin: &Client) -> Result<u64, ClientError> {
        match self {
            Self::Rotate => {
                admin.rotate(CONTEXT, None).await?;
                Ok(1)
            }
            Self::Revoke => {
                let what = Some(RevocationMatch {
                    cn: Some("nobody-at-all".to_owned()),
                    ..RevocationMatch::default()
                });
                let request = RevokeRequest {
                    what: what.clone(),
                    certificate: None,
                    reason: "a change".to_owned(),
                };
                admin.revoke(&request).await?;
                let certificate = None;
                admin.unrevoke(&UnrevokeRequest { what, certificate }).await?;
                Ok(2)
            }
            Self::Disable => {
                admin.disable_key(UNUSED, 1, None).await?;
                admin.enable_key(UNUSED, 1, None).await?;
                Ok(2)
            }
            Self::Admit => {
                let request = JoinTokenRequest {
                    // Open tokens are limited.
                    ttl_seconds: Some(1),
                    node_id: None,
                };
                admin.create_join_token(&request).await?;
                Ok(1)
            }
            Self::Look => {
                admin.list_keks().await?;
                admin.key_usage().await?;
                admin.acl().await?;
                admin.members().await?;
                Ok(4)
            }
        }
    }

    async fn again(self, admin: Client, pause: Duration, stages: watch::Receiver<Stage>) -> Result<Calls> {
        let mut calls = Calls::default();
        loop {
            let stage = *stages.borrow();
            if stage == Stage::Over {
                return Ok(calls);
            }
            let done = self.once(&admin).await;
            let nodes_leave = stage == Stage::Removals || *stages.borrow() == Stage::Removals;
            let done = match done {
                Err(error) if nodes_leave && self.gives_way(&error) => 0,
                done => done?,
            };
            calls.all += done;
            if stage == Stage::Removals {
                calls.in_removals += done;
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Whether it was refused because another change of the same keys was on its way. Where nodes leave that is the one by
    /// which their keys are replaced.
    fn gives_way(self, error: &ClientError) -> bool {
        self == Self::Rotate && error.code() == Some(ErrorCode::Conflict)
    }
}
