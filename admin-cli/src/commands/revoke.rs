//! `hsmctl revoke`, `unrevoke` and `revocations`: certificates that may do nothing any more.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use hsm_api::Base64;
use hsm_api::admin::{
    CrlInfo, RevocationInfo, RevocationMatch, RevocationsPage, RevokeCrlRequest, RevokeRequest,
    UnrevokeRequest,
};
use serde::Serialize;

use super::preview::{self, Preview};
use super::{CHANGE, READ, Session};
use crate::exit::{repeatable_failed, usage};
use crate::output::{self, note, or_dash};

const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
const END: &str = "-----END CERTIFICATE-----";
/// A large revocation list is many changes.
const CRL: std::time::Duration = std::time::Duration::from_secs(150);

/// Arguments of `revoke`.
#[derive(Debug, Args)]
pub(crate) struct Revoke {
    #[command(flatten)]
    what: Revoked,
    /// Issuer of the certificate with this serial number, as `openssl x509 -issuer -nameopt RFC2253` prints it.
    #[arg(long, value_name = "DN", requires = "serial", conflicts_with_all = ["cn", "fingerprint", "certificate", "crl"])]
    issuer: Option<String>,
    /// Why, in one line.
    #[arg(long, value_name = "TEXT")]
    reason: String,
    /// Say what would be revoked, and revoke nothing.
    #[arg(long)]
    dry_run: bool,
}

/// What is revoked: one of these.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Revoked {
    /// Every certificate with this last common name, whoever issued it.
    #[arg(long, value_name = "CN")]
    cn: Option<String>,
    /// The certificate with this serial number, hex; needs --issuer.
    #[arg(long, value_name = "HEX", requires = "issuer")]
    serial: Option<String>,
    /// The certificate with this SHA-256 fingerprint, hex. Better is --certificate or --serial: the same certificate can have
    /// several fingerprints, because a signature can be written in several ways.
    #[arg(long, value_name = "HEX")]
    fingerprint: Option<String>,
    /// This certificate, PEM or DER; by its serial number and issuer.
    #[arg(long, value_name = "FILE")]
    certificate: Option<PathBuf>,
    /// Every certificate that this revocation list names, PEM or DER, signed by a client CA of the nodes.
    #[arg(long, value_name = "FILE")]
    crl: Option<PathBuf>,
}

/// Arguments of `unrevoke`.
#[derive(Debug, Args)]
pub(crate) struct Unrevoke {
    #[command(flatten)]
    what: Unrevoked,
    /// Issuer of the certificate with this serial number, as `revocations` shows it.
    #[arg(long, value_name = "DN", requires = "serial", conflicts_with_all = ["cn", "fingerprint", "certificate"])]
    issuer: Option<String>,
    /// Say what would be taken back, and take nothing back.
    #[arg(long)]
    dry_run: bool,
}

/// Which revocation is taken back: one of these.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Unrevoked {
    /// That of this common name.
    #[arg(long, value_name = "CN")]
    cn: Option<String>,
    /// That of this serial number, hex; needs --issuer.
    #[arg(long, value_name = "HEX", requires = "issuer")]
    serial: Option<String>,
    /// That of this SHA-256 fingerprint, hex.
    #[arg(long, value_name = "HEX")]
    fingerprint: Option<String>,
    /// Those of this certificate, PEM or DER: by serial number and issuer, and by fingerprint, not by common name.
    #[arg(long, value_name = "FILE")]
    certificate: Option<PathBuf>,
}

pub(super) async fn revoke(session: &Session, args: &Revoke) -> Result<()> {
    if let Some(crl) = &args.what.crl {
        return revoke_crl(session, args, crl).await;
    }
    let certificate = args.what.certificate.as_deref().map(certificate).transpose()?;
    let matched = RevocationMatch {
        cn: args.what.cn.clone(),
        serial: args.what.serial.clone(),
        issuer: args.issuer.clone(),
        fingerprint: args.what.fingerprint.clone(),
    };
    let client = session.client(CHANGE)?;
    if args.dry_run {
        preview::check_role(session, &client, preview::ADMINISTER).await?;
        preview::check_leader(session, &client).await?;
        let would = format!("revoke {}", named(&matched, args.what.certificate.as_deref()));
        return Preview::new(would).print(session);
    }
    let request = RevokeRequest {
        what: certificate.is_none().then_some(matched),
        certificate,
        reason: args.reason.clone(),
    };
    let answer = session
        .ask(&client, "revoke", client.revoke(&request))
        .await
        .map_err(repeatable_failed)?;
    let done = &answer.body;
    for warning in &done.warnings {
        note(&format!("warning: {warning}"));
    }
    output::print_change(session.format(), &answer, || {
        let how = if done.added > 0 {
            "revoked"
        } else {
            "was revoked before"
        };
        lines(&done.revocations, how)
    })
}

