//! Decides the sides of a story's scenes: what is tied stays together, missions and scenes are drawn by seed, and what
//! would make a held-out side easy is moved out of the way. docs/split.md says why.

mod draw;

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use rayon::prelude::*;

use crate::components::Components;
use crate::error::{Error, Result};
use crate::language::Language;
use crate::manifest::SourceFiles;
use crate::rows::BuiltRow;
use crate::similar;
use crate::split::{Side, Split, SplitOptions, SplitReport};

use draw::Draw;

/// Characters from which on a text ties the scenes that hold it; shorter ones are formulas ("Yes, my lord.").
pub(crate) const TYING_CHARACTERS: usize = 12;

/// Rules that keep scenes from training.
const RETELLS: &str = "retells a mission of val-strict";
const TIED: &str = "tied to a mission of val-strict";

/// A scene (or voice line, or page) as splitting sees it.
#[derive(Debug, Clone)]
pub(crate) struct Unit {
    pub id: String,
    /// Chapter or campaign: each gives its share.
    pub stratum: String,
    /// The mission that it belongs to, if any.
    pub mission: Option<String>,
    /// Lines of the character, and of everyone.
    pub n_own_lines: usize,
    pub n_lines: usize,
}

/// A text of a unit in one language.
#[derive(Debug, Clone, Copy)]
pub(crate) struct UnitText<'t> {
    pub unit: usize,
    pub text: &'t str,
    /// The text's hash in the source, where it has such.
    pub hash: Option<i128>,
}

impl<'t> UnitText<'t> {
    pub fn new(unit: usize, text: &'t str) -> UnitText<'t> {
        UnitText {
            unit,
            text,
            hash: None,
        }
    }

    /// Equal for texts that are the same but for case, white space and punctuation; `None` for a formula.
    fn key(&self) -> Option<u64> {
        let text = self.text.trim();
        text.chars().nth(TYING_CHARACTERS - 1)?;
        let mut n_folded = 0;
        let folded = similar::significant(text).flat_map(|c| {
            n_folded += 1;
            // Most characters are ASCII, or of a script without cases.
            let lower = if c.is_ascii() || !c.is_uppercase() {
                [Some(c.to_ascii_lowercase()), None, None]
            } else {
                let mut lower = c.to_lowercase();
                [lower.next(), lower.next(), lower.next()]
            };
            lower.into_iter().flatten()
        });
        let key = hash(folded);
        if n_folded >= TYING_CHARACTERS {
            return Some(key);
        }
        // Mostly punctuation: as it stands.
        Some(hash(text.chars()))
    }
}

/// A polynomial over the characters, its high bits folded into the low ones.
fn hash(chars: impl Iterator<Item = char>) -> u64 {
    const BASE: u64 = 0x9e37_79b9_7f4a_7c15;
    let hash = chars.fold(0u64, |hash, c| {
        hash.wrapping_mul(BASE).wrapping_add(u64::from(c) + 1)
    });
    (hash ^ (hash >> 32)).wrapping_mul(BASE)
}

/// A story as splitting sees it.
pub(crate) trait Splittable: Sync {
    fn units(&self) -> &[Unit];

