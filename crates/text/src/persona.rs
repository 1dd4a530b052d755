//! Who speaks: name, system prompt, greeting and sampling profile of a character, stored as `persona.json` beside the weights.
//!
//! It is made from a character file, written by training, kept by merge and export, and read by everything that talks, so that the
//! prompt which training showed is the prompt that is served.

use std::collections::BTreeMap;
use std::path::Path;

use files::outside;
use serde::de::value::MapAccessDeserializer;
use serde::{Deserialize, Deserializer, Serialize, de};

use crate::conversation::{Message, Role, strip};
use crate::error::{Error, Result};

/// A character as a model's folder carries it. Every map goes by language code (`en`, `chs`, ..).
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Persona {
    /// Shown name.
    #[serde(default)]
    pub name: BTreeMap<String, String>,
    /// System prompt, as in training.
    #[serde(default)]
    pub system: BTreeMap<String, String>,
    /// First line of a chat; the page and `chat` show it, and give it to the model as the character's first words.
    #[serde(default)]
    pub greeting: BTreeMap<String, String>,
    /// A plain sentence on what this model is.
    #[serde(default)]
    pub note: BTreeMap<String, String>,
    /// How replies are drawn where nobody says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<PersonaProfile>,
}

/// A sampling profile by its name, or its values.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum PersonaProfile {
    /// One of the program's own, such as `Adopted`.
    Named(String),
    /// Values of the character's own.
    Values(ProfileValues),
}

/// Sampling values; one that is absent has the value of the program's default profile.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProfileValues {
    /// Divides the logits; 0 takes the most likely token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// Share of the probability that the drawn tokens come from, 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    /// Tokens to draw from; 0 for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top_k: Option<u32>,
    /// Taken once from the logit of each token that the reply already has, -2 to 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub presence_penalty: Option<f32>,
}

/// Name of the persona's file.
const FILE: &str = "persona.json";

impl Persona {
    /// Reads `folder/persona.json`; `None` if there is none.
    ///
    /// # Errors
    /// The file is there and cannot be read, or holds something else.
    pub fn read(folder: &Path) -> Result<Option<Persona>> {
        let path = folder.join(FILE);
        let bytes = match outside::read(&path, outside::MOST_SETTINGS_BYTES) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(Error::ReadPersona { path, source }),
        };
        serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|source| Error::Persona { path, source })
    }

    /// Writes `folder/persona.json`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join(FILE);
        let json = serde_json::to_vec_pretty(self).map_err(|source| Error::Persona {
            path: path.clone(),
            source,
        })?;
        Ok(files::write(&path, &json)?)
    }

    /// This persona in a folder that has had another one: the note is on the weights, so it stays unless this one brings its own.
    pub fn in_place_of(mut self, before: Option<Persona>) -> Persona {
        if self.note.is_empty() {
            self.note = before.unwrap_or_default().note;
        }
        self
    }

    /// The same persona with the words of one language alone, where it has them.
    pub fn speaking(mut self, language: &str) -> Persona {
        for words in [
            &mut self.name,
            &mut self.system,
            &mut self.greeting,
            &mut self.note,
        ] {
            if words.contains_key(language) {
                words.retain(|code, _| code == language);
            }
        }
        self
    }

    /// The shown name in English, else in the first language that has one.
    pub fn shown_name(&self) -> Option<&str> {
        english(&self.name)
    }

    /// The system prompt that a conversation gets which brings none: the English one, else the first.
    pub fn system_prompt(&self) -> Option<&str> {
        english(&self.system)
    }

    /// The greeting in English, else in the first language that has one.
    pub fn greeting_line(&self) -> Option<&str> {
        english(&self.greeting)
    }

    /// The note in English, else in the first language that has one.
    pub fn shown_note(&self) -> Option<&str> {
        english(&self.note)
    }

    /// Puts the system prompt in front of messages that begin with no system message, or with one without text. A later one, such as a note
    /// that a front end puts behind the history, is part of what the user says (docs/conversation.md).
    pub fn lead(&self, messages: &mut Vec<Message>) {
        let mut opening = messages
            .iter()
            .take_while(|message| message.role == Role::System);
        let brings_one = opening.any(|message| !strip(&message.content).is_empty());
        if let (false, Some(system)) = (brings_one, self.system_prompt()) {
            messages.insert(0, Message::system(system));
        }
    }
}

