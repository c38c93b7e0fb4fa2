//! What each role is for, on a node: by what it lets a certificate do.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cluster_tests::Playground;
use hsm_api::admin::{JoinTokenRequest, RevocationsPage};
use hsm_api::client::{Answer, Method, Retry};
use hsm_api::data::HealthResponse;
use hsm_api::{Client, ClientError, ErrorCode, paths};
use serde_json::json;

use crate::access::change_acl;
use crate::common::{CONTEXT, seal};

/// What is refused for the moment, while a rotation before is being finished, is done by then.
const DONE: Duration = Duration::from_secs(10);

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
