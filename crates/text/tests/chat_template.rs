//! Chat templates: the released ones against recorded renders, and the default one's promise.

#![allow(clippy::unwrap_used, reason = "a test helper fails by panicking")]

mod common;

use common::{fixture, json_lines, messages, tiny};
use serde_json::{Value, json};
use text::labels::{LossScale, sft};
use text::{ChatEncoder, ChatTemplate, Conversation, Error, Message, PromptOptions, RenderOptions};

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

/// The messages of a conversation up to each place where the other side speaks next.
fn whole_turns(messages: &[Message]) -> impl Iterator<Item = usize> {
    (1..messages.len())
        .filter(|n| messages[*n].role != messages[n - 1].role)
        .filter(|n| {
            messages[*n].role != text::Role::Tool || messages[n - 1].role != text::Role::User
        })
}

#[test]
fn longer_conversations_begin_with_the_tokens_of_shorter_ones() {
    let (tokenizer, template) = (tiny(), ChatTemplate::history_stable().unwrap());
    let encode = |messages: &[Message]| {
        let conversation = Conversation::new(messages.to_vec());
        let text = template.render(&conversation, &RenderOptions::default());
        tokenizer.encode(&text.unwrap()).unwrap()
    };
    let mut n_checked = 0;
    for (name, messages) in conversations() {
        let whole = encode(&messages);
        for n in whole_turns(&messages) {
            let shorter = encode(&messages[..n]);
            assert!(whole.starts_with(&shorter), "{name}: {n} messages");
            n_checked += 1;
        }
    }
    assert!(n_checked > 60);
}

#[test]
fn prompts_for_each_reply_begin_the_whole_conversation() {
    let encoder = ChatEncoder::new(tiny(), ChatTemplate::history_stable().unwrap());
    let mut n_checked = 0;
    for (name, messages) in conversations() {
        let conversation = Conversation::new(messages.clone());
        let whole = sft(encoder.tokenizer(), &conversation, LossScale::default()).unwrap();
        for (n, message) in messages.iter().enumerate() {
            // With thinking off a reply has no thoughts; an answer that goes on has no prompt of its own.
            let goes_on = n > 0 && messages[n - 1].role == text::Role::Assistant;
            let is_thinking = message.content.trim().starts_with("<think>")
                && !message.content.contains("<think>\n\n</think>");
            if message.role != text::Role::Assistant || goes_on || is_thinking {
                continue;
            }
            let before = Conversation::new(messages[..n].to_vec());
            let prompt = encoder.prompt(&before, PromptOptions::default()).unwrap();
            assert!(whole.input_ids.starts_with(&prompt), "{name}: reply {n}");
            n_checked += 1;
        }
    }
    assert!(n_checked > 40);
}

#[test]
fn history_stable_prompt_is_as_trained() {
    let template = ChatTemplate::history_stable().unwrap();
    let encoder = ChatEncoder::new(tiny(), template);
    let conversation = Conversation::new([
        Message::system(" Be kind.\n"),
        Message::user("Hi"),
        Message::assistant("Hello.\n"),
        Message::user("And you?"),
    ]);
    let text = encoder.prompt_text(&conversation, PromptOptions::default());
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
        let text = template.render(&Conversation::new(messages), &RenderOptions::default());
        assert_eq!(text.unwrap(), "<|im_start|>user\nHi<|im_end|>\n");
    }
}

#[test]
fn history_stable_opens_no_thoughts_whatever_it_is_told() {
    let template = ChatTemplate::history_stable().unwrap();
    for enable_thinking in [None, Some(true), Some(false)] {
        let options = RenderOptions {
            add_generation_prompt: true,
            enable_thinking,
            ..RenderOptions::default()
        };
        let conversation = Conversation::new([Message::user("Hi")]);
        let text = template.render(&conversation, &options).unwrap();
        assert!(text.ends_with("<|im_start|>assistant\n<think>\n\n</think>\n\n"));
    }
}

/// Released templates differ in what they do when told nothing; asked by the encoder they do the same.
#[test]
fn released_templates_are_asked_with_thinking_off_unless_told() {
    let conversation = Conversation::new([Message::user("Where is the boat?")]);
    let prompts = |thinking: bool| {
        [
            "chat_template.jinja",
            "chat_template_thinking_default.jinja",
        ]
        .map(|name| {
            let encoder = ChatEncoder::new(tiny(), released(name));
            let options = PromptOptions {
                thinking,
                ..PromptOptions::default()
            };
            encoder.prompt_text(&conversation, options).unwrap()
        })
    };
    let question = "<|im_start|>user\nWhere is the boat?<|im_end|>\n<|im_start|>assistant\n";
    let closed = format!("{question}<think>\n\n</think>\n\n");
    assert_eq!(prompts(false), [closed.clone(), closed]);
    let open = format!("{question}<think>\n");
    assert_eq!(prompts(true), [open.clone(), open]);
}

