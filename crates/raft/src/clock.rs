//! Cluster time: the clock that the leader stamps entries with.
//!
//! Pure: it is told the monotonic and the wall clock. Cluster time continues from the last time in the
//! state by the leader's monotonic clock, follows the leader's wall clock by at most [`SLEW_PERCENT`] of
//! the time that passed, and never goes back. So a leader whose wall clock is an hour ahead fires no
//! deadline early; it raises an alarm instead, and a person corrects the clock.

use std::time::Duration;

/// By how much cluster time may run faster or slower than the monotonic clock, in percent. Equals the
/// rate error (rho) that the leases allow for, so a slewing leader stays inside their margin.
pub(crate) const SLEW_PERCENT: u64 = 1;

/// Distance between cluster time and the wall clock that calls for a person, in milliseconds. NTP keeps
/// machines within a fraction of a second; ten seconds means that it does not run.
pub(crate) const ALARM_OFFSET_MS: u64 = 10_000;

/// One reading of the two clocks of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Instants {
    /// Monotonic time since an arbitrary start of the process.
    pub(crate) monotonic: Duration,
    /// Milliseconds since 1970 by the wall clock.
    pub(crate) wall_ms: u64,
}

/// What the clock says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reading {
    /// Cluster time in milliseconds.
    pub(crate) now_ms: u64,
    /// Wall clock minus cluster time in milliseconds.
    pub(crate) offset_ms: i64,
    /// The offset is beyond [`ALARM_OFFSET_MS`].
    pub(crate) alarm: bool,
}

/// Cluster time as this node continues it.
#[derive(Debug, Clone)]
pub(crate) struct ClusterClock {
    /// Monotonic time of the last reading.
    at: Duration,
    /// Cluster time then, in microseconds so that slewing by 1 % does not round away between readings; 0
    /// as long as there is none.
    micros: u64,
}

impl ClusterClock {
    /// Continues from `state_now` (milliseconds) at the monotonic time `at`. A state that has no time yet
    /// (0) gets the wall clock of its first leader: there is nothing whose deadline it could fire.
    pub(crate) fn new(state_now: u64, at: Duration) -> Self {
        Self {
            at,
            micros: state_now.saturating_mul(1_000),
        }
    }

    /// Advances by the time that passed alone, to at least `seen`: a node that does not lead must not pull
    /// cluster time towards its own wall clock.
    ///
    /// `seen` is what another node's clock shows now at the latest: an applied entry, or what the leader
    /// says of itself. It has the time that passed here in it already, so it is compared after that was
    /// added: a node that was frozen for an hour must not count that hour twice.
    pub(crate) fn follow(&mut self, instants: Instants, seen: u64) -> u64 {
        let elapsed = self.elapsed(instants);
        if self.micros != 0 {
            self.micros = self.micros.saturating_add(elapsed);
        }
        self.see(seen)
    }

    /// Advances by the time that passed and slews towards the wall clock, to at least `seen` (see
    /// [`Self::follow`]); for the leader.
    pub(crate) fn read(&mut self, instants: Instants, seen: u64) -> Reading {
        let mut elapsed = self.elapsed(instants);
        if self.micros == 0 {
            let begin = if seen == 0 { instants.wall_ms } else { seen };
            self.micros = begin.saturating_mul(1_000);
            elapsed = 0;
        }
        let natural = self.micros.saturating_add(elapsed);
        let budget = elapsed / 100 * SLEW_PERCENT + elapsed % 100 * SLEW_PERCENT / 100;
        let wall = instants.wall_ms.saturating_mul(1_000);
        self.micros = if wall >= natural {
            natural + (wall - natural).min(budget)
        } else {
            // Slower, never backwards: `budget` is at most 1 % of what was just added.
            natural - (natural - wall).min(budget)
        };
        let now_ms = self.see(seen);
        let offset_ms = i64::try_from(i128::from(instants.wall_ms) - i128::from(now_ms)).unwrap_or(i64::MAX);
        Reading {
            now_ms,
            offset_ms,
            alarm: offset_ms.unsigned_abs() > ALARM_OFFSET_MS,
        }
    }

    fn see(&mut self, ms: u64) -> u64 {
        self.micros = self.micros.max(ms.saturating_mul(1_000));
        self.micros / 1_000
    }

