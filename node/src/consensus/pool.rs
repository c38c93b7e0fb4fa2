//! Idle connections to peers, and the dials that make them. A dial runs to its end in a task of its own: the
//! caller whose time is up leaves the next one a connection instead of another dial.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use raft_store::names::RaftId;
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::connection::{CallFailure, Connection};
use crate::lock::lock;

/// Idle connections kept per peer, and dials to it at a time.
const IDLE: usize = 4;

/// A peer at an address.
pub(super) type Target = (RaftId, String);
/// How a dial ended; `None` while it runs.
type Ended = Option<Result<(), Arc<CallFailure>>>;

struct Idle<C> {
    connection: C,
    /// When it brought its last answer.
    since: Instant,
}

/// A dial. Whoever waits for it holds it.
struct Dial(watch::Receiver<Ended>);

impl Dial {
    fn runs(&self) -> bool {
        self.0.borrow().is_none() && self.0.has_changed().is_ok()
    }
}

struct Targets<C> {
    idle: Mutex<BTreeMap<Target, Vec<Idle<C>>>>,
    /// The last dials to each; peers are as few as the cluster's members.
    dials: Mutex<BTreeMap<Target, Vec<Arc<Dial>>>>,
}

/// See the module.
pub(super) struct Pool<C = Connection>(Arc<Targets<C>>);

impl<C> Default for Pool<C> {
    fn default() -> Self {
        Self(Arc::new(Targets {
            idle: Mutex::default(),
            dials: Mutex::default(),
        }))
    }
}

impl<C> Targets<C> {
    fn put(&self, to: &Target, connection: C) {
        let mut idle = lock(&self.idle);
        let kept = idle.entry(to.clone()).or_default();
        if kept.len() < IDLE {
            let since = Instant::now();
            kept.push(Idle { connection, since });
        }
    }
}

