use raft_store::command::Op;

use super::super::testing::{World, asked, context, prepare, slot};
use super::*;

fn rotate(world: &World, key: &str) -> Result<Step, CallError> {
    plan(
        &world.state,
        &context("c"),
        &Wish::Rotate,
        &asked("rotate c", key),
    )
}

fn create(world: &World, name: &str, version: Option<u32>) -> Result<Step, CallError> {
    let wish = Wish::Create { label: None, version };
    plan(&world.state, &context(name), &wish, &asked("create-kek c", "k"))
}

fn code(step: Result<Step, CallError>) -> ErrorCode {
    step.unwrap_err().code
}

fn draft(step: Result<Step, CallError>) -> Draft {
    match step.unwrap() {
        Step::Prepare(draft) => draft,
        other => panic!("{other:?}"),
    }
}

fn active(world: &mut World) -> u32 {
    let version = world.prepare("c");
    world.activate("c", version);
    version
}

/// Applies a prepare under one of a request's ids.
fn send(world: &mut World, key: &str, attempt: u32, op: Op) -> Outcome {
    let asked = asked("rotate c", key);
    world.send(asked.id(attempt), asked.body_hash, asked.origin.clone(), op)
}

#[test]
fn a_rotation_makes_the_next_version_under_the_current_transport_key() {
    let mut world = World::new(1);
    active(&mut world);
    world.transport("s", 2, 1);
    let expected = Draft {
        attempt: 0,
        expected_highest: 1,
        version: 2,
        label: "kek-c-v2".to_owned(),
        slot: slot("s"),
        transport_id: TransportId([2; 16]),
    };
    assert_eq!(draft(rotate(&world, "k")), expected);
}

#[test]
fn who_wants_one_version_replaced_is_content_once_another_has_done_it() {
    let mut world = World::new(1);
    active(&mut world);
    let replace = |world: &World, key: &str| {
        let wish = Wish::Replace { active: 1 };
        plan(&world.state, &context("c"), &wish, &asked("rotate c", key))
    };
    assert_eq!(draft(replace(&world, "k")).version, 2);
    // Another's version is pending: it may be given up.
    let version = world.prepare("c");
    assert_eq!(replace(&world, "k"), Ok(Step::Hold(version)));
    world.activate("c", version);
    assert_eq!(code(replace(&world, "k")), ErrorCode::Conflict);
}

#[test]
fn what_is_refused_for_good_is_not_attempted_again() {
    let mut world = World::new(1);
    active(&mut world);
    let asked = asked("key disable c v1", "k");
    let attempt = |world: &World| asked.attempt(&world.state, |_| Some(()));
    let disable = |expected| {
        Op::SetVersionUse(raft_store::command::SetVersionUse {
            context: context("c"),
            version: 1,
            expected,
            to: VersionState::Disabled,
        })
    };
    let refused = world.send(
        asked.id(0),
        asked.body_hash,
        asked.origin.clone(),
        disable(VersionState::Active),
    );
    assert!(matches!(
        refused,
        Outcome::Refused(Refusal::Conflict(Conflict::Active { .. }))
    ));
    assert_eq!(attempt(&world).unwrap_err().code, ErrorCode::Conflict);
    // It is retired now; the answer stays.
    active(&mut world);
    assert_eq!(attempt(&world).unwrap_err().code, ErrorCode::Conflict);
}

#[test]
fn a_label_that_was_another_versions_is_no_answer_to_whoever_asked_for_none() {
    let mut world = World::new(1);
    active(&mut world);
    let Op::PrepareVersion(op) = prepare("c", 1, 2) else {
        panic!("another operation")
    };
    let label = "kek-c-v1".to_owned();
    let taken = Op::PrepareVersion(raft_store::command::PrepareVersion { label, ..op });
    for attempt in 0..3 {
        let refused = send(&mut world, "k", attempt, taken.clone());
        assert!(
            matches!(refused, Outcome::Refused(Refusal::Exists(_))),
            "{refused:?}"
        );
        assert_eq!(draft(rotate(&world, "k")).attempt, attempt + 1);
    }
    let wish = Wish::Create {
        label: Some("kek-c-v1".to_owned()),
        version: None,
    };
    let asked = asked("rotate c", "k");
    let named = plan(&world.state, &context("c"), &wish, &asked);
    assert_eq!(code(named), ErrorCode::AlreadyExists);
    // What it makes in the end it finds again.
    send(&mut world, "k", 3, prepare("c", 1, 2));
    assert_eq!(rotate(&world, "k"), Ok(Step::Await(2)));
}

