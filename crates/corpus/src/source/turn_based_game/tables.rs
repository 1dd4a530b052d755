//! The tables of the tree that the tasks need, as numbers and text hashes; read once for all languages.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use super::json::{ArraySeed, JsonFile, ObjectSeed, exact_integer};
use super::text_map::TextHash;
use crate::error::{Error, Result, shorten};
use crate::task::Task;

/// All tables; those that no task needs are empty.
#[derive(Default)]
pub(crate) struct Tables {
    pub talks: Vec<TalkRow>,
    pub people: Vec<PersonRow>,
    pub series: Vec<SeriesRow>,
    pub books: Vec<BookRow>,
    pub stories: Vec<StoryRow>,
    pub voices: Vec<VoiceRow>,
    pub nouns: Vec<NounRow>,
    pub conclusions: Vec<ConclusionRow>,
    pub missions: Vec<MissionRow>,
    pub steps: Vec<StepRow>,
    pub mails: Vec<SentenceRow>,
    pub mailboxes: Vec<MailboxRow>,
    pub tales: Vec<SentenceRow>,
    pub wiki: Vec<WikiRow>,
    pub wiki_parts: Vec<WikiRow>,
    pub wiki_changes: Vec<ChangeRow>,
    tree: PathBuf,
    /// SHA-256 of every table that was read, in the order of their names.
    pub hashes: Vec<(&'static str, [u8; 32])>,
    joins: Mutex<Option<Arc<JoinTables>>>,
}

pub(crate) struct TalkRow {
    pub id: Option<i128>,
    /// Absent, null and what is no number are all "no name hash".
    pub name: Option<TextHash>,
    pub text: Option<TextHash>,
}
pub(crate) struct PersonRow {
    pub id: i128,
    pub name: TextHash,
}
pub(crate) struct SeriesRow {
    pub id: i128,
    pub title: TextHash,
    pub comments: Option<TextHash>,
    pub world: i128,
}
pub(crate) struct BookRow {
    pub series: i128,
    pub name: TextHash,
    pub content: TextHash,
}
pub(crate) struct StoryRow {
    pub person: i128,
    /// `ReplaceID` if there is one, else `StoryID`.
    pub place: i128,
    pub text: TextHash,
}
pub(crate) struct VoiceRow {
    pub person: i128,
    pub title: TextHash,
    pub text: TextHash,
    pub sort: Option<i128>,
}
pub(crate) struct NounRow {
    pub title: TextHash,
    pub text: TextHash,
}
pub(crate) struct ConclusionRow {
    pub mission: i128,
    pub text: TextHash,
}
pub(crate) struct MissionRow {
    pub id: i128,
    pub name: Option<TextHash>,
}
pub(crate) struct StepRow {
    pub id: i128,
    pub target: Option<TextHash>,
    pub text: Option<TextHash>,
}
pub(crate) struct SentenceRow {
    pub id: i128,
    pub text: TextHash,
}
pub(crate) struct MailboxRow {
    pub title: TextHash,
    pub from: TextHash,
    pub to: TextHash,
    pub sentences: Vec<i128>,
}
/// A page (`TarotWikiData`, with parts) or a part of one (`TarotWikiSubdata`).
pub(crate) struct WikiRow {
    pub id: i128,
    pub title: TextHash,
    pub text: TextHash,
    pub changes: Vec<i128>,
    pub parts: Vec<i128>,
}
pub(crate) struct ChangeRow {
    pub id: i128,
    pub title: TextHash,
    pub text: TextHash,
}

/// The tables of joined texts, read at the first marker.
pub(crate) struct JoinTables {
    pub joins: Vec<JoinRow>,
    pub items: Vec<JoinItemRow>,
}
pub(crate) struct JoinRow {
    pub id: i128,
    pub default: i128,
    pub items: Vec<i128>,
}
pub(crate) struct JoinItemRow {
    pub id: i128,
    pub text: Option<TextHash>,
}

impl Tables {
    /// Every table that any task reads, the two of joined texts last.
    pub fn names() -> impl Iterator<Item = &'static str> {
        let joins = ["TextJoinConfig", "TextJoinItem"];
        TALK_TABLES.into_iter().chain(PT_TABLES).chain(joins)
    }

