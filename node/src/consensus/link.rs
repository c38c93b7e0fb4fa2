//! What a connection between nodes runs over: TCP, and in the simulation what stands for it there. TLS and everything above it
//! are the same over both.

// Outside tests there is one kind of each.
#![cfg_attr(not(test), allow(clippy::match_single_binding))]

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};

/// A connection before TLS.
pub(super) enum Link {
    Tcp(TcpStream),
    #[cfg(test)]
    Simulated(turmoil::net::TcpStream),
}

impl Link {
    /// Connects to `host:port`.
    pub(super) async fn connect(address: &str) -> io::Result<Self> {
        #[cfg(test)]
        if turmoil::in_simulation() {
            return Self::simulated(address).await;
        }
        TcpStream::connect(address).await.map(Self::Tcp)
    }

    /// turmoil reports at once, as refused, what a cut link has lost. A machine hears nothing then, and waits; and with
    /// attempts that take no time simulated time could stand still.
    #[cfg(test)]
    async fn simulated(address: &str) -> io::Result<Self> {
        let begun = tokio::time::Instant::now();
        match turmoil::net::TcpStream::connect(address).await {
            Ok(tcp) => Ok(Self::Simulated(tcp)),
            // Whoever does refuse is a way away.
            Err(_) if begun.elapsed().is_zero() => std::future::pending().await,
            Err(refused) => Err(refused),
        }
    }

    /// Sends what is written at once.
    pub(super) fn set_nodelay(&self) -> io::Result<()> {
        match self {
            Self::Tcp(tcp) => tcp.set_nodelay(true),
            #[cfg(test)]
            Self::Simulated(_) => Ok(()),
        }
    }
}

impl AsyncRead for Link {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(tcp) => Pin::new(tcp).poll_read(cx, buf),
            #[cfg(test)]
            Self::Simulated(tcp) => Pin::new(tcp).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Link {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(tcp) => Pin::new(tcp).poll_write(cx, bytes),
            #[cfg(test)]
            Self::Simulated(tcp) => Pin::new(tcp).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(tcp) => Pin::new(tcp).poll_write_vectored(cx, slices),
            #[cfg(test)]
            Self::Simulated(tcp) => Pin::new(tcp).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Tcp(tcp) => tcp.is_write_vectored(),
            #[cfg(test)]
            Self::Simulated(tcp) => tcp.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(tcp) => Pin::new(tcp).poll_flush(cx),
            #[cfg(test)]
            Self::Simulated(tcp) => Pin::new(tcp).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(tcp) => Pin::new(tcp).poll_shutdown(cx),
            #[cfg(test)]
            Self::Simulated(tcp) => Pin::new(tcp).poll_shutdown(cx),
        }
    }
}

/// Where peers connect to.
pub(super) enum Listener {
    Tcp(TcpListener),
    #[cfg(test)]
    Simulated(turmoil::net::TcpListener),
}

impl Listener {
    /// The next connection.
    pub(super) async fn accept(&self) -> io::Result<Link> {
        match self {
            Self::Tcp(listener) => listener.accept().await.map(|(tcp, _)| Link::Tcp(tcp)),
            #[cfg(test)]
            Self::Simulated(listener) => listener.accept().await.map(|(tcp, _)| Link::Simulated(tcp)),
        }
    }
}
