//! Remembered requests with every outcome there is.

use raft_store::command::*;
use raft_store::names::*;
use raft_store::state::context::VersionState;
use raft_store::state::requests::Request;
use raft_store::state::slot::TransportState;
use raft_store::state::table::RowKind;

use super::examples::*;
use super::{Lines, survives};

fn done() -> Vec<Done> {
    let context = context();
    vec![
        Done::Ok,
        Done::Registered { raft_id: 3 },
        Done::Version { context, version: 2 },
        Done::JoinToken { number: 4 },
        Done::Node { raft_id: 9 },
        Done::TransportRekey { generation: 3 },
        Done::ReplicationRekey {
            key: [4; 8],
            former: [5; 8],
        },
    ]
}

fn conflicts() -> Vec<Conflict> {
    let (version, id) = (7, TransportId([3; 16]));
    let state = VersionState::DecryptOnly;
    let (holders, voters) = (2, 5);
    vec![
        Conflict::HighestVersion {
            context: context(),
            highest: 7,
        },
        Conflict::Pending {
            context: context(),
            version,
        },
        Conflict::VersionState {
            context: context(),
            version,
            state,
        },
        Conflict::Holders {
            context: context(),
            version,
            holders,
            voters,
        },
        Conflict::TransportGeneration {
            slot: slot(),
            generation: 3,
        },
        Conflict::TransportNotCurrent { slot: slot(), id },
        Conflict::NoSlotKey {
            node: node(),
            slot: slot(),
        },
        Conflict::OtherSlotKey {
            node: node(),
            slot: slot(),
        },
        Conflict::NodeRemoved { node: node() },
        Conflict::NotAcknowledged {
            node: node(),
            context: context(),
            version,
        },
        Conflict::NotProven { node: node() },
        Conflict::OpenJoinTokens { open: 256 },
        Conflict::Active {
            context: context(),
            version,
        },
        Conflict::UsedRecently {
            context: context(),
            version,
            ago_ms: 9,
        },
        Conflict::WaitNotOver {
            context: context(),
            version,
            elapsed_ms: 9,
            wait_ms: 10,
        },
        Conflict::OtherWait {
            context: context(),
            version,
            scheduled_by: 11,
            elapsed_ms: 9,
        },
        Conflict::OtherAcl { digest: [8; 32] },
        Conflict::NotCountedYet {
            context: context(),
            version,
            node: node(),
            counted_ms: None,
        },
        Conflict::NotCountedYet {
            context: context(),
            version,
            node: node(),
            counted_ms: Some(9),
        },
        Conflict::OwesDestruction {
            node: node(),
            context: context(),
            version,
        },
        Conflict::NoOtherGranter {
            node: node(),
            slot: slot(),
        },
        Conflict::ContextSlot {
            context: context(),
            slot: slot(),
        },
        Conflict::NodeLeaves { node: node() },
        Conflict::LastVoter { node: node() },
        Conflict::SuccessorVotes { node: node() },
        Conflict::LastHolder {
            node: node(),
            context: context(),
            version,
        },
        Conflict::NotLeaving { node: node() },
        Conflict::StillVotes { node: node() },
        Conflict::RekeyOpen { slot: slot() },
        Conflict::LiveTransportKeys {
            slot: slot(),
            live: 8,
        },
        Conflict::TransportState {
            slot: slot(),
            id,
            state: TransportState::Offered,
        },
        Conflict::TransportHolders {
            slot: slot(),
            id,
            holders,
            voters,
        },
        Conflict::TransportInUse {
            slot: slot(),
            id,
            context: context(),
            version,
        },
        Conflict::ReplicationKey { current: [3; 8] },
        Conflict::ResealOpen,
        Conflict::RetiredReplicationKey { id: [4; 8] },
        Conflict::LacksReplicationKey {
            node: node(),
            id: [4; 8],
        },
    ]
}

fn existing() -> Vec<Existing> {
    let label = "kek-exchange-key-v7".to_string();
    vec![
        Existing::Cluster(ClusterId([1; 16])),
        Existing::Context {
            context: context(),
            slot: slot(),
        },
        Existing::TransportKey(TransportId([3; 16])),
        Existing::Version { label },
        Existing::Node(node()),
    ]
}

fn missing() -> Vec<Missing> {
    let id = TransportId([3; 16]);
    vec![
        Missing::Cluster,
        Missing::Context(context()),
        Missing::Version {
            context: context(),
            version: 7,
        },
        Missing::Slot(slot()),
        Missing::Node(9),
        Missing::TransportKey { slot: slot(), id },
    ]
}

