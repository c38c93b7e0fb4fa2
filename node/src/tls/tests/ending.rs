//! CAs and certificates that end: nobody is let in below one that has, and what is about to is warned of.

use super::*;

fn ders(ders: &[&[u8]]) -> Vec<CertificateDer<'static>> {
    ders.iter()
        .map(|der| CertificateDer::from(der.to_vec()))
        .collect()
}

/// Seconds since the Unix epoch at the beginning of a year.
fn beginning(year: i32) -> i64 {
    rcgen::date_time_ymd(year, 1, 1).unix_timestamp()
}

/// TLS does not ask when a configured CA ends.
#[tokio::test]
async fn nobody_is_let_in_below_a_configured_ca_that_has_ended() {
    use rustls_pki_types::UnixTime;

    use crate::identity::IdentityError;

    let mut folder = Folder::new("Server's");
    let [ended, renewed] = TestCa::ending_and_renewed("Clients", 1990);
    let between = folder.ca.intermediate_until("Between", 1990);
    let write = |pems: &[&String]| {
        let all: String = pems.iter().map(|pem| pem.as_str()).collect();
        std::fs::write(folder.path("ca.crt"), all).unwrap();
    };
    for ca in [&ended, &between] {
        write(&[&folder.ca.pem, &ca.pem]);
        let tls = load_api(&folder.api(), None, false).unwrap();
        let chain = ders(&[&ca.client("trading-1", "Trading").der]);
        assert_eq!(tls.principal(&chain).unwrap_err(), IdentityError::CaEnded);
        let shown = tls.vouched(&chain, UnixTime::now());
        assert!(
            matches!(shown, Err(VouchedError::Identity(IdentityError::CaEnded))),
            "{shown:?}"
        );
        // The others are not touched.
        let other = ders(&[&folder.ca.client("trading-2", "Trading").der]);
        assert!(tls.principal(&other).is_ok());
    }
    // Renewed for the same key, it is another certificate of the same CA.
    write(&[&folder.ca.pem, &ended.pem, &renewed.pem]);
    let tls = load_api(&folder.api(), None, false).unwrap();
    let chain = ders(&[&ended.client("trading-1", "Trading").der]);
    assert!(tls.principal(&chain).is_ok());
    // Handshakes alone would have let everybody in.
    folder.ca = ended;
    folder
        .ca
        .server("server", None)
        .write(folder.dir.path(), "server");
    std::fs::write(folder.path("ca.crt"), &folder.ca.pem).unwrap();
    let tls = load_api(&folder.api(), None, false).unwrap();
    let cert = folder.ca.client("trading-1", "Trading");
    let (chain, _, _) = shake(Arc::clone(&tls.server), with(&folder.ca, &cert))
        .await
        .unwrap();
    assert_eq!(tls.principal(&chain).unwrap_err(), IdentityError::CaEnded);
}

/// A client decides what it sends along, and must not gain the time of a CA that its certificate does not hang on.
#[test]
fn what_a_client_sends_along_brings_no_ended_ca_back() {
    use crate::identity::IdentityError;

    let folder = Folder::new("Clients");
    let load = |ended: &TestCa| {
        let both = [&folder.ca.pem, &ended.pem].map(String::as_str);
        std::fs::write(folder.path("ca.crt"), both.concat()).unwrap();
        load_api(&folder.api(), None, false).unwrap()
    };
    // The root is named by the ended intermediate that comes along.
    let between = folder.ca.intermediate_until("Between", 1990);
    let leaf = between.client("trading-1", "Trading");
    let chain = ders(&[&leaf.der, &between.der]);
    assert_eq!(
        load(&between).principal(&chain).unwrap_err(),
        IdentityError::CaEnded
    );
    // A certificate that has nothing to do with the client's names the valid CA.
    let [ended, _] = TestCa::ending_and_renewed("Ended", 1990);
    let leaf = ended.client("trading-1", "Trading");
    let junk = TestCa::new("Clients");
    let chain = ders(&[&leaf.der, &junk.der]);
    assert_eq!(
        load(&ended).principal(&chain).unwrap_err(),
        IdentityError::CaEnded
    );
}

#[test]
fn a_caller_ends_with_the_first_of_the_certificates_that_it_hangs_on() {
    let folder = Folder::new("Clients");
    let tls = load_api(&folder.api(), None, false).unwrap();
    let ends = |chain: &[&[u8]]| tls.principal(&ders(chain)).unwrap().ends();
    let direct = folder.ca.issue("a", None, &[], 2090);
    assert_eq!(ends(&[&direct.der]), beginning(2090));
    let between = folder.ca.intermediate_until("Between", 2080);
    let below = between.issue("a", None, &[], 2090);
    assert_eq!(ends(&[&below.der, &between.der]), beginning(2080));
    // One that has ended already came along for nothing.
    let unused = TestCa::new("Elsewhere").intermediate_until("Unused", 1990);
    assert_eq!(ends(&[&below.der, &between.der, &unused.der]), beginning(2080));

    // A configured CA, too.
    let [ending, _] = TestCa::ending_and_renewed("Clients", 2070);
    std::fs::write(folder.path("ca.crt"), &ending.pem).unwrap();
    let tls = load_api(&folder.api(), None, false).unwrap();
    let chain = ders(&[&ending.issue("a", None, &[], 2090).der]);
    assert_eq!(tls.principal(&chain).unwrap().ends(), beginning(2070));
}

#[test]
fn a_ca_that_ends_soon_is_warned_of_when_a_node_starts() {
    use std::time::{Duration, SystemTime, UNIX_EPOCH};

    let folder = Folder::new("Clients");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let days = |days: u64| now + Duration::from_secs(days * 24 * 60 * 60);
    let soon = folder.ca.intermediate_ending("Soon", days(10));
    let ended = folder.ca.intermediate_until("Ended", 1990);
    let later = folder.ca.intermediate_ending("Later", days(100));
    let all = [&folder.ca.pem, &soon.pem, &ended.pem, &later.pem].map(String::as_str);
    std::fs::write(folder.path("ca.crt"), all.concat()).unwrap();
    let lines = crate::test_log::Lines::of(|| drop(load_api(&folder.api(), None, false).unwrap()));
    assert_eq!(lines.count("message", "ends soon"), 1);
    assert_eq!(lines.count("message", "has ended"), 1);
    assert_eq!(lines.count("ca", "CN=Soon"), 1, "{}", lines.text());
    assert_eq!(lines.count("ca", "CN=Ended"), 1, "{}", lines.text());
    assert_eq!(lines.count("key", "server.tls.ca_path"), 2);
}
