//! hsmctl as operators and version 1's scripts expect it: formats, dry runs, names, what is asked and what is not.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster_tests::{Playground, binary, until};
use serde_json::Value;

use crate::common::{json, softhsm_conf};

/// From a node's start to its first report.
const COUNTED_WITHIN: Duration = Duration::from_secs(60);

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A link to hsmctl under another name.
pub(crate) fn called(scratch: &Path, name: &str) -> Result<PathBuf> {
    let folder = scratch.join("names");
    std::fs::create_dir_all(&folder)?;
    let link = folder.join(name);
    if !link.exists() {
        symlink(binary("hsmctl")?, &link)?;
    }
    Ok(link)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_answer_and_every_failure_comes_as_yaml_too() -> Result<()> {
    let cluster = Playground::start(1).await?;
    for (args, line) in [
        (&["cluster", "status"][..], "cluster_name: playground"),
        (&["cluster", "members"], "members:"),
        (&["list-kek"], "- context: exchange-key"),
        (&["rotation-status"], "contexts:"),
        (&["whoami"], "cn: admin"),
        (&["rotate", "exchange-key"], "version: 2"),
    ] {
        let text = String::from_utf8(cluster.hsmctl(&[args, &["-o", "yaml"]].concat()).await?.ok()?)?;
        ensure!(
            text.lines().any(|have| have.trim_start() == line),
            "{line} is not a line of\n{text}"
        );
        ensure!(!text.starts_with('{'), "that is JSON: {text}");
    }
    let failed = cluster.hsmctl(&["rotate", "no-such", "-o", "yaml"]).await?;
    ensure!(
        failed.code == Some(4) && failed.stderr.lines().any(|line| line == "code: not_found"),
        "{failed:?}"
    );
    // A wait below the nodes' minimum, a day unless they are configured otherwise, is refused, and nothing is done.
    let version = "exchange-key/v1";
    let hasty = [
        "key",
        "destroy",
        version,
        "--wait",
        "1h",
        "--override",
        "--confirm",
        version,
    ];
    let refused = cluster.hsmctl(&hasty).await?;
    ensure!(
        refused.code == Some(2) && refused.stderr.contains("invalid_argument"),
        "{refused:?}"
    );
    let shown = cluster.hsmctl(&["key", "show", version, "-o", "json"]).await?;
    assert_eq!(json(&shown.ok()?)?["state"], "decrypt_only");
    // A plaintext comes in a buffer that is wiped: JSON, which is YAML too.
    let encrypt = ["encrypt", "--context", "exchange-key", "-o", "yaml"];
    let sealed = String::from_utf8(cluster.hsmctl_as("trading-1", &encrypt, b"hello").await?.ok()?)?;
    let sealed = sealed
        .lines()
        .find_map(|line| line.strip_prefix("ciphertext: "))
        .context("no ciphertext")?
        .trim_matches(|c: char| c == '"' || c == '\'')
        .to_owned();
    let decrypt = ["decrypt", "--context", "exchange-key", "-o", "yaml"];
    let opened = cluster
        .hsmctl_as("trading-1", &decrypt, sealed.as_bytes())
        .await?
        .ok()?;
    assert_eq!(json(&opened)?["plaintext"], "aGVsbG8=");
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dry_run_changes_nothing_and_ends_as_the_command_would() -> Result<()> {
    let cluster = Playground::start(1).await?;
    let keys = async || -> Result<Value> { json(&cluster.hsmctl(&["list-kek", "-o", "json"]).await?.ok()?) };
    let before = keys().await?;
    for (args, word) in [
        (
            &["create-kek", "--context", "exchange-key"][..],
            "version 2 of exchange-key",
        ),
        (&["create-kek", "--context", "order-key"], "order-key"),
        (&["rotate", "2fa"], "version 2 of 2fa"),
        (&["cluster", "token", "--node", "hsm-node-9"], "hsm-node-9"),
        (&["slot", "unlock", "--slot", "2fa"], "is open"),
    ] {
        let answer = json(
            &cluster
                .hsmctl(&[args, &["--dry-run", "-o", "json"]].concat())
                .await?
                .ok()?,
        )?;
        let would = answer["would"].as_str().context("no sentence")?;
        ensure!(
            answer["dry_run"] == true && would.contains(word),
            "{args:?}: {answer}"
        );
        let text = String::from_utf8(cluster.hsmctl(&[args, &["--dry-run"]].concat()).await?.ok()?)?;
        ensure!(text.ends_with("dry run: nothing was changed\n"), "{text}");
    }
    for (profile, args, code) in [
        ("auditor", &["rotate", "exchange-key"][..], 3),
        ("admin", &["rotate", "no-such"], 4),
        (
            "admin",
            &["create-kek", "--context", "exchange-key", "--version", "1"],
            4,
        ),
        (
            "admin",
            &["create-kek", "--context", "exchange-key", "--version", "7"],
            2,
        ),
        (
            "admin",
            &["create-kek", "--context", "exchange-key", "--size", "128"],
            2,
        ),
        ("admin", &["cluster", "init"], 4),
        ("admin", &["slot", "unlock", "--slot", "3fa"], 4),
    ] {
        let foreseen = cluster
            .hsmctl_as(profile, &[args, &["--dry-run"]].concat(), &[])
            .await?;
        ensure!(
            foreseen.code == Some(code) && foreseen.stderr.contains("would be refused"),
            "{args:?}: {foreseen:?}"
        );
        // So says the node.
        let refused = cluster.hsmctl_as(profile, args, &[]).await?;
        assert_eq!(refused.code, Some(code), "{args:?}: {refused:?}");
    }
    assert_eq!(keys().await?, before);
    cluster.passed();
    Ok(())
}

/// A founder and a joiner that are only looked at.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dry_run_of_founding_and_joining_leaves_the_nodes_alone() -> Result<()> {
    let cluster = Playground::builder().nodes(2).unformed().start().await?;
    let endpoint = |number: u32| cluster.node(number).endpoint();
    let founding = ["cluster", "init", "--endpoint", &endpoint(1), "--dry-run"];
    let text = String::from_utf8(cluster.hsmctl(&founding).await?.ok()?)?;
    ensure!(
        text.contains("would make the cluster playground of hsm-node-1"),
        "{text}"
    );
    ensure!(
        cluster
            .status(1)
            .await
            .context("no status")?
            .cluster_id
            .is_empty(),
        "it was founded"
    );
    cluster.client_on("admin", 1)?.cluster_init().await?;

    // Printed as YAML, it is read like the JSON.
    let token = ["cluster", "token", "--endpoint", &endpoint(1), "-o", "yaml"];
    let token = cluster.hsmctl(&token).await?.ok()?;
    let file = cluster.scratch().join("join.yaml");
    std::fs::write(&file, &token)?;
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    let leader = format!("127.0.0.1:{}", cluster.node(1).cluster_port);
    let join = [
        "cluster",
        "join",
        "--endpoint",
        &endpoint(2),
        "--leader",
        &leader,
        "--token-file",
        file.to_str().context("folder is not UTF-8")?,
    ];
    let text = String::from_utf8(
        cluster
            .hsmctl(&[&join[..], &["--dry-run"]].concat())
            .await?
            .ok()?,
    )?;
    ensure!(
        text.contains("would have hsm-node-2 join") && text.contains("not checked: the token"),
        "{text}"
    );
    ensure!(
        cluster
            .status(2)
            .await
            .context("no status")?
            .cluster_id
            .is_empty(),
        "it has joined"
    );
    // Nobody is asked: then somebody has to have said yes.
    let unasked = cluster.hsmctl(&[&join[..], &["--no-input"]].concat()).await?;
    ensure!(
        unasked.code == Some(2) && unasked.stderr.contains("--no-input") && unasked.stderr.contains("--yes"),
        "{unasked:?}"
    );
    // The token is as good as before.
    cluster.hsmctl(&[&join[..], &["--yes"]].concat()).await?.ok()?;
    let again = cluster.hsmctl(&[&join[..], &["--dry-run"]].concat()).await?;
    ensure!(again.code == Some(4), "{again:?}");
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn version_1s_verbs_and_configuration_work_under_its_name() -> Result<()> {
    let cluster = Playground::start(1).await?;
    let scratch = cluster.scratch();
    let hsm_admin = called(scratch, "hsm-admin")?;
    let clients = cluster.dir().join("pki/clients");
    let config = scratch.join("v1.yaml");
    let text = format!(
        "server:\n  port: \"{}\"\n  tls: {{ca_path: {}}}\nhsm: {{slot_id: hsm-token, pin: 1234-planted}}\n",
        cluster.node(1).api_port,
        cluster.dir().join("pki/ca.crt").display()
    );
    std::fs::write(&config, text)?;
    // As a script of version 1 has it; the certificate is all that is new.
    let run = |args: &[&str]| -> Result<Output> {
        let output = Command::new(&hsm_admin)
            .arg("-config")
            .arg(&config)
            .args(args)
            .env_remove("HSMCTL_ENDPOINTS")
            .env_remove("HSMCTL_CA")
            .env_remove("HSMCTL_PKI")
            .env("HSMCTL_CERT", clients.join("admin.crt"))
            .env("HSMCTL_KEY", clients.join("admin.key"))
            .stdin(Stdio::null())
            .output()?;
        ensure!(!said(&output).contains("planted"), "{}", said(&output));
        Ok(output)
    };
    let listed = run(&["list-kek", "-verbose"])?;
    ensure!(
        listed.status.success() && said(&listed).contains("server.port"),
        "{}",
        said(&listed)
    );
    // And with nothing but the variables that its service had; the node's certificate is one that has a role.
    let by_variables = Command::new(&hsm_admin)
        .arg("list-kek")
        .env_remove("HSMCTL_ENDPOINTS")
        .env_remove("HSMCTL_CA")
        .env_remove("HSMCTL_PKI")
        .env_remove("HSMCTL_PROFILE")
        .env("HSM_SERVER_PORT", cluster.node(1).api_port.to_string())
        .env("HSM_SERVER_CA", cluster.dir().join("pki/ca.crt"))
        .env("HSM_SERVER_CERT", clients.join("admin.crt"))
        .env("HSM_SERVER_KEY", clients.join("admin.key"))
        .stdin(Stdio::null())
        .output()?;
    ensure!(
        by_variables.status.success() && said(&by_variables).contains("HSM_SERVER_CERT"),
        "{}",
        said(&by_variables)
    );
    let made = run(&[
        "create-kek",
        "-label",
        "kek-order-key-v1",
        "-context",
        "order-key",
    ])?;
    ensure!(made.status.success(), "{}", said(&made));

    let file = scratch.join("metadata.yaml");
    let exported = run(&["export-metadata", "--output", file.to_str().context("not UTF-8")?])?;
    ensure!(
        exported.status.success() && exported.stdout.is_empty(),
        "{}",
        said(&exported)
    );
    let metadata = std::fs::read_to_string(&file)?;
    for line in [
        "rotation:",
        "exchange-key:",
        "current: kek-exchange-key-v1",
        "- label: kek-exchange-key-v1",
    ] {
        ensure!(
            metadata.lines().any(|have| have.trim_start() == line),
            "{line} is not in\n{metadata}"
        );
    }
    let exported = run(&["export-metadata", "-o", "json"])?;
    let exported = json(&exported.stdout)?;
    assert_eq!(exported["rotation"]["order-key"]["versions"][0]["version"], 1);

    let checked = run(&["update-checksums", "--dry-run", "-o", "json"])?;
    ensure!(checked.status.success(), "{}", said(&checked));
    let checked = json(&checked.stdout)?;
    let proven = checked.as_array().context("no list")?;
    ensure!(
        proven.len() == 3 && proven.iter().all(|key| key["proven"] == true),
        "{checked}"
    );
    // What changes something, too; version 1's label is that of its key.
    let rotated = run(&["rotate", "order-key"])?;
    ensure!(
        rotated.status.success() && String::from_utf8_lossy(&rotated.stdout).contains("kek-order-key-v2"),
        "{rotated:?}"
    );
    let cleaned = run(&["cleanup-old-versions", "-force", "-o", "json"])?;
    ensure!(cleaned.status.success(), "{}", said(&cleaned));
    let cleaned = json(&cleaned.stdout)?;
    let listed = cleaned["versions"].as_array().context("no list")?;
    // It was retired a moment ago: version 1 would have deleted it some day by its age alone.
    ensure!(
        cleaned["dry_run"] == false
            && listed
                .iter()
                .any(|held| held["key_id"] == "kek-order-key-v1" && held["disabled"] == false),
        "{cleaned}"
    );
    let state = async || -> Result<Value> {
        let shown = ["key", "show", "order-key/v1", "-o", "json"];
        Ok(json(&cluster.hsmctl(&shown).await?.ok()?)?["state"].clone())
    };
    assert_eq!(state().await?, "decrypt_only");
    let delete = ["delete-kek", "-label", "kek-order-key-v1", "-confirm"];
    // A node that has just started has to have told first that it counts uses.
    let deleted = until("it is deleted", COUNTED_WITHIN, async || {
        run(&delete).ok().filter(|deleted| deleted.status.success())
    })
    .await
    .with_context(|| format!("{:?}", run(&delete)))?;
    ensure!(
        said(&deleted).contains("undo-destroy order-key/v1"),
        "{deleted:?}"
    );
    assert_eq!(state().await?, "destroy_scheduled");
    let again = run(&delete)?;
    ensure!(again.status.code() == Some(1), "{again:?}");
    let wrong = run(&["rotate", "no-such"])?;
    ensure!(
        wrong.status.code() == Some(1) && said(&wrong).contains("hsm-admin: "),
        "{}",
        said(&wrong)
    );
    cluster.passed();
    Ok(())
}

#[test]
fn completions_and_manual_go_by_the_name_that_was_called() -> Result<()> {
    let folder = tempfile::Builder::new().prefix("hsm-names-").tempdir()?;
    for name in ["hsmctl", "hsm-admin", "create-kek"] {
        let program = called(folder.path(), name)?;
        let run = |args: &[&str]| Command::new(&program).args(args).stdin(Stdio::null()).output();
        let script = run(&["completions", "bash"])?;
        let text = String::from_utf8_lossy(&script.stdout);
        ensure!(
            script.status.success()
                && text.contains(&format!("default {name}\n"))
                && script.stderr.is_empty(),
            "{name}: {} {text}",
            said(&script)
        );
        let page = run(&["man"])?;
        let text = String::from_utf8_lossy(&page.stdout);
        ensure!(
            page.status.success() && text.contains(&format!(".TH {name} 1")),
            "{name}: {text}"
        );
        let help = run(&["--help"])?;
        let usage = if name == "hsm-admin" {
            "Usage: hsm-admin"
        } else {
            "Usage: hsmctl"
        };
        ensure!(String::from_utf8_lossy(&help.stdout).contains(usage), "{name}");
    }
    Ok(())
}

/// What SoftHSM and the script need of the environment.
fn init_hsm(folder: &Path, labels: &[&str]) -> Result<Output> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let bin = binary("hsmctl")?;
    Command::new(root.join("scripts/init-hsm.sh"))
        .arg("--pins")
        .arg(folder.join("pins"))
        .args(labels)
        .env("SOFTHSM2_CONF", folder.join("softhsm2.conf"))
        .env("HSM_BIN_DIR", bin.parent().context("no folder")?)
        .env_remove("HSM_PKCS11_LIB")
        .stdin(Stdio::null())
        .output()
        .context("scripts/init-hsm.sh")
}

#[test]
fn a_machine_is_set_up_once_however_often_the_script_runs() -> Result<()> {
    let folder = tempfile::Builder::new().prefix("hsm-init-").tempdir()?;
    let at = |name: &str| folder.path().join(name);
    std::fs::create_dir(at("tokens"))?;
    softhsm_conf(&at("softhsm2.conf"), &at("tokens"))?;
    let looked = init_hsm(folder.path(), &["--dry-run", "slot-a"])?;
    ensure!(looked.status.success(), "{}", said(&looked));
    ensure!(!at("pins").exists(), "a dry run made a folder");

    let first = init_hsm(folder.path(), &["slot-a"])?;
    ensure!(first.status.success(), "{}", said(&first));
    let pin = std::fs::read_to_string(at("pins/slot-a.pin"))?;
    let second = init_hsm(folder.path(), &["slot-a", "slot-b"])?;
    ensure!(second.status.success(), "{}", said(&second));
    assert_eq!(
        std::fs::read_to_string(at("pins/slot-a.pin"))?,
        pin,
        "a PIN was replaced"
    );
    for output in [&first, &second] {
        let all = format!("{}{}", String::from_utf8_lossy(&output.stdout), said(output));
        ensure!(!all.contains(pin.trim()), "the PIN was printed");
    }
    ensure!(
        String::from_utf8_lossy(&second.stdout).contains("was there"),
        "{second:?}"
    );
    ensure!(at("pins/slot-b.pin").is_file() && at("pins/slot-b.so-pin").is_file());
    // Without its PIN's file a token is nobody's: said, and left alone.
    std::fs::remove_file(at("pins/slot-b.pin"))?;
    let lost = init_hsm(folder.path(), &["slot-b"])?;
    ensure!(
        !lost.status.success() && said(&lost).contains("slot-b.pin is not"),
        "{}",
        said(&lost)
    );
    Ok(())
}
