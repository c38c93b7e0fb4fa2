//! Failures: what is said of them, and exit codes. Codes are stable: scripts branch on them, so a code never gets
//! another meaning. Under the names of version 1 every failure is 1, as it was.

mod report;

use std::process::ExitCode;

use hsm_api::{ClientError, ErrorCode};
use hsm_core::HsmError;

pub(crate) use report::{report, report_parser};

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

/// Every code with its meaning: the one table, for `--help`, the manual and docs/cli.md.
pub(crate) const TABLE: [(Exit, &str); 7] = [
    (Exit::Done, "done"),
    (Exit::Error, "any other error; of acl test: it may not"),
    (
        Exit::Usage,
        "usage: wrong arguments, or no node or certificate named, or a question that may not be asked",
    ),
    (Exit::Refused, "refused: the certificate, its role, or TLS"),
    (Exit::Conflict, "not found, or in conflict with the state"),
    (
        Exit::Unavailable,
        "unavailable: no node answers, no quorum, not ready",
    ),
    (
        Exit::Unknown,
        "outcome unknown: the change may have been made; repeat it with the same --idempotency-key",
    ),
];

/// What stands below the table, wherever it is shown.
pub(crate) const NOTES: &str = "\
Called as hsm-admin or create-kek, every failure is 1. A --dry-run ends as the command would.

With --output json a failure is one line of JSON on standard error: code, status, request_id, detail. With --output \
yaml it is the same as YAML.";

/// The table for `--help`.
pub(crate) fn help() -> String {
    let rows: String = TABLE
        .iter()
        .map(|(exit, meaning)| format!("  {}  {meaning}\n", *exit as u8))
        .collect();
    format!("Exit codes:\n{rows}{NOTES}")
}

/// Arguments that cannot be carried out as they stand.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Usage(String);

/// Something named that is not there.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Missing(String);

/// An answer that is no, which has been printed. Nothing more is said.
#[derive(Debug, thiserror::Error)]
#[error("no")]
pub(crate) struct No;

/// What a node would refuse, found out by a dry run.
#[derive(Debug, thiserror::Error)]
#[error("would be refused: {code}: {detail}")]
pub(crate) struct WouldBeRefused {
    code: ErrorCode,
    detail: String,
}

/// A failure, then what to do about it.
#[derive(Debug, thiserror::Error)]
#[error("{error:#}\n{hint}")]
pub(crate) struct Hinted {
    error: anyhow::Error,
    hint: String,
}

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

/// What was named is not there.
pub(crate) fn missing(text: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(Missing(text.into()))
}

/// The answer was no.
pub(crate) fn no() -> anyhow::Error {
    anyhow::Error::new(No)
}

/// A dry run has found that a node would answer with this code.
pub(crate) fn would_be_refused(code: ErrorCode, detail: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(WouldBeRefused {
        code,
        detail: detail.into(),
    })
}

