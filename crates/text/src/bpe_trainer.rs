//! Learning BPE merges from word counts, with one order for everything, so that the same texts give the same merges.
//! The `tokenizers` crate's trainer iterates hash maps with a random seed, which may decide between equal pairs.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap};

/// Tokens by id (the 256 bytes in spelling order first) and merges by rank, both as bytes.
pub(crate) struct Learned {
    pub tokens: Vec<Vec<u8>>,
    pub merges: Vec<(Vec<u8>, Vec<u8>)>,
}

type Pair = (u32, u32);

/// A pair occurring less often is never merged: a token seen once teaches nothing.
const MIN_COUNT: u64 = 2;

struct Word {
    symbols: Vec<u32>,
    count: u64,
}

/// A pair as it was when pushed; stale ones are recognised by their count when popped.
/// Order: higher count first, then the lexicographically smaller (left bytes, right bytes).
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    count: u64,
    spelling: Reverse<(Vec<u8>, Vec<u8>)>,
    pair: Pair,
}

/// Repeatedly merges the most frequent pair of neighbouring tokens until there are `vocab_size` tokens or no pair occurs twice.
/// Source: arXiv 1508.07909 §3.2, over bytes.
pub(crate) fn train(words: &BTreeMap<Vec<u8>, u64>, vocab_size: usize) -> Learned {
    // 1. the byte tokens and the words spelt in them
    let mut bytes: Vec<u8> = (0..=255).collect();
    bytes.sort_unstable_by_key(|&b| crate::spelling::char_of(b));
    let mut id_of_byte = [0u32; 256];
    for (id, &byte) in (0..).zip(&bytes) {
        id_of_byte[byte as usize] = id;
    }
    let mut tokens: Vec<Vec<u8>> = bytes.into_iter().map(|b| vec![b]).collect();
    let mut id_of_token: HashMap<Vec<u8>, u32> = tokens.iter().cloned().zip(0..).collect();
    let mut words: Vec<Word> = words
        .iter()
        .map(|(bytes, &count)| Word {
            symbols: bytes.iter().map(|&b| id_of_byte[b as usize]).collect(),
            count,
        })
        .collect();

    // 2. pair counts, where each pair occurs, and a queue of candidates
    let mut counts: HashMap<Pair, u64> = HashMap::new();
    let mut places: HashMap<Pair, BTreeSet<usize>> = HashMap::new();
    for (word_idx, word) in words.iter().enumerate() {
        for pair in pairs(&word.symbols) {
            *counts.entry(pair).or_default() += word.count;
            places.entry(pair).or_default().insert(word_idx);
        }
    }
    let mut queue: BinaryHeap<Candidate> = counts
        .iter()
        .map(|(&pair, &count)| candidate(&tokens, pair, count))
        .collect();

    // 3. merges
    let mut merges = Vec::new();
    while tokens.len() < vocab_size {
        let Some(best) = queue.pop() else { break };
        let now = counts.get(&best.pair).copied().unwrap_or(0);
        if now < MIN_COUNT {
            continue;
        }
        if now != best.count {
            queue.push(Candidate { count: now, ..best });
            continue;
        }
        let Reverse((left, right)) = best.spelling;
        let merged = [left.as_slice(), right.as_slice()].concat();
        // Two ways may lead to one spelling; then the later merge leads to the same id.
        let id = *id_of_token.entry(merged).or_insert_with_key(|merged| {
            tokens.push(merged.clone());
            tokens.len() as u32 - 1
        });
        merges.push((left, right));
        let mut touched: BTreeSet<Pair> = BTreeSet::new();
        for word_idx in places.remove(&best.pair).unwrap_or_default() {
            let word = &mut words[word_idx];
            for pair in pairs(&word.symbols) {
                if let Some(count) = counts.get_mut(&pair) {
                    *count -= word.count;
                }
            }
            merge(&mut word.symbols, best.pair, id);
            for pair in pairs(&word.symbols) {
                *counts.entry(pair).or_default() += word.count;
                if pair.0 == id || pair.1 == id {
                    places.entry(pair).or_default().insert(word_idx);
                    touched.insert(pair);
                }
            }
        }
        counts.remove(&best.pair);
        for pair in touched {
            queue.push(candidate(&tokens, pair, counts[&pair]));
        }
    }
    Learned { tokens, merges }
}

fn pairs(symbols: &[u32]) -> impl Iterator<Item = Pair> {
    symbols.windows(2).map(|w| (w[0], w[1]))
}

fn candidate(tokens: &[Vec<u8>], pair: Pair, count: u64) -> Candidate {
    let bytes = |id: u32| tokens[id as usize].clone();
    Candidate {
        count,
        spelling: Reverse((bytes(pair.0), bytes(pair.1))),
        pair,
    }
}

/// Replaces each occurrence of `pair`, from the left, by `id`.
fn merge(symbols: &mut Vec<u32>, pair: Pair, id: u32) {
    let mut kept = 0;
    let mut next = 0;
    while next < symbols.len() {
        let found = symbols[next] == pair.0 && symbols.get(next + 1) == Some(&pair.1);
        symbols[kept] = if found { id } else { symbols[next] };
        kept += 1;
        next += if found { 2 } else { 1 };
    }
    symbols.truncate(kept);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn learn(words: &[(&str, u64)], n_merges: usize) -> Vec<String> {
        let words = words
            .iter()
            .map(|&(w, n)| (w.as_bytes().to_vec(), n))
            .collect();
        let learned = train(&words, 256 + n_merges);
        let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
        let lines = learned.merges.iter();
        lines
            .map(|(l, r)| format!("{} {}", text(l), text(r)))
            .collect()
    }

    #[test]
    fn merges_follow_counts() {
        let merges = learn(&[("low", 5), ("lower", 2), ("newest", 6), ("widest", 3)], 4);
        assert_eq!(merges, ["e s", "es t", "l o", "lo w"]);
    }

    #[test]
    fn equal_counts_are_merged_in_lexicographic_order() {
        assert_eq!(
            learn(&[("zb", 2), ("ba", 2), ("bc", 2)], 3),
            ["b a", "b c", "z b"]
        );
    }

    #[test]
    fn pairs_seen_once_are_left_alone() {
        assert_eq!(learn(&[("ab", 1), ("cd", 2)], 9), ["c d"]);
    }

    #[test]
    fn repeated_symbols_merge_from_the_left() {
        assert_eq!(learn(&[("aaa", 2)], 2), ["a a", "aa a"]);
    }
}
