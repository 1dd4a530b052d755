//! A look at a story before anything is built from it: whether it can be read, how much text it has, and whether the character speaks in it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::character::Character;
use crate::error::Result;
use crate::language::{ByLanguage, Language};
use crate::source::story::{self, StoryDocuments};
use crate::task::Task;

/// What a story holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Survey {
    /// Scenes, and texts outside them.
    pub n_scenes: usize,
    /// Bytes of text by language, of those that the character file asks for.
    pub text_bytes: BTreeMap<Language, u64>,
    /// Bytes of it that the character says.
    pub character_bytes: u64,
    /// Speaker ids of the character file, the player's among them, that speak nowhere.
    pub silent_ids: Vec<String>,
}

/// Reads a story of the source `story` as `build` would.
///
/// # Errors
/// Whatever is wrong with the story's files; a character who says nothing in it, with the ids that say most.
pub fn survey(root: &Path, character: &Character) -> Result<Survey> {
    let story = story::read(root)?;
    StoryDocuments::new(&story, character).check(Task::SftCyrene)?;
    let languages = character.languages();
    let ids = &character.story.speaker_ids;
    let mut survey = Survey {
        n_scenes: story.scenes.len() + story.texts.len(),
        text_bytes: BTreeMap::new(),
        character_bytes: 0,
        silent_ids: Vec::new(),
    };
    let mut speaking = BTreeSet::new();
    let mut count = |speaker: Option<&str>, text: &ByLanguage| {
        for language in &languages {
            let bytes = text.get(*language).map_or(0, str::len) as u64;
            *survey.text_bytes.entry(*language).or_default() += bytes;
            if speaker.is_some_and(|id| ids.iter().any(|own| own == id)) {
                survey.character_bytes += bytes;
            }
        }
    };
    for line in story.scenes.iter().flat_map(|scene| &scene.lines) {
        count(Some(&line.speaker_id), &line.text);
        speaking.insert(line.speaker_id.as_str());
    }
    for text in &story.texts {
        let speaker = text.speaker.as_ref().map(|speaker| speaker.id.as_str());
        count(speaker, &text.text);
        speaking.extend(speaker);
    }
    let named = ids.iter().chain(&character.player.speaker_ids);
    survey.silent_ids = named
        .filter(|id| !speaking.contains(id.as_str()))
        .cloned()
        .collect();
    Ok(survey)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STORY: &str = concat!(
        r#"{"campaign":"c","scene":"s1","lines":[{"kind":"dialogue","speaker_id":"bo","speaker_name":{"en":"Bo"},"text":{"en":"Hello","ja":"やあ"}},{"kind":"narration","text":{"en":"Rain."}}]}"#,
        "\n",
        r#"{"campaign":"c","kind":"voice","id":"v","speaker_id":"me","speaker_name":{"en":"Me"},"title":{"en":"T"},"text":{"en":"Yes"}}"#,
        "\n"
    );

    fn survey_for(speakers: &str) -> Result<Survey> {
        let folder = tempfile::tempdir().unwrap();
        let story = folder.path().join("story.jsonl");
        std::fs::write(&story, STORY).unwrap();
        let character = format!(
            "languages = [\"en\", \"ja\"]\n[name]\nen = \"Bo\"\n[player]\nspeaker_ids = [\"me\", \"nobody\"]\n[story]\nspeaker_ids = {speakers}\n"
        );
        survey(&story, &Character::parse(&character, Path::new("bo.toml"))?)
    }

    #[test]
    fn bytes_are_counted_by_language_and_silent_ids_are_named() {
        let survey = survey_for("[\"bo\", \"young bo\"]").unwrap();
        assert_eq!(survey.n_scenes, 2);
        assert_eq!(
            survey.text_bytes,
            [(Language::En, 5 + 5 + 3), (Language::Jp, 6)].into()
        );
        assert_eq!(survey.character_bytes, 5 + 6);
        assert_eq!(survey.silent_ids, ["young bo", "nobody"]);
    }

    #[test]
    fn character_who_never_speaks_is_told_who_does() {
        let error = survey_for("[\"Bo\"]").unwrap_err().to_string();
        assert!(error.contains("\"Bo\"") && error.contains("bo"), "{error}");
    }
}
