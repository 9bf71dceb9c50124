//! Black-box tests: the real binary, real processes, real signals. Each test starts a cluster of
//! its own with `regent dev` on free ports and waits on conditions, never on time.

// Also outside of #[test]: all of it is a test. What they measure goes to stderr.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod agent_restart;
mod auth;
mod bad_input;
mod cli;
mod commands_while_away;
mod connections;
mod cut_off;
mod data_folder;
mod events;
mod first_steps;
#[allow(dead_code)] // the tests of elections, durability and engines use the rest
mod harness;
mod idempotency;
mod keepalives;
mod lease_hold;
mod leases;
mod liveness;
mod manual;
mod membership;
mod node_loss;
mod nothing_left;
mod openapi;
mod placement;
mod process;
mod recovery;
mod replicas;
mod secured;
mod smoke;
mod steady;
mod streamspace;
mod streamspace_faults;
mod tls;
mod traces;
mod transfer;
mod v2_agent;
mod wire;
mod workload;
mod writers;
