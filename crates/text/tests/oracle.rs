//! Our tokenizer against the `tokenizers` crate, with vocabularies that a fresh clone has.

#![allow(clippy::unwrap_used, reason = "a test helper fails by panicking")]

mod common;
#[path = "common/oracle.rs"]
mod oracle;

use std::fs;
use std::path::Path;

use common::fixture;
use serde_json::{Value, json};
use text::{ADDED_TOKENS, ChatTemplate, Tokenizer, WordPattern};

const TEXTS: [&str; 9] = [
    "She asked softly: \"Where's the café?\"\r\n  He didn't know.",
    "她轻声问：“灯塔在哪里？”——没有人知道1024年的事。",
    "Où est-il ? E\u{301}te\u{301}, 12 %, ＡＢＣ, ｶﾞ, 한국어, กำลังที่นั่น",
    "a<|im_start|>user\nb<|im_end|><think></think><|endoftext|> <tts_pad>",
    "",
    " \n\n\t x",
    " <|im_end|>  rain keeperrain keeper\u{2003}\n<|im_end|> e\u{301}cole école_rain rain-keeper \t ",
    "xqz xqz, xqzs",
    "_école éécole <i> e\u{301}cole\u{301} rain\u{301} the lighthouse keeper",
];

/// Both patterns of a tokenizer that was loaded from a file with changes.
fn check_changed(change: impl FnOnce(&mut Value)) {
    let text = fs::read_to_string(fixture("tiny_tokenizer.json")).unwrap();
    let mut file: Value = serde_json::from_str(&text).unwrap();
    change(&mut file);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokenizer.json");
    fs::write(&path, file.to_string()).unwrap();
    let tokenizer = Tokenizer::load(&path).unwrap();
    let theirs = oracle::read(&path);
    for text in TEXTS {
        oracle::check(&tokenizer, &theirs, text);
    }
    // What is written says the same again.
    let again = oracle::of(&tokenizer);
    for text in TEXTS {
        oracle::check(&tokenizer, &again, text);
    }
    let older = tokenizer.with_pattern(WordPattern::Qwen2);
    let theirs = oracle::of(&older);
    for text in TEXTS {
        oracle::check(&older, &theirs, text);
    }
}

/// Alone, doubled, after white space and apostrophes and between letters; every character of the lower planes, and some of the higher.
#[test]
fn every_character_encodes_as_the_crate_does() {
    let newer = Tokenizer::train(["a b c"].into_iter(), 256).unwrap();
    let older = newer.clone().with_pattern(WordPattern::Qwen2);
    let higher = (0x3400..=0x2_ffff).step_by(53);
    let all: Vec<char> = (0..0x3400)
        .chain(higher)
        .filter_map(char::from_u32)
        .collect();
    for tokenizer in [newer, older] {
        let theirs = oracle::of(&tokenizer);
        for chunk in all.chunks(512) {
            let text: String = chunk
                .iter()
                .map(|c| format!("{c} {c}{c}  {c}a{c}'{c}e {c}'L{c}\n"))
                .collect();
            oracle::check(&tokenizer, &theirs, &text);
        }
    }
}

#[test]
fn steps_within_sequences_mean_the_same() {
    check_changed(|file| {
        file["normalizer"] = json!({"type": "Sequence", "normalizers": [{"type": "NFC"}]});
        file["decoder"] = json!({"type": "Sequence", "decoders": [file["decoder"]]});
    });
}

#[test]
fn texts_stay_as_they_are_where_nothing_normalizes() {
    check_changed(|file| file["normalizer"] = Value::Null);
}

#[test]
fn words_of_the_vocabulary_are_whole_where_merges_are_ignored() {
    check_changed(|file| {
        file["model"]["ignore_merges"] = true.into();
        // No merges lead to it.
        let n = file["model"]["vocab"].as_object().unwrap().len();
        let last = file["model"]["vocab"].as_object_mut().unwrap();
        let (token, id) = ("Ġxqz".to_owned(), n - 1);
        let replaced = last
            .iter()
            .find(|(_, v)| **v == json!(id))
            .unwrap()
            .0
            .clone();
        last.remove(&replaced);
        last.insert(token, id.into());
        let merges = file["model"]["merges"].as_array_mut().unwrap();
        merges.retain(|m| {
            let part = |i: usize| m[i].as_str().unwrap();
            ![part(0), part(1)].contains(&replaced.as_str())
                && format!("{}{}", part(0), part(1)) != replaced
        });
    });
}

