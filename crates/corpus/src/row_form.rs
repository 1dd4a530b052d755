//! What a row says: the forms that people have, each read as a conversation, a text, or ids with labels (docs/rows.md).
//!
//! Whatever else stands in a row is refused by name where it would change what is trained, and counted where it means nothing here.

use serde_json::{Map, Value};
use text::Message;

use crate::examples::TrainingStage;
use crate::packed::{self, IdsPart};
use crate::row_notes::Remark;
use text::near;

/// What a row says.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum PlainRow {
    /// Messages in their order, as they came: the rules of [`text::Conversation`] are not applied yet.
    Conversation(Vec<Message>),
    /// A document.
    Text(String),
    /// Ids with labels, one part for each document that was packed into the row.
    Ids(Vec<IdsPart>),
}

/// Lists of messages. The first is OpenAI's, the second ShareGPT's.
const LISTS: [&str; 5] = [
    "messages",
    "conversations",
    "conversation",
    "dialog",
    "dialogue",
];

/// A question and its answer, by the keys of several tools.
const PAIRS: [(&str, &str); 8] = [
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("query", "response"),
    ("prompt", "response"),
    ("question", "answer"),
    ("input", "output"),
    ("query", "answer"),
];

/// What stands behind an instruction, on a line of its own.
const INPUTS: [&str; 2] = ["input", "context"];

/// The system message beside a list or a pair.
const SYSTEMS: [&str; 2] = ["system", "system_prompt"];

/// Keys of a row that would change what is trained and that nothing here can honour, with the way out.
const REFUSED: [(&[&str], &str); 6] = [
    (
        &["tools", "functions", "function_call", "tool_choice"],
        "tools are not trained here; take the key away, or write what the model is to know of them into the system message",
    ),
    (
        &[
            "images", "image", "videos", "video", "audios", "audio", "objects",
        ],
        "only text is trained here; take the row out, or the key where the text stands for itself",
    ),
    (
        &[
            "rejected",
            "rejected_response",
            "rejected_messages",
            "chosen",
            "preferred_output",
            "non_preferred_output",
            "margin",
        ],
        "preferences are not trained here; leave the wanted answer as the last message",
    ),
    (
        &["label", "kto_tag", "kto"],
        "answers are not marked good or bad here; keep the rows with the wanted answers and take the key away",
    ),
    (
        &[
            "loss_mask",
            "loss_scale",
            "assistant_masks",
            "assistant_mask",
            "completion_mask",
            "prompt_mask",
            "loss_weights",
        ],
        "what carries loss is said by `labels` of -100 beside `input_ids`, or by `\"weight\": 0` in an answer",
    ),
    (
        &["chat_template", "chat_template_kwargs", "enable_thinking"],
        "every row is written by the one template of the project; take the key away",
    ),
];

/// Keys of a row that say how much it counts.
const WEIGHTS: [&str; 5] = ["weight", "sample_weight", "loss_weight", "train", "loss"];

/// Keys that go with ids and change nothing.
const HARMLESS_BESIDE_IDS: [&str; 6] = [
    "length",
    "max_length_q",
    "max_length_k",
    "max_seqlen",
    "num_items_in_batch",
    "token_type_ids",
];

/// Reads a row; gives what it says, and what about it is worth a remark.
///
/// # Errors
/// What is wrong with it and what would be right.
pub(crate) fn read(row: Value, stage: TrainingStage) -> Result<(PlainRow, Vec<Remark>), String> {
    let mut fields = match row {
        Value::Object(fields) => fields,
        // A conversation without anything around it.
        Value::Array(messages) => Map::from_iter([(LISTS[0].to_owned(), Value::Array(messages))]),
        other => {
            return Err(format!(
                "a row is an object such as {{\"messages\":[...]}}, not {}",
                kind(&other)
            ));
        }
    };
    // Tables that became JSON have every column in every row.
    fields.retain(|_, value| !value.is_null());
    let mut row = Row {
        fields,
        remarks: Vec::new(),
    };
    row.refuse_what_changes_training()?;
    let form = row.form(stage)?;
    let plain = match form {
        Form::List(key) => row.conversation(key)?,
        Form::Pair(question, answer) => row.pair(question, answer)?,
        Form::Text => row.text()?,
        Form::Ids => row.ids()?,
    };
    let known: Vec<&str> = known_keys().collect();
    for key in row.fields.keys() {
        row.remarks.push(Remark::UnknownKey {
            near: near::near_miss(key, known.iter().copied()).map(str::to_owned),
            key: key.clone(),
            in_message: false,
        });
    }
    Ok((plain, row.remarks))
}

/// How a row is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// A list of messages under this key.
    List(&'static str),
    /// A question and its answer under these keys.
    Pair(&'static str, &'static str),
    Text,
    Ids,
}

