//! A misspelt key must never be silence, in whatever section it stands.

use super::refusal;

/// Every section of `file.rs`, with the place where a key may stand marked `KEY`.
const SECTIONS: [(&str, &str); 26] = [
    ("", "KEY"),
    ("server", "server: {KEY}"),
    ("server.tls", "server: {tls: {KEY}}"),
    ("server.http2", "server: {http2: {KEY}}"),
    ("server.drain", "server: {drain: {KEY}}"),
    ("server.limits", "server: {limits: {KEY}}"),
    ("server.trusted_proxies[0]", "server: {trusted_proxies: [{KEY}]}"),
    ("hsm", "hsm: {KEY}"),
    ("hsm.slots.exchange", "hsm: {slots: {exchange: {KEY}}}"),
    ("hsm.keys.exchange-key", "hsm: {keys: {exchange-key: {KEY}}}"),
    ("acl", "acl: {KEY}"),
    ("roles.admin[0]", "roles: {admin: [{KEY}]}"),
    ("roles.auditor[1]", "roles: {auditor: [{ou: Audit}, {KEY}]}"),
    ("cluster", "cluster: {KEY}"),
    ("cluster.tls", "cluster: {tls: {KEY}}"),
    ("cluster.coordination", "cluster: {coordination: {KEY}}"),
    ("cluster.raft", "cluster: {raft: {KEY}}"),
    ("cluster.autopilot", "cluster: {autopilot: {KEY}}"),
    ("cluster.token_replication", "cluster: {token_replication: {KEY}}"),
    ("staleness", "staleness: {KEY}"),
    ("keys", "keys: {KEY}"),
    ("keys.destroy", "keys: {destroy: {KEY}}"),
    ("rotation", "rotation: {KEY}"),
    ("rate_limit", "rate_limit: {KEY}"),
    ("logging", "logging: {KEY}"),
    ("metrics", "metrics: {KEY}"),
];

#[test]
fn every_section_refuses_an_unknown_key_with_its_full_path() {
    for (section, text) in SECTIONS {
        let error = refusal(&text.replace("KEY", "nonsense_key: 1"));
        let path = match section {
            "" => "nonsense_key".to_owned(),
            section => format!("{section}.nonsense_key"),
        };
        assert!(
            error.starts_with(&format!("config: {path}: unknown key")),
            "{section}: {error}"
        );
    }
}

#[test]
fn no_section_of_the_file_is_left_out() {
    let structs = include_str!("../file.rs").matches("deny_unknown_fields").count();
    // `roles` stands in the table twice.
    assert_eq!(structs, SECTIONS.len() - 1);
}
