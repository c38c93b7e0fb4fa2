//! Version 1's list of key versions, as far as it says what is to be adopted.

use std::io::Read;
use std::path::Path;

use hsm_api::v1::{Metadata, V1Context, V1Version};
use raft_store::command::MAX_ADOPTED;
use raft_store::names::{ContextName, UnixMillis};
use raft_store::state::ClusterState;
use raft_store::state::context::BindingMode;
use sha2::{Digest, Sha256};

use crate::app::StartFailure;
use crate::clock;
use crate::config::{Hsm, yaml_options};
use crate::sync::convert::to_state_binding;

/// No list of versions is longer.
const MAX_FILE: u64 = 1 << 20;

/// Days between rotations where version 1's list says 0: its default.
const INTERVAL_DAYS: u32 = 90;

/// A context of version 1, to be gone on with.
pub(super) struct Wanted {
    pub(super) name: ContextName,
    pub(super) binding: BindingMode,
    pub(super) interval_days: Option<u32>,
    /// The highest number that version 1 gave.
    pub(super) floor: u32,
    pub(super) versions: Vec<WantedKey>,
}

/// A key of version 1, as its list has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct WantedKey {
    pub(super) number: u32,
    pub(super) label: String,
    pub(super) id: Option<Vec<u8>>,
    pub(super) created_at: Option<UnixMillis>,
    /// Without it version 1 does not start. Where the list does not say which one it is, the newest.
    pub(super) is_current: bool,
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
pub(super) fn parse(path: &Path, text: &str) -> Result<Vec<V1Context>, StartFailure> {
    let metadata: Option<Metadata> = serde_saphyr::from_str_with_options(text, yaml_options())
        .map_err(|error| refused(path, &format!("is not version 1's list of keys: {error}")))?;
    let contexts = metadata.unwrap_or_default().contexts();
    let mut contexts = contexts.map_err(|error| refused(path, &error.to_string()))?;
    contexts.retain(|context| !context.versions.is_empty());
    Ok(contexts)
}

fn refused(path: &Path, why: &str) -> StartFailure {
    StartFailure::V1Keys(format!("{}: {why}", path.display()))
}

/// As [`parse`], with whom each is bound to.
pub(super) fn wanted(
    path: &Path,
    text: &str,
    hsm: &Hsm,
    state: &ClusterState,
) -> Result<Vec<Wanted>, StartFailure> {
    let contexts = parse(path, text)?.into_iter();
    contexts
        .map(|context| one(context, hsm, state).map_err(|why| refused(path, &why)))
        .collect()
}

fn one(context: V1Context, hsm: &Hsm, state: &ClusterState) -> Result<Wanted, String> {
    let name = ContextName::new(&context.name).map_err(|error| format!("rotation: {error}"))?;
    let floor = context.versions.iter().map(|version| version.number).max();
    let floor = floor.unwrap_or_default();
    if floor > MAX_ADOPTED {
        return Err(format!("rotation.{name}: version {floor} is above {MAX_ADOPTED}"));
    }
    let is_said = context.versions.iter().any(|version| version.is_current);
    let key = |version: V1Version| {
        let id = version.id.as_deref().map(hex::decode).transpose();
        let (number, label) = (version.number, version.label);
        Ok(WantedKey {
            id: id.map_err(|_| format!("rotation.{name}: {label:?}: id: write its CKA_ID in hex digits"))?,
            created_at: version.created_at.as_deref().and_then(clock::past),
            is_current: version.is_current || !is_said && number == floor,
            number,
            label,
        })
    };
    let versions = context
        .versions
        .into_iter()
        .map(key)
        .collect::<Result<Vec<WantedKey>, String>>()?;
    Ok(Wanted {
        binding: binding(&name, &versions, hsm, state)?,
        interval_days: context
            .rotation_interval_days
            .map(|days| if days == 0 { INTERVAL_DAYS } else { days }),
        floor,
        versions,
        name,
    })
}

