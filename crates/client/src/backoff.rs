//! How long to wait before the next attempt: full jitter, as in "Exponential Backoff And Jitter" (AWS
//! Architecture Blog, 2015).
//!
//! Each wait is drawn evenly from zero to a ceiling that doubles. The usual alternative, a fixed wait plus
//! some jitter, lets all who lost the same node come back in one wave.

use std::time::Duration;

/// Doublings after which the ceiling is at its maximum for any sensible setting.
const MAX_DOUBLINGS: u32 = 20;

/// A sequence of waits.
#[derive(Debug, Clone)]
pub struct FullJitter {
    first: Duration,
    longest: Duration,
    taken: u32,
}

impl FullJitter {
    /// Waits whose ceiling starts at `first` and doubles up to `longest`.
    pub fn new(first: Duration, longest: Duration) -> Self {
        Self {
            first,
            longest,
            taken: 0,
        }
    }

    /// The largest wait that the next one can be.
    pub fn ceiling(&self) -> Duration {
        self.first
            .saturating_mul(1 << self.taken.min(MAX_DOUBLINGS))
            .min(self.longest)
    }

    /// The next wait.
    pub fn next_delay(&mut self) -> Duration {
        let ceiling = self.ceiling();
        self.taken = self.taken.saturating_add(1);
        ceiling.mul_f64(rand::random::<f64>())
    }

    /// Starts over, after a success.
    pub fn reset(&mut self) {
        self.taken = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ceiling_doubles_up_to_its_bound_and_no_wait_is_above_it() {
        let mut backoff = FullJitter::new(Duration::from_millis(100), Duration::from_secs(5));
        let mut ceilings = Vec::new();
        for _ in 0..100 {
            let ceiling = backoff.ceiling();
            assert!(backoff.next_delay() <= ceiling);
            ceilings.push(ceiling.as_millis());
        }
        assert_eq!(ceilings[..8], [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(ceilings[99], 5000);
        backoff.reset();
        assert_eq!(backoff.ceiling(), Duration::from_millis(100));
    }
}
