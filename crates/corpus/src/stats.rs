//! What data sets hold, for the eye: lengths, holes, speakers; how often a mixture shows each scene; a random sample.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::Serialize;
use sha2::{Digest, Sha256};
use text::Role;

use crate::error::Result;
use crate::language::Language;
use crate::manifest::{DataFile, RowScenes, Tally, TrainingTokens};
use crate::rows::{self, BuiltRow, Found};
use crate::split::{Side, Split};
use crate::weighted_source::WeightedSource;

/// Passes over the same scene above which a mixture teaches by heart.
pub const MANY_PASSES: f64 = 4.0;

/// A data set in numbers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Stats {
    /// Name of the data set: `sft/cyrene`.
    pub task: String,
    /// Its files.
    pub files: Vec<FileStats>,
    /// Scenes that its rows come from.
    pub n_scenes: usize,
    /// With a split: scenes by side; one that is on different sides in different languages counts on each.
    pub sides: Vec<(String, u64)>,
    /// Whose lines are the assistant's, with the rows; for pre-training empty.
    pub speakers: Vec<(String, u64)>,
}

impl Stats {
    /// The first bin in which any language has a row.
    pub fn first_bin(&self) -> usize {
        let first = |file: &FileStats| file.histogram.iter().position(|bin| bin.n_rows > 0);
        self.files.iter().filter_map(first).min().unwrap_or(0)
    }

    /// The borders of the bins, in tokens, from the first that is not empty: `512`, `1k` (1024), `2k`.
    pub fn edges(&self) -> Vec<String> {
        let bins = self.files.iter().map(|file| &file.histogram);
        let Some(most) = bins.max_by_key(|bins| bins.len()) else {
            return Vec::new();
        };
        let used = most.get(self.first_bin()..).unwrap_or_default();
        let Some(last) = used.last() else {
            return Vec::new();
        };
        let borders = used.iter().map(|bin| bin.from).chain([last.to]);
        borders.map(power_of_two).collect()
    }

    /// What training reads of the conversations of all files; `None` for documents.
    pub fn training(&self) -> Option<TrainingTokens> {
        TrainingTokens::sum(self.files.iter().map(|file| file.training))
    }

    /// Rows and tokens by side over all files, in the order of the sides.
    pub fn tallies_by_side(&self) -> Vec<(String, Tally)> {
        let mut sums: Vec<(String, Tally)> = Vec::new();
        // A side that a language lacks must not come after one that follows it: the file with the most sides says the order.
        let mut files: Vec<_> = self.files.iter().collect();
        files.sort_by_key(|file| std::cmp::Reverse(file.sides.len()));
        for (side, tally) in files.into_iter().flat_map(|file| &file.sides) {
            match sums.iter_mut().find(|(name, _)| name == side) {
                Some((_, sum)) => sum.add(tally),
                None => sums.push((side.clone(), *tally)),
            }
        }
        sums
    }

    /// What languages lack over all files, by kind.
    pub fn holes(&self) -> BTreeMap<String, u64> {
        let mut sums = BTreeMap::new();
        for (kind, n) in self.files.iter().flat_map(|file| &file.holes) {
            *sums.entry(kind.clone()).or_default() += n;
        }
        sums
    }

    /// What the rules left out over all files, by rule.
    pub fn filtered(&self) -> BTreeMap<String, Tally> {
        let mut sums: BTreeMap<String, Tally> = BTreeMap::new();
        for (rule, tally) in self.files.iter().flat_map(|file| &file.filtered) {
            sums.entry(rule.clone()).or_default().add(tally);
        }
        sums
    }
}

fn power_of_two(n: u64) -> String {
    match n {
        n if n >= 1 << 20 => format!("{}M", n >> 20),
        n if n >= 1 << 10 => format!("{}k", n >> 10),
        n => n.to_string(),
    }
}

/// One file of a data set in numbers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FileStats {
    /// Language code, or the name of a vendor set.
    pub key: String,
    /// Rows in it.
    pub n_rows: u64,
    /// Tokens of all rows.
    pub n_tokens: u64,
    /// Of conversations: what training reads of them, system prompt and template counted in.
    pub training: Option<TrainingTokens>,
    /// Tokens of a row: half of the rows are at most this long, 95 % of them, all of them.
    pub median: u64,
    /// 95 % of the rows have at most so many tokens.
    pub p95: u64,
    /// Tokens of the longest row.
    pub longest: u64,
    /// Rows by length; empty bins between others are there, so that bars of languages stack.
    pub histogram: Vec<Bin>,
    /// What is absent in this language, by what.
    pub holes: BTreeMap<String, u64>,
    /// What the rules left out, by the rule's name.
    pub filtered: BTreeMap<String, Tally>,
    /// With a split: rows and tokens by side, as [`rows::load`] gives them: a row with lines of several sides is one row on
    /// each, so rows may add up to more than `n_rows`; tokens do not.
    pub sides: Vec<(String, Tally)>,
    /// Whose lines are the assistant's, with the rows.
    pub speakers: Vec<(String, u64)>,
}

