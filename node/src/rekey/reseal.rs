//! Records that are sealed under the former replication key, sealed anew under the cluster's: a part of them at a time.
//! What is sealed never leaves a token unwrapped; this changes the outer seal alone. Every record is opened first, so that
//! one that was altered is named here and not made good.

use hsm_core::replication::{ClusterKey, GrantContext, SealError, SealedKeyContext};
use raft_store::command::{ResealKeys, ResealedGrant, ResealedKey};
use raft_store::state::context::{KeyVersion, VersionKey};
use raft_store::state::replication::{GrantKey, ReplicationKeyId};
use raft_store::state::slot::{Grant, Grantee};
use raft_store::state::{ClusterMeta, ClusterState};
use sha2::{Digest, Sha256};

use crate::sync::convert::{to_token_key, to_token_transport};

/// Bytes of records in one command: with one more record as large as any it still is one.
const BYTES: usize = 24 << 10;
/// Records in one command.
const RECORDS: usize = 128;

/// What one command takes, and what stands in its way.
#[derive(Debug, Default)]
pub struct Batch {
    /// The command.
    pub op: ResealKeys,
    /// Records that cannot be opened, with the reason.
    pub problems: Vec<String>,
}

impl Batch {
    fn is_full(&self) -> bool {
        let keys = self.op.keys.iter().map(|key| key.sealed_key.len());
        let grants = self.op.grants.iter().map(|grant| grant.blob.len());
        let bytes: usize = keys.chain(grants).sum();
        bytes >= BYTES || self.op.keys.len() + self.op.grants.len() >= RECORDS
    }
}

/// The two keys.
#[derive(Clone, Copy)]
pub struct Keys<'a> {
    /// The cluster's.
    pub present: &'a ClusterKey,
    /// The one before.
    pub former: &'a ClusterKey,
}

/// The next records.
#[must_use]
pub fn batch(state: &ClusterState, meta: &ClusterMeta, keys: Keys<'_>) -> Batch {
    let former: ReplicationKeyId = keys.former.trk_id();
    let mut batch = Batch::default();
    for (key, version) in state.keys_sealed_under(former) {
        match reseal_key(meta, keys, key, version) {
            Ok(Some(resealed)) => batch.op.keys.push(resealed),
            Ok(None) => {}
            Err(error) => {
                let (context, version) = (&key.context, key.version);
                batch
                    .problems
                    .push(format!("{context} version {version}: {error}"));
            }
        }
        if batch.is_full() {
            return batch;
        }
    }
    for of in state.grants_sealed_under(former) {
        let why = match reseal_grant(state, meta, keys, &of) {
            Ok(Some(resealed)) => {
                batch.op.grants.push(resealed);
                None
            }
            // It would be proposed again and again to do nothing.
            Ok(None) => Some("its node has no key for the slot".to_owned()),
            Err(error) => Some(error.to_string()),
        };
        if let Some(why) = why {
            let GrantKey { slot, id, node } = &of;
            let problem = format!("slot {slot}: transport key {id} as granted to node {node}: {why}");
            batch.problems.push(problem);
        }
        if batch.is_full() {
            return batch;
        }
    }
    batch
}

fn reseal_key(
    meta: &ClusterMeta,
    keys: Keys<'_>,
    key: &VersionKey,
    version: &KeyVersion,
) -> Result<Option<ResealedKey>, SealError> {
    let Some(material) = &version.material else {
        return Ok(None);
    };
    let context = SealedKeyContext {
        cluster_id: meta.cluster_id.0,
        slot: version.slot.as_str(),
        context: key.context.as_str(),
        version: key.version,
        key_uid: to_token_key(version.key_uid),
        transport_id: to_token_transport(material.transport_id),
        check_record: &material.check_record,
    };
    let wrapped = keys.former.open_key(&context, &material.sealed_key)?;
    let sealed_key = keys.present.seal_key(&context, &wrapped)?;
    same(
        "sealed key",
        &keys.present.open_key(&context, &sealed_key)?,
        &wrapped,
    )?;
    Ok(Some(ResealedKey {
        context: key.context.clone(),
        version: key.version,
        replaces: Sha256::digest(&material.sealed_key).into(),
        sealed_key,
    }))
}

