//! Reading a request's JSON by hand, so that every refusal names the field, what it must be and what was sent.
//! serde's own messages name no field, and ranges would have to be checked a second time.

use std::fmt::Display;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::error::ApiError;
use crate::parameters::Neutral;

/// A JSON object and the path that led to it. `null` counts as absent.
#[derive(Debug, Clone)]
pub(crate) struct Fields {
    path: String,
    map: Map<String, Value>,
    /// Fields that came under another name, and that name.
    spelt: Vec<(&'static str, String)>,
}

/// Whole numbers that JSON's floats can tell apart.
const WHOLE: f64 = 9_007_199_254_740_992.0;

impl Fields {
    /// The object of a request body; a byte order mark in front is passed over.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body);
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Fields::of(String::new(), map)),
            Ok(other) => Err(ApiError::Json {
                detail: format!("got {}", kind(&other)),
            }),
            Err(error) => Err(ApiError::Json {
                detail: error.to_string(),
            }),
        }
    }

    /// An object inside another one; `path` names it in refusals.
    pub fn nested(path: String, value: &Value) -> Result<Self, ApiError> {
        match value {
            Value::Object(map) => Ok(Fields::of(path, map.clone())),
            other => Err(ApiError::field(
                path,
                format!("must be an object, got {}", kind(other)),
            )),
        }
    }

    fn of(path: String, map: Map<String, Value>) -> Self {
        Fields {
            path,
            map,
            spelt: Vec::new(),
        }
    }

    /// The fields' names as they were sent, in order.
    pub fn names(&self) -> Vec<String> {
        self.map.keys().cloned().collect()
    }

    /// The field's full name, as it was sent.
    pub fn name(&self, field: &str) -> String {
        let spelt = self.spelt.iter().find(|(read, _)| *read == field);
        let field = spelt.map_or(field, |(_, sent)| sent);
        if self.path.is_empty() {
            field.to_owned()
        } else {
            format!("{}.{field}", self.path)
        }
    }

    /// Makes the field sent as `name` the one that is read as `target`.
    ///
    /// # Errors
    /// Where that one says something else.
    pub fn rename(&mut self, name: &str, target: &'static str) -> Result<(), ApiError> {
        let Some(value) = self.map.remove(name) else {
            return Ok(());
        };
        match self.get(target) {
            None => {
                self.map.insert(target.to_owned(), value);
                self.spelt.push((target, name.to_owned()));
                Ok(())
            }
            Some(other) if is_same(other, &value) => Ok(()),
            Some(_) => Err(contradiction(name, &self.name(target))),
        }
    }

    /// The field's value; `None` if it is absent or null.
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    /// A number in `range`.
    pub fn number(&self, field: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, ApiError> {
        let Some(value) = self.get(field) else {
            return Ok(None);
        };
        match value.as_f64() {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ => Err(self.refusal(field, between("a number", &range), value)),
        }
    }

    /// A whole number in `range`, also one that is written as 42.0.
    pub fn integer(
        &self,
        field: &str,
        range: RangeInclusive<u64>,
    ) -> Result<Option<u64>, ApiError> {
        let Some(value) = self.get(field) else {
            return Ok(None);
        };
        match whole(value) {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ => Err(self.refusal(field, between("a whole number", &range), value)),
        }
    }

    /// Whether the field is -1, which many use for "none".
    pub fn is_minus_one(&self, field: &str) -> bool {
        self.get(field).and_then(Value::as_f64) == Some(-1.0)
    }

    /// True or false.
    pub fn boolean(&self, field: &str) -> Result<Option<bool>, ApiError> {
        let Some(value) = self.get(field) else {
            return Ok(None);
        };
        match value.as_bool() {
            Some(flag) => Ok(Some(flag)),
            None => Err(self.refusal(field, "true or false", value)),
        }
    }

    /// A string.
    pub fn string(&self, field: &str) -> Result<Option<&str>, ApiError> {
        let Some(value) = self.get(field) else {
            return Ok(None);
        };
        match value.as_str() {
            Some(text) => Ok(Some(text)),
            None => Err(self.refusal(field, "a string", value)),
        }
    }

    /// One string or a list of at most `most`; empty ones are left out.
    pub fn strings(&self, field: &str, most: usize) -> Result<Vec<String>, ApiError> {
        let Some(value) = self.get(field) else {
            return Ok(Vec::new());
        };
        let list = match value {
            Value::Array(list) => list.as_slice(),
            one => std::slice::from_ref(one),
        };
        let strings: Option<Vec<&str>> = list.iter().map(Value::as_str).collect();
        match strings {
            Some(strings) if strings.len() <= most => Ok(strings
                .into_iter()
                .filter(|text| !text.is_empty())
                .map(str::to_owned)
                .collect()),
            _ => {
                let expected = format!("a string or a list of at most {most} strings");
                Err(self.refusal(field, expected, value))
            }
        }
    }

    /// A list of token ids.
    pub fn ids(&self, field: &str, most: usize) -> Result<Vec<u32>, ApiError> {
        let Some(value) = self.get(field) else {
            return Ok(Vec::new());
        };
        match ids(value) {
            Some(ids) if ids.len() <= most => Ok(ids),
            _ => Err(self.refusal(field, format!("a list of at most {most} token ids"), value)),
        }
    }

    /// An object.
    pub fn object(&self, field: &str) -> Result<Option<Fields>, ApiError> {
        self.get(field)
            .map(|value| Fields::nested(self.name(field), value))
            .transpose()
    }

    /// Refuses every field but `known` ones, unless it asks for nothing.
    pub fn only(&self, known: &[&str]) -> Result<(), ApiError> {
        let stranger = self
            .map
            .iter()
            .find(|(name, value)| !known.contains(&name.as_str()) && !Neutral::Empty.holds(value));
        match stranger {
            Some((name, _)) => Err(ApiError::field(
                self.name(name),
                format!(
                    "is not supported by this server; it takes {} here",
                    known.join(", ")
                ),
            )),
            None => Ok(()),
        }
    }

    /// The error of a field that is not what it must be.
    pub fn refusal(&self, field: &str, expected: impl Display, got: &Value) -> ApiError {
        ApiError::field(
            self.name(field),
            format!("must be {expected}, got {}", brief(got)),
        )
    }
}

