//! The first start on version 1's token: the keys that `hsm.metadata_file` names become versions that decrypt, and each
//! context gets one that encrypts. All of them or none: a key that is lost in silence is found out by whoever needs it.
//! The file is read once and never written; a start that is cut off is gone on with by the next.

mod compare;
mod course;
mod list;
mod marker;

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use hsm_core::{AdoptKek, Slot};
use raft_store::command::{AdoptVersion, CreateContext, Op, Origin};
use raft_store::names::{ContextName, ContextUid, KeyUid, RaftId, SlotName};
use raft_store::state::ClusterState;
use raft_store::state::context::{KeyVersion, RotationPolicy, VersionState};
use raft_store::storage::Published;
use sha2::{Digest, Sha256};
use tokio::time::Instant;

use self::compare::{absent, check, check_again, labels, unadopted, unlisted};
use self::course::{Before, Course, course};
use self::list::{Wanted, WantedKey, digest_of, parse, read, wanted};
use self::marker::Marker;
use super::StartFailure;
use crate::clock;
use crate::config::{Config, Hsm, Mode};
use crate::rotation::cluster::{Waited, wait_leading};
use crate::rotation::plan::{Asked, Wish};
use crate::rotation::{Cluster, Rotator, reach};
use crate::slots::SlotManager;
use crate::sync::convert::to_token_key;

/// For everything together; a token that is slow makes a key pair and a transport key first.
const WITHIN: Duration = Duration::from_secs(120);
/// Between looks at who leads: an election of one takes 0.3 s.
const LOOK: Duration = Duration::from_millis(20);
/// Version 1's list where its configuration names none, in the working directory.
const DEFAULT_LIST: &str = "metadata.yaml";

/// What is to be adopted.
pub(super) struct V1Keys {
    slot: SlotName,
    token: Slot,
    contexts: Vec<Wanted>,
    marker: Marker,
}

/// Reads the list if the next start would, as far as that goes without the token and the state. `founded`: the node
/// belongs to a cluster.
///
/// # Errors
/// When it cannot be what version 1 wrote, and, before there is a cluster, when it cannot be seen to whom a context was
/// bound.
pub(super) fn check_list(config: &Config, founded: bool) -> Result<(), StartFailure> {
    let hsm = &config.hsm;
    if !hsm.legacy || is_cluster(config) {
        return Ok(());
    }
    let path = place_of_list(hsm);
    let before = Before::of(&Marker::of(&config.data_dir), founded);
    let list = before.list(hsm)?;
    // A start without its token comes to the same, or waits for it.
    match course(&before, list, Some(())) {
        Course::Changed(_) => {
            has_changed(path);
            Ok(())
        }
        // To whom its contexts are bound the state says by now.
        Course::Compare(text, ()) if founded => parse(path, &text).map(|_| ()),
        Course::Compare(text, ()) => wanted(path, &text, hsm, &ClusterState::default()).map(|_| ()),
        Course::Unlisted(()) if hsm.metadata_file.is_some() => {
            let path = path.display();
            tracing::warn!("configuration: hsm.metadata_file: {path} is not there");
            Ok(())
        }
        Course::Done | Course::Wait | Course::Unseen | Course::Unlisted(()) => Ok(()),
    }
}

/// Whether the node is one of a cluster, where no start reads a list.
fn is_cluster(config: &Config) -> bool {
    let is_cluster = config.cluster.mode != Mode::Standalone;
    if is_cluster && config.hsm.metadata_file.is_some() {
        tracing::warn!(
            "configuration: hsm.metadata_file: read by a standalone node only; in a cluster: \
             hsmctl key adopt --metadata-file"
        );
    }
    is_cluster
}

fn has_changed(path: &Path) {
    tracing::warn!(
        path = %path.display(),
        "configuration: hsm.metadata_file has changed since its keys were adopted, and is not read again; \
         adopt what is new with: hsmctl key adopt --metadata-file"
    );
}

impl Before {
    fn of(marker: &Marker, founded: bool) -> Self {
        Self {
            noted: marker.read(),
            founded,
            begun: marker.is_begun(),
        }
    }

    /// The list, if it is read and there is one.
    fn list(&self, hsm: &Hsm) -> Result<Option<String>, StartFailure> {
        if self.reads(hsm.metadata_file.is_some()) {
            read(place_of_list(hsm))
        } else {
            Ok(None)
        }
    }
}

/// Where version 1 looks for its list.
fn place_of_list(hsm: &Hsm) -> &Path {
    hsm.metadata_file.as_deref().unwrap_or(Path::new(DEFAULT_LIST))
}

