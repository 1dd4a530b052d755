//! What a row says: the forms that people have, each read as a conversation, a text, or ids with labels (docs/rows.md).
//!
//! Whatever else stands in a row is refused by name where it would change what is trained, and counted where it means nothing here.

use serde_json::{Map, Value};
use text::json::{holds_nothing, kind, says_nothing};
use text::{Message, Role, near};

use crate::examples::TrainingStage;
use crate::packed::{self, IdsPart};
use crate::row_notes::Remark;

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

/// Alpaca's question.
const INSTRUCTION: &str = "instruction";

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
        stage,
        remarks: Vec::new(),
    };
    row.refuse_what_changes_training()?;
    let form = row.form()?;
    let own = form.keys();
    row.fields
        .retain(|key, value| own.contains(&key.as_str()) || !says_nothing(value) || !is_known(key));
    let plain = match form {
        Form::List(key) => row.conversation(key)?,
        Form::Pair(question, answer) => row.pair(question, answer)?,
        Form::Text => row.text()?,
        Form::Ids => row.ids()?,
    };
    if let PlainRow::Conversation(messages) = &plain
        && stage == TrainingStage::Sft
        && !messages.iter().any(is_learned)
    {
        row.remarks.push(Remark::OnlyEndTrained);
    }
    for key in row.fields.keys() {
        let near = match form {
            _ if is_known(key) => None,
            Form::Ids => hint(key, packed::keys()),
            _ => hint(key, known_keys()),
        };
        row.remarks.push(Remark::UnknownKey {
            near: near.map(str::to_owned),
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
    /// The keys that make it.
    fn keys(self) -> Vec<&'static str> {
        match self {
            Form::List(key) => vec![key],
            Form::Pair(question, answer) => vec![question, answer],
            Form::Text => vec!["text"],
            Form::Ids => vec!["input_ids"],
        }
    }
}

/// Keys as an error names them.
fn named(keys: &[&str]) -> String {
    let keys: Vec<String> = keys.iter().map(|key| format!("`{key}`")).collect();
    keys.join(" and ")
}

/// A row on its way: what was read of it is taken out.
struct Row {
    fields: Map<String, Value>,
    stage: TrainingStage,
    remarks: Vec<Remark>,
}

impl Row {
    fn has(&self, key: &str) -> bool {
        self.fields.contains_key(key)
    }

    /// The one form that the row has.
    fn form(&mut self) -> Result<Form, String> {
        let mut found = self.forms(|value| !says_nothing(value));
        if found.is_empty() {
            // A row that says nothing is of the form that it has all the same.
            found = self.forms(|_| true);
            found.truncate(1);
        }
        let text_beside = match found[..] {
            [Form::Ids, Form::Text] => Some(Remark::TextBesideIds),
            // Alpaca's own rows have the whole text beside their parts; a conversation is trained by its parts.
            [_, .., Form::Text] if self.stage == TrainingStage::Sft => Some(Remark::TextBeside),
            _ => None,
        };
        if let Some(remark) = text_beside {
            found.pop();
            self.fields.remove("text");
            self.remarks.push(remark);
        }
        match found[..] {
            [form] => Ok(form),
            [] => Err(self.no_form()),
            _ => {
                let mut keys = Vec::new();
                for key in found.into_iter().flat_map(Form::keys) {
                    if !keys.contains(&key) {
                        keys.push(key);
                    }
                }
                Err(format!(
                    "{} stand in one row, and nobody knows which is to be trained; take away what is not",
                    named(&keys)
                ))
            }
        }
    }

    /// The forms whose keys are all there with a value that counts.
    fn forms(&self, counts: fn(&Value) -> bool) -> Vec<Form> {
        let has = |key: &str| self.fields.get(key).is_some_and(counts);
        let mut found = Vec::new();
        if has("input_ids") {
            found.push(Form::Ids);
        }
        let lists = LISTS.into_iter().filter(|key| has(key));
        found.extend(lists.map(Form::List));
        let pairs = PAIRS.into_iter();
        let pairs = pairs.filter(|(question, answer)| has(question) && has(answer));
        let mut pairs: Vec<(&str, &str)> = pairs.collect();
        if pairs.iter().any(|(question, _)| *question == INSTRUCTION) {
            // What stands there is a part of the question.
            pairs.retain(|(question, _)| !INPUTS.contains(question));
        }
        let pairs = pairs.into_iter();
        found.extend(pairs.map(|(question, answer)| Form::Pair(question, answer)));
        if has("text") {
            found.push(Form::Text);
        }
        found
    }

    /// What to say of a row in which nothing is to be trained.
    fn no_form(&self) -> String {
        let forms = "a row has `messages`, `text`, `input_ids` with `labels`, `conversations`, `prompt` with `completion` or `instruction` with `output` (docs/rows.md)";
        let unknown = self.fields.keys().filter(|key| !is_known(key));
        for key in unknown {
            if let Some(near) = hint(key, known_keys()) {
                return format!("{forms}; did you mean `{near}` by `{key}`?");
            }
        }
        if let Some(missing) = self.missing_partner() {
            return format!("{missing} beside it; {forms}");
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

    /// What a question lacks that has no answer, or an answer that has no question.
    fn missing_partner(&self) -> Option<String> {
        let sides = PAIRS.into_iter();
        let mut sides = sides.flat_map(|(question, answer)| [question, answer]);
        let key = sides.find(|key| self.has(key))?;
        let partner = |(question, answer): (&'static str, &'static str)| match key {
            key if key == question => Some(answer),
            key if key == answer => Some(question),
            _ => None,
        };
        let partners: Vec<&str> = PAIRS.into_iter().filter_map(partner).collect();
        Some(format!("`{key}` needs `{}`", partners.join("` or `")))
    }

    /// Refuses keys that would change what is trained; those that say nothing (`"tools": []`) are taken out.
    fn refuse_what_changes_training(&mut self) -> Result<(), String> {
        for (keys, remedy) in REFUSED {
            for key in keys {
                if let Some(value) = self.fields.remove(*key)
                    && !holds_nothing(&value)
                {
                    return Err(format!("`{key}` would change what is trained: {remedy}"));
                }
            }
        }
        for key in WEIGHTS {
            match self.fields.remove(key) {
                None | Some(Value::Bool(true)) => {}
                Some(Value::Number(n)) if n.as_f64() == Some(1.0) => {}
                Some(value) if says_nothing(&value) => {}
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
        match keys.iter().find(|key| self.has(key)) {
            None => Ok(()),
            Some(key) => Err(format!(
                "`{key}` beside {} would change what is trained, and nothing says how; take it away",
                named(&form.keys())
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
            Ok(mut said) => {
                if self.stage == TrainingStage::Sft {
                    // As TRL has it: a prompt is read, and only the completion is trained.
                    said.iter_mut().for_each(keep_as_context);
                }
                messages.extend(self.messages(said, question)?);
            }
            Err(said) => {
                let mut content = self.content(said, question)?;
                for key in INPUTS.into_iter().filter(|_| question == INSTRUCTION) {
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
        let mut messages = Vec::with_capacity(list.len());
        for (index, said) in list.into_iter().enumerate() {
            let here = |why: String| format!("`{key}`[{index}] {why}");
            for said in in_our_keys(said).map_err(here)? {
                let message = Message::from_json(index, &said).map_err(|error| match error {
                    text::Error::Message { field, problem, .. } => {
                        let point = if field.is_empty() { "" } else { "." };
                        format!("{key}[{index}]{point}{field}: {problem}")
                    }
                    other => other.to_string(),
                })?;
                if self.stage == TrainingStage::Cpt {
                    refuse_in_document(&message, &said).map_err(here)?;
                }
                self.remark_on_keys(&said);
                messages.push(message);
            }
        }
        Ok(messages)
    }

    fn remark_on_keys(&mut self, message: &Value) {
        let fields = message.as_object().into_iter().flatten();
        for (key, value) in fields {
            if says_nothing(value) || Message::known_keys().any(|known| known == key) {
                continue;
            }
            self.remarks.push(Remark::UnknownKey {
                near: hint(key, Message::known_keys()).map(str::to_owned),
                key: key.clone(),
                in_message: true,
            });
        }
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

/// Keys that make a conversation or a text, for hints at misspelt ones.
fn known_keys() -> impl Iterator<Item = &'static str> {
    let pairs = PAIRS
        .into_iter()
        .flat_map(|(question, answer)| [question, answer]);
    ["text", "input_ids", "labels", "history"]
        .into_iter()
        .chain(LISTS)
        .chain(pairs)
        .chain(SYSTEMS)
}

/// Whether a key means something in one of the forms.
fn is_known(key: &str) -> bool {
    let mut known = known_keys()
        .chain(INPUTS)
        .chain(packed::keys())
        .chain(HARMLESS_BESIDE_IDS);
    known.any(|known| known == key)
}

/// The key that was probably meant by one that means nothing. One with a word more, as `prompt_id` beside `prompt`, is another.
fn hint(key: &str, known: impl Iterator<Item = &'static str>) -> Option<&'static str> {
    let near = near::near_miss(key, known)?;
    (!key.split('_').any(|word| word == near)).then_some(near)
}

/// Whether something that an answer says or thinks is trained.
fn is_learned(message: &Message) -> bool {
    let thoughts = message.reasoning.as_deref().unwrap_or_default();
    message.role == Role::Assistant
        && message.is_trained
        && !(message.content.trim().is_empty() && thoughts.trim().is_empty())
}

/// Refuses what a document cannot heed: in a cpt stage all that is said is trained, and nothing else.
fn refuse_in_document(message: &Message, fields: &Value) -> Result<(), String> {
    let selecting = Message::SELECTING.into_iter();
    let mut unheeded = selecting
        .filter(|_| !message.is_trained)
        .chain(["reasoning_content"]);
    let key = unheeded.find(|key| fields.get(key).is_some_and(|value| !says_nothing(value)));
    match key {
        None => Ok(()),
        Some(key) => Err(format!(
            "has `{key}`, which a cpt stage cannot heed: there all that is said is one document, every word of it trained; take the key or the message away"
        )),
    }
}

/// A message in the keys `role` and `content`: ShareGPT's have `from` and `value`; one object may hold a whole round.
fn in_our_keys(message: Value) -> Result<Vec<Value>, String> {
    let Value::Object(mut fields) = message else {
        return Err(format!(
            "must say who speaks, as {{\"role\":\"user\",\"content\":\"...\"}} does; it is {}",
            kind(&message)
        ));
    };
    // As in a row.
    fields.retain(|_, value| !value.is_null());
    let mut keys = ["role", "from"].into_iter();
    let Some((key, name)) = keys.find_map(|key| Some((key, fields.remove(key)?))) else {
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
            None if key == "from" => {
                return Err(format!(
                    "is `from` `{name}`, who is nobody here; say system, human, gpt or tool"
                ));
            }
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

/// Whether a name is that of somebody who speaks.
pub(crate) fn is_role(name: &str) -> bool {
    role(name).is_some()
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

/// Makes an answer within a prompt one that is read, not trained, where it does not say so itself.
fn keep_as_context(message: &mut Value) {
    let says = |key: &&str| message.get(*key).is_some_and(|value| !says_nothing(value));
    let who = ["role", "from"].into_iter().find(says);
    let name = who.and_then(|key| message[key].as_str());
    let is_answer = name.and_then(role) == Some("assistant");
    if is_answer && !Message::SELECTING.iter().any(says) {
        message["loss"] = Value::Bool(false);
    }
}
