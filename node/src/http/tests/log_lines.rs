//! What callers leave in the log, and what they cannot keep out of it.

use std::sync::{Arc, Mutex};

use super::*;

#[derive(Clone, Default)]
pub(super) struct Lines(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Lines {
    /// What is logged in this thread comes here for as long as the guard lives.
    pub(super) fn collect(&self) -> tracing::subscriber::DefaultGuard {
        let writer = self.clone();
        let subscriber = tracing_subscriber::fmt()
            .json()
            .flatten_event(true)
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::set_default(subscriber)
    }

    /// The lines so far.
    pub(super) fn all(&self) -> Vec<Value> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
        lines.collect()
    }

    pub(super) fn count(&self, field: &str, part: &str) -> usize {
        let has = |line: &&Value| line[field].as_str().is_some_and(|text| text.contains(part));
        self.all().iter().filter(has).count()
    }
}

#[tokio::test]
async fn one_clients_refusals_leave_others_and_the_services_faults_their_lines() {
    const ASKED: usize = 500;
    let lines = Lines::default();
    let _logged_here = lines.collect();
    let node = FakeNode::new();
    let router = node.router();
    let body = json!({"context": "exchange-key", "plaintext": ""});
    let flood = principal("log-flood", Some("Nobody"));
    for _ in 0..ASKED {
        // Below the level that is written: must not cost what is above it.
        send(&router, Some(&flood), post("/nowhere", &body)).await;
    }
    for _ in 0..ASKED {
        send(&router, Some(&flood), post("/encrypt", &body)).await;
    }
    let written = lines.count("who", "log-flood");
    assert!((1..ASKED).contains(&written), "{written}");

    let other = principal("log-other", Some("Nobody"));
    send(&router, Some(&other), post("/encrypt", &body)).await;
    assert_eq!(lines.count("who", "log-other"), 1);
    node.refuse(ErrorCode::Stale);
    send(&router, Some(&trading()), post("/encrypt", &body)).await;
    assert_eq!(lines.count("code", "stale"), 1);
}
