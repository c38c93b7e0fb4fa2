//! Read-your-writes: whoever names the index of a change that he was answered is served from it by every node, also by
//! one that has not heard of it yet. Each request is sent once: nothing is repeated until it fits.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cluster_tests::Playground;
use hsm_api::admin::{AclMapping, JoinTokenRequest, SetAclRequest};
use hsm_api::client::{Meta, Method, RawResponse};
use hsm_api::data::{DataKeyRequest, EncryptRequest, RewrapRequest};
use hsm_api::{Client, ErrorCode, StateIndex, headers, paths};
use tokio::task::JoinSet;

use crate::common::{CONTEXT, formed_with, open, seal};

const ROTATIONS: usize = 20;
/// `server.limits.min_index_wait_ms` of these nodes, and what is far from it, also on a machine that stands still for a second.
const WAIT: Duration = Duration::from_millis(2000);
const AT_ONCE: Duration = Duration::from_millis(1600);

fn index_of(meta: &Meta) -> Result<StateIndex> {
    meta.index.context("an answer without an index")
}

/// The same person's clients of each node.
fn of_each(cluster: &Playground, profile: &str) -> Result<Vec<Client>> {
    let nodes = cluster.nodes();
    nodes
        .iter()
        .map(|node| cluster.client_on(profile, node.number))
        .collect()
}

/// Through every node in turn, a rotation is in force on each of them for whoever has its index.
async fn rotations_are_read(cluster: &Playground) -> Result<()> {
    let (admins, applications) = (of_each(cluster, "admin")?, of_each(cluster, "trading-1")?);
    let old = seal(&applications[0], CONTEXT, b"before").await?;
    for round in 0..ROTATIONS {
        let done = admins[round % admins.len()].rotate(CONTEXT, None).await?;
        let (version, index) = (done.version, index_of(&done.meta)?);
        let ask = async |at: usize, client: &Client| {
            let client = client.with_min_index(index);
            let sealed = client
                .encrypt(&EncryptRequest::new(CONTEXT, b"after"))
                .await
                .with_context(|| format!("round {round}, node {}", at + 1))?;
            ensure!(
                sealed.key_version == version && index_of(&sealed.meta)? >= index,
                "round {round}: node {} encrypts under version {} at {:?}, not {version} at {index}",
                at + 1,
                sealed.key_version,
                sealed.meta.index
            );
            anyhow::Ok(client)
        };
        // All at once, as soon as it is answered: a follower has had no time to hear of it.
        let (first, second, third) = tokio::try_join!(
            ask(0, &applications[0]),
            ask(1, &applications[1]),
            ask(2, &applications[2])
        )?;
        if round == 0 {
            for client in [first, second, third] {
                let moved = client
                    .rewrap(&RewrapRequest::new(CONTEXT, old.ciphertext.clone()))
                    .await?;
                let made = client.datakey(&DataKeyRequest::new(CONTEXT)).await?;
                ensure!((moved.key_version, made.key_version) == (version, version));
                open(&client, CONTEXT, &old).await?;
            }
        }
        // Administrators read their writes too, from any node.
        let reader = admins[(round + 1) % admins.len()].with_min_index(index);
        let keks = reader.list_keks().await?.into_body();
        let info = keks.contexts.into_iter().find(|info| info.context == CONTEXT);
        let active = info.and_then(|info| info.active_version);
        ensure!(active == Some(version), "round {round}: {active:?} is listed");
    }
    Ok(())
}

/// A unit is let in and put out again; each node knows at once.
async fn access_is_read(cluster: &Playground) -> Result<()> {
    let admins = of_each(cluster, "admin")?;
    let identity = cluster.pki().issue("new-1", Some("New"))?;
    let mut index = None;
    for round in 0..4_usize {
        let admin = &admins[round % admins.len()];
        let admin = index.map_or_else(|| admin.clone(), |index| admin.with_min_index(index));
        let mut acl = admin.acl().await?.into_body();
        let may = round.is_multiple_of(2);
        if may {
            let mapping = AclMapping {
                contexts: vec![CONTEXT.to_owned()],
                operations: None,
            };
            acl.mappings.insert("New".to_owned(), mapping);
        } else {
            acl.mappings.remove("New").context("not mapped")?;
        }
        let change = SetAclRequest { acl, dry_run: false };
        let done = admin.set_acl(&change, None).await?;
        let at = index_of(&done.meta)?;
        for node in cluster.nodes() {
            let client = cluster.pki().client(Some(&identity), &[node.endpoint()])?;
            let request = EncryptRequest::new(CONTEXT, b"may I");
            let outcome = client.with_min_index(at).encrypt(&request).await;
            let code = outcome.err().map(|error| error.code());
            let expected = (!may).then_some(Some(ErrorCode::UnknownOrganizationalUnit));
            ensure!(code == expected, "round {round}, {}: {code:?}", node.id());
        }
        index = Some(at);
    }
    Ok(())
}

