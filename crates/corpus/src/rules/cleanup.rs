//! Takes the game's own markup out of a formatted sentence: seven passes, each over the whole text.

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::digits;

/// What the clean-up puts in for one language.
#[derive(Debug, Clone)]
pub(crate) struct Cleanup {
    /// What `{NICKNAME}` becomes.
    pub nickname: String,
    /// Literal replacements after that of the nickname, in order.
    pub literals: Vec<(String, String)>,
}

impl Cleanup {
    /// Cleans a sentence. Nothing is trimmed; other braces stay.
    pub fn run<'a>(&self, text: Cow<'a, str>) -> Cow<'a, str> {
        let has_markup = |text: &str| memchr::memchr2(b'{', b'<', text.as_bytes()).is_some();
        let is_literal =
            |(from, _): &(String, String)| !from.starts_with('{') && text.contains(from);
        if !has_markup(&text) && !self.literals.iter().any(is_literal) {
            return text;
        }
        // 1. the player's name  2. literal replacements of the game
        let mut text = replace(text, "{NICKNAME}", &self.nickname);
        for (from, to) in &self.literals {
            text = replace(text, from, to);
        }
        // Often that was all.
        if !has_markup(&text) {
            return text;
        }
        // 3. blanks
        text = replace(text, "{SPACE}", " ");
        // 4. markup that goes
        text = remove_markup(text);
        // 5. to 7. choices of device and of the player's sex
        text = unwrap(text, "{LAYOUT_MOBILE#", true);
        text = unwrap(text, "{F#", true);
        unwrap(text, "{M#", false)
    }
}

/// Every `from`, which begins with a character that is rare, becomes `to`.
fn replace<'a>(text: Cow<'a, str>, from: &str, to: &str) -> Cow<'a, str> {
    let Some(first) = from.bytes().next() else {
        return text;
    };
    let mut out = String::new();
    let mut done = 0;
    for at in memchr::memchr_iter(first, text.as_bytes()) {
        if at >= done && text.as_bytes()[at..].starts_with(from.as_bytes()) {
            out.push_str(&text[done..at]);
            out.push_str(to);
            done = at + from.len();
        }
    }
    if done == 0 {
        return text;
    }
    out.push_str(&text[done..]);
    Cow::Owned(out)
}

/// Removes tags and the markers of ruby, images and layouts, from left to right in one pass.
fn remove_markup(text: Cow<'_, str>) -> Cow<'_, str> {
    let Some(first) = text.find(['<', '{']) else {
        return text;
    };
    let ends = Ends::of(&text);
    let mut out = String::with_capacity(text.len());
    let mut rest = &text[first..];
    out.push_str(&text[..first]);
    loop {
        match markup_length(rest, ends) {
            Some(length) => rest = &rest[length..],
            None => {
                let Some(c) = rest.chars().next() else { break };
                out.push(c);
                rest = &rest[c.len_utf8()..];
            }
        }
        let next = rest.find(['<', '{']).unwrap_or(rest.len());
        out.push_str(&rest[..next]);
        rest = &rest[next..];
    }
    if out.len() == text.len() {
        return text;
    }
    Cow::Owned(out)
}

/// How far before the end of a text its last `>` and its last `}` stand: what follows the last is not searched for it
/// again and again, which would take the square of the time where markup is opened and never closed.
#[derive(Clone, Copy)]
struct Ends {
    angle: Option<usize>,
    brace: Option<usize>,
}

impl Ends {
    fn of(text: &str) -> Ends {
        let from_end = |c| text.rfind(c).map(|at| text.len() - at);
        Ends {
            angle: from_end('>'),
            brace: from_end('}'),
        }
    }

    /// The first `>` of what is left of the text.
    fn angle(self, rest: &str) -> Option<usize> {
        self.angle.filter(|last| *last <= rest.len())?;
        rest.find('>')
    }

    /// The first `}` of what is left of the text.
    fn brace(self, rest: &str) -> Option<usize> {
        self.brace.filter(|last| *last <= rest.len())?;
        rest.find('}')
    }
}

/// Bytes of the markup at the beginning of `text`, if there is one that goes.
fn markup_length(text: &str, ends: Ends) -> Option<usize> {
    if let Some(inner) = text.strip_prefix('<') {
        let end = ends.angle(inner)?;
        return (end > 0).then_some(end + 2);
    }
    if text.starts_with("{RUBY_B#") {
        return ends.brace(text).map(|end| end + 1);
    }
    for literal in ["{RUBY_E#}", "{F#{M#}}"] {
        if text.starts_with(literal) {
            return Some(literal.len());
        }
    }
    for start in ["{Img#", "{Img "] {
        if let Some(inner) = text.strip_prefix(start) {
            let end = inner.find(|c| digits::value(c).is_none())?;
            return (end > 0 && inner[end..].starts_with('}')).then_some(start.len() + end + 1);
        }
    }
    for start in ["{LAYOUT_CONTROLLER#", "{LAYOUT_KEYBOARD#"] {
        if let Some(inner) = text.strip_prefix(start) {
            let end = ends.brace(inner)?;
            return (end > 0).then_some(start.len() + end + 1);
        }
    }
    None
}

/// `<start>X}` becomes X, or nothing.
fn unwrap<'a>(text: Cow<'a, str>, start: &str, keep: bool) -> Cow<'a, str> {
    if !text.contains(start) {
        return text;
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = &text[..];
    while let Some((before, inner)) = rest.split_once(start) {
        let Some((x, behind)) = inner.split_once('}') else {
            break;
        };
        out.push_str(before);
        if keep {
            out.push_str(x);
        }
        rest = behind;
    }
    out.push_str(rest);
    Cow::Owned(out)
}

