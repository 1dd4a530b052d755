//! What a tree gives for pre-training: talks, books, stories, voices, nouns, missions, letters, tales, wiki.

use std::borrow::Cow;
use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::tables::{Tables, WikiRow};
use super::talk::{Group, NICKNAME, TalkOrder};
use super::text_map::TextHash;
use super::texts::{Place, Texts};
use crate::character::{GameRules, Hash};
use crate::dataset::DatasetWriter;
use crate::error::{Error, Result};
use crate::language::Language;
use crate::rules::cleanup::{self, Cleanup};
use crate::rules::format::{self, Format};
use crate::rules::{Shown, paragraph};
use crate::task::Task;

/// A tree with what the character file says about its game; the same for all languages.
pub(crate) struct GameDocuments<'a> {
    pub tables: &'a Tables,
    pub rules: &'a GameRules,
    pub order: TalkOrder<'a>,
}

/// The rules and texts of one language.
pub(super) struct InLanguage<'a> {
    pub tables: &'a Tables,
    pub rules: &'a GameRules,
    pub texts: Texts<'a>,
    pub groups: Vec<Group<'a>>,
    cleanup: Cleanup,
    people: OnceCell<People<'a>>,
    /// Markers that the clean-up left.
    unknown: BTreeMap<String, usize>,
}

/// The people in the order of the tables, with their names.
#[derive(Default)]
pub(super) struct People<'a> {
    pub order: Vec<i128>,
    names: HashMap<i128, Cow<'a, str>>,
}

impl<'a> GameDocuments<'a> {
    pub fn new(tables: &'a Tables, rules: &'a GameRules) -> GameDocuments<'a> {
        GameDocuments {
            tables,
            rules,
            order: TalkOrder::new(tables, rules),
        }
    }

    /// Writes the rows of one task; gives the markers that the clean-up left.
    ///
    /// # Errors
    /// A strict look-up fails, a value cannot be read, or the file cannot be written.
    pub fn write(
        &self,
        task: Task,
        texts: Texts<'a>,
        out: &mut DatasetWriter<'_>,
    ) -> Result<BTreeMap<String, usize>> {
        let map = texts.map;
        let mut builder = InLanguage {
            tables: self.tables,
            rules: self.rules,
            groups: self.order.groups(|hash| map.find(hash)),
            cleanup: cleanup_of(self.rules, texts.language),
            texts,
            people: OnceCell::new(),
            unknown: BTreeMap::new(),
        };
        let n_known: usize = builder.groups.iter().map(|g| g.rows.len()).sum();
        out.holes("text of a talk row", self.order.n_rows() - n_known);
        match task {
            Task::PtEverything => builder.pre_training(None, out)?,
            Task::PtAmphoreus => builder.pre_training(Some(&Selection::new(self.rules)), out)?,
            Task::SftEverything => builder.everything(out)?,
            Task::SftAmphoreus => builder.part(&Selection::new(self.rules), out)?,
            Task::SftCyrene => builder.character(out)?,
            Task::PtVendor => {}
        }
        Ok(builder.unknown)
    }
}

/// What belongs to the character's part of the story.
pub(super) struct Selection {
    /// Name hashes of the people and the further ones.
    pub hashes: Vec<TextHash>,
    pub people: Vec<i128>,
    missions: Vec<i128>,
    worlds: Vec<i128>,
}

impl Selection {
    fn new(rules: &GameRules) -> Selection {
        let people = rules.people.iter().map(|p| &p.name_hash);
        Selection {
            hashes: people
                .chain(&rules.further_name_hashes)
                .map(text_hash)
                .collect(),
            people: rules.people.iter().map(|p| p.avatar_id.into()).collect(),
            missions: rules.mission_prefixes.iter().map(|n| (*n).into()).collect(),
            worlds: rules.book_worlds.iter().map(|n| (*n).into()).collect(),
        }
    }
}

pub(super) fn text_hash(hash: &Hash) -> TextHash {
    TextHash(hash.0.into())
}

