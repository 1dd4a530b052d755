//! The ids of words met before, one cache a thread and vocabulary: in most texts nearly every word is in it.

use std::cell::RefCell;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::bpe::WordEncoder;
use crate::hash;
use crate::words::WordSplitter;

/// Words that one cache holds of each kind; when it is full it begins anew, so that the next language finds room.
const WORDS: usize = 1 << 16;
/// Words up to here are their own key; longer ones, of which there are few, lie in a map.
const SHORT_BYTES: usize = 15;
/// Longer words hardly come twice. In Chinese and Japanese a word is all that stands between two marks, and a sentence comes once for
/// every data set and every listener.
const LONG_BYTES: usize = 255;
/// Words that are looked for together.
const AT_ONCE: usize = 16;
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
    /// Short words, by open addressing, at most half full; 0 is an empty place, for no word is empty.
    short: Vec<ShortWord>,
    /// Where the ids of each of them begin; apart, so that counting stays within `short`.
    short_ids: Vec<u32>,
    n_short: usize,
    long: HashMap<Box<[u8]>, Ids, BuildHasherDefault<WordHasher>>,
    /// The ids of all words.
    ids: Vec<u32>,
    /// The ids of the last word that was too long for the cache.
    unkept: Vec<u32>,
}

/// What a word became.
enum Word<'c> {
    Ids(&'c [u32]),
    /// A place in `WordCache::short`.
    Short(&'c WordCache, usize),
}

impl<'c> Word<'c> {
    /// The number of its ids.
    #[inline]
    pub fn len(&self) -> usize {
        match self {
            Word::Ids(ids) => ids.len(),
            Word::Short(cache, place) => (cache.short[*place] >> 124) as usize,
        }
    }

    #[inline]
    pub fn ids(&self) -> &'c [u32] {
        match self {
            Word::Ids(ids) => ids,
            Word::Short(cache, place) => {
                &cache.ids[cache.short_ids[*place] as usize..][..self.len()]
            }
        }
    }
}

/// From the low end: up to 15 bytes and zeros behind them, 4 bits for their number, 4 bits for that of their ids.
type ShortWord = u128;
const N_IDS: ShortWord = 0xf << 124;

/// A piece of `WordCache::ids`.
#[derive(Clone, Copy, Default)]
struct Ids {
    start: u32,
    n: u32,
}

impl Default for WordCache {
    fn default() -> Self {
        WordCache {
            short: vec![0; 2 * WORDS],
            short_ids: vec![0; 2 * WORDS],
            n_short: 0,
            long: HashMap::default(),
            ids: Vec::new(),
            unkept: Vec::new(),
        }
    }
}

impl WordCache {
    /// The word `text[start..end]`, which must not be empty.
    #[inline]
    fn word(
        &mut self,
        text: &[u8],
        start: usize,
        end: usize,
        encoder: WordEncoder<'_>,
    ) -> Word<'_> {
        if end - start > SHORT_BYTES {
            return Word::Ids(self.ids_of_long(&text[start..end], encoder));
        }
        let word = short_word(text, start, end);
        let mut place = first_place(word);
        loop {
            match self.short[place] {
                0 => place = self.learn_short(word, &text[start..end], encoder),
                known if known & !N_IDS == word => return Word::Short(self, place),
                _ => place = (place + 1) % (2 * WORDS),
            }
        }
    }

    /// Appends the ids of all words of a text.
    pub fn append(
        &mut self,
        text: &[u8],
        splitter: WordSplitter,
        encoder: WordEncoder<'_>,
        ids: &mut Vec<u32>,
    ) {
        let mut start = 0;
        while start < text.len() {
            let end = splitter.end(text, start);
            ids.extend_from_slice(self.word(text, start, end, encoder).ids());
            start = end;
        }
    }

    /// The number of ids of all words of a text. Short words are looked for several at a time, so that one need not wait for the
    /// memory that another lies in.
    pub fn count(
        &mut self,
        text: &[u8],
        splitter: WordSplitter,
        encoder: WordEncoder<'_>,
    ) -> usize {
        let mut count = 0;
        let mut start = 0;
        while start < text.len() {
            // 1. words
            let mut words = [(0, 0, 0); AT_ONCE];
            let mut n = 0;
            while n < AT_ONCE && start < text.len() {
                let end = splitter.end(text, start);
                if end - start > SHORT_BYTES {
                    count += self.ids_of_long(&text[start..end], encoder).len();
                } else {
                    words[n] = (start, end, short_word(text, start, end));
                    n += 1;
                }
                start = end;
            }
            // 2. what lies where each is looked for first
            let mut known = [0; AT_ONCE];
            for (known, (_, _, word)) in known.iter_mut().zip(&words[..n]) {
                *known = self.short[first_place(*word)];
            }
            // 3. most often that is the word
            for (known, (start, end, word)) in known.iter().zip(&words[..n]) {
                count += if known & !N_IDS == *word {
                    (known >> 124) as usize
                } else {
                    self.word(text, *start, *end, encoder).len()
                };
            }
        }
        count
    }

    #[cold]
    fn learn_short(&mut self, word: ShortWord, bytes: &[u8], encoder: WordEncoder<'_>) -> usize {
        if self.n_short == WORDS {
            self.forget();
        }
        let ids = self.encode(bytes, encoder);
        let mut place = first_place(word);
        while self.short[place] != 0 {
            place = (place + 1) % (2 * WORDS);
        }
        self.short[place] = word | ShortWord::from(ids.n) << 124;
        self.short_ids[place] = ids.start;
        self.n_short += 1;
        place
    }

    fn ids_of_long(&mut self, word: &[u8], encoder: WordEncoder<'_>) -> &[u32] {
        if word.len() > LONG_BYTES {
            // A word of megabytes must not hold its memory for good.
            self.unkept = Vec::new();
            encoder.append(word, &mut self.unkept);
            return &self.unkept;
        }
        let ids = match self.long.get(word) {
            Some(ids) => *ids,
            None => {
                if self.long.len() == WORDS {
                    self.forget();
                }
                let ids = self.encode(word, encoder);
                self.long.insert(word.into(), ids);
                ids
            }
        };
        &self.ids[ids.start as usize..][..ids.n as usize]
    }

    fn encode(&mut self, word: &[u8], encoder: WordEncoder<'_>) -> Ids {
        let start = self.ids.len();
        encoder.append(word, &mut self.ids);
        Ids {
            start: start as u32,
            n: (self.ids.len() - start) as u32,
        }
    }

    fn forget(&mut self) {
        self.short.fill(0);
        self.n_short = 0;
        self.long.clear();
        self.ids.clear();
    }
}

