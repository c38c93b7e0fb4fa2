use std::time::Duration;

use raft_store::command::{AddRevocations, Op};
use raft_store::state::access::RevocationKey;

use super::*;
use crate::admin::access::AccessBody;
use crate::admin::arrival::Arrival;
use crate::admin::call::{AdminBody, AdminCall};
use crate::admin::service::tests::bench;
use crate::consensus::ProposeError;
use crate::identity::{Authority, Identity, Principal};
use crate::rotation::testing::{ISSUER, asked};

/// An administrator whose certificate hangs on a CA of his own, and a revocation of that CA.
fn below(cn: &str, ca: u8) -> (Principal, RevocationKey) {
    let identity = Identity {
        cn: cn.to_owned(),
        ou: Some("Admin".to_owned()),
        sans: Vec::new(),
        serial: format!("{ca}"),
        issuer_dn: ISSUER.to_owned(),
        fingerprint: [ca; 32],
        spki_sha256: [ca; 32],
        not_after: i64::MAX,
    };
    let authority = Authority {
        serial: format!("ca{ca}"),
        issuer_dn: "CN=Root".to_owned(),
        fingerprint: [ca + 100; 32],
    };
    let key = RevocationKey::Fingerprint(authority.fingerprint);
    (Principal::below(identity, vec![authority]), key)
}

fn revoke(caller: &Principal, key: &str, what: &RevocationKey) -> AdminCall {
    let arrival = Arrival {
        principal: caller,
        via_node: 2,
        source: "127.0.0.1:1".to_owned(),
        request_id: "r".to_owned(),
        trace_id: "t".to_owned(),
        key: key.to_owned(),
    };
    let revocations = vec![(what.clone(), "stolen".to_owned())];
    let body = AdminBody::Access(AccessBody::Revoke { revocations });
    AdminCall::new(arrival, body, &key)
}

/// The state does not know what CAs a certificate hangs on: only the leader can tell.
#[tokio::test]
async fn of_two_who_revoke_each_others_ca_at_once_one_stays() {
    let bench = bench();
    let ((ann, of_ann), (bob, of_bob)) = (below("ann", 1), below("bob", 2));
    // Ann's change is under way when Bob is let in.
    let later = Instant::now() + Duration::from_secs(60);
    let anns = asked("revoke", "k");
    let turn = bench
        .service
        .turns
        .take(&*bench.cluster, &anns, later)
        .await
        .unwrap();
    let anns = async {
        for _ in 0..20 {
            tokio::task::yield_now().await;
        }
        let op = Op::AddRevocations(AddRevocations {
            revocations: vec![(of_bob.clone(), "stolen".to_owned())],
        });
        bench.cluster.with(|world| world.ok(op));
        drop(turn);
    };
    let bobs = bench.ask(revoke(&bob, "k", &of_ann));
    let (bobs, ()) = tokio::join!(bobs, anns);
    assert_eq!(bobs.unwrap_err(), ErrorCode::CertificateRevoked);
    let state = bench.cluster.published().state.clone();
    assert!(state.revocations().contains(&of_bob) && !state.revocations().contains(&of_ann));
    bench.ask(revoke(&ann, "again", &of_bob)).await.unwrap();
}

#[tokio::test]
async fn nothing_of_access_is_changed_while_the_outcome_of_the_change_before_is_open() {
    let bench = bench();
    let ((ann, of_ann), (bob, of_bob)) = (below("ann", 1), below("bob", 2));
    let lost = |done| {
        bench
            .cluster
            .failures
            .lock()
            .unwrap()
            .push((ProposeError::Unknown, done));
    };
    let in_term = |term| {
        if let Some(leadership) = &mut *bench.cluster.leadership.lock().unwrap() {
            leadership.term = term;
        }
    };
    let changed = || bench.cluster.count(|op| matches!(op, Op::AddRevocations(_)));
    // It may still be in the log.
    lost(false);
    let unknown = bench.ask(revoke(&ann, "k", &of_bob)).await.unwrap_err();
    assert_eq!(unknown, ErrorCode::OutcomeUnknown);
    let waits = bench.ask(revoke(&bob, "k", &of_ann)).await.unwrap_err();
    assert_eq!((waits, changed()), (ErrorCode::NotReady, 0));
    // Whoever asked may repeat it, and then everybody knows.
    bench.ask(revoke(&ann, "k", &of_bob)).await.unwrap();
    let refused = bench.ask(revoke(&bob, "k", &of_ann)).await.unwrap_err();
    assert_eq!(refused, ErrorCode::CertificateRevoked);
    // One that was done is in the state, and a leader of a later term has what there was.
    lost(true);
    let other = RevocationKey::CommonName("other".to_owned());
    assert!(bench.ask(revoke(&ann, "k2", &other)).await.is_err());
    let more = RevocationKey::CommonName("more".to_owned());
    bench.ask(revoke(&ann, "k3", &more)).await.unwrap();
    lost(false);
    let last = RevocationKey::CommonName("last".to_owned());
    assert!(bench.ask(revoke(&ann, "k4", &last)).await.is_err());
    in_term(2);
    bench.ask(revoke(&ann, "k5", &last)).await.unwrap();
}

/// Its entry was truncated, and this node leads again.
#[tokio::test]
async fn an_outcome_that_nobody_will_ever_hear_keeps_no_change_out_for_a_whole_term() {
    let bench = bench();
    let (ann, _) = below("ann", 1);
    let named = |name: &str| RevocationKey::CommonName(name.to_owned());
    let turns = &bench.service.turns;
    let passes = async |time: Duration| {
        let mut unsettled = turns.0.lock().await;
        let until = unsettled.as_mut().unwrap().until.as_mut().unwrap();
        *until = until.checked_sub(time).unwrap();
    };
    let lost = (ProposeError::Unknown, false);
    bench.cluster.failures.lock().unwrap().push(lost);
    let unknown = bench.ask(revoke(&ann, "k", &named("a"))).await.unwrap_err();
    assert_eq!(unknown, ErrorCode::OutcomeUnknown);
    let waits = bench.ask(revoke(&ann, "k2", &named("b"))).await.unwrap_err();
    assert_eq!(waits, ErrorCode::NotReady);
    passes(SETTLED_AFTER).await;
    bench.ask(revoke(&ann, "k2", &named("b"))).await.unwrap();
    // And so it is with one whose caller has gone.
    let gone = asked("revoke", "k3");
    let later = Instant::now() + Duration::from_secs(60);
    let mut turn = turns.take(&*bench.cluster, &gone, later).await.unwrap();
    turn.begin(&*bench.cluster, &gone);
    drop(turn);
    let waits = bench.ask(revoke(&ann, "k4", &named("c"))).await.unwrap_err();
    assert_eq!(waits, ErrorCode::NotReady);
    passes(SETTLED_AFTER).await;
    bench.ask(revoke(&ann, "k4", &named("c"))).await.unwrap();
}
