//! Chat templates: a conversation rendered to the text that the model reads, by the checkpoint's own Jinja or by ours.

use std::io;
use std::path::Path;

use files::outside;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value, ValueKind};
use minijinja::{Environment, ErrorKind};
use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter};

use crate::conversation::{Conversation, strip};
use crate::error::{Error, Result};
use crate::template_limits::{self, Bounded, MOST_INDENT};

const HISTORY_STABLE: &str = include_str!("templates/history_stable.jinja");
const NAME: &str = "chat_template";

/// A compiled template in the dialect of Hugging Face (Jinja2 with Python methods, `trim_blocks`, `lstrip_blocks`).
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    source: String,
    environment: Environment<'static>,
}

/// What a template may be told beside the messages; the names are those of `apply_chat_template`.
#[derive(Clone, Debug, Default)]
pub struct RenderOptions {
    /// Whether the opening of an answer follows the last message.
    pub add_generation_prompt: bool,
    /// `None` leaves the variable undefined, so that the template's own default holds.
    pub enable_thinking: Option<bool>,
    /// Tools, as the template's own words tell them.
    pub tools: Option<Vec<serde_json::Value>>,
    /// Whether pictures are numbered.
    pub add_vision_id: bool,
}

impl ChatTemplate {
    /// The template of a checkpoint folder: `chat_template.jinja`, else the one in `tokenizer_config.json`.
    ///
    /// # Errors
    /// [`Error::NoChatTemplate`] if neither is there, [`Error::ReadTemplate`], [`Error::NamedTemplates`] or [`Error::Template`] if it cannot
    /// be read, chosen or parsed.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join("chat_template.jinja");
        if path.exists() {
            let source = outside::read_text(&path);
            let source = source.map_err(|source| Error::ReadTemplate { path, source });
            return Self::from_source(&source?);
        }
        let path = dir.join("tokenizer_config.json");
        if let Some(config) = read_config(&path)?
            && let Some(named) = config.get("chat_template")
            && !named.is_null()
        {
            let source = source_of(named).ok_or_else(|| Error::NamedTemplates { path });
            return Self::from_source(source?);
        }
        Err(Error::NoChatTemplate {
            path: dir.to_path_buf(),
        })
    }

    /// The project's default: every answer, also in earlier rounds, carries the think block that training puts there,
    /// so the tokens of a longer conversation begin with those of the shorter one. It builds the same text of raw messages as of the
    /// [`Conversation`] that the rules make of them, whatever `enable_thinking` says. It knows no tools and no images.
    ///
    /// # Errors
    /// None in practice: the source is built in and tested.
    pub fn history_stable() -> Result<Self> {
        Self::from_source(HISTORY_STABLE)
    }

    /// Compiles a template.
    ///
    /// # Errors
    /// [`Error::Template`] with the line if the source does not parse; [`Error::TemplateTooLarge`] and [`Error::TemplateNamespace`] for one that
    /// no model needs.
    pub fn from_source(source: &str) -> Result<Self> {
        let environment = template_limits::apart(|| compiled(source))?;
        Ok(ChatTemplate {
            source: source.to_owned(),
            environment,
        })
    }

    /// Makes it the template of a folder: `chat_template.jinja`, and in `tokenizer_config.json` where that names one.
    ///
    /// # Errors
    /// [`Error::Write`] with the path; [`Error::ReadTemplate`] or [`Error::Json`] for a `tokenizer_config.json` that cannot be read.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let path = dir.join("tokenizer_config.json");
        if let Some(mut config) = read_config(&path)?
            && let Some(named) = config.get_mut("chat_template")
        {
            *named = self.source.as_str().into();
            let config = serde_json::to_vec_pretty(&config).map_err(|source| Error::Json {
                path: path.clone(),
                source,
            })?;
            files::write(&path, &config)?;
        }
        files::write(&dir.join("chat_template.jinja"), self.source.as_bytes())?;
        Ok(())
    }

    /// The Jinja source, as it was given.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders a conversation.
    ///
    /// # Errors
    /// [`Error::TemplateRaised`] with the template's own message where it refuses the conversation, [`Error::Template`] where it fails.
    pub fn render(&self, conversation: &Conversation, options: &RenderOptions) -> Result<String> {
        self.render_value(Value::from(Serde(conversation.messages())), options)
    }

    /// Renders messages as they stand in JSON, as vLLM and transformers do: no rule but the template's own holds.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn render_json(
        &self,
        messages: &serde_json::Value,
        options: &RenderOptions,
    ) -> Result<String> {
        self.render_value(Value::from(Serde(messages)), options)
    }

    fn render_value(&self, messages: Value, options: &RenderOptions) -> Result<String> {
        let mut context = vec![
            ("messages", messages),
            (
                "add_generation_prompt",
                options.add_generation_prompt.into(),
            ),
            ("add_vision_id", options.add_vision_id.into()),
        ];
        if let Some(thinking) = options.enable_thinking {
            context.push(("enable_thinking", thinking.into()));
        }
        if let Some(tools) = &options.tools {
            context.push(("tools", Value::from(Serde(tools))));
        }
        template_limits::apart(move || {
            let template = self.environment.get_template(NAME);
            let rendered = template.and_then(|t| t.render(Value::from_pairs(context)));
            rendered.map_err(|source| match raised(&source) {
                Some(message) => Error::TemplateRaised { message },
                None => template_limits::stopped(source),
            })
        })
    }
}

