//! What both kinds of completion say around their choices, whole or in chunks.

use serde_json::{Value, json};

use crate::generation::Tokens;
use crate::lines::Line;
use crate::state::{AppState, unix_time};

/// What an answer, or each of its chunks, says of itself.
pub(crate) struct Head {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
}

impl Head {
    /// The head of a new answer, whose id begins with `prefix`.
    pub fn new(state: &AppState, prefix: &str, object: &'static str) -> Self {
        Head {
            id: state.answer_id(prefix),
            object,
            created: unix_time(),
            model: state.setup().model.clone(),
        }
    }

    /// The answer or chunk around `choices`, with its `usage` where it has one.
    pub fn around(&self, choices: Vec<Value>, usage: Option<Tokens>) -> Value {
        let mut answer = json!({
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        });
        if let Some(tokens) = usage {
            answer["usage"] = json!({
                "prompt_tokens": tokens.prompt,
                "completion_tokens": tokens.completion,
                "total_tokens": tokens.prompt + tokens.completion,
                "prompt_tokens_details": {"cached_tokens": tokens.cached},
            });
        }
        answer
    }
}

/// A finished line, as the `line` event and the answer's `cyrene_lines` carry it.
pub(crate) fn line_json(index: usize, line: &Line) -> Value {
    json!({"index": index, "text": line.text, "ppl": line.ppl, "tokens": line.tokens})
}
