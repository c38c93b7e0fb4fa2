//! Places of those who wait for the leader's word on a version that this node does not know. A principal has only a
//! part of them, however many ciphertexts of made-up versions it sends; whoever finds none free waits a little.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;

use super::asking::Asking;
use super::data_plane::AboveKnown;
use super::shares::{Share, Shares};
use crate::identity::Principal;

/// Ciphertexts, and batches with some, that may wait at a time. The leader is asked once for all of them.
const PLACES: usize = 256;
/// One principal gets this part of them at most.
const PRINCIPALS_PART: usize = 8;
/// How long one waits for a place.
const WAIT: Duration = Duration::from_millis(250);

/// See the module.
pub(super) struct Lookups {
    places: Arc<Shares>,
    freed: Arc<Notify>,
}

/// Given back when dropped.
struct Place {
    share: Option<Share>,
    freed: Arc<Notify>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.share = None;
        self.freed.notify_waiters();
    }
}

impl Lookups {
    pub(super) fn new() -> Self {
        Self::with(PLACES, PLACES / PRINCIPALS_PART)
    }

    fn with(places: usize, each: usize) -> Self {
        Self {
            places: Shares::new(places, each),
            freed: Arc::default(),
        }
    }

    async fn enter(&self, principal: &Principal) -> Option<Place> {
        let taken = async {
            loop {
                // Before looking: a place that is given back from here on is heard of.
                let freed = self.freed.notified();
                let mut share = self.places.open(principal);
                if share.take(1).is_ok() {
                    return Place {
                        share: Some(share),
                        freed: Arc::clone(&self.freed),
                    };
                }
                drop(share);
                freed.await;
            }
        };
        tokio::time::timeout(WAIT, taken).await.ok()
    }
}

impl Asking<'_> {
    /// What the leader's state says about a version that this node does not know.
    pub(super) async fn look_up(&self, context: &str, version: u32) -> AboveKnown {
        match self.state.lookups().enter(self.principal).await {
            Some(_place) => self.state.data().version_above_known(context, version).await,
            None => AboveKnown::Busy,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;
    use crate::http::tests::fake::principal;

    #[tokio::test]
    async fn one_principal_leaves_places_to_the_others() {
        let lookups = Lookups::with(3, 2);
        let (a, b) = (principal("a", None), principal("b", None));
        let held = [lookups.enter(&a).await.unwrap(), lookups.enter(&a).await.unwrap()];
        assert!(lookups.enter(&a).await.is_none());
        let other = lookups.enter(&b).await.unwrap();
        assert!(
            lookups.enter(&b).await.is_none(),
            "there is no more than there is"
        );
        drop((held, other));
        assert_eq!(lookups.places.taken(), (0, 0));
    }

    #[tokio::test]
    async fn whoever_waits_gets_a_place_that_is_given_back() {
        let lookups = Lookups::with(1, 1);
        let (a, b) = (principal("a", None), principal("b", None));
        let held = lookups.enter(&a).await.unwrap();
        let (waited, ()) = tokio::join!(lookups.enter(&b), async { drop(held) });
        assert!(waited.is_some());
    }
}
