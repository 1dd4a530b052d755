//! Byte-pair encoding of one word, on ids alone: the pair of lowest rank is joined, the leftmost of equals, until none is left.
//! Own code because the `tokenizers` crate takes most of a second to set up and works on spelled characters with their offsets;
//! that crate is the oracle of the tests.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::error::{Error, Result};
use crate::spelling::char_of;
use crate::vocab::Vocab;

/// Bits of an id and of a rank in a slot of the table.
const ID_BITS: u32 = 22;
const RANK_BITS: u32 = 20;
/// Most ids and merges that the table can hold.
pub(crate) const MAX_IDS: usize = 1 << ID_BITS;
pub(crate) const MAX_MERGES: usize = (1 << RANK_BITS) - 1;
const NO_RANK: u32 = u32::MAX;
const EMPTY: u64 = u64::MAX;
/// Up to here a search block by block for the lowest rank beats a heap.
const BLOCK_TOKENS: usize = 256;
/// Pairs of a block.
const BLOCK: usize = 16;
/// A pair that no merge joins; above every other key.
const NO_KEY: i32 = i32::MAX;

/// The merges of a vocabulary.
#[derive(Clone, Debug)]
pub(crate) struct Bpe {
    /// Open addressing: left id, right id, rank; or `EMPTY`. A power of two long, at most half full.
    slots: Vec<u64>,
    /// A Bloom filter of the pairs in `slots`, a sixteenth as large: most pairs asked for are none, and this much stays in a core's own cache.
    filter: Vec<u64>,
    /// Result of each merge, by rank.
    results: Vec<u32>,
}

impl Bpe {
    /// `merges`: left, right and result, best first; of two merges of the same pair the later one counts.
    pub fn new(merges: &[[u32; 3]]) -> Bpe {
        assert!(merges.len() <= MAX_MERGES, "the caller has checked it");
        let mut bpe = Bpe {
            slots: vec![EMPTY; (2 * merges.len()).next_power_of_two().max(2)],
            filter: vec![0; (merges.len() / 8).next_power_of_two()],
            results: merges.iter().map(|m| m[2]).collect(),
        };
        for (rank, [left, right, _]) in merges.iter().enumerate() {
            let pair = pair(*left, *right);
            let slot = bpe.slot(pair);
            bpe.slots[slot] = pair << RANK_BITS | rank as u64;
            let (place, bits) = bpe.filter_bits(pair);
            bpe.filter[place] |= bits;
        }
        bpe
    }

    /// Left and right of every merge, best first.
    pub fn merges(&self) -> Vec<(u32, u32)> {
        let mut merges: Vec<u64> = self.slots.iter().copied().filter(|s| *s != EMPTY).collect();
        let rank = |slot: &u64| slot & ((1 << RANK_BITS) - 1);
        merges.sort_unstable_by_key(rank);
        let parts = |slot: u64| {
            let pair = slot >> RANK_BITS;
            (
                (pair >> ID_BITS) as u32,
                (pair & ((1 << ID_BITS) - 1)) as u32,
            )
        };
        merges.into_iter().map(parts).collect()
    }

    /// Joins what can be joined among the ids behind `start`, whose pairs have the ranks that `ranks` gives in order.
    fn join(&self, ids: &mut Vec<u32>, start: usize, ranks: impl Iterator<Item = u32>) {
        let (n, joined) = (ids.len() - start, &mut ids[start..]);
        let n_left = match n {
            0 | 1 => return,
            // Most words are short, and so is what is laid out for them.
            _ if n <= BLOCK => self.join_by_blocks::<1>(joined, ranks),
            _ if n <= 4 * BLOCK => self.join_by_blocks::<4>(joined, ranks),
            _ if n <= BLOCK_TOKENS => {
                self.join_by_blocks::<{ BLOCK_TOKENS / BLOCK }>(joined, ranks)
            }
            _ => {
                let joined = self.join_by_heap(joined);
                ids.truncate(start);
                ids.extend(joined);
                return;
            }
        };
        ids.truncate(start + n_left);
    }

