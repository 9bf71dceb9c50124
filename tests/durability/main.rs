//! Durability, by real processes: what was acknowledged is on disk before it is acknowledged; a disk that fails or
//! is full stops its node and nothing else; a crash at any moment loses nothing that was promised, and damage is
//! refused by name.
//!
//! strace sees what the process does to its files, and makes calls fail. Where it or a needed right is missing, a
//! test says so and passes, unless `REGENT_REQUIRE` lists the need.

// All of it is a test. What is measured goes to stderr.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod crash_points;
mod disk;
mod failing_sync;
mod full_disk;
#[path = "../blackbox/harness.rs"]
#[allow(dead_code, unreachable_pub)] // the black-box tests use the rest
mod harness;
mod ledger;
mod strace;
mod synced;
mod workload;
