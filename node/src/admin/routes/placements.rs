//! Where this node's configuration puts contexts: what a new context is made of. Holds nothing else of
//! the configuration, which may hold a PIN.

use std::collections::BTreeMap;

use hsm_core::envelope::Binding;
use raft_store::names::{ContextName, SlotName};
use raft_store::state::context::BindingMode;

use crate::config::Hsm;

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Placements {
    slots: BTreeMap<ContextName, SlotName>,
    bindings: BTreeMap<ContextName, BindingMode>,
}

impl Placements {
    /// Reads them from the configuration.
    #[must_use]
    pub fn of(hsm: &Hsm) -> Self {
        let slots = hsm.slots.iter().flat_map(|slot| {
            slot.contexts
                .iter()
                .map(|context| (context.clone(), slot.name.clone()))
        });
        let bindings = hsm
            .bindings
            .iter()
            .map(|(context, binding)| (context.clone(), mode(*binding)));
        Self {
            slots: slots.collect(),
            bindings: bindings.collect(),
        }
    }

    /// The slot of a context.
    #[must_use]
    pub fn slot(&self, context: &ContextName) -> Option<SlotName> {
        self.slots.get(context).cloned()
    }

    /// Whom its ciphertexts are bound to: v1's default is `private`.
    #[must_use]
    pub fn binding(&self, context: &ContextName) -> BindingMode {
        self.written_binding(context).unwrap_or(BindingMode::Private)
    }

    /// Whom its ciphertexts are bound to, if the configuration says so.
    #[must_use]
    pub fn written_binding(&self, context: &ContextName) -> Option<BindingMode> {
        self.bindings.get(context).copied()
    }
}

fn mode(binding: Binding) -> BindingMode {
    match binding {
        Binding::None => BindingMode::None,
        Binding::Shared => BindingMode::Shared,
        Binding::Private => BindingMode::Private,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_context_is_private_unless_the_configuration_says_otherwise() {
        let context = |name: &str| ContextName::new(name).unwrap();
        let hsm = Hsm::of(Vec::new(), [(context("a"), Binding::Shared)]);
        let placements = Placements::of(&hsm);
        assert_eq!(placements.binding(&context("a")), BindingMode::Shared);
        assert_eq!(placements.binding(&context("b")), BindingMode::Private);
        assert_eq!(placements.slot(&context("a")), None);
    }
}
