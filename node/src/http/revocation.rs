//! What becomes of what is in hand when the certificate that it was asked for with is revoked.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::identity::Principal;
use crate::policy::Policy;

/// Requests in hand get this long when a certificate is revoked.
pub(super) const LAST_WORDS: Duration = Duration::from_secs(1);

/// Ends when a certificate is revoked, at once if it is already.
pub(super) async fn revoked(mut policies: watch::Receiver<Arc<Policy>>, who: &Principal) {
    let revoked = policies.wait_for(|policy| policy.check_certificate(who).is_err());
    let ended = revoked.await.is_err();
    if ended {
        // The policy is not followed any more: the node stops.
        std::future::pending::<()>().await;
    }
}