impl V1Keys {
    /// Reads the list and finds its keys in the token; `None` if there is nothing to adopt, or it was done before.
    /// Changes nothing. Blocks.
    ///
    /// # Errors
    /// When the list cannot be what version 1 wrote, when a key is not there, cannot be adopted or is not in the list,
    /// and when the token cannot be looked into before all of them are adopted.
    pub(super) fn find(
        config: &Config,
        slots: &SlotManager,
        state: &ClusterState,
    ) -> Result<Option<Self>, StartFailure> {
        let hsm = &config.hsm;
        let (true, Some(place)) = (hsm.legacy, hsm.slots.first()) else {
            return Ok(None);
        };
        if is_cluster(config) {
            return Ok(None);
        }
        let path = place_of_list(hsm);
        let marker = Marker::of(&config.data_dir);
        let token = slots.get(place.name.as_str()).and_then(|entry| entry.handle());
        let before = Before::of(&marker, state.meta().is_some());
        let list = before.list(hsm)?;
        match course(&before, list, token) {
            Course::Done => Ok(None),
            Course::Changed(token) => {
                if let Some(labels) = token.and_then(|token| seen(&token)) {
                    check_again(path, &labels, state)?;
                }
                has_changed(path);
                Ok(None)
            }
            Course::Wait => Err(StartFailure::Adopting(format!(
                "slot {} is not open, so that nobody can see whether its token has them",
                place.name
            ))),
            Course::Unseen => {
                tracing::warn!(slot = %place.name, "keys of version 1 are not looked for: the slot is not open");
                Ok(None)
            }
            Course::Unlisted(token) => {
                let labelled = if before.is_open() {
                    labels(&token)?
                } else {
                    seen(&token).unwrap_or_default()
                };
                let left = unadopted(&labelled, state);
                match &hsm.metadata_file {
                    Some(path) => absent(path, &left).map(|()| None),
                    None => unlisted(&left, before.founded).map(|()| None),
                }
            }
            Course::Compare(text, token) => {
                let contexts = wanted(path, &text, hsm, state)?;
                let contexts = check(path, &place.label, &token, state, contexts)?;
                Ok(Some(Self {
                    slot: place.name.clone(),
                    token,
                    contexts,
                    marker: marker.with(digest_of(&text), path),
                }))
            }
        }
    }

    /// Notes that they are being adopted: to be called before anything is changed, and before there is a cluster.
    ///
    /// # Errors
    /// When the data folder does not take it; a start that is cut off would not be gone on with.
    pub(super) fn begin(&self) -> Result<(), StartFailure> {
        self.marker.begin().map_err(|error| {
            let path = self.marker.path().display();
            StartFailure::Adopting(format!("beside {path} it cannot be noted that they are: {error}"))
        })
    }

