//! Waiting for a condition, never for a while.

use std::time::Duration;

use anyhow::{Result, bail};
use tokio::time::Instant;

const POLL: Duration = Duration::from_millis(50);

/// Asks `probe` again and again until it finds something. `what` completes "gave up waiting for …".
pub async fn until<T>(what: &str, limit: Duration, mut probe: impl AsyncFnMut() -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = probe().await {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            bail!("gave up after {limit:?} waiting for {what}");
        }
        tokio::time::sleep(POLL).await;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_ends_with_the_condition_or_with_the_deadline() {
        let mut asked = 0;
        let found = until("three", Duration::from_secs(5), async || {
            asked += 1;
            (asked == 3).then_some(asked)
        });
        assert_eq!(found.await.unwrap(), 3);
        let error = until("nothing", Duration::from_millis(60), async || None::<()>)
            .await
            .unwrap_err();
        assert!(error.to_string().ends_with("waiting for nothing"), "{error}");
    }
}
