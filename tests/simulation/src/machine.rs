//! A machine: a runtime, a clock that runs a little fast or slow, and a switch.
//!
//! Each machine has a tokio runtime of one thread whose time is paused, so tokio moves it from timer to timer as soon
//! as nothing can run. The simulation lets every machine run up to the same moment, one after the other, and then
//! moves on by [`TICK_MS`]. A machine whose clock is fast has a little more time to go through in each step, so every
//! timer on it is early: sleeps, timeouts of elections, the lease clock. Nothing in the code under test can tell.

use std::cell::Cell;
use std::future::Future;
use std::time::Duration;

use regent_raft::clocks::Clocks;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::time::Instant;

/// How far time moves in one step, in milliseconds. No message arrives within the step in which it was sent, so the
/// order in which machines run within a step makes no difference to any of them.
pub const TICK_MS: u64 = 1;

/// Wall time at the beginning of every simulation: 2025-01-01.
const WALL_AT_START_MS: i64 = 1_735_689_600_000;

const MILLION: u64 = 1_000_000;

thread_local! {
    /// The clocks of the machine that runs now.
    static RUNNING: Cell<Option<Reading>> = const { Cell::new(None) };
}

#[derive(Clone, Copy)]
struct Reading {
    /// Its boot clock when its runtime began, and that moment as tokio has it.
    started_ms: u64,
    started: Instant,
    wall_offset_ms: i64,
}

/// Puts the clocks of the simulated machines in place of this machine's, once in a process.
pub fn simulate_clocks() {
    regent_raft::clocks::simulate(|| {
        let Some(reading) = RUNNING.get() else {
            return Clocks {
                boot_ms: 0,
                wall_ms: 0,
            };
        };
        let boot_ms = reading.started_ms + millis(reading.started.elapsed());
        let wall = i64::try_from(boot_ms).unwrap_or(i64::MAX) + reading.wall_offset_ms;
        Clocks {
            boot_ms,
            wall_ms: u64::try_from(wall).unwrap_or(0),
        }
    });
}

/// Milliseconds by the boot clock of the machine that runs now.
pub fn boot_ms() -> u64 {
    regent_raft::clocks::boot_ms()
}

/// A clock against that of the simulation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Parts per million by which it is fast (or slow, if negative).
    pub ppm: i32,
    /// What it showed at the beginning.
    pub offset_ms: u64,
}

impl Rate {
    /// What it shows at `now`.
    pub fn local(self, now: u64) -> u64 {
        let parts = MILLION.saturating_add_signed(i64::from(self.ppm));
        self.offset_ms + now * parts / MILLION
    }

    /// The moment from which on it shows `local` or more.
    pub fn when(self, local: u64) -> u64 {
        let parts = MILLION.saturating_add_signed(i64::from(self.ppm));
        (local.saturating_sub(self.offset_ms) * MILLION).div_ceil(parts)
    }
}

/// A machine.
pub struct Machine {
    /// For people.
    pub name: String,
    /// Its clock.
    pub rate: Rate,
    wall_offset_ms: i64,
    on: Option<On>,
    frozen: bool,
}

struct On {
    runtime: Runtime,
    started: Instant,
    started_ms: u64,
}

impl Machine {
    /// One that is switched off.
    pub fn new(name: String, rate: Rate, wall_wrong_by_ms: i64) -> Self {
        let shown = i64::try_from(rate.offset_ms).unwrap_or(0);
        Self {
            name,
            rate,
            wall_offset_ms: WALL_AT_START_MS - shown + wall_wrong_by_ms,
            on: None,
            frozen: false,
        }
    }

    /// Whether it runs or is frozen.
    pub fn is_on(&self) -> bool {
        self.on.is_some()
    }

    /// Whether it stands still.
    pub fn is_frozen(&self) -> bool {
        self.frozen
    }

    /// Switches it on at `now` and begins `software` there.
    ///
    /// # Panics
    /// The operating system gives no runtime.
    pub fn switch_on(&mut self, now: u64, software: impl Future<Output = ()> + Send + 'static) {
        // Only time: what would wait for a socket or a thread waits for the real world.
        let runtime = Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime without a driver for sockets needs nothing");
        let started = {
            let _inside = runtime.enter();
            Instant::now()
        };
        let on = On {
            runtime,
            started,
            started_ms: self.rate.local(now),
        };
        self.frozen = false;
        RUNNING.set(Some(self.reading(&on)));
        on.runtime.spawn(software);
        RUNNING.set(None);
        self.on = Some(on);
    }

    /// Takes everything from it that is not on its disk. What is dropped on the way may still close connections; for
    /// a machine that loses its power the network is told before.
    pub fn switch_off(&mut self) {
        self.frozen = false;
        if let Some(on) = self.on.take() {
            RUNNING.set(Some(self.reading(&on)));
            on.runtime.shutdown_background();
            RUNNING.set(None);
        }
    }

    /// Stands still from now on; its clocks go on.
    pub fn freeze(&mut self) {
        self.frozen = self.is_on();
    }

    /// Goes on: to what runs there no time has passed between two instructions, but the clock has jumped.
    pub fn thaw(&mut self, now: u64) {
        if !std::mem::take(&mut self.frozen) {
            return;
        }
        let target = self.rate.local(now);
        if let Some(on) = &self.on {
            RUNNING.set(Some(self.reading(on)));
            on.runtime.block_on(async {
                let missed = (target - on.started_ms).saturating_sub(millis(on.started.elapsed()));
                // Would otherwise go from timer to timer, and each would be on time.
                tokio::time::advance(Duration::from_millis(missed)).await;
            });
            RUNNING.set(None);
        }
    }

    /// Moves its wall clock, which nothing may depend on.
    pub fn jump_wall_clock(&mut self, by_ms: i64) {
        self.wall_offset_ms += by_ms;
    }

    /// Runs it up to the moment `until`.
    pub fn run(&self, until: u64) {
        let Some(on) = self.on.as_ref().filter(|_| !self.frozen) else {
            return;
        };
        let until = on.started + Duration::from_millis(self.rate.local(until).saturating_sub(on.started_ms));
        RUNNING.set(Some(self.reading(on)));
        on.runtime
            .block_on(async { tokio::time::sleep_until(until).await });
        RUNNING.set(None);
    }

    /// Its runtime, if it is switched on.
    pub fn handle(&self) -> Option<&Handle> {
        self.on.as_ref().map(|on| on.runtime.handle())
    }

    fn reading(&self, on: &On) -> Reading {
        Reading {
            started_ms: on.started_ms,
            started: on.started,
            wall_offset_ms: self.wall_offset_ms,
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_fast_is_early() {
        let rate = Rate {
            ppm: 5_000,
            offset_ms: 10,
        };
        assert_eq!(rate.local(0), 10);
        assert_eq!(rate.local(200_000), 10 + 201_000);
        for local in [10, 11, 500, 77_777] {
            let when = rate.when(local);
            assert!(rate.local(when) >= local);
            assert!(when == 0 || rate.local(when - 1) < local);
        }
    }
}
