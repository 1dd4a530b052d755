//! The tokenizer with the tiny vocabulary: everything that a fresh clone can check.

#![allow(clippy::unwrap_used, reason = "a test helper fails by panicking")]

mod common;

use std::fs;

use common::{fixture, ids, json_lines, tiny};
use serde_json::{Value, json};
use text::{ADDED_TOKENS, ChatTemplate, Error, Tokenizer, WordPattern};

fn assert_sync<T: Send + Sync>() {}

#[test]
fn tokenizer_is_shared_between_threads() {
    assert_sync::<Tokenizer>();
}

#[test]
fn tiny_cases_encode_as_recorded() {
    let tokenizer = tiny();
    let cases = json_lines(&fixture("tiny_tokenizer_cases.jsonl"));
    assert_eq!(cases.len(), 60);
    for case in cases {
        let text = case["text"].as_str().unwrap();
        assert_eq!(tokenizer.encode(text).unwrap(), ids(&case["ids"]), "{text}");
        assert_eq!(tokenizer.count(text).unwrap(), ids(&case["ids"]).len());
    }
}

#[test]
fn added_tokens_close_the_vocabulary() {
    let tokenizer = tiny();
    for (offset, (token, _)) in (0..).zip(ADDED_TOKENS) {
        assert_eq!(tokenizer.id(token), Some(2015 + offset));
        assert_eq!(tokenizer.encode(token).unwrap(), [2015 + offset]);
    }
    assert_eq!(tokenizer.vocab_size(), 2048);
    assert_eq!(tokenizer.end_ids(), [2017, 2015]);
    assert_eq!(tokenizer.eos(), 2017);
}

#[test]
fn only_special_tokens_are_skipped() {
    let tokenizer = tiny();
    let ids = tokenizer
        .encode("<|im_start|>a<think>b</think><|im_end|>")
        .unwrap();
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "a<think>b</think>");
}

#[test]
fn ids_without_a_token_decode_to_nothing() {
    let tokenizer = tiny();
    let mut ids = tokenizer.encode("rain").unwrap();
    ids.push(2111);
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), "rain");
}

#[test]
fn missing_added_tokens_come_from_the_config() {
    let dir = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(fixture("tiny_tokenizer.json")).unwrap();
    let mut file: Value = serde_json::from_str(&text).unwrap();
    let added = file["added_tokens"].as_array_mut().unwrap();
    let cut = added.split_off(26);
    let decoder: serde_json::Map<String, Value> = cut
        .into_iter()
        .map(|token| (token["id"].to_string(), token))
        .collect();
    fs::write(dir.path().join("tokenizer.json"), file.to_string()).unwrap();
    let config = json!({"added_tokens_decoder": decoder}).to_string();
    fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    assert_eq!(tokenizer.encode("<|audio_pad|>").unwrap(), [2047]);
    assert_eq!(tokenizer.vocab_size(), 2048);
}

