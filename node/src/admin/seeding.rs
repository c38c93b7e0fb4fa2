//! Revocations of a node's configuration are added to the state whenever the node begins to lead: what
//! a founder could not finish, and what was written into any member's file since. Nothing is ever taken
//! out, and access control is never touched.

use std::sync::Arc;
use std::time::Duration;

use hsm_api::ErrorCode;
use raft_store::codec::{self, MAX_COMMAND_BYTES};
use raft_store::command::{AddRevocations, Op};
use raft_store::state::ClusterState;
use raft_store::state::access::RevocationKey;
use tokio::time::Instant;

use super::call::CallError;
use crate::consensus::ProposeError;
use crate::rotation::cluster::{Cluster, catch_up};

/// Most revocations of one command. The rest follows in commands of its own.
pub const MAX_REVOCATIONS: usize = 100;
/// Bytes of a command that revocations may take up; the founding one holds access control besides.
const MAX_BYTES: usize = MAX_COMMAND_BYTES / 2;

/// Between looks; changes of the state wake the driver at once, and so does a new leader's first entry.
const LOOK: Duration = Duration::from_millis(1000);
/// After a failure: each proposal may be an entry in the log.
const AFTER_ERROR: Duration = Duration::from_millis(1000);
/// How long a new leader's state may take to hold everything that was committed before.
const CATCH_UP: Duration = Duration::from_secs(5);

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

/// Adds what the state lacks of `wanted`, on the leader; returns how many that were.
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
        cluster.propose_as_leader(op).await?;
        rest = later;
    }
    Ok(lacking.len())
}

/// Adds the configuration's revocations once in each term that this node leads, until the consensus of
/// this node ends.
pub async fn drive(cluster: Arc<dyn Cluster>, wanted: Vec<(RevocationKey, String)>) {
    if wanted.is_empty() {
        return;
    }
    let mut applied = cluster.applied();
    let mut done_in = None;
    loop {
        applied.borrow_and_update();
        if !look(&*cluster, &wanted, &mut done_in).await {
            // Not cut short by what is applied: a refusal is an entry too.
            tokio::time::sleep(AFTER_ERROR).await;
            continue;
        }
        if let Ok(Err(_)) = tokio::time::timeout(LOOK, applied.changed()).await {
            return;
        }
    }
}

/// Looks once. False: something failed and is to be tried again. `done_in` is the term in which nothing
/// is left to do.
async fn look(cluster: &dyn Cluster, wanted: &[(RevocationKey, String)], done_in: &mut Option<u64>) -> bool {
    let Some(term) = cluster.leadership().map(|leadership| leadership.term) else {
        return true;
    };
    // A founder leads before there is a cluster to add to; its own command brings the first ones.
    if *done_in == Some(term) || cluster.published().state.meta().is_none() {
        return true;
    }
    match add(cluster, wanted).await {
        Ok(added) => {
            *done_in = Some(term);
            if added > 0 {
                tracing::info!(target: "audit", epoch = crate::logging::epoch(), added, term, "revocations of this node's configuration added");
            }
            true
        }
        Err(error) => {
            let CallError { code, detail } = &error;
            // These end by themselves, or another leader takes over.
            if matches!(
                code,
                ErrorCode::NotLeader | ErrorCode::NoQuorum | ErrorCode::NodeDraining
            ) {
                tracing::debug!(term, detail, "revocations of this node's configuration wait");
                return false;
            }
            // A refusal would be the same again, and an entry of the log each time.
            let refused = matches!(code, ErrorCode::InvalidArgument | ErrorCode::AccessDenied);
            tracing::error!(
                target: "audit", epoch = crate::logging::epoch(),
                term,
                detail,
                again = !refused,
                "revocations of this node's configuration not added"
            );
            if refused {
                *done_in = Some(term);
            }
            refused
        }
    }
}

