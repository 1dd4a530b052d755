//! Which scenes say nearly the same, and which held-out lines are mostly made of training text: by runs of characters.

use std::collections::{HashMap, HashSet};

use crate::fold::Fold;
use crate::language::Language;

/// Characters of a run for near-duplicates.
const DUPLICATE_RUN: usize = 8;
/// Scenes whose runs overlap so far (Jaccard) say the same.
const DUPLICATE_SHARE: f64 = 0.5;
/// Runs that more scenes than this have are formulas of the story and say nothing about two of them.
const COMMON_RUN: usize = 20;
/// About so many runs of a language are compared; of a longer story an even sample is taken.
const SAMPLED_RUNS: usize = 4_000_000;
/// A line is copied when so much of it stands in long runs of training text.
const COPIED_LINE: f64 = 0.8;
/// A scene is contaminated when so much of it is copied lines.
const COPIED_SCENE: f64 = 0.5;

/// Characters from which on a run shared with training text is a copy and no accident: near the 99th percentile of what
/// new lines of a character share with her old ones (measured on voice lines, 20 for Chinese and 60 for English).
fn copied_run(language: Language) -> usize {
    match language {
        Language::Chs | Language::Cht | Language::Jp | Language::Kr => 20,
        _ => 60,
    }
}

/// Pairs of units whose texts of one language are near-duplicates; `texts` are (unit, text).
pub(crate) fn near_duplicates(texts: &[(usize, &str)]) -> Vec<(usize, usize)> {
    let n_chars: usize = texts.iter().map(|(_, text)| text.len()).sum();
    let step = (n_chars / SAMPLED_RUNS + 1) as u64;
    let mut runs: Vec<(u64, u32)> = Vec::new();
    for (unit, text) in texts {
        for_runs(text, DUPLICATE_RUN, |hash, _| {
            if hash % step == 0 {
                runs.push((hash, *unit as u32));
            }
        });
    }
    runs.sort_unstable();
    runs.dedup();
    let mut sizes: HashMap<u32, u32, Fold> = HashMap::default();
    let mut shared: HashMap<u64, u32, Fold> = HashMap::default();
    for run in runs.chunk_by(|a, b| a.0 == b.0) {
        for (idx, (_, unit)) in run.iter().enumerate() {
            *sizes.entry(*unit).or_default() += 1;
            if run.len() <= COMMON_RUN {
                for (_, other) in &run[..idx] {
                    *shared.entry(pair(*other, *unit)).or_default() += 1;
                }
            }
        }
    }
    let mut pairs: Vec<(usize, usize)> = shared
        .into_iter()
        .map(|(pair, n)| ((pair >> 32) as u32, pair as u32, n))
        .filter(|(a, b, n)| {
            let union = sizes[a] + sizes[b] - n;
            f64::from(*n) >= DUPLICATE_SHARE * f64::from(union)
        })
        .map(|(a, b, _)| (a as usize, b as usize))
        .collect();
    pairs.sort_unstable();
    pairs
}

fn pair(a: u32, b: u32) -> u64 {
    (u64::from(a) << 32) | u64::from(b)
}

/// The held-out units that are mostly copies of training text in one language.
pub(crate) fn copies(
    language: Language,
    held_out: &[(usize, &str)],
    train: &[(usize, &str)],
) -> HashSet<usize> {
    let length = copied_run(language);
    let mut wanted: HashMap<u64, bool, Fold> = HashMap::default();
    for (_, text) in held_out {
        for_runs(text, length, |hash, _| {
            wanted.insert(hash, false);
        });
    }
    for (_, text) in train {
        for_runs(text, length, |hash, _| {
            if let Some(found) = wanted.get_mut(&hash) {
                *found = true;
            }
        });
    }
    let mut counts: HashMap<usize, (usize, usize)> = HashMap::new();
    for (unit, text) in held_out {
        let n_chars = significant(text).count();
        // Runs overlap: count each character once.
        let (mut covered, mut until) = (0, 0);
        for_runs(text, length, |hash, start| {
            if wanted.get(&hash) == Some(&true) {
                covered += start + length - until.max(start);
                until = start + length;
            }
        });
        let (all, copied) = counts.entry(*unit).or_default();
        *all += n_chars;
        if covered as f64 > COPIED_LINE * n_chars as f64 {
            *copied += n_chars;
        }
    }
    counts
        .into_iter()
        .filter(|(_, (all, copied))| *copied as f64 > COPIED_SCENE * *all as f64)
        .map(|(unit, _)| unit)
        .collect()
}

/// What counts of a text: no white space, no ASCII punctuation.
fn significant(text: &str) -> impl Iterator<Item = char> {
    text.chars()
        .filter(|c| !c.is_whitespace() && !c.is_ascii_punctuation())
}

/// Calls `f` with the hash and the first place of every run of `length` characters.
fn for_runs(text: &str, length: usize, mut f: impl FnMut(u64, usize)) {
    const BASE: u64 = 0x0000_0100_0000_01b3;
    let chars: Vec<u64> = significant(text).map(|c| u64::from(c as u32) + 1).collect();
    if chars.len() < length {
        return;
    }
    let mut leading: u64 = 1;
    for _ in 1..length {
        leading = leading.wrapping_mul(BASE);
    }
    let mut rolling: u64 = 0;
    for (idx, c) in chars.iter().enumerate() {
        if idx >= length {
            rolling = rolling.wrapping_sub(chars[idx - length].wrapping_mul(leading));
        }
        rolling = rolling.wrapping_mul(BASE).wrapping_add(*c);
        if idx + 1 >= length {
            // The low bits of a polynomial mix little; a multiplication spreads them.
            let hash = (rolling ^ (rolling >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            f(hash ^ (hash >> 29), idx + 1 - length);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str =
        "The tide turned before the bell had rung, and nobody on the quay looked up from the nets.";
    const B: &str =
        "The tide turned before the bell had rung, and nobody on the pier looked up from the nets!";
    const C: &str =
        "A letter came on Tuesday; it had been opened twice and sealed again with the wrong wax.";

    #[test]
    fn near_duplicates_are_found_and_others_are_not() {
        assert_eq!(near_duplicates(&[(0, A), (1, C), (2, B)]), [(0, 2)]);
        let more = [
            (0, A),
            (1, C),
            (1, A),
            (1, "And a third line, to make most of it new."),
        ];
        assert_eq!(near_duplicates(&more), [], "most of unit 1 is new");
        assert_eq!(near_duplicates(&[(0, "short"), (1, "short")]), []);
    }

    #[test]
    fn runs_of_the_same_characters_have_the_same_hash_anywhere() {
        let hashes = |text: &str| {
            let mut all = Vec::new();
            for_runs(text, 4, |hash, _| all.push(hash));
            all
        };
        assert_eq!(hashes("xxabcd").last(), hashes("abcd").first());
        assert_eq!(hashes("a b,c d"), hashes("abcd"));
        assert!(hashes("abc").is_empty());
    }

    #[test]
    fn scene_made_of_training_text_is_a_copy() {
        let joined = format!("{A} {C}");
        let long = [(0, joined.as_str())];
        assert!(copies(Language::En, &[(7, A)], &long).contains(&7));
        assert!(copies(Language::En, &[(7, B)], &long).is_empty());
        // Half copied, half new: not mostly copied.
        assert!(copies(Language::En, &[(7, A), (7, B), (7, B)], &long).is_empty());
    }
}
