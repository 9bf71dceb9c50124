//! The peer transport: length-delimited bincode over TCP.
//!
//! Read `wire` for what is said, `handshake` for who may say it, `channel` and `listener` for the two ends
//! of a request connection, `replicate` and `snapshot` for the two streams, `network` for how openraft
//! uses them. Between two nodes there is one connection per [`wire::Purpose`] and direction, so that a
//! large transfer never delays a heartbeat. A malformed frame closes its own connection and nothing else.

pub(crate) mod channel;
pub(crate) mod connection;
pub(crate) mod handshake;
pub(crate) mod listener;
pub(crate) mod network;
pub(crate) mod peers;
pub(crate) mod replicate;
pub(crate) mod snapshot;
pub(crate) mod wire;