    /// Reads the tables that the tasks need.
    ///
    /// # Errors
    /// A file is missing or no table, a row lacks a field or holds something else in it.
    pub fn read(tree: &Path, tasks: &[Task]) -> Result<Tables> {
        let is_pt = tasks.iter().any(|t| t.is_pt());
        let names: Vec<&'static str> = TALK_TABLES
            .iter()
            .chain(PT_TABLES.iter().filter(|_| is_pt))
            .copied()
            .collect();
        let files = names
            .par_iter()
            .map(|name| JsonFile::read(tree.join("ExcelOutput").join(format!("{name}.json"))))
            .collect::<Result<Vec<_>>>()?;
        let mut tables = Tables {
            tree: tree.to_owned(),
            ..Tables::default()
        };
        for (name, file) in names.into_iter().zip(&files) {
            tables.take(name, file)?;
            tables
                .hashes
                .push((name, Sha256::digest(&file.bytes).into()));
        }
        tables.hashes.sort_unstable();
        Ok(tables)
    }

    /// The tables of joined texts, read when the first marker asks for them.
    pub fn joins(&self) -> Result<Arc<JoinTables>> {
        let mut joins = self.joins.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(joins) = &*joins {
            return Ok(joins.clone());
        }
        let read =
            |name: &str| JsonFile::read(self.tree.join("ExcelOutput").join(format!("{name}.json")));
        let items = rows(
            &read("TextJoinItem")?,
            &["TextJoinItemID", "TextJoinText"],
            |row| {
                Ok(JoinItemRow {
                    id: row.int(0)?,
                    text: row.optional_text(1)?,
                })
            },
        )?;
        let keys = ["TextJoinID", "DefaultItem", "TextJoinItemList"];
        let list = rows(&read("TextJoinConfig")?, &keys, |row| {
            Ok(JoinRow {
                id: row.int(0)?,
                default: row.int(1)?,
                items: row.ints(2)?,
            })
        })?;
        let read = Arc::new(JoinTables { joins: list, items });
        *joins = Some(read.clone());
        Ok(read)
    }

    fn take(&mut self, name: &str, file: &JsonFile) -> Result<()> {
        match name {
            "TalkSentenceConfig" => self.talks = talks(file)?,
            // First AvatarConfig, then AvatarConfigLD: the order of TALK_TABLES.
            "AvatarConfig" | "AvatarConfigLD" => self.people.extend(people(file)?),
            "VoiceAtlas" => self.voices = voices(file)?,
            "BookSeriesConfig" => self.series = series(file)?,
            "LocalbookConfig" => self.books = books(file)?,
            "StoryAtlas" => self.stories = stories(file)?,
            "NounAtlas" => self.nouns = nouns(file)?,
            "ChronicleConclusion" => self.conclusions = conclusions(file)?,
            "MainMission" => self.missions = missions(file)?,
            "SubMission" => self.steps = steps(file)?,
            "TarotMails" => self.mails = sentences(file)?,
            "TarotMailbox" => self.mailboxes = mailboxes(file)?,
            "TarotBookSentence" => self.tales = sentences(file)?,
            "TarotWikiData" => self.wiki = wiki(file, true)?,
            "TarotWikiSubdata" => self.wiki_parts = wiki(file, false)?,
            "TarotWikiChangeinfo" => self.wiki_changes = changes(file)?,
            other => unreachable!("{other} is in no list of tables"),
        }
        Ok(())
    }
}