impl Form {
    /// Its keys as a message names them.
    fn name(self) -> String {
        match self {
            Form::List(key) => format!("`{key}`"),
            Form::Pair(question, answer) => format!("`{question}` and `{answer}`"),
            Form::Text => "`text`".to_owned(),
            Form::Ids => "`input_ids`".to_owned(),
        }
    }
}

/// A row on its way: what was read of it is taken out.
struct Row {
    fields: Map<String, Value>,
    remarks: Vec<Remark>,
}

impl Row {
    fn has(&self, key: &str) -> bool {
        self.fields.contains_key(key)
    }

    /// The one form that the row has.
    fn form(&mut self, stage: TrainingStage) -> Result<Form, String> {
        let mut found: Vec<Form> = Vec::new();
        if self.has("input_ids") {
            found.push(Form::Ids);
        }
        let lists = LISTS.into_iter().filter(|key| self.has(key));
        found.extend(lists.map(Form::List));
        let mut pairs = PAIRS.into_iter();
        let pair = pairs.find(|(question, answer)| self.has(question) && self.has(answer));
        found.extend(pair.map(|(question, answer)| Form::Pair(question, answer)));
        if self.has("text") {
            // Alpaca's own rows have the whole text beside their parts; a conversation is trained by its parts.
            if found.is_empty() || stage == TrainingStage::Cpt {
                found.push(Form::Text);
            } else {
                self.fields.remove("text");
                self.remarks.push(Remark::TextBeside);
            }
        }
        match found[..] {
            [form] => Ok(form),
            [] => Err(self.no_form()),
            _ => {
                let names: Vec<String> = found.into_iter().map(Form::name).collect();
                Err(format!(
                    "{} stand in one row, and nobody knows which is to be trained; take all but one away",
                    names.join(" and ")
                ))
            }
        }
    }

    /// What to say of a row in which nothing is to be trained.
    fn no_form(&self) -> String {
        let forms = "a row has `messages`, `text`, `input_ids` with `labels`, `conversations`, `prompt` with `completion` or `instruction` with `output` (docs/rows.md)";
        let known: Vec<&str> = known_keys().collect();
        for key in self.fields.keys() {
            if let Some(near) = near::near_miss(key, known.iter().copied()) {
                return format!("{forms}; did you mean `{near}` by `{key}`?");
            }
        }
        let keys: Vec<String> = self
            .fields
            .keys()
            .take(8)
            .map(|k| format!("`{k}`"))
            .collect();
        match &keys[..] {
            [] => format!("there is nothing in it; {forms}"),
            [only] if self.fields.values().all(|value| value.is_array()) => format!(
                "it holds one list, {only}; write that list alone into the file if it holds the rows: {forms}"
            ),
            _ => format!("it has {}; {forms}", keys.join(", ")),
        }
    }

    /// Refuses keys that would change what is trained; those that say nothing (`"tools": []`) are taken out.
    fn refuse_what_changes_training(&mut self) -> Result<(), String> {
        for (keys, remedy) in REFUSED {
            for key in keys {
                if let Some(value) = self.fields.remove(*key)
                    && !says_nothing(&value)
                {
                    return Err(format!("`{key}` would change what is trained: {remedy}"));
                }
            }
        }
        for key in WEIGHTS {
            match self.fields.remove(key) {
                None | Some(Value::Bool(true)) => {}
                Some(Value::Number(n)) if n.as_f64() == Some(1.0) => {}
                Some(value) => {
                    return Err(format!(
                        "`{key}` of {value} would change what is trained: a row has no weight of its own; keep rows of one weight in a file, and give that file its weight in data.sources"
                    ));
                }
            }
        }
        Ok(())
    }

    /// Refuses keys that mean something in another form only.
    fn refuse_beside(&self, keys: &[&str], form: Form) -> Result<(), String> {
        match keys.iter().find(|key| {
            self.fields
                .get(**key)
                .is_some_and(|value| !says_nothing(value))
        }) {
            None => Ok(()),
            Some(key) => Err(format!(
                "`{key}` beside {} would change what is trained, and nothing says how; take it away",
                form.name()
            )),
        }
    }

    fn conversation(&mut self, key: &'static str) -> Result<PlainRow, String> {
        self.refuse_beside(&["history", "labels"], Form::List(key))?;
        let list = self.fields.remove(key).unwrap_or_default();
        let Value::Array(list) = list else {
            return Err(format!(
                "`{key}` must be a list of messages, not {}",
                kind(&list)
            ));
        };
        if list.is_empty() {
            return Err(format!("`{key}` holds no message"));
        }
        let messages = self.messages(list, key)?;
        self.with_system(messages)
    }

