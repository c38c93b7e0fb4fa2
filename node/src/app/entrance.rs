//! When the API lets clients in: at once, or once the node is ready, for balancers that send connections to whoever takes
//! them.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::time::{Instant, sleep};

use crate::config::Server;
use crate::health::{Readiness, ReadyQuery};
use crate::http::{DrainSignal, ListenError, Phase, Reserved};
use crate::readiness::NodeView;

/// Between two looks.
const LOOK: Duration = Duration::from_millis(20);

/// The API's address, which is this node's from the first moment on.
pub(super) enum Entrance {
    /// Who connects waits in the kernel until there is somebody to serve him.
    Open(TcpListener),
    /// Who connects is refused until the node is ready, at the latest until then.
    Waits(Reserved, Instant),
}

impl Entrance {
    /// Takes the address. Within a runtime.
    pub(super) fn take(server: &Server) -> Result<Self, ListenError> {
        let reserved = Reserved::new(server.listen_key, server.listen)?;
        if server.wait_ready.is_zero() {
            return Ok(Self::Open(reserved.open()?));
        }
        Ok(Self::Waits(reserved, Instant::now() + server.wait_ready))
    }

    /// Whether it takes connections from the first moment on.
    pub(super) fn is_open(&self) -> bool {
        matches!(self, Self::Open(_))
    }

    /// Who belongs to no cluster yet waits for a call, and so does whoever is not ready in time: it may need an
    /// administrator. Nothing, if the node is told to stop before.
    pub(super) async fn open(
        self,
        view: Arc<NodeView>,
        is_member: bool,
        mut drain: DrainSignal,
    ) -> Result<Option<TcpListener>, ListenError> {
        let (reserved, until) = match self {
            Self::Open(socket) => return Ok(Some(socket)),
            Self::Waits(reserved, until) => (reserved, until),
        };
        // A standby of mode active-passive takes requests too.
        let query = ReadyQuery {
            slot: None,
            stale_ok: true,
        };
        while is_member && !Readiness::of(view.checks(&query)).ready {
            if Instant::now() >= until {
                tracing::warn!(
                    "the API opens although this node is not ready: server.wait_ready_ms has passed"
                );
                break;
            }
            tokio::select! {
                () = drain.reached(Phase::Notice) => return Ok(None),
                () = sleep(LOOK) => {}
            }
        }
        let socket = reserved.open()?;
        view.listens();
        tracing::info!("the API is open");
        Ok(Some(socket))
    }
}
