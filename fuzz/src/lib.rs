//! Every parser of the service with a property that holds whatever the bytes are. The properties stand beside the
//! parsers, behind the feature `fuzzing`; here is the list of them. Three things feed it: the corpus and what once
//! broke a parser (`tests/replay.rs`), changes of the corpus by chance (the same), and libFuzzer (`make fuzz`).
#![warn(missing_docs)]

mod api;

use std::path::PathBuf;

/// A parser.
pub struct Target {
    /// Its name, and that of its folder in the corpus.
    pub name: &'static str,
    /// Whether the bytes are accepted. Panics where the property does not hold.
    pub check: fn(&[u8]) -> bool,
}

const fn target(name: &'static str, check: fn(&[u8]) -> bool) -> Target {
    Target { name, check }
}

/// All of them.
pub const TARGETS: &[Target] = &[
    // hsm-core
    target("check_record", hsm_core::fuzzing::check_record),
    target("envelope", hsm_core::fuzzing::envelope),
    target("grant", hsm_core::fuzzing::grant),
    target("key_uid", hsm_core::fuzzing::key_uid),
    target("object_file", hsm_core::fuzzing::object_file),
    target("pin_entropy", hsm_core::fuzzing::pin_entropy),
    target("replication_key", hsm_core::fuzzing::replication_key),
    target("sealed_key", hsm_core::fuzzing::sealed_key),
    target("spki", hsm_core::fuzzing::spki),
    // raft-store
    target("command", raft_store::fuzzing::command),
    target("commands", raft_store::fuzzing::commands),
    target("control_slot", raft_store::fuzzing::control_slot),
    target("frames", raft_store::fuzzing::frames),
    target("log_record", raft_store::fuzzing::log_record),
    target("name", raft_store::fuzzing::name),
    target("row", raft_store::fuzzing::row),
    target("row_key", raft_store::fuzzing::row_key),
    target("snapshot", raft_store::fuzzing::snapshot),
    // node
    target("acl_document", hsm_node::fuzzing::acl_document),
    target("certificate", hsm_node::fuzzing::certificate),
    target("ciphertext", hsm_node::fuzzing::ciphertext),
    target("client_cert", hsm_node::fuzzing::client_cert),
    target("config", hsm_node::fuzzing::config),
    target("crl", hsm_node::fuzzing::crl),
    target("distinguished_name", hsm_node::fuzzing::distinguished_name),
    target("go_base64", hsm_node::fuzzing::go_base64),
    target("join_token", hsm_node::fuzzing::join_token),
    target("proxy_header", hsm_node::fuzzing::proxy_header),
    target("request_id", hsm_node::fuzzing::request_id),
    target("request_json", hsm_node::fuzzing::request_json),
    target("revocation", hsm_node::fuzzing::revocation),
    target("revoked_file", hsm_node::fuzzing::revoked_file),
    target("secret_file", hsm_node::fuzzing::secret_file),
    target("traceparent", hsm_node::fuzzing::traceparent),
    target("wire", hsm_node::fuzzing::wire),
    // api
    target("problem", api::problem),
    target("state_index", api::state_index),
    target("v1_metadata", api::v1_metadata),
    // hsmctl
    target("cli_arguments", admin_cli::fuzzing::arguments),
    target("cli_profile", admin_cli::fuzzing::profile),
    target("cli_profiles", admin_cli::fuzzing::profiles),
    target("cli_secret_file", admin_cli::fuzzing::secret_file),
    target("cli_v1_config", admin_cli::fuzzing::v1_config),
];

/// The target of this name.
#[must_use]
pub fn named(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

/// The folder with a folder for each target: real encodings, of every form that was ever written, and what once broke
/// a parser. The names of files that are refused begin with `refused-` or `crash-`; all others are accepted.
#[must_use]
pub fn corpus() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("corpus")
}
