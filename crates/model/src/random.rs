//! Counter-based random numbers: a value depends on (seed, stream, index) only, never on the order of calls.

/// Sixty-four well-mixed bits: two rounds of the SplitMix64 finalizer (Steele, Lea & Flood, 2014) over seed, stream and index.
pub(crate) fn bits(seed: u64, stream: u64, index: u64) -> u64 {
    const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
    let stream_key = mix(seed.wrapping_add(GOLDEN.wrapping_mul(stream.wrapping_add(1))));
    mix(stream_key.wrapping_add(GOLDEN.wrapping_mul(index.wrapping_add(1))))
}

/// Uniform on the open interval (0, 1), in steps of 2^-52.
pub(crate) fn uniform(seed: u64, stream: u64, index: u64) -> f64 {
    ((bits(seed, stream, index) >> 12) as f64 + 0.5) / (1u64 << 52) as f64
}

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

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
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

    #[test]
    fn streams_and_seeds_differ() {
        assert_ne!(bits(1, 2, 3), bits(1, 3, 2));
        assert_ne!(bits(1, 2, 3), bits(2, 1, 3));
        assert_eq!(bits(1, 2, 3), bits(1, 2, 3));
    }
}
