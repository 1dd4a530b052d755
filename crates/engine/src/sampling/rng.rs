//! Counter-based random numbers: the draw for token n of a request depends on its seed and on n, on nothing else.

/// A number in [0, 1) with 53 bits, from `seed` and `position`.
pub fn uniform(seed: u64, position: u64) -> f64 {
    let block = philox(
        [position as u32, (position >> 32) as u32, 0, 0],
        [seed as u32, (seed >> 32) as u32],
    );
    let bits = (u64::from(block[1]) << 32) | u64::from(block[0]);
    (bits >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

/// Philox 4x32 with 10 rounds. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
    const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    for _ in 0..10 {
        let first = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let second = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [
            (second >> 32) as u32 ^ counter[1] ^ key[0],
            second as u32,
            (first >> 32) as u32 ^ counter[3] ^ key[1],
            first as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers published with the Random123 library.
    #[test]
    fn philox_gives_the_published_answers() {
        assert_eq!(
            philox([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
    }

    #[test]
    fn uniform_stays_below_one_and_depends_on_both_inputs() {
        let draws: Vec<f64> = (0..100).map(|position| uniform(1, position)).collect();
        assert!(draws.iter().all(|x| (0.0..1.0).contains(x)));
        assert_ne!(uniform(1, 0), uniform(1, 1));
        assert_ne!(uniform(1, 0), uniform(2, 0));
    }
}
