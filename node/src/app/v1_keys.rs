//! The first start on version 1's token: the keys that `hsm.metadata_file` names become versions that decrypt, and each
//! context gets one that encrypts. All of them or none: a key that is lost in silence is found out by whoever needs it.
//! The file is read once and never written; a start that is cut off is gone on with by the next.

mod list;
mod marker;

use std::path::Path;
use std::time::Duration;

use hsm_core::{AdoptKek, Slot};
use raft_store::command::{AdoptVersion, CreateContext, Op, Origin};
use raft_store::names::{ContextName, ContextUid, KeyUid, RaftId, SlotName};
use raft_store::state::ClusterState;
use raft_store::state::context::{KeyVersion, RotationPolicy};
use raft_store::storage::Published;
use sha2::{Digest, Sha256};
use tokio::time::Instant;

use self::list::{Wanted, digest_of, read, wanted};
use self::marker::Marker;
use super::StartFailure;
use crate::clock;
use crate::config::{Config, Mode};
use crate::rotation::cluster::{Waited, wait_leading};
use crate::rotation::plan::{Asked, Wish};
use crate::rotation::{Cluster, Rotator};
use crate::slots::SlotManager;
use crate::sync::convert::{to_state_binding, to_token_key};

/// For everything together; a token that is slow makes a key pair and a transport key first.
const WITHIN: Duration = Duration::from_secs(120);
/// Between looks at who leads: an election of one takes 0.3 s.
const LOOK: Duration = Duration::from_millis(20);
/// Keys named one by one in a message.
const NAMED: usize = 20;

/// What is to be adopted.
pub(super) struct V1Keys {
    slot: SlotName,
    token: Slot,
    contexts: Vec<Wanted>,
    marker: Marker,
}

impl V1Keys {
    /// Reads the file and finds its keys in the token; `None` if there is nothing to adopt, or it was done before.
    /// Changes nothing. Blocks.
    ///
    /// # Errors
    /// When the file cannot be what version 1 wrote, and when a key is not there, or cannot be adopted.
    pub(super) fn find(
        config: &Config,
        slots: &SlotManager,
        state: &ClusterState,
    ) -> Result<Option<Self>, StartFailure> {
        let hsm = &config.hsm;
        let (true, Some(place)) = (hsm.legacy, hsm.slots.first()) else {
            return Ok(None);
        };
        if config.cluster.mode != Mode::Standalone {
            if hsm.metadata_file.is_some() {
                tracing::warn!(
                    "configuration: hsm.metadata_file: read by a standalone node only; in a cluster: \
                     hsmctl key adopt --metadata-file"
                );
            }
            return Ok(None);
        }
        let token = slots.get(place.name.as_str()).and_then(|entry| entry.handle());
        let Some(token) = token else {
            tracing::warn!(slot = %place.name, "keys of version 1 are not looked for: the slot is not open");
            return Ok(None);
        };
        let Some(path) = &hsm.metadata_file else {
            let left = unadopted(&token, state)?;
            if !left.is_empty() {
                tracing::warn!(
                    keys = some_of(&left),
                    "the token holds keys that version 1 made, and hsm.metadata_file names no list of them; they are \
                     of no use until they are adopted: hsmctl key adopt --context CONTEXT --label LABEL"
                );
            }
            return Ok(None);
        };
        let marker = Marker::of(&config.data_dir);
        let text = read(path)?;
        match (marker.read(), text) {
            (Some(digest), Some(text)) if digest != digest_of(&text) => {
                tracing::warn!(
                    path = %path.display(),
                    "configuration: hsm.metadata_file has changed since its keys were adopted, and is not read again; \
                     adopt what is new with: hsmctl key adopt --metadata-file"
                );
                Ok(None)
            }
            (Some(_), _) => Ok(None),
            (None, None) => absent(path, &unadopted(&token, state)?),
            (None, Some(text)) => {
                let contexts = wanted(path, &text, hsm)?;
                check(path, &place.label, &token, state, &contexts)?;
                Ok(Some(Self {
                    slot: place.name.clone(),
                    token,
                    contexts,
                    marker: marker.with(digest_of(&text), path),
                }))
            }
        }
    }

