//! Character files, splits, and rows of any form.

use std::path::Path;
use std::sync::OnceLock;

use text::IGNORE;
use text::Tokenizer;
use text::labels::LossScale;

use super::{check_place, clear, put};
use crate::character::Character;
use crate::examples::{self, Encoding, TrainingStage};
use crate::language::Language;
use crate::split::Split;

/// A character file.
pub(super) fn character(data: &[u8], folder: &Path) {
    put(folder, "ada.toml", data);
    match Character::load(&folder.join("ada.toml")) {
        Ok(character) => {
            for language in Language::ALL {
                assert!(!character.name_in(language).trim().is_empty());
            }
            assert!(!character.languages().is_empty());
        }
        Err(error) => check_place(&error),
    }
}

/// A `split.json`.
pub(super) fn split(data: &[u8], folder: &Path) {
    put(folder, "split.json", data);
    clear(folder, "again.json");
    let split = match Split::load(&folder.join("split.json")) {
        Ok(split) => split,
        Err(error) => return check_place(&error),
    };
    let path = folder.join("again.json");
    let saved = split.save(&path, false);
    assert!(saved.is_ok(), "{saved:?}");
    assert!(Split::load(&path).is_ok_and(|again| again == split));
    for scene in split.train.iter().chain(&split.val) {
        assert!(split.side(scene, None).is_some());
    }
}

/// A file of rows in whatever form, as either stage reads it.
pub(super) fn row_forms(data: &[u8], folder: &Path) {
    static TOKENIZER: OnceLock<Option<Tokenizer>> = OnceLock::new();
    let words = "Where is the boat? Gone.";
    let tokenizer = TOKENIZER.get_or_init(|| Tokenizer::train([words].into_iter(), 300).ok());
    assert!(tokenizer.is_some());
    put(folder, "rows.jsonl", data);
    for stage in [TrainingStage::Cpt, TrainingStage::Sft] {
        for vocab_size in [None, Some(400)] {
            let encoding = Encoding {
                stage,
                loss_scale: LossScale::default(),
                tokenizer: tokenizer.as_ref(),
                vocab_size,
                row_tokens: Some(30),
            };
            let found = match examples::of_file(&folder.join("rows.jsonl"), encoding) {
                Ok(found) => found,
                Err(error) => {
                    check_place(&error);
                    continue;
                }
            };
            assert!(found.notes.lines().iter().all(|line| line.len() < 1500));
            for example in found.examples {
                let (ids, labels) = (example.encoded.input_ids, example.encoded.labels);
                assert_eq!(ids.len(), labels.len());
                assert!(labels.iter().all(|label| *label >= 0 || *label == IGNORE));
                let below = |n: usize| ids.iter().all(|id| (*id as usize) < n);
                assert!(vocab_size.is_none_or(below));
            }
        }
    }
}
