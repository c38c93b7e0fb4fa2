//! Revoked certificates, asked about once for each request. Only the replicated state fills it, and shares its rows: a
//! change costs nothing here, however many there are. A file that disappears takes nothing out.

use std::collections::BTreeSet;
use std::fmt;

use raft_store::state::access::Revocation;
use raft_store::state::table::Table;

use super::RevocationKey;
use crate::identity::Principal;

/// A set of revocations; one look for each way in which a certificate can be named.
#[derive(Clone)]
pub struct Revocations(Kept);

#[derive(Clone)]
enum Kept {
    /// Those of the state: a clone of its table.
    State(Table<RevocationKey, Revocation>),
    /// Before there is a state, and of questions.
    Listed(BTreeSet<RevocationKey>),
}

impl Revocations {
    /// Those of a state.
    #[must_use]
    pub fn of_state(revocations: &Table<RevocationKey, Revocation>) -> Self {
        Self(Kept::State(revocations.clone()))
    }

    /// Whether any revocation matches the certificate, or one of a CA that it hangs on.
    #[must_use]
    pub fn contains(&self, principal: &Principal) -> bool {
        !self.is_empty() && principal.revoked_by().iter().any(|key| self.has(key))
    }

    fn has(&self, key: &RevocationKey) -> bool {
        match &self.0 {
            Kept::State(table) => table.contains(key),
            Kept::Listed(keys) => keys.contains(key),
        }
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        match &self.0 {
            Kept::State(table) => table.len(),
            Kept::Listed(keys) => keys.len(),
        }
    }

    /// True if nothing is revoked.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Default for Revocations {
    fn default() -> Self {
        Self(Kept::Listed(BTreeSet::new()))
    }
}

impl fmt::Debug for Revocations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} revocations", self.len())
    }
}

impl FromIterator<RevocationKey> for Revocations {
    fn from_iter<I: IntoIterator<Item = RevocationKey>>(keys: I) -> Self {
        Self(Kept::Listed(keys.into_iter().collect()))
    }
}
