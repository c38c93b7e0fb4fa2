use super::super::testing::{Script, judged, node_with, undecided};
use super::*;

fn rotate(key: &str) -> Operation {
    Operation::Rotate {
        context: "c".to_owned(),
        key: key.to_owned(),
    }
}

fn made(version: u32, previous: u32) -> Outcome {
    Outcome::Ok(Answer::Rotated {
        version,
        previous: Some(previous),
    })
}

fn retired() -> Operation {
    Operation::Retired {
        context: "c".to_owned(),
    }
}

fn highest(version: u32) -> Outcome {
    Outcome::Ok(Answer::Highest {
        version: Some(version),
    })
}

fn unknown() -> Outcome {
    Outcome::Unknown { why: String::new() }
}

fn swap(from: u64, to: u64) -> Operation {
    let key = to.to_string();
    Operation::SetAcl { from, to, key }
}

fn run(script: Script, observed: &Observed) -> Vec<String> {
    judged(&script.history(), observed, judge)
}

#[test]
fn rotations_with_unknown_outcomes_are_explained_or_not() {
    let mut script = Script::default();
    script.did(rotate("a"), made(2, 1));
    script.did(retired(), highest(1));
    script.did(rotate("b"), unknown());
    script.did(rotate("d"), made(4, 3));
    script.did(retired(), highest(3));
    let observed = node_with(&[("c", &[1, 2, 3], Some(4))]);
    assert_eq!(run(script.clone(), &observed), Vec::<String>::new());
    // Nobody has asked for a fifth.
    let observed = node_with(&[("c", &[1, 2, 3, 4], Some(5))]);
    assert_eq!(run(script.clone(), &observed).len(), 1);
    // A leader that does not know that it is none any more.
    script.did(retired(), highest(2));
    let observed = node_with(&[("c", &[1, 2, 3], Some(4))]);
    let said = run(script, &observed);
    assert!(
        said.len() == 1 && said[0].contains("not linearizable"),
        "{said:?}"
    );
}

#[test]
fn one_key_makes_one_version_however_often_it_is_used() {
    let mut script = Script::default();
    script.did(rotate("a"), unknown());
    script.did(rotate("a"), made(2, 1));
    script.did(rotate("b"), made(3, 2));
    script.did(rotate("a"), made(2, 1));
    let observed = node_with(&[("c", &[1, 2], Some(3))]);
    assert_eq!(run(script.clone(), &observed), Vec::<String>::new());
    script.did(rotate("a"), made(4, 3));
    let observed = node_with(&[("c", &[1, 2, 3], Some(4))]);
    let said = run(script, &observed);
    assert!(
        said.iter().any(|text| text.contains("Idempotency-Key a")),
        "{said:?}"
    );
}

#[test]
fn a_context_that_is_made_begins_without_a_version() {
    let create = Operation::Create {
        context: "c".to_owned(),
        key: "a".to_owned(),
    };
    let first = Outcome::Ok(Answer::Rotated {
        version: 1,
        previous: None,
    });
    let mut script = Script::default();
    script.did(create, first);
    script.did(rotate("b"), made(2, 1));
    script.did(retired(), highest(1));
    let observed = node_with(&[("c", &[1], Some(2))]);
    assert_eq!(run(script, &observed), Vec::<String>::new());
}

#[test]
fn where_no_node_says_what_there_was_before_nothing_is_decided() {
    let create = Operation::Create {
        context: "c".to_owned(),
        key: "a".to_owned(),
    };
    let second = Outcome::Ok(Answer::Rotated {
        version: 2,
        previous: None,
    });
    let mut script = Script::default();
    script.did(create, second);
    // There was a first one, of which nothing in the history speaks.
    script.did(rotate("b"), made(3, 2));
    script.did(retired(), highest(2));
    let history = script.history();
    let mut observed = node_with(&[("c", &[1, 2], Some(3))]);
    assert!(judged(&history, &observed, judge).is_empty());
    assert!(undecided(|found| judge(&history, &observed, found)).is_empty());
    observed.nodes[0].keys = None;
    assert!(judged(&history, &observed, judge).is_empty());
    assert_eq!(undecided(|found| judge(&history, &observed, found)).len(), 1);
}

