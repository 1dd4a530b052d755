//! Added tokens that people write are text on every road from messages to ids, and change nothing around them.

#![allow(clippy::unwrap_used, reason = "a test helper fails by panicking")]

mod common;

use common::{fixture, tiny};
use text::labels::{Contents, LossScale, SftOptions, pt, sft, sft_counts, text_bytes};
use text::{
    ADDED_TOKENS, ChatEncoder, ChatTemplate, Conversation, Message, PromptOptions, RenderOptions,
    Role, Tokenizer, WrittenTokens,
};

/// The project's template and both released ones.
fn encoders() -> [ChatEncoder; 3] {
    let released = |name: &str| {
        let source = std::fs::read_to_string(fixture(name)).unwrap();
        ChatTemplate::from_source(&source).unwrap()
    };
    [
        ChatTemplate::history_stable().unwrap(),
        released("chat_template.jinja"),
        released("chat_template_thinking_default.jinja"),
    ]
    .map(|template| ChatEncoder::new(tiny(), template))
}

/// The same thing said by everybody, in every place where somebody can say something.
fn said_by_all(said: &str) -> Vec<Message> {
    let thinking = Message {
        reasoning: Some(said.to_owned()),
        ..Message::assistant(said)
    };
    vec![
        Message::system(said),
        Message::user(said),
        Message::assistant(said),
        Message::new(Role::Tool, said),
        thinking.clone(),
        Message::user(said),
        Message::system(said),
        thinking,
    ]
}

/// Places of [`said_by_all`] where something is said: one for each message, and the thoughts of two.
const PLACES: u64 = 10;

