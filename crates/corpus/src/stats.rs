//! What data sets hold, for the eye: lengths, holes, speakers; how often a mixture shows each scene; a random sample.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::error::Result;
use crate::language::Language;
use crate::manifest::{RowScenes, Tally};
use crate::output::Role;
use crate::rows::{self, Row};
use crate::split::{Side, Split};

/// Passes over the same scene above which a mixture teaches by heart.
pub const MANY_PASSES: f64 = 4.0;

/// A data set in numbers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Stats {
    pub files: Vec<FileStats>,
    pub n_scenes: usize,
    /// Whose lines are the assistant's, with the rows; for pre-training empty.
    pub speakers: Vec<(String, u64)>,
}

/// One file of a data set in numbers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FileStats {
    /// Language code, or the name of a vendor set.
    pub key: String,
    pub n_rows: u64,
    pub n_tokens: u64,
    /// Rows by length; empty bins between others are there, so that bars of languages stack.
    pub histogram: Vec<Bin>,
    pub holes: BTreeMap<String, u64>,
    pub filtered: BTreeMap<String, Tally>,
}

/// Rows of `from..to` tokens; the bounds are powers of two but the first, 0..1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Bin {
    pub from: u64,
    pub to: u64,
    pub n_rows: u64,
    pub n_tokens: u64,
}

/// Numbers of a data set: its folder, or one file of it.
///
/// # Errors
/// As [`rows::load`]; a file of token counts that does not fit.
pub fn stats(path: &Path) -> Result<Stats> {
    let found = rows::find(path)?;
    let counts = found.token_counts()?;
    let mut speakers: HashMap<String, u64> = HashMap::new();
    for row in rows::load(path, None)? {
        if let Some(system) = row.messages.first().filter(|m| m.role == Role::System) {
            *speakers.entry(system.content.clone()).or_default() += 1;
        }
    }
    let mut speakers: Vec<_> = speakers.into_iter().collect();
    speakers.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    let files = found.files.iter().map(|file| FileStats {
        key: file.key.clone(),
        n_rows: file.n_rows,
        n_tokens: file.n_tokens,
        histogram: histogram(counts.get(&file.key).map_or(&[], |c| &c[..])),
        holes: file.holes.clone(),
        filtered: file.filtered.clone(),
    });
    Ok(Stats {
        n_scenes: found.dataset.scenes.len(),
        files: files.collect(),
        speakers,
    })
}

fn histogram(tokens: &[u64]) -> Vec<Bin> {
    let n_bins = |n: u64| (u64::BITS - n.leading_zeros()) as usize;
    let most = tokens.iter().copied().max().map_or(0, |n| n_bins(n) + 1);
    let mut bins: Vec<Bin> = (0..most as u32)
        .map(|idx| Bin {
            from: if idx == 0 { 0 } else { 1 << (idx - 1) },
            to: 1 << idx,
            n_rows: 0,
            n_tokens: 0,
        })
        .collect();
    for n in tokens {
        let bin = &mut bins[n_bins(*n)];
        bin.n_rows += 1;
        bin.n_tokens += n;
    }
    bins
}

/// How often a mixture shows its scenes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Passes {
    pub n_scenes: usize,
    /// Passes over a scene in one language: mean over scenes and languages, and the most.
    pub same_language_mean: f64,
    pub same_language_most: f64,
    /// Passes over a scene in all languages together.
    pub all_languages_mean: f64,
    pub all_languages_most: f64,
    /// Scenes and languages above [`MANY_PASSES`].
    pub n_above_limit: usize,
}

/// Effective passes per scene of a mixture in one epoch. `sources` are data sets or files of them with their weights;
/// a source shows each of its training scenes once for every unit of weight.
///
/// # Errors
/// As [`rows::load`].
pub fn passes(sources: &[(&Path, f64)], split: Option<&Split>) -> Result<Passes> {
    let mut by_scene: HashMap<String, HashMap<String, f64>> = HashMap::new();
    for (path, weight) in sources {
        let found = rows::find(path)?;
        for file in &found.files {
            let in_file: HashSet<u32> = file
                .rows
                .iter()
                .flat_map(|row| match row {
                    RowScenes::One(scene) => vec![*scene],
                    RowScenes::Several(parts) => parts.iter().map(|(scene, _)| *scene).collect(),
                })
                .collect();
            for scene in in_file {
                let Some(id) = found.dataset.scenes.get(scene as usize) else {
                    continue;
                };
                let held_out = split
                    .and_then(|s| s.side(id))
                    .is_some_and(|side| side != Side::Train);
                if !held_out {
                    let languages = by_scene.entry(id.clone()).or_default();
                    *languages.entry(file.key.clone()).or_default() += weight;
                }
            }
        }
    }
    let each: Vec<f64> = by_scene
        .values()
        .flat_map(|l| l.values().copied())
        .collect();
    let sums: Vec<f64> = by_scene.values().map(|l| l.values().sum()).collect();
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
    let most = |values: &[f64]| values.iter().copied().fold(0.0, f64::max);
    Ok(Passes {
        n_scenes: by_scene.len(),
        same_language_mean: mean(&each),
        same_language_most: most(&each),
        all_languages_mean: mean(&sums),
        all_languages_most: most(&sums),
        n_above_limit: each.iter().filter(|n| **n > MANY_PASSES).count(),
    })
}

/// A random sample of `n_rows` rows of a data set, the same for the same seed.
///
/// # Errors
/// As [`rows::load`].
pub fn peek(
    path: &Path,
    split: Option<&Split>,
    language: Option<Language>,
    n_rows: usize,
    seed: u64,
) -> Result<Vec<Row>> {
    let mut rows = rows::load(path, split)?;
    rows.retain(|row| language.is_none() || row.language == language);
    let mut order: Vec<([u8; 32], usize)> = (0..rows.len())
        .map(|idx| {
            let mut hash = Sha256::new();
            hash.update(seed.to_le_bytes());
            hash.update((idx as u64).to_le_bytes());
            (hash.finalize().into(), idx)
        })
        .collect();
    order.sort_unstable();
    let chosen: HashMap<usize, usize> = order
        .iter()
        .take(n_rows)
        .enumerate()
        .map(|(place, (_, idx))| (*idx, place))
        .collect();
    let mut sample: Vec<(usize, Row)> = rows
        .into_iter()
        .enumerate()
        .filter_map(|(idx, row)| Some((*chosen.get(&idx)?, row)))
        .collect();
    sample.sort_by_key(|(place, _)| *place);
    Ok(sample.into_iter().map(|(_, row)| row).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histogram_bins_are_powers_of_two() {
        let bins = histogram(&[0, 1, 2, 3, 8, 8]);
        let got: Vec<_> = bins
            .iter()
            .map(|b| (b.from, b.to, b.n_rows, b.n_tokens))
            .collect();
        assert_eq!(
            got,
            [
                (0, 1, 1, 0),
                (1, 2, 1, 1),
                (2, 4, 2, 5),
                (4, 8, 0, 0),
                (8, 16, 2, 16)
            ]
        );
        assert!(histogram(&[]).is_empty());
    }
}
