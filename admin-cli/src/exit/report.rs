//! How a failure is said: as text for people, as one object for programs. Never on standard output.

use hsm_api::{ClientError, ErrorCode};
use serde::Serialize;

use super::{ChangeFailed, Exit, Hinted, Missing, No, WouldBeRefused, client_error};
use crate::names::Name;
use crate::output::{self, Format, note};

/// Says what went wrong, if anything did.
pub(crate) fn report(outcome: anyhow::Result<()>, name: Name, format: Format) -> Exit {
    let Err(error) = outcome else {
        return Exit::Done;
    };
    if error.downcast_ref::<No>().is_some() {
        return Exit::of(&error);
    }
    match format {
        Format::Table => note(&format!("{name}: {error:#}")),
        Format::Json | Format::Yaml => note(&Failure::of(&error).text(format)),
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
    if exit == Exit::Usage && format != Format::Table {
        let detail = error.to_string().trim_end().to_owned();
        note(&Failure::local(exit.word(), detail).text(format));
    } else {
        // A closed pipe must not turn --help into a failure.
        let _ = error.print();
    }
    exit
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
        } else if let Some(foreseen) = error.downcast_ref::<WouldBeRefused>() {
            foreseen.code.as_str()
        } else {
            Exit::of(error).word()
        };
        // Where an earlier attempt may have changed something, the last refusal is not what happened.
        let answer = match Exit::of(error) {
            Exit::Unknown => client_error(error).and_then(ClientError::api),
            _ => client_error(error).and_then(ClientError::refusal),
        };
        match answer {
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

    /// One line of JSON, which escapes every other one; or YAML.
    fn text(&self, format: Format) -> String {
        let text = match format {
            Format::Yaml => output::yaml(self).ok(),
            Format::Json | Format::Table => serde_json::to_string(self).ok(),
        };
        text.map_or_else(|| self.detail.clone(), |text| text.trim_end().to_owned())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use serde_json::{Value, json};

    use super::super::tests::{api, silence};
    use super::super::{change_failed, missing, usage, would_be_refused};
    use super::*;

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
    fn a_failure_for_programs_is_one_line_of_json() {
        let read = |error: &anyhow::Error| {
            let line = Failure::of(error).text(Format::Json);
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
        let foreseen = would_be_refused(ErrorCode::AlreadyExists, "it exists");
        assert_eq!(read(&foreseen)["code"], "already_exists");
    }

    #[test]
    fn a_failure_as_yaml_says_the_same() {
        let failure = Failure::of(&usage("no node is named\nsay which: --endpoint"));
        let text = failure.text(Format::Yaml);
        let read: Value = serde_saphyr::from_str(&text).unwrap();
        assert_eq!(read, serde_json::to_value(&failure).unwrap(), "{text}");
    }
}
