//! One WebSocket connection to one node: dialing, and a task each for reading and for writing.
//!
//! Thin: it turns messages into frames and back and decides nothing. Invariants: one frame is one text
//! message; both queues are bounded; when reading ends for any reason the last thing received is
//! [`Incoming::Closed`]; the tasks end with the connection, so none is ever reused by the next one.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use regent_client::ClientConfig;
use regent_types::frame::{AgentFrame, CLOSE_SUPERSEDED, MAX_FRAME, PROTOCOL, ServerFrame};
use regent_types::{AgentId, ReplicaName, Time};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::{HeaderValue, StatusCode};
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, WebSocketConfig};
use tokio_tungstenite::tungstenite::{self, Message};
use tokio_tungstenite::{Connector, MaybeTlsStream, WebSocketStream, connect_async_tls_with_config};

/// A node gets this long to take the connection: a frozen one takes none, and the next one waits.
const DIAL_WITHIN: Duration = Duration::from_secs(3);
/// Frames that wait to be written. A node that reads this slowly is as good as gone.
const OUTGOING: usize = 1024;
/// Messages that wait to be looked at; beyond them the socket is not read.
const INCOMING: usize = 256;
/// One message must be written within this time.
const WRITE_WITHIN: Duration = Duration::from_secs(10);
/// A closed connection gets this long for its goodbye.
const GOODBYE_WITHIN: Duration = Duration::from_secs(1);

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// Where and as whom to connect.
#[derive(Clone)]
pub(crate) struct Address {
    /// The URL of the node, `http://HOST:PORT` or `https://HOST:PORT`.
    pub(crate) server: String,
    /// How certificates are checked.
    pub(crate) tls: Arc<ClientConfig>,
    /// The agent's token.
    pub(crate) token: String,
    /// The agent.
    pub(crate) agent: AgentId,
    /// The replica.
    pub(crate) replica: Option<ReplicaName>,
}

/// Why a connection was not made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    /// The node answered, but not with a connection.
    #[error("refused with status {status}: {body}")]
    Refused {
        /// Its answer's status.
        status: StatusCode,
        /// Its answer.
        body: String,
    },
    /// It did not answer in time.
    #[error("no answer within {} ms", DIAL_WITHIN.as_millis())]
    TimedOut,
    /// The connection failed.
    #[error("{0}")]
    Failed(#[from] tungstenite::Error),
    /// The URL or the token cannot be used.
    #[error("{0}")]
    Unusable(String),
}

impl DialError {
    /// Whether the control plane does not know the agent.
    pub(crate) fn is_not_found(&self) -> bool {
        match self {
            Self::Refused { status, .. } => *status == StatusCode::NOT_FOUND,
            Self::TimedOut | Self::Failed(_) | Self::Unusable(_) => false,
        }
    }
}

/// What a connection brings.
#[derive(Debug)]
pub(crate) enum Incoming {
    /// A frame.
    Frame(ServerFrame),
    /// A ping, a pong or a frame that means nothing to this version.
    Alive,
    /// It is over. Nothing follows.
    Closed {
        /// Whether a newer connection of this agent took over.
        superseded: bool,
        /// For people.
        reason: String,
    },
}

/// What can be written.
#[derive(Debug)]
enum Outgoing {
    Frame(Box<AgentFrame>),
    Ping,
    Close,
}

/// A connection that stands. Dropping it closes the socket without a goodbye.
#[derive(Debug)]
pub(crate) struct Connection {
    outgoing: mpsc::Sender<Outgoing>,
    incoming: mpsc::Receiver<Incoming>,
    reader: JoinHandle<()>,
    writer: JoinHandle<()>,
}

impl Connection {
    /// Connects to a node.
    pub(crate) async fn dial(address: &Address) -> Result<Self, DialError> {
        let mut request = url(address)?
            .into_client_request()
            .map_err(|error| DialError::Unusable(format!("{}: {error}", address.server)))?;
        let mut key = HeaderValue::from_str(&address.token)
            .map_err(|_| DialError::Unusable("the token has characters that no token has".to_owned()))?;
        key.set_sensitive(true);
        request.headers_mut().insert("X-Agent-API-Key", key);
        let config = WebSocketConfig::default()
            .max_message_size(Some(MAX_FRAME))
            .max_frame_size(Some(MAX_FRAME))
            .read_buffer_size(16 << 10)
            .write_buffer_size(0);
        let dialed = tokio::time::timeout(
            DIAL_WITHIN,
            connect_async_tls_with_config(
                request,
                Some(config),
                true,
                Some(Connector::Rustls(address.tls.clone())),
            ),
        );
        match dialed.await {
            Err(_) => Err(DialError::TimedOut),
            Ok(Err(tungstenite::Error::Http(response))) => Err(DialError::Refused {
                status: response.status(),
                body: String::from_utf8_lossy(response.body().as_deref().unwrap_or_default()).into_owned(),
            }),
            Ok(Err(error)) => Err(error.into()),
            Ok(Ok((socket, _))) => Ok(Self::start(socket)),
        }
    }

