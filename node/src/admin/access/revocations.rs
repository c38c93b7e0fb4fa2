//! Revocations as people name them, and as the state keeps them.

use std::ops::Bound;

use hsm_api::admin::{RevocationInfo, RevocationMatch, RevocationsResponse};
use raft_store::state::ClusterState;
use raft_store::state::access::RevocationKey;
use raft_store::state::table::RowKey;

use super::{document, invalid};
use crate::admin::call::CallError;
use crate::admin::seed::{MAX_NAME, serial};
use crate::admin::views::rfc3339;
use crate::identity::{Principal, dn};

/// Longest reason. The state keeps it with each revocation.
const MAX_REASON: usize = 200;
/// Revocations of one page.
const PAGE: usize = 1000;

/// What is to be matched.
///
/// # Errors
/// `invalid_argument` if it is nothing, more than one thing, or not what it should be.
pub fn key(what: &RevocationMatch) -> Result<RevocationKey, CallError> {
    let given = |text: &Option<String>| text.clone().filter(|text| !text.trim().is_empty());
    let parts = (
        given(&what.cn),
        given(&what.serial),
        given(&what.issuer),
        given(&what.fingerprint),
    );
    let key = match parts {
        (Some(cn), None, None, None) => RevocationKey::CommonName(cn),
        (None, Some(written), Some(issuer), None) => RevocationKey::Serial {
            serial: serial(&written).ok_or_else(|| {
                let problem = format!(
                    "{written:?} is no serial number in hex digits; write it as `openssl x509 -noout -serial` prints \
                     it after `serial=`"
                );
                invalid("serial", problem)
            })?,
            issuer: issuer_name(&issuer)?,
        },
        (None, None, None, Some(print)) => RevocationKey::Fingerprint(document::hash("fingerprint", &print)?),
        (None, Some(_), None, None) => {
            return Err(invalid(
                "issuer",
                "is missing: a serial number is one of an issuer; give the issuer's name",
            ));
        }
        _ => {
            return Err(invalid(
                "what",
                "give one of cn, serial with issuer, and fingerprint",
            ));
        }
    };
    let bytes = key.encode().len();
    if bytes > MAX_NAME {
        let problem = format!("names a certificate with {bytes} bytes, and at most {MAX_NAME} are kept");
        return Err(invalid("what", problem));
    }
    if RevocationKey::decode(&key.encode()).as_ref() != Some(&key) {
        return Err(invalid("what", "holds a NUL character; no name does"));
    }
    Ok(key)
}

fn issuer_name(written: &str) -> Result<String, CallError> {
    let issuer = dn::normalise(written);
    if issuer.contains('=') {
        return Ok(issuer);
    }
    let problem = format!(
        "{written:?} is no issuer's name; write it as `openssl x509 -noout -issuer -nameopt RFC2253` prints it after \
         `issuer=`"
    );
    Err(invalid("issuer", problem))
}

/// What a certificate is revoked by: its signature covers its serial number. A fingerprint would miss the same
/// certificate with another encoding of its signature, which whoever has it can make of an ECDSA one.
///
/// # Errors
/// `invalid_argument` if it is no certificate.
pub fn of_certificate(der: &[u8]) -> Result<RevocationKey, CallError> {
    let holder = Principal::from_der(der).map_err(|error| invalid("certificate", error))?;
    Ok(RevocationKey::Serial {
        issuer: holder.issuer_dn.clone(),
        serial: holder.serial.clone(),
    })
}

/// Everything that revokes this certificate and no other.
///
/// # Errors
/// `invalid_argument` if it is no certificate.
pub fn all_of_certificate(der: &[u8]) -> Result<Vec<RevocationKey>, CallError> {
    let holder = Principal::from_der(der).map_err(|error| invalid("certificate", error))?;
    Ok(vec![
        RevocationKey::Serial {
            issuer: holder.issuer_dn.clone(),
            serial: holder.serial.clone(),
        },
        RevocationKey::Fingerprint(holder.fingerprint),
    ])
}

