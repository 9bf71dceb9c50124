//! The replicated state machine: operations in, outcomes and events out.
//!
//! [`State::apply`] is total, synchronous and deterministic: no clock, no randomness, no I/O,
//! integers only, ordered maps only. Whatever is random or takes time (ids, password hashes) is
//! in the [`Operation`] already; the time comes from the leader, in [`Meta`]. So every node that
//! applies the same log has the same state, byte for byte, and [`State::digest`] says so.
//!
//! Where to look: [`operation`] is what can happen, [`record`] is what is kept, [`outcome`] is
//! what comes back, [`event`] is what others are told; `apply` leads from one to the other, through
//! one module per noun, and [`State`] is what can be read. Only `txn` changes a table.

mod actor;
mod agents;
mod apply;
mod builtin;
mod check;
mod cluster;
mod codec;
mod commands;
mod digest;
mod due;
pub mod event;
mod events;
#[doc(hidden)]
pub mod faults;
#[doc(hidden)]
pub mod fuzzing;
mod index;
mod leases;
pub mod limits;
mod members;
pub mod operation;
pub mod outcome;
mod placement;
mod prune;
mod quota;
mod reconcile;
pub mod record;
mod restore;
mod sessions;
mod snapshot;
mod state;
mod templates;
mod tokens;
mod txn;
mod users;

pub use codec::{CodecError, FORMAT, MAX_ENCODED, decode_applied, encode_applied};
pub use due::Overdue;
pub use event::{Event, EventId, EventKind, EventRecord};
pub use events::Events;
pub use members::{FIRST_LEVEL, MAX_MEMBERS, MEMBERS_LEVEL, check_agent_pattern};
pub use operation::{Caller, Idempotency, Leadership, Meta, Operation, Request};
pub use outcome::{Applied, Noun, Outcome, Rejection};
pub use prune::{KEEP_ENDED_MS, KEEP_EVENTS_MS, KEEP_RECORDED_MS, MAX_PRUNED};
pub use restore::{BASE_STEP, HOLD_MS, MAX_LINEAGE, Plan, RestoreError};
pub use snapshot::{MAX_CHUNK, StateDecoder};
pub use state::{MAX_DELIVERABLE, State};
pub use tokens::MAX_TOKENS_PER_SUBJECT;
pub use txn::{MAX_EVENTS, MAX_RECORDED};