/// What every task needs.
const TALK_TABLES: [&str; 4] = [
    "TalkSentenceConfig",
    "AvatarConfig",
    "AvatarConfigLD",
    "VoiceAtlas",
];
/// What pre-training needs besides.
const PT_TABLES: [&str; 13] = [
    "BookSeriesConfig",
    "LocalbookConfig",
    "StoryAtlas",
    "NounAtlas",
    "ChronicleConclusion",
    "MainMission",
    "SubMission",
    "TarotMails",
    "TarotMailbox",
    "TarotBookSentence",
    "TarotWikiData",
    "TarotWikiSubdata",
    "TarotWikiChangeinfo",
];

fn talks(file: &JsonFile) -> Result<Vec<TalkRow>> {
    let keys = [
        "TalkSentenceID",
        "TextmapTalkSentenceName",
        "TalkSentenceText",
    ];
    rows(file, &keys, |row| {
        Ok(TalkRow {
            id: row.optional_int(0)?,
            name: row.optional_text(1)?.filter(|h| *h != TextHash::INVALID),
            text: row.optional_text(2)?,
        })
    })
}

fn people(file: &JsonFile) -> Result<Vec<PersonRow>> {
    rows(file, &["AvatarID", "AvatarName"], |row| {
        Ok(PersonRow {
            id: row.int(0)?,
            name: row.text(1)?,
        })
    })
}

fn voices(file: &JsonFile) -> Result<Vec<VoiceRow>> {
    let keys = ["AvatarID", "VoiceTitle", "Voice_M", "SortID", "AudioEvent"];
    rows(file, &keys, |row| {
        row.required(4)?;
        Ok(VoiceRow {
            person: row.int(0)?,
            title: row.text(1)?,
            text: row.text(2)?,
            sort: row.optional_int(3)?,
        })
    })
}

fn series(file: &JsonFile) -> Result<Vec<SeriesRow>> {
    let keys = [
        "BookSeriesID",
        "BookSeries",
        "BookSeriesComments",
        "BookSeriesWorld",
    ];
    rows(file, &keys, |row| {
        Ok(SeriesRow {
            id: row.int(0)?,
            title: row.text(1)?,
            comments: row.optional_text(2)?,
            world: row.int(3)?,
        })
    })
}

fn books(file: &JsonFile) -> Result<Vec<BookRow>> {
    rows(
        file,
        &["BookSeriesID", "BookInsideName", "BookContent"],
        |row| {
            Ok(BookRow {
                series: row.int(0)?,
                name: row.text(1)?,
                content: row.text(2)?,
            })
        },
    )
}

fn stories(file: &JsonFile) -> Result<Vec<StoryRow>> {
    rows(
        file,
        &["AvatarID", "StoryID", "Story", "ReplaceID"],
        |row| {
            let story = row.int(1)?;
            Ok(StoryRow {
                person: row.int(0)?,
                place: row.optional_int(3)?.unwrap_or(story),
                text: row.text(2)?,
            })
        },
    )
}

fn nouns(file: &JsonFile) -> Result<Vec<NounRow>> {
    rows(file, &["NounTitle", "NounDesc"], |row| {
        Ok(NounRow {
            title: row.text(0)?,
            text: row.text(1)?,
        })
    })
}

fn conclusions(file: &JsonFile) -> Result<Vec<ConclusionRow>> {
    rows(file, &["MissionID", "MissionConclusion"], |row| {
        Ok(ConclusionRow {
            mission: row.int(0)?,
            text: row.text(1)?,
        })
    })
}

fn missions(file: &JsonFile) -> Result<Vec<MissionRow>> {
    rows(file, &["MainMissionID", "Name"], |row| {
        Ok(MissionRow {
            id: row.int(0)?,
            name: row.optional_text(1)?,
        })
    })
}

fn steps(file: &JsonFile) -> Result<Vec<StepRow>> {
    // `DescrptionText` is spelled so in the tables.
    rows(
        file,
        &["SubMissionID", "TargetText", "DescrptionText"],
        |row| {
            Ok(StepRow {
                id: row.int(0)?,
                target: row.optional_text(1)?,
                text: row.optional_text(2)?,
            })
        },
    )
}

