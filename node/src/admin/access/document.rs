//! Access control as people write it, and as the state keeps it. Nothing is passed over: what is not understood is
//! refused with its place in the document, such as `rules[2].operations[0]`.

use std::collections::{BTreeMap, BTreeSet};

use hsm_api::admin::{AclDocument, AclMapping, AclRole, AclRule, AclWho};
use raft_store::codec;
use raft_store::state::access::{Acl, AclRule as Rule, Operation, RoleEntry, Who};
use serde_json::Value;

use super::invalid;
use crate::admin::call::CallError;
use crate::config::{ContextName, nearest};
use crate::identity::dn;
use crate::policy::{OPS, Op, ROLES, Role, role_name};

/// Bytes of access control as it is stored: with what goes around it, a command has to hold it.
const MAX_BYTES: u64 = 60 << 10;

/// Access control as people read it, with its digest.
#[must_use]
pub fn show(acl: &Acl) -> AclDocument {
    let mapping = |(ou, set): (&String, &BTreeSet<ContextName>)| {
        let mapping = AclMapping {
            contexts: names(set),
            operations: acl.operations.get(ou).map(words),
        };
        (ou.clone(), mapping)
    };
    let rule = |rule: &Rule| AclRule {
        who: AclWho {
            issuer: rule.who.issuer.clone(),
            ou: rule.who.ou.clone(),
            cn: rule.who.cn.clone(),
        },
        contexts: names(&rule.contexts),
        operations: words(&rule.operations),
    };
    let mut roles: BTreeMap<String, Vec<AclRole>> = BTreeMap::new();
    for entry in &acl.roles {
        let role = AclRole {
            issuer: Some(entry.issuer.clone()),
            ou: entry.ou.clone(),
            cn: entry.cn.clone(),
            spki_sha256: entry.spki_sha256.map(hex::encode),
        };
        roles
            .entry(role_name(entry.role).to_owned())
            .or_default()
            .push(role);
    }
    AclDocument {
        digest: Some(hex::encode(acl.digest())),
        mappings: acl.mappings.iter().map(mapping).collect(),
        rules: acl.rules.iter().map(rule).collect(),
        roles,
    }
}

fn names(contexts: &BTreeSet<ContextName>) -> Vec<String> {
    contexts.iter().map(ToString::to_string).collect()
}

fn words(operations: &BTreeSet<Operation>) -> Vec<String> {
    let ops = OPS.into_iter().filter(|op| operations.contains(&op.operation()));
    ops.map(|op| op.as_str().to_owned()).collect()
}

/// Reads a document. `acl` is its name in the request.
///
/// # Errors
/// `invalid_argument` with the place of the first member that is missing, unknown or of the wrong type.
pub fn parse(document: Value) -> Result<AclDocument, CallError> {
    serde_path_to_error::deserialize(document).map_err(|error| {
        let path = match error.path().to_string() {
            root if root == "." => "acl".to_owned(),
            path => format!("acl.{path}"),
        };
        invalid(&path, error.inner())
    })
}

/// The digest of what the document's author has read.
///
/// # Errors
/// `invalid_argument` if it names none.
pub fn digest(document: &AclDocument) -> Result<[u8; 32], CallError> {
    let Some(text) = &document.digest else {
        return Err(invalid(
            "acl.digest",
            "is missing; read the rules that are in force, and name their digest",
        ));
    };
    let mut digest = [0; 32];
    hex::decode_to_slice(text, &mut digest).map_err(|_| {
        invalid(
            "acl.digest",
            format!("{text:?} is no digest; it has 64 hex digits"),
        )
    })?;
    Ok(digest)
}

