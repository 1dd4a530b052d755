//! Packing: recorded bins and rows, and no token or loss lost where documents are cut.

#![allow(clippy::unwrap_used, reason = "a test helper fails by panicking")]

mod common;

use std::collections::BTreeMap;

use common::{fixture, ids, labels, tiny};
use serde_json::Value;
use text::labels::{Encoded, IGNORE, pt};
use text::pack::{CONTEXT_TOKENS, Piece, Strategy, bins, pieces, row, rows, split};
use text::{Error, Tokenizer};

fn recorded() -> Value {
    serde_json::from_str(&std::fs::read_to_string(fixture("packing_cases.json")).unwrap()).unwrap()
}

#[test]
fn lengths_fall_into_the_recorded_bins() {
    let recorded = recorded();
    let cases = recorded["packing"].as_array().unwrap();
    assert_eq!(cases.len(), 8);
    for case in cases {
        let lengths: Vec<usize> = serde_json::from_value(case["lengths"].clone()).unwrap();
        let expect: Vec<Vec<usize>> = serde_json::from_value(case["packs"].clone()).unwrap();
        let strategy = match case["strategy"].as_str().unwrap() {
            "binpack" => Strategy::BinPack,
            _ => Strategy::Sequential,
        };
        let capacity = case["packing_length"].as_u64().unwrap() as usize;
        assert_eq!(bins(&lengths, capacity, strategy).unwrap(), expect);
    }
}

#[test]
fn row_is_laid_out_as_recorded() {
    let recorded = recorded();
    let expect = &recorded["packed_row"];
    let (all_ids, all_labels) = (ids(&expect["input_ids"][0]), labels(&expect["labels"][0]));
    let borders = ids(&expect["cu_seq_lens_q"]);
    let samples: Vec<Piece> = borders
        .windows(2)
        .enumerate()
        .map(|(document, w)| Piece {
            document,
            encoded: Encoded {
                input_ids: all_ids[w[0] as usize..w[1] as usize].to_vec(),
                labels: all_labels[w[0] as usize..w[1] as usize].to_vec(),
            },
        })
        .collect();
    let row = row(samples.iter());
    assert_eq!(row.tokens_t, all_ids);
    assert_eq!(row.cu_seqlens, borders);
    assert_eq!(row.documents, [0, 1, 2]);
    // The recorded labels are not shifted; the trainer's shift crosses borders only onto masked first labels.
    let shifted = all_labels.iter().skip(1).chain([&IGNORE]);
    let targets: Vec<i32> = shifted.map(|&l| if l == IGNORE { -1 } else { l }).collect();
    assert_eq!(row.targets_t, targets);
    let positions: Vec<u32> = row
        .cu_seqlens
        .windows(2)
        .flat_map(|w| 0..w[1] - w[0])
        .collect();
    assert_eq!(positions, ids(&expect["position_ids"][0][0]));
}

#[test]
fn last_bin_of_a_window_stays_open() {
    // 1000 pieces of 6 fill a row each; the last row must take the piece of 4 that only the next window brings.
    let mut lengths = vec![6; 1000];
    lengths.push(4);
    let bins = bins(&lengths, 10, Strategy::BinPack).unwrap();
    assert_eq!(bins.len(), 1000);
    assert_eq!(bins[999], [999, 1000]);
}

#[test]
fn too_long_piece_is_refused() {
    let error = bins(&[3, 11], 10, Strategy::BinPack).unwrap_err();
    assert!(matches!(
        error,
        Error::PieceTooLong {
            length: 11,
            row_tokens: 10
        }
    ));
}

/// What each document trains: every (id before, id to predict) that carries loss, counted.
fn trained_pairs(pieces: &[Encoded]) -> BTreeMap<(u32, i32), usize> {
    let mut pairs = BTreeMap::new();
    for piece in pieces {
        for (ids, &label) in piece.input_ids.windows(2).zip(&piece.labels[1..]) {
            if label != IGNORE {
                *pairs.entry((ids[0], label)).or_default() += 1;
            }
        }
    }
    pairs
}

fn check_split(tokenizer: &Tokenizer, document: &Encoded, row_tokens: usize) {
    let parts = split(tokenizer, document, row_tokens).unwrap_or_else(|e| panic!("{e}"));
    let n_trained: usize = parts.iter().map(Encoded::n_trained).sum();
    assert_eq!(n_trained, document.n_trained());
    assert_eq!(
        trained_pairs(&parts),
        trained_pairs(std::slice::from_ref(document))
    );
    let mut rebuilt: Vec<u32> = Vec::new();
    for (part_idx, part) in parts.iter().enumerate() {
        assert!(part.input_ids.len() <= row_tokens);
        assert_eq!(part.labels[0], IGNORE);
        let repeated = if part_idx == 0 { 0 } else { CONTEXT_TOKENS };
        assert!(rebuilt.ends_with(&part.input_ids[..repeated]));
        rebuilt.extend(&part.input_ids[repeated..]);
    }
    assert_eq!(rebuilt, document.input_ids);
}

