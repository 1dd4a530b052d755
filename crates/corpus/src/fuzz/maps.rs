//! Text maps and tables of a tree, against a plain reading with serde_json.

use std::collections::BTreeMap;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;

use super::{check_place, clear, put};
use crate::language::Language;
use crate::source::turn_based_game::{Tables, TextHash, TextMapFiles};
use crate::task::Task;

/// Parts of a map, a zero byte between them.
pub(super) fn text_map(data: &[u8], folder: &Path) {
    clear(folder, "TextMap");
    let parts: Vec<&[u8]> = data.split(|b| *b == 0).take(4).collect();
    for (idx, part) in parts.iter().enumerate() {
        put(folder, &format!("TextMap/TextMapEN_{idx}.json"), part);
    }
    let plain = plain_map(&parts);
    let files = match TextMapFiles::read(folder, Language::En) {
        Ok(files) => files,
        Err(error) => return check_place(&error),
    };
    let map = match files.parse() {
        Ok(map) => map,
        Err(error) => {
            assert!(plain.is_none(), "refused, but it is a map: {error}");
            return check_place(&error);
        }
    };
    for part in &parts {
        let is_json = serde_json::from_slice::<IgnoredAny>(part).is_ok();
        assert!(is_json, "taken, but it is no JSON");
    }
    for (hash, value) in plain.into_iter().flatten() {
        assert!(map.find(TextHash(hash)).is_some());
        match (map.get(TextHash(hash)), value) {
            (Ok(text), Value::String(expect)) => assert_eq!(text.as_deref(), Some(&expect[..])),
            (Err(error), Value::String(_)) => panic!("a text that is no text: {error}"),
            (Ok(_), other) => panic!("{other} is no text"),
            (Err(error), _) => check_place(&error),
        }
    }
}

/// The map that the parts are, by a plain reading; `None` where that finds a fault or cannot judge.
fn plain_map(parts: &[&[u8]]) -> Option<BTreeMap<i128, Value>> {
    let mut map = BTreeMap::new();
    for part in parts {
        let Pairs(pairs) = serde_json::from_slice(part).ok()?;
        for (key, value) in pairs {
            map.insert(plain_key(&key)?, value);
        }
    }
    Some(map)
}

/// An integer as the rules write keys; `None` for others, and for digits and blanks beyond ASCII.
fn plain_key(key: &str) -> Option<i128> {
    let key = key.trim_matches(|c: char| matches!(c, '\t'..='\r' | '\u{1c}'..='\u{1f}' | ' '));
    let digits = key.strip_prefix(['+', '-']).unwrap_or(key);
    let is_number = digits
        .split('_')
        .all(|run| !run.is_empty() && run.bytes().all(|b| b.is_ascii_digit()));
    let short = digits.len() < 30;
    if !is_number || !short {
        return None;
    }
    let value: i128 = digits.replace('_', "").parse().ok()?;
    Some(if key.starts_with('-') { -value } else { value })
}

/// An object with all its keys, equal ones too.
struct Pairs(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct All;
        impl<'de> Visitor<'de> for All {
            type Value = Pairs;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(All)
    }
}

/// A line with the name of a table, then the table.
pub(super) fn tables(data: &[u8], folder: &Path) {
    let mut halves = data.splitn(2, |b| *b == b'\n');
    let name = halves.next().unwrap_or_default();
    let table = halves.next().unwrap_or_default();
    let Some(name) = Tables::names().find(|known| known.as_bytes() == name) else {
        return;
    };
    for other in Tables::names() {
        put(folder, &format!("ExcelOutput/{other}.json"), b"[]");
    }
    put(folder, &format!("ExcelOutput/{name}.json"), table);
    let read = Tables::read(folder, &[Task::PtEverything]);
    match read.and_then(|tables| tables.joins().map(|_| tables)) {
        Ok(_) => {
            let rows = serde_json::from_slice::<Vec<IgnoredAny>>(table);
            assert!(rows.is_ok(), "taken, but it is no list");
        }
        Err(error) => check_place(&error),
    }
}
