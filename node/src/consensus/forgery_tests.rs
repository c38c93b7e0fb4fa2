//! What a stranger with a certificate of the cluster's CA, or a member that speaks for others, achieves on
//! the cluster listener of a real node: nothing.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use raft_store::command::{
    AckVersions, AddTransportKey, AdminOrigin, CreateContext, CreateJoinToken, Done, GrantTransportKey, Op,
    Refusal, RegisterNode, RegisterSlotKey, RequestId,
};
use raft_store::names::{
    Boot, ContextName, ContextUid, Incarnation, NodeName, RaftId, SlotName, TransportId,
};
use raft_store::state::access::Acl;
use raft_store::state::context::{BindingMode, RotationPolicy};
use raft_store::state::node::SlotKey;
use raft_store::state::slot::{Grantee, TransportMode};
use sha2::{Digest, Sha256};

use super::connection::{CallFailure, Connection};
use super::start::start;
use super::wire::{Declined, Hello, PROTOCOL, Request, Response, TurnedAway};
use super::{Consensus, ConsensusOptions, FoundSeed, RaftTiming};
use crate::admin::call::{AdminBody, AdminCall};
use crate::config::PeerTlsFiles;
use crate::identity::test_certs::TestCa;
use crate::tls::{ClusterTls, load_cluster};

const WITHIN: Duration = Duration::from_secs(10);
const MEMBER: Incarnation = Incarnation([2; 16]);

fn tls(dir: &Path, name: &str) -> Arc<ClusterTls> {
    let files = PeerTlsFiles {
        ca_path: dir.join("ca.crt"),
        cert_path: dir.join(format!("{name}.crt")),
        key_path: dir.join(format!("{name}.key")),
    };
    Arc::new(load_cluster(&files, "test", name, &[], true).unwrap())
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
        timing: RaftTiming {
            heartbeat: Duration::from_millis(50),
            election_min: Duration::from_millis(150),
            election_max: Duration::from_millis(300),
            ready: Duration::from_secs(5),
            snapshot_every: 1000,
            keep_logs: 1000,
        },
        trk_id: Arc::new(|_| [5; 8]),
        on_barrier: Mutex::new(None),
        on_fatal: Arc::new(move |_| fatal.store(true, Ordering::SeqCst)),
    }
}

/// A cluster of the node `n1`, and somebody with the certificate of `n2`.
struct World {
    node: Consensus,
    address: String,
    attacker: ConsensusOptions,
    fatal: Arc<AtomicBool>,
    dir: tempfile::TempDir,
}

impl World {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ca = TestCa::new("cluster");
        std::fs::write(dir.path().join("ca.crt"), &ca.pem).unwrap();
        for name in ["n1", "n2"] {
            ca.server(name, Some(&format!("hsm://test/{name}")))
                .write(dir.path(), name);
        }
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let fatal = Arc::new(AtomicBool::new(false));
        let at = |name: &str| {
            let data = dir.path().join("data").join(name);
            std::fs::create_dir_all(&data).unwrap();
            options(name, data, port, tls(dir.path(), name), Arc::clone(&fatal))
        };
        let (honest, attacker) = (at("n1"), at("n2"));
        let node = tokio::task::spawn_blocking(move || start(honest))
            .await
            .unwrap()
            .unwrap();
        let seed = FoundSeed {
            acl: Acl::default(),
            revocations: vec![],
        };
        node.found(seed).await.unwrap();
        Self {
            node,
            address: format!("127.0.0.1:{port}"),
            attacker,
            fatal,
            dir,
        }
    }

    fn hello(&self, raft_id: RaftId) -> Hello {
        Hello {
            protocol: PROTOCOL,
            cluster_id: self.node.published().state.meta().unwrap().cluster_id,
            epoch: 1,
            name: "n2".into(),
            raft_id,
            incarnation: MEMBER,
            boot: Boot([1; 16]),
            log_index: u64::MAX,
        }
    }

    async fn greet(&self, hello: &Hello) -> Result<Connection, CallFailure> {
        let opened = Connection::open(&self.attacker, &self.address, hello).await;
        opened.map(|(connection, _)| connection)
    }

    async fn turned_away(&self, hello: &Hello) -> TurnedAway {
        match self.greet(hello).await {
            Err(CallFailure::Away { reason, .. }) => reason,
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("was let in"),
        }
    }

    async fn done(&self, op: Op) -> Done {
        self.node.propose_as_leader(op).await.unwrap()
    }

    /// Registers `n2` as a node that has joined and proven nothing yet.
    async fn register(&self) -> RaftId {
        let secret = [3; 32];
        let secret_hash = Sha256::digest(secret).into();
        let token = CreateJoinToken {
            secret_hash,
            expires_at: i64::MAX,
            node: None,
        };
        let Done::JoinToken { number } = self.done(Op::CreateJoinToken(token)).await else {
            panic!("no token");
        };
        let register = RegisterNode {
            token: number,
            secret_hash,
            name: NodeName::new("n2").unwrap(),
            incarnation: MEMBER,
            api_address: "127.0.0.1:1".into(),
            cluster_address: "127.0.0.1:1".into(),
        };
        match self.done(Op::RegisterNode(register)).await {
            Done::Registered { raft_id } => raft_id,
            other => panic!("{other:?}"),
        }
    }

    /// The connection is ended without an answer.
    async fn hung_up(&self, hello: &Hello, request: Request) {
        let mut connection = self.greet(hello).await.unwrap();
        match connection.call(&request, WITHIN).await {
            Err(CallFailure::Io { .. }) => {}
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("was answered"),
        }
    }

    /// What the leader says to an operation that `n2` proposes for itself.
    async fn own(&self, hello: &Hello, op: Op) -> Refusal {
        let mut connection = self.greet(hello).await.unwrap();
        let (nonce, op) = (crate::clock::random_id(), Box::new(op));
        match connection
            .call(&Request::Own { nonce, op }, WITHIN)
            .await
            .unwrap()
        {
            Response::Own(Err(Declined::Refused(refusal))) => refusal,
            Response::Own(other) => panic!("{other:?}"),
            _ => panic!("another answer"),
        }
    }
}

