//! `split.json`: on which side of the split every scene is, in every language; written once, read by training,
//! validation and evaluation alike (docs/split.md).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use files::outside;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, shorten};
use crate::language::Language;
use crate::manifest::SourceFiles;

const VERSION: u32 = 3;

/// How to split.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SplitOptions {
    /// The same seed holds the same scenes out.
    pub seed: u64,
    /// Share of the character's lines for `val`.
    pub share: f64,
    /// Share of the lines of scenes without the character for `val`.
    pub share_rest: f64,
    /// Share of the character's lines for `val-strict`; of the other lines the same in the proportion of `share_rest`.
    pub share_strict: f64,
    /// Share of all lines whose scenes are in `probe-x`: there one language of thirteen is held out.
    pub share_probe: f64,
}

impl Default for SplitOptions {
    fn default() -> Self {
        SplitOptions {
            seed: 7,
            share: 0.08,
            share_rest: 0.03,
            share_strict: 0.05,
            share_probe: 0.1,
        }
    }
}

/// The side that a scene is on in one language.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// Trained on.
    Train,
    /// Held out; retellings of it may be trained on.
    Val,
    /// Held out with its whole mission, and what retells the mission is not trained on.
    ValStrict,
    /// Held out in this language only; its other translations are trained on.
    ProbeX,
    /// On neither side: held out, but mostly covered by training text.
    Contaminated,
    /// On neither side: a rule of the split keeps it from training.
    Filtered,
}

impl Side {
    /// All of them, in the order of every listing.
    pub const ALL: [Side; 6] = [
        Side::Train,
        Side::Val,
        Side::ValStrict,
        Side::ProbeX,
        Side::Contaminated,
        Side::Filtered,
    ];

    /// The name in files and in what is printed.
    pub fn name(self) -> &'static str {
        match self {
            Side::Train => "train",
            Side::Val => "val",
            Side::ValStrict => "val-strict",
            Side::ProbeX => "probe-x",
            Side::Contaminated => "contaminated",
            Side::Filtered => "filtered",
        }
    }

    /// Whether it is there to be measured on.
    pub fn is_held_out(self) -> bool {
        matches!(self, Side::Val | Side::ValStrict | Side::ProbeX)
    }
}

impl std::fmt::Display for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// The whole file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Split {
    /// Version of the format.
    pub version: u32,
    /// How it was made.
    #[serde(flatten)]
    pub options: SplitOptions,
    /// The story and the character it was made for.
    pub source_sha256: String,
    /// The story's files, each with its own hash.
    pub source_files: SourceFiles,
    /// SHA-256 of the character file it was made for.
    pub character_sha256: String,
    /// What it came to.
    pub report: SplitReport,
    /// Scenes to train on.
    pub train: BTreeSet<String>,
    /// Scenes of side `val`.
    pub val: BTreeSet<String>,
    /// Scenes of side `val-strict`.
    #[serde(rename = "val-strict")]
    pub val_strict: BTreeSet<String>,
    /// Scene -> the language that is held out.
    #[serde(rename = "probe-x")]
    pub probe_x: BTreeMap<String, Language>,
    /// Scenes of side `contaminated`.
    pub contaminated: BTreeSet<String>,
    /// Scene -> the rule that keeps it from training.
    pub filtered: BTreeMap<String, String>,
}

/// What the split came to, for the eye.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SplitReport {
    /// Scenes of the story.
    pub n_scenes: usize,
    /// Groups of scenes that are never parted, and the scenes of the largest.
    pub n_components: usize,
    /// Scenes of the largest group.
    pub largest_component: usize,
    /// Ties that a shared text made, and those that only near-duplicates made.
    pub ties_by_text: usize,
    /// Ties that only near-duplicates made.
    pub ties_by_likeness: usize,
    /// Missions that are held out whole.
    pub strict_missions: Vec<String>,
    /// What each side holds.
    pub sides: BTreeMap<Side, SideCount>,
    /// Lines, over all languages, that stand in training text and yet stay in a held-out scene that is new otherwise.
    pub copied_lines_left: usize,
    /// What a story is too small for, and the like.
    pub notes: Vec<String>,
}

/// The scenes and lines of a side. A scene of `probe-x` counts there, its lines in the other languages in `train`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SideCount {
    /// Scenes on it.
    pub scenes: usize,
    /// Lines on it, by language.
    pub lines: BTreeMap<Language, u64>,
}

