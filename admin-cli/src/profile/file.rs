//! The profiles' file: nodes, CA, certificate and habits under one name. It holds paths and never a key itself, so others
//! may read it. What is misspelt is refused: passed over in silence, it would have other nodes asked, or as somebody else.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::ValueEnum;
use hsm_api::client::check_endpoint;
use hsm_api::suggest::nearest;
use serde_json::{Map, Value};

use crate::cli::TIMEOUT_SECONDS;
use crate::exit::usage;
use crate::output::Format;

/// No file of profiles is longer.
const MAX_FILE: u64 = 1 << 20;
/// No path, address or name is longer.
const MAX_TEXT: usize = 4096;
const MAX_NAME: usize = 64;

const TOP: [&str; 2] = ["default", "profiles"];
const OF_A_PROFILE: [&str; 6] = ["endpoints", "ca", "cert", "key", "output", "timeout"];

/// What one profile says. Relative paths were relative to the file's folder.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) endpoints: Vec<String>,
    pub(crate) ca: Option<PathBuf>,
    /// Client certificate and its private key.
    pub(crate) identity: Option<(PathBuf, PathBuf)>,
    pub(crate) output: Option<Format>,
    /// Seconds.
    pub(crate) timeout: Option<u64>,
}

/// What the whole file says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Profiles {
    /// The one that counts where none is named; it is there.
    pub(crate) default: Option<String>,
    pub(crate) all: BTreeMap<String, Entry>,
}

impl Profiles {
    /// The profile of this name, or what to say instead.
    pub(crate) fn named(&self, name: &str) -> Result<&Entry, String> {
        self.all.get(name).ok_or_else(|| {
            let known = || self.all.keys().map(String::as_str);
            let hint = match nearest(name, known()) {
                Some(meant) => format!("did you mean {meant}?"),
                None if self.all.is_empty() => "the file has none, or is not there".to_owned(),
                None => format!("there are {}", known().collect::<Vec<_>>().join(", ")),
            };
            format!("profiles: there is no profile {name:?}; {hint}")
        })
    }
}

/// Whether a profile can be called so: with `--pki` the name becomes part of a path.
pub(crate) fn is_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    !name.starts_with('.') && name.chars().all(plain)
}

/// What is wrong with a file.
fn refused(path: &Path, why: &str) -> anyhow::Error {
    usage(format!("{}: {why}", path.display()))
}

/// Reads the file; nothing if it is not there.
pub(crate) fn read(path: &Path, home: Option<&Path>) -> Result<Option<Profiles>> {
    let unreadable = |error: std::io::Error| refused(path, &format!("cannot be read: {error}"));
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(error) => return Err(unreadable(error)),
    };
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1)
        .read_to_end(&mut bytes)
        .map_err(unreadable)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(refused(path, &format!("is longer than {MAX_FILE} bytes")));
    }
    let text = std::str::from_utf8(&bytes).map_err(|_| refused(path, "is not text"))?;
    let folder = path.parent().unwrap_or(Path::new(""));
    let profiles = parse(text, folder, home).map_err(|why| refused(path, &why))?;
    Ok(Some(profiles))
}

/// Takes a text in this folder. A refusal names the key; it quotes no value that may be a secret in the wrong place.
pub(crate) fn parse(text: &str, folder: &Path, home: Option<&Path>) -> Result<Profiles, String> {
    let options = serde_saphyr::options! { with_snippet: false };
    let whole: Option<Value> = serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        let line = error.location().map_or(0, |location| location.line());
        format!("is not YAML, or has a key twice (line {line})")
    })?;
    let root = match whole {
        None | Some(Value::Null) => return Ok(Profiles::default()),
        Some(Value::Object(members)) => members,
        Some(other) => {
            return Err(format!(
                "is {}; write profiles: and under it their names",
                kind(&other)
            ));
        }
    };
    let root = Section {
        at: "",
        members: &root,
    };
    root.knows(&TOP)?;
    let mut profiles = Profiles::default();
    match root.members.get("profiles") {
        None | Some(Value::Null) => {}
        Some(Value::Object(all)) => {
            for (name, said) in all {
                if !may_be_shown(name) {
                    return Err(format!(
                        "profiles.{}: not a name; use letters, digits and . - _, at most {MAX_NAME}, and do not begin \
                         with a dot",
                        shown(name)
                    ));
                }
                let at = format!("profiles.{name}");
                let Value::Object(members) = said else {
                    return Err(format!(
                        "{at}: is {}; write {} under it",
                        kind(said),
                        OF_A_PROFILE.join(", ")
                    ));
                };
                let entry = entry(&Section { at: &at, members }, folder, home)?;
                profiles.all.insert(name.clone(), entry);
            }
        }
        Some(other) => {
            return Err(format!(
                "profiles: is {}; write the profiles' names under it",
                kind(other)
            ));
        }
    }
    if let Some(default) = root.text("default")? {
        profiles.named(default).map_err(|why| format!("default: {why}"))?;
        profiles.default = Some(default.to_owned());
    }
    Ok(profiles)
}