fn sentences(file: &JsonFile) -> Result<Vec<SentenceRow>> {
    rows(file, &["ID", "Sentence"], |row| {
        Ok(SentenceRow {
            id: row.int(0)?,
            text: row.text(1)?,
        })
    })
}

fn mailboxes(file: &JsonFile) -> Result<Vec<MailboxRow>> {
    rows(
        file,
        &["Title", "From", "To", "MailSentenceIDList"],
        |row| {
            Ok(MailboxRow {
                title: row.text(0)?,
                from: row.text(1)?,
                to: row.text(2)?,
                sentences: row.ints(3)?,
            })
        },
    )
}

fn wiki(file: &JsonFile, has_parts: bool) -> Result<Vec<WikiRow>> {
    let keys = ["ID", "Title", "Details", "ChangeID", "SubdataList"];
    rows(file, &keys, |row| {
        Ok(WikiRow {
            id: row.int(0)?,
            title: row.text(1)?,
            text: row.text(2)?,
            changes: row.ints(3)?,
            parts: if has_parts { row.ints(4)? } else { Vec::new() },
        })
    })
}

fn changes(file: &JsonFile) -> Result<Vec<ChangeRow>> {
    rows(file, &["ChangeID", "NewTitle", "NewDetails"], |row| {
        Ok(ChangeRow {
            id: row.int(0)?,
            title: row.text(1)?,
            text: row.text(2)?,
        })
    })
}

/// Reads a table: an array of objects, of which only `keys` are looked at.
fn rows<T>(
    file: &JsonFile,
    keys: &[&'static str],
    read: impl Fn(&Row<'_, '_>) -> Result<T>,
) -> Result<Vec<T>> {
    file.parse(ArraySeed)?
        .into_iter()
        .map(|raw| {
            if !raw.get().starts_with('{') {
                return Err(Error::WrongType {
                    path: file.path.clone(),
                    line: file.line_of(raw.get()),
                    key: "a row".to_owned(),
                    expected: "an object",
                    got: shorten(raw.get(), 40),
                });
            }
            let cells = read_object(file, raw, keys)?;
            read(&Row {
                file,
                raw,
                keys,
                cells: &cells,
            })
        })
        .collect()
}

fn read_object<'a>(
    file: &JsonFile,
    raw: &'a RawValue,
    keys: &[&'static str],
) -> Result<Vec<Option<&'a RawValue>>> {
    let mut deserializer = serde_json::Deserializer::from_str(raw.get());
    serde::de::DeserializeSeed::deserialize(ObjectSeed(keys), &mut deserializer)
        .map_err(|error| file.error_in(raw.get(), &error))
}

/// One row of a table, for the functions above.
struct Row<'a, 'f> {
    file: &'f JsonFile,
    raw: &'a RawValue,
    keys: &'f [&'static str],
    cells: &'f [Option<&'a RawValue>],
}

