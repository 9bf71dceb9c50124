//! The log stream: replication requests in order, pipelined, over a connection of their own.
//!
//! openraft opens a replication stream, feeds requests and expects the answers in the same order. TCP
//! keeps the order; a session number per stream tells the answers of a stream that was given up from
//! those of the next one, so that the connection can be kept.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures::{SinkExt, Stream, StreamExt};
use openraft::base::BoxStream;
use openraft::raft::{AppendEntriesRequest, StreamAppendResult};
use regent_types::NodeId;
use tokio::sync::{Mutex, mpsc};
use tokio::time::{Instant, sleep_until, timeout};

use super::channel::write_frames;
use super::connection::{Connection, LinkError};
use super::handshake::dial;
use super::network::unreachable;
use super::peers::Addresses;
use super::wire::{LogAck, LogFrame, Purpose, decode, encode};
use crate::config::TypeConfig;
use crate::identity::Identity;
use crate::machine::Raft;

type RpcError = openraft::error::RPCError<TypeConfig>;
type AppendResult = Result<StreamAppendResult<TypeConfig>, RpcError>;

/// Requests sent and not yet answered. Enough to keep the link busy while the follower syncs; the
/// answers to all of them fit the socket's buffer, so both sides can always write.
const MAX_IN_FLIGHT: usize = 32;

/// The leader's end for one follower.
pub(crate) struct LogLink {
    identity: Arc<Identity>,
    target: NodeId,
    addrs: Arc<Addresses>,
    patience: Duration,
    /// The connection between two streams.
    parked: Arc<Mutex<Option<Connection>>>,
    session: u64,
}

impl LogLink {
    pub(crate) fn new(
        identity: Arc<Identity>,
        target: NodeId,
        addrs: Arc<Addresses>,
        patience: Duration,
    ) -> Self {
        Self {
            identity,
            target,
            addrs,
            patience,
            parked: Arc::default(),
            session: 0,
        }
    }

    /// Sends what `input` yields and yields the answers.
    pub(crate) async fn stream<S>(&mut self, input: S) -> BoxStream<'_, AppendResult>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + Unpin + 'static,
    {
        let connection = self.parked.lock().await.take();
        self.session += 1;
        let session = Session {
            identity: self.identity.clone(),
            target: self.target,
            addrs: self.addrs.clone(),
            number: self.session,
            connection,
            input,
            input_done: false,
            sent: VecDeque::new(),
            patience: self.patience,
        };
        let parked = self.parked.clone();
        Box::pin(futures::stream::unfold(Some(session), move |session| {
            let parked = parked.clone();
            async move {
                let mut session = session?;
                match session.next().await {
                    // A connection in the middle of a frame or out of step is dropped with its session.
                    Some(Err(error)) => Some((Err(unreachable(error)), None)),
                    Some(Ok(Ok(matched))) => Some((Ok(Ok(matched)), Some(session))),
                    Some(Ok(refused)) => {
                        *parked.lock().await = session.connection;
                        Some((Ok(refused), None))
                    }
                    None => {
                        *parked.lock().await = session.connection;
                        None
                    }
                }
            }
        }))
    }
}

struct Session<S> {
    identity: Arc<Identity>,
    target: NodeId,
    addrs: Arc<Addresses>,
    number: u64,
    /// Made with the first request: openraft waits out its backoff when it is asked for one, so dialling
    /// before would knock at a dead peer's door with every write.
    connection: Option<Connection>,
    input: S,
    input_done: bool,
    /// When each unanswered request was sent.
    sent: VecDeque<Instant>,
    patience: Duration,
}

