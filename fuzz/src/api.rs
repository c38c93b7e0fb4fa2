//! Properties of what the wire contract parses; it has nothing private.
#![allow(clippy::unwrap_used, clippy::expect_used)] // They are tests.

use std::collections::BTreeSet;

use hsm_api::v1::{Metadata, version_of_label};
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

/// Version 1's `metadata.yaml`: what is accepted has each number once in its context, each label once, in order.
pub(crate) fn v1_metadata(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else {
        return false;
    };
    let options = serde_saphyr::options! { with_snippet: false };
    let Ok(metadata) = serde_saphyr::from_str_with_options::<Option<Metadata>>(text, options) else {
        return false;
    };
    let Ok(contexts) = metadata.unwrap_or_default().contexts() else {
        return false;
    };
    let mut labels = BTreeSet::new();
    for context in &contexts {
        assert!(
            context
                .versions
                .is_sorted_by(|one, next| one.number < next.number)
        );
        assert!(
            context
                .versions
                .iter()
                .filter(|version| version.is_current)
                .count()
                <= 1
        );
        for version in &context.versions {
            let (number, label) = (&version.number, &version.label);
            assert!(*number > 0 && !label.is_empty() && labels.insert(label));
            let written = format!("kek-{}-v{number}", context.name);
            assert_eq!(version_of_label(&context.name, &written), Some(*number));
        }
    }
    true
}
