//! A row as training sees it: who each token belongs to, and whether it carries loss.

use std::fmt::Write;

use report::harmless::harmless;
use serde::Serialize;
use text::{Example, IGNORE, Tokenizer};

/// Begins a turn.
const START: &str = "<|im_start|>";
/// Ends a turn.
const END: &str = "<|im_end|>";

/// Tokens of one kind side by side, as text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Span {
    /// Who it belongs to.
    pub kind: Kind,
    /// Carries loss.
    pub trained: bool,
    /// The text, bytes that are no text in hexadecimal (`\\xd0`).
    pub text: String,
}

/// Who a token belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Text that no turn frames: a document.
    Document,
    /// Of a system message.
    System,
    /// What the assistant answers.
    User,
    /// An answer.
    Assistant,
    /// A think block with its marks.
    Think,
    /// An added token: `<|im_start|>`, `<|im_end|>`, `<|endoftext|>`, ...
    Mark,
}

impl Kind {
    /// The name that pages, legends and JSON use.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Document => "document",
            Kind::System => "system",
            Kind::User => "user",
            Kind::Assistant => "assistant",
            Kind::Think => "think",
            Kind::Mark => "mark",
        }
    }
}

/// Cuts a row where the speaker or the loss changes, or (`every_token`) behind every token.
pub fn spans(tokenizer: &Tokenizer, encoded: &Example, every_token: bool) -> Vec<Span> {
    let id = |token| tokenizer.id(token);
    let (start, end) = (id(START), id(END));
    let (think, think_end) = (id("<think>"), id("</think>"));
    let mut spans: Vec<(Kind, bool, Vec<u8>)> = Vec::new();
    // The turn that a token stands in; behind START the role's name tells it.
    let mut turn = Kind::Document;
    let mut role: Option<Vec<u8>> = None;
    let mut is_thinking = false;
    for (&token, &label) in encoded.input_ids.iter().zip(&encoded.labels) {
        let mut bytes = Vec::new();
        tokenizer.append_bytes(token, false, &mut bytes);
        let is = |other: Option<u32>| other == Some(token);
        // A turn's marks end whatever is thought: somebody may have written `<think>` and no end of it.
        is_thinking = is_thinking && !is(start) && !is(end);
        let kind = match token {
            _ if is(think) || is(think_end) || is_thinking => Kind::Think,
            _ if tokenizer.is_added(token) || role.is_some() => Kind::Mark,
            _ => turn,
        };
        // 1. what follows
        if is(start) {
            role = Some(Vec::new());
        } else if let Some(name) = &mut role {
            name.extend_from_slice(&bytes);
            if name.contains(&b'\n') {
                turn = turn_of(name);
                role = None;
            }
        }
        if is(end) {
            turn = Kind::Mark;
        }
        if is(think) {
            is_thinking = true;
        } else if is(think_end) {
            is_thinking = false;
        }
        // 2. the token
        let trained = label != IGNORE;
        match spans.last_mut() {
            Some((last, was_trained, known))
                if !every_token && *last == kind && *was_trained == trained =>
            {
                known.extend(bytes)
            }
            _ => spans.push((kind, trained, bytes)),
        }
    }
    let spans = spans.into_iter().map(|(kind, trained, bytes)| Span {
        kind,
        trained,
        text: shown(&bytes),
    });
    spans.collect()
}

fn turn_of(role: &[u8]) -> Kind {
    match role.trim_ascii() {
        b"system" => Kind::System,
        b"user" | b"tool" => Kind::User,
        b"assistant" => Kind::Assistant,
        _ => Kind::Document,
    }
}

/// The text, or the bytes in hexadecimal where a token holds a part of a character.
fn shown(bytes: &[u8]) -> String {
    let mut out = String::new();
    for chunk in bytes.utf8_chunks() {
        out.push_str(chunk.valid());
        for byte in chunk.invalid() {
            let _ = write!(out, "\\x{byte:02x}");
        }
    }
    out
}

/// Line feeds are tokens too: they are seen before they are obeyed. What else acts on a terminal never reaches it.
pub fn visible(text: &str) -> String {
    harmless(text).replace('\n', "↵\n")
}

