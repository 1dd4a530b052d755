//! Character cards (V1, V2, V3) to character files.

use serde_json::{Map, Value};

use crate::language::Language;

use super::chat_log::PLAYER;
use super::macros::{self, Names};
use super::name;
use super::png;
use super::scenes::{Fault, Notes};

/// What `{{user}}` becomes where nobody says otherwise: front ends show this name as well.
const USER: &str = "User";
/// Keywords of PNG chunks that hold a card, the newer form first.
const KEYWORDS: [&str; 2] = ["ccv3", "chara"];

const EXAMPLES: &str = "example dialogues (a character learns from the story)";
const GREETINGS: &str = "alternate greetings";
const LORE: &str = "entries of the lorebook";
const POST_HISTORY: &str = "instructions behind the history, or at a depth of it";
const ABOUT: &str = "notes, tags, versions and sources of the card";
const ASSETS: &str = "pictures and sounds";
const EXTENSIONS: &str = "settings of front ends (extensions)";
const USERS: &str = "times {{user}} became a name (--player NAME chooses it)";
const UNKNOWN: &str = "keys that no card has";

/// Keys of a card that become part of the character file.
const USED: [&str; 7] = [
    "name",
    "nickname",
    "description",
    "personality",
    "scenario",
    "first_mes",
    "system_prompt",
];

/// A character file made of a card.
#[derive(Debug)]
pub(crate) struct CharacterFile {
    pub name: String,
    pub toml: String,
    pub notes: Notes,
}

/// Whether an object is a card.
pub(crate) fn is_card(object: &Map<String, Value>) -> bool {
    let has = |key: &str| object.contains_key(key);
    let spec = object.get("spec").and_then(Value::as_str).unwrap_or("");
    spec.starts_with("chara_card_v")
        || has("name")
            && !has("mes")
            && (has("first_mes") || has("mes_example") || has("description") && has("personality"))
        || has("char_name") && (has("char_persona") || has("char_greeting"))
}

/// The JSON of the card that a PNG holds.
///
/// # Errors
/// A picture that is damaged or holds no card.
pub(crate) fn of_png(bytes: &[u8]) -> Result<String, Fault> {
    let text = png::text(bytes, &KEYWORDS).map_err(|problem| Fault::new(1, problem))?;
    let text = text.ok_or_else(|| {
        Fault::new(1, "this picture holds no character card (no tEXt chunk `ccv3` or `chara`); pictures lose it where pages convert them, take the file as its maker offers it")
    })?;
    let json = png::base64(&text).and_then(|bytes| String::from_utf8(bytes).ok());
    json.ok_or_else(|| {
        Fault::new(
            1,
            "the card in this picture is no base64 of UTF-8; it is damaged",
        )
    })
}

/// Reads a card. `player`: the name for `{{user}}`.
///
/// # Errors
/// Broken JSON, no card, or one without a name.
pub(crate) fn read(
    json: &str,
    language: Language,
    player: Option<&str>,
) -> Result<CharacterFile, Fault> {
    let object: Map<String, Value> = serde_json::from_str(json)
        .map_err(|error| Fault::new(error.line().max(1), super::json_problem(&error)))?;
    if !is_card(&object) {
        return Err(Fault::new(
            1,
            "this JSON is no character card (no `spec` and no `name` with `first_mes`)",
        ));
    }
    let card = Card::of(&object);
    let mut notes = Notes::default();
    card.note_rest(&mut notes);
    let name = card.text("name").trim();
    if name.is_empty() {
        return Err(Fault::new(1, "the card has no name; write one at `name`"));
    }
    let nickname = card.text("nickname").trim();
    let names = Names {
        character: if nickname.is_empty() { name } else { nickname },
        user: player.unwrap_or(USER),
    };
    let mut fill = |key: &str| {
        let filled = macros::fill(card.text(key).trim(), names);
        if player.is_none() {
            notes.add_many(USERS, filled.n_user, 1);
        }
        notes.add_many(Notes::MACROS, filled.n_unknown, 1);
        filled.text.trim().to_owned()
    };
    let labelled = |label: String, text: String| match (text.is_empty(), language) {
        // As front ends write it; what other languages would say is not known here.
        (false, Language::En) => format!("{label}: {text}"),
        _ => text,
    };
    let parts = [
        fill("system_prompt"),
        fill("description"),
        labelled(
            format!("{}'s personality", names.character),
            fill("personality"),
        ),
        labelled("Scenario".to_owned(), fill("scenario")),
    ];
    let parts: Vec<String> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    let greeting = fill("first_mes");
    let toml = write(&Written {
        language,
        name,
        system: &parts.join("\n\n"),
        greeting: &greeting,
        player,
    })?;
    Ok(CharacterFile {
        name: name.to_owned(),
        toml,
        notes,
    })
}

/// The keys of a card, wherever its version has them.
struct Card<'a> {
    data: &'a Map<String, Value>,
}

