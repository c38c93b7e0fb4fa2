//! For each parser of `hsmctl` a property that holds whatever the bytes are. A function panics where it does not hold,
//! and otherwise says whether the bytes were accepted. The crate `hsm-fuzz` feeds them.
#![allow(clippy::unwrap_used, clippy::expect_used)] // They are tests.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use crate::cli::{self, Global};
use crate::files::secret_line;
use crate::names::{self, Invocation};
use crate::profile::{self, Profile};
use crate::v1_config;

/// A command line, one argument a line: translated once it is what it is, and the PIN of version 1's `create-kek` has no
/// influence on anything that is carried out or said.
pub fn arguments(data: &[u8]) -> bool {
    let args: Vec<OsString> = data
        .split(|byte| *byte == b'\n')
        .map(|arg| OsString::from_vec(arg.to_vec()))
        .collect();
    let invocation = names::translate(args.clone());
    if let Some(at) = pin(&args) {
        let mut other = args.clone();
        other[at] = OsString::from("0000");
        assert!(names::translate(other) == invocation, "the PIN is still there");
    }
    let Invocation { name, args, .. } = invocation;
    cli::parse(name, &args).is_ok()
}

/// The place of the PIN in `create-kek LABEL PIN …`.
fn pin(args: &[OsString]) -> Option<usize> {
    let is_word = |at: usize| {
        let text = args.get(at).map(|arg| arg.to_string_lossy());
        text.is_some_and(|text| !text.starts_with('-') && text != "completions" && text != "man")
    };
    let called = Path::new(args.first()?).file_name()? == "create-kek";
    (called && is_word(1) && is_word(2)).then_some(2)
}

/// The name of a profile: its files are in the folder of clients and nowhere else.
pub fn profile(data: &[u8]) -> bool {
    let Ok(name) = std::str::from_utf8(data) else {
        return false;
    };
    let global = Global {
        endpoints: vec!["https://localhost:8443".to_owned()],
        profile: Some(name.to_owned()),
        pki: Some("/pki".into()),
        ..Global::default()
    };
    let Ok(profile) = Profile::resolve(&global) else {
        return false;
    };
    for file in [&profile.cert, &profile.key] {
        assert_eq!(file.parent(), Some(Path::new("/pki/clients")));
    }
    assert!(name.is_empty() || profile.cert == Path::new("/pki/clients").join(format!("{name}.crt")));
    true
}

/// The profiles' file: paths are whole and addresses are some; a refusal is a line without what may be a key.
pub fn profiles(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else {
        return false;
    };
    match profile::parse_file(text, Path::new("/etc/hsm"), Some(Path::new("/home/op"))) {
        Ok(found) => {
            assert!(found.default.is_none_or(|name| found.all.contains_key(&name)));
            for entry in found.all.into_values() {
                for endpoint in &entry.endpoints {
                    hsm_api::client::check_endpoint(endpoint).unwrap();
                }
                let (cert, key) = entry.identity.unzip();
                for path in [entry.ca, cert, key].into_iter().flatten() {
                    assert!(path.is_absolute());
                }
                assert!(
                    entry
                        .timeout
                        .is_none_or(|seconds| cli::TIMEOUT_SECONDS.contains(&seconds))
                );
            }
            true
        }
        Err(why) => {
            assert!(!why.contains('\n') && !why.contains("-----BEGIN"), "{why}");
            false
        }
    }
}

/// A file with a secret: one newline less and nothing else changed.
pub fn secret_file(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else {
        return false;
    };
    let line = secret_line(text);
    assert!(matches!(text.strip_prefix(line), Some("" | "\n" | "\r\n" | "\r")));
    !line.is_empty()
}

/// Version 1's configuration: no path that is taken from it is empty, and a refusal quotes nothing.
pub fn v1_config(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else {
        return false;
    };
    match v1_config::parse(text) {
        Ok(found) => {
            for path in [found.ca, found.cert, found.key].into_iter().flatten() {
                assert!(!path.as_os_str().is_empty());
            }
            true
        }
        Err(why) => {
            let known = ["is not the YAML of a configuration (line ", "server.port is not "];
            assert!(known.iter().any(|begin| why.starts_with(begin)), "{why}");
            let rest = why.trim_start_matches(known[0]);
            assert!(
                rest == why
                    || rest
                        .trim_end_matches(')')
                        .bytes()
                        .all(|byte| byte.is_ascii_digit())
            );
            false
        }
    }
}
