//! openraft over sled: log, vote, snapshots, peer transport, propose, read.

mod codec;
mod config;
mod folder;
mod log;
