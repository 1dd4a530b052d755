//! Inverted dropout: each element is zero with some chance, the others are scaled up so that the mean stays.
//!
//! An element's fate depends on (seed, stream, index) alone, so the backward pass is the same call on the gradient. Four
//! neighbours share one random number, 15 of its 64 bits each: making the numbers is what dropout costs on a GPU.
//! No op of its own: [`super::low_rank`] drops what it reads, in registers.

use crate::random;

/// What is dropped.
#[derive(Debug, Clone, Copy)]
pub struct Dropout {
    /// Share of elements that become zero, 0 or more and less than 1; rounded to a multiple of 2^-15.
    pub rate: f32,
    /// Of a pass.
    pub seed: u64,
    /// Of a place within the pass, so that no two places drop the same pattern.
    pub stream: u64,
}

impl Dropout {
    /// Elements whose 15 random bits, as a number, are below this are dropped: not all of them, whatever the rate.
    pub(super) fn threshold(&self) -> u32 {
        (f64::from(self.rate) * 32768.0).round().min(32767.0) as u32
    }

    /// One over the share that is kept, so that the mean stays exactly.
    pub(super) fn keep_scale(&self) -> f32 {
        32768.0 / (32768 - self.threshold()) as f32
    }

    /// What the elements of one stream and seed have in common.
    pub(super) fn key(&self) -> u64 {
        random::key(self.seed, self.stream)
    }

    /// Drops among values of which the first is element `first` of its tensor.
    #[inline(always)]
    pub(super) fn apply(&self, values: &mut [f32], first: u64) {
        let (key, threshold, scale) = (self.key(), self.threshold(), self.keep_scale());
        let drop = |value: &mut f32, bits: u64| {
            let kept = (bits & 0x7fff) as u32 >= threshold;
            *value = if kept { *value * scale } else { 0.0 };
        };
        let n_before = (first.wrapping_neg() % 4).min(values.len() as u64);
        let (before, fours) = values.split_at_mut(n_before as usize);
        for (i, value) in (first..).zip(before) {
            drop(value, random::bits_of(key, i / 4) >> (16 * (i % 4)));
        }
        for (four, values) in ((first + n_before) / 4..).zip(fours.chunks_mut(4)) {
            let bits = random::bits_of(key, four);
            for (j, value) in values.iter_mut().enumerate() {
                drop(value, bits >> (16 * j));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::ops::testing::tensor;

    const DROPOUT: Dropout = Dropout {
        rate: 0.3,
        seed: 17,
        stream: 5,
    };

    #[test]
    fn an_element_is_dropped_where_its_bits_are_below_the_rate() {
        for rate in [0.0, 0.05, 0.3, 0.999, 0.999_999] {
            let dropout = Dropout { rate, ..DROPOUT };
            let x = tensor(&[70_001], 1, DType::F32);
            let mut y = x.f32s().to_vec();
            dropout.apply(&mut y, 0);
            let below = (f64::from(rate) * 32768.0).round().min(32767.0);
            let scale = (32768.0 / (32768.0 - below)) as f32;
            for (i, (y, x)) in (0u64..).zip(y.iter().zip(x.f32s())) {
                let bits = random::bits(17, 5, i / 4) >> (16 * (i % 4)) & 0x7fff;
                let want = if (bits as f64) < below {
                    0.0
                } else {
                    x * scale
                };
                assert_eq!(*y, want, "{i}");
            }
        }
    }

    #[test]
    fn a_part_of_a_tensor_is_dropped_as_in_the_whole() {
        let x = tensor(&[64], 1, DType::F32);
        let mut whole = x.f32s().to_vec();
        DROPOUT.apply(&mut whole, 0);
        for (first, len) in [(0, 64), (1, 2), (3, 17), (5, 0), (62, 2)] {
            let mut part = x.f32s()[first..first + len].to_vec();
            DROPOUT.apply(&mut part, first as u64);
            assert_eq!(part, whole[first..first + len]);
        }
    }

    #[test]
    fn the_mean_stays() {
        let n = 100_000;
        let mut y = vec![1.0; n];
        DROPOUT.apply(&mut y, 0);
        let zeros = y.iter().filter(|y| **y == 0.0).count();
        let mean = y.iter().sum::<f32>() / n as f32;
        assert!((zeros as f64 / n as f64 - 0.3).abs() < 0.01, "{zeros}");
        assert!((mean - 1.0).abs() < 0.01, "{mean}");
    }
}
