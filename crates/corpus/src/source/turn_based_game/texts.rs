//! Looks texts up: joined texts are put in, written line feeds become real ones.

use std::borrow::Cow;
use std::cell::OnceCell;
use std::collections::HashMap;

use super::tables::Tables;
use super::text_map::{MapValue, TextHash, TextMap};
use crate::error::{Error, Result};
use crate::language::Language;
use crate::rules::digits;

/// The texts of one language.
pub(crate) struct Texts<'a> {
    pub language: Language,
    pub map: &'a TextMap<'a>,
    tables: &'a Tables,
    joined: OnceCell<Joined<'a>>,
}

/// Number of a joined text -> the text; or the hash that some item has and the map lacks.
type Joined<'a> = std::result::Result<HashMap<i128, Cow<'a, str>>, TextHash>;

/// A text, or the hash that is unknown (its own or one of a joined text in it).
type Lookup<'a> = std::result::Result<Cow<'a, str>, TextHash>;

/// Where a hash stands, for the error of an unknown one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    pub table: &'static str,
    pub field: &'static str,
    pub id: i128,
}

impl<'a> Texts<'a> {
    pub fn new(language: Language, map: &'a TextMap<'a>, tables: &'a Tables) -> Texts<'a> {
        Texts {
            language,
            map,
            tables,
            joined: OnceCell::new(),
        }
    }

    /// # Errors
    /// The hash, or one of a joined text in it, is unknown; or the value cannot be read.
    pub fn strict(&self, hash: TextHash, place: Place) -> Result<Cow<'a, str>> {
        let found = self.lookup(hash)?;
        found.map_err(|unknown| self.unknown(unknown, place))
    }

    /// As [`Texts::strict`], of a value that was found before.
    pub fn strict_of(&self, value: MapValue<'a>, place: Place) -> Result<Cow<'a, str>> {
        let made = self.made(value)?;
        made.map_err(|unknown| self.unknown(unknown, place))
    }

    fn unknown(&self, hash: TextHash, place: Place) -> Error {
        Error::UnknownText {
            table: place.table,
            id: place.id.to_string(),
            field: place.field,
            hash: hash.to_string(),
            language: self.language.code(),
        }
    }

    /// `None` where the strict look-up fails with an unknown hash.
    ///
    /// # Errors
    /// The value cannot be read.
    pub fn lenient(&self, hash: TextHash) -> Result<Option<Cow<'a, str>>> {
        Ok(self.lookup(hash)?.ok())
    }

    fn lookup(&self, hash: TextHash) -> Result<Lookup<'a>> {
        match self.map.find(hash) {
            Some(value) => self.made(value),
            None => Ok(Err(hash)),
        }
    }

    fn made(&self, value: MapValue<'a>) -> Result<Lookup<'a>> {
        let raw = self.map.read(value)?;
        // Most texts have neither.
        if memchr::memchr2(b'{', b'\\', raw.as_bytes()).is_none() {
            return Ok(Ok(raw));
        }
        // 1. joined texts
        let text = match self.put_joined(raw)? {
            Ok(text) => text,
            Err(unknown) => return Ok(Err(unknown)),
        };
        // 2. backslash and n
        Ok(Ok(if text.contains("\\n") {
            Cow::Owned(text.replace("\\n", "\n"))
        } else {
            text
        }))
    }

    fn put_joined(&self, text: Cow<'a, str>) -> Result<Lookup<'a>> {
        const START: &str = "{TEXTJOIN#";
        if !text.contains(START) {
            return Ok(Ok(text));
        }
        let mut out = String::with_capacity(text.len());
        let mut rest = &text[..];
        while let Some(at) = rest.find(START) {
            out.push_str(&rest[..at]);
            rest = &rest[at..];
            let Some((number, length)) = marker_number(&rest[START.len()..]) else {
                out.push_str(START);
                rest = &rest[START.len()..];
                continue;
            };
            let length = START.len() + length;
            let joined = match self.joined()? {
                Ok(joined) => joined,
                Err(unknown) => return Ok(Err(*unknown)),
            };
            match joined.get(&number) {
                Some(text) => out.push_str(text),
                None => out.push_str(&rest[..length]),
            }
            rest = &rest[length..];
        }
        out.push_str(rest);
        Ok(Ok(Cow::Owned(out)))
    }

    fn joined(&self) -> Result<&Joined<'a>> {
        if let Some(joined) = self.joined.get() {
            return Ok(joined);
        }
        let joined = self.read_joined()?;
        Ok(self.joined.get_or_init(|| joined))
    }

    fn read_joined(&self) -> Result<Joined<'a>> {
        let tables = self.tables.joins()?;
        let mut items = HashMap::new();
        for item in &tables.items {
            if let Some(hash) = item.text {
                match self.map.get(hash)? {
                    Some(text) => items.insert(item.id, text),
                    None => return Ok(Err(hash)),
                };
            }
        }
        let mut joined = HashMap::new();
        for row in &tables.joins {
            let mut list = row.items.clone();
            list.sort_unstable();
            let first = std::iter::once(&row.default)
                .chain(&list)
                .find_map(|id| items.get(id));
            if let Some(text) = first {
                joined.insert(row.id, text.clone());
            }
        }
        Ok(Ok(joined))
    }
}

