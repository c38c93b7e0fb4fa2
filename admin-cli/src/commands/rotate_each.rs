//! `hsmctl rotate --all` and `--slot`: one context after the other, whatever becomes of one of them, each with its
//! outcome. All go under one `Idempotency-Key`: nodes keep it within the operation, which names the context, so that it is
//! another one for each, and the same command again begins nothing twice.

use anyhow::Result;
use hsm_api::admin::{ContextInfo, ListKeksResponse, RotateResponse};
use hsm_api::{Client, ClientError, ErrorCode, StateIndex};
use serde::Serialize;

use super::{Session, preview, rotate};
use crate::exit::{change_failed, missing, with_hint};
use crate::output::{self, or_dash};
use crate::progress::Progress;

/// What became of one context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Outcome {
    Rotated,
    Refused,
    /// It may have been rotated.
    Unknown,
    /// No node could be asked, at its turn or before.
    NotAsked,
    /// It has no first version yet: there is nothing to rotate.
    NoKey,
}

impl Outcome {
    fn text(self) -> &'static str {
        match self {
            Self::Rotated => "rotated",
            Self::Refused => "refused",
            Self::Unknown => "unknown",
            Self::NotAsked => "not asked",
            Self::NoKey => "no key yet",
        }
    }
}

/// One context, as it is printed.
#[derive(Debug, Serialize)]
struct Turn {
    context: String,
    outcome: Outcome,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    previous_version: Option<u32>,
    /// The node's code, if one has refused it.
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
}

impl Turn {
    fn of(context: &str, outcome: Outcome) -> Self {
        Self {
            context: context.to_owned(),
            outcome,
            version: None,
            key_id: None,
            previous_version: None,
            code: None,
            detail: None,
        }
    }

    fn rotated(done: RotateResponse) -> Self {
        Self {
            version: Some(done.version),
            key_id: Some(done.key_id),
            previous_version: Some(done.previous_version),
            ..Self::of(&done.context, Outcome::Rotated)
        }
    }

    fn failed(context: &str, error: &ClientError) -> Self {
        let outcome = if error.outcome_unknown() {
            Outcome::Unknown
        } else if error.refusal().is_some() {
            Outcome::Refused
        } else {
            Outcome::NotAsked
        };
        Self {
            code: error.code().map(ErrorCode::as_str),
            detail: Some(error.to_string()),
            ..Self::of(context, outcome)
        }
    }

    fn row(&self) -> [String; 6] {
        [
            self.context.clone(),
            self.outcome.text().to_owned(),
            or_dash(self.version),
            or_dash(self.key_id.as_ref()),
            or_dash(self.previous_version),
            self.detail.clone().unwrap_or_default(),
        ]
    }
}

/// What became of all.
#[derive(Debug, Default, Serialize)]
struct Turns {
    contexts: Vec<Turn>,
    /// Of the last one that was rotated.
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<String>,
    /// What the command fails with.
    #[serde(skip)]
    failed: Option<ClientError>,
}

/// Rotates the contexts of a slot, or all.
pub(super) async fn rotate(session: &Session, client: &Client, slot: Option<&str>, key: &str) -> Result<()> {
    let keks = session.ask(client, "list-kek", client.list_keks()).await?;
    let chosen = choose(&keks, slot)?;
    let turns = take_turns(&chosen, async |context: &str| {
        let answer = client.rotate(context, Some(key)).await?;
        let index = answer.meta.index;
        Ok::<_, ClientError>((answer.into_body(), index))
    })
    .await;
    output::print(session.format(), &turns, || {
        let header = ["CONTEXT", "OUTCOME", "VERSION", "KEY ID", "BEFORE", "BECAUSE"];
        output::table(header, turns.contexts.iter().map(Turn::row))
    })?;
    turns.ended(key)
}

/// Each takes as long as a single one may, at most. Once no node answers, or the cluster cannot be changed, the others are
/// left: each would wait as long in vain.
async fn take_turns(
    chosen: &[&ContextInfo],
    mut call: impl AsyncFnMut(&str) -> Result<(RotateResponse, Option<StateIndex>), ClientError>,
) -> Turns {
    let mut turns = Turns::default();
    let mut is_over = false;
    let progress = Progress::of_steps("rotating", chosen.len());
    for info in chosen {
        let context = info.context.as_str();
        let turn = if !has_key(info) {
            Turn::of(context, Outcome::NoKey)
        } else if is_over {
            Turn::of(context, Outcome::NotAsked)
        } else {
            match call(context).await {
                Ok((done, index)) => {
                    if let Some(index) = index {
                        turns.index = Some(index.to_string());
                    }
                    Turn::rotated(done)
                }
                Err(error) => {
                    is_over = ends_all(&error);
                    let turn = Turn::failed(context, &error);
                    // That something may have been done says more than that something else was not.
                    if turns.failed.is_none() || error.outcome_unknown() {
                        turns.failed = Some(error);
                    }
                    turn
                }
            }
        };
        turns.contexts.push(turn);
        progress.step();
    }
    turns
}

