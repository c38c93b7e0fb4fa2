//! `hsmctl rotation-status`.

use anyhow::Result;
use hsm_api::admin::RotationStatus;

use super::{READ, Session};
use crate::output::{self, or_dash};

pub(super) async fn status(session: &Session) -> Result<()> {
    let client = session.client(READ)?;
    let answer = session
        .ask(&client, "rotation-status", client.rotation_status())
        .await?;
    output::print(session.format(), &answer.body, || {
        let header = [
            "CONTEXT",
            "ACTIVE",
            "SINCE",
            "PENDING",
            "PROVEN BY",
            "MISSING",
            "DUE",
        ];
        output::table(header, answer.contexts.iter().map(row))
    })
}

fn row(status: &RotationStatus) -> [String; 7] {
    [
        status.context.clone(),
        or_dash(status.active_version),
        or_dash(status.active_since.clone()),
        or_dash(status.pending_version),
        status.acks.join(","),
        or_dash(Some(status.missing.join(",")).filter(|missing| !missing.is_empty())),
        due(status),
    ]
}

/// When, and by which interval.
fn due(status: &RotationStatus) -> String {
    match &status.next_rotation_due {
        Some(at) => format!("{at} ({} days)", status.rotation_interval_days),
        None => or_dash(None::<&str>),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn a_due_date_comes_with_its_interval() {
        let mut status: RotationStatus = serde_json::from_value(serde_json::json!({
            "context": "2fa", "active_version": 1, "active_since": "2030-01-01T00:00:00Z",
            "pending_version": null, "pending_since": null, "acks": [], "missing": [],
            "rotation_interval_days": 90, "next_rotation_due": "2030-04-01T00:00:00Z"
        }))
        .unwrap();
        assert_eq!(due(&status), "2030-04-01T00:00:00Z (90 days)");
        status.next_rotation_due = None;
        assert_eq!(due(&status), "-");
    }
}
