//! Finds a target by its name and gives it a folder of its own.

use std::cell::OnceCell;
use std::path::Path;

use tempfile::TempDir;

type Target = fn(&[u8], &Path);

thread_local! {
    static FOLDER: OnceCell<TempDir> = const { OnceCell::new() };
}

/// Runs a target on an input; the folder is kept from one input to the next.
pub fn run(name: &str, data: &[u8]) {
    let targets = corpus::fuzz::TARGETS
        .iter()
        .chain(&hub::fuzz::TARGETS)
        .chain(&text::fuzz::TARGETS)
        .chain(&model::fuzz::TARGETS);
    let target: Target = targets
        .clone()
        .find(|(known, _)| *known == name)
        .map(|(_, target)| *target)
        .unwrap_or_else(|| panic!("no target `{name}`"));
    FOLDER.with(|folder| {
        let folder = folder.get_or_init(|| tempfile::tempdir().expect("a temporary folder"));
        target(data, folder.path());
    });
}
