//! Stands in for the crate of this name, which openraft counts its batches with. That one fills tables for sixteen
//! resolutions on first use, 26 MB a process, of which openraft needs 2 KB; this one has none. It offers what openraft
//! calls, and is coarser: a value counts for the power of two below it.

use std::fmt;
use std::marker::PhantomData;

/// One count for every number of bits that a value can have.
const BUCKETS: usize = u64::BITS as usize + 1;

/// How often values of each size were recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Histogram<T = ()> {
    counts: [u64; BUCKETS],
    slots: PhantomData<T>,
}

impl<T> Histogram<T> {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self {
            counts: [0; BUCKETS],
            slots: PhantomData,
        }
    }

    /// Counts a value.
    pub fn record(&mut self, value: u64) {
        self.record_n(value, 1);
    }

    /// Counts a value several times.
    pub fn record_n(&mut self, value: u64, times: u64) {
        let bits = u64::BITS - value.leading_zeros();
        self.counts[bits as usize] += times;
    }

    /// What was recorded, summed up.
    #[must_use]
    pub fn percentile_stats(&self) -> PercentileStats {
        let samples: u64 = self.counts.iter().sum();
        let per_mille = |share: u64| {
            let rank = (samples * share).div_ceil(1_000);
            let mut below = 0;
            let bucket = self.counts.iter().position(|count| {
                below += count;
                *count > 0 && below >= rank
            });
            match bucket {
                None | Some(0) => 0,
                Some(bits) => 1 << (bits - 1),
            }
        };
        PercentileStats {
            samples,
            p50: per_mille(500),
            p90: per_mille(900),
            p99: per_mille(990),
            p99_9: per_mille(999),
        }
    }
}

impl<T> Default for Histogram<T> {
    fn default() -> Self {
        Self::new()
    }
}

/// A histogram summed up. Each value is the power of two below the one that was recorded, or zero.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PercentileStats {
    /// Values recorded.
    pub samples: u64,
    /// The median.
    pub p50: u64,
    /// Nine of ten values are not above it.
    pub p90: u64,
    /// 99 of 100.
    pub p99: u64,
    /// 999 of 1,000.
    pub p99_9: u64,
}

impl fmt::Display for PercentileStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            samples,
            p50,
            p90,
            p99,
            p99_9,
        } = self;
        write!(f, "[n={samples} p50={p50} p90={p90} p99={p99} p99.9={p99_9}]")
    }
}

/// Histograms beside each other.
#[derive(Debug, Clone, Default)]
pub struct AsciiChart(Vec<(String, PercentileStats)>);

impl AsciiChart {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// With one more.
    #[must_use]
    #[expect(clippy::needless_pass_by_value)] // as openraft calls it
    pub fn add(mut self, name: impl Into<String>, histogram: Histogram) -> Self {
        self.0.push((name.into(), histogram.percentile_stats()));
        self
    }
}

impl fmt::Display for AsciiChart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0
            .iter()
            .try_for_each(|(name, stats)| writeln!(f, "{name} {stats}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_counts_for_the_power_of_two_below_it() {
        let mut histogram = Histogram::<()>::new();
        assert_eq!(histogram.percentile_stats(), PercentileStats::default());
        histogram.record(0);
        assert_eq!(histogram.percentile_stats().p99_9, 0);
        histogram.record_n(5, 989);
        histogram.record_n(u64::MAX, 10);
        let PercentileStats {
            samples,
            p50,
            p90,
            p99,
            p99_9,
        } = histogram.percentile_stats();
        assert_eq!((samples, p50, p90, p99, p99_9), (1_000, 4, 4, 4, 1 << 63));
    }
}
