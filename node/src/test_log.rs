//! What is logged, as tests read it: lines of JSON, as the node writes them.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::{Arc, Mutex};

use serde_json::Value;

/// The lines so far. Clones share them.
#[derive(Clone, Default)]
pub(crate) struct Lines(Arc<Mutex<Vec<u8>>>);

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
    /// What `work` logs in this thread.
    pub(crate) fn of(work: impl FnOnce()) -> Self {
        let lines = Self::default();
        let collecting = lines.collect();
        work();
        drop(collecting);
        lines
    }

    /// What is logged in this thread comes here for as long as the guard lives, but for lines of requests.
    pub(crate) fn collect(&self) -> tracing::subscriber::DefaultGuard {
        self.collect_of("info,access=off")
    }

    /// Lines of requests, and nothing else.
    pub(crate) fn collect_access(&self) -> tracing::subscriber::DefaultGuard {
        self.collect_of("access=info")
    }

    fn collect_of(&self, filter: &str) -> tracing::subscriber::DefaultGuard {
        let subscriber = tracing_subscriber::fmt()
            .json()
            .flatten_event(true)
            .with_env_filter(filter)
            .with_writer(self.writer())
            .finish();
        tracing::subscriber::set_default(subscriber)
    }

    /// For a subscriber of another kind.
    pub(crate) fn writer(&self) -> impl Fn() -> Self + Send + Sync + use<> {
        let lines = self.clone();
        move || lines.clone()
    }

    /// As they were written.
    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }

    /// As they are read.
    pub(crate) fn all(&self) -> Vec<Value> {
        let text = self.text();
        let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
        lines.collect()
    }

    /// How many have this part in a field.
    pub(crate) fn count(&self, field: &str, part: &str) -> usize {
        let has = |line: &&Value| line[field].as_str().is_some_and(|text| text.contains(part));
        self.all().iter().filter(has).count()
    }
}
