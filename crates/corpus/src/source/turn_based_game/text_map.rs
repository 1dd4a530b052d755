//! The text map of one language: hash -> text, borrowed from the file and unescaped only where it is used.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::de::{DeserializeSeed, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use super::json::JsonFile;
use crate::error::{Error, Result, shorten};
use crate::fold::Fold;
use crate::language::Language;

/// The hash of a text: an exact integer. What is written as a text is no hash and names nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct TextHash(pub i128);

impl TextHash {
    /// What stands in the place of a hash but is none.
    pub const INVALID: TextHash = TextHash(i128::MIN);
}

impl std::fmt::Display for TextHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if *self == TextHash::INVALID {
            f.write_str("(not a number)")
        } else {
            self.0.fmt(f)
        }
    }
}

/// The files of a language's text map.
pub(crate) struct TextMapFiles {
    files: Vec<JsonFile>,
}

impl TextMapFiles {
    pub fn read(tree: &Path, language: Language) -> Result<TextMapFiles> {
        let paths = paths(tree, language);
        let files = paths
            .into_iter()
            .map(JsonFile::read)
            .collect::<Result<_>>()?;
        Ok(TextMapFiles { files })
    }

    /// How large a language's map is; what cannot be read counts as nothing.
    pub fn bytes(tree: &Path, language: Language) -> u64 {
        let bytes = |path| std::fs::metadata(path).map_or(0, |data| data.len());
        paths(tree, language).into_iter().map(bytes).sum()
    }

    pub fn is_missing(&self) -> bool {
        self.files.is_empty()
    }

    /// SHA-256 over the contents.
    pub fn sha256(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        for file in &self.files {
            hash.update((file.bytes.len() as u64).to_le_bytes());
            hash.update(&file.bytes);
        }
        hash.finalize().into()
    }

    /// # Errors
    /// Broken JSON, or a key that is no integer.
    pub fn parse(&self) -> Result<TextMap<'_>> {
        // A guess that is rarely too low: to make room for more while reading takes as long as reading.
        let bytes: usize = self.files.iter().map(|file| file.bytes.len()).sum();
        let mut texts = Texts::with_capacity_and_hasher(bytes / BYTES_PER_TEXT, Fold::default());
        for file in &self.files {
            file.parse(MapSeed(&mut texts))?;
        }
        Ok(TextMap {
            texts,
            files: &self.files,
        })
    }
}

/// `TextMap<LANG>.json` alone if it is there, else `TextMap<LANG>_0.json`, `_1`, ... until one is missing.
fn paths(tree: &Path, language: Language) -> Vec<PathBuf> {
    let folder = tree.join("TextMap");
    let code = language.code().to_uppercase();
    let whole = folder.join(format!("TextMap{code}.json"));
    if whole.exists() {
        return vec![whole];
    }
    (0..)
        .map(|part| folder.join(format!("TextMap{code}_{part}.json")))
        .take_while(|path| path.exists())
        .collect()
}

/// Of a map's file, with hash and quotes.
const BYTES_PER_TEXT: usize = 150;

type Texts<'a> = HashMap<TextHash, &'a RawValue, Fold>;

pub(crate) struct TextMap<'a> {
    texts: Texts<'a>,
    files: &'a [JsonFile],
}

/// A value that a map has for a hash.
#[derive(Clone, Copy)]
pub(crate) struct MapValue<'a> {
    pub hash: TextHash,
    raw: &'a RawValue,
}

impl<'a> TextMap<'a> {
    /// The value of a hash, unread; `None` if the map lacks it.
    pub fn find(&self, hash: TextHash) -> Option<MapValue<'a>> {
        let raw = *self.texts.get(&hash)?;
        Some(MapValue { hash, raw })
    }

    /// The text of a hash; `None` if the map lacks it.
    ///
    /// # Errors
    /// As [`TextMap::read`].
    pub fn get(&self, hash: TextHash) -> Result<Option<Cow<'a, str>>> {
        self.find(hash).map(|value| self.read(value)).transpose()
    }

    /// The text that a value is.
    ///
    /// # Errors
    /// The value is no text, or holds half a surrogate pair.
    pub fn read(&self, value: MapValue<'a>) -> Result<Cow<'a, str>> {
        let MapValue { hash, raw } = value;
        let raw = raw.get();
        let Some(inner) = raw.strip_prefix('"').and_then(|r| r.strip_suffix('"')) else {
            let (file, line) = self.place(raw);
            return Err(Error::WrongType {
                path: file.path.clone(),
                line,
                key: hash.to_string(),
                expected: "a text",
                got: shorten(raw, 40),
            });
        };
        if memchr::memchr(b'\\', inner.as_bytes()).is_none() {
            return Ok(Cow::Borrowed(inner));
        }
        match serde_json::from_str::<String>(raw) {
            Ok(text) => Ok(Cow::Owned(text)),
            Err(error) => {
                let (file, _) = self.place(raw);
                let mut error = file.error_in(raw, &error);
                if let Error::Json { problem, .. } = &mut error {
                    *problem = format!("the text of hash {hash} cannot be read: {problem}");
                }
                Err(error)
            }
        }
    }

    /// The file and line of a raw value.
    fn place(&self, raw: &str) -> (&'a JsonFile, usize) {
        let at = raw.as_ptr() as usize;
        let holds = |file: &&JsonFile| {
            let start = file.bytes.as_ptr() as usize;
            (start..start + file.bytes.len()).contains(&at)
        };
        let file = self.files.iter().find(holds).unwrap_or(&self.files[0]);
        (file, file.line_of(raw))
    }
}

