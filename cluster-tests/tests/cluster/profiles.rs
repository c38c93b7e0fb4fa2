//! hsmctl told by a profile, by variables and by options which cluster to ask, as whom and how: two clusters with a CA
//! each, so that whoever is asked by mistake does not answer.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cluster_tests::{Playground, binary};
use serde_json::Value;

/// Far below the 90 s that founding a cluster is given where nobody says a time.
const WELL_BEFORE: Duration = Duration::from_secs(60);

/// Names and values of variables.
type Variables = &'static [(&'static str, &'static str)];

fn json(output: &Output) -> Result<Value> {
    ensure!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).with_context(|| format!("{output:?}"))
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs hsmctl with these variables and no others of its own; `config` is where its user's files are.
fn hsmctl(config: &Path, variables: &[(&str, &str)], args: &[&str]) -> Result<Output> {
    let mut command = Command::new(binary("hsmctl")?);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("HSM") {
            command.env_remove(name);
        }
    }
    command
        .args(args)
        .env("XDG_CONFIG_HOME", config)
        .envs(variables.iter().copied())
        .stdin(Stdio::null())
        .output()
        .context("hsmctl")
}

/// A profile of this cluster, as this client, with paths relative to `folder` of the CA and whole ones of the rest.
fn profile(cluster: &Playground, client: &str, folder: &Path, ca: &str) -> Result<String> {
    let pki = cluster.dir().join("pki");
    std::fs::copy(pki.join("ca.crt"), folder.join(ca))?;
    let clients = pki.join("clients");
    let text = format!(
        "endpoints: [\"{}\"], ca: {ca}, cert: \"{}\", key: \"{}\"",
        cluster.node(1).endpoint(),
        clients.join(format!("{client}.crt")).display(),
        clients.join(format!("{client}.key")).display()
    );
    Ok(text)
}

