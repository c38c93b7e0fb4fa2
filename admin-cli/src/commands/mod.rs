//! What each command does: one request, one answer, printed. Commands decide nothing that a node decides.

pub(crate) mod cluster;
pub(crate) mod data;
pub(crate) mod keys;
pub(crate) mod rotate;
pub(crate) mod slot;

use std::time::Duration;

use anyhow::{Context, Result};
use hsm_api::Client;

use crate::cli::{Cli, Command, Global};
use crate::exit::usage;
use crate::output::{self, Format, note, or_dash};
use crate::profile::Profile;

/// Reading, encrypting, decrypting.
const READ: Duration = Duration::from_secs(15);
/// Changes: nodes themselves give up after 15 s and then say so.
const CHANGE: Duration = Duration::from_secs(40);
/// Making or joining a cluster imports keys; a joining node answers within 60 s.
const MEMBERSHIP: Duration = Duration::from_secs(90);

/// How this invocation talks to nodes and prints.
pub(crate) struct Session {
    global: Global,
}

impl Session {
    pub(crate) fn new(global: Global) -> Self {
        Self { global }
    }

    pub(crate) fn format(&self) -> Format {
        self.global.output
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
}

/// Carries a command out.
pub(crate) fn run(cli: Cli) -> Result<()> {
    if let Some(config) = &cli.global.config {
        note(&format!(
            "--config {}: has no meaning here: this program asks nodes, and reads no configuration of theirs",
            config.display()
        ));
    }
    let session = Session::new(cli.global);
    match cli.command {
        // Needs no network, and must not have a thread beside it while it handles PINs.
        Command::Slot(slot::SlotCommand::Init(args)) => slot::init(&session, &args),
        Command::Dev(command) => crate::dev::run(&session, command),
        command => on_runtime(remote(&session, command))?,
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
        Command::CreateKek(command) => keys::create(session, command).await,
        Command::ListKek(command) => keys::list(session, &command).await,
        Command::Rotate(command) => rotate::rotate(session, command).await,
        Command::RotationStatus => rotate::status(session).await,
        Command::Encrypt(command) => data::encrypt(session, &command).await,
        Command::Decrypt(command) => data::decrypt(session, command).await,
        Command::Whoami => whoami(session).await,
        Command::Slot(slot::SlotCommand::Unlock(args)) => slot::unlock(session, &args).await,
        // Handled before there is a runtime.
        Command::Slot(slot::SlotCommand::Init(_)) | Command::Dev(_) => Ok(()),
    }
}

async fn whoami(session: &Session) -> Result<()> {
    let answer = session.client(READ)?.whoami().await?;
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
