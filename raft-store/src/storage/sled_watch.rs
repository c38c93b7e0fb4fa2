//! sled's periodic flush thread stops at its first error and only logs it. This hook turns such a log
//! record into a fatal condition.

use std::sync::OnceLock;

type Fatal = Box<dyn Fn(String) + Send + Sync>;

struct Hook;

static ON_FATAL: OnceLock<Fatal> = OnceLock::new();

/// Installs the hook, once per process. `on_fatal` must stop the process.
pub fn install_log_hook(on_fatal: impl Fn(String) + Send + Sync + 'static) {
    if ON_FATAL.set(Box::new(on_fatal)).is_ok() && log::set_logger(&Hook).is_ok() {
        log::set_max_level(log::LevelFilter::Warn);
    }
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
        match record.level() {
            log::Level::Error => {
                tracing::error!("sled: {}", record.args());
                if let Some(on_fatal) = ON_FATAL.get() {
                    on_fatal(format!("sled reports: {}", record.args()));
                }
            }
            _ => tracing::warn!("sled: {}", record.args()),
        }
    }

    fn flush(&self) {}
}
