//! What a tree gives for fine-tuning: conversations of everyone, of the people of a part, of the character.

use std::collections::HashSet;

use super::documents::{InLanguage, Selection, place, text_hash, voice_scene};
use super::talk::Group;
use super::text_map::TextHash;
use crate::dataset::DatasetWriter;
use crate::error::Result;
use crate::rules::conversation::{Limits, rounds};
use crate::rules::format::Format;
use crate::rules::{CHARACTER_TOKENS, PIECE_TOKENS, Shown};

const CUT: Limits = Limits {
    split: Some(PIECE_TOKENS),
    most: PIECE_TOKENS,
};
const WHOLE: Limits = Limits {
    split: None,
    most: CHARACTER_TOKENS,
};

impl<'a> InLanguage<'a> {
    /// Conversations of everyone in every group in which somebody has a name hash, then everybody's voices.
    pub(super) fn everything(&mut self, out: &mut DatasetWriter<'_>) -> Result<()> {
        self.everyone(|group| group.rows.iter().any(|r| r.name.is_some()), out)?;
        let people = self.people()?.order.clone();
        self.voice_rows(&people, Format::Plain, CUT, out)
    }

    /// Conversations of everyone in the groups of the character's part, then the voices of its people.
    pub(super) fn part(&mut self, part: &Selection, out: &mut DatasetWriter<'_>) -> Result<()> {
        self.everyone(|group| group.has_any(&part.hashes), out)?;
        self.voice_rows(&part.people, Format::Plain, CUT, out)
    }

    /// The character's conversations, face by face, then her voices.
    pub(super) fn character(&mut self, out: &mut DatasetWriter<'_>) -> Result<()> {
        let own: Vec<TextHash> = self.rules.name_hashes.iter().map(text_hash).collect();
        let mut without_brackets: HashSet<TextHash> = own.iter().copied().collect();
        without_brackets.insert(text_hash(&self.rules.player_name_hash));
        let groups = std::mem::take(&mut self.groups);
        for face in own {
            for group in groups.iter().filter(|g| g.has_any(&[face])) {
                let mut shown = Vec::with_capacity(group.rows.len());
                for row in &group.rows {
                    let aside = row.name.is_some_and(|h| !without_brackets.contains(&h));
                    let text = row.text(&self.texts)?;
                    shown.push(self.show(Format::Bracketed, None, text, aside, out));
                }
                self.conversation(group, Some(face), &shown, WHOLE, out)?;
            }
        }
        self.groups = groups;
        self.voice_rows(
            &[self.rules.avatar_id.into()],
            Format::Bracketed,
            WHOLE,
            out,
        )
    }

    /// One conversation for every name hash of the groups taken, "no name hash" too, in the order of appearance.
    fn everyone(
        &mut self,
        takes: impl Fn(&Group<'a>) -> bool,
        out: &mut DatasetWriter<'_>,
    ) -> Result<()> {
        let groups = std::mem::take(&mut self.groups);
        for group in groups.iter().filter(|g| takes(g)) {
            let mut assistants: Vec<Option<TextHash>> = Vec::new();
            let mut shown = Vec::with_capacity(group.rows.len());
            for row in &group.rows {
                if !assistants.contains(&row.name) {
                    assistants.push(row.name);
                }
                let text = row.text(&self.texts)?;
                shown.push(self.show(Format::Plain, None, text, false, out));
            }
            for assistant in assistants {
                self.conversation(group, assistant, &shown, CUT, out)?;
            }
        }
        self.groups = groups;
        Ok(())
    }

    /// The conversation of a group for one assistant.
    fn conversation(
        &self,
        group: &Group<'a>,
        assistant: Option<TextHash>,
        shown: &[Shown<'_>],
        limits: Limits,
        out: &mut DatasetWriter<'_>,
    ) -> Result<()> {
        let rounds = rounds(group.rows.len(), |i| group.rows[i].name == assistant);
        let Some(speaker) = rounds.first().map(|r| &group.rows[r.assistant.start]) else {
            return Ok(());
        };
        // All rows of one hash show one name.
        let system = self.shown_name(speaker.speaker(&self.texts)?);
        out.conversation(&group.scene(), &system, rounds, shown, limits)
    }

    /// One conversation for every voice line of the people, in file order.
    fn voice_rows(
        &mut self,
        people: &[i128],
        format: Format,
        limits: Limits,
        out: &mut DatasetWriter<'_>,
    ) -> Result<()> {
        let tables = self.tables;
        for person in people {
            let name = self.person(*person, "VoiceAtlas")?;
            let system = self.shown_name(name);
            let rows = tables.voices.iter().filter(|v| v.person == *person);
            for (idx, row) in rows.enumerate() {
                let title = self
                    .texts
                    .strict(row.title, place("VoiceAtlas", "VoiceTitle", *person))?;
                let text = self
                    .texts
                    .strict(row.text, place("VoiceAtlas", "Voice_M", *person))?;
                let shown = [
                    self.show(format, None, title, false, out),
                    self.show(format, None, text, false, out),
                ];
                let rounds = rounds(2, |i| i == 1);
                out.conversation(&voice_scene(*person, idx), &system, rounds, &shown, limits)?;
            }
        }
        Ok(())
    }
}
