#[path = "judge_fixture.rs"]
mod fixture;

use raft_store::command::{Claim, LeaseInvocations, Op};
use raft_store::names::Boot;

use super::*;
use crate::rotation::testing::context;
use fixture::{MS, Node, locked, serving};

#[test]
fn a_node_that_lacks_nothing_is_ready() {
    let node = Node::new();
    assert!(node.not_ready().is_empty() && node.not_stale_ok().is_empty());
}

#[test]
fn a_node_without_a_cluster_says_what_to_do() {
    let mut node = Node::new();
    node.world.state = ClusterState::default();
    let checks = node.ask(&ReadyQuery::default());
    assert_eq!(checks.len(), 1);
    assert!(!checks[0].ok && checks[0].detail.contains("hsmctl cluster init"));
}

#[test]
fn each_thing_that_is_wrong_has_its_code() {
    type Spoil = (&'static str, fn(&mut Node));
    let spoil: [Spoil; 10] = [
        ("draining", |node| node.draining = true),
        ("consensus", |node| node.view.stopped = Some("store".to_owned())),
        ("start_gate", |node| {
            node.view.start_gate = Gate::CatchingUp { target: 10 }
        }),
        ("start_gate", |node| {
            node.view.start_gate = Gate::OlderCopy { node: 7 }
        }),
        ("start_gate", |node| {
            node.view.start_gate = Gate::EpochEnded { epoch: 2 }
        }),
        ("fresh", |node| node.view.staleness = Some(5001 * MS)),
        ("fresh", |node| node.view.staleness = None),
        ("voter", |node| node.world.voters = BTreeSet::from([2, 3])),
        ("disk", |node| node.below_reserve = true),
        ("replication_key", |node| node.wrong_key = Some("another key")),
    ];
    for (code, spoil) in spoil {
        let mut node = Node::new();
        spoil(&mut node);
        assert_eq!(node.not_ready(), [code]);
    }
}

#[test]
fn a_stale_node_is_ready_for_those_who_say_stale_is_ok_until_its_bound() {
    let mut node = Node::new();
    node.view.staleness = Some(299_000 * MS);
    assert_eq!(node.not_ready(), ["fresh"]);
    assert!(node.not_stale_ok().is_empty());
    node.view.staleness = Some(300_001 * MS);
    assert_eq!(node.not_stale_ok(), ["fresh"]);
}

#[test]
fn a_restarted_node_in_isolation_never_becomes_ready() {
    let mut node = Node::new();
    node.view.staleness = None;
    node.view.start_gate = Gate::NoLeaderSeen;
    for uptime in [1, 1_000_000] {
        node.uptime = uptime * MS;
        assert_eq!(node.not_ready(), ["start_gate", "fresh"]);
        assert_eq!(node.not_stale_ok(), ["start_gate", "fresh"]);
    }
    // Only if the operator has said so, only as stale, and only within the bound.
    node.rules.without_quorum = true;
    node.uptime = 1000 * MS;
    assert_eq!(node.not_ready(), ["start_gate", "fresh"]);
    assert!(node.not_stale_ok().is_empty());
    node.uptime = 300_001 * MS;
    assert_eq!(node.not_stale_ok(), ["fresh"]);
}

#[test]
fn a_slot_that_another_member_serves_must_be_served_here() {
    let mut node = Node::new();
    let other = node.other();
    node.report(other, "s", true);
    assert!(node.not_ready().is_empty());
    node.slot("s", locked());
    assert_eq!(node.not_ready(), ["slot:s"]);
    node.report(other, "s", false);
    assert!(
        node.not_ready().is_empty(),
        "what nobody serves makes nobody unready"
    );
    // A slot that nothing is in, nor will be, may be taken out of the configuration of one node after the other.
    node.report(other, "elsewhere", true);
    assert!(node.not_ready().is_empty());
    node.world.context("moved", "elsewhere");
    assert_eq!(node.not_ready(), ["slot:elsewhere"]);
    // Until its last version there is over.
    node.world.transport("elsewhere", 1, 0);
    let version = node.world.prepare("moved");
    node.world.activate("moved", version);
    node.world.second_slot("s2");
    node.slot("s2", serving());
    node.world.move_to("moved", "s2");
    assert_eq!(node.not_ready(), ["slot:elsewhere"]);
    let next = node.world.prepare("moved");
    node.world.activate("moved", next);
    node.world.schedule_destroy("moved", version, 1000);
    node.world.begin_destroy("moved", version);
    assert_eq!(node.not_ready(), ["slot:elsewhere"]);
    for id in node.world.voters.clone() {
        node.world.ack_destroyed(id, "moved", version);
    }
    assert!(node.not_ready().is_empty());
}

/// As after a slot was taken out of the configuration too early: its keys are needed, and nobody says that it serves.
#[test]
fn a_needed_slot_that_nobody_has_is_named_and_keeps_who_is_alone_from_being_ready() {
    let line = |node: &Node, name: &str| {
        let checks = node.ask(&ReadyQuery::default());
        let line = checks
            .into_iter()
            .find(|check| check.code == format!("slot:{name}"));
        line.map(|check| (check.ok, check.detail))
    };
    let lacking = |mut node: Node| {
        node.world.transport("lost", 1, 0);
        assert_eq!(line(&node, "lost"), None, "nothing is in it");
        node.world.context("moved", "lost");
        node
    };
    let node = lacking(Node::new());
    assert!(node.not_ready().is_empty());
    let (ok, detail) = line(&node, "lost").unwrap();
    assert!(
        ok && detail.starts_with("served by no node: not configured"),
        "{detail}"
    );
    let asked_for = ReadyQuery {
        slot: Some("lost".to_owned()),
        stale_ok: false,
    };
    assert_eq!(node.failing(&asked_for), ["slot:lost"]);

    let mut alone = Node::new();
    alone.world = crate::rotation::testing::World::new(1);
    let alone = lacking(alone);
    assert_eq!(alone.not_ready(), ["slot:lost"]);
    let (_, detail) = line(&alone, "lost").unwrap();
    assert!(
        detail.contains("hsm.slots") && detail.contains("key versions"),
        "{detail}"
    );
}

#[test]
fn a_probe_learns_no_reason_that_may_name_a_token() {
    let mut node = Node::new();
    let other = node.other();
    node.report(other, "s", true);
    node.slot("s", locked());
    let checks = node.ask(&ReadyQuery::default());
    let slot = checks.iter().find(|check| check.code == "slot:s").unwrap();
    assert!(slot.detail.starts_with("locked;"), "{}", slot.detail);
    assert!(!slot.detail.contains("labelled"), "{}", slot.detail);
}

#[test]
fn whom_the_leader_does_not_hear_serves_nothing() {
    for role in [Role::Leader, Role::Follower] {
        let mut node = Node::new();
        let other = node.other();
        node.report(other, "s", true);
        node.slot("s", locked());
        node.view.role = role;
        assert_eq!(node.not_ready(), ["slot:s"]);
        node.view.silent.insert(other);
        assert!(node.not_ready().is_empty());
    }
}

#[test]
fn a_slot_is_ready_only_after_sync_and_destruction() {
    let mut node = Node::new();
    let unseen = Local {
        synced: false,
        complete: false,
        ..serving()
    };
    node.slot("s", unseen);
    assert_eq!(node.not_ready(), ["slot:s"]);
    let owing = || Local {
        destructions: 2,
        complete: false,
        ..serving()
    };
    node.slot("s", owing());
    assert_eq!(node.not_ready(), ["destructions", "slot:s"]);
    assert_eq!(node.not_stale_ok(), ["destructions", "slot:s"]);
    let checks = node.ask(&ReadyQuery::default());
    let line = checks.iter().find(|check| check.code == "destructions").unwrap();
    assert!(line.detail.starts_with("2 keys"), "{}", line.detail);
    // Nobody can look into a token that is not open; where nobody serves it, nobody is unready because of it.
    let closed = Local {
        state: SlotState::Locked,
        ..owing()
    };
    node.slot("s", closed);
    assert!(node.not_ready().is_empty());
    // A key that no node has any more keeps nobody out of service, nor does it that nobody claims invocations of it.
    node.slot(
        "s",
        Local {
            missing_keys: 1,
            leases: 1,
            complete: false,
            ..serving()
        },
    );
    assert!(node.not_ready().is_empty());
    let checks = node.ask(&ReadyQuery::default());
    let slot = checks.iter().find(|check| check.code == "slot:s").unwrap();
    assert!(
        slot.detail.starts_with("served by no node: 1 keys"),
        "{}",
        slot.detail
    );
    // But one that is being brought may be here in a moment.
    let imports = Local {
        missing_keys: 1,
        untried: 1,
        complete: false,
        ..serving()
    };
    node.slot("s", imports.clone());
    assert_eq!(node.not_ready(), ["slot:s"]);
    let tried = Local {
        untried: 0,
        ..imports
    };
    node.slot("s", tried);
    assert!(node.not_ready().is_empty());
    let other = node.other();
    node.report(other, "s", true);
    assert_eq!(node.not_ready(), ["slot:s"]);
}

/// What is wrong with it names keys, which is not for everybody; the section is.
#[test]
fn a_slot_that_does_not_get_its_keys_by_itself_says_which_section_helps() {
    let mut node = Node::new();
    let other = node.other();
    node.report(other, "s", true);
    let mut detail = |local: Local| {
        node.slot("s", local);
        let checks = node.ask(&ReadyQuery::default());
        let line = checks.into_iter().find(|check| check.code == "slot:s").unwrap();
        assert!(!line.ok && !line.detail.contains("prove_key"), "{}", line.detail);
        line.detail
    };
    let stuck = Local {
        reason: Some("prove_key of c v1: refused".to_owned()),
        missing_keys: 2,
        complete: false,
        ..serving()
    };
    let said = detail(stuck.clone());
    assert!(
        said.starts_with("2 keys are missing") && said.contains("\"Keys are missing\""),
        "{said}"
    );
    let unread = Local {
        synced: false,
        ..stuck.clone()
    };
    assert!(detail(unread).contains("\"A token is damaged or lost\""));
    assert!(detail(locked()).contains("\"A slot does not serve\""));
    let importing = Local {
        reason: None,
        ..stuck
    };
    assert_eq!(detail(importing), "2 keys are being imported");
}

#[test]
fn a_slot_with_every_key_waits_for_invocations_whether_others_serve_it_or_not() {
    let mut node = Node::new();
    let waiting = || Local {
        leases: 1,
        ..serving()
    };
    node.slot("s", waiting());
    assert_eq!(node.not_ready(), ["slot:s"]);
    let other = node.other();
    node.report(other, "s", true);
    assert_eq!(node.not_ready(), ["slot:s"]);
    let checks = node.ask(&ReadyQuery::default());
    let slot = checks.iter().find(|check| check.code == "slot:s").unwrap();
    assert!(slot.detail.contains("wait for invocations"), "{}", slot.detail);
    // Behind a closed slot there is nothing to encrypt with.
    let closed = Local {
        state: SlotState::Locked,
        ..waiting()
    };
    let mut node = Node::new();
    node.slot("s", closed);
    assert!(node.not_ready().is_empty());
}

#[test]
fn invocations_that_are_used_up_count_only_where_the_leader_serves() {
    let mut node = Node::new();
    let starved = || Local {
        starved: 1,
        ..serving()
    };
    node.slot("s", starved());
    let said = |node: &Node| {
        let checks = node.ask(&ReadyQuery::default());
        let slot = checks.into_iter().find(|check| check.code == "slot:s").unwrap();
        assert!(
            slot.detail.contains("1 key versions wait for invocations"),
            "{}",
            slot.detail
        );
        slot.ok
    };
    let leader = node.other();
    node.view.leader = Some(leader);
    assert!(said(&node), "nobody does better");
    node.report(1, "s", true);
    assert!(said(&node), "its own word is nobody else's");
    let voters = node.world.voters.clone();
    let third = *voters.iter().find(|id| **id != 1 && **id != leader).unwrap();
    node.report(third, "s", true);
    assert!(
        said(&node),
        "nobody knows whether another follower gets any either"
    );
    node.report(leader, "s", true);
    assert!(!said(&node));
    node.report(leader, "s", false);
    assert!(said(&node));

    // A leader that is out of the balancer for another of its slots helps nobody, unless only this one is asked for.
    node.report(leader, "s", true);
    node.report(third, "t", true);
    node.slot("t", serving());
    assert!(said(&node));
    let this = ReadyQuery {
        slot: Some("s".to_owned()),
        stale_ok: false,
    };
    assert_eq!(node.failing(&this), ["slot:s"]);
}

#[test]
fn a_node_that_is_joining_says_what_keeps_it_from_voting() {
    let mut node = Node::new();
    node.own = node.world.join();
    let said = |node: &Node| {
        let checks = node.ask(&ReadyQuery::default());
        let voter = checks.into_iter().find(|check| check.code == "voter").unwrap();
        assert!(!voter.ok);
        voter.detail
    };
    let why = said(&node);
    assert!(
        why.contains("slot s: it has registered no key of its own"),
        "{why}"
    );
    node.world.slot_keys(node.own);
    let why = said(&node);
    assert!(
        why.contains("slot s: no member has granted it the transport key"),
        "{why}"
    );
}

#[test]
fn however_many_get_no_invocations_somebody_decrypts() {
    let mut node = Node::new();
    node.slot(
        "s",
        Local {
            starved: 1,
            ..serving()
        },
    );
    let voters = node.world.voters.clone();
    for id in &voters {
        node.report(*id, "s", true);
    }
    let mut ready_under = |leader| {
        node.view.leader = leader;
        let ready = voters.iter().filter(|id| {
            node.own = **id;
            node.not_ready().is_empty()
        });
        ready.count()
    };
    for leader in &voters {
        assert_eq!(ready_under(Some(*leader)), 1, "the leader");
    }
    assert_eq!(ready_under(None), voters.len());
}

#[test]
fn a_key_that_is_used_up_makes_nobody_unready_and_is_not_named() {
    let mut node = Node::new();
    let version = node.world.prepare("c");
    node.world.activate("c", version);
    let key = VersionKey {
        context: context("c"),
        version,
    };
    let said = |node: &Node| {
        let checks = node.ask(&ReadyQuery::default());
        let line = checks.into_iter().find(|check| check.code == "invocations");
        line.map(|check| (check.ok, check.detail))
    };
    assert_eq!(said(&node), None);
    let mut seen = Vec::new();
    for _ in 0..200 {
        let (state, boot) = (&node.world.state, Boot([1; 16]));
        let claim = Claim {
            context: context("c"),
            version,
            key_uid: state.version(&context("c"), version).unwrap().key_uid,
            held: false,
            seen: state.lease(&key).given(1, boot),
            count: u64::MAX,
        };
        node.world.ok(Op::LeaseInvocations(LeaseInvocations {
            node: 1,
            boot,
            claims: vec![claim],
        }));
        if let Some(now) = said(&node)
            && seen.last() != Some(&now)
        {
            seen.push(now);
        }
    }
    assert!(node.not_ready().is_empty());
    assert_eq!(seen.len(), 2, "{seen:?}");
    for ((ok, detail), part) in seen.iter().zip([
        "left: 1, with none to be given: 0",
        "left: 0, with none to be given: 1",
    ]) {
        assert!(
            *ok && detail.contains(part) && !detail.contains("c v"),
            "{detail}"
        );
    }
}

/// After a restart of everything the reports of before are what tells that keys are missing.
#[test]
fn what_this_node_served_before_its_restart_counts_too() {
    let mut node = Node::new();
    node.report(1, "s", true);
    node.slot(
        "s",
        Local {
            missing_keys: 1,
            complete: false,
            ..serving()
        },
    );
    assert_eq!(node.not_ready(), ["slot:s"]);
}

#[test]
fn a_slot_aware_balancer_asks_for_its_slot_only() {
    let mut node = Node::new();
    let other = node.other();
    node.report(other, "t", true);
    node.slot("t", locked());
    let ask = |node: &Node, name: &str| {
        node.failing(&ReadyQuery {
            slot: Some(name.to_owned()),
            stale_ok: false,
        })
    };
    assert_eq!(node.not_ready(), ["slot:t"]);
    assert!(ask(&node, "s").is_empty());
    assert_eq!(ask(&node, "t"), ["slot:t"]);
    assert_eq!(ask(&node, "nope"), ["slot:nope"]);
    // Asked for, it has to serve, whoever else does not.
    node.report(other, "t", false);
    assert_eq!(ask(&node, "t"), ["slot:t"]);
}

#[test]
fn active_passive_steers_to_the_leader_and_to_anybody_without_one() {
    let mut node = Node::new();
    node.rules.mode = Mode::ActivePassive;
    assert_eq!(node.not_ready(), ["leader"]);
    assert!(node.not_stale_ok().is_empty());
    node.view.leader = None;
    assert!(node.not_ready().is_empty());
    node.view.role = Role::Leader;
    node.view.quorum_ack_age = Some(300 * MS);
    assert!(node.not_ready().is_empty());
    node.view.quorum_ack_age = Some(1200 * MS);
    assert_eq!(node.not_ready(), ["leader"]);
}
