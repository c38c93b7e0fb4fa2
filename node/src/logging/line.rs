//! A line on its way from the subscriber to its places. Whatever others have sent, it is one line and nothing but text.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use super::writer::LogWriter;

/// Takes one line, for each of its places.
pub(super) struct LineWriter<'a> {
    pub(super) places: &'a [LogWriter],
    /// One more.
    pub(super) besides: Option<&'a LogWriter>,
    pub(super) is_audit: bool,
    /// It says that lines were lost, and is not counted itself: here it is noted if no place has taken it.
    pub(super) unsaid: Option<&'a AtomicBool>,
}

/// One call is one line: the subscriber formats a line whole before it writes it.
impl Write for LineWriter<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let one = one_line(line);
        let mut is_taken = false;
        for place in self.places.iter().chain(self.besides) {
            match self.unsaid {
                Some(_) => is_taken |= place.uncounted(&one),
                None => place.line(&one, self.is_audit),
            }
        }
        if let Some(unsaid) = self.unsaid.filter(|_| !is_taken) {
            unsaid.store(true, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What a stranger has sent may be in a field: it must not begin a line of its own, nor tell a terminal anything. In text
/// the subscriber leaves control characters in fields as they are, in JSON some. So escaped they are good JSON too.
fn one_line(line: &[u8]) -> Cow<'_, [u8]> {
    let text = line.strip_suffix(b"\n").unwrap_or(line);
    if text.iter().all(|byte| (b' '..=b'~').contains(byte)) {
        return Cow::Borrowed(line);
    }
    let mut one = String::with_capacity(line.len() + 16);
    for c in String::from_utf8_lossy(text).chars() {
        if c.is_control() {
            let _ = write!(one, "\\u{:04x}", u32::from(c));
        } else {
            one.push(c);
        }
    }
    one.push('\n');
    Cow::Owned(one.into_bytes())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::test_log::Lines;

    const SENT: &str = "ü\r\n2026-01-31T23:59:59Z INFO audit: key destroyed \t\u{1b}[31m\u{7f}\u{9b}";

    /// What becomes of a line that the subscriber has formatted.
    fn written(formatted: &Lines) -> String {
        let formatted = formatted.text();
        let written = String::from_utf8(one_line(formatted.as_bytes()).into_owned()).unwrap();
        let line = written.strip_suffix('\n').unwrap().to_owned();
        assert!(!line.contains(char::is_control), "{line:?}");
        line
    }

    #[test]
    fn what_a_stranger_has_sent_begins_no_line_and_tells_a_terminal_nothing() {
        let formatted = Lines::default();
        let text = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_writer(formatted.writer());
        tracing::subscriber::with_default(text.finish(), || {
            tracing::info!(shown = %SENT, quoted = SENT, "{SENT}");
        });
        let line = written(&formatted);
        assert!(line.contains("shown=ü\\u000d\\u000a2026-"), "{line:?}");
    }

    #[test]
    fn a_line_of_json_has_the_same_value_as_before() {
        let formatted = Lines::default();
        let json = tracing_subscriber::fmt()
            .json()
            .flatten_event(true)
            .with_writer(formatted.writer());
        tracing::subscriber::with_default(json.finish(), || tracing::info!(shown = %SENT));
        let line: Value = serde_json::from_str(&written(&formatted)).unwrap();
        assert_eq!(line["shown"], SENT);
    }

    #[test]
    fn a_line_of_plain_text_is_not_copied() {
        assert!(matches!(one_line(b"plain ~\n"), Cow::Borrowed(b"plain ~\n")));
    }
}
