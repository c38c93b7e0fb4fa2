//! The start, in the order in which failures are cheapest to find: certificates, addresses and the store before
//! a PIN is used, tokens before anything is served.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use raft_store::storage::{install_log_hook, install_panic_hook};
use tokio::sync::watch;

use super::entrance::Entrance;
use super::files::Files;
use super::v1_keys::V1Keys;
use super::{StartFailure, descriptors, die, stop};
use crate::admin::{
    self, AdminParts, AdminService, Changes, Placements, Seed, ServiceParts, differences, revoked_file,
};
use crate::config::{Config, Mode, ReplicationKeySource};
use crate::consensus::{self, Autopilot, Consensus, ConsensusOptions, Prepared, RaftTiming};
use crate::destruction;
use crate::health;
use crate::http::{
    self, ApiListener, ApiParts, ApiState, BodyLimits, DataPlane, DrainControl, OpenConnections,
};
use crate::keyring::KeyRing;
use crate::leases::{self, Leases};
use crate::metrics;
use crate::readiness::{NodeParts, NodeView, Rules};
use crate::rekey;
use crate::rotation::schedule::watch_clocks;
use crate::rotation::{self, ByUse, Clocks, Cluster, HeldSlot, Limits, Rotator, Schedule, TokenKeys};
use crate::secrets::{ask_pins, read_replication_key};
use crate::slots::SlotManager;
use crate::sync::{self, Replication, SyncOptions};
use crate::tls::ClusterTls;

/// How long a request waits for a token: more than the slot's own deadline, so that it is the slot
/// that judges a hang.
pub(super) const TOKEN_TIMEOUT: Duration = Duration::from_secs(6);
/// What threads that still work get once everything is over.
const LAST_THREADS: Duration = Duration::from_secs(1);
/// After `server.drain.notice_ms`: a listener closes within 0.2 s (docs/decisions/013), and the rest is for hearing of it.
const HEARD_AND_CLOSED: Duration = Duration::from_millis(700);
/// Longest that a leader goes on sending the log to who leaves: whoever had it removed waits for that, and nobody else comes or goes.
const MOST_NOTICE: Duration = Duration::from_secs(8);