    /// Microseconds since the last reading.
    fn elapsed(&mut self, instants: Instants) -> u64 {
        let elapsed = instants.monotonic.saturating_sub(self.at);
        self.at = self.at.max(instants.monotonic);
        u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: u64 = 86_400_000;

    fn at(monotonic_ms: u64, wall_ms: u64) -> Instants {
        Instants {
            monotonic: Duration::from_millis(monotonic_ms),
            wall_ms,
        }
    }

    #[test]
    fn a_new_cluster_begins_at_the_wall_clock() {
        let mut clock = ClusterClock::new(0, Duration::from_millis(5));
        assert_eq!(clock.follow(at(5, DAY), 0), 0, "only a leader begins");
        assert_eq!(
            clock.read(at(5, DAY), 0),
            Reading {
                now_ms: DAY,
                offset_ms: 0,
                alarm: false
            }
        );
    }

    #[test]
    fn it_continues_from_the_state_and_slews_up_by_one_percent() {
        let mut clock = ClusterClock::new(DAY, Duration::from_millis(0));
        let reading = clock.read(at(100_000, DAY + 105_000), 0);
        assert_eq!(reading.now_ms, DAY + 101_000);
        assert!(!reading.alarm);
    }

    #[test]
    fn small_steps_slew_as_much_as_a_large_one() {
        let mut clock = ClusterClock::new(DAY, Duration::from_millis(0));
        let mut now = 0;
        for ms in 1..=100_000 {
            now = clock.read(at(ms, DAY + 5_000 + ms), 0).now_ms;
        }
        assert_eq!(now, DAY + 101_000);
    }

    #[test]
    fn it_slows_down_but_never_goes_back_when_the_wall_clock_is_behind() {
        let mut clock = ClusterClock::new(DAY, Duration::from_millis(0));
        let mut last = 0;
        for ms in 0..5_000 {
            let now = clock.read(at(ms, 1), 0).now_ms;
            assert!(now >= last, "{now} after {last}");
            last = now;
        }
        assert_eq!(last, DAY + 4_949);
    }

    /// A wall clock an hour ahead on a new leader must not fire every deadline at once.
    #[test]
    fn an_hour_ahead_raises_the_alarm_and_moves_nothing() {
        let mut clock = ClusterClock::new(DAY, Duration::from_millis(0));
        let reading = clock.read(at(1_000, DAY + 3_601_000), 0);
        assert_eq!(reading.now_ms, DAY + 1_010);
        assert!(reading.alarm);
    }

    #[test]
    fn what_others_stamped_is_never_undercut() {
        let mut clock = ClusterClock::new(DAY, Duration::from_millis(0));
        assert_eq!(clock.read(at(10, DAY + 10), DAY + 700).now_ms, DAY + 700);
        assert_eq!(clock.read(at(20, DAY + 710), DAY).now_ms, DAY + 710);
    }

    /// A follower that was frozen, or whose clock nobody asked for an hour, and then sees the leader's
    /// time: that time has the hour in it. Counted twice it would fire every deadline once it leads.
    #[test]
    fn time_that_passed_elsewhere_too_is_counted_once() {
        const HOUR: u64 = 3_600_000;
        for lead in [false, true] {
            let mut clock = ClusterClock::new(DAY, Duration::from_millis(0));
            let instants = at(HOUR, DAY + HOUR);
            let now = if lead {
                clock.read(instants, DAY + HOUR).now_ms
            } else {
                clock.follow(instants, DAY + HOUR)
            };
            assert_eq!(now, DAY + HOUR);
            assert_eq!(clock.follow(instants, DAY + HOUR), DAY + HOUR);
        }
    }

    #[test]
    fn the_time_before_the_first_reading_is_not_in_the_wall_clock_again() {
        let mut clock = ClusterClock::new(0, Duration::from_millis(0));
        assert_eq!(clock.read(at(9_000, DAY), 0).now_ms, DAY);
        assert_eq!(
            ClusterClock::new(0, Duration::ZERO)
                .read(at(9_000, DAY), 7)
                .now_ms,
            7
        );
    }

    #[test]
    fn a_follower_ignores_its_wall_clock() {
        let mut clock = ClusterClock::new(DAY, Duration::from_millis(0));
        assert_eq!(clock.follow(at(1_000, DAY + 3_600_000), 0), DAY + 1_000);
    }

    #[test]
    fn a_monotonic_clock_read_out_of_order_changes_nothing() {
        let mut clock = ClusterClock::new(DAY, Duration::from_millis(50));
        let first = clock.read(at(60, DAY + 10), 0).now_ms;
        assert_eq!(clock.read(at(55, DAY + 5), 0).now_ms, first);
    }
}
