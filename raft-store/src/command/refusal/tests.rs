//! Every refusal names the thing, the value and the remedy, and nothing of its text is stored.

use super::*;
use crate::codec;

fn context() -> ContextName {
    ContextName::new("exchange-key").unwrap()
}

fn slot() -> SlotName {
    SlotName::new("exchange").unwrap()
}

fn node() -> NodeName {
    NodeName::new("hsm-node-2").unwrap()
}

fn id() -> TransportId {
    TransportId([0xab; 16])
}

fn large(what: Bounded) -> Refusal {
    let (size, most) = (70_001, 70_000);
    Invalid::TooLarge { what, size, most }.into()
}

fn says(refusal: impl Into<Refusal>, parts: &'static [&'static str]) -> (Refusal, &'static [&'static str]) {
    (refusal.into(), parts)
}

/// Each refusal, and what its text has to say.
fn refusals() -> Vec<(Refusal, &'static [&'static str])> {
    let (version, state) = (7, VersionState::DecryptOnly);
    let (holders, voters) = (2, 5);
    let label = "kek-exchange-v7".to_owned();
    vec![
        says(
            Conflict::HighestVersion {
                context: context(),
                highest: 7,
            },
            &["exchange-key", "7"],
        ),
        says(
            Conflict::Pending {
                context: context(),
                version,
            },
            &["exchange-key", "7", "pending", "wait"],
        ),
        says(
            Conflict::VersionState {
                context: context(),
                version,
                state,
            },
            &["exchange-key", "7", "decrypt_only"],
        ),
        says(
            Conflict::Holders {
                context: context(),
                version,
                holders,
                voters,
            },
            &["exchange-key", "7", "2 of 5"],
        ),
        says(
            Conflict::TransportGeneration {
                slot: slot(),
                generation: 3,
            },
            &["slot exchange", "generation 3"],
        ),
        says(
            Conflict::TransportNotCurrent {
                slot: slot(),
                id: id(),
            },
            &["slot exchange", "abab", "not the current one"],
        ),
        says(
            Conflict::NoSlotKey {
                node: node(),
                slot: slot(),
            },
            &["hsm-node-2", "slot exchange", "when its token is ready"],
        ),
        says(
            Conflict::OtherSlotKey {
                node: node(),
                slot: slot(),
            },
            &["hsm-node-2", "slot exchange", "new node_id"],
        ),
        says(
            Conflict::NodeRemoved { node: node() },
            &["hsm-node-2", "removed", "empty data_dir"],
        ),
        says(Conflict::NodeLeaves { node: node() }, &["hsm-node-2", "--cancel"]),
        says(
            Conflict::LastVoter { node: node() },
            &["hsm-node-2", "only voter", "cluster replace"],
        ),
        says(
            Conflict::SuccessorVotes { node: node() },
            &["hsm-node-2", "votes already"],
        ),
        says(
            Conflict::LastHolder {
                node: node(),
                context: context(),
                version: 3,
            },
            &["hsm-node-2", "version 3 of exchange-key", "adopt it"],
        ),
        says(
            Conflict::NotLeaving { node: node() },
            &["hsm-node-2", "not asked"],
        ),
        says(Conflict::StillVotes { node: node() }, &["hsm-node-2", "votes"]),
        says(
            Conflict::NotAcknowledged {
                node: node(),
                context: context(),
                version,
            },
            &["hsm-node-2", "exchange-key", "7", "import it first"],
        ),
        says(
            Conflict::NotProven { node: node() },
            &["hsm-node-2", "ready first"],
        ),
        says(Conflict::OpenJoinTokens { open: 256 }, &["256", "wait"]),
        says(
            Conflict::Active {
                context: context(),
                version,
            },
            &["exchange-key", "7", "active", "rotate"],
        ),
        says(
            Conflict::UsedRecently {
                context: context(),
                version,
                ago_ms: 7_200_000,
            },
            &["exchange-key", "7", "2 h ago", "override"],
        ),
        says(
            Conflict::WaitNotOver {
                context: context(),
                version,
                elapsed_ms: 90_000,
                wait_ms: 86_400_000,
            },
            &["exchange-key", "7", "90 s of 1 d", "leader"],
        ),
        says(
            Conflict::OtherWait {
                context: context(),
                version,
                scheduled_by: 17,
                elapsed_ms: 1500,
            },
            &["exchange-key", "7", "entry 17", "1500 ms"],
        ),
        says(
            Conflict::OtherAcl { digest: [0xab; 32] },
            &["access control", "abab", "read it again"],
        ),
        says(
            Conflict::NotCountedYet {
                context: context(),
                version,
                node: node(),
                counted_ms: None,
            },
            &["hsm-node-2", "exchange-key", "7", "upgrade", "override"],
        ),
        says(
            Conflict::NotCountedYet {
                context: context(),
                version,
                node: node(),
                counted_ms: Some(7_200_000),
            },
            &["hsm-node-2", "exchange-key", "7", "2 h only", "wait", "override"],
        ),
        says(
            Conflict::OwesDestruction {
                node: node(),
                context: context(),
                version,
            },
            &["hsm-node-2", "exchange-key", "7", "remove it first"],
        ),
        says(
            Conflict::NoOtherGranter {
                node: node(),
                slot: slot(),
            },
            &["hsm-node-2", "slot exchange", "no other holder"],
        ),
        says(
            Conflict::ContextSlot {
                context: context(),
                slot: slot(),
            },
            &["exchange-key", "slot exchange", "ask again"],
        ),
        says(
            Conflict::RekeyOpen { slot: slot() },
            &["slot exchange", "on its way", "rekey status"],
        ),
        says(
            Conflict::LiveTransportKeys {
                slot: slot(),
                live: 8,
            },
            &["slot exchange", "8 transport keys", "key destroy"],
        ),
        says(
            Conflict::TransportState {
                slot: slot(),
                id: id(),
                state: TransportState::Superseded,
            },
            &["slot exchange", "abab", "superseded"],
        ),
        says(
            Conflict::TransportHolders {
                slot: slot(),
                id: id(),
                holders,
                voters,
            },
            &["slot exchange", "abab", "2 of 5"],
        ),
        says(
            Conflict::TransportInUse {
                slot: slot(),
                id: id(),
                context: context(),
                version,
            },
            &["slot exchange", "abab", "exchange-key", "7", "destroyed first"],
        ),
        says(
            Conflict::ReplicationKey { current: [0xab; 8] },
            &["replication key", "abab", "look again"],
        ),
        says(Conflict::ResealOpen, &["sealed anew", "rekey status"]),
        says(
            Conflict::RetiredReplicationKey { id: [0xab; 8] },
            &["abab", "before", "a new one"],
        ),
        says(
            Conflict::LacksReplicationKey {
                node: node(),
                id: [0xab; 8],
            },
            &["hsm-node-2", "abab", "restart it"],
        ),
        says(
            Existing::Cluster(ClusterId([0xcd; 16])),
            &["cluster cdcd", "exists already"],
        ),
        says(
            Existing::Context {
                context: context(),
                slot: slot(),
            },
            &["exchange-key", "slot exchange", "another name"],
        ),
        says(Existing::TransportKey(id()), &["abab", "exists already"]),
        says(Existing::Version { label }, &["kek-exchange-v7", "another label"]),
        says(Existing::Node(node()), &["node_id hsm-node-2", "another node_id"]),
        says(Missing::Cluster, &["the cluster does not exist"]),
        says(
            Missing::Context(context()),
            &["context exchange-key does not exist"],
        ),
        says(
            Missing::Version {
                context: context(),
                version,
            },
            &["version 7 of exchange-key does not exist"],
        ),
        says(Missing::Slot(slot()), &["slot exchange does not exist"]),
        says(Missing::Node(9), &["node 9 does not exist"]),
        says(
            Missing::TransportKey {
                slot: slot(),
                id: id(),
            },
            &["abab", "slot exchange", "does not exist"],
        ),
        says(Forbidden::JoinToken, &["join token", "make a new one"]),
        says(
            Forbidden::JoinTokenOfAnother { node: node() },
            &["join token", "hsm-node-2", "make one"],
        ),
        says(Forbidden::NotItself { node: 9 }, &["node 9", "of itself"]),
        says(
            Forbidden::Incarnation { node: node() },
            &["hsm-node-2", "new node_id"],
        ),
        says(
            Forbidden::Removed { node: node() },
            &["hsm-node-2", "new node_id"],
        ),
        says(
            Forbidden::Grantor {
                slot: slot(),
                id: id(),
            },
            &["abab", "slot exchange", "a node that was granted it"],
        ),
        says(
            Forbidden::Grantee {
                slot: slot(),
                id: id(),
            },
            &["abab", "slot exchange", "only to nodes"],
        ),
        says(
            Forbidden::Operation {
                operation: "admit_node".into(),
            },
            &["admit_node", "by a node"],
        ),
        says(
            Forbidden::Driver {
                operation: "advance_waits".into(),
            },
            &["advance_waits", "the leader"],
        ),
        says(
            Forbidden::RejectedGrantor {
                slot: slot(),
                id: id(),
            },
            &["abab", "slot exchange", "another holder"],
        ),
        says(Forbidden::Revoked, &["certificate", "revoked"]),
        says(Invalid::JoinTokenExpired, &["join token", "more time"]),
        says(
            Invalid::VersionNumber {
                context: context(),
                version: 9,
                next: 7,
            },
            &["exchange-key", "version 9", "is 7"],
        ),
        says(
            Invalid::Epoch { epoch: 3, current: 2 },
            &["epoch 3", "epoch 2", "catch up"],
        ),
        says(
            Invalid::Key {
                kind: RowKind::Revocation,
            },
            &["revocation", "leave it out"],
        ),
        says(
            Invalid::Wait {
                wait_ms: 60_000,
                least_ms: 3_600_000,
                most_ms: 31_536_000_000,
            },
            &["1 min", "1 h to 365 d"],
        ),
        says(
            Invalid::Use {
                state: VersionState::Active,
            },
            &["active", "decrypt_only", "disabled"],
        ),
        says(Invalid::NoAdmin, &["nobody an administrator", "role admin"]),
        says(
            Invalid::WaitOrder {
                context: context(),
                version,
            },
            &["exchange-key", "7", "twice", "ascending"],
        ),
        says(
            large(Bounded::Row(RowKind::Slot)),
            &["70001", "70000", "row of kind slot", "transport keys"],
        ),
        says(
            large(Bounded::Row(RowKind::Node)),
            &["70001", "row of kind node", "fewer slots"],
        ),
        says(
            large(Bounded::Row(RowKind::Request)),
            &["70001", "row of kind request", "Idempotency-Key"],
        ),
        says(
            large(Bounded::Row(RowKind::Acl)),
            &["70001", "row of kind acl", "smaller"],
        ),
        says(
            large(Bounded::RowKey(RowKind::Revocation)),
            &["70001", "key of a row of kind revocation", "shorten"],
        ),
        says(large(Bounded::Label), &["70001", "label", "shorter"]),
        says(
            large(Bounded::Grant),
            &["70001", "granted transport key", "smaller slot key"],
        ),
        says(
            large(Bounded::SlotPublicKey),
            &["70001", "public key", "smaller slot key"],
        ),
        says(
            large(Bounded::SlotSignature),
            &["70001", "signature", "smaller cluster key"],
        ),
        says(large(Bounded::Certificates), &["70001 certificates", "leave out"]),
        says(
            large(Bounded::CertificateBytes),
            &["70001 bytes", "certificate chain", "leave out"],
        ),
        says(large(Bounded::SlotKeys), &["70001 slots", "fewer slots"]),
        says(large(Bounded::Address), &["70001", "address", "host:port"]),
        says(large(Bounded::Uses), &["70001 versions", "report", "next"]),
        says(large(Bounded::Advance), &["70001 milliseconds", "smaller steps"]),
        says(large(Bounded::UseCount), &["70001 uses", "report", "next"]),
        says(large(Bounded::Claims), &["70001 versions", "invocations", "next"]),
        says(large(Bounded::Invocations), &["70001 invocations", "write less"]),
        says(
            large(Bounded::Revocations),
            &["70001 revoked certificates", "unrevoke"],
        ),
        says(
            large(Bounded::ReplicationKeys),
            &["70001 replication keys", "the one before"],
        ),
        says(Refusal::KeyReused, &["idempotency key", "take a new one"]),
        says(Refusal::KeyExpired, &["idempotency key", "take a new one"]),
    ]
}

#[test]
fn every_refusal_names_the_thing_the_value_and_the_remedy() {
    for (refusal, wanted) in refusals() {
        let text = refusal.to_string();
        for part in wanted {
            assert!(text.contains(part), "{text:?} does not say {part:?}");
        }
    }
}

#[test]
fn what_is_stored_of_a_refusal_holds_names_and_numbers_and_no_text() {
    for (refusal, _) in refusals() {
        let bytes = codec::encode(&refusal).unwrap();
        assert_eq!(codec::decode::<Refusal>(&bytes).unwrap(), refusal);
        // A space between two words; a number may well be 32.
        let mut three = bytes.windows(3);
        let sentence =
            three.any(|it| matches!(it, [a, b' ', b] if a.is_ascii_alphabetic() && b.is_ascii_alphabetic()));
        assert!(!sentence, "{refusal:?} holds a sentence");
    }
}
