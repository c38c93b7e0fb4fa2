//! `hsmctl export-metadata`: the cluster's contexts in the form of version 1's `metadata.yaml`, for scripts that read
//! that file. Here it is an extract: nothing reads it back, the state is the cluster's own.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use hsm_api::admin::{ContextInfo, KeyState, KeyVersionInfo, ListKeksResponse, RotationStatusResponse};
use serde::Serialize;

use super::{READ, Session};
use crate::files;
use crate::output::{self, Format, note};

/// Arguments of `export-metadata`.
#[derive(Debug, Args)]
pub(crate) struct ExportMetadata {
    /// Write it to this file instead of standard output. Called --output by version 1, which is understood here too,
    /// unless what follows is the name of a format.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
}

/// The file.
#[derive(Debug, Serialize)]
struct Metadata {
    rotation: BTreeMap<String, Rotation>,
}

/// One context.
#[derive(Debug, Serialize)]
struct Rotation {
    /// Label of the version that encrypts.
    current: String,
    rotation_interval_days: u32,
    versions: Vec<Version>,
}

#[derive(Debug, Serialize)]
struct Version {
    label: String,
    version: u32,
    created_at: String,
    /// Version 1 had a hash of the label here, which proved nothing. There is none: what a node holds it has proven
    /// with the check record.
    checksum: String,
}

pub(super) async fn export(session: &Session, args: &ExportMetadata) -> Result<()> {
    let client = session.client(READ)?;
    let keks = session
        .ask(&client, "export-metadata", client.list_keks())
        .await?;
    let rotation = session
        .ask(&client, "export-metadata", client.rotation_status())
        .await?;
    let (metadata, left_out) = metadata(&keks, &rotation);
    if !left_out.is_empty() {
        note(&format!(
            "left out, version 1 would take them for keys in use: {}",
            left_out.join(", ")
        ));
    }
    let text = match session.format() {
        Format::Json => serde_json::to_string_pretty(&metadata)? + "\n",
        // The file is YAML, whoever reads it.
        Format::Table | Format::Yaml => output::yaml(&metadata)?,
    };
    match &args.file {
        None => output::bytes(text.as_bytes()),
        Some(path) => {
            files::write(path, text.as_bytes())?;
            note(&format!("{}: written", path.display()));
            Ok(())
        }
    }
}

/// The file, and the labels of versions that it has no state for.
fn metadata(keks: &ListKeksResponse, status: &RotationStatusResponse) -> (Metadata, Vec<String>) {
    let mut left_out = Vec::new();
    let mut rotation = BTreeMap::new();
    for info in &keks.contexts {
        let (kept, others): (Vec<&KeyVersionInfo>, Vec<&KeyVersionInfo>) =
            info.versions.iter().partition(|version| is_usable(version.state));
        left_out.extend(others.iter().map(|version| version.key_id.clone()));
        let Some(current) = current(info) else {
            // Without a key that encrypts there is no entry that version 1 could read.
            left_out.extend(kept.iter().map(|version| version.key_id.clone()));
            continue;
        };
        let interval = status
            .contexts
            .iter()
            .find(|context| context.context == info.context);
        let entry = Rotation {
            current,
            rotation_interval_days: interval.map_or(0, |context| context.rotation_interval_days),
            versions: kept.into_iter().map(version).collect(),
        };
        rotation.insert(info.context.clone(), entry);
    }
    (Metadata { rotation }, left_out)
}

/// What version 1 knew: keys that decrypt.
fn is_usable(state: KeyState) -> bool {
    matches!(state, KeyState::Active | KeyState::DecryptOnly)
}

fn current(info: &ContextInfo) -> Option<String> {
    let number = info.active_version?;
    let active = info.versions.iter().find(|version| version.version == number);
    active.map(|version| version.key_id.clone())
}

fn version(info: &KeyVersionInfo) -> Version {
    Version {
        label: info.key_id.clone(),
        version: info.version,
        created_at: info.created_at.clone(),
        checksum: String::new(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use serde_json::{Value, json};

    use super::super::preview::tests::keks;
    use super::*;

    #[test]
    fn it_has_version_1s_form_and_what_version_1_could_use() {
        let status: RotationStatusResponse = serde_json::from_value(json!({"contexts": [{
            "context": "exchange-key", "active_version": 3, "active_since": null, "rotation_interval_days": 90,
            "next_rotation_due": null
        }]}))
        .unwrap();
        let (metadata, left_out) = metadata(&keks(), &status);
        let text = output::yaml(&metadata).unwrap();
        let read: Value = serde_saphyr::from_str(&text).unwrap();
        let version = |number: u32| {
            json!({
                "label": format!("kek-exchange-key-v{number}"), "version": number,
                "created_at": "2030-01-01T00:00:00Z", "checksum": ""
            })
        };
        assert_eq!(
            read,
            json!({"rotation": {"exchange-key": {
                "current": "kek-exchange-key-v3", "rotation_interval_days": 90,
                "versions": [version(2), version(3)]
            }}}),
            "{text}"
        );
        assert_eq!(left_out, ["kek-2fa-v1", "kek-exchange-key-v1"]);
    }
}
