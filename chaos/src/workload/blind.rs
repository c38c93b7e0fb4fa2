//! An operator, or his script, who repeats a command until it says that it is done, and once more to be sure: with the same
//! `Idempotency-Key` it is one change, whatever leader is asked; with a new one it is another.

use std::collections::VecDeque;

use super::Worker;

/// Keys that are used again later: long after their answers were given.
const KEPT: usize = 16;
/// Attempts of one command, each through one node.
const ATTEMPTS: u32 = 6;

pub(super) async fn repeat(mut worker: Worker, context: &'static str) {
    let mut keys: VecDeque<String> = VecDeque::new();
    while worker.pause(4_000, 10_000).await {
        let old = worker.one_of(&(0..keys.len()).collect::<Vec<_>>());
        let key = match old.filter(|_| worker.random.below(3) == 0) {
            Some(place) => keys[place].clone(),
            None => worker.clients.key(),
        };
        for _ in 0..ATTEMPTS {
            let node = worker.node();
            let done = worker
                .clients
                .rotate(worker.process, context, Some(node), &key)
                .await;
            if done.is_some() || !worker.pause(100, 500).await {
                break;
            }
        }
        if worker.once_in(2) {
            worker.clients.rotate(worker.process, context, None, &key).await;
        }
        if !keys.contains(&key) {
            keys.push_back(key);
        }
        if keys.len() > KEPT {
            keys.pop_front();
        }
    }
}