/// A source, checked and compiled.
fn compiled(source: &str) -> Result<Environment<'static>> {
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
        .map_err(|source| Error::Template { source })?;
    template_limits::check_source(source, &syntax)?;
    let mut environment = Environment::new();
    environment.set_syntax(syntax);
    // Ours does what its input asks for, and no more.
    environment.set_fuel((source != HISTORY_STABLE).then_some(template_limits::FUEL));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(|out, _, value| {
        write!(out, "{}", python_str(value)?).map_err(minijinja::Error::from)
    });
    environment.add_function("raise_exception", raise_exception);
    environment.add_filter("trim", trim);
    environment.add_filter("tojson", to_json);
    environment.add_filter("string", |value: Value| python_str(&value));
    environment.add_filter("items", items);
    environment
        .add_template_owned(NAME, source.to_owned())
        .map_err(|source| Error::Template { source })?;
    Ok(environment)
}

/// The template of a configuration: a text, or of a list of named ones the one named `default`, as transformers picks it.
fn source_of(named: &serde_json::Value) -> Option<&str> {
    if let Some(list) = named.as_array() {
        let default = list.iter().find(|one| one["name"] == "default");
        return default?.get("template")?.as_str();
    }
    named.as_str()
}

/// A `tokenizer_config.json`, if it is there.
fn read_config(path: &Path) -> Result<Option<serde_json::Value>> {
    if !path.exists() {
        return Ok(None);
    }
    let text = outside::read_text(path).map_err(|source| Error::ReadTemplate {
        path: path.to_owned(),
        source,
    })?;
    let config = serde_json::from_str(&text).map_err(|source| Error::Json {
        path: path.to_owned(),
        source,
    })?;
    Ok(Some(config))
}

/// Marks an error as the template's own word, to be found again under the positions that the engine adds.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise(message: &str) -> minijinja::Error {
    minijinja::Error::new(ErrorKind::InvalidOperation, message.to_owned())
        .with_source(Raised(message.to_owned()))
}

fn raised(error: &minijinja::Error) -> Option<String> {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = cause {
        if let Some(Raised(message)) = error.downcast_ref() {
            return Some(message.clone());
        }
        cause = error.source();
    }
    None
}

fn raise_exception(message: &str) -> std::result::Result<Value, minijinja::Error> {
    Err(raise(message))
}

