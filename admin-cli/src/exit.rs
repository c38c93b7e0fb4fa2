//! Exit codes. They are stable: scripts branch on them, so a code never gets another meaning. Under the
//! names of version 1 every failure is 1, as it was.

use std::process::ExitCode;

use hsm_api::ClientError;

use crate::output::note;

/// The table for `--help`.
pub(crate) const HELP: &str = "\
Exit codes:
  0  done
  1  any other error
  2  usage: wrong arguments, or no node or certificate named
  3  refused: the certificate, its role, or TLS
  4  not found, or in conflict with the state
  5  unavailable: no node answers, no quorum, not ready
  6  outcome unknown: the change may have been made; repeat it with the same --idempotency-key
Called as hsm-admin or create-kek, every failure is 1.";

/// How the program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    Done = 0,
    Error = 1,
    Usage = 2,
    Refused = 3,
    Conflict = 4,
    Unavailable = 5,
    Unknown = 6,
}

/// Arguments that cannot be carried out as they stand.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Usage(String);

/// A change that failed, or may have failed.
#[derive(Debug, thiserror::Error)]
#[error("{error}{hint}")]
pub(crate) struct ChangeFailed {
    error: ClientError,
    hint: String,
}

/// A usage error as the commands return it.
pub(crate) fn usage(text: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(Usage(text.into()))
}

/// The failure of a change that can be repeated under `key`.
pub(crate) fn change_failed(error: ClientError, key: &str) -> anyhow::Error {
    let hint = if error.outcome_unknown() {
        format!(
            "\nthe change may have been made; ask again, and it is made once, with: --idempotency-key {key}"
        )
    } else {
        String::new()
    };
    anyhow::Error::new(ChangeFailed { error, hint })
}

/// The failure of a change that is safe to repeat as it is.
pub(crate) fn repeatable_failed(error: ClientError) -> anyhow::Error {
    let hint = if error.outcome_unknown() {
        "\nit may have been done; the same command again is safe".to_owned()
    } else {
        String::new()
    };
    anyhow::Error::new(ChangeFailed { error, hint })
}

/// Says what went wrong, if anything did.
pub(crate) fn report(outcome: anyhow::Result<()>) -> Exit {
    match outcome {
        Ok(()) => Exit::Done,
        Err(error) => {
            note(&format!("hsmctl: {error:#}"));
            Exit::of(&error)
        }
    }
}

/// `--help` and `--version` are no errors.
pub(crate) fn of_parser(error: &clap::Error) -> Exit {
    if error.exit_code() == 0 {
        Exit::Done
    } else {
        Exit::Usage
    }
}

impl Exit {
    /// The code of a failure.
    pub(crate) fn of(error: &anyhow::Error) -> Self {
        if error.downcast_ref::<Usage>().is_some() {
            return Self::Usage;
        }
        if let Some(failed) = error.downcast_ref::<ChangeFailed>() {
            return if failed.error.outcome_unknown() {
                Self::Unknown
            } else {
                Self::of_client(&failed.error)
            };
        }
        error
            .downcast_ref::<ClientError>()
            .map_or(Self::Error, Self::of_client)
    }

    fn of_client(error: &ClientError) -> Self {
        match error {
            ClientError::Connect { .. } | ClientError::Transport { .. } | ClientError::Timeout { .. } => {
                Self::Unavailable
            }
            ClientError::Tls { .. } => Self::Refused,
            ClientError::Decode { .. } | ClientError::Request(_) => Self::Error,
            ClientError::Api(answer) => match answer.status {
                401 | 403 => Self::Refused,
                404 | 409 | 422 => Self::Conflict,
                429 | 502 | 503 | 504 => Self::Unavailable,
                _ => Self::Error,
            },
        }
    }

    /// For the operating system.
    pub(crate) fn as_process_exit(self, v1: bool) -> ExitCode {
        match self {
            Self::Done => ExitCode::SUCCESS,
            _ if v1 => ExitCode::from(Self::Error as u8),
            other => ExitCode::from(other as u8),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use anyhow::Context;
    use hsm_api::ErrorCode;
    use hsm_api::client::ApiError;

    use super::*;

    fn api(code: ErrorCode) -> ClientError {
        ClientError::Api(Box::new(ApiError {
            status: code.status(),
            code: Some(code),
            code_text: code.as_str().to_owned(),
            detail: String::new(),
            request_id: None,
            retryable: code.retryable(),
            retry_after: None,
            node: None,
            endpoint: "https://a:1".to_owned(),
        }))
    }

    fn silence() -> ClientError {
        ClientError::Transport {
            endpoint: "https://a:1".to_owned(),
            reason: "reset".to_owned(),
        }
    }

    #[test]
    fn a_nodes_refusal_has_a_code_of_its_kind() {
        for (code, exit) in [
            (ErrorCode::RoleRequired, Exit::Refused),
            (ErrorCode::AccessDenied, Exit::Refused),
            (ErrorCode::NotFound, Exit::Conflict),
            (ErrorCode::AlreadyExists, Exit::Conflict),
            (ErrorCode::IdempotencyKeyReused, Exit::Conflict),
            (ErrorCode::NoQuorum, Exit::Unavailable),
            (ErrorCode::RateLimited, Exit::Unavailable),
            (ErrorCode::AuthenticationFailed, Exit::Error),
            (ErrorCode::Internal, Exit::Error),
        ] {
            assert_eq!(Exit::of(&api(code).into()), exit, "{code}");
        }
    }

    #[test]
    fn silence_is_unavailable_for_a_read_and_unknown_for_a_change() {
        assert_eq!(Exit::of(&silence().into()), Exit::Unavailable);
        assert_eq!(Exit::of(&change_failed(silence(), "k")), Exit::Unknown);
        assert_eq!(
            Exit::of(&change_failed(api(ErrorCode::OutcomeUnknown), "k")),
            Exit::Unknown
        );
        assert_eq!(
            Exit::of(&change_failed(api(ErrorCode::NoQuorum), "k")),
            Exit::Unavailable
        );
    }

    #[test]
    fn an_unknown_outcome_says_how_to_ask_again() {
        let text = change_failed(silence(), "01KEY").to_string();
        assert!(text.contains("--idempotency-key 01KEY"), "{text}");
    }

    #[test]
    fn context_around_an_error_does_not_change_its_code() {
        let error = Err::<(), _>(api(ErrorCode::RoleRequired))
            .context("node 2")
            .context("join")
            .unwrap_err();
        assert_eq!(Exit::of(&error), Exit::Refused);
        assert_eq!(Exit::of(&usage("no node").context("x")), Exit::Usage);
        assert_eq!(Exit::of(&anyhow::anyhow!("anything")), Exit::Error);
    }

    #[test]
    fn under_the_old_names_every_failure_is_one() {
        for exit in [Exit::Usage, Exit::Refused, Exit::Unknown] {
            assert_eq!(exit.as_process_exit(true), ExitCode::from(1));
        }
        assert_eq!(Exit::Done.as_process_exit(true), ExitCode::SUCCESS);
        assert_eq!(Exit::Unknown.as_process_exit(false), ExitCode::from(6));
    }
}
