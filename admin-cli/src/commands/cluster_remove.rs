//! `hsmctl cluster remove` and `replace`: a node leaves for good, and what it knew is replaced: the transport keys, which
//! gives every context of their slots a version that it never had, and the replication key. That is in the nodes'
//! configuration: it is replaced if the operator has given those that stay another one beside it.

mod renewal;

use anyhow::Result;
use clap::Args;
use hsm_api::admin::{RemovalState, RemoveNodeRequest, RemoveNodeResponse};
use serde::Serialize;

use self::renewal::{Failure, Renewal, Rotated, renew};
use super::preview::{self, Preview};
use super::{CHANGE, Session, idempotency_key};
use crate::exit::{change_failed, with_hint};
use crate::output::{self, note};
use crate::terminal::Destruction;

/// Arguments of `cluster remove`.
#[derive(Debug, Args)]
pub(crate) struct Remove {
    /// The node.
    #[arg(value_name = "NODE_ID")]
    node: String,
    /// The node again, instead of typing it.
    #[arg(long, value_name = "NODE_ID")]
    confirm: Option<String>,
    /// Replace no key that the node had, and rotate no context; `cluster rekey status` and `cluster members` go on
    /// naming them.
    #[arg(long)]
    no_rotate: bool,
    /// Although a key that was adopted from version 1 is in this node's token only, and goes with it.
    #[arg(long)]
    lose_keys: bool,
    /// Have a node stay that was to leave and has not left yet.
    #[arg(long, conflicts_with_all = ["confirm", "no_rotate", "lose_keys", "dry_run"])]
    cancel: bool,
    /// Under the same key a repeated command goes on with what was begun.
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    /// Say whether it could be done, and do nothing.
    #[arg(long)]
    dry_run: bool,
}

/// Arguments of `cluster replace`.
#[derive(Debug, Args)]
pub(crate) struct Replace {
    /// The node that leaves.
    #[arg(value_name = "OLD")]
    node: String,
    /// The node that takes its place. It may join afterwards.
    #[arg(long = "with", value_name = "NEW")]
    successor: String,
    /// The node that leaves again, instead of typing it.
    #[arg(long, value_name = "OLD")]
    confirm: Option<String>,
    /// Replace no key that the node had, and rotate no context; `cluster rekey status` and `cluster members` go on
    /// naming them.
    #[arg(long)]
    no_rotate: bool,
    /// Although a key that was adopted from version 1 is in this node's token only, and goes with it.
    #[arg(long)]
    lose_keys: bool,
    /// Under the same key a repeated command goes on with what was begun.
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    /// Say whether it could be done, and do nothing.
    #[arg(long)]
    dry_run: bool,
}

/// What is left to the operator.
const TRANSPORT: &str = "hsmctl cluster rekey transport --all";
const REPLICATION: &str = "hsmctl cluster rekey replication";

/// Both of them.
struct Wish {
    node: String,
    request: RemoveNodeRequest,
    confirm: Option<String>,
    rotate: bool,
    idempotency_key: Option<String>,
}

pub(super) async fn remove(session: &Session, args: Remove) -> Result<()> {
    if args.cancel {
        return keep(session, &args.node, args.idempotency_key).await;
    }
    let wish = Wish {
        node: args.node,
        request: RemoveNodeRequest {
            successor: None,
            lose_keys: args.lose_keys,
            dry_run: args.dry_run,
        },
        confirm: args.confirm,
        rotate: !args.no_rotate,
        idempotency_key: args.idempotency_key,
    };
    leave(session, wish).await
}

pub(super) async fn replace(session: &Session, args: Replace) -> Result<()> {
    let wish = Wish {
        node: args.node,
        request: RemoveNodeRequest {
            successor: Some(args.successor),
            lose_keys: args.lose_keys,
            dry_run: args.dry_run,
        },
        confirm: args.confirm,
        rotate: !args.no_rotate,
        idempotency_key: args.idempotency_key,
    };
    leave(session, wish).await
}

async fn keep(session: &Session, node: &str, key: Option<String>) -> Result<()> {
    let client = session.client(CHANGE)?;
    let key = idempotency_key(key);
    let what = format!("cluster remove {node} --cancel");
    let answer = session
        .ask(&client, &what, client.keep_node(node, Some(&key)))
        .await
        .map_err(|error| change_failed(error, &key))?;
    let kept = &answer.body;
    output::print_change(session.format(), &answer, || {
        output::pairs([
            ("node", kept.node_id.clone()),
            ("raft id", kept.raft_id.to_string()),
            ("state", "stays".to_owned()),
        ])
    })
}

