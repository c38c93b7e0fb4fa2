//! Every path of the API, in one place, so that server, client and tests cannot drift apart.

/// `POST`: encrypt one plaintext, or a batch.
pub const ENCRYPT: &str = "/encrypt";
/// `POST`: decrypt one ciphertext, or a batch.
pub const DECRYPT: &str = "/decrypt";
/// `POST`: encrypt one ciphertext, or a batch, under the active key version.
pub const REWRAP: &str = "/rewrap";
/// `POST`: make a data key, or a batch of them.
pub const DATAKEY: &str = "/datakey";
/// `GET`: v1's health document.
pub const HEALTH: &str = "/health";
/// `GET`: Prometheus text.
pub const METRICS: &str = "/metrics";
/// `GET`: the description of this API, OpenAPI 3.1.
pub const OPENAPI: &str = "/openapi.json";

/// What every admin path begins with. These routes need `X-HSM-Request: 1`.
pub const ADMIN_PREFIX: &str = "/admin/v1/";
/// `POST`: make a cluster of the node that is asked.
pub const CLUSTER_INIT: &str = "/admin/v1/cluster/init";
/// `POST`: make a one-time join token.
pub const CLUSTER_TOKENS: &str = "/admin/v1/cluster/tokens";
/// `POST`, to the joining node: join a cluster.
pub const CLUSTER_JOIN: &str = "/admin/v1/cluster/join";
/// `GET`, to the joining node: its own public key in each slot.
pub const CLUSTER_SLOT_KEYS: &str = "/admin/v1/cluster/slot-keys";
/// `GET`: the cluster as the node that is asked sees it.
pub const CLUSTER_STATUS: &str = "/admin/v1/cluster/status";
/// `GET`: all members.
pub const CLUSTER_MEMBERS: &str = "/admin/v1/cluster/members";
/// `POST`: a node leaves the cluster, as a route pattern; clients use [`member`].
pub const CLUSTER_REMOVE_PATTERN: &str = "/admin/v1/cluster/members/{node}/remove";
/// `POST`: a node that was to leave stays; as above.
pub const CLUSTER_KEEP_PATTERN: &str = "/admin/v1/cluster/members/{node}/keep";
/// `POST`: another node leads.
pub const CLUSTER_TRANSFER_LEADER: &str = "/admin/v1/cluster/transfer-leader";
/// `GET`: where the replacement of transport keys and of the replication key stands.
pub const CLUSTER_REKEY: &str = "/admin/v1/cluster/rekey";
/// `POST`: replace a slot's transport key.
pub const CLUSTER_REKEY_TRANSPORT: &str = "/admin/v1/cluster/rekey/transport";
/// `POST`: replace the replication key.
pub const CLUSTER_REKEY_REPLICATION: &str = "/admin/v1/cluster/rekey/replication";
/// `GET`: all contexts and key versions; `POST`: create a KEK.
pub const KEYS: &str = "/admin/v1/keys";
/// `POST`: rotate a context, as a route pattern; clients use [`rotate`].
pub const KEYS_ROTATE_PATTERN: &str = "/admin/v1/keys/{context}/rotate";
/// `POST`: move a context to another slot, as a route pattern; clients use [`relocate`].
pub const KEYS_MOVE_PATTERN: &str = "/admin/v1/keys/{context}/move";
/// `GET`: how often each key version was used, and when last.
pub const KEYS_USAGE: &str = "/admin/v1/keys/usage";
/// `POST`: disable versions that nobody needs any more, by each context's policy.
pub const KEYS_CLEANUP: &str = "/admin/v1/keys/cleanup";
/// `POST`: adopt keys that version 1 made, from a token of the node that is asked.
pub const KEYS_ADOPT: &str = "/admin/v1/keys/adopt";
/// `POST`: take a retired version out of use, as a route pattern; clients use [`key_version`].
pub const KEY_DISABLE_PATTERN: &str = "/admin/v1/keys/{context}/versions/{version}/disable";
/// `POST`: put a disabled version back into use; as above.
pub const KEY_ENABLE_PATTERN: &str = "/admin/v1/keys/{context}/versions/{version}/enable";
/// `POST`: destroy a retired version after a wait; as above.
pub const KEY_DESTROY_PATTERN: &str = "/admin/v1/keys/{context}/versions/{version}/destroy";
/// `POST`: take a destruction back that still waits; as above.
pub const KEY_UNDO_DESTROY_PATTERN: &str = "/admin/v1/keys/{context}/versions/{version}/undo-destroy";
/// `POST`: give an adopted version back to version 1; as above.
pub const KEY_RELEASE_PATTERN: &str = "/admin/v1/keys/{context}/versions/{version}/release";
/// `GET`: where each context stands in its rotation.
pub const ROTATION_STATUS: &str = "/admin/v1/keys/rotation-status";
/// `POST`: open a slot of the node that is asked, as a route pattern; clients use [`unlock_slot`].
pub const SLOT_UNLOCK_PATTERN: &str = "/admin/v1/slots/{slot}/unlock";
/// `GET`: who the caller is to this node.
pub const WHOAMI: &str = "/admin/v1/whoami";
/// `GET`: access control; `POST`: other access control in its place.
pub const ACL: &str = "/admin/v1/acl";
/// `GET`: whether somebody may do something.
pub const ACL_TEST: &str = "/admin/v1/acl/test";
/// `GET`: what is revoked; `POST`: revoke.
pub const REVOCATIONS: &str = "/admin/v1/revocations";
/// `POST`: revoke what a certificate revocation list names.
pub const REVOCATIONS_CRL: &str = "/admin/v1/revocations/crl";
/// `POST`: take a revocation back.
pub const REVOCATIONS_REMOVE: &str = "/admin/v1/revocations/remove";

