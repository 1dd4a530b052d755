//! The rules by which messages become a conversation, in Rust and in the template that others render.

#![allow(clippy::unwrap_used, reason = "a test helper fails by panicking")]

mod common;

use common::tiny;
use serde_json::{Value, json};
use text::labels::{LossScale, sft};
use text::{
    ChatEncoder, ChatTemplate, Conversation, Error, Message, MessageProblem, PromptOptions,
    RenderOptions, Role, WrittenTokens,
};

/// What the rules make of messages, as (role, content).
fn check(messages: Value, expect: &[(Role, &str)]) {
    let conversation = Conversation::from_json(messages.as_array().unwrap()).unwrap();
    let messages = conversation.messages();
    let got: Vec<(Role, &str)> = messages
        .iter()
        .map(|m| (m.role, m.content.as_str()))
        .collect();
    assert_eq!(got, expect);
}

fn of(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

#[test]
fn leading_system_messages_are_joined_with_a_blank_line() {
    check(
        json!([
            of("system", "You are Bo, an old ferryman."),
            of("developer", " The harbour at dusk.\n"),
            of("system", ""),
            of("user", "Hi.")
        ]),
        &[
            (
                Role::System,
                "You are Bo, an old ferryman.\n\nThe harbour at dusk.",
            ),
            (Role::User, "Hi."),
        ],
    );
}

#[test]
fn late_system_message_joins_the_users_turn_before_it() {
    check(
        json!([
            of("system", "You are Bo."),
            of("assistant", "You again."),
            of("user", "Hi."),
            of("system", "Stay in character.")
        ]),
        &[
            (Role::System, "You are Bo."),
            (Role::User, ""),
            (Role::Assistant, "You again."),
            (Role::User, "Hi.\n\nStay in character."),
        ],
    );
}

#[test]
fn late_system_message_behind_an_answer_joins_the_users_turn_after_it() {
    check(
        json!([
            of("user", "Hi."),
            of("assistant", "Yo."),
            of("system", "It rains."),
            of("system", "It is late."),
            of("user", "Where?"),
            of("user", "When?"),
        ]),
        &[
            (Role::User, "Hi."),
            (Role::Assistant, "Yo."),
            (Role::User, "It rains.\n\nIt is late.\n\nWhere?\nWhen?"),
        ],
    );
}

#[test]
fn late_system_message_between_answers_is_a_turn_of_its_own() {
    check(
        json!([
            of("user", "Hi."),
            of("assistant", "Yo."),
            of("system", "An hour passes."),
            of("assistant", "Still here?"),
            of("system", " ")
        ]),
        &[
            (Role::User, "Hi."),
            (Role::Assistant, "Yo."),
            (Role::User, "An hour passes."),
            (Role::Assistant, "Still here?"),
        ],
    );
}

#[test]
fn turns_of_one_role_are_joined_with_a_line_feed() {
    check(
        json!([
            of("user", "Hi. "),
            of("user", ""),
            of("human", "Where is the boat?"),
            of("assistant", "Gone."),
            of("assistant", "Ask the river."),
            of("tool", "4 m"),
            of("tool", "5 m"),
        ]),
        &[
            (Role::User, "Hi.\nWhere is the boat?"),
            (Role::Assistant, "Gone.\nAsk the river."),
            (
                Role::User,
                "<tool_response>\n4 m\n</tool_response>\n<tool_response>\n5 m\n</tool_response>",
            ),
        ],
    );
}

#[test]
fn absent_null_and_empty_contents_are_no_text() {
    for answer in [
        json!({"role": "assistant"}),
        json!({"role": "assistant", "content": null, "audio": null, "tool_calls": []}),
        json!({"role": "assistant", "tool_calls": "", "function_call": {}, "images": "[]", "weight": ""}),
        of("assistant", ""),
        json!({"role": "assistant", "content": []}),
    ] {
        check(
            json!([{"role": "user"}, answer, of("user", "Hi.")]),
            &[(Role::User, ""), (Role::Assistant, ""), (Role::User, "Hi.")],
        );
    }
}

#[test]
fn text_parts_are_joined_as_they_are() {
    let parts = json!([{"type": "text", "text": "one "}, "two", {"text": ", three"}]);
    check(
        json!([{"role": "user", "content": parts}]),
        &[(Role::User, "one two, three")],
    );
}

/// Place, key and kind of what is refused.
fn check_refused(messages: Value, at: &str, is_expected: impl Fn(&MessageProblem) -> bool) {
    let error = Conversation::from_json(messages.as_array().unwrap()).unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with(&format!("{at}: ")), "{text}");
    let Error::Message { problem, .. } = error else {
        panic!("{text}");
    };
    assert!(is_expected(&problem), "{text}");
}

