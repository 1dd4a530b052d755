//! The markup of passages: links, macros of SugarCube, Harlowe and Chapbook, tags and emphasis.

use std::collections::HashMap;

use crate::import::html;
use crate::import::name;
use crate::import::scenes::{Gatherer, Notes};
use crate::scene::LineKind;

/// Characters of the longest link or macro: what is longer is taken for text, so that what is never closed costs no more.
const LONGEST: usize = 500;

const MACROS: &str = "macros (the texts of all their branches were kept)";
const TAGS: &str = "HTML tags and emphasis";
const COMMENTS: &str = "comments";
const IMAGES: &str = "images";

/// Macros of Harlowe, whose names a text in parentheses could hold too: only these are macros.
const HARLOWE: [&str; 44] = [
    "set",
    "put",
    "if",
    "unless",
    "else-if",
    "else",
    "elseif",
    "for",
    "either",
    "print",
    "display",
    "show",
    "hide",
    "link",
    "link-goto",
    "link-reveal",
    "link-repeat",
    "link-replace",
    "link-reveal-goto",
    "click",
    "click-replace",
    "click-append",
    "goto",
    "go-to",
    "live",
    "stop",
    "event",
    "after",
    "transition",
    "t8n",
    "text-colour",
    "text-color",
    "text-style",
    "align",
    "font",
    "css",
    "background",
    "bg",
    "enchant",
    "append",
    "replace",
    "prepend",
    "history",
    "move",
];
/// Macros of which the first text is what the player chooses.
const LINKS: [&str; 7] = [
    "link",
    "button",
    "link-goto",
    "link-reveal",
    "link-repeat",
    "link-replace",
    "link-reveal-goto",
];

/// A line of a passage, variables as they stand.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub text: String,
    pub is_option: bool,
    pub line: usize,
}

impl Piece {
    /// Gives the line with the variables whose first value is known.
    pub fn give(&self, out: &mut Gatherer, variables: &HashMap<String, String>) {
        let (text, n_defaults, has_variables) = put_defaults(&self.text, variables);
        out.notes.add_many(Notes::DEFAULTS, n_defaults, self.line);
        out.notes
            .add_many(Notes::VARIABLES, usize::from(has_variables), self.line);
        let mut line = match (self.is_option, name::split(&text)) {
            (true, _) => out.line(LineKind::Option, None, &text),
            (false, Some((name, text))) => {
                out.line(LineKind::Dialogue, Some(&name::voice(&name)), &text)
            }
            (false, None) => out.line(LineKind::Narration, None, &text),
        };
        line.has_variables = has_variables;
        out.push(line);
    }
}

/// What a passage holds.
#[derive(Debug, Default)]
pub(crate) struct Read {
    pub pieces: Vec<Piece>,
    pub targets: Vec<String>,
}

/// Reads the body of a passage whose header stands on line `line`.
pub(crate) fn read(body: &str, line: usize, notes: &mut Notes) -> Read {
    let mut read = Read::default();
    let body = without_comments(body, line, notes);
    let mut in_macro = false;
    let mut n_hooks = 0;
    for (at, text) in body.lines().enumerate() {
        let number = line + 1 + at;
        let mut scan = Scan {
            read: &mut read,
            notes,
            line: number,
            options: Vec::new(),
            in_macro,
            n_hooks,
        };
        let shown = scan.text(text);
        (in_macro, n_hooks) = (scan.in_macro, scan.n_hooks);
        let options = std::mem::take(&mut scan.options);
        let shown = html::unescape(&shown);
        let shown = shown.trim();
        // A line of links alone is a list of choices; in a sentence their words belong to it as well.
        let is_list = !options.is_empty() && {
            let mut left = shown.to_owned();
            for option in &options {
                left = left.replacen(option.as_str(), "", 1);
            }
            !left.chars().any(char::is_alphanumeric)
        };
        if !shown.is_empty() && !is_list {
            read.pieces.push(Piece {
                text: shown.to_owned(),
                is_option: false,
                line: number,
            });
        }
        let options = options.into_iter().map(|text| Piece {
            text,
            is_option: true,
            line: number,
        });
        read.pieces.extend(options);
    }
    read
}

/// Takes `/* */`, `/% %/` and `<!-- -->` out; their line feeds stay, so that lines keep their numbers.
fn without_comments(body: &str, line: usize, notes: &mut Notes) -> String {
    let mut out = String::with_capacity(body.len());
    let mut rest = body;
    let mut unclosed = [false; 3];
    const KINDS: [(&str, &str); 3] = [("/*", "*/"), ("/%", "%/"), ("<!--", "-->")];
    while let Some(at) = rest.find(['/', '<']) {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let kind = KINDS
            .iter()
            .position(|(open, _)| rest.starts_with(open))
            .filter(|kind| !unclosed[*kind]);
        let end = kind.and_then(|kind| {
            let (open, close) = KINDS[kind];
            let end = rest[open.len()..].find(close);
            unclosed[kind] = end.is_none();
            Some(open.len() + end? + close.len())
        });
        match end {
            Some(end) => {
                let number = line + 1 + out.matches('\n').count();
                notes.add(COMMENTS, number);
                out.extend(rest[..end].chars().filter(|c| *c == '\n'));
                rest = &rest[end..];
            }
            None => {
                out.push_str(&rest[..1]);
                rest = &rest[1..];
            }
        }
    }
    out.push_str(rest);
    out
}

