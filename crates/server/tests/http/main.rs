//! REST from outside: a node alone in its cluster, in memory, asked over a real socket.
//!
//! Each test has a node of its own, on free ports, so tests run in parallel and in any order.

#![allow(clippy::unwrap_used)] // also outside of #[test]: all of it is a test

mod agents;
mod events;
mod leases;
mod limits;
mod sessions;
mod support;
mod surface;
mod users;
mod waiting;