/// Health listener, `GET`: 200 while the process runs.
pub const LIVEZ: &str = "/livez";
/// Health listener, `GET`: 200 while the node may be sent requests.
pub const READYZ: &str = "/readyz";
/// Health listener, `POST`, only in builds with feature `failpoints`.
pub const FAILPOINTS: &str = "/failpoints";
/// Health listener, `GET`, only in builds with feature `failpoints`: index and digest of the replicated state.
pub const STATE_HASH: &str = "/debug/state-hash";

/// Path of [`KEYS_ROTATE_PATTERN`] for one context.
#[must_use]
pub fn rotate(context: &str) -> String {
    format!("{KEYS}/{}/rotate", encode_segment(context))
}

/// Path of [`KEYS_MOVE_PATTERN`] for one context.
#[must_use]
pub fn relocate(context: &str) -> String {
    format!("{KEYS}/{}/move", encode_segment(context))
}

/// Path of one of the patterns about a key version: what to do with it is its last word, such as `disable`.
#[must_use]
pub fn key_version(context: &str, version: u32, verb: &str) -> String {
    format!(
        "{KEYS}/{}/versions/{version}/{}",
        encode_segment(context),
        encode_segment(verb)
    )
}

/// Path of one of the patterns about a member: what to do with it is its last word, such as `remove`.
#[must_use]
pub fn member(node: &str, verb: &str) -> String {
    format!(
        "{CLUSTER_MEMBERS}/{}/{}",
        encode_segment(node),
        encode_segment(verb)
    )
}

/// Path of [`SLOT_UNLOCK_PATTERN`] for one slot.
#[must_use]
pub fn unlock_slot(slot: &str) -> String {
    format!("{ADMIN_PREFIX}slots/{}/unlock", encode_segment(slot))
}

/// Percent-encodes all but RFC 3986's unreserved characters, `/` too.
#[must_use]
pub fn encode_segment(segment: &str) -> String {
    let mut out = String::with_capacity(segment.len());
    for byte in segment.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(char::from(byte)),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_context_cannot_leave_its_path_segment() {
        assert_eq!(rotate("exchange-key"), "/admin/v1/keys/exchange-key/rotate");
        assert_eq!(rotate("../x?y#ü"), "/admin/v1/keys/..%2Fx%3Fy%23%C3%BC/rotate");
        assert_eq!(relocate("a/b"), "/admin/v1/keys/a%2Fb/move");
        assert_eq!(unlock_slot("a/b"), "/admin/v1/slots/a%2Fb/unlock");
        assert_eq!(
            key_version("a/b", 7, "undo-destroy"),
            "/admin/v1/keys/a%2Fb/versions/7/undo-destroy"
        );
    }

    #[test]
    fn a_verb_is_the_last_word_of_its_pattern() {
        for (pattern, verb) in [
            (KEY_DISABLE_PATTERN, "disable"),
            (KEY_ENABLE_PATTERN, "enable"),
            (KEY_DESTROY_PATTERN, "destroy"),
            (KEY_UNDO_DESTROY_PATTERN, "undo-destroy"),
            (KEY_RELEASE_PATTERN, "release"),
        ] {
            let filled = pattern.replace("{context}", "c").replace("{version}", "3");
            assert_eq!(key_version("c", 3, verb), filled);
        }
        for (pattern, verb) in [(CLUSTER_REMOVE_PATTERN, "remove"), (CLUSTER_KEEP_PATTERN, "keep")] {
            assert_eq!(member("n/2", verb), pattern.replace("{node}", "n%2F2"));
        }
    }

    #[test]
    fn every_admin_path_has_the_admin_prefix() {
        for path in [
            CLUSTER_INIT,
            CLUSTER_TOKENS,
            CLUSTER_JOIN,
            CLUSTER_SLOT_KEYS,
            CLUSTER_STATUS,
            CLUSTER_MEMBERS,
            CLUSTER_REMOVE_PATTERN,
            CLUSTER_KEEP_PATTERN,
            CLUSTER_TRANSFER_LEADER,
            CLUSTER_REKEY,
            CLUSTER_REKEY_TRANSPORT,
            CLUSTER_REKEY_REPLICATION,
            KEYS,
            KEYS_ROTATE_PATTERN,
            KEYS_USAGE,
            KEYS_CLEANUP,
            KEYS_ADOPT,
            KEY_DISABLE_PATTERN,
            KEY_ENABLE_PATTERN,
            KEY_DESTROY_PATTERN,
            KEY_UNDO_DESTROY_PATTERN,
            KEY_RELEASE_PATTERN,
            ROTATION_STATUS,
            SLOT_UNLOCK_PATTERN,
            WHOAMI,
            ACL,
            ACL_TEST,
            REVOCATIONS,
            REVOCATIONS_CRL,
            REVOCATIONS_REMOVE,
        ] {
            assert!(path.starts_with(ADMIN_PREFIX), "{path}");
        }
    }
}
