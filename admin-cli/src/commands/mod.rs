//! What each command does: one request, one answer, printed. Commands decide nothing that a node decides.

pub(crate) mod acl;
mod acl_changes;
mod acl_set;
pub(crate) mod cleanup;
pub(crate) mod cluster;
mod cluster_init;
mod cluster_leader;
pub(crate) mod cluster_rekey;
mod cluster_remove;
mod cluster_token;
pub(crate) mod completions;
pub(crate) mod create_kek;
pub(crate) mod data;
pub(crate) mod export_metadata;
mod join;
pub(crate) mod key;
mod key_adopt;
pub(crate) mod key_destroy;
mod key_move;
mod key_release;
mod key_usage;
pub(crate) mod list_kek;
pub(crate) mod manual;
pub(crate) mod node;
mod pin_file;
mod preview;
pub(crate) mod profile;
pub(crate) mod revoke;
pub(crate) mod rotate;
mod rotate_each;
mod rotation_status;
pub(crate) mod slot;
mod slot_init;
mod slot_status;
mod slot_unlock;
pub(crate) mod update_checksums;

use std::ffi::OsString;
use std::time::Duration;

use anyhow::{Context, Result};
use hsm_api::{Client, ClientError};

use crate::cli::{Cli, Command, Global};
use crate::exit::{client_error, usage, with_hint};
use crate::names::Name;
use crate::output::{self, Format, or_dash};
use crate::profile::{self as profiles, Profile};
use crate::progress::patiently;
use crate::terminal::Questions;
use crate::v1_config;

/// Reading, encrypting, decrypting.
const READ: Duration = Duration::from_secs(15);
/// Changes: nodes themselves give up after 15 s and then say so.
const CHANGE: Duration = Duration::from_secs(40);
/// Making or joining a cluster imports keys: a joining node answers within 60 s and is then asked again.
const MEMBERSHIP: Duration = Duration::from_secs(90);
/// Endpoints that a note names one by one.
const NAMED: usize = 3;
/// To version 1's scripts, which named nobody.
const AS_THE_NODE: &str = "nobody is named who asks, so the node's own certificate was used, which administers only if \
    roles say so and it was issued for clients too; name an administrator's certificate with --cert FILE --key FILE, or \
    set HSMCTL_CERT and HSMCTL_KEY";

/// How this invocation talks to nodes and prints.
pub(crate) struct Session {
    global: Global,
}

impl Session {
    pub(crate) fn new(global: Global) -> Self {
        Self { global }
    }

    pub(crate) fn format(&self) -> Format {
        self.global.output.unwrap_or_default()
    }

    /// Whether somebody may be asked.
    pub(crate) fn questions(&self) -> Questions {
        Questions::unless(self.global.no_input)
    }

    /// A client of all endpoints.
    fn client(&self, default: Duration) -> Result<Client> {
        let budget = self.global.timeout.map_or(default, Duration::from_secs);
        Profile::resolve(&self.global)?.client(budget)
    }

    /// A client of the one endpoint that was named: for what is about one node.
    fn client_of_one(&self, default: Duration) -> Result<Client> {
        let profile = Profile::resolve(&self.global)?;
        if profile.endpoints.len() != 1 {
            return Err(usage(format!(
                "this is about one node, and {} are named; say which with --endpoint https://host:port",
                profile.endpoints.len()
            )));
        }
        self.client(default)
    }

    /// Waits for a node's answer and shows that, if it takes longer than a second and somebody looks. What a node does
    /// meanwhile, or whether it has heard the question, is not known here.
    async fn ask<T>(&self, client: &Client, what: &str, call: impl Future<Output = T>) -> T {
        patiently(&format!("{what}: waiting for {}", whom(client)), call).await
    }

    /// Adds to a failure of TLS which certificates were used, and where that was the node's own because nobody was named,
    /// to every refusal how to name somebody.
    fn explain(&self, error: anyhow::Error) -> anyhow::Error {
        let failed = client_error(&error);
        let (tls, refused) = (
            failed.is_some_and(is_about_tls),
            failed.is_some_and(may_be_for_the_certificate),
        );
        let error = match Profile::resolve(&self.global) {
            Ok(profile) if tls => with_hint(error, format!("asked with {}", profile.files())),
            _ => error,
        };
        if self.global.as_the_node && refused {
            return with_hint(error, AS_THE_NODE);
        }
        error
    }
}

