//! A TCP proxy before a node's peer port, which can be late.
//!
//! Within a connection everything keeps its order, as TCP has it; connections are late by different times, so what
//! travels on one overtakes what travels on another: a vote an append, a heartbeat a snapshot. It runs in a thread
//! of its own, in the namespace of the node that it stands before.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rand::RngExt as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::network::Network;

/// Pieces on their way in one direction of a connection; a sender that is faster waits.
const ON_THE_WAY: usize = 1_024;
/// The size of a piece.
const PIECE: usize = 64 << 10;

/// How late everything is; shared by all proxies of a cluster.
#[derive(Clone, Default)]
pub(crate) struct Lateness(Arc<AtomicU64>);

impl Lateness {
    /// By up to this from now on.
    pub(crate) fn set(&self, up_to: Duration) {
        let micros = u64::try_from(up_to.as_micros()).expect("delays are short");
        self.0.store(micros, Ordering::Relaxed);
    }

    fn draw(&self) -> Duration {
        match self.0.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            most => Duration::from_micros(rand::rng().random_range(0..=most)),
        }
    }
}

/// A running proxy; it ends when this is dropped.
pub(crate) struct Proxy {
    _end: oneshot::Sender<()>,
}

impl Proxy {
    /// Takes what comes to `listen` on a host to `to` on the same host.
    pub(crate) fn start(
        network: &Network,
        host: usize,
        listen: SocketAddr,
        to: SocketAddr,
        lateness: Lateness,
    ) -> Self {
        let (end, ended) = oneshot::channel();
        let (ready, is_ready) = std::sync::mpsc::channel();
        let inside = network.inside(host);
        std::thread::spawn(move || {
            inside.enter();
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let listener = TcpListener::bind(listen).await.unwrap();
                ready.send(()).unwrap();
                tokio::select! {
                    _ = ended => {}
                    () = serve(listener, to, lateness) => {}
                }
            });
        });
        is_ready.recv().expect("a proxy listens");
        Self { _end: end }
    }
}

async fn serve(listener: TcpListener, to: SocketAddr, lateness: Lateness) {
    loop {
        let Ok((near, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        let lateness = lateness.clone();
        tokio::spawn(async move {
            // Nobody listens behind it: the connection ends, as one to a machine without the program would.
            let Ok(far) = TcpStream::connect(to).await else {
                return;
            };
            let _ = (near.set_nodelay(true), far.set_nodelay(true));
            let (near_in, near_out) = near.into_split();
            let (far_in, far_out) = far.into_split();
            tokio::spawn(carry(near_in, far_out, lateness.clone()));
            tokio::spawn(carry(far_in, near_out, lateness));
        });
    }
}

/// One direction of a connection.
async fn carry(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, lateness: Lateness) {
    let (send, mut receive) = mpsc::channel::<(Instant, Vec<u8>)>(ON_THE_WAY);
    let deliver = async move {
        while let Some((at, piece)) = receive.recv().await {
            tokio::time::sleep_until(at).await;
            if to.write_all(&piece).await.is_err() {
                return;
            }
        }
        let _ = to.shutdown().await;
    };
    let read = async move {
        let mut piece = vec![0; PIECE];
        while let Ok(many @ 1..) = from.read(&mut piece).await {
            let at = Instant::now() + lateness.draw();
            if send.send((at, piece[..many].to_vec())).await.is_err() {
                return;
            }
        }
    };
    tokio::join!(deliver, read);
}
