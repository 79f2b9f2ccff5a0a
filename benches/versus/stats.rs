//! Counting: latency histograms, medians and their spread.
//!
//! A [`Histogram`] has 128 buckets to each doubling, so a quantile is off by less than 0.8 %, whatever its size, and recording costs
//! an addition.
//!
//! ```text
//! 90 operations of 1 ms and 10 of 20 ms: quantile(0.5) = 1 ms, quantile(0.99) = 20 ms
//! ```

use std::time::Duration;

/// Buckets to a doubling, as a power of two.
const BITS: u32 = 7;
/// Enough buckets for every `u64` of nanoseconds.
const BUCKETS: usize = ((64 - BITS as usize) + 1) << BITS;

/// Latencies in nanoseconds, in buckets of less than 0.8 % width.
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
    max_ns: u64,
}

impl Histogram {
    pub fn new() -> Self {
        Self { counts: vec![0; BUCKETS], total: 0, max_ns: 0 }
    }

    pub fn record(&mut self, latency: Duration) {
        let ns = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        if let Some(count) = self.counts.get_mut(bucket(ns)) {
            *count += 1;
        }
        self.total += 1;
        self.max_ns = self.max_ns.max(ns);
    }

    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        self.total += other.total;
        self.max_ns = self.max_ns.max(other.max_ns);
    }

    /// The latency that the given share of operations stayed at or below, in microseconds; 0 when there were none.
    pub fn quantile_us(&self, share: f64) -> f64 {
        let rank = ((share * self.total as f64).ceil() as u64).max(1);
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank && *count > 0 {
                return (middle(index).min(self.max_ns as f64)) / 1000.0;
            }
        }
        0.0
    }

    pub fn max_us(&self) -> f64 {
        self.max_ns as f64 / 1000.0
    }
}

/// Values below 128 have a bucket each; above, the bucket is made of the value's doubling and its seven bits after the first.
fn bucket(ns: u64) -> usize {
    let shift = (u64::BITS - ns.leading_zeros()).saturating_sub(BITS + 1);
    ((shift as usize) << BITS) + (ns >> shift) as usize
}

/// The middle of the values that share a bucket.
fn middle(index: usize) -> f64 {
    let shift = (index >> BITS).saturating_sub(1);
    let low = ((index - (shift << BITS)) as u64) << shift;
    low as f64 + ((1_u64 << shift) - 1) as f64 / 2.0
}

/// The median of the values with their least and greatest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Spread {
    /// `None` for no values, and when one of them is not a number.
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let half = sorted.len() / 2;
        let upper = *sorted.get(half)?;
        let lower = if sorted.len().is_multiple_of(2) { *sorted.get(half - 1)? } else { upper };
        (min.is_finite() && max.is_finite()).then_some(Self { median: f64::midpoint(lower, upper), min, max })
    }
}

/// The median, or 0 for no values.
pub fn median(values: &[f64]) -> f64 {
    Spread::of(values).map_or(0.0, |spread| spread.median)
}

/// A small generator of even numbers (xorshift64*): the same seed gives the same load, and a draw costs a nanosecond.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        // Neighbouring seeds must not give neighbouring sequences, and zero would stay zero.
        Self(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`, which must not be 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }
}

#[cfg(test)]
#[allow(unused)] // See main.rs.
mod tests {
    use super::*;

    #[test]
    fn buckets_ascend_and_hold_their_values() {
        let mut last = 0;
        for ns in (0..10_000_u64).chain((14..64).flat_map(|bit| [(1 << bit) - 1, 1 << bit, (1 << bit) + (1 << (bit - 3))])) {
            let index = bucket(ns);
            assert!(index >= last && index < BUCKETS, "{ns} ns in bucket {index} after {last}");
            assert!((middle(index) - ns as f64).abs() <= ns as f64 / 128.0, "{ns} ns reads as {}", middle(index));
            last = index;
        }
        assert!(bucket(u64::MAX) < BUCKETS);
    }

    #[test]
    fn quantiles() {
        let mut histogram = Histogram::new();
        assert_eq!(histogram.quantile_us(0.99), 0.0);
        for _ in 0..90 {
            histogram.record(Duration::from_millis(1));
        }
        let mut slow = Histogram::new();
        for _ in 0..10 {
            slow.record(Duration::from_millis(20));
        }
        histogram.merge(&slow);
        for (share, ms) in [(0.5, 1.0), (0.9, 1.0), (0.91, 20.0), (0.99, 20.0), (1.0, 20.0)] {
            let us = histogram.quantile_us(share);
            assert!((us / 1000.0 - ms).abs() < ms * 0.01, "quantile {share} is {us} us");
        }
        assert_eq!(histogram.max_us(), 20_000.0);
    }

    #[test]
    fn spreads() {
        assert_eq!(Spread::of(&[]), None);
        assert_eq!(Spread::of(&[1.0, f64::NAN]), None);
        assert_eq!(Spread::of(&[3.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 3.0 }));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn random_numbers_stay_below_and_cover() {
        let mut rng = Rng::new(0);
        let mut seen = [0_u32; 10];
        for _ in 0..10_000 {
            seen[usize::try_from(rng.below(10)).unwrap()] += 1;
        }
        assert!(seen.iter().all(|count| (800..1200).contains(count)), "{seen:?}");
    }
}
