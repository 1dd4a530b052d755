//! The clean-up and the lines of a text, against the rules read word by word and without any haste.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use crate::character::{Markup, Replacement};
use crate::language::Language;
use crate::rules::cleanup::{self, Cleanup};
use crate::rules::{digits, markup as story_markup, paragraph};

/// A sentence through the clean-up of a game.
pub(super) fn cleanup(data: &[u8], _: &Path) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let rules = Cleanup {
        nickname: "Sam".to_owned(),
        literals: vec![("{MCV#1}".to_owned(), "3".to_owned())],
    };
    let shown = rules.run(Cow::Borrowed(text));
    assert_eq!(shown, plain_cleanup(text), "{text:?}");
    let mut unknown = BTreeMap::new();
    cleanup::count_unknown(&shown, &mut unknown);
    assert_eq!(unknown.values().sum::<usize>(), shown.matches('{').count());
}

/// A step of the clean-up: what stands at the beginning of a text, as its length and what comes in its place.
type Step = fn(&str) -> Option<(usize, String)>;

/// Section 5.2 of the rules, one pass a step.
fn plain_cleanup(text: &str) -> String {
    let steps: [Step; 7] = [
        |t| literal(t, "{NICKNAME}", "Sam"),
        |t| literal(t, "{MCV#1}", "3"),
        |t| literal(t, "{SPACE}", " "),
        |t| {
            enclosed(t, "<", '>', 1)
                .or_else(|| enclosed(t, "{RUBY_B#", '}', 0))
                .or_else(|| literal(t, "{RUBY_E#}", ""))
                .or_else(|| literal(t, "{F#{M#}}", ""))
                .or_else(|| image(t, "{Img#"))
                .or_else(|| image(t, "{Img "))
                .or_else(|| enclosed(t, "{LAYOUT_CONTROLLER#", '}', 1))
                .or_else(|| enclosed(t, "{LAYOUT_KEYBOARD#", '}', 1))
                .map(|(length, _)| (length, String::new()))
        },
        |t| enclosed(t, "{LAYOUT_MOBILE#", '}', 0),
        |t| enclosed(t, "{F#", '}', 0),
        |t| enclosed(t, "{M#", '}', 0).map(|(length, _)| (length, String::new())),
    ];
    steps.iter().fold(text.to_owned(), |text, step| {
        let mut out = String::new();
        let mut rest = &text[..];
        while let Some(c) = rest.chars().next() {
            match step(rest) {
                Some((length, replacement)) => {
                    out.push_str(&replacement);
                    rest = &rest[length..];
                }
                None => {
                    out.push(c);
                    rest = &rest[c.len_utf8()..];
                }
            }
        }
        out
    })
}

fn literal(text: &str, from: &str, to: &str) -> Option<(usize, String)> {
    text.starts_with(from).then(|| (from.len(), to.to_owned()))
}

/// `start`, at least `least` characters other than `end`, `end`; gives what is between.
fn enclosed(text: &str, start: &str, end: char, least: usize) -> Option<(usize, String)> {
    let inner: String = text
        .strip_prefix(start)?
        .chars()
        .take_while(|c| *c != end)
        .collect();
    let length = start.len() + inner.len() + 1;
    let is_closed = text.len() >= length;
    (is_closed && inner.chars().count() >= least).then_some((length, inner))
}

fn image(text: &str, start: &str) -> Option<(usize, String)> {
    let (length, inner) = enclosed(text, start, '}', 1)?;
    inner
        .chars()
        .all(|c| digits::value(c).is_some())
        .then_some((length, inner))
}

/// A text cut into lines.
pub(super) fn lines(data: &[u8], _: &Path) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let expect: Vec<String> = plain_lines(text)
        .into_iter()
        .filter(|line| !line.is_empty())
        .collect();
    assert_eq!(paragraph::lines(text).collect::<Vec<_>>(), expect);
}

/// Section 6 of the rules, a character at a time; empty lines stay.
fn plain_lines(text: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    let mut was_feed = false;
    for c in text.chars() {
        match c {
            '\n' => lines.push(String::new()),
            '\u{a0}' if was_feed => {}
            _ => {
                if let Some(line) = lines.last_mut() {
                    line.push(c);
                }
            }
        }
        was_feed = c == '\n';
    }
    for line in &mut lines {
        while line.ends_with(paragraph::is_space) {
            line.pop();
        }
        while line.starts_with(paragraph::is_space) {
            line.remove(0);
        }
    }
    lines
}

/// A text of a plain story through its own clean-up.
pub(super) fn markup(data: &[u8], _: &Path) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let rules = Markup {
        strip: vec!["i".to_owned(), "span".to_owned()],
        remove: vec!["img".to_owned()],
        text_attribute: vec!["ref".to_owned()],
    };
    let mut unknown = BTreeMap::new();
    let stripped = story_markup::strip(&rules, text, &mut unknown);
    assert!(stripped.len() <= text.len());
    for tag in unknown.keys() {
        assert!(
            stripped.contains(tag.trim_end_matches('>'))
                || stripped.contains(tag.replacen('<', "</", 1).trim_end_matches('>')),
            "{tag} is counted and gone"
        );
    }
    if !text.contains('<') {
        assert_eq!(stripped, text);
    }
    let variables = BTreeMap::from([("name".to_owned(), Replacement::All("Sam".to_owned()))]);
    let replaced = story_markup::replace_variables(&variables, Language::En, text);
    if !text.contains('$') {
        assert_eq!(replaced.as_deref(), Some(text));
    }
}
