//! Logical lines of a Ren'Py script: comments gone, quotes and brackets that reach over lines joined.

use std::borrow::Cow;

use crate::import::scenes::Fault;

/// A statement: its indentation in characters, its text without it, and the line where it begins.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Logical {
    pub indent: usize,
    pub text: String,
    pub number: usize,
}

/// The statements of a script.
///
/// # Errors
/// A quote or bracket that is never closed, with the line where it opens.
pub(crate) fn logical_lines(text: &str) -> Result<Vec<Logical>, Fault> {
    let mut lines = Vec::new();
    let mut rest = text;
    let mut number = 1;
    while !rest.is_empty() {
        let (statement, n_bytes) = Statement::read(rest, number)?;
        let consumed = &rest[..n_bytes];
        if !statement.trim().is_empty() {
            let indent = consumed
                .chars()
                .take_while(|c| *c == ' ' || *c == '\t')
                .count();
            lines.push(Logical {
                indent,
                text: statement.trim().to_owned(),
                number,
            });
        }
        number += consumed.matches('\n').count();
        rest = &rest[n_bytes..];
    }
    Ok(lines)
}

struct Statement {
    text: String,
    /// Open brackets, with the line of the outermost.
    depth: usize,
    opened: usize,
}

impl Statement {
    /// Reads up to the line feed that ends a statement; gives its text and its bytes.
    fn read(text: &str, first: usize) -> Result<(String, usize), Fault> {
        let mut statement = Statement {
            text: String::new(),
            depth: 0,
            opened: first,
        };
        let mut at = 0;
        let mut number = first;
        while let Some(c) = text[at..].chars().next() {
            match c {
                '\n' => {
                    number += 1;
                    at += 1;
                    if statement.depth == 0 {
                        return Ok((statement.text, at));
                    }
                    statement.text.push(' ');
                }
                '#' => at += text[at..].find('\n').unwrap_or(text.len() - at),
                '\\' if text[at + 1..].starts_with('\n') => {
                    number += 1;
                    at += 2;
                }
                '"' | '\'' | '`' => {
                    let Some(length) = literal_length(&text[at..]) else {
                        return Err(Fault::new(number, "a quote opens here and is never closed"));
                    };
                    let literal = &text[at..at + length];
                    statement.text.push_str(literal);
                    number += literal.matches('\n').count();
                    at += length;
                }
                _ => {
                    statement.bracket(c, number);
                    statement.text.push(c);
                    at += c.len_utf8();
                }
            }
        }
        match statement.depth {
            0 => Ok((statement.text, at)),
            _ => Err(Fault::new(
                statement.opened,
                "a bracket opens here and is never closed",
            )),
        }
    }

    fn bracket(&mut self, c: char, number: usize) {
        match c {
            '(' | '[' | '{' => {
                if self.depth == 0 {
                    self.opened = number;
                }
                self.depth += 1;
            }
            ')' | ']' | '}' => self.depth = self.depth.saturating_sub(1),
            _ => {}
        }
    }
}

/// Bytes of the string literal at the beginning of a text, quotes included.
fn literal_length(text: &str) -> Option<usize> {
    let quote = text.chars().next()?;
    let triple: String = std::iter::repeat_n(quote, 3).collect();
    let end = if text.starts_with(&triple) {
        triple
    } else {
        quote.to_string()
    };
    let mut at = end.len();
    loop {
        let next = at + text[at..].find(['\\', quote])?;
        if text[next..].starts_with('\\') {
            at = next + 1;
            at += text[at..].chars().next()?.len_utf8();
        } else if text[next..].starts_with(&end) {
            return Some(next + end.len());
        } else {
            at = next + quote.len_utf8();
        }
    }
}

/// The inner text of the string literal at the beginning of a text, escapes as they stand, and what follows it.
pub(crate) fn literal(text: &str) -> Option<(String, &str)> {
    if !text.starts_with(['"', '\'', '`']) {
        return None;
    }
    let length = literal_length(text)?;
    let n_quotes = if length >= 6 && text[1..].starts_with(&text[..1].repeat(2)) {
        3
    } else {
        1
    };
    let inner = &text[n_quotes..length - n_quotes];
    // Only three quotes make several lines of one statement.
    let inner = match n_quotes {
        1 => single_blanks(inner),
        _ => inner.to_owned(),
    };
    Some((inner, &text[length..]))
}

/// Every run of white space as one blank.
fn single_blanks(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_whitespace() {
            true if out.ends_with(' ') => {}
            true => out.push(' '),
            false => out.push(c),
        }
    }
    out
}

/// The lines that a literal shows: its paragraphs, which empty lines part, each with single blanks.
pub(crate) fn paragraphs(literal: &str) -> Vec<Cow<'_, str>> {
    if !literal.contains('\n') {
        return vec![Cow::Borrowed(literal)];
    }
    let mut paragraphs = vec![String::new()];
    for line in literal.lines() {
        match line.trim() {
            "" => paragraphs.push(String::new()),
            line => {
                if let Some(last) = paragraphs.last_mut() {
                    if !last.is_empty() {
                        last.push(' ');
                    }
                    last.push_str(line);
                }
            }
        }
    }
    let filled = paragraphs.into_iter().filter(|p| !p.is_empty());
    filled.map(Cow::Owned).collect()
}