#[test]
fn what_does_not_exist_cannot_be_rotated() {
    let mut world = World::new(1);
    assert_eq!(code(rotate(&world, "k")), ErrorCode::ContextHasNoKey);
    assert_eq!(code(create(&world, "nope", None)), ErrorCode::NotFound);
    world.context("d", "other");
    assert_eq!(code(create(&world, "d", None)), ErrorCode::NotReady);
}

#[test]
fn a_request_finds_the_version_it_made() {
    let mut world = World::new(1);
    active(&mut world);
    send(&mut world, "k", 0, prepare("c", 1, 2));
    assert_eq!(rotate(&world, "k"), Ok(Step::Await(2)));
    assert_eq!(rotate(&world, "another"), Ok(Step::Hold(2)));
    world.activate("c", 2);
    assert_eq!(rotate(&world, "k"), Ok(Step::Await(2)));
    assert_eq!(draft(rotate(&world, "another")).version, 3);
    // Still the same one when a later version has replaced it.
    active(&mut world);
    assert_eq!(rotate(&world, "k"), Ok(Step::Await(2)));
}

#[test]
fn a_conflict_leaves_the_request_open_under_its_next_id() {
    let mut world = World::new(1);
    active(&mut world);
    let refused = send(&mut world, "k", 0, prepare("c", 0, 1));
    assert!(matches!(refused, Outcome::Refused(Refusal::Conflict(_))));
    assert_eq!(draft(rotate(&world, "k")).attempt, 1);
    send(&mut world, "k", 1, prepare("c", 1, 2));
    assert_eq!(rotate(&world, "k"), Ok(Step::Await(2)));
}

#[test]
fn a_version_given_up_leaves_the_request_open_and_its_number_a_gap() {
    let mut world = World::new(1);
    active(&mut world);
    send(&mut world, "k", 0, prepare("c", 1, 2));
    world.abandon("c", 2);
    let next = draft(rotate(&world, "k"));
    assert_eq!((next.attempt, next.version), (1, 3));
}

#[test]
fn a_key_used_for_another_body_is_refused() {
    let mut world = World::new(1);
    active(&mut world);
    send(&mut world, "k", 0, prepare("c", 1, 2));
    let other = Asked {
        body_hash: [0; 32],
        ..asked("rotate c", "k")
    };
    let step = plan(&world.state, &context("c"), &Wish::Rotate, &other);
    assert_eq!(code(step), ErrorCode::IdempotencyKeyReused);
}

#[test]
fn a_label_that_was_taken_meanwhile_is_passed_over() {
    let mut world = World::new(1);
    active(&mut world);
    let Op::PrepareVersion(mut taken) = prepare("c", 1, 2) else {
        panic!()
    };
    taken.label = "kek-c-v1".to_owned();
    send(&mut world, "k", 0, Op::PrepareVersion(taken));
    let again = draft(rotate(&world, "k"));
    assert_eq!((again.attempt, again.label.as_str()), (1, "kek-c-v2"));
}

#[test]
fn a_request_that_only_meets_conflicts_ends() {
    let mut world = World::new(1);
    active(&mut world);
    for attempt in 0..MAX_ATTEMPTS {
        send(&mut world, "k", attempt, prepare("c", 0, 1));
    }
    assert_eq!(code(rotate(&world, "k")), ErrorCode::Conflict);
}

#[test]
fn a_chosen_number_must_be_the_next() {
    let mut world = World::new(1);
    assert_eq!(draft(create(&world, "c", None)).version, 1);
    assert_eq!(draft(create(&world, "c", Some(1))).version, 1);
    world.ok(prepare("c", 0, 1));
    assert_eq!(create(&world, "c", None), Ok(Step::Hold(1)));
    world.activate("c", 1);
    assert_eq!(draft(create(&world, "c", Some(2))).label, "kek-c-v2");
    assert_eq!(code(create(&world, "c", Some(1))), ErrorCode::AlreadyExists);
    for other in [0, 3, 7, u32::MAX] {
        let refused = create(&world, "c", Some(other)).unwrap_err();
        assert_eq!(refused.code, ErrorCode::InvalidArgument);
        assert!(refused.detail.contains("which is 2"), "{refused}");
    }
}

#[test]
fn a_default_label_that_another_context_took_gets_a_place() {
    let mut world = World::new(1);
    world.context("other", "s");
    let Op::PrepareVersion(mut taker) = prepare("other", 0, 1) else {
        panic!()
    };
    taker.label = "kek-c-v1".to_owned();
    world.ok(Op::PrepareVersion(taker));
    assert_eq!(draft(create(&world, "c", None)).label, "kek-c-v1-2");
    world.abandon("other", 1);
    assert_eq!(draft(create(&world, "c", None)).label, "kek-c-v1", "free again");
}