struct Scan<'a> {
    read: &'a mut Read,
    notes: &'a mut Notes,
    line: usize,
    /// Labels of the links of this line.
    options: Vec<String>,
    /// Whether a macro that began on a line before goes on.
    in_macro: bool,
    /// Open hooks of Harlowe: the `[` behind a macro.
    n_hooks: usize,
}

impl Scan<'_> {
    /// The text that is shown of a line.
    fn text(&mut self, line: &str) -> String {
        let mut out = String::with_capacity(line.len());
        let mut rest = line;
        if self.in_macro {
            match rest.split_once(">>") {
                Some((_, behind)) => {
                    rest = behind;
                    self.in_macro = false;
                }
                None => return out,
            }
        }
        if is_modifier(rest) {
            self.notes.add(MACROS, self.line);
            return out;
        }
        while let Some(at) = rest.find(['[', '<', '(', '\'', '/', '\\', ']']) {
            out.push_str(&rest[..at]);
            rest = &rest[at..];
            let length = self.mark(rest, &mut out);
            match length {
                0 => {
                    out.push_str(&rest[..1]);
                    rest = &rest[1..];
                }
                length => rest = &rest[length..],
            }
        }
        out.push_str(rest);
        out
    }

    /// Bytes of the markup at the beginning of a text, whose words go to `out`; 0 if it is none.
    fn mark(&mut self, rest: &str, out: &mut String) -> usize {
        if let Some(inner) = rest.strip_prefix("[[") {
            return self.link(inner, out).map_or(0, |length| length + 2);
        }
        if rest.starts_with("[img[") || rest.starts_with("[<img[") || rest.starts_with("[>img[") {
            return within(rest).find("]]").map_or(0, |end| {
                self.notes.add(IMAGES, self.line);
                end + 2
            });
        }
        if let Some(inner) = rest.strip_prefix("<<") {
            let Some(end) = within(inner).find(">>") else {
                // A macro of several lines.
                self.in_macro = within(inner).len() == inner.len();
                self.notes.add(MACROS, self.line);
                return if self.in_macro { rest.len() } else { 0 };
            };
            let length = end + 4;
            let name_end = inner
                .find(|c: char| !c.is_alphanumeric() && !"-_/=".contains(c))
                .unwrap_or(end)
                .min(end);
            return self.call(&inner[..name_end], &inner[name_end..end], length, out);
        }
        if rest.starts_with('(') {
            return self.harlowe(rest, out);
        }
        if let Some(inner) = rest.strip_prefix('<') {
            let is_tag = inner.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/');
            return within(rest).find('>').filter(|_| is_tag).map_or(0, |end| {
                let is_image = inner.starts_with("img");
                self.notes
                    .add(if is_image { IMAGES } else { TAGS }, self.line);
                end + 1
            });
        }
        for mark in ["''", "//"] {
            // `//` of an address is none.
            if rest.starts_with(mark) && !out.ends_with(':') {
                self.notes.add(TAGS, self.line);
                return mark.len();
            }
        }
        if rest.starts_with(']') && self.n_hooks > 0 {
            self.n_hooks -= 1;
            return 1;
        }
        // A line that SugarCube joins with the next.
        usize::from(rest == "\\")
    }

    /// The link whose `[[` is behind us: `text|target`, `text->target`, `target<-text`, `target`, and SugarCube's
    /// `text|target][$x to 1`.
    fn link(&mut self, inner: &str, out: &mut String) -> Option<usize> {
        let end = within(inner).find("]]")?;
        let link = inner[..end].split("][").next().unwrap_or("");
        let (label, target) = if let Some((target, label)) = link.split_once("<-") {
            (label, target)
        } else if let Some((label, target)) = link.rsplit_once("->") {
            (label, target)
        } else {
            link.split_once('|').unwrap_or((link, link))
        };
        let label = html::unescape(label.trim());
        out.push_str(&label);
        self.read.targets.push(target.trim().to_owned());
        if !label.is_empty() {
            self.options.push(label);
        }
        Some(end + 2)
    }

    /// A macro of SugarCube or Harlowe with its arguments.
    fn call(&mut self, name: &str, arguments: &str, length: usize, out: &mut String) -> usize {
        self.notes.add(MACROS, self.line);
        let texts = quoted(arguments);
        if LINKS.contains(&name) || name == "choice" {
            if let Some(inner) = arguments.trim_start().strip_prefix("[[") {
                self.link(inner, out);
            } else if let Some(label) = texts.first() {
                out.push_str(label);
                self.options.push((*label).to_owned());
                if let Some(target) = texts.get(1) {
                    self.read.targets.push((*target).to_owned());
                }
            }
        } else if ["goto", "go-to", "include", "display"].contains(&name) {
            self.read
                .targets
                .extend(texts.first().map(|target| (*target).to_owned()));
        } else if ["print", "=", "-"].contains(&name) {
            let variable = arguments.trim();
            if variable.starts_with('$') {
                out.push_str(variable);
            }
        }
        length
    }

    /// `(name: arguments)` of Harlowe.
    fn harlowe(&mut self, rest: &str, out: &mut String) -> usize {
        let Some(colon) = rest.bytes().take(24).position(|b| b == b':') else {
            return 0;
        };
        let name = &rest[1..colon];
        if !HARLOWE.contains(&name) {
            return 0;
        }
        let mut depth = 0;
        let mut quote = None;
        for (at, c) in within(rest).char_indices() {
            match (quote, c) {
                (None, '"' | '\'') => quote = Some(c),
                (Some(open), c) if c == open => quote = None,
                (None, '(') => depth += 1,
                (None, ')') => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                let length = self.call(name, &rest[colon + 1..at], at + 1, out);
                let behind = rest[length..].trim_start();
                let is_hook = behind.starts_with('[')
                    && (!behind.starts_with("[[") || behind.starts_with("[[["));
                self.n_hooks += usize::from(is_hook);
                return if is_hook {
                    rest.len() - behind.len() + 1
                } else {
                    length
                };
            }
        }
        0
    }
}