async fn add(cluster: &dyn Cluster, wanted: &[(RevocationKey, String)]) -> Result<usize, CallError> {
    // What only seems to be missing would become entries of the log.
    catch_up(cluster, Instant::now() + CATCH_UP).await?;
    Ok(add_missing(cluster, wanted).await?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::rotation::cluster::{Waited, wait_leading};
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

    fn commands(cluster: &FakeCluster) -> usize {
        cluster.count(|op| matches!(op, Op::AddRevocations(_)))
    }

    fn revoked(cluster: &FakeCluster) -> usize {
        cluster.with(|world| world.state.revocations().len())
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
    async fn a_leader_goes_on_where_the_founder_stopped() {
        let all = wanted(250);
        let cluster = FakeCluster::new(world_with(&all[..100]));
        let mut done_in = None;
        assert!(look(&*cluster, &all, &mut done_in).await);
        assert_eq!(done_in, Some(1));
        assert_eq!(revoked(&cluster), 250);
        assert_eq!(commands(&cluster), 1 + 2, "the founder's and two for the rest");
    }

    #[tokio::test]
    async fn it_is_done_once_in_a_term_and_again_in_the_next() {
        let cluster = FakeCluster::new(World::new(1));
        let mut done_in = None;
        assert!(look(&*cluster, &wanted(1), &mut done_in).await);
        assert!(look(&*cluster, &wanted(2), &mut done_in).await);
        assert_eq!(revoked(&cluster), 1);
        if let Some(leadership) = &mut *cluster.leadership.lock().unwrap() {
            leadership.term = 2;
        }
        assert!(look(&*cluster, &wanted(2), &mut done_in).await);
        assert_eq!(revoked(&cluster), 2);
    }

    #[tokio::test]
    async fn who_does_not_lead_or_has_no_cluster_proposes_nothing() {
        let cluster = FakeCluster::new(World::new(1));
        *cluster.leadership.lock().unwrap() = None;
        let mut done_in = None;
        assert!(look(&*cluster, &wanted(1), &mut done_in).await);
        assert_eq!((commands(&cluster), done_in), (0, None));

        let cluster = FakeCluster::new(World {
            state: ClusterState::default(),
            index: 1,
            voters: BTreeSet::from([1]),
            log: Vec::new(),
        });
        assert!(look(&*cluster, &wanted(1), &mut done_in).await);
        assert_eq!((commands(&cluster), done_in), (0, None));
    }

    #[tokio::test]
    async fn a_failure_is_tried_again() {
        let cluster = FakeCluster::new(World::new(1));
        let mut done_in = None;
        for error in [ProposeError::NoQuorum, ProposeError::NoSpace] {
            cluster.failures.lock().unwrap().push((error, false));
            assert!(!look(&*cluster, &wanted(1), &mut done_in).await);
            assert_eq!((revoked(&cluster), done_in), (0, None));
        }
        // The answer is lost, and what was done is seen at the next look.
        cluster
            .failures
            .lock()
            .unwrap()
            .push((ProposeError::Unknown, true));
        assert!(!look(&*cluster, &wanted(1), &mut done_in).await);
        assert!(look(&*cluster, &wanted(1), &mut done_in).await);
        assert_eq!((revoked(&cluster), commands(&cluster)), (1, 1));
        assert_eq!(done_in, Some(1));
    }

    #[tokio::test]
    async fn a_node_that_begins_to_lead_later_adds_its_own() {
        let cluster = FakeCluster::new(World::new(1));
        let leadership = cluster.leadership.lock().unwrap().take();
        let driver = tokio::spawn(drive(Arc::clone(&cluster) as Arc<dyn Cluster>, wanted(101)));
        tokio::task::yield_now().await;
        *cluster.leadership.lock().unwrap() = leadership;
        // A new leader's first entry is applied.
        cluster.with(|world| world.index += 1);
        let deadline = Instant::now() + Duration::from_secs(20);
        let complete = wait_leading(&*cluster, deadline, |published| {
            (published.state.revocations().len() == 101).then_some(())
        });
        assert_eq!(complete.await, Waited::Met(()));
        driver.abort();
    }
}
