//! Scenarios that mostly wait, for elections and time-outs: at once, each on a cluster of its own. Each stands in the file of
//! its question.

use std::panic::resume_unwind;
use std::thread;

use crate::{failover, identity, partition};

type Lane = &'static [fn()];

const LANES: [Lane; 4] = [
    &[
        partition::an_isolated_leader_refuses_and_its_log_does_not_grow,
        identity::a_wiped_node_is_refused_under_its_old_identity,
    ],
    &[
        partition::a_leader_and_one_follower_of_five_cut_off_together_are_both_stale,
        partition::a_node_restarted_in_isolation_never_passes_the_start_gate,
    ],
    &[
        partition::a_leader_under_load_outlives_the_return_of_followers_that_lack_more_than_its_log,
        failover::a_whole_cluster_killed_at_once_comes_back_with_everything_acknowledged,
    ],
    &[
        failover::a_node_that_missed_more_than_the_log_keeps_catches_up_by_snapshot,
        identity::a_directory_put_back_from_an_older_copy_poisons_itself,
        identity::a_founders_copy_from_when_it_was_alone_does_not_stay_ready,
    ],
];

#[test]
fn what_mostly_waits() {
    let running = LANES.map(|lane| thread::spawn(move || lane.iter().for_each(|scenario| scenario())));
    // All are waited for, so that none leaves its nodes behind.
    let ended = running.map(thread::JoinHandle::join);
    for lane in ended {
        if let Err(panic) = lane {
            resume_unwind(panic);
        }
    }
}
