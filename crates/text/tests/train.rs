//! Learning a vocabulary.

#![allow(clippy::unwrap_used, reason = "a test helper fails by panicking")]

mod common;

use common::{fixture, json_lines};
use text::{ADDED_TOKENS, ChatTemplate, Error, Tokenizer};

fn texts() -> Vec<String> {
    let cases = json_lines(&fixture("sft_label_cases.jsonl"));
    let turns = cases.iter().flat_map(common::messages);
    turns.map(|m| m.content).collect()
}

fn train(texts: &[String], vocab_size: usize) -> Tokenizer {
    Tokenizer::train(texts.iter().map(String::as_str), vocab_size).unwrap_or_else(|e| panic!("{e}"))
}

fn json_of(tokenizer: &Tokenizer) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let template = ChatTemplate::history_stable().unwrap();
    tokenizer.save(dir.path(), &template).unwrap();
    std::fs::read(dir.path().join("tokenizer.json")).unwrap()
}

#[test]
fn same_texts_give_the_same_bytes() {
    let texts = texts();
    assert_eq!(json_of(&train(&texts, 600)), json_of(&train(&texts, 600)));
}

#[test]
fn order_of_texts_does_not_matter() {
    let mut texts = texts();
    let expect = json_of(&train(&texts, 600));
    texts.reverse();
    assert_eq!(json_of(&train(&texts, 600)), expect);
}

#[test]
fn added_tokens_follow_the_learned_ones() {
    let tokenizer = train(&texts(), 600);
    assert_eq!(tokenizer.vocab_size(), 633);
    for (id, (token, _)) in (600..).zip(ADDED_TOKENS) {
        assert_eq!(tokenizer.encode(token).unwrap(), [id]);
    }
    assert_eq!(tokenizer.eos(), 602);
}

#[test]
fn learned_vocabulary_shortens_its_texts_and_loses_nothing() {
    let texts = texts();
    let (bytes, words) = (train(&texts, 256), train(&texts, 600));
    for text in &texts {
        let ids = words.encode(text).unwrap();
        assert_eq!(words.decode(&ids, false).unwrap(), *text);
        assert!(ids.len() <= bytes.count(text).unwrap());
    }
    let total = |t: &Tokenizer| texts.iter().map(|s| t.count(s).unwrap()).sum::<usize>();
    assert!(total(&words) * 2 < total(&bytes));
}

#[test]
fn saved_training_loads_with_equal_ids() {
    let tokenizer = train(&texts(), 600);
    let dir = tempfile::tempdir().unwrap();
    let template = ChatTemplate::history_stable().unwrap();
    tokenizer.save(dir.path(), &template).unwrap();
    let again = Tokenizer::load(dir.path()).unwrap();
    for text in texts() {
        assert_eq!(
            again.encode(&text).unwrap(),
            tokenizer.encode(&text).unwrap()
        );
    }
}

#[test]
fn learned_ids_are_those_of_the_merges() {
    // "ab" (4) before "cd" (2); then "abcd" (2), which is one word.
    let tokenizer = train(&["abcd abcd ab ab".to_owned()], 260);
    let ids = tokenizer.encode("abcd").unwrap();
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), "abcd");
    assert_eq!(tokenizer.encode("ab").unwrap(), [256]);
}

#[test]
fn poor_texts_give_a_smaller_vocabulary() {
    let tokenizer = train(&["aa bb".to_owned()], 4_000);
    assert_eq!(tokenizer.vocab_size(), 256 + ADDED_TOKENS.len());
}

#[test]
fn vocabulary_below_the_bytes_is_refused() {
    let error = Tokenizer::train(std::iter::empty(), 255).unwrap_err();
    assert!(matches!(error, Error::VocabTooSmall { vocab_size: 255 }));
}