struct MapSeed<'m, 'a>(&'m mut Texts<'a>);

impl<'de> DeserializeSeed<'de> for MapSeed<'_, 'de> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(
        self,
        deserializer: D,
    ) -> std::result::Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for MapSeed<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object of texts by hash")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<(), A::Error> {
        while let Some(hash) = map.next_key_seed(HashSeed)? {
            self.0.insert(hash, map.next_value()?);
        }
        Ok(())
    }
}

struct HashSeed;

impl<'de> DeserializeSeed<'de> for HashSeed {
    type Value = TextHash;

    fn deserialize<D: Deserializer<'de>>(
        self,
        deserializer: D,
    ) -> std::result::Result<TextHash, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for HashSeed {
    type Value = TextHash;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a number written as a text")
    }

    fn visit_str<E: serde::de::Error>(self, key: &str) -> std::result::Result<TextHash, E> {
        parse_key(key)
            .map(TextHash)
            .ok_or_else(|| E::custom(format!("the key `{}` is not a number", shorten(key, 40))))
    }
}

/// An integer key: blanks around it, a sign, leading zeros and single underscores between digits are accepted.
fn parse_key(key: &str) -> Option<i128> {
    if let Ok(plain) = key.parse::<u64>() {
        return Some(i128::from(plain));
    }
    let trimmed = key.trim_matches(crate::rules::paragraph::is_space);
    let (negative, digits) = match trimmed.as_bytes().first()? {
        b'-' => (true, &trimmed[1..]),
        b'+' => (false, &trimmed[1..]),
        _ => (false, trimmed),
    };
    let mut value: i128 = 0;
    let mut after_digit = false;
    for c in digits.chars() {
        if c == '_' && after_digit {
            after_digit = false;
            continue;
        }
        let digit = crate::rules::digits::value(c)?;
        // A number too long to be anybody's hash is still a number; it names nothing.
        value = value.saturating_mul(10).saturating_add(i128::from(digit));
        after_digit = true;
    }
    // The last character must be a digit: an underscore stands between two.
    after_digit.then_some(if negative { -value } else { value })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_key(key: &str, expect: Option<i128>) {
        assert_eq!(parse_key(key), expect, "{key:?}");
    }

    #[test]
    fn keys_are_read_as_integers() {
        check_key("18446744073709551615", Some(18_446_744_073_709_551_615));
        check_key(" +007\n", Some(7));
        check_key("-1_000", Some(-1000));
        check_key("1__0", None);
        check_key("_1", None);
        check_key("1_", None);
        check_key("", None);
        check_key(" ", None);
        check_key("-", None);
        check_key("+-1", None);
        check_key("1 2", None);
        check_key("0x10", None);
        check_key("12a", None);
    }

    fn map(text: &str) -> TextMapFiles {
        let file = JsonFile::new("TextMapEN.json".into(), text.as_bytes().to_vec()).unwrap();
        TextMapFiles { files: vec![file] }
    }

    #[test]
    fn bad_value_is_an_error_only_when_used() {
        let files =
            map("{\"1\": 5,\n \"2\": \"\\ud800\", \"3\": \"a\\u00e9\\n\", \"3 \": \"later\"}");
        let map = files.parse().unwrap();
        assert_eq!(map.get(TextHash(3)).unwrap().unwrap(), "later");
        assert_eq!(map.get(TextHash(9)).unwrap(), None);
        let error = map.get(TextHash(1)).unwrap_err().to_string();
        assert_eq!(error, "TextMapEN.json:1: `1` must be a text, not 5");
        let error = map.get(TextHash(2)).unwrap_err().to_string();
        assert!(error.starts_with("TextMapEN.json:2:14: "), "{error}");
        assert!(
            error.contains("surrogate") || error.contains("hex escape"),
            "{error}"
        );
    }

    #[test]
    fn key_that_is_no_number_names_line() {
        let files = map("{\"1\": \"a\",\n\"x\": \"b\"}");
        let Err(error) = files.parse() else {
            panic!("read")
        };
        assert!(
            error.to_string().starts_with("TextMapEN.json:2:"),
            "{error}"
        );
        assert!(
            error.to_string().contains("the key `x` is not a number"),
            "{error}"
        );
    }

    #[test]
    fn later_part_wins() {
        let folder = tempfile::tempdir().unwrap();
        let maps = folder.path().join("TextMap");
        std::fs::create_dir(&maps).unwrap();
        std::fs::write(maps.join("TextMapRU_0.json"), r#"{"1": "a", "2": "b"}"#).unwrap();
        std::fs::write(maps.join("TextMapRU_1.json"), r#"{"2": "c"}"#).unwrap();
        std::fs::write(maps.join("TextMapRU_3.json"), r#"{"2": "d"}"#).unwrap();
        let files = TextMapFiles::read(folder.path(), Language::Ru).unwrap();
        assert_eq!(
            files.parse().unwrap().get(TextHash(2)).unwrap().unwrap(),
            "c"
        );
        std::fs::write(maps.join("TextMapRU.json"), r#"{"1": "w"}"#).unwrap();
        let files = TextMapFiles::read(folder.path(), Language::Ru).unwrap();
        assert!(files.parse().unwrap().find(TextHash(2)).is_none());
        assert!(
            TextMapFiles::read(folder.path(), Language::Th)
                .unwrap()
                .is_missing()
        );
    }
}
