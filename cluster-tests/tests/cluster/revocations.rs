//! Certificates that are revoked, in every way that there is: on every node, at once, on connections that are open, and
//! until it is taken back.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use cluster_tests::{Identity, Playground, Stalls, until};
use hsm_api::ErrorCode;
use hsm_api::admin::{RevocationMatch, RevokeRequest, UnrevokeRequest};
use rustls_pki_types::pem::PemObject;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::access::{SETTLED, a_change_of_rules_is_too, everywhere, text, write};
use crate::audit::every_change_is_audited_where_it_was_asked_for_and_on_the_leader;
#[cfg(feature = "failpoints")]
use crate::audit::what_a_follower_lets_through_the_leader_refuses;
use crate::common::formed_with;
use crate::open_connections::{are_in_force, no_handshake_is_spared, open_everywhere};

fn serial_hex(who: &Identity) -> Result<String> {
    Ok(hex::encode(who.serial()?))
}

fn by_serial(cluster: &Playground, who: &Identity) -> Result<RevocationMatch> {
    Ok(RevocationMatch {
        serial: Some(serial_hex(who)?),
        issuer: Some(cluster.pki().client_ca_name()),
        ..RevocationMatch::default()
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_revocation_of_each_kind_closes_open_connections_everywhere_and_can_be_taken_back() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let issuer = cluster.pki().client_ca_name();
    let (stalls, mut took) = (Stalls::watch()?, Vec::new());
    for kind in ["cn", "serial", "fingerprint", "certificate", "crl"] {
        let cn = format!("victim-{kind}");
        let victim = cluster.pki().issue(&cn, Some("Trading"))?;
        let bystander = cluster.pki().issue("bystander", Some("Trading"))?;
        let file = match kind {
            "crl" => write(&cluster, "list.pem", cluster.pki().crl(&[&victim])?)?,
            _ => write(&cluster, "victim.pem", &victim.cert)?,
        };
        let file = text(&file)?;
        let (serial, print) = (serial_hex(&victim)?, hex::encode(Sha256::digest(victim.der()?)));
        let named = match kind {
            "cn" => vec!["--cn", &cn],
            "serial" => vec!["--serial", &serial, "--issuer", &issuer],
            "fingerprint" => vec!["--fingerprint", &print],
            "certificate" => vec!["--certificate", file],
            _ => vec!["--crl", file],
        };
        let open = open_everywhere(&cluster, &victim).await?;
        let others = open_everywhere(&cluster, &bystander).await?;
        let revoke = [&["revoke", "--reason", "lost"][..], &named].concat();
        cluster.hsmctl(&revoke).await?.ok().context(kind)?;
        let returned = Instant::now();
        for open in open {
            open.until_closed().await.context(kind)?;
        }
        took.push(stalls.running_since(returned));
        everywhere(&cluster, &victim, Some(ErrorCode::CertificateRevoked)).await?;
        for mut open in others {
            ensure!(
                open.encrypt().await == Some(200),
                "{kind}: somebody else was cut off"
            );
        }
        // Doing it twice is doing it once.
        cluster.hsmctl(&revoke).await?.ok().context(kind)?;
        let listed = cluster.hsmctl_as("auditor", &["revocations", "-o", "json"], &[]);
        let listed: Value = serde_json::from_slice(&listed.await?.ok()?)?;
        ensure!(
            listed["revocations"].as_array().map(Vec::len) == Some(1),
            "{kind}: {listed}"
        );
        ensure!(listed["revocations"][0]["reason"] == "lost", "{listed}");

        let named = if kind == "crl" {
            vec!["--serial", &serial, "--issuer", &issuer]
        } else {
            named
        };
        let unrevoke = [&["unrevoke"][..], &named].concat();
        cluster.hsmctl(&unrevoke).await?.ok().context(kind)?;
        everywhere(&cluster, &victim, None).await?;
    }
    are_in_force(took)?;
    every_change_is_audited_where_it_was_asked_for_and_on_the_leader(&cluster).await?;
    #[cfg(feature = "failpoints")]
    what_a_follower_lets_through_the_leader_refuses(&cluster).await?;
    cluster.passed();
    Ok(())
}

/// "revoke returned" to "every node refuses the certificate on a connection that was open", of twenty.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_revocation_is_effective_on_every_node_within_a_second() -> Result<()> {
    const ROUNDS: usize = 20;
    let cluster = Playground::start(3).await?;
    let (stalls, mut took) = (Stalls::watch()?, Vec::new());
    for round in 0..ROUNDS {
        let victim = cluster.pki().issue(&format!("victim-{round}"), Some("Trading"))?;
        let mut busy = tokio::task::JoinSet::new();
        for open in open_everywhere(&cluster, &victim).await? {
            busy.spawn(open.until_refused());
        }
        // Through the leader and through followers.
        let through = cluster.node(u32::try_from(round % 3)? + 1);
        let admin = cluster.client_on("admin", through.number)?;
        let request = RevokeRequest {
            what: Some(by_serial(&cluster, &victim)?),
            certificate: None,
            reason: "measured".to_owned(),
        };
        admin.revoke(&request).await?;
        let returned = Instant::now();
        while let Some(refused) = busy.join_next().await {
            refused?;
        }
        took.push(stalls.running_since(returned));
    }
    are_in_force(took)?;
    a_change_of_rules_is_too(&cluster, &stalls).await?;
    no_handshake_is_spared(&cluster).await?;
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revocation_list_counts_only_with_the_cas_signature() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let victims = ["one", "two"].map(|cn| cluster.pki().issue(cn, Some("Trading")));
    let victims = victims.into_iter().collect::<Result<Vec<_>>>()?;
    let all: Vec<&Identity> = victims.iter().collect();
    let good = cluster.pki().crl(&all)?;
    let foreign = cluster_tests::Pki::foreign_crl(&all)?;
    let revoke = async |name: &str, content: &[u8]| {
        let file = write(&cluster, name, content)?;
        let args = [
            "revoke",
            "--crl",
            text(&file)?,
            "--reason",
            "monthly",
            "-o",
            "json",
        ];
        cluster.hsmctl(&args).await
    };
    let mut altered = der_of(&good)?;
    let middle = altered.len() / 2;
    altered[middle] ^= 1;
    for (name, content, says) in [
        ("foreign.pem", foreign.as_bytes(), "signature"),
        ("altered.der", &altered, "crl: "),
        ("nothing.pem", b"nothing", "crl: "),
    ] {
        let refused = revoke(name, content).await?;
        ensure!(
            refused.code == Some(2) && refused.stderr.contains(says),
            "{name}: {refused:?}"
        );
    }
    for victim in &victims {
        everywhere(&cluster, victim, None).await?;
    }
    let done: Value = serde_json::from_slice(&revoke("good.pem", good.as_bytes()).await?.ok()?)?;
    ensure!(done["added"] == 2 && done["lists"][0]["entries"] == 2, "{done}");
    for victim in &victims {
        everywhere(&cluster, victim, Some(ErrorCode::CertificateRevoked)).await?;
    }
    let again: Value = serde_json::from_slice(&revoke("good.der", &der_of(&good)?).await?.ok()?)?;
    ensure!(again["added"] == 0, "{again}");
    cluster.passed();
    Ok(())
}

fn der_of(crl: &str) -> Result<Vec<u8>> {
    use rustls_pki_types::CertificateRevocationListDer;
    Ok(CertificateRevocationListDer::from_pem_slice(crl.as_bytes())?.to_vec())
}

pub(crate) async fn deleting_the_file_of_revocations_takes_none_back() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = |node: &str| folder.path().join(format!("{node}.yaml"));
    let cluster = formed_with(Playground::builder(), |config| {
        let node = config
            .lines()
            .find_map(|line| line.trim().strip_prefix("node_id: "));
        let own = file(node.unwrap_or_default());
        let lines = format!(
            "acl:\n  revoked_file: {}\n  revoked_check_interval_ms: 100\n",
            own.display()
        );
        // It has to be there at the first start.
        std::fs::write(&own, "revoked:\n  - {cn: trading-2, reason: lost}\n").unwrap();
        config.replacen("acl:\n", &lines, 1)
    })
    .await?;
    let revoked = Some(ErrorCode::CertificateRevoked);
    let second = cluster.pki().identity("trading-2")?;
    everywhere(&cluster, &second, revoked).await?;
    let lost = what_is_written_into_one_nodes_file_is_revoked_on_all(&cluster, file).await?;

    for node in cluster.nodes() {
        let own = file(&node.id());
        if own.exists() {
            std::fs::remove_file(&own)?;
        }
        node.kill().await?;
    }
    // With what it has said before in the state, a file that is gone keeps no node down.
    cluster.up().await?;
    for node in cluster.nodes() {
        // The log is written a moment later.
        until("its word that the file is gone", SETTLED, async || {
            let said = "is not there; what it has said before stays revoked";
            node.log().contains(said).then_some(())
        })
        .await
        .with_context(|| node.id())?;
    }
    for who in [&second, &lost] {
        everywhere(&cluster, who, revoked).await?;
    }

    // Only a command takes it back, for good.
    let admin = cluster.client("admin")?;
    let request = UnrevokeRequest {
        what: Some(RevocationMatch {
            cn: Some("trading-2".to_owned()),
            ..RevocationMatch::default()
        }),
        certificate: None,
    };
    let done = admin.unrevoke(&request).await?.into_body();
    ensure!(done.removed == 1, "{done:?}");
    everywhere(&cluster, &second, None).await?;
    for node in cluster.nodes() {
        node.kill().await?;
    }
    cluster.up().await?;
    everywhere(&cluster, &second, None).await?;
    cluster.passed();
    Ok(())
}