#[test]
fn what_can_have_made_nothing_is_not_searched() {
    let mut script = Script::default();
    for number in 0..400 {
        script.did(rotate(&format!("lost {number}")), unknown());
        script.did(swap(0, 1000 + number), unknown());
    }
    for version in 2..3000 {
        script.did(rotate(&format!("made {version}")), made(version, version - 1));
        script.did(retired(), highest(version - 1));
    }
    for value in 1..900 {
        script.did(swap(value - 1, value), Outcome::Ok(Answer::Done));
    }
    let retired: Vec<u32> = (1..2999).collect();
    let mut observed = node_with(&[("c", &retired, Some(2999))]);
    observed.nodes[0].acl = Some(899);
    let history = script.history();
    assert!(judged(&history, &observed, judge).is_empty());
    assert!(undecided(|found| judge(&history, &observed, found)).is_empty());
    let mut found = Found::default();
    judge(&history, &observed, &mut found);
    // 2998 rotations and reads each, 899 changes, and what the node says at the end.
    assert_eq!(found.checked.get(NAME), Some(&(2 * 2998 + 899 + 2)));
}

#[test]
fn a_change_without_a_trace_is_left_out_and_no_other() {
    let swap = |from, to, completed| Call {
        invoked: 1,
        completed,
        op: CellOp::Swap { from, to },
    };
    let read = Call {
        invoked: 9,
        completed: Some(9),
        op: CellOp::Read { value: Some(3) },
    };
    let mut calls = vec![
        swap(0, 1, Some(2)),
        // What comes of it is read.
        swap(1, 3, None),
        // One after the other without a trace.
        swap(3, 4, None),
        swap(4, 5, None),
        read,
    ];
    without_trace(&mut calls);
    let left: Vec<&CellOp> = calls.iter().map(|call| &call.op).collect();
    assert_eq!(
        left,
        [
            &CellOp::Swap { from: 0, to: 1 },
            &CellOp::Swap { from: 1, to: 3 },
            &CellOp::Read { value: Some(3) }
        ]
    );
}

#[test]
fn a_request_that_was_refused_has_made_nothing() {
    let mut script = Script::default();
    let code = "no_quorum".to_owned();
    script.did(rotate("a"), Outcome::Refused { code });
    let observed = node_with(&[("c", &[1], Some(2))]);
    assert_eq!(run(script, &observed).len(), 1);
}

#[test]
fn of_two_that_set_what_they_read_one_is_refused() {
    let mut script = Script::default();
    script.did(swap(0, 1), Outcome::Ok(Answer::Done));
    script.did(swap(1, 2), unknown());
    script.did(swap(2, 3), Outcome::Ok(Answer::Done));
    let mut observed = node_with(&[]);
    observed.nodes[0].acl = Some(3);
    assert_eq!(run(script.clone(), &observed), Vec::<String>::new());
    let mut lost = script.clone();
    lost.did(swap(1, 4), Outcome::Ok(Answer::Done));
    assert_eq!(run(lost, &observed).len(), 1);
    observed.nodes[0].acl = Some(2);
    assert_eq!(
        run(script, &observed).len(),
        1,
        "an acknowledged value is gone at the end"
    );
}

#[test]
fn a_read_is_not_older_than_the_state_that_it_names() {
    let read = |value| Outcome::Ok(Answer::Value { value });
    let mut script = Script::default();
    script.did_at(swap(0, 1), Some(10), Outcome::Ok(Answer::Done));
    script.did_at(swap(1, 2), Some(20), Outcome::Ok(Answer::Done));
    let node = 1;
    script.did_at(Operation::ReadAcl { node }, Some(19), read(1));
    script.did_at(Operation::ReadAcl { node }, Some(15), read(2));
    let mut observed = node_with(&[]);
    observed.nodes[0].acl = Some(2);
    assert_eq!(run(script.clone(), &observed), Vec::<String>::new());
    script.did_at(Operation::ReadAcl { node }, Some(20), read(1));
    assert_eq!(run(script, &observed).len(), 1);
}
