//! The clock that guards count by.
//!
//! It runs while the machine is suspended: a laptop that was closed for an hour must not believe that its
//! lease still stands. Its values are common to all processes of a machine since its last boot.

/// Milliseconds by a clock that only goes forward and runs during suspend (`CLOCK_BOOTTIME`). Only
/// differences mean anything.
pub fn boot_ms() -> u64 {
    #[cfg(any(target_os = "linux", target_os = "android"))]
    const CLOCK: rustix::time::ClockId = rustix::time::ClockId::Boottime;
    #[cfg(not(any(target_os = "linux", target_os = "android")))]
    const CLOCK: rustix::time::ClockId = rustix::time::ClockId::Monotonic;
    let now = rustix::time::clock_gettime(CLOCK);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds * 1_000 + nanos / 1_000_000
}
