//! Which profile counts, and what it fills in: whatever neither an option nor a variable says.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::Result;

use super::file::{self, Profiles};
use super::given;
use crate::cli::Global;
use crate::exit::usage;

/// Names the file where no option does. Not clap's: it says nothing beside `--pki`, where the option is refused.
const PROFILES: &str = "HSMCTL_PROFILES";

/// The value of a variable.
type Env<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// Fills in what a profile says and nothing else does. A folder `--pki` has profiles of its own, and then no file is
/// looked at: whoever has read a playground's `DIR/env` is in the playground.
pub(crate) fn apply(global: &mut Global, env: Env<'_>) -> Result<()> {
    if given(&global.pki).is_some() {
        return match &global.profiles {
            None => Ok(()),
            Some(path) => Err(usage(format!(
                "--profiles {}: --pki or HSMCTL_PKI names the folder whose certificates are the profiles; unset it, or \
                 leave --profiles out",
                path.display()
            ))),
        };
    }
    let named = global.profile.clone().filter(|name| !name.is_empty());
    let (path, profiles) = file_in(global, env)?;
    let Some(path) = path else {
        return Ok(());
    };
    let Some(name) = named.or(profiles.default.clone()) else {
        return Ok(());
    };
    let has_identity = given(&global.cert).is_some() || given(&global.key).is_some();
    if profiles.all.is_empty() && has_identity {
        // Whatever the profile would be, the certificate goes before it.
        return Ok(());
    }
    let entry = profiles.named(&name).map_err(|why| {
        usage(format!(
            "{}: {why}. Another file is named with --profiles or {PROFILES}; with --pki a profile is a certificate in \
             that folder",
            path.display()
        ))
    })?;
    if global.endpoints.iter().all(|endpoint| endpoint.trim().is_empty()) {
        global.endpoints.clone_from(&entry.endpoints);
    }
    if given(&global.ca).is_none() {
        global.ca.clone_from(&entry.ca);
    }
    if !has_identity && let Some((cert, key)) = entry.identity.clone() {
        (global.cert, global.key) = (Some(cert), Some(key));
    }
    global.output = global.output.or(entry.output);
    global.timeout = global.timeout.or(entry.timeout);
    Ok(())
}

/// The profiles' file that counts, and its path; no profiles if the file is not there and was not named.
pub(crate) fn file_of(global: &Global) -> Result<(Option<PathBuf>, Profiles)> {
    file_in(global, &|variable| std::env::var_os(variable))
}

