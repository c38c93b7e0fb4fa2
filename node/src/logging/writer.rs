//! One place that lines go to, behind a thread of its own: standard error, standard output or a file. Whoever logs
//! only puts a line into a bounded queue, so that a reader of the log that stalls, or a disk, costs lines, which are
//! counted, and never stops the thread that logged. Audit lines have room of their own: they are the last that are lost.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

/// Lines that may wait for one place.
const QUEUE: usize = 4096;
/// Audit lines that may wait besides, and the last words: those of eight whole batches of rewraps for others.
const RESERVED: usize = 8192;
/// How often a message that must not be lost is offered to a full queue.
const RETRY: Duration = Duration::from_millis(5);
/// Why a line was lost that the operating system has not refused.
const TOO_SLOW: i32 = 0;

enum Message {
    Line(Vec<u8>),
    /// A line that others must not crowd out.
    Reserved(Vec<u8>),
    /// One that is not counted if it is lost.
    Uncounted(Vec<u8>),
    /// Answered once everything before it is written.
    Flush(SyncSender<()>),
}

/// What one place has lost since the start.
#[derive(Default)]
struct Lost {
    lines: AtomicU64,
    /// Those of them that were of the audit.
    audit: AtomicU64,
    /// The operating system's reason for the last of them, or [`TOO_SLOW`].
    reason: AtomicI32,
    /// What of these two was said.
    told: AtomicU64,
    told_audit: AtomicU64,
}

impl Lost {
    fn count(&self, is_audit: bool, reason: i32) {
        self.reason.store(reason, Ordering::Relaxed);
        self.lines.fetch_add(1, Ordering::Relaxed);
        if is_audit {
            self.audit.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// A place. Clones share queue and counts.
#[derive(Clone)]
pub(super) struct LogWriter {
    name: Arc<str>,
    queue: SyncSender<Message>,
    /// How many [`Message::Line`] may wait, and do.
    room: usize,
    waiting: Arc<AtomicUsize>,
    lost: Arc<Lost>,
}

impl LogWriter {
    /// Starts the thread that writes to `sink`, which messages call `name`.
    pub(super) fn start(name: &str, sink: impl Write + Send + 'static) -> io::Result<Self> {
        Self::with_room(name, QUEUE, RESERVED, sink)
    }

    fn with_room(
        name: &str,
        room: usize,
        reserved: usize,
        sink: impl Write + Send + 'static,
    ) -> io::Result<Self> {
        let (queue, messages) = sync_channel(room + reserved);
        let waiting = Arc::new(AtomicUsize::new(0));
        let lost = Arc::new(Lost::default());
        let (left, losing) = (Arc::clone(&waiting), Arc::clone(&lost));
        std::thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || write_out(&messages, &left, &losing, sink))?;
        Ok(Self {
            name: name.into(),
            queue,
            room,
            waiting,
            lost,
        })
    }

    /// What messages call it.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Whether both write to one place.
    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.lost, &other.lost)
    }

    /// Lines lost since the start.
    pub(super) fn dropped(&self) -> u64 {
        self.lost.lines.load(Ordering::Relaxed)
    }

    /// Audit lines among them.
    pub(super) fn audit_dropped(&self) -> u64 {
        self.lost.audit.load(Ordering::Relaxed)
    }

    /// [`Self::dropped`], if it is more than it was the last time.
    pub(super) fn more_dropped(&self) -> Option<u64> {
        let lost = self.dropped();
        (self.lost.told.swap(lost, Ordering::Relaxed) < lost).then_some(lost)
    }

    /// [`Self::audit_dropped`], if it is more than it was the last time.
    pub(super) fn more_audit_dropped(&self) -> Option<u64> {
        let lost = self.audit_dropped();
        (self.lost.told_audit.swap(lost, Ordering::Relaxed) < lost).then_some(lost)
    }

    /// As if [`Self::more_dropped`] had not been asked.
    pub(super) fn say_dropped_again(&self) {
        self.lost.told.store(0, Ordering::Relaxed);
    }

