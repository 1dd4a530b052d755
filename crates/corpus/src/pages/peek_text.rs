//! Spans of a row for a terminal, told apart by colour or by brackets.

use std::collections::BTreeSet;
use std::fmt::Write;

use crate::peek::{Kind, Span, visible};

/// How spans are told apart on the screen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// By colour, and underlined where they are trained.
    Colour,
    /// By brackets around what is trained, for a screen without colours and for files.
    Brackets,
}

/// What the colours (of the kinds that were seen) or brackets mean.
pub fn legend(kinds: &BTreeSet<Kind>, style: Style) -> String {
    match style {
        Style::Colour => {
            let shown = |trained| -> String {
                let names = kinds.iter().map(|kind| {
                    let code = code(*kind, trained);
                    painted(kind.name(), &code, style)
                });
                names.collect::<Vec<_>>().join(" ")
            };
            format!(
                "trained, underlined: {}; read only, dim: {}",
                shown(true),
                shown(false)
            )
        }
        Style::Brackets => {
            "⟦ ⟧ holds what is trained; the rest is read only; ↵ is a line feed".to_owned()
        }
    }
}

/// The spans as they go to the screen, with `between` after each but the last.
pub fn paint(spans: &[Span], style: Style, between: &str) -> String {
    let mut out = String::new();
    for (at, run) in spans.chunk_by(|a, b| a.trained == b.trained).enumerate() {
        if at > 0 {
            out.push_str(between);
        }
        let pieces: Vec<String> = run.iter().map(|span| paint_span(span, style)).collect();
        let text = pieces.join(between);
        if style == Style::Brackets && run[0].trained {
            // The closing bracket stands before a last line feed, where the eye looks for it.
            let (text, feed) = text
                .strip_suffix('\n')
                .map_or((text.as_str(), ""), |text| (text, "\n"));
            let _ = write!(out, "⟦{text}⟧{feed}");
        } else {
            out.push_str(&text);
        }
    }
    out
}

fn paint_span(span: &Span, style: Style) -> String {
    let text = visible(&span.text);
    // A line at a time, so that an underline does not run to the edge of the screen.
    let code = code(span.kind, span.trained);
    let lines: Vec<String> = text
        .split('\n')
        .map(|line| painted(line, &code, style))
        .collect();
    lines.join("\n")
}

/// The parameters of a terminal's colour sequence.
fn code(kind: Kind, trained: bool) -> String {
    let colour = match kind {
        Kind::Document => 39,
        Kind::System => 35,
        Kind::User => 36,
        Kind::Assistant => 32,
        Kind::Think => 34,
        Kind::Mark => 33,
    };
    let weight = if trained { "1;4" } else { "2" };
    format!("{weight};{colour}")
}

/// A text in a colour that [`Style::Colour`] shows, `code` being the parameters of a terminal's colour sequence.
pub fn painted(text: &str, code: &str, style: Style) -> String {
    match style {
        Style::Colour if !text.is_empty() => format!("\u{1b}[{code}m{text}\u{1b}[0m"),
        _ => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use text::labels::{self, LossScale};
    use text::{Conversation, Message, Tokenizer};

    use super::*;
    use crate::peek::spans;

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
    fn brackets_hold_what_is_trained() {
        assert_eq!(
            paint(&conversation(), Style::Brackets, ""),
            "<|im_start|>system↵\nAda<|im_end|>↵\n<|im_start|>user↵\nHi<|im_end|>↵\n<|im_start|>assistant↵\n<think>↵\n↵\n</think>↵\n↵\n⟦你好↵\nsailor<|im_end|>↵⟧\n"
        );
    }

    #[test]
    fn colour_underlines_what_is_trained() {
        let painted = paint(&conversation(), Style::Colour, "");
        assert!(
            painted.contains("\u{1b}[1;4;32m你好↵\u{1b}[0m\n\u{1b}[1;4;32msailor\u{1b}[0m"),
            "{painted:?}"
        );
        assert!(painted.contains("\u{1b}[2;36mHi\u{1b}[0m"));
    }
}