/// The clean-up of a language: the player's name and the game's literal replacements.
pub(crate) fn cleanup_of(rules: &GameRules, language: Language) -> Cleanup {
    Cleanup {
        nickname: rules
            .nickname
            .get_or_any(language)
            .unwrap_or_default()
            .to_owned(),
        literals: rules
            .replacements
            .iter()
            .map(|l| (l.from.clone(), l.to.clone()))
            .collect(),
    }
}

impl<'a> InLanguage<'a> {
    fn pre_training(
        &mut self,
        part: Option<&Selection>,
        out: &mut DatasetWriter<'_>,
    ) -> Result<()> {
        self.talks(part, out)?;
        match part {
            None => {
                self.books(None, out)?;
                self.stories(None, out)?;
                self.voices(None, out)?;
                self.nouns(out)?;
                self.missions(None, out)?;
            }
            Some(part) => {
                self.missions(Some(part), out)?;
                self.stories(Some(part), out)?;
                self.voices(Some(part), out)?;
                self.books(Some(part), out)?;
                self.nouns(out)?;
            }
        }
        self.letters(out)?;
        self.tales(out)?;
        self.wiki(out)
    }

    fn talks(&mut self, part: Option<&Selection>, out: &mut DatasetWriter<'_>) -> Result<()> {
        let groups = std::mem::take(&mut self.groups);
        for group in &groups {
            if part.is_some_and(|p| !group.has_any(&p.hashes)) {
                continue;
            }
            let mut sentences = Vec::with_capacity(group.rows.len());
            for row in &group.rows {
                let name = row.speaker(&self.texts)?;
                let text = row.text(&self.texts)?;
                sentences.push(self.show(Format::Named, Some(&name), text, false, out));
            }
            out.paragraph(&sentences, &[&group.scene()])?;
        }
        self.groups = groups;
        Ok(())
    }