    /// As if [`Self::more_audit_dropped`] had not been asked.
    pub(super) fn say_audit_dropped_again(&self) {
        self.lost.told_audit.store(0, Ordering::Relaxed);
    }

    /// Why the last line was lost.
    pub(super) fn why_dropped(&self) -> String {
        match self.lost.reason.load(Ordering::Relaxed) {
            TOO_SLOW => "they are not taken in time".to_owned(),
            reason => io::Error::from_raw_os_error(reason).to_string(),
        }
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

    /// Takes one line, or counts it as lost.
    pub(super) fn line(&self, line: &[u8], is_audit: bool) {
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
        self.lost.count(is_audit, TOO_SLOW);
    }

    /// Takes one line that says what was lost, and says whether there was room for it. It is not counted.
    pub(super) fn uncounted(&self, line: &[u8]) -> bool {
        self.queue.try_send(Message::Uncounted(line.to_vec())).is_ok()
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

/// What a line is counted as if it is lost.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Audit,
    Other,
}

/// The thread. A place that cannot be written to is no reason to stop: what it has lost is counted and said.
fn write_out(messages: &Receiver<Message>, waiting: &AtomicUsize, lost: &Lost, mut sink: impl Write) {
    let mut write = |line: &[u8], counted_as: Option<Kind>| {
        if let Err(error) = sink.write_all(line)
            && let Some(kind) = counted_as
        {
            lost.count(
                kind == Kind::Audit,
                error.raw_os_error().unwrap_or(nix::libc::EIO),
            );
        }
    };
    for message in messages {
        match message {
            Message::Line(line) => {
                waiting.fetch_sub(1, Ordering::Relaxed);
                write(&line, Some(Kind::Other));
            }
            Message::Reserved(line) => write(&line, Some(Kind::Audit)),
            Message::Uncounted(line) => write(&line, None),
            // Each line was handed to the operating system when it was written.
            Message::Flush(done) => {
                let _ = done.try_send(());
            }
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
        writer.line(format!("{line}\n").as_bytes(), false);
    }

    #[test]
    fn everything_logged_before_the_end_is_written_in_its_order() {
        let reader = Reader::default();
        let writer = LogWriter::start("reader", reader.clone()).unwrap();
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
        let writer = LogWriter::with_room("reader", 4, 2, reader.clone()).unwrap();
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

    /// Takes nothing for as long as it is full.
    struct Disk {
        is_full: Arc<std::sync::atomic::AtomicBool>,
        reader: Reader,
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.is_full.load(Ordering::SeqCst) {
                return Err(io::Error::from_raw_os_error(nix::libc::ENOSPC));
            }
            self.reader.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_full_disk_costs_lines_that_are_counted_and_said_once_with_the_reason() {
        let is_full = Arc::new(std::sync::atomic::AtomicBool::new(true));
        let reader = Reader::default();
        let disk = Disk {
            is_full: Arc::clone(&is_full),
            reader: reader.clone(),
        };
        let writer = LogWriter::start("audit.log", disk).unwrap();
        assert_eq!((writer.more_dropped(), writer.more_audit_dropped()), (None, None));
        log(&writer, "lost");
        writer.line(b"lost too\n", true);
        writer.finish(None, LONG);
        assert_eq!((writer.dropped(), writer.audit_dropped()), (2, 1));
        assert_eq!(
            (writer.more_dropped(), writer.more_audit_dropped()),
            (Some(2), Some(1))
        );
        assert!(writer.why_dropped().contains("space"), "{}", writer.why_dropped());
        assert_eq!((writer.more_dropped(), writer.more_audit_dropped()), (None, None));
        is_full.store(false, Ordering::SeqCst);
        log(&writer, "there is room again");
        writer.finish(None, LONG);
        assert_eq!(reader.read(), ["there is room again"]);
        assert_eq!(writer.dropped(), 2);
    }
}
