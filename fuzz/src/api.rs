//! Properties of what the wire contract parses; it has nothing private.
#![allow(clippy::unwrap_used, clippy::expect_used)] // They are tests.

use hsm_api::{Problem, StateIndex};

/// `X-HSM-Index` and `X-HSM-Min-Index`: two numbers, which are written in one form.
pub(crate) fn state_index(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else {
        return false;
    };
    let Ok(index) = text.parse::<StateIndex>() else {
        return false;
    };
    let written = index.to_string();
    assert!(written.len() <= text.len());
    assert_eq!(written.parse(), Ok(index));
    // Only zeros before a number may be missing in it.
    assert!(text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.'));
    true
}

/// The body of an error, as a client reads it: unknown members are passed over, known ones survive.
pub(crate) fn problem(data: &[u8]) -> bool {
    let Ok(problem) = serde_json::from_slice::<Problem>(data) else {
        return false;
    };
    let written = serde_json::to_vec(&problem).unwrap();
    assert_eq!(serde_json::from_slice::<Problem>(&written).unwrap(), problem);
    if let Some(code) = problem.error_code() {
        assert_eq!(code.as_str(), problem.code);
    }
    true
}
