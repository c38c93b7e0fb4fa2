//! File descriptors. Every connection is one, and so is every file of the store, of a snapshot and of SoftHSM:
//! clients must never take the last ones, because a store that cannot open a file ends the node.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::config::{ConfigError, Limits};
use crate::http::HANDSHAKES;

/// Kept for whatever is no client: peers (at most 256), probes (128), the store, snapshots, tokens, the log.
const OWN: u64 = 512;
/// A node that left its option alone and has room for fewer clients than this has none.
const LEAST: u64 = 64;
/// What Linux gives a process that was given nothing else.
const USUAL: u64 = 1024;

const KEY: &str = "server.limits.max_connections";

/// Raises the soft limit to the hard one, and says for how many clients there is room.
///
/// # Errors
/// When the configured number does not fit.
pub(super) fn room(limits: &Limits) -> Result<usize, ConfigError> {
    let available = raised();
    let room = fit(limits, available)?;
    if room < limits.max_connections {
        tracing::warn!(
            available,
            connections = room,
            "{KEY}: its default of {} does not fit into the file descriptors of this process; raise their hard \
             limit (LimitNOFILE= of systemd, ulimit -Hn)",
            limits.max_connections
        );
    }
    Ok(room)
}

fn raised() -> u64 {
    let (soft, hard) = match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok(limits) => limits,
        Err(error) => {
            tracing::warn!(%error, "the limit of file descriptors is not known; {USUAL} are assumed");
            return USUAL;
        }
    };
    if soft >= hard {
        return soft;
    }
    match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => hard,
        Err(error) => {
            tracing::warn!(%error, soft, hard, "the limit of file descriptors could not be raised");
            soft
        }
    }
}

/// How many clients fit beside everything else.
fn fit(limits: &Limits, available: u64) -> Result<usize, ConfigError> {
    let reserve = OWN + HANDSHAKES as u64;
    let room = available.saturating_sub(reserve);
    let wanted = u64::try_from(limits.max_connections).unwrap_or(u64::MAX);
    if wanted <= room {
        return Ok(limits.max_connections);
    }
    if limits.connections_by_default && room >= LEAST {
        // Less than `max_connections`, which is one.
        return Ok(usize::try_from(room).unwrap_or(limits.max_connections));
    }
    let needed = wanted.saturating_add(reserve);
    let less = match room {
        0 => String::new(),
        room => format!(", or write at most {room}"),
    };
    Err(ConfigError::invalid(
        KEY,
        limits.max_connections,
        format!(
            "does not fit into the {available} file descriptors of this process, {reserve} of which are for its \
             own files and for handshakes"
        ),
        format!("raise their hard limit (LimitNOFILE= of systemd, ulimit -Hn) to {needed} or more{less}"),
    ))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    fn limits(max_connections: usize, connections_by_default: bool) -> Limits {
        Limits {
            max_connections,
            connections_by_default,
            max_body_bytes: 1 << 20,
            min_index_wait: std::time::Duration::from_secs(1),
        }
    }

    fn refusal(max_connections: usize, by_default: bool, available: u64) -> String {
        fit(&limits(max_connections, by_default), available)
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn what_fits_is_taken_as_it_is() {
        for by_default in [true, false] {
            assert_eq!(fit(&limits(10_000, by_default), 10_768).unwrap(), 10_000);
            assert_eq!(fit(&limits(10_000, by_default), u64::MAX).unwrap(), 10_000);
        }
    }

    #[test]
    fn a_default_that_does_not_fit_is_lowered() {
        assert_eq!(fit(&limits(10_000, true), 10_767).unwrap(), 9_999);
        assert_eq!(fit(&limits(10_000, true), 1024).unwrap(), 256);
    }

    #[test]
    fn a_number_that_was_written_is_refused_with_what_would_do() {
        let error = refusal(2000, false, 1024);
        assert!(
            error.starts_with("config: server.limits.max_connections: 2000: "),
            "{error}"
        );
        assert!(
            error.contains("1024 file descriptors")
                && error.contains("to 2768 or more, or write at most 256"),
            "{error}"
        );
    }

    #[test]
    fn a_node_without_room_for_clients_does_not_start() {
        assert!(refusal(10_000, true, 800).contains("or write at most 32"));
        let error = refusal(10_000, true, 256);
        assert!(error.ends_with("to 10768 or more"), "{error}");
    }
}
