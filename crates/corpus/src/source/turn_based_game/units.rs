//! The units of splitting of a tree: every talk group, book, story, voice line, noun, mission, letter, tale and wiki
//! group is one, and so is every page and exercise of the vendor folder; texts tie them by what they say, language by
//! language.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::documents::{cleanup_of, text_hash, voice_scene};
use super::tables::{ChangeRow, Tables, WikiRow};
use super::talk::TalkOrder;
use super::text_map::{TextHash, TextMap, TextMapFiles};
use super::texts::Texts;
use super::vendor;
use crate::character::{Character, GameRules};
use crate::error::Result;
use crate::language::Language;
use crate::manifest::SourceFiles;
use crate::rows::BuiltRow;
use crate::rules::cleanup::Cleanup;
use crate::split::{Split, SplitOptions};
use crate::splitter::{self, Origin, Splittable, TYING_CHARACTERS, Unit, UnitText};
use crate::task::Task;
use files::hex;

/// A tree, and the vendor folder beside it if there is one.
#[derive(Clone, Copy)]
pub(crate) struct Roots<'a> {
    pub tree: &'a Path,
    pub vendor: Option<&'a Path>,
}

/// # Errors
/// Whatever is wrong with the tables or the maps, or a text of twelve characters or more stands on two sides.
pub(crate) fn split(
    roots: Roots<'_>,
    character: &Character,
    rules: &GameRules,
    options: SplitOptions,
) -> Result<Split> {
    let tables = Tables::read(roots.tree, &[Task::PtEverything])?;
    let mut hash = Sha256::new();
    for (name, table) in &tables.hashes {
        hash.update(name);
        hash.update(table);
    }
    let mut source_files = table_files(&tables);
    for (language, sha256) in Language::ALL.into_iter().zip(map_hashes(roots.tree)?) {
        hash.update(sha256);
        add_map(&mut source_files, language, sha256);
    }
    let mut pages = Vec::new();
    for set in vendor::SETS {
        if let Some(root) = roots.vendor {
            let (of_set, sha256) = vendor::read(set, root)?;
            source_files.insert(vendor::source_file(set), hex(&sha256));
            pages.extend(of_set);
        }
    }
    for page in &pages {
        hash.update(&page.scene);
        for line in &page.lines {
            hash.update(line);
        }
    }
    vendor::name_player(&mut pages, rules);
    let units = Units::new(roots.tree, &tables, rules, pages)?;
    let origin = Origin {
        source_sha256: hex(&hash.finalize()),
        source_files,
        character_sha256: character.origin.sha256.clone(),
        languages: character.languages(),
    };
    splitter::make(&units, options, origin)
}

/// # Errors
/// The split is of another tree, a text of twelve characters or more stands on both sides (of the tree, or of it and the pages), or
/// the tree cannot be read.
pub(crate) fn guard(
    tree: &Path,
    rules: &GameRules,
    split: &Split,
    pages: &[BuiltRow],
) -> Result<()> {
    let tables = Tables::read(tree, &[Task::PtEverything])?;
    let mut source_files = table_files(&tables);
    for (language, sha256) in Language::ALL.into_iter().zip(map_hashes(tree)?) {
        add_map(&mut source_files, language, sha256);
    }
    split.check_files(tree, &source_files)?;
    let units = Units::new(tree, &tables, rules, Vec::new())?;
    splitter::guard(&units, tree, split, pages)
}

/// The tables that were read, by the names that a manifest and a split have for them.
pub(crate) fn table_files(tables: &Tables) -> SourceFiles {
    let hashes = tables.hashes.iter();
    hashes
        .map(|(name, sha256)| (format!("ExcelOutput/{name}"), hex(sha256)))
        .collect()
}

/// Adds a language's text map.
pub(crate) fn add_map(files: &mut SourceFiles, language: Language, sha256: [u8; 32]) {
    let code = language.code().to_uppercase();
    files.insert(format!("TextMap/{code}"), hex(&sha256));
}

/// Of the text maps of all languages, in their order.
fn map_hashes(tree: &Path) -> Result<Vec<[u8; 32]>> {
    Language::ALL
        .par_iter()
        .map(|language| Ok(TextMapFiles::read(tree, *language)?.sha256()))
        .collect()
}

/// The units of a tree and the hashes of their texts.
struct Units<'a> {
    tree: &'a Path,
    tables: &'a Tables,
    rules: &'a GameRules,
    units: Vec<Unit>,
    places: HashMap<String, usize>,
    /// (unit, text), for all units, in their order.
    texts: Vec<(usize, TextHash)>,
    /// (unit, title), until it is known which are long.
    titles: Vec<(usize, TextHash)>,
    pages: Vec<(usize, vendor::Page)>,
}

