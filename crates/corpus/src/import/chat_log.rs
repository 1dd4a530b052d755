//! Chat logs of SillyTavern: JSON lines, the settings first, then a message a line.

use serde_json::{Map, Value};

use crate::language::Language;

use super::macros::{self, Names};
use super::name;
use super::scenes::{Fault, Gatherer, Imported, Notes, Voice};

/// The id of whoever sits at the keyboard.
pub(crate) const PLAYER: &str = "player";

const SWIPES: &str = "answers that were swiped away";
const HIDDEN: &str = "hidden messages, comments and notes of the system";
const REASONING: &str = "blocks of reasoning";
const MEDIA: &str = "pictures and files";

/// Whether an object is a line of such a log.
pub(crate) fn is_line(object: &Map<String, Value>) -> bool {
    let has = |key: &str| object.contains_key(key);
    has("mes") && (has("name") || has("is_user")) || is_header(object)
}

fn is_header(object: &Map<String, Value>) -> bool {
    let has = |key: &str| object.contains_key(key);
    !has("mes")
        && (has("user_name") && (has("character_name") || has("chat_metadata"))
            || has("chat_metadata"))
}

/// The scenes of a log.
///
/// # Errors
/// A line that is no JSON object or no message.
pub(crate) fn read(text: &str, language: Language) -> Result<Imported, Fault> {
    let mut out = Gatherer::new(language);
    let (mut user, mut character) = (String::from("User"), String::new());
    for (at, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let number = at + 1;
        let object: Map<String, Value> = serde_json::from_str(line)
            .map_err(|error| Fault::new(number, super::json_problem(&error)))?;
        if is_header(&object) {
            let name = |key: &str| {
                object
                    .get(key)
                    .and_then(Value::as_str)
                    .filter(|name| *name != "unused")
            };
            user = name("user_name").unwrap_or("User").to_owned();
            character = name("character_name").unwrap_or_default().to_owned();
            continue;
        }
        let Some(text) = object.get("mes").and_then(Value::as_str) else {
            return Err(Fault::new(number, "this message has no text `mes`"));
        };
        let message = Message {
            object: &object,
            text,
            line: number,
        };
        message.give(&user, &character, &mut out);
    }
    Ok(out.finish())
}

struct Message<'a> {
    object: &'a Map<String, Value>,
    text: &'a str,
    line: usize,
}

impl Message<'_> {
    fn give(&self, user: &str, character: &str, out: &mut Gatherer) {
        let is = |key: &str| {
            self.object
                .get(key)
                .and_then(Value::as_bool)
                .unwrap_or(false)
        };
        let extra = self.object.get("extra");
        let in_extra = |key: &str| {
            extra
                .and_then(|extra| extra.get(key))
                .filter(|value| !value.is_null())
        };
        let kind = in_extra("type").and_then(Value::as_str).unwrap_or_default();
        if kind != "narrator" && (is("is_system") || kind == "comment") {
            out.notes.add(HIDDEN, self.line);
            return;
        }
        let n_swipes = self
            .object
            .get("swipes")
            .and_then(Value::as_array)
            .map_or(0, Vec::len);
        out.notes
            .add_many(SWIPES, n_swipes.saturating_sub(1), self.line);
        let has_media = ["image", "media", "file", "files", "video"]
            .iter()
            .any(|key| in_extra(key).is_some());
        out.notes.add_many(MEDIA, usize::from(has_media), self.line);
        let has_reasoning = in_extra("reasoning")
            .and_then(Value::as_str)
            .is_some_and(|text| !text.is_empty());
        out.notes
            .add_many(REASONING, usize::from(has_reasoning), self.line);

        let (spoken, n_thoughts) = without_thoughts(self.text);
        out.notes.add_many(REASONING, n_thoughts, self.line);
        let speaker = self
            .object
            .get("name")
            .and_then(Value::as_str)
            .unwrap_or(if is("is_user") { user } else { character });
        let filled = macros::fill(
            &spoken,
            Names {
                // Whoever answers is meant, also in a group.
                character: if is("is_user") || speaker.is_empty() {
                    character
                } else {
                    speaker
                },
                user,
            },
        );
        out.notes
            .add_many(Notes::MACROS, filled.n_unknown, self.line);
        if filled.text.trim().is_empty() {
            return out.notes.add(Notes::EMPTY, self.line);
        }
        if kind == "narrator" || speaker.trim().is_empty() {
            return out.narration(&filled.text);
        }
        if is("is_user") {
            out.may_cut();
        }
        let voice = Voice {
            id: if is("is_user") {
                PLAYER.to_owned()
            } else {
                name::id(speaker)
            },
            name: Some(speaker.trim().to_owned()),
        };
        out.dialogue(&voice, &filled.text);
    }
}