#[test]
fn last_answer_goes_on_where_it_ends() {
    let messages = [Message::user("Hi."), Message::assistant("The boat is ")];
    let conversation = Conversation::new(messages);
    let options = PromptOptions {
        continue_final: true,
        ..PromptOptions::default()
    };
    let templates = [
        ChatTemplate::history_stable().unwrap(),
        released("chat_template.jinja"),
        released("chat_template_thinking_default.jinja"),
    ];
    for template in templates {
        let encoder = ChatEncoder::new(tiny(), template);
        let text = encoder.prompt_text(&conversation, options).unwrap();
        assert_eq!(
            text,
            "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nThe boat is"
        );
        let question = Conversation::new([Message::user("Hi.")]);
        let error = encoder.prompt(&question, options).unwrap_err();
        assert!(
            matches!(error, Error::NothingToContinue { index: 0 }),
            "{error}"
        );
    }
    let other = ChatTemplate::from_source("{{ messages[-1].content }}</s>").unwrap();
    let error = ChatEncoder::new(tiny(), other).prompt(&conversation, options);
    assert!(matches!(error, Err(Error::CannotContinue)));
}

#[test]
fn released_template_takes_what_the_rules_have_put_in_order() {
    let messages = [
        Message::system("You are Bo."),
        Message::system("Dusk."),
        Message::assistant("You again."),
        Message::user("Hi."),
        Message::system("One short line."),
    ];
    let encoder = ChatEncoder::new(tiny(), released("chat_template.jinja"));
    let text = encoder.prompt_text(&Conversation::new(messages), PromptOptions::default());
    assert_eq!(
        text.unwrap(),
        "<|im_start|>system\nYou are Bo.\n\nDusk.<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\nYou again.<|im_end|>\n\
         <|im_start|>user\nHi.\n\nOne short line.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    );
    let only_system = Conversation::new([Message::system("You are Bo.")]);
    let text = encoder.prompt_text(&only_system, PromptOptions::default());
    assert!(text.unwrap().contains("<|im_start|>user\n<|im_end|>\n"));
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
    let calls = json!([{"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]}]);
    check_refused(calls, &plain, "calls");
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
    let conversation = Conversation::new([Message::user("Hi")]);
    let text = template.render(&conversation, &RenderOptions::default());
    assert_eq!(text.unwrap(), "1");
}

/// The template that a folder with this value of `chat_template` has.
fn of_config(value: &Value) -> text::Result<ChatTemplate> {
    let dir = tempfile::tempdir().unwrap();
    let config = json!({ "chat_template": value }).to_string();
    std::fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
    ChatTemplate::load(dir.path())
}

#[test]
fn default_of_named_templates_is_found_and_other_shapes_are_refused() {
    let tools = json!({ "name": "tool_use", "template": "tools" });
    let default = json!({ "name": "default", "template": "{{ messages | length }}" });
    let found = of_config(&json!([tools, default])).unwrap();
    assert_eq!(found.source(), "{{ messages | length }}");
    let none = of_config(&json!(null)).unwrap_err();
    assert!(matches!(none, Error::NoChatTemplate { .. }), "{none}");
    for wrong in [
        json!([tools]),
        json!([]),
        json!(["default"]),
        json!([{ "name": "default", "template": 3 }]),
        json!({ "default": "x" }),
        json!(7),
    ] {
        let error = of_config(&wrong).unwrap_err().to_string();
        assert!(
            error.contains("tokenizer_config.json: `chat_template`"),
            "{error}"
        );
    }
}

#[test]
fn template_that_cannot_be_read_is_named_as_one() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("chat_template.jinja"), b"\xff").unwrap();
    let error = ChatTemplate::load(dir.path()).unwrap_err();
    assert!(matches!(error, Error::ReadTemplate { .. }), "{error}");
}

/// What a template gives that somebody wrote against us.
fn hostile(source: &str) -> text::Result<String> {
    let template = ChatTemplate::from_source(source)?;
    let messages = json!([{ "role": "user", "content": "Hi" }]);
    template.render_json(&messages, &RenderOptions::default())
}

#[test]
fn namespace_that_could_hold_itself_is_refused() {
    for source in [
        "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}",
        "{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns.x ~ '' }}",
        "{% set ns = namespace() %}{% set a = ns %}{% set ns.x = a %}{{ a|tojson }}",
        "{% set a = namespace() %}{%- set b = namespace(a=a) -%}{% set a.b = b %}{{ b|upper }}",
        "{% set n = namespace %}{% set a = n() %}{% set a.x = a %}",
        "{% set a = [namespace()] %}{% set a[0].x = a %}",
        "{{ namespace() }}",
        "{% set ns = namespace() %}{{ f(ns=ns) }}",
    ] {
        let error = hostile(source).unwrap_err();
        assert!(
            matches!(error, Error::TemplateNamespace { .. }),
            "{source}: {error}"
        );
    }
    for source in [
        "{% set ns = namespace(n=1) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{%- set ns = namespace(n=1) -%}{%- set ns.n = 2 -%}{{ ns['n'] }}",
        "{{ 'namespace(' }}{# namespace #}{% raw %}{{ namespace }}{% endraw %}",
        "{{ messages.namespace }}namespace",
    ] {
        hostile(source).unwrap_or_else(|error| panic!("{source}: {error}"));
    }
}

#[test]
fn template_that_goes_on_for_ever_or_grows_without_end_is_stopped() {
    let range = "range(100000)";
    for source in [
        format!("{{% for a in {range} %}}{{% for b in {range} %}}{{% endfor %}}{{% endfor %}}"),
        format!(
            "{{% set ns = namespace(x='a') %}}{{% for a in {range} %}}{{% set ns.x = ns.x ~ ns.x %}}{{% endfor %}}"
        ),
        "{{ '%1000000000s'|format('a') }}".to_owned(),
        "{{ 'a' * 1000000000 }}".to_owned(),
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}".to_owned(),
    ] {
        let error = hostile(&source).unwrap_err();
        let is_stopped = matches!(error, Error::TemplateEndless | Error::Template { .. });
        assert!(is_stopped, "{source}: {error}");
    }
    let error =
        hostile("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}");
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("more than any conversation needs"),
        "{error}"
    );
}

