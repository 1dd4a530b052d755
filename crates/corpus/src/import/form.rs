//! The forms that can be imported, and how a file is told to be of one.

use std::path::Path;

use serde_json::{Map, Value};

use super::{card, chat_log, discord, png, subtitles};

/// A form in which people have stories and characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Form {
    /// `.rpy`
    RenPy,
    /// `.srt` and `.vtt`
    Subtitles,
    /// `.ass` and `.ssa`
    SubStation,
    /// `.twee` and `.tw`
    Twee,
    /// A page that Twine wrote.
    Twine,
    /// CSV and TSV.
    Table,
    /// JSON lines of SillyTavern.
    ChatLog,
    /// JSON of DiscordChatExporter.
    Discord,
    /// A character card as JSON, or in a PNG.
    Card,
    /// `Name: text` lines, or prose.
    Plain,
}

/// What is known of a form: its name on the command line, what a file of it is, the endings of such files.
pub(crate) struct Known {
    pub form: Form,
    pub name: &'static str,
    pub title: &'static str,
    pub endings: &'static [&'static str],
}

/// Every form; of forms with one ending the content decides.
pub(crate) const FORMS: [Known; 10] = [
    Known {
        form: Form::RenPy,
        name: "renpy",
        title: "a Ren'Py script",
        endings: &["rpy", "rpym"],
    },
    Known {
        form: Form::Subtitles,
        name: "subtitles",
        title: "a file of subtitles",
        endings: &["srt", "vtt"],
    },
    Known {
        form: Form::SubStation,
        name: "substation",
        title: "a file of subtitles",
        endings: &["ass", "ssa"],
    },
    Known {
        form: Form::Twee,
        name: "twee",
        title: "a Twee story",
        endings: &["twee", "tw", "tw2", "twee2", "twee3"],
    },
    Known {
        form: Form::Twine,
        name: "twine",
        title: "a Twine story",
        endings: &[],
    },
    Known {
        form: Form::Table,
        name: "table",
        title: "a table",
        endings: &["csv", "tsv"],
    },
    Known {
        form: Form::ChatLog,
        name: "chat-log",
        title: "a SillyTavern chat log",
        endings: &[],
    },
    Known {
        form: Form::Discord,
        name: "discord",
        title: "a Discord chat",
        endings: &[],
    },
    Known {
        form: Form::Card,
        name: "card",
        title: "a character card",
        endings: &[],
    },
    Known {
        form: Form::Plain,
        name: "plain",
        title: "plain text",
        endings: &["txt", "text", "md"],
    },
];

impl Form {
    /// The form of a name on the command line.
    pub fn from_name(name: &str) -> Option<Form> {
        FORMS
            .iter()
            .find(|known| known.name == name)
            .map(|known| known.form)
    }

    /// The names of all forms, for a message.
    pub fn names() -> String {
        FORMS.map(|known| known.name).join(", ")
    }

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        FORMS
            .iter()
            .find(|known| known.form == self)
            .map_or("", |known| known.name)
    }

    /// What a file of this form is: `a Ren'Py script`.
    pub fn title(self) -> &'static str {
        FORMS
            .iter()
            .find(|known| known.form == self)
            .map_or("", |known| known.title)
    }

    /// The form of a file: what its content shows, else what its ending says.
    pub(crate) fn of(path: &Path, bytes: &[u8], text: &str) -> Option<Form> {
        // JSON that is none of ours is no plain text, whatever its name.
        let inner = text.trim_start().strip_prefix('{').map(str::trim_start);
        let is_json = inner.is_some_and(|inner| inner.starts_with('"'));
        let by_ending = || Form::by_ending(path).filter(|form| !(is_json && *form == Form::Plain));
        Form::by_content(bytes, text).or_else(by_ending)
    }

    /// The form that a file must have because of what it holds.
    fn by_content(bytes: &[u8], text: &str) -> Option<Form> {
        if bytes.starts_with(png::MAGIC) {
            return png::text(bytes, &["ccv3", "chara"])
                .ok()
                .flatten()
                .map(|_| Form::Card);
        }
        let text = text.trim_start();
        let first = text.lines().next().unwrap_or("").trim_end();
        if text.starts_with('{') {
            return Form::of_json(text, first);
        }
        let second = text.lines().nth(1).unwrap_or("");
        let is_timing = |line: &str| subtitles::timing(line).is_some();
        if first.starts_with("WEBVTT")
            || is_timing(first)
            || first.parse::<u64>().is_ok() && is_timing(second)
        {
            Some(Form::Subtitles)
        } else if ["[script info]", "[events]", "[v4+ styles]"]
            .contains(&first.to_ascii_lowercase().as_str())
        {
            Some(Form::SubStation)
        } else if first.starts_with(":: ")
            || text.contains("\n:: StoryTitle")
            || text.contains("\n:: StoryData")
        {
            Some(Form::Twee)
        } else if text.contains("<tw-passagedata") {
            Some(Form::Twine)
        } else {
            None
        }
    }

    fn of_json(text: &str, first: &str) -> Option<Form> {
        let object = |text: &str| serde_json::from_str::<Map<String, Value>>(text).ok();
        let head = text
            .char_indices()
            .nth(4000)
            .map_or(text, |(end, _)| &text[..end]);
        if discord::is_export(head) {
            return Some(Form::Discord);
        }
        if object(first).is_some_and(|object| chat_log::is_line(&object)) {
            return Some(Form::ChatLog);
        }
        object(text)
            .is_some_and(|object| card::is_card(&object))
            .then_some(Form::Card)
    }

    /// The form that files with this ending have.
    pub(crate) fn by_ending(path: &Path) -> Option<Form> {
        let ending = path.extension()?.to_str()?.to_ascii_lowercase();
        let known = FORMS
            .iter()
            .find(|known| known.endings.contains(&ending.as_str()));
        known.map(|known| known.form)
    }

    /// Whether a file with this ending may be one of ours.
    pub(crate) fn is_candidate(path: &Path) -> bool {
        let by_content = ["json", "jsonl", "html", "htm", "png"];
        let ending = path
            .extension()
            .and_then(|ending| ending.to_str())
            .unwrap_or("")
            .to_ascii_lowercase();
        Form::by_ending(path).is_some() || by_content.contains(&ending.as_str())
    }
}
