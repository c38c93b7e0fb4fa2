//! Contexts that the state has otherwise than this node's configuration would make them today. A context keeps the
//! binding and rotation that it was created with, and its slot until an administrator moves it.

use raft_store::names::{ContextName, SlotName};
use raft_store::state::ClusterState;
use raft_store::state::context::{BindingMode, RotationPolicy};

use super::listed;
use crate::admin::Placements;

/// What the configuration says of contexts.
#[derive(Clone, Debug, Default)]
pub struct Configured {
    /// Their slots and bindings.
    pub placements: Placements,
    /// The rotation of new ones; `None` compares nothing.
    pub rotation: Option<RotationPolicy>,
}

/// See the module. Each is what the state says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContextDifferences {
    /// In another slot than the one whose `contexts` name them.
    pub slots: Vec<(ContextName, SlotName)>,
    /// Bound to something else than their `mode`, if one is written.
    pub bindings: Vec<(ContextName, BindingMode)>,
    /// Of those that the configuration names, with another rotation or retention.
    pub rotations: Vec<ContextName>,
}

impl ContextDifferences {
    pub(super) fn between(ours: &Configured, state: &ClusterState) -> Self {
        let mut found = Self::default();
        for (name, context) in state.contexts().iter() {
            let slot = ours.placements.slot(name);
            let binding = ours.placements.written_binding(name);
            if slot.as_ref().is_some_and(|slot| *slot != context.slot) {
                found.slots.push((name.clone(), context.slot.clone()));
            }
            if binding.is_some_and(|binding| binding != context.binding) {
                found.bindings.push((name.clone(), context.binding));
            }
            let rotation = ours.rotation.as_ref();
            if slot.is_some() && rotation.is_some_and(|rotation| *rotation != context.policy) {
                found.rotations.push(name.clone());
            }
        }
        found
    }

    pub(super) fn parts(&self) -> impl Iterator<Item = String> {
        let slots = self
            .slots
            .iter()
            .map(|(name, slot)| format!("{name} (its new versions are made in {slot})"));
        let bindings = self.bindings.iter();
        let bindings = bindings.map(|(name, binding)| format!("{name} (it is {})", word(*binding)));
        let rotations = self.rotations.iter().map(ToString::to_string);
        [
            ("hsm.slots of", listed(slots)),
            ("hsm.keys mode of", listed(bindings)),
            ("rotation or retention of", listed(rotations)),
        ]
        .into_iter()
        .filter_map(|(what, names)| names.map(|names| format!("{what} {names}")))
    }
}

fn word(binding: BindingMode) -> &'static str {
    match binding {
        BindingMode::None => "none",
        BindingMode::Shared => "shared",
        BindingMode::Private => "private",
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use hsm_core::envelope::Binding;

    use super::*;
    use crate::config::{Hsm, PinSource, Slot};
    use crate::rotation::testing::{World, context};

    fn configured(slots: &[(&str, &[&str])], bindings: &[(&str, Binding)]) -> Configured {
        let slot = |(name, contexts): &(&str, &[&str])| {
            let contexts = contexts.iter().map(|name| context(name)).collect();
            Slot {
                name: SlotName::new(name).unwrap(),
                label: format!("slot-{name}"),
                pin: PinSource::File {
                    key: format!("hsm.slots.{name}.pin_file"),
                    path: "/nonexistent/pin".into(),
                },
                contexts,
                insecure_pin: false,
                threads: 1,
                queue: 16,
                pkcs11_lib: "/nonexistent/libhsm.so".into(),
            }
        };
        let bindings = bindings.iter().map(|(name, binding)| (context(name), *binding));
        let hsm = Hsm::of(slots.iter().map(slot).collect(), bindings);
        Configured {
            placements: Placements::of(&hsm),
            rotation: Some(RotationPolicy::default()),
        }
    }

    /// With the contexts `made`, shared in slot `one`, and `other`, shared in slot `two`.
    fn world() -> World {
        let mut world = World::new(1);
        world.context("made", "one");
        world.context("other", "two");
        world
    }

    #[test]
    fn what_was_created_as_it_is_written_agrees_and_so_does_what_is_not_written() {
        let world = world();
        let agrees = |ours: Configured| {
            ContextDifferences::between(&ours, &world.state) == ContextDifferences::default()
        };
        assert!(agrees(Configured::default()));
        // Not made yet, or bound by somebody who named another binding than the default.
        assert!(agrees(configured(&[("one", &["made", "to-be-made"])], &[])));
        let both: &[(&str, &[&str])] = &[("one", &["made"]), ("two", &["other"])];
        assert!(agrees(configured(both, &[("made", Binding::Shared)])));
    }

    #[test]
    fn a_context_that_was_moved_is_where_it_was_moved_to() {
        let mut world = world();
        world.second_slot("two");
        let found = |world: &World| {
            let ours = configured(&[("two", &["made"])], &[]);
            ContextDifferences::between(&ours, &world.state).slots
        };
        assert_eq!(found(&world), [(context("made"), SlotName::new("one").unwrap())]);
        world.move_to("made", "two");
        assert!(found(&world).is_empty());
    }

    #[test]
    fn another_slot_another_binding_and_another_rotation_are_each_named() {
        let world = world();
        let mut ours = configured(
            &[("one", &["other"]), ("two", &[])],
            &[("made", Binding::Private), ("other", Binding::Shared)],
        );
        let found = ContextDifferences::between(&ours, &world.state);
        assert_eq!(found.slots, [(context("other"), SlotName::new("two").unwrap())]);
        assert_eq!(found.bindings, [(context("made"), BindingMode::Shared)]);
        assert!(found.rotations.is_empty());
        let parts: Vec<String> = found.parts().collect();
        assert_eq!(
            parts,
            [
                "hsm.slots of other (its new versions are made in two)",
                "hsm.keys mode of made (it is shared)"
            ]
        );
        ours.rotation = Some(RotationPolicy {
            interval_days: 7,
            ..RotationPolicy::default()
        });
        let found = ContextDifferences::between(&ours, &world.state);
        assert_eq!(
            found.rotations,
            [context("other")],
            "the others are not named here"
        );
    }
}
