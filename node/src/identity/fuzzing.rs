//! See [`crate::fuzzing`].

use super::{CaCertificate, Principal, dn, peer_identity};

/// A certificate as an identity: names, serial number and issuer are in the one form in which role bindings and
/// revocations are compared with them.
pub fn certificate(data: &[u8]) -> bool {
    let read = Principal::from_der(data);
    if let Ok(ca) = CaCertificate::from_der(data) {
        assert_eq!(dn::normalise(&ca.subject_dn), ca.subject_dn);
    }
    if let Ok(node) = peer_identity(data) {
        for name in [&node.cluster, &node.name] {
            assert!(raft_store::names::NodeName::new(name).is_ok(), "{name:?}");
        }
    }
    let Ok(principal) = read else { return false };
    assert_eq!(
        dn::normalise(&principal.issuer_dn),
        principal.issuer_dn,
        "an operator who copies the name means another one"
    );
    assert!(principal.issuer_dn.chars().all(|c| !c.is_control()), "one line");
    let digits = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    assert!(!principal.serial.is_empty() && principal.serial.bytes().all(digits));
    assert!(principal.serial == "0" || !principal.serial.starts_with('0'));
    assert!(principal.sans.iter().all(|san| san.contains(':')));
    let longer = [data, &[0]].concat();
    assert!(
        Principal::from_der(&longer).is_err(),
        "what follows was passed over"
    );
    true
}

/// A name as people write it: there is one form of it. Every text has one.
pub fn distinguished_name(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else {
        return false;
    };
    let name = dn::normalise(text);
    assert_eq!(dn::normalise(&name), name);
    name.contains('=')
}
