//! openraft over sled: log, vote, snapshots, peer transport, propose, read.
//!
//! One [`Node`] is one member of a cluster. The server holds its handle: it proposes operations, reads
//! linearizably, hears who leads, and calls other nodes. Nothing above this crate names openraft or sled.
//!
//! From the top down:
//! - [`Node`] wires everything; `start` opens it, `forming` and `identity` settle who is who before
//!   openraft runs, `watch` keeps an eye on leadership, quorum, digests and failures.
//! - `propose` and `read` are the two paths of work, `clock` the time that entries are stamped with.
//! - `transport` carries everything between nodes.
//! - `machine` applies, `snapshot` and `log` keep, `backup` gives a snapshot to whoever asks.
//! - `offline` makes a new cluster of a backup, or of what a lost one left behind.
//!
//! Invariants, each kept in one place: a refused write was never appended (`propose`); a read joins only
//! a round that starts after it arrived (`read`); a node whose data folder is gone never votes under its
//! old id (`identity`); cluster time never goes back (`clock`); what was promised is durable (`log`).

mod backup;
mod clock;
pub mod clocks;
mod codec;
mod config;
mod digest;
mod error;
mod folder;
mod forming;
#[doc(hidden)]
pub mod fuzzing;
mod gather;
mod identity;
mod joining;
mod log;
mod machine;
mod members;
mod node;
pub mod offline;
mod offload;
mod options;
mod places;
mod propose;
mod read;
mod roster;
mod snapshot;
mod sockets;
mod start;
mod status;
mod transport;
mod watch;

pub use backup::{Backup, BackupInfo};
pub use config::{MAX_PROPOSAL, SnapshotPolicy, Timing};
pub use error::{CallError, ChangeError, ProposeError, ReadError, StartError, TransferError};
pub use folder::FolderError;
pub use joining::{Joining, KnownMember};
#[doc(hidden)]
pub use log::workbench;
pub use log::{LogError, LogStore, MemoryDisk};
pub use machine::View;
pub use members::Consensus;
pub use node::{LeadershipView, Node, PeerService, Proposed};
pub use options::{ClusterSecret, MIN_SECRET_BYTES, Options, SecretTooShort, Storage};
pub use places::{Place, Places};
pub use snapshot::SnapshotError;
pub use sockets::{Port, Sockets, Stream, Tcp, Tls};
pub use status::{Alarm, ClusterStatus, Health, MemberStatus, Role};
pub use transport::wire::MAX_CALL;
