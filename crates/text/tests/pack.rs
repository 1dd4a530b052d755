//! Packing: recorded bins and rows, and no token or loss lost where documents are cut.

#![allow(clippy::unwrap_used, reason = "a test helper fails by panicking")]

mod common;

use std::collections::BTreeMap;

use common::{fixture, ids, labels, tiny};
use serde_json::Value;
use text::labels::{LossScale, pt, sft};
use text::pack::{CONTEXT_TOKENS, Packing, Piece, bins, check_room, pieces, row, rows, split};
use text::{Conversation, Error, Example, IGNORE, Message, Tokenizer};

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
        let packing = match case["strategy"].as_str().unwrap() {
            "binpack" => Packing::BinPack,
            _ => Packing::Sequential,
        };
        let capacity = case["packing_length"].as_u64().unwrap() as usize;
        assert_eq!(bins(&lengths, capacity, packing).unwrap(), expect);
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
        .map(|(example_idx, w)| Piece {
            example_idx,
            example: Example::document(
                all_ids[w[0] as usize..w[1] as usize].to_vec(),
                all_labels[w[0] as usize..w[1] as usize].to_vec(),
            ),
        })
        .collect();
    let row = row(samples.iter());
    assert_eq!(row.tokens_t, all_ids);
    assert_eq!(row.cu_seqlens, borders);
    assert_eq!(row.examples, [0, 1, 2]);
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
    let bins = bins(&lengths, 10, Packing::BinPack).unwrap();
    assert_eq!(bins.len(), 1000);
    assert_eq!(bins[999], [999, 1000]);
}

#[test]
fn too_long_piece_is_refused() {
    let error = bins(&[3, 11], 10, Packing::BinPack).unwrap_err();
    assert!(matches!(
        error,
        Error::PieceTooLong {
            length: 11,
            row_tokens: 10
        }
    ));
}

