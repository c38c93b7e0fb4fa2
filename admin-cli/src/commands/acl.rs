//! `hsmctl acl`: who may do what, as one document; and what it says of somebody.

use anyhow::Result;
use clap::{Args, Subcommand};
use hsm_api::admin::{AclAnswer, AclDocument, AclQuestion};

use super::acl_changes::{holder, mapping, rule};
use super::acl_set::{self, Set};
use super::{READ, Session};
use crate::exit::no;
use crate::output::{self, or_dash};

/// Subcommands of `acl`.
#[derive(Debug, Subcommand)]
pub(crate) enum AclCommand {
    /// Show access control: what each organizational unit may do, further rules, and who has which role.
    ///
    /// With -o yaml or json it is the document that `acl set` takes.
    Get,
    /// Put other access control in the place of what is in force.
    ///
    /// Shows what would change and has the cluster's name typed. Nothing is changed if somebody else has changed the
    /// rules since the file was made from `acl get`, nor if the certificate that asks would not be an administrator any
    /// more.
    Set(Set),
    /// Say whether a certificate may do something, and why: exit code 0 if it may, 1 if not.
    Test(Test),
}

/// Arguments of `acl test`.
#[derive(Debug, Args)]
pub(crate) struct Test {
    /// First organizational unit of the certificate.
    #[arg(long, value_name = "OU")]
    ou: Option<String>,
    /// Its last common name.
    #[arg(long, value_name = "CN")]
    cn: Option<String>,
    /// Its issuer, where the answer depends on it.
    #[arg(long, value_name = "DN")]
    issuer: Option<String>,
    /// The context.
    #[arg(long, value_name = "CONTEXT")]
    context: String,
    /// What is to be done with it: encrypt, decrypt, rewrap or datakey.
    #[arg(long, value_name = "OPERATION")]
    operation: String,
}

pub(super) async fn run(session: &Session, command: AclCommand) -> Result<()> {
    match command {
        AclCommand::Get => get(session).await,
        AclCommand::Set(args) => acl_set::set(session, &args).await,
        AclCommand::Test(args) => test(session, args).await,
    }
}

async fn get(session: &Session) -> Result<()> {
    let client = session.client(READ)?;
    let answer = session.ask(&client, "acl get", client.acl()).await?;
    output::print(session.format(), &answer.body, || table(&answer.body))
}

fn table(acl: &AclDocument) -> String {
    let mapped = acl
        .mappings
        .iter()
        .map(|(ou, unit)| ["ou".to_owned(), ou.clone(), mapping(unit)]);
    let granted = acl
        .rules
        .iter()
        .enumerate()
        .map(|(place, one)| ["rule".to_owned(), place.to_string(), rule(one)]);
    let roles = acl.roles.iter().flat_map(|(role, holders)| {
        let row = move |one| ["role".to_owned(), role.clone(), holder(one)];
        holders.iter().map(row)
    });
    let rows = mapped.chain(granted).chain(roles);
    let digest = or_dash(acl.digest.as_deref());
    format!(
        "{}\ndigest {digest}\n",
        output::table(["KIND", "NAME", "WHAT"], rows)
    )
}

async fn test(session: &Session, args: Test) -> Result<()> {
    let client = session.client(READ)?;
    let question = AclQuestion {
        ou: args.ou,
        cn: args.cn,
        issuer: args.issuer,
        context: args.context,
        operation: args.operation,
    };
    let answer = session
        .ask(&client, "acl test", client.test_acl(&question))
        .await?;
    output::print(session.format(), &answer.body, || said(&question, &answer.body))?;
    if answer.body.allowed { Ok(()) } else { Err(no()) }
}

/// "may Trading decrypt 2fa? no: …"
fn said(question: &AclQuestion, answer: &AclAnswer) -> String {
    let who = match (&question.ou, &question.cn) {
        (Some(ou), Some(cn)) => format!("{cn} of {ou}"),
        (Some(ou), None) => ou.clone(),
        (None, Some(cn)) => format!("{cn} of no unit"),
        (None, None) => "a certificate without a unit".to_owned(),
    };
    let (context, operation) = (&question.context, &question.operation);
    let verdict = if answer.allowed { "yes" } else { "no" };
    let mut text = format!("may {who} {operation} {context}? {verdict}: {}", answer.reason);
    if !answer.allowed && !answer.operations.is_empty() {
        text.push_str(&format!("; it may {}", answer.operations.join(", ")));
    }
    text
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_answer_is_a_sentence() {
        let question = |cn: Option<&str>| AclQuestion {
            ou: Some("Trading".to_owned()),
            cn: cn.map(str::to_owned),
            issuer: None,
            context: "2fa".to_owned(),
            operation: "decrypt".to_owned(),
        };
        let answer = |allowed, reason: &str, operations: &[&str]| AclAnswer {
            allowed,
            reason: reason.to_owned(),
            operations: operations.iter().map(|word| (*word).to_owned()).collect(),
        };
        assert_eq!(
            said(&question(None), &answer(false, "it is not mapped", &[])),
            "may Trading decrypt 2fa? no: it is not mapped"
        );
        assert_eq!(
            said(
                &question(None),
                &answer(false, "not that", &["encrypt", "rewrap"])
            ),
            "may Trading decrypt 2fa? no: not that; it may encrypt, rewrap"
        );
        assert_eq!(
            said(
                &question(Some("batch")),
                &answer(true, "allowed by rules[0]", &["decrypt"])
            ),
            "may batch of Trading decrypt 2fa? yes: allowed by rules[0]"
        );
    }

    #[test]
    fn a_table_has_units_rules_and_roles() {
        let acl: AclDocument = serde_json::from_value(json!({
            "digest": "ab",
            "mappings": {"Trading": ["exchange-key"], "Reports": {"contexts": ["a"], "operations": ["decrypt"]}},
            "rules": [{"who": {"cn": "batch"}, "contexts": ["2fa"], "operations": ["rewrap"]}],
            "roles": {"admin": [{"issuer": "CN=CA", "ou": "Admin"}]}
        }))
        .unwrap();
        let text = table(&acl);
        for part in [
            "Trading",
            "exchange-key",
            "a: decrypt",
            "cn batch",
            "admin",
            "issuer CN=CA",
            "digest ab",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
    }
}
