//! `POST /v1/completions`: text or token ids in, what follows out; no chat template.

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use serde_json::{Map, Value, json};

use super::stream::{self, Shape, line_json, usage_json};
use super::{JsonBody, check_model};
use crate::error::ApiError;
use crate::fields::Fields;
use crate::generation::{Finish, Generation, Options, Update};
use crate::reply::{Delta, TokenLogprob};
use crate::state::{AppState, unix_time};

pub(crate) fn routes() -> Router<AppState> {
    Router::new().route("/v1/completions", post(complete))
}

async fn complete(
    State(state): State<AppState>,
    JsonBody(fields): JsonBody,
) -> Result<Response, ApiError> {
    check_model(&fields, &state)?;
    state.loaded_engine()?;
    let mut options = Options::parse(&fields, &state)?;
    let most = engine::MAX_TOP_LOGPROBS as u64;
    if let Some(n) = fields.integer("logprobs", 0..=most)? {
        options.reply.logprobs = true;
        options.top_logprobs = n as usize;
    }
    let prompt = prompt(fields, &state).await?;

    let mut generation = Generation::start(&state, prompt, &options)?;
    let head = Head {
        id: state.answer_id("cmpl"),
        created: unix_time(),
        model: state.setup().model.clone(),
        logprobs: options.reply.logprobs,
    };
    if options.stream {
        return Ok(
            stream::respond(head, generation, options.n, options.include_usage).into_response(),
        );
    }
    let replies = generation.collect().await?;
    let choices: Vec<Value> = replies
        .iter()
        .enumerate()
        .map(|(index, (delta, finish))| {
            let mut choice = head.choice_json(index, delta, Some(*finish));
            if options.reply.lines {
                let lines = delta.lines.iter().map(|line| line_json(index, line));
                choice["cyrene_lines"] = Value::Array(lines.collect());
            }
            choice
        })
        .collect();
    Ok(Json(json!({
        "id": head.id,
        "object": "text_completion",
        "created": head.created,
        "model": head.model,
        "choices": choices,
        "usage": usage_json(generation.tokens()),
    }))
    .into_response())
}

/// `prompt`: a string, or token ids as they are.
async fn prompt(fields: Fields, state: &AppState) -> Result<Vec<u32>, ApiError> {
    match fields.get("prompt") {
        Some(Value::String(_)) => {}
        Some(Value::Array(_)) => {
            let most = state.loaded_engine()?.config().context;
            return fields.ids("prompt", most);
        }
        _ => {
            return Err(ApiError::field(
                "prompt",
                "must be a string or a list of token ids",
            ));
        }
    }
    let encoder = state.clone();
    tokio::task::spawn_blocking(move || {
        let text = fields.string("prompt")?.unwrap_or_default();
        Ok(encoder.setup().chat.tokenizer().encode(text)?)
    })
    .await
    .map_err(|_| ApiError::Stopping)?
}

struct Head {
    id: String,
    created: u64,
    model: String,
    logprobs: bool,
}

impl Head {
    fn choice_json(&self, index: usize, delta: &Delta, finish: Option<Finish>) -> Value {
        json!({
            "index": index,
            "text": delta.text,
            "logprobs": self.logprobs_json(&delta.tokens),
            "finish_reason": finish.map(Finish::name),
        })
    }

    /// The older shape: parallel lists, alternatives as a map from spelling to log-probability.
    fn logprobs_json(&self, tokens: &[TokenLogprob]) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        let top: Vec<Value> = tokens
            .iter()
            .map(|token| {
                let map: Map<String, Value> = token
                    .top
                    .iter()
                    .map(|(spelling, logprob)| (spelling.text.clone(), json!(logprob)))
                    .collect();
                Value::Object(map)
            })
            .collect();
        json!({
            "tokens": tokens.iter().map(|t| t.spelling.text.as_str()).collect::<Vec<_>>(),
            "token_logprobs": tokens.iter().map(|t| t.logprob).collect::<Vec<_>>(),
            "top_logprobs": top,
            "text_offset": tokens.iter().map(|t| t.offset).collect::<Vec<_>>(),
        })
    }
}

impl Shape for Head {
    fn opening(&self, _n: usize) -> Vec<Value> {
        Vec::new()
    }

    fn choice(&self, update: &Update) -> Value {
        self.choice_json(update.index, &update.delta, update.finish)
    }

    fn chunk(&self, choices: Vec<Value>, usage: Option<Value>) -> Value {
        let mut chunk = json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        });
        if let Some(usage) = usage {
            chunk["usage"] = usage;
        }
        chunk
    }
}