#[test]
fn options_that_say_nothing_where_all_bytes_are_known_change_nothing() {
    check_changed(|file| {
        file["model"]["unk_token"] = "<unk>".into();
        file["model"]["fuse_unk"] = true.into();
        file["model"]["byte_fallback"] = true.into();
    });
}

/// Tokens with every flag by itself and with all, beginning with letters and white space, within each other, not in NFC.
#[test]
fn flags_of_added_tokens_mean_what_the_crate_takes_them_for() {
    let contents = [
        "rain",
        "éc",
        "e\u{301}cole",
        "<i>",
        "_",
        "keeper",
        "\n",
        "in kee",
    ];
    for flags in 0..32 {
        check_changed(|file| {
            let vocab = file["model"]["vocab"].as_object().unwrap().clone();
            let mut next = 2048;
            let tokens = file["added_tokens"].as_array_mut().unwrap();
            let bit = |at: usize, idx: usize| (flags >> ((at + idx) % 5)) & 1 == 1;
            for (idx, content) in contents.iter().enumerate() {
                let id = vocab.get(*content).cloned().unwrap_or_else(|| {
                    next += 1;
                    json!(next - 1)
                });
                tokens.push(json!({
                    "id": id, "content": content, "single_word": bit(0, idx),
                    // White space that takes white space along makes the crate panic where another token has taken it.
                    "lstrip": bit(1, idx) && *content != "\n",
                    "rstrip": bit(2, idx), "normalized": bit(3, idx),
                    // Of a special token that is not in NFC the crate forgets that it is special.
                    "special": bit(4, idx) && !content.contains('\u{301}'),
                }));
            }
        });
    }
}

#[test]
fn added_tokens_have_the_ids_that_the_crate_gives_them() {
    let tokenizer = Tokenizer::train(["some words, some more"].into_iter(), 300).unwrap();
    let theirs = oracle::of(&tokenizer);
    let added = theirs.get_added_vocabulary();
    let decoder = added.get_added_tokens_decoder();
    assert_eq!(decoder.len(), ADDED_TOKENS.len());
    for (content, special) in ADDED_TOKENS {
        let id = tokenizer.id(content).unwrap();
        assert_eq!(theirs.token_to_id(content), Some(id), "{content}");
        assert_eq!(theirs.id_to_token(id).as_deref(), Some(content));
        assert_eq!(decoder[&id].special, special, "{content}");
        assert_eq!(added.is_special_token(content), special, "{content}");
        assert!(tokenizer.is_added(id));
    }
}

/// Two programs that read a folder and write it again leave the same file.
#[test]
fn a_saved_file_is_byte_for_byte_what_the_crate_writes() {
    let trained = Tokenizer::train(TEXTS.into_iter(), 400).unwrap();
    let loaded = Tokenizer::load(&fixture("tiny_tokenizer.json")).unwrap();
    let older = loaded.clone().with_pattern(WordPattern::Qwen2);
    for tokenizer in [trained, loaded, older] {
        let dir = tempfile::tempdir().unwrap();
        let template = ChatTemplate::history_stable().unwrap();
        tokenizer.save(dir.path(), &template).unwrap();
        let path = dir.path().join("tokenizer.json");
        let written = fs::read_to_string(&path).unwrap();
        let theirs = oracle::read(&path).to_string(false).unwrap();
        assert!(written == theirs, "{}", &theirs[..300]);
    }
}

#[test]
fn seeds_of_the_fuzzer_encode_as_the_crate_does() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds/tokenizer");
    for tokenizer in text::fuzz::tokenizers() {
        let theirs = oracle::of(tokenizer);
        for seed in fs::read_dir(&seeds).unwrap() {
            let bytes = fs::read(seed.unwrap().path()).unwrap();
            oracle::check(tokenizer, &theirs, &String::from_utf8_lossy(&bytes));
        }
    }
}
