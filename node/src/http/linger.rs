//! The end of a connection that loses nothing of what was written last. A socket that is closed while bytes of its client
//! are unread, or still come (a window update, a request too many), is reset, and the kernel throws away what it has not
//! sent yet: the rest of a long answer. So the socket says that nothing more comes, and is read until its client has closed
//! it too, or a moment has passed (RFC 9112 section 9.6).

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::timeout;

/// Whoever has not closed its side by then is not told anything any more. It holds its place for so long.
const LINGER: Duration = Duration::from_secs(1);

/// A socket that comes back from whoever has it when that is done with it.
pub(super) struct Borrowed {
    /// Absent only while it is dropped.
    stream: Option<TcpStream>,
    back: Option<oneshot::Sender<TcpStream>>,
}

/// Where it comes back to.
pub(super) struct Back(oneshot::Receiver<TcpStream>);

impl Borrowed {
    pub(super) fn new(stream: TcpStream) -> (Self, Back) {
        let (sender, receiver) = oneshot::channel();
        let borrowed = Self {
            stream: Some(stream),
            back: Some(sender),
        };
        (borrowed, Back(receiver))
    }

    fn stream(&mut self) -> io::Result<Pin<&mut TcpStream>> {
        let stream = self.stream.as_mut().map(Pin::new);
        stream.ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

impl Drop for Borrowed {
    fn drop(&mut self) {
        if let (Some(stream), Some(back)) = (self.stream.take(), self.back.take()) {
            // If nobody waits for it, it is closed here.
            let _ = back.send(stream);
        }
    }
}

impl Back {
    /// Closes the socket, once it is here.
    pub(super) async fn linger(self) {
        let ended = async {
            let Ok(mut stream) = self.0.await else { return };
            // Done before, by whoever ended the connection well.
            let _ = stream.shutdown().await;
            let mut scrap = [0_u8; 4096];
            while let Ok(1..) = stream.read(&mut scrap).await {}
        };
        let _ = timeout(LINGER, ended).await;
    }
}

impl AsyncRead for Borrowed {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.get_mut().stream()?.poll_read(cx, buf)
    }
}

impl AsyncWrite for Borrowed {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().stream()?.poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().stream()?.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().stream()?.poll_shutdown(cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().stream()?.poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    /// Sends more than fits on its way to a client of which bytes are unread, ends the connection, and gives how much was
    /// sent, how much the client sees of it, and what it sees then.
    async fn what_is_seen(lingers: bool) -> (usize, usize, io::Result<usize>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (accepted, _) = listener.accept().await.unwrap();
        let (mut borrowed, back) = Borrowed::new(accepted);
        client.write_all(&[7; 10_000]).await.unwrap();
        borrowed.read_exact(&mut [0; 100]).await.unwrap();
        let mut sent = 0;
        borrowed.stream.as_ref().unwrap().writable().await.unwrap();
        while let Ok(length) = borrowed.stream.as_ref().unwrap().try_write(&[1; 65_536]) {
            sent += length;
        }
        borrowed.shutdown().await.unwrap();
        drop(borrowed);
        let lingering = async {
            if lingers {
                back.linger().await;
            } else {
                drop(back);
            }
        };
        let reading = async move {
            // The other side has had time to do what it does.
            tokio::task::yield_now().await;
            let (mut seen, mut piece) = (0, vec![0; 65_536]);
            loop {
                match client.read(&mut piece).await {
                    Ok(length @ 1..) => seen += length,
                    end => return (seen, end),
                }
            }
        };
        let ((), (seen, end)) = tokio::join!(lingering, reading);
        (sent, seen, end)
    }

    #[tokio::test]
    async fn what_was_written_last_is_not_lost() {
        let (sent, seen, end) = what_is_seen(true).await;
        assert_eq!((seen, end.unwrap()), (sent, 0));
    }

    #[tokio::test]
    async fn of_a_socket_that_is_closed_at_once_it_is() {
        let (sent, seen, end) = what_is_seen(false).await;
        assert!(seen < sent && end.is_err(), "{seen} of {sent}, then {end:?}");
    }

    #[tokio::test]
    async fn a_client_that_does_not_close_is_not_waited_for() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (accepted, _) = listener.accept().await.unwrap();
        let (borrowed, back) = Borrowed::new(accepted);
        drop(borrowed);
        timeout(10 * LINGER, back.linger()).await.unwrap();
    }
}
