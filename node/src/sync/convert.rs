//! The one place where names of the token world and of the replicated state meet: two crates that
//! never see each other have types of their own for the same things.

use hsm_core::envelope::Binding;
use hsm_core::names as token;
use raft_store::names as state;
use raft_store::state::context::BindingMode;

/// A key's id, for the token.
pub fn to_token_key(uid: state::KeyUid) -> token::KeyUid {
    token::KeyUid::from_bytes(uid.0)
}

/// A key's id, for the state.
pub fn to_state_key(uid: token::KeyUid) -> state::KeyUid {
    state::KeyUid(*uid.as_bytes())
}

/// A transport key's id, for the token.
pub fn to_token_transport(id: state::TransportId) -> token::TransportId {
    token::TransportId::from_bytes(id.0)
}

/// A transport key's id, for the state.
pub fn to_state_transport(id: token::TransportId) -> state::TransportId {
    state::TransportId(*id.as_bytes())
}

/// What ciphertexts of a context are bound to, for the token.
pub fn to_token_binding(mode: BindingMode) -> Binding {
    match mode {
        BindingMode::None => Binding::None,
        BindingMode::Shared => Binding::Shared,
        BindingMode::Private => Binding::Private,
    }
}

/// What ciphertexts of a context are bound to, for the state.
pub fn to_state_binding(binding: Binding) -> BindingMode {
    match binding {
        Binding::None => BindingMode::None,
        Binding::Shared => BindingMode::Shared,
        Binding::Private => BindingMode::Private,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_the_way_to_the_token_and_back() {
        let uid = state::KeyUid([7; 16]);
        assert_eq!(to_state_key(to_token_key(uid)), uid);
        assert_eq!(to_token_key(uid).to_string(), uid.to_string());
        let id = state::TransportId([9; 16]);
        assert_eq!(to_state_transport(to_token_transport(id)), id);
        for binding in [Binding::None, Binding::Shared, Binding::Private] {
            assert_eq!(to_token_binding(to_state_binding(binding)), binding);
        }
    }
}
