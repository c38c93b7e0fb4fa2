//! Clients behind a proxy that ends TLS, and behind a balancer that says where they are: on real nodes.

use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cluster_tests::http1::{Connection, Message};
use cluster_tests::proxy::client_cert;
use cluster_tests::{Ca, Identity, Node, Pki, Playground, Proxy, until};
use hsm_api::admin::{RevocationMatch, RevokeRequest};
use hsm_api::{headers, paths};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::common::CONTEXT;

/// From the answer to a revocation until every node goes by it.
const IN_FORCE: Duration = Duration::from_secs(1);
/// The same, in a moment in which the machine does something else. How soon it is as a rule, `access.rs` has.
const SETTLED: Duration = Duration::from_secs(30);
/// A log is written by a thread of its own.
const LOGGED: Duration = Duration::from_secs(30);
/// Requests of one principal at once, on the node where they are few.
const BURST: usize = 200;
/// Addresses of this machine that are listed as a balancer's.
const BALANCER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
const OTHER_BALANCER: Ipv4Addr = Ipv4Addr::new(127, 0, 1, 5);

/// Two nodes that trust a proxy, whose own certificate has an OU that may encrypt. They accept clients of two CAs: the
/// playground's, and one that has others below it.
async fn start() -> Result<(Playground, Identity, Ca)> {
    let cluster = Playground::builder().nodes(2).unformed().start().await?;
    let edge = cluster.pki().issue("edge-1", Some("Trading"))?;
    let pin = hex::encode(Sha256::digest(edge.spki()?));
    let root = Ca::new("DEV root CA")?;
    let both = cluster.scratch().join("client-cas.crt");
    let own = fs::read_to_string(cluster.pki().dir().join("ca.crt"))?;
    fs::write(&both, own + &root.cert)?;
    for node in cluster.nodes() {
        node.kill().await?;
        let config = node.config()?;
        let mut lines = config.lines();
        let ca_path = lines.find(|line| line.starts_with("    ca_path: "));
        let ca_path = ca_path.with_context(|| format!("no server.tls.ca_path in:\n{config}"))?;
        let before = config.replacen(ca_path, &format!("    ca_path: {both:?}"), 1);
        let keys = format!(
            "  trusted_proxies: [{{name: edge, spki_sha256: \"{pin}\"}}]\n  proxy_protocol_from: [{BALANCER}, \
             127.0.1.0/24]\n  drain: {{"
        );
        let mut after = before.replacen("  drain: {", &keys, 1);
        ensure!(
            after != before,
            "the playground's configuration has changed:\n{before}"
        );
        if node.number == 2 {
            after.push_str(&format!(
                "rate_limit: {{requests_per_second: 1, burst: {BURST}}}\n"
            ));
        }
        node.set_config(&after)?;
    }
    cluster.up().await?;
    Ok((cluster, edge, root))
}

fn shows(who: &Identity) -> Result<String> {
    Ok(client_cert(&who.der()?))
}

/// An encryption's answer.
async fn encrypt(connection: &mut Connection, lines: &[String], context: &str) -> Result<Message> {
    let body = json!({"context": context, "plaintext": "aGVsbG8="});
    connection.ask("POST", paths::ENCRYPT, lines, &body).await
}

async fn decrypt(connection: &mut Connection, context: &str, ciphertext: &Value) -> Result<Message> {
    let body = json!({"context": context, "ciphertext": ciphertext});
    connection.ask("POST", paths::DECRYPT, &[], &body).await
}

/// An encryption of `exchange-key` is answered with this code, or done.
async fn expect(connection: &mut Connection, lines: &[String], code: Option<&str>) -> Result<()> {
    let answer = encrypt(connection, lines, CONTEXT).await?;
    let given = answer.code();
    ensure!(
        given.as_deref() == code && (code.is_some() || answer.status()? == 200),
        "{given:?} instead of {code:?}: {answer:?}"
    );
    Ok(())
}

