//! One request to a member, in the time it is given: on an idle connection, and once more on a fresh one if
//! that turns out to be closed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use raft_store::names::RaftId;

use super::connection::{CallFailure, Connection};
use super::shared::Shared;
use super::wire::{Request, Response};
use crate::clock;

/// Why a request has no answer.
#[derive(Debug)]
pub(super) struct Unanswered {
    pub(super) failure: CallFailure,
    /// Whether the request may have reached the peer.
    pub(super) sent: bool,
}

/// What carries a request and brings its answer.
trait Exchange: Send {
    fn exchange(
        &mut self,
        request: &Request,
        within: Duration,
    ) -> impl Future<Output = Result<Response, CallFailure>> + Send;
}

impl Exchange for Connection {
    fn exchange(
        &mut self,
        request: &Request,
        within: Duration,
    ) -> impl Future<Output = Result<Response, CallFailure>> + Send {
        self.call(request, within)
    }
}

/// One request on the idle connection or, if that turns out to be closed, on a fresh one; all of it within
/// the given time. Gives back the connection that brought the answer.
async fn one_request<C: Exchange>(
    idle: Option<C>,
    dial: impl Future<Output = Result<C, CallFailure>> + Send,
    address: &str,
    request: &Request,
    within: Duration,
) -> Result<(C, Response), Unanswered> {
    let deadline = clock::now() + within;
    let left = || deadline.saturating_duration_since(clock::now());
    let sent = idle.is_some();
    if let Some(mut idle) = idle {
        match idle.exchange(request, within).await {
            Ok(answer) => return Ok((idle, answer)),
            Err(CallFailure::Io { .. }) => {}
            // A peer that does not answer is not asked once more: the time is used up.
            Err(failure) => return Err(Unanswered { failure, sent }),
        }
    }
    let dialled = tokio::time::timeout(left(), dial).await;
    let dialled = dialled.unwrap_or_else(|_| {
        Err(CallFailure::TimedOut {
            address: address.to_string(),
        })
    });
    let mut fresh = dialled.map_err(|failure| Unanswered { failure, sent })?;
    match fresh.exchange(request, left()).await {
        Ok(answer) => Ok((fresh, answer)),
        Err(failure) => Err(Unanswered { failure, sent: true }),
    }
}

impl Shared {
    /// An idle or fresh connection to a member, for the caller alone.
    pub(super) async fn connect(
        self: &Arc<Self>,
        target: RaftId,
        address: &str,
    ) -> Result<Connection, CallFailure> {
        let to = (target, address.to_string());
        let dial = || {
            let (shared, to) = (Arc::clone(self), to.clone());
            async move { shared.dial(to.0, &to.1).await }
        };
        self.pool.connection(&to, &self.runtime, dial).await
    }

    async fn dial(&self, target: RaftId, address: &str) -> Result<Connection, CallFailure> {
        match Connection::open(&self.options, address, &self.hello()).await {
            Ok((connection, certificate)) => {
                match self.admit_dialled(target, &certificate, &connection.peer) {
                    Ok(()) => Ok(connection),
                    Err(reason) => Err(connection.turn_away(certificate, reason).await),
                }
            }
            Err(failure) => {
                if let CallFailure::Away { name, reason, .. } = &failure {
                    self.accused(target, name, reason);
                }
                Err(failure)
            }
        }
    }

    /// See [`Shared::ask`].
    pub(super) async fn call(
        self: &Arc<Self>,
        target: RaftId,
        address: &str,
        request: &Request,
        within: Duration,
    ) -> Result<Response, CallFailure> {
        let answer = self.ask(target, address, request, within).await;
        answer.map_err(|unanswered| unanswered.failure)
    }

