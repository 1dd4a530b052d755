//! The talk table of one language: rows whose text is there, in groups that are one conversation each.

use std::borrow::Cow;

use super::tables::{Tables, TalkRow};
use super::text_map::{MapValue, TextHash};
use super::texts::{Place, Texts};
use crate::character::GameRules;
use crate::error::Result;

/// Where a nameless speaker's name stands: the player's.
pub(crate) const NICKNAME: &str = "{NICKNAME}";

/// Rows with an id and a text, sorted by group and id, with the number of their group: the same for all languages.
pub(crate) struct TalkOrder<'a> {
    rows: Vec<(i128, &'a TalkRow)>,
}

/// A group: its number and its rows in this language. `T`: what is known of each row's text.
pub(crate) struct Group<'a, T = MapValue<'a>> {
    pub number: i128,
    pub rows: Vec<GroupRow<'a, T>>,
}

pub(crate) struct GroupRow<'a, T = MapValue<'a>> {
    row: &'a TalkRow,
    text: T,
}

impl<T> std::ops::Deref for GroupRow<'_, T> {
    type Target = TalkRow;

    fn deref(&self) -> &TalkRow {
        self.row
    }
}

impl<'a> TalkOrder<'a> {
    pub fn new(tables: &'a Tables, rules: &GameRules) -> TalkOrder<'a> {
        let group = |id: i128| {
            let thousand = id.div_euclid(1000);
            let is_fine = rules
                .fine_talk_blocks
                .iter()
                .any(|b| i128::from(*b) == thousand);
            if is_fine {
                id.div_euclid(100)
            } else {
                thousand
            }
        };
        let mut rows: Vec<(i128, &TalkRow)> = tables
            .talks
            .iter()
            .filter_map(|row| Some((group(row.id?), row)))
            .filter(|(_, row)| row.text.is_some())
            .collect();
        // Stable: rows of the same id keep the order of the file.
        rows.sort_by_key(|(group, row)| (*group, row.id));
        TalkOrder { rows }
    }

    /// Rows that have an id and a text, whether or not a language has it.
    pub fn n_rows(&self) -> usize {
        self.rows.len()
    }

    /// The groups of a language, ascending by number. `find`: what the language's map has for a hash.
    pub fn groups<T>(&self, find: impl Fn(TextHash) -> Option<T>) -> Vec<Group<'a, T>> {
        let told = |row: &(i128, &'a TalkRow)| {
            let text = find(row.1.text?)?;
            Some(GroupRow { row: row.1, text })
        };
        self.rows
            .chunk_by(|a, b| a.0 == b.0)
            .map(|rows| Group {
                number: rows[0].0,
                rows: rows.iter().filter_map(told).collect(),
            })
            .filter(|group| !group.rows.is_empty())
            .collect()
    }
}

impl<T> Group<'_, T> {
    pub fn has_any(&self, hashes: &[TextHash]) -> bool {
        self.rows
            .iter()
            .any(|r| r.name.is_some_and(|h| hashes.contains(&h)))
    }

    /// The name of the scene that a group is.
    pub fn scene(&self) -> String {
        format!("talk/{}", self.number)
    }
}

impl<'a> GroupRow<'a> {
    pub fn text(&self, texts: &Texts<'a>) -> Result<Cow<'a, str>> {
        let place = Place {
            table: "TalkSentenceConfig",
            field: "TalkSentenceText",
            id: self.row.id.unwrap_or_default(),
        };
        texts.strict_of(self.text, place)
    }
}

impl TalkRow {
    /// The speaker's name; the player's where there is none.
    pub fn speaker<'a>(&self, texts: &Texts<'a>) -> Result<Cow<'a, str>> {
        let known = match self.name {
            None | Some(TextHash(0)) => None,
            Some(hash) => texts.lenient(hash)?.filter(|name| !name.is_empty()),
        };
        Ok(known.unwrap_or(Cow::Borrowed(NICKNAME)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(ids: &[i128], fine: &[i64]) -> Vec<(i128, usize)> {
        let talks = ids.iter().map(|id| TalkRow {
            id: Some(*id),
            name: None,
            text: Some(TextHash(1)),
        });
        let mut tables = Tables::default();
        tables.talks = talks.collect();
        let mut rules: GameRules = toml::from_str(
            "nickname = {en = \"x\"}\nplayer_name_hash = 1\nname_hashes = [2]\navatar_id = 1\npeople = []\n\
             mission_prefixes = []\nbook_worlds = []",
        )
        .unwrap();
        rules.fine_talk_blocks = fine.to_vec();
        let groups = TalkOrder::new(&tables, &rules).groups(|_| Some(()));
        groups.iter().map(|g| (g.number, g.rows.len())).collect()
    }

    #[test]
    fn fine_blocks_are_grouped_by_the_hundred() {
        let ids = [
            504_119_101,
            504_119_100,
            504_119_201,
            504_120_999,
            5_041_191_000_123,
        ];
        // A longer id whose thousand-cut equals a hundred-cut of a fine block joins that group.
        assert_eq!(
            numbers(&ids, &[504_119]),
            [
                (504_120, 1),
                (5_041_191, 2),
                (5_041_192, 1),
                (5_041_191_000, 1)
            ]
        );
        assert_eq!(
            numbers(&[5_041_191_007, 504_119_100], &[504_119]),
            [(5_041_191, 2)]
        );
    }

    #[test]
    fn negative_ids_are_cut_downwards() {
        assert_eq!(numbers(&[-1, 0, 999], &[]), [(-1, 1), (0, 2)]);
    }
}