/// What the document says. `issuers` are the CAs that certificates are accepted from here: a role or rule of any other
/// issuer would wait for somebody to make one of that name.
///
/// # Errors
/// `invalid_argument` with the place of the first thing that makes no sense.
pub fn resolve(document: &AclDocument, issuers: &[String]) -> Result<Acl, CallError> {
    let mut acl = Acl::default();
    for (ou, mapping) in &document.mappings {
        if ou.is_empty() {
            return Err(invalid("acl.mappings", "an organizational unit has no name"));
        }
        let at = format!("acl.mappings.{ou}");
        let list = match &mapping.operations {
            None => at.clone(),
            Some(words) => {
                let operations = operations(&format!("{at}.operations"), words)?;
                acl.operations.insert(ou.clone(), operations);
                format!("{at}.contexts")
            }
        };
        acl.mappings
            .insert(ou.clone(), contexts(&list, &mapping.contexts)?);
    }
    for (place, rule) in document.rules.iter().enumerate() {
        acl.rules
            .push(one_rule(&format!("acl.rules[{place}]"), rule, issuers)?);
    }
    for (name, holders) in &document.roles {
        let role = role(name)?;
        for (place, holder) in holders.iter().enumerate() {
            let at = format!("acl.roles.{name}[{place}]");
            acl.roles.push(entry(&at, role, holder, issuers)?);
        }
    }
    let bytes = codec::size(&acl);
    if bytes > MAX_BYTES {
        let problem = format!("has {bytes} bytes as it is stored, and at most {MAX_BYTES} are kept");
        return Err(invalid("acl", problem));
    }
    Ok(acl)
}

fn one_rule(at: &str, rule: &AclRule, issuers: &[String]) -> Result<Rule, CallError> {
    let named = |what: &str, text: &Option<String>| given(&format!("{at}.who.{what}"), text.as_deref());
    let who = Who {
        issuer: issuer(&format!("{at}.who"), rule.who.issuer.as_deref(), issuers)?,
        ou: named("ou", &rule.who.ou)?,
        cn: named("cn", &rule.who.cn)?,
    };
    if who == Who::default() {
        return Err(invalid(
            &format!("{at}.who"),
            "names nobody, so everybody would be meant; give issuer, ou or cn",
        ));
    }
    let contexts = contexts(&format!("{at}.contexts"), &rule.contexts)?;
    if contexts.is_empty() {
        return Err(invalid(
            &format!("{at}.contexts"),
            "names no context; take the rule out",
        ));
    }
    let operations = operations(&format!("{at}.operations"), &rule.operations)?;
    Ok(Rule {
        who,
        contexts,
        operations,
    })
}

fn role(name: &str) -> Result<Role, CallError> {
    let found = ROLES.into_iter().find(|role| role_name(*role) == name);
    found.ok_or_else(|| {
        let problem = format!("is no role; {}", meant(name, &ROLES.map(role_name)));
        invalid(&format!("acl.roles.{name}"), problem)
    })
}

fn entry(at: &str, role: Role, holder: &AclRole, issuers: &[String]) -> Result<RoleEntry, CallError> {
    let named = |what: &str, text: &Option<String>| given(&format!("{at}.{what}"), text.as_deref());
    let (ou, cn) = (named("ou", &holder.ou)?, named("cn", &holder.cn)?);
    let spki = named("spki_sha256", &holder.spki_sha256)?;
    let spki_sha256 = spki
        .map(|text| hash(&format!("{at}.spki_sha256"), &text))
        .transpose()?;
    if ou.is_none() && cn.is_none() && spki_sha256.is_none() {
        let problem = "names nobody, so every certificate of the issuer would have the role; give ou, cn or \
                       spki_sha256";
        return Err(invalid(at, problem));
    }
    let Some(issuer) = issuer(at, holder.issuer.as_deref(), issuers)? else {
        let problem = format!(
            "is missing: a role is bound to its issuer; known are {}",
            issuers.join("; ")
        );
        return Err(invalid(&format!("{at}.issuer"), problem));
    };
    Ok(RoleEntry {
        role,
        issuer,
        ou,
        cn,
        spki_sha256,
    })
}

/// A part that, if it is there, says something.
fn given(at: &str, text: Option<&str>) -> Result<Option<String>, CallError> {
    match text {
        Some("") => Err(invalid(at, "is empty; leave it out")),
        text => Ok(text.map(str::to_owned)),
    }
}

