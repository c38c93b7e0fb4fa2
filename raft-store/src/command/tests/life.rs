//! A key version's life as a whole: each command takes it where the drawing says, and nowhere else.

use super::*;
use VersionState::*;

pub(super) const STATES: [VersionState; 8] = [
    Pending,
    Active,
    DecryptOnly,
    Disabled,
    DestroyScheduled,
    Destroying,
    Destroyed,
    Abandoned,
];

impl World {
    /// Makes the next version, which node 1 holds, the active one.
    pub(super) fn rotate(&mut self, version: u32) {
        self.ok(prepare(version - 1, version));
        self.ack(1, version);
        self.ok(activate(version, &[]));
    }

    /// The whole of a shortest wait passes.
    pub(super) fn wait_out(&mut self, version: u32) {
        let expected = vec![self.seen(version)];
        self.ok(advance(LEAST_WAIT_MS, expected));
    }

    /// Version 1 is in this state; if it is to be destroyed, it was `decrypt_only`.
    pub(super) fn in_state(state: VersionState) -> Self {
        let mut world = match state {
            Pending | Active => World::new(),
            Abandoned => World::in_state(Pending),
            DecryptOnly => World::in_state(Active),
            Disabled | DestroyScheduled => World::in_state(DecryptOnly),
            Destroying => World::in_state(DestroyScheduled),
            Destroyed => World::in_state(Destroying),
        };
        let op = match state {
            Pending => prepare(0, 1),
            Abandoned => abandon(1),
            Disabled => set_use(1, DecryptOnly, Disabled),
            DestroyScheduled => Op::ScheduleDestroy(schedule(1, DecryptOnly)),
            Destroying => {
                world.wait_out(1);
                begin(1)
            }
            Destroyed => ack_destroyed(1, 1),
            Active | DecryptOnly => {
                world.rotate(if state == Active { 1 } else { 2 });
                return world;
            }
        };
        world.ok(op);
        assert_eq!(world.version_state(1), state);
        world
    }
}

#[test]
fn each_command_takes_a_version_where_it_may_go_and_nowhere_else() {
    for from in STATES {
        let commands = [
            (set_use(1, from, Disabled), Disabled, from == DecryptOnly),
            (set_use(1, from, DecryptOnly), DecryptOnly, from == Disabled),
            (
                Op::ScheduleDestroy(schedule(1, from)),
                DestroyScheduled,
                matches!(from, DecryptOnly | Disabled),
            ),
            (undo(1), DecryptOnly, from == DestroyScheduled),
            (begin(1), Destroying, from == DestroyScheduled),
            (ack_destroyed(1, 1), Destroyed, from == Destroying),
            (abandon(1), Abandoned, from == Pending),
            (activate(1, &[]), Active, from == Pending),
        ];
        for (op, to, goes) in commands {
            let mut world = World::in_state(from);
            match from {
                Pending => world.ack(1, 1),
                DestroyScheduled => world.wait_out(1),
                _ => {}
            }
            let (what, before) = (format!("{} from {from:?}", op.name()), world.rows());
            // What is so already, or was never asked of it, is answered without doing anything.
            let done = match &op {
                Op::BeginDestroy(_) => matches!(from, Destroying | Destroyed),
                Op::ActivateVersion(_) | Op::AbandonVersion(_) => from == to,
                Op::AckDestroyed(_) => true,
                _ => false,
            };
            let outcome = world.run(op);
            assert_eq!(
                matches!(outcome, Outcome::Done(_)),
                goes || done,
                "{what}: {outcome:?}"
            );
            if goes {
                assert_eq!(world.version_state(1), to, "{what}");
                assert!(from.may_become(to), "{what}");
            } else {
                assert_eq!(world.rows(), before, "{what}");
            }
        }
    }
}

#[test]
fn a_version_in_any_state_is_read_back_as_it_was_written() {
    for state in STATES {
        let world = World::in_state(state);
        let mut read = ClusterState::default();
        for row in world.state.dump().unwrap() {
            let value = row.value.unwrap();
            read.load(row.kind, row.version, &row.key, &value).unwrap();
        }
        assert_eq!(read.version(&context(), 1), Some(world.version(1)));
    }
}

#[test]
fn an_end_is_an_end() {
    for state in [Destroyed, Abandoned] {
        assert!(state.is_over());
        let world = World::in_state(state);
        assert!(world.version(1).material.is_none(), "{state:?}");
    }
}
