//! Scenarios that mostly wait, for elections, silences, time-outs and kills: at once, each on a cluster of its own, so that all
//! of them take little longer than the one that watches an isolated leader for a minute. Each stands in the file of its
//! question; `HSM_SCENARIOS=restart` runs those alone that have the word in their names, and fails a test
//! that has none.

use anyhow::Result;
use cluster_tests::lanes::lanes;
use cluster_tests::scenario;

#[test]
fn what_mostly_waits() -> Result<()> {
    lanes([
        vec![scenario!(
            crate::partitions::an_isolated_leader_changes_nothing_and_serves_within_its_bounds
        )],
        vec![
            scenario!(crate::partitions::a_healed_node_is_ready_only_with_what_it_missed),
            scenario!(crate::partitions::a_minority_of_five_is_stale_in_time_and_still_answers),
            scenario!(crate::restarted_alone::a_node_restarted_in_isolation_is_never_ready),
        ],
        vec![
            scenario!(crate::restart::a_whole_cluster_killed_at_once_loses_nothing_acknowledged),
            scenario!(crate::restart::a_node_that_was_away_serves_only_with_every_key),
            scenario!(crate::restart::a_polite_stop_finishes_what_it_has_begun),
            scenario!(crate::metrics::an_idle_cluster_appends_nothing),
            scenario!(crate::handover::a_leader_that_stops_together_with_a_follower_hands_over_to_the_third),
        ],
        vec![
            scenario!(crate::key_life::a_disabled_version_decrypts_nowhere_until_it_is_enabled),
            scenario!(crate::key_life::a_destroyed_version_is_gone_from_every_token_and_its_number_with_it),
            scenario!(crate::key_life::a_destruction_that_waits_can_be_undone_and_stays_undone),
            scenario!(crate::key_life::a_node_that_was_away_destroys_its_copy_before_it_is_ready),
            scenario!(crate::key_life::a_version_in_recent_use_is_destroyed_by_an_override_only),
            scenario!(crate::key_life::a_wait_goes_on_under_the_next_leader),
        ],
        vec![
            scenario!(crate::moves::a_context_moves_to_another_slot_and_the_old_one_can_go),
            scenario!(crate::tokens::a_lost_token_costs_no_voter),
            scenario!(crate::copied_token::another_token_in_a_slots_place_opens_nothing),
            scenario!(crate::space::rotations_with_destructions_leave_nothing_behind),
        ],
        vec![
            scenario!(crate::v1_adoption::an_adopted_key_serves_where_its_token_is_and_ends_there),
            scenario!(crate::full_disk::a_disk_that_fills_up_and_is_freed_again_costs_nothing_acknowledged),
            scenario!(crate::previous_release::a_node_of_each_earlier_release_is_opened_and_joined),
        ],
        vec![
            scenario!(crate::members::a_cluster_grows_to_five_and_shrinks_to_three_and_nobody_notices),
            scenario!(crate::members::leadership_moves_and_a_node_is_replaced_in_one_change),
            scenario!(crate::rekey::another_replication_key_comes_over_rolling_restarts),
            scenario!(crate::revocations::deleting_the_file_of_revocations_takes_none_back),
        ],
        vec![
            scenario!(
                crate::recovery::a_survivor_goes_on_alone_and_the_old_nodes_are_refused_until_they_come_anew
            ),
            scenario!(crate::recovery::a_dead_voter_is_taken_out_once_another_one_has_joined_and_not_before),
            // Last: from then on nodes that have ended stay as zombies of this process.
            scenario!(
                crate::notice::a_node_that_leaves_serves_until_balancers_know_and_may_be_kept_until_then
            ),
        ],
        vec![
            scenario!(crate::chaos::a_short_run_of_chaos_finds_nothing_and_nor_does_its_replay),
            scenario!(crate::chaos::a_short_run_on_a_bridge_finds_nothing),
            scenario!(crate::chaos::a_signal_ends_chaos_and_its_nodes),
        ],
    ])
}

/// The same, of those that need a leader to stay: only as many as leave a core idle.
#[test]
fn what_waits_under_one_leader() -> Result<()> {
    lanes([
        vec![scenario!(
            crate::hung_token::a_hung_token_of_the_leader_costs_its_slot_and_nothing_else
        )],
        vec![
            scenario!(
                crate::wall_clock::a_leader_whose_wall_clock_jumps_rotates_cleans_up_and_destroys_nothing
            ),
            // Last: from then on nodes that have ended stay as zombies of this process.
            scenario!(crate::stopping::a_hanging_token_keeps_no_leader_from_ending),
        ],
    ])
}

/// The same, of nodes that are killed or lie at a point of their code.
#[cfg(feature = "failpoints")]
#[test]
fn what_mostly_waits_at_failpoints() -> Result<()> {
    lanes([
        vec![
            scenario!(crate::by_age::versions_are_rotated_by_age_and_never_twice),
            scenario!(crate::snapshots::a_voter_that_installs_a_snapshot_is_not_taken_for_dead),
            scenario!(crate::key_life::a_node_that_dies_before_it_removes_a_key_removes_it_when_it_returns),
            scenario!(
                crate::handover::a_leader_that_stops_ends_the_calls_that_it_has_in_hand_before_another_leads
            ),
            scenario!(
                crate::handover::a_call_that_a_stopping_leader_does_not_wait_for_is_ended_by_the_next_one
            ),
            scenario!(crate::handover::a_leader_that_could_not_hand_over_tries_again_while_it_drains),
        ],
        vec![
            scenario!(crate::forgeries::a_call_forwarded_by_a_node_that_is_no_member_yet_is_refused),
            scenario!(
                crate::forgeries::a_grant_of_nothing_or_of_another_key_is_rejected_and_another_holder_grants
            ),
            scenario!(crate::forgeries::a_substituted_slot_key_is_granted_nothing),
            scenario!(crate::forgeries::a_forged_grant_is_refused),
            scenario!(crate::forgeries::an_acknowledgement_for_another_node_is_refused),
        ],
        vec![scenario!(
            crate::member_kills::a_leader_that_dies_inside_a_joint_change_leaves_nothing_to_do
        )],
        vec![
            scenario!(crate::snapshots::a_kill_inside_the_installation_of_a_snapshot_is_made_good),
            scenario!(crate::recovery::a_compaction_that_is_killed_leaves_the_node_as_it_was),
            scenario!(
                crate::returning::a_node_that_returns_by_a_snapshot_destroys_its_copy_before_it_is_ready
            ),
            scenario!(crate::previous_release::what_an_older_node_does_not_know_waits_for_it),
        ],
        vec![scenario!(
            crate::rekey_kills::a_transport_key_is_replaced_whoever_dies_and_the_old_one_ends_in_every_token
        )],
    ])
}