/// Starts the node and serves until a signal.
pub(super) fn run(config: Config) -> Result<(), StartFailure> {
    let recorder = metrics::install(config.client_metrics)?;
    // Before the store is opened. Both end the process only from then on.
    install_log_hook(|why| die(&why))?;
    install_panic_hook(|why| die(&why));
    let connections = descriptors::room(&config.server.limits)?;
    let Files {
        api_tls,
        cluster_tls,
        signer,
        seed,
        revoked_faults,
    } = Files::read(&config)?;
    let cluster_ends = cluster_tls.as_ref().and_then(|tls| tls.ends);
    for (listener, ends) in [("api", api_tls.ends), ("cluster", cluster_ends)] {
        if let Some(ends) = ends {
            metrics::certificate_ends(listener, ends);
        }
    }
    let replication = replication(&config)?;

    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("request")
        .build()?;
    let health_socket = health::bind(config.server.health_listen)?;
    let entrance = {
        let _entered = runtime.enter();
        Entrance::take(&config.server)?
    };
    let prepared = prepare_consensus(&config, cluster_tls.clone(), &replication)?;
    if let Some(meta) = prepared.published().state.meta() {
        // Found here, not in the first import that fails.
        replication
            .for_cluster(meta)
            .map_err(|wrong| StartFailure::ReplicationKey(wrong.to_string()))?;
    }
    let founded = prepared.published().state.meta().is_some();
    seed.check_revoked(founded, revoked_faults)?;
    seed.warn_of_unwritten_admins(founded);
    ask_pins(&config.hsm)?;
    let slots = SlotManager::open(&config.hsm, &config.data_dir)?;
    // Before anything is founded: a key that is not there must not be found out by its first reader.
    let v1_keys = V1Keys::find(&config, &slots, &prepared.published().state)?;
    let consensus = prepared.start()?;

    let served: Result<(), StartFailure> = runtime.block_on(async move {
        let (_running, stopping) = watch::channel(false);
        let removed = consensus.removed();
        let ring = Arc::new(ArcSwap::from_pointee(KeyRing::default()));
        let leases = Leases::new(consensus.boot(), config.staleness.encrypt);
        let options = SyncOptions {
            consensus: consensus.clone(),
            slots: Arc::clone(&slots),
            replication: Arc::clone(&replication),
            signer: signer.map(Arc::new),
            ring: Arc::clone(&ring),
            leases: Arc::clone(&leases),
            interval: config.cluster.replication.interval,
        };
        let (sync, _workers) = sync::start(options, &stopping);
        tokio::spawn(leases::drive(
            Arc::new(consensus.clone()),
            Arc::clone(&leases),
            Arc::clone(&ring),
            stopping.clone(),
        ));
        let _watches = slots.watch(&stopping);
        let drain = DrainControl::default();
        let view = NodeView::new(NodeParts {
            consensus: consensus.clone(),
            seed: seed.clone(),
            ring,
            sync,
            leases,
            slots: Arc::clone(&slots),
            rules: rules(&config),
            drain: drain.signal(),
            metrics: Arc::new(recorder.clone()),
        });
        if entrance.is_open() {
            view.listens();
        }
        let _health = health::start(health_socket, Arc::clone(&view) as _, Some(recorder))?;
        let rotator = lead(
            &config,
            &consensus,
            &seed,
            &slots,
            &replication,
            cluster_tls.as_deref(),
        );
        tokio::spawn(differences::report(consensus.clone(), seed.clone()));

        let open = OpenConnections::new(connections);
        let data: Arc<dyn DataPlane> = Arc::clone(&view) as _;
        let api = ApiState::new(ApiParts {
            data: Arc::clone(&data),
            health: Arc::clone(&view) as _,
            rate_limit: config.rate_limit,
            max_body_bytes: config.server.limits.max_body_bytes,
            token_timeout: TOKEN_TIMEOUT,
            min_index_wait: config.server.limits.min_index_wait,
            drain: drain.signal(),
        });
        let changes = Changes::default();
        let policies = view.follow_policy();
        let tls = Arc::new(ArcSwap::from_pointee(api_tls));
        let admin = admin::router(AdminParts {
            consensus: consensus.clone(),
            seed: seed.clone(),
            placements: Placements::of(&config.hsm),
            slots,
            view: Arc::clone(&view),
            bodies: BodyLimits::admin(),
            uploads: BodyLimits::uploads(),
            tls: Arc::clone(&tls),
            cluster_name: config.cluster.name.clone(),
            changes: changes.clone(),
        });
        let listener = {
            let (proxies, drain, open) = (config.server.proxies.clone(), drain.signal(), open.clone());
            let (router, http2) = (http::router(api, admin), config.server.http2);
            move |socket| ApiListener {
                socket,
                tls,
                router,
                data,
                policies,
                http2,
                proxies,
                stalled: http::STALLED,
                drain,
                open,
            }
        };
        let founds = config.cluster.mode == Mode::Standalone && consensus.published().state.meta().is_none();
        if let Some(keys) = v1_keys {
            keys.begin()?;
            // Whoever connects meanwhile waits: to version 1's clients a refusal is final.
            if founds {
                found_alone(&consensus, &seed).await?;
            }
            keys.adopt(&consensus, &rotator, &config).await?;
        }
        let opened = entrance.open(view, founded, drain.signal());
        let listening = open.listen();
        tokio::spawn(async move {
            match opened.await {
                Ok(Some(socket)) => listener(socket).serve(listening).await,
                Ok(None) => {}
                Err(error) => die(&error.to_string()),
            }
        });
        if config.cluster.mode == Mode::Standalone && consensus.published().state.meta().is_none() {
            found_alone(&consensus, &seed).await?;
        }
        tracing::info!(node = %config.cluster.node_id, api = %config.server.listen, "started");
        let times = config.server.drain;
        match stop::wait(&consensus, removed, &drain, times, &open, &changes).await {
            Some(why) => Err(StartFailure::Removed(why)),
            None => Ok(()),
        }
    });
    // A call that hangs in a token never comes back, and dropping the runtime would wait for it.
    runtime.shutdown_timeout(LAST_THREADS);
    served
}

fn replication(config: &Config) -> Result<Arc<Replication>, StartFailure> {
    let source = &config.cluster.replication.key;
    let loaded = read_replication_key(source, &config.data_dir)?;
    if let Some(path) = &loaded.created {
        tracing::warn!(
            path = %path.display(),
            "a replication key was made: keep a copy, every key of this node is sealed under it"
        );
    }
    let named = |source: &ReplicationKeySource| match source {
        ReplicationKeySource::Env { key, variable } => format!("{key} ({variable})"),
        ReplicationKeySource::File { key, path } => format!("{key} ({})", path.display()),
        ReplicationKeySource::DataDir => format!("{}/replication.key", config.data_dir.display()),
    };
    let replication = Replication::new(loaded.key, named(source));
    let Some(previous) = &config.cluster.replication.previous else {
        return Ok(Arc::new(replication));
    };
    let beside = read_replication_key(previous, &config.data_dir)?;
    Ok(Arc::new(replication.beside(beside.key, &named(previous))))
}

fn prepare_consensus(
    config: &Config,
    tls: Option<Arc<ClusterTls>>,
    replication: &Arc<Replication>,
) -> Result<Prepared, StartFailure> {
    let cluster = &config.cluster;
    let key = Arc::clone(replication);
    let options = ConsensusOptions {
        node_name: cluster.node_id.clone(),
        data_dir: config.data_dir.clone(),
        listen: cluster.peer.as_ref().map(|peer| peer.listen),
        advertise: cluster
            .peer
            .as_ref()
            .map(|peer| peer.advertise.clone())
            .unwrap_or_default(),
        api_advertise: cluster.api_advertise.clone(),
        peer_addresses: cluster
            .peer
            .as_ref()
            .map(|peer| peer.addresses.clone())
            .unwrap_or_default(),
        cluster_name: cluster.name.clone(),
        tls,
        timing: timing(config),
        notice: (config.server.drain.notice + HEARD_AND_CLOSED).min(MOST_NOTICE),
        autopilot: autopilot(config),
        trk_id: Arc::new(move |id| key.trk_id(id)),
        on_barrier: Mutex::new(Some(Box::new(|| {
            let begun = Instant::now();
            Box::new(move || metrics::fsync(begun.elapsed()))
        }))),
        on_fatal: Arc::new(|why| die(&why)),
    };
    Ok(consensus::prepare(options)?)
}

