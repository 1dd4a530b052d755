//! The character file: everything that is particular to one character or one game, so that none of it stands in code.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use files::outside;
use serde::{Deserialize, Deserializer};
use text::{Persona, PersonaProfile};

use crate::error::{Error, Result, shorten};
use crate::import::Form;
use crate::language::{ByLanguage, Language};
use text::near;

/// A character file (`characters/<name>.toml`), read and checked.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Character {
    /// Shown name by language; a language without one shows the English name, else the first.
    pub name: ByLanguage,
    /// Languages to build; all thirteen when absent.
    #[serde(default)]
    pub languages: Vec<Language>,
    /// System prompt of conversations by language; the shown name where absent, as the rules have it.
    #[serde(default)]
    pub system: ByLanguage,
    /// First line of a chat by language, for the chat page.
    #[serde(default)]
    pub greeting: ByLanguage,
    /// How replies are drawn where nobody says: the name of a profile, or its values.
    #[serde(default)]
    pub profile: Option<PersonaProfile>,
    /// Whose lines are the user's own.
    #[serde(default)]
    pub player: Player,
    /// What the source `story` needs to know.
    #[serde(default)]
    pub story: StoryRules,
    /// What the source `turn-based-game` needs to know.
    pub turn_based_game: Option<GameRules>,
    /// Where the file lies and what it holds, for messages and manifests.
    #[serde(skip)]
    pub origin: Origin,
}

/// Whose lines are shown as the user's own words, without parentheses.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Player {
    /// The player's shown name by language, instead of the name in the lines.
    #[serde(default)]
    pub name: ByLanguage,
    /// The speaker ids of the player in a `story`.
    #[serde(default)]
    pub speaker_ids: Vec<String>,
}

/// Rules of the source `story`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoryRules {
    /// The character's own speaker ids.
    #[serde(default)]
    pub speaker_ids: Vec<String>,
    /// Tags of the texts.
    #[serde(default)]
    pub markup: Markup,
    /// What a `$variable` of a line marked `variables: true` becomes; a text for all languages or one a language.
    #[serde(default)]
    pub variables: BTreeMap<String, Replacement>,
    /// Kinds of texts (or beginnings of kinds, ending in `*`) that no data set takes.
    #[serde(default)]
    pub skip_kinds: Vec<String>,
}

/// Markup of a `story`: which tags go and what stays of them.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Markup {
    /// `<tag ...>` and `</tag>` go, what they enclose stays.
    #[serde(default)]
    pub strip: Vec<String>,
    /// The tags go with all they enclose.
    #[serde(default)]
    pub remove: Vec<String>,
    /// `<tag>... text='X' ...</tag>` becomes X.
    #[serde(default)]
    pub text_attribute: Vec<String>,
}

/// A replacement text, the same for all languages or one for each.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum Replacement {
    /// The same in every language.
    All(String),
    /// One a language.
    Each(ByLanguage),
}

impl Replacement {
    /// The text in a language; `None` where it has none there.
    pub fn get(&self, language: Language) -> Option<&str> {
        match self {
            Replacement::All(text) => Some(text),
            Replacement::Each(texts) => texts.get(language),
        }
    }
}

/// Rules of the source `turn-based-game`: the ids and hashes of one game and of the character in it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GameRules {
    /// What `{NICKNAME}` becomes, by language.
    pub nickname: ByLanguage,
    /// Name hash of the player, never put in brackets.
    pub player_name_hash: Hash,
    /// The character's name hashes (faces), in the order in which their conversations come.
    pub name_hashes: Vec<Hash>,
    /// The character's avatar id, for voice lines.
    pub avatar_id: i64,
    /// The people of the character's part of the story, in the order in which their voices come.
    pub people: Vec<Person>,
    /// Further name hashes whose talks belong to the character's part of the story.
    #[serde(default)]
    pub further_name_hashes: Vec<Hash>,
    /// Mission numbers (`floor(MissionID / 10000)`) of the character's part of the story.
    pub mission_prefixes: Vec<i64>,
    /// Book worlds of the character's part of the story.
    pub book_worlds: Vec<i64>,
    /// Blocks of talk ids (`floor(id / 1000)`) that are grouped by the hundred.
    #[serde(default)]
    pub fine_talk_blocks: Vec<i64>,
    /// Literal replacements, made in this order after that of `{NICKNAME}`.
    #[serde(default)]
    pub replacements: Vec<Literal>,
}

/// A person of the game: avatar id and name hash.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Person {
    /// Id of the person as an avatar, which voice lines name.
    pub avatar_id: i64,
    /// Hash of the person's name, which lines of talks name.
    pub name_hash: Hash,
}

/// A literal replacement.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Literal {
    /// What is replaced, to the letter.
    pub from: String,
    /// What stands there instead.
    pub to: String,
}

/// A text hash, 0 to 2^64-1; TOML integers end at 2^63-1, so a text is taken as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Hash(pub u64);

