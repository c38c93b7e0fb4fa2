//! Version 1's list of key versions, as far as it says what is to be adopted.

use std::io::Read;
use std::path::Path;

use hsm_api::v1::{Metadata, V1Context};
use hsm_core::envelope::Binding;
use raft_store::command::MAX_ADOPTED;
use raft_store::names::ContextName;
use sha2::{Digest, Sha256};

use crate::app::StartFailure;
use crate::config::{Hsm, yaml_options};

/// No list of versions is longer.
const MAX_FILE: u64 = 1 << 20;

/// A context of version 1, to be gone on with.
pub(super) struct Wanted {
    pub(super) name: ContextName,
    pub(super) binding: Binding,
    pub(super) interval_days: Option<u32>,
    pub(super) versions: Vec<(u32, String)>,
}

/// The file's text; `None` if there is no file.
pub(super) fn read(path: &Path) -> Result<Option<String>, StartFailure> {
    let refuse = |why: String| StartFailure::V1Keys(format!("{}: {why}", path.display()));
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(refuse(format!("cannot be read: {error}"))),
    };
    let mut text = String::new();
    let read = file.take(MAX_FILE + 1).read_to_string(&mut text);
    read.map_err(|error| refuse(format!("cannot be read: {error}")))?;
    if text.len() as u64 > MAX_FILE {
        return Err(refuse(format!(
            "is longer than {MAX_FILE} bytes, which no list of versions is"
        )));
    }
    Ok(Some(text))
}

pub(super) fn digest_of(text: &str) -> String {
    hex::encode(Sha256::digest(text.as_bytes()))
}

/// The contexts of the file that have keys.
pub(super) fn wanted(path: &Path, text: &str, hsm: &Hsm) -> Result<Vec<Wanted>, StartFailure> {
    let refuse = |why: String| StartFailure::V1Keys(format!("{}: {why}", path.display()));
    let metadata: Option<Metadata> = serde_saphyr::from_str_with_options(text, yaml_options())
        .map_err(|error| refuse(format!("is not version 1's list of keys: {error}")))?;
    let contexts = metadata.unwrap_or_default().contexts();
    let contexts = contexts.map_err(|error| refuse(error.to_string()))?;
    let with_keys = contexts
        .into_iter()
        .filter(|context| !context.versions.is_empty());
    with_keys
        .map(|context| {
            let V1Context {
                name,
                rotation_interval_days,
                versions,
            } = context;
            let name = ContextName::new(&name).map_err(|error| refuse(format!("rotation: {error}")))?;
            if let Some((number, _)) = versions.iter().find(|(number, _)| *number > MAX_ADOPTED) {
                return Err(refuse(format!("rotation.{name}: version {number} is above {MAX_ADOPTED}")));
            }
            if !hsm.bindings.contains_key(&name) {
                // As version 1 took it.
                tracing::warn!(
                    context = %name,
                    "hsm.metadata_file: the context is not in hsm.keys, so its ciphertexts are bound to the CN (private)"
                );
            }
            Ok(Wanted {
                binding: hsm.binding(name.as_str()),
                interval_days: rotation_interval_days,
                versions,
                name,
            })
        })
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::config::Config;

    const CONFIG: &str = "
server: {port: '8443', tls: {ca_path: a, cert_path: b, key_path: c}}
hsm: {slot_id: t, metadata_file: m.yaml, keys: {exchange-key: {mode: shared}}}
acl: {mappings: {Trading: [exchange-key]}}
";

    fn read_as_v1(text: &str) -> Result<Vec<Wanted>, String> {
        let env = |name: &str| (name == "HSM_PIN").then(|| "1234".to_owned());
        let config = Config::parse(CONFIG, Path::new("config.yaml"), Some(0o600), &env).unwrap();
        wanted(Path::new("m.yaml"), text, &config.hsm).map_err(|error| error.to_string())
    }

    #[test]
    fn contexts_are_bound_as_configured_and_to_the_cn_where_nothing_is_said() {
        let text = "
rotation:
  exchange-key:
    current: kek-exchange-key-v2
    rotation_interval_days: 30
    versions:
      - {label: kek-exchange-key-v1, version: 1, created_at: 2024-01-01T00:00:00Z, checksum: ab}
      - {label: kek-exchange-key-v2, version: 2, created_at: 2024-02-01T00:00:00Z, checksum: cd}
  forgotten: {current: old, versions: [{label: old, version: 7}]}
  empty: {}
";
        let wanted = read_as_v1(text).unwrap();
        let seen: Vec<_> = wanted
            .iter()
            .map(|context| (context.name.as_str(), context.binding, context.interval_days))
            .collect();
        assert_eq!(
            seen,
            [
                ("exchange-key", Binding::Shared, Some(30)),
                ("forgotten", Binding::Private, None)
            ]
        );
        assert_eq!(wanted[0].versions.len(), 2);
        assert!(read_as_v1("").unwrap().is_empty());
    }

    #[test]
    fn a_file_that_is_no_list_of_keys_is_refused_by_its_name() {
        let names = |name: &str| format!("rotation: {{{name}: {{versions: [{{label: a, version: 1}}]}}}}");
        for (text, part) in [
            ("rotation: [1]".to_owned(), "is not version 1's list of keys"),
            (names("\"../x\""), "A-Z"),
            (
                names("c").replace("version: 1", "version: 2000000"),
                "above 1000000",
            ),
            (
                names("c").replace("label: a", "label: ''"),
                "version 1 with the label",
            ),
        ] {
            let error = read_as_v1(&text).map(|_| ()).unwrap_err();
            assert!(error.starts_with("hsm.metadata_file: m.yaml: "), "{error}");
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn a_text_that_is_too_long_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let path: PathBuf = dir.path().join("m.yaml");
        assert_eq!(read(&path).unwrap(), None);
        std::fs::write(&path, "x".repeat(1 << 20)).unwrap();
        assert_eq!(read(&path).unwrap().unwrap().len(), 1 << 20);
        std::fs::write(&path, "x".repeat((1 << 20) + 1)).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("longer"));
    }
}
