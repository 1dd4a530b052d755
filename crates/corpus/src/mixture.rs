//! The mixture that a recipe names: sources with their weights, read as what is trained on and what is held out.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use crate::account::{self, SourceAccount};
use crate::error::{Error, Result};
use crate::examples::{self, Encoding, SourceExample};
use crate::row_notes::RowNotes;
use crate::row_problems::BadRows;
use crate::split::{Side, Split};
use crate::stats::{self, Passes};
use crate::weighted_source::WeightedSource;

/// What a training is fed with.
#[derive(Debug, Clone, Copy)]
pub struct Mixture<'a> {
    /// What the paths are relative to.
    pub folder: &'a Path,
    /// What rows come from; one that is named twice is shown as often as both weights say.
    pub sources: &'a [WeightedSource],
    /// File of the split, whose sides decide what is held out.
    pub split: Option<&'a Path>,
    /// Share of the rows held out where there is no split, by seed and what they say.
    pub validation_share: f64,
    /// Most tokens of each side that are kept of what is held out.
    pub validation_tokens: usize,
    /// The same seed draws the same rows.
    pub seed: u64,
}

/// Rows of a mixture in ids, by side.
#[derive(Debug, Default)]
pub struct MixedExamples {
    /// To train on; the origin of each names its source by its place in [`Mixture::sources`].
    pub train: Vec<SourceExample>,
    /// `val` first, then the other sides that have rows; of each as many as [`Mixture::validation_tokens`] lets through.
    pub held_out: BTreeMap<Side, Vec<SourceExample>>,
    /// What is worth saying about rows that were read all the same.
    pub notes: RowNotes,
}

impl Mixture<'_> {
    /// The sources with paths that can be read from here.
    pub fn sources(&self) -> Vec<WeightedSource> {
        let sources = self.sources.iter().map(|source| WeightedSource {
            path: self.folder.join(&source.path),
            weight: source.weight,
        });
        sources.collect()
    }

    /// Reads the split that is named.
    ///
    /// # Errors
    /// The file is not there or no split.
    pub fn load_split(&self) -> Result<Option<Split>> {
        let path = self.split.map(|path| self.folder.join(path));
        path.map(|path| Split::load(&path)).transpose()
    }

    /// Where the tokens are; None if a source was not built here, so that nobody knows its scenes.
    ///
    /// # Errors
    /// Data sets that do not fit their manifest or the split.
    pub fn account(&self, split: Option<&Split>) -> Result<Option<SourceAccount>> {
        account::of_sources(&self.sources(), split)
    }

    /// How often an epoch shows a scene.
    ///
    /// # Errors
    /// Data sets that do not fit their manifest or the split.
    pub fn passes(&self, split: Option<&Split>) -> Result<Passes> {
        stats::passes(&self.sources(), split)
    }

    /// Reads and encodes all sources.
    ///
    /// # Errors
    /// A missing source; [`Error::BadRows`] with the rows of all sources that cannot be used; [`Error::NothingToTrain`].
    pub fn examples(&self, split: Option<&Split>, encoding: Encoding<'_>) -> Result<MixedExamples> {
        let mut bad = BadRows::default();
        let mut mixed = MixedExamples::default();
        let (mut paths, mut seen) = (HashSet::new(), HashSet::new());
        for (source_idx, source) in self.sources().into_iter().enumerate() {
            let found = match examples::source(&source.path, split, encoding) {
                // Those of all sources are named together.
                Err(Error::BadRows(rows)) => {
                    bad.append(rows);
                    continue;
                }
                found => found?,
            };
            if paths.insert(source.path) {
                mixed.notes.append(found.notes);
            }
            for mut example in found.examples {
                example.encoded.origin.source_idx = source_idx as u32;
                let side = self.side(&example, split);
                let ids = &example.encoded.input_ids;
                // A source named twice to weigh more is held out once.
                if side.is_held_out() && !seen.insert(ids.clone()) {
                    continue;
                }
                mixed.add(side, example);
            }
        }
        bad.into_result()?;
        if mixed.train.is_empty() {
            return Err(Error::NothingToTrain {
                n_held_out: mixed.held_out.values().map(Vec::len).sum(),
                split: self.split.map(Path::to_owned),
                validation_share: self.validation_share,
            });
        }
        for examples in mixed.held_out.values_mut() {
            let all = std::mem::take(examples);
            let length = |held: &SourceExample| held.encoded.input_ids.len();
            *examples = sampled(all, length, self.validation_tokens, self.seed);
        }
        Ok(mixed)
    }

    fn side(&self, example: &SourceExample, split: Option<&Split>) -> Side {
        let is_drawn =
            split.is_none() && drawn(self.seed, &example.encoded.input_ids) < self.validation_share;
        match is_drawn {
            true => Side::Val,
            false => example.side,
        }
    }
}