#[test]
fn contradicting_ids_are_an_error() {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(
        fixture("tiny_tokenizer.json"),
        dir.path().join("tokenizer.json"),
    )
    .unwrap();
    let token = json!({"content": "<new>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    let config = json!({"added_tokens_decoder": {"3000": token}}).to_string();
    fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
    let error = Tokenizer::load(dir.path()).unwrap_err();
    assert!(
        matches!(
            error,
            Error::AddedTokenId {
                expected: 3000,
                got: 2048,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn saved_tokenizer_loads_with_equal_ids() {
    let dir = tempfile::tempdir().unwrap();
    let template = ChatTemplate::history_stable().unwrap();
    tiny().save(dir.path(), &template).unwrap();
    let again = Tokenizer::load(dir.path()).unwrap();
    for case in json_lines(&fixture("tiny_tokenizer_cases.jsonl")) {
        let text = case["text"].as_str().unwrap();
        assert_eq!(again.encode(text).unwrap(), ids(&case["ids"]));
    }
    let loaded = ChatTemplate::load(dir.path()).unwrap();
    assert_eq!(loaded.source(), template.source());
    let files: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
    assert_eq!(files.len(), 3, "nothing half-written stays behind");
}

#[test]
fn packed_file_loads_like_the_plain_one() {
    use std::io::Write;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json.gz");
    let file = fs::File::create(&path).unwrap();
    let mut packer = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
    packer
        .write_all(&fs::read(fixture("tiny_tokenizer.json")).unwrap())
        .unwrap();
    packer.finish().unwrap();
    let text = "She asked softly.";
    let expect = tiny().encode(text).unwrap();
    for path in [path.as_path(), dir.path()] {
        let tokenizer = Tokenizer::load(path).unwrap();
        assert_eq!(tokenizer.encode(text).unwrap(), expect);
    }
}

#[test]
fn older_merges_load_like_newer_ones() {
    let dir = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(fixture("tiny_tokenizer.json")).unwrap();
    let mut file: Value = serde_json::from_str(&text).unwrap();
    for merge in file["model"]["merges"].as_array_mut().unwrap() {
        let line = format!(
            "{} {}",
            merge[0].as_str().unwrap(),
            merge[1].as_str().unwrap()
        );
        *merge = line.into();
    }
    let path = dir.path().join("tokenizer.json");
    fs::write(&path, file.to_string()).unwrap();
    let text = "the lighthouse keeper";
    assert_eq!(
        Tokenizer::load(&path).unwrap().encode(text).unwrap(),
        tiny().encode(text).unwrap()
    );
}

#[test]
fn qwen2_pattern_sets_marks_apart() {
    let text = "กำลังที่นั่น ครับ";
    let newer = tiny();
    let older = newer.clone().with_pattern(WordPattern::Qwen2);
    let back = older.clone().with_pattern(WordPattern::Qwen3_5);
    assert!(older.count(text).unwrap() > newer.count(text).unwrap());
    assert_eq!(back.encode(text).unwrap(), newer.encode(text).unwrap());
}

fn load_text(text: &str) -> Error {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    fs::write(&path, text).unwrap();
    Tokenizer::load(&path).unwrap_err()
}

#[test]
fn missing_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let error = Tokenizer::load(dir.path()).unwrap_err();
    assert!(error.to_string().contains("tokenizer.json"), "{error}");
    assert!(matches!(error, Error::Read { .. }));
}

#[test]
fn broken_json_is_told_with_its_place() {
    let error = load_text("{\"model\": {\"type\": \"BPE\", ");
    assert!(error.to_string().contains("line 1"), "{error}");
}

#[test]
fn other_models_are_named() {
    let error = load_text(r#"{"model": {"type": "Unigram", "vocab": [["a", -1.0]]}}"#);
    assert!(
        matches!(&error, Error::NotBpe { got, .. } if got == "Unigram"),
        "{error}"
    );
}

#[test]
fn a_vocabulary_without_turn_ends_is_refused() {
    let error = load_text(r#"{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}"#);
    assert!(
        matches!(&error, Error::MissingToken { token } if token == "<|im_end|>"),
        "{error}"
    );
}

#[test]
fn an_id_beyond_all_bounds_is_refused_before_memory_is_taken() {
    let mut file: Value =
        serde_json::from_str(&fs::read_to_string(fixture("tiny_tokenizer.json")).unwrap()).unwrap();
    file["model"]["vocab"]["rain rain"] = json!(u32::MAX);
    assert!(matches!(
        load_text(&file.to_string()),
        Error::VocabTooLarge { .. }
    ));
}

#[test]
fn packed_tokenizer_that_unpacks_without_end_is_refused_with_the_limit() {
    use std::io::Write;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json.gz");
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(&vec![b' '; 65 << 20]).unwrap();
    fs::write(&path, packed.finish().unwrap()).unwrap();
    let error = Tokenizer::load(dir.path()).unwrap_err().to_string();
    assert!(error.contains("unpacks to more than 64 MiB"), "{error}");
}