async fn leave(session: &Session, wish: Wish) -> Result<()> {
    let client = session.client(CHANGE)?;
    let (node, warning) = (&wish.node, warning(&wish));
    let destruction = Destruction {
        warning: &warning,
        name: node,
        option: "--confirm",
        answered: wish.confirm.as_deref(),
    };
    if wish.request.dry_run {
        preview::check_role(session, &client, preview::ADMINISTER).await?;
        destruction.could_be_confirmed(session.questions())?;
    } else {
        destruction.confirm(session.questions())?;
    }
    let key = idempotency_key(wish.idempotency_key.clone());
    let what = format!("cluster {} {node}", verb(&wish.request));
    let answer = session
        .ask(
            &client,
            &what,
            client.remove_node(node, &wish.request, Some(&key)),
        )
        .await
        .map_err(|error| change_failed(error, &key))?;
    let left = &answer.body;
    if wish.request.dry_run {
        return foresee(&wish, left).print(session);
    }
    let renewal = if wish.rotate && left.state == RemovalState::Removed {
        renew(&client, left, answer.meta.index, &key).await
    } else {
        Renewal::nothing_of(left)
    };
    let done = Done {
        answer: left,
        index: answer.meta.index.map(|index| index.to_string()),
        rekeyed: renewal.rekeyed,
        rotated: renewal.rotated,
        idempotency_key: (left.state == RemovalState::Waiting).then(|| key.clone()),
        to_rotate: renewal.to_rotate,
        replication_key: renewal.replication_key,
        knows_replication_key: renewal.knows_replication_key,
    };
    output::print(session.format(), &done, || text(&done))?;
    for line in next(&wish, &done) {
        note(&line);
    }
    finish(&wish, &key, &renewal.failed)
}

/// A removal that is done and keys that are not replaced make a failure: whoever looks at the exit code has to know.
fn finish(wish: &Wish, key: &str, failed: &[Failure]) -> Result<()> {
    let Some(first) = failed.first() else {
        return Ok(());
    };
    let node = &wish.node;
    let more = match failed.len() {
        1 => String::new(),
        many => format!(", and {} more failed", many - 1),
    };
    let failure = anyhow::anyhow!("{node} is removed, and {}: {}{more}", first.what, first.error);
    let hint =
        format!("it still has those keys; ask again, and the rest is done, with: --idempotency-key {key}");
    Err(with_hint(failure, hint))
}

fn verb(request: &RemoveNodeRequest) -> &'static str {
    match request.successor {
        Some(_) => "replace",
        None => "remove",
    }
}

fn warning(wish: &Wish) -> String {
    let node = &wish.node;
    let rotates = if wish.rotate {
        "the transport keys that it has are replaced, by which every key that it holds gets a new version, and so is the \
         replication key if every other node has another one beside it"
    } else {
        "the transport keys and the keys that it holds stay in use (--no-rotate)"
    };
    match &wish.request.successor {
        None => format!(
            "{node} will leave the cluster for good: it stops, its data directory never runs again, and {rotates}."
        ),
        Some(successor) => format!(
            "{node} will leave the cluster for good as soon as {successor} can take its place: it stops, its data \
             directory never runs again, and {rotates}."
        ),
    }
}

fn foresee(wish: &Wish, left: &RemoveNodeResponse) -> Preview {
    let node = &wish.node;
    let what = match &wish.request.successor {
        Some(successor) => format!(
            "put {successor} in the place of {node} (raft id {})",
            left.raft_id
        ),
        None => format!(
            "remove {node} (raft id {}): {} voters would be left, {} a majority, and {} more could fail",
            left.raft_id, left.voters, left.majority, left.failure_tolerance
        ),
    };
    let rotates = match (wish.rotate, left.held.is_empty()) {
        (false, true) => "; it holds no active key version".to_owned(),
        (true, true) => "; it holds no active key version; and replace the transport keys that it has, and the replication \
                         key, if every other node has another one beside it"
            .to_owned(),
        (true, false) => format!(
            "; and replace the transport keys that it has, which rotates {}, and the replication key, if every other node \
             has another one beside it",
            left.held.join(", ")
        ),
        (false, false) => format!("; and leave {} to be rotated", left.held.join(", ")),
    };
    let preview = Preview::new(format!("{what}{rotates}"));
    match &wish.request.successor {
        Some(successor) => preview.not_checked(format!(
            "whether {successor} joins and proves every key: until then {node} stays"
        )),
        None => preview,
    }
}