fn issuer(at: &str, text: Option<&str>, known: &[String]) -> Result<Option<String>, CallError> {
    let at = format!("{at}.issuer");
    let Some(text) = given(&at, text)? else {
        return Ok(None);
    };
    let issuer = dn::normalise(&text);
    if known.contains(&issuer) {
        return Ok(Some(issuer));
    }
    let known: Vec<&str> = known.iter().map(String::as_str).collect();
    let problem = format!(
        "{issuer} is not the subject of a CA in server.tls.ca_path or server.tls.admin_client_ca_path of this node; {}",
        meant(&issuer, &known)
    );
    Err(invalid(&at, problem))
}

fn contexts(at: &str, names: &[String]) -> Result<BTreeSet<ContextName>, CallError> {
    let context = |(place, name): (usize, &String)| {
        ContextName::new(name).map_err(|error| invalid(&format!("{at}[{place}]"), error))
    };
    names.iter().enumerate().map(context).collect()
}

fn operations(at: &str, words: &[String]) -> Result<BTreeSet<Operation>, CallError> {
    if words.is_empty() {
        let problem = format!("names no operation; known are {}", OPS.map(Op::as_str).join(", "));
        return Err(invalid(at, problem));
    }
    let operation =
        |(place, word): (usize, &String)| operation(&format!("{at}[{place}]"), word).map(Op::operation);
    words.iter().enumerate().map(operation).collect()
}

/// An operation by its name.
///
/// # Errors
/// `invalid_argument` with the nearest one there is.
pub(super) fn operation(at: &str, word: &str) -> Result<Op, CallError> {
    let found = OPS.into_iter().find(|op| op.as_str() == word);
    found.ok_or_else(|| {
        let problem = format!("{word:?} is no operation; {}", meant(word, &OPS.map(Op::as_str)));
        invalid(at, problem)
    })
}

fn meant(word: &str, known: &[&str]) -> String {
    nearest(word, known.iter().copied()).map_or_else(
        || format!("known are {}", known.join("; ")),
        |near| format!("did you mean {near}?"),
    )
}

