use super::super::event::{Held, Probe, Sample, Seen};
use super::*;

/// A history in the making.
#[derive(Default)]
struct Script {
    fold: Fold,
    id: u64,
    at: u64,
}

impl Script {
    fn begin(&mut self, operation: Operation) -> u64 {
        (self.id, self.at) = (self.id + 1, self.at + SECOND / 100);
        self.fold.line(Line::Invoked {
            at: self.at,
            id: self.id,
            process: 1,
            operation,
        });
        self.id
    }

    fn end(&mut self, id: u64, index: Option<u64>, outcome: Outcome) {
        self.at += SECOND / 100;
        self.fold.line(Line::Completed {
            at: self.at,
            id,
            index,
            stale: false,
            outcome,
        });
    }

    fn ok(&mut self, operation: Operation, index: u64, answer: Answer) {
        let id = self.begin(operation);
        self.end(id, Some(index), Outcome::Ok(answer));
    }

    fn seal(&mut self, number: u64, version: u32, index: u64) {
        let operation = Operation::Encrypt {
            context: "c".to_owned(),
            number,
            node: 1,
        };
        let ciphertext = format!("sealed {number}");
        self.ok(operation, index, Answer::Sealed { version, ciphertext });
    }

    /// The watch looks, so much later: node 2 is ready.
    fn look(&mut self, later: u64) {
        self.at += later;
        let seen = Seen {
            node: 2,
            pid: Some(1),
            ready: true,
            index: None,
            held: Held::NotAsked,
            older: Held::NotAsked,
            digest: None,
            term: None,
            leads: false,
        };
        self.fold.line(Line::Sampled {
            at: self.at,
            sample: Box::new(Sample {
                began: self.at,
                known: 0,
                probe: None,
                older: None,
                nodes: vec![seen],
            }),
        });
    }

    fn open(&mut self, version: u32, index: u64, right: bool) {
        self.ok(decrypt(version), index, Answer::Opened { right });
    }
}

fn decrypt(version: u32) -> Operation {
    Operation::Decrypt {
        context: "c".to_owned(),
        version,
        number: 1,
        node: 2,
    }
}

fn ask() -> Operation {
    Operation::Ask {
        cn: "victim".to_owned(),
        node: 1,
    }
}

fn revoke() -> Operation {
    Operation::Revoke {
        cn: "victim".to_owned(),
    }
}

fn use_of(enable: bool) -> Operation {
    Operation::Use {
        context: "c".to_owned(),
        version: 1,
        enable,
        key: "k".to_owned(),
    }
}

#[test]
fn every_version_keeps_some_and_the_totals_are_true() {
    let mut script = Script::default();
    for number in 0..1000 {
        script.seal(number, 1, 1);
    }
    script.seal(1000, 2, 1);
    let history = script.fold.finish();
    assert_eq!(history.encryptions(), 1001);
    let first = &history.versions[&("c".to_owned(), 1)];
    assert_eq!((first.total, first.kept.len()), (1000, KEPT));
    // Not the first ones only.
    assert!(first.kept.iter().any(|kept| kept.number >= 500));
    assert_eq!(history.versions[&("c".to_owned(), 2)].kept.len(), 1);
    let in_all: u32 = history.encrypted_in.iter().sum();
    assert_eq!((in_all, history.encrypted_in.len()), (1001, 21));
}

#[test]
fn right_answers_to_decryptions_are_counted_in_their_seconds() {
    let mut script = Script::default();
    for right in [true, false, true] {
        script.open(1, 1, right);
    }
    script.at = 2 * SECOND;
    script.open(1, 1, true);
    assert_eq!(script.fold.finish().decrypted_in, [2, 0, 1]);
}

#[test]
fn an_encryption_under_a_replaced_version_is_told_by_the_index_alone() {
    let mut script = Script::default();
    let rotate = Operation::Rotate {
        context: "c".to_owned(),
        key: "k".to_owned(),
    };
    let answer = Answer::Rotated {
        version: 2,
        previous: Some(1),
    };
    script.ok(rotate, 20, answer);
    // A node that has not come so far may go on.
    script.seal(1, 1, 19);
    script.seal(2, 2, 25);
    assert_eq!(script.fold.history.behind.total, 0);
    script.seal(3, 1, 20);
    assert_eq!(script.fold.finish().behind.total, 1);
}