fn reseal_grant(
    state: &ClusterState,
    meta: &ClusterMeta,
    keys: Keys<'_>,
    of: &GrantKey,
) -> Result<Option<ResealedGrant>, SealError> {
    let slot = state.slots().get(&of.slot);
    let generation = slot.and_then(|slot| slot.transport(of.id));
    let grant: Option<&Grant> = generation.and_then(|it| it.grants.get(&Grantee::Node(of.node)));
    let node = state.nodes().get(&of.node);
    let own = node.and_then(|node| node.slot_keys.get(&of.slot));
    let (Some(grant), Some(own)) = (grant, own) else {
        return Ok(None);
    };
    let context = GrantContext {
        cluster_id: meta.cluster_id.0,
        epoch: grant.epoch,
        slot: of.slot.as_str(),
        transport_id: to_token_transport(of.id),
        raft_id: of.node,
        spki_sha256: Sha256::digest(&own.spki).into(),
    };
    let wrapped = keys.former.open_grant(&context, &grant.blob)?;
    let blob = keys.present.seal_grant(&context, &wrapped)?;
    same("grant", &keys.present.open_grant(&context, &blob)?, &wrapped)?;
    Ok(Some(ResealedGrant {
        slot: of.slot.clone(),
        id: of.id,
        node: of.node,
        replaces: Sha256::digest(&grant.blob).into(),
        blob,
    }))
}

