//! A node that leads a cluster of its own, somebody with another node's certificate who talks to its cluster
//! listener, and what the node has written of him for the audit.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use raft_store::command::{
    AdminOrigin, AdmitNode, CreateJoinToken, Done, Op, Origin, Refusal, RegisterNode, ReportNode, RequestId,
};
use raft_store::names::{Boot, ContextName, Incarnation, NodeName, RaftId};
use raft_store::state::frozen::AclV1;
use raft_store::state::node::NodeReport;
use sha2::{Digest, Sha256};
use tokio_rustls::TlsAcceptor;

use super::connection::{CallFailure, Connection};
use super::start::start;
use super::wire::{
    self, Declined, Hello, HelloReply, MAX_FRAME, MAX_HELLO, PROTOCOL, Request, Response, TurnedAway,
};
use super::{Consensus, ConsensusOptions, FoundSeed, JoinRequest, RaftTiming, join_token_text};
use crate::admin::call::{AdminBody, AdminCall};
use crate::config::PeerTlsFiles;
use crate::identity::test_certs::TestCa;
use crate::test_log::Lines;
use crate::tls::{ClusterTls, load_cluster};

pub(super) const WITHIN: Duration = Duration::from_secs(30);
const MEMBER: Incarnation = Incarnation([2; 16]);
/// Of join tokens.
const SECRET: [u8; 32] = [3; 32];

/// The audit of this process: one for all tests, because consensus has threads of its own. Each test finds its
/// lines by the name of its attacker.
fn audit() -> &'static Lines {
    static LINES: OnceLock<Lines> = OnceLock::new();
    LINES.get_or_init(|| {
        let lines = Lines::default();
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter("off,audit=info")
            .with_writer(lines.writer())
            .json()
            .flatten_event(true)
            .finish();
        tracing::subscriber::set_global_default(subscriber).unwrap();
        lines
    })
}

pub(super) fn tls(dir: &Path, name: &str) -> Arc<ClusterTls> {
    let files = PeerTlsFiles {
        ca_path: dir.join("ca.crt"),
        cert_path: dir.join(format!("{name}.crt")),
        key_path: dir.join(format!("{name}.key")),
    };
    Arc::new(load_cluster(&files, "test", name, &[], true).unwrap())
}

pub(super) fn seed() -> FoundSeed {
    FoundSeed {
        acl: AclV1::default(),
        revocations: vec![],
    }
}

fn free_port() -> u16 {
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    free.local_addr().unwrap().port()
}

fn options(
    name: &str,
    data_dir: PathBuf,
    port: u16,
    tls: Arc<ClusterTls>,
    fatal: Arc<AtomicBool>,
) -> ConsensusOptions {
    ConsensusOptions {
        node_name: NodeName::new(name).unwrap(),
        data_dir,
        listen: Some(([127, 0, 0, 1], port).into()),
        advertise: format!("127.0.0.1:{port}"),
        api_advertise: "127.0.0.1:1".into(),
        peer_addresses: BTreeMap::new(),
        cluster_name: "test".into(),
        tls: Some(tls),
        notice: Duration::ZERO,
        autopilot: None,
        timing: RaftTiming {
            // As in production: quicker ones lose their leader on a machine that is busy with other tests.
            heartbeat: Duration::from_millis(200),
            election_min: Duration::from_millis(800),
            election_max: Duration::from_millis(1200),
            ready: Duration::from_secs(5),
            snapshot_every: 1000,
            keep_logs: 1000,
        },
        trk_id: Arc::new(|_| [5; 8]),
        on_barrier: Mutex::new(None),
        on_fatal: Arc::new(move |_| fatal.store(true, Ordering::SeqCst)),
    }
}

/// A cluster of the node `n1`, and somebody with the certificate of another.
pub(super) struct World {
    pub(super) node: Consensus,
    pub(super) dir: tempfile::TempDir,
    /// The name in the attacker's certificate.
    name: &'static str,
    address: String,
    attacker: ConsensusOptions,
    fatal: Arc<AtomicBool>,
}

impl World {
    /// `name` has to be the test's own: the audit is found by it.
    pub(super) async fn new(name: &'static str) -> Self {
        Self::with_timing(name, |_| ()).await
    }

