//! Who may do what, changed at run time: on every node, at once, and for connections that are open. What nobody may
//! do is lock everybody out.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cluster_tests::{Identity, Node, Playground, until};
use hsm_api::admin::{
    AclMapping, AclQuestion, RevocationMatch, RevokeRequest, SetAclRequest, UnrevokeRequest,
};
use hsm_api::client::Method;
use hsm_api::data::EncryptRequest;
use hsm_api::{Client, ErrorCode, paths};
use rustls::{ClientConfig, HandshakeKind, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::audit::every_change_is_audited_where_it_was_asked_for_and_on_the_leader;
#[cfg(feature = "failpoints")]
use crate::audit::what_a_follower_lets_through_the_leader_refuses;
use crate::common::{CONTEXT, formed_with, open, seal};
use crate::roles::each_role_may_what_it_is_for;

/// From the answer to a change until every node that is reached goes by it.
const IN_FORCE: Duration = Duration::from_secs(1);
/// The same, where it is only waited for.
const SETTLED: Duration = Duration::from_secs(10);
/// The name of every playground's cluster.
const CLUSTER: &str = "playground";
const OPERATIONS: [&str; 4] = ["encrypt", "decrypt", "rewrap", "datakey"];

/// One connection that is kept open, asked in plain HTTP/1.1: a client of the API would open another one.
struct Open(TlsStream<TcpStream>);

impl Open {
    async fn connect(cluster: &Playground, node: &Node, who: &Identity) -> Result<Self> {
        Self::connect_with(Self::config(cluster, who)?, node).await
    }

    /// What keeps sessions that can be resumed, as clients do.
    fn config(cluster: &Playground, who: &Identity) -> Result<Arc<ClientConfig>> {
        let mut roots = RootCertStore::empty();
        let ca = std::fs::read(cluster.pki().dir().join("ca.crt"))?;
        roots.add(CertificateDer::from_pem_slice(&ca)?)?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots)
            .with_client_auth_cert(
                vec![CertificateDer::from(who.der()?)],
                PrivateKeyDer::from_pem_slice(who.key.as_bytes())?,
            )?;
        Ok(Arc::new(config))
    }

    async fn connect_with(config: Arc<ClientConfig>, node: &Node) -> Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", node.api_port)).await?;
        let name = ServerName::try_from("localhost")?;
        Ok(Self(TlsConnector::from(config).connect(name, stream).await?))
    }

    /// The status of one encryption; nothing if the connection has ended.
    async fn encrypt(&mut self) -> Option<u16> {
        let body = format!(r#"{{"context":"{CONTEXT}","plaintext":"aGVsbG8="}}"#);
        let request = format!(
            "POST {} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            paths::ENCRYPT,
            body.len()
        );
        self.0.write_all(request.as_bytes()).await.ok()?;
        let mut answer = Vec::new();
        let mut piece = [0_u8; 4096];
        loop {
            let read = timeout(Duration::from_secs(5), self.0.read(&mut piece)).await;
            let length = read.ok()?.ok().filter(|length| *length > 0)?;
            answer.extend_from_slice(&piece[..length]);
            if let Some(status) = whole(&answer) {
                return Some(status);
            }
        }
    }

    /// Until it is refused or closed.
    async fn until_refused(mut self) {
        while let Some(status) = self.encrypt().await {
            if status == 403 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Until an encryption is answered with this status; nothing if the connection has ended before.
    async fn until_answered(mut self, status: u16) -> Option<Self> {
        while self.encrypt().await? != status {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Some(self)
    }

    /// Until the node has closed it, without being asked anything.
    async fn until_closed(mut self) -> Result<()> {
        let mut byte = [0_u8; 1];
        match timeout(Duration::from_secs(10), self.0.read(&mut byte)).await {
            Err(_) => bail!("the connection is still open"),
            Ok(Ok(1..)) => bail!("something was sent"),
            Ok(_) => Ok(()),
        }
    }
}

/// The status of an answer that has arrived whole.
fn whole(answer: &[u8]) -> Option<u16> {
    let text = String::from_utf8_lossy(answer);
    let (head, body) = text.split_once("\r\n\r\n")?;
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "))?;
    let length: usize = length.trim().parse().ok()?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    (body.len() >= length).then_some(status)
}

/// An open connection to every node, each of which has been answered.
async fn open_everywhere(cluster: &Playground, who: &Identity) -> Result<Vec<Open>> {
    let mut all = Vec::new();
    for node in cluster.nodes() {
        let mut open = Open::connect(cluster, &node, who).await?;
        ensure!(
            open.encrypt().await == Some(200),
            "{} does not encrypt",
            node.id()
        );
        all.push(open);
    }
    Ok(all)
}

/// The code that one node answers an encryption with, on a new connection.
async fn code_on(cluster: &Playground, node: &Node, who: &Identity) -> Result<Option<ErrorCode>> {
    let client = cluster.pki().client(Some(who), &[node.endpoint()])?;
    match client.encrypt(&EncryptRequest::new(CONTEXT, b"x")).await {
        Ok(_) => Ok(None),
        Err(error) => Ok(Some(error.code().with_context(|| error.to_string())?)),
    }
}

/// Until every node answers an encryption with this; a follower hears of a change a moment after its answer.
async fn everywhere(cluster: &Playground, who: &Identity, wanted: Option<ErrorCode>) -> Result<()> {
    for node in cluster.nodes() {
        let what = format!("{wanted:?} from {}", node.id());
        until(&what, SETTLED, async || {
            (code_on(cluster, &node, who).await.ok()? == wanted).then_some(())
        })
        .await?;
    }
    Ok(())
}

fn write(cluster: &Playground, name: &str, content: impl AsRef<[u8]>) -> Result<PathBuf> {
    let path = cluster.scratch().join(name);
    std::fs::write(&path, content)?;
    Ok(path)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("folder is not UTF-8")
}

async fn acl(cluster: &Playground) -> Result<Value> {
    let printed = cluster.hsmctl(&["acl", "get", "-o", "json"]).await?.ok()?;
    Ok(serde_json::from_slice(&printed)?)
}

/// Puts changed rules in force, and waits until every node goes by them.
pub(crate) async fn change_acl(cluster: &Playground, change: impl FnOnce(&mut Value)) -> Result<()> {
    let mut document = acl(cluster).await?;
    change(&mut document);
    let file = write(cluster, "acl.json", document.to_string())?;
    let set = [
        "acl",
        "set",
        "--file",
        text(&file)?,
        "--confirm",
        CLUSTER,
        "-o",
        "json",
    ];
    let done: Value = serde_json::from_slice(&cluster.hsmctl(&set).await?.ok()?)?;
    for node in cluster.nodes() {
        let client = cluster.client_on("admin", node.number)?;
        until("the new rules", SETTLED, async || {
            let digest = client.acl().await.ok()?.into_body().digest?;
            (done["digest"] == digest.as_str()).then_some(())
        })
        .await
        .with_context(|| node.id())?;
    }
    Ok(())
}

fn serial_hex(who: &Identity) -> Result<String> {
    Ok(hex::encode(who.serial()?))
}

fn by_serial(cluster: &Playground, who: &Identity) -> Result<RevocationMatch> {
    Ok(RevocationMatch {
        serial: Some(serial_hex(who)?),
        issuer: Some(cluster.pki().client_ca_name()),
        ..RevocationMatch::default()
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_revocation_of_each_kind_closes_open_connections_everywhere_and_can_be_taken_back() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let issuer = cluster.pki().client_ca_name();
    for kind in ["cn", "serial", "fingerprint", "certificate", "crl"] {
        let cn = format!("victim-{kind}");
        let victim = cluster.pki().issue(&cn, Some("Trading"))?;
        let bystander = cluster.pki().issue("bystander", Some("Trading"))?;
        let file = match kind {
            "crl" => write(&cluster, "list.pem", cluster.pki().crl(&[&victim])?)?,
            _ => write(&cluster, "victim.pem", &victim.cert)?,
        };
        let file = text(&file)?;
        let (serial, print) = (serial_hex(&victim)?, hex::encode(Sha256::digest(victim.der()?)));
        let named = match kind {
            "cn" => vec!["--cn", &cn],
            "serial" => vec!["--serial", &serial, "--issuer", &issuer],
            "fingerprint" => vec!["--fingerprint", &print],
            "certificate" => vec!["--certificate", file],
            _ => vec!["--crl", file],
        };
        let open = open_everywhere(&cluster, &victim).await?;
        let others = open_everywhere(&cluster, &bystander).await?;
        let revoke = [&["revoke", "--reason", "lost"][..], &named].concat();
        cluster.hsmctl(&revoke).await?.ok().context(kind)?;
        let returned = Instant::now();
        for open in open {
            open.until_closed().await.context(kind)?;
        }
        let took = returned.elapsed();
        ensure!(took < IN_FORCE, "{kind}: closed {took:?} after the answer");
        everywhere(&cluster, &victim, Some(ErrorCode::CertificateRevoked)).await?;
        for mut open in others {
            ensure!(
                open.encrypt().await == Some(200),
                "{kind}: somebody else was cut off"
            );
        }
        // Doing it twice is doing it once.
        cluster.hsmctl(&revoke).await?.ok().context(kind)?;
        let listed = cluster.hsmctl_as("auditor", &["revocations", "-o", "json"], &[]);
        let listed: Value = serde_json::from_slice(&listed.await?.ok()?)?;
        ensure!(
            listed["revocations"].as_array().map(Vec::len) == Some(1),
            "{kind}: {listed}"
        );
        ensure!(listed["revocations"][0]["reason"] == "lost", "{listed}");

        let named = if kind == "crl" {
            vec!["--serial", &serial, "--issuer", &issuer]
        } else {
            named
        };
        let unrevoke = [&["unrevoke"][..], &named].concat();
        cluster.hsmctl(&unrevoke).await?.ok().context(kind)?;
        everywhere(&cluster, &victim, None).await?;
    }
    every_change_is_audited_where_it_was_asked_for_and_on_the_leader(&cluster).await?;
    #[cfg(feature = "failpoints")]
    what_a_follower_lets_through_the_leader_refuses(&cluster).await?;
    cluster.passed();
    Ok(())
}

/// "revoke returned" to "every node refuses the certificate on a connection that was open", the slowest of twenty.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_revocation_is_effective_on_every_node_within_a_second() -> Result<()> {
    const ROUNDS: usize = 20;
    let cluster = Playground::start(3).await?;
    let mut took = Vec::new();
    for round in 0..ROUNDS {
        let victim = cluster.pki().issue(&format!("victim-{round}"), Some("Trading"))?;
        let mut busy = tokio::task::JoinSet::new();
        for open in open_everywhere(&cluster, &victim).await? {
            busy.spawn(open.until_refused());
        }
        // Through the leader and through followers.
        let through = cluster.node(u32::try_from(round % 3)? + 1);
        let admin = cluster.client_on("admin", through.number)?;
        let request = RevokeRequest {
            what: Some(by_serial(&cluster, &victim)?),
            certificate: None,
            reason: "measured".to_owned(),
        };
        admin.revoke(&request).await?;
        let returned = Instant::now();
        while let Some(refused) = busy.join_next().await {
            refused?;
        }
        took.push(returned.elapsed());
    }
    took.sort();
    let (half, slowest) = (took[ROUNDS / 2], took[ROUNDS - 1]);
    println!("refused everywhere after the answer: half within {half:?}, all {ROUNDS} within {slowest:?}");
    ensure!(slowest < IN_FORCE, "{took:?}");
    a_change_of_rules_is_too(&cluster).await?;
    no_handshake_is_spared(&cluster).await?;
    cluster.passed();
    Ok(())
}

/// On connections that stay open: what is taken is refused, and what is given back is done.
async fn a_change_of_rules_is_too(cluster: &Playground) -> Result<()> {
    const ROUNDS: usize = 6;
    let who = cluster.pki().issue("swings", Some("Swing"))?;
    change_acl(cluster, |acl| acl["mappings"]["Swing"] = json!([CONTEXT])).await?;
    everywhere(cluster, &who, None).await?;
    let mut open = open_everywhere(cluster, &who).await?;
    let mut rules = cluster.client_on("admin", 1)?.acl().await?.into_body();
    let mut took = Vec::new();
    for round in 0..ROUNDS {
        let (status, contexts) = match round % 2 {
            0 => (403, Vec::new()),
            _ => (200, vec![CONTEXT.to_owned()]),
        };
        let operations = None;
        let mapping = AclMapping { contexts, operations };
        rules.mappings.insert("Swing".to_owned(), mapping);
        let mut busy = tokio::task::JoinSet::new();
        for open in open.drain(..) {
            busy.spawn(timeout(SETTLED, open.until_answered(status)));
        }
        // Through the leader and through followers.
        let through = cluster.node(u32::try_from(round % 3)? + 1);
        let admin = cluster.client_on("admin", through.number)?;
        let request = SetAclRequest {
            acl: rules.clone(),
            dry_run: false,
        };
        rules.digest = Some(admin.set_acl(&request, None).await?.into_body().digest);
        let returned = Instant::now();
        while let Some(answered) = busy.join_next().await {
            let still = answered?.with_context(|| format!("round {round}: no {status}"))?;
            open.push(still.with_context(|| format!("round {round}: the connection has ended"))?);
        }
        took.push(returned.elapsed());
    }
    took.sort();
    println!("rules everywhere after the answer: {took:?}");
    ensure!(took.iter().all(|took| *took < IN_FORCE), "{took:?}");
    Ok(())
}

/// A resumed session would go by a certificate that was looked at before: no node gives a ticket for one, and who comes
/// again shows his certificate again.
async fn no_handshake_is_spared(cluster: &Playground) -> Result<()> {
    let who = cluster.pki().identity("trading-1")?;
    for node in cluster.nodes() {
        let config = Open::config(cluster, &who)?;
        for attempt in 1..=2 {
            let mut open = Open::connect_with(Arc::clone(&config), &node).await?;
            // What a server has to say after the handshake has come with the answer.
            ensure!(
                open.encrypt().await == Some(200),
                "{} does not encrypt",
                node.id()
            );
            let (_, session) = open.0.get_ref();
            let (tickets, kind) = (session.tls13_tickets_received(), session.handshake_kind());
            let full = matches!(
                kind,
                Some(HandshakeKind::Full | HandshakeKind::FullWithHelloRetryRequest)
            );
            ensure!(
                tickets == 0 && full,
                "{}, connection {attempt}: {tickets} tickets, {kind:?}",
                node.id()
            );
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn operations_and_rules_are_enforced_on_every_node() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let (reader, batch) = (
        cluster.pki().identity("trading-1")?,
        cluster.pki().issue("batch", Some("Night"))?,
    );
    let sealed = seal(&cluster.client("trading-1")?, CONTEXT, b"before").await?;
    everywhere(&cluster, &batch, Some(ErrorCode::UnknownOrganizationalUnit)).await?;
    change_acl(&cluster, |acl| {
        acl["mappings"]["Trading"] = json!({"contexts": [CONTEXT], "operations": ["decrypt"]});
        acl["rules"] = json!([{"who": {"cn": "batch"}, "contexts": [CONTEXT], "operations": ["encrypt"]}]);
    })
    .await?;
    everywhere(&cluster, &reader, Some(ErrorCode::AccessDenied)).await?;
    everywhere(&cluster, &batch, None).await?;
    for node in cluster.nodes() {
        let reading = cluster.client_on("trading-1", node.number)?;
        open(&reading, CONTEXT, &sealed)
            .await
            .with_context(|| node.id())?;
        let writing = cluster.pki().client(Some(&batch), &[node.endpoint()])?;
        let refused = open(&writing, CONTEXT, &sealed).await;
        ensure!(refused.is_err(), "{}: batch may decrypt", node.id());
    }
    // Back to what the founder's configuration said, and the rule is gone too.
    change_acl(&cluster, |acl| {
        acl["mappings"]["Trading"] = json!([CONTEXT, "order-key"]);
        acl["rules"] = json!([]);
    })
    .await?;
    everywhere(&cluster, &reader, None).await?;
    everywhere(&cluster, &batch, Some(ErrorCode::UnknownOrganizationalUnit)).await?;
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rules_that_somebody_else_has_changed_or_that_lock_out_are_refused() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let before = acl(&cluster).await?;
    let set = async |name: &str, document: &Value, more: &[&str]| {
        let file = write(&cluster, name, document.to_string())?;
        let args = ["acl", "set", "--file", text(&file)?];
        cluster.hsmctl(&[&args[..], more].concat()).await
    };
    let confirmed = ["--confirm", CLUSTER];
    let mut wanted = before.clone();
    wanted["mappings"]["Night"] = json!([CONTEXT]);

    // A dry run shows the difference and makes none; nobody is asked where nobody may be.
    let shown = set("a.json", &wanted, &["--dry-run"]).await?;
    let shown = String::from_utf8(shown.ok()?)?;
    ensure!(
        shown.contains("+ ou Night: exchange-key") && shown.contains("dry run"),
        "{shown}"
    );
    let unasked = set("a.json", &wanted, &["--no-input"]).await?;
    ensure!(
        unasked.code == Some(2) && unasked.stderr.contains("--confirm playground"),
        "{unasked:?}"
    );
    let misnamed = set("a.json", &wanted, &["--confirm", "other"]).await?;
    ensure!(misnamed.code == Some(2), "{misnamed:?}");
    assert_eq!(acl(&cluster).await?, before);

    set("a.json", &wanted, &confirmed).await?.ok()?;
    // The same digest again: it was read before the change.
    let mut late = before.clone();
    late["mappings"]["Late"] = json!([]);
    for more in [&confirmed[..], &["--dry-run"]] {
        let stale = set("b.json", &late, more).await?;
        ensure!(
            stale.code == Some(4) && stale.stderr.contains("changed since it was read"),
            "{stale:?}"
        );
    }
    let now = acl(&cluster).await?;
    ensure!(now["mappings"]["Night"] == json!([CONTEXT]), "{now}");

    // Nobody an administrator, somebody else one, a CA that there is not.
    let ca = cluster.pki().client_ca_name();
    for (admins, code) in [
        (json!([]), 2),
        (json!([{"issuer": ca, "ou": "Nobody"}]), 4),
        (json!([{"issuer": "CN=Other CA", "ou": "Admin"}]), 2),
    ] {
        let mut locked = now.clone();
        locked["roles"]["admin"] = admins.clone();
        let refused = set("c.json", &locked, &confirmed).await?;
        ensure!(refused.code == Some(code), "{admins}: {refused:?}");
    }
    // What is misspelt is named with its place.
    for (pointer, value, place) in [
        ("/mappings/Night", json!(["a b"]), "mappings.Night[0]"),
        (
            "/mappings/Night",
            json!({"contexts": [CONTEXT], "operations": ["decrpyt"]}),
            "mappings.Night.operations[0]",
        ),
        (
            "/mappings/Night",
            json!({"contexts": [CONTEXT]}),
            "mappings.Night",
        ),
    ] {
        let mut misspelt = now.clone();
        *misspelt.pointer_mut(pointer).context("no such place")? = value;
        let refused = set("d.json", &misspelt, &confirmed).await?;
        ensure!(
            refused.code == Some(2) && refused.stderr.contains(place),
            "{place}: {refused:?}"
        );
    }
    assert_eq!(acl(&cluster).await?, now);

    // Who is no administrator changes nothing, and an auditor may look.
    let file = write(&cluster, "e.json", late.to_string())?;
    let set = ["acl", "set", "--file", text(&file)?, "--confirm", CLUSTER];
    for (profile, args) in [
        ("auditor", &set[..]),
        ("auditor", &["revoke", "--cn", "x", "--reason", "y"]),
        ("auditor", &["unrevoke", "--cn", "x"]),
        ("trading-1", &["acl", "get"]),
        ("trading-1", &["revocations"]),
    ] {
        let refused = cluster.hsmctl_as(profile, args, &[]).await?;
        ensure!(refused.code == Some(3), "{profile} {args:?}: {refused:?}");
    }
    cluster.hsmctl_as("auditor", &["acl", "get"], &[]).await?.ok()?;
    // Nor does an administrator revoke himself.
    let own = cluster
        .hsmctl(&["revoke", "--cn", "admin", "--reason", "x"])
        .await?;
    ensure!(own.code == Some(4), "{own:?}");
    cluster.passed();
    Ok(())
}

/// Whether a node lets a certificate do something: any answer but a refusal of it is a yes.
async fn does(client: &Client, context: &str, operation: &str, ciphertext: &str) -> Result<bool> {
    let (path, body) = match operation {
        "encrypt" => (paths::ENCRYPT, json!({"context": context, "plaintext": ""})),
        "decrypt" => (
            paths::DECRYPT,
            json!({"context": context, "ciphertext": ciphertext}),
        ),
        "rewrap" => (
            paths::REWRAP,
            json!({"context": context, "ciphertext": ciphertext}),
        ),
        _ => (paths::DATAKEY, json!({"context": context})),
    };
    let headers = [("content-type", "application/json")];
    let answer = client
        .request(Method::POST, path, &headers, body.to_string())
        .await?;
    Ok(answer.status != 403)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_acl_test_says_is_what_the_data_plane_does() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let sealed = seal(&cluster.client("trading-1")?, CONTEXT, b"x").await?;
    let ciphertext = sealed.ciphertext.to_string();
    let ca = cluster.pki().client_ca_name();
    change_acl(&cluster, |acl| {
        acl["mappings"]["Reports"] = json!({"contexts": [CONTEXT, "2fa"], "operations": ["decrypt"]});
        acl["mappings"]["Empty"] = json!([]);
        acl["rules"] = json!([
            {"who": {"cn": "batch", "issuer": ca}, "contexts": ["2fa"], "operations": ["rewrap", "datakey"]},
            {"who": {"ou": "Reports", "cn": "writer"}, "contexts": [CONTEXT], "operations": ["encrypt"]},
        ]);
    })
    .await?;
    cluster
        .hsmctl(&["revoke", "--cn", "gone", "--reason", "x"])
        .await?
        .ok()?;
    let admin = cluster.client("admin")?;
    let mut seen = [0; 2];
    for (cn, ou) in [
        ("any", Some("Trading")),
        ("any", Some("2FA")),
        ("any", Some("Reports")),
        ("writer", Some("Reports")),
        ("writer", Some("Trading")),
        ("batch", Some("Night")),
        ("batch", Some("Trading")),
        ("any", Some("Empty")),
        ("any", Some("trading")),
        ("batch", None),
        ("gone", Some("Trading")),
    ] {
        let identity = cluster.pki().issue(cn, ou)?;
        let node = cluster.node(u32::try_from((seen[0] + seen[1]) % 3)? + 1);
        let client = cluster.pki().client(Some(&identity), &[node.endpoint()])?;
        if cn == "gone" {
            everywhere(&cluster, &identity, Some(ErrorCode::CertificateRevoked)).await?;
        }
        for context in [CONTEXT, "2fa", "no-such-context"] {
            for operation in OPERATIONS {
                let question = AclQuestion {
                    ou: ou.map(str::to_owned),
                    cn: Some(cn.to_owned()),
                    issuer: None,
                    context: context.to_owned(),
                    operation: operation.to_owned(),
                };
                let said = admin.test_acl(&question).await?.into_body();
                // A revoked client's connection ends with its answer.
                let client = if cn == "gone" {
                    cluster.pki().client(Some(&identity), &[node.endpoint()])?
                } else {
                    client.clone()
                };
                let done = does(&client, context, operation, &ciphertext).await?;
                ensure!(
                    said.allowed == done,
                    "{cn} of {ou:?}, {operation} {context}: said {said:?}, and {} lets it: {done}",
                    node.id()
                );
                seen[usize::from(done)] += 1;
            }
        }
    }
    ensure!(seen[0] > 20 && seen[1] > 20, "{seen:?} tell nothing");

    // For people and for scripts.
    let ask = async |args: &[&str]| {
        let test = ["acl", "test", "--context", "2fa", "--operation", "decrypt"];
        cluster.hsmctl(&[&test[..], args].concat()).await
    };
    let no = ask(&["--ou", "Trading"]).await?;
    let said = String::from_utf8(no.stdout)?;
    ensure!(
        no.code == Some(1) && said.starts_with("may Trading decrypt 2fa? no: ") && no.stderr.is_empty(),
        "{:?} {said:?} {:?}",
        no.code,
        no.stderr
    );
    let yes = ask(&["--ou", "2FA", "--cn", "2fa-1"]).await?;
    let said = String::from_utf8(yes.stdout)?;
    ensure!(
        yes.code == Some(0)
            && said.trim_end() == "may 2fa-1 of 2FA decrypt 2fa? yes: allowed by mappings.2FA",
        "{:?} {said:?}",
        yes.code
    );
    each_role_may_what_it_is_for(&cluster).await?;
    cluster.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revocation_list_counts_only_with_the_cas_signature() -> Result<()> {
    let cluster = Playground::start(3).await?;
    let victims = ["one", "two"].map(|cn| cluster.pki().issue(cn, Some("Trading")));
    let victims = victims.into_iter().collect::<Result<Vec<_>>>()?;
    let all: Vec<&Identity> = victims.iter().collect();
    let good = cluster.pki().crl(&all)?;
    let foreign = cluster_tests::Pki::foreign_crl(&all)?;
    let revoke = async |name: &str, content: &[u8]| {
        let file = write(&cluster, name, content)?;
        let args = [
            "revoke",
            "--crl",
            text(&file)?,
            "--reason",
            "monthly",
            "-o",
            "json",
        ];
        cluster.hsmctl(&args).await
    };
    let mut altered = der_of(&good)?;
    let middle = altered.len() / 2;
    altered[middle] ^= 1;
    for (name, content, says) in [
        ("foreign.pem", foreign.as_bytes(), "signature"),
        ("altered.der", &altered, "crl: "),
        ("nothing.pem", b"nothing", "crl: "),
    ] {
        let refused = revoke(name, content).await?;
        ensure!(
            refused.code == Some(2) && refused.stderr.contains(says),
            "{name}: {refused:?}"
        );
    }
    for victim in &victims {
        everywhere(&cluster, victim, None).await?;
    }
    let done: Value = serde_json::from_slice(&revoke("good.pem", good.as_bytes()).await?.ok()?)?;
    ensure!(done["added"] == 2 && done["lists"][0]["entries"] == 2, "{done}");
    for victim in &victims {
        everywhere(&cluster, victim, Some(ErrorCode::CertificateRevoked)).await?;
    }
    let again: Value = serde_json::from_slice(&revoke("good.der", &der_of(&good)?).await?.ok()?)?;
    ensure!(again["added"] == 0, "{again}");
    cluster.passed();
    Ok(())
}

fn der_of(crl: &str) -> Result<Vec<u8>> {
    use rustls_pki_types::CertificateRevocationListDer;
    Ok(CertificateRevocationListDer::from_pem_slice(crl.as_bytes())?.to_vec())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deleting_the_file_of_revocations_takes_none_back() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = |node: &str| folder.path().join(format!("{node}.yaml"));
    let cluster = formed_with(Playground::builder(), |config| {
        let node = config
            .lines()
            .find_map(|line| line.trim().strip_prefix("node_id: "));
        let own = file(node.unwrap_or_default());
        let lines = format!(
            "acl:\n  revoked_file: {}\n  revoked_check_interval_ms: 100\n",
            own.display()
        );
        // It has to be there at the first start.
        std::fs::write(&own, "revoked:\n  - {cn: trading-2, reason: lost}\n").unwrap();
        config.replacen("acl:\n", &lines, 1)
    })
    .await?;
    let revoked = Some(ErrorCode::CertificateRevoked);
    let second = cluster.pki().identity("trading-2")?;
    everywhere(&cluster, &second, revoked).await?;
    let lost = what_is_written_into_one_nodes_file_is_revoked_on_all(&cluster, file).await?;

    for node in cluster.nodes() {
        let own = file(&node.id());
        if own.exists() {
            std::fs::remove_file(&own)?;
        }
        node.kill().await?;
    }
    // With what it has said before in the state, a file that is gone keeps no node down.
    cluster.up().await?;
    for node in cluster.nodes() {
        let log = node.log();
        ensure!(
            log.contains("is not there; what it has said before stays revoked"),
            "{} does not say that its file is gone",
            node.id()
        );
    }
    for who in [&second, &lost] {
        everywhere(&cluster, who, revoked).await?;
    }

    // Only a command takes it back, for good.
    let admin = cluster.client("admin")?;
    let request = UnrevokeRequest {
        what: Some(RevocationMatch {
            cn: Some("trading-2".to_owned()),
            ..RevocationMatch::default()
        }),
        certificate: None,
    };
    let done = admin.unrevoke(&request).await?.into_body();
    ensure!(done.removed == 1, "{done:?}");
    everywhere(&cluster, &second, None).await?;
    for node in cluster.nodes() {
        node.kill().await?;
    }
    cluster.up().await?;
    everywhere(&cluster, &second, None).await?;
    cluster.passed();
    Ok(())
}

/// On connections that are open too, from a node that does not lead, and for good. Gives back who was revoked.
async fn what_is_written_into_one_nodes_file_is_revoked_on_all(
    cluster: &Playground,
    file: impl Fn(&str) -> PathBuf,
) -> Result<Identity> {
    let leader = cluster.leader().await?;
    let others = cluster.others(leader.node);
    let node = others.first().context("nobody follows")?;
    let own = file(&node.id());
    let lost = cluster.pki().issue("lost-1", Some("Trading"))?;
    let open = open_everywhere(cluster, &lost).await?;
    // What cannot be used keeps nothing else out.
    let text = "revoked:\n  - {cn: trading-2, reason: lost}\n  - {serial: zebra}\n  - {cn: lost-1}\n";
    std::fs::write(&own, text)?;
    for open in open {
        open.until_closed().await?;
    }
    everywhere(cluster, &lost, Some(ErrorCode::CertificateRevoked)).await?;

    let said = |part: &str| node.log().lines().filter(|line| line.contains(part)).count();
    until("the line that is wrong", SETTLED, async || {
        (said("line 3: revokes nothing") > 0).then_some(())
    })
    .await?;
    let name = own.file_name().and_then(|name| name.to_str()).context("a name")?;
    std::fs::remove_file(&own)?;
    until("the file that is gone", SETTLED, async || {
        (said(&format!("{name} is not there any more")) > 0).then_some(())
    })
    .await?;
    ensure!(said("line 3: revokes nothing") == 1, "it is said again and again");
    ensure!(
        said("revocations of this node's configuration added") > 0,
        "no line of the audit"
    );
    everywhere(cluster, &lost, Some(ErrorCode::CertificateRevoked)).await?;
    Ok(lost)
}