impl MixedExamples {
    fn add(&mut self, side: Side, example: SourceExample) {
        match side {
            // Only what is explicitly for training in its language.
            Side::Train => self.train.push(example),
            Side::Val | Side::ValStrict | Side::ProbeX => {
                self.held_out.entry(side).or_default().push(example);
            }
            Side::Contaminated | Side::Filtered => {}
        }
    }
}

/// Rows drawn by seed until they hold `tokens`; all of them, in their order, if they hold no more.
fn sampled<R>(rows: Vec<R>, length: impl Fn(&R) -> usize, tokens: usize, seed: u64) -> Vec<R> {
    let mut drawn: Vec<usize> = (0..rows.len()).collect();
    drawn.sort_by_cached_key(|at| files::sha256(format!("{seed} held out {at}").as_bytes()));
    let mut left = tokens;
    let mut kept = vec![false; rows.len()];
    for at in drawn {
        let length = length(&rows[at]);
        if length <= left {
            left -= length;
            kept[at] = true;
        }
    }
    let pairs = rows.into_iter().zip(kept);
    pairs
        .filter_map(|(row, kept)| kept.then_some(row))
        .collect()
}

/// A number in [0, 1) for a row, from the seed and what the row says: the same row is on one side, in whatever source it stands.
fn drawn(seed: u64, ids: &[u32]) -> f64 {
    let seed = seed.to_le_bytes().into_iter();
    let bytes: Vec<u8> = seed
        .chain(ids.iter().flat_map(|id| id.to_le_bytes()))
        .collect();
    let digest = files::sha256(&bytes);
    let bits = u64::from_str_radix(&digest[..13], 16).unwrap_or(0);
    bits as f64 / (1u64 << 52) as f64
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use text::Tokenizer;
    use text::labels::LossScale;

    use super::*;
    use crate::examples::TrainingStage;
    use crate::{BuildRequest, Character, Language, SourceKind, SplitOptions, SplitRequest, Task};

    fn encoding(tokenizer: Option<&Tokenizer>) -> Encoding<'_> {
        Encoding {
            stage: TrainingStage::Cpt,
            loss_scale: LossScale::default(),
            tokenizer,
            // More than any row here has.
            vocab_size: Some(2000),
            row_tokens: None,
        }
    }

    fn sources<const N: usize>(sources: [(&str, f64); N]) -> [WeightedSource; N] {
        sources.map(|(path, weight)| WeightedSource {
            path: path.into(),
            weight,
        })
    }

    fn mixture<'a>(folder: &'a Path, sources: &'a [WeightedSource]) -> Mixture<'a> {
        Mixture {
            folder,
            sources,
            split: None,
            validation_share: 0.02,
            validation_tokens: 100_000,
            seed: 7,
        }
    }

    #[test]
    fn held_out_sample_fits_the_budget_and_follows_the_seed() {
        let rows = |n: u32| -> Vec<u32> { (0..n).collect() };
        let ten = |_: &u32| 10;
        assert_eq!(sampled(rows(5), ten, 50, 7), [0, 1, 2, 3, 4]);
        let some = sampled(rows(50), ten, 105, 7);
        assert_eq!(some.len(), 10);
        assert_eq!(some, sampled(rows(50), ten, 105, 7));
        assert_ne!(some, sampled(rows(50), ten, 105, 8));
    }

    /// Six scenes in two languages, built; `s<n>` says "word<n>" in English and "字<n>" in Chinese.
    fn built_story(folder: &Path) -> Tokenizer {
        let story: String = (0..6)
            .map(|n| {
                let line = serde_json::json!({ "kind": "narration", "text": { "en": format!("word{n}"), "chs": format!("字{n}") } });
                serde_json::json!({ "campaign": "c", "scene": format!("s{n}"), "lines": [line] }).to_string() + "\n"
            })
            .collect();
        std::fs::write(folder.join("story.jsonl"), &story).unwrap();
        let character =
            "languages = [\"chs\", \"en\"]\n[name]\nen = \"A\"\n[story]\nspeaker_ids = [\"a\"]\n";
        let character = Character::parse(character, Path::new("a.toml")).unwrap();
        let root = folder.join("story.jsonl");
        let request = BuildRequest {
            source: SourceKind::Story,
            root: &root,
            character: &character,
            tasks: &[Task::PtEverything],
            languages: None,
            out: folder,
        };
        crate::build(
            &request,
            crate::Counters::of_rules(&|text| text.len()),
            &|_| {},
        )
        .unwrap();
        let split = crate::make_split(&SplitRequest {
            source: SourceKind::Story,
            root: &root,
            vendor: None,
            character: &character,
            options: SplitOptions::default(),
        })
        .unwrap();
        let ids = |n: usize| BTreeSet::from([format!("s{n}")]);
        let split = Split {
            train: ids(0),
            val: ids(1),
            val_strict: ids(2),
            probe_x: [("s3".to_owned(), Language::En)].into(),
            contaminated: ids(4),
            filtered: [("s5".to_owned(), "a rule".to_owned())].into(),
            ..split
        };
        split.save(&folder.join("split.json"), true).unwrap();
        Tokenizer::train([story.as_str()].into_iter(), 300).unwrap()
    }

    #[test]
    fn nothing_but_the_train_side_of_its_language_is_trained() {
        let folder = tempfile::tempdir().unwrap();
        let tokenizer = built_story(folder.path());
        let sources = sources([("pt/everything", 1.0), ("pt/everything/en.jsonl", 1.0)]);
        let mixture = Mixture {
            split: Some(Path::new("split.json")),
            ..mixture(folder.path(), &sources)
        };
        let split = mixture.load_split().unwrap();
        let mixed = mixture
            .examples(split.as_ref(), encoding(Some(&tokenizer)))
            .unwrap();
        let texts = |examples: &[SourceExample]| -> Vec<(String, u32)> {
            let text = |one: &SourceExample| {
                let ids = &one.encoded.input_ids;
                (
                    tokenizer.decode(ids, true).unwrap(),
                    one.encoded.origin.source_idx,
                )
            };
            examples.iter().map(text).collect()
        };
        let own = |texts: &[(&str, u32)]| -> Vec<(String, u32)> {
            let texts = texts.iter();
            texts
                .map(|(text, idx)| ((*text).to_owned(), *idx))
                .collect()
        };
        assert_eq!(
            texts(&mixed.train),
            own(&[("字0", 0), ("字3", 0), ("word0", 0), ("word0", 1)])
        );
        let held_out: Vec<_> = mixed
            .held_out
            .iter()
            .map(|(side, examples)| (side.name(), texts(examples)))
            .collect();
        assert_eq!(
            held_out,
            [
                ("val", own(&[("字1", 0), ("word1", 0)])),
                ("val-strict", own(&[("字2", 0), ("word2", 0)])),
                ("probe-x", own(&[("word3", 0)])),
            ]
        );
    }

    /// A source named twice weighs more, and a folder holds its files: without a split, too, no row is on both sides.
    #[test]
    fn row_in_two_sources_is_on_one_side() {
        let folder = tempfile::tempdir().unwrap();
        let rows_of = |from: usize, to: usize| -> String {
            (from..to)
                .map(|n| {
                    format!(
                        "{{\"input_ids\":[{n},{},1],\"labels\":[{n},{},1]}}\n",
                        n * 7,
                        n * 7
                    )
                })
                .collect()
        };
        std::fs::write(folder.path().join("a.jsonl"), rows_of(10, 110)).unwrap();
        std::fs::write(folder.path().join("b.jsonl"), rows_of(60, 160)).unwrap();
        let sources = sources([("a.jsonl", 2.0), ("b.jsonl", 1.0), ("a.jsonl", 1.0)]);
        let held_out = |seed: u64| -> BTreeSet<u32> {
            let mixture = Mixture {
                seed,
                validation_share: 0.3,
                ..mixture(folder.path(), &sources)
            };
            let mixed = mixture.examples(None, encoding(None)).unwrap();
            let first = |one: &SourceExample| one.encoded.input_ids[0];
            let val: Vec<u32> = mixed.held_out[&Side::Val].iter().map(first).collect();
            let train: Vec<u32> = mixed.train.iter().map(first).collect();
            assert!(val.iter().all(|row| !train.contains(row)));
            let of_150 = 150 - val.len();
            let trained: BTreeSet<u32> = train.into_iter().collect();
            assert_eq!(trained.len(), of_150);
            assert!((20..70).contains(&val.len()), "{}", val.len());
            val.into_iter().collect()
        };
        assert_eq!(held_out(7), held_out(7));
        assert_ne!(held_out(7), held_out(8));
    }

    #[test]
    fn rows_that_no_manifest_lists_are_refused_with_a_split() {
        let folder = tempfile::tempdir().unwrap();
        let tokenizer = built_story(folder.path());
        let elsewhere = tempfile::tempdir().unwrap();
        let copy = elsewhere.path().join("en.jsonl");
        std::fs::copy(folder.path().join("pt/everything/en.jsonl"), &copy).unwrap();
        let sources = [WeightedSource {
            path: copy,
            weight: 1.0,
        }];
        let split = Split::load(&folder.path().join("split.json")).unwrap();
        let read = |split| {
            let encoding = encoding(Some(&tokenizer));
            mixture(folder.path(), &sources).examples(split, encoding)
        };
        let error = read(Some(&split)).err().unwrap().to_string();
        assert!(error.contains("with a manifest.json beside it"), "{error}");
        assert!(read(None).is_ok());
    }

    #[test]
    fn rows_that_are_all_held_out_are_said_to_be() {
        let folder = tempfile::tempdir().unwrap();
        let sources = sources([("a.jsonl", 1.0)]);
        let said = |rows: &str, validation_share: f64| {
            std::fs::write(folder.path().join("a.jsonl"), rows).unwrap();
            let mixture = Mixture {
                validation_share,
                ..mixture(folder.path(), &sources)
            };
            let read = mixture.examples(None, encoding(None));
            read.map(|mixed| mixed.train.len()).map_err(|error| {
                assert!(error.is_of_rows());
                error.to_string()
            })
        };
        let row = "{\"input_ids\":[1,2],\"labels\":[-100,2]}\n";
        let all = said(row, 1.0).unwrap_err();
        assert!(all.contains("data.validation_share = 1"), "{all}");
        assert!(all.contains("every row of data.sources (1)"), "{all}");
        assert_eq!(said(row, 0.0), Ok(1));
        let none = said("\n", 0.0).unwrap_err();
        assert!(none.contains("hold no row"), "{none}");
    }

    #[test]
    fn bad_rows_of_all_sources_are_named_together() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a.jsonl", "b.jsonl"] {
            let rows = "{\"input_ids\":[1,2],\"labels\":[-100,2]}\n{\"input_ids\":[1,2],\"labels\":[-100,99999]}\n";
            std::fs::write(folder.path().join(name), rows).unwrap();
        }
        let sources = sources([("a.jsonl", 1.0), ("b.jsonl", 1.0), ("a.jsonl", 1.0)]);
        let error = mixture(folder.path(), &sources).examples(None, encoding(None));
        let said = error.err().unwrap().to_string();
        assert!(said.starts_with("2 rows cannot be used:"), "{said}");
        for place in ["a.jsonl:2: the label", "b.jsonl:2: the label"] {
            assert!(said.contains(place), "{said}");
        }
    }
}
