//! A whole cluster in one thread: the real server on simulated machines, with a simulated network between them.
//!
//! Everything that decides anything is the shipped code: REST, gateway, lease clock, reconcilers, openraft, log
//! writer, snapshots. What is simulated is around it, from the bottom up:
//! - [`machine`]: a machine has a tokio runtime with a clock of its own, which runs a little fast or slow. It can be
//!   switched off (everything in its memory is gone), frozen and thawed.
//! - [`network`]: connections between machines, with delays, partitions in either direction, and what TCP does
//!   about them.
//! - the disk is `regent_raft::MemoryDisk`, which forgets what was not synced, and snapshot files.
//! - [`trouble`]: what goes wrong and when, all drawn from the seed.
//! - [`clients`]: what the cluster is asked for, over HTTP and WebSocket, and what was answered.
//! - [`observe`]: what the nodes say of themselves, from outside, every millisecond.
//! - [`run`]: one seed from the beginning to the verdict of `regent_history`.
//!
//! One seed is one process: what is global in a process (the sequence of random numbers, clocks, counters) then
//! begins anew with each seed, and one that fails takes nobody along. How far that makes it deterministic stands in
//! `docs/decisions/0022-deterministic-simulation.md`.

pub mod clients;
pub mod cluster;
pub mod machine;
pub mod network;
pub mod observe;
pub mod run;
pub mod trace;
pub mod trouble;

/// Breaks a rule in this whole process: see `regent_state::faults`.
///
/// # Errors
/// There is no such rule, or this build cannot.
pub fn seed_fault(name: &str) -> Result<(), String> {
    let fault: regent_state::faults::Fault = name.parse()?;
    #[cfg(feature = "faults")]
    {
        regent_state::faults::seed(Some(fault));
        Ok(())
    }
    #[cfg(not(feature = "faults"))]
    Err(format!(
        "this build cannot break {fault}: it lacks the feature `faults`"
    ))
}
