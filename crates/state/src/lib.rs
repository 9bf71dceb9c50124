//! The replicated state machine: operations in, outcomes and events out.
//!
//! [`State::apply`] is total, synchronous and deterministic: no clock, no randomness, no I/O,
//! integers only, ordered maps only. Whatever is random or takes time (ids, password hashes) is
//! in the [`Operation`] already; the time comes from the leader, in [`Meta`]. So every node that
//! applies the same log has the same state, byte for byte, and [`State::digest`] says so.
//!
//! Where to look: [`operation`] is what can happen, [`record`] is what is kept, [`outcome`] is
//! what comes back, [`event`] is what others are told.

pub mod event;
pub mod operation;
pub mod outcome;
pub mod record;

pub use event::{Event, EventId, EventKind, EventRecord};
pub use operation::{Caller, Idempotency, Leadership, Meta, Operation, Request};
pub use outcome::{Applied, Noun, Outcome, Rejection};