async fn id_of(cluster: &Playground) -> Result<Value> {
    let status = cluster.status(1).await.context("no status")?;
    ensure!(!status.cluster_id.is_empty(), "it was not founded");
    Ok(Value::from(status.cluster_id))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_profile_says_which_cluster_is_asked_and_as_whom() -> Result<()> {
    let (one, other) = (Playground::start(1).await?, Playground::start(1).await?);
    let (first, second) = (id_of(&one).await?, id_of(&other).await?);
    ensure!(first != second, "one cluster: {first}");
    let config = one.scratch().join("config");
    let folder = config.join("hsmctl");
    std::fs::create_dir_all(&folder)?;
    let file = folder.join("profiles.yaml");
    let text = format!(
        "default: one\nprofiles:\n  one: {{{}}}\n  other: {{{}, output: json, timeout: 20}}\n",
        profile(&one, "admin", &folder, "one.crt")?,
        profile(&other, "auditor", &folder, "other.crt")?
    );
    std::fs::write(&file, &text)?;
    let run = |variables: &[(&str, &str)], args: &[&str]| hsmctl(&config, variables, args);
    let status = ["cluster", "status"];
    let asked = |variables: &[(&str, &str)], options: &[&str]| -> Result<Value> {
        let status = json(&run(variables, &[&status[..], options].concat())?)?;
        Ok(status["cluster_id"].clone())
    };

    // By default, by option, by variable; the option goes first.
    assert_eq!(asked(&[], &["-o", "json"])?, first);
    assert_eq!(asked(&[], &["--profile", "other"])?, second);
    assert_eq!(asked(&[("HSMCTL_PROFILE", "other")], &[])?, second);
    let by_variable = [("HSMCTL_PROFILE", "other")];
    assert_eq!(asked(&by_variable, &["--profile", "one", "-o", "json"])?, first);
    let who = json(&run(&by_variable, &["whoami"])?)?;
    assert_eq!(who["cn"], "auditor");

    // A variable goes before the profile, each by itself: the nodes are the other cluster's now, the CA is not.
    let endpoint = one.node(1).endpoint();
    let mixed = [
        ("HSMCTL_PROFILE", "other"),
        ("HSMCTL_ENDPOINTS", endpoint.as_str()),
    ];
    let refused = run(&mixed, &status)?;
    ensure!(
        refused.status.code() == Some(3) && said(&refused).contains("other.crt"),
        "{refused:?}"
    );
    let ca = one.dir().join("pki/ca.crt");
    let ca = ca.to_str().context("folder is not UTF-8")?;
    let admin = |end: &str| one.dir().join("pki/clients/admin").with_extension(end);
    let (cert, key) = (admin("crt"), admin("key"));
    let mut whole = mixed.to_vec();
    whole.extend([
        ("HSMCTL_CERT", cert.to_str().context("folder is not UTF-8")?),
        ("HSMCTL_KEY", key.to_str().context("folder is not UTF-8")?),
    ]);
    assert_eq!(asked(&whole, &["--ca", ca])?, first);

    // How it prints and how long it waits: option, variable, profile.
    let formats: [(Variables, &[&str], &str); 4] = [
        (&[], &[], "{"),
        (&[("HSMCTL_OUTPUT", "yaml")], &[], "cluster_id: "),
        (&[("HSMCTL_OUTPUT", "yaml")], &["-o", "table"], "cluster  "),
        (&[("HSMCTL_OUTPUT", "yaml")], &["-o", "json"], "{"),
    ];
    for (variables, options, begins) in formats {
        let args = [&status[..], &["--profile", "other"], options].concat();
        let printed = run(variables, &args)?;
        let text = String::from_utf8_lossy(&printed.stdout);
        ensure!(
            printed.status.success() && text.starts_with(begins),
            "{variables:?} {options:?}: {printed:?}"
        );
    }
    let show = ["profile", "show", "--profile", "other"];
    let times: [(Variables, &[&str], u64); 3] = [
        (&[], &[], 20),
        (&[("HSMCTL_TIMEOUT", "7")], &[], 7),
        (&[("HSMCTL_TIMEOUT", "7")], &["--timeout", "9"], 9),
    ];
    for (variables, options, seconds) in times {
        let shown = json(&run(variables, &[&show[..], options].concat())?)?;
        assert_eq!(shown["timeout_seconds"], seconds, "{shown}");
        assert_eq!(
            shown["ca"],
            folder.join("other.crt").to_str().context("not UTF-8")?
        );
    }
    // Nobody listens there.
    let nobody = [
        ("HSMCTL_TIMEOUT", "1"),
        ("HSMCTL_ENDPOINTS", "https://127.0.0.1:1"),
    ];
    let began = Instant::now();
    let given_up = run(&nobody, &["cluster", "init"])?;
    ensure!(
        !given_up.status.success() && began.elapsed() < WELL_BEFORE,
        "{given_up:?}"
    );
    let wrong = run(&[("HSMCTL_TIMEOUT", "0")], &status)?;
    ensure!(
        wrong.status.code() == Some(2) && said(&wrong).contains("--timeout"),
        "{wrong:?}"
    );

    // Without the variable the question fails for want of a terminal, if there is none; with it nobody is asked.
    let destroy = ["key", "destroy", "exchange-key/v1"];
    let unasked = run(&[("HSMCTL_NO_INPUT", "1")], &destroy)?;
    ensure!(
        unasked.status.code() == Some(2) && said(&unasked).contains("--no-input"),
        "{unasked:?}"
    );

    let listed = json(&run(&[], &["profile", "list", "-o", "json"])?)?;
    ensure!(
        listed[0]["profile"] == "one" && listed[0]["default"] == true && listed[1]["profile"] == "other",
        "{listed}"
    );

    // A playground's folder goes before the file, whatever that says; and what is misspelt there is refused.
    std::fs::write(&file, text.replacen("output:", "ouput:", 1))?;
    let refused = run(&[], &status)?;
    ensure!(
        refused.status.code() == Some(2)
            && said(&refused)
                .contains("profiles.yaml: profiles.other.ouput: unknown key; did you mean output?"),
        "{refused:?}"
    );
    let pki = one.dir().join("pki");
    let pki = pki.to_str().context("folder is not UTF-8")?;
    let playground = [
        ("HSMCTL_ENDPOINTS", endpoint.as_str()),
        ("HSMCTL_PKI", pki),
        ("HSMCTL_CA", ca),
        ("HSMCTL_PROFILE", "trading-1"),
    ];
    let who = json(&run(&playground, &["whoami", "-o", "json"])?)?;
    assert_eq!(who["cn"], "trading-1");
    one.passed();
    other.passed();
    Ok(())
}
