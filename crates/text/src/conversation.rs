//! A conversation as data, and the one set of rules by which messages become one: every road to ids (training, evaluation, serving) begins here.
//!
//! The rules, which `templates/history_stable.jinja` states once more for whoever renders raw messages (docs/conversation.md):
//! 1. Roles are `system`, `developer` (the same), `user`, `human` (the same), `assistant` and `tool`.
//! 2. A content is a text, a list of text parts (joined as they are), or null, absent or empty (no text); it is stripped.
//! 3. System messages before anything else are joined with a blank line. A later one is part of the user's turn beside it, the one before if
//!    there is one, else the one after, and parted from it by a blank line; between two answers it is a user's turn of its own.
//! 4. What a tool answers is said by the user, between `<tool_response>` marks.
//! 5. Turns of one role in a row are one turn, joined with a line feed; one without text adds nothing.
//! 6. A conversation that begins with an answer gets an empty user's turn in front.
//! 7. An answer's thoughts are its `reasoning_content`, or what stands between `<think>` and `</think>` at its start.
//!
//! The marks of rules 4 and 7 are tokens; any other added token that a content spells is text.

use serde::{Serialize, Serializer};
use serde_json::{Map, Value};

use crate::error::{Error, MessageProblem, Result};
use crate::json::{holds_nothing, kind, says_nothing};
use crate::tokenizer::Tokenizer;

/// Who says a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Whoever sets the scene; `developer` in newer requests.
    System,
    /// Whoever asks.
    User,
    /// The model.
    Assistant,
    /// What a tool gave back.
    Tool,
}

impl Role {
    /// The name in files, requests and templates.
    pub fn name(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
            Role::Tool => "tool",
        }
    }

    /// The role of a name, with the names that others use for the same.
    pub fn from_name(name: &str) -> Option<Role> {
        Some(match name {
            "system" | "developer" => Role::System,
            "user" | "human" => Role::User,
            "assistant" => Role::Assistant,
            "tool" => Role::Tool,
            _ => return None,
        })
    }
}

/// One message as it comes in, before the rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who says it.
    pub role: Role,
    /// What is said.
    pub content: String,
    /// An answer's thoughts, where they stand beside the content.
    pub reasoning: Option<String>,
    /// Whether training learns an answer; one that it does not is context.
    pub is_trained: bool,
}

/// Keys of a message that say something that nothing here can say.
const REFUSED: [&str; 9] = [
    "tool_calls",
    "function_call",
    "images",
    "image",
    "videos",
    "video",
    "audios",
    "audio",
    "objects",
];

impl Message {
    /// Keys that select which answers are trained.
    pub const SELECTING: [&'static str; 3] = ["loss", "train", "weight"];

    /// A message that is trained if it is an answer.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Message {
            role,
            content: content.into(),
            reasoning: None,
            is_trained: true,
        }
    }

    /// [`Message::new`] of the system.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new(Role::System, content)
    }

    /// [`Message::new`] of the user.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new(Role::User, content)
    }

    /// [`Message::new`] of the assistant.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new(Role::Assistant, content)
    }

    /// Keys that are read, refused, or known to change nothing; whoever reports unknown keys leaves these out.
    pub fn known_keys() -> impl Iterator<Item = &'static str> {
        let read = ["role", "content", "reasoning_content", "name"];
        read.into_iter().chain(Self::SELECTING).chain(REFUSED)
    }

    /// Reads messages as they stand in JSON: rows, files and requests alike.
    ///
    /// # Errors
    /// [`Error::Message`] with the place and key of what cannot be read.
    pub fn list_from_json(values: &[Value]) -> Result<Vec<Message>> {
        let indexed = values.iter().enumerate();
        indexed.map(|(i, v)| Message::from_json(i, v)).collect()
    }

    /// Reads one message; `index` is its place in its list, for errors.
    ///
    /// # Errors
    /// [`Error::Message`] with the key of what cannot be read.
    pub fn from_json(index: usize, value: &Value) -> Result<Message> {
        let fail = |field: &str, problem| Error::Message {
            index,
            field: field.to_owned(),
            problem,
        };
        let Value::Object(fields) = value else {
            let got = kind(value);
            return Err(fail("", MessageProblem::NotAnObject { got }));
        };
        let role = match fields.get("role") {
            Some(Value::String(name)) => Role::from_name(name).ok_or_else(|| {
                let got = format!("`{name}`");
                fail("role", MessageProblem::Role { got })
            })?,
            other => {
                let got = other.map_or("nothing", kind).to_owned();
                return Err(fail("role", MessageProblem::Role { got }));
            }
        };
        let says = |field: &&&str| {
            fields
                .get(**field)
                .is_some_and(|value| !holds_nothing(value))
        };
        if let Some(field) = REFUSED.iter().find(says) {
            return Err(fail(field, MessageProblem::Unsupported));
        }
        let content = match fields.get("content") {
            None => String::new(),
            Some(content) => {
                text_of(content).map_err(|(at, problem)| fail(&format!("content{at}"), problem))?
            }
        };
        let reasoning = match fields.get("reasoning_content") {
            None | Some(Value::Null) => None,
            Some(Value::String(thoughts)) => (role == Role::Assistant).then(|| thoughts.clone()),
            Some(other) => {
                let got = kind(other);
                return Err(fail("reasoning_content", MessageProblem::NotText { got }));
            }
        };
        let is_trained = selected(fields, role).map_err(|(field, problem)| fail(field, problem))?;
        Ok(Message {
            role,
            content,
            reasoning,
            is_trained: is_trained.unwrap_or(true),
        })
    }
}

