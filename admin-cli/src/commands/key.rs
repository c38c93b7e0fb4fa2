//! `hsmctl key`: single key versions. What they are called is `CONTEXT/vN`.

use std::fmt;
use std::str::FromStr;

use anyhow::Result;
use clap::{Args, Subcommand};
use hsm_api::ErrorCode;
use hsm_api::admin::{
    DestructionInfo, KeyOrigin, KeyState, KeyVersionInfo, KeyVersionResponse, ListKeksResponse,
};

use super::preview::{self, Preview};
use super::{
    CHANGE, READ, Session, idempotency_key, key_adopt, key_destroy, key_move, key_release, key_usage,
    list_kek,
};
use crate::exit::{change_failed, missing, would_be_refused};
use crate::output::{self, or_dash};

/// Key versions.
#[derive(Debug, Subcommand)]
pub(crate) enum KeyCommand {
    /// List contexts and their key versions, as list-kek does.
    List(list_kek::ListKek),
    /// Show one version, and how far its destruction is.
    Show(Show),
    /// Show how often each version was used, when last, and by which nodes.
    Usage(key_usage::Usage),
    /// Take a retired version out of use: nothing is decrypted with it until it is enabled again.
    Disable(Change),
    /// Put a disabled version back into use.
    Enable(Change),
    /// Destroy a retired version on every node, after a wait in which it can be undone. It is out of use at once.
    Destroy(key_destroy::Destroy),
    /// Take a destruction back that still waits: the version is what it was before.
    UndoDestroy(Change),
    /// Adopt keys that version 1 made, from a token of the one node that is named.
    ///
    /// They cannot leave their token, so they decrypt only on nodes that have it, or a copy of it, and never encrypt. A
    /// context without a version that encrypts gets one, on every node. Version 1's own objects stay as they are.
    Adopt(key_adopt::Adopt),
    /// Make the next version of a context in another slot, and make it at once.
    ///
    /// Older versions stay in their own slot and decrypt on; rewrap what was encrypted under them. Every node has to
    /// have both slots open. Returns once the new version is active.
    Move(key_move::Move),
    /// Give an adopted version back to version 1: the nodes remove their copies of the key.
    ///
    /// For a key that was adopted into the wrong context, or before version 1 is gone back to. It decrypts nothing from then
    /// on; version 1's own object stays in its token, and its label can be adopted again.
    Release(key_release::Release),
}

/// A key version as it is typed and printed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Named {
    pub(super) context: String,
    pub(super) version: u32,
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/v{}", self.context, self.version)
    }
}

impl FromStr for Named {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?}: write CONTEXT/vN, such as exchange-key/v3");
        let (context, version) = text.rsplit_once("/v").ok_or_else(wrong)?;
        let is_number = !version.is_empty() && version.bytes().all(|byte| byte.is_ascii_digit());
        match version.parse() {
            Ok(version) if is_number && !context.is_empty() => Ok(Self {
                context: context.to_owned(),
                version,
            }),
            _ => Err(wrong()),
        }
    }
}

/// Arguments of `key show`.
#[derive(Debug, Args)]
pub(crate) struct Show {
    /// The version.
    #[arg(value_name = "CONTEXT/vN")]
    version: Named,
}

/// Arguments of `key disable`, `key enable` and `key undo-destroy`.
#[derive(Debug, Args)]
pub(crate) struct Change {
    /// The version.
    #[arg(value_name = "CONTEXT/vN")]
    version: Named,
    /// Under the same key a repeated command changes once.
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    /// Say what would be changed, and change nothing.
    #[arg(long)]
    dry_run: bool,
}

/// What [`Change`] is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verb {
    Disable,
    Enable,
    UndoDestroy,
}

impl Verb {
    fn name(self) -> &'static str {
        match self {
            Self::Disable => "key disable",
            Self::Enable => "key enable",
            Self::UndoDestroy => "key undo-destroy",
        }
    }
}

pub(super) async fn run(session: &Session, command: KeyCommand) -> Result<()> {
    match command {
        KeyCommand::List(args) => list_kek::list(session, &args).await,
        KeyCommand::Show(args) => show(session, &args).await,
        KeyCommand::Usage(args) => key_usage::usage(session, &args).await,
        KeyCommand::Disable(args) => change(session, Verb::Disable, args).await,
        KeyCommand::Enable(args) => change(session, Verb::Enable, args).await,
        KeyCommand::Destroy(args) => key_destroy::destroy(session, args).await,
        KeyCommand::UndoDestroy(args) => change(session, Verb::UndoDestroy, args).await,
        KeyCommand::Adopt(args) => key_adopt::adopt(session, args).await,
        KeyCommand::Move(args) => key_move::relocate(session, args).await,
        KeyCommand::Release(args) => key_release::release(session, args).await,
    }
}