/// What flags that mean one thing say together, each with its full name; `None` where all are absent.
///
/// # Errors
/// Where two of them differ.
pub(crate) fn agreed(flags: &[(String, Option<bool>)]) -> Result<Option<bool>, ApiError> {
    let mut sent = flags
        .iter()
        .filter_map(|(name, flag)| Some((name, (*flag)?)));
    let Some((first, said)) = sent.next() else {
        return Ok(None);
    };
    match sent.find(|(_, flag)| *flag != said) {
        Some((name, _)) => Err(contradiction(name, first)),
        None => Ok(Some(said)),
    }
}

fn contradiction(name: &str, other: &str) -> ApiError {
    ApiError::field(
        name,
        format!("is another name of `{other}` and says something else; send one of the two"),
    )
}

/// A list of token ids, if `value` is one.
pub(crate) fn ids(value: &Value) -> Option<Vec<u32>> {
    let list = value.as_array()?;
    let ids = list.iter().map(|item| u32::try_from(whole(item)?).ok());
    ids.collect()
}

/// A whole number that is not negative, however it is written.
fn whole(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| {
        let number = value.as_f64()?;
        let is_whole = number.fract() == 0.0 && (0.0..=WHOLE).contains(&number);
        is_whole.then_some(number as u64)
    })
}

/// Whether two values say the same; 5 and 5.0 do.
fn is_same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}

fn between<T: Display>(what: &str, range: &RangeInclusive<T>) -> String {
    format!("{what} from {} to {}", range.start(), range.end())
}

/// The value as it was sent if it is short, else only its kind: errors never repeat a conversation.
fn brief(value: &Value) -> String {
    let text = value.to_string();
    if text.len() <= 24 {
        text
    } else {
        kind(value).to_owned()
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(body: &str, read: impl Fn(&Fields) -> Result<(), ApiError>) -> String {
        match Fields::parse(body.as_bytes()).and_then(|fields| read(&fields)) {
            Ok(()) => "fine".to_owned(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn refusals_name_field_expectation_and_value() {
        let text = message(r#"{"temperature": "hot"}"#, |fields| {
            fields.number("temperature", 0.0..=2.0).map(|_| ())
        });
        assert_eq!(
            text,
            "`temperature` must be a number from 0 to 2, got \"hot\""
        );
        let text = message(r#"{"stream_options": {"include_usage": 1}}"#, |fields| {
            let options = fields.object("stream_options")?;
            options.map(|o| o.boolean("include_usage")).transpose()?;
            Ok(())
        });
        assert_eq!(
            text,
            "`stream_options.include_usage` must be true or false, got 1"
        );
    }

    #[test]
    fn negative_and_huge_integers_are_refused() {
        for body in [r#"{"n": -1}"#, r#"{"n": 1e30}"#, r#"{"n": 1.5}"#] {
            let text = message(body, |fields| fields.integer("n", 1..=8).map(|_| ()));
            assert!(text.starts_with("`n` must be a whole number"), "{text}");
        }
    }

    #[test]
    fn null_counts_as_absent() {
        let text = message(r#"{"n": null}"#, |fields| {
            assert_eq!(fields.integer("n", 1..=8)?, None);
            Ok(())
        });
        assert_eq!(text, "fine");
    }

    #[test]
    fn long_values_are_not_repeated() {
        let body = format!(r#"{{"n": "{}"}}"#, "secret ".repeat(20));
        let text = message(&body, |fields| fields.integer("n", 1..=8).map(|_| ()));
        assert!(text.ends_with("got a string"), "{text}");
    }
}