/// The text of a content; where it has none, the place inside the content and what is wrong there.
fn text_of(content: &Value) -> std::result::Result<String, (String, MessageProblem)> {
    match content {
        Value::Null => Ok(String::new()),
        Value::String(text) => Ok(text.clone()),
        Value::Array(parts) => {
            let mut text = String::new();
            for (i, part) in parts.iter().enumerate() {
                let part =
                    part_text(part).map_err(|(key, problem)| (format!("[{i}]{key}"), problem));
                text.push_str(part?);
            }
            Ok(text)
        }
        other => {
            let got = kind(other);
            Err((String::new(), MessageProblem::NotText { got }))
        }
    }
}

fn part_text(part: &Value) -> std::result::Result<&str, (&'static str, MessageProblem)> {
    let fields = match part {
        Value::String(text) => return Ok(text),
        Value::Object(fields) => fields,
        other => return Err(("", MessageProblem::NotText { got: kind(other) })),
    };
    match fields.get("type").unwrap_or(&Value::Null) {
        Value::Null => {}
        Value::String(kind) if kind == "text" => {}
        other => {
            let got = other.as_str().unwrap_or_else(|| kind(other));
            let kind = got.to_owned();
            return Err((".type", MessageProblem::Part { kind }));
        }
    }
    match fields.get("text").unwrap_or(&Value::Null) {
        Value::String(text) => Ok(text),
        other => Err((".text", MessageProblem::NotText { got: kind(other) })),
    }
}

/// Whether the message's own keys select it for training; None where they say nothing.
fn selected(
    fields: &Map<String, Value>,
    role: Role,
) -> std::result::Result<Option<bool>, (&'static str, MessageProblem)> {
    let mut chosen = None;
    for field in Message::SELECTING {
        let said = match fields.get(field) {
            None => continue,
            Some(nothing) if says_nothing(nothing) => continue,
            Some(Value::Bool(said)) => *said,
            Some(Value::Number(n)) if n.as_f64() == Some(0.0) => false,
            Some(Value::Number(n)) if n.as_f64() == Some(1.0) => true,
            Some(other) => {
                let got = other.to_string();
                return Err((field, MessageProblem::Selection { got }));
            }
        };
        if said && role != Role::Assistant {
            return Err((field, MessageProblem::NotAnAnswer { role }));
        }
        if chosen.is_some_and(|chosen| chosen != said) {
            return Err((field, MessageProblem::Contradiction));
        }
        chosen = Some(said);
    }
    Ok(chosen)
}

/// How turns of one role in a row are joined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TurnJoin {
    /// With a line feed: the rule.
    #[default]
    LineFeed,
    /// With nothing, as ms-swift does; only for holding the rows recorded from it against ours.
    Nothing,
}

/// A conversation by the rules: at most one system message, then the user's turns and answers in alternation, the user's first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Conversation {
    /// Empty where there is none.
    pub(crate) system: String,
    pub(crate) turns: Vec<Turn>,
    /// Messages that it was made of.
    pub(crate) n_messages: usize,
}

