//! How connections are opened and accepted.
//!
//! Everything between nodes goes through [`Sockets`], so that a whole cluster can run over a network that a
//! test decides about, and the code that is tested is the code that is shipped. [`Tcp`] is what a node has
//! unless it is told otherwise. The halves of a [`Stream`] are boxed apart, because the two ends of a
//! connection are worked on by different tasks: one call through a table per read and write, and over plain
//! TCP no lock. [`Tls`] is the same with both ends known by their certificates.

mod tls;

use std::fmt;
use std::io;
use std::net::SocketAddr;

use futures::future::BoxFuture;
use regent_types::NodeId;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};

pub use tls::Tls;

/// A network: opens connections and ports.
pub trait Sockets: fmt::Debug + Send + Sync + 'static {
    /// Connects to `address`, a `host:port`.
    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Stream>>;

    /// Listens on `address`.
    fn bind(&self, address: SocketAddr) -> BoxFuture<'_, io::Result<Box<dyn Port>>>;

    /// Makes of an accepted connection what is talked over. Apart from accepting, because it may take the
    /// other side's time, and then nobody else must wait for it; the caller bounds it.
    fn receive(&self, accepted: Stream) -> BoxFuture<'_, io::Result<Stream>> {
        Box::pin(std::future::ready(Ok(accepted)))
    }
}

/// An open port.
pub trait Port: Send + 'static {
    /// The next connection and where it comes from. Nothing is lost when the future is dropped.
    fn accept(&mut self) -> BoxFuture<'_, io::Result<(Stream, SocketAddr)>>;
}

/// Both halves of a connection. What is written is sent at once.
pub struct Stream {
    /// What the other side sends.
    pub reader: Box<dyn AsyncRead + Send + Unpin>,
    /// What is sent to the other side.
    pub writer: Box<dyn AsyncWrite + Send + Unpin>,
    /// Which node the other side has proven to be by its certificate. None where there are no certificates:
    /// over TLS, who is no node gets no stream.
    pub proven: Option<NodeId>,
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream").finish_non_exhaustive()
    }
}

impl Stream {
    /// Over TCP.
    ///
    /// # Errors
    /// The connection has ended already.
    pub fn from_tcp(stream: TcpStream) -> io::Result<Self> {
        // Every frame is wanted at once; batching is done above.
        stream.set_nodelay(true)?;
        let (reader, writer) = stream.into_split();
        Ok(Self {
            reader: Box::new(reader),
            writer: Box::new(writer),
            proven: None,
        })
    }
}

/// The network of the machine.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tcp;

impl Sockets for Tcp {
    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Stream>> {
        Box::pin(async move { Stream::from_tcp(TcpStream::connect(address).await?) })
    }

    fn bind(&self, address: SocketAddr) -> BoxFuture<'_, io::Result<Box<dyn Port>>> {
        Box::pin(async move {
            let port: Box<dyn Port> = Box::new(TcpListener::bind(address).await?);
            Ok(port)
        })
    }
}

impl Port for TcpListener {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<(Stream, SocketAddr)>> {
        Box::pin(async move {
            loop {
                let (stream, from) = TcpListener::accept(self).await?;
                // One that has ended by now is its own failure and not the port's, which would pause for it.
                if let Ok(stream) = Stream::from_tcp(stream) {
                    return Ok((stream, from));
                }
            }
        })
    }
}