/// The same failure, followed by a line about it.
pub(crate) fn with_hint(error: anyhow::Error, hint: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(Hinted {
        error,
        hint: hint.into(),
    })
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

/// The failed call to a node that a failure is about, if it is about one.
pub(crate) fn client_error(error: &anyhow::Error) -> Option<&ClientError> {
    if let Some(hinted) = error.downcast_ref::<Hinted>() {
        return client_error(&hinted.error);
    }
    if let Some(failed) = error.downcast_ref::<ChangeFailed>() {
        return Some(&failed.error);
    }
    error.downcast_ref()
}

impl Exit {
    /// The code of a failure.
    pub(crate) fn of(error: &anyhow::Error) -> Self {
        if let Some(hinted) = error.downcast_ref::<Hinted>() {
            return Self::of(&hinted.error);
        }
        if error.downcast_ref::<Usage>().is_some() {
            return Self::Usage;
        }
        if error.downcast_ref::<Missing>().is_some() {
            return Self::Conflict;
        }
        if let Some(failed) = error.downcast_ref::<ChangeFailed>() {
            return if failed.error.outcome_unknown() {
                Self::Unknown
            } else {
                Self::of_client(&failed.error)
            };
        }
        if let Some(refusal) = error.downcast_ref::<WouldBeRefused>() {
            return Self::of_status(refusal.code.status(), Some(refusal.code));
        }
        if let Some(error) = error.downcast_ref::<HsmError>() {
            return Self::of_token(error);
        }
        error
            .downcast_ref::<ClientError>()
            .map_or(Self::Error, Self::of_client)
    }

    fn of_token(error: &HsmError) -> Self {
        match error {
            HsmError::AlreadyInitialised { .. } | HsmError::Owned { .. } | HsmError::NotFound { .. } => {
                Self::Conflict
            }
            HsmError::Argument { what: "label", .. } => Self::Usage,
            _ => Self::Error,
        }
    }

    fn of_client(error: &ClientError) -> Self {
        match error {
            ClientError::Connect { .. } | ClientError::Transport { .. } | ClientError::Timeout { .. } => {
                Self::Unavailable
            }
            ClientError::Tls { .. } => Self::Refused,
            // Where one of them could not be reached, another time may do.
            ClientError::NoneAnswered { failures } => failures
                .iter()
                .map(Self::of_client)
                .find(|exit| *exit != Self::Refused)
                .unwrap_or(Self::Refused),
            ClientError::Decode { .. } | ClientError::Request(_) => Self::Error,
            // Of a change it is unknown what it did, which is looked at before.
            ClientError::Api(answer) | ClientError::RefusedAfterSilence { refusal: answer, .. } => {
                Self::of_status(answer.status, answer.code)
            }
        }
    }

    fn of_status(status: u16, code: Option<ErrorCode>) -> Self {
        match status {
            400 if code == Some(ErrorCode::InvalidArgument) => Self::Usage,
            401 | 403 => Self::Refused,
            412 if code == Some(ErrorCode::MinIndexNotReached) => Self::Unavailable,
            404 | 409 | 412 | 422 => Self::Conflict,
            429 | 502 | 503 | 504 => Self::Unavailable,
            _ => Self::Error,
        }
    }

    /// For programs, where no node gave a code.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Error => "error",
            Self::Usage => "usage",
            Self::Refused => "refused",
            Self::Conflict => "conflict",
            Self::Unavailable => "unavailable",
            Self::Unknown => "outcome_unknown",
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
pub(crate) mod tests {
    use anyhow::Context;
    use hsm_api::client::ApiError;

    use super::*;

    pub(crate) fn api(code: ErrorCode) -> ClientError {
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

    pub(crate) fn silence() -> ClientError {
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
            (ErrorCode::IndexEpochChanged, Exit::Conflict),
            (ErrorCode::MinIndexNotReached, Exit::Unavailable),
            (ErrorCode::NoQuorum, Exit::Unavailable),
            (ErrorCode::RateLimited, Exit::Unavailable),
            (ErrorCode::InvalidArgument, Exit::Usage),
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
    fn nobody_at_home_is_unavailable_and_everybody_refusing_tls_a_refusal() {
        let tls = || ClientError::Tls {
            endpoint: "https://a:1".to_owned(),
            reason: "unknown CA".to_owned(),
        };
        let none = |failures| anyhow::Error::new(ClientError::NoneAnswered { failures });
        assert_eq!(Exit::of(&none(vec![tls(), tls()])), Exit::Refused);
        assert_eq!(Exit::of(&none(vec![tls(), silence()])), Exit::Unavailable);
    }

    #[test]
    fn what_is_not_there_and_what_is_taken_share_a_code() {
        assert_eq!(Exit::of(&missing("no playground").context("x")), Exit::Conflict);
        let initialised = HsmError::AlreadyInitialised {
            label: "slot-a".to_owned(),
            serial: "1".to_owned(),
        };
        assert_eq!(Exit::of(&initialised.into()), Exit::Conflict);
        let label = HsmError::Argument {
            what: "label",
            reason: "is empty".to_owned(),
        };
        assert_eq!(Exit::of(&label.into()), Exit::Usage);
    }

    #[test]
    fn the_cause_comes_before_the_hint_and_decides_the_code() {
        let hinted = with_hint(usage("no node").context("start"), "the others run");
        assert_eq!(format!("{hinted:#}"), "start: no node\nthe others run");
        assert_eq!(Exit::of(&hinted), Exit::Usage);
        let hinted = with_hint(change_failed(silence(), "k"), "x");
        assert_eq!(Exit::of(&hinted), Exit::Unknown);
        assert!(client_error(&hinted).is_some());
    }

    #[test]
    fn a_dry_run_ends_as_the_refusal_would() {
        for code in [
            ErrorCode::RoleRequired,
            ErrorCode::NotFound,
            ErrorCode::AlreadyExists,
            ErrorCode::InvalidArgument,
            ErrorCode::NoQuorum,
            ErrorCode::ContextHasNoKey,
        ] {
            let foreseen = would_be_refused(code, "why").context("x");
            assert_eq!(Exit::of(&foreseen), Exit::of(&api(code).into()), "{code}");
        }
        let text = would_be_refused(ErrorCode::NotFound, "context x does not exist").to_string();
        assert_eq!(text, "would be refused: not_found: context x does not exist");
    }

    #[test]
    fn the_table_has_every_code_once_and_in_order() {
        let codes: Vec<u8> = TABLE.iter().map(|(exit, _)| *exit as u8).collect();
        assert_eq!(codes, [0, 1, 2, 3, 4, 5, 6]);
        let help = help();
        assert!(
            help.contains("\n  5  unavailable: ") && help.contains("hsm-admin"),
            "{help}"
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
    fn no_is_an_answer_with_a_code_of_its_own() {
        assert_eq!(Exit::of(&no()), Exit::Error);
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