fn entry(said: &Section<'_>, folder: &Path, home: Option<&Path>) -> Result<Entry, String> {
    said.knows(&OF_A_PROFILE)?;
    let path = |key: &str| -> Result<Option<PathBuf>, String> {
        let Some(text) = said.text(key)? else {
            return Ok(None);
        };
        match (text.strip_prefix("~/"), home) {
            (None, _) => Ok(Some(folder.join(text))),
            (Some(rest), Some(home)) => Ok(Some(home.join(rest))),
            (Some(_), None) => Err(format!(
                "{}: {text}: HOME is not set; write the whole path",
                said.path(key)
            )),
        }
    };
    let identity = match (path("cert")?, path("key")?) {
        (Some(cert), Some(key)) => Some((cert, key)),
        (None, None) => None,
        (Some(_), None) => {
            return Err(format!(
                "{}: needs key with it, the file of its private key",
                said.path("cert")
            ));
        }
        (None, Some(_)) => {
            return Err(format!(
                "{}: needs cert with it, the file of its certificate",
                said.path("key")
            ));
        }
    };
    Ok(Entry {
        endpoints: endpoints(said)?,
        ca: path("ca")?,
        identity,
        output: output(said)?,
        timeout: timeout(said)?,
    })
}

/// A list, or one text with commas as in `HSMCTL_ENDPOINTS`.
fn endpoints(said: &Section<'_>) -> Result<Vec<String>, String> {
    let at = said.path("endpoints");
    let listed: Vec<&str> = match said.members.get("endpoints") {
        None => return Ok(Vec::new()),
        Some(Value::Array(many)) => many.iter().map(|one| text(&at, one)).collect::<Result<_, _>>()?,
        Some(one) => text(&at, one)?.split(',').collect(),
    };
    let listed: Vec<&str> = listed
        .into_iter()
        .map(str::trim)
        .filter(|one| !one.is_empty())
        .collect();
    if listed.is_empty() {
        return Err(format!("{at}: names no node; write a list of https://host:8443"));
    }
    for one in &listed {
        check_endpoint(one).map_err(|error| format!("{at}: {error}"))?;
    }
    Ok(listed.into_iter().map(str::to_owned).collect())
}

fn output(said: &Section<'_>) -> Result<Option<Format>, String> {
    let Some(word) = said.text("output")? else {
        return Ok(None);
    };
    let format = Format::from_str(word, false);
    let format = format.map_err(|_| {
        format!(
            "{}: {word:?}: is no format; write table, json or yaml",
            said.path("output")
        )
    });
    format.map(Some)
}

fn timeout(said: &Section<'_>) -> Result<Option<u64>, String> {
    let Some(value) = said.members.get("timeout") else {
        return Ok(None);
    };
    let wrong = |what: String| {
        let (least, most) = (*TIMEOUT_SECONDS.start(), *TIMEOUT_SECONDS.end());
        format!(
            "{}: {what}; write seconds, a number from {least} to {most}",
            said.path("timeout")
        )
    };
    match value {
        Value::Number(number) => match number.as_u64() {
            Some(seconds) if TIMEOUT_SECONDS.contains(&seconds) => Ok(Some(seconds)),
            _ => Err(wrong(number.to_string())),
        },
        other => Err(wrong(format!("is {}", kind(other)))),
    }
}

/// A mapping and where it is.
struct Section<'a> {
    /// `profiles.prod`; nothing for the whole file.
    at: &'a str,
    members: &'a Map<String, Value>,
}

impl<'a> Section<'a> {
    fn path(&self, key: &str) -> String {
        if self.at.is_empty() {
            return key.to_owned();
        }
        format!("{}.{key}", self.at)
    }