    fn start(socket: Socket) -> Self {
        let (sink, stream) = socket.split();
        let (outgoing, to_write) = mpsc::channel(OUTGOING);
        let (read, incoming) = mpsc::channel(INCOMING);
        Self {
            outgoing,
            incoming,
            reader: tokio::spawn(read_all(stream, read)),
            writer: tokio::spawn(write_all(sink, to_write)),
        }
    }

    /// The next thing that it brings. Cancel safe.
    pub(crate) async fn next(&mut self) -> Incoming {
        self.incoming.recv().await.unwrap_or(Incoming::Closed {
            superseded: false,
            reason: "the connection is closed".to_owned(),
        })
    }

    /// Queues a frame; `false` if the connection takes no more and must be given up.
    #[must_use]
    pub(crate) fn send(&self, frame: Box<AgentFrame>) -> bool {
        self.outgoing.try_send(Outgoing::Frame(frame)).is_ok()
    }

    /// Queues a ping; `false` as for [`Connection::send`].
    #[must_use]
    pub(crate) fn ping(&self) -> bool {
        self.outgoing.try_send(Outgoing::Ping).is_ok()
    }

    /// Writes what is queued and says goodbye, for as long as that may take.
    pub(crate) async fn close(mut self) {
        let goodbye = async {
            if self.outgoing.send(Outgoing::Close).await.is_ok() {
                // The reader ends when the node has answered the goodbye.
                while !matches!(self.next().await, Incoming::Closed { .. }) {}
            }
        };
        // A node that does not answer is told by the end of the TCP connection.
        let _ = tokio::time::timeout(GOODBYE_WITHIN, goodbye).await;
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.reader.abort();
        self.writer.abort();
    }
}

fn url(address: &Address) -> Result<String, DialError> {
    let server = address.server.trim_end_matches('/');
    let (scheme, rest) = if let Some(rest) = server.strip_prefix("https://") {
        ("wss", rest)
    } else if let Some(rest) = server.strip_prefix("http://") {
        ("ws", rest)
    } else {
        return Err(DialError::Unusable(format!(
            "{server} does not begin with http:// or https://"
        )));
    };
    // Both identifiers are made of characters that need no encoding.
    let replica = match &address.replica {
        Some(name) => format!("&replica={name}"),
        None => String::new(),
    };
    Ok(format!(
        "{scheme}://{rest}/api/v1/agents/connect?agent_id={}{replica}&protocol={PROTOCOL}",
        address.agent
    ))
}

async fn read_all(mut stream: SplitStream<Socket>, read: mpsc::Sender<Incoming>) {
    loop {
        let incoming = match stream.next().await {
            Some(Ok(message)) => match understand(message) {
                Some(incoming) => incoming,
                None => continue,
            },
            Some(Err(error)) => closed(error.to_string()),
            None => closed("the node closed the connection".to_owned()),
        };
        let over = matches!(incoming, Incoming::Closed { .. });
        if read.send(incoming).await.is_err() || over {
            return;
        }
    }
}

fn understand(message: Message) -> Option<Incoming> {
    match message {
        Message::Text(text) => match ServerFrame::parse(&text) {
            Ok(Some(frame)) => Some(Incoming::Frame(frame)),
            Ok(None) => {
                tracing::debug!("ignored a frame of an unknown type");
                Some(Incoming::Alive)
            }
            Err(error) => {
                tracing::warn!(%error, "ignored a frame that cannot be read");
                Some(Incoming::Alive)
            }
        },
        // The answer to a ping is sent by the library.
        Message::Ping(_) | Message::Pong(_) | Message::Binary(_) => Some(Incoming::Alive),
        Message::Close(Some(frame)) => Some(Incoming::Closed {
            superseded: u16::from(frame.code) == CLOSE_SUPERSEDED,
            reason: format!(
                "the node closed the connection with {}: {}",
                frame.code, frame.reason
            ),
        }),
        Message::Close(None) => Some(closed("the node closed the connection".to_owned())),
        // Only written, never read.
        Message::Frame(_) => None,
    }
}

fn closed(reason: String) -> Incoming {
    Incoming::Closed {
        superseded: false,
        reason,
    }
}

/// Ends on the first error; the reader notices the end of the socket by itself or by silence.
async fn write_all(mut sink: SplitSink<Socket, Message>, mut to_write: mpsc::Receiver<Outgoing>) {
    while let Some(outgoing) = to_write.recv().await {
        let last = matches!(outgoing, Outgoing::Close);
        let message = match outgoing {
            Outgoing::Frame(frame) => Message::text(frame.to_text(now())),
            Outgoing::Ping => Message::Ping(tungstenite::Bytes::new()),
            Outgoing::Close => Message::Close(Some(CloseFrame {
                code: CloseCode::Normal,
                reason: "the agent ends".into(),
            })),
        };
        match tokio::time::timeout(WRITE_WITHIN, sink.send(message)).await {
            Ok(Ok(())) if !last => {}
            Ok(Ok(())) => return,
            Ok(Err(error)) => {
                tracing::debug!(%error, "writing to the node failed");
                return;
            }
            Err(_) => {
                tracing::debug!("writing to the node took too long");
                return;
            }
        }
    }
}

fn now() -> Time {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Time(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
