//! Typed client of the public API.
//!
//! A [`Client`] knows all nodes and asks them in turn: any node serves any request, so a node that is
//! gone, has no leader or has no quorum only costs the time until the next one is asked. What makes this
//! safe for calls that change something is the idempotency key: it is made once per call and goes along
//! with every repetition, so a call whose outcome is unknown may be repeated.
//!
//! - `call`: one call: which server, how often, how long; the only place that sends.
//! - [`LeaderElector`]: elections for programs: campaign, lead while the guard is valid, resign.
//! - `candidacy`: the queue before a lease, over all servers.
//! - `follow`: a stream of events that outlives any node.
//! - [`backoff`]: waiting between attempts, full jitter.
//! - [`guard`]: until when a holder may act under a lease, and when it sends the next keepalive: pure.
//! - `look`: what one node says, whatever it is.
//! - [`clock`]: the clock that guards count by.
//! - [`error`]: what can come of it.
//! - [`page`]: lists, a page at a time or all at once.
//! - one file for each noun: `auth`, `sessions`, `templates`, `users`, `tokens`, `agents`, `commands`,
//!   `leases`, `events`, `cluster`.

mod agents;
mod auth;
pub mod backoff;
mod call;
mod candidacy;
pub mod clock;
mod cluster;
mod commands;
pub mod elector;
pub mod error;
mod events;
mod follow;
#[doc(hidden)]
pub mod fuzzing;
pub mod guard;
mod leases;
mod look;
pub mod page;
mod sessions;
mod sse;
mod templates;
mod tokens;
mod users;

pub use call::{Client, Consistency};
pub use commands::CommandFilter;
pub use elector::{LeaderElector, Leadership, Loss, Standing};
pub use error::Error;
pub use events::EventFilter;
pub use leases::{Leader, LeaseState};
pub use page::Page;
pub use regent_tls::{ClientConfig, Identity, Trust};
pub use sessions::{SessionFilter, Tagged};