/// What each document trains: every (id before, id to predict) that carries loss, counted.
fn trained_pairs(pieces: &[Example]) -> BTreeMap<(u32, i32), usize> {
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

fn check_split(tokenizer: &Tokenizer, document: &Example, row_tokens: usize) {
    let parts = split(Some(tokenizer), document, row_tokens).unwrap_or_else(|e| panic!("{e}"));
    let n_trained: usize = parts.iter().map(Example::n_trained).sum();
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
    let parts = split(Some(&tokenizer), &document, n_tokens).unwrap();
    assert_eq!(parts, [document]);
}

/// Text of each piece without what it repeats.
fn cut_texts(text: &str, row_tokens: usize) -> Vec<String> {
    let tokenizer = tiny();
    let document = pt(&tokenizer, text).unwrap_or_default();
    let parts = split(Some(&tokenizer), &document, row_tokens).unwrap_or_default();
    let new = |(i, part): (usize, &Example)| {
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
    let error = split(Some(&tokenizer), &document, 1).unwrap_err();
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
    let documents: Vec<Example> = (1..6)
        .map(|n| pt(&tokenizer, &STORY.repeat(n)).unwrap())
        .collect();
    let row_tokens = 200;
    for packing in [Packing::BinPack, Packing::Sequential] {
        let pieces = pieces(Some(&tokenizer), &documents, row_tokens).unwrap();
        let rows = rows(&pieces, row_tokens, packing).unwrap();
        let n_targets: usize = rows
            .iter()
            .map(|r| r.targets_t.iter().filter(|&&t| t >= 0).count())
            .sum();
        let n_trained: usize = documents.iter().map(Example::n_trained).sum();
        assert_eq!(n_targets, n_trained);
        let n_pieces: usize = rows.iter().map(|r| r.examples.len()).sum();
        assert_eq!(n_pieces, pieces.len());
        for row in &rows {
            assert!(row.tokens_t.len() <= row_tokens);
            assert_eq!(row.tokens_t.len(), row.targets_t.len());
            assert_eq!(row.cu_seqlens.len(), row.examples.len() + 1);
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
    let documents: Vec<Example> = (1..6)
        .map(|n| pt(&tokenizer, &STORY.repeat(n)).unwrap())
        .collect();
    let make = || {
        let pieces = pieces(Some(&tokenizer), &documents, 150).unwrap();
        rows(&pieces, 150, Packing::BinPack).unwrap()
    };
    assert_eq!(make(), make());
}

#[test]
fn document_without_a_tokenizer_is_cut_where_rows_are_full() {
    let ids: Vec<u32> = (0..25).collect();
    let mut labels: Vec<i32> = (0..25).collect();
    labels[0] = IGNORE;
    let document = Example::document(ids, labels);
    let parts = split(None, &document, 10).unwrap();
    let ids: Vec<_> = parts.iter().map(|part| part.input_ids.clone()).collect();
    let expect: [Vec<u32>; 3] = [(0..10).collect(), (9..19).collect(), (18..25).collect()];
    assert_eq!(ids, expect);
    let n_trained: usize = parts.iter().map(Example::n_trained).sum();
    assert_eq!(n_trained, document.n_trained());
}

const SYSTEM: &str = "You are Bo, the old ferryman. You speak in short sentences.";

/// Questions and answers of three rounds.
const ROUNDS: [(&str, &str); 3] = [
    ("Where is the boat?", "Gone with the tide. I saw it go."),
    (
        "And who took it?",
        "The girl from the mill. She rowed alone. She did not look back.",
    ),
    (
        "Will she come back?",
        "Ask the river. It knows more than I do. It always did.",
    ),
];

fn conversation(system: &str, rounds: &[(&str, &str)]) -> Example {
    let said = rounds
        .iter()
        .flat_map(|(user, answer)| [Message::user(*user), Message::assistant(*answer)]);
    let messages = [Message::system(system)].into_iter().chain(said);
    let conversation = Conversation::new(messages);
    sft(&tiny(), &conversation, LossScale::default()).unwrap()
}

/// Cuts, and checks what holds of every cut of a conversation: rows are held, no label is lost or trained twice, each piece is what it
/// claims to be. Gives the pieces' texts.
fn check_rounds(example: &Example, row_tokens: usize) -> Vec<String> {
    let tokenizer = tiny();
    let pieces = split(Some(&tokenizer), example, row_tokens).unwrap();
    let trained = |examples: &[Example]| -> Vec<u32> {
        examples.iter().flat_map(Example::trained_ids).collect()
    };
    assert_eq!(trained(&pieces), trained(std::slice::from_ref(example)));
    let system = &example.input_ids[..example.rounds[0].start];
    for piece in &pieces {
        assert!(piece.input_ids.len() <= row_tokens);
        assert!(piece.input_ids.starts_with(system));
        assert_eq!(piece.labels[0], IGNORE);
        for (&id, &label) in piece.input_ids.iter().zip(&piece.labels) {
            assert!(label == IGNORE || label == id as i32);
        }
    }
    let texts = pieces.iter();
    texts
        .map(|piece| tokenizer.decode(&piece.input_ids, false).unwrap())
        .collect()
}

fn turn(role: &str, content: &str) -> String {
    let think = if role == "assistant" {
        "<think>\n\n</think>\n\n"
    } else {
        ""
    };
    format!("<|im_start|>{role}\n{think}{content}<|im_end|>\n")
}

/// The least tokens of a row that holds every round.
fn longest_round(example: &Example) -> usize {
    let fits = |row_tokens: &usize| example.n_rounds_longer_than(*row_tokens) == 0;
    (1..).find(fits).unwrap()
}

#[test]
fn rounds_are_marked_where_they_begin_and_where_the_answer_speaks() {
    let tokenizer = tiny();
    let example = conversation(SYSTEM, &ROUNDS);
    assert_eq!(example.rounds.len(), 3);
    let ends = example.rounds.iter().skip(1).map(|round| round.start);
    let ends = ends.chain([example.input_ids.len()]);
    for ((round, end), (user, answer)) in example.rounds.iter().zip(ends).zip(ROUNDS) {
        let text = |range: std::ops::Range<usize>| {
            tokenizer.decode(&example.input_ids[range], false).unwrap()
        };
        let question = turn("user", user);
        assert_eq!(
            text(round.start..round.said),
            format!("{question}<|im_start|>assistant\n<think>\n\n</think>\n\n")
        );
        assert_eq!(text(round.said..end), format!("{answer}<|im_end|>\n"));
    }
}

#[test]
fn conversation_is_cut_between_rounds_with_its_system_message_in_front() {
    let example = conversation(SYSTEM, &ROUNDS);
    let texts = check_rounds(&example, longest_round(&example));
    let system = turn("system", SYSTEM);
    let expect = ROUNDS
        .map(|(user, answer)| system.clone() + &turn("user", user) + &turn("assistant", answer));
    assert_eq!(texts, expect);
}

#[test]
fn as_many_rounds_as_fit_share_a_piece() {
    let example = conversation(SYSTEM, &ROUNDS);
    let until_third = example.rounds[2].start;
    // Two rounds fit to the token, then not any more.
    assert_eq!(check_rounds(&example, until_third).len(), 2);
    assert_eq!(check_rounds(&example, until_third - 1).len(), 3);
    let whole = example.input_ids.len();
    assert_eq!(split(Some(&tiny()), &example, whole).unwrap(), [example]);
}

#[test]
fn conversation_without_system_message_is_cut_between_rounds_too() {
    let example = conversation("", &ROUNDS);
    assert_eq!(example.rounds[0].start, 0);
    let texts = check_rounds(&example, longest_round(&example));
    let expect = ROUNDS.map(|(user, answer)| turn("user", user) + &turn("assistant", answer));
    assert_eq!(texts, expect);
}

#[test]
fn round_that_is_too_long_is_cut_in_its_answer_behind_its_question() {
    let long = STORY.repeat(3);
    let rounds = [ROUNDS[0], ("Tell me of the tide.", long.trim()), ROUNDS[2]];
    let example = conversation(SYSTEM, &rounds);
    assert_eq!(example.n_rounds_longer_than(160), 1);
    let texts = check_rounds(&example, 160);
    assert!(texts.len() > 4);
    let front = turn("system", SYSTEM)
        + &turn("user", "Tell me of the tide.")
        + "<|im_start|>assistant\n<think>\n\n</think>\n\n";
    let inside = &texts[1..texts.len() - 1];
    for text in inside {
        assert!(text.starts_with(&front), "{text}");
    }
    for text in &inside[..inside.len() - 1] {
        let end = text.trim_end_matches(['”', '」', '♪']);
        assert!(
            end.ends_with(['。', '！', '？', '…', '.', '!', '?', '\n']),
            "{text}"
        );
    }
    assert!(texts[0].ends_with(&turn("assistant", ROUNDS[0].1)));
    assert!(texts[texts.len() - 1].ends_with(&turn("assistant", ROUNDS[2].1)));
    // Down to the smallest row that holds question, context and one token.
    let question = example.rounds[1].said - example.rounds[1].start;
    let least = example.rounds[0].start + question + CONTEXT_TOKENS + 1;
    check_rounds(&example, least.max(100));
}

#[test]
fn untrained_and_unfinished_answers_keep_their_labels_when_cut() {
    let quiet = Message {
        is_trained: false,
        ..Message::assistant(ROUNDS[1].1)
    };
    let messages = [
        Message::system(SYSTEM),
        Message::user(ROUNDS[0].0),
        Message::assistant(ROUNDS[0].1),
        Message::user(ROUNDS[1].0),
        quiet,
        Message::user(ROUNDS[2].0),
        Message::assistant(ROUNDS[2].1),
    ];
    for loss_scale in [
        LossScale::IgnoreEmptyThink,
        LossScale::Default,
        LossScale::LastRound,
    ] {
        let conversation = Conversation::new(messages.clone());
        let example = sft(&tiny(), &conversation, loss_scale).unwrap();
        let texts = check_rounds(&example, longest_round(&example));
        assert_eq!(texts.len(), 3);
    }
}

#[test]
fn a_trained_system_message_is_trained_in_the_first_piece_alone() {
    let long = STORY.repeat(3);
    let long = ("Tell me of the tide.", long.trim());
    // A round that is cut inside its answer comes first, behind others, and twice.
    for rounds in [
        vec![long, ROUNDS[0]],
        vec![ROUNDS[0], long],
        vec![ROUNDS[0], long, ROUNDS[1], long],
    ] {
        let mut example = conversation(SYSTEM, &rounds);
        for at in 1..example.rounds[0].start {
            example.labels[at] = example.input_ids[at] as i32;
        }
        assert!(example.n_rounds_longer_than(160) > 0);
        check_rounds(&example, 160);
    }
}

#[test]
fn row_without_room_for_an_answer_is_refused_with_both_lengths() {
    let example = conversation(&SYSTEM.repeat(5), &ROUNDS);
    let system = example.rounds[0].start;
    let error = split(Some(&tiny()), &example, system - 1).unwrap_err();
    let question = example.rounds[0].said - example.rounds[0].start;
    let is_expected = matches!(
        error,
        Error::NoRoomForAnswer { prompt_tokens, row_tokens }
            if prompt_tokens == system + question && row_tokens == system - 1
    );
    assert!(is_expected, "{error}");
    assert!(error.to_string().contains("rows of more tokens"), "{error}");
    // What is found without cutting is what cutting finds.
    let tokenizer = tiny();
    for row_tokens in 2..=example.input_ids.len() {
        let found = check_room(&example, row_tokens).map_err(|error| error.to_string());
        let cut = split(Some(&tokenizer), &example, row_tokens).map_err(|error| error.to_string());
        assert_eq!(found.err(), cut.err(), "{row_tokens}");
    }
}

/// Report 04, whose rounds do not all fit a row of 96 tokens alone: behind the question stands the token before the cut.
#[test]
fn reported_conversation_keeps_system_message_and_question_in_every_piece() {
    let example = conversation(SYSTEM, &ROUNDS);
    let texts = check_rounds(&example, 96);
    let system = turn("system", SYSTEM);
    let piece = |user: &str, answer: &str| {
        let opening = "<|im_start|>assistant\n<think>\n\n</think>\n\n";
        system.clone() + &turn("user", user) + opening + answer
    };
    let expect = [
        piece(ROUNDS[0].0, "Gone with the tide. I saw it go.<|im_end|>\n"),
        piece(ROUNDS[1].0, "The girl from the mill. She rowed alone."),
        piece(ROUNDS[1].0, ". She did not look back.<|im_end|>\n"),
        piece(ROUNDS[2].0, "Ask the river. It knows more than I do."),
        piece(ROUNDS[2].0, ". It always did.<|im_end|>\n"),
    ];
    assert_eq!(texts, expect);
}