impl<'de> Deserialize<'de> for Hash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Number(u64),
            Text(String),
        }
        match Written::deserialize(deserializer)? {
            Written::Number(n) => Ok(Hash(n)),
            Written::Text(text) => text.parse().map(Hash).map_err(|_| {
                serde::de::Error::custom(format!("`{text}` is not a number from 0 to 2^64-1"))
            }),
        }
    }
}

/// Where a character file lies, and its hash.
#[derive(Debug, Clone, Default)]
pub struct Origin {
    /// The file as it was named.
    pub path: PathBuf,
    /// File name without `.toml`.
    pub id: String,
    /// SHA-256 of its bytes, in hexadecimal digits.
    pub sha256: String,
}

impl Character {
    /// Reads and checks a character file.
    ///
    /// # Errors
    /// The file cannot be read, is a character card or not TOML, has an unknown key (the near miss is named) or a value out of range.
    pub fn load(path: &Path) -> Result<Character> {
        let bytes =
            outside::read(path, outside::MOST_SETTINGS_BYTES).map_err(|source| Error::Read {
                path: path.to_owned(),
                source,
            })?;
        let source = std::str::from_utf8(&bytes)
            .map_err(|error| Error::not_utf8(path, &bytes[..error.valid_up_to()]));
        let character = source.and_then(|source| Character::parse(source, path));
        // A card of another program is named for what it is.
        character.map_err(|error| match crate::import::recognise(path) {
            Some(card) if card.form == Form::Card => Error::Importable(card),
            _ => error,
        })
    }

    /// The same from a text already read; `path` only names it in messages.
    pub fn parse(source: &str, path: &Path) -> Result<Character> {
        let mut character: Character =
            toml::from_str(source).map_err(|error| toml_error(source, path, &error))?;
        let id = path
            .file_stem()
            .map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
        character.origin = Origin {
            path: path.to_owned(),
            id,
            sha256: files::sha256(source.as_bytes()),
        };
        character.check()?;
        Ok(character)
    }

    /// The shown name in a language.
    pub fn name_in(&self, language: Language) -> &str {
        self.name.get_or_any(language).unwrap_or_default()
    }

    /// The system prompt of a conversation in a language: the one of the file, else the shown name.
    pub fn system_in(&self, language: Language) -> &str {
        self.system
            .get(language)
            .unwrap_or_else(|| self.name_in(language))
    }

    /// What a model's folder carries of the character: words in every language that the file asks for, as conversations have them.
    pub fn persona(&self) -> Persona {
        let mut persona = Persona {
            profile: self.profile.clone(),
            ..Persona::default()
        };
        for language in self.languages() {
            let code = language.code().to_owned();
            persona
                .name
                .insert(code.clone(), self.name_in(language).to_owned());
            persona
                .system
                .insert(code.clone(), self.system_in(language).to_owned());
            if let Some(greeting) = self.greeting.get(language) {
                persona.greeting.insert(code, greeting.to_owned());
            }
        }
        persona
    }

    /// The languages that the file asks for, in the fixed order.
    pub fn languages(&self) -> Vec<Language> {
        Language::ALL
            .into_iter()
            .filter(|l| self.languages.is_empty() || self.languages.contains(l))
            .collect()
    }

    fn check(&self) -> Result<()> {
        let problem = |problem: &str| {
            Err(Error::CharacterValue {
                path: self.origin.path.clone(),
                problem: problem.to_owned(),
            })
        };
        if self.name.is_empty() || self.name.iter().any(|(_, name)| name.trim().is_empty()) {
            return problem(
                "[name] holds no name or an empty one; write one, for example en = \"Ada\"",
            );
        }
        if let Some(id) = self
            .player
            .speaker_ids
            .iter()
            .find(|id| self.story.speaker_ids.contains(id))
        {
            return problem(&format!(
                "speaker id `{id}` is both the character's and the player's; take it out of one list"
            ));
        }
        if let Some(game) = &self.turn_based_game {
            if game.name_hashes.is_empty() {
                return problem(
                    "[turn_based_game] name_hashes is empty; add the character's name hash",
                );
            }
            if game.nickname.is_empty() {
                return problem(
                    "[turn_based_game.nickname] is empty; add a name, for example en = \"Ada\"",
                );
            }
        }
        Ok(())
    }
}

