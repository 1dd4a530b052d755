//! Reads JSON without copies and without losing digits: numbers are kept as they are written until asked for.
//! Keys may repeat (the last one wins), and what nobody asks for is only checked to be JSON.

use std::path::{Path, PathBuf};

use files::outside;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::error::{Error, Result, without_position};

/// A file of the tree, without a byte order mark.
pub(crate) struct JsonFile {
    pub path: PathBuf,
    pub bytes: Vec<u8>,
}

impl JsonFile {
    pub fn read(path: PathBuf) -> Result<JsonFile> {
        let bytes =
            outside::read(&path, outside::MOST_DATA_BYTES).map_err(|source| Error::Read {
                path: path.clone(),
                source,
            })?;
        JsonFile::new(path, bytes)
    }

    pub fn new(path: PathBuf, bytes: Vec<u8>) -> Result<JsonFile> {
        if bytes.starts_with(b"\xef\xbb\xbf") {
            return Err(Error::ByteOrderMark { path });
        }
        Ok(JsonFile { path, bytes })
    }

    /// # Errors
    /// The file is not UTF-8.
    pub fn text(&self) -> Result<&str> {
        simdutf8::compat::from_utf8(&self.bytes)
            .map_err(|error| Error::not_utf8(&self.path, &self.bytes[..error.valid_up_to()]))
    }

    /// Deserializes the whole text; anything behind the value is an error.
    pub fn parse<'a, S: DeserializeSeed<'a>>(&'a self, seed: S) -> Result<S::Value> {
        let mut deserializer = serde_json::Deserializer::from_str(self.text()?);
        seed.deserialize(&mut deserializer)
            .and_then(|value| deserializer.end().map(|()| value))
            .map_err(|error| json_error(&self.path, &error))
    }

    /// Line of a piece of this text.
    pub fn line_of(&self, piece: &str) -> usize {
        self.before(piece).iter().filter(|b| **b == b'\n').count() + 1
    }

    /// The error of a piece of this text that was read alone, with its place in the whole.
    pub fn error_in(&self, piece: &str, error: &serde_json::Error) -> Error {
        let mut whole = json_error(&self.path, error);
        if let Error::Json { line, column, .. } = &mut whole {
            if *line == 1 {
                let before = self.before(piece);
                *column += before.iter().rev().take_while(|b| **b != b'\n').count();
            }
            *line += self.line_of(piece) - 1;
        }
        whole
    }

    /// The bytes before a piece of this text.
    fn before(&self, piece: &str) -> &[u8] {
        let offset = (piece.as_ptr() as usize)
            .saturating_sub(self.bytes.as_ptr() as usize)
            .min(self.bytes.len());
        &self.bytes[..offset]
    }
}

pub(crate) fn json_error(path: &Path, error: &serde_json::Error) -> Error {
    Error::Json {
        path: path.to_owned(),
        line: error.line(),
        column: error.column().max(1),
        problem: without_position(&error.to_string()),
    }
}

/// The wanted cells of an object, in the order of `keys`; `null` counts as absent.
pub(crate) type Cells<'a> = Vec<Option<&'a RawValue>>;

/// Reads an object: the values of `keys`, all others ignored.
pub(crate) struct ObjectSeed<'k>(pub &'k [&'static str]);

impl<'de> DeserializeSeed<'de> for ObjectSeed<'_> {
    type Value = Cells<'de>;

    fn deserialize<D: Deserializer<'de>>(
        self,
        deserializer: D,
    ) -> std::result::Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for ObjectSeed<'_> {
    type Value = Cells<'de>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(
        self,
        mut map: A,
    ) -> std::result::Result<Self::Value, A::Error> {
        let mut cells: Cells<'de> = vec![None; self.0.len()];
        while let Some(place) = map.next_key_seed(KeySeed(self.0))? {
            match place {
                Some(place) => {
                    let value: &'de RawValue = map.next_value()?;
                    cells[place] = (value.get() != "null").then_some(value);
                }
                None => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(cells)
    }
}

/// Reads a key as its place among the wanted ones.
struct KeySeed<'k>(&'k [&'static str]);

impl<'de> DeserializeSeed<'de> for KeySeed<'_> {
    type Value = Option<usize>;

    fn deserialize<D: Deserializer<'de>>(
        self,
        deserializer: D,
    ) -> std::result::Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for KeySeed<'_> {
    type Value = Option<usize>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E>(self, key: &str) -> std::result::Result<Self::Value, E> {
        Ok(self.0.iter().position(|known| *known == key))
    }
}

/// Reads an array as the raw texts of its items.
pub(crate) struct ArraySeed;

impl<'de> DeserializeSeed<'de> for ArraySeed {
    type Value = Vec<&'de RawValue>;

    fn deserialize<D: Deserializer<'de>>(
        self,
        deserializer: D,
    ) -> std::result::Result<Self::Value, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for ArraySeed {
    type Value = Vec<&'de RawValue>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(
        self,
        mut seq: A,
    ) -> std::result::Result<Self::Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(items)
    }
}

/// The whole number that a JSON number is, exactly; `None` for a fraction, a text, or one beyond 38 digits.
pub(crate) fn exact_integer(number: &str) -> Option<i128> {
    let (negative, unsigned) = match number.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, number),
    };
    if !unsigned.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    let (mantissa, exponent) = match unsigned.find(['e', 'E']) {
        Some(at) => (&unsigned[..at], unsigned[at + 1..].parse::<i32>().ok()?),
        None => (unsigned, 0),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let fraction = fraction.trim_end_matches('0');
    let mut value: i128 = 0;
    for digit in whole.bytes().chain(fraction.bytes()) {
        value = value
            .checked_mul(10)?
            .checked_add(i128::from(digit - b'0'))?;
    }
    let mut shift = exponent.checked_sub(i32::try_from(fraction.len()).ok()?)?;
    while shift > 0 && value != 0 {
        value = value.checked_mul(10)?;
        shift -= 1;
    }
    while shift < 0 && value != 0 {
        if value % 10 != 0 {
            return None;
        }
        value /= 10;
        shift += 1;
    }
    Some(if negative { -value } else { value })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(number: &str, expect: Option<i128>) {
        assert_eq!(exact_integer(number), expect, "{number}");
    }

    #[test]
    fn integers_are_exact() {
        check("18446744073709551615", Some(18_446_744_073_709_551_615));
        check("9007199254740993.0", Some(9_007_199_254_740_993));
        check("5.0", Some(5));
        check("5.10", None);
        check("-3", Some(-3));
        check("1.5e3", Some(1500));
        check("150e-1", Some(15));
        check("15e-1", None);
        check("0e999999999", Some(0));
        check("1e999999999", None);
        check("\"5\"", None);
        check("true", None);
    }

    #[test]
    fn last_of_equal_keys_wins_and_null_is_absent() {
        let file = JsonFile::new(
            "t.json".into(),
            br#"{"a": 1, "c": {"a": 3}, "a": 2, "b": null}"#.to_vec(),
        )
        .unwrap();
        let cells = file.parse(ObjectSeed(&["a", "b"])).unwrap();
        assert_eq!(cells[0].map(RawValue::get), Some("2"));
        assert!(cells[1].is_none());
    }

    #[test]
    fn what_follows_the_value_is_an_error_with_its_place() {
        let file = JsonFile::new("t.json".into(), b"[1,\n2] x".to_vec()).unwrap();
        let error = file.parse(ArraySeed).unwrap_err().to_string();
        assert_eq!(
            error,
            "t.json:2:4: trailing characters; mend the JSON there"
        );
    }
}