    fn books(&mut self, part: Option<&Selection>, out: &mut DatasetWriter<'_>) -> Result<()> {
        let tables = self.tables;
        for series in &tables.series {
            if part.is_some_and(|p| !p.worlds.contains(&series.world)) {
                continue;
            }
            let place = |field| place("BookSeriesConfig", field, series.id);
            let mut head: Option<[Cow<'a, str>; 2]> = None;
            let books = tables.books.iter().filter(|b| b.series == series.id);
            for (idx, book) in books.enumerate() {
                let head = match &head {
                    Some(head) => head,
                    None => {
                        let title = self.texts.strict(series.title, place("BookSeries"))?;
                        let comments = self.or_empty(series.comments)?;
                        head.insert([title, comments])
                    }
                };
                let place = |field| self::place("LocalbookConfig", field, book.series);
                let name = self.texts.strict(book.name, place("BookInsideName"))?;
                let content = self.texts.strict(book.content, place("BookContent"))?;
                let lines = head
                    .iter()
                    .chain([&name])
                    .map(|t| &t[..])
                    .chain(paragraph::lines(&content));
                let scene = format!("book/{}/{}", series.id, idx + 1);
                self.paragraph(lines, &scene, out)?;
            }
        }
        Ok(())
    }

    fn stories(&mut self, part: Option<&Selection>, out: &mut DatasetWriter<'_>) -> Result<()> {
        let tables = self.tables;
        let people: BTreeSet<i128> = tables.stories.iter().map(|s| s.person).collect();
        for person in people.into_iter().filter(|p| takes_person(part, *p)) {
            let rows = tables.stories.iter().filter(|s| s.person == person);
            let places: BTreeMap<i128, TextHash> = rows.map(|s| (s.place, s.text)).collect();
            let name = self.person(person, "StoryAtlas")?;
            let mut lines: Vec<Cow<'a, str>> = vec![name];
            for hash in places.values() {
                let text = self
                    .texts
                    .strict(*hash, place("StoryAtlas", "Story", person))?;
                lines.extend(paragraph::lines(&text).map(|l| Cow::Owned(l.to_owned())));
            }
            self.paragraph(
                lines.iter().map(|l| &l[..]),
                &format!("story/{person}"),
                out,
            )?;
        }
        Ok(())
    }

    fn voices(&mut self, part: Option<&Selection>, out: &mut DatasetWriter<'_>) -> Result<()> {
        let tables = self.tables;
        let people: BTreeSet<i128> = tables.voices.iter().map(|v| v.person).collect();
        for person in people.into_iter().filter(|p| takes_person(part, *p)) {
            let mut rows: Vec<_> = tables
                .voices
                .iter()
                .filter(|v| v.person == person)
                .enumerate()
                .collect();
            // Ascending, absent last; stable.
            rows.sort_by_key(|(_, v)| (v.sort.is_none(), v.sort));
            let name = self.person(person, "VoiceAtlas")?;
            let mut sentences = Vec::with_capacity(2 * rows.len());
            let mut scenes = Vec::with_capacity(2 * rows.len());
            for (idx, row) in rows {
                let title = self
                    .texts
                    .strict(row.title, place("VoiceAtlas", "VoiceTitle", person))?;
                let text = self
                    .texts
                    .strict(row.text, place("VoiceAtlas", "Voice_M", person))?;
                sentences.push(self.show(Format::Named, Some(NICKNAME), title, false, out));
                sentences.push(self.show(Format::Named, Some(&name), text, false, out));
                let scene = voice_scene(person, idx);
                scenes.extend([scene.clone(), scene]);
            }
            let scenes: Vec<&str> = scenes.iter().map(String::as_str).collect();
            out.paragraph(&sentences, &scenes)?;
        }
        Ok(())
    }

    fn nouns(&mut self, out: &mut DatasetWriter<'_>) -> Result<()> {
        let tables = self.tables;
        for (idx, noun) in tables.nouns.iter().enumerate() {
            let place = |field| place("NounAtlas", field, idx as i128 + 1);
            let title = self.texts.strict(noun.title, place("NounTitle"))?;
            let text = self.texts.strict(noun.text, place("NounDesc"))?;
            let lines = std::iter::once(&title[..]).chain(paragraph::lines(&text));
            self.paragraph(lines, &format!("noun/{}", idx + 1), out)?;
        }
        Ok(())
    }

    fn missions(&mut self, part: Option<&Selection>, out: &mut DatasetWriter<'_>) -> Result<()> {
        let tables = self.tables;
        let names: HashMap<i128, TextHash> = tables
            .missions
            .iter()
            .filter_map(|m| Some((m.id, m.name?)))
            .collect();
        let mut steps: BTreeMap<i128, Vec<_>> = BTreeMap::new();
        for step in &tables.steps {
            if let Some(target) = step.target {
                steps
                    .entry(step.id.div_euclid(100))
                    .or_default()
                    .push((step.id, target, step.text));
            }
        }
        let mut conclusions: Vec<_> = tables.conclusions.iter().collect();
        conclusions.sort_by_key(|c| c.mission);
        for conclusion in conclusions {
            let mission = conclusion.mission;
            if part.is_some_and(|p| !p.missions.contains(&mission.div_euclid(10000))) {
                continue;
            }
            let name = *names.get(&mission).ok_or_else(|| Error::UnknownRow {
                table: "ChronicleConclusion",
                id: mission.to_string(),
                target: "MainMission (with a Name)",
                wanted: mission.to_string(),
            })?;
            let name = self.texts.lenient(name)?;
            let place = place("ChronicleConclusion", "MissionConclusion", mission);
            let text = self.texts.strict(conclusion.text, place)?;
            let mut lines: Vec<&str> = name
                .as_deref()
                .into_iter()
                .chain(paragraph::lines(&text))
                .collect();

            let mut steps = steps.get(&mission).cloned().unwrap_or_default();
            steps.sort_by_key(|(id, ..)| *id);
            let mut taken: Vec<(Cow<'a, str>, Cow<'a, str>)> = Vec::new();
            for (_, target, text) in steps {
                let step = (self.or_empty(Some(target))?, self.or_empty(text)?);
                if !step.0.is_empty() && !step.1.is_empty() && taken.last() != Some(&step) {
                    taken.push(step);
                }
            }
            for (target, text) in &taken {
                lines.push(target);
                lines.extend(paragraph::lines(text));
            }
            self.paragraph(lines.into_iter(), &format!("mission/{mission}"), out)?;
        }
        Ok(())
    }

    fn letters(&mut self, out: &mut DatasetWriter<'_>) -> Result<()> {
        let tables = self.tables;
        let mails: HashMap<i128, TextHash> = tables.mails.iter().map(|m| (m.id, m.text)).collect();
        for (idx, letter) in tables.mailboxes.iter().enumerate() {
            let id = idx as i128 + 1;
            let mut lines = Vec::with_capacity(3 + letter.sentences.len());
            for (hash, field) in [
                (letter.title, "Title"),
                (letter.from, "From"),
                (letter.to, "To"),
            ] {
                lines.push(self.texts.strict(hash, place("TarotMailbox", field, id))?);
            }
            for sentence in &letter.sentences {
                let hash = *mails.get(sentence).ok_or_else(|| Error::UnknownRow {
                    table: "TarotMailbox",
                    id: id.to_string(),
                    target: "TarotMails",
                    wanted: sentence.to_string(),
                })?;
                lines.push(
                    self.texts
                        .strict(hash, place("TarotMails", "Sentence", *sentence))?,
                );
            }
            self.paragraph(lines.iter().map(|l| &l[..]), &format!("letter/{id}"), out)?;
        }
        Ok(())
    }

    fn tales(&mut self, out: &mut DatasetWriter<'_>) -> Result<()> {
        let mut rows: Vec<_> = self.tables.tales.iter().collect();
        rows.sort_by_key(|r| r.id);
        for group in rows.chunk_by(|a, b| a.id.div_euclid(1000) == b.id.div_euclid(1000)) {
            let texts = group
                .iter()
                .map(|row| {
                    self.texts
                        .strict(row.text, place("TarotBookSentence", "Sentence", row.id))
                })
                .collect::<Result<Vec<_>>>()?;
            let scene = format!("tale/{}", group[0].id.div_euclid(1000));
            self.paragraph(texts.iter().flat_map(|t| paragraph::lines(t)), &scene, out)?;
        }
        Ok(())
    }

    fn wiki(&mut self, out: &mut DatasetWriter<'_>) -> Result<()> {
        let tables = self.tables;
        let parts: HashMap<i128, &WikiRow> = tables.wiki_parts.iter().map(|p| (p.id, p)).collect();
        let mut rows: Vec<_> = tables.wiki.iter().collect();
        rows.sort_by_key(|r| r.id);
        for group in rows.chunk_by(|a, b| a.id.div_euclid(100) == b.id.div_euclid(100)) {
            let mut texts: Vec<[Cow<'a, str>; 2]> = Vec::new();
            for page in group {
                texts.push(self.wiki_text("TarotWikiData", page)?);
                let mut ids = page.parts.clone();
                ids.sort_unstable();
                for id in ids {
                    let part = *parts.get(&id).ok_or_else(|| Error::UnknownRow {
                        table: "TarotWikiData",
                        id: page.id.to_string(),
                        target: "TarotWikiSubdata",
                        wanted: id.to_string(),
                    })?;
                    texts.push(self.wiki_text("TarotWikiSubdata", part)?);
                }
            }
            let lines = texts.iter().flat_map(|[title, text]| {
                std::iter::once(&title[..]).chain(paragraph::lines(text))
            });
            let scene = format!("wiki/{}", group[0].id.div_euclid(100));
            self.paragraph(lines, &scene, out)?;
        }
        Ok(())
    }

    /// Title and details of a page or a part of one, after the last of its changes.
    fn wiki_text(&self, table: &'static str, row: &WikiRow) -> Result<[Cow<'a, str>; 2]> {
        let Some(change) = row.changes.iter().max() else {
            return Ok([
                self.texts
                    .strict(row.title, place(table, "Title", row.id))?,
                self.texts
                    .strict(row.text, place(table, "Details", row.id))?,
            ]);
        };
        // The later of two rows with the same id wins.
        let changes = &self.tables.wiki_changes;
        let change =
            changes
                .iter()
                .rfind(|c| c.id == *change)
                .ok_or_else(|| Error::UnknownRow {
                    table,
                    id: row.id.to_string(),
                    target: "TarotWikiChangeinfo",
                    wanted: change.to_string(),
                })?;
        let place = |field| place("TarotWikiChangeinfo", field, change.id);
        Ok([
            self.texts.strict(change.title, place("NewTitle"))?,
            self.texts.strict(change.text, place("NewDetails"))?,
        ])
    }

    // Shared with the conversations

    /// A sentence as the task shows it.
    pub(super) fn show<'s>(
        &mut self,
        format: Format,
        name: Option<&str>,
        text: Cow<'s, str>,
        aside: bool,
        out: &DatasetWriter<'_>,
    ) -> Shown<'s> {
        let written = format::write(format, self.texts.language, name, text, aside);
        let shown = self.cleanup.run(written);
        if memchr::memchr(b'{', shown.as_bytes()).is_some() {
            cleanup::count_unknown(&shown, &mut self.unknown);
        }
        Shown::new(shown, out.counters.rules)
    }

