//! Training rows with the tiny vocabulary: what is recorded as text holds for any vocabulary.

#![allow(clippy::unwrap_used, reason = "a test helper fails by panicking")]

mod common;

use common::{fixture, json_lines, recorded_conversation, tiny};
use text::labels::{Contents, LossScale, SftOptions, preview, pt, pt_with_end, sft, text_bytes};
use text::{ChatTemplate, Conversation, Error, Example, IGNORE, Message, RenderOptions, Tokenizer};

fn messages() -> [Message; 5] {
    [
        Message::system("Be kind."),
        Message::user("Hi"),
        Message::assistant("Hello."),
        Message::user("And?"),
        Message::assistant("More."),
    ]
}

fn conversation() -> Conversation {
    Conversation::new(messages())
}

/// As the recorded rows were made, some of whose contents spell added tokens.
fn as_recorded() -> SftOptions<'static> {
    SftOptions {
        contents: Contents::AsMsSwift,
        ..SftOptions::default()
    }
}

/// The text under loss, without what is masked.
fn trained(tokenizer: &Tokenizer, encoded: &Example) -> String {
    let ids: Vec<u32> = encoded.trained_ids().collect();
    tokenizer.decode(&ids, false).unwrap_or_default()
}

#[test]
fn recorded_texts_are_encoded_whole() {
    let tokenizer = tiny();
    for case in json_lines(&fixture("sft_label_cases.jsonl")) {
        if case.get("tools").is_some() || case.get("max_length").is_some() {
            continue;
        }
        let name = case["name"].as_str().unwrap();
        let encoded = sft(&tokenizer, &recorded_conversation(&case), as_recorded()).unwrap();
        let text = tokenizer.decode(&encoded.input_ids, false).unwrap();
        assert_eq!(text, case["text"].as_str().unwrap(), "{name}");
    }
}

#[test]
fn recorded_answers_carry_the_loss() {
    let tokenizer = tiny();
    let mut n_checked = 0;
    for case in json_lines(&fixture("sft_label_cases.jsonl")) {
        let Some(expect) = case["trained_text"].as_str() else {
            continue;
        };
        if expect.contains('\u{fffd}') {
            continue;
        }
        let encoded = sft(&tokenizer, &recorded_conversation(&case), as_recorded()).unwrap();
        assert_eq!(trained(&tokenizer, &encoded), expect.replace('·', ""));
        n_checked += 1;
    }
    assert_eq!(n_checked, 15);
}

/// Where they do not, ours are ms-swift's to the id: template and contents are encoded as one text.
#[test]
fn rows_differ_from_the_recorded_ones_only_where_contents_spell_added_tokens() {
    let tokenizer = tiny();
    let mut differ = Vec::new();
    for case in json_lines(&fixture("sft_label_cases.jsonl")) {
        let conversation = recorded_conversation(&case);
        let recorded = sft(&tokenizer, &conversation, as_recorded()).unwrap();
        if sft(&tokenizer, &conversation, LossScale::default()).unwrap() != recorded {
            differ.push(case["name"].as_str().unwrap().to_owned());
        }
    }
    assert_eq!(
        differ,
        ["answer ends with im_end text", "tools and tool call"]
    );
    for case in json_lines(&fixture("pt_cases.jsonl")) {
        let text = case["messages"][0]["content"].as_str().unwrap();
        let encode = |contents| pt_with_end(&tokenizer, text, tokenizer.eos(), contents).unwrap();
        let is_same = encode(Contents::AreText) == encode(Contents::AsMsSwift);
        assert_eq!(is_same, !text.contains("<|endoftext|>"), "{text}");
    }
}

#[test]
fn rendered_conversation_has_the_ids_of_training() {
    let tokenizer = tiny();
    let template = ChatTemplate::history_stable().unwrap();
    let text = template.render(&conversation(), &RenderOptions::default());
    let encoded = sft(&tokenizer, &conversation(), LossScale::default()).unwrap();
    assert_eq!(tokenizer.encode(&text.unwrap()).unwrap(), encoded.input_ids);
}

fn check_trained(loss_scale: LossScale, expect: &str) {
    let tokenizer = tiny();
    let encoded = sft(&tokenizer, &conversation(), loss_scale).unwrap_or_default();
    assert_eq!(trained(&tokenizer, &encoded), expect);
    assert_eq!(encoded.labels[0], IGNORE);
    for (&id, &label) in encoded.input_ids.iter().zip(&encoded.labels) {
        assert!(label == IGNORE || label == id as i32);
    }
}

#[test]
fn empty_think_blocks_carry_no_loss_by_default() {
    check_trained(
        LossScale::IgnoreEmptyThink,
        "Hello.<|im_end|>\nMore.<|im_end|>\n",
    );
}

#[test]
fn older_default_trains_think_blocks() {
    check_trained(
        LossScale::Default,
        "<think>\n\n</think>\n\nHello.<|im_end|>\n<think>\n\n</think>\n\nMore.<|im_end|>\n",
    );
}

#[test]
fn last_round_trains_the_last_answer() {
    check_trained(LossScale::LastRound, "More.<|im_end|>\n");
}

