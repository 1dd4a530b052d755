//! Chats that DiscordChatExporter wrote as JSON.

use serde::Deserialize;

use crate::language::Language;

use super::name;
use super::scenes::{Fault, Gatherer, Imported, Notes, Voice};

const EVENTS: &str = "messages of the system (pins, calls, who joined)";
const MEDIA: &str = "pictures, files, stickers and embeds";
const REACTIONS: &str = "reactions";

#[derive(Deserialize)]
struct Export {
    #[serde(default)]
    channel: Channel,
    messages: Vec<Message>,
}

#[derive(Deserialize, Default)]
struct Channel {
    #[serde(default)]
    name: Option<String>,
}

#[derive(Deserialize)]
struct Message {
    #[serde(default, rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    timestamp: String,
    #[serde(default)]
    content: String,
    author: Author,
    #[serde(default)]
    attachments: Vec<serde::de::IgnoredAny>,
    #[serde(default)]
    embeds: Vec<serde::de::IgnoredAny>,
    #[serde(default)]
    stickers: Vec<serde::de::IgnoredAny>,
    #[serde(default)]
    reactions: Vec<serde::de::IgnoredAny>,
}

#[derive(Deserialize)]
struct Author {
    name: String,
    #[serde(default)]
    nickname: Option<String>,
}

/// Whether the beginning of a file is that of such a chat.
pub(crate) fn is_export(head: &str) -> bool {
    let has = |key: &str| head.contains(key);
    head.trim_start().starts_with('{') && has("\"guild\"") && has("\"channel\"")
}

/// The scenes of a chat: a day is one.
///
/// # Errors
/// Broken JSON, or messages without author.
pub(crate) fn read(text: &str, language: Language) -> Result<Imported, Fault> {
    let export: Export = serde_json::from_str(text)
        .map_err(|error| Fault::new(error.line().max(1), super::json_problem(&error)))?;
    let channel = export.channel.name.unwrap_or_default();
    let mut out = Gatherer::new(language);
    let mut day = "";
    for (at, message) in export.messages.iter().enumerate() {
        // Messages have no lines: their number in the file is the place.
        let number = at + 1;
        let here = message.timestamp.get(..10).unwrap_or("");
        if here != day {
            out.border(format!("{channel} {here}").trim());
            day = here;
        }
        if message
            .kind
            .as_deref()
            .is_some_and(|kind| kind != "Default" && kind != "Reply")
        {
            out.notes.add(EVENTS, number);
            continue;
        }
        let n_media = message.attachments.len() + message.embeds.len() + message.stickers.len();
        out.notes.add_many(MEDIA, n_media, number);
        out.notes
            .add_many(REACTIONS, message.reactions.len(), number);
        if message.content.trim().is_empty() {
            out.notes.add(Notes::EMPTY, number);
            continue;
        }
        out.may_cut();
        let shown = message.author.nickname.as_deref().unwrap_or("").trim();
        let voice = Voice {
            id: name::id(&message.author.name),
            name: Some(
                if shown.is_empty() {
                    message.author.name.trim()
                } else {
                    shown
                }
                .to_owned(),
            ),
        };
        out.dialogue(&voice, &message.content);
    }
    Ok(out.finish())
}

#[cfg(test)]
mod tests {
    use super::super::tests::show;
    use super::*;

    #[test]
    fn messages_speak_and_days_are_scenes() {
        let text = r#"{"guild":{"name":"Sea"},"channel":{"name":"harbour"},"messages":[
            {"type":"Default","timestamp":"2026-01-01T10:00:00+00:00","content":"Where is the boat?","author":{"name":"ann_7","nickname":"Ann"}},
            {"type":"Reply","timestamp":"2026-01-01T10:01:00+00:00","content":"Gone.","author":{"name":"bo","nickname":null},"attachments":[{"url":"x"}],"reactions":[{},{}]},
            {"type":"ChannelPinnedMessage","timestamp":"2026-01-01T10:02:00+00:00","content":"Pinned a message.","author":{"name":"bo"}},
            {"type":"Default","timestamp":"2026-01-02T09:00:00+00:00","content":"Back.","author":{"name":"bo"}},
            {"timestamp":"2026-01-02T09:00:01+00:00","content":"","author":{"name":"bo"}}]}"#;
        assert!(is_export(text));
        assert_eq!(
            show(&read(text, Language::En).unwrap()),
            "== harbour 2026-01-01\n<ann-7 Ann> Where is the boat?\n<bo bo> Gone.\n== harbour 2026-01-02\n<bo bo> Back.\n\
             ! 1 pictures, files, stickers and embeds, first at line 2\n! 2 reactions, first at line 2\n\
             ! 1 messages of the system (pins, calls, who joined), first at line 3\n! 1 messages without a text, first at line 5\n"
        );
    }

    #[test]
    fn broken_json_names_its_line() {
        let fault = read("{\"messages\":[\n{\"content\":\"x\"}]}", Language::En).unwrap_err();
        assert_eq!(
            (fault.line, fault.problem.as_str()),
            (2, "missing field `author` (column 15)")
        );
    }
}