/// A word of at most 15 bytes as a number, that of its ids left out.
#[inline]
fn short_word(text: &[u8], start: usize, end: usize) -> ShortWord {
    let n = end - start;
    let bytes: [u8; 16] = match text[start..].first_chunk::<16>() {
        Some(window) => *window,
        None => {
            let mut bytes = [0; 16];
            bytes[..n].copy_from_slice(&text[start..end]);
            bytes
        }
    };
    u128::from_le_bytes(bytes) & ((1 << (8 * n)) - 1) | (n as u128) << 120
}

#[inline]
fn first_place(word: ShortWord) -> usize {
    hash::fold(word as u64, (word >> 64) as u64 | 1) as usize % (2 * WORDS)
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
    use crate::bpe::{Bpe, Bytes};

    const BYTE_IDS: [u32; 256] = {
        let mut ids = [0; 256];
        let mut byte = 0;
        while byte < 256 {
            ids[byte] = byte as u32;
            byte += 1;
        }
        ids
    };

    fn check(cache: &mut WordCache, encoder: WordEncoder<'_>, text: &str, n: usize) {
        let mut expect = Vec::new();
        encoder.append(&text.as_bytes()[..n], &mut expect);
        let word = cache.word(text.as_bytes(), 0, n, encoder);
        assert_eq!(
            (word.ids(), word.len()),
            (&expect[..], expect.len()),
            "{text}"
        );
    }

    /// Every word twice, so that the second comes from the cache; in the middle of a text and at its end.
    #[test]
    fn words_of_every_length_have_their_own_ids() {
        let bpe = Bpe::new(&[[97, 97, 300], [300, 300, 301]]);
        let bytes = Bytes::of_ids(BYTE_IDS, &bpe);
        let encoder = WordEncoder {
            bpe: &bpe,
            bytes: &bytes,
            whole_words: None,
        };
        let mut cache = WordCache::default();
        for _ in 0..2 {
            for n in 1..300 {
                let text = format!("{}b{}", "a".repeat(n), "c".repeat(20));
                check(&mut cache, encoder, &text, n);
                check(&mut cache, encoder, &text[..n], n);
            }
        }
    }

    #[test]
    fn full_cache_begins_anew() {
        let bpe = Bpe::new(&[]);
        let bytes = Bytes::of_ids(BYTE_IDS, &bpe);
        let encoder = WordEncoder {
            bpe: &bpe,
            bytes: &bytes,
            whole_words: None,
        };
        let mut cache = WordCache::default();
        for word in 0..3 * WORDS {
            for word in [format!("{word}"), format!("{word:020}")] {
                check(&mut cache, encoder, &word, word.len());
            }
        }
        assert!(cache.n_short <= WORDS && cache.long.len() <= WORDS);
    }
}
