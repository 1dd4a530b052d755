//! Chat templates: the released ones against recorded renders, and the default one's promise.

#![allow(clippy::unwrap_used, reason = "a test helper fails by panicking")]

mod common;

use common::{fixture, json_lines, messages, tiny};
use serde_json::{Value, json};
use text::{ChatTemplate, Error, Message, RenderOptions};

fn options(case: &Value) -> RenderOptions {
    let flag = |key: &str| case.get(key).and_then(Value::as_bool);
    RenderOptions {
        add_generation_prompt: flag("add_generation_prompt").unwrap_or(false),
        enable_thinking: flag("enable_thinking"),
        tools: case.get("tools").and_then(Value::as_array).cloned(),
        add_vision_id: flag("add_vision_id").unwrap_or(false),
    }
}

fn released(name: &str) -> ChatTemplate {
    ChatTemplate::from_source(&std::fs::read_to_string(fixture(name)).unwrap()).unwrap()
}

/// Renders every recorded case; `thinking_default` picks what the second template gives where the two differ.
fn check_recorded(template: &ChatTemplate, thinking_default: bool) {
    let cases = json_lines(&fixture("chat_cases.jsonl"));
    assert_eq!(cases.len(), 53);
    let mut n_errors = 0;
    for case in &cases {
        let name = case["name"].as_str().unwrap();
        let got = template.render_json(&case["messages"], &options(case));
        let own = case.get("thinking_default_template");
        let expect = own.filter(|_| thinking_default).unwrap_or(case);
        if let Some(error) = expect.get("error") {
            n_errors += 1;
            let (_, message) = error.as_str().unwrap().split_once(": ").unwrap();
            let raised = matches!(&got, Err(Error::TemplateRaised { message: m }) if m == message);
            assert!(raised, "{name}: {got:?}");
        } else {
            let rendered = got.unwrap_or_else(|e| panic!("{name}: {e:?}"));
            assert_eq!(rendered, expect["rendered"].as_str().unwrap(), "{name}");
        }
    }
    assert_eq!(n_errors, 11);
}

#[test]
fn released_template_renders_as_recorded() {
    check_recorded(&released("chat_template.jinja"), false);
}

#[test]
fn thinking_template_renders_as_recorded() {
    check_recorded(&released("chat_template_thinking_default.jinja"), true);
}

/// The conversations recorded for training, which have every odd shape: greetings first, joined turns, thoughts, tool answers.
fn conversations() -> Vec<(String, Vec<Message>)> {
    let cases = json_lines(&fixture("sft_label_cases.jsonl"));
    cases
        .iter()
        .map(|c| (c["name"].as_str().unwrap().to_owned(), messages(c)))
        .collect()
}

#[test]
fn longer_conversations_begin_with_the_tokens_of_shorter_ones() {
    let (tokenizer, template) = (tiny(), ChatTemplate::history_stable().unwrap());
    let encode = |messages: &[Message], options: &RenderOptions| {
        tokenizer
            .encode(&template.render(messages, options).unwrap())
            .unwrap()
    };
    for (name, messages) in conversations() {
        let whole = encode(&messages, &RenderOptions::default());
        for n in 1..messages.len() {
            let shorter = encode(&messages[..n], &RenderOptions::default());
            assert!(whole.starts_with(&shorter), "{name}: {n} messages");
        }
    }
}

#[test]
fn prompts_for_each_reply_begin_the_whole_conversation() {
    let (tokenizer, template) = (tiny(), ChatTemplate::history_stable().unwrap());
    let encode = |text: &str| tokenizer.encode(text).unwrap();
    for (name, messages) in conversations() {
        let whole = template.render(&messages, &RenderOptions::default());
        let whole = encode(&whole.unwrap());
        for (n, message) in messages.iter().enumerate() {
            if message.role != text::Role::Assistant {
                continue;
            }
            let is_thinking = message.content.trim().starts_with("<think>")
                && !message.content.contains("<think>\n\n</think>");
            let options = RenderOptions {
                enable_thinking: is_thinking.then_some(true),
                ..RenderOptions::generation()
            };
            let prompt = encode(&template.render(&messages[..n], &options).unwrap());
            assert!(whole.starts_with(&prompt), "{name}: reply {n}");
        }
    }
}

