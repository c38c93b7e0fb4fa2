//! Encrypts on one node and decrypts at once on another, and now and then something older anywhere: of every version some
//! ciphertexts are kept, also of those that are gone.

use super::{CONTEXTS, Sealed, Worker};

/// Older ciphertexts that are kept, drawn evenly from all.
const KEPT: usize = 256;

pub(super) async fn work(mut worker: Worker) {
    let (mut kept, mut made) = (Vec::<Sealed>::new(), 0_u64);
    while worker.pause(15, 35).await {
        let context = worker.one_of(&CONTEXTS).unwrap_or(CONTEXTS[0]);
        let (here, there) = (worker.node(), worker.node());
        if let Some(sealed) = worker.clients.seal(worker.process, context, here).await {
            worker.clients.open(worker.process, there, &sealed).await;
            made += 1;
            if kept.len() < KEPT {
                kept.push(sealed);
            } else {
                let place = usize::try_from(worker.random.below(made)).unwrap_or(usize::MAX);
                if let Some(old) = kept.get_mut(place) {
                    *old = sealed;
                }
            }
        }
        if worker.once_in(3) && !kept.is_empty() {
            let place = worker.random.below(kept.len() as u64);
            if let Some(sealed) = kept.get(usize::try_from(place).unwrap_or_default()) {
                let node = worker.node();
                worker.clients.open(worker.process, node, sealed).await;
            }
        }
    }
}
