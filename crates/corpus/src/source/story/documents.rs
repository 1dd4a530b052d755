//! The documents and conversations of a plain story: the rules of the game's data, for scenes that carry their texts.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};

use crate::character::Character;
use crate::dataset::DatasetWriter;
use crate::error::{Error, Result};
use crate::language::{ByLanguage, Language};
use crate::rules::conversation::{Limits, rounds};
use crate::rules::format::{self, Format};
use crate::rules::{CHARACTER_TOKENS, PIECE_TOKENS, Shown, markup, paragraph};
use crate::scene::{Line, LineKind, Scene, Story, Text};
use crate::task::Task;

/// A story with what the character file says about it.
pub(crate) struct StoryDocuments<'a> {
    story: &'a Story,
    character: &'a Character,
    own_ids: HashSet<&'a str>,
    player_ids: HashSet<&'a str>,
    /// Campaigns in which the character speaks.
    campaigns: HashSet<&'a str>,
    /// A speaker's names as they stand anywhere, for lines whose name lacks a translation.
    names: HashMap<&'a str, ByLanguage>,
}

/// A line as one language shows it.
struct ShownLine<'a> {
    line: &'a Line,
    name: Option<&'a str>,
    text: Cow<'a, str>,
}

/// Unknown markup, with how often it stands there.
pub(crate) type UnknownMarkup = BTreeMap<String, usize>;