#[test]
fn what_cannot_be_said_here_is_refused_by_name() {
    let image = json!([{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": "x"}}]);
    check_refused(
        json!([of("system", "x"), {"role": "user", "content": image}]),
        "messages[1].content[1].type",
        |p| matches!(p, MessageProblem::Part { kind } if kind == "image_url"),
    );
    let calls = json!([of("user", "x"), {"role": "assistant", "tool_calls": [{"id": "1"}]}]);
    check_refused(calls, "messages[1].tool_calls", |p| {
        *p == MessageProblem::Unsupported
    });
    check_refused(
        json!([of("narrator", "x")]),
        "messages[0].role",
        |p| matches!(p, MessageProblem::Role { got } if got == "`narrator`"),
    );
    check_refused(
        json!([{"content": "x"}]),
        "messages[0].role",
        |p| matches!(p, MessageProblem::Role { got } if got == "nothing"),
    );
    check_refused(
        json!([{"role": "user", "content": 3}]),
        "messages[0].content",
        |p| matches!(p, MessageProblem::NotText { got: "a number" }),
    );
    check_refused(json!(["hi"]), "messages[0]", |p| {
        matches!(p, MessageProblem::NotAnObject { got: "a text" })
    });
}

#[test]
fn keys_of_an_answer_select_what_is_trained() {
    let is_trained = |key: &str, value: Value| {
        let mut answer = of("assistant", "x");
        answer[key] = value;
        Message::from_json(0, &answer).map(|message| message.is_trained)
    };
    for (key, value, expect) in [
        ("loss", json!(false), false),
        ("loss", json!(null), true),
        ("train", json!(false), false),
        ("train", json!(true), true),
        ("weight", json!(0), false),
        ("weight", json!(0.0), false),
        ("weight", json!(1), true),
    ] {
        assert_eq!(is_trained(key, value).unwrap(), expect);
    }
    for value in [json!(0.5), json!(2), json!("no")] {
        let error = is_trained("weight", value).unwrap_err().to_string();
        assert!(error.starts_with("messages[0].weight: "), "{error}");
    }
    let both = json!([{"role": "assistant", "loss": true, "weight": 0}]);
    check_refused(both, "messages[0].weight", |p| {
        *p == MessageProblem::Contradiction
    });
    let user = json!([{"role": "user", "content": "x", "train": true}]);
    check_refused(user, "messages[0].train", |p| {
        *p == MessageProblem::NotAnAnswer { role: Role::User }
    });
    let quiet = json!({"role": "user", "content": "x", "weight": 0});
    assert!(Message::from_json(0, &quiet).is_ok());
}

/// Numbers below `n` from a counter: the same in every run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n as u64) as usize
    }

    fn one<'a>(&mut self, list: &[&'a str]) -> &'a str {
        list[self.below(list.len())]
    }

    /// A raw message of a shape that requests and rows have.
    fn message(&mut self) -> Value {
        const ROLES: [&str; 9] = [
            "system",
            "developer",
            "user",
            "user",
            "human",
            "tool",
            "assistant",
            "assistant",
            "assistant",
        ];
        const TEXTS: [&str; 14] = [
            "",
            " \n\t",
            "Hi.",
            " Where is the boat?\n",
            "潮声落下的时候……",
            "one\n\ntwo",
            "「……そっか」",
            "<think>\nhm, the river\n</think>\n\nGone.",
            "<think></think>Gone!",
            "<think>only thoughts</think>",
            "not <think> at the start </think>",
            "Gone.<|im_end|>\n<|im_start|>user\nHi.",
            "Gone.<|im_end|>",
            "😀 x^2 … \u{e9}\u{301} \u{1c}",
        ];
        let role = self.one(&ROLES);
        let mut message = json!({ "role": role });
        match self.below(6) {
            0 => {}
            1 => message["content"] = Value::Null,
            2 => {
                let parts = [self.one(&TEXTS), self.one(&TEXTS)];
                message["content"] = json!([{"type": "text", "text": parts[0]}, parts[1]]);
            }
            _ => message["content"] = json!(self.one(&TEXTS)),
        }
        if role == "assistant" && self.below(5) == 0 {
            let thoughts = self.one(&["", " ", "I think.\n"]);
            message["reasoning_content"] = json!(thoughts);
        }
        message
    }
}

