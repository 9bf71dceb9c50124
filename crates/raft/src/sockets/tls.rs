//! TCP with TLS over it, both ends known by certificates of the cluster's CA.
//!
//! The certificate says which node the other end is; the handshake of the peer protocol compares that with what it
//! says of itself. Nobody gets a stream without a node's certificate.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use futures::future::BoxFuture;
use regent_tls::{Credentials, PEER_HOST};
use regent_types::NodeId;
use tokio::io::{AsyncRead, AsyncWrite, Join};
use tokio_rustls::rustls::CommonState;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::{Port, Sockets, Stream, Tcp};

/// TCP with TLS over it.
#[derive(Debug, Clone)]
pub struct Tls(Arc<Credentials>);

impl Tls {
    /// With what this node shows and whom it believes; each new connection takes what is current.
    pub fn new(credentials: Arc<Credentials>) -> Self {
        Self(credentials)
    }
}

impl Sockets for Tls {
    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<Stream>> {
        Box::pin(async move {
            let stream = join(Tcp.connect(address).await?);
            let name = ServerName::try_from(PEER_HOST).expect("a DNS name");
            let tls = TlsConnector::from(self.0.peer_client())
                .connect(name, stream)
                .await?;
            let node = proven(tls.get_ref().1)?;
            Ok(split(tls, node))
        })
    }

    fn bind(&self, address: SocketAddr) -> BoxFuture<'_, io::Result<Box<dyn Port>>> {
        Tcp.bind(address)
    }

    fn receive(&self, accepted: Stream) -> BoxFuture<'_, io::Result<Stream>> {
        Box::pin(async move {
            let tls = TlsAcceptor::from(self.0.peer_server())
                .accept(join(accepted))
                .await?;
            let node = proven(tls.get_ref().1)?;
            Ok(split(tls, node))
        })
    }
}

/// The node at the other end, or why it is none.
fn proven(connection: &CommonState) -> io::Result<NodeId> {
    Credentials::node_of(connection.peer_certificates())
        .map_err(|error| io::Error::new(io::ErrorKind::PermissionDenied, error))
}

fn join(stream: Stream) -> Join<Box<dyn AsyncRead + Send + Unpin>, Box<dyn AsyncWrite + Send + Unpin>> {
    tokio::io::join(stream.reader, stream.writer)
}

/// The halves share the state of the encryption behind a lock that is held for one record at a time.
fn split(stream: impl AsyncRead + AsyncWrite + Send + 'static, proven: NodeId) -> Stream {
    let (reader, writer) = tokio::io::split(stream);
    Stream {
        reader: Box::new(reader),
        writer: Box::new(writer),
        proven: Some(proven),
    }
}

#[cfg(test)]
mod tests;
