//! Tokens, looked at from outside with another program: what keys may do, and whose a token is.

use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster_tests::{Node, Playground, until};
use hsm_api::ErrorCode;
use hsm_api::admin::SlotState;

use crate::common::{CONTEXT, formed_with, seal};

const MODULE: &str = "/usr/lib/softhsm/libsofthsm2.so";
/// An object that another program makes.
const STRANGER: &str = "made-by-another-program";

/// One object as `pkcs11-tool --list-objects` shows it.
#[derive(Debug, Default)]
struct Object {
    kind: String,
    label: String,
    usage: Vec<String>,
    access: Vec<String>,
}

fn pkcs11_tool(cluster: &Playground, node: &Node, slot: &str, args: &[&str]) -> Result<Output> {
    let pin = std::fs::read_to_string(cluster.dir().join(format!("secrets/{slot}.pin")))?;
    Command::new("pkcs11-tool")
        .args([
            "--module",
            MODULE,
            "--token-label",
            &format!("slot-{slot}"),
            "--login",
            "--pin",
            "env:TEST_PIN",
        ])
        .args(args)
        .env("SOFTHSM2_CONF", node.dir.join("softhsm2.conf"))
        .env("TEST_PIN", pin.trim())
        .output()
        .context("pkcs11-tool: install opensc")
}

fn parse(text: &str) -> Vec<Object> {
    let mut objects: Vec<Object> = Vec::new();
    for line in text.lines() {
        if let Some((kind, _)) = line.split_once("Object")
            && !line.starts_with(char::is_whitespace)
        {
            objects.push(Object {
                kind: kind.trim().to_owned(),
                ..Object::default()
            });
            continue;
        }
        let Some(object) = objects.last_mut() else {
            continue;
        };
        let Some((name, value)) = line.trim().split_once(':') else {
            continue;
        };
        let words = || {
            value
                .split(',')
                .map(|word| word.trim().to_owned())
                .filter(|word| !word.is_empty())
                .collect()
        };
        match name.trim() {
            "label" => object.label = value.trim().trim_matches('\'').to_owned(),
            "Usage" => object.usage = words(),
            "Access" => object.access = words(),
            _ => {}
        }
    }
    objects
}

fn list(cluster: &Playground, node: &Node, slot: &str) -> Result<Vec<Object>> {
    let output = pkcs11_tool(cluster, node, slot, &["--list-objects"])?;
    ensure!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(parse(&String::from_utf8_lossy(&output.stdout)))
}

