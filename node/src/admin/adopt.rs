//! Keys that version 1 made, on the leader: the node that was asked has found them in its token and made their check
//! records; here they become versions, and their context gets one that encrypts. A repeat finds what was done before,
//! by its id and by the labels, so that it goes on where the first attempt stopped.

use std::time::Duration;

use hsm_api::ErrorCode;
use hsm_api::admin::{AdoptKeysResponse, AdoptedVersion};
use raft_store::command::{AdoptVersion, Op, Outcome};
use raft_store::names::{ContextName, KeyUid, RaftId, SlotName, UnixMillis};
use raft_store::state::ClusterState;
use raft_store::state::context::{BindingMode, KeyVersion, VersionState};
use raft_store::state::requests::Seen;
use raft_store::storage::Published;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::call::CallError;
use super::service::AdminService;
use super::views;
use crate::rotation::cluster::{Waited, wait_leading};
use crate::rotation::plan::{Asked, Wish};
use crate::rotation::reach;

/// How long the answer waits for the node that was asked to hold what it has found.
const PROVEN_WITHIN: Duration = Duration::from_secs(5);

/// Keys to be adopted, as the node that was asked sends them to the leader.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdoptOrder {
    /// The context.
    pub context: ContextName,
    /// The slot whose token holds them.
    pub slot: SlotName,
    /// The binding mode of the context.
    pub binding: BindingMode,
    /// The highest number that a label of version 1's form has in the token; 0: none has.
    pub floor: u32,
    /// The keys.
    pub keys: Vec<FoundKey>,
}

/// A key that a node has found in its token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundKey {
    /// Its label.
    pub label: String,
    /// The number it gets.
    pub version: u32,
    /// The id of its copies, fresh and random.
    pub key_uid: KeyUid,
    /// Made under it; empty where the node knows that it was adopted before.
    pub check_record: Vec<u8>,
    /// When version 1 made it, if that is known.
    pub created_at: Option<UnixMillis>,
}

impl AdoptOrder {
    /// What it acts on, for the audit.
    pub(super) fn target(&self) -> String {
        let keys: Vec<String> = self.keys.iter().map(|key| format!("v{}", key.version)).collect();
        format!("{}/{}", self.context, keys.join(","))
    }
}

/// The version that this label was adopted as. One that was released is none.
pub(super) fn adopted<'s>(
    state: &'s ClusterState,
    context: &ContextName,
    label: &str,
) -> Option<(u32, &'s KeyVersion)> {
    state.versions_of(context).find(|(_, version)| {
        let stands = version.state != VersionState::Abandoned;
        version.origin.is_adopted() && stands && version.label == label
    })
}

/// Whether a key can be adopted under this label and number, as far as the state says.
///
/// # Errors
/// `already_exists`, with what is in the way.
pub(super) fn check_free(
    state: &ClusterState,
    context: &ContextName,
    version: u32,
    label: &str,
) -> Result<(), CallError> {
    let exists = |detail: String| Err(CallError::new(ErrorCode::AlreadyExists, detail));
    if let Some(known) = state.version(context, version) {
        return exists(format!(
            "version {version} of {context} exists already: {} ({}); adopt the key {label:?} under another number",
            known.label,
            known.state.as_str()
        ));
    }
    if state.label_taken(label) {
        return exists(format!(
            "label {label:?} is another version's; no two have one label, because ciphertexts name their key by it"
        ));
    }
    Ok(())
}

/// Whether a version that was adopted before still is what is asked for.
///
/// # Errors
/// `conflict` if it is on its way to its end, or over.
pub(super) fn check_alive(context: &ContextName, number: u32, version: &KeyVersion) -> Result<(), CallError> {
    match version.state {
        VersionState::DestroyScheduled | VersionState::Destroying | VersionState::Destroyed => {
            let (label, state) = (&version.label, version.state.as_str());
            let detail =
                format!("the key {label:?} was adopted as version {number} of {context}, which is {state}");
            Err(CallError::new(ErrorCode::Conflict, detail))
        }
        _ => Ok(()),
    }
}

/// The refusal of a binding that is not the context's.
pub(super) fn other_binding(context: &ContextName, is: BindingMode, asked: BindingMode) -> CallError {
    let (is, asked) = (views::binding(is), views::binding(asked));
    CallError::new(
        ErrorCode::Conflict,
        format!(
            "the ciphertexts of {context} are bound in mode {is}, for good, and not {asked}; nothing that version 1 bound \
             otherwise could be decrypted there: adopt its keys under a new context"
        ),
    )
}

