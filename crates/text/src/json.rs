//! What JSON values say, in the one sense that messages, rows and their errors share.

use serde_json::Value;

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
