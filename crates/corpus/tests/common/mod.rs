//! Where the golden data lies, and how to unpack it.

use std::path::{Path, PathBuf};

/// `../shared` beside the repository, or where CYRENE_SHARED says; `None` (test skipped) if it is not there.
pub fn shared() -> Option<PathBuf> {
    let path = std::env::var_os("CYRENE_SHARED").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"),
        PathBuf::from,
    );
    if path.is_dir() {
        return Some(path);
    }
    let required = std::env::var_os("CYRENE_REQUIRE_SHARED").is_some_and(|v| v == "1");
    assert!(!required, "{} is not there", path.display());
    println!("skipped: no ../shared");
    None
}

/// A file of the repository's `characters` folder.
pub fn character(name: &str) -> corpus::Character {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../characters")
        .join(name);
    corpus::Character::load(&path).unwrap()
}