/// A SHA-256 hash, with or without colons.
///
/// # Errors
/// `invalid_argument`.
pub(super) fn hash(at: &str, text: &str) -> Result<[u8; 32], CallError> {
    let digits: String = text.trim().chars().filter(|c| *c != ':').collect();
    let mut hash = [0; 32];
    hex::decode_to_slice(digits, &mut hash)
        .map_err(|_| invalid(at, format!("{text:?} is no SHA-256 hash; write 64 hex digits")))?;
    Ok(hash)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use hsm_api::ErrorCode;
    use serde_json::json;

    use super::*;

    fn issuers() -> Vec<String> {
        vec!["CN=Admin CA,O=Example".to_owned(), "CN=Clients".to_owned()]
    }

    fn whole() -> Value {
        let spki = ["AB"; 32].join(":");
        json!({
            "digest": "ab".repeat(32),
            "mappings": {
                "Trading": ["exchange-key", "order-key"],
                "Reports": {"contexts": ["exchange-key"], "operations": ["decrypt"]},
                "Database": []
            },
            "rules": [
                {"who": {"ou": "Trading", "cn": "batch", "issuer": "cn = Clients"},
                 "contexts": ["2fa"], "operations": ["rewrap", "datakey"]}
            ],
            "roles": {
                "admin": [{"issuer": "CN=Admin CA,O=Example", "ou": "Admin"}],
                "auditor": [{"issuer": "CN=Clients", "cn": "aud"},
                            {"issuer": "CN=Clients", "spki_sha256": spki}]
            }
        })
    }

    fn read(document: Value) -> Result<Acl, String> {
        let acl = parse(document).and_then(|document| resolve(&document, &issuers()));
        acl.map_err(|error| {
            assert_eq!(error.code, ErrorCode::InvalidArgument);
            error.detail
        })
    }

    #[test]
    fn a_document_says_the_same_as_what_is_made_of_it() {
        let acl = read(whole()).unwrap();
        assert_eq!(acl.mappings.len(), 3);
        assert_eq!(acl.operations["Reports"], BTreeSet::from([Operation::Decrypt]));
        assert!(!acl.operations.contains_key("Trading"));
        assert_eq!(acl.rules[0].who.issuer.as_deref(), Some("CN=Clients"));
        assert_eq!(acl.roles[2].spki_sha256, Some([0xab; 32]));
        let shown = show(&acl);
        assert_eq!(digest(&shown).unwrap(), acl.digest());
        let again = read(serde_json::to_value(&shown).unwrap()).unwrap();
        assert_eq!(again, acl);
    }

    #[test]
    fn whatever_is_wrong_is_named_with_its_place() {
        let with = |pointer: &str, value: Value| {
            let mut document = whole();
            *document.pointer_mut(pointer).unwrap() = value;
            read(document).unwrap_err()
        };
        for (pointer, value, place, says) in [
            (
                "/mappings/Trading/1",
                json!("a b"),
                "acl.mappings.Trading[1]: ",
                "A-Z",
            ),
            (
                "/mappings/Trading/1",
                json!(7),
                "acl.mappings.Trading[1]: ",
                "expected a string",
            ),
            (
                "/mappings/Trading",
                json!("x"),
                "acl.mappings.Trading: ",
                "a list of contexts",
            ),
            (
                "/mappings/Reports/operations/0",
                json!("decrpyt"),
                "acl.mappings.Reports.operations[0]: ",
                "did you mean decrypt?",
            ),
            (
                "/mappings/Reports/operations",
                json!([]),
                "acl.mappings.Reports.operations: ",
                "encrypt, decrypt, rewrap, datakey",
            ),
            (
                "/mappings/Reports/contexts/0",
                json!(""),
                "acl.mappings.Reports.contexts[0]: ",
                "",
            ),
            ("/rules/0/who", json!({}), "acl.rules[0].who: ", "names nobody"),
            (
                "/rules/0/who/ou",
                json!(""),
                "acl.rules[0].who.ou: ",
                "leave it out",
            ),
            (
                "/rules/0/who",
                json!({"uo": "x"}),
                "acl.rules[0].who",
                "unknown field `uo`",
            ),
            (
                "/rules/0/contexts",
                json!([]),
                "acl.rules[0].contexts: ",
                "names no context",
            ),
            (
                "/rules/0/who/issuer",
                json!("CN=Client"),
                "acl.rules[0].who.issuer: ",
                "did you mean CN=Clients?",
            ),
            (
                "/roles",
                json!({"admn": []}),
                "acl.roles.admn: ",
                "did you mean admin?",
            ),
            (
                "/roles/admin/0",
                json!({"ou": "Admin"}),
                "acl.roles.admin[0].issuer: ",
                "is missing",
            ),
            (
                "/roles/admin/0",
                json!({"issuer": "CN=Clients"}),
                "acl.roles.admin[0]: ",
                "names nobody",
            ),
            (
                "/roles/auditor/1/spki_sha256",
                json!("abc"),
                "acl.roles.auditor[1].spki_sha256: ",
                "64 hex digits",
            ),
        ] {
            let error = with(pointer, value.clone());
            assert!(error.starts_with(place), "{pointer} {value}: {error}");
            assert!(error.contains(says), "{pointer} {value}: {error}");
        }
        let mut more = whole();
        more["rulez"] = json!([]);
        assert!(read(more).unwrap_err().contains("unknown field `rulez`"));
        let mut nameless = whole();
        nameless["mappings"][""] = json!([]);
        assert!(read(nameless).unwrap_err().starts_with("acl.mappings: "));
    }

    #[test]
    fn what_no_command_holds_is_refused_with_its_size() {
        let mut large = whole();
        large["mappings"]["x".repeat(61 << 10)] = json!([]);
        let error = read(large).unwrap_err();
        assert!(
            error.starts_with("acl: has 6") && error.contains("at most 61440"),
            "{error}"
        );
    }

    #[test]
    fn a_document_without_the_digest_of_what_was_read_is_refused() {
        let mut document = parse(whole()).unwrap();
        assert_eq!(digest(&document), Ok([0xab; 32]));
        document.digest = Some("abc".to_owned());
        assert!(digest(&document).is_err());
        document.digest = None;
        let error = digest(&document).unwrap_err();
        assert!(error.detail.starts_with("acl.digest: is missing"), "{error}");
    }
}
