//! What clients asked and what came of it, written down as it happens: one line of JSON when an operation is invoked, one
//! when it is over. A file is the only memory of a run: it is read once, at the end, into a [`History`] whose size goes by the
//! number of changes and of key versions, never by that of requests.

mod event;
mod fold;

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Instant, SystemTime};

use anyhow::{Context, Result, anyhow};
use hsm_api::ClientError;
use hsm_api::client::Meta;

pub(crate) use fold::Made;

pub use event::{Answer, ContextView, Held, Line, Operation, Outcome, Probe, Sample, Seen};
pub use fold::{
    Counts, Done, Few, Findings, History, Kept, LateAsk, Moment, Moments, Refusals, TermSeen, Version,
};

/// Lines that wait for the disk at most; whoever writes one more waits too.
const WAITING: usize = 1 << 16;

enum Message {
    Line(Box<Line>),
    End,
}

struct Shared {
    began: Instant,
    /// Of the next operation.
    next: AtomicU64,
    /// The highest applied index that any node has spoken of.
    highest: AtomicU64,
    marker: String,
    file: PathBuf,
    lines: SyncSender<Message>,
    writer: Mutex<Option<JoinHandle<std::io::Result<()>>>>,
}

/// Writes a history down. Clones write the same one.
#[derive(Clone)]
pub struct Recorder(Arc<Shared>);

impl Recorder {
    /// Begins one; what was in the file is gone.
    ///
    /// # Errors
    /// A file that cannot be made.
    pub fn create(file: &Path) -> Result<Self> {
        let out = File::create(file).with_context(|| file.display().to_string())?;
        let (lines, received) = sync_channel(WAITING);
        let writer = std::thread::Builder::new()
            .name("history".to_owned())
            .spawn(move || write(out, &received))
            .context("start the history's writer")?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let nanos = now.map_or(0, |since| since.as_nanos());
        let marker = format!("CANARY-{nanos:032x}-{:08x}", std::process::id());
        let recorder = Self(Arc::new(Shared {
            began: Instant::now(),
            next: AtomicU64::new(1),
            highest: AtomicU64::new(0),
            marker: marker.clone(),
            file: file.to_owned(),
            lines,
            writer: Mutex::new(Some(writer)),
        }));
        recorder.write(Line::Begun { marker });
        Ok(recorder)
    }

    /// Of this run alone: every plaintext begins with it, and it must be in no file of a node.
    #[must_use]
    pub fn marker(&self) -> &str {
        &self.0.marker
    }

    /// The run's clock: since the recorder was made.
    #[must_use]
    pub fn elapsed_ms(&self) -> u64 {
        self.now() / 1_000_000
    }

    /// The same in nanoseconds, as in the lines of a history.
    pub(crate) fn now(&self) -> u64 {
        u64::try_from(self.0.began.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// A number that no other operation or plaintext of this run has.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.0.next.fetch_add(1, Ordering::Relaxed)
    }

    /// An operation begins: to be called before anything of it is sent.
    pub fn invoke(&self, process: u32, operation: Operation) -> Pending {
        let id = self.number();
        self.write(Line::Invoked {
            at: self.now(),
            id,
            process,
            operation,
        });
        Pending {
            recorder: self.clone(),
            id,
            open: true,
        }
    }

    /// Says what else happens: faults, phases.
    pub fn note(&self, what: &str) {
        self.write(Line::Noted {
            at: self.now(),
            what: what.to_owned(),
        });
    }

    /// What the watch saw.
    pub fn sample(&self, sample: Sample) {
        self.write(Line::Sampled {
            at: self.now(),
            sample: Box::new(sample),
        });
    }

    /// The highest applied index that any node has spoken of until now: everything up to it is committed.
    #[must_use]
    pub fn highest_index(&self) -> u64 {
        self.0.highest.load(Ordering::SeqCst)
    }

    /// A node has spoken of this applied index.
    pub fn saw_index(&self, index: u64) {
        self.0.highest.fetch_max(index, Ordering::SeqCst);
    }

    /// After the end nothing is written any more.
    fn write(&self, line: Line) {
        let _ = self.0.lines.send(Message::Line(Box::new(line)));
    }

    /// Ends it, also for the clones, and reads it back.
    ///
    /// # Errors
    /// What could not be written or read.
    pub fn finish(self) -> Result<History> {
        let writer = {
            let mut writer = self.0.writer.lock().unwrap_or_else(PoisonError::into_inner);
            writer.take().context("the history was ended before")?
        };
        let _ = self.0.lines.send(Message::End);
        let written = writer
            .join()
            .map_err(|_| anyhow!("the history's writer panicked"))?;
        written.with_context(|| self.0.file.display().to_string())?;
        History::read(&self.0.file)
    }
}

fn write(out: File, lines: &Receiver<Message>) -> std::io::Result<()> {
    let mut out = BufWriter::new(out);
    loop {
        // What is there is written at once, so that a run that is killed leaves what it knew.
        let message = match lines.try_recv() {
            Ok(message) => message,
            Err(_) => {
                out.flush()?;
                match lines.recv() {
                    Ok(message) => message,
                    Err(_) => return Ok(()),
                }
            }
        };
        match message {
            Message::Line(line) => {
                serde_json::to_writer(&mut out, &line)?;
                out.write_all(b"\n")?;
            }
            Message::End => return out.flush(),
        }
    }
}

/// An operation that is not over. Dropped as it is, its outcome is unknown.
#[must_use]
pub struct Pending {
    recorder: Recorder,
    id: u64,
    open: bool,
}

impl Pending {
    /// Its number.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// It is over.
    pub fn complete(self, outcome: Outcome) {
        self.end(outcome, None, false);
    }

