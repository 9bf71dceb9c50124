//! The agent: dials a node of the control plane, does what it is told, and tells what it runs.
//!
//! - [`run`] wires everything: `service` is the loop, `connection` one socket.
//! - [`session`] decides: what to send, what to begin, what to refuse. Pure: told the time and frames.
//! - [`executor`] does: [`fence`], intent in the [`journal`], [`action`] on the [`runtime`], outcome.
//! - [`reconcile`] finds out, after a crash, what was done without being recorded.
//! - [`runtime`] is what sessions run on: a trait, and processes as the one that needs nothing.
//!
//! Sessions outlive the agent: it may be killed at any moment and started again.

pub mod action;
mod connection;
mod ended;
pub mod executor;
pub mod fence;
pub mod files;
pub mod journal;
pub mod lifeline;
mod options;
pub mod reconcile;
pub mod runtime;
mod service;
pub mod session;

pub use options::{Options, machine_capacity};
pub use runtime::{Runtime, RuntimeKind};
pub use service::{Error, run};
