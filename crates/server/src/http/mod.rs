//! REST, under `/api/v1` on every node, and what probes and people ask beside it.
//!
//! A request passes `observe` (id, metrics, panics, problems), is taken apart by `caller`, `query` and
//! `body`, checked against `limits`, and becomes either one operation, whose outcome is answered, or a
//! read of one view. Nothing here changes a record; `view` shows them.

mod agents;
mod attempts;
mod auth;
mod backup;
mod body;
pub(crate) mod caller;
mod cluster;
mod commands;
mod events;
mod findings;
pub(crate) mod fuzzing;
mod health;
mod idempotency;
mod leases;
pub(crate) mod limits;
mod members;
mod metrics;
mod observe;
mod openapi;
mod paging;
pub(crate) mod passwords;
pub(crate) mod problem;
mod query;
mod rates;
mod reply;
mod router;
mod sessions;
mod templates;
mod tokens;
mod users;
mod view;

pub(crate) use rates::Rates;
pub(crate) use router::router;