#[test]
fn what_is_out_of_use_decrypts_nowhere_that_knows_it() {
    let mut script = Script::default();
    let disabled = Answer::State {
        state: KeyState::Disabled,
    };
    script.ok(use_of(false), 10, disabled);
    script.open(1, 9, true);
    assert_eq!(script.fold.history.revived.total, 0);
    script.open(1, 10, true);
    assert_eq!(script.fold.history.revived.total, 1);
    // From here on it may be in use, whatever comes of it.
    let enabling = script.begin(use_of(true));
    script.open(1, 12, true);
    let unknown = Outcome::Unknown { why: String::new() };
    script.end(enabling, None, unknown);
    script.open(1, 13, true);
    assert_eq!(script.fold.finish().revived.total, 1);
}

#[test]
fn what_is_said_to_be_destroyed_decrypts_nowhere() {
    let mut script = Script::default();
    let before = script.begin(decrypt(1));
    let show = Operation::Show {
        context: "c".to_owned(),
        version: 1,
        node: 1,
    };
    let destroyed = Answer::State {
        state: KeyState::Destroyed,
    };
    script.ok(show, 1, destroyed);
    // It was asked for before.
    script.end(before, Some(1), Outcome::Ok(Answer::Opened { right: true }));
    assert_eq!(script.fold.history.revived.total, 0);
    script.open(1, 1, true);
    script.open(2, 1, true);
    assert_eq!(script.fold.finish().revived.total, 1);
}

#[test]
fn a_wrong_plaintext_and_refusals_are_kept_by_version() {
    let mut script = Script::default();
    script.open(1, 1, false);
    for code in ["stale", "stale", "unknown_key_version"] {
        let id = script.begin(decrypt(1));
        let code = code.to_owned();
        script.end(id, None, Outcome::Refused { code });
    }
    let history = script.fold.finish();
    let version = &history.versions[&("c".to_owned(), 1)];
    assert_eq!((version.wrong.total, version.opened), (1, 0));
    assert_eq!(version.refused["stale"].count, 2);
    assert_eq!(version.refused["unknown_key_version"].first_node, 2);
    assert_eq!((history.counts.ok, history.counts.refused), (1, 3));
}

#[test]
fn who_is_let_in_after_his_revocation_is_told_with_what_the_node_knew() {
    let mut script = Script::default();
    script.ok(ask(), 1, Answer::Done);
    script.ok(revoke(), 10, Answer::Done);
    script.ok(ask(), 9, Answer::Done);
    script.ok(ask(), 10, Answer::Done);
    let turned_away = Outcome::Refused {
        code: "certificate_revoked".to_owned(),
    };
    let id = script.begin(ask());
    script.end(id, None, turned_away.clone());
    let unrevoke = script.begin(Operation::Unrevoke {
        cn: "victim".to_owned(),
    });
    script.ok(ask(), 11, Answer::Done);
    script.end(unrevoke, Some(12), Outcome::Ok(Answer::Done));
    let stranger = script.begin(Operation::Ask {
        cn: "bystander".to_owned(),
        node: 3,
    });
    script.end(stranger, None, turned_away);
    let history = script.fold.finish();
    let late: Vec<bool> = history.late.values().map(|late| late.knew).collect();
    assert_eq!(late, [false, true]);
    assert_eq!((history.asked, history.turned_away), (4, 2));
    assert_eq!(history.turned_away_early.total, 1);
}

#[test]
fn of_many_who_are_let_in_late_the_latest_of_each_node_is_kept() {
    let mut script = Script::default();
    script.ok(revoke(), 10, Answer::Done);
    for _ in 0..500 {
        script.ok(ask(), 9, Answer::Done);
    }
    let last = script.at;
    let history = script.fold.finish();
    assert_eq!(history.late.len(), 1, "{:?}", history.late);
    let late = &history.late[&(1, false, false)];
    // From the acknowledgement, at 20 ms, until the last one was asked for.
    assert_eq!(late.after_ns, last - SECOND / 100 - SECOND / 50);
    // Beyond three seconds, one in a second.
    let seconds: Vec<u64> = history
        .lingering
        .kept
        .iter()
        .map(|moment| moment.at / SECOND)
        .collect();
    assert_eq!(seconds, (3..10).collect::<Vec<u64>>());
}

#[test]
fn an_internal_error_is_kept_with_its_time_and_its_node() {
    let mut script = Script::default();
    for _ in 0..150 {
        let id = script.begin(decrypt(1));
        let code = "internal".to_owned();
        script.end(id, None, Outcome::Refused { code });
    }
    let history = script.fold.finish();
    let at: Vec<u64> = history.internal.kept.iter().map(|one| one.at / SECOND).collect();
    assert_eq!(at, [0, 1, 2], "one in a second");
    assert_eq!((history.internal.kept[0].node, history.internal.more), (2, 0));
}

