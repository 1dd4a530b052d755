//! Which scenes say nearly the same, which held-out lines are made of training text, and which scenes retell a mission:
//! all by runs of characters, white space and ASCII punctuation aside.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use rayon::prelude::*;

use crate::components::Components;
use crate::fold::Fold;
use crate::language::Language;
use crate::splitter::UnitText;

/// Characters of a shingle: the runs of characters that two texts are compared by.
const SHINGLE_CHARS: usize = 8;
/// Scenes whose shingles overlap so far (Jaccard) say the same.
const DUPLICATE_SHARE: f64 = 0.5;
/// Scenes of fewer shingles (12 characters) are formulas, like or not.
const FEWEST_SHINGLES: usize = 5;
/// A MinHash signature: of a scene's shingles those with the smallest hashes stand for it. Two scenes that overlap by half share about half of
/// these; that they share fewer than two of them happens once in a million pairs.
const SIGNATURE_SHINGLES: usize = 24;
/// Scenes with the same run are compared with so many neighbours, not with all: a run that hundreds have says little,
/// and copies of copies are tied through their neighbours.
const NEIGHBOURS: usize = 4;
/// A line is copied when so much of it stands in long runs of training text.
const COPIED_LINE: f64 = 0.8;
/// A scene is contaminated when so much of it is copied lines.
const COPIED_SCENE: f64 = 0.1;
/// A scene, or a paragraph of a page, retells a mission when so many of its runs stand there.
const RETOLD_SHARE: f64 = 0.5;
/// Shorter paragraphs (fewer runs) are too short to retell anything.
const RETELLING_RUNS: usize = 24;

/// Characters from which on a run shared with training text is a copy and no accident: near the 99th percentile of what
/// new lines of a character share with her old ones (measured on voice lines, 20 for Chinese and 60 for English).
fn copied_run(language: Language) -> usize {
    match language {
        Language::Chs | Language::Cht | Language::Jp | Language::Kr => 20,
        _ => 60,
    }
}

