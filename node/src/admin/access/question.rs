//! "May Trading decrypt 2fa?": answered by the very policy that requests are judged by.

use hsm_api::admin::{AclAnswer, AclQuestion};

use super::{document, invalid};
use crate::admin::call::CallError;
use crate::identity::{Identity, Principal, dn};
use crate::policy::{OPS, Op, Policy};

/// Answers by a policy. `issuers` are the CAs that certificates are accepted from: without an issuer in the question
/// it is asked for each of them.
///
/// # Errors
/// `invalid_argument` for an unknown operation, and where the answer depends on the issuer.
pub fn answer(policy: &Policy, question: &AclQuestion, issuers: &[String]) -> Result<AclAnswer, CallError> {
    let op = document::operation("operation", &question.operation)?;
    if let Some(issuer) = given(question.issuer.as_ref()) {
        return Ok(of(policy, question, op, &dn::normalise(issuer)));
    }
    let mut answers = issuers.iter().map(|issuer| of(policy, question, op, issuer));
    let Some(first) = answers.next() else {
        return Ok(of(policy, question, op, ""));
    };
    if answers.any(|other| other != first) {
        let problem = format!(
            "is missing, and the answer depends on it; known are {}",
            issuers.join("; ")
        );
        return Err(invalid("issuer", problem));
    }
    Ok(first)
}

fn given(text: Option<&String>) -> Option<&String> {
    text.filter(|text| !text.is_empty())
}

fn of(policy: &Policy, question: &AclQuestion, op: Op, issuer: &str) -> AclAnswer {
    let principal = Principal::new(Identity {
        cn: question.cn.clone().unwrap_or_default(),
        ou: given(question.ou.as_ref()).cloned(),
        sans: Vec::new(),
        // Of no certificate that there is.
        serial: String::new(),
        issuer_dn: issuer.to_owned(),
        fingerprint: [0; 32],
        spki_sha256: [0; 32],
        not_after: i64::MAX,
    });
    let context = question.context.as_str();
    let granted = policy.grant(&principal, context, op);
    let may = |op: &Op| policy.authorise(&principal, context, *op).is_ok();
    AclAnswer {
        allowed: granted.is_ok(),
        reason: match &granted {
            Ok(grant) => format!("allowed by {grant}"),
            Err(denial) => denial.to_string(),
        },
        operations: OPS
            .into_iter()
            .filter(may)
            .map(|op| op.as_str().to_owned())
            .collect(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::collections::BTreeSet;

    use hsm_api::ErrorCode;
    use raft_store::state::access::{Acl, AclRule, Operation, RevocationKey, Who};

    use super::*;
    use crate::config::ContextName;

    fn policy(issuer: Option<&str>) -> Policy {
        let contexts = |name: &str| BTreeSet::from([ContextName::new(name).unwrap()]);
        let rule = AclRule {
            who: Who {
                issuer: issuer.map(str::to_owned),
                ou: Some("Trading".to_owned()),
                cn: Some("batch".to_owned()),
            },
            contexts: contexts("2fa"),
            operations: [Operation::Decrypt, Operation::Rewrap].into(),
        };
        let acl = Acl {
            mappings: [("Trading".to_owned(), contexts("exchange-key"))].into(),
            rules: vec![rule],
            ..Acl::default()
        };
        Policy::new(&acl, [RevocationKey::CommonName("gone".to_owned())])
    }

    fn question(ou: Option<&str>, cn: Option<&str>, context: &str, operation: &str) -> AclQuestion {
        AclQuestion {
            ou: ou.map(str::to_owned),
            cn: cn.map(str::to_owned),
            issuer: None,
            context: context.to_owned(),
            operation: operation.to_owned(),
        }
    }

    fn issuers() -> Vec<String> {
        vec!["CN=A".to_owned(), "CN=B".to_owned()]
    }

    #[test]
    fn an_answer_says_what_allows_it_or_what_is_missing() {
        for (question, allowed, reason, operations) in [
            (
                question(Some("Trading"), None, "exchange-key", "decrypt"),
                true,
                "allowed by mappings.Trading",
                4,
            ),
            (
                question(Some("Trading"), Some("batch"), "2fa", "decrypt"),
                true,
                "allowed by rules[0]",
                2,
            ),
            (
                question(Some("Trading"), None, "2fa", "decrypt"),
                false,
                "organizational unit \"Trading\" may not decrypt under context \"2fa\"",
                0,
            ),
            (
                question(Some("Trading"), Some("batch"), "2fa", "encrypt"),
                false,
                "organizational unit \"Trading\" may not encrypt under context \"2fa\"",
                2,
            ),
            (
                question(Some("Nobody"), None, "2fa", "decrypt"),
                false,
                "organizational unit \"Nobody\" is in no mapping",
                0,
            ),
            (
                question(None, Some("batch"), "2fa", "decrypt"),
                false,
                "the certificate has no organizational unit",
                0,
            ),
            (
                question(Some("Trading"), Some("gone"), "exchange-key", "encrypt"),
                false,
                "the certificate is revoked",
                0,
            ),
        ] {
            let answer = answer(&policy(None), &question, &issuers()).unwrap();
            assert_eq!(
                (answer.allowed, answer.reason.as_str(), answer.operations.len()),
                (allowed, reason, operations),
                "{question:?}"
            );
        }
    }

    #[test]
    fn the_issuer_is_asked_for_only_where_it_matters() {
        let policy = policy(Some("CN=B"));
        let ask = |question: &AclQuestion| answer(&policy, question, &issuers());
        assert!(
            ask(&question(Some("Trading"), None, "exchange-key", "encrypt"))
                .unwrap()
                .allowed
        );
        let depends = question(Some("Trading"), Some("batch"), "2fa", "decrypt");
        let error = ask(&depends).unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidArgument);
        assert!(error.detail.contains("CN=A; CN=B"), "{error}");
        for (issuer, allowed) in [("cn = B", true), ("CN=A", false)] {
            let question = AclQuestion {
                issuer: Some(issuer.to_owned()),
                ..depends.clone()
            };
            assert_eq!(ask(&question).unwrap().allowed, allowed, "{issuer}");
        }
    }

    #[test]
    fn an_unknown_operation_is_refused_with_the_nearest_one() {
        let question = question(Some("Trading"), None, "2fa", "decrpyt");
        let error = answer(&policy(None), &question, &issuers()).unwrap_err();
        assert!(error.detail.ends_with("did you mean decrypt?"), "{error}");
    }
}