impl AdminService {
    /// Adopts the keys that `holder` has found, and makes a version that encrypts if there is none.
    pub(super) async fn adopt(
        &self,
        order: &AdoptOrder,
        asked: &Asked,
        holder: RaftId,
        deadline: Instant,
    ) -> Result<AdoptKeysResponse, CallError> {
        let (cluster, context) = (&*self.parts.cluster, &order.context);
        let known = cluster.published().state.contexts().get(context).cloned();
        match known {
            Some(known) if known.binding != order.binding => {
                return Err(other_binding(context, known.binding, order.binding));
            }
            Some(_) => {}
            None => {
                self.place_context(context, &order.slot, order.binding, asked)
                    .await?;
            }
        }
        let mut versions = Vec::with_capacity(order.keys.len());
        for key in &order.keys {
            versions.push(self.adopt_one(order, key, asked, holder).await?);
            reach("adopt::after_version").await;
        }
        let active_version = self.encrypting(context, asked, deadline).await?;
        let patience = deadline.min(Instant::now() + PROVEN_WITHIN);
        for version in &mut versions {
            version.proven = self.proven(context, version.version, holder, patience).await;
        }
        Ok(AdoptKeysResponse {
            context: context.to_string(),
            slot: order.slot.to_string(),
            binding: views::binding(order.binding),
            dry_run: false,
            versions,
            skipped: Vec::new(),
            active_version,
        })
    }

    async fn adopt_one(
        &self,
        order: &AdoptOrder,
        key: &FoundKey,
        asked: &Asked,
        holder: RaftId,
    ) -> Result<AdoptedVersion, CallError> {
        let (cluster, context) = (&*self.parts.cluster, &order.context);
        let published = cluster.published();
        let id = asked.side_id(&format!("adopt {}", key.label));
        // A repeat is told the same as the first time.
        let mine = matches!(
            published.state.requests().look_up(&id, &asked.body_hash),
            Seen::Repeat(Outcome::Done(_))
        );
        let done = |version, new| AdoptedVersion {
            version,
            key_id: key.label.clone(),
            new,
            proven: false,
        };
        if let Some((number, version)) = adopted(&published.state, context, &key.label) {
            check_alive(context, number, version)?;
            if version.slot != order.slot && !mine {
                let (label, slot) = (&key.label, &version.slot);
                let detail = format!(
                    "the key {label:?} was adopted as version {number} of {context} from slot {slot}, not {}; no two \
                     versions have one label, because ciphertexts name their key by it",
                    order.slot
                );
                return Err(CallError::new(ErrorCode::AlreadyExists, detail));
            }
            return Ok(done(number, mine));
        }
        if key.check_record.is_empty() {
            let detail = "the node that was asked does not know yet what became of these keys; ask again";
            return Err(CallError::new(ErrorCode::NotReady, detail));
        }
        check_free(&published.state, context, key.version, &key.label)?;
        let op = Op::AdoptVersion(AdoptVersion {
            context: context.clone(),
            version: key.version,
            key_uid: key.key_uid,
            label: key.label.clone(),
            slot: order.slot.clone(),
            check_record: key.check_record.clone(),
            holder,
            floor: order.floor,
            created_at: key.created_at,
        });
        cluster
            .propose(id, asked.body_hash, asked.origin.clone(), op)
            .await?;
        tracing::info!(%context, version = key.version, label = key.label.as_str(), "key of version 1 adopted");
        Ok(done(key.version, true))
    }

    /// The version that encrypts; a fresh one if there is none. What was adopted never does.
    async fn encrypting(
        &self,
        context: &ContextName,
        asked: &Asked,
        deadline: Instant,
    ) -> Result<Option<u32>, CallError> {
        let active = |published: &Published| {
            let context = published.state.contexts().get(context);
            context.and_then(|context| context.active_version)
        };
        if let Some(active) = active(&self.parts.cluster.published()) {
            return Ok(Some(active));
        }
        let fresh = Asked {
            operation: format!("{} @fresh", asked.operation),
            ..asked.clone()
        };
        let wish = Wish::Create {
            label: None,
            version: None,
        };
        let made = self.parts.rotator.make(context, &wish, &fresh, deadline).await;
        let made = made.map_err(|error| {
            // Something was done, so nothing may say that nothing was.
            let code = match error.code {
                ErrorCode::NoQuorum | ErrorCode::NotLeader | ErrorCode::NodeDraining => ErrorCode::OutcomeUnknown,
                code => code,
            };
            let detail = format!(
                "the keys are adopted, and {context} has no version that encrypts yet ({}); ask again with the same \
                 Idempotency-Key, or: hsmctl create-kek --context {context}",
                error.detail
            );
            CallError::new(code, detail)
        })?;
        Ok(Some(made.version))
    }

    /// Waits until the node that has found a key has acknowledged to hold its copy.
    async fn proven(&self, context: &ContextName, number: u32, holder: RaftId, deadline: Instant) -> bool {
        let acknowledged = |published: &Published| {
            let version = published.state.version(context, number)?;
            version.acks.contains(&holder).then_some(())
        };
        let waited = wait_leading(&*self.parts.cluster, deadline, acknowledged).await;
        waited == Waited::Met(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
#[path = "adopt_tests.rs"]
mod tests;
