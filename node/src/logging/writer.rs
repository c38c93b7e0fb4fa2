//! Standard error, behind a thread of its own. Whoever logs only puts a line into a bounded queue, so that a
//! reader of the log that stalls costs lines, which are counted, and never stops the thread that logged.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use tracing_subscriber::fmt::MakeWriter;

/// Lines that may wait for standard error.
const QUEUE: usize = 4096;
/// How often a message that must not be lost is offered to a full queue.
const RETRY: Duration = Duration::from_millis(5);

enum Message {
    Line(Vec<u8>),
    /// Answered once everything before it is written.
    Flush(SyncSender<()>),
}

/// What the log writes to. Clones share queue and count.
#[derive(Clone)]
pub(super) struct LogWriter {
    queue: SyncSender<Message>,
    dropped: Arc<AtomicU64>,
}

impl LogWriter {
    /// Starts the thread that writes to `sink`.
    pub(super) fn start(sink: impl Write + Send + 'static) -> io::Result<Self> {
        Self::with_room(QUEUE, sink)
    }

    fn with_room(lines: usize, sink: impl Write + Send + 'static) -> io::Result<Self> {
        let (queue, waiting) = sync_channel(lines);
        std::thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || write_out(&waiting, sink))?;
        Ok(Self {
            queue,
            dropped: Arc::default(),
        })
    }

    /// Lines lost since the start.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Says `words` and waits until they and everything before them are written, but not for longer than
    /// `patience`: the process is about to end, whether anybody reads its log or not.
    pub(super) fn finish(&self, words: Option<&str>, patience: Duration) {
        let deadline = Instant::now() + patience;
        if let Some(words) = words {
            self.send(Message::Line(format!("{words}\n").into_bytes()), deadline);
        }
        let (done, written) = sync_channel(1);
        if self.send(Message::Flush(done), deadline) {
            let _ = written.recv_timeout(deadline.saturating_duration_since(Instant::now()));
        }
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
fn write_out(waiting: &Receiver<Message>, mut sink: impl Write) {
    for message in waiting {
        match message {
            Message::Line(line) => {
                let _ = sink.write_all(&line);
            }
            Message::Flush(done) => {
                let _ = sink.flush();
                let _ = done.try_send(());
            }
        }
    }
}

/// One call is one line: the subscriber formats a line whole before it writes it.
impl Write for &LogWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.queue.try_send(Message::Line(line.to_vec())).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogWriter {
    type Writer = &'a Self;

    fn make_writer(&'a self) -> Self::Writer {
        self
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
        let writer = LogWriter::with_room(4, reader.clone()).unwrap();
        let stalled = reader.stall();
        for line in 0..100 {
            log(&writer, &line.to_string());
        }
        // One line may be in the hands of the thread.
        assert!(writer.dropped() >= 95, "{}", writer.dropped());
        writer.finish(Some("nobody reads this in time"), Duration::from_millis(20));
        drop(stalled);
        writer.finish(Some("read again"), LONG);
        let read = reader.read();
        assert_eq!(read.first().unwrap(), "0");
        assert_eq!(read.last().unwrap(), "read again");
    }
}