fn whom(client: &Client) -> String {
    let endpoints: Vec<&str> = client.endpoints().collect();
    if endpoints.len() <= NAMED {
        endpoints.join(" or ")
    } else {
        format!("one of {} nodes", endpoints.len())
    }
}

fn is_about_tls(error: &ClientError) -> bool {
    match error {
        ClientError::Tls { .. } => true,
        ClientError::NoneAnswered { failures } => failures.iter().any(is_about_tls),
        _ => false,
    }
}

/// A node may break a connection before its client has read why it refuses the certificate.
fn may_be_for_the_certificate(error: &ClientError) -> bool {
    match error {
        ClientError::Tls { .. } | ClientError::Transport { .. } => true,
        ClientError::NoneAnswered { failures } => failures.iter().any(may_be_for_the_certificate),
        error => matches!(error.status(), Some(401 | 403)),
    }
}

/// Fills in what neither an option nor a variable says.
pub(crate) fn prepare(name: Name, cli: &mut Cli) -> Result<()> {
    if !cli.command.asks_nodes() {
        v1_config::pass_over(&cli.global);
        return Ok(());
    }
    fill_in(&mut cli.global, name, &|variable| std::env::var_os(variable))
}

/// From version 1's configuration, then from a profile. But a profile that is named goes before what only version 1's
/// variables say: they may be a node's, and it was meant for this command.
fn fill_in(global: &mut Global, name: Name, env: &dyn Fn(&str) -> Option<OsString>) -> Result<()> {
    let is_named = global.profile.as_ref().is_some_and(|profile| !profile.is_empty());
    if is_named && global.config.is_none() {
        profiles::apply(global, env)?;
        return v1_config::apply(global, name, env);
    }
    v1_config::apply(global, name, env)?;
    profiles::apply(global, env)
}

/// Carries a command out.
pub(crate) fn run(name: Name, cli: Cli) -> Result<()> {
    let Cli { global, command } = cli;
    let session = Session::new(global);
    match command {
        // Needs no network, and must not have a thread beside it while it handles PINs.
        Command::Slot(slot::SlotCommand::Init(args)) => slot_init::init(&session, &args),
        Command::Dev(command) => crate::dev::run(&session, command),
        Command::Node(command) => command.run(&session),
        Command::Profile(command) => profile::run(&session, &command),
        Command::Completions(args) => completions::print(name, &args),
        Command::Man(args) => manual::print(name, &args),
        command => on_runtime(remote(&session, command))?.map_err(|error| session.explain(error)),
    }
}

/// Runs one future to its end on this thread.
pub(crate) fn on_runtime<T>(work: impl Future<Output = T>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")?;
    Ok(runtime.block_on(work))
}

async fn remote(session: &Session, command: Command) -> Result<()> {
    match command {
        Command::Cluster(command) => cluster::run(session, command).await,
        Command::CreateKek(command) => create_kek::create(session, command).await,
        Command::ListKek(command) => list_kek::list(session, &command).await,
        Command::Rotate(command) => rotate::rotate(session, command).await,
        Command::RotationStatus => rotation_status::status(session).await,
        Command::Key(command) => key::run(session, command).await,
        Command::DeleteKek(args) => key_destroy::delete_kek(session, args).await,
        Command::CleanupOldVersions(args) => cleanup::run(session, args).await,
        Command::ExportMetadata(command) => export_metadata::export(session, &command).await,
        Command::UpdateChecksums(command) => update_checksums::show(session, &command).await,
        Command::Encrypt(command) => data::encrypt(session, &command).await,
        Command::Decrypt(command) => data::decrypt(session, command).await,
        Command::Whoami => whoami(session).await,
        Command::Acl(command) => acl::run(session, command).await,
        Command::Revoke(args) => revoke::revoke(session, &args).await,
        Command::Unrevoke(args) => revoke::unrevoke(session, &args).await,
        Command::Revocations => revoke::list(session).await,
        Command::Slot(slot::SlotCommand::Status(args)) => slot_status::status(session, &args).await,
        Command::Slot(slot::SlotCommand::Unlock(args)) => slot_unlock::unlock(session, &args).await,
        // Handled before there is a runtime.
        Command::Slot(slot::SlotCommand::Init(_))
        | Command::Dev(_)
        | Command::Node(_)
        | Command::Profile(_)
        | Command::Completions(_)
        | Command::Man(_) => Ok(()),
    }
}