fn forbidden() -> Vec<Forbidden> {
    let id = TransportId([3; 16]);
    let operation = "admit_node".to_string();
    let drivers = "advance_waits".to_string();
    vec![
        Forbidden::JoinToken,
        Forbidden::JoinTokenOfAnother { node: node() },
        Forbidden::NotItself { node: 9 },
        Forbidden::Incarnation { node: node() },
        Forbidden::Removed { node: node() },
        Forbidden::Grantor { slot: slot(), id },
        Forbidden::Grantee { slot: slot(), id },
        Forbidden::Operation { operation },
        Forbidden::Driver { operation: drivers },
        Forbidden::RejectedGrantor { slot: slot(), id },
        Forbidden::Revoked,
    ]
}

fn invalid() -> Vec<Invalid> {
    let bounded = [
        Bounded::Row(RowKind::Slot),
        Bounded::RowKey(RowKind::Revocation),
        Bounded::Label,
        Bounded::Grant,
        Bounded::SlotPublicKey,
        Bounded::SlotSignature,
        Bounded::Certificates,
        Bounded::CertificateBytes,
        Bounded::SlotKeys,
        Bounded::Address,
    ];
    let (size, most) = (70_001, 70_000);
    let too_large = bounded.map(|what| Invalid::TooLarge { what, size, most });
    let first = [
        Invalid::JoinTokenExpired,
        Invalid::VersionNumber {
            context: context(),
            version: 9,
            next: 7,
        },
        Invalid::Epoch { epoch: 3, current: 2 },
    ];
    let kind = RowKind::Revocation;
    // In the order in which they came, so that each keeps its place.
    let later = [
        Invalid::Key { kind },
        Invalid::Wait {
            wait_ms: 9,
            least_ms: 10,
            most_ms: 11,
        },
        Invalid::Use {
            state: VersionState::Active,
        },
    ];
    let too_large_later =
        [Bounded::Uses, Bounded::Advance].map(|what| Invalid::TooLarge { what, size, most });
    let all = first.into_iter().chain(too_large);
    let all = all.chain(later).chain(too_large_later);
    let order = Invalid::WaitOrder {
        context: context(),
        version: 7,
    };
    let latest = [
        Bounded::UseCount,
        Bounded::Claims,
        Bounded::Invocations,
        Bounded::Revocations,
        Bounded::ReplicationKeys,
    ]
    .map(|what| Invalid::TooLarge { what, size, most });
    all.chain([Invalid::NoAdmin, order]).chain(latest).collect()
}

/// Every answer, under its place.
fn outcomes() -> Vec<(String, Outcome)> {
    let mut all = vec![("nothing".to_string(), Outcome::Nothing)];
    let mut add = |what: &str, outcomes: Vec<Outcome>| {
        let numbered = outcomes.into_iter().enumerate();
        all.extend(numbered.map(|(number, outcome)| (format!("{what}.{number}"), outcome)));
    };
    fn refused<T: Into<Refusal>>(why: Vec<T>) -> Vec<Outcome> {
        let why = why.into_iter().map(Into::into);
        why.map(Outcome::Refused).collect()
    }
    add("done", done().into_iter().map(Outcome::Done).collect());
    add("conflict", refused(conflicts()));
    add("exists", refused(existing()));
    add("not_found", refused(missing()));
    add("forbidden", refused(forbidden()));
    add("invalid", refused(invalid()));
    add("key", refused(vec![Refusal::KeyReused, Refusal::KeyExpired]));
    all
}

pub(super) fn lines(lines: &mut Lines) {
    let request = |outcome| Request {
        id: RequestId::Node {
            node: 1,
            nonce: [7; 16],
        },
        body_hash: [1; 32],
        outcome,
    };
    lines.value("row.request.forgotten", &request(None));
    for (what, outcome) in outcomes() {
        lines.value(&format!("row.request.{what}"), &request(Some(outcome)));
    }
    let client = Request {
        id: RequestId::Client {
            principal: [2; 32],
            operation: "op".into(),
            key: "k".into(),
        },
        ..request(None)
    };
    lines.value("row.request.of_client", &client);
}

/// Whether an old line is read; `None` if it is none of these.
pub(super) fn reads(what: &str, bytes: &[u8]) -> Option<bool> {
    what.starts_with("row.request.")
        .then(|| survives::<Request>(bytes))
}
