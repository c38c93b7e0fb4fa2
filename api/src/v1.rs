//! Version 1's `metadata.yaml`: which keys it had. Read by nodes at their first start, and by `hsmctl key adopt`; never
//! written. Its checksums are hashes of labels and prove nothing, so they are not even read.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

/// The file, as it stands there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Metadata {
    rotation: Option<BTreeMap<String, Option<Rotation>>>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct Rotation {
    current: Option<String>,
    rotation_interval_days: Option<u32>,
    versions: Option<Vec<Version>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct Version {
    label: String,
    version: u32,
}

/// A context of version 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct V1Context {
    /// Its name.
    pub name: String,
    /// How often it was to be rotated, in days, if that was said.
    pub rotation_interval_days: Option<u32>,
    /// Its versions in the order of their numbers: number and label.
    pub versions: Vec<(u32, String)>,
}

/// A file that cannot be what version 1 wrote.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("rotation.{context}: {problem}")]
pub struct MetadataError {
    context: String,
    problem: String,
}

impl Metadata {
    /// The contexts and their versions.
    ///
    /// # Errors
    /// When a number or a label is given twice, when the current version is not listed, or when a version has no
    /// label or no number: to adopt what is left would be to lose a key in silence.
    pub fn contexts(self) -> Result<Vec<V1Context>, MetadataError> {
        let mut labels = BTreeSet::new();
        let contexts = self.rotation.unwrap_or_default().into_iter();
        contexts
            .map(|(name, rotation)| context(name, rotation.unwrap_or_default(), &mut labels))
            .collect()
    }
}

fn context(
    name: String,
    rotation: Rotation,
    labels: &mut BTreeSet<String>,
) -> Result<V1Context, MetadataError> {
    let wrong = |problem: String| MetadataError {
        context: name.clone(),
        problem,
    };
    let mut versions = BTreeMap::new();
    for Version { label, version } in rotation.versions.unwrap_or_default() {
        if label.is_empty() || version == 0 {
            let problem =
                format!("version {version} with the label {label:?}: give it its number and its label");
            return Err(wrong(problem));
        }
        if !labels.insert(label.clone()) {
            return Err(wrong(format!(
                "the label {label:?} is there twice; a label is one version's"
            )));
        }
        if let Some(other) = versions.insert(version, label.clone()) {
            let problem =
                format!("version {version} is there twice ({other:?}, {label:?}); a number is one version's");
            return Err(wrong(problem));
        }
    }
    if let Some(current) = rotation.current.filter(|current| !current.is_empty())
        && !versions.values().any(|label| *label == current)
    {
        let problem = format!("current: {current:?} is not among the versions; add it there with its number");
        return Err(wrong(problem));
    }
    Ok(V1Context {
        rotation_interval_days: rotation.rotation_interval_days,
        versions: versions.into_iter().collect(),
        name,
    })
}

/// Number of the version that a label of version 1's form names, `kek-<context>-v<N>`.
#[must_use]
pub fn version_of_label(context: &str, label: &str) -> Option<u32> {
    let digits = label
        .strip_prefix("kek-")?
        .strip_prefix(context)?
        .strip_prefix("-v")?;
    let plain = !digits.starts_with('0') && digits.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| digits.parse().ok()).flatten()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(file: Value) -> Result<Vec<V1Context>, String> {
        let metadata: Metadata = serde_json::from_value(file).unwrap();
        metadata.contexts().map_err(|error| error.to_string())
    }

    fn version(number: u32, label: &str) -> Value {
        json!({"label": label, "version": number, "created_at": "2024-01-01T00:00:00Z", "checksum": "00"})
    }

    #[test]
    fn what_version_1_wrote_is_read_in_order() {
        let file = json!({"rotation": {
            "exchange-key": {
                "current": "kek-exchange-key-v2", "rotation_interval_days": 90,
                "versions": [version(2, "kek-exchange-key-v2"), version(1, "old one")],
            },
            "2fa": null,
        }, "later": 1});
        let contexts = read(file).unwrap();
        assert_eq!(contexts[0].versions, []);
        assert_eq!(
            contexts[1],
            V1Context {
                name: "exchange-key".to_owned(),
                rotation_interval_days: Some(90),
                versions: vec![(1, "old one".to_owned()), (2, "kek-exchange-key-v2".to_owned())],
            }
        );
        assert_eq!(read(json!({})).unwrap(), []);
    }

    #[test]
    fn a_file_that_would_lose_a_key_is_refused_with_its_place() {
        let with = |versions: Value| json!({"rotation": {"c": {"current": "a", "versions": versions}}});
        for (file, problem) in [
            (
                with(json!([version(1, "b")])),
                "current: \"a\" is not among the versions",
            ),
            (
                with(json!([version(1, "a"), version(1, "b")])),
                "version 1 is there twice",
            ),
            (
                with(json!([version(1, "a"), version(2, "a")])),
                "the label \"a\" is there twice",
            ),
            (with(json!([version(0, "a")])), "version 0"),
            (with(json!([version(1, "")])), "version 1 with the label \"\""),
        ] {
            let error = read(file).unwrap_err();
            assert!(
                error.starts_with("rotation.c: ") && error.contains(problem),
                "{error}"
            );
        }
        let twice = json!({"rotation": {
            "a": {"versions": [version(1, "one")]}, "b": {"versions": [version(1, "one")]},
        }});
        assert!(read(twice).unwrap_err().starts_with("rotation.b: "));
    }

    #[test]
    fn a_label_of_version_1_names_its_number() {
        assert_eq!(version_of_label("exchange-key", "kek-exchange-key-v12"), Some(12));
        for label in [
            "kek-exchange-key-v",
            "kek-exchange-key-v01",
            "kek-2fa-v1",
            "exchange-key-v1",
            "kek-exchange-key-v1x",
        ] {
            assert_eq!(version_of_label("exchange-key", label), None, "{label}");
        }
    }
}
