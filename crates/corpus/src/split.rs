//! The held-out split: by scene, without language, all translations of a scene on one side.
//! A scene and whatever repeats one of its texts are one component and are never parted, so validation cannot be
//! passed by memory alone.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result, shorten};
use crate::language::Language;
use crate::output;
use crate::similar;

/// Characters from which on a text ties the scenes that hold it; shorter ones are formulas ("Yes, my lord.").
pub const TYING_CHARACTERS: usize = 12;
const VERSION: u32 = 1;

/// How to split.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SplitOptions {
    pub seed: u64,
    /// Share of the character's lines to hold out.
    pub share: f64,
    /// Share of the lines of scenes without the character to hold out.
    pub share_rest: f64,
}

impl Default for SplitOptions {
    fn default() -> Self {
        SplitOptions {
            seed: 7,
            share: 0.08,
            share_rest: 0.03,
        }
    }
}

/// `split.json`: which scenes are held out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Split {
    pub version: u32,
    #[serde(flatten)]
    pub options: SplitOptions,
    /// The story and the character it was made for.
    pub source_sha256: String,
    pub character_sha256: String,
    pub held_out: BTreeSet<String>,
    pub train: BTreeSet<String>,
    /// On neither side: held out, but mostly covered by training text.
    pub contaminated: BTreeSet<String>,
}

/// The side a scene is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    Train,
    HeldOut,
    Contaminated,
}

/// A scene (or voice line, or page) as splitting sees it.
#[derive(Debug, Clone)]
pub struct Unit {
    pub id: String,
    /// Chapter or campaign: each gives its share.
    pub stratum: String,
    /// Lines of the character, and of everyone.
    pub n_own_lines: usize,
    pub n_lines: usize,
}

impl Split {
    /// # Errors
    /// The file cannot be read or is no split of this version.
    pub fn load(path: &Path) -> Result<Split> {
        let bytes = std::fs::read(path).map_err(|source| Error::Read {
            path: path.to_owned(),
            source,
        })?;
        let split: Split = serde_json::from_slice(&bytes).map_err(|error| Error::Split {
            path: path.to_owned(),
            problem: format!("is no split ({})", shorten(&error.to_string(), 200)),
        })?;
        if split.version != VERSION {
            return Err(Error::Split {
                path: path.to_owned(),
                problem: format!("is a split of version {}, not {VERSION}", split.version),
            });
        }
        Ok(split)
    }

    /// Writes `split.json`; one that says the same is left alone, another one is replaced only with `force`.
    ///
    /// # Errors
    /// Another split lies there, or the file cannot be written.
    pub fn save(&self, path: &Path, force: bool) -> Result<()> {
        if !force && path.exists() {
            let old = Split::load(path)?;
            if old == *self {
                return Ok(());
            }
            let problem = if old.options != self.options {
                format!(
                    "seed {}, share {}, share_rest {}",
                    old.options.seed, old.options.share, old.options.share_rest
                )
            } else if old.source_sha256 != self.source_sha256 {
                "another story".to_owned()
            } else {
                "another character file".to_owned()
            };
            return Err(Error::SplitExists {
                split: path.to_owned(),
                problem,
            });
        }
        // Maps with text keys, numbers and texts: this cannot fail.
        let mut json = serde_json::to_vec_pretty(self).unwrap_or_default();
        json.push(b'\n');
        output::write_file(path, &json).map(|_| ())
    }

    /// The side of a scene; `None` if the split was made from another story.
    pub fn side(&self, scene: &str) -> Option<Side> {
        if self.train.contains(scene) {
            Some(Side::Train)
        } else if self.held_out.contains(scene) {
            Some(Side::HeldOut)
        } else if self.contaminated.contains(scene) {
            Some(Side::Contaminated)
        } else {
            None
        }
    }
}

/// Collects which units repeat each other, then splits.
pub(crate) struct Splitter {
    units: Vec<Unit>,
    /// Union-find over the units.
    parents: Vec<usize>,
}

impl Splitter {
    pub fn new(units: Vec<Unit>) -> Splitter {
        let parents = (0..units.len()).collect();
        Splitter { units, parents }
    }

    /// Ties pairs of units, as [`ties`] gives them.
    pub fn tie(&mut self, pairs: impl IntoIterator<Item = (usize, usize)>) {
        for (a, b) in pairs {
            let (a, b) = (self.root(a), self.root(b));
            // The smaller place is the root, so that the order of ties does not matter.
            self.parents[a.max(b)] = a.min(b);
        }
    }

