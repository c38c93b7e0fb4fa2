//! The lines of a history: operations of clients, their outcomes, and what the watch saw.

use hsm_api::ClientError;
use hsm_api::admin::KeyState;
use serde::{Deserialize, Serialize};

/// What a client asks for. Those with an `Idempotency-Key` name it: the same one again is the same request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// Encrypt the plaintext of this number.
    Encrypt { context: String, number: u64, node: u32 },
    /// Decrypt what was encrypted under this number.
    Decrypt {
        context: String,
        version: u32,
        number: u64,
        node: u32,
    },
    /// Encrypt as somebody whose certificate is revoked now and then.
    Ask { cn: String, node: u32 },
    /// Make the next version, and have it active.
    Rotate { context: String, key: String },
    /// The same by the command for new keys.
    Create { context: String, key: String },
    /// The highest version that is retired and decrypts. The leader asks a quorum before it answers.
    Retired { context: String },
    /// Of all contexts, as one node sees them.
    Keys { node: u32 },
    /// One version, as one node sees it.
    Show {
        context: String,
        version: u32,
        node: u32,
    },
    /// Take a version out of use, or put it back.
    Use {
        context: String,
        version: u32,
        enable: bool,
        key: String,
    },
    /// Have a version destroyed after the shortest wait.
    Destroy {
        context: String,
        version: u32,
        key: String,
    },
    /// Take that back.
    Undo {
        context: String,
        version: u32,
        key: String,
    },
    /// The value in access control, as one node sees it.
    ReadAcl { node: u32 },
    /// Put a value into access control if this one is there.
    SetAcl { from: u64, to: u64, key: String },
    /// Revoke a common name.
    Revoke { cn: String },
    /// Take that back.
    Unrevoke { cn: String },
}

impl Operation {
    /// Requests of the data plane: too many of them to be kept one by one.
    pub(super) fn is_data(&self) -> bool {
        matches!(
            self,
            Self::Encrypt { .. } | Self::Decrypt { .. } | Self::Ask { .. }
        )
    }

    /// What changes the state of the cluster.
    #[must_use]
    pub fn is_change(&self) -> bool {
        !self.is_data()
            && !matches!(
                self,
                Self::Retired { .. } | Self::Keys { .. } | Self::Show { .. } | Self::ReadAcl { .. }
            )
    }
}

/// What came of an operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It was done.
    Ok(Answer),
    /// It was certainly not done.
    Refused {
        /// Why.
        code: String,
    },
    /// It may have been done, or be done yet.
    Unknown {
        /// What happened instead of an answer.
        why: String,
    },
}

impl Outcome {
    /// By the client's rules. Without a connection, and with a certificate that was refused, nothing was sent.
    #[must_use]
    pub fn of(error: &ClientError) -> Self {
        if error.outcome_unknown() {
            return Self::Unknown {
                why: error.to_string(),
            };
        }
        let code = match error.refusal() {
            Some(refusal) if !refusal.code_text.is_empty() => refusal.code_text.clone(),
            Some(refusal) => format!("status_{}", refusal.status),
            None => "unreachable".to_owned(),
        };
        Self::Refused { code }
    }

    /// What was answered.
    #[must_use]
    pub fn answer(&self) -> Option<&Answer> {
        match self {
            Self::Ok(answer) => Some(answer),
            _ => None,
        }
    }
}

/// What was answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Nothing but that it is done.
    Done,
    /// A ciphertext, in base64.
    Sealed { version: u32, ciphertext: String },
    /// A plaintext, and whether it is the right one.
    Opened { right: bool },
    /// A new version, and the one that was active before it, where the answer has it.
    Rotated { version: u32, previous: Option<u32> },
    /// A number of a version, if there is one.
    Highest { version: Option<u32> },
    /// All contexts.
    Keys { contexts: Vec<ContextView> },
    /// The state of a version.
    State { state: KeyState },
    /// The value in access control.
    Value { value: u64 },
}

/// A context as one node sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContextView {
    /// Its name.
    pub context: String,
    /// Versions that encrypt.
    pub active: Vec<u32>,
    /// Numbers that are listed.
    pub listed: u32,
    /// The highest of them.
    pub highest: u32,
}