async fn show(session: &Session, args: &Show) -> Result<()> {
    let client = session.client(READ)?;
    let keks = session.ask(&client, "key show", client.list_keks()).await?;
    let Some(info) = find(&keks, &args.version) else {
        return Err(missing(format!("{}: there is no such key version", args.version)));
    };
    let shown = KeyVersionResponse {
        context: args.version.context.clone(),
        info: info.clone(),
    };
    output::print(session.format(), &shown, || text(&args.version, info))
}

async fn change(session: &Session, verb: Verb, args: Change) -> Result<()> {
    let client = session.client(CHANGE)?;
    let named = &args.version;
    if args.dry_run {
        preview::check_role(session, &client, preview::OPERATE).await?;
        preview::check_leader(session, &client).await?;
        let keks = session.ask(&client, verb.name(), client.list_keks()).await?;
        return foresee(verb, named, &keks)?.print(session);
    }
    let key = idempotency_key(args.idempotency_key);
    let what = format!("{} {named}", verb.name());
    let call = async {
        match verb {
            Verb::Disable => {
                client
                    .disable_key(&named.context, named.version, Some(&key))
                    .await
            }
            Verb::Enable => client.enable_key(&named.context, named.version, Some(&key)).await,
            Verb::UndoDestroy => {
                client
                    .undo_destroy_key(&named.context, named.version, Some(&key))
                    .await
            }
        }
    };
    let answer = session
        .ask(&client, &what, call)
        .await
        .map_err(|error| change_failed(error, &key))?;
    output::print_change(session.format(), &answer, || text(named, &answer.body.info))
}

/// A version as the nodes list it.
pub(super) fn find<'a>(keks: &'a ListKeksResponse, named: &Named) -> Option<&'a KeyVersionInfo> {
    let context = preview::find(keks, &named.context)?;
    context
        .versions
        .iter()
        .find(|version| version.version == named.version)
}

/// A version, for people.
pub(super) fn text(named: &Named, info: &KeyVersionInfo) -> String {
    let names = |names: &[String]| or_dash(Some(names.join(",")).filter(|names| !names.is_empty()));
    let mut text = output::pairs([
        ("version", named.to_string()),
        ("key id", info.key_id.clone()),
        ("key uid", info.key_uid.clone()),
        ("slot", info.slot.clone()),
        ("state", info.state.to_string()),
        ("origin", info.origin.to_string()),
        ("held by", held_by(info)),
        ("created", info.created_at.clone()),
        ("activated", or_dash(info.activated_at.clone())),
        ("retired", or_dash(info.retired_at.clone())),
        (
            match info.state {
                KeyState::Destroying | KeyState::Destroyed => "removed by",
                _ => "proven by",
            },
            names(&info.acks),
        ),
        ("leased", or_dash(info.invocations.map(key_usage::leased))),
    ]);
    if let Some(destruction) = &info.destruction {
        text.push_str("\ndestruction\n");
        text.push_str(&destruction_text(destruction));
        if info.state == KeyState::DestroyScheduled {
            text.push_str(&format!("  take it back: hsmctl key undo-destroy {named}\n"));
        }
    }
    text
}

/// The nodes that have the key, or will have: one that version 1 made is nowhere else.
pub(super) fn held_by(info: &KeyVersionInfo) -> String {
    match info.origin {
        KeyOrigin::Adopted if info.holders.is_empty() => "nobody".to_owned(),
        KeyOrigin::Adopted => format!("{} only", info.holders.join(",")),
        _ => "every node".to_owned(),
    }
}

