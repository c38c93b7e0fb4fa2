//! Who may do what, changed at run time: on every node, at once, and for connections that are open. What nobody may
//! do is lock everybody out.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cluster_tests::{Identity, Node, Playground, Stalls, until};
use hsm_api::admin::{AclMapping, AclQuestion, SetAclRequest};
use hsm_api::client::Method;
use hsm_api::data::EncryptRequest;
use hsm_api::{Client, ErrorCode, paths};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::common::{CONTEXT, open, seal};
use crate::open_connections::{are_in_force, open_everywhere};
use crate::roles::each_role_may_what_it_is_for;

/// From the answer to a change until every node that is reached goes by it.
pub(crate) const IN_FORCE: Duration = Duration::from_secs(1);
/// The same, where it is only waited for.
pub(crate) const SETTLED: Duration = Duration::from_secs(30);
/// The name of every playground's cluster.
const CLUSTER: &str = "playground";
const OPERATIONS: [&str; 4] = ["encrypt", "decrypt", "rewrap", "datakey"];

/// The code that one node answers an encryption with, on a new connection.
async fn code_on(cluster: &Playground, node: &Node, who: &Identity) -> Result<Option<ErrorCode>> {
    let client = cluster.pki().client(Some(who), &[node.endpoint()])?;
    match client.encrypt(&EncryptRequest::new(CONTEXT, b"x")).await {
        Ok(_) => Ok(None),
        Err(error) => Ok(Some(error.code().with_context(|| error.to_string())?)),
    }
}

/// Until every node answers an encryption with this; a follower hears of a change a moment after its answer.
pub(crate) async fn everywhere(
    cluster: &Playground,
    who: &Identity,
    wanted: Option<ErrorCode>,
) -> Result<()> {
    for node in cluster.nodes() {
        let what = format!("{wanted:?} from {}", node.id());
        until(&what, SETTLED, async || {
            (code_on(cluster, &node, who).await.ok()? == wanted).then_some(())
        })
        .await?;
    }
    Ok(())
}

pub(crate) fn write(cluster: &Playground, name: &str, content: impl AsRef<[u8]>) -> Result<PathBuf> {
    let path = cluster.scratch().join(name);
    std::fs::write(&path, content)?;
    Ok(path)
}

pub(crate) fn text(path: &Path) -> Result<&str> {
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
    // Whichever node is asked next hears of it a moment later.
    for node in cluster.nodes() {
        let client = cluster.client_on("admin", node.number)?;
        until("the new rules", SETTLED, async || {
            let rules = client.acl().await.ok()?.into_body();
            rules.mappings.contains_key("Night").then_some(())
        })
        .await
        .with_context(|| node.id())?;
    }
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

/// On connections that stay open: what is taken is refused, and what is given back is done.
pub(crate) async fn a_change_of_rules_is_too(cluster: &Playground, stalls: &Stalls) -> Result<()> {
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
        took.push(stalls.running_since(returned));
    }
    are_in_force(took)
}