fn added(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<u32> {
    let ids = ids.iter().copied();
    ids.filter(|id| tokenizer.is_added(*id)).collect()
}

/// Each added token within words, at their ends, and beside what could become a part of it.
fn writings() -> Vec<(&'static str, String)> {
    let tokens = ADDED_TOKENS.iter().map(|(token, _)| *token);
    tokens
        .flat_map(|token| {
            [
                format!("hi {token} there"),
                format!("hi{token}"),
                format!("{token}hi"),
                format!("<{token}>\n{token}"),
            ]
            .map(|said| (token, said))
        })
        .collect()
}

#[test]
fn control_tokens_of_anybody_are_text_in_training() {
    let [encoder, ..] = encoders();
    let tokenizer = encoder.tokenizer();
    // With the places that carry loss: three answers and the thoughts of two, or those of the last.
    for (loss_scale, n_trained) in [
        (LossScale::IgnoreEmptyThink, 5),
        (LossScale::Default, 5),
        (LossScale::LastRound, 2),
    ] {
        let honest = Conversation::new(said_by_all("hi"));
        let honest = sft(tokenizer, &honest, loss_scale).unwrap();
        for (token, said) in writings() {
            let conversation = Conversation::new(said_by_all(&said));
            let got = sft(tokenizer, &conversation, loss_scale).unwrap();
            assert_eq!(
                added(tokenizer, &got.input_ids),
                added(tokenizer, &honest.input_ids),
                "{said:?}"
            );
            let trained: Vec<u32> = got.trained_ids().collect();
            let honest_trained: Vec<u32> = honest.trained_ids().collect();
            assert_eq!(
                added(tokenizer, &trained),
                added(tokenizer, &honest_trained),
                "{said:?}"
            );
            let n_bytes = text_bytes(tokenizer, &honest) + n_trained * (said.len() - "hi".len());
            assert_eq!(text_bytes(tokenizer, &got), n_bytes, "{said:?}");
            let counts = sft_counts(tokenizer, &conversation, loss_scale).unwrap();
            assert_eq!(counts.tokens, got.input_ids.len(), "{said:?}");
            assert_eq!(counts.trained, got.n_trained(), "{said:?}");
            if loss_scale != LossScale::LastRound {
                let text = encoder
                    .template()
                    .render(&conversation, &RenderOptions::default());
                let decoded = tokenizer.decode(&got.input_ids, false).unwrap();
                assert_eq!(decoded, text.unwrap());
            }
            let written = WrittenTokens::of_conversation(tokenizer, &conversation);
            let n = PLACES * said.matches(token).count() as u64;
            assert_eq!(written.iter().collect::<Vec<_>>(), [(token, n)], "{said:?}");
        }
    }
}

#[test]
fn control_tokens_of_anybody_are_text_in_prompts() {
    let continued = PromptOptions {
        continue_final: true,
        ..PromptOptions::default()
    };
    let thinking = PromptOptions {
        thinking: true,
        ..PromptOptions::default()
    };
    for encoder in encoders() {
        let tokenizer = encoder.tokenizer();
        for options in [PromptOptions::default(), thinking, continued] {
            let ids = |said: &str| {
                let mut messages = said_by_all(said);
                // The released templates tell the last round's thoughts only; let there be a question, or an answer that goes on.
                if !options.continue_final {
                    messages.push(Message::user(said));
                }
                let conversation = Conversation::new(messages);
                let text = encoder.prompt_text(&conversation, options).unwrap();
                let ids = encoder.prompt(&conversation, options).unwrap();
                assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
                assert!(text.contains(&format!("<|im_start|>system\n{said}<|im_end|>\n")));
                assert!(text.contains(&format!("<|im_start|>user\n{said}<|im_end|>\n")));
                added(tokenizer, &ids)
            };
            let honest = ids("hi");
            for (_, said) in writings() {
                assert_eq!(ids(&said), honest, "{said:?}");
            }
        }
    }
}

/// What is asked for is what was trained, token for token, whatever is written.
#[test]
fn prompts_begin_what_is_trained() {
    let [encoder, ..] = encoders();
    for (_, said) in writings() {
        let messages = [
            Message::system(said.clone()),
            Message::user(said.clone()),
            Message::assistant(said.clone()),
            Message::user(said.clone()),
            Message::assistant(said.clone()),
        ];
        let whole = Conversation::new(messages.clone());
        let whole = sft(encoder.tokenizer(), &whole, LossScale::default()).unwrap();
        for n in [2, 4] {
            let before = Conversation::new(messages[..n].to_vec());
            let prompt = encoder.prompt(&before, PromptOptions::default()).unwrap();
            assert!(whole.input_ids.starts_with(&prompt), "{said:?}");
            assert_eq!(whole.rounds[n / 2 - 1].said, prompt.len(), "{said:?}");
        }
        let continued = PromptOptions {
            continue_final: true,
            ..PromptOptions::default()
        };
        let open = encoder.prompt(&Conversation::new(messages), continued);
        let end = encoder.tokenizer().encode("<|im_end|>\n").unwrap();
        assert_eq!([open.unwrap(), end].concat(), whole.input_ids, "{said:?}");
    }
}

#[test]
fn control_tokens_in_documents_are_text() {
    let tokenizer = tiny();
    for (token, said) in writings() {
        let document = pt(&tokenizer, &said).unwrap();
        assert_eq!(
            added(&tokenizer, &document.input_ids),
            [tokenizer.eos()],
            "{said:?}"
        );
        let (_, text) = document.input_ids.split_last().unwrap();
        assert_eq!(tokenizer.decode(text, false).unwrap(), said);
        assert_eq!(tokenizer.encode_ordinary(&said).unwrap(), text);
        let mut first = Vec::new();
        tokenizer.append_bytes(text[0], false, &mut first);
        assert_eq!(text_bytes(&tokenizer, &document), said.len() - first.len());
        let written = WrittenTokens::of_text(&tokenizer, &said);
        let n = said.matches(token).count() as u64;
        assert_eq!(written.iter().collect::<Vec<_>>(), [(token, n)], "{said:?}");
    }
    assert!(WrittenTokens::of_text(&tokenizer, "no <| such |> token, <b>no</b>").is_empty());
}

#[test]
fn thoughts_at_the_start_of_an_answer_and_tool_answers_keep_their_marks() {
    let tokenizer = tiny();
    let marked = Conversation::new([
        Message::user("4?"),
        Message::new(Role::Tool, "4 m"),
        Message::assistant("<think>a <think> b</think>four </think>"),
    ]);
    let got = sft(&tokenizer, &marked, LossScale::default()).unwrap();
    let expect = "<|im_start|>user\n4?\n<tool_response>\n4 m\n</tool_response><|im_end|>\n\
                  <|im_start|>assistant\n<think>\na <think> b\n</think>\n\nfour </think><|im_end|>\n";
    assert_eq!(tokenizer.decode(&got.input_ids, false).unwrap(), expect);
    let names = [
        "<|im_start|>",
        "<tool_response>",
        "</tool_response>",
        "<|im_end|>",
        "<|im_start|>",
        "<think>",
        "</think>",
        "<|im_end|>",
    ];
    let names = names.map(|name| tokenizer.id(name).unwrap());
    assert_eq!(added(&tokenizer, &got.input_ids), names);
    // The same words from the user are words.
    let user = Message::user("<tool_response>\n4 m\n</tool_response>");
    let asked = Conversation::new([user]);
    for encoder in encoders() {
        let prompt = encoder.prompt(&asked, PromptOptions::default()).unwrap();
        let tool = tokenizer.id("<tool_response>").unwrap();
        assert!(!prompt.contains(&tool));
    }
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

    /// Pieces that words could span borders by: blanks, line feeds, marks, halves of tokens, what NFC changes.
    fn text(&mut self) -> String {
        const PIECES: [&str; 24] = [
            " ", "\n", "\r\n", "\t", "\u{3000}", "a", "Hi", "'s", "'", "12", "?", "!\n", "<", "|",
            "think>", "|im_end|", "</", ">", "潮", "é", "e\u{301}", "\u{301}", "\u{338}",
            "\u{fdd0}",
        ];
        let n = self.below(9);
        (0..n).map(|_| PIECES[self.below(PIECES.len())]).collect()
    }
}

/// What stands beside a content does not become its part by this: the ids are those of the whole text.
#[test]
fn contents_without_control_tokens_have_the_ids_of_the_whole_text() {
    let encoders = encoders();
    let tokenizer = encoders[0].tokenizer();
    let as_one_text = SftOptions {
        contents: Contents::AsMsSwift,
        ..SftOptions::default()
    };
    let mut dice = Dice(3);
    let mut n_checked = 0;
    for _ in 0..4000 {
        let mut messages = vec![Message::system(dice.text())];
        for _ in 0..=dice.below(3) {
            messages.push(Message::user(dice.text()));
            messages.push(Message {
                reasoning: (dice.below(3) == 0).then(|| dice.text()),
                is_trained: dice.below(4) > 0,
                ..Message::assistant(dice.text())
            });
        }
        let conversation = Conversation::new(messages.clone());
        if !WrittenTokens::of_conversation(tokenizer, &conversation).is_empty() {
            continue;
        }
        n_checked += 1;
        let ours = sft(tokenizer, &conversation, LossScale::default()).unwrap();
        let whole = sft(tokenizer, &conversation, as_one_text).unwrap();
        assert_eq!(ours, whole, "{messages:?}");
        messages.push(Message::user(dice.text()));
        let conversation = Conversation::new(messages.clone());
        if !WrittenTokens::of_conversation(tokenizer, &conversation).is_empty() {
            continue;
        }
        for encoder in &encoders {
            let options = PromptOptions::default();
            let text = encoder.prompt_text(&conversation, options).unwrap();
            let ids = encoder.prompt(&conversation, options).unwrap();
            assert_eq!(ids, tokenizer.encode(&text).unwrap(), "{messages:?}");
        }
    }
    assert!(n_checked > 2000, "{n_checked}");
}