/// What one side says before the other does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Turn {
    pub is_answer: bool,
    /// What an answer thinks before it speaks, one part a message that does, each with what joins it to the next; none without a think
    /// block, an empty one for an empty block.
    pub thoughts: Vec<Part>,
    /// What is said, one part a message, each with what joins it to the next; one empty part where nothing is said.
    pub parts: Vec<Part>,
    /// Whether the last part was a system message.
    ends_in_note: bool,
}

/// What one message says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub text: String,
    pub is_trained: bool,
    /// Nobody wrote it, the rules put it there: its added tokens are tokens.
    pub is_mark: bool,
}

impl Part {
    /// What somebody wrote.
    fn written(text: &str, is_trained: bool) -> Self {
        Part {
            text: text.to_owned(),
            is_trained,
            is_mark: false,
        }
    }

    /// What the rules put beside it.
    fn mark(text: &str, is_trained: bool) -> Self {
        Part {
            is_mark: true,
            ..Part::written(text, is_trained)
        }
    }
}

impl Turn {
    /// Everything that is said.
    pub fn text(&self) -> String {
        text_of_parts(&self.parts)
    }

    /// Everything that is thought.
    pub fn thoughts_text(&self) -> String {
        text_of_parts(&self.thoughts)
    }
}

fn text_of_parts(parts: &[Part]) -> String {
    parts.iter().map(|part| part.text.as_str()).collect()
}

impl Conversation {
    /// Applies the rules.
    pub fn new(messages: impl IntoIterator<Item = Message>) -> Self {
        Self::joined(messages, TurnJoin::LineFeed)
    }

    /// [`Conversation::new`] of messages as they stand in JSON.
    ///
    /// # Errors
    /// As [`Message::list_from_json`].
    pub fn from_json(messages: &[Value]) -> Result<Self> {
        Ok(Self::new(Message::list_from_json(messages)?))
    }

    /// [`Conversation::new`] with another joint between turns of one role.
    pub fn joined(messages: impl IntoIterator<Item = Message>, join: TurnJoin) -> Self {
        let mut conversation = Conversation::default();
        for message in messages {
            conversation.n_messages += 1;
            conversation.push(message, join);
        }
        conversation
    }

    /// The system message; empty where there is none.
    pub fn system(&self) -> &str {
        &self.system
    }

    /// Whether the model spoke last.
    pub fn ends_with_answer(&self) -> bool {
        self.turns.last().is_some_and(|turn| turn.is_answer)
    }

    /// Itself, with an empty user's turn where nobody has spoken: an answer needs something before it.
    pub(crate) fn with_a_turn(&self) -> Self {
        let mut conversation = self.clone();
        if conversation.turns.is_empty() {
            add(
                &mut conversation.turn(false).parts,
                Part::written("", false),
                "",
            );
        }
        conversation
    }

    /// What people wrote in it: the system message, and each message's thoughts and words.
    pub(crate) fn written(&self) -> impl Iterator<Item = &str> {
        let parts = self
            .turns
            .iter()
            .flat_map(|turn| turn.thoughts.iter().chain(&turn.parts));
        let written = parts.filter(|part| !part.is_mark);
        let written = written.map(|part| part.text.as_str());
        std::iter::once(self.system.as_str()).chain(written)
    }

    /// Itself with everything that people wrote escaped: between a template's own tokens it is text ([`Tokenizer::escape`]).
    pub(crate) fn escaped(&self, tokenizer: &Tokenizer) -> Self {
        let mut escaped = self.clone();
        escaped.system = tokenizer.escape(&self.system);
        for turn in &mut escaped.turns {
            let parts = turn.thoughts.iter_mut().chain(&mut turn.parts);
            for part in parts.filter(|part| !part.is_mark) {
                part.text = tokenizer.escape(&part.text);
            }
        }
        escaped
    }

    /// The messages that the rules made of it: what a template renders.
    pub fn messages(&self) -> Vec<Message> {
        let mut messages = Vec::with_capacity(self.turns.len() + 1);
        if !self.system.is_empty() {
            messages.push(Message::system(self.system.clone()));
        }
        messages.extend(self.turns.iter().map(|turn| {
            Message {
                // Always there: a template that found none would look for marks in what is said.
                reasoning: turn.is_answer.then(|| turn.thoughts_text()),
                is_trained: turn.parts.iter().all(|part| part.is_trained),
                ..Message::new(
                    if turn.is_answer {
                        Role::Assistant
                    } else {
                        Role::User
                    },
                    turn.text(),
                )
            }
        }));
        messages
    }

