//! Takes markup and variables out of the texts of a plain story, as the character file says.

use std::borrow::Cow;
use std::collections::BTreeMap;

use crate::character::{Markup, Replacement};
use crate::language::Language;

/// Removes the markup that `markup` names; counts other tags in `unknown` and leaves them.
pub(crate) fn strip<'a>(
    markup: &Markup,
    text: &'a str,
    unknown: &mut BTreeMap<String, usize>,
) -> Cow<'a, str> {
    if !text.contains('<') {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find('<') {
        out.push_str(&rest[..start]);
        rest = &rest[start..];
        let Some(tag) = Tag::at(rest) else {
            out.push('<');
            rest = &rest[1..];
            continue;
        };
        let is = |list: &[String]| list.iter().any(|known| known == tag.name);
        let after = &rest[tag.length..];
        if is(&markup.strip) {
            rest = after;
        } else if !tag.is_end && (is(&markup.remove) || is(&markup.text_attribute)) {
            let end = format!("</{}>", tag.name);
            let (inner, behind) = after.split_once(end.as_str()).unwrap_or((after, ""));
            if is(&markup.text_attribute) {
                out.push_str(text_attribute(inner).unwrap_or(inner));
            }
            rest = behind;
        } else {
            *unknown.entry(format!("<{}>", tag.name)).or_default() += 1;
            out.push_str(&rest[..tag.length]);
            rest = after;
        }
    }
    out.push_str(rest);
    Cow::Owned(out)
}

/// A tag at the beginning of a text.
struct Tag<'a> {
    name: &'a str,
    is_end: bool,
    /// Bytes from `<` to `>`.
    length: usize,
}

impl<'a> Tag<'a> {
    /// `<` or `</`, a letter, and all up to the next `>`; anything else is no tag.
    fn at(text: &'a str) -> Option<Tag<'a>> {
        // A `<` before the `>` makes this one no tag; so no character is looked at for more than one of them.
        let end = text[1..].find(['<', '>'])?;
        let (inner, behind) = text[1..].split_at(end);
        if behind.starts_with('<') {
            return None;
        }
        let length = end + 2;
        let is_end = inner.starts_with('/');
        let inner = inner.strip_prefix('/').unwrap_or(inner);
        let name_end = inner
            .find(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != '-')
            .unwrap_or(inner.len());
        let name = &inner[..name_end];
        if !name.starts_with(|c: char| c.is_ascii_alphabetic()) {
            return None;
        }
        Some(Tag {
            name,
            is_end,
            length,
        })
    }
}

/// X of the first `text='X'`.
fn text_attribute(inner: &str) -> Option<&str> {
    let (_, behind) = inner.split_once("text='")?;
    behind.split_once('\'').map(|(value, _)| value)
}

/// Replaces `$name`, `$name|` and `$(expression)`; `None` if one of them has no replacement in this language.
pub(crate) fn replace_variables(
    variables: &BTreeMap<String, Replacement>,
    language: Language,
    text: &str,
) -> Option<String> {
    // Bytes from the last `)` to the end: behind it no expression is closed.
    let last_close = text.rfind(')').map_or(usize::MAX, |at| text.len() - at);
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find('$') {
        out.push_str(&rest[..start]);
        rest = &rest[start + 1..];
        if rest.starts_with('(') && rest.len() < last_close {
            out.push('$');
            continue;
        }
        let (name, behind) = variable_name(rest);
        if name.is_empty() {
            out.push('$');
            continue;
        }
        out.push_str(variables.get(name)?.get(language)?);
        rest = behind;
    }
    out.push_str(rest);
    Some(out)
}

/// The variable's name at the beginning of a text, and what follows behind it and behind a `|`.
fn variable_name(text: &str) -> (&str, &str) {
    if text.starts_with('(') {
        return match text.find(')') {
            Some(end) => text.split_at(end + 1),
            None => ("", text),
        };
    }
    let end = text
        .find(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != '.')
        .unwrap_or(text.len());
    // A full stop behind the name ends the sentence.
    let name = text[..end].trim_end_matches('.');
    let behind = &text[name.len()..];
    (name, behind.strip_prefix('|').unwrap_or(behind))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn markup() -> Markup {
        let list = |tags: &[&str]| tags.iter().map(|t| (*t).to_owned()).collect();
        Markup {
            strip: list(&["i", "span"]),
            remove: list(&["img"]),
            text_attribute: list(&["ref"]),
        }
    }

    fn check(text: &str, expect: &str, expect_unknown: &[&str]) {
        let mut unknown = BTreeMap::new();
        assert_eq!(strip(&markup(), text, &mut unknown), expect);
        assert_eq!(
            unknown.keys().map(String::as_str).collect::<Vec<_>>(),
            expect_unknown
        );
    }

    #[test]
    fn known_tags_go_and_unknown_ones_stay_counted() {
        check("a <i>b</i> <span color='red'>c</span>", "a b c", &[]);
        check(
            "<img>src=x.png</img>see <ref>dst='a' text='Drakes'</ref>.",
            "see Drakes.",
            &[],
        );
        check("<blink>no</blink>", "<blink>no</blink>", &["<blink>"]);
    }

    #[test]
    fn comparison_signs_are_no_tags() {
        check("1 < 2 > 0, <3 and <", "1 < 2 > 0, <3 and <", &[]);
        check("a <b <i>c</i>", "a <b c", &[]);
    }

    /// Would take hours if what is never closed were searched for its end each time.
    #[test]
    fn unclosed_markup_takes_no_longer_than_other_text() {
        let text = "<a".repeat(4_000_000) + "<";
        check(&text, &text, &[]);
        let text = "$(".repeat(4_000_000);
        let replaced = replace_variables(&BTreeMap::new(), Language::En, &text);
        assert!(replaced.is_some_and(|replaced| replaced == text));
    }

    #[test]
    fn variables_are_replaced_or_the_line_is_given_up() {
        let variables = BTreeMap::from([
            ("unit.name".to_owned(), Replacement::All("Ada".to_owned())),
            ("(hp-15)".to_owned(), Replacement::All("5".to_owned())),
        ]);
        let replace = |text| replace_variables(&variables, Language::En, text);
        assert_eq!(replace("$unit.name|, run!").as_deref(), Some("Ada, run!"));
        assert_eq!(replace("Run, $unit.name.").as_deref(), Some("Run, Ada."));
        assert_eq!(
            replace("$(hp-15) left, 3 $").as_deref(),
            Some("5 left, 3 $")
        );
        assert_eq!(replace("$gold gold"), None);
    }
}
