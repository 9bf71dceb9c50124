//! Agents on real engines, black-box: the real binary, real nodes, real containers and pods.
//!
//! What each runtime owes whoever runs sessions is written once (`owed`), for a [`stage::Stage`], and runs over each of
//! them; what only one of them has is in a module of its own.

// All of it is a test. What is measured goes to stderr.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod compose;
mod docker;
#[path = "../docker/engine.rs"]
#[allow(dead_code, unreachable_pub, clippy::print_stdout)] // the tests of agent-docker use the rest
mod engine;
#[path = "../blackbox/harness.rs"]
#[allow(dead_code)] // the black-box tests use the rest
mod harness;
mod image;
mod kubernetes;
mod manifests;
mod owed;
mod stack;
mod stage;
mod swarm;
mod units;
