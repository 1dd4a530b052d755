//! Counter-based random numbers as [`kernel::random`] has them, and normal ones.

pub(crate) use kernel::random::{bits, uniform};

/// Mean 0, variance 1: the sum of twelve uniforms of 16 bits each, less its mean.
/// Only additions, so that every platform gets the same bits; nothing lies beyond six standard deviations.
pub(crate) fn normal(seed: u64, stream: u64, index: u64) -> f64 {
    let mut sum = 0u64;
    for word in 0..3 {
        let mut word_bits = bits(seed, stream, 3 * index + word);
        for _ in 0..4 {
            sum += word_bits & 0xFFFF;
            word_bits >>= 16;
        }
    }
    (sum as f64 + 6.0) / 65536.0 - 6.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_has_mean_zero_and_variance_one() {
        let n = 200_000;
        let values: Vec<f64> = (0..n).map(|i| normal(7, 3, i)).collect();
        let mean = values.iter().sum::<f64>() / n as f64;
        let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n as f64;
        assert!(mean.abs() < 0.01, "{mean}");
        assert!((variance - 1.0).abs() < 0.01, "{variance}");
    }
}
