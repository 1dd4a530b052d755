//! A hasher for keys that are numbers, most of them hashes already: one multiplication spreads them over the table.

use std::hash::{BuildHasherDefault, Hasher};

/// For `HashMap<K, V, Fold>` with keys of numbers; not for keys that others choose.
pub(crate) type Fold = BuildHasherDefault<FoldHasher>;

#[derive(Default)]
pub(crate) struct FoldHasher(u64);

impl FoldHasher {
    fn fold(&mut self, value: u64) {
        let mixed = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 32);
    }
}

impl Hasher for FoldHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.fold(u64::from(*byte));
        }
    }

    fn write_u32(&mut self, value: u32) {
        self.fold(u64::from(value));
    }

    fn write_u64(&mut self, value: u64) {
        self.fold(value);
    }

    fn write_i128(&mut self, value: i128) {
        self.fold(value as u64);
    }
}
