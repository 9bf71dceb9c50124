//! The HTTP port over TLS.
//!
//! A handshake has a deadline, and a caller that speaks plain HTTP is told so in plain HTTP: what it sent has
//! crossed the network already, its token with it, and a person should know.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use regent_tls::Credentials;
use regent_types::{Code, Problem};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::Accept;

/// How long a handshake may take: two messages each way, over the worst of links.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(10);
/// What the first byte of every TLS connection is.
const TLS_HANDSHAKE: u8 = 22;
/// How much of a plain request is read at once.
const PLAIN_READ: usize = 16 << 10;

/// A port that speaks TLS.
pub(crate) struct Secured {
    port: TcpListener,
    credentials: Arc<Credentials>,
}

impl Secured {
    /// With what is shown there, as it is current when a connection comes.
    pub(crate) fn new(port: TcpListener, credentials: Arc<Credentials>) -> Self {
        Self { port, credentials }
    }
}

impl Accept for Secured {
    type Raw = TcpStream;
    type Io = TlsStream<TcpStream>;

    async fn next(&mut self) -> io::Result<(TcpStream, SocketAddr)> {
        self.port.next().await
    }

    fn open(
        &self,
        raw: TcpStream,
        from: SocketAddr,
    ) -> impl Future<Output = Option<Self::Io>> + Send + use<> {
        let acceptor = TlsAcceptor::from(self.credentials.http());
        async move {
            let (kind, why) = match timeout(HANDSHAKE_WITHIN, handshake(acceptor, raw)).await {
                Ok(Ok(Some(stream))) => return Some(stream),
                Ok(Ok(None)) => ("plain", "it speaks plain HTTP".to_owned()),
                Ok(Err(error)) => (
                    "tls",
                    regent_tls::explain(&error).unwrap_or_else(|| error.to_string()),
                ),
                Err(_) => ("slow", "it took too long".to_owned()),
            };
            metrics::counter!("regent_http_handshakes_failed_total", "kind" => kind).increment(1);
            tracing::debug!(%from, kind, why, "a connection did not become TLS");
            None
        }
    }
}

/// `None`: the caller spoke plain text and was told.
async fn handshake(acceptor: TlsAcceptor, mut raw: TcpStream) -> io::Result<Option<TlsStream<TcpStream>>> {
    let mut first = [0];
    if raw.peek(&mut first).await? == 1 && first[0] != TLS_HANDSHAKE {
        answer_plainly(&mut raw).await?;
        return Ok(None);
    }
    acceptor.accept(raw).await.map(Some)
}

async fn answer_plainly(raw: &mut TcpStream) -> io::Result<()> {
    let problem = Problem::new(
        Code::InvalidRequest,
        "this port speaks TLS only: use https:// instead of http://, and the CA file of the cluster",
    );
    let body = serde_json::to_string(&problem).unwrap_or_default();
    // What is left unread when the connection is closed would take the answer with it.
    let mut unread = vec![0; PLAIN_READ];
    let _ = raw.read(&mut unread).await?;
    let answer = format!(
        "HTTP/1.1 400 Bad Request\r\ncontent-type: application/problem+json\r\ncontent-length: {}\r\n\
         connection: close\r\n\r\n{body}",
        body.len()
    );
    raw.write_all(answer.as_bytes()).await?;
    raw.shutdown().await?;
    // Until the caller has closed too; the deadline is around all of this.
    while raw.read(&mut unread).await? > 0 {}
    Ok(())
}
