//! The real vocabulary against ids recorded from Hugging Face.

mod common;

use std::io::Read;

use common::{ids, json_lines, shared};
use text::{ADDED_TOKENS, ChatTemplate, StreamDecoder, Tokenizer, WordPattern};

#[test]
fn all_recorded_texts_encode_and_decode_as_hugging_face_does() {
    let Some(dir) = shared("reference/tokenizer") else {
        return;
    };
    let tokenizer = Tokenizer::load(&dir).unwrap();
    let older = tokenizer.clone().with_pattern(WordPattern::Qwen2).unwrap();
    let cases = json_lines(&dir.join("tokenizer_cases.jsonl"));
    assert_eq!(cases.len(), 298);
    let mut n_older = 0;
    for case in &cases {
        let text = case["text"].as_str().unwrap();
        let expect = ids(&case["ids"]);
        assert_eq!(tokenizer.encode(text).unwrap(), expect, "{text}");
        assert_eq!(tokenizer.count(text).unwrap(), expect.len());
        let decoded = case["decoded"].as_str().unwrap();
        assert_eq!(tokenizer.decode(&expect, false).unwrap(), decoded);
        let mut stream = StreamDecoder::new(&tokenizer, false);
        let mut streamed: String = expect.iter().map(|&id| stream.push(id)).collect();
        streamed.push_str(&stream.finish());
        assert_eq!(streamed, decoded);
        let older_ids = match case.get("ids_qwen2_pretokenizer") {
            Some(value) => {
                n_older += 1;
                ids(value)
            }
            None => expect,
        };
        assert_eq!(older.encode(text).unwrap(), older_ids, "{text}");
    }
    assert_eq!(n_older, 19);
}

#[test]
fn added_tokens_have_the_released_ids() {
    let Some(dir) = shared("reference/tokenizer") else {
        return;
    };
    let tokenizer = Tokenizer::load(&dir).unwrap();
    for (id, (token, _)) in (248_044..).zip(ADDED_TOKENS) {
        assert_eq!(tokenizer.id(token), Some(id));
        assert_eq!(tokenizer.encode(token).unwrap(), [id]);
        assert!(tokenizer.is_added(id));
    }
    assert_eq!(tokenizer.vocab_size(), 248_077);
    assert_eq!(tokenizer.end_ids(), [248_046, 248_044]);
}

#[test]
fn saved_vocabulary_gives_equal_ids() {
    let Some(dir) = shared("reference/tokenizer") else {
        return;
    };
    let tokenizer = Tokenizer::load(&dir).unwrap();
    let out = tempfile::tempdir().unwrap();
    let template = ChatTemplate::load(&dir).unwrap();
    tokenizer.save(out.path(), &template).unwrap();
    let again = Tokenizer::load(out.path()).unwrap();
    for case in json_lines(&dir.join("tokenizer_cases.jsonl")) {
        let text = case["text"].as_str().unwrap();
        assert_eq!(again.encode(text).unwrap(), ids(&case["ids"]), "{text}");
    }
}

/// The `tokenizers` crate by itself is the oracle: it reads the same file with its own code and runs its whole pipeline.
#[test]
fn a_story_in_twelve_languages_encodes_as_the_crate_does() {
    let (Some(dir), Some(story)) = (
        shared("reference/tokenizer"),
        shared("story/wesnoth_story.jsonl.gz"),
    ) else {
        return;
    };
    let unpack = |path: &std::path::Path| {
        let file = std::fs::File::open(path).unwrap();
        let mut text = String::new();
        flate2::read::GzDecoder::new(file)
            .read_to_string(&mut text)
            .unwrap();
        text
    };
    let oracle = unpack(&dir.join("tokenizer.json.gz"));
    let oracle = tokenizers::Tokenizer::from_bytes(oracle.as_bytes()).unwrap();
    let tokenizer = Tokenizer::load(&dir).unwrap();
    for line in unpack(&story).lines().step_by(10) {
        let expect = oracle.encode_fast(line, false).unwrap();
        let got = tokenizer.encode(line).unwrap();
        assert!(got == expect.get_ids(), "{line}");
    }
}