async fn whoami(session: &Session) -> Result<()> {
    let client = session.client(READ)?;
    let answer = session.ask(&client, "whoami", client.whoami()).await?;
    let me = &answer.body;
    output::print(session.format(), me, || {
        output::pairs([
            ("node", or_dash(answer.meta.node.clone())),
            ("cn", me.cn.clone()),
            ("ou", or_dash(me.ou.clone())),
            ("roles", me.roles.join(", ")),
            ("contexts", me.contexts.join(", ")),
        ])
    })
}

/// A key under which a change can be repeated.
fn idempotency_key(given: Option<String>) -> String {
    given.unwrap_or_else(|| ulid::Ulid::new().to_string())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::path::{Path, PathBuf};

    use hsm_api::ErrorCode;

    use super::*;
    use crate::exit::tests::{api, silence};

    fn tls() -> ClientError {
        ClientError::Tls {
            endpoint: "https://a:1".to_owned(),
            reason: "unknown CA".to_owned(),
        }
    }

    #[test]
    fn a_failure_of_tls_names_the_files_that_were_used() {
        let session = Session::new(Global {
            endpoints: vec!["https://a:1".to_owned()],
            pki: Some("/play/pki".into()),
            ..Global::default()
        });
        for error in [
            tls(),
            ClientError::NoneAnswered {
                failures: vec![tls()],
            },
        ] {
            let text = format!("{:#}", session.explain(error.into()));
            for file in [
                "/play/pki/ca.crt",
                "/play/pki/clients/admin.crt",
                "/play/pki/clients/admin.key",
            ] {
                assert!(text.contains(file), "{text}");
            }
        }
        let other = ClientError::Request("x".to_owned());
        let text = format!("{:#}", session.explain(other.into()));
        assert!(!text.contains("/play"), "{text}");
    }

    /// Where a node runs, version 1's variables are set for it.
    #[test]
    fn a_named_profile_goes_before_the_variables_of_version_1_and_not_before_an_option() {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join(".config/hsmctl");
        std::fs::create_dir_all(&folder).unwrap();
        let profiles =
            "profiles: {prod: {endpoints: [https://prod:1], ca: p.crt}, bare: {cert: b.crt, key: b.key}}";
        std::fs::write(folder.join("profiles.yaml"), profiles).unwrap();
        let config = home.path().join("config.yaml");
        std::fs::write(&config, "server: {port: 9443, tls: {ca_path: v.crt}}").unwrap();
        let variables = [
            ("HOME", home.path().as_os_str()),
            ("CONFIG_PATH", config.as_os_str()),
        ];
        let filled = |profile: &str, config: Option<&Path>| {
            let mut global = Global {
                profile: Some(profile.to_owned()),
                config: config.map(Path::to_owned),
                ..Global::default()
            };
            let env = |variable: &str| {
                let found = variables.iter().find(|(known, _)| *known == variable);
                found.map(|(_, value)| value.to_os_string())
            };
            fill_in(&mut global, Name::HsmAdmin, &env).unwrap();
            (global.endpoints.concat(), global.ca.unwrap(), global.cert)
        };
        let (local, own_ca) = ("https://localhost:9443".to_owned(), PathBuf::from("v.crt"));
        let prod = ("https://prod:1".to_owned(), folder.join("p.crt"), None);
        assert_eq!(filled("prod", None), prod);
        assert_eq!(
            filled("prod", Some(&config)),
            (local.clone(), own_ca.clone(), None)
        );
        // What it leaves out they say.
        let cert = Some(folder.join("b.crt"));
        assert_eq!(filled("bare", None), (local, own_ca, cert));
    }

    #[test]
    fn whoever_is_refused_as_the_node_hears_how_to_be_somebody_else() {
        let explained = |as_the_node: bool, error: ClientError| {
            let session = Session::new(Global {
                as_the_node,
                ..Global::default()
            });
            format!("{:#}", session.explain(error.into()))
        };
        let refusals: [fn() -> ClientError; 4] = [
            || api(ErrorCode::RoleRequired),
            tls,
            silence,
            || ClientError::NoneAnswered {
                failures: vec![silence(), tls()],
            },
        ];
        for error in refusals {
            let text = explained(true, error());
            assert!(
                text.contains("--cert FILE --key FILE") && text.contains("HSMCTL_CERT and HSMCTL_KEY"),
                "{text}"
            );
            let text = explained(false, error());
            assert!(!text.contains("HSMCTL_CERT"), "{text}");
        }
        let text = explained(true, api(ErrorCode::NotFound));
        assert!(!text.contains("HSMCTL_CERT"), "{text}");
    }
}
