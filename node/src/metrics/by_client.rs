//! The label `client_cn`, for those who ask for it (`metrics.client_cn`). Each client is a series of its own in whatever
//! stores metrics, so their number is bounded: those beyond it are one.

use std::collections::HashSet;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use metrics::SharedString;

/// Common names that get a label of their own, until the process ends: a counter is never forgotten.
const MOST: usize = 1000;
/// The label of all others. A client of this name is among them.
const OTHER: &str = "other";

/// Empty unless the label was asked for.
static CLIENTS: OnceLock<Clients> = OnceLock::new();

/// From now on clients are counted by name.
pub(super) fn begin() {
    CLIENTS.get_or_init(|| Clients::new(MOST));
}

/// The label of a client with this common name; `None` if nobody has one.
pub(super) fn label(common_name: &str) -> Option<SharedString> {
    CLIENTS.get().map(|clients| clients.label(common_name))
}

/// The names that have a label.
struct Clients {
    most: usize,
    known: RwLock<HashSet<Arc<str>>>,
}

impl Clients {
    fn new(most: usize) -> Self {
        Self {
            most,
            known: RwLock::default(),
        }
    }

    fn label(&self, common_name: &str) -> SharedString {
        {
            let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(known) = known.get(common_name) {
                return Arc::clone(known).into();
            }
            // What has to be escaped may look like another name afterwards, and one series would be there twice.
            if known.len() >= self.most || common_name.contains(['\\', '"', '\n']) {
                return SharedString::const_str(OTHER);
            }
        }
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        // Others came meanwhile.
        if let Some(known) = known.get(common_name) {
            return Arc::clone(known).into();
        }
        if known.len() >= self.most {
            return SharedString::const_str(OTHER);
        }
        let name: Arc<str> = common_name.into();
        known.insert(Arc::clone(&name));
        name.into()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn so_many_clients_have_a_label_and_the_rest_share_one() {
        let clients = Clients::new(MOST);
        for n in 0..MOST {
            let name = format!("client-{n}");
            assert_eq!(&*clients.label(&name), name);
        }
        for n in MOST..MOST + 50 {
            assert_eq!(&*clients.label(&format!("client-{n}")), OTHER);
        }
        // Whoever had one keeps it.
        for name in ["client-0", "client-999"] {
            assert_eq!(&*clients.label(name), name);
        }
        assert_eq!(clients.known.read().unwrap().len(), MOST);
    }

    #[test]
    fn a_name_that_would_have_to_be_escaped_has_no_label() {
        let clients = Clients::new(MOST);
        for name in ["a\\", "a\"", "a\\\"", "a\nb"] {
            assert_eq!(&*clients.label(name), OTHER, "{name:?}");
        }
        for name in ["Jürgen, O=x", "a{b}", ""] {
            assert_eq!(&*clients.label(name), name);
        }
    }

    #[test]
    fn clients_that_come_at_once_do_not_exceed_the_bound() {
        let clients = Clients::new(10);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let clients = &clients;
                scope.spawn(move || {
                    for n in 0..100 {
                        clients.label(&format!("{}", (n * 7 + thread) % 50));
                    }
                });
            }
        });
        assert_eq!(clients.known.read().unwrap().len(), 10);
    }
}
