//! What is sent about access control and revocations.

use std::collections::BTreeMap;

use hsm_api::Base64;
use hsm_api::admin::*;

use super::{Sample, answer, hash, list, request, text, time, with_alternatives};

/// Both forms of a mapping.
pub(crate) fn mappings() -> [AclMapping; 2] {
    let mapping = |operations| AclMapping {
        contexts: list(&["exchange-key"]),
        operations,
    };
    [mapping(None), mapping(Some(list(&["decrypt"])))]
}

pub(super) fn samples() -> Vec<Sample> {
    let issuer = || Some(text("CN=Clients"));
    let who = AclWho {
        issuer: issuer(),
        ou: Some(text("Trading")),
        cn: Some(text("batch")),
    };
    let rule = AclRule {
        who: who.clone(),
        contexts: list(&["2fa"]),
        operations: list(&["rewrap"]),
    };
    let role = AclRole {
        issuer: issuer(),
        ou: Some(text("Admin")),
        cn: Some(text("admin")),
        spki_sha256: Some(hash()),
    };
    let [everything, some] = mappings();
    let acl = AclDocument {
        digest: Some(hash()),
        mappings: BTreeMap::from([(text("Trading"), everything), (text("Reports"), some)]),
        rules: vec![rule.clone()],
        roles: BTreeMap::from([(text("admin"), vec![role.clone()])]),
    };
    let set = SetAclRequest {
        acl: acl.clone(),
        dry_run: true,
    };
    let was_set = SetAclResponse { digest: hash() };
    let said = AclAnswer {
        allowed: true,
        reason: text("allowed by mappings.Trading"),
        operations: list(&["encrypt"]),
    };
    let by_name = RevocationMatch {
        cn: Some(text("gone")),
        ..RevocationMatch::default()
    };
    let every_way = RevocationMatch {
        cn: Some(text("gone")),
        serial: Some(text("12ab")),
        issuer: issuer(),
        fingerprint: Some(hash()),
    };
    let certificate = || Some(Base64::from(b"abc"));
    let revoke = RevokeRequest {
        what: Some(by_name.clone()),
        certificate: certificate(),
        reason: text("lost"),
    };
    let revoked = |warnings: &[&str]| RevokeResponse {
        revocations: vec![by_name.clone()],
        added: 1,
        warnings: list(warnings),
    };
    let unrevoke = UnrevokeRequest {
        what: Some(by_name.clone()),
        certificate: certificate(),
    };
    let unrevoked = UnrevokeResponse {
        revocations: vec![by_name.clone()],
        removed: 1,
    };
    let crl = RevokeCrlRequest {
        crl: Base64::from(b"abc"),
        reason: text("monthly"),
    };
    let crl_info = |next_update: Option<String>| CrlInfo {
        issuer: text("CN=Clients"),
        entries: 2,
        next_update,
    };
    let crl_revoked = RevokeCrlResponse {
        lists: vec![crl_info(Some(time()))],
        added: 2,
    };
    let revocation = RevocationInfo {
        what: by_name.clone(),
        reason: text("lost"),
        revoked_at: time(),
    };
    let page = |next: Option<&str>| RevocationsResponse {
        revocations: vec![revocation.clone()],
        total: 1001,
        next: next.map(text),
    };
    vec![
        request("AclDocument", &acl, &[]),
        request("AclRule", &rule, &[]),
        request("AclWho", &who, &[]),
        request("AclRole", &role, &["issuer"]),
        request("SetAclRequest", &set, &[]),
        answer("SetAclResponse", &was_set, &was_set),
        answer("AclAnswer", &said, &said),
        with_alternatives(request("RevocationMatch", &every_way, &[])),
        with_alternatives(request("RevokeRequest", &revoke, &[])),
        answer("RevokeResponse", &revoked(&["an intermediate CA"]), &revoked(&[])),
        with_alternatives(request("UnrevokeRequest", &unrevoke, &[])),
        answer("UnrevokeResponse", &unrevoked, &unrevoked),
        request("RevokeCrlRequest", &crl, &[]),
        answer("RevokeCrlResponse", &crl_revoked, &crl_revoked),
        answer("CrlInfo", &crl_info(Some(time())), &crl_info(None)),
        answer("RevocationsResponse", &page(Some("00ab")), &page(None)),
        answer("RevocationInfo", &revocation, &revocation),
    ]
}