/// Whom its ciphertexts are bound to, for good. Version 1 serves no context that is not in `hsm.keys`, so nothing but
/// that says it.
fn binding(
    name: &ContextName,
    versions: &[WantedKey],
    hsm: &Hsm,
    state: &ClusterState,
) -> Result<BindingMode, String> {
    let written = hsm.bindings.get(name).copied().map(to_state_binding);
    let known = state.contexts().get(name).map(|known| known.binding);
    let is_new = |key: &WantedKey| super::known(state, name, &key.label).is_none();
    match (known, written) {
        (Some(known), Some(written)) if known != written && versions.iter().any(is_new) => Err(format!(
            "rotation.{name}: the context exists and binds its ciphertexts otherwise than hsm.keys.{name}.mode says, so \
             that its keys would open nothing there; take it out of the list, and adopt its keys under another context"
        )),
        (Some(known), _) => Ok(known),
        (None, Some(written)) => Ok(written),
        (None, None) => Err(format!(
            "rotation.{name}: the context stands in no hsm.keys, so that nothing says to whom its ciphertexts are bound; \
             version 1 served it to nobody. Write hsm.keys.{name}.mode: shared (the OU) or private (the CN; version 1's \
             default), or take the context out of the list and its keys out of the token if nobody needs them"
        )),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::config::Config;
    use crate::rotation::testing::World;

    const CONFIG: &str = "
server: {port: '8443', tls: {ca_path: a, cert_path: b, key_path: c}}
hsm: {slot_id: t, metadata_file: m.yaml, keys: {exchange-key: {mode: shared}}}
acl: {mappings: {Trading: [exchange-key]}}
";

    fn read_as_v1(text: &str) -> Result<Vec<Wanted>, String> {
        let env = |name: &str| (name == "HSM_PIN").then(|| "1234".to_owned());
        let config = Config::parse(CONFIG, Path::new("config.yaml"), Some(0o600), &env).unwrap();
        read_into(&ClusterState::default(), &config, text)
    }

    fn read_into(state: &ClusterState, config: &Config, text: &str) -> Result<Vec<Wanted>, String> {
        wanted(Path::new("m.yaml"), text, &config.hsm, state).map_err(|error| error.to_string())
    }

    const LIST: &str = "
rotation:
  exchange-key:
    current: kek-exchange-key-v2
    rotation_interval_days: 30
    versions:
      - {label: kek-exchange-key-v1, version: 1, created_at: 2024-01-01T00:00:00Z, checksum: ab}
      - {label: kek-exchange-key-v2, version: 2, created_at: soon, checksum: cd, id: '0a0B'}
  empty: {}
";

    #[test]
    fn a_context_is_bound_as_configured_and_its_keys_are_as_listed() {
        let wanted = read_as_v1(LIST).unwrap();
        assert_eq!(wanted.len(), 1);
        let context = &wanted[0];
        assert_eq!(
            (context.name.as_str(), context.binding, context.interval_days),
            ("exchange-key", BindingMode::Shared, Some(30))
        );
        assert_eq!(context.floor, 2);
        let first = WantedKey {
            number: 1,
            label: "kek-exchange-key-v1".to_owned(),
            id: None,
            created_at: Some(1_704_067_200_000),
            is_current: false,
        };
        let second = WantedKey {
            number: 2,
            label: "kek-exchange-key-v2".to_owned(),
            id: Some(vec![0x0a, 0x0b]),
            created_at: None,
            is_current: true,
        };
        assert_eq!(context.versions, [first, second]);
        assert!(read_as_v1("").unwrap().is_empty());
    }

    #[test]
    fn an_interval_of_0_is_version_1s_default_and_without_a_current_version_the_newest_is_it() {
        let text = LIST
            .replace("days: 30", "days: 0")
            .replace("current: kek-exchange-key-v2", "later: 1");
        let wanted = read_as_v1(&text).unwrap();
        assert_eq!(wanted[0].interval_days, Some(90));
        let current: Vec<bool> = wanted[0].versions.iter().map(|key| key.is_current).collect();
        assert_eq!(current, [false, true]);
    }

    #[test]
    fn a_context_that_version_1_served_to_nobody_is_refused_with_what_to_write() {
        let text = format!("{LIST}  forgotten: {{current: old, versions: [{{label: old, version: 7}}]}}\n");
        let error = read_as_v1(&text).map(|_| ()).unwrap_err();
        assert!(error.contains("Write hsm.keys.forgotten.mode"), "{error}");
    }

    #[test]
    fn a_context_that_exists_says_how_it_is_bound() {
        let mut world = World::new(1);
        world.context("forgotten", "s");
        world.context("exchange-key", "s");
        let env = |name: &str| (name == "HSM_PIN").then(|| "1234".to_owned());
        let parse = |text: &str| Config::parse(text, Path::new("config.yaml"), Some(0o600), &env).unwrap();
        let text = format!("{LIST}  forgotten: {{current: old, versions: [{{label: old, version: 7}}]}}\n");
        let wanted = read_into(&world.state, &parse(CONFIG), &text).unwrap();
        let bound: Vec<_> = wanted.iter().map(|context| context.binding).collect();
        assert_eq!(bound, [BindingMode::Shared, BindingMode::Shared]);
        // The world's are shared.
        let otherwise = parse(&CONFIG.replace("mode: shared", "mode: private"));
        let error = read_into(&world.state, &otherwise, LIST).map(|_| ()).unwrap_err();
        assert!(error.contains("binds its ciphertexts otherwise"), "{error}");
    }

    #[test]
    fn a_file_that_is_no_list_of_keys_is_refused_by_its_name() {
        let names = |name: &str| format!("rotation: {{{name}: {{versions: [{{label: a, version: 1}}]}}}}");
        for (text, part) in [
            ("rotation: [1]".to_owned(), "is not version 1's list of keys"),
            (names("\"../x\""), "A-Z"),
            (
                names("exchange-key").replace("version: 1", "version: 2000000"),
                "above 1000000",
            ),
            (
                names("exchange-key").replace("version: 1", "version: 1, id: xy"),
                "in hex digits",
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
