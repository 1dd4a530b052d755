//! Seeded choices that need no state: every stream of numbers is named by what it is for, so a resumed run asks again and gets the same.

use kernel::random::{GOLDEN, mix};

/// What a stream of random numbers is for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Purpose {
    /// Which documents a fractional weight draws in an epoch.
    Remainder = 1,
    /// Order of documents in an epoch.
    Documents,
    /// Order of rows in an epoch.
    Rows,
    /// Choice of the train probe.
    Probe,
    /// First values of adapters.
    Adapter,
    /// Dropout of a micro-batch.
    Dropout,
}

/// The seed of one stream: `seed` is the run's, `a` and `b` number the epoch, step or source.
pub(crate) fn derive(seed: u64, purpose: Purpose, a: u64, b: u64) -> u64 {
    [purpose as u64, a, b]
        .into_iter()
        .fold(mix(seed), |state, part| {
            mix(state ^ mix(part.wrapping_add(GOLDEN)))
        })
}

/// SplitMix64 (Steele, Lea, Flood 2014).
#[derive(Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Rng(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        mix(self.0)
    }

    /// Fisher-Yates. The bound is taken by multiplication; its bias is below n / 2^64.
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let pick = (u128::from(self.next()) * (last as u128 + 1)) >> 64;
            items.swap(last, pick as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splitmix_gives_its_published_numbers() {
        let mut rng = Rng::new(1234567);
        let got: Vec<u64> = (0..3).map(|_| rng.next()).collect();
        assert_eq!(
            got,
            [
                6457827717110365317,
                3203168211198807973,
                9817491932198370423
            ]
        );
    }

    #[test]
    fn shuffle_keeps_every_item() {
        let mut items: Vec<u32> = (0..100).collect();
        Rng::new(7).shuffle(&mut items);
        assert_ne!(items, (0..100).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn streams_differ_by_purpose_and_number() {
        let seeds = [
            derive(7, Purpose::Rows, 0, 0),
            derive(7, Purpose::Documents, 0, 0),
            derive(7, Purpose::Rows, 1, 0),
            derive(7, Purpose::Rows, 0, 1),
            derive(8, Purpose::Rows, 0, 0),
        ];
        for (i, a) in seeds.iter().enumerate() {
            assert!(seeds[i + 1..].iter().all(|b| a != b));
        }
    }
}
