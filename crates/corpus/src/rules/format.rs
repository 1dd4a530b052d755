//! The three ways in which a sentence is written into a record, before any clean-up.

use std::borrow::Cow;

use crate::language::Language;

/// How a sentence is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// The text alone.
    Plain,
    /// Name, colon, text.
    Named,
    /// The text without outer brackets, in brackets if `aside` says so.
    Bracketed,
}

/// Writes a sentence. `aside`: somebody else than the player or the character speaks (only for `Bracketed`).
pub(crate) fn write<'a>(
    format: Format,
    language: Language,
    name: Option<&str>,
    text: Cow<'a, str>,
    aside: bool,
) -> Cow<'a, str> {
    match format {
        Format::Plain => text,
        Format::Named => match name {
            None => text,
            Some(name) => {
                let colon = if language.is_fullwidth() { "：" } else { ": " };
                Cow::Owned([name, colon, &text].concat())
            }
        },
        Format::Bracketed => {
            let (open, close) = if language.is_fullwidth() {
                ('（', '）')
            } else {
                ('(', ')')
            };
            let inner = text.trim_start_matches(open).trim_end_matches(close);
            if aside {
                Cow::Owned(format!("{open}{inner}{close}"))
            } else if inner.len() == text.len() {
                text
            } else {
                Cow::Owned(inner.to_owned())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(format: Format, language: Language, text: &str, aside: bool, expect: &str) {
        let got = write(format, language, Some("Ada"), Cow::Borrowed(text), aside);
        assert_eq!(got, expect);
    }

    #[test]
    fn named_puts_the_colon_of_the_language() {
        check(Format::Named, Language::Cht, "你好", false, "Ada：你好");
        check(Format::Named, Language::Jp, "よう", false, "Ada: よう");
    }

    #[test]
    fn bracketed_strips_everyone_and_wraps_asides() {
        check(Format::Bracketed, Language::En, "((Hm.)", false, "Hm.");
        check(Format::Bracketed, Language::En, "(Hm.) ", true, "(Hm.) )");
        check(
            Format::Bracketed,
            Language::En,
            "（Hm.）",
            true,
            "(（Hm.）)",
        );
        check(Format::Bracketed, Language::Chs, "（嗯）", true, "（嗯）");
        check(Format::Bracketed, Language::Chs, "(嗯)", true, "（(嗯)）");
        check(Format::Bracketed, Language::En, "(((", true, "()");
    }
}
