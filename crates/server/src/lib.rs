//! One node: REST, agent gateway, lease clock, reconcilers.
//!
//! [`Server::start`] wires the parts; each follows one shape (options, the service, a cheap handle, an
//! error), and none talks to another about state: **the log is the bus.** Every part looks at what was
//! applied and acts on what concerns it.
//!
//! Where to look: `service` is what all parts are handed; `http` is REST; `gateway` holds the
//! connections of agents; `dispatch` wakes those that applied operations concern; `keepalive`, `leader`,
//! `lease_clock`, `presence` and `waiting` are the leases; `reconcile` does, on the leader, what time makes due.

mod activity;
mod backups;
mod bootstrap;
mod describe;
mod dispatch;
mod follow;
#[doc(hidden)]
pub mod fuzzing;
mod gateway;
mod http;
mod ids;
mod joining;
mod keepalive;
mod leader;
mod lease_clock;
#[cfg(test)]
mod lease_simulation;
mod listener;
mod membership;
mod options;
mod peer;
mod presence;
mod reconcile;
pub mod recovery;
mod server;
mod service;
mod traces;
mod waiting;

pub use joining::{JoinError, Joining};
pub use options::{
    BackupSchedule, Credentials, DEFAULT_HEARTBEAT, DEFAULT_MIN_VOTERS, DEFAULT_STALE_AFTER, Files,
    HttpClients, Limits, LogStore, MemoryDisk, Options, SnapshotPolicy, Sockets,
};
pub use server::{Error, Server};

/// Breaks a rule in this whole process: see `regent_state::faults`.
#[cfg(feature = "faults")]
#[doc(hidden)]
pub fn seed_fault(name: &str) -> Result<(), String> {
    regent_state::faults::seed(Some(name.parse()?));
    Ok(())
}
