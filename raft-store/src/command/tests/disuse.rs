//! Retired versions are disabled, and enabled again.

use super::life::STATES;
use super::*;
use VersionState::{
    Abandoned, Active, DecryptOnly, DestroyScheduled, Destroyed, Destroying, Disabled, Pending,
};

fn found(state: VersionState) -> Refusal {
    Refusal::Conflict(Conflict::VersionState {
        context: context(),
        version: 1,
        state,
    })
}

#[test]
fn a_version_that_is_disabled_and_enabled_again_is_what_it_was() {
    let mut world = World::in_state(DecryptOnly);
    let before = world.rows();
    let done = Done::Version {
        context: context(),
        version: 1,
    };
    assert_eq!(world.ok(set_use(1, DecryptOnly, Disabled)), done);
    let disabled = world.version(1);
    assert!(!disabled.state.is_readable());
    assert!(
        disabled.material.is_some(),
        "who lost it meanwhile imports it again"
    );
    assert_eq!(world.ok(set_use(1, Disabled, DecryptOnly)), done);
    assert_eq!(world.rows(), before);
}

#[test]
fn the_active_and_a_pending_version_are_refused_with_reasons_of_their_own() {
    let (context, version) = (context(), 1);
    let active = Conflict::Active {
        context: context.clone(),
        version,
    };
    let pending = Conflict::Pending { context, version };
    for (state, why) in [(Active, active), (Pending, pending)] {
        for op in [
            set_use(1, state, Disabled),
            set_use(1, DecryptOnly, Disabled),
            Op::ScheduleDestroy(schedule(1, state)),
            undo(1),
            begin(1),
        ] {
            let refused = World::in_state(state).refused(op);
            assert_eq!(refused, Refusal::Conflict(why.clone()));
        }
    }
}

#[test]
fn a_version_in_another_state_than_the_proposer_saw_is_left_alone() {
    let mut world = World::in_state(Disabled);
    assert_eq!(
        world.refused(set_use(1, DecryptOnly, Disabled)),
        found(Disabled),
        "somebody was quicker"
    );
    let seen_before = Op::ScheduleDestroy(schedule(1, DecryptOnly));
    assert_eq!(world.refused(seen_before), found(Disabled));
    let mut world = World::in_state(DecryptOnly);
    assert_eq!(
        world.refused(set_use(1, Disabled, DecryptOnly)),
        found(DecryptOnly)
    );
}

/// Undoing is a command of its own, and says so in the audit.
#[test]
fn a_version_that_is_to_be_destroyed_is_not_enabled() {
    for state in [DestroyScheduled, Destroying, Destroyed, Abandoned] {
        for to in [DecryptOnly, Disabled] {
            let refused = World::in_state(state).refused(set_use(1, state, to));
            assert_eq!(refused, found(state));
        }
    }
}

#[test]
fn a_version_is_disabled_or_enabled_and_nothing_else() {
    let other = |state: &VersionState| !matches!(state, DecryptOnly | Disabled);
    for state in STATES.into_iter().filter(other) {
        let refused = World::in_state(DecryptOnly).refused(set_use(1, DecryptOnly, state));
        assert_eq!(refused, Refusal::Invalid(Invalid::Use { state }));
    }
}

#[test]
fn a_version_that_never_was_is_not_found() {
    let missing = Missing::Version {
        context: context(),
        version: 7,
    };
    let seen = SeenWait {
        version: 7,
        ..World::in_state(DestroyScheduled).seen(1)
    };
    for op in [
        set_use(7, DecryptOnly, Disabled),
        Op::ScheduleDestroy(schedule(7, DecryptOnly)),
        undo(7),
        advance(1, vec![seen]),
        begin(7),
    ] {
        let refused = World::in_state(DecryptOnly).refused(op);
        assert_eq!(refused, Refusal::NotFound(missing.clone()));
    }
}