fn trim(text: &str, chars: Option<&str>) -> String {
    match chars {
        None => strip(text).to_owned(),
        Some(chars) => text.trim_matches(|c| chars.contains(c)).to_owned(),
    }
}

fn items(value: Value) -> std::result::Result<Value, minijinja::Error> {
    if value.is_undefined() {
        return Ok(Value::from(Vec::<Value>::new()));
    }
    if value.kind() != ValueKind::Map {
        return Err(raise("Can only get item pairs from a mapping."));
    }
    let mut pairs = Vec::new();
    for key in value.try_iter()? {
        let item = value.get_item(&key)?;
        pairs.push(Value::from(vec![key, item]));
    }
    Ok(Value::from(pairs))
}

/// `json.dumps(value, ensure_ascii=False)`, which is what Hugging Face puts in the place of Jinja's own filter.
fn to_json(value: Value, kwargs: Kwargs) -> std::result::Result<String, minijinja::Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let _: Option<bool> = kwargs.get("ensure_ascii")?;
    kwargs.assert_all_used()?;
    let fail = |e: serde_json::Error| {
        minijinja::Error::new(ErrorKind::BadSerialization, "cannot serialize to JSON")
            .with_source(e)
    };
    let mut out = Bounded::default();
    match indent {
        None => {
            let mut writer = serde_json::Serializer::with_formatter(&mut out, PythonJson);
            value.serialize(&mut writer).map_err(fail)?;
        }
        Some(width) if width > MOST_INDENT => {
            let problem = format!("an indent of {width} blanks; at most {MOST_INDENT} are written");
            return Err(minijinja::Error::new(ErrorKind::InvalidOperation, problem));
        }
        Some(width) => {
            let indent = " ".repeat(width);
            let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            let mut writer = serde_json::Serializer::with_formatter(&mut out, formatter);
            value.serialize(&mut writer).map_err(fail)?;
        }
    }
    Ok(out.into_string())
}

/// Python's default separators (`, ` and `: `) and its spelling of floats.
struct PythonJson;

impl Formatter for PythonJson {
    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }

    fn write_f64<W: ?Sized + io::Write>(&mut self, out: &mut W, value: f64) -> io::Result<()> {
        out.write_all(python_float(value).as_bytes())
    }

    fn write_string_fragment<W: ?Sized + io::Write>(
        &mut self,
        out: &mut W,
        text: &str,
    ) -> io::Result<()> {
        CompactFormatter.write_string_fragment(out, text)
    }
}

/// `str(value)`: `True`, `None`, floats as Python writes them; the rest as the engine does.
fn python_str(value: &Value) -> std::result::Result<String, minijinja::Error> {
    Ok(match value.kind() {
        ValueKind::Undefined => String::new(),
        ValueKind::None => "None".to_owned(),
        ValueKind::Bool if value.is_true() => "True".to_owned(),
        ValueKind::Bool => "False".to_owned(),
        ValueKind::Number if !value.is_integer() => {
            f64::try_from(value.clone()).map_or_else(|_| value.to_string(), python_float)
        }
        _ => template_limits::shown(value)?,
    })
}

/// `repr` of a float: Rust prints the same digits, but `1e16` where Python has `1e+16`, and `1e-7` for `1e-07`.
fn python_float(value: f64) -> String {
    let text = format!("{value:?}");
    match text.split_once('e') {
        None => text,
        Some((digits, exponent)) => {
            let (sign, exponent) = match exponent.strip_prefix('-') {
                Some(rest) => ('-', rest),
                None => ('+', exponent),
            };
            format!("{digits}e{sign}{exponent:0>2}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_spelt_as_python_does() {
        let spelt = [0.5, 3.0, 1e15, 1e16, 1.5e-5, 1e-7, -2.5e300].map(python_float);
        assert_eq!(
            spelt,
            [
                "0.5",
                "3.0",
                "1000000000000000.0",
                "1e+16",
                "1.5e-05",
                "1e-07",
                "-2.5e+300"
            ]
        );
    }
}
