//! The `tokenizers` crate by itself: it reads what a tokenizer writes with its own code and runs its whole pipeline.
#![allow(clippy::unwrap_used, reason = "a test helper fails by panicking")]

use std::path::Path;

use text::{ChatTemplate, Tokenizer};

/// The crate's tokenizer of the file that `tokenizer` writes.
pub fn of(tokenizer: &Tokenizer) -> tokenizers::Tokenizer {
    let dir = tempfile::tempdir().unwrap();
    let template = ChatTemplate::history_stable().unwrap();
    tokenizer.save(dir.path(), &template).unwrap();
    read(&dir.path().join("tokenizer.json"))
}

/// The crate's reading of a file.
pub fn read(path: &Path) -> tokenizers::Tokenizer {
    tokenizers::Tokenizer::from_file(path).unwrap()
}

/// Both give the same ids for a text, and the same text for the ids.
pub fn check(tokenizer: &Tokenizer, oracle: &tokenizers::Tokenizer, text: &str) {
    let expect = oracle.encode_fast(text, false).unwrap();
    let ids = tokenizer.encode(text).unwrap();
    assert_eq!(ids, expect.get_ids(), "{text:?}");
    assert_eq!(tokenizer.count(text).unwrap(), ids.len(), "{text:?}");
    for skip_special in [false, true] {
        assert_eq!(
            tokenizer.decode(&ids, skip_special).unwrap(),
            oracle.decode(&ids, skip_special).unwrap(),
            "{text:?}"
        );
    }
}
