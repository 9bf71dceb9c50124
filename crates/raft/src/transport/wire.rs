//! What peers say to each other.
//!
//! Every frame begins with [`PROTOCOL`]; a peer of another version is refused in the handshake, so a
//! frame of another version later is a malformed one. Enum variants are only ever appended.

use bytes::Bytes;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, TransferLeaderRequest, TransferLeaderResponse, VoteRequest,
    VoteResponse,
};
use serde::{Deserialize, Serialize};

use crate::codec::{self, CodecError};
use crate::config::{LogId, Reply, SnapshotMeta, TypeConfig, Vote};
use crate::identity::{IdentityReply, Settlement};
use crate::status::Report;

/// Version of the peer protocol, in the handshake and before every frame.
pub(crate) const PROTOCOL: u8 = 1;

/// What a connection is for. Each has its own, so that a snapshot never delays a heartbeat and a burst of
/// proposals never delays the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Purpose {
    /// Settling who is who before openraft runs.
    Identity,
    /// Votes, heartbeats, transfers, status.
    Control,
    /// Log replication, in order.
    Log,
    /// One snapshot.
    Snapshot,
    /// Proposals, read indexes and calls.
    Work,
}

impl Purpose {
    /// The word for it in logs and metrics.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Identity => "identity",
            Self::Control => "control",
            Self::Log => "log",
            Self::Snapshot => "snapshot",
            Self::Work => "work",
        }
    }

    /// Largest frame in bytes. What may be sent is bounded well below (a batch of log entries by the log
    /// store, a batch of proposals by `propose`, a call by [`MAX_CALL`], a snapshot chunk by `snapshot`).
    pub(crate) fn max_frame(self) -> usize {
        match self {
            Self::Identity => 64 * 1024,
            Self::Control => 256 * 1024,
            Self::Log => 8 * 1024 * 1024,
            Self::Snapshot | Self::Work => 4 * 1024 * 1024,
        }
    }
}

/// Largest body of a call, and of its answer, in bytes.
pub const MAX_CALL: usize = 2 * 1024 * 1024;

/// A request on an identity, control or work connection; answered in any order.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// Are you there?
    Ping,
    /// Who are you, and do you belong to a cluster?
    Identify,
    /// The identity of the cluster, decided by its lowest member.
    Settle(Settlement),
    /// A vote, for real.
    Vote(VoteRequest<TypeConfig>),
    /// Would you vote for me?
    PreVote(VoteRequest<TypeConfig>),
    /// A heartbeat.
    Append(AppendEntriesRequest<TypeConfig>),
    /// Take over the leadership.
    TransferLeader(TransferLeaderRequest<TypeConfig>),
    /// How I am; answered with how you are.
    Status(Report),
    /// Encoded operations to be replicated, in this order.
    Propose {
        /// Milliseconds that their callers still wait.
        within_ms: u64,
        /// The operations.
        bodies: Vec<Bytes>,
    },
    /// Up to which index must a read that arrives now have applied?
    ReadIndex {
        /// Milliseconds that the callers still wait.
        within_ms: u64,
    },
    /// A call to the service above.
    Call(Bytes),
}

/// The answer to a [`Request`].
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Response {
    /// To `Ping`, and to `Settle` once it is stored.
    Done,
    /// To `Identify`.
    Identity(IdentityReply),
    /// To `Vote` and `PreVote`.
    Vote(VoteResponse<TypeConfig>),
    /// To `Append`.
    Append(AppendEntriesResponse<TypeConfig>),
    /// To `TransferLeader`.
    TransferLeader(TransferLeaderResponse<TypeConfig>),
    /// To `Status`.
    Status(Report),
    /// To `Propose`, one each.
    Propose(Vec<ProposeReply>),
    /// To `ReadIndex`.
    ReadIndex(ReadIndexReply),
    /// To `Call`.
    Call(Result<Bytes, String>),
    /// The request was not taken: too many are under way.
    Busy,
    /// The request was not carried out: this node cannot, for this reason.
    Failed(String),
}

/// What became of one forwarded proposal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ProposeReply {
    /// Applied on the leader.
    Done(Reply),
    /// Not appended: not the leader, or it is handing over.
    NotLeader,
    /// Not appended: the leader has no quorum.
    NoQuorum,
    /// Not appended: too many wait.
    Busy,
    /// Perhaps.
    Unknown,
}

/// What came of a read-index round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ReadIndexReply {
    /// A quorum confirmed the leader after the request arrived.
    At(LogId),
    /// Not the leader.
    NotLeader,
    /// The leader found no quorum.
    NoQuorum,
    /// Too many wait.
    Busy,
}

/// One replication request on a log connection.
#[derive(Serialize, Deserialize)]
pub(crate) struct LogFrame {
    /// Which replication stream of this connection; a new one replaces the last.
    pub(crate) session: u64,
    /// The entries.
    pub(crate) request: AppendEntriesRequest<TypeConfig>,
}

/// The answer to one [`LogFrame`], in order.
#[derive(Serialize, Deserialize)]
pub(crate) struct LogAck {
    /// The stream that the request belonged to.
    pub(crate) session: u64,
    /// What openraft said.
    pub(crate) result: Result<Option<LogId>, openraft::raft::StreamAppendError<TypeConfig>>,
}

/// What the sender of a snapshot says.
#[derive(Serialize, Deserialize)]
pub(crate) enum SnapshotFrame {
    /// What follows, and under which leadership it is sent.
    Begin {
        /// The leader's vote.
        vote: Vote,
        /// What the snapshot covers.
        meta: SnapshotMeta,
        /// Bytes that will follow.
        size: u64,
    },
    /// The next bytes.
    Chunk(Bytes),
    /// All was sent.
    End {
        /// CRC-32 of all bytes.
        crc: u32,
    },
}

/// What the receiver of a snapshot answers, once.
#[derive(Serialize, Deserialize)]
pub(crate) enum SnapshotAck {
    /// Installed, or not needed; the receiver's vote.
    Done(Vote),
    /// Not installed.
    Failed(String),
}

/// Encodes one frame.
pub(crate) fn encode<T: Serialize>(value: &T) -> Bytes {
    codec::encode(PROTOCOL, value).into()
}

/// Decodes one frame.
pub(crate) fn decode<T: serde::de::DeserializeOwned>(frame: &[u8]) -> Result<T, CodecError> {
    codec::decode(PROTOCOL, frame)
}