    /// Gives the number of ids left. The key of a pair is its rank and its place, so that the lowest key is the next merge.
    fn join_by_blocks<const BLOCKS: usize>(
        &self,
        ids: &mut [u32],
        ranks: impl Iterator<Item = u32>,
    ) -> usize {
        let n = ids.len();
        let key_of = |at: usize, rank: u32| match rank {
            NO_RANK => NO_KEY,
            rank => (rank << 8) as i32 | at as i32,
        };
        let key = |at: usize, left: u32, right: u32| key_of(at, self.rank(left, right));
        let mut keys = [[NO_KEY; BLOCK]; BLOCKS];
        for ((at, rank), key) in ranks.enumerate().zip(keys.as_flattened_mut()) {
            *key = key_of(at, rank);
        }
        let mut lowest = keys.map(|block| least(&block));
        let mut next = [[0u16; BLOCK]; BLOCKS];
        let mut previous = [[0u8; BLOCK]; BLOCKS];
        let (next, previous) = (next.as_flattened_mut(), previous.as_flattened_mut());
        for (at, (next, previous)) in next.iter_mut().zip(&mut *previous).enumerate() {
            *next = at as u16 + 1;
            *previous = at.saturating_sub(1) as u8;
        }
        loop {
            let best = lowest.iter().copied().fold(NO_KEY, i32::min);
            if best == NO_KEY {
                break;
            }
            let at = best as usize % BLOCK_TOKENS;
            let right = usize::from(next[at]);
            let behind = usize::from(next[right]);
            ids[at] = self.results[(best >> 8) as usize];
            next[at] = behind as u16;
            keys[right / BLOCK][right % BLOCK] = NO_KEY;
            keys[at / BLOCK][at % BLOCK] = NO_KEY;
            if behind < n {
                previous[behind] = at as u8;
                keys[at / BLOCK][at % BLOCK] = key(at, ids[at], ids[behind]);
            }
            lowest[right / BLOCK] = least(&keys[right / BLOCK]);
            lowest[at / BLOCK] = least(&keys[at / BLOCK]);
            if at > 0 {
                let left = usize::from(previous[at]);
                keys[left / BLOCK][left % BLOCK] = key(left, ids[left], ids[at]);
                lowest[left / BLOCK] = least(&keys[left / BLOCK]);
            }
        }
        let (mut n_left, mut at) = (0, 0);
        while at < n {
            ids[n_left] = ids[at];
            n_left += 1;
            at = usize::from(next[at]);
        }
        n_left
    }

    /// For long words, where a search for every merge would take quadratic time.
    fn join_by_heap(&self, ids: &[u32]) -> Vec<u32> {
        const GONE: u32 = u32::MAX;
        let mut ids = ids.to_vec();
        let n = ids.len();
        let mut next: Vec<usize> = (1..=n).collect();
        let mut previous: Vec<usize> = (0..n).map(|at| at.wrapping_sub(1)).collect();
        let mut heap = BinaryHeap::new();
        for (at, pair) in ids.windows(2).enumerate() {
            let rank = self.rank(pair[0], pair[1]);
            if rank != NO_RANK {
                heap.push(Reverse((rank, at)));
            }
        }
        while let Some(Reverse((rank, at))) = heap.pop() {
            let right = next[at];
            // The pair may have changed since it was pushed.
            if ids[at] == GONE || right >= n || self.rank(ids[at], ids[right]) != rank {
                continue;
            }
            ids[at] = self.results[rank as usize];
            ids[right] = GONE;
            next[at] = next[right];
            if next[at] < n {
                previous[next[at]] = at;
            }
            for left in [previous[at], at] {
                let Some(&right) = next.get(left).filter(|right| **right < n) else {
                    continue;
                };
                let rank = self.rank(ids[left], ids[right]);
                if rank != NO_RANK {
                    heap.push(Reverse((rank, left)));
                }
            }
        }
        ids.retain(|id| *id != GONE);
        ids
    }

    fn rank(&self, left: u32, right: u32) -> u32 {
        let pair = pair(left, right);
        let (place, bits) = self.filter_bits(pair);
        if self.filter[place] & bits != bits {
            return NO_RANK;
        }
        match self.slots[self.slot(pair)] {
            EMPTY => NO_RANK,
            slot => (slot & ((1 << RANK_BITS) - 1)) as u32,
        }
    }

    /// A word of the filter and the two bits in it that a pair sets.
    fn filter_bits(&self, pair: u64) -> (usize, u64) {
        let hash = spread(pair);
        let place = (hash >> 32) as usize & (self.filter.len() - 1);
        (place, 1 << (hash >> 26 & 63) | 1 << (hash >> 20 & 63))
    }

    /// Where a pair stands, or the empty place where it would.
    fn slot(&self, pair: u64) -> usize {
        let mask = self.slots.len() - 1;
        let mut slot = (spread(pair) >> 32) as usize & mask;
        while self.slots[slot] != EMPTY && self.slots[slot] >> RANK_BITS != pair {
            slot = (slot + 1) & mask;
        }
        slot
    }
}

fn pair(left: u32, right: u32) -> u64 {
    u64::from(left) << ID_BITS | u64::from(right)
}

/// A hash of a pair; its upper half is the better one.
fn spread(pair: u64) -> u64 {
    let product = pair.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    product ^ (product >> 32)
}

fn least(block: &[i32; BLOCK]) -> i32 {
    block.iter().copied().fold(NO_KEY, i32::min)
}

