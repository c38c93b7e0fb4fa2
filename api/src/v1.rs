//! Version 1's `metadata.yaml`: which keys it had. Read by nodes at their first start, and by `hsmctl key adopt`; never
//! written. Its checksums are hashes of labels and prove nothing, so they are not even read.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;
use serde::de::IgnoredAny;

/// The file, as it stands there.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Metadata {
    rotation: Option<BTreeMap<String, Option<Rotation>>>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
struct Rotation {
    current: Option<String>,
    rotation_interval_days: Option<u32>,
    versions: Option<Vec<Version>>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
struct Version {
    label: String,
    version: u32,
    /// Not version 1's: written by whoever has several keys of one label.
    id: Option<String>,
    created_at: Option<Written>,
}

/// What is only shown: something else than a text must keep no node from starting.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged)]
enum Written {
    Text(String),
    Other(IgnoredAny),
}

/// A key version of version 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct V1Version {
    /// Its number.
    pub number: u32,
    /// Its label in the token.
    pub label: String,
    /// Its `CKA_ID` in hex, if one was written beside it.
    pub id: Option<String>,
    /// When it was made, as it stands there.
    pub created_at: Option<String>,
    /// Whether version 1 encrypts under it. It does not start without that one; of others it does not ask whether they
    /// are there.
    pub is_current: bool,
}

/// A context of version 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct V1Context {
    /// Its name.
    pub name: String,
    /// How often it was to be rotated, in days, if that was said.
    pub rotation_interval_days: Option<u32>,
    /// Its versions in the order of their numbers.
    pub versions: Vec<V1Version>,
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
    let current = rotation.current.filter(|current| !current.is_empty());
    let mut versions: BTreeMap<u32, V1Version> = BTreeMap::new();
    for listed in rotation.versions.unwrap_or_default() {
        let Version { label, version, .. } = &listed;
        if label.is_empty() || *version == 0 {
            let problem =
                format!("version {version} with the label {label:?}: give it its number and its label");
            return Err(wrong(problem));
        }
        if !labels.insert(label.clone()) {
            return Err(wrong(format!(
                "the label {label:?} is there twice; a label is one version's"
            )));
        }
        if let Some(other) = versions.get(version) {
            let other = &other.label;
            let problem =
                format!("version {version} is there twice ({other:?}, {label:?}); a number is one version's");
            return Err(wrong(problem));
        }
        let known = V1Version {
            number: listed.version,
            is_current: current.as_ref() == Some(&listed.label),
            label: listed.label,
            id: listed.id.filter(|id| !id.is_empty()),
            created_at: match listed.created_at {
                Some(Written::Text(text)) => Some(text),
                Some(Written::Other(_)) | None => None,
            },
        };
        versions.insert(known.number, known);
    }
    if let Some(current) = &current
        && !versions.values().any(|version| version.is_current)
    {
        let problem = format!("current: {current:?} is not among the versions; add it there with its number");
        return Err(wrong(problem));
    }
    Ok(V1Context {
        rotation_interval_days: rotation.rotation_interval_days,
        versions: versions.into_values().collect(),
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
        let known = |number, label: &str| V1Version {
            number,
            label: label.to_owned(),
            id: None,
            created_at: Some("2024-01-01T00:00:00Z".to_owned()),
            is_current: false,
        };
        let current = V1Version {
            is_current: true,
            ..known(2, "kek-exchange-key-v2")
        };
        assert_eq!(
            contexts[1],
            V1Context {
                name: "exchange-key".to_owned(),
                rotation_interval_days: Some(90),
                versions: vec![known(1, "old one"), current],
            }
        );
        assert_eq!(read(json!({})).unwrap(), []);
    }

    #[test]
    fn a_time_that_is_no_text_is_left_out_and_an_id_is_read() {
        for made in [json!(null), json!(7), json!({"at": "x"}), json!([])] {
            let version = json!({"label": "a", "version": 1, "created_at": made, "id": "0a0b"});
            let contexts = read(json!({"rotation": {"c": {"versions": [version]}}})).unwrap();
            let version = &contexts[0].versions[0];
            assert_eq!((&version.created_at, version.is_current), (&None, false));
            assert_eq!(version.id.as_deref(), Some("0a0b"));
        }
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
