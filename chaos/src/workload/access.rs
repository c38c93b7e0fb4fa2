//! Who may do what: a value in access control that is compared and set by several at once, and clients whose certificates are
//! revoked while they go on asking.

use hsm_api::Client;
use hsm_api::admin::{AclDocument, AclMapping};

use super::{CONTEXTS, Worker};

/// In front of the value: the OU of a mapping that nobody has.
const OU: &str = "chaos-";

/// The value in access control; zero where none was ever put.
#[must_use]
pub fn value_of(acl: &AclDocument) -> u64 {
    let values = acl
        .mappings
        .keys()
        .filter_map(|ou| ou.strip_prefix(OU)?.parse().ok());
    values.max().unwrap_or_default()
}

/// The same with another value.
#[must_use]
pub fn with_value(acl: &AclDocument, value: u64) -> AclDocument {
    let mut acl = acl.clone();
    acl.mappings.retain(|ou, _| !ou.starts_with(OU));
    let mapping = AclMapping {
        contexts: vec![CONTEXTS[0].to_owned()],
        operations: None,
    };
    acl.mappings.insert(format!("{OU}{value}"), mapping);
    acl
}

/// Reads on some node, and writes over what was read.
pub(super) async fn change(mut worker: Worker) {
    while worker.pause(1_000, 4_000).await {
        let node = worker.node();
        let Some(read) = worker.clients.read_acl(worker.process, node).await else {
            continue;
        };
        let (to, key) = (worker.clients.recorder().number(), worker.clients.key());
        let node = worker.once_in(2).then(|| worker.node());
        worker
            .clients
            .set_acl(worker.process, &read, to, node, &key)
            .await;
        if worker.once_in(4) {
            // Blindly, whatever came of it: the same request is carried out once.
            worker
                .clients
                .set_acl(worker.process, &read, to, None, &key)
                .await;
        }
    }
}

/// One client after the other: let in, revoked, and asking on; half of them are pardoned.
pub(super) async fn revoke(mut worker: Worker) {
    while worker.pause(500, 2_000).await {
        let cn = format!("victim-{}", worker.clients.recorder().number());
        let victim = match worker.clients.issue(&cn) {
            Ok(victim) => victim,
            Err(error) => {
                // Whoever stops the clients finds that this one has ended.
                eprintln!("{cn}: {error:#}");
                return;
            }
        };
        ask(&mut worker, &cn, &victim, 5).await;
        let node = worker.once_in(2).then(|| worker.node());
        worker.clients.set_revoked(worker.process, &cn, true, node).await;
        ask(&mut worker, &cn, &victim, 40).await;
        if worker.once_in(2) {
            worker.clients.set_revoked(worker.process, &cn, true, None).await;
        }
        if worker.once_in(2) {
            worker.clients.set_revoked(worker.process, &cn, false, None).await;
            ask(&mut worker, &cn, &victim, 5).await;
        }
    }
}

async fn ask(worker: &mut Worker, cn: &str, victim: &[(u32, Client)], times: u32) {
    for _ in 0..times {
        let running = worker.clients.running();
        let nodes = victim.iter().filter(|(node, _)| running.contains(node));
        for (node, client) in nodes {
            worker.clients.ask(worker.process, cn, (*node, client)).await;
        }
        if !worker.pause(50, 150).await {
            return;
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn the_value_is_the_only_thing_that_changes() {
        let mut before = AclDocument::default();
        let trading = AclMapping {
            contexts: vec!["order-key".to_owned()],
            operations: None,
        };
        before.digest = Some("read".to_owned());
        before.mappings.insert("Trading".to_owned(), trading);
        assert_eq!(value_of(&before), 0);
        let first = with_value(&before, 7);
        let second = with_value(&first, 12);
        assert_eq!((value_of(&first), value_of(&second)), (7, 12));
        assert_eq!(second.mappings.len(), 2);
        assert_eq!(second.mappings["Trading"], before.mappings["Trading"]);
        assert_eq!(second.digest, before.digest, "it says what was read");
    }
}
