//! Every field that clients are known to send, and what becomes of it: read, taken because it cannot change the answer, or refused.
//! One table, so that no field is lost in silence: docs/api.md shows it, and a field that is not in it is refused by name.

mod table;

use std::fmt;

use serde_json::Value;

use crate::error::ApiError;
use crate::fields::Fields;
use table::GROUPS;

/// An address that takes a JSON body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Endpoint {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completions,
}

/// Fields that are treated alike.
pub(crate) struct Group {
    pub names: &'static [&'static str],
    /// Whose fields they are.
    pub from: &'static str,
    /// `None` = both addresses.
    pub endpoint: Option<Endpoint>,
    pub rule: Rule,
}

/// What becomes of a field.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Rule {
    /// Read; the text says how.
    Read(&'static str),
    /// Read as the field named.
    Alias(&'static str),
    /// Taken, because it cannot change the answer; the text says why.
    Taken(&'static str),
    /// Has an effect with the field named only, which has a rule of its own.
    Part(&'static str),
    /// Refused unless it asks for nothing; the text says what to do instead.
    Refused(Neutral, &'static str),
}

/// Values that ask for nothing, beside null.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Neutral {
    /// False, and empty strings, lists and objects.
    Empty,
    /// Those, and these numbers.
    Numbers(&'static [f64]),
    /// Those, and numbers below this.
    Below(f64),
    /// Those, and these strings.
    Words(&'static [&'static str]),
    /// True alone.
    True,
}

use Neutral::{Below, Empty, Numbers, True, Words};
use Rule::{Alias, Part, Read, Refused, Taken};

/// Keys of a message that are read, here or by [`text::Message`], which refuses some of them.
const MESSAGE_KEYS: [&str; 16] = [
    "role",
    "content",
    "reasoning_content",
    "prefix",
    "tool_calls",
    "function_call",
    "images",
    "image",
    "videos",
    "video",
    "audios",
    "audio",
    "objects",
    "loss",
    "train",
    "weight",
];

/// Keys of a message that name it, its sender or what it answers, which the chat template does not show.
const MESSAGE_NAMES: [&str; 9] = [
    "name",
    "id",
    "tool_call_id",
    "model",
    "created",
    "created_at",
    "timestamp",
    "metadata",
    "cache_control",
];

/// Holds a message's keys against those that are known.
///
/// # Errors
/// The first key that asks for something nobody here knows; thoughts of anybody but the assistant, which no prompt shows.
pub(crate) fn check_message(message: &Fields) -> Result<(), ApiError> {
    const THOUGHTS: &str = "reasoning_content";
    let asks = |name: &str| message.get(name).is_some_and(|value| !Empty.holds(value));
    let is_answer = message.get("role").and_then(Value::as_str) == Some("assistant");
    if !is_answer && asks(THOUGHTS) {
        return Err(ApiError::field(
            message.name(THOUGHTS),
            "is read of an assistant's message only; write what it says into `content`",
        ));
    }
    let known = [MESSAGE_KEYS.as_slice(), &MESSAGE_NAMES].concat();
    for name in message.names() {
        if !known.contains(&name.as_str()) && asks(&name) {
            return Err(ApiError::field(
                message.name(&name),
                "is not a key of a message here; write what it says into `content`, thoughts into `reasoning_content`",
            ));
        }
    }
    Ok(())
}

/// Holds a request's fields against the table: other names become the one that is read, what asks for nothing is taken, the rest refused.
///
/// # Errors
/// The first field that would change the answer and cannot be honoured, or that nobody knows.
pub(crate) fn check(fields: &mut Fields, endpoint: Endpoint) -> Result<(), ApiError> {
    for name in fields.names() {
        let Some(value) = fields.get(&name) else {
            continue;
        };
        match find(&name, endpoint) {
            Some(Read(_) | Taken(_) | Part(_)) => {}
            Some(Alias(target)) => fields.rename(&name, target)?,
            Some(Refused(neutral, instead)) => {
                if !neutral.holds(value) {
                    let problem = format!("is not supported by this server: {instead}");
                    return Err(ApiError::field(fields.name(&name), problem));
                }
            }
            None if Empty.holds(value) => {}
            None => {
                return Err(ApiError::field(
                    fields.name(&name),
                    unknown(&name, endpoint),
                ));
            }
        }
    }
    Ok(())
}

/// The table of fields in Markdown, as docs/api.md shows it.
pub fn fields_markdown() -> String {
    let mut rows = vec![
        "| field | of | what becomes of it |".to_owned(),
        "| --- | --- | --- |".to_owned(),
    ];
    for group in GROUPS {
        let names: Vec<String> = group.names.iter().map(|n| format!("`{n}`")).collect();
        let names = names.join(" ");
        let place = match group.endpoint {
            None => "",
            Some(Endpoint::Chat) => " (chat)",
            Some(Endpoint::Completions) => " (completions)",
        };
        let fate = match group.rule {
            Read(how) => format!("read: {how}"),
            Alias(target) => format!("read as `{target}`"),
            Taken(why) => format!("taken: {why}"),
            Part(of) => format!("goes with `{of}`"),
            Refused(neutral, instead) => match neutral.to_string() {
                none if none.is_empty() => format!("refused: {instead}"),
                neutral => format!("refused unless {neutral}: {instead}"),
            },
        };
        rows.push(format!("| {names} | {}{place} | {fate} |", group.from));
    }
    rows.join("\n")
}

fn find(name: &str, endpoint: Endpoint) -> Option<Rule> {
    GROUPS
        .iter()
        .filter(|group| group.endpoint.is_none_or(|only| only == endpoint))
        .find(|group| group.names.contains(&name))
        .map(|group| group.rule)
}

fn unknown(name: &str, endpoint: Endpoint) -> String {
    let letters = |name: &str| name.replace(['_', '-'], "").to_lowercase();
    let known = GROUPS
        .iter()
        .flat_map(|group| group.names.iter().map(move |name| (group, *name)))
        .find(|(_, known)| letters(known) == letters(name));
    match known {
        Some((group, known)) if group.endpoint.is_none_or(|only| only == endpoint) => {
            format!("is not a field of this address; did you mean `{known}`?")
        }
        Some((_, known)) => format!(
            "is not a field of this address; `{known}` belongs to {}",
            match endpoint {
                Endpoint::Chat => "/v1/completions",
                Endpoint::Completions => "/v1/chat/completions",
            }
        ),
        None => "is not a field that this server knows, and it could change the answer; leave it out (docs/api.md lists them all)".to_owned(),
    }
}

impl Neutral {
    /// Whether `value` asks for nothing.
    pub fn holds(self, value: &Value) -> bool {
        let is_empty = match value {
            Value::Null => true,
            Value::Bool(flag) => *flag == matches!(self, True),
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            Value::String(text) => text.is_empty(),
            Value::Number(_) => false,
        };
        is_empty
            || match (self, value) {
                (Numbers(numbers), value) => value
                    .as_f64()
                    .is_some_and(|number| numbers.contains(&number)),
                (Below(most), value) => value.as_f64().is_some_and(|number| number < most),
                (Words(words), Value::String(text)) => words.contains(&text.as_str()),
                (Words(words), Value::Array(list)) => list
                    .iter()
                    .all(|item| item.as_str().is_some_and(|text| words.contains(&text))),
                _ => false,
            }
    }
}

impl fmt::Display for Neutral {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |items: Vec<String>| items.join(", ");
        match self {
            Empty => Ok(()),
            Numbers(numbers) => f.write_str(&list(numbers.iter().map(f64::to_string).collect())),
            Below(most) => write!(f, "below {most}"),
            Words(words) => f.write_str(&list(words.iter().map(|w| format!("`{w}`")).collect())),
            True => f.write_str("true"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::json;

    use super::*;

    const DOCS: &str = include_str!("../../../../docs/api.md");

    #[test]
    fn docs_show_the_table_as_it_is() {
        let table = fields_markdown();
        assert!(DOCS.contains(&table), "docs/api.md should hold:\n{table}");
    }

    #[test]
    fn every_field_has_one_rule_at_an_address() {
        for endpoint in [Endpoint::Chat, Endpoint::Completions] {
            let mut seen = BTreeSet::new();
            for group in GROUPS {
                if group.endpoint.is_none_or(|only| only == endpoint) {
                    for name in group.names {
                        assert!(seen.insert(*name), "{name} stands twice");
                    }
                }
            }
        }
    }

    #[test]
    fn rules_that_name_another_field_name_one_with_a_rule_of_its_own() {
        for group in GROUPS {
            let other = match group.rule {
                Alias(target) => target,
                Part(of) => of,
                _ => continue,
            };
            let endpoint = group.endpoint.unwrap_or(Endpoint::Chat);
            match find(other, endpoint) {
                Some(Read(_)) => {}
                Some(Refused(..)) if matches!(group.rule, Part(_)) => {}
                rule => panic!("{other}: {rule:?}"),
            }
        }
    }

    #[test]
    fn every_field_that_is_said_to_be_read_is_read() {
        let sources = [
            include_str!("../generation.rs"),
            include_str!("../options.rs"),
            include_str!("../api/mod.rs"),
            include_str!("../api/chat_completions.rs"),
            include_str!("../api/completions.rs"),
        ]
        // A name in a file's own tests reads nothing.
        .map(|source| source.split("#[cfg(test)]").next().unwrap())
        .concat();
        for group in GROUPS {
            if let Read(_) = group.rule {
                for name in group.names {
                    assert!(sources.contains(&format!("\"{name}\"")), "{name}");
                }
            }
        }
    }

    fn outcome(endpoint: Endpoint, body: Value) -> Result<Fields, String> {
        let mut fields = Fields::parse(body.to_string().as_bytes()).unwrap();
        match check(&mut fields, endpoint) {
            Ok(()) => Ok(fields),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn values_that_ask_for_nothing_are_taken() {
        let neutral = json!({
            "typical_p": 1, "tfs_z": 1.0, "mirostat": 0, "mirostat_tau": 5, "mirostat_eta": 0.1,
            "xtc_probability": 0, "xtc_threshold": 0.1, "dry_multiplier": 0.0, "dry_base": 1.75,
            "grammar": "", "guided_json": null, "guided_choice": [], "structured_outputs": {},
            "top_n_sigma": -1, "adaptive_target": -0.01, "do_sample": true, "num_beams": 1,
            "nobody_knows": null, "nobody_either": false, "modalities": ["text"], "tools": [],
        });
        outcome(Endpoint::Chat, neutral).unwrap();
    }

    #[test]
    fn fields_that_would_change_the_answer_are_refused_by_name() {
        for (field, value) in [
            ("typical_p", json!(0.9)),
            ("mirostat", json!(2)),
            ("xtc_probability", json!(0.5)),
            ("grammar", json!("root ::= \"yes\"")),
            ("guided_choice", json!(["yes", "no"])),
            ("structured_outputs", json!({"choice": ["yes"]})),
            ("do_sample", json!(false)),
            ("adaptive_target", json!(0.3)),
            ("samplers", json!(["top_k"])),
            ("prompt_logprobs", json!(0)),
            ("modalities", json!(["text", "audio"])),
        ] {
            let message = outcome(Endpoint::Chat, json!({ field: value }))
                .err()
                .unwrap();
            assert!(
                message.starts_with(&format!("`{field}` is not supported")),
                "{message}"
            );
        }
    }

    #[test]
    fn unknown_fields_are_refused_with_the_nearest_name() {
        for (field, endpoint, expect) in [
            ("maxTokens", Endpoint::Chat, "did you mean `max_tokens`?"),
            (
                "messages",
                Endpoint::Completions,
                "belongs to /v1/chat/completions",
            ),
            ("suffix", Endpoint::Chat, "belongs to /v1/completions"),
            ("temprature", Endpoint::Chat, "leave it out"),
        ] {
            let message = outcome(endpoint, json!({ field: "x" })).err().unwrap();
            assert!(
                message.contains(&format!("`{field}`")) && message.contains(expect),
                "{message}"
            );
        }
    }

    #[test]
    fn other_names_are_read_as_the_one_they_stand_for() {
        let fields = outcome(
            Endpoint::Completions,
            json!({"n_predict": 5, "max_new_tokens": 5}),
        )
        .unwrap();
        assert_eq!(fields.integer("max_tokens", 1..=9).unwrap(), Some(5));
        // A refusal speaks of the field that was sent.
        let fields = outcome(Endpoint::Completions, json!({"n_predict": 50})).unwrap();
        let error = fields.integer("max_tokens", 1..=9).unwrap_err().to_string();
        assert!(error.starts_with("`n_predict` must be"), "{error}");
        let error = outcome(Endpoint::Chat, json!({"max_tokens": 5, "n_predict": 6}))
            .err()
            .unwrap();
        assert!(
            error.contains("`n_predict`") && error.contains("`max_tokens`"),
            "{error}"
        );
    }
}
