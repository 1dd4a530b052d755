//! The units of splitting of a plain story: every scene, voice line and page is one; a chapter is a mission.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use crate::character::Character;
use crate::error::Result;
use crate::language::Language;
use crate::manifest::SourceFiles;
use crate::rules::markup;
use crate::scene::{LineKind, Story};
use crate::split::{Split, SplitOptions};
use crate::splitter::{self, Origin, Splittable, Unit, UnitText};

/// Splits a story.
///
/// # Errors
/// A text of twelve characters or more stands on two sides.
pub(crate) fn split(story: &Story, character: &Character, options: SplitOptions) -> Result<Split> {
    let origin = Origin {
        source_sha256: story.sha256.clone(),
        source_files: source_files(story),
        character_sha256: character.origin.sha256.clone(),
        languages: character.languages(),
    };
    splitter::make(&StoryUnits::new(story, character), options, origin)
}

/// # Errors
/// The split is of another story, or a text of twelve characters or more stands on both sides.
pub(crate) fn guard(
    story: &Story,
    root: &Path,
    character: &Character,
    split: &Split,
) -> Result<()> {
    split.check_files(root, &source_files(story))?;
    splitter::guard(&StoryUnits::new(story, character), root, split, &[])
}

pub(crate) fn source_files(story: &Story) -> SourceFiles {
    SourceFiles::from([("story".to_owned(), story.sha256.clone())])
}

/// First the scenes, then the texts.
struct StoryUnits<'a> {
    story: &'a Story,
    character: &'a Character,
    units: Vec<Unit>,
}

impl Splittable for StoryUnits<'_> {
    fn units(&self) -> &[Unit] {
        &self.units
    }

    fn with_texts<R>(
        &self,
        language: Language,
        f: impl FnOnce(&[UnitText<'_>]) -> Result<R>,
    ) -> Result<R> {
        let story = self.story;
        let clean = |text, has_variables| self.clean(language, text, has_variables);
        let mut told: Vec<(usize, Cow<'_, str>)> = Vec::new();
        for (idx, scene) in story.scenes.iter().enumerate() {
            for line in &scene.lines {
                if let Some(text) = line.text.get(language) {
                    told.push((idx, clean(text, line.has_variables)));
                }
            }
        }
        for (idx, text) in story.texts.iter().enumerate() {
            if let Some(body) = text.text.get(language) {
                told.push((story.scenes.len() + idx, clean(body, false)));
            }
        }
        let texts = told.iter().map(|(unit, text)| UnitText::new(*unit, text));
        f(&texts.collect::<Vec<_>>())
    }
}

impl<'a> StoryUnits<'a> {
    fn new(story: &'a Story, character: &'a Character) -> StoryUnits<'a> {
        let own: HashSet<&str> = character
            .story
            .speaker_ids
            .iter()
            .map(String::as_str)
            .collect();
        let scenes = story.scenes.iter().map(|scene| {
            let chapter = format!("{}/{}", scene.campaign, scene.scenario);
            Unit {
                id: scene.id.clone(),
                stratum: chapter.clone(),
                mission: Some(chapter),
                n_own_lines: scene
                    .lines
                    .iter()
                    .filter(|l| l.kind == LineKind::Dialogue && own.contains(l.speaker_id.as_str()))
                    .count(),
                n_lines: scene.lines.len(),
            }
        });
        let texts = story.texts.iter().map(|text| {
            let is_own = text
                .speaker
                .as_ref()
                .is_some_and(|s| own.contains(s.id.as_str()));
            let kind = if text.is_voice() { "voice" } else { "page" };
            Unit {
                id: text.id.clone(),
                stratum: format!("{}/{kind}", text.campaign),
                mission: None,
                n_own_lines: usize::from(is_own),
                n_lines: 1,
            }
        });
        StoryUnits {
            story,
            character,
            units: scenes.chain(texts).collect(),
        }
    }

    /// A text as the data sets show it: a tag more or less makes no other text of it.
    fn clean<'t>(&self, language: Language, text: &'t str, has_variables: bool) -> Cow<'t, str> {
        let rules = &self.character.story;
        let text = markup::strip(&rules.markup, text, &mut BTreeMap::new());
        if !has_variables {
            return text;
        }
        // A line with a variable that has no value is in no data set.
        match markup::replace_variables(&rules.variables, language, &text) {
            Some(replaced) => Cow::Owned(replaced),
            None => text,
        }
    }
}