/// Why, as it is kept.
///
/// # Errors
/// `invalid_argument` if there is none, or it is no line of a sensible length.
pub fn reason(text: &str) -> Result<String, CallError> {
    let text = text.trim();
    let fits = (1..=MAX_REASON).contains(&text.chars().count()) && !text.chars().any(char::is_control);
    if fits {
        return Ok(text.to_owned());
    }
    let problem = format!("say why, in one line of 1 to {MAX_REASON} characters");
    Err(invalid("reason", problem))
}

/// What people may have meant otherwise.
#[must_use]
pub fn warning(key: &RevocationKey, issuers: &[String]) -> Option<String> {
    match key {
        RevocationKey::Serial { issuer, .. } if !issuers.contains(issuer) => Some(format!(
            "the issuer {issuer} is none of this node's client CAs ({}); this is right for an intermediate CA only",
            issuers.join("; ")
        )),
        _ => None,
    }
}

/// As people name it.
#[must_use]
pub fn matching(key: &RevocationKey) -> RevocationMatch {
    let mut what = RevocationMatch::default();
    match key {
        RevocationKey::CommonName(cn) => what.cn = Some(cn.clone()),
        RevocationKey::Fingerprint(hash) => what.fingerprint = Some(hex::encode(hash)),
        RevocationKey::Serial { issuer, serial } => {
            what.serial = Some(serial.clone());
            what.issuer = Some(issuer.clone());
        }
    }
    what
}

/// For the audit.
#[must_use]
pub fn text(key: &RevocationKey) -> String {
    match key {
        RevocationKey::CommonName(cn) => format!("cn {cn}"),
        RevocationKey::Fingerprint(hash) => format!("fingerprint {}", hex::encode(hash)),
        RevocationKey::Serial { issuer, serial } => format!("serial {serial} of {issuer}"),
    }
}

/// Where a page begins, as the one before has said.
///
/// # Errors
/// `invalid_argument`.
pub fn place(after: &str) -> Result<RevocationKey, CallError> {
    let key = hex::decode(after)
        .ok()
        .and_then(|bytes| RevocationKey::decode(&bytes));
    key.ok_or_else(|| invalid("after", "is not where a page ends"))
}