impl<'a> Card<'a> {
    fn of(object: &'a Map<String, Value>) -> Card<'a> {
        let data = object
            .get("data")
            .and_then(Value::as_object)
            .unwrap_or(object);
        Card { data }
    }

    /// A text; the empty one where there is none. Cards of 2022 have other names for some keys.
    fn text(&self, key: &str) -> &'a str {
        let old = match key {
            "name" => "char_name",
            "description" => "char_persona",
            "scenario" => "world_scenario",
            "first_mes" => "char_greeting",
            "mes_example" => "example_dialogue",
            _ => key,
        };
        let find = |key: &str| {
            self.data
                .get(key)
                .and_then(Value::as_str)
                .filter(|text| !text.trim().is_empty())
        };
        find(key).or_else(|| find(old)).unwrap_or_default()
    }

    /// Counts what has no place in a character file.
    fn note_rest(&self, notes: &mut Notes) {
        let list = |value: &Value| value.as_array().map_or(0, Vec::len);
        let filled = |value: &Value| match value {
            Value::Null => false,
            Value::String(text) => !text.trim().is_empty(),
            Value::Array(items) => !items.is_empty(),
            Value::Object(object) => !object.is_empty(),
            _ => true,
        };
        let examples = self.text("mes_example");
        let n_starts = examples
            .matches("<START>")
            .count()
            .max(usize::from(!examples.is_empty()));
        notes.add_many(EXAMPLES, n_starts, 1);
        for (key, value) in self.data.iter().filter(|(_, value)| filled(value)) {
            match key.as_str() {
                key if USED.contains(&key) => {}
                "mes_example" | "example_dialogue" | "spec" | "spec_version" | "data" => {}
                "char_name" | "char_persona" | "world_scenario" | "char_greeting" => {}
                "alternate_greetings" | "group_only_greetings" => {
                    notes.add_many(GREETINGS, list(value), 1)
                }
                "character_book" => {
                    notes.add_many(LORE, value.get("entries").map_or(1, entries), 1)
                }
                "post_history_instructions" => notes.add(POST_HISTORY, 1),
                "creator_notes"
                | "creator_notes_multilingual"
                | "tags"
                | "creator"
                | "character_version"
                | "source"
                | "creation_date"
                | "modification_date"
                | "create_date"
                | "creatorcomment"
                | "metadata" => {
                    notes.add(ABOUT, 1);
                }
                "assets" => notes.add_many(ASSETS, list(value), 1),
                "avatar" => notes.add(ASSETS, 1),
                "extensions" => {
                    let prompt = value
                        .pointer("/depth_prompt/prompt")
                        .and_then(Value::as_str)
                        .unwrap_or("");
                    notes.add_many(POST_HISTORY, usize::from(!prompt.trim().is_empty()), 1);
                    let n = value
                        .as_object()
                        .map_or(0, |o| o.keys().filter(|key| *key != "depth_prompt").count());
                    notes.add_many(EXTENSIONS, n, 1);
                }
                "chat" | "fav" | "talkativeness" => notes.add(EXTENSIONS, 1),
                _ => notes.add(UNKNOWN, 1),
            }
        }
    }
}

/// Entries of a lorebook: a list, or an object by number.
fn entries(value: &Value) -> usize {
    match value {
        Value::Array(items) => items.len(),
        Value::Object(object) => object.len(),
        _ => 1,
    }
}

struct Written<'a> {
    language: Language,
    name: &'a str,
    system: &'a str,
    greeting: &'a str,
    player: Option<&'a str>,
}

fn write(card: &Written<'_>) -> Result<String, Fault> {
    let by_language = |text: &str| {
        let mut table = toml::Table::new();
        table.insert(card.language.code().to_owned(), text.into());
        toml::Value::Table(table)
    };
    let ids = |id: &str| toml::Value::Array(vec![id.into()]);
    let mut file = toml::Table::new();
    file.insert("languages".to_owned(), ids(card.language.code()));
    file.insert("name".to_owned(), by_language(card.name));
    for (key, text) in [("system", card.system), ("greeting", card.greeting)] {
        if !text.is_empty() {
            file.insert(key.to_owned(), by_language(text));
        }
    }
    let mut player = toml::Table::new();
    // A character of this name would have the player's id.
    let id = name::id(card.name);
    if id != PLAYER {
        player.insert("speaker_ids".to_owned(), ids(PLAYER));
    }
    if let Some(name) = card.player {
        player.insert("name".to_owned(), by_language(name));
    }
    file.insert("player".to_owned(), toml::Value::Table(player));
    let mut story = toml::Table::new();
    story.insert("speaker_ids".to_owned(), ids(&id));
    file.insert("story".to_owned(), toml::Value::Table(story));
    toml::to_string_pretty(&file).map_err(|error| Fault::new(1, error.to_string()))
}

#[cfg(test)]
mod tests;
