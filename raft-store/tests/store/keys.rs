//! A cluster of three and the lives of its keys, as the entries that its nodes propose: no token, no network.

use std::collections::{BTreeMap, BTreeSet};

use openraft::{EntryPayload, Membership};
use raft_store::command::*;
use raft_store::names::*;
use raft_store::state::FEATURE_LEVEL;
use raft_store::state::context::{BindingMode, KeyMaterial, RotationPolicy, VersionState};
use raft_store::state::node::{NodeReport, SlotKey};
use raft_store::state::slot::{Grant, Grantee, TransportMode};
use raft_store::{Entry, MemberNode};

use crate::common::{command, log_id};

/// Versions that can be used at a time: the active one and those that still decrypt.
const KEPT: u32 = 3;
const TRANSPORT: TransportId = TransportId([1; 16]);
/// What a token's wrapped key takes once it is sealed, and a check record.
const SEALED: usize = 110;
const RECORD: usize = 64;
/// A usual lease.
const LEASED: u64 = 1 << 16;

fn slot() -> SlotName {
    SlotName::new("s").unwrap()
}

fn context() -> ContextName {
    ContextName::new("exchange-key").unwrap()
}

fn uid(version: u32) -> KeyUid {
    KeyUid(u128::from(version).to_be_bytes())
}

fn admin() -> Origin {
    Origin::Admin(AdminOrigin {
        fingerprint: [1; 32],
        cn: "ann".into(),
        ou: "Admin".into(),
        serial: "0b".into(),
        issuer: "CN=ca".into(),
        via_node: 1,
        evidence: None,
    })
}

/// None of them was refused.
pub(crate) fn all_done(outcomes: &[Outcome]) {
    for outcome in outcomes {
        assert!(!matches!(outcome, Outcome::Refused(_)), "{outcome:?}");
    }
}

/// The log of a founded cluster, from an index on. Node 1 leads, in term 1.
pub(crate) struct Keys {
    next: u64,
    nodes: Vec<RaftId>,
    highest: u32,
}

impl Keys {
    /// From this index on.
    pub(crate) fn starting_at(next: u64) -> Self {
        Self {
            next,
            nodes: vec![1],
            highest: 0,
        }
    }

    fn by(&mut self, origin: Origin, op: Op) -> Entry {
        let mut entry = command(1, self.next, op);
        if let EntryPayload::Normal(command) = &mut entry.payload {
            command.origin = origin;
        }
        self.next += 1;
        entry
    }

    fn lead(&mut self, op: Op) -> Entry {
        self.by(Origin::Node(1), op)
    }

    /// Two more members, a slot, and a context in it.
    pub(crate) fn beginning(&mut self) -> Vec<Entry> {
        let mut entries = vec![
            self.lead(Op::AddTransportKey(AddTransportKey {
                slot: slot(),
                id: TRANSPORT,
                expected_generation: 0,
                mode: TransportMode::Standard,
                check: vec![1; 40],
                grants: BTreeMap::new(),
            })),
            self.lead(Op::CreateContext(CreateContext {
                name: context(),
                uid: ContextUid([1; 16]),
                slot: slot(),
                binding: BindingMode::Shared,
                policy: RotationPolicy::default(),
            })),
        ];
        for number in [2, 3] {
            entries.extend(self.join(number));
        }
        let addresses: BTreeMap<RaftId, MemberNode> =
            self.nodes.iter().map(|id| (*id, MemberNode::default())).collect();
        let voters: BTreeSet<RaftId> = self.nodes.iter().copied().collect();
        entries.push(Entry {
            log_id: log_id(1, self.next),
            payload: EntryPayload::Membership(Membership::new(vec![voters], addresses)),
        });
        self.next += 1;
        entries
    }

    fn join(&mut self, number: u8) -> Vec<Entry> {
        let token = self.next;
        let made = self.lead(Op::CreateJoinToken(CreateJoinToken {
            secret_hash: [number; 32],
            expires_at: i64::MAX,
            node: None,
        }));
        let id = self.next;
        let registered = self.lead(Op::RegisterNode(RegisterNode {
            token,
            secret_hash: [number; 32],
            name: NodeName::new(&format!("n{number}")).unwrap(),
            incarnation: Incarnation([number; 16]),
            api_address: format!("api-{number}:1"),
            cluster_address: format!("cluster-{number}:1"),
        }));
        let key = SlotKey {
            spki: vec![number; 294],
            epoch: 1,
            signature: vec![number; 70],
            signer_chain: vec![vec![number; 500]],
        };
        let named = Op::RegisterSlotKey(RegisterSlotKey {
            node: id,
            slot: slot(),
            key,
        });
        let named = self.by(Origin::Node(id), named);
        let report = NodeReport {
            seq: 1,
            incarnation: Incarnation([number; 16]),
            boot: Boot([number; 16]),
            clock: 0,
            durable_index: 1,
            proven_at: Some(1),
            feature_level: FEATURE_LEVEL,
            slots: BTreeMap::new(),
            uses: BTreeMap::new(),
        };
        let proven = self.by(Origin::Node(id), Op::ReportNode(ReportNode { node: id, report }));
        let admitted = self.lead(Op::AdmitNode(AdmitNode { node: id }));
        self.nodes.push(id);
        vec![made, registered, named, proven, admitted]
    }

