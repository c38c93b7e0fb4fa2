//! The changes that administrators have asked this node for and that have not ended. They outlive the connections
//! they were asked on: there are so many of them at most, and a shutdown waits until each has its line in the audit.

use std::sync::Arc;

use hsm_api::ErrorCode;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::admin::authorise::{Act, authorise};
use crate::admin::call::CallError;
use crate::identity::Principal;
use crate::policy::Policy;

/// Changes under way at once; as many as the leader has proposals in flight.
const MOST: u32 = 64;

/// See the module. Clones are the same.
#[derive(Clone)]
pub struct Changes(Arc<Semaphore>);

impl Default for Changes {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(MOST as usize)))
    }
}

impl Changes {
    /// A place for one change of a caller who may make it, until it is recorded. Whoever may not takes none, or he
    /// would keep those out who may.
    pub(super) fn begin(
        &self,
        policy: &Policy,
        principal: &Principal,
        act: Act,
    ) -> Result<OwnedSemaphorePermit, CallError> {
        authorise(policy, principal, act)?;
        self.place()
    }

    fn place(&self) -> Result<OwnedSemaphorePermit, CallError> {
        Arc::clone(&self.0).try_acquire_owned().map_err(|_| {
            let detail = "too many administrative changes are under way on this node; try again";
            CallError::new(ErrorCode::Overloaded, detail)
        })
    }

    /// Waits until all have ended. No further one begins.
    pub async fn end(&self) {
        if let Ok(all) = self.0.acquire_many(MOST).await {
            all.forget();
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::identity::Identity;

    #[test]
    fn whoever_may_not_takes_no_place_and_is_told_so_when_there_is_none() {
        let changes = Changes::default();
        let nobody = Principal::new(Identity {
            cn: "nobody".to_owned(),
            ou: Some("Nobody".to_owned()),
            sans: vec![],
            serial: "1".to_owned(),
            issuer_dn: "CN=CA".to_owned(),
            fingerprint: [1; 32],
            spki_sha256: [2; 32],
            not_after: i64::MAX,
        });
        let begin = || changes.begin(&Policy::default(), &nobody, Act::Join);
        let mut taken = Vec::new();
        for _ in 0..MOST {
            assert_eq!(begin().unwrap_err().code, ErrorCode::RoleRequired);
            taken.push(changes.place().unwrap());
        }
        assert_eq!(begin().unwrap_err().code, ErrorCode::RoleRequired);
    }

    #[tokio::test]
    async fn they_are_bounded_and_their_end_is_waited_for() {
        let changes = Changes::default();
        let mut all: Vec<_> = (0..MOST).map(|_| changes.place().unwrap()).collect();
        assert_eq!(changes.place().unwrap_err().code, ErrorCode::Overloaded);
        let last = all.pop();
        drop(all);
        let mut end = Box::pin(changes.end());
        assert!(end.as_mut().now_or_never().is_none());
        assert!(changes.place().is_err(), "a shutdown has begun");
        drop(last);
        end.await;
        assert_eq!(changes.place().unwrap_err().code, ErrorCode::Overloaded);
    }
}