/// Merges and bytes: what turns a word into ids.
#[derive(Clone, Copy)]
pub(crate) struct WordEncoder<'a> {
    pub bpe: &'a Bpe,
    pub bytes: &'a Bytes,
    /// A word that is in here is one token, whatever the merges say.
    pub whole_words: Option<&'a Vocab>,
}

impl WordEncoder<'_> {
    /// Appends the ids of a word.
    pub fn append(&self, word: &[u8], ids: &mut Vec<u32>) {
        if let Some(vocab) = self.whole_words {
            let spelled: String = word.iter().map(|byte| char_of(*byte)).collect();
            if let Some(id) = vocab.id(&spelled) {
                ids.push(id);
                return;
            }
        }
        let start = ids.len();
        ids.extend(word.iter().map(|byte| self.bytes.ids[usize::from(*byte)]));
        let ranks = word
            .windows(2)
            .map(|pair| self.bytes.rank(pair[0], pair[1]));
        self.bpe.join(ids, start, ranks);
    }
}

/// What a word is before anything is joined: the ids of the 256 bytes, and the rank of every pair of them. Half of all ranks asked for
/// are of such pairs, and here each is one load.
#[derive(Clone, Debug)]
pub(crate) struct Bytes {
    ids: [u32; 256],
    ranks: Vec<u32>,
}

impl Bytes {
    /// # Errors
    /// [`Error::MissingByte`] if the vocabulary lacks one.
    pub fn new(vocab: &Vocab, bpe: &Bpe) -> Result<Bytes> {
        let mut ids = [0; 256];
        for (byte, id) in (0..=255).zip(ids.iter_mut()) {
            let spelling = char_of(byte);
            let known = vocab.id(spelling.encode_utf8(&mut [0; 4]));
            *id = known.ok_or(Error::MissingByte { byte, spelling })?;
        }
        Ok(Bytes::of_ids(ids, bpe))
    }

    pub(crate) fn of_ids(ids: [u32; 256], bpe: &Bpe) -> Bytes {
        let ranks = ids
            .iter()
            .flat_map(|left| ids.iter().map(|right| bpe.rank(*left, *right)));
        Bytes {
            ranks: ranks.collect(),
            ids,
        }
    }

    fn rank(&self, left: u8, right: u8) -> u32 {
        self.ranks[usize::from(left) << 8 | usize::from(right)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn join(bpe: &Bpe, ids: &mut Vec<u32>, start: usize) {
        let ranks: Vec<u32> = ids[start..]
            .windows(2)
            .map(|pair| bpe.rank(pair[0], pair[1]))
            .collect();
        bpe.join(ids, start, ranks.into_iter());
    }

    /// Ids 0 to 3 are letters, the others what the merges build.
    fn check(merges: &[[u32; 3]], ids: &[u32], expect: &[u32]) {
        let bpe = Bpe::new(merges);
        let mut got = vec![9];
        got.extend(ids);
        join(&bpe, &mut got, 1);
        assert_eq!(got[1..], *expect);
        assert_eq!(bpe.join_by_heap(ids), expect);
    }

    #[test]
    fn lowest_rank_is_joined_first() {
        let merges = [[1, 2, 4], [0, 1, 5], [0, 4, 6]];
        check(&merges, &[0, 1, 2], &[6]);
        check(&merges, &[0, 1, 0, 1], &[5, 5]);
        check(&merges, &[3, 3], &[3, 3]);
    }

    #[test]
    fn leftmost_of_equals_is_joined_first() {
        let merges = [[0, 0, 4]];
        check(&merges, &[0, 0, 0], &[4, 0]);
        check(&merges, &[0, 0, 0, 0, 0], &[4, 4, 0]);
    }

    #[test]
    fn merges_come_back_in_order() {
        let bpe = Bpe::new(&[[1, 2, 4], [0, 1, 5], [0, 4, 6]]);
        assert_eq!(bpe.merges(), [(1, 2), (0, 1), (0, 4)]);
    }

    #[test]
    fn blocks_and_heap_agree() {
        let mut state = 7u64;
        let mut random = |n: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) % n
        };
        let mut merges: Vec<[u32; 3]> = Vec::new();
        for result in 4..200 {
            let part = |r: u64| r as u32;
            let (left, right) = (
                part(random(u64::from(result))),
                part(random(u64::from(result))),
            );
            if !merges.iter().any(|m| m[..2] == [left, right]) {
                merges.push([left, right, result]);
            }
        }
        let bpe = Bpe::new(&merges);
        for n in 2..=BLOCK_TOKENS {
            let ids: Vec<u32> = (0..n).map(|_| random(4) as u32).collect();
            let mut joined = ids.clone();
            join(&bpe, &mut joined, 0);
            assert_eq!(bpe.join_by_heap(&ids), joined);
        }
    }
}