/// Turns a TOML error into ours: line, column, and the near miss of an unknown key.
fn toml_error(source: &str, path: &Path, error: &toml::de::Error) -> Error {
    let start = error.span().map_or(0, |span| span.start.min(source.len()));
    let before = &source.as_bytes()[..start];
    let line = before.iter().filter(|b| **b == b'\n').count() + 1;
    let column = String::from_utf8_lossy(before.rsplit(|b| *b == b'\n').next().unwrap_or(before))
        .chars()
        .count()
        + 1;
    let message = error.message();
    // serde words it: unknown field `x`, expected one of `a`, `b`
    let mut quoted = message.split('`').skip(1).step_by(2);
    let known: Vec<&str>;
    match quoted.next() {
        Some(key)
            if message.starts_with("unknown field") || message.starts_with("unknown variant") =>
        {
            known = quoted.collect();
            Error::UnknownKey {
                path: path.to_owned(),
                line,
                column,
                key: shorten(key, 40),
                near: near::hint(key, known.iter().copied()),
                known: known.join(", "),
            }
        }
        _ => Error::Character {
            path: path.to_owned(),
            line,
            column,
            problem: shorten(message, 200),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(source: &str) -> Result<Character> {
        Character::parse(source, Path::new("ada.toml"))
    }

    #[test]
    fn unknown_key_names_line_and_near_miss() {
        let error = parse("[name]\nen = \"Ada\"\n[player]\nspeaker_idz = [\"p\"]\n").unwrap_err();
        assert_eq!(
            error.to_string(),
            "ada.toml:4:1: unknown key `speaker_idz` (known here: name, speaker_ids); did you mean `speaker_ids`?"
        );
    }

    #[test]
    fn unknown_language_is_refused() {
        let error = parse("[name]\nenn = \"Ada\"\n").unwrap_err().to_string();
        assert!(
            error.contains("unknown key `enn`") && error.ends_with("did you mean `en`?"),
            "{error}"
        );
    }

    #[test]
    fn hash_beyond_i64_is_read_from_text() {
        let hash: BTreeMap<String, Hash> =
            toml::from_str("a = \"18446744073709551615\"\nb = 7").unwrap();
        assert_eq!(hash["a"], Hash(u64::MAX));
        assert_eq!(hash["b"], Hash(7));
    }

    #[test]
    fn system_prompt_defaults_to_the_name() {
        let ada = parse("[name]\nen = \"Ada\"\njp = \"エイダ\"\n[system]\nen = \"You are Ada.\"\n")
            .unwrap();
        assert_eq!(ada.system_in(Language::En), "You are Ada.");
        assert_eq!(ada.system_in(Language::Jp), "エイダ");
        assert_eq!(ada.system_in(Language::Vi), "Ada");
        assert_eq!(ada.languages().len(), 13);
    }

    #[test]
    fn persona_has_the_words_of_every_language_that_is_built() {
        let ada = parse(
            "languages = [\"en\", \"jp\"]\nprofile = \"Legacy\"\n[name]\nen = \"Ada\"\n[system]\nen = \"You are Ada.\"\n[greeting]\njp = \"やあ\"\n",
        )
        .unwrap();
        let persona = ada.persona();
        let pairs = |map: &BTreeMap<String, String>| -> Vec<(String, String)> {
            map.clone().into_iter().collect()
        };
        let own = |pairs: &[(&str, &str)]| -> Vec<(String, String)> {
            let own = |(a, b): &(&str, &str)| ((*a).to_owned(), (*b).to_owned());
            pairs.iter().map(own).collect()
        };
        assert_eq!(pairs(&persona.name), own(&[("en", "Ada"), ("jp", "Ada")]));
        assert_eq!(
            pairs(&persona.system),
            own(&[("en", "You are Ada."), ("jp", "Ada")])
        );
        assert_eq!(pairs(&persona.greeting), own(&[("jp", "やあ")]));
        assert_eq!(
            persona.profile,
            Some(PersonaProfile::Named("Legacy".into()))
        );
        assert!(persona.note.is_empty());
    }

    #[test]
    fn profile_is_a_name_or_values_and_a_misspelt_key_is_named() {
        let ada = parse("[name]\nen = \"Ada\"\n[profile]\ntemperature = 0.3\ntop_k = 8\n").unwrap();
        let values = text::ProfileValues {
            temperature: Some(0.3),
            top_k: Some(8),
            ..text::ProfileValues::default()
        };
        assert_eq!(ada.profile, Some(PersonaProfile::Values(values)));
        let error = parse("[name]\nen = \"Ada\"\n[profile]\ntemprature = 0.3\n").unwrap_err();
        assert_eq!(
            error.to_string(),
            "ada.toml:4:1: unknown key `temprature` (known here: temperature, top_p, top_k, presence_penalty); did you mean `temperature`?"
        );
        let error = parse("profile = 3\n[name]\nen = \"Ada\"\n")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("the name of a profile, or a table"),
            "{error}"
        );
    }

    /// Found by the fuzz target `character`: every language without a name of its own showed nothing.
    #[test]
    fn empty_name_is_refused() {
        let error = parse("[name]\nen = \" \"\njp = \"エイダ\"\n").unwrap_err();
        assert!(error.to_string().contains("an empty one"), "{error}");
    }

    #[test]
    fn file_that_is_not_utf8_is_named_with_its_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ada.toml");
        std::fs::write(&path, b"[name]\nen = \"\xff\"\n").unwrap();
        let error = Character::load(&path).unwrap_err().to_string();
        assert!(error.ends_with("ada.toml:2:7: this byte is not UTF-8; save the file as UTF-8"));
    }

    #[test]
    fn speaker_cannot_be_character_and_player() {
        let error = parse(
            "[name]\nen = \"Ada\"\n[story]\nspeaker_ids = [\"x\"]\n[player]\nspeaker_ids = [\"x\"]\n",
        );
        assert!(
            error
                .unwrap_err()
                .to_string()
                .contains("both the character's and the player's")
        );
    }
}