impl<S> Session<S>
where
    S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Unpin,
{
    /// The next answer; `None` when all requests were answered and no more will come.
    async fn next(&mut self) -> Option<Result<StreamAppendResult<TypeConfig>, LinkError>> {
        loop {
            if self.input_done && self.sent.is_empty() {
                return None;
            }
            let expires = self
                .sent
                .front()
                .map_or_else(Instant::now, |oldest| *oldest + self.patience);
            let Some(connection) = &mut self.connection else {
                let Some(request) = self.input.next().await else {
                    self.input_done = true;
                    continue;
                };
                if let Err(error) = self.connect_and_send(request).await {
                    return Some(Err(error));
                }
                continue;
            };
            tokio::select! {
                biased;
                frame = connection.reader.next() => {
                    let frame = match frame {
                        Some(Ok(frame)) => frame,
                        Some(Err(error)) => return Some(Err(error.into())),
                        None => return Some(Err(LinkError::Closed)),
                    };
                    let ack: LogAck = match decode(&frame) {
                        Ok(ack) => ack,
                        Err(error) => return Some(Err(error.into())),
                    };
                    if ack.session != self.number {
                        continue;
                    }
                    self.sent.pop_front();
                    return Some(Ok(ack.result));
                }
                request = self.input.next(), if !self.input_done && self.sent.len() < MAX_IN_FLIGHT => {
                    let Some(request) = request else {
                        self.input_done = true;
                        continue;
                    };
                    if let Err(error) = self.connect_and_send(request).await {
                        return Some(Err(error));
                    }
                }
                () = sleep_until(expires), if !self.sent.is_empty() => return Some(Err(LinkError::Silent)),
            }
        }
    }

    async fn connect_and_send(&mut self, request: AppendEntriesRequest<TypeConfig>) -> Result<(), LinkError> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => {
                let addr = self.addrs.current();
                none.insert(dial(&self.identity, self.target, &addr, Purpose::Log).await?)
            }
        };
        let frame = encode(&LogFrame {
            session: self.number,
            request,
        });
        timeout(self.patience, connection.writer.send(frame))
            .await
            .map_err(|_| LinkError::Silent)??;
        self.sent.push_back(Instant::now());
        Ok(())
    }
}

/// The follower's end: feeds openraft in order and sends its answers in order.
pub(crate) async fn serve(connection: Connection, raft: Raft, heard: impl Fn() + Send) -> LinkError {
    let Connection {
        mut reader, writer, ..
    } = connection;
    let (acks, outgoing) = mpsc::channel(MAX_IN_FLIGHT);
    let mut writing = tokio::spawn(write_frames(writer, outgoing));
    let mut current: Option<(u64, mpsc::Sender<AppendEntriesRequest<TypeConfig>>)> = None;
    let error = loop {
        let frame = tokio::select! {
            frame = reader.next() => frame,
            _ = &mut writing => break LinkError::Closed,
        };
        let frame = match frame {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => break error.into(),
            None => break LinkError::Closed,
        };
        heard();
        let LogFrame { session, request } = match decode(&frame) {
            Ok(frame) => frame,
            Err(error) => break error.into(),
        };
        if current.as_ref().is_none_or(|(number, _)| *number != session) {
            let (feed, requests) = mpsc::channel(MAX_IN_FLIGHT);
            let answers = raft.stream_append(receive(requests));
            let acks = acks.clone();
            tokio::spawn(async move {
                futures::pin_mut!(answers);
                // Ends after the first refusal, and when openraft stopped; the leader then opens a new
                // stream or gives the connection up.
                while let Some(Ok(result)) = answers.next().await {
                    if acks.send(encode(&LogAck { session, result })).await.is_err() {
                        return;
                    }
                }
            });
            current = Some((session, feed));
        }
        if let Some((_, feed)) = &current {
            // Closed after a refusal: the rest of that stream has no answer, as openraft expects.
            let _ = feed.send(request).await;
        }
    };
    writing.abort();
    error
}

fn receive<T: Send + 'static>(queue: mpsc::Receiver<T>) -> impl Stream<Item = T> + Send + 'static {
    futures::stream::unfold(queue, |mut queue| async move {
        queue.recv().await.map(|item| (item, queue))
    })
}
