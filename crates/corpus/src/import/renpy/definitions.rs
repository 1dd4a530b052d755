//! Who the variables of a Ren'Py game stand for, and what texts they begin with.

use std::collections::HashMap;

use super::lexer;
use super::markup;
use crate::import::name;
use crate::import::scenes::Voice;

/// The calls that make a character.
const CHARACTERS: [&str; 5] = [
    "Character(",
    "DynamicCharacter(",
    "ADVCharacter(",
    "NVLCharacter(",
    "DynamicNVLCharacter(",
];
/// Speakers that Ren'Py brings along and that have no name.
const NARRATORS: [&str; 3] = ["narrator", "centered", "vcentered"];

/// Who says a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Speaker {
    Narrator,
    Voice(Voice),
}

/// Characters and texts by their variables, over all files of a game.
#[derive(Debug, Default)]
pub(crate) struct Definitions {
    speakers: HashMap<String, Speaker>,
    texts: HashMap<String, String>,
}

impl Definitions {
    /// Takes what a statement defines, if it defines a character or a text; the first definition of a text counts.
    pub fn take(&mut self, statement: &str) {
        let Some((variable, value)) = assignment(statement) else {
            return;
        };
        let call = CHARACTERS.iter().find_map(|call| value.strip_prefix(call));
        if let Some(arguments) = call {
            let speaker = speaker(
                variable,
                arguments.trim_start(),
                value.starts_with("Dynamic"),
            );
            self.speakers.insert(variable.to_owned(), speaker);
        } else if let Some((text, rest)) = translatable(value)
            && rest.trim().is_empty()
        {
            self.texts.entry(variable.to_owned()).or_insert(text);
        }
    }

    pub fn speaker(&self, variable: &str) -> Option<&Speaker> {
        match self.speakers.get(variable) {
            None if NARRATORS.contains(&variable) => Some(&Speaker::Narrator),
            known => known,
        }
    }

    /// The text that a variable has at the beginning.
    pub fn text(&self, variable: &str) -> Option<&str> {
        self.texts.get(variable).map(String::as_str)
    }
}

/// Variable and value of `define e = ...`, `default e = ...`, `$ e = ...` or `e = ...` in Python.
fn assignment(statement: &str) -> Option<(&str, &str)> {
    let (before, value) = statement.split_once('=')?;
    let is_comparison =
        value.starts_with('=') || before.ends_with(['!', '<', '>', '+', '-', '*', '/']);
    let before = before.trim();
    let before = ["define", "default", "$"]
        .iter()
        .find_map(|word| {
            before
                .strip_prefix(word)
                .filter(|rest| rest.starts_with(' '))
        })
        .unwrap_or(before);
    // A priority may stand in front: `define -1 e = ...`.
    let variable = before.split_whitespace().next_back()?;
    let is_name = variable
        .chars()
        .all(|c| c.is_alphanumeric() || c == '_' || c == '.');
    (is_name && !is_comparison).then_some((variable, value.trim()))
}

/// A text, or `_("text")`.
fn translatable(value: &str) -> Option<(String, &str)> {
    let marked = value
        .strip_prefix("_(")
        .or_else(|| value.strip_prefix("__("));
    match marked {
        Some(marked) => {
            let (text, rest) = lexer::literal(marked.trim_start())?;
            Some((text, rest.trim_start().strip_prefix(')')?))
        }
        None => lexer::literal(value),
    }
}

/// The speaker that `Character(arguments` makes.
fn speaker(variable: &str, arguments: &str, is_dynamic: bool) -> Speaker {
    let unnamed = Speaker::Voice(Voice {
        id: variable.to_owned(),
        name: None,
    });
    let named = arguments.strip_prefix("name").map(|rest| rest.trim_start());
    let arguments = named
        .and_then(|rest| rest.strip_prefix('='))
        .map_or(arguments, str::trim_start);
    if arguments.starts_with("None") || arguments.starts_with(')') || arguments.starts_with("kind")
    {
        return Speaker::Narrator;
    }
    let Some((literal, _)) = translatable(arguments) else {
        return unnamed;
    };
    let shown = markup::plain(&literal);
    if is_dynamic || shown.contains('[') {
        return unnamed;
    }
    if shown.is_empty() {
        return Speaker::Narrator;
    }
    let has_letters = shown.chars().any(char::is_alphanumeric);
    Speaker::Voice(Voice {
        id: if has_letters {
            name::id(&shown)
        } else {
            variable.to_owned()
        },
        name: Some(shown),
    })
}