/// A line that is a modifier of Chapbook: `[if ready]`, `[continue]`.
fn is_modifier(line: &str) -> bool {
    let inner = line
        .trim()
        .strip_prefix('[')
        .and_then(|inner| inner.strip_suffix(']'));
    let word = inner.unwrap_or("").split([' ', ';']).next().unwrap_or("");
    [
        "if",
        "unless",
        "else",
        "continue",
        "cont",
        "after",
        "align",
        "note",
        "JavaScript",
        "CSS",
    ]
    .contains(&word)
}

/// The beginning of a text, in which a link, tag or macro must end.
fn within(text: &str) -> &str {
    let end = text
        .char_indices()
        .nth(LONGEST)
        .map_or(text.len(), |(at, _)| at);
    &text[..end]
}

/// The texts in quotes.
fn quoted(arguments: &str) -> Vec<&str> {
    let mut texts = Vec::new();
    let mut rest = arguments;
    while let Some(at) = rest.find(['"', '\'']) {
        let quote = &rest[at..=at];
        let Some((text, behind)) = rest[at + 1..].split_once(quote) else {
            break;
        };
        texts.push(text);
        rest = behind;
    }
    texts
}

/// Variables that a story sets to a text: `<<set $name to "Sam">>`, `(set: $name to "Sam")`; the first counts.
pub(crate) fn defaults(body: &str, variables: &mut HashMap<String, String>) {
    let mut rest = body;
    while let Some(at) = rest.find("set") {
        rest = &rest[at + 3..];
        let assignment = rest.trim_start_matches([':', ' ']);
        let Some(name) = assignment.strip_prefix('$') else {
            continue;
        };
        let end = variable_length(name);
        let (name, value) = name.split_at(end);
        let value = value.trim_start();
        let value = value
            .strip_prefix("to ")
            .or_else(|| value.strip_prefix('='));
        let Some(value) = value.map(str::trim_start) else {
            continue;
        };
        if let Some(text) = value
            .starts_with(['"', '\''])
            .then(|| quoted(within(value)))
            .and_then(|t| t.first().copied())
        {
            variables
                .entry(name.to_owned())
                .or_insert_with(|| text.to_owned());
        }
    }
}

fn variable_length(text: &str) -> usize {
    let end = text
        .find(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != '.')
        .unwrap_or(text.len());
    text[..end].trim_end_matches('.').len()
}

/// Puts the known values in for `$name`; says how many were, and whether others are left.
fn put_defaults(text: &str, variables: &HashMap<String, String>) -> (String, usize, bool) {
    let mut out = String::with_capacity(text.len());
    let (mut n_defaults, mut has_variables) = (0, false);
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let end = variable_length(rest);
        let name = &rest[..end];
        // `$5` is a sum of money.
        if !name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') {
            out.push('$');
            continue;
        }
        match variables.get(name) {
            Some(value) => {
                n_defaults += 1;
                out.push_str(value);
            }
            None => {
                has_variables = true;
                out.push_str(&format!("${name}|"));
            }
        }
        rest = &rest[end..];
    }
    out.push_str(rest);
    (out, n_defaults, has_variables)
}
