//! Streaming decoding against decoding at once.

mod common;

use common::{fixture, json_lines, tiny};
use text::{StreamDecoder, Tokenizer};

/// What each id gives, then what is left.
fn pieces(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> Vec<String> {
    let mut stream = StreamDecoder::new(tokenizer, skip_special);
    let mut pieces: Vec<String> = ids.iter().map(|&id| stream.push(id)).collect();
    pieces.push(stream.finish());
    pieces
}

fn check(tokenizer: &Tokenizer, ids: &[u32]) {
    for skip_special in [false, true] {
        let expect = tokenizer.decode(ids, skip_special).unwrap_or_default();
        assert_eq!(pieces(tokenizer, ids, skip_special).concat(), expect);
    }
}

/// Ids of single bytes: the tiny vocabulary begins with them in spelling order.
fn bytes(tokenizer: &Tokenizer, bytes: &[u8]) -> Vec<u32> {
    let spelt = |&byte: &u8| {
        let mut own = Vec::new();
        let id = (0..256).find(|&id| {
            own.clear();
            tokenizer.append_bytes(id, false, &mut own);
            own == [byte]
        });
        id.unwrap_or(u32::MAX)
    };
    bytes.iter().map(spelt).collect()
}

#[test]
fn streams_join_to_the_decoded_text() {
    let tokenizer = tiny();
    for case in json_lines(&fixture("tiny_tokenizer_cases.jsonl")) {
        check(&tokenizer, &common::ids(&case["ids"]));
    }
}

#[test]
fn any_order_of_tokens_streams_as_it_decodes() {
    let tokenizer = tiny();
    // A fixed congruential walk over all ids, ids without a token included: mostly broken UTF-8.
    let ids: Vec<u32> = (0..20_000u64)
        .map(|i| ((i * 48_271 + 11) % 2_111) as u32)
        .collect();
    for chunk in ids.chunks(50) {
        check(&tokenizer, chunk);
    }
}

#[test]
fn split_characters_come_out_whole() {
    let tokenizer = tiny();
    let ids = bytes(&tokenizer, "é♪😀".as_bytes());
    let got = pieces(&tokenizer, &ids, false);
    assert_eq!(got, ["", "é", "", "", "♪", "", "", "", "😀", ""]);
}

#[test]
fn impossible_bytes_become_replacement_characters_at_once() {
    let tokenizer = tiny();
    let ids = bytes(&tokenizer, b"\xffa\xe2\x99b");
    let got = pieces(&tokenizer, &ids, false);
    assert_eq!(got, ["\u{fffd}", "a", "", "", "\u{fffd}b", ""]);
}

#[test]
fn unfinished_character_is_told_at_the_end() {
    let tokenizer = tiny();
    let ids = bytes(&tokenizer, b"a\xf0\x9f\x98");
    assert_eq!(pieces(&tokenizer, &ids, false).concat(), "a\u{fffd}");
}
