//! `keys` and `rotation`: how key versions come to their end, and when new ones are made by themselves. The leader's
//! values count, so they should be the same on every node.

use std::time::Duration;

use super::error::ConfigError;
use super::file::{DestroySection, RotationSection};
use super::server::number;

const HOUR: Duration = Duration::from_secs(3600);
/// A day, as long as nobody tests.
pub const DAY: Duration = Duration::from_secs(24 * 3600);
/// A year, in hours: the longest wait that the state takes.
const YEAR_HOURS: u64 = 365 * 24;

/// What destroying a key version takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Destroy {
    /// How long it can be undone, unless somebody says otherwise.
    pub default_wait: Duration,
    /// The shortest wait.
    pub min_wait: Duration,
    /// A version that was used within this time is destroyed only by an override.
    pub recent_use: Duration,
}

/// When versions are replaced by age.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rotation {
    /// Whether this node rotates by age while it leads.
    pub enabled: bool,
    /// The interval of new contexts, in days; 0 = never.
    pub interval_days: u32,
    /// Between two looks at what is due.
    pub check_interval: Duration,
    /// How long a day is; another length than [`DAY`] is for tests.
    pub day: Duration,
}

/// Refuses what only a test may want.
fn only_in_dev(key: &str, given: bool, dev: bool) -> Result<(), ConfigError> {
    if dev || !given {
        return Ok(());
    }
    Err(ConfigError::invalid(
        key,
        "(given)",
        "is for tests, and takes effect with dev: true only",
        "remove it",
    ))
}

impl DestroySection {
    pub(crate) fn resolve(self, dev: bool) -> Result<Destroy, ConfigError> {
        const DEFAULT: &str = "keys.destroy.default_wait_hours";
        const SECONDS: &str = "keys.destroy.min_wait_seconds";
        let hours = |key, value, default| {
            number(key, value, default, 1..=YEAR_HOURS).map(|hours| HOUR * hours_of(hours))
        };
        only_in_dev(SECONDS, self.min_wait_seconds.is_some(), dev)?;
        let mut min_wait = hours("keys.destroy.min_wait_hours", self.min_wait_hours, 24)?;
        if let Some(seconds) = self.min_wait_seconds {
            min_wait = Duration::from_secs(number(SECONDS, Some(seconds), 1, 1..=YEAR_HOURS * 3600)?);
        }
        let default_wait = hours(DEFAULT, self.default_wait_hours, 168)?;
        if default_wait < min_wait {
            return Err(ConfigError::invalid(
                DEFAULT,
                default_wait.as_secs() / HOUR.as_secs(),
                "is below keys.destroy.min_wait_hours: nothing could be destroyed without naming a longer wait",
                format!("write at least {}", min_wait.as_secs().div_ceil(HOUR.as_secs())),
            ));
        }
        let recent: u32 = number("keys.destroy.recent_use_days", self.recent_use_days, 7, 0..=3650)?;
        Ok(Destroy {
            default_wait,
            min_wait,
            recent_use: DAY * recent,
        })
    }
}

/// In range by then.
fn hours_of(hours: u64) -> u32 {
    u32::try_from(hours).unwrap_or(u32::MAX)
}

impl RotationSection {
    pub(crate) fn resolve(self, dev: bool) -> Result<Rotation, ConfigError> {
        const DAY_MS: &str = "rotation.day_ms";
        only_in_dev(DAY_MS, self.day_ms.is_some(), dev)?;
        let whole = 24 * 3600 * 1000;
        Ok(Rotation {
            enabled: self.enabled.unwrap_or(true),
            interval_days: number("rotation.interval_days", self.interval_days, 90, 0..=36_500)?,
            check_interval: Duration::from_secs(number(
                "rotation.check_interval_seconds",
                self.check_interval_seconds,
                60,
                1..=3600,
            )?),
            day: Duration::from_millis(number(DAY_MS, self.day_ms, whole, 10..=whole)?),
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn without_a_word_a_destruction_waits_a_week_and_never_less_than_a_day() {
        let destroy = DestroySection::default().resolve(false).unwrap();
        assert_eq!(
            (destroy.default_wait, destroy.min_wait, destroy.recent_use),
            (DAY * 7, DAY, DAY * 7)
        );
        let rotation = RotationSection::default().resolve(false).unwrap();
        assert_eq!(
            (rotation.enabled, rotation.interval_days, rotation.day),
            (true, 90, DAY)
        );
    }

    #[test]
    fn a_default_below_the_minimum_and_no_wait_at_all_are_refused() {
        let refused = |section: DestroySection| section.resolve(false).unwrap_err().to_string();
        let error = refused(DestroySection {
            min_wait_hours: Some(200),
            ..DestroySection::default()
        });
        assert!(
            error.starts_with("config: keys.destroy.default_wait_hours: 168: ")
                && error.contains("at least 200"),
            "{error}"
        );
        for (wait, key) in [(0, "min_wait_hours"), (YEAR_HOURS + 1, "min_wait_hours")] {
            let error = refused(DestroySection {
                min_wait_hours: Some(wait),
                ..DestroySection::default()
            });
            assert!(error.contains(key), "{error}");
        }
    }

    #[test]
    fn what_is_for_tests_is_refused_anywhere_else() {
        let brief = || DestroySection {
            min_wait_seconds: Some(2),
            ..DestroySection::default()
        };
        assert_eq!(brief().resolve(true).unwrap().min_wait, Duration::from_secs(2));
        let error = brief().resolve(false).unwrap_err().to_string();
        assert!(
            error.contains("min_wait_seconds") && error.contains("dev: true"),
            "{error}"
        );
        let short = || RotationSection {
            day_ms: Some(50),
            ..RotationSection::default()
        };
        assert_eq!(short().resolve(true).unwrap().day, Duration::from_millis(50));
        assert!(short().resolve(false).is_err());
    }
}