    /// A question and its answer, in front of them what was said before. Where both are lists of messages they are joined.
    fn pair(&mut self, question: &'static str, answer: &'static str) -> Result<PlainRow, String> {
        self.refuse_beside(&["labels"], Form::Pair(question, answer))?;
        let mut messages = self.history()?;
        match as_messages(self.fields.remove(question).unwrap_or_default()) {
            // As TRL has it: a prompt is read, and only the completion is trained.
            Ok(said) => {
                let said = said.into_iter().map(untrained).collect();
                messages.extend(self.messages(said, question)?);
            }
            Err(said) => {
                let mut content = self.content(said, question)?;
                for key in INPUTS.into_iter().filter(|_| question == "instruction") {
                    let Some(input) = self.fields.remove(key) else {
                        continue;
                    };
                    let input = self.content(input, key)?;
                    if !content.is_empty() && !input.is_empty() {
                        content.push('\n');
                    }
                    content.push_str(&input);
                }
                messages.push(Message::user(content));
            }
        }
        match as_messages(self.fields.remove(answer).unwrap_or_default()) {
            Ok(said) => messages.extend(self.messages(said, answer)?),
            Err(said) => messages.push(Message::assistant(self.content(said, answer)?)),
        }
        self.with_system(messages)
    }

    /// `history`: earlier rounds, as pairs of question and answer or as messages. They are trained too, as LLaMA-Factory and ms-swift do.
    fn history(&mut self) -> Result<Vec<Message>, String> {
        let Some(history) = self.fields.remove("history") else {
            return Ok(Vec::new());
        };
        let wrong = "`history` must be a list of pairs [question, answer]";
        let Value::Array(rounds) = history else {
            return Err(format!("{wrong}, not {}", kind(&history)));
        };
        if rounds.first().is_some_and(Value::is_object) {
            return self.messages(rounds, "history");
        }
        let mut messages = Vec::new();
        for round in rounds {
            let Value::Array(round) = round else {
                return Err(format!("{wrong}; one of them is {}", kind(&round)));
            };
            let Ok([question, answer]) = <[Value; 2]>::try_from(round) else {
                return Err(format!("{wrong}; one of them has another length"));
            };
            messages.push(Message::user(self.content(question, "history")?));
            messages.push(Message::assistant(self.content(answer, "history")?));
        }
        Ok(messages)
    }

    /// Puts `system` or `system_prompt` in front. Where the list brings a system message itself that one stands, as in ms-swift and
    /// LLaMA-Factory.
    fn with_system(&mut self, mut messages: Vec<Message>) -> Result<PlainRow, String> {
        let mut system: Option<String> = None;
        for key in SYSTEMS {
            let Some(value) = self.fields.remove(key) else {
                continue;
            };
            let content = self.content(value, key)?;
            match &system {
                Some(other) if *other != content => {
                    return Err(
                        "`system` and `system_prompt` say different things; take one away"
                            .to_owned(),
                    );
                }
                _ => system = Some(content),
            }
        }
        if let Some(system) = system.filter(|system| !system.is_empty()) {
            match messages.first() {
                Some(own) if own.role == text::Role::System => {
                    if own.content.trim() != system.trim() {
                        self.remarks.push(Remark::OwnSystem);
                    }
                }
                _ => messages.insert(0, Message::system(system)),
            }
        }
        Ok(PlainRow::Conversation(messages))
    }

    fn text(&mut self) -> Result<PlainRow, String> {
        let others: Vec<&str> = SYSTEMS.into_iter().chain(["history", "labels"]).collect();
        self.refuse_beside(&others, Form::Text)?;
        match self.fields.remove("text") {
            Some(Value::String(text)) => Ok(PlainRow::Text(text)),
            other => Err(format!(
                "`text` must be a text, not {}",
                kind(&other.unwrap_or_default())
            )),
        }
    }

    fn ids(&mut self) -> Result<PlainRow, String> {
        let others: Vec<&str> = SYSTEMS.into_iter().chain(["history"]).collect();
        self.refuse_beside(&others, Form::Ids)?;
        let parts = packed::parts(&mut self.fields)?;
        for key in HARMLESS_BESIDE_IDS {
            self.fields.remove(key);
        }
        Ok(PlainRow::Ids(parts))
    }

    /// Messages of a list, those of other tools in our keys.
    fn messages(&mut self, list: Vec<Value>, key: &str) -> Result<Vec<Message>, String> {
        let known: Vec<&str> = Message::known_keys().collect();
        let mut messages = Vec::with_capacity(list.len());
        for (index, message) in list.into_iter().enumerate() {
            for message in in_our_keys(message).map_err(|why| format!("`{key}`[{index}] {why}"))? {
                if let Value::Object(fields) = &message {
                    let unknown = fields.iter().filter(|(key, value)| {
                        !known.contains(&key.as_str()) && !says_nothing(value)
                    });
                    self.remarks
                        .extend(unknown.map(|(key, _)| Remark::UnknownKey {
                            near: near::near_miss(key, known.iter().copied()).map(str::to_owned),
                            key: key.clone(),
                            in_message: true,
                        }));
                }
                let message = Message::from_json(index, &message);
                messages.push(message.map_err(|error| error.to_string())?);
            }
        }
        Ok(messages)
    }

