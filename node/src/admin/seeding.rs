//! Adding revocations of configurations to the state: those that it lacks, in commands that are no larger than they may
//! be. Nothing is ever taken out, and access control is never touched.

use raft_store::codec::{self, MAX_COMMAND_BYTES};
use raft_store::command::{AddRevocations, Op};
use raft_store::state::ClusterState;
use raft_store::state::access::RevocationKey;

use crate::consensus::ProposeError;
use crate::rotation::cluster::Cluster;

/// Most revocations of one command. The rest follows in commands of its own.
pub const MAX_REVOCATIONS: usize = 100;
/// Bytes of a command that revocations may take up; the founding one holds access control besides.
const MAX_BYTES: usize = MAX_COMMAND_BYTES / 2;

/// Those of `wanted` that the state does not have, whatever reason stands there.
#[must_use]
pub fn missing(wanted: &[(RevocationKey, String)], state: &ClusterState) -> Vec<(RevocationKey, String)> {
    let lacks = |key: &RevocationKey| !state.revocations().contains(key);
    wanted.iter().filter(|(key, _)| lacks(key)).cloned().collect()
}

/// How many revocations from the first on fit into one command with certainty; one at least.
pub(super) fn fitting(revocations: &[(RevocationKey, String)]) -> usize {
    let mut bytes = 0_usize;
    let fits = |revocation: &&(RevocationKey, String)| {
        let more = codec::encode(*revocation).map_or(usize::MAX, |encoded| encoded.len());
        bytes = bytes.saturating_add(more);
        bytes <= MAX_BYTES
    };
    let most = revocations.len().min(MAX_REVOCATIONS);
    let count = revocations[..most].iter().take_while(fits).count();
    count.max(most.min(1))
}

/// Adds what the state lacks of `wanted`, by this node's own word, wherever the leader is; returns how many that were.
pub(super) async fn add_missing(
    cluster: &dyn Cluster,
    wanted: &[(RevocationKey, String)],
) -> Result<usize, ProposeError> {
    let lacking = missing(wanted, &cluster.published().state);
    let mut rest = lacking.as_slice();
    while !rest.is_empty() {
        let (chunk, later) = rest.split_at(fitting(rest));
        let op = Op::AddRevocations(AddRevocations {
            revocations: chunk.to_vec(),
        });
        cluster.propose_as_node(op).await?;
        rest = later;
    }
    Ok(lacking.len())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::rotation::testing::{FakeCluster, World};

    fn wanted(n: usize) -> Vec<(RevocationKey, String)> {
        (0..n)
            .map(|i| (RevocationKey::CommonName(format!("c{i}")), "lost".to_owned()))
            .collect()
    }

    fn world_with(revocations: &[(RevocationKey, String)]) -> World {
        let mut world = World::new(1);
        world.ok(Op::AddRevocations(AddRevocations {
            revocations: revocations.to_vec(),
        }));
        world
    }

    #[test]
    fn what_the_state_has_under_another_reason_is_not_missing() {
        let mut all = wanted(3);
        let world = world_with(&all[..2]);
        all[0].1 = "stolen".to_owned();
        assert_eq!(missing(&all, &world.state), all[2..]);
        assert!(missing(&all[..2], &world.state).is_empty());
        assert_eq!(missing(&all, &ClusterState::default()), all);
    }

    #[test]
    fn a_serial_number_of_another_issuer_is_missing() {
        let of = |issuer: &str| {
            let key = RevocationKey::Serial {
                issuer: issuer.to_owned(),
                serial: "ab".to_owned(),
            };
            (key, String::new())
        };
        let world = world_with(&[of("CN=A")]);
        assert_eq!(missing(&[of("CN=A"), of("CN=B")], &world.state), [of("CN=B")]);
    }

    #[test]
    fn a_command_takes_a_hundred_or_half_of_its_bytes() {
        assert_eq!(fitting(&wanted(0)), 0);
        assert_eq!(fitting(&wanted(7)), 7);
        assert_eq!(fitting(&wanted(101)), MAX_REVOCATIONS);
        let long = |bytes: usize| (RevocationKey::CommonName("x".repeat(bytes)), String::new());
        assert_eq!(fitting(&[long(MAX_BYTES), long(1)]), 1, "one at least");
        let several = vec![long(1000); 100];
        let taken = fitting(&several);
        assert!((25..33).contains(&taken), "{taken}");
    }

    #[tokio::test]
    async fn only_what_is_missing_is_added_and_no_command_is_too_large() {
        let all = wanted(250);
        let cluster = FakeCluster::new(world_with(&all[..100]));
        assert_eq!(add_missing(&*cluster, &all).await.unwrap(), 150);
        assert_eq!(cluster.with(|world| world.state.revocations().len()), 250);
        let commands = || cluster.count(|op| matches!(op, Op::AddRevocations(_)));
        assert_eq!(commands(), 1 + 2, "the first ones, and two for the rest");
        assert_eq!(add_missing(&*cluster, &all).await.unwrap(), 0);
        assert_eq!(commands(), 3);
    }
}
