//! Ren'Py scripts: say statements and menus in the order of the file, labels as scenes.

mod definitions;
mod lexer;
mod markup;

use crate::language::{ByLanguage, Language};
use crate::scene::LineKind;

use super::name;
use super::scenes::{Fault, Gatherer, Imported, Notes, Voice};
pub(crate) use definitions::Definitions;
use definitions::Speaker;
use lexer::Logical;

const CONDITIONS: &str = "conditions and loops (every branch was kept, in the order of the file)";
const JUMPS: &str = "jumps and calls (labels were kept in the order of the file)";
const PYTHON: &str = "Python lines and blocks";
const SCREENS: &str = "blocks of screens, styles, images and animations";
const STAGING: &str = "statements for pictures, sound and timing";
const TRANSLATIONS: &str = "translation blocks";
const UNDEFINED: &str = "lines whose speaker no `define` names (the variable became the name)";
const UNKNOWN: &str = "statements that are not Ren'Py's own";

/// Statements whose block is no story.
const BLOCKS: [&str; 6] = [
    "screen",
    "style",
    "transform",
    "image",
    "layeredimage",
    "testcase",
];
/// Statements for what is seen and heard.
const STAGE: [&str; 15] = [
    "scene", "show", "hide", "with", "play", "stop", "queue", "voice", "pause", "window", "camera",
    "nvl", "at", "set", "rpy",
];

/// Who speaks in the files of one story.
///
/// # Errors
/// A quote or bracket that is never closed.
pub(crate) fn define(text: &str, definitions: &mut Definitions) -> Result<(), Fault> {
    for line in lexer::logical_lines(text)? {
        definitions.take(&line.text);
    }
    Ok(())
}

/// The scenes of one file.
///
/// # Errors
/// A quote or bracket that is never closed.
pub(crate) fn read(
    text: &str,
    definitions: &Definitions,
    language: Language,
) -> Result<Imported, Fault> {
    let mut reader = Reader {
        definitions,
        out: Gatherer::new(language),
        skipped: None,
    };
    for line in lexer::logical_lines(text)? {
        reader.statement(&line);
    }
    Ok(reader.out.finish())
}

struct Reader<'a> {
    definitions: &'a Definitions,
    out: Gatherer,
    /// Indentation of a block that is no story.
    skipped: Option<usize>,
}