/// On connections that are open too, from a node that does not lead, and for good. Gives back who was revoked.
async fn what_is_written_into_one_nodes_file_is_revoked_on_all(
    cluster: &Playground,
    file: impl Fn(&str) -> PathBuf,
) -> Result<Identity> {
    let leader = cluster.leader().await?;
    let others = cluster.others(leader.node);
    let node = others.first().context("nobody follows")?;
    let own = file(&node.id());
    let lost = cluster.pki().issue("lost-1", Some("Trading"))?;
    let open = open_everywhere(cluster, &lost).await?;
    // What cannot be used keeps nothing else out.
    let text = "revoked:\n  - {cn: trading-2, reason: lost}\n  - {serial: zebra}\n  - {cn: lost-1}\n";
    std::fs::write(&own, text)?;
    for open in open {
        open.until_closed().await?;
    }
    everywhere(cluster, &lost, Some(ErrorCode::CertificateRevoked)).await?;

    let said = |part: &str| node.log().lines().filter(|line| line.contains(part)).count();
    until("the line that is wrong", SETTLED, async || {
        (said("line 3: revokes nothing") > 0).then_some(())
    })
    .await?;
    let name = own.file_name().and_then(|name| name.to_str()).context("a name")?;
    std::fs::remove_file(&own)?;
    until("the file that is gone", SETTLED, async || {
        (said(&format!("{name} is not there any more")) > 0).then_some(())
    })
    .await?;
    ensure!(said("line 3: revokes nothing") == 1, "it is said again and again");
    until("a line of the audit", SETTLED, async || {
        (said("revocations of this node's configuration added") > 0).then_some(())
    })
    .await?;
    everywhere(cluster, &lost, Some(ErrorCode::CertificateRevoked)).await?;
    Ok(lost)
}