/// Whether the next context would meet the same, after as long a wait.
fn ends_all(error: &ClientError) -> bool {
    error.status().is_none() || error.outcome_unknown() || error.code() == Some(ErrorCode::NoQuorum)
}

impl Turns {
    /// An error if one was not rotated, with what to do about it.
    fn ended(self, key: &str) -> Result<()> {
        let named = |with: &[Outcome]| -> Vec<&str> {
            let contexts = self.contexts.iter();
            let of = contexts.filter(|turn| with.contains(&turn.outcome));
            of.map(|turn| turn.context.as_str()).collect()
        };
        let listed =
            |with: &[Outcome]| or_dash(Some(named(with).join(", ")).filter(|names| !names.is_empty()));
        let hint = format!(
            "not rotated: {}; rotated: {}; unknown: {}; the same again, by which each is rotated once: --idempotency-key {key}",
            listed(&[Outcome::Refused, Outcome::NotAsked]),
            listed(&[Outcome::Rotated]),
            listed(&[Outcome::Unknown]),
        );
        let Some(error) = self.failed else {
            return Ok(());
        };
        Err(with_hint(change_failed(error, key), hint))
    }
}

/// The contexts that are meant; at least one of them has a key.
fn choose<'a>(keks: &'a ListKeksResponse, slot: Option<&str>) -> Result<Vec<&'a ContextInfo>> {
    let is_meant = |info: &&ContextInfo| slot.is_none_or(|slot| info.slot == slot);
    let chosen: Vec<&ContextInfo> = keks.contexts.iter().filter(is_meant).collect();
    if chosen.iter().any(|info| has_key(info)) {
        return Ok(chosen);
    }
    let here = slot.map(|slot| format!(" of slot {slot}")).unwrap_or_default();
    let mut slots: Vec<&str> = keks.contexts.iter().map(|info| info.slot.as_str()).collect();
    slots.sort_unstable();
    slots.dedup();
    Err(missing(if chosen.is_empty() {
        format!(
            "there is no context{here}; contexts are in slot {}",
            slots.join(", ")
        )
    } else {
        format!(
            "no context{here} has a key to rotate; make its first one with: hsmctl create-kek --context CONTEXT"
        )
    }))
}

/// A first version that is on its way counts: the next one waits for it.
fn has_key(info: &ContextInfo) -> bool {
    info.active_version.is_some() || preview::pending_version(info).is_some()
}