fn autopilot(config: &Config) -> Option<Autopilot> {
    let rules = config.cluster.autopilot;
    Some(Autopilot {
        remove_dead_after: rules.remove_dead_after?,
        min_voters: rules.min_voters,
    })
}

fn timing(config: &Config) -> RaftTiming {
    let raft = config.cluster.raft;
    let standalone = config.cluster.mode == Mode::Standalone;
    // An election of one needs no patience: a restarted standalone node serves after 0.3 s.
    let brisk = |cluster: Duration, alone: u64| {
        if standalone {
            Duration::from_millis(alone)
        } else {
            cluster
        }
    };
    RaftTiming {
        heartbeat: brisk(raft.heartbeat, 50),
        election_min: brisk(raft.election_min, 150),
        election_max: brisk(raft.election_max, 300),
        ready: config.staleness.ready,
        snapshot_every: raft.snapshot_every,
        keep_logs: raft.keep_logs,
    }
}

fn rules(config: &Config) -> Rules {
    Rules {
        staleness: config.staleness,
        mode: config.cluster.mode,
        election_max: timing(config).election_max,
        without_quorum: config.serve_after_restart_without_quorum,
    }
}

/// What this node does whenever it leads: rotations, rekeys, destructions, calls of administrators. And what it has others revoke
/// at all times: what stands in its own file.
fn lead(
    config: &Config,
    consensus: &Consensus,
    seed: &Seed,
    slots: &Arc<SlotManager>,
    replication: &Arc<Replication>,
    tls: Option<&ClusterTls>,
) -> Arc<Rotator> {
    let cluster: Arc<dyn Cluster> = Arc::new(consensus.clone());
    let held = Arc::clone(slots);
    let find = move |name: &raft_store::names::SlotName| {
        let entry = held.get(name.as_str())?;
        Some(HeldSlot {
            handle: entry.handle(),
            state: entry.state(),
        })
    };
    let keys = Arc::clone(replication);
    let cluster_keys: rotation::rotator::ClusterKeys =
        Arc::new(move |meta| keys.for_cluster(meta).map_err(|error| error.to_string()));
    let limits = Limits::new(config.cluster.fence_after);
    let clocks: Arc<Clocks> = Arc::default();
    let rotator = Arc::new(Rotator::new(
        Arc::clone(&cluster),
        Arc::new(TokenKeys::new(Box::new(find))),
        cluster_keys,
        Arc::clone(&clocks),
        limits,
    ));
    tokio::spawn(watch_clocks(Arc::clone(&cluster), Arc::clone(&clocks)));
    let schedule = Schedule::new(
        Arc::clone(&cluster),
        Arc::clone(&rotator),
        Arc::clone(&clocks),
        config.rotation,
    );
    tokio::spawn(schedule.drive());
    tokio::spawn(ByUse::new(Arc::clone(&cluster), Arc::clone(&rotator)).drive());
    let rekeys = rekey::Driver::new(
        Arc::clone(&cluster),
        Arc::clone(&rotator),
        Arc::clone(replication),
        limits,
    );
    tokio::spawn(rekeys.drive());
    tokio::spawn(rekey::holding::report(
        Arc::clone(&cluster),
        Arc::clone(replication),
    ));
    let service = AdminService::new(ServiceParts {
        cluster: Arc::clone(&cluster),
        rotator: Arc::clone(&rotator),
        clocks: Arc::clone(&clocks),
        policy: config.rotation_policy(),
        max_invocations: config.hsm.max_invocations.clone(),
        destroy: config.destroy,
        day: config.rotation.day,
        seed: seed.clone(),
        cluster_ca_sha256: tls.map(|tls| tls.ca_sha256),
        replication: Arc::clone(replication),
    });
    consensus.serve_leader_calls(Arc::new(service));
    if let Some(file) = &seed.file {
        tokio::spawn(revoked_file::drive(Arc::clone(&cluster), file.clone()));
    }
    tokio::spawn(destruction::drive(Arc::clone(&cluster)));
    tokio::spawn(rotation::drive(cluster, clocks, limits));
    rotator
}

async fn found_alone(consensus: &Consensus, seed: &Seed) -> Result<(), StartFailure> {
    let founded = seed
        .found(consensus)
        .await
        .map_err(|error| StartFailure::Found(error.detail))?;
    tracing::info!(cluster = %founded.cluster_id, "founded a cluster of one");
    Ok(())
}
