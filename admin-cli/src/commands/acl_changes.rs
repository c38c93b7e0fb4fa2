//! What another document of access control would change, in words that a person can judge before it is in force.

use std::collections::{BTreeMap, BTreeSet};

use hsm_api::admin::{AclDocument, AclMapping, AclRole, AclRule};

/// A unit's contexts, and what it may do with them if that is not everything.
pub(super) fn mapping(mapping: &AclMapping) -> String {
    let contexts = if mapping.contexts.is_empty() {
        "nothing".to_owned()
    } else {
        sorted(&mapping.contexts)
    };
    match &mapping.operations {
        None => contexts,
        Some(operations) => format!("{contexts}: {}", sorted(operations)),
    }
}

/// A rule.
pub(super) fn rule(rule: &AclRule) -> String {
    let who = parts([
        ("issuer", &rule.who.issuer),
        ("ou", &rule.who.ou),
        ("cn", &rule.who.cn),
    ]);
    format!("{who} → {}: {}", sorted(&rule.contexts), sorted(&rule.operations))
}

/// Who has a role.
pub(super) fn holder(holder: &AclRole) -> String {
    parts([
        ("ou", &holder.ou),
        ("cn", &holder.cn),
        ("spki", &holder.spki_sha256),
        ("issuer", &holder.issuer),
    ])
}

fn parts<const N: usize>(parts: [(&str, &Option<String>); N]) -> String {
    let given = parts
        .into_iter()
        .filter_map(|(name, value)| Some(format!("{name} {}", value.as_ref()?)));
    given.collect::<Vec<_>>().join(", ")
}

/// The order of a list means nothing.
fn sorted(words: &[String]) -> String {
    let words: BTreeSet<&str> = words.iter().map(String::as_str).collect();
    words.into_iter().collect::<Vec<_>>().join(", ")
}

/// Every difference, one a line: `+` what comes, `-` what goes, `~` what changes. Empty if both say the same.
pub(super) fn changes(now: &AclDocument, wanted: &AclDocument) -> Vec<String> {
    let mut lines = mappings(&now.mappings, &wanted.mappings);
    lines.extend(members(&rules(now), &rules(wanted)));
    lines.extend(members(&roles(now), &roles(wanted)));
    lines
}

fn mappings(now: &BTreeMap<String, AclMapping>, wanted: &BTreeMap<String, AclMapping>) -> Vec<String> {
    let units: BTreeSet<&String> = now.keys().chain(wanted.keys()).collect();
    let line = |ou: &String| match (now.get(ou).map(mapping), wanted.get(ou).map(mapping)) {
        (Some(before), Some(after)) if before == after => None,
        (Some(before), Some(after)) => Some(format!("~ ou {ou}: {before} → {after}")),
        (Some(before), None) => Some(format!("- ou {ou}: {before}")),
        (None, after) => Some(format!("+ ou {ou}: {}", after.unwrap_or_default())),
    };
    units.into_iter().filter_map(line).collect()
}

fn rules(acl: &AclDocument) -> Vec<String> {
    acl.rules
        .iter()
        .map(|one| format!("rule: {}", rule(one)))
        .collect()
}

fn roles(acl: &AclDocument) -> Vec<String> {
    let of = |(role, holders): (&String, &Vec<AclRole>)| -> Vec<String> {
        let line = |one: &AclRole| format!("role {role}: {}", holder(one));
        holders.iter().map(line).collect()
    };
    acl.roles.iter().flat_map(of).collect()
}

/// What is on one side only.
fn members(now: &[String], wanted: &[String]) -> Vec<String> {
    let gone = now.iter().filter(|one| !wanted.contains(one));
    let come = wanted.iter().filter(|one| !now.contains(one));
    let gone = gone.map(|text| format!("- {text}"));
    gone.chain(come.map(|text| format!("+ {text}"))).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn document(json: Value) -> AclDocument {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn what_comes_goes_and_changes_is_said() {
        let now = document(json!({
            "mappings": {"Trading": ["b", "a"], "Gone": [], "Same": ["c"]},
            "rules": [{"who": {"cn": "batch"}, "contexts": ["2fa"], "operations": ["rewrap"]}],
            "roles": {"admin": [{"issuer": "CN=CA", "ou": "Admin"}]}
        }));
        let wanted = document(json!({
            "digest": "ab",
            "mappings": {
                "Trading": {"contexts": ["a"], "operations": ["decrypt"]}, "New": ["d"], "Same": ["c"]
            },
            "roles": {
                "admin": [{"issuer": "CN=CA", "ou": "Admin"}], "auditor": [{"issuer": "CN=CA", "cn": "aud"}]
            }
        }));
        assert_eq!(
            changes(&now, &wanted),
            [
                "- ou Gone: nothing",
                "+ ou New: d",
                "~ ou Trading: a, b → a: decrypt",
                "- rule: cn batch → 2fa: rewrap",
                "+ role auditor: cn aud, issuer CN=CA",
            ]
        );
        let mut turned = now.clone();
        turned.mappings.get_mut("Trading").unwrap().contexts.reverse();
        assert!(changes(&now, &turned).is_empty());
    }
}
