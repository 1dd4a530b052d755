//! Decides the sides of a story's scenes: what is tied stays together, missions and scenes are drawn by seed, and what
//! would make a held-out side easy is moved out of the way. docs/split.md says why.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::components::Components;
use crate::error::{Error, Result};
use crate::language::Language;
use crate::similar;
use crate::split::{Side, Split, SplitOptions, SplitReport};

/// Characters from which on a text ties the scenes that hold it; shorter ones are formulas ("Yes, my lord.").
pub(crate) const TYING_CHARACTERS: usize = 12;
/// A story of fewer missions has none to spare for `val-strict`.
const FEWEST_MISSIONS: usize = 20;
/// `probe-x` needs about so many groups of scenes in each language to say anything.
const FEWEST_PROBES: usize = 8;
/// A mission is not held out if more than this share of its lines is tied to scenes that stay in training.
const MOST_TIED_OUT: f64 = 0.2;

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
        origin.character_sha256,
        draw.report,
    );
    for (unit, place) in units.iter().zip(&places) {
        let id = unit.id.clone();
        match place {
            Place::On(Side::Train) => _ = split.train.insert(id),
            Place::On(Side::Val) => _ = split.val.insert(id),
            Place::On(Side::ValStrict) => _ = split.val_strict.insert(id),
            Place::On(_) => _ = split.contaminated.insert(id),
            Place::Probe(language) => _ = split.probe_x.insert(id, *language),
            Place::Filtered(rule) => _ = split.filtered.insert(id, (*rule).to_owned()),
        }
    }
    count(&mut split.report, &places, &n_texts);
    Ok(split)
}