/// One page of what is revoked, after a place.
#[must_use]
pub fn page(state: &ClusterState, after: Option<&RevocationKey>) -> RevocationsResponse {
    let begin = after.map_or(Bound::Unbounded, |key| Bound::Excluded(key.clone()));
    let mut rows = state.revocations().range((begin, Bound::Unbounded));
    let mut last = None;
    let mut revocations = Vec::new();
    for (key, revocation) in rows.by_ref().take(PAGE) {
        last = Some(key);
        revocations.push(RevocationInfo {
            what: matching(key),
            reason: revocation.reason.clone(),
            revoked_at: rfc3339(revocation.revoked_at),
        });
    }
    let more = rows.next().is_some();
    RevocationsResponse {
        revocations,
        total: state.revocations().len() as u64,
        next: last.filter(|_| more).map(|key| hex::encode(key.encode())),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use raft_store::command::{AddRevocations, Op};

    use super::*;
    use crate::identity::test_certs::TestCa;
    use crate::policy::Revocations;
    use crate::rotation::testing::World;

    fn what(cn: &str, serial: &str, issuer: &str, fingerprint: &str) -> RevocationMatch {
        let given = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        RevocationMatch {
            cn: given(cn),
            serial: given(serial),
            issuer: given(issuer),
            fingerprint: given(fingerprint),
        }
    }

    #[test]
    fn each_kind_is_read_as_people_write_it() {
        assert_eq!(
            key(&what("gone", "", "", "")),
            Ok(RevocationKey::CommonName("gone".to_owned()))
        );
        assert_eq!(
            key(&what("", "00:AB:12", "cn = A, o = B", "")),
            Ok(RevocationKey::Serial {
                issuer: "CN=A,O=B".to_owned(),
                serial: "ab12".to_owned()
            })
        );
        let print = ["AB"; 32].join(":");
        assert_eq!(
            key(&what("", "", "", &print)),
            Ok(RevocationKey::Fingerprint([0xab; 32]))
        );
    }

    #[test]
    fn what_matches_nothing_or_too_much_is_refused() {
        for (what, says) in [
            (what("", "", "", ""), "what: give one of"),
            (what("a", "", "", &"ab".repeat(32)), "what: give one of"),
            (what("a", "1", "CN=A", ""), "what: give one of"),
            (what("", "", "CN=A", ""), "what: give one of"),
            (what(" ", "", "", ""), "what: give one of"),
            (what("", "12", "", ""), "issuer: is missing"),
            (what("", "zebra", "CN=A", ""), "serial: \"zebra\""),
            (what("", "12", "Client CA", ""), "issuer: \"Client CA\""),
            (what("", "", "", "abcd"), "fingerprint: \"abcd\""),
            (
                what(&"x".repeat(1001), "", "", ""),
                "what: names a certificate with",
            ),
        ] {
            let error = key(&what).unwrap_err();
            assert!(error.detail.starts_with(says), "{what:?}: {error}");
        }
    }

    #[test]
    fn a_certificate_is_revoked_by_what_its_signature_covers() {
        let ca = TestCa::new("Clients");
        let (mine, other) = (ca.client("a", "Trading").der, ca.client("a", "Trading").der);
        let [mine_principal, other_principal] = [&mine, &other].map(|der| Principal::from_der(der).unwrap());
        let revoked: Revocations = [of_certificate(&mine).unwrap()].into_iter().collect();
        assert!(revoked.contains(&mine_principal) && !revoked.contains(&other_principal));
        let all = all_of_certificate(&mine).unwrap();
        assert!(all.contains(&of_certificate(&mine).unwrap()));
        assert!(all.contains(&RevocationKey::Fingerprint(mine_principal.fingerprint)));
        assert!(of_certificate(b"x").is_err() && all_of_certificate(b"x").is_err());
    }

    #[test]
    fn a_reason_is_one_line() {
        assert_eq!(reason(" laptop lost "), Ok("laptop lost".to_owned()));
        for bad in ["", "  ", "a\nb", &"x".repeat(201)] {
            assert!(reason(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_serial_number_of_an_unknown_issuer_is_warned_about() {
        let issuers = vec!["CN=A".to_owned()];
        let by_serial = |issuer: &str| RevocationKey::Serial {
            issuer: issuer.to_owned(),
            serial: "1".to_owned(),
        };
        assert_eq!(warning(&by_serial("CN=A"), &issuers), None);
        assert!(warning(&by_serial("CN=B"), &issuers).unwrap().contains("CN=B"));
    }

    #[test]
    fn pages_hold_every_revocation_once() {
        let mut world = World::new(1);
        let by_cn = |n: usize| (RevocationKey::CommonName(format!("c{n}")), "lost".to_owned());
        let all: Vec<_> = (0..PAGE + 2).map(by_cn).collect();
        for chunk in all.chunks(500) {
            world.ok(Op::AddRevocations(AddRevocations {
                revocations: chunk.to_vec(),
            }));
        }
        let first = page(&world.state, None);
        assert_eq!((first.revocations.len(), first.total), (PAGE, 1002));
        let after = place(&first.next.unwrap()).unwrap();
        let second = page(&world.state, Some(&after));
        assert_eq!((second.revocations.len(), second.next), (2, None));
        let mut names: Vec<_> = first
            .revocations
            .into_iter()
            .chain(second.revocations)
            .map(|info| info.what.cn.unwrap())
            .collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), PAGE + 2);
        assert!(place("zz").is_err() && place("00").is_err());
    }
}
