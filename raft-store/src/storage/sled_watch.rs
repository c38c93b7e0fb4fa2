//! What sled says and does beside its answers. Its periodic flush thread stops at its first error and only logs it;
//! a thread of its own, or of ours that nobody waits for, may panic and be missed. Both end the process, once a
//! store is open; what sled says while one is being opened goes into the refusal.

use std::cell::RefCell;
use std::panic::PanicHookInfo;
use std::sync::{Mutex, OnceLock};

use super::lock;

type Fatal = Box<dyn Fn(String) + Send + Sync>;

struct Hook;

/// What to do about errors of sled's other threads.
struct Watch {
    /// A store is open: what is said now is said of a running store.
    armed: bool,
    /// Said by other threads than the opening one while none was open yet.
    early: Vec<String>,
}

static ON_FATAL: OnceLock<Fatal> = OnceLock::new();
static INSTALLED: Mutex<bool> = Mutex::new(false);
static WATCH: Mutex<Watch> = Mutex::new(Watch {
    armed: false,
    early: Vec::new(),
});

thread_local! {
    /// What sled says on this thread, while it opens a store.
    static OPENING: RefCell<Option<Vec<String>>> = const { RefCell::new(None) };
}

/// Another logger is installed: sled's errors would go unheard.
#[derive(Debug, thiserror::Error)]
#[error("another logger than the store's is installed for the log crate: errors of sled would go unheard")]
pub struct LogHookTaken;

/// Installs the hook, once per process; `on_fatal` must stop the process. Before a store is opened.
///
/// # Errors
/// When another logger is installed. When this one is, it stays as it is.
pub fn install_log_hook(on_fatal: impl Fn(String) + Send + Sync + 'static) -> Result<(), LogHookTaken> {
    let mut installed = lock(&INSTALLED);
    if *installed {
        return Ok(());
    }
    log::set_logger(&Hook).map_err(|_| LogHookTaken)?;
    // Nothing else sets it, and the lock is held.
    let _ = ON_FATAL.set(Box::new(on_fatal));
    log::set_max_level(log::LevelFilter::Warn);
    *installed = true;
    Ok(())
}

/// Adds to the process's panic hook: `on_fatal`, which must stop the process, is called when a thread panics on
/// which the store rests. Before a store is opened.
pub fn install_panic_hook(on_fatal: impl Fn(String) + Send + Sync + 'static) {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic: &PanicHookInfo<'_>| {
        before(panic);
        let thread = std::thread::current();
        let name = thread.name().unwrap_or_default();
        let open = lock(&WATCH).armed;
        // A panic while a store is opened is caught, and comes to a refusal that says what to do.
        if open && is_vital(name) && !is_opening() {
            on_fatal(format!("thread {name:?}: {panic}"));
        }
    }));
}

/// Threads whose work nobody else takes over and whose end few would notice: sled's flusher and I/O threads (so named
/// in sled 0.34.7), the store's writer, and the one that consensus runs on, whose tasks are drivers that live as
/// long as the process. A thread that serves requests is none of them: its panic ends one request.
fn is_vital(name: &str) -> bool {
    matches!(name, "log flusher" | "store-writer" | "consensus") || name.starts_with("sled-io-")
}

fn is_opening() -> bool {
    OPENING.try_with(|said| said.borrow().is_some()).unwrap_or(false)
}

/// Runs the opening of a store, and gives back what sled said on this thread meanwhile.
pub(super) fn listen<T>(open: impl FnOnce() -> T) -> (T, Vec<String>) {
    OPENING.set(Some(Vec::new()));
    let opened = open();
    (opened, OPENING.take().unwrap_or_default())
}

/// What sled's other threads said while a store was opened that is refused.
pub(super) fn take_early() -> Vec<String> {
    std::mem::take(&mut lock(&WATCH).early)
}

