//! What is worth saying about rows that are read all the same: each remark once, with the number of its rows.

use std::collections::{BTreeMap, BTreeSet};

use text::WrittenTokens;

use crate::error::shorten;

/// Something about a row that its owner may not have meant.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Remark {
    /// A key that means nothing here.
    UnknownKey {
        key: String,
        /// The known key that it may be a misspelling of.
        near: Option<String>,
        /// It stands in a message of the row.
        in_message: bool,
    },
    /// `system` beside a list that begins with another system message.
    OwnSystem,
    /// `text` beside a conversation, in a stage that trains conversations.
    TextBeside,
    /// `text` beside ids.
    TextBesideIds,
    /// No answer says anything that is trained, but the last one's end is.
    OnlyEndTrained,
}

impl Remark {
    /// Itself, to be read: a key may be as long as its owner likes.
    fn shortened(self) -> Remark {
        match self {
            Remark::UnknownKey {
                key,
                near,
                in_message,
            } => Remark::UnknownKey {
                key: shorten(&key, 40),
                near,
                in_message,
            },
            other => other,
        }
    }
}

/// Keys that one sentence names.
const KEYS_NAMED: usize = 12;
/// Control tokens that one sentence names: all of Qwen's.
const TOKENS_NAMED: usize = text::ADDED_TOKENS.len();

/// Remarks on rows, counted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RowNotes {
    n_rows: BTreeMap<Remark, u64>,
    written: WrittenTokens,
}

impl RowNotes {
    /// Counts the remarks on one row, each once.
    pub(crate) fn add(&mut self, remarks: Vec<Remark>) {
        let remarks = remarks.into_iter().map(Remark::shortened);
        for remark in remarks.collect::<BTreeSet<_>>() {
            *self.n_rows.entry(remark).or_default() += 1;
        }
    }

    /// Adds the remarks on other rows.
    pub fn append(&mut self, others: RowNotes) {
        for (remark, n) in others.n_rows {
            *self.n_rows.entry(remark).or_default() += n;
        }
        self.written.append(&others.written);
    }

    /// Counts added tokens that the contents of a row spell.
    pub fn add_written(&mut self, written: &WrittenTokens) {
        self.written.append(written);
    }

    /// A sentence for each remark; keys that nothing is like and that equally many rows have share one.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let mut alike: BTreeMap<(u64, bool), Vec<&str>> = BTreeMap::new();
        for (remark, n) in &self.n_rows {
            let rows = rows(*n);
            match remark {
                Remark::UnknownKey {
                    key,
                    near: Some(near),
                    in_message,
                } => lines.push(format!(
                    "{rows} the key `{key}`{}, which means nothing here; did you mean `{near}`?",
                    place(*in_message)
                )),
                Remark::UnknownKey {
                    key, in_message, ..
                } => alike.entry((*n, *in_message)).or_default().push(key),
                Remark::OwnSystem => lines.push(format!(
                    "{rows} another `system` beside a system message of the list, which is the one that counts"
                )),
                Remark::TextBeside => lines.push(format!(
                    "{rows} a `text` beside the conversation, which is what this stage trains on"
                )),
                Remark::TextBesideIds => lines.push(format!(
                    "{rows} a `text` beside `input_ids`, which are what is trained"
                )),
                Remark::OnlyEndTrained => lines.push(format!(
                    "{rows} no answer to learn (all are empty or of weight 0), so that only the end of the last one is trained"
                )),
            }
        }
        for ((n, in_message), keys) in alike.into_iter().rev() {
            let names = keys.iter().take(KEYS_NAMED).map(|key| format!("`{key}`"));
            let mut names = names.collect::<Vec<_>>().join(", ");
            if keys.len() > KEYS_NAMED {
                names.push_str(&format!(" and {} others", keys.len() - KEYS_NAMED));
            }
            let (noun, verb) = match keys.len() {
                1 => ("key", "means"),
                _ => ("keys", "mean"),
            };
            lines.push(format!(
                "{} the {noun} {}{}, which {verb} nothing here",
                rows(n),
                names,
                place(in_message)
            ));
        }
        lines.extend(written_line(&self.written));
        lines
    }
}

/// A sentence on the added tokens that contents spell, the most frequent first.
fn written_line(written: &WrittenTokens) -> Option<String> {
    let mut tokens: Vec<(&str, u64)> = written.iter().collect();
    if tokens.is_empty() {
        return None;
    }
    tokens.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
    let n_others = tokens.len().saturating_sub(TOKENS_NAMED);
    let named = tokens.into_iter().take(TOKENS_NAMED);
    let named = named.map(|(token, n)| match n {
        1 => format!("`{}` once", shorten(token, 40)),
        n => format!("`{}` {n} times", shorten(token, 40)),
    });
    let mut named = named.collect::<Vec<_>>().join(", ");
    if n_others > 0 {
        named.push_str(&format!(" and {n_others} others"));
    }
    Some(format!(
        "the contents spell control tokens: {named}; there they are text and no tokens (docs/conversation.md)"
    ))
}

fn rows(n: u64) -> String {
    match n {
        1 => "1 row has".to_owned(),
        n => format!("{n} rows have"),
    }
}

fn place(in_message: bool) -> &'static str {
    match in_message {
        true => " in a message",
        false => "",
    }
}