impl Reader<'_> {
    fn statement(&mut self, line: &Logical) {
        if self.skipped.is_some_and(|indent| line.indent > indent) {
            return;
        }
        self.skipped = None;
        let text = line.text.as_str();
        let word = first_word(text);
        let opens_block = text.ends_with(':');
        match word {
            "label" => self.label(text),
            "menu" if opens_block => {}
            "if" | "elif" | "else" | "while" | "for" => self.out.notes.add(CONDITIONS, line.number),
            "jump" | "call" => self.out.notes.add(JUMPS, line.number),
            "return" | "pass" | "define" | "default" => {}
            "init" if !text.contains("python") => {}
            "$" | "init" | "python" => self.skip(PYTHON, line),
            "translate" => self.skip(TRANSLATIONS, line),
            _ if BLOCKS.contains(&word) => self.skip(SCREENS, line),
            "extend" => self.extend(line),
            _ if STAGE.contains(&word) => {
                if word == "scene" {
                    self.out.may_cut();
                }
                self.skip(STAGING, line);
            }
            _ => self.say(line),
        }
    }

    /// Passes over a statement and the block under it.
    fn skip(&mut self, what: &'static str, line: &Logical) {
        self.out.notes.add(what, line.number);
        self.skipped = Some(line.indent);
    }

    fn label(&mut self, text: &str) {
        let name = text["label".len()..].trim();
        let end = name.find(['(', ':', ' ']).unwrap_or(name.len());
        self.out.border(&name[..end]);
    }

    /// `"text"`, `"Name" "text"`, `e happy "text" with dissolve`, or `"choice" if condition:`.
    fn say(&mut self, line: &Logical) {
        let text = line.text.as_str();
        let Some(at) = text.find(['"', '\'', '`']) else {
            self.skip(UNKNOWN, line);
            return;
        };
        let who = text[..at].trim();
        let Some((first, rest)) = lexer::literal(&text[at..]) else {
            self.skip(UNKNOWN, line);
            return;
        };
        if who.is_empty() {
            if let Some((second, _)) = lexer::literal(rest.trim_start()) {
                let voice = name::voice(&markup::plain(&first));
                return self.speak(&Speaker::Voice(voice), &second, line.number);
            }
            if rest.trim_end().ends_with(':') {
                if rest.contains(" if ") {
                    self.out.notes.add(CONDITIONS, line.number);
                }
                return self.choice(&first, line.number);
            }
            return self.speak(&Speaker::Narrator, &first, line.number);
        }
        if !is_speaker(who) {
            self.skip(UNKNOWN, line);
            return;
        }
        let variable = first_word(who);
        match self.definitions.speaker(variable) {
            Some(speaker) => self.speak(&speaker.clone(), &first, line.number),
            None => {
                self.out.notes.add(UNDEFINED, line.number);
                self.speak(&Speaker::Voice(name::voice(variable)), &first, line.number);
            }
        }
    }

    fn speak(&mut self, speaker: &Speaker, literal: &str, number: usize) {
        for paragraph in lexer::paragraphs(literal) {
            let shown = self.shown(&paragraph, number);
            let voice: Option<&Voice> = match speaker {
                Speaker::Narrator => None,
                Speaker::Voice(voice) => Some(voice),
            };
            let kind = match voice {
                Some(_) => LineKind::Dialogue,
                None => LineKind::Narration,
            };
            let mut said = self.out.line(kind, voice, &shown.text);
            said.has_variables = shown.has_variables;
            self.out.push(said);
        }
    }

    fn choice(&mut self, literal: &str, number: usize) {
        let shown = self.shown(literal, number);
        let mut option = self.out.line(LineKind::Option, None, &shown.text);
        option.has_variables = shown.has_variables;
        self.out.push(option);
    }

    /// `extend "..."` goes on with the line before.
    fn extend(&mut self, line: &Logical) {
        let rest = line.text["extend".len()..].trim_start();
        let Some((literal, _)) = rest
            .find(['"', '\''])
            .and_then(|at| lexer::literal(&rest[at..]))
        else {
            return self.skip(UNKNOWN, line);
        };
        let shown = self.shown(&literal, line.number);
        // As it was written: the white space in front of an extension parts it from what it extends.
        let begins_apart = literal.starts_with(char::is_whitespace);
        let Some(last) = self.out.last() else {
            return self.out.notes.add(UNKNOWN, line.number);
        };
        let mut joined = ByLanguage::default();
        for (language, text) in last.text.iter() {
            let space = if begins_apart { " " } else { "" };
            joined.set(language, &format!("{text}{space}{}", shown.text.trim()));
        }
        last.text = joined;
        last.has_variables |= shown.has_variables;
    }

    fn shown(&mut self, literal: &str, number: usize) -> markup::Shown {
        let shown = markup::show(literal, self.definitions);
        self.out.notes.add_many(markup::TAGS, shown.n_tags, number);
        self.out
            .notes
            .add_many(Notes::DEFAULTS, shown.n_defaults, number);
        self.out
            .notes
            .add_many(Notes::VARIABLES, usize::from(shown.has_variables), number);
        shown
    }
}

/// The word at the beginning: letters, digits, `_` and `.`; `$` alone.
fn first_word(text: &str) -> &str {
    if text.starts_with('$') {
        return "$";
    }
    let end = text
        .find(|c: char| !c.is_alphanumeric() && c != '_' && c != '.')
        .unwrap_or(text.len());
    &text[..end]
}

/// A variable, and the attributes of its picture: `e happy -sad @ angry`.
fn is_speaker(who: &str) -> bool {
    let is_word = |word: &str| {
        let word = word.trim_start_matches(['-', '@']);
        word.chars()
            .all(|c| c.is_alphanumeric() || c == '_' || c == '.')
    };
    who.starts_with(|c: char| c.is_alphabetic() || c == '_') && who.split_whitespace().all(is_word)
}

#[cfg(test)]
mod tests;
