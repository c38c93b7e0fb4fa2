//! Standard error, behind a thread of its own. Whoever logs only puts a line into a bounded queue, so that a
//! reader of the log that stalls costs lines, which are counted, and never stops the thread that logged. Audit
//! lines have room of their own: they are the last that are lost.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use tracing::Metadata;
use tracing_subscriber::fmt::MakeWriter;

/// Lines that may wait for standard error.
const QUEUE: usize = 4096;
/// Audit lines that may wait besides, and the last words: those of eight whole batches of rewraps for others.
const RESERVED: usize = 8192;
/// The target of audit lines.
const AUDIT: &str = "audit";
/// How often a message that must not be lost is offered to a full queue.
const RETRY: Duration = Duration::from_millis(5);

enum Message {
    Line(Vec<u8>),
    /// A line that others must not crowd out.
    Reserved(Vec<u8>),
    /// Answered once everything before it is written.
    Flush(SyncSender<()>),
}

/// What the log writes to. Clones share queue and count.
#[derive(Clone)]
pub(super) struct LogWriter {
    queue: SyncSender<Message>,
    /// How many [`Message::Line`] may wait, and do.
    room: usize,
    waiting: Arc<AtomicUsize>,
    dropped: Arc<AtomicU64>,
    /// Those of them that were of the audit.
    audit_dropped: Arc<AtomicU64>,
}

impl LogWriter {
    /// Starts the thread that writes to `sink`.
    pub(super) fn start(sink: impl Write + Send + 'static) -> io::Result<Self> {
        Self::with_room(QUEUE, RESERVED, sink)
    }

    fn with_room(room: usize, reserved: usize, sink: impl Write + Send + 'static) -> io::Result<Self> {
        let (queue, messages) = sync_channel(room + reserved);
        let waiting = Arc::new(AtomicUsize::new(0));
        let left = Arc::clone(&waiting);
        std::thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || write_out(&messages, &left, sink))?;
        Ok(Self {
            queue,
            room,
            waiting,
            dropped: Arc::default(),
            audit_dropped: Arc::default(),
        })
    }

    /// Lines lost since the start.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Audit lines among them.
    pub(super) fn audit_dropped(&self) -> u64 {
        self.audit_dropped.load(Ordering::Relaxed)
    }

    /// Says `words` and waits until they and everything before them are written, but not for longer than
    /// `patience`: the process is about to end, whether anybody reads its log or not.
    pub(super) fn finish(&self, words: Option<&str>, patience: Duration) {
        let deadline = Instant::now() + patience;
        if let Some(words) = words {
            self.send(Message::Reserved(format!("{words}\n").into_bytes()), deadline);
        }
        let (done, written) = sync_channel(1);
        if self.send(Message::Flush(done), deadline) {
            let _ = written.recv_timeout(deadline.saturating_duration_since(Instant::now()));
        }
    }

    fn line(&self, line: &[u8], is_audit: bool) {
        let taken = is_audit || self.take_room();
        let sent = taken && {
            let line = line.to_vec();
            let message = if is_audit {
                Message::Reserved(line)
            } else {
                Message::Line(line)
            };
            self.queue.try_send(message).is_ok()
        };
        if sent {
            return;
        }
        if taken && !is_audit {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
        }
        self.dropped.fetch_add(1, Ordering::Relaxed);
        if is_audit {
            self.audit_dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn take_room(&self) -> bool {
        let more = |waiting: usize| (waiting < self.room).then_some(waiting + 1);
        let taken = self
            .waiting
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        taken.is_ok()
    }

    fn send(&self, mut message: Message, deadline: Instant) -> bool {
        loop {
            match self.queue.try_send(message) {
                Ok(()) => return true,
                Err(TrySendError::Full(back)) if Instant::now() < deadline => message = back,
                Err(_) => return false,
            }
            std::thread::sleep(RETRY);
        }
    }
}

/// The thread. A log that cannot be written is no reason to stop: there is nowhere to say so.
fn write_out(messages: &Receiver<Message>, waiting: &AtomicUsize, mut sink: impl Write) {
    for message in messages {
        match message {
            Message::Line(line) => {
                waiting.fetch_sub(1, Ordering::Relaxed);
                let _ = sink.write_all(&line);
            }
            Message::Reserved(line) => {
                let _ = sink.write_all(&line);
            }
            Message::Flush(done) => {
                let _ = sink.flush();
                let _ = done.try_send(());
            }
        }
    }
}

/// Takes one line.
pub(super) struct LineWriter<'a> {
    log: &'a LogWriter,
    is_audit: bool,
}

/// One call is one line: the subscriber formats a line whole before it writes it.
impl Write for LineWriter<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.log.line(line, self.is_audit);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogWriter {
    type Writer = LineWriter<'a>;

    fn make_writer(&'a self) -> Self::Writer {
        LineWriter {
            log: self,
            is_audit: false,
        }
    }

    fn make_writer_for(&'a self, meta: &Metadata<'_>) -> Self::Writer {
        LineWriter {
            log: self,
            is_audit: meta.target() == AUDIT,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::sync::{Mutex, MutexGuard};

    use super::*;

    /// A reader that stalls for as long as somebody holds its lock.
    #[derive(Clone, Default)]
    struct Reader(Arc<Mutex<Vec<u8>>>);

    impl Reader {
        fn stall(&self) -> MutexGuard<'_, Vec<u8>> {
            self.0.lock().unwrap()
        }

        fn read(&self) -> Vec<String> {
            let bytes = self.0.lock().unwrap().clone();
            let text = String::from_utf8(bytes).unwrap();
            text.lines().map(str::to_owned).collect()
        }
    }

    impl Write for Reader {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    const LONG: Duration = Duration::from_secs(20);

    fn log(writer: &LogWriter, line: &str) {
        let mut place = writer.make_writer();
        place.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    #[test]
    fn everything_logged_before_the_end_is_written_in_its_order() {
        let reader = Reader::default();
        let writer = LogWriter::start(reader.clone()).unwrap();
        let lines: Vec<String> = (0..100).map(|n| n.to_string()).collect();
        for line in &lines {
            log(&writer, line);
        }
        writer.finish(Some("the end"), LONG);
        assert_eq!(reader.read(), [&lines[..], &["the end".to_owned()]].concat());
        assert_eq!(writer.dropped(), 0);
    }

    #[test]
    fn a_reader_that_stalls_costs_lines_and_stops_nobody() {
        let reader = Reader::default();
        let writer = LogWriter::with_room(4, 2, reader.clone()).unwrap();
        let stalled = reader.stall();
        log(&writer, "0");
        // In the hands of the thread.
        while writer.waiting.load(Ordering::Relaxed) > 0 {
            std::thread::yield_now();
        }
        for line in 1..100 {
            log(&writer, &line.to_string());
        }
        assert_eq!(writer.dropped(), 95);
        // There is room for these.
        writer.line(b"audit 1\n", true);
        writer.line(b"audit 2\n", true);
        assert_eq!((writer.dropped(), writer.audit_dropped()), (95, 0));
        writer.line(b"audit 3\n", true);
        assert_eq!((writer.dropped(), writer.audit_dropped()), (96, 1));
        writer.finish(Some("nobody reads this in time"), Duration::from_millis(20));
        drop(stalled);
        writer.finish(Some("read again"), LONG);
        let read = reader.read();
        assert_eq!(read.first().unwrap(), "0");
        for line in ["audit 1", "audit 2"] {
            assert!(read.iter().any(|read| read == line), "{line}");
        }
        assert_eq!(read.last().unwrap(), "read again");
    }
}
