//! What each role is for, on a node: by what it lets a certificate do.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster_tests::{Ca, Identity, Playground};
use hsm_api::admin::{JoinTokenRequest, RevocationsPage, SetAclRequest};
use hsm_api::client::{Answer, Method, Retry};
use hsm_api::data::HealthResponse;
use hsm_api::{Client, ClientError, ErrorCode, paths};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::access::change_acl;
use crate::common::{CONTEXT, formed_with, seal};

/// What is refused for the moment, while a rotation before is being finished, is done by then.
const DONE: Duration = Duration::from_secs(30);

/// What a certificate may.
#[derive(Debug, PartialEq, Eq)]
struct May {
    /// Reads: `GET /admin/v1/keys`.
    list: bool,
    /// Works on keys: rotates one.
    operate: bool,
    /// Administers: makes a join token.
    administer: bool,
    /// Audits: reads the revocations.
    audit: bool,
    /// Sees contexts and keys in `/metrics` and `/health`.
    names: bool,
}

/// Done or refused for want of a role; anything else is an error.
fn has_role<T>(outcome: Result<Answer<T>, ClientError>) -> Result<bool> {
    match outcome {
        Ok(_) => Ok(true),
        Err(error) if error.code() == Some(ErrorCode::RoleRequired) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

async fn may(client: &Client) -> Result<May> {
    let by_context = format!("context=\"{CONTEXT}\"");
    let in_metrics = client.metrics().await?.into_body().contains(&by_context);
    let health = client
        .request(Method::GET, paths::HEALTH, &[], Vec::new())
        .await?;
    let health: HealthResponse = health.json()?;
    ensure!(
        in_metrics != health.kek_status.is_empty(),
        "names in /metrics: {in_metrics}, and in /health: {:?}",
        health.kek_status
    );
    Ok(May {
        list: has_role(client.list_keks().await)?,
        operate: has_role(client.rotate(CONTEXT, None).await)?,
        administer: has_role(client.create_join_token(&JoinTokenRequest::default()).await)?,
        audit: has_role(client.revocations(&RevocationsPage::default()).await)?,
        names: in_metrics,
    })
}

/// Each by its OU and by its CN.
pub(crate) async fn each_role_may_what_it_is_for(cluster: &Playground) -> Result<()> {
    const ROLES: [&str; 6] = ["admin", "operator", "auditor", "officer", "backup", "metrics"];
    let ca = cluster.pki().client_ca_name();
    change_acl(cluster, |acl| {
        for role in ROLES {
            let by_ou = json!({"issuer": ca, "ou": format!("All {role}")});
            let by_cn = json!({"issuer": ca, "cn": format!("one {role}")});
            match acl["roles"][role].as_array_mut() {
                Some(held) => held.extend([by_ou, by_cn]),
                None => acl["roles"][role] = json!([by_ou, by_cn]),
            }
        }
    })
    .await?;
    // Somebody has encrypted on the node whose metrics are read.
    let number = cluster.leader().await?.node;
    seal(&cluster.client_on("trading-1", number)?, CONTEXT, b"counted").await?;
    let as_whom = async |cn: &str, ou: &str| {
        let identity = cluster.pki().issue(cn, Some(ou))?;
        let endpoints = [cluster.node(number).endpoint()];
        let client = cluster.pki().client(Some(&identity), &endpoints)?;
        let client = client.with_retry(Retry::Until(DONE));
        let roles = client.whoami().await?.into_body().roles;
        anyhow::Ok((roles, may(&client).await?))
    };
    for role in ROLES {
        let (admin, operator, auditor) = (role == "admin", role == "operator", role == "auditor");
        let expected = May {
            list: admin || operator || auditor,
            operate: admin || operator,
            administer: admin,
            audit: admin || auditor,
            names: admin || operator || auditor || role == "metrics",
        };
        let (by_ou, by_cn) = (format!("All {role}"), format!("one {role}"));
        for (cn, ou) in [("anyone", by_ou.as_str()), (by_cn.as_str(), "Elsewhere")] {
            let (roles, found) = as_whom(cn, ou)
                .await
                .with_context(|| cn.to_owned() + " of " + ou)?;
            ensure!(
                roles == [role] && found == expected,
                "{cn} of {ou}: {roles:?} {found:?} instead of {expected:?}"
            );
        }
    }
    // Who uses keys has no part in it, nor has one who only bears a role's name.
    for (cn, ou) in [
        ("anyone", "Trading"),
        ("admin", "Trading"),
        ("All admin", "one admin"),
    ] {
        let (roles, found) = as_whom(cn, ou)
            .await
            .with_context(|| cn.to_owned() + " of " + ou)?;
        let nothing = May {
            list: false,
            operate: false,
            administer: false,
            audit: false,
            names: false,
        };
        ensure!(
            roles.is_empty() && found == nothing,
            "{cn} of {ou}: {roles:?} {found:?}"
        );
    }
    Ok(())
}

/// What one node lets a certificate do, and the roles that it says it has.
async fn roles_of(cluster: &Playground, who: &Identity) -> Result<(Vec<String>, May)> {
    let endpoints = [cluster.node(1).endpoint()];
    let client = cluster.pki().client(Some(who), &endpoints)?;
    let client = client.with_retry(Retry::Until(DONE));
    let roles = client.whoami().await?.into_body().roles;
    Ok((roles, may(&client).await?))
}

/// With a CA for administrators (`admin_client_ca_path`) a role is bound to it, or to whichever CA it names: what others
/// write into certificates is theirs to say. One that is bound to a key goes with the key.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_application_ca_mints_no_administrator_where_administrators_have_a_ca_of_their_own() -> Result<()>
{
    let folder = tempfile::tempdir()?;
    let admins = Ca::new("DEV administrators CA")?;
    let file = folder.path().join("admins.crt");
    std::fs::write(&file, &admins.cert)?;
    let robot = admins.issue("robot", Some("Machines"))?;
    let key = hex::encode(Sha256::digest(robot.spki()?));
    // Whoever forms the playground has a certificate of its own CA: that role says so.
    let cluster = formed_with(Playground::builder().nodes(1), |config| {
        let tls = format!("  tls:\n    admin_client_ca_path: {}\n", file.display());
        let roles = format!(
            "  admin: [{{ou: Admin}}, {{ou: Admin, cn: admin, issuer: 'CN=DEV hsm-service client CA,O=DEV'}}]\n  \
             operator: [{{spki_sha256: '{key}'}}]\n"
        );
        config
            .replacen("  tls:\n", &tls, 1)
            .replacen("  admin: [{ou: Admin}]\n", &roles, 1)
    })
    .await?;
    let pki = cluster.pki();
    seal(&cluster.client("trading-1")?, CONTEXT, b"counted").await?;
    let administers = May {
        list: true,
        operate: true,
        administer: true,
        audit: true,
        names: true,
    };
    let operates = May {
        administer: false,
        audit: false,
        ..administers
    };
    // Everybody reads names until somebody has the role for that.
    let nothing = May {
        list: false,
        operate: false,
        ..operates
    };
    let root = admins.issue("root", Some("Admin"))?;
    for (what, who, roles, expected) in [
        ("of their CA", root.clone(), &["admin"][..], &administers),
        (
            "of the application CA, by its name",
            pki.identity("admin")?,
            &["admin"],
            &administers,
        ),
        (
            "of the application CA",
            pki.issue("root", Some("Admin"))?,
            &[],
            &nothing,
        ),
        (
            "of their CA, in another unit",
            admins.issue("root", Some("Trading"))?,
            &[],
            &nothing,
        ),
        ("the key", robot.clone(), &["operator"], &operates),
        (
            "the key, under other names",
            admins.issue_for(&robot, "renewed", Some("Elsewhere"))?,
            &["operator"],
            &operates,
        ),
        (
            "its names, with another key",
            admins.issue("robot", Some("Machines"))?,
            &[],
            &nothing,
        ),
        (
            "the key, of the application CA",
            pki.issue_for(&robot, "robot", Some("Machines"))?,
            &[],
            &nothing,
        ),
    ] {
        let (held, found) = roles_of(&cluster, &who).await.context(what)?;
        ensure!(
            held == roles && found == *expected,
            "{what}: {held:?} {found:?} instead of {roles:?} {expected:?}"
        );
    }

    // Once an administrator of that CA is there, the one of the playground is taken out, whom no other one follows.
    let client = pki.client(Some(&root), &[cluster.node(1).endpoint()])?;
    let mut rules = client.acl().await?.into_body();
    let entries = rules.roles.get_mut("admin").context("no administrators")?;
    let own = admins.name();
    entries.retain(|entry| entry.issuer.as_ref() == Some(&own));
    ensure!(entries.len() == 1, "{entries:?}");
    let request = SetAclRequest {
        acl: rules,
        dry_run: false,
    };
    client.set_acl(&request, None).await?;
    for who in [pki.identity("admin")?, pki.issue("admin", Some("Admin"))?] {
        let (held, found) = roles_of(&cluster, &who).await?;
        ensure!(held.is_empty() && found == nothing, "{held:?} {found:?}");
    }
    let (held, found) = roles_of(&cluster, &root).await?;
    ensure!(held == ["admin"] && found == administers, "{held:?} {found:?}");
    cluster.passed();
    Ok(())
}