/// What changes no key moves the index all the same.
async fn any_change_is_reached(cluster: &Playground) -> Result<()> {
    let request = JoinTokenRequest {
        ttl_seconds: Some(60),
        node_id: None,
    };
    let made = cluster.client("admin")?.create_join_token(&request).await?;
    let index = index_of(&made.meta)?;
    for client in of_each(cluster, "trading-1")? {
        let sealed = client
            .with_min_index(index)
            .encrypt(&EncryptRequest::new(CONTEXT, b"after"))
            .await?;
        ensure!(index_of(&sealed.meta)? >= index);
    }
    Ok(())
}

async fn ask(client: &Client, index: &str) -> Result<(RawResponse, Duration)> {
    let began = Instant::now();
    let headers = [(headers::X_HSM_MIN_INDEX, index)];
    let body = br#"{"context":"exchange-key","plaintext":"aGVsbG8="}"#;
    let answer = client
        .request(Method::POST, paths::ENCRYPT, &headers, body.to_vec())
        .await?;
    Ok((answer, began.elapsed()))
}

async fn refusals_have_their_codes(cluster: &Playground) -> Result<()> {
    let client = cluster.client_on("trading-1", 2)?;
    let sealed = client.encrypt(&EncryptRequest::new(CONTEXT, b"now")).await?;
    let StateIndex { epoch, index } = index_of(&sealed.meta)?;
    let at = |epoch: u64, index: u64| StateIndex { epoch, index }.to_string();
    for (asked, status, code) in [
        ("newest".to_owned(), 400, ErrorCode::InvalidArgument),
        (at(epoch - 1, index), 412, ErrorCode::IndexEpochChanged),
        (at(epoch + 1, 1), 412, ErrorCode::IndexEpochChanged),
        (at(epoch, index + 20_000), 412, ErrorCode::MinIndexTooFar),
    ] {
        let (mut answer, mut took) = ask(&client, &asked).await?;
        if took >= AT_ONCE {
            // A machine that stood still does not do so each time.
            (answer, took) = ask(&client, &asked).await?;
        }
        let seen = answer.problem().and_then(|problem| problem.error_code());
        ensure!(
            (answer.status, seen) == (status, Some(code)) && took < AT_ONCE,
            "{asked}: {} after {took:?}",
            answer.text()
        );
    }
    let (answer, took) = ask(&client, &at(epoch, index + 5000)).await?;
    let seen = answer.problem().and_then(|problem| problem.error_code());
    ensure!(
        (answer.status, seen) == (412, Some(ErrorCode::MinIndexNotReached)) && took >= WAIT,
        "{} after {took:?}",
        answer.text()
    );
    ensure!(
        answer.header(headers::RETRY_AFTER) == Some("1"),
        "no Retry-After: {:?}",
        answer.headers
    );
    Ok(())
}

/// Requests that may wait on a node at a time, from clients whom the rules know and from others.
const PLACES: [usize; 2] = [224, 32];
/// Clients of each kind. One gets a quarter of the places: it takes more than four of them.
const CLIENTS: usize = 5;

/// All ask at the same moment for what is not there yet.
fn crowd(clients: &[(usize, Client)], ahead: &str) -> JoinSet<Result<(usize, RawResponse, Duration)>> {
    let mut asked = JoinSet::new();
    for (kind, client) in clients {
        // Together for more than there are places.
        for _ in 0..PLACES[*kind].div_ceil(CLIENTS - 1) + 4 {
            let (kind, client, ahead) = (*kind, client.clone(), ahead.to_owned());
            asked.spawn(async move {
                let (answer, took) = ask(&client, &ahead).await?;
                anyhow::Ok((kind, answer, took))
            });
        }
    }
    asked
}

/// Crowds at most: one that comes late, on a machine that does something else, says nothing about the places.
const CROWDS: usize = 5;

/// What became of a crowd, by kind.
struct Crowd {
    waited: [usize; 2],
    refused: [Vec<Duration>; 2],
    /// How long somebody else's encryption took meanwhile.
    held_up: Option<Duration>,
}

