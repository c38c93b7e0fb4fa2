//! `hsmctl cluster remove` and `replace`: a node leaves for good, and every key that it could use is replaced.

use anyhow::Result;
use clap::Args;
use hsm_api::Client;
use hsm_api::admin::{RemovalState, RemoveNodeRequest, RemoveNodeResponse};
use serde::Serialize;

use super::preview::{self, Preview};
use super::{CHANGE, Session, idempotency_key};
use crate::exit::{change_failed, with_hint};
use crate::output::{self, note};
use crate::progress::Progress;
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
    /// Leave the keys as they are that the node held; `cluster members` goes on naming them.
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
    /// Leave the keys as they are that the node held; `cluster members` goes on naming them.
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
    let rotated = if wish.rotate && left.state == RemovalState::Removed {
        rotate_all(&client, &left.held, &key).await
    } else {
        Rotations::default()
    };
    let done = Done {
        answer: left,
        index: answer.meta.index.map(|index| index.to_string()),
        rotated: rotated.made,
        idempotency_key: (left.state == RemovalState::Waiting).then(|| key.clone()),
        to_rotate: match (left.state, wish.rotate) {
            (RemovalState::Removed, true) => rotated
                .failed
                .iter()
                .map(|(context, _)| context.clone())
                .collect(),
            _ => left.held.clone(),
        },
    };
    output::print(session.format(), &done, || text(&done))?;
    for line in next(&wish, &done) {
        note(&line);
    }
    finish(&wish, &key, &rotated.failed)
}

/// A removal that is done and rotations that are not make a failure: whoever looks at the exit code has to know.
fn finish(wish: &Wish, key: &str, failed: &[(String, String)]) -> Result<()> {
    let Some((context, error)) = failed.first() else {
        return Ok(());
    };
    let node = &wish.node;
    let more = match failed.len() {
        1 => String::new(),
        many => format!(", and {} more", many - 1),
    };
    let failure = anyhow::anyhow!("{node} is removed, and {context}{more} was not rotated: {error}");
    let hint = format!(
        "it still holds those keys; ask again, and the rest is rotated, with: --idempotency-key {key}"
    );
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
        "every key that it holds gets a new version"
    } else {
        "the keys that it holds stay in use (--no-rotate)"
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
        (_, true) => "; it holds no active key version".to_owned(),
        (true, false) => format!("; and rotate {}", left.held.join(", ")),
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

/// A new version in the place of one that the node has.
#[derive(Debug, Serialize)]
struct Rotated {
    context: String,
    version: u32,
    key_id: String,
}

#[derive(Debug, Default)]
struct Rotations {
    made: Vec<Rotated>,
    /// Contexts, each with what went wrong.
    failed: Vec<(String, String)>,
}

/// One after the other, all of them whatever becomes of one. The key of the removal is each rotation's too: it belongs to
/// another operation each time.
async fn rotate_all(client: &Client, contexts: &[String], key: &str) -> Rotations {
    let progress = Progress::of_steps("rotating what the node held", contexts.len());
    let mut rotations = Rotations::default();
    for context in contexts {
        match client.rotate(context, Some(key)).await {
            Ok(answer) => rotations.made.push(Rotated {
                context: context.clone(),
                version: answer.version,
                key_id: answer.key_id.clone(),
            }),
            Err(error) => rotations.failed.push((context.clone(), error.to_string())),
        }
        progress.step();
    }
    rotations
}

/// What has come of it.
#[derive(Debug, Serialize)]
struct Done<'a> {
    #[serde(flatten)]
    answer: &'a RemoveNodeResponse,
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<String>,
    rotated: Vec<Rotated>,
    /// Contexts whose active version the node still holds.
    to_rotate: Vec<String>,
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
            "then the same command once more rotates what {node} held, with: --idempotency-key {key}"
        ));
        return lines;
    }
    if !done.to_rotate.is_empty() {
        lines.push(format!(
            "{node} still holds the active versions of {}: rotate each with hsmctl rotate CONTEXT",
            done.to_rotate.join(", ")
        ));
    }
    lines.push(format!(
        "{node} knows the keys that protect keys on their way: next, hsmctl cluster rekey transport, then hsmctl cluster \
         rekey replication"
    ));
    lines.push(format!(
        "what was encrypted before can be opened with the tokens of {node}: re-wrap it, destroy the old versions, erase \
         those tokens"
    ));
    lines
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

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
            rotated: vec![],
            to_rotate: to_rotate.iter().map(|&context| context.to_owned()).collect(),
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
            "remove n3 (raft id 9): 2 voters would be left, 2 a majority, and 0 more could fail; and rotate a, b"
        );
        assert!(would(&wish(None, false)).ends_with("leave a, b to be rotated"));
        assert!(would(&wish(Some("n4"), true)).starts_with("put n4 in the place of n3"));
    }

    #[test]
    fn what_is_to_be_done_next_is_said() {
        let removed = left(RemovalState::Removed);
        let lines = next(&wish(None, true), &done(&removed, &[])).join("\n");
        assert!(
            lines.contains("rekey transport") && lines.contains("rekey replication"),
            "{lines}"
        );
        assert!(!lines.contains("hsmctl rotate"), "{lines}");
        let lines = next(&wish(None, false), &done(&removed, &["a", "b"])).join("\n");
        assert!(lines.contains("active versions of a, b"), "{lines}");
        let waiting = left(RemovalState::Waiting);
        let lines = next(&wish(Some("n4"), true), &done(&waiting, &[])).join("\n");
        assert!(
            lines.contains("cluster token --node n4") && lines.contains("--idempotency-key k"),
            "{lines}"
        );
    }

    #[test]
    fn rotations_that_failed_make_the_command_fail_and_say_how_to_go_on() {
        assert!(finish(&wish(None, true), "k", &[]).is_ok());
        let failed = [("a".to_owned(), "x".to_owned()), ("b".to_owned(), "y".to_owned())];
        let error = finish(&wish(None, true), "k", &failed).unwrap_err();
        let text = format!("{error:#}");
        assert!(
            text.contains("a, and 1 more was not rotated: x") && text.contains("--idempotency-key k"),
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
