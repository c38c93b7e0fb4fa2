//! Failures: what is said of them, and exit codes. Codes are stable: scripts branch on them, so a code never gets
//! another meaning. Under the names of version 1 every failure is 1, as it was.

use std::process::ExitCode;

use hsm_api::{ClientError, ErrorCode};
use hsm_core::HsmError;
use serde::Serialize;

use crate::output::{Format, note};

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
Called as hsm-admin or create-kek, every failure is 1.

With --output json a failure is one line of JSON on standard error: code, status, request_id, detail.";

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

/// Something named that is not there.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Missing(String);

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

/// Says what went wrong, if anything did.
pub(crate) fn report(outcome: anyhow::Result<()>, format: Format) -> Exit {
    let Err(error) = outcome else {
        return Exit::Done;
    };
    match format {
        Format::Table => note(&format!("hsmctl: {error:#}")),
        Format::Json => note(&Failure::of(&error).line()),
    }
    Exit::of(&error)
}

/// Says what is wrong with the arguments. `--help` and `--version` are no errors.
pub(crate) fn report_parser(error: &clap::Error, format: Format) -> Exit {
    let exit = if error.exit_code() == 0 {
        Exit::Done
    } else {
        Exit::Usage
    };
    if exit == Exit::Usage && format == Format::Json {
        let detail = error.to_string().trim_end().to_owned();
        note(&Failure::local(exit.word(), detail).line());
    } else {
        // A closed pipe must not turn --help into a failure.
        let _ = error.print();
    }
    exit
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

/// What was said of a failure besides what the node said.
fn hints(error: &anyhow::Error) -> String {
    if let Some(hinted) = error.downcast_ref::<Hinted>() {
        return format!("{}\n{}", hints(&hinted.error), hinted.hint);
    }
    let failed = error.downcast_ref::<ChangeFailed>();
    failed.map(|failed| failed.hint.clone()).unwrap_or_default()
}

/// A failure as programs read it.
#[derive(Debug, Serialize)]
struct Failure {
    /// A node's own code, or a word of this program.
    code: String,
    /// The HTTP status, if a node answered.
    status: Option<u16>,
    /// Names the request in the nodes' logs.
    request_id: Option<String>,
    detail: String,
}

impl Failure {
    fn local(code: &str, detail: String) -> Self {
        Self {
            code: code.to_owned(),
            status: None,
            request_id: None,
            detail,
        }
    }

    fn of(error: &anyhow::Error) -> Self {
        let code = if error.downcast_ref::<Missing>().is_some() {
            ErrorCode::NotFound.as_str()
        } else {
            Exit::of(error).word()
        };
        match client_error(error).and_then(ClientError::api) {
            None => Self::local(code, format!("{error:#}")),
            // A balancer's answer has no code.
            Some(answer) => Self {
                code: Some(&answer.code_text)
                    .filter(|text| !text.is_empty())
                    .map_or_else(|| code.to_owned(), Clone::clone),
                status: Some(answer.status),
                request_id: answer.request_id.clone(),
                detail: format!("{}{}", answer.detail, hints(error)),
            },
        }
    }

    /// One line: JSON escapes every other one.
    fn line(&self) -> String {
        serde_json::to_string(self).unwrap_or_else(|_| self.detail.clone())
    }
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
            ClientError::Connect { .. }
            | ClientError::Transport { .. }
            | ClientError::Timeout { .. }
            | ClientError::RefusedAfterSilence { .. } => Self::Unavailable,
            ClientError::Tls { .. } => Self::Refused,
            // Where one of them could not be reached, another time may do.
            ClientError::NoneAnswered { failures } => failures
                .iter()
                .map(Self::of_client)
                .find(|exit| *exit != Self::Refused)
                .unwrap_or(Self::Refused),
            ClientError::Decode { .. } | ClientError::Request(_) => Self::Error,
            ClientError::Api(answer) => match answer.status {
                400 if answer.code == Some(ErrorCode::InvalidArgument) => Self::Usage,
                401 | 403 => Self::Refused,
                404 | 409 | 422 => Self::Conflict,
                429 | 502 | 503 | 504 => Self::Unavailable,
                _ => Self::Error,
            },
        }
    }

    /// For programs, where no node gave a code.
    fn word(self) -> &'static str {
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
mod tests {
    use anyhow::Context;
    use hsm_api::client::ApiError;
    use serde_json::{Value, json};

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
    fn a_refusal_after_silence_is_unknown_for_a_change_and_names_its_key() {
        let error = || {
            let ClientError::Api(refusal) = api(ErrorCode::NoQuorum) else {
                panic!("no refusal");
            };
            ClientError::RefusedAfterSilence {
                unanswered: Box::new(silence()),
                refusal,
            }
        };
        assert_eq!(Exit::of(&error().into()), Exit::Unavailable);
        let failed = change_failed(error(), "01KEY");
        assert_eq!(Exit::of(&failed), Exit::Unknown);
        let failure = Failure::of(&failed);
        assert_eq!(failure.code, "outcome_unknown");
        assert!(failure.detail.contains("no_quorum"), "{}", failure.detail);
        assert!(
            failure.detail.contains("--idempotency-key 01KEY"),
            "{}",
            failure.detail
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
    fn a_failure_for_programs_is_one_line_of_json() {
        let read = |error: &anyhow::Error| {
            let line = Failure::of(error).line();
            assert!(!line.contains('\n'), "{line}");
            serde_json::from_str::<Value>(&line).unwrap()
        };
        let mut answer = match api(ErrorCode::OutcomeUnknown) {
            ClientError::Api(answer) => answer,
            other => panic!("{other}"),
        };
        answer.detail = "written".to_owned();
        answer.request_id = Some("01J".to_owned());
        let json = read(&change_failed(ClientError::Api(answer), "01KEY"));
        assert_eq!(
            (&json["code"], &json["status"]),
            (&json!("outcome_unknown"), &json!(503))
        );
        assert_eq!(json["request_id"], "01J");
        let detail = json["detail"].as_str().unwrap();
        assert!(
            detail.starts_with("written\n") && detail.contains("01KEY"),
            "{detail}"
        );

        let json = read(&usage("no node is named"));
        let expected =
            json!({"code": "usage", "status": null, "request_id": null, "detail": "no node is named"});
        assert_eq!(json, expected);
        assert_eq!(read(&missing("no playground"))["code"], "not_found");
        assert_eq!(read(&silence().into())["code"], "unavailable");
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