impl Split {
    /// What a split came to: components, then a line a side with its scenes, and its lines by language.
    pub fn describe(&self) -> String {
        let report = &self.report;
        let mut text = format!(
            "{} scenes in {} groups that stay on one side (the largest has {}): {} pairs share a text, {} more are nearly alike",
            report.n_scenes,
            report.n_components,
            report.largest_component,
            report.ties_by_text,
            report.ties_by_likeness,
        );
        let has_lines = |language: &Language| {
            report
                .sides
                .values()
                .any(|s| s.lines.contains_key(language))
        };
        let languages: Vec<Language> = Language::ALL.into_iter().filter(has_lines).collect();
        text.push_str(&format!("\n{:<13}{:>7}", "side", "scenes"));
        for language in &languages {
            text.push_str(&format!("{:>8}", language.code()));
        }
        for side in Side::ALL {
            let Some(count) = report.sides.get(&side) else {
                continue;
            };
            text.push_str(&format!("\n{side:<13}{:>7}", count.scenes));
            for language in &languages {
                text.push_str(&format!("{:>8}", count.lines.get(language).unwrap_or(&0)));
            }
        }
        text.push_str(
            "\n(lines by language. train: learned from; val: held out; val-strict: whole missions held out; probe-x: held out in one language, \
             its other lines are trained on; contaminated, filtered: on neither side; docs/split.md)",
        );
        if report.copied_lines_left > 0 {
            text.push_str(&format!(
                "\n{} copied lines (over all languages) stay in held-out scenes that are new otherwise",
                report.copied_lines_left
            ));
        }
        if !report.strict_missions.is_empty() {
            text.push_str(&format!(
                "\nval-strict: {}",
                report.strict_missions.join(", ")
            ));
        }
        for note in &report.notes {
            text.push_str(&format!("\n{note}"));
        }
        text
    }

    /// A split without a scene.
    pub(crate) fn new(
        options: SplitOptions,
        source_sha256: String,
        source_files: SourceFiles,
        character_sha256: String,
        report: SplitReport,
    ) -> Split {
        Split {
            version: VERSION,
            options,
            source_sha256,
            source_files,
            character_sha256,
            report,
            train: BTreeSet::new(),
            val: BTreeSet::new(),
            val_strict: BTreeSet::new(),
            probe_x: BTreeMap::new(),
            contaminated: BTreeSet::new(),
            filtered: BTreeMap::new(),
        }
    }