async fn revoke_crl(session: &Session, args: &Revoke, path: &Path) -> Result<()> {
    let bytes = std::fs::read(path).with_context(|| format!("{}: cannot be read", path.display()))?;
    let client = session.client(CRL)?;
    if args.dry_run {
        preview::check_role(session, &client, preview::ADMINISTER).await?;
        preview::check_leader(session, &client).await?;
        let would = format!("revoke every certificate in {}", path.display());
        let preview = Preview::new(would).not_checked("the list's signature, which a node checks");
        return preview.print(session);
    }
    let request = RevokeCrlRequest {
        crl: Base64::from(bytes),
        reason: args.reason.clone(),
    };
    let answer = session
        .ask(&client, "revoke --crl", client.revoke_crl(&request))
        .await
        .map_err(repeatable_failed)?;
    let done = &answer.body;
    output::print_change(session.format(), &answer, || {
        let row = |list: &CrlInfo| {
            [
                list.issuer.clone(),
                list.entries.to_string(),
                or_dash(list.next_update.clone()),
            ]
        };
        let table = output::table(
            ["ISSUER", "CERTIFICATES", "NEXT LIST"],
            done.lists.iter().map(row),
        );
        format!("{table}\n{} revoked that were not before\n", done.added)
    })
}

pub(super) async fn unrevoke(session: &Session, args: &Unrevoke) -> Result<()> {
    let certificate = args.what.certificate.as_deref().map(certificate).transpose()?;
    let matched = RevocationMatch {
        cn: args.what.cn.clone(),
        serial: args.what.serial.clone(),
        issuer: args.issuer.clone(),
        fingerprint: args.what.fingerprint.clone(),
    };
    let client = session.client(CHANGE)?;
    if args.dry_run {
        preview::check_role(session, &client, preview::ADMINISTER).await?;
        preview::check_leader(session, &client).await?;
        let whom = named(&matched, args.what.certificate.as_deref());
        return Preview::new(format!("take the revocation of {whom} back")).print(session);
    }
    let request = UnrevokeRequest {
        what: certificate.is_none().then_some(matched),
        certificate,
    };
    let answer = session
        .ask(&client, "unrevoke", client.unrevoke(&request))
        .await
        .map_err(repeatable_failed)?;
    let done = &answer.body;
    if done.removed > 0 {
        note(
            "a node whose acl.revoked_file still names it adds it again within half a minute: take it out there first",
        );
    }
    output::print_change(session.format(), &answer, || {
        let how = if done.removed > 0 {
            "is not revoked any more"
        } else {
            "was not revoked"
        };
        lines(&done.revocations, how)
    })
}

/// All of them, as they are printed for programs.
#[derive(Debug, Serialize)]
struct Listed {
    revocations: Vec<RevocationInfo>,
}

pub(super) async fn list(session: &Session) -> Result<()> {
    let client = session.client(READ)?;
    let mut listed = Listed {
        revocations: Vec::new(),
    };
    let mut page = RevocationsPage::default();
    loop {
        let answer = session
            .ask(&client, "revocations", client.revocations(&page))
            .await?
            .into_body();
        listed.revocations.extend(answer.revocations);
        match answer.next {
            Some(next) => page.after = Some(next),
            None => break,
        }
    }
    output::print(session.format(), &listed, || {
        let row = |info: &RevocationInfo| [text(&info.what), info.reason.clone(), info.revoked_at.clone()];
        output::table(["WHAT", "REASON", "SINCE"], listed.revocations.iter().map(row))
    })
}

