use super::*;
use crate::rotation::testing::{World, context};

fn key(label: &str, version: Option<u32>) -> AdoptKey {
    AdoptKey {
        label: label.to_owned(),
        version,
        id: None,
        created_at: None,
    }
}

fn request(keys: Vec<AdoptKey>) -> AdoptKeysRequest {
    AdoptKeysRequest {
        context: "c".to_owned(),
        keys,
        slot: None,
        binding: None,
        only: false,
        skip_missing: false,
        dry_run: false,
    }
}

#[test]
fn a_request_names_each_label_and_number_once() {
    check(&request(vec![key("a", None), key("b c", Some(7))])).unwrap();
    for keys in [
        vec![],
        vec![key("x", None); 65],
        vec![key("a", None), key("a", Some(2))],
        vec![key("a", Some(2)), key("b", Some(2))],
        vec![key("", None)],
        vec![key("a\n", None)],
        vec![key(&"x".repeat(256), None)],
        vec![key("a", Some(0))],
        vec![key("a", Some(MAX_ADOPTED + 1))],
    ] {
        let error = check(&request(keys.clone())).unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidArgument, "{keys:?}");
    }
}

#[test]
fn a_key_gets_the_number_that_is_asked_for_or_its_labels_or_the_next() {
    let mut world = World::new(1);
    world.prepare("c");
    world.activate("c", 1);
    let numbers = |keys: &[AdoptKey]| {
        let numbered = numbered(&world.state, &context("c"), keys, 0);
        numbered.map(|keys| keys.iter().map(|key| key.kek.version).collect::<Vec<_>>())
    };
    let keys = [
        key("plain", None),
        key("kek-c-v5", None),
        key("kek-c-v9", Some(3)),
    ];
    assert_eq!(numbers(&keys).unwrap(), [6, 5, 3]);
    assert_eq!(numbers(&[key("plain", None)]).unwrap(), [2]);
    let error = numbers(&[key("old", Some(1))]).unwrap_err();
    assert_eq!(error.code, ErrorCode::AlreadyExists);
    assert!(error.detail.contains("another number"), "{error}");
    let error = numbers(&[key("a", Some(5)), key("kek-c-v5", None)]).unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidArgument);
}

#[test]
fn a_number_that_is_in_a_label_of_version_1s_is_given_to_no_other_key() {
    let world = World::new(1);
    let numbered = numbered(&world.state, &context("c"), &[key("plain", None)], 7).unwrap();
    assert_eq!(numbered[0].kek.version, 8);
}

#[test]
fn an_id_is_hex_and_a_time_is_over() {
    let with = |id: &str, made: &str| AdoptKey {
        id: Some(id.to_owned()),
        created_at: Some(made.to_owned()),
        ..key("old", None)
    };
    let long = "00".repeat(256);
    for id in ["", "0", "xy", long.as_str()] {
        let error = check(&request(vec![with(id, "")])).unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidArgument, "{id}");
    }
    let world = World::new(1);
    let made = |key: AdoptKey| {
        check(&request(vec![key.clone()])).unwrap();
        let numbered = numbered(&world.state, &context("c"), &[key], 0).unwrap();
        (numbered[0].id.clone(), numbered[0].created_at)
    };
    let id = Some(vec![0x0a, 0x0b]);
    assert_eq!(
        made(with("0A0b", "2024-01-01T00:00:00Z")),
        (id.clone(), Some(1_704_067_200_000))
    );
    for none in ["last year", "9000-01-01T00:00:00Z"] {
        assert_eq!(made(with("0a0b", none)), (id.clone(), None));
    }
}

