//! What JSON values say, in the one sense that messages, rows and their errors share.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

/// Characters of a key in a message.
const MOST_SHOWN: usize = 80;

/// A value in which no object has a key twice: the last would stand for both, and what the first says would be lost in silence.
#[derive(Debug, Clone, PartialEq)]
pub struct Unambiguous(pub Value);

impl<'de> Deserialize<'de> for Unambiguous {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(EachKeyOnce).map(Unambiguous)
    }
}

struct EachKeyOnce;

impl<'de> Visitor<'de> for EachKeyOnce {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(text.into())
    }

    fn visit_string<E>(self, text: String) -> Result<Value, E> {
        Ok(text.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(Unambiguous(item)) = items.next_element()? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut pairs: A) -> Result<Value, A::Error> {
        let mut fields = Map::new();
        while let Some(key) = pairs.next_key::<String>()? {
            if fields.contains_key(&key) {
                let shown: String = key.chars().take(MOST_SHOWN).collect();
                let problem = format!("the key `{shown}` stands twice in one object, keep one");
                return Err(de::Error::custom(problem));
            }
            let Unambiguous(value) = pairs.next_value()?;
            fields.insert(key, value);
        }
        Ok(Value::Object(fields))
    }
}

/// Whether a value says nothing: null, a blank text, an empty list or object. Tables that became JSON have every column in every row.
pub fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.trim().is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

/// The same of a value that is data and no words, such as a list of tools, which some tools write as a text: `"[]"` holds nothing.
pub fn holds_nothing(value: &Value) -> bool {
    let text = value.as_str().map(str::trim);
    says_nothing(value) || matches!(text, Some("[]" | "{}" | "null"))
}

/// A value's kind, in words.
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn value_is_read_as_serde_reads_it() {
        let text = r#"{"b": [1, -2, 2.5, 1e300, true, null, "x\u00e9", {}], "a": {"b": 18446744073709551615}}"#;
        let Unambiguous(value) = serde_json::from_str(text).unwrap();
        assert_eq!(value, serde_json::from_str::<Value>(text).unwrap());
        // In its order.
        assert_eq!(
            value.to_string(),
            serde_json::from_str::<Value>(text).unwrap().to_string()
        );
    }

    #[test]
    fn key_that_stands_twice_is_named_at_any_depth_and_however_it_is_spelt() {
        for text in [
            r#"{"a": 1, "a": 2}"#,
            r#"[{"b": [{"a": 1, "x": 2, "a": 1}]}]"#,
            r#"{"a": 1, "\u0061": 2}"#,
        ] {
            let error = serde_json::from_str::<Unambiguous>(text).unwrap_err();
            assert!(error.to_string().contains("`a` stands twice"), "{error}");
            assert_eq!(error.line(), 1);
        }
        let apart = r#"[{"a": 1}, {"a": {"a": 2}}]"#;
        assert!(serde_json::from_str::<Unambiguous>(apart).is_ok());
    }
}