/// The number of a marker and its bytes with the closing brace.
fn marker_number(inner: &str) -> Option<(i128, usize)> {
    let end = inner.find(|c| digits::value(c).is_none())?;
    if end == 0 || !inner[end..].starts_with('}') {
        return None;
    }
    let mut number: i128 = 0;
    for digit in inner[..end].chars().filter_map(digits::value) {
        // A number too long for any table names no joined text.
        number = number.saturating_mul(10).saturating_add(i128::from(digit));
    }
    Some((number, end + 1))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::source::turn_based_game::text_map::TextMapFiles;

    const JOINS: &str = r#"[
        {"TextJoinID": 1, "DefaultItem": 10, "TextJoinItemList": [12, 11]},
        {"TextJoinID": 2, "DefaultItem": 99, "TextJoinItemList": [12, 11]},
        {"TextJoinID": 3, "DefaultItem": 99, "TextJoinItemList": [13]},
        {"TextJoinID": 1, "DefaultItem": 99, "TextJoinItemList": [13]}]"#;
    const ITEMS: &str = r#"[
        {"TextJoinItemID": 10, "TextJoinText": {"Hash": 1}},
        {"TextJoinItemID": 11, "TextJoinText": {"Hash": 2}},
        {"TextJoinItemID": 12, "TextJoinText": {"Hash": 3}},
        {"TextJoinItemID": 13}]"#;
    const MAP: &str = r#"{"1": "ten{TEXTJOIN#2}\\n", "2": "", "3": "twelve",
        "20": "<{TEXTJOIN#001}>{TEXTJOIN#2}{TEXTJOIN#3}{TEXTJOIN#}{TEXTJOIN#1", "21": "a\\\\nb\\t", "22": "{TEXTJOIN#٢}!"}"#;

    fn check(items: &str, hash: i128, expect: std::result::Result<Option<&str>, &str>) {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap_or(Path::new("."))).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("TextMap/TextMapEN.json", MAP);
        write("ExcelOutput/TextJoinConfig.json", JOINS);
        write("ExcelOutput/TextJoinItem.json", items);
        for table in [
            "TalkSentenceConfig",
            "AvatarConfig",
            "AvatarConfigLD",
            "VoiceAtlas",
        ] {
            write(&format!("ExcelOutput/{table}.json"), "[]");
        }
        let tables = Tables::read(folder.path(), &[]).unwrap();
        let files = TextMapFiles::read(folder.path(), Language::En).unwrap();
        let map = files.parse().unwrap();
        let texts = Texts::new(Language::En, &map, &tables);
        let got = texts.lenient(TextHash(hash));
        match expect {
            Ok(expect) => assert_eq!(got.unwrap().as_deref(), expect),
            Err(expect) => assert!(got.unwrap_err().to_string().contains(expect)),
        }
    }

    #[test]
    fn markers_take_the_default_or_the_first_item() {
        // What is put in is not searched for markers, but its written line feeds count; number 3 has no text.
        check(
            ITEMS,
            20,
            Ok(Some(
                "<ten{TEXTJOIN#2}\n>{TEXTJOIN#3}{TEXTJOIN#}{TEXTJOIN#1",
            )),
        );
        check(ITEMS, 22, Ok(Some("!")));
    }

    #[test]
    fn backslash_n_is_a_line_feed_and_nothing_else_is() {
        check(ITEMS, 21, Ok(Some("a\\\nb\\t")));
    }

    #[test]
    fn unknown_item_fails_only_texts_with_markers() {
        let items = r#"[{"TextJoinItemID": 77, "TextJoinText": {"Hash": 777}}]"#;
        check(items, 21, Ok(Some("a\\\nb\\t")));
        check(items, 20, Ok(None));
    }

    #[test]
    fn broken_join_table_is_an_error_even_when_lenient() {
        check(
            "[{\"TextJoinText\": null}]",
            20,
            Err("`TextJoinItemID` is missing"),
        );
        check("nothing", 21, Ok(Some("a\\\nb\\t")));
    }
}