/// What has come of it.
#[derive(Debug, Serialize)]
struct Done<'a> {
    #[serde(flatten)]
    answer: &'a RemoveNodeResponse,
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<String>,
    /// Slots that get another transport key.
    rekeyed: Vec<String>,
    rotated: Vec<Rotated>,
    /// Contexts whose active version the node still holds.
    to_rotate: Vec<String>,
    /// The cluster's replication key, if it was replaced.
    #[serde(skip_serializing_if = "Option::is_none")]
    replication_key: Option<String>,
    /// The node knows the one in use.
    knows_replication_key: bool,
    /// With which to ask again, while a successor is waited for.
    #[serde(skip_serializing_if = "Option::is_none")]
    idempotency_key: Option<String>,
}

fn text(done: &Done<'_>) -> String {
    let left = done.answer;
    let mut text = output::pairs([
        ("node", format!("{} (raft id {})", left.node_id, left.raft_id)),
        ("state", left.state.to_string()),
        (
            "voters left",
            format!(
                "{} ({} are a majority, {} more may fail)",
                left.voters, left.majority, left.failure_tolerance
            ),
        ),
    ]);
    if !done.rekeyed.is_empty() {
        let rekeyed = done.rekeyed.iter().map(|slot| [slot.clone()]);
        text.push('\n');
        text.push_str(&output::table(["SLOTS WITH ANOTHER TRANSPORT KEY"], rekeyed));
    }
    if let Some(key) = &done.replication_key {
        text.push('\n');
        text.push_str(&output::pairs([(
            "replication key",
            format!("{key}, in the place of the one that {} has", left.node_id),
        )]));
    }
    if !done.rotated.is_empty() {
        let rows = done.rotated.iter().map(|rotated| {
            [
                rotated.context.clone(),
                rotated.version.to_string(),
                rotated.key_id.clone(),
            ]
        });
        text.push('\n');
        text.push_str(&output::table(["ROTATED", "VERSION", "KEY ID"], rows));
    }
    text
}

