//! What every node says at the end of a run, when everything is healed; kept in the run's folder.

use std::collections::BTreeMap;

use hsm_api::admin::KeyState;
use serde::{Deserialize, Serialize};

/// See the module.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Observed {
    /// All members.
    pub nodes: Vec<NodeView>,
    /// Files that were searched for secrets.
    pub searched: u64,
    /// Secrets that were found, with the file.
    pub leaked: Vec<String>,
    /// The search has found the secrets where they have to be.
    pub search_finds: bool,
}

/// A node. What it did not say is absent.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct NodeView {
    /// Its number.
    pub node: u32,
    /// Whether it is ready.
    pub ready: bool,
    /// What it could not be asked, and why.
    pub silent: Vec<String>,
    /// Its contexts.
    pub keys: Option<Vec<ContextState>>,
    /// The value in access control.
    pub acl: Option<u64>,
    /// Common names that are revoked.
    pub revoked: Option<Vec<String>>,
    /// Its state's index and digest, at some moments.
    pub digests: Vec<(u64, String)>,
    /// What it made of ciphertexts that were handed out.
    pub opened: Vec<Opened>,
    /// What its tokens hold, past the node.
    pub tokens: Vec<TokenView>,
}

/// A context on a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContextState {
    /// Its name.
    pub context: String,
    /// The version that encrypts.
    pub active: Option<u32>,
    /// All versions, in the order in which they were listed.
    pub versions: Vec<VersionView>,
}

/// A version on a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionView {
    /// Its number.
    pub number: u32,
    /// Its state.
    pub state: KeyState,
    /// It was active once.
    pub activated: bool,
    /// `CKA_ID`, hex.
    pub id: String,
    /// The slot whose tokens hold it.
    pub slot: String,
}

/// Ciphertexts of one version on a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opened {
    /// Their context.
    pub context: String,
    /// Their version.
    pub version: u32,
    /// Right plaintexts.
    pub right: u64,
    /// Other plaintexts.
    pub wrong: u64,
    /// Refusals by their codes.
    pub refused: BTreeMap<String, u64>,
}

/// A token of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenView {
    /// Its slot.
    pub slot: String,
    /// `CKA_ID` of every secret key, hex.
    pub ids: Vec<String>,
}

impl NodeView {
    /// A context of it.
    #[must_use]
    pub fn context(&self, name: &str) -> Option<&ContextState> {
        self.keys.as_ref()?.iter().find(|known| known.context == name)
    }

    /// A version of it.
    #[must_use]
    pub fn version(&self, context: &str, number: u32) -> Option<&VersionView> {
        let versions = &self.context(context)?.versions;
        versions.iter().find(|version| version.number == number)
    }
}