    /// Adopts them, and waits until this node has proven each. Goes on where an earlier start was cut off.
    ///
    /// # Errors
    /// Whatever keeps a key from being adopted now.
    pub(super) async fn adopt(
        self,
        cluster: &dyn Cluster,
        rotator: &Rotator,
        config: &Config,
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
        // Every check record before the first entry: a key that cannot be used is found before anything is changed.
        let mut found = Vec::with_capacity(self.contexts.len());
        for context in &self.contexts {
            let published = cluster.published();
            let versions = self.records(&published.state, context, me).await?;
            found.push((context, versions));
        }
        for (context, versions) in found {
            self.adopt_context(cluster, rotator, config, (context, versions), me, deadline)
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
        reach("v1_keys::before_marker").await;
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

    /// What is still to be adopted of a context, with check records.
    async fn records(
        &self,
        state: &ClusterState,
        context: &Wanted,
        me: RaftId,
    ) -> Result<Vec<AdoptVersion>, StartFailure> {
        let mut versions = Vec::new();
        for key in &context.versions {
            if known(state, &context.name, &key.label).is_some() {
                continue;
            }
            let made = self.found(context, key, me).await;
            versions.push(made.map_err(|why| failed(&context.name, &key.label, &why))?);
        }
        Ok(versions)
    }

    async fn adopt_context(
        &self,
        cluster: &dyn Cluster,
        rotator: &Rotator,
        config: &Config,
        (context, versions): (&Wanted, Vec<AdoptVersion>),
        me: RaftId,
        deadline: Instant,
    ) -> Result<(), StartFailure> {
        let name = &context.name;
        if !cluster.published().state.contexts().contains(name) {
            let policy = config.policy_of(name);
            let op = Op::CreateContext(CreateContext {
                name: name.clone(),
                uid: ContextUid(clock::random_id()),
                slot: self.slot.clone(),
                binding: context.binding,
                policy: RotationPolicy {
                    interval_days: context.interval_days.unwrap_or(policy.interval_days),
                    ..policy
                },
            });
            let made = cluster.propose_as_leader(op).await;
            made.map_err(|error| failed(name, "make the context", &error.to_string()))?;
        }
        for op in versions {
            let (version, label) = (op.version, op.label.clone());
            let made = cluster.propose_as_leader(Op::AdoptVersion(op)).await;
            made.map_err(|error| failed(name, &label, &error.to_string()))?;
            let epoch = crate::logging::epoch();
            tracing::info!(
                target: "audit", epoch, action = "key.adopt", context = %name, version,
                label = label.as_str(), "key of version 1 adopted"
            );
            reach("v1_keys::after_version").await;
        }
        let active = {
            let published = cluster.published();
            let known = published.state.contexts().get(name);
            known.and_then(|known| known.active_version)
        };
        if active.is_none() {
            let wish = Wish::Create {
                label: None,
                version: None,
            };
            let made = rotator
                .make(name, &wish, &asked(name, context.floor, me), deadline)
                .await;
            let made =
                made.map_err(|error| failed(name, "make the version that encrypts", &error.to_string()))?;
            tracing::info!(context = %name, version = made.version, "a fresh version encrypts");
        }
        Ok(())
    }

    /// The key's check record, made in the token.
    async fn found(&self, context: &Wanted, key: &WantedKey, holder: RaftId) -> Result<AdoptVersion, String> {
        let key_uid = KeyUid(clock::random_id());
        let kek = AdoptKek {
            key_uid: to_token_key(key_uid),
            version: key.number,
            context: context.name.to_string(),
            label: key.label.clone(),
        };
        let (token, id) = (self.token.clone(), key.id.clone());
        let record = tokio::task::spawn_blocking(move || token.v1_check_record(&kek, id.as_deref())).await;
        let check_record = record
            .map_err(|error| error.to_string())?
            .map_err(|error| error.to_string())?;
        Ok(AdoptVersion {
            context: context.name.clone(),
            version: key.number,
            key_uid,
            label: key.label.clone(),
            slot: self.slot.clone(),
            check_record,
            holder,
            floor: context.floor,
            created_at: key.created_at,
        })
    }
}

/// The token's labels, as far as it can be looked into: a node that has run before starts without its token too.
fn seen(token: &Slot) -> Option<BTreeSet<String>> {
    match labels(token) {
        Ok(labels) => Some(labels),
        Err(error) => {
            tracing::warn!(%error, "keys of version 1 are not looked for");
            None
        }
    }
}

fn failed(context: &ContextName, what: &str, why: &str) -> StartFailure {
    StartFailure::Adopting(format!("{context}: {what}: {why}"))
}

/// The request that makes the first version that encrypts: the same at each start, so that it finds the one that an
/// earlier start has made.
fn asked(context: &ContextName, floor: u32, me: RaftId) -> Asked {
    let operation = format!("adopt-v1 {context}");
    Asked {
        principal: Sha256::digest(b"hsm/v1-keys/v1").into(),
        body_hash: Sha256::digest(operation.as_bytes()).into(),
        operation,
        key: format!("after v{floor}"),
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
    // One that was started again has to be elected first.
    let led = |published: &Published| cluster.leadership().and_then(|_| check(published));
    loop {
        match wait_leading(cluster, deadline, &led).await {
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

/// The version of a label, unless it was given back: one that was adopted before, or one that was made here, whose
/// list somebody has put in the place of version 1's.
fn known<'s>(state: &'s ClusterState, context: &ContextName, label: &str) -> Option<&'s KeyVersion> {
    let mut versions = state.versions_of(context).map(|(_, version)| version);
    versions.find(|version| version.label == label && version.state != VersionState::Abandoned)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::rotation::testing::World;

    #[test]
    fn a_version_that_was_given_back_does_not_stand_for_its_label() {
        let mut world = World::new(1);
        world.context("a", "s");
        world.prepare("a");
        let name = ContextName::new("a").unwrap();
        let label = world.state.version(&name, 1).unwrap().label.clone();
        assert!(known(&world.state, &name, &label).is_some());
        world.abandon("a", 1);
        assert!(known(&world.state, &name, &label).is_none());
    }
}