/// Pairs of units whose texts of one language are near-duplicates (Jaccard of their runs, computed exactly for every
/// pair that comes out), enough of them to tie all that belong together. `texts` are in the order of their units;
/// pairs that `are_tied` already are passed over.
pub(crate) fn near_duplicates(
    texts: &[UnitText<'_>],
    are_tied: impl Fn(usize, usize) -> bool + Sync,
) -> Vec<(usize, usize)> {
    // 1. a MinHash signature of every unit, and who has which shingle in it
    let units: Vec<&[UnitText<'_>]> = texts.chunk_by(|a, b| a.unit == b.unit).collect();
    let signatures: Vec<Vec<u64>> = units.par_iter().map(|texts| signature(texts)).collect();
    let mut postings: Vec<(u64, u32)> = Vec::new();
    for (place, signature) in signatures.iter().enumerate() {
        postings.extend(signature.iter().map(|run| (*run, place as u32)));
    }
    postings.par_sort_unstable();
    // 2. pairs that share shingles of their signatures
    let mut pairs: Vec<(u32, u32)> = Vec::new();
    for group in postings.chunk_by(|a, b| a.0 == b.0) {
        for (at, (_, b)) in group.iter().enumerate() {
            for (_, a) in &group[at.saturating_sub(NEIGHBOURS)..at] {
                if !are_tied(units[*a as usize][0].unit, units[*b as usize][0].unit) {
                    pairs.push((*a, *b));
                }
            }
        }
    }
    pairs.par_sort_unstable();
    let mut candidates: Vec<(std::cmp::Reverse<usize>, (u32, u32))> = pairs
        .chunk_by(PartialEq::eq)
        .filter(|same| same.len() >= 2)
        .map(|same| (std::cmp::Reverse(same.len()), same[0]))
        .collect();
    candidates.sort_unstable();
    // 3. the likeliest first, exactly; who is tied through others by then needs no look
    let mut known = Components::new(units.len());
    let mut found = Vec::new();
    for (_, (a, b)) in candidates {
        let (a, b) = (a as usize, b as usize);
        if known.are_tied(a, b) || !may_be_alike(&signatures[a], &signatures[b]) {
            continue;
        }
        if jaccard(&runs(units[a]), &runs(units[b])) >= DUPLICATE_SHARE {
            known.tie(a, b);
            found.push((units[a][0].unit, units[b][0].unit));
        }
    }
    found
}

/// The smallest hashes of a unit's runs, ascending; none for a formula.
fn signature(texts: &[UnitText<'_>]) -> Vec<u64> {
    let mut smallest: Vec<u64> = Vec::with_capacity(SIGNATURE_SHINGLES + 1);
    for text in texts {
        for_runs(text.text, SHINGLE_CHARS, |run, _| {
            let is_full = smallest.len() == SIGNATURE_SHINGLES;
            if is_full && smallest.last().is_some_and(|last| run >= *last) {
                return;
            }
            if let Err(place) = smallest.binary_search(&run) {
                smallest.insert(place, run);
                smallest.truncate(SIGNATURE_SHINGLES);
            }
        });
    }
    if smallest.len() < FEWEST_SHINGLES {
        smallest.clear();
    }
    smallest
}

/// Whether two signatures leave it open that the units overlap by half: of the smallest shingles of both together a quarter
/// is in both. Small units are not judged by it.
fn may_be_alike(a: &[u64], b: &[u64]) -> bool {
    if a.len() < SIGNATURE_SHINGLES || b.len() < SIGNATURE_SHINGLES {
        return true;
    }
    let (mut i, mut j, mut n_union, mut n_shared) = (0, 0, 0, 0);
    while n_union < SIGNATURE_SHINGLES {
        match a[i].cmp(&b[j]) {
            std::cmp::Ordering::Less => i += 1,
            std::cmp::Ordering::Greater => j += 1,
            std::cmp::Ordering::Equal => {
                n_shared += 1;
                (i, j) = (i + 1, j + 1);
            }
        }
        n_union += 1;
        if i == a.len() || j == b.len() {
            break;
        }
    }
    4 * n_shared >= n_union
}

/// The distinct runs of a unit, ascending.
fn runs(texts: &[UnitText<'_>]) -> Vec<u64> {
    let mut runs = Vec::new();
    for text in texts {
        for_runs(text.text, SHINGLE_CHARS, |run, _| runs.push(run));
    }
    runs.sort_unstable();
    runs.dedup();
    runs
}

fn jaccard(a: &[u64], b: &[u64]) -> f64 {
    let (mut i, mut j, mut n_shared) = (0, 0, 0usize);
    while i < a.len() && j < b.len() {
        match a[i].cmp(&b[j]) {
            std::cmp::Ordering::Less => i += 1,
            std::cmp::Ordering::Greater => j += 1,
            std::cmp::Ordering::Equal => {
                n_shared += 1;
                (i, j) = (i + 1, j + 1);
            }
        }
    }
    let n_union = a.len() + b.len() - n_shared;
    n_shared as f64 / n_union.max(1) as f64
}

/// What of a held-out unit is copied from training text of one language.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub(crate) struct Copied {
    n_chars: usize,
    n_copied_chars: usize,
    pub n_copied_lines: usize,
}

impl Copied {
    /// Whether so much is copied that the unit says nothing as a held-out one.
    pub fn is_contaminated(self) -> bool {
        self.n_copied_chars as f64 > COPIED_SCENE * self.n_chars as f64
    }
}

/// The held-out units with lines that are mostly made of training text of one language.
pub(crate) fn copies<'t>(
    language: Language,
    held_out: &[UnitText<'t>],
    train: impl Iterator<Item = &'t str>,
) -> BTreeMap<usize, Copied> {
    let length = copied_run(language);
    let mut wanted: HashMap<u64, bool, Fold> = HashMap::default();
    for text in held_out {
        for_runs(text.text, length, |run, _| {
            wanted.insert(run, false);
        });
    }
    if wanted.is_empty() {
        return BTreeMap::new();
    }
    let filter = BloomFilter::new(wanted.keys().copied(), wanted.len());
    for text in train {
        for_runs(text, length, |run, _| {
            if filter.may_hold(run)
                && let Some(found) = wanted.get_mut(&run)
            {
                *found = true;
            }
        });
    }
    let mut copied: BTreeMap<usize, Copied> = BTreeMap::new();
    for text in held_out {
        // Runs overlap: count each character once.
        let (mut covered, mut until) = (0, 0);
        for_runs(text.text, length, |run, start| {
            if wanted.get(&run) == Some(&true) {
                covered += start + length - until.max(start);
                until = start + length;
            }
        });
        let n_chars = significant(text.text).count();
        let of_unit = copied.entry(text.unit).or_default();
        of_unit.n_chars += n_chars;
        if covered as f64 > COPIED_LINE * n_chars as f64 {
            of_unit.n_copied_chars += n_chars;
            of_unit.n_copied_lines += 1;
        }
    }
    copied.retain(|_, of_unit| of_unit.n_copied_lines > 0);
    copied
}

/// The units of which half stands in one mission, and the pages with a paragraph of which half does. `missions` are
/// (mission, text); `others` are in the order of their units.
pub(crate) fn retellings(
    missions: &[(usize, &str)],
    others: &[UnitText<'_>],
    is_page: impl Fn(usize) -> bool,
) -> BTreeSet<usize> {
    let mut told: Vec<(u64, usize)> = Vec::new();
    for (mission, text) in missions {
        for_runs(text, SHINGLE_CHARS, |run, _| told.push((run, *mission)));
    }
    told.sort_unstable();
    told.dedup();
    let filter = BloomFilter::new(told.iter().map(|(run, _)| *run), told.len());
    let mut retelling = BTreeSet::new();
    for unit in others.chunk_by(|a, b| a.unit == b.unit) {
        let mut of_unit = Overlap::default();
        for text in unit {
            let mut of_text = Overlap::default();
            for_runs(text.text, SHINGLE_CHARS, |run, _| {
                of_text.n_runs += 1;
                if filter.may_hold(run) {
                    let first = told.partition_point(|(other, _)| *other < run);
                    for (_, mission) in told[first..].iter().take_while(|(other, _)| *other == run)
                    {
                        *of_text.in_mission.entry(*mission).or_default() += 1;
                    }
                }
            });
            if of_text.is_retelling() && is_page(text.unit) {
                retelling.insert(text.unit);
            }
            of_unit.add(of_text);
        }
        if of_unit.is_retelling() {
            retelling.insert(unit[0].unit);
        }
    }
    retelling
}

/// Runs of a text, and how many of them stand in each mission.
#[derive(Default)]
struct Overlap {
    n_runs: usize,
    in_mission: BTreeMap<usize, usize>,
}

impl Overlap {
    fn add(&mut self, other: Overlap) {
        self.n_runs += other.n_runs;
        for (mission, n) in other.in_mission {
            *self.in_mission.entry(mission).or_default() += n;
        }
    }

    fn is_retelling(&self) -> bool {
        let most = self.in_mission.values().copied().max().unwrap_or(0);
        self.n_runs >= RETELLING_RUNS && most as f64 >= RETOLD_SHARE * self.n_runs as f64
    }
}

/// Says of most hashes that are not in a set that they are not, from a table that stays in the cache.
struct BloomFilter {
    bits: Vec<u64>,
    mask: u64,
}

impl BloomFilter {
    fn new(hashes: impl Iterator<Item = u64>, n: usize) -> BloomFilter {
        // One bit of sixteen is set, so one other hash of sixteen passes.
        let n_bits = (16 * n).next_power_of_two().clamp(1 << 10, 1 << 27);
        let mut filter = BloomFilter {
            bits: vec![0; n_bits / 64],
            mask: n_bits as u64 - 1,
        };
        for hash in hashes {
            let bit = hash & filter.mask;
            filter.bits[(bit / 64) as usize] |= 1 << (bit % 64);
        }
        filter
    }

    fn may_hold(&self, hash: u64) -> bool {
        let bit = hash & self.mask;
        self.bits[(bit / 64) as usize] >> (bit % 64) & 1 == 1
    }
}

/// What counts of a text: no white space, no ASCII punctuation.
pub(crate) fn significant(text: &str) -> impl Iterator<Item = char> {
    text.chars()
        .filter(|c| !c.is_whitespace() && !c.is_ascii_punctuation())
}

/// Calls `f` with the hash and the first place of every run of `length` characters.
fn for_runs(text: &str, length: usize, mut f: impl FnMut(u64, usize)) {
    const BASE: u64 = 0x0000_0100_0000_01b3;
    // A text has at most as many characters as bytes.
    if text.len() < length {
        return;
    }
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

    fn texts<'t>(texts: &[(usize, &'t str)]) -> Vec<UnitText<'t>> {
        texts
            .iter()
            .map(|(unit, text)| UnitText::new(*unit, text))
            .collect()
    }

    fn near(all: &[(usize, &str)]) -> Vec<(usize, usize)> {
        near_duplicates(&texts(all), |_, _| false)
    }

    #[test]
    fn near_duplicates_are_found_and_others_are_not() {
        assert_eq!(near(&[(0, A), (1, C), (2, B)]), [(0, 2)]);
        let more = [
            (0, A),
            (1, C),
            (1, A),
            (1, "And a third line, to make most of it new."),
        ];
        assert_eq!(near(&more), [], "most of unit 1 is new");
        assert_eq!(near(&[(0, "short"), (1, "short")]), []);
    }

    #[test]
    fn copies_of_copies_are_tied_with_few_pairs() {
        let all: Vec<String> = (0..300)
            .map(|n| format!("{} {n}", if n % 3 == 0 { A } else { C }))
            .collect();
        let all: Vec<_> = all.iter().map(String::as_str).enumerate().collect();
        let pairs = near(&all);
        // Two families: as many pairs as it takes to tie each, and none across.
        assert_eq!(pairs.len(), 298);
        assert!(pairs.iter().all(|(a, b)| (a % 3 == 0) == (b % 3 == 0)));
    }

    #[test]
    fn near_duplicates_agree_with_the_plain_definition() {
        // Sentences of a small vocabulary, many of them half alike.
        let words = [
            "tide", "bell", "quay", "letter", "Tuesday", "wax", "net", "salt", "scale",
        ];
        let mut state = 5u64;
        let mut next = |n: usize| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) as usize % n
        };
        let mut all: Vec<String> = Vec::new();
        for at in 0..120 {
            let mut text: Vec<&str> = (0..12).map(|_| words[next(words.len())]).collect();
            if at % 2 == 1 && next(3) > 0 {
                let place = next(9);
                let old = all[at - 1].clone();
                text = old
                    .split(' ')
                    .map(|w| *words.iter().find(|x| **x == w).unwrap())
                    .collect();
                for k in 0..1 + next(3) {
                    text[place + k] = words[next(words.len())];
                }
            }
            all.push(text.join(" "));
        }
        let all: Vec<_> = all.iter().map(String::as_str).enumerate().collect();
        let all = texts(&all);
        let mut plain = Components::new(all.len());
        for a in 0..all.len() {
            for b in 0..a {
                if jaccard(&runs(&all[a..=a]), &runs(&all[b..=b])) >= DUPLICATE_SHARE {
                    plain.tie(a, b);
                }
            }
        }
        let mut found = Components::new(all.len());
        for (a, b) in near_duplicates(&all, |_, _| false) {
            found.tie(a, b);
        }
        assert!(plain.groups().len() < 100, "{}", plain.groups().len());
        assert_eq!(found.groups(), plain.groups());
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
    fn scene_with_a_tenth_of_copied_lines_is_contaminated() {
        let joined = format!("{A} {C}");
        let copies = |held_out: &[(usize, &str)]| -> Vec<(usize, usize, bool)> {
            let train = [joined.as_str()].into_iter();
            copies(Language::En, &texts(held_out), train)
                .into_iter()
                .map(|(unit, copied)| (unit, copied.n_copied_lines, copied.is_contaminated()))
                .collect()
        };
        assert_eq!(copies(&[(7, A), (7, B)]), [(7, 1, true)]);
        assert!(copies(&[(7, B)]).is_empty());
        let mut long = vec![(7, B); 12];
        long.push((7, A));
        assert_eq!(copies(&long), [(7, 1, false)]);
    }

    #[test]
    fn page_of_which_half_stands_in_a_mission_retells_it() {
        let missions = [(0, A), (0, C), (1, "nothing of it here, whatever")];
        let retell = |others: &[(usize, &str)], is_page: bool| -> Vec<usize> {
            let found = retellings(&missions, &texts(others), |_| is_page);
            found.into_iter().collect()
        };
        let page = format!("It is written: {A} So they say on the coast.");
        assert_eq!(retell(&[(4, &page)], false), [4]);
        let other = "The bell had rung, but it was another bell in quite another town, they say.";
        assert!(retell(&[(4, other)], true).is_empty());
        assert!(
            retell(&[(4, &A[..20])], true).is_empty(),
            "too short to tell anything"
        );
        // One paragraph of many: enough for a page, not for a scene.
        let many = [(4, other), (4, page.as_str()), (4, other)];
        assert_eq!(retell(&many, true), [4]);
        assert!(retell(&many, false).is_empty());
    }

    #[test]
    fn half_of_two_missions_is_no_retelling_of_one() {
        let third = "somewhere else entirely, and long enough to be told";
        let told = format!("{} {} {third}", &A[..44], &C[..44]);
        let of = |missions: &[(usize, &str)]| retellings(missions, &texts(&[(4, &told)]), |_| true);
        assert_eq!(of(&[(0, A), (0, C)]), BTreeSet::from([4]));
        assert!(of(&[(0, A), (1, C)]).is_empty());
    }
}