#[test]
fn document_trains_all_but_its_first_token() {
    let tokenizer = tiny();
    let encoded = pt(&tokenizer, "  The rain stops.\n").unwrap();
    let mut ids = tokenizer.encode("The rain stops.").unwrap();
    ids.push(tokenizer.eos());
    let mut labels: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
    labels[0] = IGNORE;
    let expect = Example::document(ids, labels);
    assert_eq!(encoded, expect);
}

#[test]
fn empty_document_trains_nothing() {
    let tokenizer = tiny();
    let encoded = pt(&tokenizer, " \n").unwrap();
    assert_eq!(encoded.input_ids, [tokenizer.eos()]);
    assert_eq!(encoded.n_trained(), 0);
}

#[test]
fn text_bytes_count_the_text_under_loss() {
    let tokenizer = tiny();
    let answer = "Oh… ♪";
    let conversation = Conversation::new([Message::user("hi"), Message::assistant(answer)]);
    let encoded = sft(&tokenizer, &conversation, LossScale::Default).unwrap();
    // The think block's two line feeds, twice, less the marks; the answer; the line feed after its end.
    let line_feeds = "\n\n".len() + "\n\n".len();
    assert_eq!(
        text_bytes(&tokenizer, &encoded),
        line_feeds + answer.len() + 1
    );
    let document = pt(&tokenizer, answer).unwrap();
    let mut first = Vec::new();
    tokenizer.append_bytes(document.input_ids[0], false, &mut first);
    let expect = answer.len() - first.len();
    assert_eq!(text_bytes(&tokenizer, &document), expect);
}

#[test]
fn preview_dots_what_carries_no_loss() {
    let tokenizer = tiny();
    let encoded = sft(&tokenizer, &conversation(), LossScale::default()).unwrap();
    let text = preview(&tokenizer, &encoded).unwrap();
    assert_eq!(
        text.matches('·').count(),
        encoded.labels.len() - encoded.n_trained()
    );
    assert_eq!(text.replace('·', ""), "Hello.<|im_end|>\nMore.<|im_end|>\n");
}

#[test]
fn conversation_without_final_answer_is_refused() {
    let error_of = |messages: &[Message]| {
        let conversation = Conversation::new(messages.to_vec());
        sft(&tiny(), &conversation, LossScale::default()).unwrap_err()
    };
    let error = error_of(&messages()[..4]);
    assert!(
        matches!(error, Error::NoFinalAnswer { index: 3 }),
        "{error}"
    );
    assert!(matches!(error_of(&[]), Error::NoFinalAnswer { .. }));
}

/// Whatever stands side by side in one turn: only what is trained carries loss, and the ids are those of the whole text.
#[test]
fn part_of_a_turn_is_trained_alone() {
    let tokenizer = tiny();
    let unlearned = Message {
        is_trained: false,
        ..Message::assistant("Wrong one.")
    };
    for (answers, expect) in [
        (
            [unlearned.clone(), Message::assistant("Right one.")],
            "Right one.<|im_end|>\n",
        ),
        (
            [Message::assistant("Right one."), unlearned],
            "Right one.\n<|im_end|>\n",
        ),
    ] {
        let messages = [Message::user("Hi")].into_iter().chain(answers);
        let conversation = Conversation::new(messages);
        let encoded = sft(&tokenizer, &conversation, LossScale::default()).unwrap();
        assert_eq!(trained(&tokenizer, &encoded), expect);
        let text = tokenizer.decode(&encoded.input_ids, false).unwrap();
        assert_eq!(tokenizer.encode(&text).unwrap(), encoded.input_ids);
    }
}

/// As above, of what is thought before it is said: the marks go with the thoughts beside them.
#[test]
fn thoughts_carry_loss_with_the_message_that_they_came_with() {
    let tokenizer = tiny();
    let said = |text: &str, is_trained: bool| Message {
        is_trained,
        ..Message::assistant(text)
    };
    let thought = |thoughts: &str, is_trained: bool| Message {
        reasoning: Some(thoughts.to_owned()),
        ..said("B", is_trained)
    };
    for (answers, expect) in [
        (
            [said("A", true), said("<think>no</think>B", false)],
            "A\n<|im_end|>\n",
        ),
        (
            [said("A", false), said("<think>why</think>B", true)],
            "<think>\nwhy\n</think>\n\nB<|im_end|>\n",
        ),
        (
            [thought("no", false), thought("why", true)],
            "why\n</think>\n\nB<|im_end|>\n",
        ),
        (
            [thought("why", true), thought("no", false)],
            "<think>\nwhy\nB\n<|im_end|>\n",
        ),
    ] {
        let messages = [Message::user("Hi")].into_iter().chain(answers);
        let conversation = Conversation::new(messages);
        let encoded = sft(&tokenizer, &conversation, LossScale::default()).unwrap();
        assert_eq!(trained(&tokenizer, &encoded), expect);
        let text = tokenizer.decode(&encoded.input_ids, false).unwrap();
        assert_eq!(tokenizer.encode(&text).unwrap(), encoded.input_ids);
    }
}