const STORY: &str = "The tide went out. She looked up: “Is it 3.14 miles?” Nobody knew... The keeper laughed! \
    潮声落下的时候，灯塔看守人终于等到了那封信。“你还记得我吗？”少女轻声问道。嗯……大概吧♪ 「……そっか」とだけ言って、彼女は笑った。\n\
    Quand la marée s'est retirée, la gardienne trouva la lettre. 👍🏽 걱정하지 마, 비가 그칠 때까지 곁에 있을게.\n";

#[test]
fn splitting_loses_no_token_and_no_loss() {
    let tokenizer = tiny();
    let document = pt(&tokenizer, &STORY.repeat(3)).unwrap();
    for row_tokens in [2, 3, 7, 16, 33, 64, 100, 301] {
        check_split(&tokenizer, &document, row_tokens);
    }
}

#[test]
fn masked_labels_stay_masked_when_split() {
    let tokenizer = tiny();
    let mut document = pt(&tokenizer, STORY).unwrap();
    for label in document.labels.iter_mut().step_by(3) {
        *label = IGNORE;
    }
    check_split(&tokenizer, &document, 20);
}

#[test]
fn documents_that_fit_stay_whole() {
    let tokenizer = tiny();
    let document = pt(&tokenizer, STORY).unwrap();
    let n_tokens = document.input_ids.len();
    let parts = split(&tokenizer, &document, n_tokens).unwrap();
    assert_eq!(parts, [document]);
}

/// Text of each piece without what it repeats.
fn cut_texts(text: &str, row_tokens: usize) -> Vec<String> {
    let tokenizer = tiny();
    let document = pt(&tokenizer, text).unwrap_or_default();
    let parts = split(&tokenizer, &document, row_tokens).unwrap_or_default();
    let new = |(i, part): (usize, &Encoded)| {
        let skip = if i == 0 { 0 } else { CONTEXT_TOKENS };
        tokenizer
            .decode(&part.input_ids[skip..], true)
            .unwrap_or_default()
    };
    parts.iter().enumerate().map(new).collect()
}

#[test]
fn cuts_fall_on_sentence_ends() {
    let texts = cut_texts(&STORY.repeat(3), 90);
    assert!(texts.len() > 4);
    for text in &texts[..texts.len() - 1] {
        let end = text.trim_end_matches(['”', '」', '♪']);
        let ends_well = end.ends_with(['。', '！', '？', '…', '.', '!', '?', '\n']);
        assert!(ends_well, "{text:?}");
        assert!(!text.ends_with("3."), "{text:?}");
    }
}

#[test]
fn closing_quotes_stay_with_their_sentence() {
    let texts = cut_texts(&"“你还记得我吗？”".repeat(20), 40);
    assert!(texts.len() > 2);
    for text in texts {
        assert!(text.starts_with('“') && text.ends_with('”'), "{text:?}");
    }
}

#[test]
fn text_without_sentences_is_cut_between_characters() {
    let texts = cut_texts(&"潮声".repeat(60), 31);
    assert!(texts.len() > 3);
    assert!(texts.iter().all(|t| !t.contains('\u{fffd}')));
    assert_eq!(texts.concat(), "潮声".repeat(60));
}

#[test]
fn row_too_short_for_any_cut_is_refused() {
    let tokenizer = tiny();
    let document = pt(&tokenizer, "some words").unwrap();
    let error = split(&tokenizer, &document, 1).unwrap_err();
    assert!(matches!(
        error,
        Error::RowTooShort {
            row_tokens: 1,
            least: 2
        }
    ));
}

#[test]
fn rows_hold_every_piece_once_and_keep_documents_apart() {
    let tokenizer = tiny();
    let documents: Vec<Encoded> = (1..6)
        .map(|n| pt(&tokenizer, &STORY.repeat(n)).unwrap())
        .collect();
    let row_tokens = 200;
    for strategy in [Strategy::BinPack, Strategy::Sequential] {
        let pieces = pieces(&tokenizer, &documents, row_tokens).unwrap();
        let rows = rows(&pieces, row_tokens, strategy).unwrap();
        let n_targets: usize = rows
            .iter()
            .map(|r| r.targets_t.iter().filter(|&&t| t >= 0).count())
            .sum();
        let n_trained: usize = documents.iter().map(Encoded::n_trained).sum();
        assert_eq!(n_targets, n_trained);
        let n_pieces: usize = rows.iter().map(|r| r.documents.len()).sum();
        assert_eq!(n_pieces, pieces.len());
        for row in &rows {
            assert!(row.tokens_t.len() <= row_tokens);
            assert_eq!(row.tokens_t.len(), row.targets_t.len());
            assert_eq!(row.cu_seqlens.len(), row.documents.len() + 1);
            for &end in &row.cu_seqlens[1..] {
                assert_eq!(row.targets_t[end as usize - 1], -1);
            }
            for t in 0..row.tokens_t.len() - 1 {
                let target = row.targets_t[t];
                assert!(target < 0 || target == row.tokens_t[t + 1] as i32);
            }
        }
    }
}

#[test]
fn packing_is_repeatable() {
    let tokenizer = tiny();
    let documents: Vec<Encoded> = (1..6)
        .map(|n| pt(&tokenizer, &STORY.repeat(n)).unwrap())
        .collect();
    let make = || {
        let pieces = pieces(&tokenizer, &documents, 150).unwrap();
        rows(&pieces, 150, Strategy::BinPack).unwrap()
    };
    assert_eq!(make(), make());
}
