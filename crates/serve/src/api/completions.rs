//! `POST /v1/completions`: texts or token ids in, what follows each out; no chat template.

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Extension, Json, Router};
use serde_json::{Map, Value, json};
use text::Tokenizer;

use super::answer::{Head, line_json};
use super::stream::{self, Shape};
use super::{JsonBody, check_model};
use crate::error::ApiError;
use crate::fields::{self, Fields};
use crate::generation::{Finish, Generation, Prompt, Update};
use crate::options::Options;
use crate::parameters::{self, Endpoint};
use crate::reply::{Delta, TokenLogprob};
use crate::shares::Client;
use crate::state::AppState;

/// Prompts of one request at most.
const MOST_PROMPTS: usize = 256;

pub(crate) fn routes() -> Router<AppState> {
    Router::new().route("/v1/completions", post(complete))
}

async fn complete(
    State(state): State<AppState>,
    client: Option<Extension<Client>>,
    JsonBody(fields): JsonBody,
) -> Result<Response, ApiError> {
    // 1. what is asked; the body's JSON, many times its size in memory, is gone before anything is waited for
    let (options, texts) = asked(fields, &state)?;

    // 2. the prompts; encoding long ones must not hold up other requests
    let encoder = state.clone();
    let echo = options.echo;
    let prompts = tokio::task::spawn_blocking(move || {
        let tokenizer = encoder.setup().chat.tokenizer();
        let prompts = texts.into_iter().map(|text| text.prompt(tokenizer, echo));
        prompts.collect::<Result<Vec<Prompt>, ApiError>>()
    })
    .await
    .map_err(|_| ApiError::Stopping)??;

    // 3. the answer
    let client = client.map(|Extension(client)| client);
    let mut generation = Generation::start(&state, client, prompts, &options)?;
    let head = Head::new(&state, "cmpl", "text_completion");
    let shape = TextShape {
        logprobs: options.reply.logprobs,
    };
    if options.stream {
        let events = stream::respond(head, shape, generation, options.include_usage);
        return Ok(events.into_response());
    }
    let replies = generation.collect().await?;
    let choices: Vec<Value> = replies
        .iter()
        .enumerate()
        .map(|(index, (delta, finish))| {
            let mut choice = shape.choice_json(index, delta, Some(*finish));
            if options.reply.lines {
                let lines = delta.lines.iter().map(|line| line_json(index, line));
                choice["cyrene_lines"] = Value::Array(lines.collect());
            }
            choice
        })
        .collect();
    Ok(Json(head.around(choices, Some(generation.tokens()))).into_response())
}

/// The request's options and what is to be gone on from.
fn asked(mut fields: Fields, state: &AppState) -> Result<(Options, Vec<Asked>), ApiError> {
    parameters::check(&mut fields, Endpoint::Completions)?;
    check_model(&fields, state)?;
    state.loaded_engine()?;
    Ok((options(&fields, state)?, prompts(&fields)?))
}

fn options(fields: &Fields, state: &AppState) -> Result<Options, ApiError> {
    let mut options = Options::parse(fields, state)?;
    let most = engine::MAX_TOP_LOGPROBS as u64;
    let is_off = fields.get("logprobs") == Some(&Value::Bool(false));
    if !is_off && let Some(n) = fields.integer("logprobs", 0..=most)? {
        options.reply.logprobs = true;
        options.reply.stop_logprob = true;
        options.top_logprobs = n as usize;
    }
    Ok(options)
}

/// A prompt as it was sent.
enum Asked {
    Text(String),
    Ids(Vec<u32>),
}

impl Asked {
    /// As ids, with its text where the reply is to begin with it.
    fn prompt(self, tokenizer: &Tokenizer, echo: bool) -> Result<Prompt, ApiError> {
        let (ids, text) = match self {
            Asked::Text(text) => (tokenizer.encode(&text)?, echo.then_some(text)),
            Asked::Ids(ids) => {
                let text = echo.then(|| tokenizer.decode(&ids, false)).transpose()?;
                (ids, text)
            }
        };
        Ok(Prompt {
            ids,
            field: "prompt",
            echo: text,
        })
    }
}

/// `prompt`: a string, token ids as they are, or a list of either.
fn prompts(fields: &Fields) -> Result<Vec<Asked>, ApiError> {
    let refusal = |got: &Value| {
        let expected =
            format!("a string, a list of token ids, or a list of 1 to {MOST_PROMPTS} of either");
        fields.refusal("prompt", expected, got)
    };
    let value = fields.get("prompt").unwrap_or(&Value::Null);
    let one = |value: &Value| match value {
        Value::String(text) => Ok(Asked::Text(text.clone())),
        value => fields::ids(value)
            .map(Asked::Ids)
            .ok_or_else(|| refusal(value)),
    };
    match value {
        Value::Array(list) if list.iter().any(|item| item.is_string() || item.is_array()) => {
            if list.len() > MOST_PROMPTS {
                return Err(refusal(value));
            }
            list.iter().map(one).collect()
        }
        value => Ok(vec![one(value)?]),
    }
}

/// Choices as completions have them.
struct TextShape {
    logprobs: bool,
}

impl TextShape {
    fn choice_json(&self, index: usize, delta: &Delta, finish: Option<Finish>) -> Value {
        json!({
            "index": index,
            "text": delta.text,
            "logprobs": self.logprobs_json(&delta.tokens),
            "finish_reason": finish.map(Finish::name),
        })
    }

    /// The older shape: parallel lists, alternatives as a map from spelling to log-probability, the token itself always among them.
    fn logprobs_json(&self, tokens: &[TokenLogprob]) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        json!({
            "tokens": tokens.iter().map(|t| t.spelling.text.as_str()).collect::<Vec<_>>(),
            "token_logprobs": tokens.iter().map(|t| t.logprob).collect::<Vec<_>>(),
            "top_logprobs": tokens.iter().map(alternatives).collect::<Vec<_>>(),
            "text_offset": tokens.iter().map(|t| t.offset).collect::<Vec<_>>(),
        })
    }
}

/// Spellings and log-probabilities of the likeliest tokens and of `token`; null where nothing is said of it.
fn alternatives(token: &TokenLogprob) -> Value {
    let Some(logprob) = token.logprob else {
        return Value::Null;
    };
    let mut map = Map::new();
    for (spelling, logprob) in &token.top {
        // Several tokens may look alike where they are parts of characters: the likeliest is named.
        map.entry(spelling.text.clone()).or_insert(json!(logprob));
    }
    map.entry(token.spelling.text.clone())
        .or_insert(json!(logprob));
    Value::Object(map)
}

impl Shape for TextShape {
    fn opening(&self, _n: usize) -> Vec<Value> {
        Vec::new()
    }

    fn choice(&self, update: &Update) -> Value {
        self.choice_json(update.index, &update.delta, update.finish)
    }
}
