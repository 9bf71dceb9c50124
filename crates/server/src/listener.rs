//! Accepting HTTP connections, within bounds.
//!
//! Where they come from is an [`Accept`]: TCP, TLS over it ([`Secured`]), or a simulated network.
//!
//! A connection that does not finish the head of its request in time is closed, so that nobody holds
//! them all by saying nothing (axum's own `serve` has no such bound). When as many stand as may, no more
//! are accepted until one ends.

mod secured;

use std::future::ready;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{ConnectInfo, Request};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use regent_raft::{Places, Port};
use tokio::io::{AsyncRead, AsyncWrite, Join};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

pub(crate) use secured::Secured;

/// How long the head of a request may take, the first and each that follows on the connection.
const HEAD_WITHIN: Duration = Duration::from_secs(30);
/// Connections at once; those that became sockets of agents have a bound of their own (`gateway::registry`).
pub(crate) const MAX_CONNECTIONS: usize = 30_000;
/// Pause after accepting failed: out of files, mostly, which only time mends.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Where connections come from.
pub(crate) trait Accept: Send {
    /// A connection as it is accepted.
    type Raw: Send + 'static;
    /// What is talked over.
    type Io: AsyncRead + AsyncWrite + Send + Unpin + 'static;

    /// The next one.
    fn next(&mut self) -> impl Future<Output = io::Result<(Self::Raw, SocketAddr)>> + Send;

    /// Makes of it what is talked over, in its own time, while others are accepted; `None` when it cannot be.
    fn open(
        &self,
        raw: Self::Raw,
        from: SocketAddr,
    ) -> impl Future<Output = Option<Self::Io>> + Send + 'static + use<Self>;
}

impl Accept for TcpListener {
    type Raw = TcpStream;
    type Io = TcpStream;

    async fn next(&mut self) -> io::Result<(TcpStream, SocketAddr)> {
        let (stream, from) = TcpListener::accept(self).await?;
        // Answers and frames are small and somebody waits for each.
        let _ = stream.set_nodelay(true);
        Ok((stream, from))
    }

    fn open(&self, raw: TcpStream, _: SocketAddr) -> impl Future<Output = Option<TcpStream>> + Send + use<> {
        ready(Some(raw))
    }
}

/// A port of a simulated network.
pub(crate) struct Simulated(pub(crate) Box<dyn Port>);

impl Accept for Simulated {
    type Raw = Self::Io;
    type Io = Join<Box<dyn AsyncRead + Send + Unpin>, Box<dyn AsyncWrite + Send + Unpin>>;

    async fn next(&mut self) -> io::Result<(Self::Io, SocketAddr)> {
        let (stream, from) = self.0.accept().await?;
        Ok((tokio::io::join(stream.reader, stream.writer), from))
    }

    fn open(&self, raw: Self::Io, _: SocketAddr) -> impl Future<Output = Option<Self::Io>> + Send + use<> {
        ready(Some(raw))
    }
}

/// Serves until `stop`, then finishes what is in flight. The caller bounds how long that may take.
pub(crate) async fn serve(
    mut listener: impl Accept,
    router: Router,
    places: Places,
    stop: CancellationToken,
) {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_WITHIN);
    let graceful = GracefulShutdown::new();
    let all = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let accepted = async {
            let place = all
                .clone()
                .acquire_owned()
                .await
                .expect("the semaphore is never closed");
            (listener.next().await, place)
        };
        let (accepted, place) = tokio::select! {
            () = stop.cancelled() => break,
            accepted = accepted => accepted,
        };
        let (raw, from) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Some(its) = places.enter(from.ip()) else {
            metrics::counter!("regent_http_connections_refused_total").increment(1);
            tracing::debug!(%from, "refused a connection: its address has too many");
            continue;
        };
        let service = router.clone().map_request(move |mut request: Request<_>| {
            request.extensions_mut().insert(ConnectInfo::<SocketAddr>(from));
            request
        });
        let opened = listener.open(raw, from);
        let (builder, watcher, stop) = (builder.clone(), graceful.watcher(), stop.clone());
        tokio::spawn(async move {
            let _places = (place, its);
            let io = tokio::select! {
                io = opened => io,
                () = stop.cancelled() => None,
            };
            let Some(io) = io else { return };
            let connection = builder
                .serve_connection_with_upgrades(TokioIo::new(io), TowerToHyperService::new(service))
                .into_owned();
            if let Err(error) = watcher.watch(connection).await {
                tracing::debug!(%from, error, "a connection ended badly");
            }
        });
    }
    drop(listener);
    graceful.shutdown().await;
}
