//! The real vocabulary against ids recorded from Hugging Face.

#![allow(clippy::unwrap_used, reason = "a test helper fails by panicking")]

mod common;

use std::io::Read;
use std::path::Path;

use common::{ids, json_lines, shared};
use text::{ADDED_TOKENS, ChatTemplate, StreamDecoder, Tokenizer, WordPattern};

#[test]
fn all_recorded_texts_encode_and_decode_as_hugging_face_does() {
    let Some(dir) = shared("reference/tokenizer") else {
        return;
    };
    let tokenizer = Tokenizer::load(&dir).unwrap();
    let older = tokenizer.clone().with_pattern(WordPattern::Qwen2);
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

/// The `tokenizers` crate by itself: it reads the same file with its own code and runs its whole pipeline.
fn oracle(dir: &Path, pattern: WordPattern) -> tokenizers::Tokenizer {
    let mut file = unpack(&dir.join("tokenizer.json.gz"));
    if pattern == WordPattern::Qwen2 {
        let spelt = |pattern: WordPattern| serde_json::to_string(pattern.regex()).unwrap();
        file = file.replace(&spelt(WordPattern::Qwen3_5), &spelt(pattern));
    }
    tokenizers::Tokenizer::from_bytes(file.as_bytes()).unwrap()
}

fn unpack(path: &Path) -> String {
    let file = std::fs::File::open(path).unwrap();
    let mut text = String::new();
    flate2::read::GzDecoder::new(file)
        .read_to_string(&mut text)
        .unwrap();
    text
}

#[test]
fn a_story_in_twelve_languages_encodes_as_the_crate_does() {
    let (Some(dir), Some(story)) = (
        shared("reference/tokenizer"),
        shared("story/wesnoth_story.jsonl.gz"),
    ) else {
        return;
    };
    let oracle = oracle(&dir, WordPattern::Qwen3_5);
    let tokenizer = Tokenizer::load(&dir).unwrap();
    for line in unpack(&story).lines().step_by(10) {
        let expect = oracle.encode_fast(line, false).unwrap();
        let got = tokenizer.encode(line).unwrap();
        assert!(got == expect.get_ids(), "{line}");
    }
}

/// Characters of many scripts, combining marks in any order, white space of every kind, added tokens and parts of them.
const PIECES: [&str; 14] = [
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "0123456789٣५๔Ⅷ½²",
    " \t\n\r\u{a0}\u{3000}\u{2028}\u{85}\u{200b}\u{1c}",
    "'.,:;!?-–—…“”‘’«»()[]{}<>|/\\@#$%^&*_=+~`",
    "的一是不了人我在有他这为之大来以个中上们到说国和地也子时道出而要于就下得可你年生自会",
    "のにはをたがでてとしれさいるかもなあこらまデスランアイトー、。「」",
    "가각간나는다라마바사하의에을이고그리",
    "абвгдежзийклмнопрстуфхцчшщъыьэюяЁЙ",
    "กขคงจชดตถทนบปผพมยรลวสหอะาิีึืุูเแโใไๆ็่้๊๋์ํ",
    "àáâãäåæçèéêëñòóôõöøùúûüýÿßœřšžđğıİąęłńśźżạảấầẩẫậắằẳẵặẹẻẽếềểễệ",
    "\u{300}\u{301}\u{302}\u{303}\u{308}\u{30a}\u{323}\u{327}\u{328}\u{345}\u{591}\u{5b0}\u{64b}\u{93c}\u{94d}\u{1100}\u{1161}\u{11a8}",
    "αβγδεΆήώאבגדابتثहिन्दीதமிழ်မြန်မာ",
    "😀👍🏽👩‍🚀🇩🇪★→∀≠Å𝒜𠀀𠮷ﬁＡ～㍿Ⓐﾞ",
    "",
];
const SPECIAL: [&str; 10] = [
    "<|im_end|>",
    "<think>",
    "</think>",
    "<|im_",
    "<|endoftext|>",
    "'ll",
    "'RE",
    "'ſ",
    "\r\n",
    "  ",
];

#[test]
fn generated_texts_encode_as_the_crate_does() {
    let Some(dir) = shared("reference/tokenizer") else {
        return;
    };
    let tokenizer = Tokenizer::load(&dir).unwrap();
    let mut state = 20_241_124_u64;
    let mut random = |n: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) as usize % n
    };
    let pieces: Vec<Vec<char>> = PIECES.iter().map(|p| p.chars().collect()).collect();
    let mut texts = Vec::new();
    for idx in 0..20_000 {
        let mut text = String::new();
        for _ in 0..=random(12) {
            let piece = &pieces[random(pieces.len())];
            if piece.is_empty() {
                text.push_str(SPECIAL[random(SPECIAL.len())]);
                continue;
            }
            // Every hundredth text has words longer than the caches and the scan take.
            let most = if idx % 100 == 0 { 200 } else { 8 };
            for _ in 0..=random(most) {
                text.push(piece[random(piece.len())]);
            }
        }
        texts.push(text);
    }
    for pattern in [WordPattern::Qwen3_5, WordPattern::Qwen2] {
        let oracle = oracle(&dir, pattern);
        let tokenizer = tokenizer.clone().with_pattern(pattern);
        for text in &texts {
            let expect = oracle.encode_fast(text.as_str(), false).unwrap();
            assert!(
                tokenizer.encode(text).unwrap() == expect.get_ids(),
                "{text:?}"
            );
            assert_eq!(tokenizer.count(text).unwrap(), expect.get_ids().len());
        }
    }
}