fn destruction_text(destruction: &DestructionInfo) -> String {
    let left = destruction
        .wait_seconds
        .saturating_sub(destruction.elapsed_seconds);
    let mut lines = vec![format!("scheduled {}", destruction.scheduled_at)];
    lines.push(format!(
        "waits {}, {} left under a leader; undone it is {} again",
        span(destruction.wait_seconds),
        span(left),
        destruction.undone
    ));
    if let Some(begun) = &destruction.begun_at {
        lines.pop();
        lines.push(format!("begun {begun}: there is no way back"));
    }
    if let Some(ended) = &destruction.ended_at {
        lines.push(format!("gone from every token since {ended}"));
    }
    if !destruction.owing.is_empty() {
        lines.push(format!("not removed yet by {}", destruction.owing.join(", ")));
    }
    if !destruction.joining.is_empty() {
        lines.push(format!(
            "holds it and has not joined: {}; the destruction does not end before it has, or while its join has failed \
             for good (no node can be removed yet)",
            destruction.joining.join(", ")
        ));
    }
    if destruction.remnants_sealed {
        lines.push(
            "old logs, snapshots and backups may still hold the key, sealed under a transport key that lives"
                .to_owned(),
        );
    }
    lines.iter().map(|line| format!("  {line}\n")).collect()
}

/// A time in its largest two units.
pub(super) fn span(seconds: u64) -> String {
    let mut rest = seconds;
    let mut parts = Vec::new();
    for (length, name) in [(86_400, "d"), (3600, "h"), (60, "min"), (1, "s")] {
        if parts.len() < 2 && rest >= length {
            parts.push(format!("{} {name}", rest / length));
            rest %= length;
        }
    }
    if parts.is_empty() {
        return "0 s".to_owned();
    }
    parts.join(" ")
}

/// The version a change is about; the refusal if it is not there, or not retired.
pub(super) fn retired<'a>(keks: &'a ListKeksResponse, named: &Named) -> Result<&'a KeyVersionInfo> {
    let Some(info) = find(keks, named) else {
        let detail = format!("{named} does not exist");
        return Err(would_be_refused(ErrorCode::NotFound, detail));
    };
    let remedy = match info.state {
        KeyState::DecryptOnly | KeyState::Disabled | KeyState::DestroyScheduled => return Ok(info),
        KeyState::Active => format!("; rotate {} first", named.context),
        _ => String::new(),
    };
    let detail = format!("{named} is {}{remedy}", info.state);
    Err(would_be_refused(ErrorCode::Conflict, detail))
}

