//! The agent: dials a node of the control plane, does what it is told, and tells what it runs.
//!
//! - [`run`] wires everything: `service` is the loop, `attempt` how it connects, `connection` one socket,
//!   `farewell` the end of the sessions in `dev`.
//! - [`session`] decides: what to send, what to begin, what to refuse. Pure: told the time and frames.
//!   `leadership` says who leads among replicas, `membership` whom to believe, `runs` which commands wait and
//!   what came of the rest, `present` and `ended` which sessions are here, `report` how all that is told.
//! - [`executor`] does, while the [`permit`] lasts: [`fence`], intent in the [`journal`], [`action`] on the
//!   [`runtime`], outcome.
//! - [`reconcile`] finds out, after a crash, what was done without being recorded.
//! - [`runtime`] is what sessions run on: a trait, and processes as the one that needs nothing.
//!
//! Sessions outlive the agent: it may be killed at any moment and started again.

pub mod action;
mod attempt;
mod connection;
mod effect;
mod ended;
pub mod executor;
mod farewell;
pub mod fence;
pub mod files;
#[doc(hidden)]
pub mod fuzzing;
pub mod journal;
mod leadership;
pub mod lifeline;
mod membership;
pub mod names;
mod options;
pub mod permit;
mod present;
pub mod reconcile;
mod report;
mod runs;
pub mod runtime;
mod service;
pub mod session;

pub use farewell::stop_sessions;
pub use options::{LEASE_TTL, Options, machine_capacity};
pub use runtime::{Runtime, RuntimeKind};
pub use service::{Error, cluster_of, run};
