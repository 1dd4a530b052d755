//! The ids of words met before, one cache a thread and vocabulary: in most texts nearly every word is in it.

use std::cell::RefCell;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::bpe::{Bpe, Scratch};
use crate::hash;

/// Words that one cache holds of each kind; when it is full it begins anew, so that the next language finds room.
const WORDS: usize = 1 << 16;
/// Words up to here are their own key; longer ones, of which there are few, lie in a map.
const SHORT_BYTES: usize = 15;
/// Longer words hardly come twice.
const LONG_BYTES: usize = 64;
/// Vocabularies that a thread remembers.
const VOCABULARIES: usize = 4;

thread_local! {
    /// Caches by the number of their vocabulary, the latest last.
    static CACHES: RefCell<Vec<(u64, Box<WordCache>)>> = const { RefCell::new(Vec::new()) };
}

/// Tells vocabularies apart: every loaded one has its own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CacheKey(u64);

impl CacheKey {
    pub fn new() -> CacheKey {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        CacheKey(NEXT.fetch_add(1, Ordering::Relaxed))
    }

    /// Runs `work` with this thread's cache for the vocabulary.
    pub fn with<R>(self, work: impl FnOnce(&mut WordCache) -> R) -> R {
        CACHES.with_borrow_mut(|caches| {
            let place = match caches.iter().position(|(key, _)| *key == self.0) {
                Some(place) => place,
                None => {
                    if caches.len() == VOCABULARIES {
                        caches.remove(0);
                    }
                    caches.push((self.0, Box::default()));
                    caches.len() - 1
                }
            };
            work(&mut caches[place].1)
        })
    }
}

pub(crate) struct WordCache {
    /// Open addressing, at most half full; a key of 0 is an empty place, for no word is empty.
    short: Vec<Slot>,
    n_short: usize,
    long: HashMap<Box<[u8]>, Ids, BuildHasherDefault<WordHasher>>,
    /// The ids of all words.
    ids: Vec<u32>,
    /// The ids of the last word that was too long for the cache.
    unkept: Vec<u32>,
    scratch: Scratch,
}

#[derive(Clone, Copy, Default)]
struct Slot {
    /// The word's bytes, zeros behind them, their number last.
    key: [u64; 2],
    ids: Ids,
}

/// A piece of `WordCache::ids`.
#[derive(Clone, Copy, Default)]
struct Ids {
    start: u32,
    n: u32,
}

impl Default for WordCache {
    fn default() -> Self {
        WordCache {
            short: vec![Slot::default(); 2 * WORDS],
            n_short: 0,
            long: HashMap::default(),
            ids: Vec::new(),
            unkept: Vec::new(),
            scratch: Scratch::default(),
        }
    }
}

impl WordCache {
    /// The ids of the word `text[start..end]`. `byte_ids`: the ids of the 256 bytes.
    #[inline]
    pub fn ids(
        &mut self,
        text: &[u8],
        start: usize,
        end: usize,
        bpe: &Bpe,
        byte_ids: &[u32; 256],
    ) -> &[u32] {
        if end - start > SHORT_BYTES {
            return self.ids_of_long(&text[start..end], bpe, byte_ids);
        }
        let key = short_key(text, start, end);
        let mut place = place(key);
        loop {
            let slot = self.short[place];
            if slot.key == key {
                return self.piece(slot.ids);
            }
            if slot.key == [0; 2] {
                break;
            }
            place = (place + 1) % (2 * WORDS);
        }
        self.learn_short(key, &text[start..end], bpe, byte_ids)
    }

    #[cold]
    fn learn_short(
        &mut self,
        key: [u64; 2],
        word: &[u8],
        bpe: &Bpe,
        byte_ids: &[u32; 256],
    ) -> &[u32] {
        if self.n_short == WORDS {
            self.forget();
        }
        let ids = self.encode(word, bpe, byte_ids);
        let mut place = place(key);
        while self.short[place].key != [0; 2] {
            place = (place + 1) % (2 * WORDS);
        }
        self.short[place] = Slot { key, ids };
        self.n_short += 1;
        self.piece(ids)
    }

