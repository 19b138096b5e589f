//! Randomness from a seed: SplitMix64 (Steele, Lea, Flood 2014). For spreading load, never for secrets.

use std::time::Duration;

#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to `most`, both included.
    pub(crate) fn up_to(&mut self, most: Duration) -> Duration {
        // 32 bits of fraction: finer than a millisecond in any wait that the limits allow.
        let fraction = f64::from((self.next() >> 32) as u32) / f64::from(u32::MAX);
        most.mul_f64(fraction)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_spread_and_bounded() {
        let mut random = Random::new(1);
        let most = Duration::from_secs(10);
        let draws: Vec<_> = (0..1_000).map(|_| random.up_to(most)).collect();
        assert!(draws.iter().all(|draw| *draw <= most));
        for tenth in 0..10 {
            let (low, high) = (most / 10 * tenth, most / 10 * (tenth + 1));
            assert!(
                draws
                    .iter()
                    .filter(|draw| (low..high).contains(*draw))
                    .count()
                    > 50
            );
        }
    }
}
