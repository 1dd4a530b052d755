//! The units of splitting of a plain story: every scene, voice line and page is one; a chapter is a mission.

use std::collections::HashSet;

use crate::character::Character;
use crate::error::Result;
use crate::language::Language;
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
        character_sha256: character.origin.sha256.clone(),
        languages: character.languages(),
    };
    splitter::make(&StoryUnits::new(story, character), options, origin)
}

/// # Errors
/// A text of twelve characters or more stands on both sides.
pub(crate) fn guard(story: &Story, character: &Character, split: &Split) -> Result<()> {
    splitter::guard(&StoryUnits::new(story, character), split)
}

/// First the scenes, then the texts.
struct StoryUnits<'a> {
    story: &'a Story,
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
        let scenes = story.scenes.iter().enumerate().flat_map(|(idx, scene)| {
            let lines = scene.lines.iter();
            lines.filter_map(move |line| Some(UnitText::new(idx, line.text.get(language)?)))
        });
        let texts = story.texts.iter().enumerate().filter_map(|(idx, text)| {
            let place = story.scenes.len() + idx;
            Some(UnitText::new(place, text.text.get(language)?))
        });
        let texts: Vec<_> = scenes.chain(texts).collect();
        f(&texts)
    }
}

impl<'a> StoryUnits<'a> {
    fn new(story: &'a Story, character: &Character) -> StoryUnits<'a> {
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
            units: scenes.chain(texts).collect(),
        }
    }
}