    /// A name as a system message shows it.
    pub(super) fn shown_name(&self, name: Cow<'a, str>) -> Cow<'a, str> {
        self.cleanup.run(name)
    }

    /// The name of a person.
    pub(super) fn person(&self, id: i128, table: &'static str) -> Result<Cow<'a, str>> {
        self.people()?
            .names
            .get(&id)
            .cloned()
            .ok_or_else(|| Error::UnknownRow {
                table,
                id: id.to_string(),
                target: "AvatarConfig and AvatarConfigLD",
                wanted: id.to_string(),
            })
    }

    /// All people with their names, looked up when the first is needed.
    pub(super) fn people(&self) -> Result<&People<'a>> {
        if let Some(people) = self.people.get() {
            return Ok(people);
        }
        let mut people = People::default();
        for row in &self.tables.people {
            let name = self
                .texts
                .strict(row.name, place("AvatarConfig", "AvatarName", row.id))?;
            if people.names.insert(row.id, name).is_none() {
                people.order.push(row.id);
            }
        }
        Ok(self.people.get_or_init(|| people))
    }

    /// A paragraph of lines without names; empty lines are dropped before the clean-up.
    fn paragraph<'l>(
        &mut self,
        lines: impl Iterator<Item = &'l str>,
        scene: &str,
        out: &mut DatasetWriter<'_>,
    ) -> Result<()> {
        let sentences: Vec<_> = lines
            .filter(|line| !line.is_empty())
            .map(|line| self.show(Format::Named, None, Cow::Borrowed(line), false, out))
            .collect();
        out.paragraph(&sentences, &[scene])
    }

    fn or_empty(&self, hash: Option<TextHash>) -> Result<Cow<'a, str>> {
        match hash {
            Some(hash) => Ok(self.texts.lenient(hash)?.unwrap_or_default()),
            None => Ok(Cow::Borrowed("")),
        }
    }
}

/// The scene of a voice line: its place among the person's rows in the file.
pub(super) fn voice_scene(person: i128, idx: usize) -> String {
    format!("voice/{person}/{}", idx + 1)
}

pub(super) fn place(table: &'static str, field: &'static str, id: i128) -> Place {
    Place { table, field, id }
}

fn takes_person(part: Option<&Selection>, person: i128) -> bool {
    part.is_none_or(|p| p.people.contains(&person))
}
