//! One connection that carries frames.

use std::io::ErrorKind;

use bytes::Bytes;
use futures::{SinkExt, StreamExt};
use regent_types::NodeId;
use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::codec::{FramedRead, FramedWrite, LengthDelimitedCodec};

use super::wire::{decode, encode};
use crate::codec::CodecError;
use crate::identity::Refusal;
use crate::sockets::Stream;

/// Why a connection could not be made or is over.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    /// The network said no, or a frame exceeded its cap.
    #[error("{0}")]
    Io(#[source] std::io::Error),
    /// The certificate of one side does not convince the other.
    #[error("{0}")]
    Tls(String),
    /// Its first bytes are none of ours.
    #[error(
        "what it says is not the peer protocol: one of the two speaks TLS and the other does not, or something else \
         listens there"
    )]
    Foreign,
    /// The other side closed it.
    #[error("closed by the peer")]
    Closed,
    /// The other side said nothing for too long.
    #[error("the peer does not answer")]
    Silent,
    /// A frame that does not decode.
    #[error("malformed frame: {0}")]
    Malformed(#[from] CodecError),
    /// One side will not talk to the other.
    #[error("{0}")]
    Refused(#[from] Refusal),
}

impl From<std::io::Error> for LinkError {
    fn from(error: std::io::Error) -> Self {
        match regent_tls::explain(&error) {
            Some(why) => Self::Tls(why),
            // What TLS calls an end without a goodbye: that of a process that was killed.
            None if error.kind() == ErrorKind::UnexpectedEof => Self::Closed,
            None => Self::Io(error),
        }
    }
}

impl LinkError {
    /// Whether a person must do something before it can succeed.
    pub(crate) fn is_fault(&self) -> bool {
        match self {
            Self::Malformed(_) | Self::Tls(_) | Self::Foreign => true,
            Self::Refused(refusal) => !refusal.passes(),
            Self::Io(_) | Self::Closed | Self::Silent => false,
        }
    }
}

/// A framed connection to one peer.
pub(crate) struct Connection {
    pub(crate) peer: NodeId,
    /// Which node it is by its certificate; none without certificates.
    proven: Option<NodeId>,
    pub(crate) reader: FramedRead<Box<dyn AsyncRead + Send + Unpin>, LengthDelimitedCodec>,
    pub(crate) writer: FramedWrite<Box<dyn AsyncWrite + Send + Unpin>, LengthDelimitedCodec>,
}

impl Connection {
    pub(crate) fn new(stream: Stream, peer: NodeId, max_frame: usize) -> Self {
        let mut link = Self {
            peer,
            proven: stream.proven,
            reader: FramedRead::new(stream.reader, LengthDelimitedCodec::new()),
            writer: FramedWrite::new(stream.writer, LengthDelimitedCodec::new()),
        };
        link.set_max_frame(max_frame);
        link
    }

    /// Refuses a peer that calls itself another node than its certificate does.
    pub(crate) fn check_proven(&self) -> Result<(), Refusal> {
        match self.proven {
            Some(proven) if proven != self.peer => Err(Refusal::Certificate {
                claimed: self.peer,
                proven,
            }),
            Some(_) | None => Ok(()),
        }
    }

    pub(crate) fn set_max_frame(&mut self, bytes: usize) {
        self.reader.decoder_mut().set_max_frame_length(bytes);
        self.writer.encoder_mut().set_max_frame_length(bytes);
    }

    pub(crate) async fn send<T: Serialize>(&mut self, value: &T) -> Result<(), LinkError> {
        Ok(self.writer.send(encode(value)).await?)
    }

    pub(crate) async fn receive<T: DeserializeOwned>(&mut self) -> Result<T, LinkError> {
        let frame = self.reader.next().await.ok_or(LinkError::Closed)??;
        Ok(decode(&frame)?)
    }

    /// The first frame: whoever speaks something else is found out by its length.
    pub(crate) async fn first(&mut self) -> Result<Bytes, LinkError> {
        match self.reader.next().await {
            Some(Ok(frame)) => Ok(frame.freeze()),
            Some(Err(error)) => Err(match LinkError::from(error) {
                LinkError::Io(error) if error.kind() == ErrorKind::InvalidData => LinkError::Foreign,
                other => other,
            }),
            None => Err(LinkError::Closed),
        }
    }
}