/// Texts as the data sets show them: a tag, or the player's name, more or less makes no other text of it.
struct ShownTexts<'a> {
    texts: Texts<'a>,
    cleanup: Cleanup,
}

impl<'a> ShownTexts<'a> {
    fn new(
        tables: &'a Tables,
        rules: &GameRules,
        language: Language,
        map: &'a TextMap<'a>,
    ) -> ShownTexts<'a> {
        ShownTexts {
            texts: Texts::new(language, map, tables),
            cleanup: cleanup_of(rules, language),
        }
    }

    /// `None` if the map lacks it, or a text that is to be joined into it.
    fn text(&self, hash: TextHash) -> Result<Option<Cow<'a, str>>> {
        let text = self.texts.lenient(hash)?;
        Ok(text.map(|text| self.cleanup.run(text)))
    }
}

impl Splittable for Units<'_> {
    fn units(&self) -> &[Unit] {
        &self.units
    }

    fn with_texts<R>(
        &self,
        language: Language,
        f: impl FnOnce(&[UnitText<'_>]) -> Result<R>,
    ) -> Result<R> {
        let files = TextMapFiles::read(self.tree, language)?;
        let map = files.parse()?;
        let shown = ShownTexts::new(self.tables, self.rules, language, &map);
        let mut texts: Vec<(usize, TextHash, Cow<'_, str>)> = Vec::with_capacity(self.texts.len());
        for (unit, hash) in &self.texts {
            if let Some(text) = shown.text(*hash)? {
                texts.push((*unit, *hash, text));
            }
        }
        let mut texts: Vec<UnitText<'_>> = texts
            .iter()
            .map(|(unit, hash, text)| UnitText {
                unit: *unit,
                text,
                hash: Some(hash.0),
            })
            .collect();
        if language == vendor::LANGUAGE {
            for (unit, page) in &self.pages {
                texts.extend(page.lines.iter().map(|line| UnitText::new(*unit, line)));
            }
        }
        f(&texts)
    }
}

impl<'a> Units<'a> {
    fn new(
        tree: &'a Path,
        tables: &'a Tables,
        rules: &'a GameRules,
        pages: Vec<vendor::Page>,
    ) -> Result<Units<'a>> {
        let mut units = Units {
            tree,
            tables,
            rules,
            units: Vec::new(),
            places: HashMap::new(),
            texts: Vec::new(),
            titles: Vec::new(),
            pages: Vec::new(),
        };
        units.add_talks(tables, rules);
        units.add_books(tables);
        for story in &tables.stories {
            units.add(
                format!("story/{}", story.person),
                "story".to_owned(),
                0,
                [story.text],
            );
        }
        let mut n_voices: BTreeMap<i128, usize> = BTreeMap::new();
        for voice in &tables.voices {
            let n = n_voices.entry(voice.person).or_default();
            let id = voice_scene(voice.person, *n);
            *n += 1;
            let n_own = usize::from(voice.person == i128::from(rules.avatar_id));
            let place = units.add(id, format!("voice/{}", voice.person), n_own, [voice.text]);
            units.titles.push((place, voice.title));
        }
        for (idx, noun) in tables.nouns.iter().enumerate() {
            let id = format!("noun/{}", idx + 1);
            let place = units.add(id, "noun".to_owned(), 0, [noun.text]);
            units.titles.push((place, noun.title));
        }
        units.add_missions(tables);
        let mails: HashMap<i128, TextHash> = tables.mails.iter().map(|m| (m.id, m.text)).collect();
        for (idx, letter) in tables.mailboxes.iter().enumerate() {
            let texts = letter
                .sentences
                .iter()
                .filter_map(|id| mails.get(id).copied());
            let id = format!("letter/{}", idx + 1);
            let place = units.add(id, "letter".to_owned(), 0, texts);
            units.titles.push((place, letter.title));
        }
        for tale in &tables.tales {
            let id = format!("tale/{}", tale.id.div_euclid(1000));
            units.add(id, "tale".to_owned(), 0, [tale.text]);
        }
        units.add_wiki(tables);
        for page in pages {
            units.units.push(page.unit());
            units.pages.push((units.units.len() - 1, page));
        }
        units.add_long_titles()?;
        // Stable: the texts of a unit keep their order.
        units.texts.sort_by_key(|(unit, _)| *unit);
        Ok(units)
    }

    /// What people say, by groups of talks.
    fn add_talks(&mut self, tables: &'a Tables, rules: &'a GameRules) {
        let own: HashSet<TextHash> = rules.name_hashes.iter().map(text_hash).collect();
        for group in TalkOrder::new(tables, rules).groups(|_| Some(())) {
            // Six-digit groups: the first three digits are the chapter, as they are of missions.
            let chapter = group.number.div_euclid(1000);
            let is_small_talk = rules
                .fine_talk_blocks
                .iter()
                .any(|block| i128::from(*block) == group.number.div_euclid(10));
            let mission = (!is_small_talk).then(|| group.number.to_string());
            let n_own = group
                .rows
                .iter()
                .filter(|r| r.name.is_some_and(|h| own.contains(&h)))
                .count();
            let texts = group.rows.iter().filter_map(|r| r.text);
            let place = self.add(group.scene(), format!("talk/{chapter}"), n_own, texts);
            self.units[place].mission = mission;
        }
    }

    /// Books of series, each with the comment on its series.
    fn add_books(&mut self, tables: &'a Tables) {
        let mut n_books: BTreeMap<i128, usize> = BTreeMap::new();
        let comments: HashMap<i128, TextHash> = tables
            .series
            .iter()
            .filter_map(|s| Some((s.id, s.comments?)))
            .collect();
        for book in &tables.books {
            let n = n_books.entry(book.series).or_default();
            *n += 1;
            let id = format!("book/{}/{n}", book.series);
            let texts = comments.get(&book.series).copied();
            let texts = texts.into_iter().chain([book.content]);
            self.add(id, "book".to_owned(), 0, texts);
        }
    }

    /// The steps and conclusions of missions.
    fn add_missions(&mut self, tables: &'a Tables) {
        let mut steps_of: HashMap<i128, Vec<_>> = HashMap::new();
        for step in &tables.steps {
            let mission = step.id.div_euclid(100);
            steps_of.entry(mission).or_default().push(step);
        }
        for conclusion in &tables.conclusions {
            let mission = conclusion.mission;
            let steps = steps_of.get(&mission).into_iter().flatten();
            let (targets, texts): (Vec<_>, Vec<_>) = steps.map(|s| (s.target, s.text)).unzip();
            let texts = texts.into_iter().flatten().chain([conclusion.text]);
            let chapter = format!("mission/{}", mission.div_euclid(10000));
            let place = self.add(format!("mission/{mission}"), chapter, 0, texts);
            // Talks have the numbers of ten missions in common.
            self.units[place].mission = Some(mission.div_euclid(10).to_string());
            let targets = targets.into_iter().flatten();
            self.titles.extend(targets.map(|target| (place, target)));
        }
    }

    /// Titles and names are texts like others where they are long. In other languages than Chinese most have twelve
    /// characters and would tie all that has a "First Meeting", so Chinese decides.
    fn add_long_titles(&mut self) -> Result<()> {
        let files = TextMapFiles::read(self.tree, Language::Chs)?;
        let map = files.parse()?;
        let shown = ShownTexts::new(self.tables, self.rules, Language::Chs, &map);
        for (unit, hash) in std::mem::take(&mut self.titles) {
            let title = shown.text(hash)?;
            if title.is_some_and(|t| t.trim().chars().nth(TYING_CHARACTERS - 1).is_some()) {
                self.texts.push((unit, hash));
            }
        }
        Ok(())
    }

    fn add_wiki(&mut self, tables: &Tables) {
        let changes: HashMap<i128, &ChangeRow> =
            tables.wiki_changes.iter().map(|c| (c.id, c)).collect();
        let parts: HashMap<i128, &WikiRow> = tables.wiki_parts.iter().map(|p| (p.id, p)).collect();
        let text = |row: &WikiRow| match row.changes.iter().max() {
            Some(change) => changes.get(change).map(|c| c.text),
            None => Some(row.text),
        };
        let title = |row: &WikiRow| match row.changes.iter().max() {
            Some(change) => changes.get(change).map(|c| c.title),
            None => Some(row.title),
        };
        for page in &tables.wiki {
            let parts = page.parts.iter().filter_map(|id| parts.get(id).copied());
            let rows: Vec<&WikiRow> = parts.chain([page]).collect();
            let texts = rows.iter().filter_map(|row| text(row));
            let id = format!("wiki/{}", page.id.div_euclid(100));
            let place = self.add(id, "wiki".to_owned(), 0, texts);
            let titles = rows.iter().filter_map(|row| title(row));
            self.titles.extend(titles.map(|title| (place, title)));
        }
    }

    /// Adds texts to a unit; the first time the unit itself, too.
    fn add(
        &mut self,
        id: String,
        stratum: String,
        n_own_lines: usize,
        texts: impl IntoIterator<Item = TextHash>,
    ) -> usize {
        let place = *self.places.entry(id.clone()).or_insert_with(|| {
            self.units.push(Unit {
                id,
                stratum,
                mission: None,
                n_own_lines: 0,
                n_lines: 0,
            });
            self.units.len() - 1
        });
        self.units[place].n_own_lines += n_own_lines;
        for text in texts {
            self.units[place].n_lines += 1;
            self.texts.push((place, text));
        }
        place
    }
}