/// One look of the watch at every node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// When it began, in nanoseconds since the run began: before anybody was asked whether he is ready.
    #[serde(default)]
    pub began: u64,
    /// The highest index that was known to be committed before anybody was asked.
    pub known: u64,
    /// What a node that was ready has just encrypted.
    pub probe: Option<Probe>,
    /// What was encrypted under an earlier version, and one of the nodes was asked for besides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub older: Option<Probe>,
    /// The nodes.
    pub nodes: Vec<Seen>,
}

/// A ciphertext that a ready node has made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// Its context.
    pub context: String,
    /// Its version.
    pub version: u32,
    /// Who made it.
    pub made_on: u32,
    /// When it was there, in nanoseconds since the run began.
    #[serde(default)]
    pub at: u64,
}

/// A node in a sample.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Its number.
    pub node: u32,
    /// Its process.
    pub pid: Option<i32>,
    /// Whether it was ready before and after it was asked, in one process.
    pub ready: bool,
    /// The index that it had applied, read before `ready` was asked for the last time.
    pub index: Option<u64>,
    /// What it made of the probe.
    pub held: Held,
    /// What it made of the older one.
    #[serde(default)]
    pub older: Held,
    /// Its state's index and digest, read together.
    pub digest: Option<(u64, String)>,
    /// Its term.
    pub term: Option<u64>,
    /// Whether it leads, by what it says itself.
    pub leads: bool,
}

/// What a node made of a probe.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Held {
    /// It was not asked.
    #[default]
    NotAsked,
    /// It decrypted it.
    Opened,
    /// It decrypted it to something else.
    Wrong,
    /// It refused.
    Refused { code: String },
    /// It did not answer.
    Silent,
}

/// A line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// The first one.
    Begun { marker: String },
    /// An operation begins.
    Invoked {
        at: u64,
        id: u64,
        process: u32,
        operation: Operation,
    },
    /// It is over.
    Completed {
        at: u64,
        id: u64,
        /// `X-HSM-Index` of the answer.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        index: Option<u64>,
        /// `X-HSM-Stale` of the answer.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        stale: bool,
        outcome: Outcome,
    },
    /// Something else happened.
    Noted { at: u64, what: String },
    /// The watch has looked.
    Sampled { at: u64, sample: Box<Sample> },
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use hsm_api::client::ApiError;

    use super::*;

    fn refusal(code: &str, status: u16) -> ApiError {
        ApiError {
            status,
            code: code.parse().ok(),
            code_text: code.to_owned(),
            detail: String::new(),
            request_id: None,
            retryable: false,
            retry_after: None,
            node: None,
            endpoint: String::new(),
        }
    }

    #[test]
    fn only_what_certainly_was_not_done_is_refused() {
        let conflict = Outcome::of(&ClientError::Api(Box::new(refusal("conflict", 409))));
        assert_eq!(
            conflict,
            Outcome::Refused {
                code: "conflict".to_owned()
            }
        );
        let page = Outcome::of(&ClientError::Api(Box::new(refusal("", 502))));
        assert_eq!(
            page,
            Outcome::Refused {
                code: "status_502".to_owned()
            }
        );
        let connect = ClientError::Connect {
            endpoint: String::new(),
            reason: String::new(),
        };
        assert!(matches!(Outcome::of(&connect), Outcome::Refused { code } if code == "unreachable"));
        let unanswered = || ClientError::Transport {
            endpoint: String::new(),
            reason: "reset".to_owned(),
        };
        let said = ClientError::Api(Box::new(refusal("outcome_unknown", 503)));
        let refused_later = ClientError::RefusedAfterSilence {
            unanswered: Box::new(unanswered()),
            refusal: Box::new(refusal("conflict", 409)),
        };
        for unknown in [unanswered(), said, refused_later] {
            assert!(
                matches!(Outcome::of(&unknown), Outcome::Unknown { .. }),
                "{unknown}"
            );
        }
    }

    #[test]
    fn a_line_is_read_as_it_was_written() {
        let line = Line::Completed {
            at: 1,
            id: 2,
            index: Some(3),
            stale: true,
            outcome: Outcome::Ok(Answer::State {
                state: KeyState::Destroyed,
            }),
        };
        let text = serde_json::to_string(&line).unwrap();
        assert_eq!(serde_json::from_str::<Line>(&text).unwrap(), line);
    }
}