    pub fn finish(
        mut self,
        options: SplitOptions,
        source_sha256: String,
        character_sha256: String,
    ) -> Split {
        let mut components: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for unit in 0..self.units.len() {
            components.entry(self.root(unit)).or_default().push(unit);
        }
        // A stratum is a chapter, with and without the character apart.
        let mut strata: BTreeMap<(bool, &str), Vec<Component<'_>>> = BTreeMap::new();
        for members in components.values() {
            let component = Component::new(members, &self.units, options.seed);
            let key = (component.has_character, component.stratum);
            strata.entry(key).or_default().push(component);
        }
        let mut held_out = BTreeSet::new();
        for has_character in [true, false] {
            let share = if has_character {
                options.share
            } else {
                options.share_rest
            };
            let strata = strata.iter_mut().filter(|(key, _)| key.0 == has_character);
            for component in draw(strata.map(|(_, components)| components), share) {
                held_out.extend(component.members.iter().map(|m| self.units[*m].id.clone()));
            }
        }
        let train = self
            .units
            .iter()
            .filter(|u| !held_out.contains(&u.id))
            .map(|u| u.id.clone())
            .collect();
        Split {
            version: VERSION,
            options,
            source_sha256,
            character_sha256,
            held_out,
            train,
            contaminated: BTreeSet::new(),
        }
    }

    fn root(&mut self, mut unit: usize) -> usize {
        while self.parents[unit] != unit {
            self.parents[unit] = self.parents[self.parents[unit]];
            unit = self.parents[unit];
        }
        unit
    }
}

/// Draws components until every stratum has given its share of lines. A component is drawn whatever its size, so that
/// short and long scenes are held out alike; what a stratum gave too much, the next one gives less.
fn draw<'c, 'a: 'c>(
    strata: impl Iterator<Item = &'c mut Vec<Component<'a>>>,
    share: f64,
) -> Vec<&'c Component<'a>> {
    let strata: Vec<_> = strata.collect();
    let all = || strata.iter().flat_map(|components| components.iter());
    let n_components = all().count();
    let n_lines = all().map(|c| c.n_lines).sum::<usize>() as f64;
    // A component that would be most of the held-out part stays in training.
    let most = (share * n_lines / 2.0).max(2.0 * n_lines / n_components.max(1) as f64);
    let mut drawn = Vec::new();
    let mut owed = 0.0;
    for components in strata {
        components.sort_by_key(|c| c.order);
        owed += share * components.iter().map(|c| c.n_lines as f64).sum::<f64>();
        for component in components.iter() {
            if owed <= 0.0 {
                break;
            }
            if component.n_lines as f64 <= most {
                owed -= component.n_lines as f64;
                drawn.push(component);
            }
        }
    }
    drawn
}

/// Units that are never parted.
struct Component<'a> {
    members: &'a [usize],
    stratum: &'a str,
    has_character: bool,
    /// Lines that count: the character's where she speaks, else everyone's.
    n_lines: usize,
    /// Seeded place in the order of the stratum.
    order: [u8; 32],
}

impl<'a> Component<'a> {
    fn new(members: &'a [usize], units: &'a [Unit], seed: u64) -> Component<'a> {
        let n_own: usize = members.iter().map(|m| units[*m].n_own_lines).sum();
        let n_all: usize = members.iter().map(|m| units[*m].n_lines).sum();
        let mut hash = Sha256::new();
        hash.update(seed.to_le_bytes());
        let first = members.iter().map(|m| units[*m].id.as_str()).min();
        hash.update(first.unwrap_or_default());
        Component {
            members,
            stratum: &units[members[0]].stratum,
            has_character: n_own > 0,
            n_lines: if n_own > 0 { n_own } else { n_all.max(1) },
            order: hash.finalize().into(),
        }
    }
}

/// Pairs of units that share a text of one language or say nearly the same in it; `texts` are (unit, text).
pub(crate) fn ties(texts: &[(usize, &str)]) -> Vec<(usize, usize)> {
    let mut first: HashMap<&str, usize> = HashMap::new();
    let mut pairs = similar::near_duplicates(texts);
    for (unit, text) in texts.iter().filter(|(_, text)| is_long(text)) {
        let other = *first.entry(text).or_insert(*unit);
        if other != *unit {
            pairs.push((other, *unit));
        }
    }
    pairs
}

/// Whether a text is long enough to tie the scenes that hold it.
fn is_long(text: &str) -> bool {
    text.chars().nth(TYING_CHARACTERS - 1).is_some()
}

/// Held-out scenes that are mostly training text in one language, as places in `ids`.
/// `ids` are the scenes, `texts` are (place in `ids`, text).
pub(crate) fn copies(
    split: &Split,
    language: Language,
    ids: &[&str],
    texts: &[(usize, &str)],
) -> HashSet<usize> {
    let of_side = |side| -> Vec<(usize, &str)> {
        let on_side: Vec<bool> = ids.iter().map(|id| split.side(id) == Some(side)).collect();
        let on_side = texts.iter().filter(|(unit, _)| on_side[*unit]);
        on_side.copied().collect()
    };
    similar::copies(language, &of_side(Side::HeldOut), &of_side(Side::Train))
}

/// Moves scenes from the held-out to the contaminated ones.
pub(crate) fn set_aside<'a>(split: &mut Split, scenes: impl IntoIterator<Item = &'a str>) {
    for scene in scenes {
        if split.held_out.remove(scene) {
            split.contaminated.insert(scene.to_owned());
        }
    }
}

