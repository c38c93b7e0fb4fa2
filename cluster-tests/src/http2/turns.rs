//! Requests in turns on one connection that is kept: some at once, then nothing for a while. For a client that repeats
//! nothing: it takes a new connection only where it was told, before it sent anything, that this one ends.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, timeout, timeout_at};

use super::{
    ACK, Connection, DATA, END_STREAM, Frame, GOAWAY, HEADERS, PATIENCE, PING, RST_STREAM, SETTINGS, status,
};

/// RFC 9113 section 6.9.
const WINDOW_UPDATE: u8 = 8;

/// The answer to one request.
#[derive(Debug, Default)]
pub struct Whole {
    /// See [`super::Answer::Status`].
    pub status: Option<u16>,
    /// Its body.
    pub body: Vec<u8>,
    is_over: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// Whether the other side takes no further requests: a client has to go elsewhere with the next one.
    #[must_use]
    pub fn is_ending(&self) -> bool {
        self.is_ending
    }

    /// Sends these bodies at once, each on a stream of its own, and gives their answers in the same order. That a stream is
    /// reset, or that it was not taken, is an error.
    pub async fn ask(&mut self, path: &str, bodies: &[Vec<u8>]) -> Result<Vec<Whole>> {
        let answered = async {
            let first = self.next_stream;
            for body in bodies {
                let stream = self.next_stream;
                self.next_stream += 2;
                self.begin(stream, path).await?;
                self.finish(stream, body).await?;
            }
            let mut answers: Vec<Whole> = bodies.iter().map(|_| Whole::default()).collect();
            while answers.iter().any(|answer| !answer.is_over) {
                let frame = self.next().await?;
                let frame = frame.context("ended before all was answered")?;
                self.take(frame, first, &mut answers).await?;
            }
            anyhow::Ok(answers)
        };
        timeout(PATIENCE, answered).await.context("no answer")?
    }

    /// Lets time pass in which nothing is asked; ends as soon as the other side says GOAWAY. That it ends the connection
    /// without is an error (RFC 9113 section 6.8): a request may have been on its way, and nobody knows what became of it.
    pub async fn rest(&mut self, time: Duration) -> Result<()> {
        let until = Instant::now() + time;
        while !self.is_ending {
            match timeout_at(until, self.next()).await {
                Err(_) => return Ok(()),
                Ok(Ok(Some(frame))) => self.take(frame, self.next_stream, &mut []).await?,
                Ok(Ok(None)) => bail!("ended without GOAWAY while nothing was asked"),
                Ok(Err(error)) => return Err(error.context("while nothing was asked")),
            }
        }
        Ok(())
    }

    /// What the other side needs to hear of what it has sent. It may have ended after its last answer and be gone: whether that
    /// was all that was asked for is seen by reading on.
    async fn tell(&mut self, kind: u8, flags: u8, payload: &[u8]) {
        let _ = self.send(kind, flags, 0, payload).await;
    }

    async fn take(&mut self, frame: Frame, first: u32, answers: &mut [Whole]) -> Result<()> {
        let last = self.next_stream.saturating_sub(2);
        let place = frame
            .stream
            .checked_sub(first)
            .and_then(|beyond| usize::try_from(beyond / 2).ok());
        match frame.kind {
            PING if frame.flags & ACK == 0 => self.tell(PING, ACK, &frame.payload).await,
            SETTINGS if frame.flags & ACK == 0 => self.tell(SETTINGS, ACK, &[]).await,
            GOAWAY => {
                self.is_ending = true;
                let taken = frame.payload.first_chunk::<4>().context("a short GOAWAY")?;
                let taken = u32::from_be_bytes(*taken);
                let open = answers.iter().any(|answer| !answer.is_over);
                ensure!(
                    !open || last <= taken,
                    "stream {last} was not taken: GOAWAY {taken}"
                );
            }
            RST_STREAM => {
                let answer = place.and_then(|place| answers.get(place));
                ensure!(
                    answer.is_none_or(|answer| answer.is_over),
                    "stream {} was reset: {:?}",
                    frame.stream,
                    frame.payload
                );
            }
            HEADERS | DATA => {
                if frame.kind == DATA && !frame.payload.is_empty() {
                    // Of the connection; a stream's own is larger than any answer here.
                    let length = u32::try_from(frame.payload.len())?;
                    self.tell(WINDOW_UPDATE, 0, &length.to_be_bytes()).await;
                }
                let answer = place.and_then(|place| answers.get_mut(place));
                let answer = answer.with_context(|| format!("stream {} was not begun", frame.stream))?;
                if frame.kind == DATA {
                    answer.body.extend_from_slice(&frame.payload);
                } else if answer.status.is_none() {
                    answer.status = status(&frame.payload);
                }
                answer.is_over |= frame.flags & END_STREAM != 0;
            }
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    use super::*;

    const LONG: Duration = Duration::from_secs(30);

    fn connected() -> (Connection<DuplexStream>, DuplexStream) {
        let (own, other) = duplex(1024);
        let connection = Connection {
            stream: own,
            read: Vec::new(),
            max_streams: None,
            next_stream: 1,
            is_ending: false,
        };
        (connection, other)
    }

    /// A frame without flags, for the connection as a whole.
    fn frame(kind: u8, payload: [u8; 8]) -> Vec<u8> {
        let mut frame = vec![0, 0, 8, kind, 0, 0, 0, 0, 0];
        frame.extend_from_slice(&payload);
        frame
    }

    #[tokio::test]
    async fn a_connection_ends_well_with_goaway() {
        let (mut connection, mut other) = connected();
        // The last stream that is taken: any; then no error.
        let goaway = frame(GOAWAY, [0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
        other.write_all(&frame(PING, [1; 8])).await.unwrap();
        other.write_all(&goaway).await.unwrap();
        connection.rest(LONG).await.unwrap();
        assert!(connection.is_ending());
    }

    #[tokio::test]
    async fn what_was_answered_is_answered_though_the_other_side_has_gone_since() {
        let (mut connection, mut other) = connected();
        let asked = tokio::spawn(async move { connection.ask("/encrypt", &[b"{}".to_vec()]).await });
        // As much as is asked for; then nobody reads what it is told.
        let mut head = [0; 9];
        for _ in 0..2 {
            other.read_exact(&mut head).await.unwrap();
            let mut payload = vec![0; usize::from(head[2])];
            other.read_exact(&mut payload).await.unwrap();
        }
        let mut answer = vec![0, 0, 1, HEADERS, 4, 0, 0, 0, 1, 0x88];
        answer.extend_from_slice(&[0, 0, 2, DATA, END_STREAM, 0, 0, 0, 1]);
        answer.extend_from_slice(b"{}");
        other.write_all(&answer).await.unwrap();
        drop(other);
        let answers = asked.await.unwrap().unwrap();
        assert_eq!(
            (answers[0].status, answers[0].body.as_slice()),
            (Some(200), &b"{}"[..])
        );
    }

    #[tokio::test]
    async fn a_connection_that_ends_without_goaway_has_failed() {
        let (mut connection, other) = connected();
        drop(other);
        let error = connection.rest(LONG).await.unwrap_err();
        assert!(error.to_string().contains("without GOAWAY"), "{error}");
        assert!(!connection.is_ending());
    }

    #[tokio::test]
    async fn a_request_that_goaway_leaves_out_has_failed() {
        let (mut connection, mut other) = connected();
        other.write_all(&frame(GOAWAY, [0; 8])).await.unwrap();
        let error = connection.ask("/encrypt", &[b"{}".to_vec()]).await.unwrap_err();
        assert!(error.to_string().contains("was not taken"), "{error}");
    }
}