    fn knows(&self, known: &[&str]) -> Result<(), String> {
        let Some(key) = self.members.keys().find(|key| !known.contains(&key.as_str())) else {
            return Ok(());
        };
        let hint = match nearest(key, known.iter().copied()) {
            Some(meant) => format!("did you mean {meant}?"),
            None => format!("known here: {}", known.join(", ")),
        };
        Err(format!("{}: unknown key; {hint}", self.path(shown(key))))
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, String> {
        let value = self.members.get(key);
        value.map(|value| text(&self.path(key), value)).transpose()
    }
}

/// A text of one line that is no certificate and no key.
fn text<'v>(at: &str, value: &'v Value) -> Result<&'v str, String> {
    match value {
        Value::String(text) if text.trim().is_empty() => {
            Err(format!("{at}: is empty; write something, or leave the key out"))
        }
        Value::String(text) if text.contains("-----BEGIN") => Err(format!(
            "{at}: is a certificate or a private key itself; put that into a file, a private key's with mode 0600, and \
             the file's path here"
        )),
        Value::String(text) if text.len() > MAX_TEXT || text.contains(char::is_control) => Err(format!(
            "{at}: is longer than {MAX_TEXT} bytes or than a line; write a name, an address or a path"
        )),
        Value::String(text) => Ok(text),
        other => Err(format!(
            "{at}: is {}; write a text, in quotes if it looks like something else",
            kind(other)
        )),
    }
}

/// A key that is no name is not repeated: what somebody puts there by mistake may be anything.
fn shown(key: &str) -> &str {
    if may_be_shown(key) { key } else { "(…)" }
}

