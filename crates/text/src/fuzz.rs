//! The tokenizer as a function of bytes that anybody may have written, for the fuzzer and for the test that replays its
//! seeds (`fuzz/README.md`). A target panics when a promise is broken.

use std::path::Path;
use std::sync::LazyLock;

use crate::added_tokens::{Added, unescape};
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

/// The count of a text's ids is their number, and they say the text; what people write is text, also between the tokens of a template.
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
        written(tokenizer, &text);
    }
}

fn written(tokenizer: &Tokenizer, text: &str) {
    // 1. alone
    let is_added = |id: &&u32| tokenizer.is_added(**id);
    let ids = tokenizer.encode_ordinary(text).unwrap_or_default();
    assert_eq!(ids.iter().filter(is_added).count(), 0, "{text:?}");
    let said = tokenizer.decode(&ids, false).unwrap_or_default();
    let again = tokenizer.encode_ordinary(&said).unwrap_or_default();
    assert_eq!(again, ids, "{text:?} became {said:?}");
    // 2. escaped
    let escaped = tokenizer.escape(text);
    assert_eq!(unescape(&escaped), text);
    assert_eq!(
        tokenizer.ids(&escaped, Added::Unescaped),
        ids,
        "{escaped:?}"
    );
    // 3. between tokens
    let turn = format!("<|im_start|>{escaped}<|im_end|>");
    let framed = tokenizer.ids(&turn, Added::Unescaped);
    assert_eq!(framed.len(), ids.len() + 2, "{turn:?}");
    assert_eq!(framed[1..=ids.len()], ids, "{turn:?}");
    assert_eq!(tokenizer.n_ids(&turn, Added::Unescaped), framed.len());
}