#[test]
fn what_is_back_in_use_is_refused_by_nobody_who_knows() {
    for (between, withheld) in [(20, 1), (1, 0)] {
        let mut script = Script::default();
        let disabled = Answer::State {
            state: KeyState::Disabled,
        };
        script.ok(use_of(false), 10, disabled);
        let enabled = Answer::State {
            state: KeyState::DecryptOnly,
        };
        script.ok(use_of(true), 11, enabled);
        script.look(between * SECOND);
        let id = script.begin(decrypt(1));
        let code = "key_version_disabled".to_owned();
        script.end(id, None, Outcome::Refused { code });
        script.look(SECOND);
        let history = script.fold.finish();
        assert_eq!(history.watched.withheld.total, withheld, "{between} s");
    }
}

fn encrypt(context: &str) -> Operation {
    Operation::Encrypt {
        context: context.to_owned(),
        number: 1,
        node: 2,
    }
}

#[test]
fn a_refusal_to_encrypt_is_of_the_moment_or_is_told() {
    for (code, told, internal) in [
        ("overloaded", 0, 0),
        ("slot_failed", 0, 0),
        ("unreachable", 0, 0),
        ("internal", 0, 1),
        ("access_denied", 1, 0),
        ("status_404", 1, 0),
    ] {
        let mut script = Script::default();
        let id = script.begin(encrypt("2fa"));
        let code = code.to_owned();
        script.end(id, None, Outcome::Refused { code: code.clone() });
        let history = script.fold.finish();
        let is = (
            history.refused_to_encrypt.total,
            history.internal.kept.len() as u64,
        );
        assert_eq!(is, (told, internal), "{code}");
    }
}

#[test]
fn who_has_long_been_ready_knows_which_contexts_have_a_key() {
    // Made at the beginning, made by somebody then, and never made.
    for (context, between, told) in [
        ("2fa", 20, 1),
        ("2fa", 1, 0),
        ("chaos-1", 20, 1),
        ("chaos-1", 1, 0),
        ("chaos-2", 20, 0),
    ] {
        let mut script = Script::default();
        let create = Operation::Create {
            context: "chaos-1".to_owned(),
            key: "k".to_owned(),
        };
        let answer = Answer::Rotated {
            version: 1,
            previous: None,
        };
        script.ok(create, 10, answer);
        script.look(between * SECOND);
        let id = script.begin(encrypt(context));
        let code = "context_has_no_key".to_owned();
        script.end(id, None, Outcome::Refused { code });
        script.look(SECOND);
        let history = script.fold.finish();
        assert_eq!(history.watched.withheld.total, told, "{context} {between}");
        assert_eq!(history.refused_to_encrypt.total, 0);
    }
}

#[test]
fn an_older_key_has_to_be_held_until_somebody_wants_it_out_of_use() {
    for (wanted_out, lacking) in [(false, 1), (true, 0)] {
        let mut script = Script::default();
        if wanted_out {
            script.begin(use_of(false));
        }
        let code = "key_version_not_ready".to_owned();
        let seen = Seen {
            node: 2,
            pid: Some(1),
            ready: true,
            index: None,
            held: Held::NotAsked,
            older: Held::Refused { code },
            digest: None,
            term: None,
            leads: false,
        };
        let older = Probe {
            context: "c".to_owned(),
            version: 1,
            made_on: 1,
            at: 0,
        };
        script.fold.line(Line::Sampled {
            at: script.at + 1,
            sample: Box::new(Sample {
                began: script.at,
                known: 0,
                probe: None,
                older: Some(older),
                nodes: vec![seen],
            }),
        });
        let history = script.fold.finish();
        assert_eq!(history.watched.lacking.kept.len(), lacking, "{wanted_out}");
    }
}

#[test]
fn what_never_ends_is_kept_as_unknown() {
    let mut script = Script::default();
    script.begin(revoke());
    script.begin(ask());
    script.fold.line(Line::Sampled {
        at: 1,
        sample: Box::new(Sample {
            began: 0,
            known: 0,
            probe: None,
            older: None,
            nodes: Vec::new(),
        }),
    });
    let history = script.fold.finish();
    assert_eq!((history.changes.len(), history.counts.unknown), (1, 2));
    assert_eq!(history.changes[0].completed, None);
    assert_eq!(history.watched.samples, 1);
}