fn foresee(verb: Verb, named: &Named, keks: &ListKeksResponse) -> Result<Preview> {
    let info = retired(keks, named)?;
    let conflict = |why: &str| {
        let detail = format!("{named} is {}: {why}", info.state);
        Err(would_be_refused(ErrorCode::Conflict, detail))
    };
    let would = match (verb, info.state) {
        (Verb::Disable, KeyState::Disabled) | (Verb::Enable, KeyState::DecryptOnly) => {
            format!("leave {named} as it is: {}", info.state)
        }
        (Verb::Disable, KeyState::DecryptOnly) => {
            format!("disable {named}: nothing is decrypted with it until it is enabled again")
        }
        (Verb::Enable, KeyState::Disabled) => format!("enable {named}: it decrypts again"),
        (Verb::UndoDestroy, KeyState::DestroyScheduled) => {
            let was = info.destruction.as_ref().map(|destruction| destruction.undone);
            format!("not destroy {named}: it is {} again", or_dash(was))
        }
        (Verb::UndoDestroy, _) => return conflict("no destruction of it waits"),
        (_, _) => return conflict("undo its destruction first"),
    };
    Ok(Preview::new(would))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
pub(super) mod tests {
    use super::super::preview::tests::keks;
    use super::*;
    use crate::exit::Exit;

    /// As [`keks`], with version 2 of `exchange-key` in another state.
    pub(in super::super) fn keks_with(state: KeyState) -> ListKeksResponse {
        let mut keks = keks();
        for info in keks.contexts.iter_mut().flat_map(|info| &mut info.versions) {
            if info.key_id == "kek-exchange-key-v2" {
                info.state = state;
                info.destruction = (state == KeyState::DestroyScheduled).then(destruction);
            }
        }
        keks
    }

    fn destruction() -> DestructionInfo {
        DestructionInfo {
            scheduled_at: "2030-01-01T00:00:00Z".to_owned(),
            undone: KeyState::Disabled,
            wait_seconds: 7 * 86_400,
            elapsed_seconds: 86_400 + 1800,
            begun_at: None,
            ended_at: None,
            owing: Vec::new(),
            joining: Vec::new(),
            remnants_sealed: false,
        }
    }

    pub(in super::super) fn named(text: &str) -> Named {
        text.parse().unwrap()
    }

    #[test]
    fn a_version_is_named_by_context_and_number() {
        let version = named("exchange-key/v3");
        assert_eq!((version.context.as_str(), version.version), ("exchange-key", 3));
        assert_eq!(version.to_string(), "exchange-key/v3");
        for wrong in [
            "exchange-key",
            "exchange-key/3",
            "exchange-key/v",
            "/v3",
            "a/v+3",
            "a/vx",
        ] {
            let error = wrong.parse::<Named>().unwrap_err();
            assert!(error.contains("CONTEXT/vN"), "{error}");
        }
    }

    #[test]
    fn times_are_said_in_two_units() {
        let said: Vec<_> = [0, 59, 3600, 7 * 86_400, 86_400 + 7200 + 30].map(span).to_vec();
        assert_eq!(said, ["0 s", "59 s", "1 h", "7 d", "1 d 2 h"]);
    }

    #[test]
    fn a_destruction_says_how_long_it_can_be_undone_and_who_owes_it() {
        let version = named("exchange-key/v2");
        let keks = keks_with(KeyState::DestroyScheduled);
        let mut info = find(&keks, &version).unwrap().clone();
        let shown = text(&version, &info);
        for part in [
            "waits 7 d, 5 d 23 h left",
            "undo-destroy exchange-key/v2",
            "disabled again",
        ] {
            assert!(shown.contains(part), "{part} is not in\n{shown}");
        }
        info.state = KeyState::Destroying;
        info.destruction = Some(DestructionInfo {
            begun_at: Some("2030-01-08T00:00:00Z".to_owned()),
            owing: vec!["hsm-node-3".to_owned(), "hsm-node-4".to_owned()],
            joining: vec!["hsm-node-4".to_owned()],
            remnants_sealed: true,
            ..destruction()
        });
        let shown = text(&version, &info);
        for part in [
            "no way back",
            "not removed yet by hsm-node-3, hsm-node-4",
            "has not joined: hsm-node-4",
            "backups may still hold",
        ] {
            assert!(shown.contains(part), "{part} is not in\n{shown}");
        }
        assert!(!shown.contains("undo-destroy"), "{shown}");
    }

    #[test]
    fn an_adopted_version_says_who_has_it() {
        let version = named("exchange-key/v2");
        let keks = keks_with(KeyState::DecryptOnly);
        let mut info = find(&keks, &version).unwrap().clone();
        assert!(text(&version, &info).contains("every node"));
        info.origin = KeyOrigin::Adopted;
        info.holders = vec!["hsm-node-1".to_owned(), "hsm-node-2".to_owned()];
        let shown = text(&version, &info);
        assert!(
            shown.contains("adopted") && shown.contains("hsm-node-1,hsm-node-2 only"),
            "{shown}"
        );
    }

    fn foreseen(verb: Verb, text: &str, state: KeyState) -> Result<String> {
        let preview = foresee(verb, &named(text), &keks_with(state))?;
        let json = serde_json::to_value(&preview)?;
        Ok(json["would"].as_str().unwrap().to_owned())
    }

    #[test]
    fn a_dry_run_says_what_a_change_would_do() {
        let at = |verb, state| foreseen(verb, "exchange-key/v2", state);
        let would = at(Verb::Disable, KeyState::DecryptOnly).unwrap();
        assert!(would.starts_with("disable exchange-key/v2"), "{would}");
        let would = at(Verb::Disable, KeyState::Disabled).unwrap();
        assert!(would.starts_with("leave"), "{would}");
        let would = at(Verb::UndoDestroy, KeyState::DestroyScheduled).unwrap();
        assert!(would.ends_with("disabled again"), "{would}");
        for (verb, state) in [
            (Verb::UndoDestroy, KeyState::DecryptOnly),
            (Verb::Enable, KeyState::DestroyScheduled),
            (Verb::Enable, KeyState::Destroyed),
        ] {
            assert_eq!(Exit::of(&at(verb, state).unwrap_err()), Exit::Conflict);
        }
        let active = foreseen(Verb::Disable, "exchange-key/v3", KeyState::DecryptOnly).unwrap_err();
        assert!(
            active.to_string().contains("rotate exchange-key first"),
            "{active}"
        );
        let none = foreseen(Verb::Disable, "exchange-key/v9", KeyState::DecryptOnly).unwrap_err();
        assert_eq!(Exit::of(&none), Exit::Conflict);
    }
}
