//! Reading a request's JSON by hand, so that every refusal names the field, what it must be and what was sent.
//! serde's own messages name no field, and ranges would have to be checked a second time.

use std::fmt::Display;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::error::ApiError;

/// A JSON object and the path that led to it. `null` counts as absent, unknown fields are left alone.
pub(crate) struct Fields {
    path: String,
    map: Map<String, Value>,
}

impl Fields {
    /// The object of a request body.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Fields {
                path: String::new(),
                map,
            }),
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
            Value::Object(map) => Ok(Fields {
                path,
                map: map.clone(),
            }),
            other => Err(ApiError::field(
                path,
                format!("must be an object, got {}", kind(other)),
            )),
        }
    }

    /// The field's full name.
    pub fn name(&self, field: &str) -> String {
        if self.path.is_empty() {
            field.to_owned()
        } else {
            format!("{}.{field}", self.path)
        }
    }

    pub fn get(&self, field: &str) -> Option<&Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    pub fn number(&self, field: &str, range: RangeInclusive<f64>) -> Result<Option<f64>, ApiError> {
        let Some(value) = self.get(field) else {
            return Ok(None);
        };
        match value.as_f64() {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ => Err(self.refusal(field, between("a number", &range), value)),
        }
    }

    pub fn integer(
        &self,
        field: &str,
        range: RangeInclusive<u64>,
    ) -> Result<Option<u64>, ApiError> {
        let Some(value) = self.get(field) else {
            return Ok(None);
        };
        match value.as_u64() {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ => Err(self.refusal(field, between("a whole number", &range), value)),
        }
    }

    pub fn boolean(&self, field: &str) -> Result<Option<bool>, ApiError> {
        let Some(value) = self.get(field) else {
            return Ok(None);
        };
        match value.as_bool() {
            Some(flag) => Ok(Some(flag)),
            None => Err(self.refusal(field, "true or false", value)),
        }
    }

    pub fn string(&self, field: &str) -> Result<Option<&str>, ApiError> {
        let Some(value) = self.get(field) else {
            return Ok(None);
        };
        match value.as_str() {
            Some(text) => Ok(Some(text)),
            None => Err(self.refusal(field, "a string", value)),
        }
    }

    /// One string or a list of at most `most`; none of them empty.
    pub fn strings(&self, field: &str, most: usize) -> Result<Vec<String>, ApiError> {
        let Some(value) = self.get(field) else {
            return Ok(Vec::new());
        };
        let expected = format!("a string or a list of at most {most} strings, none of them empty");
        let list = match value {
            Value::Array(list) => list.as_slice(),
            one => std::slice::from_ref(one),
        };
        let strings: Option<Vec<String>> = list
            .iter()
            .map(|item| item.as_str().filter(|s| !s.is_empty()).map(str::to_owned))
            .collect();
        match strings {
            Some(strings) if strings.len() <= most => Ok(strings),
            _ => Err(self.refusal(field, expected, value)),
        }
    }

    /// A list of token ids.
    pub fn ids(&self, field: &str, most: usize) -> Result<Vec<u32>, ApiError> {
        let Some(value) = self.get(field) else {
            return Ok(Vec::new());
        };
        let ids = value.as_array().and_then(|list| {
            list.iter()
                .map(|item| item.as_u64().and_then(|id| u32::try_from(id).ok()))
                .collect::<Option<Vec<u32>>>()
        });
        match ids {
            Some(ids) if ids.len() <= most => Ok(ids),
            _ => Err(self.refusal(field, format!("a list of at most {most} token ids"), value)),
        }
    }

    pub fn object(&self, field: &str) -> Result<Option<Fields>, ApiError> {
        self.get(field)
            .map(|value| Fields::nested(self.name(field), value))
            .transpose()
    }

    /// Refuses features that would change the answer and are not there, rather than answering something else in silence.
    pub fn refuse(&self, fields: &[&str]) -> Result<(), ApiError> {
        for field in fields {
            let is_set = self.get(field).is_some_and(|value| match value {
                Value::Bool(flag) => *flag,
                Value::Array(list) => !list.is_empty(),
                Value::Object(map) => !map.is_empty(),
                Value::String(text) => !text.is_empty(),
                _ => true,
            });
            if is_set {
                return Err(ApiError::field(
                    self.name(field),
                    "is not supported by this server; leave it out",
                ));
            }
        }
        Ok(())
    }

    pub fn refusal(&self, field: &str, expected: impl Display, got: &Value) -> ApiError {
        ApiError::field(
            self.name(field),
            format!("must be {expected}, got {}", brief(got)),
        )
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