#[test]
fn a_label_may_be_chosen() {
    let world = World::new(1);
    let wish = Wish::Create {
        label: Some("mine".to_owned()),
        version: None,
    };
    let step = plan(&world.state, &context("c"), &wish, &asked("create-kek c", "k"));
    assert_eq!(draft(step).label, "mine");
    assert!(check_label("kek-exchange-key-v1").is_ok());
    for bad in ["", "a b", "a\nb", "ä", &"x".repeat(129)] {
        assert_eq!(
            check_label(bad).unwrap_err().code,
            ErrorCode::InvalidArgument,
            "{bad:?}"
        );
    }
}

#[test]
fn no_two_ids_of_requests_meet() {
    let one = asked("rotate c", "k");
    let ids = [
        one.id(0),
        one.id(1),
        one.id(11),
        one.side_id("context"),
        asked("rotate c", "k #1").id(0),
        asked("rotate d", "k").id(1),
    ];
    for (at, id) in ids.iter().enumerate() {
        assert!(!ids[at + 1..].contains(id), "{id:?}");
    }
}

fn relocate(world: &World, key: &str, to: &str) -> Result<Step, CallError> {
    let wish = Wish::Move { to: slot(to) };
    plan(&world.state, &context("c"), &wish, &asked("key move c", key))
}

/// Applies the move of a request, under the attempt that it has come to.
fn send_move(world: &mut World, key: &str, attempt: u32, from: &str, to: &str) -> Outcome {
    let asked = asked("key move c", key).side(MOVE);
    let op = Op::MoveContext(raft_store::command::MoveContext {
        context: context("c"),
        from: slot(from),
        to: slot(to),
    });
    world.send(asked.id(attempt), asked.body_hash, asked.origin.clone(), op)
}

fn moves(attempt: u32, from: &str) -> Result<Step, CallError> {
    let from = slot(from);
    Ok(Step::Move { attempt, from })
}

#[test]
fn a_context_is_moved_first_and_its_next_version_is_made_there() {
    let mut world = World::new(1);
    active(&mut world);
    world.second_slot("t");
    assert_eq!(relocate(&world, "k", "t"), moves(0, "s"));
    // Somebody moved it and back in between: the proposal met a conflict, and is made again.
    send_move(&mut world, "k", 0, "t", "s");
    assert_eq!(relocate(&world, "k", "t"), moves(1, "s"));
    send_move(&mut world, "k", 1, "s", "t");
    let draft = draft(relocate(&world, "k", "t"));
    assert_eq!((draft.version, draft.slot), (2, slot("t")));
    // A leader that died in between leaves it to whoever asks, with the same key or another.
    assert!(matches!(relocate(&world, "another", "t"), Ok(Step::Prepare(_))));
    let version = world.prepare("c");
    assert_eq!(relocate(&world, "k", "t"), Ok(Step::Hold(version)));
    world.activate("c", version);
    assert_eq!(code(relocate(&world, "another", "t")), ErrorCode::Conflict);
    // Its own version was not that one.
    assert!(matches!(relocate(&world, "k", "t"), Ok(Step::Prepare(_))));
}

#[test]
fn a_move_that_another_one_has_overtaken_is_not_repeated_by_its_echo() {
    let mut world = World::new(1);
    active(&mut world);
    world.second_slot("t");
    send_move(&mut world, "k", 0, "s", "t");
    world.move_to("c", "s");
    let error = relocate(&world, "k", "t").unwrap_err();
    assert_eq!(error.code, ErrorCode::Conflict);
    assert!(error.detail.contains("has moved it to s since"), "{error}");
    assert_eq!(relocate(&world, "new", "t"), moves(0, "s"));
}

#[test]
fn a_context_without_a_key_gets_its_first_one_where_it_is_moved_to() {
    let mut world = World::new(1);
    world.second_slot("t");
    assert_eq!(relocate(&world, "k", "t"), moves(0, "s"));
    send_move(&mut world, "k", 0, "s", "t");
    // The leader died then, or its version was given up: whoever asks gets it, with the same key or another.
    for key in ["k", "another"] {
        let draft = draft(relocate(&world, key, "t"));
        assert_eq!((draft.version, draft.slot), (1, slot("t")));
    }
    let version = world.prepare("c");
    world.abandon("c", version);
    assert_eq!(draft(relocate(&world, "another", "t")).version, 2);
    let version = world.prepare("c");
    world.activate("c", version);
    let error = relocate(&world, "third", "t").unwrap_err();
    assert_eq!(error.code, ErrorCode::Conflict);
    assert!(error.detail.contains("is in slot t already"), "{error}");
}
