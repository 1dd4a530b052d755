//! Twine stories, as Twee source or as the published page: passages that follow each other alone are one scene.

mod markup;

use std::collections::HashMap;

use crate::language::Language;

use super::html;
use super::scenes::{Gatherer, Imported, Notes};
use markup::Piece;

/// Lines up to which passages are joined.
const JOINED_LINES: usize = 40;
/// Passages that hold settings.
const SETTINGS: [&str; 14] = [
    "StoryTitle",
    "StoryData",
    "StoryInit",
    "StoryCaption",
    "StoryMenu",
    "StoryInterface",
    "StoryBanner",
    "StorySubtitle",
    "StoryAuthor",
    "StoryShare",
    "PassageHeader",
    "PassageFooter",
    "PassageReady",
    "PassageDone",
];
/// Tags of passages that hold code.
const CODE: [&str; 6] = [
    "script",
    "stylesheet",
    "widget",
    "Twine.private",
    "Twine.image",
    "annotation",
];

const NO_STORY: &str = "passages of settings, scripts and styles";

/// A passage: its name, its lines, where its links lead.
#[derive(Debug)]
struct Passage {
    name: String,
    pieces: Vec<Piece>,
    targets: Vec<String>,
}

/// The scenes of Twee source.
pub(crate) fn read(text: &str, language: Language) -> Imported {
    let mut raw: Vec<(String, String, usize)> = Vec::new();
    for (at, line) in text.lines().enumerate() {
        if let Some(header) = line.strip_prefix("::") {
            raw.push((header.to_owned(), String::new(), at + 1));
        } else if let Some((_, body, _)) = raw.last_mut() {
            body.push_str(line);
            body.push('\n');
        }
    }
    let mut story = Story::default();
    for (header, body, line) in raw {
        let (name, tags) = header_parts(&header);
        story.take(&name, &tags, &body, line);
    }
    story.scenes(language)
}

/// The scenes of a published or archived page.
pub(crate) fn read_page(text: &str, language: Language) -> Imported {
    const OPEN: &str = "<tw-passagedata";
    let mut story = Story::default();
    let mut rest = text;
    let mut line = 1;
    while let Some(at) = rest.find(OPEN) {
        line += rest[..at].matches('\n').count();
        let element = &rest[at + OPEN.len()..];
        let close = element.find("</tw-passagedata>").unwrap_or(element.len());
        let element = &element[..close];
        if let Some((attributes, body)) = part_tag(element) {
            let name = attribute(attributes, "name").unwrap_or_default();
            let tags = attribute(attributes, "tags").unwrap_or_default();
            story.take(&name, &tags, &html::unescape(body), line);
        }
        line += element.matches('\n').count();
        rest = &rest[at + OPEN.len() + close..];
    }
    story.scenes(language)
}

/// Attributes and content of an element whose name is already behind us. A `>` in quotes ends no tag.
fn part_tag(element: &str) -> Option<(&str, &str)> {
    let mut quote = None;
    for (at, c) in element.char_indices() {
        match (quote, c) {
            (None, '"' | '\'') => quote = Some(c),
            (Some(open), c) if c == open => quote = None,
            (None, '>') => return Some((&element[..at], &element[at + 1..])),
            _ => {}
        }
    }
    None
}

fn attribute(attributes: &str, name: &str) -> Option<String> {
    let (_, rest) = attributes.split_once(&format!(" {name}="))?;
    let quote = rest.chars().next().filter(|c| *c == '"' || *c == '\'')?;
    let (value, _) = rest[1..].split_once(quote)?;
    Some(html::unescape(value))
}

/// Name and tags of ` Name [tags] {"position":"1,2"}`; `\[` and the like are the characters themselves.
fn header_parts(header: &str) -> (String, String) {
    let mut name = String::new();
    let mut chars = header.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => name.extend(chars.next()),
            '[' => {
                let tags = chars.as_str().split(']').next().unwrap_or("");
                return (name.trim().to_owned(), tags.to_owned());
            }
            '{' => break,
            c => name.push(c),
        }
    }
    (name.trim().to_owned(), String::new())
}

#[derive(Default)]
struct Story {
    passages: Vec<Passage>,
    notes: Notes,
    variables: HashMap<String, String>,
}

impl Story {
    fn take(&mut self, name: &str, tags: &str, body: &str, line: usize) {
        markup::defaults(body, &mut self.variables);
        let is_code = tags.split_whitespace().any(|tag| CODE.contains(&tag));
        if is_code || SETTINGS.contains(&name) {
            self.notes.add(NO_STORY, line);
            return;
        }
        let mut read = markup::read(body, line, &mut self.notes);
        read.targets.sort();
        read.targets.dedup();
        self.passages.push(Passage {
            name: name.to_owned(),
            pieces: read.pieces,
            targets: read.targets,
        });
    }

    /// Passages in their order; one that only the passage before leads to, and to which that leads alone, goes with it.
    fn scenes(self, language: Language) -> Imported {
        let places: HashMap<&str, usize> = self
            .passages
            .iter()
            .enumerate()
            .map(|(at, passage)| (passage.name.as_str(), at))
            .collect();
        let mut n_incoming = vec![0; self.passages.len()];
        let targets = |passage: &Passage| -> Vec<usize> {
            passage
                .targets
                .iter()
                .filter_map(|name| places.get(name.as_str()).copied())
                .collect()
        };
        for target in self.passages.iter().flat_map(targets) {
            n_incoming[target] += 1;
        }
        let next = |at: usize| match targets(&self.passages[at])[..] {
            [target]
                if n_incoming[target] == 1
                    && target != at
                    && self.passages[at].targets.len() == 1 =>
            {
                Some(target)
            }
            _ => None,
        };
        let mut follows = vec![false; self.passages.len()];
        for target in (0..self.passages.len()).filter_map(next) {
            follows[target] = true;
        }
        let mut out = Gatherer::new(language);
        let mut is_done = vec![false; self.passages.len()];
        // First what begins a chain, then what is left: rings.
        let starts = (0..self.passages.len()).filter(|at| !follows[*at]);
        for start in starts.chain(0..self.passages.len()) {
            let mut at = Some(start);
            let mut n_lines = 0;
            while let Some(here) = at.filter(|at| !is_done[*at]) {
                is_done[here] = true;
                let passage = &self.passages[here];
                if n_lines == 0 || n_lines + passage.pieces.len() > JOINED_LINES {
                    out.border(&passage.name);
                    n_lines = 0;
                }
                passage
                    .pieces
                    .iter()
                    .for_each(|piece| piece.give(&mut out, &self.variables));
                n_lines += passage.pieces.len();
                at = next(here);
            }
        }
        let mut imported = out.finish();
        let mut notes = self.notes;
        for kind in imported.notes.0.drain(..) {
            notes.add_many(kind.what, kind.count, kind.line);
        }
        imported.notes = notes;
        imported
    }
}

#[cfg(test)]
mod tests;