impl<'de> Deserialize<'de> for PersonaProfile {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct NameOrValues;

        impl<'de> de::Visitor<'de> for NameOrValues {
            type Value = PersonaProfile;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("the name of a profile, or a table of sampling values")
            }

            fn visit_str<E: de::Error>(self, name: &str) -> std::result::Result<Self::Value, E> {
                Ok(PersonaProfile::Named(name.to_owned()))
            }

            fn visit_map<A: de::MapAccess<'de>>(
                self,
                map: A,
            ) -> std::result::Result<Self::Value, A::Error> {
                let values = ProfileValues::deserialize(MapAccessDeserializer::new(map))?;
                Ok(PersonaProfile::Values(values))
            }
        }

        // Not `untagged`, whose message names neither the misspelt key nor its place.
        deserializer.deserialize_any(NameOrValues)
    }
}

fn english(by_language: &BTreeMap<String, String>) -> Option<&str> {
    by_language
        .get("en")
        .or_else(|| by_language.values().next())
        .map(String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn persona(json: &str) -> serde_json::Result<Persona> {
        serde_json::from_str(json)
    }

    #[test]
    fn written_persona_is_read_back_and_a_folder_without_one_has_none() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Persona::read(folder.path()).unwrap(), None);
        for profile in [
            r#""Legacy""#,
            r#"{"temperature": 0.25, "top_k": 8}"#,
            "null",
        ] {
            let persona = persona(&format!(
                r#"{{"name": {{"en": "Bo"}}, "greeting": {{"jp": "やあ"}}, "profile": {profile}}}"#
            ))
            .unwrap();
            persona.write(folder.path()).unwrap();
            assert_eq!(Persona::read(folder.path()).unwrap(), Some(persona));
        }
    }

    #[test]
    fn misspelt_keys_are_named() {
        for (json, key) in [
            (r#"{"sistem": {}}"#, "`sistem`"),
            (r#"{"profile": {"temprature": 1}}"#, "`temprature`"),
        ] {
            let error = persona(json).unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
        let error = persona(r#"{"profile": 3}"#).unwrap_err().to_string();
        assert!(error.contains("the name of a profile"), "{error}");
    }

    #[test]
    fn damaged_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(FILE), "{").unwrap();
        let error = Persona::read(folder.path()).unwrap_err().to_string();
        assert!(error.contains("persona.json"), "{error}");
    }

    #[test]
    fn system_prompt_leads_only_where_the_messages_begin_with_none() {
        let bo = persona(r#"{"system": {"chs": "波", "en": "Bo"}}"#).unwrap();
        let mut messages = vec![Message::user("hello")];
        bo.lead(&mut messages);
        assert_eq!(messages, [Message::system("Bo"), Message::user("hello")]);
        let own = vec![Message::system("Be brief."), Message::user("hello")];
        let mut kept = own.clone();
        bo.lead(&mut kept);
        assert_eq!(kept, own);
        let note = Message::system("Stay in character.");
        let mut late = vec![Message::system(" "), Message::user("hello"), note];
        bo.lead(&mut late);
        assert_eq!(late[0], Message::system("Bo"));
        assert_eq!(late.len(), 4);
        let mut without = vec![Message::user("hello")];
        Persona::default().lead(&mut without);
        assert_eq!(without, [Message::user("hello")]);
    }

    #[test]
    fn persona_speaks_one_language_where_it_has_the_words() {
        let bo = persona(
            r#"{"system": {"chs": "波", "en": "Bo"}, "greeting": {"en": "Mind the step."}}"#,
        )
        .unwrap();
        let chs = bo.clone().speaking("chs");
        assert_eq!(chs.system_prompt(), Some("波"));
        assert_eq!(chs.greeting_line(), Some("Mind the step."));
        assert_eq!(bo.clone().speaking("vi"), bo);
    }

    #[test]
    fn note_on_the_weights_outlives_a_change_of_character() {
        let before = persona(r#"{"name": {"en": "Bo"}, "note": {"en": "small"}}"#).unwrap();
        let after = persona(r#"{"name": {"en": "Ada"}}"#).unwrap();
        let merged = after.in_place_of(Some(before));
        assert_eq!(merged.shown_name(), Some("Ada"));
        assert_eq!(merged.shown_note(), Some("small"));
    }
}
