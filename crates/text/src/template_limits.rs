//! What a chat template may do: it comes with somebody else's weights, and is a program.
//!
//! It runs on a thread of its own, with a stack that its source and its fuel cannot outgrow, and a panic in it is an error.

use std::collections::BTreeSet;
use std::fmt::{self, Write as _};
use std::io;

use minijinja::machinery::{Token, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::{ErrorKind, Value};

use crate::error::{Error, Result};

/// Longest source in bytes; those of known models have up to 30 KB. Each byte may nest once more, and takes some 2 KB of stack then.
const MOST_SOURCE_BYTES: usize = 64 << 10;

/// Work of one rendering by a template that is not ours: an instruction costs 1, and so do 64 bytes that are written or looked through. A
/// message takes some 150.
pub(crate) const FUEL: u64 = 1_000_000;

/// Longest text that one value is turned into, in bytes.
const MOST_VALUE_BYTES: usize = 64 << 20;

/// Widest indent of JSON, in blanks.
pub(crate) const MOST_INDENT: usize = 16;

/// Reserved, and taken as it is used.
const STACK_BYTES: usize = 512 << 20;

/// Runs the work of a template on a thread of its own.
///
/// # Errors
/// What the work gives; [`Error::TemplatePanicked`]; [`Error::TemplateThread`].
pub(crate) fn apart<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let thread = std::thread::Builder::new()
        .name("chat template".to_owned())
        .stack_size(STACK_BYTES);
    std::thread::scope(|scope| {
        let running = thread.spawn_scoped(scope, work);
        let running = running.map_err(|source| Error::TemplateThread { source })?;
        // An error here is a panic there.
        running.join().unwrap_or(Err(Error::TemplatePanicked))
    })
}

/// Refuses a source that no template needs.
///
/// # Errors
/// [`Error::TemplateTooLarge`]; [`Error::Template`] for what is no template; [`Error::TemplateNamespace`].
pub(crate) fn check_source(source: &str, syntax: &SyntaxConfig) -> Result<()> {
    if source.len() > MOST_SOURCE_BYTES {
        return Err(Error::TemplateTooLarge {
            n_bytes: source.len(),
            most: MOST_SOURCE_BYTES,
        });
    }
    let tokens = tokenize(source, false, syntax.clone());
    let tokens = tokens.map(|token| token.map(|(token, _)| token));
    let tokens = tokens.collect::<std::result::Result<Vec<_>, _>>();
    let tokens = tokens.map_err(|source| Error::Template { source })?;
    match misused_namespace(&tokens) {
        Some(name) => Err(Error::TemplateNamespace {
            name: name.to_owned(),
        }),
        None => Ok(()),
    }
}

/// A namespace that could come to stand in itself, and then is endless to whatever looks through it. Namespaces are the only values that
/// change, so none does where each is made by `{% set NAME = namespace(...) %}` and NAME is used for its attributes alone.
fn misused_namespace<'t>(tokens: &[Token<'t>]) -> Option<&'t str> {
    const MAKER: &str = "namespace";
    let is_attribute = |at: usize| at > 0 && matches!(tokens[at - 1], Token::Dot);
    let mut idents = Vec::new();
    for (at, token) in tokens.iter().enumerate() {
        if let Token::Ident(name) = token
            && !is_attribute(at)
        {
            idents.push((at, *name));
        }
    }
    // 1. where they are made
    let mut names = BTreeSet::new();
    for &(at, _) in idents.iter().filter(|(_, name)| *name == MAKER) {
        let before = at.checked_sub(4).map(|start| &tokens[start..at]);
        match (before, tokens.get(at + 1)) {
            (
                Some(
                    [
                        Token::BlockStart,
                        Token::Ident("set"),
                        Token::Ident(name),
                        Token::Assign,
                    ],
                ),
                Some(Token::ParenOpen),
            ) => names.insert(*name),
            _ => return Some(MAKER),
        };
    }
    // 2. where they are used: for an attribute, or as a name that gets a value
    let misused = idents.iter().find(|(at, name)| {
        let follows = tokens.get(at + 1);
        let is_fine = matches!(
            follows,
            Some(Token::Dot | Token::BracketOpen | Token::Assign)
        );
        names.contains(name) && !is_fine
    });
    misused.map(|(_, name)| *name)
}

/// The error of a template, in words of its own where it was stopped.
pub(crate) fn stopped(source: minijinja::Error) -> Error {
    match source.kind() {
        ErrorKind::OutOfFuel => Error::TemplateEndless,
        _ => Error::Template { source },
    }
}

/// What a value is shown as, up to the limit.
pub(crate) fn shown(value: &Value) -> std::result::Result<String, minijinja::Error> {
    let mut text = Bounded::default();
    match write!(text, "{value}") {
        Ok(()) => Ok(text.into_string()),
        Err(_) => Err(too_long()),
    }
}

fn too_long() -> minijinja::Error {
    let problem = format!(
        "a value would take more than {} MiB as text",
        MOST_VALUE_BYTES >> 20
    );
    minijinja::Error::new(ErrorKind::InvalidOperation, problem)
}

/// A text that refuses to grow beyond the limit of one value.
#[derive(Default)]
pub(crate) struct Bounded {
    bytes: Vec<u8>,
}

impl Bounded {
    pub fn into_string(self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }

    fn add(&mut self, bytes: &[u8]) -> bool {
        let fits = self.bytes.len() + bytes.len() <= MOST_VALUE_BYTES;
        if fits {
            self.bytes.extend_from_slice(bytes);
        }
        fits
    }
}

impl fmt::Write for Bounded {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        match self.add(text.as_bytes()) {
            true => Ok(()),
            false => Err(fmt::Error),
        }
    }
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.add(bytes) {
            true => Ok(bytes.len()),
            false => Err(io::Error::other(too_long())),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
