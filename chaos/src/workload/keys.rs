//! The life of key versions: made, read, taken out of use and put back, destroyed.

use std::time::Duration;

use hsm_api::admin::KeyState;

use super::{NEW, Opened, SHORT_LIVED, Sealed, Worker};

/// Retired versions that are left alone in contexts that rotate all the time: a token with thousands of keys is another test, and
/// a node proves every key that it holds at each start.
const LEFT: usize = 40;
/// The same in each of those that are made during a run: there are four of them.
const LEFT_OF_NEW: usize = 8;
/// The same where versions are destroyed one by one, for those that were spared in time. The newest is still with the client that
/// ends them; of the older ones it wants nothing any more.
const LEFT_OF_SPARED: usize = 8;
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

/// How many retired versions of a context are left alone.
fn left_of(context: &str) -> usize {
    match context {
        SHORT_LIVED => LEFT_OF_SPARED,
        new if NEW.contains(&new) => LEFT_OF_NEW,
        _ => LEFT,
    }
}

/// Those of a listing that are old: all that are retired but the newest, in their order. One that is spared may be out of use.
fn old(versions: impl Iterator<Item = (u32, KeyState)>, left: usize) -> Vec<u32> {
    let mut retired: Vec<u32> = versions
        .filter(|(_, state)| matches!(state, KeyState::DecryptOnly | KeyState::Disabled))
        .map(|(version, _)| version)
        .collect();
    retired.sort_unstable();
    retired.truncate(retired.len().saturating_sub(left));
    retired
}

/// Destroys what is old, so that a node holds as many keys after an hour as after some minutes: the newest retired ones stay as
/// they are. A node that lists them late lists older ones, so none of the newest is ever meant.
pub(super) async fn trim(mut worker: Worker) {
    while worker.pause(5_000, 10_000).await {
        let node = worker.node();
        let Some(keys) = worker.clients.keys(worker.process, node).await else {
            continue;
        };
        for known in &keys.contexts {
            let states = known.versions.iter().map(|known| (known.version, known.state));
            for version in old(states, left_of(&known.context)) {
                if !worker.goes_on() {
                    return;
                }
                worker
                    .clients
                    .destroy(worker.process, &known.context, version)
                    .await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::CONTEXTS;

    #[test]
    fn what_is_old_is_destroyed_in_every_context_and_the_newest_retired_ones_are_not() {
        use KeyState::{Active, DecryptOnly, DestroyScheduled, Destroyed, Disabled};
        let states = [
            (1, Destroyed),
            (5, DecryptOnly),
            (2, Disabled),
            (3, DecryptOnly),
            (4, DestroyScheduled),
            (6, DecryptOnly),
            (7, Active),
        ];
        let old = |left| old(states.into_iter(), left);
        assert_eq!(old(2), [2, 3]);
        assert_eq!(old(1), [2, 3, 5]);
        assert!(old(4).is_empty() && old(40).is_empty());
        // Together as many as some minutes make, however long a run is.
        let all: usize = CONTEXTS.iter().chain(&NEW).map(|context| left_of(context)).sum();
        assert_eq!(all, 2 * LEFT + LEFT_OF_SPARED + 4 * LEFT_OF_NEW);
        assert!(
            CONTEXTS.iter().chain(&NEW).all(|context| left_of(context) > 0),
            "the last one is read"
        );
    }
}