/// What the operator does next.
fn next(wish: &Wish, done: &Done<'_>) -> Vec<String> {
    let node = &wish.node;
    let mut lines = Vec::new();
    if let (RemovalState::Waiting, Some(successor)) = (done.answer.state, &wish.request.successor) {
        let key = done.idempotency_key.as_deref().unwrap_or_default();
        lines.push(format!(
            "{node} stays until {successor} has joined: hsmctl cluster token --node {successor}, then hsmctl cluster join \
             at {successor}"
        ));
        lines.push(format!(
            "then the same command once more replaces what {node} knew, with: --idempotency-key {key}"
        ));
        return lines;
    }
    if !done.to_rotate.is_empty() && done.rekeyed.is_empty() {
        lines.push(format!(
            "{node} still holds the active versions of {}: rotate each with hsmctl rotate CONTEXT",
            done.to_rotate.join(", ")
        ));
    }
    if !done.to_rotate.is_empty() && !done.rekeyed.is_empty() {
        lines.push(format!(
            "{node} still holds the active versions of {}: the nodes rotate what is in slots with another transport key by \
             themselves; look how far they are with: hsmctl cluster rekey status",
            done.to_rotate.join(", ")
        ));
    }
    if !wish.rotate {
        lines.push(format!(
            "{node} knows the transport keys; replace them, which rotates every context too, with: {TRANSPORT}"
        ));
    }
    if done.knows_replication_key {
        lines.push(format!(
            "{node} knows TOKEN_REPLICATION_KEY, which no node can replace by itself: give every node another one beside \
             the present one, restart them one by one, then: {REPLICATION}"
        ));
    }
    lines.push(format!(
        "what was encrypted before can be opened with the tokens of {node}: re-wrap it, destroy the old versions, erase \
         those tokens"
    ));
    lines
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::Cli;

    fn wish(successor: Option<&str>, rotate: bool) -> Wish {
        Wish {
            node: "n3".to_owned(),
            request: RemoveNodeRequest {
                successor: successor.map(str::to_owned),
                ..RemoveNodeRequest::default()
            },
            confirm: None,
            rotate,
            idempotency_key: None,
        }
    }

    fn left(state: RemovalState) -> RemoveNodeResponse {
        RemoveNodeResponse {
            node_id: "n3".to_owned(),
            raft_id: 9,
            state,
            successor: None,
            held: vec!["a".to_owned(), "b".to_owned()],
            voters: 2,
            majority: 2,
            failure_tolerance: 0,
        }
    }

    fn done<'a>(answer: &'a RemoveNodeResponse, to_rotate: &[&str]) -> Done<'a> {
        Done {
            answer,
            index: None,
            rekeyed: vec![],
            rotated: vec![],
            to_rotate: to_rotate.iter().map(|&context| context.to_owned()).collect(),
            replication_key: None,
            knows_replication_key: true,
            idempotency_key: Some("k".to_owned()),
        }
    }

    #[test]
    fn a_dry_run_says_what_is_left_and_what_is_rotated() {
        let would = |wish: &Wish| {
            let preview = foresee(wish, &left(RemovalState::Possible));
            serde_json::to_value(&preview).unwrap()["would"]
                .as_str()
                .unwrap()
                .to_owned()
        };
        assert_eq!(
            would(&wish(None, true)),
            "remove n3 (raft id 9): 2 voters would be left, 2 a majority, and 0 more could fail; and replace the \
             transport keys that it has, which rotates a, b, and the replication key, if every other node has another one \
             beside it"
        );
        assert!(would(&wish(None, false)).ends_with("leave a, b to be rotated"));
        assert!(would(&wish(Some("n4"), true)).starts_with("put n4 in the place of n3"));
    }

    #[test]
    fn what_is_to_be_done_next_is_said() {
        let removed = left(RemovalState::Removed);
        let said = |wish: &Wish, done: &Done<'_>| next(wish, done).join("\n");
        let lines = said(&wish(None, true), &done(&removed, &[]));
        assert!(
            lines.contains("TOKEN_REPLICATION_KEY") && lines.contains(REPLICATION),
            "{lines}"
        );
        assert!(
            !lines.contains("hsmctl rotate") && !lines.contains(TRANSPORT),
            "{lines}"
        );
        let replaced = Done {
            replication_key: Some("cd".to_owned()),
            knows_replication_key: false,
            ..done(&removed, &[])
        };
        let lines = said(&wish(None, true), &replaced);
        assert!(!lines.contains("TOKEN_REPLICATION_KEY"), "{lines}");
        assert!(text(&replaced).contains("cd, in the place of the one that n3 has"));
        let lines = said(&wish(None, false), &done(&removed, &["a", "b"]));
        assert!(
            lines.contains("active versions of a, b") && lines.contains(TRANSPORT),
            "{lines}"
        );
        let busy = Done {
            rekeyed: vec!["s".to_owned()],
            ..done(&removed, &["a"])
        };
        let lines = said(&wish(None, true), &busy);
        assert!(
            lines.contains("rekey status") && !lines.contains("hsmctl rotate"),
            "{lines}"
        );
        let waiting = left(RemovalState::Waiting);
        let lines = next(&wish(Some("n4"), true), &done(&waiting, &[])).join("\n");
        assert!(
            lines.contains("cluster token --node n4") && lines.contains("--idempotency-key k"),
            "{lines}"
        );
    }

    /// As it is typed: a command that is offered and refused is worse than none.
    #[test]
    fn every_command_that_is_offered_is_one() {
        for command in [TRANSPORT, REPLICATION, "hsmctl cluster rekey status"] {
            let parsed = Cli::try_parse_from(command.split(' '));
            assert!(parsed.is_ok(), "{command}: {:?}", parsed.err());
        }
    }

    #[test]
    fn keys_that_could_not_be_replaced_make_the_command_fail_and_say_how_to_go_on() {
        assert!(finish(&wish(None, true), "k", &[]).is_ok());
        let mut renewal = Renewal::default();
        renewal.fail("the transport key of slot s was not replaced".to_owned(), &"x");
        renewal.fail("b was not rotated".to_owned(), &"y");
        let error = finish(&wish(None, true), "k", &renewal.failed).unwrap_err();
        let text = format!("{error:#}");
        assert!(
            text.contains("slot s was not replaced: x, and 1 more failed")
                && text.contains("--idempotency-key k"),
            "{text}"
        );
    }

    #[test]
    fn a_warning_names_the_node_and_says_whether_keys_are_replaced() {
        assert!(warning(&wish(None, true)).contains("gets a new version"));
        let text = warning(&wish(Some("n4"), false));
        assert!(
            text.contains("n4 can take its place") && text.contains("--no-rotate"),
            "{text}"
        );
    }
}