/// Rows of `from..to` tokens; the bounds are powers of two but the first, 0..1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Bin {
    /// Fewest tokens of a row.
    pub from: u64,
    /// One more than the most tokens of a row.
    pub to: u64,
    /// Rows of such lengths.
    pub n_rows: u64,
    /// Their tokens.
    pub n_tokens: u64,
}

/// Numbers of a data set: its folder, or one file of it.
///
/// # Errors
/// As [`rows::load`]; a file of token counts that does not fit.
pub fn stats(path: &Path, split: Option<&Split>) -> Result<Stats> {
    let found = rows::find(path, split)?;
    let counts = found.token_counts()?;
    let files = found
        .files
        .par_iter()
        .map(|file| file_stats(&found, file, &counts, split))
        .collect::<Result<Vec<_>>>()?;
    let mut speakers: HashMap<&str, u64> = HashMap::new();
    for (name, n) in files.iter().flat_map(|file| &file.speakers) {
        *speakers.entry(name).or_default() += n;
    }
    let mut scenes = HashSet::new();
    let mut on_sides = HashSet::new();
    let mut sides: BTreeMap<Side, u64> = BTreeMap::new();
    for file in &found.files {
        for origin in &file.rows {
            for part in found.scenes_of(file, origin)? {
                scenes.insert(part.scene);
                let side = found.side(file, split, part.scene)?;
                if split.is_some() && on_sides.insert((part.scene, side)) {
                    *sides.entry(side).or_default() += 1;
                }
            }
        }
    }
    Ok(Stats {
        speakers: by_count(speakers),
        n_scenes: scenes.len(),
        sides: by_name(sides),
        files,
        task: found.task,
    })
}

fn file_stats(
    found: &Found,
    file: &DataFile,
    counts: &BTreeMap<String, Vec<u64>>,
    split: Option<&Split>,
) -> Result<FileStats> {
    let tokens = found.tokens_of(file, counts)?;
    let mut speakers: HashMap<String, u64> = HashMap::new();
    found.each_record(
        file,
        |_| true,
        |record| {
            if let Some(system) = record.messages.first().filter(|m| m.role == Role::System) {
                *speakers.entry(system.content.clone()).or_default() += 1;
            }
            Ok(())
        },
    )?;
    let mut sides: BTreeMap<Side, Tally> = BTreeMap::new();
    if split.is_some() {
        for (origin, of_row) in file.rows.iter().zip(tokens) {
            let mut counted = Vec::new();
            for part in found.scenes_of(file, origin)? {
                let side = found.side(file, split, part.scene)?;
                let tally = sides.entry(side).or_default();
                let of_part = part.lines_and_tokens;
                tally.tokens += of_part.map_or(*of_row, |(_, tokens)| u64::from(tokens));
                if !counted.contains(&side) {
                    tally.rows += 1;
                    counted.push(side);
                }
            }
        }
    }
    let mut sorted = tokens.to_vec();
    sorted.sort_unstable();
    let quantile = |share: f64| {
        let place = (share * sorted.len() as f64).ceil() as usize;
        sorted.get(place.max(1) - 1).copied().unwrap_or(0)
    };
    Ok(FileStats {
        key: file.key.clone(),
        n_rows: file.n_rows,
        n_tokens: file.n_tokens,
        training: file.training,
        median: quantile(0.5),
        p95: quantile(0.95),
        longest: quantile(1.0),
        histogram: histogram(tokens),
        holes: file.holes.clone(),
        filtered: file.filtered.clone(),
        sides: by_name(sides),
        speakers: by_count(speakers),
    })
}

/// Sides under their names, in the order of the sides.
fn by_name<T>(sides: BTreeMap<Side, T>) -> Vec<(String, T)> {
    let sides = sides.into_iter();
    sides
        .map(|(side, value)| (side.name().to_owned(), value))
        .collect()
}

fn by_count<T: Into<String>>(counts: HashMap<T, u64>) -> Vec<(String, u64)> {
    let counts = counts.into_iter().map(|(name, n)| (name.into(), n));
    let mut counts: Vec<(String, u64)> = counts.collect();
    counts.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    counts
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
    /// Scenes that are trained on.
    pub n_scenes: usize,
    /// Passes over a scene in one language: mean over scenes and languages, and the most.
    pub same_language_mean: f64,
    /// The most passes over a scene in one language.
    pub same_language_most: f64,
    /// Passes over a scene in all languages together.
    pub all_languages_mean: f64,
    /// The most passes over a scene in all languages together.
    pub all_languages_most: f64,
    /// Scenes and languages above [`MANY_PASSES`].
    pub n_above_limit: usize,
    /// By language (or vendor set): passes over a scene, mean and most.
    pub languages: Vec<LanguagePasses>,
    /// Scenes and languages by passes, and scenes by passes in all languages, both in rising order.
    pub same_language: Vec<PassCount>,
    /// Scenes by passes in all languages, in rising order.
    pub all_languages: Vec<PassCount>,
}