fn is(found: &[String], expected: &[&str]) -> bool {
    found.iter().all(|word| expected.contains(&word.as_str()))
        && expected.iter().all(|word| found.iter().any(|f| f == word))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_key_may_do_more_than_it_has_to() -> Result<()> {
    let cluster = Playground::start(3).await?;
    cluster.client("admin")?.rotate(CONTEXT, None).await?;
    cluster.dev("down", &[]).await?;
    for node in cluster.nodes() {
        for (slot, keks) in [("exchange", 2), ("2fa", 1)] {
            let objects = list(&cluster, &node, slot)?;
            let whence = format!("{}, slot {slot}", node.id());
            let (mut of_keks, mut transport, mut private) = (0, 0, 0);
            for object in &objects {
                let forbidden = ["sign", "verify", "derive", "signRecover", "verifyRecover"];
                ensure!(
                    object
                        .usage
                        .iter()
                        .all(|usage| !forbidden.contains(&usage.as_str())),
                    "{whence}: {object:?}"
                );
                match object.kind.as_str() {
                    "Secret Key" if object.label.starts_with("kek-") => {
                        of_keks += 1;
                        ensure!(is(&object.usage, &["encrypt", "decrypt"]), "{whence}: {object:?}");
                        ensure!(
                            object.access.iter().any(|a| a == "sensitive"),
                            "{whence}: {object:?}"
                        );
                        ensure!(
                            object.access.iter().all(|a| a != "extractable"),
                            "{whence}: {object:?}"
                        );
                    }
                    "Secret Key" => {
                        transport += 1;
                        ensure!(is(&object.usage, &["wrap", "unwrap"]), "{whence}: {object:?}");
                        // It has to reach joiners. And the program does list the word where it applies: that
                        // it is missing above says something.
                        for word in ["sensitive", "extractable"] {
                            ensure!(
                                object.access.iter().any(|a| a == word),
                                "{whence}: not {word}: {object:?}"
                            );
                        }
                    }
                    "Private Key" => {
                        private += 1;
                        ensure!(is(&object.usage, &["unwrap"]), "{whence}: {object:?}");
                        ensure!(
                            object.access.iter().any(|a| a == "sensitive"),
                            "{whence}: {object:?}"
                        );
                    }
                    _ => {}
                }
            }
            ensure!(of_keks == keks, "{whence}: {of_keks} KEKs in {objects:?}");
            ensure!(
                transport == 1,
                "{whence}: {transport} transport keys in {objects:?}"
            );
            ensure!(private == 1, "{whence}: {private} node keys in {objects:?}");
        }
    }
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_in_use_is_not_initialised_and_one_with_keys_only_on_purpose() -> Result<()> {
    let cluster = Playground::start(1).await?;
    let node = cluster.node(1);
    let sealed = seal(&cluster.client("trading-1")?, CONTEXT, b"kept").await?;
    let secrets = cluster.dir().join("secrets");
    let init = |more: &[&str]| -> Result<Output> {
        Ok(Command::new(cluster_tests::binary("hsmctl")?)
            .args([
                "slot",
                "init",
                "--label",
                "slot-exchange",
                "--module",
                MODULE,
                "--pin-file",
            ])
            .arg(secrets.join("exchange.pin"))
            .arg("--so-pin-file")
            .arg(secrets.join("exchange.so-pin"))
            .args(more)
            .env("SOFTHSM2_CONF", node.dir.join("softhsm2.conf"))
            .output()?)
    };
    let said = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();
    let destroy = ["--destroy-existing", "--confirm-label", "slot-exchange"];

    // While the node owns it, not even on purpose.
    let output = init(&[])?;
    ensure!(
        !output.status.success() && said(&output).contains("--destroy-existing"),
        "{}",
        said(&output)
    );
    let output = init(&destroy)?;
    ensure!(
        !output.status.success() && said(&output).contains("owned"),
        "{}",
        said(&output)
    );
    crate::common::open(&cluster.client("trading-1")?, CONTEXT, &sealed).await?;

    // Stopped, only with the label typed again.
    cluster.dev("down", &[]).await?;
    let output = init(&[])?;
    ensure!(
        !output.status.success() && said(&output).contains("initialised already"),
        "{}",
        said(&output)
    );
    let output = init(&["--destroy-existing", "--no-input"])?;
    ensure!(output.status.code() == Some(2), "{output:?}");
    let output = init(&["--destroy-existing", "--confirm-label", "slot-exchagne"])?;
    ensure!(output.status.code() == Some(2), "{output:?}");
    ensure!(
        list(&cluster, &node, "exchange")?
            .iter()
            .any(|o| o.label.starts_with("kek-")),
        "keys are gone"
    );
    let output = init(&destroy)?;
    ensure!(output.status.success(), "{}", said(&output));
    let left = list(&cluster, &node, "exchange")?;
    ensure!(
        left.len() == 1 && left.iter().all(|object| object.label == "hsm-node-key"),
        "more than its new node key is in a token that was made anew"
    );
    cluster.passed();
    Ok(())
}

/// An object that is put into a token shows in no call and in no entry of the log: only the next full comparison finds it.
/// Two nodes have all in common but the period.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_is_compared_with_the_state_as_often_as_the_configuration_says() -> Result<()> {
    let cluster = formed_with(Playground::builder().nodes(2), |config| {
        let is_first = config.contains("node_id: hsm-node-1\n");
        let period = format!("interval_seconds: {}", if is_first { 1 } else { 86_400 });
        config.replace("interval_seconds: 60", &period)
    })
    .await?;
    let (often, daily) = (cluster.node(1), cluster.node(2));
    let make = [
        "--keygen",
        "--key-type",
        "AES:32",
        "--label",
        STRANGER,
        "--id",
        "00ff",
    ];
    let before = daily.log().len();
    // Where it must not be found, it is there first.
    for node in [&daily, &often] {
        let made = pkcs11_tool(&cluster, node, "exchange", &make)?;
        let said = String::from_utf8_lossy(&made.stderr).into_owned();
        ensure!(made.status.success(), "{}: {said}", node.id());
    }
    // Well below the default of 60 s.
    until("a comparison", Duration::from_secs(30), async || {
        often.log().contains(STRANGER).then_some(())
    })
    .await?;
    let log = daily.log();
    let log = log.get(before..).unwrap_or_default();
    // A machine that stands still may take a slot out of service, and it is compared when it is back.
    let was_interrupted = log.contains("slot serves again");
    ensure!(
        !log.contains(STRANGER) || was_interrupted,
        "a node that compares once a day has found it"
    );
    // It is left alone.
    let objects = list(&cluster, &often, "exchange")?;
    ensure!(
        objects.iter().any(|object| object.label == STRANGER),
        "{objects:?}"
    );
    cluster.passed();
    Ok(())
}

/// A node that has lost its token is a voter without it, and the others serve.
pub(crate) async fn a_lost_token_costs_no_voter() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let leader = cluster.leader().await?;
    let node = cluster.others(leader.node)[0].clone();
    node.kill().await?;
    let tokens = node.dir.join("tokens");
    std::fs::rename(&tokens, node.dir.join("tokens-taken-away"))?;
    std::fs::create_dir(&tokens)?;
    cluster.start_node(node.number).await?;
    // It takes part: with another node gone, two of three still change things.
    let third = cluster
        .nodes()
        .into_iter()
        .find(|other| other.number != node.number && other.number != leader.node)
        .context("no third node")?;
    cluster_tests::until("its vote", std::time::Duration::from_secs(60), async || {
        let status = cluster.status(node.number).await?;
        status.leader.map(drop)
    })
    .await?;
    // A member that answers is not left out of a rotation; one that can hold no key would only have it abandoned.
    let rotator = cluster.client_on("admin", leader.node)?;
    cluster_tests::until("its report", std::time::Duration::from_secs(60), async || {
        let members = rotator.members().await.ok()?.into_body().members;
        let own = members.into_iter().find(|member| member.node_id == node.id())?;
        let failed = |slot: &hsm_api::admin::MemberSlot| slot.state != SlotState::Ready;
        (own.slots.len() == 2 && own.slots.iter().all(failed)).then_some(())
    })
    .await?;
    let error = rotator
        .rotate(CONTEXT, None)
        .await
        .err()
        .context("it was rotated")?;
    ensure!(error.code() == Some(ErrorCode::SlotFailed), "{error}");
    let said = error.to_string();
    ensure!(
        said.contains(&node.id()) && said.contains("nothing was made"),
        "{said}"
    );
    third.kill().await?;
    let request = hsm_api::admin::JoinTokenRequest {
        ttl_seconds: Some(60),
        node_id: None,
    };
    let admin = cluster.client_on("admin", node.number)?;
    let admin = admin.with_retry(hsm_api::client::Retry::Until(std::time::Duration::from_secs(60)));
    admin.create_join_token(&request).await?;
    // Others serve the slots that it does not: out of the balancer.
    ensure!(!node.is_ready().await, "a node without tokens is ready");
    // Stopped, it is left out, and no number was used up.
    cluster.start_node(third.number).await?;
    third.wait_ready(std::time::Duration::from_secs(60)).await?;
    node.kill().await?;
    let made = cluster_tests::until("a rotation", std::time::Duration::from_secs(60), async || {
        match rotator.rotate(CONTEXT, None).await {
            // Until it has been silent for long enough.
            Err(error) if error.code() == Some(ErrorCode::SlotFailed) => None,
            made => Some(made),
        }
    })
    .await??;
    ensure!(made.version == 2, "{made:?}");
    cluster.passed();
    Ok(())
}

#[test]
fn a_listing_is_read_as_it_is_printed() {
    let text = "Using slot 0 with a present token (0x1)\n\
                Secret Key Object; AES length 32\n  label:      kek-2fa-v1\n  ID:         00\n  \
                Usage:      encrypt, decrypt\n  Access:     sensitive\n\
                Private Key Object; RSA \n  label:      x\n  Usage:      unwrap\n  Access:     sensitive, local\n";
    let objects = parse(text);
    assert_eq!(objects.len(), 2);
    assert_eq!(
        (objects[0].kind.as_str(), objects[0].label.as_str()),
        ("Secret Key", "kek-2fa-v1")
    );
    assert!(is(&objects[0].usage, &["decrypt", "encrypt"]) && !is(&objects[0].usage, &["encrypt"]));
    assert_eq!(objects[1].access, ["sensitive", "local"]);
}
