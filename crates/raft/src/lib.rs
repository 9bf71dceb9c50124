//! openraft over sled: log, vote, snapshots, peer transport, propose, read.

mod codec;
mod config;
mod digest;
mod folder;
mod log;
mod machine;
mod snapshot;