/// Fails if a text of twelve characters or more of one language stands on both sides.
/// `ids` are the scenes, `texts` are (place in `ids`, text).
pub(crate) fn guard(
    split: &Split,
    language: Language,
    ids: &[&str],
    texts: &[(usize, &str)],
) -> Result<()> {
    let mut sides: HashMap<&str, (Side, &str)> = HashMap::new();
    for (unit, text) in texts.iter().filter(|(_, text)| is_long(text)) {
        let scene = ids[*unit];
        let side = match split.side(scene) {
            Some(side @ (Side::Train | Side::HeldOut)) => side,
            _ => continue,
        };
        let (other, other_scene) = *sides.entry(text).or_insert((side, scene));
        if other != side {
            let (held_out, train) = if side == Side::HeldOut {
                (scene, other_scene)
            } else {
                (other_scene, scene)
            };
            return Err(Error::Leak {
                text: (*text).to_owned(),
                language: language.code(),
                held_out: held_out.to_owned(),
                train: train.to_owned(),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(id: usize, stratum: &str, n_own_lines: usize) -> Unit {
        Unit {
            id: format!("s{id:03}"),
            stratum: stratum.to_owned(),
            n_own_lines,
            n_lines: 5,
        }
    }

    fn splitter() -> Splitter {
        let chapter = |i: usize| if i < 100 { "one" } else { "two" };
        Splitter::new((0..200).map(|i| unit(i, chapter(i), i % 3)).collect())
    }

    fn finish(splitter: Splitter, seed: u64) -> Split {
        let options = SplitOptions {
            seed,
            ..SplitOptions::default()
        };
        splitter.finish(options, String::new(), String::new())
    }

    #[test]
    fn share_is_met_in_every_stratum() {
        let split = finish(splitter(), 7);
        let own = |from: usize, to: usize| -> usize {
            (from..to)
                .filter(|i| split.held_out.contains(&format!("s{i:03}")))
                .map(|i| i % 3)
                .sum()
        };
        // 8 % of 99 and of 100 lines of the character
        assert!((6..=10).contains(&own(0, 100)), "{}", own(0, 100));
        assert!((6..=10).contains(&own(100, 200)), "{}", own(100, 200));
        assert_eq!(split.held_out.len() + split.train.len(), 200);
    }

    #[test]
    fn seed_decides_and_nothing_else() {
        assert_eq!(finish(splitter(), 7), finish(splitter(), 7));
        assert_ne!(
            finish(splitter(), 7).held_out,
            finish(splitter(), 8).held_out
        );
    }

    #[test]
    fn shared_text_keeps_scenes_together() {
        for seed in 0..20 {
            let mut tied = splitter();
            tied.tie(ties(&[
                (3, "twelve chars"),
                (4, "short"),
                (150, "twelve chars"),
                (9, "short"),
            ]));
            let split = finish(tied, seed);
            assert_eq!(split.side("s003"), split.side("s150"));
        }
    }

    #[test]
    fn component_too_large_for_the_share_stays_in_training() {
        let mut tied = splitter();
        let texts: Vec<_> = (0..60).map(|i| (i, "we are vanquished")).collect();
        tied.tie(ties(&texts));
        let split = finish(tied, 7);
        assert_eq!(split.side("s000"), Some(Side::Train));
        assert!(!split.held_out.is_empty());
    }

    #[test]
    fn guard_names_the_text_on_both_sides() {
        let mut split = finish(splitter(), 7);
        split.held_out = BTreeSet::from(["a".to_owned()]);
        split.train = BTreeSet::from(["b".to_owned()]);
        let guard = |text| guard(&split, Language::En, &["a", "b"], &[(0, text), (1, text)]);
        assert!(guard("eleven char").is_ok());
        let error = guard("twelve chars").unwrap_err();
        assert!(error.to_string().starts_with(
            "the text `twelve chars` (en) stands in a (held out) and in b (training)"
        ));
    }

    #[test]
    fn held_out_copy_of_training_text_is_set_aside() {
        let mut split = finish(splitter(), 7);
        split.held_out = BTreeSet::from(["a".to_owned(), "c".to_owned()]);
        split.train = BTreeSet::from(["b".to_owned()]);
        let told = "The tide turned before the bell had rung, and nobody on the quay looked up from the nets.";
        let retold = format!("They say: {told} So it was.");
        let texts = [
            (0, told),
            (1, &retold),
            (
                2,
                "Something new and long enough, told by nobody before this day, ever.",
            ),
        ];
        let ids = ["a", "b", "c"];
        let copies = copies(&split, Language::En, &ids, &texts);
        set_aside(&mut split, copies.into_iter().map(|place| ids[place]));
        assert_eq!(split.side("a"), Some(Side::Contaminated));
        assert_eq!(split.side("c"), Some(Side::HeldOut));
    }

    #[test]
    fn split_is_written_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("split.json");
        let split = finish(splitter(), 7);
        split.save(&path, false).unwrap();
        split.save(&path, false).unwrap();
        assert_eq!(Split::load(&path).unwrap(), split);
        let other = finish(splitter(), 8);
        assert!(matches!(
            other.save(&path, false),
            Err(Error::SplitExists { .. })
        ));
        other.save(&path, true).unwrap();
        assert_eq!(Split::load(&path).unwrap(), other);
    }
}
