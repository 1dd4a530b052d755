//! What a player reads of a Ren'Py text: tags go, escapes and variables are put in.

use super::definitions::Definitions;

pub(crate) const TAGS: &str = "text tags such as {b} and {w}";

/// Characters of the longest tag or expression.
const LONGEST: usize = 300;

/// A text as it is shown.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Shown {
    pub text: String,
    pub n_tags: usize,
    /// Variables whose first value was put in.
    pub n_defaults: usize,
    /// Whether variables without a value stand in it as `$name|`.
    pub has_variables: bool,
}

/// A text without tags and escapes; variables stay as they are.
pub(crate) fn plain(literal: &str) -> String {
    let tagless = without_tags(literal);
    unescape(&tagless.text, |_, _| false).text.trim().to_owned()
}

/// A text as it is shown, with the variables that have a value at the beginning.
pub(crate) fn show(literal: &str, definitions: &Definitions) -> Shown {
    let tagless = without_tags(literal);
    let mut shown = unescape(&tagless.text, |shown, expression| {
        match definitions.text(expression) {
            Some(value) => {
                shown.n_defaults += 1;
                shown.text.push_str(&plain(value));
            }
            None if is_variable(expression) => {
                shown.has_variables = true;
                shown.text.push_str(&format!("${expression}|"));
            }
            None => {
                shown.has_variables = true;
                let inner = expression.replace(['(', ')'], "");
                shown.text.push_str(&format!("$({inner})"));
            }
        }
        true
    });
    shown.n_tags = tagless.n_tags;
    shown
}

/// The beginning of a text, in which a tag or an expression must end: so that what is never closed costs no more than
/// other text.
fn within(text: &str) -> &str {
    let end = text
        .char_indices()
        .nth(LONGEST)
        .map_or(text.len(), |(at, _)| at);
    &text[..end]
}

/// Whether a plain story can name the variable: letters, digits, `_` and `.` of ASCII.
fn is_variable(expression: &str) -> bool {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
    !expression.is_empty() && expression.chars().all(is_part) && !expression.ends_with('.')
}

/// Takes tags out, and with readings of ruby text and comments what they enclose; `{{` becomes `{`.
fn without_tags(literal: &str) -> Shown {
    let mut shown = Shown::default();
    let mut rest = literal;
    while let Some(at) = rest.find('{') {
        shown.text.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(behind) = rest.strip_prefix('{') {
            shown.text.push('{');
            rest = behind;
            continue;
        }
        let Some(end) = within(rest).find('}') else {
            shown.text.push('{');
            continue;
        };
        let tag = &rest[..end];
        rest = &rest[end + 1..];
        shown.n_tags += 1;
        match tag {
            "rt" | "art" => {
                let close = format!("{{/{tag}}}");
                let reading = within(rest).find(&close);
                rest = reading.map_or(rest, |at| &rest[at + close.len()..]);
            }
            "p" => shown.text.push(' '),
            _ if tag.starts_with("p=") => shown.text.push(' '),
            _ => {}
        }
    }
    shown.text.push_str(rest);
    shown
}

/// Puts in escapes; `put` gets each `[expression]` and `%(name)s` and says whether it wrote something for it.
fn unescape(text: &str, mut put: impl FnMut(&mut Shown, &str) -> bool) -> Shown {
    let mut shown = Shown::default();
    let mut rest = text;
    while let Some(at) = rest.find(['\\', '[', '%']) {
        shown.text.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some(escaped) = rest.strip_prefix('\\') {
            let mut chars = escaped.chars();
            match chars.next() {
                Some('n') => shown.text.push('\n'),
                Some(c) => shown.text.push(c),
                None => {}
            }
            rest = chars.as_str();
        } else if let Some(behind) = rest.strip_prefix("[[").or_else(|| rest.strip_prefix("%%")) {
            shown.text.push_str(&rest[..1]);
            rest = behind;
        } else if let Some((expression, behind)) = variable(rest) {
            if !put(&mut shown, expression) {
                shown.text.push_str(&rest[..rest.len() - behind.len()]);
            }
            rest = behind;
        } else {
            shown.text.push_str(&rest[..1]);
            rest = &rest[1..];
        }
    }
    shown.text.push_str(rest);
    shown
}

/// The expression of `[expression!t:.2]` or `%(name)s` at the beginning of a text, and what follows.
fn variable(text: &str) -> Option<(&str, &str)> {
    if let Some(inner) = text.strip_prefix("%(") {
        let end = within(inner).find(')')?;
        let (name, behind) = (&inner[..end], &inner[end + 1..]);
        return behind
            .strip_prefix(['s', 'd'])
            .map(|behind| (name.trim(), behind));
    }
    let inner = text.strip_prefix('[')?;
    let mut depth = 1;
    let end = within(inner).char_indices().find_map(|(at, c)| {
        match c {
            '[' => depth += 1,
            ']' => depth -= 1,
            _ => {}
        }
        (depth == 0).then_some(at)
    })?;
    let expression = &inner[..end];
    // Flags and formats follow behind `!` and `:`.
    let name_end = expression.find(['!', ':']).unwrap_or(expression.len());
    Some((expression[..name_end].trim(), &inner[end + 1..]))
}
