//! Training rows against those recorded from ms-swift, with the real vocabulary.

#![allow(clippy::unwrap_used, reason = "a test helper fails by panicking")]

mod common;

use common::{fixture, ids, json_lines, labels, messages, recorded_conversation, shared};
use serde_json::Value;
use text::labels::{Contents, LossScale, SftOptions, preview, pt_with_end, sft};
use text::{ChatTemplate, Conversation, Example, RenderOptions, Tokenizer};

fn tokenizer() -> Option<Tokenizer> {
    shared("reference/tokenizer").map(|dir| Tokenizer::load(&dir).unwrap())
}

fn recorded(case: &Value, ids_key: &str, labels_key: &str) -> Option<Example> {
    let own_ids = case.get(ids_key).unwrap_or(&case["input_ids"]);
    case.get(labels_key)
        .map(|l| Example::document(ids(own_ids), labels(l)))
}

#[test]
fn conversations_are_labelled_as_recorded_in_every_variant() {
    let Some(tokenizer) = tokenizer() else { return };
    let template = std::fs::read_to_string(fixture("chat_template.jinja")).unwrap();
    let template = ChatTemplate::from_source(&template).unwrap();
    let cases = json_lines(&fixture("sft_label_cases.jsonl"));
    assert_eq!(cases.len(), 24);
    let variants = [
        ("input_ids", "labels", LossScale::IgnoreEmptyThink, true),
        (
            "input_ids",
            "labels_plain_default",
            LossScale::Default,
            true,
        ),
        (
            "labels_last_round_input_ids",
            "labels_last_round",
            LossScale::LastRound,
            true,
        ),
        (
            "no_prefix_input_ids",
            "no_prefix_labels",
            LossScale::Default,
            false,
        ),
    ];
    let mut n_checked = 0;
    for case in &cases {
        let name = case["name"].as_str().unwrap();
        let tools = case.get("tools").and_then(Value::as_array);
        for (ids_key, labels_key, loss_scale, empty_think_prefix) in variants {
            let Some(expect) = recorded(case, ids_key, labels_key) else {
                continue;
            };
            let options = SftOptions {
                loss_scale,
                empty_think_prefix,
                tools: tools.map(|t| (&template, t.as_slice())),
                contents: Contents::AsMsSwift,
            };
            let mut got = sft(&tokenizer, &recorded_conversation(case), options).unwrap();
            if let Some(max_length) = case.get("max_length").and_then(Value::as_u64) {
                // Recorded with truncation, which this project never does.
                got.input_ids.truncate(max_length as usize);
                got.labels.truncate(max_length as usize);
            }
            // The recorded rows know no rounds.
            let got = Example::document(got.input_ids, got.labels);
            assert_eq!(got, expect, "{name}: {labels_key}");
            n_checked += 1;
        }
    }
    assert_eq!(n_checked, 93);
}

#[test]
fn ordinary_conversations_render_to_the_ids_of_training() {
    let Some(tokenizer) = tokenizer() else { return };
    let template = ChatTemplate::history_stable().unwrap();
    let mut n_ordinary = 0;
    for case in json_lines(&fixture("sft_label_cases.jsonl")) {
        let name = case["name"].as_str().unwrap();
        let is_odd = name.starts_with("consecutive")
            || name.starts_with("answer ends with")
            || name.starts_with("truncated")
            || case.get("tools").is_some();
        if is_odd {
            continue;
        }
        let conversation = Conversation::new(messages(&case));
        let rendered = template.render(&conversation, &RenderOptions::default());
        let got = tokenizer.encode(&rendered.unwrap()).unwrap();
        assert_eq!(got, ids(&case["input_ids"]), "{name}");
        n_ordinary += 1;
    }
    assert_eq!(n_ordinary, 19);
}

#[test]
fn previews_show_what_is_trained() {
    let Some(tokenizer) = tokenizer() else { return };
    for case in json_lines(&fixture("sft_label_cases.jsonl")) {
        let encoded = recorded(&case, "input_ids", "labels").unwrap();
        let Some(expect) = case["trained_text"].as_str() else {
            continue;
        };
        // The recorded view decodes token by token and so breaks emoji.
        if !expect.contains('\u{fffd}') {
            assert_eq!(preview(&tokenizer, &encoded).unwrap(), expect);
        }
    }
}

#[test]
fn documents_are_labelled_as_recorded_with_both_ends() {
    let Some(tokenizer) = tokenizer() else { return };
    let cases = json_lines(&fixture("pt_cases.jsonl"));
    let mut ends = std::collections::BTreeSet::new();
    for case in &cases {
        let end_id = tokenizer.id(case["eos_token"].as_str().unwrap()).unwrap();
        ends.insert(end_id);
        let text = case["messages"][0]["content"].as_str().unwrap();
        let mut got = pt_with_end(&tokenizer, text, end_id, Contents::AsMsSwift).unwrap();
        let max_length = case["max_length"].as_u64().unwrap() as usize;
        got.input_ids.truncate(max_length);
        got.labels.truncate(max_length);
        let expect = recorded(case, "input_ids", "labels").unwrap();
        assert_eq!(got, expect, "{text}");
    }
    assert_eq!(ends.into_iter().collect::<Vec<_>>(), [248_044, 248_046]);
}