fn may_be_shown(key: &str) -> bool {
    // A line of dashes is the beginning of a certificate or a private key.
    !key.is_empty() && key.len() <= MAX_NAME && is_name(key) && !key.contains("-----")
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "empty",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "a mapping",
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::exit::Exit;

    fn parsed(text: &str) -> Result<Profiles, String> {
        parse(text, Path::new("/etc/hsm"), Some(Path::new("/home/op")))
    }

    fn refusal(text: &str) -> String {
        parsed(text).unwrap_err()
    }

    #[test]
    fn a_profile_says_nodes_files_and_habits() {
        let profiles = parsed(
            "default: prod\n\
             profiles:\n\
             \x20 prod:\n\
             \x20   endpoints: [https://hsm-1:8443, hsm-2]\n\
             \x20   ca: pki/ca.crt\n\
             \x20   cert: /srv/op.crt\n\
             \x20   key: ~/op.key\n\
             \x20   output: yaml\n\
             \x20   timeout: 30\n\
             \x20 test: {endpoints: \"https://a:1, https://b:2\"}\n",
        )
        .unwrap();
        assert_eq!(profiles.default.as_deref(), Some("prod"));
        let prod = Entry {
            endpoints: vec!["https://hsm-1:8443".to_owned(), "hsm-2".to_owned()],
            ca: Some("/etc/hsm/pki/ca.crt".into()),
            identity: Some(("/srv/op.crt".into(), "/home/op/op.key".into())),
            output: Some(Format::Yaml),
            timeout: Some(30),
        };
        assert_eq!(profiles.named("prod"), Ok(&prod));
        let test = profiles.named("test").unwrap();
        assert_eq!(test.endpoints, ["https://a:1", "https://b:2"]);
        assert_eq!((&test.ca, &test.identity, test.output), (&None, &None, None));
    }

    #[test]
    fn a_file_that_says_nothing_has_no_profiles() {
        for text in ["", "# nothing yet\n", "profiles:\n", "{}"] {
            assert_eq!(parsed(text), Ok(Profiles::default()), "{text}");
        }
    }

    #[test]
    fn what_is_misspelt_is_refused_with_what_was_meant() {
        for (text, said) in [
            ("defalt: a", "defalt: unknown key; did you mean default?"),
            (
                "clusters: {}",
                "clusters: unknown key; known here: default, profiles",
            ),
            (
                "profiles: {prod: {endpoint: x}}",
                "profiles.prod.endpoint: unknown key; did you mean endpoints?",
            ),
            (
                "profiles: {prod: {certificate-authority-data: x}}",
                "profiles.prod.certificate-authority-data: unknown key; known here: endpoints, ca, cert, key, output, \
                 timeout",
            ),
            (
                "default: pord\nprofiles: {prod: {ca: x}}",
                "default: profiles: there is no profile \"pord\"; did you mean prod?",
            ),
        ] {
            assert_eq!(refusal(text), said);
        }
        let profiles = parsed("profiles: {prod: {ca: x}, staging: {ca: x}}").unwrap();
        let unknown = profiles.named("elsewhere").unwrap_err();
        assert!(unknown.ends_with("there are prod, staging"), "{unknown}");
    }

    #[test]
    fn a_value_of_the_wrong_kind_is_refused_by_its_key() {
        for (entry, said) in [
            ("ca: 7", "profiles.a.ca: is a number; "),
            ("ca:", "profiles.a.ca: is empty; "),
            ("ca: ' '", "profiles.a.ca: is empty; "),
            ("ca: [x]", "profiles.a.ca: is a list; "),
            ("cert: x", "profiles.a.cert: needs key with it"),
            ("key: x", "profiles.a.key: needs cert with it"),
            ("endpoints: []", "profiles.a.endpoints: names no node; "),
            ("endpoints: [8443]", "profiles.a.endpoints: is a number; "),
            (
                "endpoints: ['http://h:1']",
                "profiles.a.endpoints: endpoint \"http://h:1\": the API speaks only https; ",
            ),
            (
                "output: xml",
                "profiles.a.output: \"xml\": is no format; write table, json or yaml",
            ),
            (
                "timeout: 0",
                "profiles.a.timeout: 0; write seconds, a number from 1 to 86400",
            ),
            ("timeout: 30s", "profiles.a.timeout: is a text; "),
            ("timeout: 86401", "profiles.a.timeout: 86401; "),
        ] {
            let refusal = refusal(&format!("profiles:\n  a:\n    {entry}\n"));
            assert!(refusal.starts_with(said), "{entry}: {refusal}");
        }
        for text in [
            "[a]",
            "a",
            "profiles: [a]",
            "profiles: {a: b}",
            "profiles: {a}",
            "profiles: {../a: {}}",
        ] {
            assert!(parsed(text).is_err(), "{text}");
        }
        let nowhere = parse("profiles: {a: {ca: ~/x}}", Path::new(""), None).unwrap_err();
        assert!(nowhere.contains("HOME is not set"), "{nowhere}");
    }

    /// A key of the file that is there twice would be one of the two.
    #[test]
    fn a_key_that_is_there_twice_is_refused_with_its_line() {
        let refusal = refusal("profiles:\n  a: {ca: x}\n  a: {ca: y}\n");
        assert!(refusal.contains("(line "), "{refusal}");
    }

    #[test]
    fn a_key_itself_is_refused_and_not_repeated() {
        for text in [
            "profiles: {a: {cert: c, key: \"-----BEGIN PRIVATE KEY-----\\nplanted\"}}",
            "profiles:\n  a:\n    cert: c\n    key: |\n      -----BEGIN PRIVATE KEY-----\n      planted\n",
            "profiles:\n  a:\n    cert: c\n    key: |\n      planted\n      in lines\n",
            "profiles: {a: {'-----BEGIN planted': x}}",
            "profiles: {'-----BEGIN planted': {}}",
            "profiles: {a: {key: planted",
        ] {
            let refusal = refusal(text);
            assert!(
                !refusal.contains("planted") && !refusal.contains("BEGIN"),
                "{refusal}"
            );
        }
    }

    #[test]
    fn a_file_is_named_in_its_refusal_and_may_be_absent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("profiles.yaml");
        assert!(read(&path, None).unwrap().is_none());
        std::fs::write(&path, "profiles: {a: {ca: ca.crt}}").unwrap();
        let profiles = read(&path, None).unwrap().unwrap();
        assert_eq!(profiles.named("a").unwrap().ca, Some(dir.path().join("ca.crt")));
        let long = vec![b'#'; (1 << 20) + 1];
        for bad in [
            b"profiles: {a: {cb: x}}".as_slice(),
            b"\xff".as_slice(),
            long.as_slice(),
        ] {
            std::fs::write(&path, bad).unwrap();
            let error = read(&path, None).unwrap_err();
            assert_eq!(Exit::of(&error), Exit::Usage);
            assert!(error.to_string().contains("profiles.yaml: "), "{error}");
        }
        let error = read(dir.path(), None).unwrap_err().to_string();
        assert!(error.contains("cannot be read"), "{error}");
    }
}
