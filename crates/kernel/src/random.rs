//! Counter-based random numbers: a value depends on (seed, stream, index) only, never on the order of calls or on the device.

/// What SplitMix64 adds for each number: 2^64 over the golden ratio.
pub const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// Sixty-four well-mixed bits: two rounds of the SplitMix64 finalizer (Steele, Lea & Flood, 2014) over seed, stream and index.
#[inline(always)]
pub fn bits(seed: u64, stream: u64, index: u64) -> u64 {
    bits_of(key(seed, stream), index)
}

/// Uniform on the open interval (0, 1), in steps of 2^-52.
#[inline(always)]
pub fn uniform(seed: u64, stream: u64, index: u64) -> f64 {
    ((bits(seed, stream, index) >> 12) as f64 + 0.5) / (1u64 << 52) as f64
}

/// What [`bits`] of one stream have in common; kernels get it as an argument.
#[inline(always)]
pub(crate) fn key(seed: u64, stream: u64) -> u64 {
    mix(seed.wrapping_add(GOLDEN.wrapping_mul(stream.wrapping_add(1))))
}

/// The key that gives `index` the bits that `key` gives `first + index`.
#[inline(always)]
pub(crate) fn key_from(key: u64, first: u64) -> u64 {
    key.wrapping_add(GOLDEN.wrapping_mul(first))
}

/// [`bits`] from its [`key`]; `random_bits` of the kernels' prelude is the same function.
#[inline(always)]
pub(crate) fn bits_of(key: u64, index: u64) -> u64 {
    mix(key.wrapping_add(GOLDEN.wrapping_mul(index.wrapping_add(1))))
}

/// The finalizer of SplitMix64.
#[inline(always)]
pub fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_and_seeds_differ() {
        assert_ne!(bits(1, 2, 3), bits(1, 3, 2));
        assert_ne!(bits(1, 2, 3), bits(2, 1, 3));
        assert_eq!(bits(1, 2, 3), bits(1, 2, 3));
    }

    #[test]
    fn a_later_key_goes_on_where_the_first_is() {
        let key = key(7, 3);
        for first in [0, 1, 8_388_608, u64::MAX - 5] {
            for index in 0..20_u64 {
                let want = bits_of(key, first.wrapping_add(index));
                assert_eq!(bits_of(key_from(key, first), index), want);
            }
        }
    }

    #[test]
    fn uniform_has_mean_one_half() {
        let n = 100_000;
        let mean = (0..n).map(|i| uniform(7, 3, i)).sum::<f64>() / n as f64;
        assert!((mean - 0.5).abs() < 0.01, "{mean}");
    }
}