#[test]
fn keys_of_the_context_that_nobody_adopts_are_seen_and_no_number_of_theirs_is_given_out() {
    let mut world = World::new(1);
    world.prepare("c");
    world.activate("c", 1);
    let labelled: BTreeSet<String> = [
        "kek-c-v1",
        "kek-c-v2",
        "kek-c-v3",
        "kek-c-v12",
        "kek-c-v01",
        "kek-d-v40",
        "kek-c-x",
        "other",
        "kek-c-v9000000",
    ]
    .into_iter()
    .map(str::to_owned)
    .collect();
    let (floor, left) = survey(&world.state, &context("c"), &[key("kek-c-v2", None)], &labelled);
    // Version 1 is this cluster's own, and has the label.
    assert_eq!(
        (floor, &left[..]),
        (12, &["kek-c-v3".to_owned(), "kek-c-v12".to_owned()][..])
    );
    let error = further(&context("c"), &left);
    assert_eq!(error.code, ErrorCode::Conflict);
    for part in ["kek-c-v3, kek-c-v12", "--only"] {
        assert!(error.detail.contains(part), "{error}");
    }
    let (floor, left) = survey(&world.state, &context("none"), &[], &labelled);
    assert_eq!((floor, left.len()), (0, 0));
}

#[test]
fn a_new_context_is_bound_as_is_said_or_written_and_never_as_guessed() {
    let world = World::new(1);
    let placements = Placements::default();
    let bound = |name: &str, asked| binding_of(&placements, &world.state, &context(name), asked);
    // The world's own context is shared.
    assert_eq!(bound("c", None).unwrap(), BindingMode::Shared);
    assert_eq!(bound("c", Some(ApiBinding::Shared)).unwrap(), BindingMode::Shared);
    let error = bound("c", Some(ApiBinding::Private)).unwrap_err();
    assert_eq!(error.code, ErrorCode::Conflict);
    assert!(
        error.detail.contains("shared, for good, and not private"),
        "{error}"
    );
    assert_eq!(bound("new", Some(ApiBinding::None)).unwrap(), BindingMode::None);
    let error = bound("new", None).unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidArgument);
    assert!(error.detail.contains("--mode shared, private"), "{error}");
    assert_eq!(
        bound("new", Some(ApiBinding::Unknown)).unwrap_err().code,
        ErrorCode::InvalidArgument
    );
    let private = (context("new"), hsm_core::envelope::Binding::Private);
    let hsm = crate::config::Hsm::of(Vec::new(), [private]);
    let written = binding_of(&Placements::of(&hsm), &world.state, &context("new"), None);
    assert_eq!(written.unwrap(), BindingMode::Private);
}

#[test]
fn a_key_that_is_left_out_is_in_the_answer_and_its_number_is_given_to_no_other() {
    let left_out = |label: &str, version| SkippedKey {
        key_id: label.to_owned(),
        version,
    };
    let skipped = [left_out("gone", Some(9)), left_out("unnumbered", None)];
    let keys = [key("gone", Some(9)), key("there", None), key("unnumbered", None)];
    let there = without(&keys, &skipped);
    assert_eq!(there, [key("there", None)]);
    assert_eq!((reserved(3, &skipped), reserved(12, &skipped)), (9, 12));
    let numbered = numbered(&World::new(1).state, &context("c"), &there, reserved(3, &skipped));
    assert_eq!(numbered.unwrap()[0].kek.version, 10);

    let mut answer = serde_json::json!({"context": "c", "versions": []});
    with_skipped(&mut answer, &[]).unwrap();
    assert!(answer.get("skipped").is_none());
    with_skipped(&mut answer, &skipped).unwrap();
    assert_eq!(
        answer["skipped"],
        serde_json::json!([{"key_id": "gone", "version": 9}, {"key_id": "unnumbered"}])
    );
    assert_eq!(
        skip(&context("c"), &skipped[0]),
        "c/v9 skipped, not in the token: gone"
    );
    assert_eq!(
        skip(&context("c"), &skipped[1]),
        "c skipped, not in the token: unnumbered"
    );
}

#[test]
fn a_context_that_does_not_exist_is_not_left_without_any_of_its_keys() {
    let world = World::new(1);
    let gone = [SkippedKey {
        key_id: "gone".to_owned(),
        version: Some(9),
    }];
    let left = |name: &str, there: &[AdoptKey]| {
        let slot = SlotName::new("s").unwrap();
        check_left(&world.state, &slot, &context(name), there, &gone)
    };
    left("c", &[]).unwrap();
    left("new", &[key("there", None)]).unwrap();
    let error = left("new", &[]).unwrap_err();
    assert_eq!(error.code, ErrorCode::Conflict);
    assert!(error.detail.contains("\"gone\" (version 9)"), "{error}");
}
