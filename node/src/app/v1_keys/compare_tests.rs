use raft_store::command::{AdoptVersion, Op, ReleaseVersion};
use raft_store::names::KeyUid;
use raft_store::state::context::BindingMode;

use super::*;
use crate::rotation::testing::{World, context as name};

fn key(number: u32) -> WantedKey {
    WantedKey {
        number,
        label: format!("kek-old-v{number}"),
        id: None,
        created_at: None,
        is_current: number == 3,
    }
}

/// Versions 1 to 3 of `old`, of which the last is the current one.
fn listed() -> Vec<Wanted> {
    vec![Wanted {
        name: name("old"),
        binding: BindingMode::Shared,
        interval_days: None,
        floor: 3,
        versions: [1, 2, 3].map(key).into(),
    }]
}

fn labelled(labels: &[&str]) -> BTreeSet<String> {
    labels.iter().map(|label| (*label).to_owned()).collect()
}

/// As a token with these labels answers, each key of which is what it should be.
fn compared(world: &World, labels: &[&str]) -> (Vec<Wanted>, Vec<String>) {
    let there = labelled(labels);
    let examine = |key: &WantedKey| {
        if there.contains(&key.label) {
            return Ok(());
        }
        Err(HsmError::NotFound {
            what: "key of version 1",
            id: key.label.clone(),
        })
    };
    compare(&world.state, &there, listed(), examine)
}

const ALL: [&str; 3] = ["kek-old-v1", "kek-old-v2", "kek-old-v3"];

fn numbers(wanted: &[Wanted]) -> Vec<u32> {
    wanted[0].versions.iter().map(|key| key.number).collect()
}

#[test]
fn a_list_and_a_token_that_agree_are_adopted() {
    let world = World::new(1);
    let (wanted, wrong) = compared(&world, &[&ALL[..], &["transport", "adopted:kek-old-v1"]].concat());
    assert_eq!(wrong, [""; 0]);
    assert_eq!((numbers(&wanted), wanted[0].floor), (vec![1, 2, 3], 3));
}

#[test]
fn a_key_in_the_token_that_the_list_lacks_keeps_the_node_from_starting() {
    let world = World::new(1);
    let (_, wrong) = compared(&world, &[&ALL[..], &["kek-old-v4", "kek-other-v1"]].concat());
    assert_eq!(wrong.len(), 2, "{wrong:?}");
    for label in ["kek-old-v4: ", "kek-other-v1: "] {
        let named = wrong
            .iter()
            .any(|why| why.starts_with(label) && why.contains("not in the list"));
        assert!(named, "{label} {wrong:?}");
    }
}

#[test]
fn an_old_key_that_version_1_had_no_more_either_is_left_out_and_its_number_kept() {
    let world = World::new(1);
    let (wanted, wrong) = compared(&world, &["kek-old-v2", "kek-old-v3"]);
    assert_eq!(wrong, [""; 0]);
    assert_eq!((numbers(&wanted), wanted[0].floor), (vec![2, 3], 3));
}

#[test]
fn the_current_key_has_to_be_there_and_every_key_that_is_there_has_to_be_usable() {
    let world = World::new(1);
    let (_, wrong) = compared(&world, &ALL[..2]);
    assert_eq!(wrong.len(), 1, "{wrong:?}");
    assert!(wrong[0].starts_with("kek-old-v3 (version 3 of old)"), "{wrong:?}");

    let there = labelled(&ALL);
    let unusable = |key: &WantedKey| match key.number {
        1 => Err(HsmError::Argument {
            what: "label",
            reason: "there are two".to_owned(),
        }),
        // Of this label there is one, with another id than the list says.
        2 => Err(HsmError::NotFound {
            what: "key of version 1",
            id: key.label.clone(),
        }),
        _ => Ok(()),
    };
    let (_, wrong) = compare(&world.state, &there, listed(), unusable);
    assert_eq!(wrong.len(), 2, "{wrong:?}");
}

