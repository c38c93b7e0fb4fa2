//! Every path of the API, in one place, so that server, client and tests cannot drift apart.

/// `POST`: encrypt one plaintext.
pub const ENCRYPT: &str = "/encrypt";
/// `POST`: decrypt one ciphertext.
pub const DECRYPT: &str = "/decrypt";
/// `GET`: v1's health document.
pub const HEALTH: &str = "/health";
/// `GET`: Prometheus text.
pub const METRICS: &str = "/metrics";

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
/// `GET`: all contexts and key versions; `POST`: create a KEK.
pub const KEYS: &str = "/admin/v1/keys";
/// `POST`: rotate a context, as a route pattern; clients use [`rotate`].
pub const KEYS_ROTATE_PATTERN: &str = "/admin/v1/keys/{context}/rotate";
/// `GET`: where each context stands in its rotation.
pub const ROTATION_STATUS: &str = "/admin/v1/keys/rotation-status";
/// `POST`: open a slot of the node that is asked, as a route pattern; clients use [`unlock_slot`].
pub const SLOT_UNLOCK_PATTERN: &str = "/admin/v1/slots/{slot}/unlock";
/// `GET`: who the caller is to this node.
pub const WHOAMI: &str = "/admin/v1/whoami";

/// Health listener, `GET`: 200 while the process runs.
pub const LIVEZ: &str = "/livez";
/// Health listener, `GET`: 200 while the node may be sent requests.
pub const READYZ: &str = "/readyz";
/// Health listener, `POST`, only in builds with feature `failpoints`.
pub const FAILPOINTS: &str = "/failpoints";

/// Path of [`KEYS_ROTATE_PATTERN`] for one context.
#[must_use]
pub fn rotate(context: &str) -> String {
    format!("{KEYS}/{}/rotate", encode_segment(context))
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
        assert_eq!(unlock_slot("a/b"), "/admin/v1/slots/a%2Fb/unlock");
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
            KEYS,
            KEYS_ROTATE_PATTERN,
            ROTATION_STATUS,
            SLOT_UNLOCK_PATTERN,
            WHOAMI,
        ] {
            assert!(path.starts_with(ADMIN_PREFIX), "{path}");
        }
    }
}