    /// Adopts them, and waits until this node has proven each. Goes on where an earlier start was cut off.
    ///
    /// # Errors
    /// Whatever keeps a key from being adopted now.
    pub(super) async fn adopt(
        self,
        cluster: &dyn Cluster,
        rotator: &Rotator,
        policy: &RotationPolicy,
    ) -> Result<(), StartFailure> {
        let deadline = Instant::now() + WITHIN;
        let transport = |published: &Published| {
            let slot = published.state.slots().get(&self.slot)?;
            slot.current_transport().map(|_| ())
        };
        until(cluster, deadline, "its token has no transport key yet", transport).await?;
        let me = cluster
            .raft_id()
            .ok_or_else(|| StartFailure::Adopting("this node has no identity yet".to_owned()))?;
        for context in &self.contexts {
            self.adopt_context(cluster, rotator, policy, context, me, deadline)
                .await?;
        }
        for context in &self.contexts {
            let proven = |published: &Published| {
                let mut mine = adopted_of(&published.state, &context.name);
                mine.all(|(_, version)| !version.state.is_readable() || version.acks.contains(&me))
                    .then_some(())
            };
            until(cluster, deadline, "the token does not prove them", proven).await?;
        }
        // Without it the next start would only look again.
        if let Err(error) = self.marker.write() {
            tracing::warn!(path = %self.marker.path().display(), %error, "cannot note that version 1's keys were adopted");
        }
        let contexts = self.contexts.len();
        tracing::info!(
            contexts,
            "the keys of version 1 are adopted; hsm.metadata_file is not read any more"
        );
        Ok(())
    }

    async fn adopt_context(
        &self,
        cluster: &dyn Cluster,
        rotator: &Rotator,
        policy: &RotationPolicy,
        context: &Wanted,
        me: RaftId,
        deadline: Instant,
    ) -> Result<(), StartFailure> {
        let failed =
            |what: &str, why: String| StartFailure::Adopting(format!("{}: {what}: {why}", context.name));
        if !cluster.published().state.contexts().contains(&context.name) {
            let op = Op::CreateContext(CreateContext {
                name: context.name.clone(),
                uid: ContextUid(clock::random_id()),
                slot: self.slot.clone(),
                binding: to_state_binding(context.binding),
                policy: RotationPolicy {
                    interval_days: context.interval_days.unwrap_or(policy.interval_days),
                    ..policy.clone()
                },
            });
            let made = cluster.propose_as_leader(op).await;
            made.map_err(|error| failed("make the context", error.to_string()))?;
        }
        for (number, label) in &context.versions {
            if known(&cluster.published().state, &context.name, label).is_some() {
                continue;
            }
            let op = self
                .found(context, *number, label, me)
                .await
                .map_err(|why| failed(label, why))?;
            let made = cluster.propose_as_leader(op).await;
            made.map_err(|error| failed(label, error.to_string()))?;
            let (epoch, name) = (crate::logging::epoch(), &context.name);
            tracing::info!(
                target: "audit", epoch, action = "key.adopt", context = %name, version = *number,
                label = label.as_str(), "key of version 1 adopted"
            );
        }
        let (active, highest) = {
            let published = cluster.published();
            let known = published.state.contexts().get(&context.name);
            known.map_or((None, 0), |known| (known.active_version, known.highest_version))
        };
        if active.is_none() {
            let wish = Wish::Create {
                label: None,
                version: None,
            };
            let asked = asked(&context.name, highest, me);
            let made = rotator.make(&context.name, &wish, &asked, deadline).await;
            let made = made.map_err(|error| failed("make the version that encrypts", error.to_string()))?;
            tracing::info!(context = %context.name, version = made.version, "a fresh version encrypts");
        }
        Ok(())
    }

    /// The key's check record, made in the token.
    async fn found(&self, context: &Wanted, version: u32, label: &str, holder: RaftId) -> Result<Op, String> {
        let key_uid = KeyUid(clock::random_id());
        let kek = AdoptKek {
            key_uid: to_token_key(key_uid),
            version,
            context: context.name.to_string(),
            label: label.to_owned(),
        };
        let token = self.token.clone();
        let record = tokio::task::spawn_blocking(move || token.v1_check_record(&kek)).await;
        let check_record = record
            .map_err(|error| error.to_string())?
            .map_err(|error| error.to_string())?;
        Ok(Op::AdoptVersion(AdoptVersion {
            context: context.name.clone(),
            version,
            key_uid,
            label: label.to_owned(),
            check_record,
            holder,
        }))
    }
}

/// The request that makes the first version that encrypts, the same at each start.
fn asked(context: &ContextName, highest: u32, me: RaftId) -> Asked {
    let operation = format!("adopt-v1 {context}");
    Asked {
        principal: Sha256::digest(b"hsm/v1-keys/v1").into(),
        body_hash: Sha256::digest(operation.as_bytes()).into(),
        operation,
        key: format!("after v{highest}"),
        origin: Origin::Node(me),
    }
}

/// Waits until this node leads and `check` finds what it looks for.
async fn until(
    cluster: &dyn Cluster,
    deadline: Instant,
    otherwise: &str,
    check: impl Fn(&Published) -> Option<()> + Send + Sync,
) -> Result<(), StartFailure> {
    loop {
        match wait_leading(cluster, deadline, &check).await {
            Waited::Met(()) => return Ok(()),
            Waited::LostLead if Instant::now() < deadline => tokio::time::sleep(LOOK).await,
            Waited::LostLead | Waited::Late => return Err(StartFailure::Adopting(otherwise.to_owned())),
        }
    }
}