    /// A content that stands alone: a text, text parts, or nothing.
    fn content(&self, value: Value, key: &str) -> Result<String, String> {
        let message = serde_json::json!({ "role": "user", "content": value });
        match Message::from_json(0, &message) {
            Ok(message) => Ok(message.content),
            Err(_) => Err(format!("`{key}` must be a text or a list of text parts")),
        }
    }
}

/// Keys that are read, for hints at misspelt ones.
fn known_keys() -> impl Iterator<Item = &'static str> {
    let pairs = PAIRS
        .into_iter()
        .flat_map(|(question, answer)| [question, answer]);
    ["text", "input_ids", "labels", "history"]
        .into_iter()
        .chain(LISTS)
        .chain(pairs)
        .chain(SYSTEMS)
        .chain(packed::KEYS)
}

/// A message in the keys `role` and `content`: ShareGPT's have `from` and `value`; one object may hold a whole round.
fn in_our_keys(message: Value) -> Result<Vec<Value>, String> {
    let Value::Object(mut fields) = message else {
        return Err(format!(
            "must say who speaks, as {{\"role\":\"user\",\"content\":\"...\"}} does; it is {}",
            kind(&message)
        ));
    };
    let Some(name) = ["role", "from"].iter().find_map(|key| fields.remove(*key)) else {
        return round(fields);
    };
    let role = match name {
        Value::String(name) => Value::String(match role(&name) {
            Some("") => {
                return Err(format!(
                    "has the role `{name}`: calls of tools are not trained here; write what the model is to say into the content of an answer"
                ));
            }
            Some(ours) => ours.to_owned(),
            None => name,
        }),
        other => other,
    };
    if !fields.contains_key("content")
        && let Some(content) = ["value", "text"].iter().find_map(|key| fields.remove(*key))
    {
        fields.insert("content".to_owned(), content);
    }
    fields.insert("role".to_owned(), role);
    Ok(vec![Value::Object(fields)])
}

/// `{"human": "...", "assistant": "..."}`: what each says, in the order of the keys.
fn round(fields: Map<String, Value>) -> Result<Vec<Value>, String> {
    let who = "must say who speaks, as {\"role\":\"user\",\"content\":\"...\"} does";
    if fields.contains_key("author") || fields.contains_key("mes") {
        return Err(format!(
            "{who}; it looks like a line of a chat log, which `cyrene corpus import` turns into a story"
        ));
    }
    let roles: Option<Vec<&str>> = fields.keys().map(|key| role(key)).collect();
    match roles {
        Some(roles) if !roles.is_empty() && !roles.contains(&"") => Ok(roles
            .into_iter()
            .zip(fields.values())
            .map(|(role, content)| serde_json::json!({ "role": role, "content": content }))
            .collect()),
        _ => Err(who.to_owned()),
    }
}

/// Our name for who speaks, by the names of other tools; empty for what cannot be trained.
fn role(name: &str) -> Option<&'static str> {
    Some(match name.to_ascii_lowercase().as_str() {
        "system" | "developer" => "system",
        "user" | "human" => "user",
        "assistant" | "gpt" | "chatgpt" | "bing" | "bard" | "model" | "bot" => "assistant",
        "tool" | "observation" | "function_response" | "tool_response" => "tool",
        "function_call" | "tool_call" | "function" => "",
        _ => return None,
    })
}

/// The messages of a value that is a list of them; else the value, which may be a text or a list of its parts.
fn as_messages(value: Value) -> Result<Vec<Value>, Value> {
    let is_message = |first: &Value| {
        let fields = first.as_object();
        fields.is_some_and(|fields| !fields.contains_key("type"))
    };
    match value {
        Value::Array(list) if list.first().is_some_and(is_message) => Ok(list),
        other => Err(other),
    }
}

/// A message of a prompt: read, not trained, where it does not say so itself.
fn untrained(mut message: Value) -> Value {
    let names = ["role", "from"].iter().find_map(|key| message.get(*key));
    let is_answer = names.and_then(Value::as_str).and_then(role) == Some("assistant");
    if let Value::Object(fields) = &mut message
        && is_answer
        && !["loss", "train", "weight"]
            .iter()
            .any(|key| fields.contains_key(*key))
    {
        fields.insert("loss".to_owned(), Value::Bool(false));
    }
    message
}

/// Whether a value is there for form's sake: `null`, nothing, an empty list or object, or the text of one.
fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => matches!(text.trim(), "" | "[]" | "{}" | "null"),
        Value::Array(list) => list.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

/// A value's kind in words.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