    /// The same, with other times than in production.
    pub(super) async fn with_timing(name: &'static str, change: impl FnOnce(&mut RaftTiming)) -> Self {
        audit();
        let dir = tempfile::tempdir().unwrap();
        let ca = TestCa::new("cluster");
        std::fs::write(dir.path().join("ca.crt"), &ca.pem).unwrap();
        for name in ["n1", name] {
            ca.server(name, Some(&format!("hsm://test/{name}")))
                .write(dir.path(), name);
        }
        let port = free_port();
        let fatal = Arc::new(AtomicBool::new(false));
        let at = |name: &str| {
            let data = dir.path().join("data").join(name);
            std::fs::create_dir_all(&data).unwrap();
            options(name, data, port, tls(dir.path(), name), Arc::clone(&fatal))
        };
        let (mut honest, attacker) = (at("n1"), at(name));
        change(&mut honest.timing);
        let node = tokio::task::spawn_blocking(move || start(honest))
            .await
            .unwrap()
            .unwrap();
        node.found(seed()).await.unwrap();
        Self {
            node,
            dir,
            name,
            address: format!("127.0.0.1:{port}"),
            attacker,
            fatal,
        }
    }

    pub(super) fn hello(&self, raft_id: RaftId) -> Hello {
        Hello {
            protocol: PROTOCOL,
            cluster_id: self.node.published().state.meta().unwrap().cluster_id,
            epoch: 1,
            name: self.name.into(),
            raft_id,
            incarnation: MEMBER,
            boot: Boot([1; 16]),
            log_index: u64::MAX,
        }
    }

    pub(super) async fn greet(&self, hello: &Hello) -> Result<Connection, CallFailure> {
        let opened = Connection::open(&self.attacker, &self.address, hello).await;
        opened.map(|(connection, _)| connection)
    }

    pub(super) async fn turned_away(&self, hello: &Hello) -> TurnedAway {
        match self.greet(hello).await {
            Err(CallFailure::Away { reason, .. }) => reason,
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("was let in"),
        }
    }

    pub(super) async fn done(&self, op: Op) -> Done {
        self.node.propose_as_leader(op).await.unwrap()
    }

    /// What a node under the attacker's name is started with.
    pub(super) fn options_at(&self, port: u16) -> ConsensusOptions {
        let data = self.dir.path().join("data").join("another");
        let (tls, fatal) = (tls(self.dir.path(), self.name), Arc::clone(&self.fatal));
        options(self.name, data, port, tls, fatal)
    }

    /// A real node under the attacker's name, which belongs to no cluster yet.
    pub(super) async fn another(&self) -> Consensus {
        let options = self.options_at(free_port());
        let started = tokio::task::spawn_blocking(move || start(options)).await;
        started.unwrap().unwrap()
    }

    /// What a node joins this cluster with.
    pub(super) async fn invitation(&self) -> JoinRequest {
        let number = self.token().await;
        JoinRequest {
            token: join_token_text(number, &SECRET),
            cluster_ca_sha256: self.attacker.tls.as_ref().unwrap().ca_sha256,
            addresses: vec![self.address.clone()],
            slots: vec![],
        }
    }

    async fn token(&self) -> u64 {
        let token = CreateJoinToken {
            secret_hash: Sha256::digest(SECRET).into(),
            expires_at: i64::MAX,
            node: None,
        };
        match self.done(Op::CreateJoinToken(token)).await {
            Done::JoinToken { number } => number,
            other => panic!("{other:?}"),
        }
    }

    /// Registers the attacker as a node that has joined and proven nothing yet.
    pub(super) async fn register(&self, cluster_address: &str) -> RaftId {
        let register = RegisterNode {
            token: self.token().await,
            secret_hash: Sha256::digest(SECRET).into(),
            name: NodeName::new(self.name).unwrap(),
            incarnation: MEMBER,
            api_address: "127.0.0.1:1".into(),
            cluster_address: cluster_address.into(),
        };
        match self.done(Op::RegisterNode(register)).await {
            Done::Registered { raft_id } => raft_id,
            other => panic!("{other:?}"),
        }
    }

    /// Makes the attacker a member. Nobody answers at its address, so that it does not vote.
    pub(super) async fn admit(&self) -> RaftId {
        let node = self.register("127.0.0.1:1").await;
        self.admitted(node).await;
        node
    }

    /// Makes the attacker, who is registered, a member.
    pub(super) async fn admitted(&self, node: RaftId) {
        let report = NodeReport {
            seq: 1,
            boot: Boot([1; 16]),
            incarnation: MEMBER,
            clock: 0,
            durable_index: 0,
            proven_at: Some(1),
            feature_level: 1,
            slots: BTreeMap::new(),
            uses: BTreeMap::new(),
        };
        let nonce = crate::clock::random_id();
        let (id, op) = (RequestId::Node { node, nonce }, ReportNode { node, report });
        let reported = self
            .node
            .propose(id, [0; 32], Origin::Node(node), Op::ReportNode(op));
        reported.await.unwrap();
        self.done(Op::AdmitNode(AdmitNode { node })).await;
    }

    /// Connections that say nothing.
    pub(super) fn silent(&self, count: usize) -> Vec<std::net::TcpStream> {
        let connect = |_| std::net::TcpStream::connect(&self.address).unwrap();
        (0..count).map(connect).collect()
    }

