//! The units of splitting of a plain story: every scene, voice line and page is one.

use std::collections::HashSet;

use rayon::prelude::*;

use crate::character::Character;
use crate::error::Result;
use crate::language::Language;
use crate::scene::{LineKind, Story};
use crate::split::{self, Split, SplitOptions, Splitter, Unit};

/// Splits a story.
pub(crate) fn split(story: &Story, character: &Character, options: SplitOptions) -> Split {
    let mut splitter = Splitter::new(units(story, character));
    let ties: Vec<_> = Language::ALL
        .par_iter()
        .map(|language| split::ties(&texts(story, *language)))
        .collect();
    splitter.tie(ties.into_iter().flatten());
    let mut split = splitter.finish(
        options,
        story.sha256.clone(),
        character.origin.sha256.clone(),
    );
    let ids = ids(story);
    let copies: Vec<_> = Language::ALL
        .par_iter()
        .map(|language| split::copies(&split, *language, &ids, &texts(story, *language)))
        .collect();
    let copies = copies.into_iter().flatten().map(|place| ids[place]);
    split::set_aside(&mut split, copies);
    split
}

/// # Errors
/// A text of twelve characters or more stands on both sides.
pub(crate) fn guard(story: &Story, split: &Split) -> Result<()> {
    let ids = ids(story);
    Language::ALL
        .into_par_iter()
        .map(|language| split::guard(split, language, &ids, &texts(story, language)))
        .collect()
}

/// Ids of the units: first the scenes, then the texts.
fn ids(story: &Story) -> Vec<&str> {
    let scenes = story.scenes.iter().map(|s| s.id.as_str());
    scenes
        .chain(story.texts.iter().map(|t| t.id.as_str()))
        .collect()
}

/// (unit, text) of everything that a language has.
fn texts(story: &Story, language: Language) -> Vec<(usize, &str)> {
    let scenes = story.scenes.iter().enumerate().flat_map(|(idx, scene)| {
        let lines = scene.lines.iter();
        lines.filter_map(move |line| Some((idx, line.text.get(language)?.trim())))
    });
    let texts = story.texts.iter().enumerate().filter_map(|(idx, text)| {
        Some((story.scenes.len() + idx, text.text.get(language)?.trim()))
    });
    scenes.chain(texts).collect()
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