    /// A new version: made, held and leased by every node, activated. With more than there may be, the oldest is
    /// destroyed, its wait over at once.
    pub(crate) fn rotation(&mut self) -> Vec<Entry> {
        let version = self.highest + 1;
        let prepare = Op::PrepareVersion(PrepareVersion {
            context: context(),
            expected_highest: self.highest,
            version,
            key_uid: uid(version),
            label: format!("kek-exchange-key-v{version}"),
            material: KeyMaterial {
                transport_id: TRANSPORT,
                sealed_key: vec![7; SEALED],
                check_record: vec![8; RECORD],
            },
        });
        self.highest = version;
        let mut entries = vec![self.lead(prepare)];
        for node in self.nodes.clone() {
            let claim = Claim {
                context: context(),
                version,
                key_uid: uid(version),
                held: true,
                seen: 0,
                count: LEASED,
            };
            let held = Op::LeaseInvocations(LeaseInvocations {
                node,
                boot: Boot([node as u8; 16]),
                claims: vec![claim],
            });
            entries.push(self.by(Origin::Node(node), held));
        }
        entries.push(self.lead(Op::ActivateVersion(ActivateVersion {
            context: context(),
            version,
            left_out: BTreeSet::new(),
        })));
        if version > KEPT {
            entries.extend(self.destruction(version - KEPT));
        }
        entries
    }

    /// A rekey of both kinds begins: node 1 has another replication key besides the cluster's, and the slot's next
    /// transport key is offered.
    pub(crate) fn replacements(&mut self) -> Vec<Entry> {
        let key = SlotKey {
            spki: vec![1; 294],
            epoch: 1,
            signature: vec![1; 70],
            signer_chain: vec![vec![1; 500]],
        };
        let held = ReportReplicationKeys {
            node: 1,
            held: BTreeSet::from([[1; 8], [2; 8]]),
        };
        let named = RegisterSlotKey {
            node: 1,
            slot: slot(),
            key,
        };
        let asked = RekeyTransport {
            slot: slot(),
            expected_generation: 1,
            give_up: None,
        };
        let grants = self.nodes.iter().map(|node| {
            let blob = vec![6; 450];
            (Grantee::Node(*node), Grant { epoch: 1, blob })
        });
        let offered = OfferTransportKey {
            slot: slot(),
            id: TransportId([2; 16]),
            expected_generation: 1,
            mode: TransportMode::Standard,
            check: vec![2; 40],
            grants: grants.collect(),
        };
        vec![
            self.lead(Op::ReportReplicationKeys(held)),
            self.lead(Op::RegisterSlotKey(named)),
            self.by(admin(), Op::RekeyTransport(asked)),
            self.lead(Op::OfferTransportKey(offered)),
        ]
    }

    fn destruction(&mut self, version: u32) -> Vec<Entry> {
        let scheduled_by = self.next;
        let schedule = Op::ScheduleDestroy(ScheduleDestroy {
            context: context(),
            version,
            expected: VersionState::DecryptOnly,
            wait_ms: LEAST_WAIT_MS,
            min_wait_ms: LEAST_WAIT_MS,
            recent_ms: 0,
            override_recent_use: true,
            short_wait_allowed: true,
        });
        let mut entries = vec![self.by(admin(), schedule)];
        let waited = SeenWait {
            context: context(),
            version,
            scheduled_by,
            elapsed_ms: 0,
        };
        entries.push(self.lead(Op::AdvanceWaits(AdvanceWaits {
            elapsed_ms: LEAST_WAIT_MS,
            expected: vec![waited],
        })));
        entries.push(self.lead(Op::BeginDestroy(BeginDestroy {
            context: context(),
            version,
        })));
        for node in self.nodes.clone() {
            let gone = Op::AckDestroyed(AckDestroyed {
                node,
                versions: vec![(context(), version, uid(version))],
            });
            entries.push(self.by(Origin::Node(node), gone));
        }
        entries
    }

    /// Versions that are to be there, by the state they have to be in.
    pub(crate) fn expected(&self) -> BTreeMap<&'static str, u32> {
        let retired = self.highest.saturating_sub(1).min(KEPT - 1);
        let destroyed = self.highest.saturating_sub(KEPT);
        let all = [("active", 1), ("decrypt_only", retired), ("destroyed", destroyed)];
        all.into_iter().filter(|(_, count)| *count > 0).collect()
    }
}