    /// One request to a member. The peer may have closed an idle connection meanwhile, before or after it read
    /// the request, so the request goes out once more on a fresh one. Every request that comes this way
    /// can be sent twice: Raft's own by its design, `Admin` because its id is kept, `Own` because its nonce
    /// is, and `ReadIndex` because it changes nothing. Snapshots and joins use connections of their own.
    pub(super) async fn ask(
        self: &Arc<Self>,
        target: RaftId,
        address: &str,
        request: &Request,
        within: Duration,
    ) -> Result<Response, Unanswered> {
        let (to, begun) = ((target, address.to_string()), Instant::now());
        let idle = self.pool.take(&to);
        let fresh = async {
            // Whatever closed the idle one has closed those that were idle beside it.
            self.pool.forget(&to, begun);
            self.connect(target, address).await
        };
        match one_request(idle, fresh, address, request, within).await {
            Ok((connection, answer)) => {
                self.pool.put(&to, connection);
                Ok(answer)
            }
            Err(unanswered) => {
                // A request that waits in vain says the same of them. Waiting for a dial says nothing.
                if unanswered.sent && matches!(unanswered.failure, CallFailure::TimedOut { .. }) {
                    self.pool.forget(&to, begun);
                }
                Err(unanswered)
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::future::{pending, ready};
    use std::sync::Mutex;

    use super::*;

    const WITHIN: Duration = Duration::from_secs(60);
    /// What a connection takes to fail.
    const SLOW: Duration = Duration::from_millis(5);

    #[derive(Clone, Copy)]
    enum Plays {
        Answers,
        Closed,
        Silent,
    }

    /// A connection that notes how long each of its requests may take.
    struct Fake {
        plays: Plays,
        given: Arc<Mutex<Vec<Duration>>>,
    }

    impl Exchange for Fake {
        async fn exchange(&mut self, _: &Request, within: Duration) -> Result<Response, CallFailure> {
            self.given.lock().unwrap().push(within);
            let begun = Instant::now();
            while begun.elapsed() < SLOW {
                tokio::task::yield_now().await;
            }
            let address = String::new();
            match self.plays {
                Plays::Answers => Ok(Response::More),
                Plays::Closed => Err(CallFailure::Io {
                    address,
                    source: std::io::ErrorKind::UnexpectedEof.into(),
                }),
                Plays::Silent => Err(CallFailure::TimedOut { address }),
            }
        }
    }

    /// The outcome, whether the request may have arrived, and the time each request was given.
    async fn ask(idle: Option<Plays>, fresh: Plays) -> (&'static str, bool, Vec<Duration>) {
        let given = Arc::new(Mutex::new(Vec::new()));
        let connection = |plays| Fake {
            plays,
            given: Arc::clone(&given),
        };
        let dial = ready(Ok(connection(fresh)));
        let asked = one_request(idle.map(connection), dial, "a:1", &Request::ReadIndex, WITHIN).await;
        let times = given.lock().unwrap().clone();
        match asked {
            Ok(_) => ("answered", true, times),
            Err(Unanswered { failure, sent }) => (word(&failure), sent, times),
        }
    }

    fn word(failure: &CallFailure) -> &'static str {
        match failure {
            CallFailure::Io { .. } => "io",
            CallFailure::TimedOut { .. } => "timed out",
            CallFailure::Away { .. } => "away",
        }
    }

    #[tokio::test]
    async fn an_idle_connection_that_answers_is_enough() {
        let (outcome, _, given) = ask(Some(Plays::Answers), Plays::Silent).await;
        assert_eq!((outcome, given), ("answered", vec![WITHIN]));
    }

    #[tokio::test]
    async fn a_closed_idle_connection_is_replaced_in_the_time_that_is_left() {
        let (outcome, _, given) = ask(Some(Plays::Closed), Plays::Answers).await;
        assert_eq!((outcome, given.len()), ("answered", 2));
        assert!(given[1] <= WITHIN - SLOW, "{given:?}");
        // Once: a peer that closes a fresh one too is not asked for ever.
        let (outcome, sent, given) = ask(Some(Plays::Closed), Plays::Closed).await;
        assert_eq!((outcome, sent, given.len()), ("io", true, 2));
    }

    #[tokio::test]
    async fn a_silent_peer_is_asked_once() {
        let (outcome, sent, given) = ask(Some(Plays::Silent), Plays::Answers).await;
        assert_eq!((outcome, sent, given.len()), ("timed out", true, 1));
        let (outcome, sent, given) = ask(None, Plays::Silent).await;
        assert_eq!((outcome, sent, given.len()), ("timed out", true, 1));
    }

    #[tokio::test]
    async fn a_peer_that_cannot_be_reached_was_sent_nothing() {
        let refused = || {
            Err(CallFailure::Io {
                address: String::new(),
                source: std::io::ErrorKind::ConnectionRefused.into(),
            })
        };
        let request = Request::ReadIndex;
        let dialled = |idle| one_request::<Fake>(idle, ready(refused()), "a:1", &request, WITHIN);
        assert!(!dialled(None).await.err().unwrap().sent);
        let idle = Fake {
            plays: Plays::Closed,
            given: Arc::default(),
        };
        assert!(dialled(Some(idle)).await.err().unwrap().sent);
    }

    #[tokio::test]
    async fn dialling_ends_with_the_call() {
        let within = Duration::from_millis(10);
        let asked = one_request::<Fake>(None, pending(), "a:1", &Request::ReadIndex, within).await;
        let unanswered = asked.err().unwrap();
        assert_eq!((word(&unanswered.failure), unanswered.sent), ("timed out", false));
        assert!(unanswered.failure.to_string().contains("a:1"));
    }
}