/// What would be made of each.
pub(super) fn foresee(keks: &ListKeksResponse, slot: Option<&str>) -> Result<String> {
    let chosen = choose(keks, slot)?;
    let with_key = chosen.into_iter().filter(|info| has_key(info));
    let each: Result<Vec<String>> = with_key
        .map(|info| rotate::foresee(&info.context, keks))
        .collect();
    Ok(each?.join(". Then "))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::on_runtime;
    use super::super::preview::tests::keks;
    use super::*;
    use crate::exit::Exit;
    use crate::exit::tests::{api, silence};

    /// Contexts of one slot that have keys.
    fn contexts(names: &[&str]) -> Vec<ContextInfo> {
        let known = keks().contexts;
        let with_key = known.iter().find(|info| info.context == "exchange-key").unwrap();
        let named = |name: &&str| ContextInfo {
            context: (*name).to_owned(),
            ..with_key.clone()
        };
        names.iter().map(named).collect()
    }

    /// Asks for these; those that `refuse` names fail. Returns who was asked, too.
    fn asked(infos: &[ContextInfo], refuse: impl Fn(&str) -> Option<ClientError>) -> (Vec<String>, Turns) {
        let chosen: Vec<&ContextInfo> = infos.iter().collect();
        let mut asked = Vec::new();
        let turns = take_turns(&chosen, async |context: &str| {
            asked.push(context.to_owned());
            if let Some(error) = refuse(context) {
                return Err(error);
            }
            let done = RotateResponse {
                context: context.to_owned(),
                version: 4,
                key_id: format!("kek-{context}-v4"),
                previous_version: 3,
            };
            let index = StateIndex {
                epoch: 1,
                index: 10 + asked.len() as u64,
            };
            Ok((done, Some(index)))
        });
        let turns = on_runtime(turns).unwrap();
        (asked, turns)
    }

    fn outcomes(turns: &Turns) -> Vec<(&str, Outcome)> {
        let each = turns.contexts.iter();
        each.map(|turn| (turn.context.as_str(), turn.outcome)).collect()
    }

    #[test]
    fn a_slot_has_its_contexts_and_all_are_all() {
        let known = keks();
        let names = |slot: Option<&str>| -> Vec<String> {
            let chosen = choose(&known, slot).unwrap();
            chosen.iter().map(|info| info.context.clone()).collect()
        };
        assert_eq!(names(None), ["2fa", "exchange-key", "order-key"]);
        assert_eq!(names(Some("exchange")), ["exchange-key", "order-key"]);
        let error = choose(&known, Some("no-such")).unwrap_err();
        assert_eq!(Exit::of(&error), Exit::Conflict);
        assert!(error.to_string().contains("slot 2fa, exchange"), "{error}");
        let mut empty = known;
        empty.contexts.retain(|info| info.context == "order-key");
        let error = choose(&empty, None).unwrap_err();
        assert_eq!(Exit::of(&error), Exit::Conflict);
        assert!(error.to_string().contains("create-kek"), "{error}");
    }

    #[test]
    fn each_is_rotated_once_and_one_without_a_key_is_passed_over() {
        let (asked, turns) = asked(&keks().contexts, |_| None);
        assert_eq!(asked, ["2fa", "exchange-key"]);
        let expected = [
            ("2fa", Outcome::Rotated),
            ("exchange-key", Outcome::Rotated),
            ("order-key", Outcome::NoKey),
        ];
        assert_eq!(outcomes(&turns), expected);
        let printed = serde_json::to_value(&turns).unwrap();
        assert_eq!(printed["index"], "1.12", "{printed}");
        assert_eq!(
            printed["contexts"][1],
            serde_json::json!({
                "context": "exchange-key", "outcome": "rotated", "version": 4, "key_id": "kek-exchange-key-v4",
                "previous_version": 3
            })
        );
        assert_eq!(printed["contexts"][2]["outcome"], "no_key");
        assert_eq!(turns.contexts[2].row()[..3], ["order-key", "no key yet", "-"]);
        turns.ended("k").unwrap();
    }

    #[test]
    fn one_that_is_refused_does_not_keep_the_others_and_the_command_fails() {
        let infos = contexts(&["a", "b", "c"]);
        let (asked, turns) = asked(&infos, |context| {
            (context == "b").then(|| api(ErrorCode::SlotFailed))
        });
        assert_eq!(asked, ["a", "b", "c"]);
        let printed = serde_json::to_value(&turns).unwrap();
        assert_eq!(printed["contexts"][1]["outcome"], "refused");
        assert_eq!(printed["contexts"][1]["code"], "slot_failed");
        let error = turns.ended("k").unwrap_err();
        assert_eq!(Exit::of(&error), Exit::Unavailable);
        let said = error.to_string();
        for part in ["not rotated: b;", "rotated: a, c;", "--idempotency-key k"] {
            assert!(said.contains(part), "{said} does not say {part}");
        }
    }

    #[test]
    fn where_nobody_answers_the_others_are_not_waited_for() {
        let infos = contexts(&["a", "b", "c", "d"]);
        let refuse = |context: &str| match context {
            "a" => Some(api(ErrorCode::SlotFailed)),
            "b" => Some(silence()),
            _ => None,
        };
        let (asked, turns) = asked(&infos, refuse);
        assert_eq!(asked, ["a", "b"]);
        let expected = [
            ("a", Outcome::Refused),
            ("b", Outcome::Unknown),
            ("c", Outcome::NotAsked),
            ("d", Outcome::NotAsked),
        ];
        assert_eq!(outcomes(&turns), expected);
        let error = turns.ended("k").unwrap_err();
        assert_eq!(Exit::of(&error), Exit::Unknown);
        let said = error.to_string();
        assert!(
            said.contains("not rotated: a, c, d; rotated: -; unknown: b;"),
            "{said}"
        );
        for (error, ends) in [
            (api(ErrorCode::NoQuorum), true),
            (api(ErrorCode::OutcomeUnknown), true),
            (api(ErrorCode::RoleRequired), false),
            (api(ErrorCode::Conflict), false),
        ] {
            assert_eq!(ends_all(&error), ends, "{error}");
        }
    }

    #[test]
    fn a_dry_run_says_it_of_each_that_has_a_key() {
        let would = foresee(&keks(), None).unwrap();
        assert!(
            would.starts_with("make version 2 of 2fa once version 1")
                && would.contains(". Then make version 4 of exchange-key in slot exchange")
                && !would.contains("order-key"),
            "{would}"
        );
    }
}