/// A text without its `<think>` blocks, and how many there were.
fn without_thoughts(text: &str) -> (String, usize) {
    const OPEN: &str = "<think>";
    const CLOSE: &str = "</think>";
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    let mut n = 0;
    while let Some((before, behind)) = rest.split_once(OPEN) {
        let Some((_, after)) = behind.split_once(CLOSE) else {
            break;
        };
        out.push_str(before);
        rest = after;
        n += 1;
    }
    out.push_str(rest);
    (out, n)
}

#[cfg(test)]
mod tests {
    use super::super::tests::show;
    use super::*;

    fn check(text: &str, expect: &str) {
        let got = match read(text, Language::En) {
            Ok(imported) => show(&imported),
            Err(fault) => format!("{}: {}", fault.line, fault.problem),
        };
        assert_eq!(got, expect);
    }

    const HEADER: &str =
        r#"{"user_name":"Ann","character_name":"Bo","create_date":"2026-1-1","chat_metadata":{}}"#;

    #[test]
    fn messages_become_lines_of_player_and_character() {
        check(
            &format!(
                "{HEADER}\n{}\n\n{}\n{}\n",
                r#"{"name":"Bo","is_user":false,"is_system":false,"mes":"*Bo looks up.* You again, {{user}}."}"#,
                r#"{"name":"Ann","is_user":true,"is_system":false,"mes":"Where is the boat?"}"#,
                r#"{"name":"Bo","is_user":false,"mes":"Gone.\n\nTo sea."}"#
            ),
            "== 1\n<bo Bo> *Bo looks up.* You again, Ann.\n<player Ann> Where is the boat?\n<bo Bo> Gone.\n\nTo sea.\n",
        );
    }

    #[test]
    fn swipes_hidden_messages_and_reasoning_are_left_out_and_counted() {
        check(
            &format!(
                "{HEADER}\n{}\n{}\n{}\n{}\n{}\n",
                r#"{"name":"Bo","is_user":false,"mes":"Gone.","swipe_id":1,"swipes":["Here.","Gone.","Sunk."],"extra":{"reasoning":"hm","image":"a.png"}}"#,
                r#"{"name":"System","is_user":false,"is_system":true,"mes":"Chat saved.","extra":{"type":"generic"}}"#,
                r#"{"name":"System","is_user":false,"is_system":false,"mes":"Night falls.","extra":{"type":"narrator"}}"#,
                r#"{"name":"Note","is_user":false,"is_system":true,"mes":"aside","extra":{"type":"comment"}}"#,
                r#"{"name":"Bo","is_user":false,"mes":"<think>The tide.</think> Wait. {{time}}"}"#
            ),
            "== 1\n<bo Bo> Gone.\n- Night falls.\n<bo Bo> Wait. {{time}}\n\
             ! 2 answers that were swiped away, first at line 2\n! 1 pictures and files, first at line 2\n\
             ! 2 blocks of reasoning, first at line 2\n! 2 hidden messages, comments and notes of the system, first at line 3\n\
             ! 1 macros that only a front end fills in (they stay in the text), first at line 6\n",
        );
    }

    #[test]
    fn group_chats_keep_who_speaks() {
        check(
            &format!(
                "{}\n{}\n{}\n{}\n",
                r#"{"user_name":"unused","character_name":"unused","chat_metadata":{}}"#,
                r#"{"name":"Bo","is_user":false,"mes":"{{char}} waits."}"#,
                r#"{"name":"Old Ash","is_user":false,"mes":"So does {{char}}."}"#,
                r#"{"name":"You","is_user":true,"mes":""}"#
            ),
            "== 1\n<bo Bo> Bo waits.\n<old-ash Old Ash> So does Old Ash.\n! 1 messages without a text, first at line 4\n",
        );
    }

    #[test]
    fn broken_lines_are_named() {
        check(
            &format!("{HEADER}\n{{\"name\":"),
            "2: EOF while parsing a value (column 8)",
        );
        check(
            &format!("{HEADER}\n{{\"name\":\"Bo\"}}"),
            "2: this message has no text `mes`",
        );
    }
}
