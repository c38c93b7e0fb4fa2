//! Slots on real SoftHSM tokens. SoftHSM reads its configuration from the environment, once per
//! process, so every test runs itself again as child processes with a directory of their own;
//! several phases of one test are several starts of a node on the same token.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod adopt;
mod batches;
mod damage;
mod data;
mod disobedient;
mod harness;
mod health;
mod init;
mod keys;
mod lifecycle;
mod objects;
mod pins;
mod transport;

use harness::{long_scenario, scenario};

/// Tests by their names, below a path, each with its phases.
macro_rules! scenarios {
    ($run:ident below $path:literal: $($name:ident: $($phase:path),+;)+) => {
        $(
            #[test]
            fn $name() {
                $run(concat!($path, stringify!($name)), &[$($phase),+]);
            }
        )+
    };
}

/// What has deadlines, which a machine that stands still takes a part of. They run alone (`.config/nextest.toml`).
mod by_the_clock {
    use super::harness::scenario_by_the_clock;
    use super::{batches, health};

    scenarios! {
        scenario_by_the_clock below "by_the_clock::":
        a_batch_whose_time_is_over_keeps_what_is_done: batches::time_is_over;
        no_call_is_begun_that_might_end_after_its_caller_has_gone: batches::caller_goes;
        a_long_batch_gives_way_to_single_jobs_and_other_batches: batches::gives_way;
        the_turns_of_other_batches_cost_a_batch_none_of_its_time: batches::turns_of_others;
        many_batches_beside_each_other_end_before_their_callers_give_up: batches::many_beside_each_other;
        a_hang_between_two_turns_of_a_batch_leaves_its_answers: batches::hang_between_turns;
        an_item_that_hangs_costs_those_before_it_nothing: batches::hanging_item;
        a_hanging_call_fails_the_slot_until_it_has_come_back_and_passed_a_test: health::hang;
    }
}

scenarios! {
    scenario below "":
    plaintexts_of_all_sizes_round_trip: data::round_trip;
    any_flipped_bit_is_the_callers_fault: data::bit_flips;
    another_context_principal_or_aad_does_not_open: data::other_associated_data;
    a_v1_ciphertext_made_elsewhere_opens: data::v1_vector;
    a_short_ciphertext_is_refused_before_the_token_sees_it: data::too_short;
    a_decrypt_only_version_does_not_encrypt: data::decrypt_only;
    a_key_that_is_not_loaded_is_said_to_be_so: data::not_loaded;
    many_callers_get_every_answer: data::many_callers;

    a_batch_is_answered_in_order_and_a_bad_item_costs_no_other_anything: batches::order_and_neighbours;
    a_ciphertext_of_either_format_is_rewrapped: batches::rewrap;
    data_keys_are_fresh_and_stay_data_keys: batches::data_keys;

    importing_twice_makes_one_object: lifecycle::import_twice, lifecycle::import_after_restart;
    a_second_object_of_one_id_is_quarantined_until_destroyed: lifecycle::duplicates;
    a_destroyed_key_is_gone_from_copies_too: lifecycle::destroy;
    a_forged_or_foreign_sealed_key_is_not_imported: lifecycle::forged;
    a_kill_at_any_moment_of_an_import_leaves_a_token_that_can_import: lifecycle::make_one_key, lifecycle::kill_in_import;
    a_torn_token_object_is_restored: lifecycle::make_one_key, lifecycle::tear_token_object, lifecycle::token_was_restored;
    torn_objects_are_removed_and_others_left: lifecycle::make_one_key, lifecycle::tear_objects, lifecycle::torn_are_gone;
    a_kill_inside_a_login_leaves_a_token_that_opens: lifecycle::make_one_key, lifecycle::kill_in_login, lifecycle::key_still_works;

    a_key_of_version_1_gets_a_copy_that_only_decrypts_and_stays_as_it_is: adopt::adopt, adopt::after_restart;
    what_cannot_be_adopted_is_refused_by_its_label: adopt::refusals;
    a_readable_key_of_version_1_gets_a_copy_that_is_closed: adopt::open_original;
    a_key_of_the_same_label_in_another_token_has_to_prove_itself: adopt::another_token;
    of_keys_of_one_label_the_one_that_is_named_is_adopted: adopt::one_of_many;
    a_copy_of_an_adopted_key_is_proven_without_being_made: adopt::proven_only;
    keys_of_version_1_with_one_id_are_each_known_by_their_label: adopt::same_id;
    a_destroyed_adopted_key_takes_its_original_with_it_and_no_other_key: adopt::destroy;
    an_adopted_key_is_given_back_only_if_its_original_is_there: adopt::release;
    a_kill_at_any_moment_of_an_adoption_costs_nothing: adopt::make_one, adopt::kill;

    objects_have_exactly_the_attributes_they_should: objects::attributes;
    no_key_that_a_transport_key_unwraps_can_be_read: objects::unwrapped_keys_stay_closed;
    the_inventory_names_what_is_there: objects::inventory;
    a_token_in_trouble_is_no_wrong_ciphertext_and_costs_no_key: disobedient::general_error;
    a_key_that_is_not_as_its_template_says_is_refused_and_never_used: disobedient::every_flag, disobedient::left_behind, disobedient::node_key;

    a_wrong_pin_is_tried_once: pins::wrong_pin, pins::wrong_pin_again, pins::right_pin;
    wrong_pins_of_others_need_an_override: pins::set_up, pins::count_low;
    a_guessable_pin_is_refused_unless_accepted: pins::weak;
    a_label_must_name_one_token: pins::labels;
    a_token_has_one_owner: pins::one_owner;
    a_slot_opens_again_with_the_same_pin_only: pins::open_again;

    a_granted_transport_key_carries_keys_to_another_token: transport::grant_and_accept, transport::after_restart;
    a_substituted_transport_key_is_refused: transport::substituted;
    an_offered_transport_key_is_in_the_tokens_that_took_it_and_ends_in_each: transport::offered;
    a_grant_for_another_token_does_not_open: transport::wrong_recipient;
    the_sealed_keys_of_another_slot_stay_closed: transport::sealed_for_another_slot;

    an_initialised_token_is_kept: init::refuses_initialised;
    an_owned_token_is_not_initialised: init::refuses_owned;
    destroying_a_token_is_asked_for_explicitly: lifecycle::make_one_key, init::destroy_existing, init::new_pin_works;
    unsuitable_pins_and_labels_are_refused: init::refuses_bad_arguments;

    a_lost_token_fails_its_slot_and_nothing_else: health::lost_token;
    a_failed_test_takes_the_copies_out_of_use_and_a_passed_one_brings_them_back: health::fail_and_recover;
    a_planted_key_is_never_used_and_can_be_replaced: health::planted;
    a_forgotten_login_is_made_again: health::logout;
    operations_are_reported_with_their_outcome: health::on_call;
}

scenarios! {
    long_scenario below "":
    a_token_of_which_one_file_is_damaged_serves_every_key_or_says_why: damage::make, damage::each_file;
}

/// Not a test: what the tests above start as processes of their own.
#[test]
fn helper() {
    harness::run_helper(&[
        ("import_for_ever", lifecycle::import_for_ever),
        ("check_after_kill", lifecycle::check_after_kill),
        ("adopt_for_ever", adopt::adopt_for_ever),
        ("adopted_after_kill", adopt::adopted_after_kill),
        ("log_in_for_ever", lifecycle::log_in_for_ever),
        ("hold_generation", health::hold_generation),
        ("look_at_damaged_token", damage::look),
    ]);
}