#[test]
fn a_label_that_both_have_given_needs_the_operator() {
    let mut world = World::new(1);
    world.prepare("c");
    world.activate("c", 1);
    let (_, wrong) = compared(&world, &[&ALL[..], &["kek-c-v1"]].concat());
    assert_eq!(wrong.len(), 1, "{wrong:?}");
    assert!(
        wrong[0].starts_with("kek-c-v1: version 1 of c was made here"),
        "{wrong:?}"
    );
    // Also where the list was read before, and has changed.
    let path = Path::new("m.yaml");
    check_again(path, &labelled(&ALL), &world.state).unwrap();
    let error = check_again(path, &labelled(&["kek-c-v1"]), &world.state).unwrap_err();
    assert_eq!(error.exit_code(), 78);
    assert!(error.to_string().contains("m.yaml has changed"), "{error}");
}

/// Version 1 of `old` was adopted.
fn begun() -> World {
    let mut world = World::new(1);
    world.context("old", "s");
    world.ok(Op::AdoptVersion(AdoptVersion {
        context: name("old"),
        version: 1,
        key_uid: KeyUid([1; 16]),
        label: "kek-old-v1".to_owned(),
        slot: raft_store::names::SlotName::new("s").unwrap(),
        check_record: vec![1],
        holder: 1,
        floor: 3,
        created_at: None,
    }));
    world
}

#[test]
fn a_key_that_was_released_since_keeps_no_node_from_starting_and_is_not_adopted_again() {
    let mut world = begun();
    world.ok(Op::ReleaseVersion(ReleaseVersion {
        context: name("old"),
        version: 1,
        expected: VersionState::DecryptOnly,
    }));
    let (wanted, wrong) = compared(&world, &ALL);
    assert_eq!(wrong, [""; 0]);
    assert_eq!(numbers(&wanted), [2, 3]);
    // Nor is it one that the list lacks.
    let there = labelled(&ALL);
    assert!(!unadopted(&there, &world.state).contains(&"kek-old-v1".to_owned()));
}

#[test]
fn a_start_that_was_cut_off_finds_what_it_did() {
    let world = begun();
    let (wanted, wrong) = compared(&world, &ALL);
    assert_eq!(wrong, [""; 0]);
    assert_eq!(numbers(&wanted), [1, 2, 3]);
    let left: Vec<u32> = wanted[0]
        .versions
        .iter()
        .filter(|key| known(&world.state, &name("old"), &key.label).is_none())
        .map(|key| key.number)
        .collect();
    assert_eq!(left, [2, 3]);
}

#[test]
fn a_file_that_is_gone_while_its_keys_are_there_keeps_the_node_from_starting() {
    let path = Path::new("m.yaml");
    absent(path, &[]).unwrap();
    let many: Vec<String> = (1..=NAMED + 2).map(|number| format!("kek-c-v{number}")).collect();
    let error = absent(path, &many).unwrap_err().to_string();
    assert!(
        error.contains("kek-c-v1, ") && error.contains("and 2 more"),
        "{error}"
    );
    assert!(error.contains("hsmctl key adopt"), "{error}");
}

#[test]
fn keys_without_a_list_keep_a_first_start_back_and_no_later_one() {
    let keys = ["kek-c-v1".to_owned()];
    unlisted(&[], false).unwrap();
    unlisted(&keys, true).unwrap();
    let error = unlisted(&keys, false).unwrap_err();
    assert_eq!(error.exit_code(), 78);
    let error = error.to_string();
    for part in ["kek-c-v1", "metadata.yaml", "hsm.metadata_file: PATH"] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn version_1s_labels_are_told_from_others() {
    for label in ["kek-exchange-key-v1", "kek-a-v1-v22"] {
        assert!(is_v1s(label), "{label}");
    }
    for label in [
        "kek--v1",
        "kek-a",
        "kek-a-v",
        "kek-a-vx",
        "other",
        "adopted:kek-a-v1",
    ] {
        assert!(!is_v1s(label), "{label}");
    }
}
