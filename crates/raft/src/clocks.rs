//! The clocks of the machine: the one place where they are read.
//!
//! Intervals within a node are tokio's (`tokio::time::Instant`); here is what must run on while the machine
//! is suspended (leases), and what people read. A simulation of several machines in one process puts its own
//! in place, each machine with another rate; a node cannot tell.

use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

/// One reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clocks {
    /// Milliseconds since an arbitrary moment, by a clock that runs during suspend.
    pub boot_ms: u64,
    /// Milliseconds since 1970.
    pub wall_ms: u64,
}

static SIMULATED: OnceLock<fn() -> Clocks> = OnceLock::new();

/// From now on the clocks of this process are what `read` says, where it is called.
///
/// # Panics
/// It was done before: two simulations in one process would read each other's clocks.
#[doc(hidden)]
pub fn simulate(read: fn() -> Clocks) {
    assert!(
        SIMULATED.set(read).is_ok(),
        "the clocks of a process are replaced once"
    );
}

/// Milliseconds by a clock that runs during suspend.
pub fn boot_ms() -> u64 {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    const CLOCK: rustix::time::ClockId = rustix::time::ClockId::Boottime;
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    const CLOCK: rustix::time::ClockId = rustix::time::ClockId::Monotonic;
    if let Some(read) = SIMULATED.get() {
        return read().boot_ms;
    }
    let now = rustix::time::clock_gettime(CLOCK);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds * 1_000 + nanos / 1_000_000
}

/// Milliseconds since 1970 by the wall clock.
pub fn wall_ms() -> u64 {
    if let Some(read) = SIMULATED.get() {
        return read().wall_ms;
    }
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX)
}
