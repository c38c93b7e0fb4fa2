//! Opening a slot: find the one token of its label, own it, log in by the rules, clear away what
//! a kill left behind, start the threads. Whatever fails leaves the token as it was.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use cryptoki::session::Session;

use super::sessions::Sessions;
use super::shared::{Parts, Shared};
use super::{Inner, Slot, SlotOptions, executor, watchdog};
use crate::error::{HsmError, SlotError};
use crate::inventory;
use crate::login::Login;
use crate::module::{Module, TokenInfo};
use crate::softhsm_files::TokenFiles;
use crate::token::Token;
use crate::token_lock::TokenLock;

/// More threads than this fight over the token's mutex, in hardware too.
const MAX_THREADS: usize = 64;

pub(crate) fn open(module: &Arc<Module>, options: SlotOptions) -> Result<Slot, SlotError> {
    let name = options.name.clone();
    let failed = |error: HsmError| SlotError::Hsm {
        slot: name.clone(),
        error,
    };
    let token = find_token(module, &options)?;
    // Before anything is written to the token's files.
    let lock = TokenLock::acquire(module.profile(), &token.serial).map_err(&failed)?;
    let missing = module.missing_mechanisms(token.slot).map_err(&failed)?;
    if !missing.is_empty() {
        return Err(failed(HsmError::NotSupported {
            what: missing.join(", "),
            by: format!("{} (token {})", module.profile().library, token.serial),
            remedy: "enable these mechanisms in the module's configuration, or use another token".to_owned(),
        }));
    }
    let files = locate(module, &token).map_err(&failed)?;
    let session = module.session(&token).map_err(&failed)?;
    let torn = match prepare(module, &options, &token, files.as_ref(), &session) {
        Ok(torn) => torn,
        Err(error) => {
            module.give_back(&token.serial, session);
            return Err(error);
        }
    };
    let threads = options.threads.clamp(1, MAX_THREADS);
    let shared = Arc::new(Shared::new(Parts {
        name: options.name,
        token,
        module: Arc::clone(module),
        files,
        pin: options.pin,
        state_dir: options.state_dir,
        insecure_pin: options.insecure_pin,
        deadline: options.deadline,
        control_deadline: options.control_deadline,
        on_call: options.on_call,
        threads,
        queue: options.queue.max(1),
        session,
        lock,
    }));
    // From here on dropping `slot` stops what has been started.
    let slot = Slot(Arc::new(Inner {
        shared: Arc::clone(&shared),
        torn,
    }));
    for index in 0..threads {
        let sessions = Sessions::open(&shared).map_err(&failed)?;
        let mine = Arc::clone(&shared);
        spawn(&shared, &format!("hsm-{name}-{index}"), move || {
            executor::run(&mine, index, sessions)
        })
        .map_err(&failed)?;
    }
    let mine = Arc::clone(&shared);
    spawn(&shared, &format!("hsm-{name}-watch"), move || {
        watchdog::run(&mine)
    })
    .map_err(&failed)?;
    Ok(slot)
}

/// Logs in and clears away torn objects; nobody else uses the token yet.
fn prepare(
    module: &Module,
    options: &SlotOptions,
    token: &TokenInfo,
    files: Option<&TokenFiles>,
    session: &Session,
) -> Result<Vec<String>, SlotError> {
    let login = Login {
        slot: &options.name,
        module,
        token,
        files,
        pin: &options.pin,
        state_dir: &options.state_dir,
        insecure_pin: options.insecure_pin,
        retry: options.retry_pin,
    };
    login.run(session)?;
    let token = Token {
        raw: module.raw(),
        session,
        profile: module.profile(),
        files,
    };
    let clear = || -> Result<Vec<String>, HsmError> {
        let torn = inventory::remove_torn(&token, true)?;
        // What an earlier process made and did not get to sync is durable from now on.
        files.map_or(Ok(()), TokenFiles::sync_all)?;
        Ok(torn)
    };
    clear().map_err(|error| SlotError::Hsm {
        slot: options.name.clone(),
        error,
    })
}

fn find_token(module: &Module, options: &SlotOptions) -> Result<TokenInfo, SlotError> {
    let slot = || options.name.clone();
    let tokens = module
        .tokens()
        .map_err(|error| SlotError::Hsm { slot: slot(), error })?;
    let (mut named, others): (Vec<TokenInfo>, Vec<TokenInfo>) = tokens
        .into_iter()
        .filter(|token| token.initialised)
        .partition(|token| token.label == options.label);
    match (named.pop(), named.len()) {
        (Some(token), 0) => Ok(token),
        (Some(last), more) => {
            named.push(last);
            let serials: Vec<String> = named.into_iter().map(|token| token.serial).collect();
            Err(SlotError::DuplicateLabel {
                slot: slot(),
                label: options.label.clone(),
                count: more + 1,
                serials: serials.join(", "),
            })
        }
        (None, _) => {
            let found: Vec<String> = others.iter().map(|token| format!("{:?}", token.label)).collect();
            let found = if found.is_empty() {
                "no token".to_owned()
            } else {
                found.join(", ")
            };
            Err(SlotError::TokenNotFound {
                slot: slot(),
                label: options.label.clone(),
                found,
            })
        }
    }
}

fn locate(module: &Module, token: &TokenInfo) -> Result<Option<TokenFiles>, HsmError> {
    let Some(root) = &module.profile().token_root else {
        return Ok(None);
    };
    match TokenFiles::locate(root, &token.serial)? {
        Some(files) => Ok(Some(files)),
        // Going on without them would mean to acknowledge imports that are not on disk.
        None => Err(HsmError::File {
            path: root.display().to_string(),
            action: "find the directory of the token",
            reason: format!(
                "none has serial {}; this process and the module must read the same configuration (SOFTHSM2_CONF)",
                token.serial
            ),
        }),
    }
}

fn spawn(shared: &Arc<Shared>, name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), HsmError> {
    // Counts the thread out however it ends.
    struct Counted(Arc<Shared>);
    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.thread_ended();
        }
    }
    shared.thread_started();
    let counted = Counted(Arc::clone(shared));
    let started = thread::Builder::new().name(name.to_owned()).spawn(move || {
        let _counted = counted;
        work();
    });
    match started {
        Ok(_detached) => Ok(()),
        Err(error) => Err(HsmError::file(&PathBuf::from(name), "start thread", &error)),
    }
}
