//! Which scenario is played next, and how some are played at a time.

use std::cmp::Reverse;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;

use super::Case;

/// Nodes of a scenario beside which another one of any size is played: two cores carry them all.
const SMALL: u32 = 3;

/// Scenarios that are still to be played.
pub(super) struct Queue {
    waiting: VecDeque<Case>,
    /// Large ones that are being played.
    large: usize,
}

impl Queue {
    pub(super) fn new(mut cases: Vec<Case>) -> Self {
        // The large ones take longest.
        cases.sort_by_key(|case| Reverse(case.nodes));
        Self {
            waiting: cases.into(),
            large: 0,
        }
    }

    /// The next one. Large ones come one after the other, as long as there are small ones to play beside them.
    pub(super) fn begin(&mut self) -> Option<Case> {
        let fits = |case: &Case| self.large == 0 || !is_large(case);
        let place = self.waiting.iter().position(fits).unwrap_or_default();
        let case = self.waiting.remove(place)?;
        self.large += usize::from(is_large(&case));
        Some(case)
    }

    /// This one is over.
    pub(super) fn end(&mut self, case: &Case) {
        self.large = self.large.saturating_sub(usize::from(is_large(case)));
    }
}

fn is_large(case: &Case) -> bool {
    case.nodes > SMALL
}

/// Until all of these are over. In one task: with it, whatever they hold is dropped when the program is told to stop.
pub(super) async fn side_by_side(mut running: Vec<Pin<Box<dyn Future<Output = ()> + '_>>>) {
    poll_fn(|context| {
        running.retain_mut(|one| one.as_mut().poll(context).is_pending());
        if running.is_empty() {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::cell::RefCell;

    use tokio::sync::Notify;

    use super::*;

    #[tokio::test]
    async fn who_waits_holds_up_nobody() {
        let (told, order) = (Notify::new(), RefCell::new(Vec::new()));
        let waits = async {
            told.notified().await;
            order.borrow_mut().push("waits");
        };
        let goes_on = async {
            tokio::task::yield_now().await;
            order.borrow_mut().push("goes on");
            told.notify_one();
        };
        side_by_side(vec![Box::pin(waits), Box::pin(goes_on)]).await;
        assert_eq!(order.into_inner(), ["goes on", "waits"]);
        side_by_side(Vec::new()).await;
    }
}