    /// It succeeded.
    pub fn answered(self, answer: Answer, meta: &Meta) {
        let index = meta.index.map(|index| index.index);
        if let Some(index) = index {
            self.recorder.saw_index(index);
        }
        self.end(Outcome::Ok(answer), index, meta.stale);
    }

    /// It failed; whether it was done all the same is what the client says.
    pub fn failed(self, error: &ClientError) {
        self.complete(Outcome::of(error));
    }

    fn end(mut self, outcome: Outcome, index: Option<u64>, stale: bool) {
        self.write(outcome, index, stale);
        self.open = false;
    }

    fn write(&self, outcome: Outcome, index: Option<u64>, stale: bool) {
        self.recorder.write(Line::Completed {
            at: self.recorder.now(),
            id: self.id,
            index,
            stale,
            outcome,
        });
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if self.open {
            let why = "it was given up".to_owned();
            self.write(Outcome::Unknown { why }, None, false);
        }
    }
}

/// The plaintext of a number, in the run of a marker. Nothing of it is random: who has the history can check it.
#[must_use]
pub fn plaintext(marker: &str, number: u64) -> String {
    format!("{marker}-{number:012}-plaintext")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    fn rotate(key: &str) -> Operation {
        Operation::Rotate {
            context: "c".to_owned(),
            key: key.to_owned(),
        }
    }

    #[test]
    fn what_is_recorded_is_read_back_and_what_is_dropped_is_unknown() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("history.jsonl");
        let recorder = Recorder::create(&file).unwrap();
        let marker = recorder.marker().to_owned();
        let first = recorder.invoke(1, rotate("a"));
        drop(recorder.invoke(2, rotate("b")));
        first.complete(Outcome::Ok(Answer::Rotated {
            version: 2,
            previous: Some(1),
        }));
        let refused = recorder.invoke(1, rotate("c"));
        refused.complete(Outcome::Refused {
            code: "no_quorum".to_owned(),
        });
        recorder.note("calm begins");
        // Neither over nor dropped: the process was killed.
        std::mem::forget(recorder.invoke(3, rotate("d")));
        let history = recorder.clone().finish().unwrap();
        recorder.note("too late, and harmless");
        assert_eq!(history.marker, marker);
        assert_eq!(history.changes.len(), 4);
        let outcomes: Vec<&Outcome> = history.changes.iter().map(|done| &done.outcome).collect();
        assert!(matches!(
            outcomes[0],
            Outcome::Ok(Answer::Rotated { version: 2, .. })
        ));
        assert!(matches!(outcomes[1], Outcome::Unknown { .. }));
        assert!(matches!(outcomes[2], Outcome::Refused { .. }));
        assert!(matches!(outcomes[3], Outcome::Unknown { .. }));
        let first = &history.changes[0];
        assert!(first.completed.unwrap() > first.invoked);
        assert_eq!(
            history.changes[1].completed, None,
            "an unknown one may happen at any later time"
        );
        assert_eq!(history.operations(), 2, "those whose outcome is known");
        assert!(recorder.finish().is_err(), "a history ends once");
    }

    #[test]
    fn a_file_that_was_cut_off_in_its_last_line_is_read_up_to_there() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("history.jsonl");
        let recorder = Recorder::create(&file).unwrap();
        let done = recorder.invoke(1, rotate("a"));
        done.complete(Outcome::Refused {
            code: "conflict".to_owned(),
        });
        recorder.finish().unwrap();
        let whole = std::fs::read_to_string(&file).unwrap();
        let cut = &whole[..whole.len() - 9];
        std::fs::write(&file, cut).unwrap();
        let history = History::read(&file).unwrap();
        assert!(matches!(history.changes[0].outcome, Outcome::Unknown { .. }));
        // Not in its last line: that is no crash.
        std::fs::write(&file, format!("{cut}\n{whole}")).unwrap();
        assert!(History::read(&file).unwrap_err().to_string().contains("line 3"));
    }
}
