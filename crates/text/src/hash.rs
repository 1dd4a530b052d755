//! A fast hash for words and tokens: eight bytes a multiplication; not for keys that an attacker chooses to collide.

const LENGTH: u64 = 0x9e37_79b9_7f4a_7c15;
const MIX: u64 = 0xd6e8_feb8_6659_fd93;

pub(crate) fn of(bytes: &[u8]) -> u64 {
    let mut state = (bytes.len() as u64).wrapping_mul(LENGTH);
    let (chunks, tail) = bytes.as_chunks::<8>();
    for chunk in chunks {
        state = fold(state ^ u64::from_le_bytes(*chunk), MIX);
    }
    let mut last = [0; 8];
    last[..tail.len()].copy_from_slice(tail);
    fold(state ^ u64::from_le_bytes(last), MIX)
}

/// Both halves of a product, one over the other: every bit of either factor reaches every bit of the result.
pub(crate) fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a ^ LENGTH) * u128::from(b);
    (product as u64) ^ ((product >> 64) as u64)
}