    fn ids_of_long(&mut self, word: &[u8], bpe: &Bpe, byte_ids: &[u32; 256]) -> &[u32] {
        if word.len() > LONG_BYTES {
            self.unkept.clear();
            self.unkept
                .extend(word.iter().map(|byte| byte_ids[usize::from(*byte)]));
            bpe.join(&mut self.unkept, 0, &mut self.scratch);
            return &self.unkept;
        }
        if let Some(ids) = self.long.get(word) {
            return self.piece(*ids);
        }
        if self.long.len() == WORDS {
            self.forget();
        }
        let ids = self.encode(word, bpe, byte_ids);
        self.long.insert(word.into(), ids);
        self.piece(ids)
    }

    fn encode(&mut self, word: &[u8], bpe: &Bpe, byte_ids: &[u32; 256]) -> Ids {
        let start = self.ids.len();
        self.ids
            .extend(word.iter().map(|byte| byte_ids[usize::from(*byte)]));
        bpe.join(&mut self.ids, start, &mut self.scratch);
        Ids {
            start: start as u32,
            n: (self.ids.len() - start) as u32,
        }
    }

    fn piece(&self, ids: Ids) -> &[u32] {
        &self.ids[ids.start as usize..][..ids.n as usize]
    }

    fn forget(&mut self) {
        self.short.fill(Slot::default());
        self.n_short = 0;
        self.long.clear();
        self.ids.clear();
    }
}

/// A word of at most 15 bytes as a number.
#[inline]
fn short_key(text: &[u8], start: usize, end: usize) -> [u64; 2] {
    let n = end - start;
    let bytes: [u8; 16] = match text[start..].first_chunk::<16>() {
        Some(window) => *window,
        None => {
            let mut bytes = [0; 16];
            bytes[..n].copy_from_slice(&text[start..end]);
            bytes
        }
    };
    let all = u128::from_le_bytes(bytes) & ((1 << (8 * n)) - 1) | (n as u128) << 120;
    [all as u64, (all >> 64) as u64]
}

#[inline]
fn place(key: [u64; 2]) -> usize {
    hash::fold(key[0], key[1] | 1) as usize % (2 * WORDS)
}

#[derive(Default)]
struct WordHasher(u64);

impl Hasher for WordHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        self.0 ^= hash::of(bytes);
    }

    fn write_usize(&mut self, _: usize) {
        // The length of a slice, which `write` takes in anyway.
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn byte_ids() -> [u32; 256] {
        std::array::from_fn(|byte| byte as u32)
    }

    /// Every word twice, so that the second comes from the cache; in the middle of a text and at its end.
    #[test]
    fn words_of_every_length_have_their_own_ids() {
        let bpe = Bpe::new(&[[97, 97, 300], [300, 300, 301]]);
        let mut cache = WordCache::default();
        for _ in 0..2 {
            for n in 1..100 {
                let text = format!("{}b{}", "a".repeat(n), "c".repeat(20));
                for text in [&text[..], &text[..n]] {
                    let mut expect = vec![97; n];
                    bpe.join(&mut expect, 0, &mut Scratch::default());
                    assert_eq!(cache.ids(text.as_bytes(), 0, n, &bpe, &byte_ids()), expect);
                }
            }
        }
    }

    #[test]
    fn full_cache_begins_anew() {
        let bpe = Bpe::new(&[]);
        let mut cache = WordCache::default();
        for word in 0..3 * WORDS {
            for word in [format!("{word}"), format!("{word:020}")] {
                let expect: Vec<u32> = word.bytes().map(u32::from).collect();
                assert_eq!(
                    cache.ids(word.as_bytes(), 0, word.len(), &bpe, &byte_ids()),
                    expect
                );
            }
        }
        assert!(cache.n_short <= WORDS && cache.long.len() <= WORDS);
    }
}