#[cfg(test)]
mod tests {
    use text::labels::{self, LossScale};
    use text::{Conversation, Message};

    use super::*;

    fn tokenizer() -> Tokenizer {
        Tokenizer::train(["Hello there, sailor. 你好"].into_iter(), 400).unwrap()
    }

    fn conversation() -> Vec<Span> {
        let tokenizer = tokenizer();
        let messages = [
            Message::system("Ada"),
            Message::user("Hi"),
            Message::assistant("你好\nsailor"),
        ];
        let conversation = Conversation::new(messages);
        let encoded = labels::sft(&tokenizer, &conversation, LossScale::IgnoreEmptyThink).unwrap();
        spans(&tokenizer, &encoded, false)
    }

    #[test]
    fn conversation_shows_roles_think_block_and_loss() {
        let got: Vec<(Kind, bool, String)> = conversation()
            .into_iter()
            .map(|s| (s.kind, s.trained, s.text))
            .collect();
        let span = |kind, trained, text: &str| (kind, trained, text.to_owned());
        assert_eq!(
            got,
            [
                span(Kind::Mark, false, "<|im_start|>system\n"),
                span(Kind::System, false, "Ada"),
                span(Kind::Mark, false, "<|im_end|>\n<|im_start|>user\n"),
                span(Kind::User, false, "Hi"),
                span(Kind::Mark, false, "<|im_end|>\n<|im_start|>assistant\n"),
                span(Kind::Think, false, "<think>\n\n</think>"),
                span(Kind::Assistant, false, "\n\n"),
                span(Kind::Assistant, true, "你好\nsailor"),
                span(Kind::Mark, true, "<|im_end|>\n"),
            ]
        );
    }

    #[test]
    fn marks_that_somebody_writes_are_what_he_says() {
        let tokenizer = tokenizer();
        let messages = [
            Message::user("Hi <think> there<|im_end|>"),
            Message::assistant("sailor</think>"),
        ];
        let conversation = Conversation::new(messages);
        let encoded = labels::sft(&tokenizer, &conversation, LossScale::default()).unwrap();
        let spans = spans(&tokenizer, &encoded, false);
        let kinds: Vec<(Kind, &str)> = spans.iter().map(|s| (s.kind, s.text.as_str())).collect();
        assert_eq!(
            kinds[1..],
            [
                (Kind::User, "Hi <think> there<|im_end|>"),
                (Kind::Mark, "<|im_end|>\n<|im_start|>assistant\n"),
                (Kind::Think, "<think>\n\n</think>"),
                (Kind::Assistant, "\n\n"),
                (Kind::Assistant, "sailor</think>"),
                (Kind::Mark, "<|im_end|>\n"),
            ]
        );
    }

    #[test]
    fn think_mark_in_rows_of_ids_ends_with_the_turn() {
        let tokenizer = tokenizer();
        let text = "<|im_start|>user\nHi <think> there<|im_end|>\n<|im_start|>assistant\nsailor";
        let input_ids = tokenizer.encode(text).unwrap();
        let labels = vec![IGNORE; input_ids.len()];
        let spans = spans(&tokenizer, &Example::document(input_ids, labels), false);
        let kinds: Vec<(Kind, &str)> = spans.iter().map(|s| (s.kind, s.text.as_str())).collect();
        assert_eq!(
            kinds[1..],
            [
                (Kind::User, "Hi "),
                (Kind::Think, "<think> there"),
                (Kind::Mark, "<|im_end|>\n<|im_start|>assistant\n"),
                (Kind::Assistant, "sailor"),
            ]
        );
    }

    #[test]
    fn every_token_is_apart_on_request_and_parts_of_characters_are_bytes() {
        let tokenizer = tokenizer();
        let encoded = labels::pt(&tokenizer, "ж").unwrap();
        let texts: Vec<String> = spans(&tokenizer, &encoded, true)
            .into_iter()
            .map(|s| s.text)
            .collect();
        assert_eq!(texts, ["\\xd0", "\\xb6", "<|im_end|>"]);
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(visible("a\u{1b}[31m\nb\r"), "a\\u{1b}[31m↵\nb\\u{d}");
        assert_eq!(visible("a\u{202e}b"), "a\\u{202e}b");
    }
}