    fn push(&mut self, message: Message, join: TurnJoin) {
        let content = strip(&message.content);
        match message.role {
            Role::System if self.turns.is_empty() => {
                if !self.system.is_empty() && !content.is_empty() {
                    self.system.push_str("\n\n");
                }
                self.system.push_str(content);
            }
            Role::System if content.is_empty() => {}
            Role::System => self.say([Part::written(content, message.is_trained)], true, join),
            Role::User => self.say([Part::written(content, message.is_trained)], false, join),
            Role::Tool => {
                let mark = |text| Part::mark(text, message.is_trained);
                let parts = [
                    mark("<tool_response>\n"),
                    Part::written(content, message.is_trained),
                    mark("\n</tool_response>"),
                ];
                self.say(parts, false, join);
            }
            Role::Assistant => self.answer(content, &message, join),
        }
    }

    /// Something on the user's side: what the user says, or a note of the system.
    fn say(&mut self, parts: impl IntoIterator<Item = Part>, is_note: bool, join: TurnJoin) {
        let turn = self.turn(false);
        let mut join = match (turn.ends_in_note || is_note, join) {
            (true, _) => "\n\n",
            (false, TurnJoin::LineFeed) => "\n",
            (false, TurnJoin::Nothing) => "",
        };
        for part in parts {
            if add(&mut turn.parts, part, join) {
                turn.ends_in_note = is_note;
                join = "";
            }
        }
    }

    fn answer(&mut self, content: &str, message: &Message, join: TurnJoin) {
        if self.turns.is_empty() {
            add(&mut self.turn(false).parts, Part::written("", false), "");
        }
        let (thoughts, said) = match &message.reasoning {
            Some(thoughts) => (Some(strip(thoughts)), content),
            None => split_thoughts(content),
        };
        let join = match join {
            TurnJoin::LineFeed => "\n",
            TurnJoin::Nothing => "",
        };
        let turn = self.turn(true);
        add(
            &mut turn.parts,
            Part::written(said, message.is_trained),
            join,
        );
        if let Some(thoughts) = thoughts {
            let thoughts = Part::written(thoughts, message.is_trained);
            add(&mut turn.thoughts, thoughts, join);
        }
    }

    /// The last turn if it is of this side, else a new one.
    fn turn(&mut self, is_answer: bool) -> &mut Turn {
        if self.turns.last().map(|turn| turn.is_answer) != Some(is_answer) {
            self.turns.push(Turn {
                is_answer,
                thoughts: Vec::new(),
                parts: Vec::new(),
                ends_in_note: false,
            });
        }
        let last = self.turns.len() - 1;
        &mut self.turns[last]
    }
}

/// Adds a part behind `join`; one without text adds nothing to parts that are there. Whether something was added.
fn add(parts: &mut Vec<Part>, part: Part, join: &str) -> bool {
    let has_said = parts.last().is_some_and(|part| !part.text.is_empty());
    match parts.last_mut() {
        Some(_) if part.text.is_empty() => return false,
        Some(last) if has_said => last.text.push_str(join),
        _ => parts.clear(),
    }
    parts.push(part);
    true
}

/// The thoughts in `<think>..</think>` at the start of an answer, stripped, and the rest.
fn split_thoughts(answer: &str) -> (Option<&str>, &str) {
    let block = answer
        .strip_prefix("<think>")
        .and_then(|rest| rest.split_once("</think>"));
    match block {
        Some((thoughts, said)) => (Some(strip(thoughts)), strip(said)),
        None => (None, answer),
    }
}

/// Strips what Python calls white space, since templates and training stacks strip with Python:
/// Unicode's White_Space and U+001C..U+001F.
pub(crate) fn strip(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c))
}

/// As templates take it: role, content, and thoughts under the name that released templates know.
impl Serialize for Message {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Fields<'a> {
            role: Role,
            content: &'a str,
            #[serde(skip_serializing_if = "Option::is_none")]
            reasoning_content: Option<&'a str>,
        }
        let fields = Fields {
            role: self.role,
            content: &self.content,
            reasoning_content: self.reasoning.as_deref(),
        };
        fields.serialize(serializer)
    }
}
