//! Points at which tests stop or kill this process, or make it lie to the others. Compiled only with the feature
//! `failpoints`, which release packaging refuses.

use hsm_core::names::TransportId as TokenKeyId;
use hsm_core::{HsmError, Slot};
use raft_store::command::{AckVersions, GrantTransportKey, Op};
use raft_store::names::{ContextName, KeyUid, RaftId, SlotName, TransportId};
use raft_store::state::ClusterState;
use raft_store::state::node::SlotKey;
use raft_store::state::slot::{Grant, Grantee};

/// Arms a point: `kill` sends this process SIGKILL there; anything else is an action of the `fail` crate.
///
/// # Errors
/// What is wrong with the action.
pub fn arm(name: &str, action: &str) -> Result<(), String> {
    if action == "kill" {
        return fail::cfg_callback(name, || {
            let own = nix::unistd::Pid::this();
            let _ = nix::sys::signal::kill(own, nix::sys::signal::Signal::SIGKILL);
        });
    }
    fail::cfg(name, action)
}

/// Arms what `HSM_FAILPOINTS` names: `point=action;point=action`.
///
/// # Errors
/// The pair that is wrong.
pub fn arm_from_environment() -> Result<(), String> {
    let Ok(text) = std::env::var("HSM_FAILPOINTS") else {
        return Ok(());
    };
    for pair in text.split(';').filter(|pair| !pair.is_empty()) {
        let (name, action) = pair
            .split_once('=')
            .ok_or_else(|| format!("HSM_FAILPOINTS: {pair}: no `=`"))?;
        arm(name, action).map_err(|error| format!("HSM_FAILPOINTS: {pair}: {error}"))?;
    }
    Ok(())
}

/// The founder's, who is in every cluster.
const FOUNDER: RaftId = 1;

/// `sync::register_other_key`: the key that is registered is not the one that was signed.
pub(crate) fn other_key(mut key: SlotKey) -> SlotKey {
    if is_armed("sync::register_other_key")
        && let Some(byte) = key.spki.last_mut()
    {
        *byte ^= 1;
    }
    key
}

/// `sync::grant_unopenable`: the grant that a holder makes opens with nothing.
pub(crate) fn unopenable(mut grant: Grant) -> Grant {
    if is_armed("sync::grant_unopenable")
        && let Some(byte) = grant.blob.last_mut()
    {
        *byte ^= 1;
    }
    grant
}

/// `sync::grant_planted`: the key that a holder grants is one that it has just made, well wrapped and well sealed.
pub(crate) fn planted(slot: &Slot, id: TokenKeyId) -> Result<TokenKeyId, HsmError> {
    if !is_armed("sync::grant_planted") {
        return Ok(id);
    }
    let planted = TokenKeyId::random()?;
    slot.create_transport_key(planted)?;
    Ok(planted)
}

/// `sync::grant_junk`: what a node proposes in place of its own key, a grant of a key that it does not hold.
pub(crate) fn junk_grant(state: &ClusterState, slot: &SlotName) -> Op {
    let current = state.slots().get(slot).and_then(|slot| slot.current_transport());
    Op::GrantTransportKey(GrantTransportKey {
        slot: slot.clone(),
        id: current.map_or(TransportId::default(), |current| current.id),
        grantee: Grantee::Node(FOUNDER),
        grant: Grant {
            epoch: state.epoch(),
            blob: b"junk".to_vec(),
        },
    })
}

/// `sync::ack_as_other`: what a node acknowledges in another's name.
pub(crate) fn ack_as_other(me: RaftId, versions: &[(ContextName, u32, KeyUid)]) -> Op {
    let node = if me == FOUNDER { FOUNDER + 1 } else { FOUNDER };
    let versions = versions.to_vec();
    Op::AckVersions(AckVersions { node, versions })
}

/// Whether a point is armed with the action `return`.
fn is_armed(name: &str) -> bool {
    fail::fail_point!(name, |_| true);
    false
}