impl<'a> StoryDocuments<'a> {
    pub fn new(story: &'a Story, character: &'a Character) -> StoryDocuments<'a> {
        let own_ids: HashSet<&str> = as_set(&character.story.speaker_ids);
        let mut campaigns = HashSet::new();
        let mut names: HashMap<&str, ByLanguage> = HashMap::new();
        for scene in &story.scenes {
            for line in &scene.lines {
                if line.kind == LineKind::Dialogue {
                    if own_ids.contains(line.speaker_id.as_str()) {
                        campaigns.insert(scene.campaign.as_str());
                    }
                    let known = names.entry(&line.speaker_id).or_default();
                    for (language, name) in line.speaker_name.iter() {
                        if known.get(language).is_none() {
                            known.set(language, name);
                        }
                    }
                }
            }
        }
        for text in &story.texts {
            if text
                .speaker
                .as_ref()
                .is_some_and(|s| own_ids.contains(s.id.as_str()))
            {
                campaigns.insert(text.campaign.as_str());
            }
        }
        StoryDocuments {
            story,
            character,
            own_ids,
            player_ids: as_set(&character.player.speaker_ids),
            campaigns,
            names,
        }
    }

    /// # Errors
    /// The task needs the game's source, or the character says nothing in this story.
    pub fn check(&self, task: Task) -> Result<()> {
        if task == Task::PtVendor {
            return Err(Error::TaskOfSource {
                task: task.to_string(),
                origin: "story",
                reason: "it reads a vendor folder; use --source turn-based-game".to_owned(),
            });
        }
        let needs_character = matches!(
            task,
            Task::PtAmphoreus | Task::SftAmphoreus | Task::SftCyrene
        );
        if needs_character && self.campaigns.is_empty() {
            return Err(Error::NoSuchSpeaker {
                character: self.character.origin.path.clone(),
                ids: format!("{:?}", self.character.story.speaker_ids),
                most: self.most_lines(),
            });
        }
        Ok(())
    }

    /// Writes all rows of a task in one language.
    pub fn write(
        &self,
        task: Task,
        language: Language,
        out: &mut DatasetWriter<'_>,
    ) -> Result<UnknownMarkup> {
        let mut unknown = UnknownMarkup::new();
        let all = matches!(task, Task::PtEverything | Task::SftEverything);
        let takes = |campaign: &str| all || self.campaigns.contains(campaign);
        for scene in self.story.scenes.iter().filter(|s| takes(&s.campaign)) {
            match task {
                Task::SftCyrene => self.own_conversation(language, scene, out, &mut unknown)?,
                Task::SftAmphoreus | Task::SftEverything => {
                    self.conversations_of_all(language, scene, out, &mut unknown)?;
                }
                _ => self.scene_document(language, scene, out, &mut unknown)?,
            }
        }
        for text in self.story.texts.iter().filter(|t| takes(&t.campaign)) {
            if self.is_skipped(&text.kind) {
                if task.is_pt() {
                    let texts = [text.title.get(language), text.text.get(language)];
                    let tokens = texts.into_iter().flatten().map(out.counters.rules).sum();
                    out.filtered("kinds that the character file skips", 1, tokens);
                }
                continue;
            }
            match &text.speaker {
                None if task.is_pt() => self.page(language, text, out, &mut unknown)?,
                None => {}
                Some(speaker)
                    if task == Task::SftCyrene && !self.own_ids.contains(speaker.id.as_str()) => {}
                Some(_) => self.voice(task, language, text, out, &mut unknown)?,
            }
        }
        Ok(unknown)
    }

    // Pre-training

    /// One document a scene: a line a sentence, `name: text`.
    fn scene_document(
        &self,
        language: Language,
        scene: &Scene,
        out: &mut DatasetWriter<'_>,
        unknown: &mut UnknownMarkup,
    ) -> Result<()> {
        let sentences: Vec<_> = self
            .shown_lines(language, scene, |_| true, out, unknown)
            .into_iter()
            .map(|l| {
                let text = format::write(Format::Named, language, l.name, l.text, false);
                Shown::new(text, out.counters.rules)
            })
            .collect();
        out.paragraph(&sentences, &[&scene.id])
    }

    /// A page: its title, then its lines.
    fn page(
        &self,
        language: Language,
        text: &Text,
        out: &mut DatasetWriter<'_>,
        unknown: &mut UnknownMarkup,
    ) -> Result<()> {
        let Some(body) = text.text.get(language) else {
            out.hole("text");
            return Ok(());
        };
        let clean = |text| markup::strip(&self.character.story.markup, text, unknown);
        let cleaned: Vec<Cow<'_, str>> = text
            .title
            .get(language)
            .into_iter()
            .chain([body])
            .map(clean)
            .collect();
        let sentences: Vec<_> = cleaned
            .iter()
            .flat_map(|t| paragraph::lines(t))
            .map(|l| Shown::new(l.into(), out.counters.rules))
            .collect();
        out.paragraph(&sentences, &[&text.id])
    }

    // Fine-tuning

    /// The character's conversation in a scene: everybody else's lines are the user's, asides in brackets.
    fn own_conversation(
        &self,
        language: Language,
        scene: &Scene,
        out: &mut DatasetWriter<'_>,
        unknown: &mut UnknownMarkup,
    ) -> Result<()> {
        if !scene.lines.iter().any(|l| self.is_own(l)) {
            return Ok(());
        }
        let lines = self.shown_lines(language, scene, is_talk, out, unknown);
        let rounds = rounds(lines.len(), |i| self.is_own(lines[i].line));
        let shown: Vec<_> = lines
            .into_iter()
            .map(|l| {
                let aside = !self.is_own(l.line) && !self.is_player(l.line);
                let text = format::write(Format::Bracketed, language, l.name, l.text, aside);
                Shown::new(text, out.counters.rules)
            })
            .collect();
        let limits = Limits {
            split: None,
            most: CHARACTER_TOKENS,
        };
        out.conversation(
            &scene.id,
            self.character.system_in(language),
            rounds,
            &shown,
            limits,
        )
    }

    /// A conversation for everyone who speaks in a scene and has a name.
    fn conversations_of_all(
        &self,
        language: Language,
        scene: &Scene,
        out: &mut DatasetWriter<'_>,
        unknown: &mut UnknownMarkup,
    ) -> Result<()> {
        let lines = self.shown_lines(language, scene, is_talk, out, unknown);
        let mut speakers: Vec<(&str, &str)> = Vec::new();
        let line_speakers: Vec<Option<(&str, &str)>> = lines
            .iter()
            .map(|l| match l.line.kind {
                LineKind::Dialogue => l.name.map(|name| (l.line.speaker_id.as_str(), name)),
                _ => None,
            })
            .collect();
        for speaker in line_speakers.iter().flatten() {
            if !speakers.contains(speaker) {
                speakers.push(*speaker);
            }
        }
        let shown: Vec<_> = lines
            .into_iter()
            .map(|l| Shown::new(l.text, out.counters.rules))
            .collect();
        for speaker in speakers {
            let rounds = rounds(shown.len(), |i| line_speakers[i] == Some(speaker));
            let limits = Limits {
                split: Some(PIECE_TOKENS),
                most: PIECE_TOKENS,
            };
            out.conversation(&scene.id, speaker.1, rounds, &shown, limits)?;
        }
        Ok(())
    }

    // Both

    /// A voice line: what is asked, what is said.
    fn voice(
        &self,
        task: Task,
        language: Language,
        text: &Text,
        out: &mut DatasetWriter<'_>,
        unknown: &mut UnknownMarkup,
    ) -> Result<()> {
        let Some(said) = text.text.get(language) else {
            out.hole("text");
            return Ok(());
        };
        let title = text.title.get(language);
        if title.is_none() {
            out.hole("title");
        }
        let own = text
            .speaker
            .as_ref()
            .is_some_and(|s| self.own_ids.contains(s.id.as_str()));
        let name = match text.speaker.as_ref() {
            _ if own => Some(self.character.name_in(language)),
            Some(speaker) => self.name_of(&speaker.id, &speaker.name, language),
            None => None,
        };
        let player = self.character.player.name.get(language);
        let mut clean = |text| {
            let text = markup::strip(&self.character.story.markup, text, unknown);
            Cow::Owned(text.trim_matches(paragraph::is_space).to_owned())
        };
        let lines: Vec<(Option<&str>, Cow<'_, str>)> = title
            .map(|t| (player, clean(t)))
            .into_iter()
            .chain([(name, clean(said))])
            .collect();
        let format = match task {
            _ if task.is_pt() => Format::Named,
            Task::SftCyrene => Format::Bracketed,
            _ => Format::Plain,
        };
        let shown: Vec<_> = lines
            .into_iter()
            .map(|(name, text)| {
                Shown::new(
                    format::write(format, language, name, text, false),
                    out.counters.rules,
                )
            })
            .collect();
        if task.is_pt() {
            return out.paragraph(&shown, &[&text.id]);
        }
        let (system, limits) = if task == Task::SftCyrene {
            let most = CHARACTER_TOKENS;
            (
                self.character.system_in(language),
                Limits { split: None, most },
            )
        } else {
            let most = PIECE_TOKENS;
            (
                name.unwrap_or_default(),
                Limits {
                    split: Some(most),
                    most,
                },
            )
        };
        let rounds = rounds(shown.len(), |i| i + 1 == shown.len());
        out.conversation(&text.id, system, rounds, &shown, limits)
    }

    /// The lines of a scene that this language has; what is absent is counted.
    fn shown_lines<'s>(
        &'s self,
        language: Language,
        scene: &'s Scene,
        takes: impl Fn(&Line) -> bool,
        out: &mut DatasetWriter<'_>,
        unknown: &mut UnknownMarkup,
    ) -> Vec<ShownLine<'s>> {
        let mut lines = Vec::with_capacity(scene.lines.len());
        for line in &scene.lines {
            let Some(text) = line.text.get(language) else {
                if takes(line) {
                    out.hole("text");
                }
                continue;
            };
            if !takes(line) {
                let rules = &self.character.story.markup;
                let text = trim(markup::strip(rules, text, &mut UnknownMarkup::new()));
                let tokens = (out.counters.rules)(&text);
                out.filtered("objectives are no talk", 1, tokens);
                continue;
            }
            let rules = &self.character.story;
            let mut text = markup::strip(&rules.markup, text, unknown);
            if line.has_variables {
                match markup::replace_variables(&rules.variables, language, &text) {
                    Some(replaced) => text = Cow::Owned(replaced),
                    None => {
                        out.hole("value of a variable");
                        let tokens = (out.counters.rules)(&text);
                        out.filtered("variable without a value", 1, tokens);
                        continue;
                    }
                }
            }
            let text = trim(text);
            if text.is_empty() {
                out.hole("text after the clean-up");
                continue;
            }
            let name = if line.kind == LineKind::Dialogue {
                self.line_name(line, language)
            } else {
                None
            };
            if name.is_none() && !line.speaker_name.is_empty() && line.kind == LineKind::Dialogue {
                out.hole("name");
            }
            lines.push(ShownLine { line, name, text });
        }
        lines
    }

    /// The name before a line: the player's of the character file, else the line's own.
    fn line_name<'s>(&'s self, line: &'s Line, language: Language) -> Option<&'s str> {
        if self.is_player(line)
            && let Some(name) = self.character.player.name.get(language)
        {
            return Some(name);
        }
        self.name_of(&line.speaker_id, &line.speaker_name, language)
    }

    /// The translation of a name, else how the same speaker is called elsewhere, else the character file's name.
    fn name_of<'n>(
        &'n self,
        id: &str,
        name: &'n ByLanguage,
        language: Language,
    ) -> Option<&'n str> {
        if name.is_empty() {
            return None;
        }
        name.get(language)
            .or_else(|| self.names.get(id).and_then(|known| known.get(language)))
            .or_else(|| {
                self.own_ids
                    .contains(id)
                    .then(|| self.character.name_in(language))
            })
            .filter(|name| !name.is_empty())
    }

    fn is_own(&self, line: &Line) -> bool {
        line.kind == LineKind::Dialogue && self.own_ids.contains(line.speaker_id.as_str())
    }

    fn is_player(&self, line: &Line) -> bool {
        match line.kind {
            LineKind::Option => true,
            LineKind::Dialogue => self.player_ids.contains(line.speaker_id.as_str()),
            LineKind::Narration | LineKind::Objective => false,
        }
    }

    fn is_skipped(&self, kind: &str) -> bool {
        self.character
            .story
            .skip_kinds
            .iter()
            .any(|skip| match skip.strip_suffix('*') {
                Some(beginning) => kind.starts_with(beginning),
                None => kind == skip,
            })
    }

    /// The five speaker ids with most lines, for the error that names them.
    fn most_lines(&self) -> String {
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for line in self.story.scenes.iter().flat_map(|s| &s.lines) {
            if line.kind == LineKind::Dialogue {
                *counts.entry(&line.speaker_id).or_default() += 1;
            }
        }
        let mut counts: Vec<_> = counts.into_iter().collect();
        counts.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
        let named: Vec<_> = counts
            .iter()
            .take(5)
            .map(|(id, n)| format!("{id} ({n})"))
            .collect();
        named.join(", ")
    }
}

/// Objectives are no talk.
fn is_talk(line: &Line) -> bool {
    line.kind != LineKind::Objective
}

fn trim(text: Cow<'_, str>) -> Cow<'_, str> {
    match text {
        Cow::Borrowed(text) => Cow::Borrowed(text.trim_matches(paragraph::is_space)),
        Cow::Owned(text) => {
            let trimmed = text.trim_matches(paragraph::is_space);
            if trimmed.len() == text.len() {
                Cow::Owned(text)
            } else {
                Cow::Owned(trimmed.to_owned())
            }
        }
    }
}

fn as_set(ids: &[String]) -> HashSet<&str> {
    ids.iter().map(String::as_str).collect()
}