    /// Calls `f` with all texts of a language, in the order of their units.
    ///
    /// # Errors
    /// The texts cannot be read, or what `f` reports.
    fn with_texts<R>(
        &self,
        language: Language,
        f: impl FnOnce(&[UnitText<'_>]) -> Result<R>,
    ) -> Result<R>;
}

/// What a split was made from.
pub(crate) struct Origin {
    pub source_sha256: String,
    pub source_files: SourceFiles,
    pub character_sha256: String,
    /// Languages that data sets are built in.
    pub languages: Vec<Language>,
}

/// Splits a story: the same story, character and options give the same split.
///
/// # Errors
/// The texts cannot be read.
pub(crate) fn make(
    source: &impl Splittable,
    options: SplitOptions,
    origin: Origin,
) -> Result<Split> {
    let units = source.units();
    let mut report = SplitReport {
        n_scenes: units.len(),
        ..SplitReport::default()
    };
    // 1. what belongs together
    let ties = ties(source)?;
    let mut components = Components::new(units.len());
    for (a, b) in ties.iter().flat_map(|(_, ties)| &ties.by_text) {
        report.ties_by_text += usize::from(components.tie(*a, *b));
    }
    for (a, b) in ties.iter().flat_map(|(_, ties)| &ties.by_likeness) {
        report.ties_by_likeness += usize::from(components.tie(*a, *b));
    }
    let groups = components.groups();
    report.n_components = groups.len();
    report.largest_component = groups.iter().map(Vec::len).max().unwrap_or(0);
    let n_texts: Vec<(Language, Vec<u32>)> = ties
        .into_iter()
        .map(|(language, ties)| (language, ties.n_texts))
        .collect();
    // 2. the draw
    let mut draw = Draw {
        units,
        options,
        is_told: (0..units.len())
            .map(|unit| n_texts.iter().any(|(_, n)| n[unit] > 0))
            .collect(),
        places: vec![None; units.len()],
        report,
    };
    draw.strict(&groups);
    draw.val(&groups);
    draw.probe(&groups, &n_texts, &origin.languages);
    let places: Vec<Place> = draw
        .places
        .into_iter()
        .map(|place| place.unwrap_or(Place::On(Side::Train)))
        .collect();
    // 3. what is moved out of the way
    let (places, n_copied_lines_left) = moved(source, places)?;
    draw.report.copied_lines_left = n_copied_lines_left;
    let mut split = Split::new(
        options,
        origin.source_sha256,
        origin.source_files,
        origin.character_sha256,
        draw.report,
    );
    for (unit, place) in units.iter().zip(&places) {
        let id = unit.id.clone();
        match place {
            Place::On(Side::Train) => _ = split.train.insert(id),
            Place::On(Side::Val) => _ = split.val.insert(id),
            Place::On(Side::ValStrict) => _ = split.val_strict.insert(id),
            Place::On(Side::Contaminated) => _ = split.contaminated.insert(id),
            Place::On(side @ (Side::ProbeX | Side::Filtered)) => {
                unreachable!("{side:?} has a place of its own")
            }
            Place::Probe(language) => _ = split.probe_x.insert(id, *language),
            Place::Filtered(rule) => _ = split.filtered.insert(id, (*rule).to_owned()),
        }
    }
    count(&mut split.report, &places, &n_texts);
    Ok(split)
}

/// Fails if a text of twelve characters or more of one language stands on the training side and a held-out one.
/// `root`: where the units come from; `pages`: rows that were made of wiki pages before, of which the split may know none.
///
/// # Errors
/// [`Error::Leak`] with both scenes, a scene that the split does not know, or the texts cannot be read.
pub(crate) fn guard(
    source: &impl Splittable,
    root: &Path,
    split: &Split,
    pages: &[BuiltRow],
) -> Result<()> {
    let units = source.units();
    if let Some(unit) = units.iter().find(|u| split.side(&u.id, None).is_none()) {
        return Err(Error::UnknownScene {
            path: root.to_owned(),
            scene: unit.id.clone(),
            remedy: "split the story as it is now with `cyrene corpus split --force` (pages of a vendor folder: with --vendor FOLDER)",
        });
    }
    Language::ALL.into_par_iter().try_for_each(|language| {
        source.with_texts(language, |texts| {
            let mut guard = Guard::new(language);
            for text in texts {
                let scene = units[text.unit].id.as_str();
                if let Some(side) = split.side(scene, Some(language)) {
                    guard.see(side, scene, text)?;
                }
            }
            // The pages are in simplified Chinese.
            for row in pages.iter().filter(|_| language == Language::Chs) {
                let Some(side) = split.side(&row.scene, None) else {
                    continue;
                };
                for line in row.messages.iter().flat_map(|m| m.content.split('\n')) {
                    guard.meet(side, &row.scene, &UnitText::new(0, line))?;
                }
            }
            Ok(())
        })
    })
}

/// Where a unit goes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Place {
    On(Side),
    Probe(Language),
    Filtered(&'static str),
}

impl Place {
    fn side(self, language: Language) -> Side {
        match self {
            Place::On(side) => side,
            Place::Probe(out) if out == language => Side::ProbeX,
            Place::Probe(_) => Side::Train,
            Place::Filtered(_) => Side::Filtered,
        }
    }
}

/// What one language says about its units.
struct Ties {
    /// Texts of each unit.
    n_texts: Vec<u32>,
    by_text: Vec<(usize, usize)>,
    by_likeness: Vec<(usize, usize)>,
}

/// The ties of every language. Chinese first: what it ties, the others need not compare.
fn ties(source: &impl Splittable) -> Result<Vec<(Language, Ties)>> {
    let n_units = source.units().len();
    let of = |language: Language, roots: &[usize]| -> Result<(Language, Ties)> {
        source.with_texts(language, |texts| {
            Ok((language, ties_of(n_units, texts, roots)))
        })
    };
    let alone: Vec<usize> = (0..n_units).collect();
    let first = of(Language::ALL[0], &alone)?;
    let mut known = Components::new(n_units);
    for (a, b) in first.1.by_text.iter().chain(&first.1.by_likeness) {
        known.tie(*a, *b);
    }
    let roots = known.roots();
    let rest = Language::ALL[1..]
        .par_iter()
        .map(|language| of(*language, &roots))
        .collect::<Result<Vec<_>>>()?;
    Ok(std::iter::once(first).chain(rest).collect())
}

/// `roots`: who is tied already, as [`Components::roots`] gives it.
fn ties_of(n_units: usize, texts: &[UnitText<'_>], roots: &[usize]) -> Ties {
    let mut n_texts = vec![0; n_units];
    for text in texts {
        n_texts[text.unit] += 1;
    }
    let mut keys: Vec<(u64, usize)> = texts
        .par_iter()
        .filter_map(|text| Some((text.key()?, text.unit)))
        .collect();
    keys.par_sort_unstable();
    keys.dedup();
    let by_text = keys
        .windows(2)
        .filter(|pair| pair[0].0 == pair[1].0)
        .map(|pair| (pair[0].1, pair[1].1))
        .collect();
    Ties {
        n_texts,
        by_text,
        by_likeness: similar::near_duplicates(texts, |a, b| roots[a] == roots[b]),
    }
}

/// Guards the places, then moves held-out copies of training text and retellings of strict missions out of both sides.
/// Gives the copied lines, over all languages, that stay in held-out scenes, too.
fn moved(source: &impl Splittable, mut places: Vec<Place>) -> Result<(Vec<Place>, usize)> {
    let units = source.units();
    let mut mission_idx: HashMap<&str, usize> = HashMap::new();
    for unit in units {
        if let Some(mission) = &unit.mission {
            let next = mission_idx.len();
            mission_idx.entry(mission).or_insert(next);
        }
    }
    let found = Language::ALL
        .par_iter()
        .map(|language| {
            source.with_texts(*language, |texts| {
                let side = |text: &UnitText<'_>| places[text.unit].side(*language);
                let mut guard = Guard::new(*language);
                for text in texts {
                    guard.see(side(text), &units[text.unit].id, text)?;
                }
                let missions: Vec<(usize, &str)> = texts
                    .iter()
                    .filter(|t| side(t) == Side::ValStrict)
                    .filter_map(|t| {
                        let mission = units[t.unit].mission.as_deref()?;
                        Some((mission_idx[mission], t.text))
                    })
                    .collect();
                // A probe's other languages are trained on, so it is asked in all of them.
                let others: Vec<_> = texts
                    .iter()
                    .filter(|t| matches!(side(t), Side::Train | Side::ProbeX))
                    .copied()
                    .collect();
                let retellings = if missions.is_empty() {
                    BTreeSet::new()
                } else {
                    similar::retellings(&missions, &others, |unit| units[unit].mission.is_none())
                };
                let held_out: Vec<_> = texts
                    .iter()
                    .filter(|t| side(t).is_held_out())
                    .copied()
                    .collect();
                // What retells a mission is not trained on, so it contaminates nothing.
                let train = texts
                    .iter()
                    .filter(|t| side(t) == Side::Train && !retellings.contains(&t.unit));
                let copies = similar::copies(*language, &held_out, train.map(|t| t.text));
                Ok((copies, retellings))
            })
        })
        .collect::<Result<Vec<_>>>()?;
    for (copies, retellings) in &found {
        for (unit, _) in copies.iter().filter(|(_, copied)| copied.is_contaminated()) {
            places[*unit] = Place::On(Side::Contaminated);
        }
        for unit in retellings {
            if places[*unit] != Place::On(Side::Contaminated) {
                places[*unit] = Place::Filtered(RETELLS);
            }
        }
    }
    let is_out = |place| matches!(place, Place::On(Side::Contaminated) | Place::Filtered(_));
    let n_left = found
        .iter()
        .flat_map(|(copies, _)| copies)
        .filter(|(unit, _)| !is_out(places[**unit]))
        .map(|(_, copied)| copied.n_copied_lines)
        .sum();
    Ok((places, n_left))
}

/// Looks for a text of one language on the training side and a held-out one.
struct Guard<'u> {
    language: Language,
    /// Key -> the first scene on the training side, and the first that is held out.
    seen: HashMap<u64, [Option<&'u str>; 2]>,
}

impl<'u> Guard<'u> {
    fn new(language: Language) -> Guard<'u> {
        Guard {
            language,
            seen: HashMap::new(),
        }
    }

    /// # Errors
    /// [`Error::Leak`] if the text was seen on the other side.
    fn see(&mut self, side: Side, scene: &'u str, text: &UnitText<'_>) -> Result<()> {
        let (Some(place), Some(key)) = (Self::place(side), text.key()) else {
            return Ok(());
        };
        let known = self.seen.entry(key).or_default();
        known[place].get_or_insert(scene);
        let known = *known;
        self.check(known, text)
    }

    /// As [`Guard::see`], of a text that is held against those seen and not against others like it.
    ///
    /// # Errors
    /// [`Error::Leak`] if the text was seen on the other side.
    fn meet(&self, side: Side, scene: &'u str, text: &UnitText<'_>) -> Result<()> {
        let (Some(place), Some(key)) = (Self::place(side), text.key()) else {
            return Ok(());
        };
        let mut known = self.seen.get(&key).copied().unwrap_or_default();
        known[place] = Some(scene);
        self.check(known, text)
    }

    /// In `seen`; `None` on neither side.
    fn place(side: Side) -> Option<usize> {
        match side {
            Side::Train => Some(0),
            Side::Val | Side::ValStrict | Side::ProbeX => Some(1),
            Side::Contaminated | Side::Filtered => None,
        }
    }

    fn check(&self, known: [Option<&str>; 2], text: &UnitText<'_>) -> Result<()> {
        let [Some(train), Some(held_out)] = known else {
            return Ok(());
        };
        let hash = text
            .hash
            .map_or(String::new(), |hash| format!(", hash {hash}"));
        Err(Error::Leak {
            text: text.text.trim().to_owned(),
            language: self.language.code(),
            hash,
            held_out: held_out.to_owned(),
            train: train.to_owned(),
        })
    }
}

/// Scenes and lines by side and language.
fn count(report: &mut SplitReport, places: &[Place], n_texts: &[(Language, Vec<u32>)]) {
    for place in places {
        let side = match place {
            Place::On(side) => *side,
            Place::Probe(_) => Side::ProbeX,
            Place::Filtered(_) => Side::Filtered,
        };
        report.sides.entry(side).or_default().scenes += 1;
    }
    for (language, n_texts) in n_texts {
        for (place, n) in places.iter().zip(n_texts) {
            if *n > 0 {
                let side = report.sides.entry(place.side(*language)).or_default();
                *side.lines.entry(*language).or_default() += u64::from(*n);
            }
        }
    }
}

#[cfg(test)]
mod tests;