/// A store is open: from now on errors of sled are fatal. Those of its other threads until now are too, because
/// such a thread has stopped.
pub(super) fn arm() {
    let early = {
        let mut watch = lock(&WATCH);
        watch.armed = true;
        std::mem::take(&mut watch.early)
    };
    if !early.is_empty() {
        fatal(&early.join("; "));
    }
}

fn fatal(said: &str) {
    if let Some(on_fatal) = ON_FATAL.get() {
        on_fatal(format!("sled reports: {said}"));
    }
}

/// Takes what was said for the refusal, if this thread is opening a store.
fn keep(said: &str) -> bool {
    let keep = |kept: &RefCell<Option<Vec<String>>>| match &mut *kept.borrow_mut() {
        Some(kept) => {
            kept.push(said.to_string());
            true
        }
        None => false,
    };
    OPENING.try_with(keep).unwrap_or(false)
}

impl log::Log for Hook {
    // Of what logs through `log`, only sled says anything that is heard nowhere else.
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Warn && metadata.target().starts_with("sled")
    }

    fn log(&self, record: &log::Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let said = record.args().to_string();
        let error = record.level() == log::Level::Error;
        if error {
            tracing::error!("sled: {said}");
        } else {
            tracing::warn!("sled: {said}");
        }
        if keep(&said) || !error {
            return;
        }
        let mut watch = lock(&WATCH);
        if watch.armed {
            drop(watch);
            fatal(&said);
        } else {
            watch.early.push(said);
        }
    }

    fn flush(&self) {}
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// The hook of this test process, and what it called fatal.
    fn fatal_said() -> Arc<Mutex<Vec<String>>> {
        static SAID: OnceLock<Arc<Mutex<Vec<String>>>> = OnceLock::new();
        let said = SAID.get_or_init(Arc::default);
        let heard = Arc::clone(said);
        install_log_hook(move |why| lock(&heard).push(why)).unwrap();
        Arc::clone(said)
    }

    fn was_fatal(what: &str) -> bool {
        lock(&fatal_said()).iter().any(|why| why.contains(what))
    }

    // One test: what is said and whether a store is open are the process's.
    #[test]
    fn an_error_of_sled_is_told_while_a_store_opens_and_fatal_once_one_is_open() {
        fatal_said();
        let ((), said) = listen(|| {
            log::warn!(target: "sled::pagecache", "a crc is wrong");
            log::error!(target: "sled", "a segment is torn");
            log::error!(target: "other", "not sled's");
        });
        assert_eq!(said, ["a crc is wrong", "a segment is torn"]);
        let elsewhere = |what: &'static str| {
            std::thread::spawn(move || log::error!(target: "sled::flusher", "{what}"))
                .join()
                .unwrap();
        };
        elsewhere("a flush failed early");
        assert!(!was_fatal("early"), "no store is open");
        arm();
        assert!(was_fatal("a flush failed early"), "its thread has stopped");
        elsewhere("a flush failed late");
        assert!(was_fatal("sled reports: a flush failed late"));
        let ((), said) = listen(|| log::error!(target: "sled", "another store is torn"));
        assert_eq!(said, ["another store is torn"]);
        assert!(!was_fatal("torn") && !was_fatal("not sled's"));
        log::warn!(target: "sled", "only a warning");
        assert!(!was_fatal("only a warning"));
    }

    #[test]
    fn the_threads_that_the_store_rests_on_are_known_by_name() {
        for vital in [
            "log flusher",
            "sled-io-0",
            "sled-io-17",
            "store-writer",
            "consensus",
        ] {
            assert!(is_vital(vital), "{vital}");
        }
        for other in ["request", "tokio-rt-worker", "health", "main", "sled"] {
            assert!(!is_vital(other), "{other}");
        }
    }

    #[test]
    fn installing_the_same_hook_again_is_no_error() {
        fatal_said();
        assert!(install_log_hook(|_| {}).is_ok());
    }
}
