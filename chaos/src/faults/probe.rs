//! A change that is asked for again and again until it is acknowledged. Clients change something now and then; how long no
//! change was possible is to be known better than that.

use std::time::Duration;

use anyhow::Result;
use hsm_api::Client;
use hsm_api::admin::{RevocationMatch, RevokeRequest};
use tokio::time::{Instant, sleep};

use crate::cluster::Cluster;
use crate::history::{Answer, Operation, Recorder};

/// In a history, whoever asks here.
pub(crate) const PROCESS: u32 = 40;
/// Between two attempts.
const AGAIN: Duration = Duration::from_millis(20);

/// Revokes somebody who does not exist, through these nodes in turn, each attempt another one, so that what is acknowledged
/// can be looked for at the end like every other revocation. Whether it was acknowledged in time.
pub(super) async fn write(
    nodes: &[u32],
    within: Duration,
    cluster: &Cluster,
    recorder: &Recorder,
) -> Result<bool> {
    let clients: Vec<Client> = nodes
        .iter()
        .map(|number| cluster.playground().client_on("admin", *number))
        .collect::<Result<_>>()?;
    let deadline = Instant::now() + within;
    for client in clients.iter().cycle() {
        let cn = format!("probe-{}", recorder.number());
        let request = RevokeRequest {
            what: Some(RevocationMatch {
                cn: Some(cn.clone()),
                ..RevocationMatch::default()
            }),
            certificate: None,
            reason: "chaos".to_owned(),
        };
        let pending = recorder.invoke(PROCESS, Operation::Revoke { cn });
        match client.revoke(&request).await {
            Ok(answer) => {
                pending.answered(Answer::Done, &answer.meta);
                return Ok(true);
            }
            Err(error) => pending.failed(&error),
        }
        if Instant::now() >= deadline {
            break;
        }
        sleep(AGAIN).await;
    }
    Ok(false)
}