/// A new record is opened once before it takes the place of the old one, which is nowhere any more with the entry: of a
/// version that no other token has it is all that there is.
fn same(what: &'static str, opened: &[u8], wrapped: &[u8]) -> Result<(), SealError> {
    if opened == wrapped {
        Ok(())
    } else {
        Err(SealError::Altered { what })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::collections::BTreeMap;

    use hsm_core::replication::ReplicationKey;
    use raft_store::command::{AddTransportKey, CreateContext, Op, PrepareVersion};
    use raft_store::names::{ContextUid, KeyUid, TransportId};
    use raft_store::state::context::{BindingMode, KeyMaterial, RotationPolicy};
    use raft_store::state::slot::TransportMode;

    use super::*;
    use crate::rotation::testing::{World, context, replication_key, slot};

    const WRAPPED: [u8; 40] = [7; 40];
    const SPKI: &[u8] = &[1];

    fn cluster_key(key: &ReplicationKey, meta: &ClusterMeta) -> ClusterKey {
        key.for_cluster(&meta.cluster_id.0)
    }

    fn new_key() -> ReplicationKey {
        ReplicationKey::parse(&"cd".repeat(32)).unwrap()
    }

    fn sealed_for(number: u32) -> SealedKeyContext<'static> {
        SealedKeyContext {
            cluster_id: [1; 16],
            slot: "t",
            context: "d",
            version: number,
            key_uid: hsm_core::names::KeyUid::from_bytes([u8::try_from(number).unwrap(); 16]),
            transport_id: hsm_core::names::TransportId::from_bytes([5; 16]),
            check_record: b"check record",
        }
    }

    fn granted_to(node: u64) -> GrantContext<'static> {
        GrantContext {
            cluster_id: [1; 16],
            epoch: 1,
            slot: "t",
            transport_id: hsm_core::names::TransportId::from_bytes([5; 16]),
            raft_id: node,
            spki_sha256: Sha256::digest(SPKI).into(),
        }
    }

    /// Slot `t` with a transport key that is granted to node 1, and versions of `d` in it, all sealed as a node does.
    fn world(versions: u32) -> World {
        let mut world = World::new(1);
        let meta = world.state.meta().unwrap().clone();
        let old = cluster_key(&replication_key(), &meta);
        let blob = old.seal_grant(&granted_to(1), &[9; 384]).unwrap();
        let op = AddTransportKey {
            slot: slot("t"),
            id: TransportId([5; 16]),
            expected_generation: 0,
            mode: TransportMode::Standard,
            check: vec![7; 40],
            grants: BTreeMap::from([(Grantee::Node(1), Grant { epoch: 1, blob })]),
        };
        world.ok(Op::AddTransportKey(op));
        world.ok(Op::CreateContext(CreateContext {
            name: context("d"),
            uid: ContextUid([2; 16]),
            slot: slot("t"),
            binding: BindingMode::Shared,
            policy: RotationPolicy::default(),
        }));
        world.slot_keys(1);
        for version in 1..=versions {
            world.ok(Op::PrepareVersion(PrepareVersion {
                context: context("d"),
                expected_highest: version - 1,
                version,
                key_uid: KeyUid([u8::try_from(version).unwrap(); 16]),
                label: format!("kek-d-v{version}"),
                material: KeyMaterial {
                    transport_id: TransportId([5; 16]),
                    sealed_key: old.seal_key(&sealed_for(version), &WRAPPED).unwrap(),
                    check_record: b"check record".to_vec(),
                },
            }));
            world.activate("d", version);
        }
        world.rekey_replication(cluster_key(&new_key(), &meta).trk_id());
        world
    }

    /// Seals everything anew; how many commands that took, and what stood in the way at the end.
    fn reseal(world: &mut World) -> (usize, Vec<String>) {
        let meta = world.state.meta().unwrap().clone();
        let (present, former) = (
            cluster_key(&new_key(), &meta),
            cluster_key(&replication_key(), &meta),
        );
        let keys = Keys {
            present: &present,
            former: &former,
        };
        let mut commands = 0;
        loop {
            let Batch { op, problems } = batch(&world.state, &meta, keys);
            if op.keys.is_empty() && op.grants.is_empty() {
                return (commands, problems);
            }
            assert!(commands < 100, "it comes to no end");
            commands += 1;
            world.ok(Op::ResealKeys(op));
        }
    }

    #[test]
    fn what_was_sealed_under_the_former_key_opens_with_the_new_one_as_it_was() {
        let mut world = world(3);
        assert_eq!(reseal(&mut world), (1, Vec::new()));
        let meta = world.state.meta().unwrap().clone();
        let new = cluster_key(&new_key(), &meta);
        for (number, version) in world.state.versions_of(&context("d")) {
            let record = &version.material.as_ref().unwrap().sealed_key;
            let wrapped = new.open_key(&sealed_for(number), record).unwrap();
            assert_eq!(*wrapped, WRAPPED);
        }
        let slots = world.state.slots();
        let generation = slots
            .get(&slot("t"))
            .unwrap()
            .current_transport()
            .unwrap()
            .clone();
        let grant = &generation.grants[&Grantee::Node(1)];
        assert_eq!(*new.open_grant(&granted_to(1), &grant.blob).unwrap(), [9; 384]);
        assert!(
            world.state.replication().unwrap().former.is_none(),
            "it is retired"
        );
    }

    #[test]
    fn many_records_are_sealed_in_commands_that_fit() {
        let mut world = world(200);
        let (commands, problems) = reseal(&mut world);
        assert!(commands >= 2 && problems.is_empty(), "{commands} {problems:?}");
        assert!(world.state.replication().unwrap().former.is_none());
        for op in &world.log {
            assert!(
                raft_store::codec::encode(op).unwrap().len() < 64 << 10,
                "{}",
                op.name()
            );
        }
    }

    #[test]
    fn a_grant_that_nobody_can_seal_anew_is_named_and_nothing_is_proposed() {
        let mut world = World::new(2);
        let meta = world.state.meta().unwrap().clone();
        let node = *world.voters.last().unwrap();
        let old = cluster_key(&replication_key(), &meta);
        let blob = old.seal_grant(&granted_to(node), &[9; 384]).unwrap();
        world.ok(Op::AddTransportKey(AddTransportKey {
            slot: slot("t"),
            id: TransportId([5; 16]),
            expected_generation: 0,
            mode: TransportMode::Standard,
            check: vec![7; 40],
            grants: BTreeMap::from([(Grantee::Node(node), Grant { epoch: 1, blob })]),
        }));
        world.rekey_replication(cluster_key(&new_key(), &meta).trk_id());
        let (commands, problems) = reseal(&mut world);
        assert_eq!((commands, problems.len()), (0, 1));
        assert!(
            problems[0].contains(&format!("node {node}: its node has no key")),
            "{problems:?}"
        );
    }

    #[test]
    fn what_does_not_open_to_what_was_sealed_takes_no_records_place() {
        same("sealed key", &WRAPPED, &WRAPPED).unwrap();
        let other = [&WRAPPED[1..], &[8]].concat();
        let error = same("sealed key", &other, &WRAPPED).unwrap_err();
        assert!(
            matches!(error, SealError::Altered { what: "sealed key" }),
            "{error}"
        );
    }

    #[test]
    fn a_record_that_was_altered_is_named_and_keeps_the_former_key_in_use() {
        let mut world = World::new(1);
        let meta = world.state.meta().unwrap().clone();
        let mut record = b"HSK1".to_vec();
        record.extend(meta.trk_id);
        record.extend([5; 80]);
        let Op::PrepareVersion(mut op) = crate::rotation::testing::prepare("c", 0, 1) else {
            panic!()
        };
        op.material.sealed_key = record;
        world.ok(Op::PrepareVersion(op));
        world.activate("c", 1);
        world.rekey_replication(cluster_key(&new_key(), &meta).trk_id());
        let (commands, problems) = reseal(&mut world);
        assert_eq!((commands, problems.len()), (0, 1));
        assert!(problems[0].starts_with("c version 1: "), "{problems:?}");
        assert!(world.state.replication().unwrap().former.is_some());
    }
}
