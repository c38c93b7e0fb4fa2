//! What of `acl.revoked_file` is to be added to the cluster still, and how often that is asked for.

use std::collections::BTreeMap;
use std::time::Duration;

use hsm_api::ErrorCode;
use raft_store::state::access::RevocationKey;
use tokio::time::Instant;

use super::{AGAIN, Entry};
use crate::admin::access::{MAX_KEPT, revocations};
use crate::admin::audit::plain;
use crate::admin::call::CallError;
use crate::admin::seeding::{add_missing, missing};
use crate::rotation::cluster::Cluster;

/// Before what was refused is asked for again, unless the file changes: there may be room by then, or another leader.
const REFUSED_AGAIN: Duration = Duration::from_secs(600);
/// How long this node's state may take to hold everything that was committed before.
const CATCH_UP: Duration = Duration::from_secs(5);

/// What stands in the file, or stood there, and is to be added still. An entry that was there at a look is added even
/// if the file is gone by the time that there is a leader, but not if a newer text of it lacks the entry.
#[derive(Default)]
pub(super) struct Pending {
    pub(super) entries: BTreeMap<RevocationKey, String>,
    /// Refused as they are, and not asked for before then: that may be an entry of the log each time.
    pub(super) held_until: Option<Instant>,
    /// That they were not added is said; it is said once until they are, or the file has changed.
    told: bool,
}

impl Pending {
    /// The file has changed. What still stands in a text is taken again, and in a file that is gone nothing does; but what
    /// was refused must not keep out what comes.
    pub(super) fn anew(&mut self, is_gone: bool) {
        if !is_gone || self.held_until.is_some() {
            self.entries.clear();
        }
        (self.held_until, self.told) = (None, false);
    }

    pub(super) fn is_held(&self) -> bool {
        self.held_until.is_some_and(|until| Instant::now() < until)
    }

    pub(super) fn take(&mut self, lacking: Vec<Entry>) {
        for (key, reason) in lacking {
            if self.entries.len() >= MAX_KEPT {
                return;
            }
            self.entries.entry(key).or_insert(reason);
        }
    }

    /// Has the cluster add them. False: it is to be tried again soon.
    pub(super) async fn add(&mut self, cluster: &dyn Cluster) -> bool {
        let wanted: Vec<Entry> = self.entries.iter().map(|(k, r)| (k.clone(), r.clone())).collect();
        match add(cluster, &wanted).await {
            Ok(added) => {
                *self = Self::default();
                if let Some((first, _)) = added.first() {
                    tracing::info!(
                        target: "audit", epoch = crate::logging::epoch(),
                        added = added.len(),
                        first = plain(&revocations::text(first)),
                        "revocations of this node's configuration added"
                    );
                }
                true
            }
            Err(error) => {
                let CallError { code, detail } = &error;
                let refused = matches!(code, ErrorCode::InvalidArgument | ErrorCode::AccessDenied);
                self.held_until = refused.then(|| Instant::now() + REFUSED_AGAIN);
                let again = if refused { REFUSED_AGAIN } else { AGAIN };
                // These end by themselves, or another leader takes over.
                let waits = matches!(
                    code,
                    ErrorCode::NotLeader
                        | ErrorCode::NoQuorum
                        | ErrorCode::NodeDraining
                        | ErrorCode::OutcomeUnknown
                );
                if !std::mem::replace(&mut self.told, true) {
                    if waits {
                        tracing::info!(detail, "revocations of this node's configuration wait");
                    } else {
                        tracing::error!(
                            target: "audit", epoch = crate::logging::epoch(),
                            detail,
                            again_s = again.as_secs_f64(),
                            "revocations of this node's configuration not added"
                        );
                    }
                }
                refused
            }
        }
    }
}

/// Adds what the state lacks of `wanted`, and returns that.
async fn add(cluster: &dyn Cluster, wanted: &[Entry]) -> Result<Vec<Entry>, CallError> {
    // What only seems to be missing would become entries of the log.
    catch_up(cluster).await?;
    let lacking = missing(wanted, &cluster.published().state);
    add_missing(cluster, &lacking).await?;
    Ok(lacking)
}

/// Makes sure that this node's state holds everything committed before.
async fn catch_up(cluster: &dyn Cluster) -> Result<(), CallError> {
    let index = cluster.read_index().await?;
    let mut applied = cluster.applied();
    let reached = applied.wait_for(|applied| *applied >= index);
    let reached = tokio::time::timeout(CATCH_UP, reached).await;
    if reached.is_ok_and(|reached| reached.is_ok()) {
        return Ok(());
    }
    let detail = format!("this node has not applied index {index} in time");
    Err(CallError::new(ErrorCode::NotReady, detail))
}