/// Fails if a text of twelve characters or more of one language stands on the training side and a held-out one.
///
/// # Errors
/// [`Error::Leak`] with both scenes, or the texts cannot be read.
pub(crate) fn guard(source: &impl Splittable, split: &Split) -> Result<()> {
    Language::ALL.into_par_iter().try_for_each(|language| {
        source.with_texts(language, |texts| {
            let side = |unit: usize| split.side(&source.units()[unit].id, Some(language));
            guard_texts(language, source.units(), texts, side)
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
                guard_texts(*language, units, texts, |unit| {
                    Some(places[unit].side(*language))
                })?;
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

fn guard_texts(
    language: Language,
    units: &[Unit],
    texts: &[UnitText<'_>],
    side: impl Fn(usize) -> Option<Side>,
) -> Result<()> {
    // Key -> the first text on the training side, and the first that is held out.
    let mut seen: HashMap<u64, [Option<usize>; 2]> = HashMap::new();
    for (at, text) in texts.iter().enumerate() {
        let place = match side(text.unit) {
            Some(Side::Train) => 0,
            Some(Side::Val | Side::ValStrict | Side::ProbeX) => 1,
            Some(Side::Contaminated | Side::Filtered) | None => continue,
        };
        let Some(key) = text.key() else { continue };
        let known = seen.entry(key).or_default();
        known[place].get_or_insert(at);
        if let [Some(train), Some(held_out)] = *known {
            let hash = text
                .hash
                .map_or(String::new(), |hash| format!(", hash {hash}"));
            return Err(Error::Leak {
                text: text.text.trim().to_owned(),
                language: language.code(),
                hash,
                held_out: units[texts[held_out].unit].id.clone(),
                train: units[texts[train].unit].id.clone(),
            });
        }
    }
    Ok(())
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

/// The places given so far.
struct Draw<'u> {
    units: &'u [Unit],
    options: SplitOptions,
    /// Whether a unit has a text in any language; one that has none can be measured on nothing.
    is_told: Vec<bool>,
    places: Vec<Option<Place>>,
    report: SplitReport,
}

impl<'u> Draw<'u> {
    /// Whole missions, until the share of lines is met.
    fn strict(&mut self, groups: &[Vec<usize>]) {
        if self.options.share_strict <= 0.0 {
            return;
        }
        let mut missions: BTreeMap<&'u str, Vec<usize>> = BTreeMap::new();
        for (at, unit) in self.units.iter().enumerate() {
            if let Some(mission) = unit.mission.as_ref().filter(|_| self.is_told[at]) {
                missions.entry(mission).or_default().push(at);
            }
        }
        if missions.len() < FEWEST_MISSIONS {
            self.note(format!(
                "no val-strict: the story has {} missions or chapters, and {FEWEST_MISSIONS} are needed",
                missions.len()
            ));
            return;
        }
        let mut group_of = vec![0; self.units.len()];
        for (idx, group) in groups.iter().enumerate() {
            for unit in group {
                group_of[*unit] = idx;
            }
        }
        let mut missions: Vec<Mission<'u>> = missions
            .into_iter()
            .map(|(name, members)| Mission::new(name, members, self.units, self.options.seed))
            .collect();
        missions.sort_by_key(|m| m.order);
        for has_character in [true, false] {
            let share = self.options.share_strict
                * if has_character {
                    1.0
                } else {
                    (self.options.share_rest / self.options.share.max(f64::EPSILON)).min(1.0)
                };
            let of_kind = || missions.iter().filter(|m| m.has_character == has_character);
            let n_lines = of_kind().map(|m| m.n_lines).sum::<usize>() as f64;
            let most = (share * n_lines / 2.0).max(2.0 * n_lines / of_kind().count().max(1) as f64);
            let mut owed = share * n_lines;
            for mission in of_kind() {
                if owed <= 0.0 {
                    break;
                }
                if mission.n_lines as f64 <= most && self.can_be_out(mission, groups, &group_of) {
                    owed -= mission.n_lines as f64;
                    self.report.strict_missions.push(mission.name.to_owned());
                    for unit in &mission.members {
                        self.places[*unit] = Some(Place::On(Side::ValStrict));
                    }
                }
            }
        }
        if self.report.strict_missions.is_empty() {
            self.note(
                "no val-strict: every mission shares too much of its text with the rest".to_owned(),
            );
        }
        self.report.strict_missions.sort();
        self.settle_ties(groups);
    }

    /// Whether a mission may be held out: most of it is not tied to scenes that stay in training.
    fn can_be_out(&self, mission: &Mission<'_>, groups: &[Vec<usize>], group_of: &[usize]) -> bool {
        let members: BTreeSet<usize> = mission.members.iter().copied().collect();
        let mut touched: Vec<usize> = members.iter().map(|unit| group_of[*unit]).collect();
        touched.sort_unstable();
        touched.dedup();
        let (mut tied_out, mut taken_along) = (0, 0);
        for group in touched {
            let (inside, outside) = self.lines(&groups[group], |unit| {
                members.contains(&unit) || self.is_strict(unit)
            });
            if outside > inside {
                let own = groups[group].iter().filter(|unit| members.contains(unit));
                tied_out += own.map(|unit| self.units[*unit].n_lines).sum::<usize>();
            } else {
                taken_along += outside;
            }
        }
        let n_lines: usize = mission.members.iter().map(|m| self.units[*m].n_lines).sum();
        tied_out as f64 <= MOST_TIED_OUT * n_lines as f64 && taken_along <= n_lines
    }

    /// What is tied to a strict mission: if the mission has the larger part of a group, the rest is not trained on;
    /// if the rest is larger, the mission's part is contaminated.
    fn settle_ties(&mut self, groups: &[Vec<usize>]) {
        for group in groups {
            let (inside, outside) = self.lines(group, |unit| self.is_strict(unit));
            if inside == 0 || outside == 0 {
                continue;
            }
            for unit in group {
                if outside > inside && self.is_strict(*unit) {
                    self.places[*unit] = Some(Place::On(Side::Contaminated));
                } else if outside <= inside && !self.is_strict(*unit) {
                    self.places[*unit] = Some(Place::Filtered(TIED));
                }
            }
        }
    }

    fn is_strict(&self, unit: usize) -> bool {
        self.places[unit] == Some(Place::On(Side::ValStrict))
    }

    /// Lines of a group's units that `is_inside`, and of the others; a unit counts one at least.
    fn lines(&self, group: &[usize], is_inside: impl Fn(usize) -> bool) -> (usize, usize) {
        let mut lines = (0, 0);
        for unit in group {
            let n = self.units[*unit].n_lines.max(1);
            if is_inside(*unit) {
                lines.0 += n;
            } else {
                lines.1 += n;
            }
        }
        lines
    }

    /// Scenes in all languages, by chapter, until each has given its share.
    fn val(&mut self, groups: &[Vec<usize>]) {
        let free = self.free(groups);
        for has_character in [true, false] {
            let share = if has_character {
                self.options.share
            } else {
                self.options.share_rest
            };
            for group in self.drawn(&free, has_character, share, "") {
                for unit in group {
                    self.places[*unit] = Some(Place::On(Side::Val));
                }
            }
        }
    }

    /// Scenes in one language each, by chapter.
    fn probe(
        &mut self,
        groups: &[Vec<usize>],
        n_texts: &[(Language, Vec<u32>)],
        languages: &[Language],
    ) {
        if self.options.share_probe <= 0.0 {
            return;
        }
        let n_texts: Vec<_> = n_texts
            .iter()
            .filter(|(l, n)| languages.contains(l) && n.iter().any(|n| *n > 0))
            .collect();
        let free = self.free(groups);
        let expected = self.options.share_probe * free.len() as f64;
        let wanted = FEWEST_PROBES * n_texts.len();
        if n_texts.len() < 2 {
            self.note("no probe-x: the story has one language".to_owned());
            return;
        }
        if expected < wanted as f64 {
            self.note(format!(
                "no probe-x: about {expected:.0} scenes for {} languages, and {wanted} are needed",
                n_texts.len()
            ));
            return;
        }
        for has_character in [true, false] {
            for group in self.drawn(&free, has_character, self.options.share_probe, "probe-x") {
                // A language counts as there if it has at least half of what the best one has.
                let lines_in = |n: &[u32]| group.iter().map(|unit| n[*unit]).sum::<u32>();
                let most = n_texts.iter().map(|(_, n)| lines_in(n)).max().unwrap_or(0);
                let there: Vec<Language> = n_texts
                    .iter()
                    .filter(|(_, n)| lines_in(n) > 0 && 2 * lines_in(n) >= most)
                    .map(|(language, _)| *language)
                    .collect();
                if there.len() < 2 {
                    continue;
                }
                let digest = order(self.options.seed, "language", self.first_id(group));
                let pick = u64::from_le_bytes(digest[..8].try_into().unwrap_or_default());
                let language = there[(pick % there.len() as u64) as usize];
                for unit in group {
                    self.places[*unit] = Some(Place::Probe(language));
                }
            }
        }
    }

    /// What is left of the groups.
    fn free(&self, groups: &[Vec<usize>]) -> Vec<Vec<usize>> {
        groups
            .iter()
            .map(|group| {
                let is_free = |unit: &usize| self.places[*unit].is_none() && self.is_told[*unit];
                group.iter().copied().filter(is_free).collect()
            })
            .filter(|group: &Vec<usize>| !group.is_empty())
            .collect()
    }

    /// Draws groups until every stratum has given its share of lines. A group is drawn whatever its size, so that short
    /// and long scenes are held out alike; what a stratum gave too much, the next one gives less.
    fn drawn<'g>(
        &self,
        groups: &'g [Vec<usize>],
        has_character: bool,
        share: f64,
        purpose: &str,
    ) -> Vec<&'g [usize]> {
        struct Group<'g> {
            members: &'g [usize],
            /// Lines that count: the character's where she speaks, else everyone's.
            n_lines: usize,
            order: [u8; 32],
        }
        let mut strata: BTreeMap<&str, Vec<Group<'g>>> = BTreeMap::new();
        for members in groups {
            let sum = |lines: fn(&Unit) -> usize| -> usize {
                members.iter().map(|m| lines(&self.units[*m])).sum()
            };
            let n_own = sum(|unit| unit.n_own_lines);
            if (n_own > 0) != has_character {
                continue;
            }
            let stratum = strata.entry(&self.units[members[0]].stratum).or_default();
            stratum.push(Group {
                members,
                n_lines: if n_own > 0 {
                    n_own
                } else {
                    sum(|unit| unit.n_lines).max(1)
                },
                order: order(self.options.seed, purpose, self.first_id(members)),
            });
        }
        let all = || strata.values().flatten();
        let n_lines = all().map(|g| g.n_lines).sum::<usize>() as f64;
        // A group that would be most of the held-out part stays in training.
        let most = (share * n_lines / 2.0).max(2.0 * n_lines / all().count().max(1) as f64);
        let mut drawn = Vec::new();
        let mut owed = 0.0;
        for groups in strata.values_mut() {
            groups.sort_by_key(|group| group.order);
            owed += share * groups.iter().map(|group| group.n_lines as f64).sum::<f64>();
            for group in groups.iter() {
                if owed <= 0.0 {
                    break;
                }
                if group.n_lines as f64 <= most {
                    owed -= group.n_lines as f64;
                    drawn.push(group.members);
                }
            }
        }
        drawn
    }

    fn first_id(&self, members: &[usize]) -> &str {
        let ids = members.iter().map(|m| self.units[*m].id.as_str());
        ids.min().unwrap_or_default()
    }

    fn note(&mut self, note: String) {
        self.report.notes.push(note);
    }
}

struct Mission<'u> {
    name: &'u str,
    members: Vec<usize>,
    has_character: bool,
    /// Lines that count, as of a group.
    n_lines: usize,
    order: [u8; 32],
}

impl<'u> Mission<'u> {
    fn new(name: &'u str, members: Vec<usize>, units: &[Unit], seed: u64) -> Mission<'u> {
        let n_own: usize = members.iter().map(|m| units[*m].n_own_lines).sum();
        let n_all: usize = members.iter().map(|m| units[*m].n_lines).sum();
        Mission {
            name,
            members,
            has_character: n_own > 0,
            n_lines: if n_own > 0 { n_own } else { n_all.max(1) },
            order: order(seed, "val-strict", name),
        }
    }
}

/// The seeded place of a thing in the order of a draw.
fn order(seed: u64, purpose: &str, id: &str) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(seed.to_le_bytes());
    if !purpose.is_empty() {
        hash.update(purpose);
        hash.update([0]);
    }
    hash.update(id);
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Units with their texts by language.
    struct Told {
        units: Vec<Unit>,
        texts: Vec<(usize, Language, String)>,
    }

    impl Splittable for Told {
        fn units(&self) -> &[Unit] {
            &self.units
        }

        fn with_texts<R>(
            &self,
            language: Language,
            f: impl FnOnce(&[UnitText<'_>]) -> Result<R>,
        ) -> Result<R> {
            let of_language = self.texts.iter().filter(|t| t.1 == language);
            let texts = of_language.map(|(unit, _, text)| UnitText {
                unit: *unit,
                text,
                hash: Some(4711),
            });
            let mut texts: Vec<_> = texts.collect();
            texts.sort_by_key(|t| t.unit);
            f(&texts)
        }
    }

    impl Told {
        /// `n` scenes of two chapters, missions of five, nothing told twice; the character speaks in two of three.
        fn scenes(n: usize) -> Told {
            let mut told = Told {
                units: Vec::new(),
                texts: Vec::new(),
            };
            for i in 0..n {
                let chapter = if i < n / 2 { "one" } else { "two" };
                told.units.push(Unit {
                    id: format!("s{i:03}"),
                    stratum: chapter.to_owned(),
                    mission: Some(format!("m{:02}", i / 5)),
                    n_own_lines: i % 3,
                    n_lines: 5,
                });
                for language in [Language::Chs, Language::En, Language::Jp] {
                    told.tell(i, language, &sentence(i, language));
                }
            }
            told
        }

        fn tell(&mut self, unit: usize, language: Language, text: &str) {
            self.texts.push((unit, language, text.to_owned()));
        }

        fn split(&self, seed: u64) -> Split {
            let options = SplitOptions {
                seed,
                ..SplitOptions::default()
            };
            make(self, options, origin()).unwrap()
        }
    }

    fn origin() -> Origin {
        Origin {
            source_sha256: String::new(),
            character_sha256: String::new(),
            languages: Language::ALL.to_vec(),
        }
    }

    /// Sixty letters that no other scene and language has.
    fn sentence(i: usize, language: Language) -> String {
        let mut state = (i as u64 + 1) * 1000 + language as u64;
        (0..60)
            .map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                char::from(b'a' + ((state >> 33) % 26) as u8)
            })
            .collect()
    }

    #[test]
    fn share_is_met_in_every_stratum() {
        let split = Told::scenes(300).split(7);
        let own = |range: std::ops::Range<usize>| -> usize {
            range
                .filter(|i| split.val.contains(&format!("s{i:03}")))
                .map(|i| i % 3)
                .sum()
        };
        // 8 % of about 140 lines of the character in each chapter
        assert!((8..=14).contains(&own(0..150)), "{}", own(0..150));
        assert!((8..=14).contains(&own(150..300)), "{}", own(150..300));
    }

    #[test]
    fn every_scene_is_on_one_side() {
        let told = Told::scenes(300);
        let split = told.split(7);
        let n = split.train.len()
            + split.val.len()
            + split.val_strict.len()
            + split.probe_x.len()
            + split.contaminated.len()
            + split.filtered.len();
        assert_eq!(n, 300);
        for side in [Side::Train, Side::Val, Side::ValStrict, Side::ProbeX] {
            assert!(split.report.sides[&side].scenes > 0, "{side}");
        }
        // Lines by language: each in one place.
        for language in [Language::Chs, Language::En, Language::Jp] {
            let lines = split
                .report
                .sides
                .values()
                .filter_map(|s| s.lines.get(&language));
            assert_eq!(lines.sum::<u64>(), 300);
        }
    }

    #[test]
    fn seed_decides_and_nothing_else() {
        let told = Told::scenes(300);
        assert_eq!(told.split(7), told.split(7));
        let (a, b) = (told.split(7), told.split(8));
        assert_ne!(a.val, b.val);
        assert_ne!(a.val_strict, b.val_strict);
        assert_ne!(a.probe_x, b.probe_x);
    }

    #[test]
    fn strict_missions_are_out_whole() {
        let told = Told::scenes(300);
        let split = told.split(7);
        assert!(!split.report.strict_missions.is_empty());
        for unit in &told.units {
            let mission = unit.mission.clone().unwrap();
            assert_eq!(
                split.val_strict.contains(&unit.id),
                split.report.strict_missions.contains(&mission)
            );
        }
    }

    #[test]
    fn probes_leave_one_language_out_and_each_gets_some() {
        let split = Told::scenes(300).split(7);
        for language in [Language::Chs, Language::En, Language::Jp] {
            let n = split.probe_x.values().filter(|l| **l == language).count();
            assert!(n >= 4, "{language}: {n} of {}", split.probe_x.len());
        }
        let (scene, out) = split.probe_x.iter().next().unwrap();
        let trained = Language::ALL
            .iter()
            .filter(|l| split.side(scene, Some(**l)) == Some(Side::Train));
        assert_eq!(trained.count(), 12);
        assert_eq!(split.side(scene, Some(*out)), Some(Side::ProbeX));
    }

    #[test]
    fn small_story_has_no_strict_side_and_no_probes_and_says_so() {
        let split = Told::scenes(60).split(7);
        assert!(split.val_strict.is_empty() && split.probe_x.is_empty());
        assert!(!split.val.is_empty());
        assert_eq!(
            split.report.notes,
            [
                "no val-strict: the story has 12 missions or chapters, and 20 are needed",
                "no probe-x: about 6 scenes for 3 languages, and 24 are needed"
            ]
        );
    }

    #[test]
    fn shared_text_keeps_scenes_together() {
        for seed in 0..20 {
            let mut told = Told::scenes(300);
            // The same but for case and punctuation, in one language of three.
            told.tell(3, Language::En, "We are vanquished");
            told.tell(150, Language::En, " we are - vanquished!");
            told.tell(4, Language::En, "short");
            let split = told.split(seed);
            let of_mission =
                |id: &str| split.val_strict.contains(id) || split.filtered.contains_key(id);
            for language in [Language::Chs, Language::En] {
                let side = |id| split.side(id, Some(language));
                let together = side("s003") == side("s150");
                assert!(
                    together || (of_mission("s003") && of_mission("s150")),
                    "{seed}"
                );
            }
            assert_eq!(split.report.ties_by_text, 1);
        }
    }

    #[test]
    fn component_too_large_for_the_share_stays_in_training() {
        let mut told = Told::scenes(300);
        for i in 0..90 {
            told.tell(i, Language::En, "we are vanquished");
        }
        let split = told.split(7);
        let held_out = |i: usize| {
            let side = split.side(&format!("s{i:03}"), Some(Language::En));
            side.is_some_and(Side::is_held_out)
        };
        assert!(!(0..90).any(held_out));
        assert!(!split.val.is_empty());
        assert_eq!(split.report.largest_component, 90);
    }

    #[test]
    fn retelling_of_a_strict_mission_is_filtered_with_the_rules_name() {
        let mut told = Told::scenes(300);
        let strict = told.split(7).val_strict.iter().next().unwrap().clone();
        let place = told.units.iter().position(|u| u.id == strict).unwrap();
        told.units.push(Unit {
            id: "wiki".to_owned(),
            stratum: "wiki".to_owned(),
            mission: None,
            n_own_lines: 0,
            n_lines: 2,
        });
        // A paragraph of its own and then the scene, in one language.
        told.tell(300, Language::Chs, &sentence(900, Language::Chs));
        let begin = sentence(901, Language::En) + &sentence(902, Language::En);
        told.tell(300, Language::En, &begin);
        let page = format!("As they tell it: {}", sentence(place, Language::En));
        told.tell(300, Language::En, &page);
        let split = told.split(7);
        assert!(split.val_strict.contains(&strict));
        assert_eq!(
            split.side("wiki", Some(Language::Chs)),
            Some(Side::Filtered)
        );
        assert_eq!(split.rule("wiki"), Some(RETELLS));
    }

    #[test]
    fn held_out_copy_of_training_text_is_contaminated() {
        let mut told = Told::scenes(300);
        let split = told.split(7);
        let (val, train) = (
            split.val.iter().next().unwrap().clone(),
            split.train.iter().next().unwrap().clone(),
        );
        let place = |id: &str| told.units.iter().position(|u| u.id == id).unwrap();
        let line = sentence(901, Language::En) + &sentence(902, Language::En);
        let (val_place, train_place) = (place(&val), place(&train));
        told.tell(val_place, Language::En, &line);
        let longer = format!(
            "{} {line} {}",
            sentence(903, Language::En),
            sentence(904, Language::En)
        );
        told.tell(train_place, Language::En, &longer);
        let split = told.split(7);
        assert_eq!(
            split.side(&val, Some(Language::Chs)),
            Some(Side::Contaminated)
        );
        assert_eq!(split.side(&train, Some(Language::Chs)), Some(Side::Train));
    }

    #[test]
    fn guard_names_both_scenes_and_the_hash_of_a_text_on_two_sides() {
        let mut told = Told::scenes(300);
        let mut split = told.split(7);
        // A doctored split: two scenes that share a text, on two sides.
        told.tell(0, Language::Jp, "eleven char");
        told.tell(1, Language::Jp, "eleven char");
        let train: BTreeSet<String> = told.units.iter().map(|u| u.id.clone()).collect();
        split.val = BTreeSet::from(["s001".to_owned()]);
        split.train = train.difference(&split.val).cloned().collect();
        split.val_strict.clear();
        split.probe_x.clear();
        guard(&told, &split).unwrap();
        told.tell(0, Language::Jp, "twelve chars");
        told.tell(1, Language::Jp, "twelve chars");
        let error = guard(&told, &split).unwrap_err().to_string();
        assert!(
            error.starts_with(
                "the text `twelve chars` (jp, hash 4711) stands in s001 (held out) and in s000 (training)"
            ),
            "{error}"
        );
        // The other held-out sides are guarded as well, a probe in its language only.
        split.val.clear();
        split.val_strict.insert("s001".to_owned());
        guard(&told, &split).unwrap_err();
        split.val_strict.clear();
        split.probe_x.insert("s001".to_owned(), Language::En);
        guard(&told, &split).unwrap();
        split.probe_x.insert("s001".to_owned(), Language::Jp);
        guard(&told, &split).unwrap_err();
    }
}