#[test]
fn json_of_a_template_has_a_bearable_indent() {
    let wide = hostile("{{ messages|tojson(indent=1000000000) }}").unwrap_err();
    assert!(wide.to_string().contains("at most 16"), "{wide}");
    let narrow = hostile("{{ messages|tojson(indent=4) }}").unwrap();
    assert!(narrow.contains("\n        \"role\""), "{narrow}");
}

#[test]
fn template_that_nests_or_panics_is_an_error_and_the_program_goes_on() {
    let nested = |what: &str| format!("{{{{ {}1 }}}}", what.repeat(60_000 / what.len()));
    for source in [nested("not "), nested("-"), nested("1 + "), nested("1~")] {
        // Whatever it comes to, it does not take the process with it.
        let _ = hostile(&source);
    }
    let error = hostile(&nested("not ").repeat(2)).unwrap_err();
    assert!(error.to_string().contains("at most 65536"), "{error}");
    let error = hostile("{% for m in messages %}{{ loop.cycle() }}{% endfor %}").unwrap_err();
    assert!(matches!(error, Error::TemplatePanicked), "{error}");
    assert_eq!(hostile("{{ messages[0].content }}").unwrap(), "Hi");
}

#[cfg(unix)]
#[test]
fn template_persona_and_tokenizer_that_are_no_files_are_named_and_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let link = |name: &str| std::os::unix::fs::symlink("/dev/zero", dir.path().join(name)).unwrap();
    link("persona.json");
    link("tokenizer.json");
    link("tokenizer_config.json");
    let said = |error: Error, name: &str| {
        let error = error.to_string();
        assert!(
            error.contains(name) && error.contains("a device"),
            "{error}"
        );
    };
    said(text::Persona::read(dir.path()).unwrap_err(), "persona.json");
    said(
        text::Tokenizer::load(dir.path()).unwrap_err(),
        "tokenizer.json",
    );
    said(
        ChatTemplate::load(dir.path()).unwrap_err(),
        "tokenizer_config.json",
    );
    link("chat_template.jinja");
    said(
        ChatTemplate::load(dir.path()).unwrap_err(),
        "chat_template.jinja",
    );
}