    /// Answers whoever dials with a refusal; says where, and counts the answers.
    pub(super) async fn refusing(&self, reason: TurnedAway) -> (String, Arc<AtomicUsize>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let tls = self.attacker.tls.as_ref().unwrap();
        let acceptor = TlsAcceptor::from(Arc::clone(&tls.server));
        let answered = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&answered);
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let Ok(mut stream) = acceptor.accept(tcp).await else {
                    continue;
                };
                let hello = wire::receive::<Hello>(&mut stream, MAX_HELLO).await;
                let reply = HelloReply::Away(reason.clone());
                if hello.is_ok() && wire::send(&mut stream, &reply).await.is_ok() {
                    count.fetch_add(1, Ordering::SeqCst);
                }
            }
        });
        (address, answered)
    }

    /// Answers whoever dials `listener` as the node with this id, with what `answer` makes of each request.
    pub(super) fn answering(
        &self,
        listener: tokio::net::TcpListener,
        id: RaftId,
        answer: impl Fn(Request) -> Response + Clone + Send + 'static,
    ) {
        let tls = self.attacker.tls.as_ref().unwrap();
        let acceptor = TlsAcceptor::from(Arc::clone(&tls.server));
        let hello = self.hello(id);
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let (acceptor, hello, answer) = (acceptor.clone(), hello.clone(), answer.clone());
                tokio::spawn(async move {
                    let mut stream = acceptor.accept(tcp).await?;
                    wire::receive::<Hello>(&mut stream, MAX_HELLO).await?;
                    wire::send(&mut stream, &HelloReply::Welcome(hello)).await?;
                    while let Ok(request) = wire::receive(&mut stream, MAX_FRAME).await {
                        wire::send(&mut stream, &answer(request)).await?;
                    }
                    std::io::Result::Ok(())
                });
            }
        });
    }

    /// The connection is ended without an answer.
    pub(super) async fn hung_up(&self, hello: &Hello, request: Request) {
        match self.ask(hello, request).await {
            Err(CallFailure::Io { .. }) => {}
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("was answered"),
        }
    }

    pub(super) async fn ask(&self, hello: &Hello, request: Request) -> Result<Response, CallFailure> {
        let mut connection = self.greet(hello).await.unwrap();
        connection.call(&request, WITHIN).await
    }

    /// What the leader says to an operation that the attacker proposes for itself.
    pub(super) async fn own(&self, hello: &Hello, op: Op) -> Refusal {
        let (nonce, op) = (crate::clock::random_id(), Box::new(op));
        match self.ask(hello, Request::Own { nonce, op }).await.unwrap() {
            Response::Own(Err(Declined::Refused(refusal))) => refusal,
            Response::Own(other) => panic!("{other:?}"),
            _ => panic!("another answer"),
        }
    }

    /// What the audit has of the attacker.
    pub(super) fn audited(&self) -> Vec<serde_json::Value> {
        let mut lines = audit().all();
        lines.retain(|line| line["peer"] == self.name);
        lines
    }

    /// The audit names the attacker, what it asked for and why it was refused.
    pub(super) fn assert_audited(&self, raft_id: RaftId, asked: &str, reason: &str) {
        let lines = self.audited();
        let found = lines.iter().any(|line| {
            line["target"] == "audit"
                && line["outcome"] == "refused"
                && line["raft_id"] == raft_id
                && line["asked"] == asked
                && line["reason"].as_str().is_some_and(|why| why.contains(reason))
        });
        assert!(found, "no {asked} refused because of {reason:?}: {lines:#?}");
    }

    pub(super) fn is_ended(&self) -> bool {
        self.fatal.load(Ordering::SeqCst)
    }

    pub(super) fn voters(&self) -> BTreeSet<RaftId> {
        self.node.published().membership.voter_ids().collect()
    }
}

/// Waits for a condition.
pub(super) async fn until(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + 2 * WITHIN;
    while !holds() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A well-formed call of somebody who spoke to `via_node`.
pub(super) fn rotate(via_node: RaftId, hop: u8) -> Request {
    let origin = AdminOrigin {
        fingerprint: [0; 32],
        cn: "admin".into(),
        ou: "Admin".into(),
        serial: "1".into(),
        issuer: "CN=admins".into(),
        via_node,
        evidence: None,
    };
    Request::Admin(Box::new(AdminCall {
        id: RequestId::Node {
            node: via_node,
            nonce: [0; 16],
        },
        body_hash: [0; 32],
        origin,
        spki_sha256: [0; 32],
        authorities: Vec::new(),
        source: "127.0.0.1".into(),
        request_id: "r".into(),
        trace_id: "0af7651916cd43dd8448eb211c80319c".into(),
        hop,
        body: AdminBody::Rotate {
            context: ContextName::new("c").unwrap(),
        },
    }))
}
