//! The units of splitting of a tree: every talk group, book, story, voice line, noun, mission, letter, tale and wiki
//! group is one; texts tie them by what they say, language by language.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::documents::{text_hash, voice_scene};
use super::tables::{Tables, WikiRow};
use super::talk::TalkOrder;
use super::text_map::{TextHash, TextMapFiles};
use crate::character::{Character, GameRules};
use crate::error::Result;
use crate::language::Language;
use crate::output::hex;
use crate::split::{self, Split, SplitOptions, Splitter, Unit};
use crate::task::Task;

/// The units of a tree and the hashes of their texts.
struct Units {
    units: Vec<Unit>,
    places: HashMap<String, usize>,
    /// (unit, text), for all units.
    texts: Vec<(usize, TextHash)>,
}

/// # Errors
/// Whatever is wrong with the tables or the maps.
pub(crate) fn split(
    tree: &Path,
    character: &Character,
    rules: &GameRules,
    options: SplitOptions,
) -> Result<Split> {
    let tables = Tables::read(tree, &[Task::PtEverything])?;
    let units = Units::new(&tables, rules);
    let mut splitter = Splitter::new(units.units.clone());
    let mut hash = Sha256::new();
    for (name, table) in &tables.hashes {
        hash.update(name);
        hash.update(table);
    }
    let ties = Language::ALL
        .par_iter()
        .map(|language| {
            let files = TextMapFiles::read(tree, *language)?;
            let ties = split::ties(&as_slices(&units.texts_of(&files)?));
            Ok((files.sha256(), ties))
        })
        .collect::<Result<Vec<_>>>()?;
    for (sha256, ties) in ties {
        hash.update(sha256);
        splitter.tie(ties);
    }
    let source = hex(&hash.finalize());
    let mut split = splitter.finish(options, source, character.origin.sha256.clone());
    let ids = units.ids();
    let copies = Language::ALL
        .par_iter()
        .map(|language| {
            let files = TextMapFiles::read(tree, *language)?;
            let texts = units.texts_of(&files)?;
            Ok(split::copies(&split, *language, &ids, &as_slices(&texts)))
        })
        .collect::<Result<Vec<_>>>()?;
    let copies = copies.into_iter().flatten().map(|place| ids[place]);
    split::set_aside(&mut split, copies);
    Ok(split)
}

/// # Errors
/// A text of twelve characters or more stands on both sides, or the tree cannot be read.
pub(crate) fn guard(tree: &Path, rules: &GameRules, split: &Split) -> Result<()> {
    let tables = Tables::read(tree, &[Task::PtEverything])?;
    let units = Units::new(&tables, rules);
    let ids = units.ids();
    Language::ALL
        .par_iter()
        .map(|language| {
            let files = TextMapFiles::read(tree, *language)?;
            let texts = units.texts_of(&files)?;
            split::guard(split, *language, &ids, &as_slices(&texts))
        })
        .collect()
}

fn as_slices<'t>(texts: &'t [(usize, Cow<'_, str>)]) -> Vec<(usize, &'t str)> {
    texts
        .iter()
        .map(|(unit, text)| (*unit, &text[..]))
        .collect()
}

impl Units {
    fn new(tables: &Tables, rules: &GameRules) -> Units {
        let mut units = Units {
            units: Vec::new(),
            places: HashMap::new(),
            texts: Vec::new(),
        };
        let own: HashSet<TextHash> = rules.name_hashes.iter().map(text_hash).collect();
        for group in TalkOrder::new(tables, rules).groups(|_| true) {
            // Six-digit groups: the first three digits are the chapter, as they are of missions.
            let chapter = group.number.div_euclid(1000);
            let n_own = group
                .rows
                .iter()
                .filter(|r| r.name.is_some_and(|h| own.contains(&h)))
                .count();
            let texts = group.rows.iter().filter_map(|r| r.text);
            units.add(group.scene(), format!("talk/{chapter}"), n_own, texts);
        }
        let mut n_books: BTreeMap<i128, usize> = BTreeMap::new();
        for book in &tables.books {
            let n = n_books.entry(book.series).or_default();
            *n += 1;
            let id = format!("book/{}/{n}", book.series);
            units.add(id, "book".to_owned(), 0, [book.content]);
        }
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
            units.add(id, format!("voice/{}", voice.person), n_own, [voice.text]);
        }
        for (idx, noun) in tables.nouns.iter().enumerate() {
            units.add(
                format!("noun/{}", idx + 1),
                "noun".to_owned(),
                0,
                [noun.text],
            );
        }
        for conclusion in &tables.conclusions {
            let mission = conclusion.mission;
            let steps = tables
                .steps
                .iter()
                .filter(|s| s.id.div_euclid(100) == mission);
            let texts = steps.filter_map(|s| s.text).chain([conclusion.text]);
            let chapter = format!("mission/{}", mission.div_euclid(10000));
            units.add(format!("mission/{mission}"), chapter, 0, texts);
        }
        let mails: HashMap<i128, TextHash> = tables.mails.iter().map(|m| (m.id, m.text)).collect();
        for (idx, letter) in tables.mailboxes.iter().enumerate() {
            let texts = letter
                .sentences
                .iter()
                .filter_map(|id| mails.get(id).copied());
            units.add(format!("letter/{}", idx + 1), "letter".to_owned(), 0, texts);
        }
        for tale in &tables.tales {
            let id = format!("tale/{}", tale.id.div_euclid(1000));
            units.add(id, "tale".to_owned(), 0, [tale.text]);
        }
        units.add_wiki(tables);
        units
    }

    fn ids(&self) -> Vec<&str> {
        self.units.iter().map(|u| u.id.as_str()).collect()
    }

    fn add_wiki(&mut self, tables: &Tables) {
        let changes: HashMap<i128, TextHash> =
            tables.wiki_changes.iter().map(|c| (c.id, c.text)).collect();
        let parts: HashMap<i128, &WikiRow> = tables.wiki_parts.iter().map(|p| (p.id, p)).collect();
        let text = |row: &WikiRow| match row.changes.iter().max() {
            Some(change) => changes.get(change).copied(),
            None => Some(row.text),
        };
        for page in &tables.wiki {
            let parts = page.parts.iter().filter_map(|id| parts.get(id).copied());
            let texts = parts.chain([page]).filter_map(text);
            let id = format!("wiki/{}", page.id.div_euclid(100));
            self.add(id, "wiki".to_owned(), 0, texts);
        }
    }

    /// Adds texts to a unit; the first time the unit itself, too.
    fn add(
        &mut self,
        id: String,
        stratum: String,
        n_own_lines: usize,
        texts: impl IntoIterator<Item = TextHash>,
    ) {
        let place = *self.places.entry(id.clone()).or_insert_with(|| {
            self.units.push(Unit {
                id,
                stratum,
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
    }

    /// The texts of a language that are there.
    fn texts_of<'a>(&self, files: &'a TextMapFiles) -> Result<Vec<(usize, Cow<'a, str>)>> {
        let map = files.parse()?;
        let mut texts = Vec::with_capacity(self.texts.len());
        for (unit, hash) in &self.texts {
            if let Some(text) = map.get(*hash)? {
                texts.push((*unit, text));
            }
        }
        Ok(texts)
    }
}
