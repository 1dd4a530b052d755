//! The units of splitting of a plain story: every scene, voice line and page is one.

use std::collections::HashSet;

use crate::character::Character;
use crate::error::Result;
use crate::language::Language;
use crate::scene::{LineKind, Story};
use crate::split::{self, Split, SplitOptions, Splitter, Unit};

/// Splits a story.
pub(crate) fn split(story: &Story, character: &Character, options: SplitOptions) -> Split {
    let mut splitter = Splitter::new(units(story, character));
    for language in Language::ALL {
        let scenes = story.scenes.iter().enumerate().flat_map(|(idx, scene)| {
            scene
                .lines
                .iter()
                .filter_map(move |line| Some((idx, line.text.get(language)?.trim())))
        });
        let texts = story.texts.iter().enumerate().filter_map(|(idx, text)| {
            Some((story.scenes.len() + idx, text.text.get(language)?.trim()))
        });
        splitter.tie(scenes.chain(texts));
    }
    splitter.finish(
        options,
        story.sha256.clone(),
        character.origin.sha256.clone(),
    )
}

/// # Errors
/// A text of twelve characters or more stands on both sides.
pub(crate) fn guard(story: &Story, split: &Split) -> Result<()> {
    for language in Language::ALL {
        let scenes = story.scenes.iter().flat_map(|scene| {
            scene
                .lines
                .iter()
                .filter_map(move |line| Some((scene.id.as_str(), line.text.get(language)?.trim())))
        });
        let texts = story
            .texts
            .iter()
            .filter_map(|text| Some((text.id.as_str(), text.text.get(language)?.trim())));
        split::guard(split, language, scenes.chain(texts))?;
    }
    Ok(())
}

fn units(story: &Story, character: &Character) -> Vec<Unit> {
    let own: HashSet<&str> = character
        .story
        .speaker_ids
        .iter()
        .map(String::as_str)
        .collect();
    let scenes = story.scenes.iter().map(|scene| Unit {
        id: scene.id.clone(),
        stratum: format!("{}/{}", scene.campaign, scene.scenario),
        n_own_lines: scene
            .lines
            .iter()
            .filter(|l| l.kind == LineKind::Dialogue && own.contains(l.speaker_id.as_str()))
            .count(),
        n_lines: scene.lines.len(),
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
            n_own_lines: usize::from(is_own),
            n_lines: 1,
        }
    });
    scenes.chain(texts).collect()
}
