//! How a prepared version ends: active, or given up. Read from the state, so that everybody who waits
//! for one version is told the same.

use hsm_api::ErrorCode;
use raft_store::names::ContextName;
use raft_store::state::ClusterState;
use raft_store::state::context::VersionState;

use crate::admin::call::CallError;

/// A version that is, or was, active.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made {
    /// Its number.
    pub version: u32,
    /// Its label.
    pub key_id: String,
    /// Its state now.
    pub state: VersionState,
    /// The version that was active before it.
    pub previous: Option<u32>,
}

/// How a prepared version ended; `None` while it is pending.
pub fn outcome(state: &ClusterState, context: &ContextName, number: u32) -> Option<Result<Made, CallError>> {
    let version = state.version(context, number)?;
    if version.state == VersionState::Abandoned {
        let detail = format!(
            "version {number} of {context} was abandoned ({}); its number is not used again, ask again \
             for the next one",
            version.note
        );
        return Some(Err(CallError::new(ErrorCode::KeyVersionNotReady, detail)));
    }
    version.activated_at?;
    let before = state.versions_of(context).filter(|(other, _)| *other < number);
    let previous = before
        .filter(|(_, v)| v.activated_at.is_some())
        .map(|(other, _)| other)
        .max();
    Some(Ok(Made {
        version: number,
        key_id: version.label.clone(),
        state: version.state,
        previous,
    }))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::testing::{World, context};
    use super::*;

    #[test]
    fn a_version_ends_active_or_abandoned_and_stays_so() {
        let mut world = World::new(1);
        let ended = |world: &World, version| outcome(&world.state, &context("c"), version);
        assert!(ended(&world, 1).is_none());
        world.prepare("c");
        assert!(ended(&world, 1).is_none());
        world.activate("c", 1);
        world.prepare("c");
        world.abandon("c", 2);
        world.prepare("c");
        world.activate("c", 3);
        let first = ended(&world, 1).unwrap().unwrap();
        assert_eq!((first.state, first.previous), (VersionState::DecryptOnly, None));
        let error = ended(&world, 2).unwrap().unwrap_err();
        assert_eq!(error.code, ErrorCode::KeyVersionNotReady);
        // A gap is no version that was active before.
        assert_eq!(ended(&world, 3).unwrap().unwrap().previous, Some(1));
    }
}
