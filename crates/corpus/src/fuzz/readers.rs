//! Character files and splits.

use std::path::Path;

use super::{check_place, clear, put};
use crate::character::Character;
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