impl Crowd {
    /// Asks with all of them, and with somebody else once the first was refused.
    async fn ask(clients: &[(usize, Client)], ahead: &str, other: &Client) -> Result<Self> {
        let mut asked = crowd(clients, ahead);
        let mut seen = Self {
            waited: [0; 2],
            refused: [Vec::new(), Vec::new()],
            held_up: None,
        };
        while let Some(answered) = asked.join_next().await {
            let (kind, answer, took) = answered??;
            let code = answer.problem().and_then(|problem| problem.error_code());
            ensure!(
                (answer.status, code) == (412, Some(ErrorCode::MinIndexNotReached)),
                "{}",
                answer.text()
            );
            if !answer.text().contains("too many") {
                ensure!(took >= WAIT, "{} after {took:?}", answer.text());
                seen.waited[kind] += 1;
                continue;
            }
            seen.refused[kind].push(took);
            if seen.held_up.is_none() {
                let began = Instant::now();
                other.encrypt(&EncryptRequest::new(CONTEXT, b"at once")).await?;
                seen.held_up = Some(began.elapsed());
            }
        }
        for (kind, places) in PLACES.iter().enumerate() {
            // A place that is given back before the last has come is taken again.
            ensure!(
                seen.waited[kind] >= *places,
                "{:?} waited: {places} places",
                seen.waited
            );
            seen.refused[kind].sort_unstable();
        }
        Ok(seen)
    }

    /// Who found no place was told at once, and nobody else was held up. Most of them: they have all been sent at the same
    /// moment.
    fn was_told_at_once(&self) -> bool {
        let quick = |took: &Duration| *took < AT_ONCE;
        let told = |refused: &Vec<Duration>| refused.get(refused.len() / 2).is_some_and(quick);
        self.held_up.as_ref().is_some_and(quick) && self.refused.iter().all(told)
    }
}

/// More come than may wait: all places are taken, and the rest is told at once. Nobody else is held up.
async fn only_so_many_wait(cluster: &Playground) -> Result<()> {
    let other = cluster.client_on("trading-1", 2)?;
    let sealed = other.encrypt(&EncryptRequest::new(CONTEXT, b"now")).await?;
    let StateIndex { epoch, index } = index_of(&sealed.meta)?;
    let now = StateIndex { epoch, index }.to_string();
    let ahead = StateIndex {
        epoch,
        index: index + 5000,
    };
    let mut clients = Vec::new();
    for (kind, unit) in ["Trading", "Nobody"].into_iter().enumerate() {
        for number in 1..=CLIENTS {
            let identity = cluster
                .pki()
                .issue(&format!("waiter-{unit}-{number}"), Some(unit))?;
            let at = [cluster.node(2).endpoint()];
            let client = cluster
                .pki()
                .client_waiting(10 * WAIT, true, Some(&identity), &at)?;
            // The node knows it, or does not.
            let (answer, _) = ask(&client, &now).await?;
            ensure!(answer.status == [200, 403][kind], "{unit}: {}", answer.text());
            clients.push((kind, client));
        }
    }
    let ahead = ahead.to_string();
    // Once for the connections: what they cost would keep the last from coming while the first wait.
    crowd(&clients, &ahead).join_all().await;
    let mut seen: Vec<Crowd> = Vec::new();
    while !seen.last().is_some_and(Crowd::was_told_at_once) {
        let slow: Vec<_> = seen.iter().map(|crowd| (crowd.held_up, &crowd.refused)).collect();
        ensure!(
            seen.len() < CROWDS,
            "another's encryption took, and was refused after: {slow:?}"
        );
        seen.push(Crowd::ask(&clients, &ahead, &other).await?);
    }
    // The places are free again.
    let (answer, took) = ask(&clients[0].1, &ahead).await?;
    ensure!(took >= WAIT, "{} after {took:?}", answer.text());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_names_the_index_of_a_change_reads_it_on_every_node() -> Result<()> {
    let cluster = formed_with(Playground::builder(), |config| {
        let limits = format!(
            "\n  limits: {{min_index_wait_ms: {}}}\n  drain:",
            WAIT.as_millis()
        );
        config.replacen("\n  drain:", &limits, 1)
    })
    .await?;
    rotations_are_read(&cluster).await?;
    access_is_read(&cluster).await?;
    any_change_is_reached(&cluster).await?;
    refusals_have_their_codes(&cluster).await?;
    only_so_many_wait(&cluster).await?;
    // As scripts do.
    let rotated = cluster.hsmctl(&["rotate", CONTEXT, "-o", "json"]).await?.ok()?;
    let rotated: serde_json::Value = serde_json::from_slice(&rotated)?;
    let index = rotated["index"].as_str().context("hsmctl prints no index")?;
    let args = [
        "encrypt",
        "--context",
        CONTEXT,
        "--min-index",
        index,
        "-o",
        "json",
    ];
    let sealed = cluster
        .hsmctl_as("trading-1", &args, b"by a script")
        .await?
        .ok()?;
    let sealed: serde_json::Value = serde_json::from_slice(&sealed)?;
    ensure!(
        sealed["key_version"] == rotated["version"],
        "{sealed} after {rotated}"
    );
    cluster.passed();
    Ok(())
}