impl<C: Send + 'static> Pool<C> {
    /// Takes an idle connection out; for the time of a call it is the caller's alone.
    pub(super) fn take(&self, to: &Target) -> Option<C> {
        let idle = lock(&self.0.idle).get_mut(to)?.pop()?;
        Some(idle.connection)
    }

    /// Puts a connection back whose call ended well.
    pub(super) fn put(&self, to: &Target, connection: C) {
        self.0.put(to, connection);
    }

    /// Drops what has been idle since before `begun`. What has answered since then is well.
    pub(super) fn forget(&self, to: &Target, begun: Instant) {
        if let Some(idle) = lock(&self.0.idle).get_mut(to) {
            idle.retain(|idle| idle.since >= begun);
        }
    }

    /// An idle connection, or a fresh one. A few dials at a time run to each target, whoever waits for them; what
    /// they make is idle until somebody takes it.
    pub(super) async fn connection<D>(
        &self,
        to: &Target,
        runtime: &Handle,
        dial: impl Fn() -> D,
    ) -> Result<C, CallFailure>
    where
        D: Future<Output = Result<C, CallFailure>> + Send + 'static,
    {
        loop {
            if let Some(connection) = self.take(to) {
                return Ok(connection);
            }
            let dial = self.dialling(to, runtime, &dial);
            let mut ended = dial.0.clone();
            let ended = match ended.wait_for(Option::is_some).await {
                Ok(ended) => ended.clone(),
                Err(_) => None,
            };
            match ended {
                // Somebody else may be quicker to take it.
                Some(Ok(())) => {}
                Some(Err(failure)) => return Err(failure.again()),
                None => {
                    let source = std::io::Error::other("dialling ended abnormally");
                    let address = to.1.clone();
                    return Err(CallFailure::Io { address, source });
                }
            }
        }
    }

    /// A dial that runs and that nobody waits for, else a new one, else the one that the fewest wait for.
    fn dialling<D>(&self, to: &Target, runtime: &Handle, dial: impl Fn() -> D) -> Arc<Dial>
    where
        D: Future<Output = Result<C, CallFailure>> + Send + 'static,
    {
        let mut dials = lock(&self.0.dials);
        let running = dials.entry(to.clone()).or_default();
        running.retain(|dial| dial.runs());
        if let Some(least) = running.iter().min_by_key(|dial| Arc::strong_count(dial))
            // Held here only: who began it has gone.
            && (Arc::strong_count(least) == 1 || running.len() >= IDLE)
        {
            return Arc::clone(least);
        }
        let (ended, outcome) = watch::channel(None);
        let begun = Arc::new(Dial(outcome));
        running.push(Arc::clone(&begun));
        let (targets, to, dialled) = (Arc::clone(&self.0), to.clone(), dial());
        runtime.spawn(async move {
            let outcome = match dialled.await {
                Ok(connection) => {
                    targets.put(&to, connection);
                    Ok(())
                }
                Err(failure) => Err(Arc::new(failure)),
            };
            ended.send_replace(Some(outcome));
        });
        begun
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use futures_util::FutureExt;
    use futures_util::future::join_all;
    use tokio::sync::Semaphore;

    use super::*;

    /// Dials that end when they are told to, and are counted.
    #[derive(Clone)]
    struct Dials {
        made: Arc<AtomicUsize>,
        end: Arc<Semaphore>,
        fail: bool,
    }

    impl Dials {
        fn new(fail: bool) -> Self {
            Self {
                made: Arc::default(),
                end: Arc::new(Semaphore::new(0)),
                fail,
            }
        }

        fn dial(&self) -> impl Future<Output = Result<usize, CallFailure>> + Send + use<> {
            let (number, this) = (self.made.fetch_add(1, Ordering::SeqCst), self.clone());
            async move {
                this.end.acquire().await.unwrap().forget();
                let (address, source) = (String::new(), std::io::ErrorKind::ConnectionRefused.into());
                if this.fail {
                    Err(CallFailure::Io { address, source })
                } else {
                    Ok(number)
                }
            }
        }

        fn made(&self) -> usize {
            self.made.load(Ordering::SeqCst)
        }
    }

    fn to() -> Target {
        (2, "a:1".to_owned())
    }

    #[tokio::test]
    async fn a_dial_outlives_its_caller_and_leaves_a_connection() {
        let (pool, dials, runtime) = (Pool::default(), Dials::new(false), Handle::current());
        let to = to();
        let late = Duration::from_millis(1);
        let waited = tokio::time::timeout(late, pool.connection(&to, &runtime, || dials.dial())).await;
        assert!(waited.is_err());
        // The next caller waits for the same one.
        let next = pool.connection(&to, &runtime, || dials.dial());
        dials.end.add_permits(1);
        assert_eq!((next.await.unwrap(), dials.made()), (0, 1));
    }

    #[tokio::test]
    async fn all_who_wait_share_a_few_dials_and_hear_how_theirs_failed() {
        let dials = Dials::new(true);
        let (pool, runtime, to) = (Pool::default(), Handle::current(), to());
        let waiting = (0..2 * IDLE).map(|_| pool.connection(&to, &runtime, || dials.dial()));
        let waiting = join_all(waiting);
        dials.end.add_permits(IDLE);
        for failed in waiting.await {
            assert!(matches!(failed, Err(CallFailure::Io { .. })));
        }
        assert_eq!(dials.made(), IDLE);
        // A failure is not remembered.
        dials.end.add_permits(1);
        assert!(pool.connection(&to, &runtime, || dials.dial()).await.is_err());
        assert_eq!(dials.made(), IDLE + 1);
    }

    #[tokio::test]
    async fn a_dial_that_hangs_holds_nobody_who_comes_later() {
        let (pool, runtime, to) = (Pool::<usize>::default(), Handle::current(), to());
        let hangs = pool.connection(&to, &runtime, std::future::pending::<Result<usize, CallFailure>>);
        tokio::pin!(hangs);
        assert!((&mut hangs).now_or_never().is_none());
        let later = pool.connection(&to, &runtime, || std::future::ready(Ok(7)));
        let later = tokio::time::timeout(Duration::from_secs(30), later).await;
        assert_eq!(later.unwrap().unwrap(), 7);
    }

    #[test]
    fn a_connection_that_answered_since_is_kept() {
        let (pool, to, begun) = (Pool::default(), to(), Instant::now());
        pool.put(&to, 1);
        pool.forget(&to, begun);
        assert_eq!(pool.take(&to), Some(1));
        pool.put(&to, 2);
        pool.forget(&to, Instant::now() + Duration::from_secs(60));
        assert_eq!(pool.take(&to), None);
    }

    #[test]
    fn no_more_are_kept_than_a_peer_is_asked_at_once() {
        let (pool, to) = (Pool::default(), to());
        for number in 0..2 * IDLE {
            pool.put(&to, number);
        }
        assert_eq!(std::iter::from_fn(|| pool.take(&to)).count(), IDLE);
    }
}
