//! The way back for a cluster that accepts no administrator's certificate any more, as docs/operations.md describes it.

use super::*;
use crate::admin::authorise::{Act, authorise};
use crate::policy::{Acl, Policy, RevocationKey, Role, RoleEntry};

/// What docs/operations.md says to do when no administrator's certificate is left that is accepted.
#[tokio::test]
async fn a_ca_made_anew_under_its_name_brings_an_administrator_back_who_can_take_revocations_back() {
    let folder = Folder::new("Clients");
    let acl = Acl {
        roles: vec![RoleEntry {
            role: Role::Admin,
            issuer: "CN=Clients".to_owned(),
            ou: Some("Admin".to_owned()),
            cn: None,
            spki_sha256: None,
        }],
        ..Acl::default()
    };
    let may = |ca: &TestCa, revoked: &[RevocationKey]| {
        let tls = load_api(&folder.api(), None, false).unwrap();
        let chain = [CertificateDer::from(ca.client("root", "Admin").der)];
        let admin = tls.principal(&chain).unwrap();
        let policy = Policy::new(&acl, revoked.iter().cloned());
        authorise(&policy, &admin, Act::Unrevoke).is_ok()
    };
    let lost = Authority::from_der(&folder.ca.der).unwrap();
    let all = [
        RevocationKey::Fingerprint(lost.fingerprint),
        RevocationKey::Serial {
            issuer: lost.issuer_dn,
            serial: lost.serial,
        },
    ];
    assert!(may(&folder.ca, &[]));
    for revoked in &all {
        assert!(!may(&folder.ca, std::slice::from_ref(revoked)), "{revoked:?}");
    }
    let renewed = TestCa::new("Clients");
    let both = [folder.ca.pem.as_str(), renewed.pem.as_str()].concat();
    std::fs::write(folder.path("ca.crt"), both).unwrap();
    assert!(may(&renewed, &all), "of the same name, with another key");
    assert!(!may(&folder.ca, &all));
    // Of a single certificate the next one of the same CA does.
    let first = Principal::from_der(&folder.ca.client("root", "Admin").der).unwrap();
    let single = RevocationKey::Serial {
        issuer: first.issuer_dn.clone(),
        serial: first.serial.clone(),
    };
    assert!(may(&folder.ca, &[single]));
    // Not where every certificate of the name is meant.
    assert!(!may(&renewed, &[RevocationKey::CommonName("root".to_owned())]));
}

#[tokio::test]
async fn another_certificate_for_the_key_of_a_revoked_ca_brings_nobody_back() {
    let folder = Folder::new("Server's");
    let [lost, same_key] = TestCa::ending_and_renewed("Clients", 4090);
    let both = [lost.pem.as_str(), same_key.pem.as_str()].concat();
    std::fs::write(folder.path("ca.crt"), both).unwrap();
    let tls = load_api(&folder.api(), None, false).unwrap();
    let admin = [CertificateDer::from(same_key.client("root", "Admin").der)];
    let hangs_on = tls.principal(&admin).unwrap().authorities().to_vec();
    assert!(hangs_on.contains(&Authority::from_der(&lost.der).unwrap()));
}
