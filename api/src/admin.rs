//! Requests and answers of the admin routes: cluster, members, keys, rotation. Times are RFC 3339
//! in UTC, ids and hashes hex. Members are added here, never removed or given another meaning.

mod access;
mod cluster;
mod keys;
mod rekey;

use serde::{Deserialize, Serialize};

pub use access::*;
pub use cluster::*;
pub use keys::*;
pub use rekey::*;

/// Answer of `GET /admin/v1/whoami`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WhoAmI {
    /// The last CN of the certificate.
    pub cn: String,
    /// Its first OU.
    pub ou: Option<String>,
    /// Its admin roles.
    pub roles: Vec<String>,
    /// The contexts it may use.
    pub contexts: Vec<String>,
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::wire::SecretText;

    #[test]
    fn an_older_client_reads_a_newer_nodes_words() {
        let slot: MemberSlot =
            serde_json::from_value(json!({"slot": "x", "state": "on_fire", "new": 1})).unwrap();
        assert_eq!(slot.state, SlotState::Unknown);
    }

    #[test]
    fn an_older_nodes_answer_is_read_without_what_it_does_not_say() {
        let member: Member = serde_json::from_value(json!({
            "node_id": "hsm-node-1", "raft_id": 1, "role": "voter", "api_address": "a:1",
            "cluster_address": "a:2", "is_leader": true, "slots": [], "joined_at": "2030-01-01T00:00:00Z"
        }))
        .unwrap();
        assert_eq!(member.state, None);
        assert!(!serde_json::to_string(&member).unwrap().contains("state"));
    }

    #[test]
    fn every_word_round_trips() {
        for &state in KeyState::ALL {
            let json = serde_json::to_string(&state).unwrap();
            assert_eq!(serde_json::from_str::<KeyState>(&json).unwrap(), state);
            assert_eq!(json, format!("\"{state}\""));
        }
        assert_eq!(KeyState::DestroyScheduled.as_str(), "destroy_scheduled");
    }

    #[test]
    fn optional_members_are_left_out_of_requests() {
        assert_eq!(
            serde_json::to_value(CreateKekRequest::new("2fa")).unwrap(),
            json!({"context": "2fa"})
        );
        assert_eq!(
            serde_json::to_value(JoinTokenRequest::default()).unwrap(),
            json!({})
        );
        assert_eq!(serde_json::to_value(ClusterInitRequest {}).unwrap(), json!({}));
    }

    #[test]
    fn a_join_token_is_not_printed() {
        let request = JoinRequest {
            token: SecretText::from("canary"),
            cluster_ca_sha256: "00".to_owned(),
            leader_addresses: vec!["127.0.0.1:8445".to_owned()],
        };
        assert!(!format!("{request:?}").contains("canary"));
        assert_eq!(serde_json::to_value(&request).unwrap()["token"], "canary");
    }
}