impl<'a> Row<'a, '_> {
    fn required(&self, idx: usize) -> Result<&'a RawValue> {
        self.cells[idx].ok_or_else(|| self.missing(idx))
    }

    fn int(&self, idx: usize) -> Result<i128> {
        self.optional_int(idx)?.ok_or_else(|| self.missing(idx))
    }

    fn optional_int(&self, idx: usize) -> Result<Option<i128>> {
        let Some(raw) = self.cells[idx] else {
            return Ok(None);
        };
        match exact_integer(raw.get()) {
            Some(value) => Ok(Some(value)),
            None => Err(self.wrong(idx, "a whole number", raw)),
        }
    }

    fn ints(&self, idx: usize) -> Result<Vec<i128>> {
        let raw = self.required(idx)?;
        let expected = "a list of whole numbers";
        let mut deserializer = serde_json::Deserializer::from_str(raw.get());
        let items = serde::de::DeserializeSeed::deserialize(ArraySeed, &mut deserializer)
            .map_err(|_| self.wrong(idx, expected, raw))?;
        items
            .into_iter()
            .map(|item| exact_integer(item.get()).ok_or_else(|| self.wrong(idx, expected, raw)))
            .collect()
    }

    fn text(&self, idx: usize) -> Result<TextHash> {
        self.optional_text(idx)?.ok_or_else(|| self.missing(idx))
    }

    /// `{"Hash": <integer>}`; null, `{}` and a missing field are absent, a hash that is no number names nothing.
    fn optional_text(&self, idx: usize) -> Result<Option<TextHash>> {
        let Some(raw) = self.cells[idx] else {
            return Ok(None);
        };
        if !raw.get().starts_with('{') {
            return Err(self.wrong(idx, "a text, {\"Hash\": number}", raw));
        }
        let cells = read_object(self.file, raw, &["Hash"])?;
        Ok(cells[0].map(|hash| exact_integer(hash.get()).map_or(TextHash::INVALID, TextHash)))
    }

    fn missing(&self, idx: usize) -> Error {
        Error::MissingCell {
            path: self.file.path.clone(),
            line: self.file.line_of(self.raw.get()),
            key: self.keys[idx],
        }
    }

    fn wrong(&self, idx: usize, expected: &'static str, raw: &RawValue) -> Error {
        Error::WrongType {
            path: self.file.path.clone(),
            line: self.file.line_of(raw.get()),
            key: self.keys[idx].to_owned(),
            expected,
            got: shorten(raw.get(), 40),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(text: &str) -> JsonFile {
        JsonFile::new("T.json".into(), text.as_bytes().to_vec()).unwrap()
    }

    #[test]
    fn optional_text_may_be_absent_null_or_empty() {
        let file = table(
            r#"[{"TalkSentenceID": 5.0, "TalkSentenceText": {"Hash": 18446744073709551615}},
                {"TalkSentenceID": null, "TalkSentenceText": null, "TextmapTalkSentenceName": {}},
                {"TalkSentenceText": {"Hash": "7"}, "TextmapTalkSentenceName": {"Hash": "7"}}]"#,
        );
        let rows = talks(&file).unwrap();
        assert_eq!(rows[0].id, Some(5));
        assert_eq!(rows[0].text, Some(TextHash(u64::MAX.into())));
        assert_eq!((rows[1].id, rows[1].text, rows[1].name), (None, None, None));
        assert_eq!(
            (rows[2].text, rows[2].name),
            (Some(TextHash::INVALID), None)
        );
    }

    fn check_error(text: &str, expect: &str) {
        let Err(error) = stories(&table(text)) else {
            panic!("{text} was read")
        };
        assert!(error.to_string().starts_with(expect), "{error}");
    }

    #[test]
    fn faults_name_line_and_field() {
        check_error("{}", "T.json:1:");
        check_error("[\n7]", "T.json:2: `a row` must be an object, not 7");
        check_error("[\n{\"AvatarID\": 1}]", "T.json:2: `StoryID` is missing");
        check_error(
            "[{\"StoryID\": 1.5}]",
            "T.json:1: `StoryID` must be a whole number, not 1.5",
        );
        check_error(
            "[{\"StoryID\": 1, \"AvatarID\": 2, \"Story\": null}]",
            "T.json:1: `Story` is missing",
        );
        check_error(
            "[{\"StoryID\": 1, \"AvatarID\": 2, \"Story\": 3}]",
            "T.json:1: `Story` must be a text",
        );
        check_error("[] []", "T.json:1:4: trailing characters");
    }

    /// Found by the fuzz target `tables`: the place was that in the row.
    #[test]
    fn fault_inside_a_row_has_its_place_in_the_file() {
        check_error(
            "[\n {\"\\ud800\": 1}]",
            "T.json:2:10: unexpected end of hex escape",
        );
    }
}