    /// # Errors
    /// The file cannot be read, is no split of this version, or has a scene on two sides.
    pub fn load(path: &Path) -> Result<Split> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let bytes =
            outside::read(path, outside::MOST_DATA_BYTES).map_err(|source| Error::Read {
                path: path.to_owned(),
                source,
            })?;
        let problem = |problem| Error::Split {
            path: path.to_owned(),
            problem,
        };
        let no_split = |error: serde_json::Error| {
            problem(format!(
                "is no split ({})",
                shorten(&error.to_string(), 200)
            ))
        };
        // The version first: another version's fields would be called missing.
        let Versioned { version } = serde_json::from_slice(&bytes).map_err(no_split)?;
        if version != VERSION {
            return Err(problem(format!(
                "is a split of version {version}, not {VERSION}"
            )));
        }
        let split: Split = serde_json::from_slice(&bytes).map_err(no_split)?;
        match split.on_two_sides() {
            None => Ok(split),
            Some((scene, first, second)) => Err(problem(format!(
                "has scene `{scene}` on {first} and on {second}; take it out of one of them"
            ))),
        }
    }

    /// A scene that an edited file has on two sides, and these.
    fn on_two_sides(&self) -> Option<(&str, Side, Side)> {
        let mut seen: BTreeMap<&str, Side> = BTreeMap::new();
        Side::ALL.into_iter().find_map(|side| {
            let mut scenes: Box<dyn Iterator<Item = &String>> = match side {
                Side::Train => Box::new(self.train.iter()),
                Side::Val => Box::new(self.val.iter()),
                Side::ValStrict => Box::new(self.val_strict.iter()),
                Side::ProbeX => Box::new(self.probe_x.keys()),
                Side::Contaminated => Box::new(self.contaminated.iter()),
                Side::Filtered => Box::new(self.filtered.keys()),
            };
            scenes.find_map(|scene| Some((scene.as_str(), seen.insert(scene, side)?, side)))
        })
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
                let o = old.options;
                format!(
                    "seed {}, share {}, share_rest {}, share_strict {}, share_probe {}",
                    o.seed, o.share, o.share_rest, o.share_strict, o.share_probe
                )
            } else if old.source_sha256 != self.source_sha256 {
                "another story".to_owned()
            } else if old.character_sha256 != self.character_sha256 {
                "another character file".to_owned()
            } else {
                "another version of the program, or edited".to_owned()
            };
            return Err(Error::SplitExists {
                split: path.to_owned(),
                problem,
            });
        }
        // Maps with text keys, numbers and texts: this cannot fail.
        let mut json = serde_json::to_vec_pretty(self).unwrap_or_default();
        json.push(b'\n');
        files::write(path, &json)?;
        Ok(())
    }

    /// The side of a scene in a language (`None`: of a page without language); `None` if the split was made from
    /// another story.
    pub fn side(&self, scene: &str, language: Option<Language>) -> Option<Side> {
        if self.train.contains(scene) {
            Some(Side::Train)
        } else if self.val.contains(scene) {
            Some(Side::Val)
        } else if self.val_strict.contains(scene) {
            Some(Side::ValStrict)
        } else if let Some(out) = self.probe_x.get(scene) {
            Some(match language {
                Some(language) if language != *out => Side::Train,
                _ => Side::ProbeX,
            })
        } else if self.contaminated.contains(scene) {
            Some(Side::Contaminated)
        } else {
            self.filtered.contains_key(scene).then_some(Side::Filtered)
        }
    }

    /// A file that has changed since the split was made: one that both know, with another hash.
    fn changed_file<'f>(&self, files: &'f SourceFiles) -> Option<&'f str> {
        files
            .iter()
            .find(|(name, hash)| self.source_files.get(*name).is_some_and(|old| old != *hash))
            .map(|(name, _)| name.as_str())
    }

    /// # Errors
    /// [`Error::StoryChanged`], with `path` for where the story or what was made of it lies.
    pub(crate) fn check_files(&self, path: &Path, files: &SourceFiles) -> Result<()> {
        match self.changed_file(files) {
            None => Ok(()),
            Some(file) => Err(Error::StoryChanged {
                path: path.to_owned(),
                file: file.to_owned(),
            }),
        }
    }

    /// The rule that keeps a filtered scene from training.
    pub fn rule(&self, scene: &str) -> Option<&str> {
        self.filtered.get(scene).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(seed: u64) -> Split {
        let options = SplitOptions {
            seed,
            ..SplitOptions::default()
        };
        let mut split = Split::new(
            options,
            String::new(),
            SourceFiles::new(),
            String::new(),
            SplitReport::default(),
        );
        split.train.insert("t".to_owned());
        split.val.insert("v".to_owned());
        split.val_strict.insert("s".to_owned());
        split.probe_x.insert("p".to_owned(), Language::En);
        split.contaminated.insert("c".to_owned());
        split.filtered.insert("f".to_owned(), "a rule".to_owned());
        split
    }

    #[test]
    fn side_depends_on_the_language_of_a_probe_only() {
        let split = split(7);
        let names: Vec<_> = ["t", "v", "s", "p", "c", "f", "?"]
            .iter()
            .map(|id| split.side(id, Some(Language::En)).map(Side::name))
            .collect();
        let expect = Side::ALL.map(|side| Some(side.name()));
        assert_eq!(names[..6], expect);
        assert_eq!(names[6], None);
        assert_eq!(split.side("p", Some(Language::Chs)), Some(Side::Train));
        assert_eq!(split.side("v", Some(Language::Chs)), Some(Side::Val));
        // A page without language is never taken for a translation.
        assert_eq!(split.side("p", None), Some(Side::ProbeX));
    }

    #[test]
    fn split_is_written_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("split.json");
        split(7).save(&path, false).unwrap();
        split(7).save(&path, false).unwrap();
        assert_eq!(Split::load(&path).unwrap(), split(7));
        let error = split(8).save(&path, false).unwrap_err();
        assert!(matches!(error, Error::SplitExists { .. }));
        assert!(error.to_string().contains("seed 7, share 0.08"), "{error}");
        split(8).save(&path, true).unwrap();
        assert_eq!(Split::load(&path).unwrap(), split(8));
    }

    #[test]
    fn edited_split_with_a_scene_on_two_sides_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("split.json");
        let check = |edit: fn(&mut Split), expect: &str| {
            let mut edited = split(7);
            edit(&mut edited);
            edited.save(&path, true).unwrap();
            let error = Split::load(&path).unwrap_err().to_string();
            assert!(
                error.contains("split.json") && error.contains(expect),
                "{error}"
            );
        };
        check(
            |s| _ = s.val.insert("t".to_owned()),
            "scene `t` on train and on val;",
        );
        check(
            |s| _ = s.train.insert("p".to_owned()),
            "scene `p` on train and on probe-x;",
        );
        check(
            |s| _ = s.filtered.insert("c".to_owned(), "a rule".to_owned()),
            "scene `c` on contaminated and on filtered;",
        );
    }

    #[test]
    fn split_of_another_version_says_how_to_write_it_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("split.json");
        std::fs::write(&path, r#"{"version": 1, "held_out": []}"#).unwrap();
        let error = Split::load(&path).unwrap_err().to_string();
        assert!(error.contains("version 1, not 3"), "{error}");
        assert!(error.contains("corpus split --force"), "{error}");
    }
}