/// vLLM and transformers render raw messages by the template alone, with whatever default they have; training goes by the rules.
#[test]
fn template_gives_raw_messages_the_ids_of_the_rules() {
    let encoder = ChatEncoder::new(tiny(), ChatTemplate::history_stable().unwrap());
    let tokenizer = encoder.tokenizer();
    let mut dice = Dice(7);
    let mut n_trained = 0;
    for _ in 0..3000 {
        let n = 1 + dice.below(8);
        let raw: Vec<Value> = (0..n).map(|_| dice.message()).collect();
        let conversation = Conversation::from_json(&raw).unwrap();
        let prompt = encoder.prompt_text(&conversation, PromptOptions::default());
        let prompt = prompt.unwrap();
        let whole = sft(tokenizer, &conversation, LossScale::default());
        let written = WrittenTokens::of_conversation(tokenizer, &conversation);
        let raw = Value::from(raw);
        for enable_thinking in [None, Some(true), Some(false)] {
            let render = |add_generation_prompt| {
                let options = RenderOptions {
                    add_generation_prompt,
                    enable_thinking,
                    ..RenderOptions::default()
                };
                encoder.template().render_json(&raw, &options).unwrap()
            };
            assert_eq!(render(true), prompt, "{raw}");
            if let Ok(trained) = &whole {
                let ids = tokenizer.encode(&render(false)).unwrap();
                // Others take for tokens what contents spell; here it is text, and the same one.
                let say_the_same = tokenizer.decode(&ids, false).unwrap()
                    == tokenizer.decode(&trained.input_ids, false).unwrap();
                assert!(say_the_same, "{raw}");
                assert_eq!(ids == trained.input_ids, written.is_empty(), "{raw}");
                n_trained += usize::from(written.is_empty());
            }
        }
    }
    assert!(n_trained > 300);
}

/// The rules leave what they made alone.
#[test]
fn rules_change_nothing_the_second_time() {
    let mut dice = Dice(11);
    for _ in 0..1000 {
        let n = 1 + dice.below(8);
        let raw: Vec<Value> = (0..n).map(|_| dice.message()).collect();
        let once = Conversation::from_json(&raw).unwrap().messages();
        assert_eq!(Conversation::new(once.clone()).messages(), once);
    }
}

#[test]
fn mask_bans_added_tokens_but_ends_and_asked_for_thoughts() {
    let tokenizer = tiny();
    let off = tokenizer.sampling_mask(false);
    let on = tokenizer.sampling_mask(true);
    let marks = ["<think>", "</think>"].map(|mark| tokenizer.id(mark).unwrap());
    let ends = tokenizer.end_ids();
    assert_eq!(off.banned.len(), 33 - ends.len());
    assert!(!off.banned.iter().any(|id| ends.contains(id)));
    let kept: Vec<u32> = off
        .banned
        .iter()
        .copied()
        .filter(|id| !on.banned.contains(id))
        .collect();
    assert_eq!(kept, marks);
    assert_eq!(off.vocab_limit as usize, tokenizer.vocab_size());
}
