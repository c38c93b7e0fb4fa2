//! The policy for those who have to hear of its changes at once, whether anybody asks for anything or not: open
//! connections end when their certificate is revoked.

use std::sync::Arc;

use tokio::sync::watch;

use super::NodeView;
use crate::http::DataPlane;
use crate::policy::Policy;

impl NodeView {
    /// The policy in force, and each later one as soon as it is applied here. Followed until this node's consensus
    /// ends.
    pub fn follow_policy(self: &Arc<Self>) -> watch::Receiver<Arc<Policy>> {
        let mut applied = self.parts.consensus.applied();
        applied.borrow_and_update();
        let (sender, receiver) = watch::channel(self.policy());
        let view = Arc::clone(self);
        tokio::spawn(async move {
            while applied.changed().await.is_ok() {
                applied.borrow_and_update();
                tell(&sender, view.policy());
            }
        });
        receiver
    }
}

/// Wakes nobody for a policy that they know.
fn tell(sender: &watch::Sender<Arc<Policy>>, policy: Arc<Policy>) {
    sender.send_if_modified(|known| {
        let changed = !Arc::ptr_eq(known, &policy);
        if changed {
            *known = policy;
        }
        changed
    });
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn only_another_policy_wakes_who_waits() {
        let first = Arc::new(Policy::default());
        let (sender, mut receiver) = watch::channel(Arc::clone(&first));
        tell(&sender, first);
        assert!(!receiver.has_changed().unwrap());
        tell(&sender, Arc::new(Policy::default()));
        assert!(receiver.has_changed().unwrap());
        receiver.borrow_and_update();
    }
}