fn file_in(global: &Global, env: Env<'_>) -> Result<(Option<PathBuf>, Profiles)> {
    let env = |variable: &str| env(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    let home = env("HOME");
    let named = match given(&global.profiles) {
        Some(path) => Some((path.to_owned(), "--profiles")),
        None => env(PROFILES).map(|path| (path, PROFILES)),
    };
    if let Some((path, by)) = named {
        let Some(profiles) = file::read(&path, home.as_deref())? else {
            return Err(usage(format!(
                "{}: is not there, and {by} names it as the profiles' file; write it, or leave {by} out",
                path.display()
            )));
        };
        return Ok((Some(path), profiles));
    }
    // By the specification of these folders a relative one is none.
    let config = env("XDG_CONFIG_HOME").filter(|folder| folder.is_absolute());
    let config = config.or_else(|| home.as_deref().map(|home| home.join(".config")));
    let Some(path) = config.map(|folder| folder.join("hsmctl/profiles.yaml")) else {
        return Ok((None, Profiles::default()));
    };
    let profiles = file::read(&path, home.as_deref())?.unwrap_or_default();
    Ok((Some(path), profiles))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::exit::Exit;
    use crate::output::Format;
    use crate::profile::Profile;

    const TWO: &str = "\
default: prod
profiles:
  prod:
    endpoints: [https://hsm-1:8443, https://hsm-2:8443]
    ca: prod/ca.crt
    cert: prod/op.crt
    key: prod/op.key
    output: json
    timeout: 30
  test: {endpoints: [https://test:8443], ca: test/ca.crt, cert: test/op.crt, key: test/op.key}
  nodes-only: {endpoints: [https://n:1], ca: n.crt}
";

    /// A home with this file, and its place.
    fn home(text: &str) -> (tempfile::TempDir, PathBuf) {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join(".config/hsmctl");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("profiles.yaml"), text).unwrap();
        (home, folder)
    }

    fn apply_with(global: &mut Global, variables: &[(&str, &Path)]) -> Result<()> {
        apply(global, &|variable| {
            let mut known = variables.iter();
            let found = known.find(|(known, _)| *known == variable);
            found.map(|(_, value)| OsString::from(value))
        })
    }

    fn named(name: &str) -> Global {
        Global {
            profile: Some(name.to_owned()),
            ..Global::default()
        }
    }

    #[test]
    fn a_name_is_enough_and_none_is_the_files_default() {
        let (home, folder) = home(TWO);
        let variables = [("HOME", home.path())];
        let mut global = named("test");
        apply_with(&mut global, &variables).unwrap();
        let profile = Profile::resolve(&global).unwrap();
        assert_eq!(profile.endpoints, ["https://test:8443"]);
        assert_eq!(profile.ca, folder.join("test/ca.crt"));
        assert_eq!(profile.cert, folder.join("test/op.crt"));
        assert_eq!(profile.key, folder.join("test/op.key"));
        assert_eq!((global.output, global.timeout), (None, None));

        for mut global in [Global::default(), named("")] {
            apply_with(&mut global, &variables).unwrap();
            assert_eq!(global.endpoints.len(), 2);
            assert_eq!((global.output, global.timeout), (Some(Format::Json), Some(30)));
        }
    }

    /// Both look the same here: clap has put a variable where no option was.
    #[test]
    fn an_option_and_a_variable_go_before_a_profile_each_by_itself() {
        let (home, folder) = home(TWO);
        let mut global = Global {
            endpoints: vec!["https://other:1".to_owned()],
            output: Some(Format::Table),
            ..named("prod")
        };
        apply_with(&mut global, &[("HOME", home.path())]).unwrap();
        let profile = Profile::resolve(&global).unwrap();
        assert_eq!(profile.endpoints, ["https://other:1"]);
        assert_eq!(profile.ca, folder.join("prod/ca.crt"));
        assert_eq!((global.output, global.timeout), (Some(Format::Table), Some(30)));

        let mut global = Global {
            cert: Some("own.crt".into()),
            key: Some("own.key".into()),
            ca: Some("own-ca.crt".into()),
            timeout: Some(5),
            ..named("prod")
        };
        apply_with(&mut global, &[("HOME", home.path())]).unwrap();
        let profile = Profile::resolve(&global).unwrap();
        assert_eq!((profile.cert, profile.key), ("own.crt".into(), "own.key".into()));
        assert_eq!(profile.ca, PathBuf::from("own-ca.crt"));
        assert_eq!(global.timeout, Some(5));
        // Half of a pair is never made whole with half of another.
        let mut half = Global {
            cert: Some("own.crt".into()),
            ..named("prod")
        };
        apply_with(&mut half, &[("HOME", home.path())]).unwrap();
        assert!(Profile::resolve(&half).unwrap_err().to_string().contains("--key"));
    }

    #[test]
    fn the_file_is_the_options_then_the_variables_then_that_of_the_users_folder() {
        let (home, _) = home("default: home\nprofiles: {home: {endpoints: [https://home:1]}}");
        let place = |name: &str, text: &str| {
            let path = home.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let option = place(
            "o.yaml",
            "default: o\nprofiles: {o: {endpoints: [https://option:1]}}",
        );
        let variable = place(
            "v.yaml",
            "default: v\nprofiles: {v: {endpoints: [https://variable:1]}}",
        );
        let xdg = home.path().join("xdg");
        std::fs::create_dir_all(xdg.join("hsmctl")).unwrap();
        place(
            "xdg/hsmctl/profiles.yaml",
            "default: x\nprofiles: {x: {endpoints: [https://xdg:1]}}",
        );
        let all = [
            ("HOME", home.path()),
            ("XDG_CONFIG_HOME", xdg.as_path()),
            (PROFILES, variable.as_path()),
        ];
        let asked = |option: Option<&Path>, variables: &[(&str, &Path)]| {
            let mut global = Global {
                profiles: option.map(Path::to_owned),
                ..Global::default()
            };
            apply_with(&mut global, variables).unwrap();
            global.endpoints.concat()
        };
        assert_eq!(asked(Some(&option), &all), "https://option:1");
        assert_eq!(asked(None, &all), "https://variable:1");
        assert_eq!(asked(None, &all[..2]), "https://xdg:1");
        assert_eq!(asked(None, &all[..1]), "https://home:1");
        assert_eq!(
            asked(None, &[all[0], ("XDG_CONFIG_HOME", Path::new("xdg"))]),
            "https://home:1"
        );
        assert_eq!(
            asked(None, &[all[0], (PROFILES, Path::new(""))]),
            "https://home:1"
        );
        assert_eq!(asked(None, &[]), "");
    }

    /// Shells that have read `DIR/env`.
    #[test]
    fn in_a_playground_no_file_is_looked_at() {
        let (home, _) = home("not: [a, profiles' file");
        let playground = Global {
            endpoints: vec!["https://127.0.0.1:8443".to_owned()],
            pki: Some("/play/pki".into()),
            ca: Some("/play/pki/ca.crt".into()),
            ..named("trading-1")
        };
        let mut global = playground.clone();
        let variables = [("HOME", home.path()), (PROFILES, Path::new("/nonexistent"))];
        apply_with(&mut global, &variables).unwrap();
        let profile = Profile::resolve(&global).unwrap();
        assert_eq!(profile.cert, PathBuf::from("/play/pki/clients/trading-1.crt"));
        assert_eq!((global.output, global.timeout), (None, None));
        // The option was meant for this very command.
        let mut global = Global {
            profiles: Some("p.yaml".into()),
            ..playground
        };
        let error = apply_with(&mut global, &variables).unwrap_err();
        assert_eq!(Exit::of(&error), Exit::Usage);
        assert!(error.to_string().starts_with("--profiles p.yaml: "), "{error}");
    }

    #[test]
    fn what_is_not_there_is_named_with_its_remedy() {
        let (home, _) = home(TWO);
        let variables = [("HOME", home.path())];
        let refusal = |global: &mut Global, variables: &[(&str, &Path)]| {
            let error = apply_with(global, variables).unwrap_err();
            assert_eq!(Exit::of(&error), Exit::Usage);
            error.to_string()
        };
        let unknown = refusal(&mut named("tset"), &variables);
        assert!(
            unknown.contains("profiles.yaml: profiles: there is no profile \"tset\"; did you mean test?"),
            "{unknown}"
        );
        let absent = [("HOME", Path::new("/nonexistent"))];
        let nothing = refusal(&mut named("prod"), &absent);
        assert!(
            nothing.starts_with("/nonexistent/.config/hsmctl/profiles.yaml: ")
                && nothing.contains("--profiles"),
            "{nothing}"
        );
        let by_variable = refusal(&mut Global::default(), &[(PROFILES, Path::new("/nonexistent"))]);
        assert!(by_variable.contains("HSMCTL_PROFILES names it"), "{by_variable}");
        // Nobody named a profile, or its certificate goes before it.
        apply_with(&mut Global::default(), &absent).unwrap();
        let mut own = Global {
            cert: Some("own.crt".into()),
            key: Some("own.key".into()),
            ..named("prod")
        };
        apply_with(&mut own, &absent).unwrap();
        // A profile that says nothing of a certificate leaves that to others.
        let mut global = named("nodes-only");
        apply_with(&mut global, &variables).unwrap();
        let error = Profile::resolve(&global).unwrap_err().to_string();
        assert!(error.contains("no certificate for profile nodes-only"), "{error}");
    }
}