fn rotate(via_node: RaftId, hop: u8) -> Request {
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
        source: "127.0.0.1".into(),
        request_id: "r".into(),
        hop,
        body: AdminBody::Rotate {
            context: ContextName::new("c").unwrap(),
        },
    }))
}

fn vote() -> Request {
    Request::Vote(openraft::raft::VoteRequest {
        vote: openraft::Vote::new(1 << 40, 1 << 40),
        last_log_id: None,
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_with_a_node_certificate_is_no_member() {
    let world = World::new().await;
    // Under an id that may be given one day, however large.
    for id in [2, 3, 500, 1 << 40] {
        let reason = world.turned_away(&world.hello(id)).await;
        assert_eq!(reason, TurnedAway::Unknown(id));
    }
    let reason = world.turned_away(&world.hello(1)).await;
    assert!(matches!(reason, TurnedAway::OtherName { .. }), "{reason}");
    let as_n1 = Hello {
        name: "n1".into(),
        ..world.hello(1)
    };
    let reason = world.turned_away(&as_n1).await;
    assert!(matches!(reason, TurnedAway::OtherName { .. }), "{reason}");
    // As a node that wants to join it is greeted, and may do nothing else.
    let joining = world.hello(0);
    for request in [
        rotate(0, 1),
        rotate(1, 1),
        vote(),
        Request::ReadIndex,
        Request::Stand,
        Request::Vouch(1),
    ] {
        world.hung_up(&joining, request).await;
    }
    assert_eq!(world.node.view().term, 1, "no election was caused");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_speaks_for_itself_only() {
    let world = World::new().await;
    let id = world.register().await;
    let hello = world.hello(id);
    // Somebody else's call, and a call that travels on.
    for request in [rotate(1, 1), rotate(id, 0), rotate(id, 2)] {
        world.hung_up(&hello, request).await;
    }
    let other_filling = Hello {
        incarnation: Incarnation([9; 16]),
        ..hello.clone()
    };
    let reason = world.turned_away(&other_filling).await;
    assert_eq!(reason, TurnedAway::OtherIncarnation { raft_id: id });

    let (slot, transport) = (SlotName::new("s").unwrap(), TransportId([7; 16]));
    let generation = AddTransportKey {
        slot: slot.clone(),
        id: transport,
        expected_generation: 0,
        mode: TransportMode::Standard,
        check: vec![1; 40],
        grants: BTreeMap::from([(Grantee::Node(1), b"sealed".to_vec())]),
    };
    world.done(Op::AddTransportKey(generation)).await;
    let ack = AckVersions {
        node: 1,
        versions: vec![],
    };
    assert!(matches!(
        world.own(&hello, Op::AckVersions(ack)).await,
        Refusal::Forbidden(_)
    ));
    let grant = GrantTransportKey {
        slot: slot.clone(),
        id: transport,
        grantee: Grantee::Recovery("off-line".into()),
        blob: b"forged".to_vec(),
    };
    let refused = world.own(&hello, Op::GrantTransportKey(grant)).await;
    assert!(matches!(refused, Refusal::Forbidden(_)), "{refused}");
    let context = CreateContext {
        name: ContextName::new("c").unwrap(),
        uid: ContextUid([1; 16]),
        slot: slot.clone(),
        binding: BindingMode::Shared,
        policy: RotationPolicy::default(),
    };
    let refused = world.own(&hello, Op::CreateContext(context)).await;
    assert!(matches!(refused, Refusal::Forbidden(_)), "{refused}");
    // A slot key under another node's certificate.
    let key = SlotKey {
        spki: vec![1],
        signature: vec![2],
        signer_chain: vec![tls(world.dir.path(), "n1").certificate.to_vec()],
    };
    let op = Box::new(Op::RegisterSlotKey(RegisterSlotKey { node: id, slot, key }));
    let nonce = [4; 16];
    world.hung_up(&hello, Request::Own { nonce, op }).await;
    let published = world.node.published();
    assert!(published.state.contexts().is_empty());
    assert!(published.state.nodes().get(&id).unwrap().slot_keys.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_node_that_is_no_member_yet_ends_nobody() {
    let world = World::new().await;
    let id = world.register().await;
    let accusation = TurnedAway::RolledBack {
        raft_id: 1,
        incarnation: world.node.control().get().incarnation,
        log_index: 1,
        seen_index: 1 << 40,
    };
    world.hung_up(&world.hello(id), Request::GoAway(accusation)).await;
    assert!(!world.fatal.load(Ordering::SeqCst));
    assert!(world.node.control().get().poison.is_none());
}