#[test]
fn history_stable_prompt_is_as_trained() {
    let template = ChatTemplate::history_stable().unwrap();
    let messages = [
        Message::system(" Be kind.\n"),
        Message::user("Hi"),
        Message::assistant("Hello.\n"),
        Message::user("And you?"),
    ];
    let text = template.render(&messages, &RenderOptions::generation());
    assert_eq!(
        text.unwrap(),
        "<|im_start|>system\nBe kind.<|im_end|>\n\
         <|im_start|>user\nHi<|im_end|>\n\
         <|im_start|>assistant\n<think>\n\n</think>\n\nHello.<|im_end|>\n\
         <|im_start|>user\nAnd you?<|im_end|>\n\
         <|im_start|>assistant\n<think>\n\n</think>\n\n"
    );
}

#[test]
fn history_stable_adds_no_system_prompt() {
    let template = ChatTemplate::history_stable().unwrap();
    for messages in [
        vec![Message::user("Hi")],
        vec![Message::system(" \n"), Message::user("Hi")],
    ] {
        let text = template.render(&messages, &RenderOptions::default());
        assert_eq!(text.unwrap(), "<|im_start|>user\nHi<|im_end|>\n");
    }
}

#[test]
fn history_stable_opens_thoughts_on_request() {
    let template = ChatTemplate::history_stable().unwrap();
    let options = RenderOptions {
        enable_thinking: Some(true),
        ..RenderOptions::generation()
    };
    let text = template.render(&[Message::user("Hi")], &options).unwrap();
    assert!(text.ends_with("<|im_start|>assistant\n<think>\n"));
}

#[test]
fn history_stable_takes_text_parts() {
    let template = ChatTemplate::history_stable().unwrap();
    let messages = json!([{"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}]);
    let text = template.render_json(&messages, &RenderOptions::default());
    assert_eq!(text.unwrap(), "<|im_start|>user\none two<|im_end|>\n");
}

fn check_refused(messages: Value, options: &RenderOptions, part: &str) {
    let template = ChatTemplate::history_stable().unwrap();
    match template.render_json(&messages, options) {
        Err(Error::TemplateRaised { message }) => assert!(message.contains(part), "{message}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn history_stable_refuses_what_it_would_have_to_drop() {
    let plain = RenderOptions::default();
    let image = json!([{"role": "user", "content": [{"type": "image", "image": "x.png"}]}]);
    check_refused(image, &plain, "text only");
    let late = json!([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]);
    check_refused(late, &plain, "come first");
    let unknown = json!([{"role": "narrator", "content": "a"}]);
    check_refused(unknown, &plain, "role");
    let tools = RenderOptions {
        tools: Some(vec![json!({"type": "function"})]),
        ..plain
    };
    check_refused(json!([{"role": "user", "content": "a"}]), &tools, "tools");
}

#[test]
fn unparsable_template_names_the_line() {
    let error = ChatTemplate::from_source("{% if %}").unwrap_err();
    assert!(error.to_string().contains("chat_template:1"), "{error}");
}

#[test]
fn folder_without_template_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let error = ChatTemplate::load(dir.path()).unwrap_err();
    assert!(matches!(error, Error::NoChatTemplate { .. }));
}

#[test]
fn template_of_the_config_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let config = json!({"chat_template": "{{ messages | length }}"}).to_string();
    std::fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
    let template = ChatTemplate::load(dir.path()).unwrap();
    let text = template.render(&[Message::user("Hi")], &RenderOptions::default());
    assert_eq!(text.unwrap(), "1");
}