/// Counts markers in braces that the clean-up left, by their name (up to `#` or `}`).
pub(crate) fn count_unknown(text: &str, unknown: &mut BTreeMap<String, usize>) {
    let mut rest = text;
    while let Some(start) = rest.find('{') {
        rest = &rest[start + 1..];
        let end = rest.find(['#', '}', '{']).unwrap_or(rest.len());
        let name: String = rest[..end].chars().take(30).collect();
        *unknown.entry(format!("{{{name}}}")).or_default() += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expect: &str) {
        let cleanup = Cleanup {
            nickname: "Sam".to_owned(),
            literals: vec![("{MCV#1}".to_owned(), "3".to_owned())],
        };
        assert_eq!(cleanup.run(Cow::Borrowed(text)), expect, "{text}");
    }

    #[test]
    fn names_and_blanks_are_put_in() {
        check("{NICKNAME},{SPACE}{NICKNAME} has {MCV#1}", "Sam, Sam has 3");
        check(
            "{nickname} {NICK{NICKNAME}NAME}",
            "{nickname} {NICKSamNAME}",
        );
    }

    #[test]
    fn markup_goes_in_one_pass() {
        check("a<b>c</b>d", "acd");
        check("a <> b > c", "a <> b > c");
        check("a<\n<x>b", "ab");
        check("2 < 3", "2 < 3");
        check("{RUBY_B#かな}漢字{RUBY_E#}", "漢字");
        check("{RUBY_B#}x", "x");
        check("x{F#{M#}}y", "xy");
        check(
            "{Img#12}{Img 3}{Img#}{Img#1a}{IMG#1}",
            "{Img#}{Img#1a}{IMG#1}",
        );
        check("{Img#٣}", "");
        check(
            "{LAYOUT_CONTROLLER#A}{LAYOUT_KEYBOARD#B}{LAYOUT_MOBILE#C}",
            "C",
        );
        check("{LAYOUT_CONTROLLER#}", "{LAYOUT_CONTROLLER#}");
        // What a removal joins is not looked at again in the same step.
        check("{RUBY<b>_E#}", "{RUBY_E#}");
    }

    /// Would take hours if what is never closed were searched for its end each time.
    #[test]
    fn unclosed_markup_takes_no_longer_than_other_text() {
        for open in ["<", "{RUBY_B#", "<{LAYOUT_KEYBOARD#"] {
            let text = open.repeat(4_000_000);
            check(&text, &text);
        }
    }

    #[test]
    fn choices_take_the_first_brace() {
        check("{F#she}{M#he} said", "she said");
        check("{M#he}{F#she}", "she");
        check("{F#}{M#}", "");
        check("{F#a{M#b}}", "a");
        check("{F#open", "{F#open");
        check("{M#a\nb}c", "c");
        check("{LAYOUT_MOBILE#{F#x}}", "x");
    }

    #[test]
    fn other_braces_stay_and_are_counted() {
        check("{UNKNOWN#1} {x", "{UNKNOWN#1} {x");
        let mut unknown = BTreeMap::new();
        count_unknown("{A#1}{A#2} {b} {", &mut unknown);
        let got: Vec<_> = unknown.into_iter().collect();
        assert_eq!(
            got,
            [
                ("{A}".to_owned(), 2),
                ("{b}".to_owned(), 1),
                ("{}".to_owned(), 1)
            ]
        );
    }
}
