//! The life of key versions: made, read, taken out of use and put back, destroyed.

use std::time::Duration;

use hsm_api::admin::KeyState;

use super::{NEW, Opened, Sealed, Worker};

/// Retired versions that are left alone in contexts that rotate all the time: a token with thousands of keys is another test.
const LEFT: usize = 40;
/// From a destruction's order to its end: a new leader may cost it half a minute, a node that is away longer.
const DESTROYED: Duration = Duration::from_secs(90);

/// Makes versions, sometimes by the other command, sometimes through one node only.
pub(super) async fn rotate(mut worker: Worker, context: &'static str, every_ms: u64) {
    while worker.pause(every_ms / 2, every_ms * 3 / 2).await {
        let key = worker.clients.key();
        let node = worker.once_in(2).then(|| worker.node());
        if worker.once_in(5) {
            worker.clients.create(worker.process, context, node, &key).await;
        } else {
            worker.clients.rotate(worker.process, context, node, &key).await;
        }
    }
}

/// The first version of a context, under one key until it is said to be there. False if all is over before.
async fn make(worker: &mut Worker, context: &str) -> bool {
    let key = worker.clients.key();
    loop {
        let node = worker.once_in(2).then(|| worker.node());
        let made = worker.clients.create(worker.process, context, node, &key).await;
        if made.is_some() {
            return true;
        }
        if !worker.pause(500, 1_500).await {
            return false;
        }
    }
}

/// Makes contexts that nobody has had, each until it is said to be there, and then versions of them. Whether what was encrypted
/// in them decrypts is asked at the end: a node that is cut off does not know them, and may say so.
pub(super) async fn create(mut worker: Worker) {
    for context in NEW {
        if !worker.pause(3_000, 15_000).await {
            return;
        }
        if !make(&mut worker, context).await {
            return;
        }
        for node in worker.clients.running() {
            worker.clients.seal(worker.process, context, node).await;
        }
    }
    while worker.pause(10_000, 20_000).await {
        let context = worker.one_of(&NEW).unwrap_or(NEW[0]);
        let key = worker.clients.key();
        worker.clients.rotate(worker.process, context, None, &key).await;
        let node = worker.node();
        worker.clients.seal(worker.process, context, node).await;
    }
}

/// Reads through the leader, and what single nodes list.
pub(super) async fn read(mut worker: Worker, context: &'static str) {
    while worker.pause(200, 600).await {
        let node = worker.node();
        worker.clients.retired(worker.process, context, Some(node)).await;
        if worker.once_in(4) {
            let node = worker.node();
            worker.clients.keys(worker.process, node).await;
        }
    }
}

/// The whole life of each version of a context: retired, disabled, enabled, destroyed, sometimes spared in time.
pub(super) async fn live(mut worker: Worker, context: &'static str) {
    if !make(&mut worker, context).await {
        return;
    }
    while worker.pause(1_000, 3_000).await {
        let node = worker.node();
        let Some(sealed) = worker.clients.seal(worker.process, context, node).await else {
            continue;
        };
        let key = worker.clients.key();
        let made = worker.clients.rotate(worker.process, context, None, &key).await;
        if made.is_none_or(|made| made <= sealed.version) {
            continue;
        }
        disuse(&mut worker, &sealed).await;
        let version = (context, sealed.version);
        let key = worker.clients.key();
        let ordered = worker
            .clients
            .destroy_by(worker.process, version, None, &key)
            .await;
        if ordered.is_none() {
            // A client that has heard nothing asks again, and it is one destruction all the same.
            worker
                .clients
                .destroy_by(worker.process, version, None, &key)
                .await;
        }
        if worker.once_in(6) {
            let key = worker.clients.key();
            worker.clients.undo_destroy(worker.process, version, &key).await;
            continue;
        }
        if worker.goes_on() {
            ends(&mut worker, &sealed).await;
        }
    }
}

/// Out of use and back, with a look at what clients see of it.
async fn disuse(worker: &mut Worker, sealed: &Sealed) {
    let version = (sealed.context.as_str(), sealed.version);
    for enable in [false, true] {
        let key = worker.clients.key();
        let node = worker.once_in(2).then(|| worker.node());
        let clients = worker.clients.clone();
        clients.set_use(worker.process, version, enable, node, &key).await;
        for node in clients.running() {
            clients.open(worker.process, node, sealed).await;
        }
        // It was said before, and is done once.
        if worker.once_in(3) {
            clients.set_use(worker.process, version, enable, None, &key).await;
        }
    }
}

/// Once anybody calls it destroyed, it decrypts nowhere.
async fn ends(worker: &mut Worker, sealed: &Sealed) {
    let clients = worker.clients.clone();
    let waited = clients.wait_destroyed(worker.process, &sealed.context, sealed.version, DESTROYED);
    let destroyed = tokio::select! {
        destroyed = waited => destroyed,
        () = super::told(&mut worker.stopped) => false,
    };
    if !destroyed {
        return;
    }
    for node in clients.running() {
        if clients.open(worker.process, node, sealed).await == Opened::Right {
            clients.recorder().note("a destroyed version has decrypted");
        }
    }
}

/// Destroys what is old where versions are only ever made: the newest retired ones stay as they are.
pub(super) async fn trim(mut worker: Worker, contexts: [&'static str; 2]) {
    while worker.pause(5_000, 10_000).await {
        let node = worker.node();
        let Some(keys) = worker.clients.keys(worker.process, node).await else {
            continue;
        };
        for context in contexts {
            let known = keys.contexts.iter().filter(|known| known.context == context);
            let versions = known.flat_map(|known| &known.versions);
            let retired: Vec<u32> = versions
                .filter(|version| version.state == KeyState::DecryptOnly)
                .map(|version| version.version)
                .collect();
            let old = retired.len().saturating_sub(LEFT);
            for version in &retired[..old] {
                if !worker.goes_on() {
                    return;
                }
                worker.clients.destroy(worker.process, context, *version).await;
            }
        }
    }
}
