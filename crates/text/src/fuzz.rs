//! The tokenizer as a function of bytes that anybody may have written, for the fuzzer and for the test that replays its
//! seeds (`fuzz/README.md`). A target panics when a promise is broken.

use std::path::Path;
use std::sync::LazyLock;

use crate::tokenizer::{Tokenizer, WordPattern};

/// A target: bytes, and a folder it may lay files in.
pub type Target = fn(&[u8], &Path);

/// All targets by name; the seeds of each lie in `fuzz/seeds/<name>`.
pub const TARGETS: [(&str, Target); 1] = [("tokenizer", tokenizer)];

/// A small vocabulary, with words cut by each pattern.
static TOKENIZERS: LazyLock<Vec<Tokenizer>> = LazyLock::new(|| {
    let texts = [
        "the tide turns, the tide turns, don't they?",
        "潮水转了。潮水转了。",
        "กำ ที่ กำ ที่",
    ];
    let newer = Tokenizer::train(texts.into_iter(), 300);
    let older = newer
        .as_ref()
        .ok()
        .map(|t| t.clone().with_pattern(WordPattern::Qwen2));
    newer.into_iter().chain(older).collect()
});

/// The tokenizers of the target, so that their ids can be held against those of another program (`text/tests/oracle.rs`).
pub fn tokenizers() -> &'static [Tokenizer] {
    &TOKENIZERS
}

/// The count of a text's ids is their number, and they say the text.
fn tokenizer(data: &[u8], _: &Path) {
    assert_eq!(TOKENIZERS.len(), 2);
    let text = String::from_utf8_lossy(data);
    for tokenizer in &*TOKENIZERS {
        let Ok(ids) = tokenizer.encode(&text) else {
            panic!("{text:?} cannot be encoded");
        };
        assert_eq!(tokenizer.count(&text).ok(), Some(ids.len()), "{text:?}");
        let said = tokenizer.decode(&ids, false).unwrap_or_default();
        // NFC aside, which a second round leaves alone.
        let again = tokenizer.encode(&said).unwrap_or_default();
        assert_eq!(again, ids, "{text:?} became {said:?}");
        let mut bytes = Vec::new();
        for id in &ids {
            tokenizer.append_bytes(*id, false, &mut bytes);
        }
        assert_eq!(bytes, said.as_bytes(), "{text:?}");
    }
}