/// Until the audit has a line with all of this.
async fn audited(node: &Node, parts: &[&str]) -> Result<()> {
    let what = format!("a line of the audit of {} with {parts:?}", node.id());
    until(&what, LOGGED, async || {
        let log = node.log();
        let mut lines = log.lines();
        lines
            .any(|line| line.contains(r#""target":"audit""#) && parts.iter().all(|part| line.contains(part)))
            .then_some(())
    })
    .await
}

/// Until the refusal is counted: a connection may have ended a moment before.
async fn counted(node: &Node, metric: &str, reason: &str) -> Result<()> {
    let what = format!("{metric}{{reason={reason:?}}} of {}", node.id());
    until(&what, LOGGED, async || {
        let value = node.metrics().await.ok()?.with_label(metric, "reason", reason)?;
        (value >= 1.0).then_some(())
    })
    .await
}

async fn logged(node: &Node, text: &str) -> Result<()> {
    let what = format!("{text:?} in the log of {}", node.id());
    until(&what, LOGGED, async || node.log().contains(text).then_some(())).await
}

/// Two clients take turns on one connection to the node, and each is who he is.
async fn identities_do_not_mix(cluster: &Playground, edge: &Identity) -> Result<()> {
    let pki = cluster.pki();
    let proxy = Proxy::start(&pki, edge, cluster.node(1).api_port).await?;
    let mut trading = Connection::open(&pki, proxy.port(), &pki.identity("trading-1")?).await?;
    let mut owner = Connection::open(&pki, proxy.port(), &pki.identity("2fa-1")?).await?;
    let other = pki.issue("2fa-2", Some("2FA"))?;
    let mut other = Connection::open(&pki, proxy.port(), &other).await?;
    for _ in 0..5 {
        expect(&mut trading, &[], None).await?;
        expect(&mut owner, &[], Some("access_denied")).await?;
    }
    // What a client says of certificates itself does not reach the node.
    let forged = [shows(&pki.identity("trading-1")?)?];
    expect(&mut owner, &forged, Some("access_denied")).await?;

    // `2fa` is private: its ciphertexts are for one CN.
    let sealed = encrypt(&mut owner, &[], "2fa").await?.json()?["ciphertext"].clone();
    let refused = decrypt(&mut trading, "2fa", &sealed).await?;
    ensure!(refused.code().as_deref() == Some("access_denied"), "{refused:?}");
    let refused = decrypt(&mut other, "2fa", &sealed).await?;
    ensure!(
        refused.code().as_deref() == Some("authentication_failed"),
        "{refused:?}"
    );
    let opened = decrypt(&mut owner, "2fa", &sealed).await?;
    ensure!(opened.json()?["plaintext"] == "aGVsbG8=", "{opened:?}");

    // At the same time, too.
    let busy = tokio::spawn(async move {
        for _ in 0..50 {
            expect(&mut trading, &[], None).await?;
        }
        anyhow::Ok(())
    });
    for _ in 0..50 {
        expect(&mut owner, &[], Some("access_denied")).await?;
    }
    busy.await??;
    ensure!(proxy.opened() == 1, "{} connections to the node", proxy.opened());
    Ok(())
}

/// A client of a CA below one that the nodes know is somebody with that CA's certificate beside its own, and nobody without.
async fn a_chain_is_followed(cluster: &Playground, edge: &Identity, root: &Ca) -> Result<()> {
    let team = root.intermediate("DEV team CA")?;
    let own = shows(&team.issue("trading-9", Some("Trading"))?)?;
    let chain = |ca: &Ca| anyhow::Ok(client_cert(&ca.der()?).replacen("Client-Cert", "Client-Cert-Chain", 1));
    let mut connection = Connection::open(&cluster.pki(), cluster.node(1).api_port, edge).await?;
    let unrelated = Ca::new("DEV team CA")?;
    for lines in [vec![own.clone()], vec![own.clone(), chain(&unrelated)?]] {
        expect(&mut connection, &lines, Some("client_cert_refused")).await?;
    }
    let lines = [own, chain(&team)?];
    expect(&mut connection, &lines, None).await?;
    // As whom its own certificate says, and no more.
    let other = encrypt(&mut connection, &lines, "2fa").await?;
    ensure!(other.code().as_deref() == Some("access_denied"), "{other:?}");
    Ok(())
}

/// Each kind of header that is not taken, on one connection that goes on.
async fn what_is_not_shown_well_is_refused(cluster: &Playground, edge: &Identity) -> Result<()> {
    let (pki, node) = (cluster.pki(), cluster.node(1));
    let trading = pki.identity("trading-1")?;
    let good = shows(&trading)?;
    let mut connection = Connection::open(&pki, node.api_port, edge).await?;
    let two = |other: &str| vec![good.clone(), other.to_owned()];
    for (lines, code) in [
        // The proxy's own OU may encrypt; that is nobody's.
        (vec![], "client_cert_missing"),
        (two(&good), "client_cert_malformed"),
        (two("Client-Cert-Chain: :MIIB"), "client_cert_malformed"),
        (vec![good.replace(": :", ": ")], "client_cert_malformed"),
        (vec!["Client-Cert: :MIIB:".to_owned()], "client_cert_refused"),
        (
            vec![shows(&Pki::foreign("trading-1", Some("Trading"))?)?],
            "client_cert_refused",
        ),
        (
            vec![shows(&pki.issue_expired("trading-1", Some("Trading"))?)?],
            "client_cert_refused",
        ),
        (
            vec![shows(&pki.issue_for_servers("trading-1", Some("Trading"))?)?],
            "client_cert_refused",
        ),
        (vec![shows(edge)?], "client_cert_refused"),
    ] {
        expect(&mut connection, &lines, Some(code))
            .await
            .with_context(|| format!("{lines:?}"))?;
        expect(&mut connection, std::slice::from_ref(&good), None)
            .await
            .with_context(|| format!("after {lines:?}"))?;
    }
    // The one way to version 1's own words: of a connection of one's own, TLS refuses who shows no certificate.
    let nobody = encrypt(&mut connection, &[], CONTEXT).await?;
    ensure!(
        nobody.status()? == 401 && nobody.json()?["error"] == "no client certificate",
        "{nobody:?}"
    );
    for reason in ["missing", "malformed", "refused"] {
        counted(&node, "hsm_client_cert_refusals_total", reason).await?;
    }

    // Nobody else may show any, his own neither.
    let mut direct = Connection::open(&pki, node.api_port, &trading).await?;
    for line in [good, "Client-Cert-Chain: x".to_owned()] {
        expect(&mut direct, &[line], Some("client_cert_not_trusted")).await?;
    }
    expect(&mut direct, &[], None).await?;
    counted(&node, "hsm_client_cert_refusals_total", "not_trusted").await?;
    audited(
        &node,
        &[r#""action":"client_cert.claim""#, "CN=trading-1", "127.0.0.1:"],
    )
    .await
}

async fn nothing_is_administered_through_a_proxy(cluster: &Playground, edge: &Identity) -> Result<()> {
    let (pki, node) = (cluster.pki(), cluster.node(1));
    let proxy = Proxy::start(&pki, edge, node.api_port).await?;
    let marked = ["x-hsm-request: 1".to_owned()];
    let mut admin = Connection::open(&pki, proxy.port(), &pki.identity("admin")?).await?;
    let rotate = format!("/admin/v1/keys/{CONTEXT}/rotate");
    for (method, path) in [("GET", paths::WHOAMI), ("POST", rotate.as_str())] {
        let answer = admin.ask(method, path, &marked, &json!({})).await?;
        ensure!(
            answer.code().as_deref() == Some("admin_through_proxy"),
            "{path}: {answer:?}"
        );
        ensure!(answer.status()? == 403, "{answer:?}");
    }
    let audit = [
        r#""action":"proxy.admin""#,
        "CN=admin",
        r#""proxy":"edge""#,
        "admin_through_proxy",
    ];
    audited(&node, &audit).await?;
    // What an administrator may do on the paths of applications is not done either.
    let body = json!({"context": "2fa", "ciphertext": "YQ==", "principal": {"cn": "2fa-1", "ou": "2FA"}});
    let answer = admin.ask("POST", paths::REWRAP, &[], &body).await?;
    ensure!(
        answer.code().as_deref() == Some("admin_through_proxy"),
        "{answer:?}"
    );
    let seen = cluster.client_on("admin", 1)?.list_keks().await?.into_body();
    let context = seen.contexts.iter().find(|context| context.context == CONTEXT);
    ensure!(
        context.is_some_and(|context| context.active_version == Some(1)),
        "it was rotated: {context:?}"
    );
    Ok(())
}

/// Whoever is revoked is refused within a second on connections that are open, and nobody else notices.
async fn a_revoked_client_is_refused_at_once(cluster: &Playground, edge: &Identity) -> Result<()> {
    const ROUNDS: u32 = 6;
    let mut took = Vec::new();
    for round in 1..=ROUNDS {
        let victim = cluster.pki().issue(&format!("victim-{round}"), Some("Trading"))?;
        took.push(is_refused(cluster, edge, &victim).await?);
        if took.last() < Some(&IN_FORCE) {
            return Ok(());
        }
    }
    bail!("refused so long after the answer: {took:?}")
}

/// Revokes a client behind a proxy of each node; how long after the answer all of them refuse him.
async fn is_refused(cluster: &Playground, edge: &Identity, victim: &Identity) -> Result<Duration> {
    let pki = cluster.pki();
    let bystander = pki.issue("bystander", Some("Trading"))?;
    let mut all = Vec::new();
    for node in cluster.nodes() {
        let proxy = Proxy::start(&pki, edge, node.api_port).await?;
        let mut revoked = Connection::open(&pki, proxy.port(), victim).await?;
        let mut spared = Connection::open(&pki, proxy.port(), &bystander).await?;
        expect(&mut revoked, &[], None).await?;
        expect(&mut spared, &[], None).await?;
        all.push((proxy, revoked, spared));
    }
    revoke(cluster, victim).await?;
    let returned = Instant::now();
    for (_, revoked, _) in &mut all {
        until("the refusal", SETTLED, async || {
            let answer = encrypt(revoked, &[], CONTEXT).await.ok()?;
            (answer.code().as_deref() == Some("certificate_revoked")).then_some(())
        })
        .await?;
    }
    let took = returned.elapsed();
    for (proxy, revoked, spared) in &mut all {
        expect(spared, &[], None).await?;
        expect(revoked, &[], Some("certificate_revoked")).await?;
        ensure!(proxy.opened() == 1, "the proxy's connection was cut");
    }
    Ok(took)
}

async fn revoke(cluster: &Playground, who: &Identity) -> Result<()> {
    let request = RevokeRequest {
        what: Some(RevocationMatch {
            serial: Some(hex::encode(who.serial()?)),
            issuer: Some(cluster.pki().client_ca_name()),
            ..RevocationMatch::default()
        }),
        certificate: None,
        reason: "lost".to_owned(),
    };
    cluster.client_on("admin", 1)?.revoke(&request).await?;
    Ok(())
}

/// How many requests are left, and the seconds until there are more; of a rate of one in a second.
fn tells_the_rate(answer: &Message, [left, reset]: [&str; 2]) -> Result<()> {
    let (limit, policy) = (BURST.to_string(), format!("1;w=1;burst={BURST}"));
    for (name, expected) in [
        (headers::RATELIMIT_LIMIT, limit.as_str()),
        (headers::RATELIMIT_REMAINING, left),
        (headers::RATELIMIT_RESET, reset),
        (headers::RATELIMIT_POLICY, policy.as_str()),
    ] {
        ensure!(
            answer.header(name) == Some(expected),
            "{name} is not {expected}: {answer:?}"
        );
    }
    Ok(())
}

/// On the node whose rate is small: one client spends his own, and not the one of others on the connection.
async fn rates_are_the_clients(cluster: &Playground, edge: &Identity) -> Result<()> {
    let pki = cluster.pki();
    let proxy = Proxy::start(&pki, edge, cluster.node(2).api_port).await?;
    let busy = pki.issue("busy", Some("Trading"))?;
    let mut busy = Connection::open(&pki, proxy.port(), &busy).await?;
    let mut quiet = Connection::open(&pki, proxy.port(), &pki.issue("quiet", Some("Trading"))?).await?;
    let mut served = 0;
    let refused = loop {
        let answer = encrypt(&mut busy, &[], CONTEXT).await?;
        if answer.status()? != 200 {
            break answer;
        }
        served += 1;
        if served == 1 {
            let left = (BURST - 1).to_string();
            tells_the_rate(&answer, [left.as_str(), "1"])?;
            ensure!(answer.header(headers::RETRY_AFTER).is_none(), "{answer:?}");
        }
        ensure!(served < 20 * BURST, "its rate is not limited");
    };
    ensure!(served >= BURST, "only {served} requests");
    ensure!(
        refused.status()? == 429 && refused.code().as_deref() == Some("rate_limited"),
        "{refused:?}"
    );
    // There is one more each second.
    ensure!(refused.header(headers::RETRY_AFTER) == Some("1"), "{refused:?}");
    tells_the_rate(&refused, ["0", "1"])?;
    expect(&mut quiet, &[], None).await?;
    ensure!(proxy.opened() == 1, "{} connections to the node", proxy.opened());
    Ok(())
}

/// Version 2 of the header: PROXY, TCP over IPv4.
fn header(client: SocketAddrV4) -> Vec<u8> {
    let mut bytes = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c".to_vec();
    bytes.extend(client.ip().octets());
    bytes.extend([127, 0, 0, 1]);
    bytes.extend(client.port().to_be_bytes());
    bytes.extend(443_u16.to_be_bytes());
    bytes
}

async fn balancers_say_where_clients_are(cluster: &Playground, edge: &Identity) -> Result<()> {
    let (pki, node) = (cluster.pki(), cluster.node(1));
    let (admin, trading) = (pki.identity("admin")?, pki.identity("trading-1")?);
    let marked = ["x-hsm-request: 1".to_owned()];
    let far: SocketAddrV4 = "192.0.2.77:4711".parse()?;
    let mut connection = Connection::open_from(&pki, node.api_port, &admin, BALANCER, &header(far)).await?;
    let answer = connection.ask("GET", paths::WHOAMI, &marked, &json!({})).await?;
    ensure!(answer.status()? == 200, "{answer:?}");
    audited(&node, &[r#""source":"192.0.2.77:4711""#, "CN=admin"]).await?;
    // The balancer's own.
    let local = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";
    let mut connection = Connection::open_from(&pki, node.api_port, &admin, BALANCER, local).await?;
    let answer = connection.ask("GET", paths::WHOAMI, &marked, &json!({})).await?;
    ensure!(answer.status()? == 200, "{answer:?}");
    audited(&node, &[r#""source":"127.0.0.2:"#, "CN=admin"]).await?;

    let text = b"PROXY TCP4 192.0.2.77 127.0.0.1 4711 443\r\n";
    let unix = b"\r\n\r\n\0\r\nQUIT\n\x21\x31\0\0";
    for (from, preface, reason) in [
        (BALANCER, &b""[..], "missing"),
        (OTHER_BALANCER, &text[..], "version_1"),
        (OTHER_BALANCER, &unix[..], "malformed"),
        (Ipv4Addr::LOCALHOST, &header(far)[..], "unexpected"),
        (Ipv4Addr::LOCALHOST, &text[..], "unexpected"),
    ] {
        if Connection::open_from(&pki, node.api_port, &trading, from, preface)
            .await
            .is_ok()
        {
            bail!("a connection from {from} was taken that is {reason}");
        }
        counted(&node, "hsm_proxy_protocol_refusals_total", reason).await?;
    }
    logged(&node, "version 1 (text)").await?;
    logged(&node, "is not listed in server.proxy_protocol_from").await?;

    // A proxy behind a balancer: its client's certificate, and the address that the balancer gives.
    let far: SocketAddrV4 = "198.51.100.9:5".parse()?;
    let mut connection =
        Connection::open_from(&pki, node.api_port, edge, OTHER_BALANCER, &header(far)).await?;
    expect(&mut connection, &[shows(&trading)?], None).await?;
    let lines = [marked[0].clone(), shows(&admin)?];
    let answer = connection.ask("GET", paths::WHOAMI, &lines, &json!({})).await?;
    ensure!(
        answer.code().as_deref() == Some("admin_through_proxy"),
        "{answer:?}"
    );
    audited(
        &node,
        &[r#""source":"198.51.100.9:5""#, r#""proxy":"edge""#, "CN=admin"],
    )
    .await
}

/// The end of the proxy's own rights.
async fn a_revoked_proxy_is_cut(cluster: &Playground, edge: &Identity) -> Result<()> {
    let pki = cluster.pki();
    let lines = [shows(&pki.identity("trading-1")?)?];
    let mut connection = Connection::open(&pki, cluster.node(2).api_port, edge).await?;
    expect(&mut connection, &lines, None).await?;
    revoke(cluster, edge).await?;
    connection.until_closed().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_proxy_speaks_for_its_clients_and_a_balancer_says_where_they_are() -> Result<()> {
    let (cluster, edge, root) = start().await?;
    identities_do_not_mix(&cluster, &edge).await?;
    a_chain_is_followed(&cluster, &edge, &root).await?;
    what_is_not_shown_well_is_refused(&cluster, &edge).await?;
    nothing_is_administered_through_a_proxy(&cluster, &edge).await?;
    a_revoked_client_is_refused_at_once(&cluster, &edge).await?;
    balancers_say_where_clients_are(&cluster, &edge).await?;
    rates_are_the_clients(&cluster, &edge).await?;
    a_revoked_proxy_is_cut(&cluster, &edge).await?;
    cluster.passed();
    Ok(())
}