/// Passes of a mixture over the scenes of one language.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LanguagePasses {
    /// Language code, or the name of a vendor set.
    pub key: String,
    /// Scenes of this language that are trained on.
    pub n_scenes: usize,
    /// Mean passes over them.
    pub mean: f64,
    /// The most passes over one of them.
    pub most: f64,
}

/// How many are shown so often.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PassCount {
    /// How often in an epoch.
    pub passes: f64,
    /// How many.
    pub count: u64,
}

/// Effective passes per scene of a mixture in one epoch. `sources` are data sets or files of them; a source shows each of its training scenes once for every unit of weight.
///
/// # Errors
/// As [`rows::load`].
pub(crate) fn passes(sources: &[WeightedSource], split: Option<&Split>) -> Result<Passes> {
    // Ordered, so that the same mixture gives the same sums to the last bit.
    let mut by_scene: BTreeMap<String, BTreeMap<String, f64>> = BTreeMap::new();
    for WeightedSource { path, weight } in sources {
        let found = rows::find(path, split)?;
        for file in &found.files {
            let in_file: HashSet<u32> = file
                .rows
                .iter()
                .flat_map(|row| match row {
                    RowScenes::One(scene) => vec![*scene],
                    RowScenes::Several(parts) => parts.iter().map(|(scene, ..)| *scene).collect(),
                })
                .collect();
            for scene in in_file {
                let id = found.scene(file, scene)?;
                if found.side(file, split, id)? == Side::Train {
                    let languages = by_scene.entry(id.to_owned()).or_default();
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
    let mut by_key: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for (key, passes) in by_scene.values().flatten() {
        by_key.entry(key).or_default().push(*passes);
    }
    let languages = by_key.into_iter().map(|(key, passes)| LanguagePasses {
        key: key.to_owned(),
        n_scenes: passes.len(),
        mean: mean(&passes),
        most: most(&passes),
    });
    Ok(Passes {
        languages: languages.collect(),
        same_language: pass_counts(&each),
        all_languages: pass_counts(&sums),
        n_scenes: by_scene.len(),
        same_language_mean: mean(&each),
        same_language_most: most(&each),
        all_languages_mean: mean(&sums),
        all_languages_most: most(&sums),
        n_above_limit: each.iter().filter(|n| **n > MANY_PASSES).count(),
    })
}

fn pass_counts(values: &[f64]) -> Vec<PassCount> {
    let mut values = values.to_vec();
    values.sort_unstable_by(f64::total_cmp);
    let mut counts: Vec<PassCount> = Vec::new();
    for passes in values {
        match counts.last_mut() {
            Some(last) if last.passes == passes => last.count += 1,
            _ => counts.push(PassCount { passes, count: 1 }),
        }
    }
    counts
}

/// A row of a sample and where it stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// File of the line.
    pub path: PathBuf,
    /// From 1.
    pub line: usize,
    /// The row.
    pub row: BuiltRow,
}

/// A random sample of `n_lines` lines of a data set, the same for the same seed. A line whose scenes are on different
/// sides gives a row for each side.
///
/// # Errors
/// As [`rows::load`].
pub fn peek(
    path: &Path,
    split: Option<&Split>,
    language: Option<Language>,
    n_lines: usize,
    seed: u64,
) -> Result<Vec<Sampled>> {
    let found = rows::find(path, split)?;
    let files = found.files.iter().enumerate();
    let files = files.filter(|(_, file)| language.is_none() || file.language == language);
    let mut places: Vec<(usize, usize)> = files
        .flat_map(|(at, file)| (0..file.rows.len()).map(move |idx| (at, idx)))
        .collect();
    let drawn = draw(places.len(), n_lines, seed);
    places = drawn.into_iter().map(|at| places[at]).collect();
    let mut by_place: HashMap<(usize, usize), Vec<Sampled>> = HashMap::new();
    for (at, file) in found.files.iter().enumerate() {
        let wanted: HashSet<usize> = places
            .iter()
            .filter(|(file, _)| *file == at)
            .map(|(_, idx)| *idx)
            .collect();
        if wanted.is_empty() {
            continue;
        }
        found.each_record(
            file,
            |idx| wanted.contains(&idx),
            |record| {
                let line = record.idx + 1;
                let rows = found.by_side(file, split, record)?;
                let rows = rows.into_iter().map(|row| Sampled {
                    path: found.out.join(&file.path),
                    line,
                    row,
                });
                by_place.insert((at, line - 1), rows.collect());
                Ok(())
            },
        )?;
    }
    let rows = places.iter().filter_map(|place| by_place.remove(place));
    Ok(rows.flatten().collect())
}

/// `n_drawn` of the places 0..n in a random order that the seed alone decides.
pub fn draw(n: usize, n_drawn: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<([u8; 32], usize)> = (0..n)
        .map(|idx| {
            let mut hash = Sha256::new();
            hash.update(seed.to_le_bytes());
            hash.update((idx as u64).to_le_bytes());
            (hash.finalize().into(), idx)
        })
        .collect();
    order.sort_unstable();
    order.truncate(n_drawn);
    order.into_iter().map(|(_, idx)| idx).collect()
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