/// `cn gone: revoked`, a line each.
fn lines(what: &[RevocationMatch], how: &str) -> String {
    what.iter().map(|one| format!("{}: {how}\n", text(one))).collect()
}

fn text(what: &RevocationMatch) -> String {
    let parts = [
        ("cn", &what.cn),
        ("serial", &what.serial),
        ("issuer", &what.issuer),
        ("fingerprint", &what.fingerprint),
    ];
    let given = parts
        .into_iter()
        .filter_map(|(name, value)| Some(format!("{name} {}", value.as_ref()?)));
    given.collect::<Vec<_>>().join(", ")
}

fn named(what: &RevocationMatch, cert: Option<&Path>) -> String {
    match cert {
        Some(path) => format!("the certificate in {}", path.display()),
        None => text(what),
    }
}

/// A certificate's DER.
fn certificate(path: &Path) -> Result<Base64> {
    let bytes = std::fs::read(path).with_context(|| format!("{}: cannot be read", path.display()))?;
    der(&bytes).ok_or_else(|| {
        usage(format!(
            "{}: holds no certificate; give DER, or PEM ({BEGIN})",
            path.display()
        ))
    })
}

/// The first one of a PEM file, as TLS takes it for the holder's own.
fn der(bytes: &[u8]) -> Option<Base64> {
    // A sequence with a length of several bytes: no text begins so.
    if matches!(bytes, [0x30, 0x80..=0x84, ..]) {
        return Some(Base64::from(bytes));
    }
    let text = std::str::from_utf8(bytes).ok()?;
    let (_, after) = text.split_once(BEGIN)?;
    let (body, _) = after.split_once(END)?;
    let body: String = body.split_whitespace().collect();
    body.parse()
        .ok()
        .filter(|der: &Base64| !der.as_slice().is_empty())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn one_thing_is_named_and_a_serial_number_with_its_issuer() {
        let parses = |args: &str| Cli::try_parse_from(args.split(' ')).is_ok();
        for good in [
            "hsmctl revoke --reason lost --cn a",
            "hsmctl revoke --reason lost --serial ab --issuer CN=CA",
            "hsmctl revoke --reason lost --fingerprint ab",
            "hsmctl revoke --reason lost --certificate f",
            "hsmctl revoke --reason lost --crl f --dry-run",
            "hsmctl unrevoke --cn a",
            "hsmctl unrevoke --serial ab --issuer CN=CA",
            "hsmctl revocations",
        ] {
            assert!(parses(good), "{good}");
        }
        for bad in [
            "hsmctl revoke --cn a",
            "hsmctl revoke --reason lost",
            "hsmctl revoke --reason lost --serial ab",
            "hsmctl revoke --reason lost --cn a --issuer CN=CA",
            "hsmctl revoke --reason lost --cn a --certificate f",
            "hsmctl unrevoke",
            "hsmctl unrevoke --crl f",
            "hsmctl unrevoke --serial ab",
        ] {
            assert!(!parses(bad), "{bad}");
        }
    }

    #[test]
    fn a_certificate_is_pem_or_der() {
        let content = [0x30, 0x82, 1, 2, 3];
        assert_eq!(der(&content).unwrap().as_slice(), content);
        let pem = format!("Bag\n{BEGIN}\nMIIB\nAgM=\n{END}\n{BEGIN}\nAAAA\n{END}\n");
        assert_eq!(der(pem.as_bytes()).unwrap().as_slice(), [0x30, 0x82, 1, 2, 3]);
        for bad in [
            String::new(),
            "x".to_owned(),
            format!("{BEGIN}\n{END}"),
            format!("{BEGIN}\n!\n{END}"),
            pem.replace(END, ""),
        ] {
            assert!(der(bad.as_bytes()).is_none(), "{bad}");
        }
    }

    #[test]
    fn a_line_says_what_became_of_each() {
        let what = RevocationMatch {
            serial: Some("ab".to_owned()),
            issuer: Some("CN=CA".to_owned()),
            ..RevocationMatch::default()
        };
        assert_eq!(lines(&[what], "revoked"), "serial ab, issuer CN=CA: revoked\n");
    }
}