fn adopted_of<'s>(
    state: &'s ClusterState,
    context: &ContextName,
) -> impl Iterator<Item = (u32, &'s KeyVersion)> {
    let versions = state.versions_of(context);
    versions.filter(|(_, version)| version.origin.is_adopted())
}

/// The version of a label, whatever has become of it: one that was adopted before, or one that was made here, whose
/// list somebody has put in the place of version 1's.
fn known<'s>(state: &'s ClusterState, context: &ContextName, label: &str) -> Option<&'s KeyVersion> {
    let mut versions = state.versions_of(context).map(|(_, version)| version);
    versions.find(|version| version.label == label)
}

/// Without the file nobody knows what was version 1's, unless its keys are there to see.
fn absent(path: &Path, left: &[String]) -> Result<Option<V1Keys>, StartFailure> {
    let shown = path.display();
    if left.is_empty() {
        tracing::warn!(
            "configuration: hsm.metadata_file: {shown} is not there; no key of version 1 is adopted"
        );
        return Ok(None);
    }
    Err(StartFailure::V1Keys(format!(
        "{shown} is not there, and the token holds keys that version 1 made ({}), which nothing could be decrypted \
         with: bring the file back; or take hsm.metadata_file out of the configuration and adopt the keys with \
         hsmctl key adopt once the node runs",
        some_of(left)
    )))
}

/// Labels in the token that look like version 1's and that no version has.
fn unadopted(token: &Slot, state: &ClusterState) -> Result<Vec<String>, StartFailure> {
    let objects = token
        .objects()
        .map_err(|error| StartFailure::V1Keys(format!("the token cannot be looked into: {error}")))?;
    let labels = objects.labelled.into_iter();
    Ok(labels
        .filter(|label| is_v1s(label) && !state.label_taken(label))
        .collect())
}

/// `kek-<context>-v<N>`.
fn is_v1s(label: &str) -> bool {
    label
        .strip_prefix("kek-")
        .and_then(|rest| rest.rsplit_once("-v"))
        .is_some_and(|(context, digits)| {
            !context.is_empty() && !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
        })
}

fn some_of(labels: &[String]) -> String {
    let mut shown = labels.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
    if labels.len() > NAMED {
        shown.push_str(&format!(" and {} more", labels.len() - NAMED));
    }
    shown
}

/// Finds every key that is still to be adopted.
fn check(
    path: &Path,
    token_label: &str,
    token: &Slot,
    state: &ClusterState,
    contexts: &[Wanted],
) -> Result<(), StartFailure> {
    let mut wrong = Vec::new();
    for context in contexts {
        for (number, label) in &context.versions {
            let name = &context.name;
            if let Some(version) = known(state, name, label) {
                if !version.origin.is_adopted() {
                    tracing::warn!(context = %name, label, "hsm.metadata_file: the key was made here, not by version 1");
                }
                continue;
            }
            let taken = state.version(name, *number).map(|version| version.label.clone());
            let problem = match taken {
                Some(other) => Some(format!("version {number} of {name} is {other} already")),
                None if state.label_taken(label) => Some("its label is another version's already".to_owned()),
                None => token.examine_v1_key(label).err().map(|error| error.to_string()),
            };
            wrong.extend(problem.map(|why| format!("{label} (version {number} of {name}): {why}")));
        }
    }
    if wrong.is_empty() {
        return Ok(());
    }
    let (shown, count) = (path.display(), wrong.len());
    let list = wrong.into_iter().take(NAMED).collect::<Vec<_>>().join("; ");
    Err(StartFailure::V1Keys(format!(
        "{shown} names {count} keys that cannot be adopted from the token {token_label:?}, and what was encrypted under \
         them could not be decrypted: {list}. Nothing was changed. Put the token in place that version 1 used \
         (hsm.slot_id, SOFTHSM2_CONF); or take those versions out of the file whose data nobody needs any more"
    )))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_gone_while_its_keys_are_there_keeps_the_node_from_starting() {
        let path = Path::new("m.yaml");
        assert!(absent(path, &[]).unwrap().is_none());
        let many: Vec<String> = (1..=NAMED + 2).map(|number| format!("kek-c-v{number}")).collect();
        let Err(error) = absent(path, &many) else { panic!() };
        let error = error.to_string();
        assert!(
            error.contains("kek-c-v1, ") && error.contains("and 2 more"),
            "{error}"
        );
        assert!(error.contains("hsmctl key adopt"), "{error}");
    }

    #[test]
    fn version_1s_labels_are_told_from_others() {
        for label in ["kek-exchange-key-v1", "kek-a-v1-v22"] {
            assert!(is_v1s(label), "{label}");
        }
        for label in [
            "kek--v1",
            "kek-a",
            "kek-a-v",
            "kek-a-vx",
            "other",
            "adopted:kek-a-v1",
        ] {
            assert!(!is_v1s(label), "{label}");
        }
    }
}
