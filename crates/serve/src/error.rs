//! What can go wrong: `Error` for whoever starts the server, `ApiError` for whoever asks it something.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use crate::connections::Crowd;

/// The result of starting and running the server.
pub type Result<T> = std::result::Result<T, Error>;

/// Errors of starting and running the server.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Somebody else listens there.
    #[error(
        "{host}:{port} is in use already; stop the other server or choose another port with --port"
    )]
    PortInUse {
        /// The address asked for.
        host: String,
        /// The port asked for.
        port: u16,
    },
    /// The system does not let the server listen there.
    #[error(
        "cannot listen on {host}:{port}: {source}; choose an address of this machine with --host and a port above 1023 with --port"
    )]
    Bind {
        /// The address asked for.
        host: String,
        /// The port asked for.
        port: u16,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file of profiles that is none.
    #[error("the sampling profiles are not readable: {source}; see profiles.toml for the form")]
    Profiles {
        /// Where and why.
        source: toml::de::Error,
    },
    /// A profile that is not there.
    #[error(
        "the active profile `{active}` is not among the profiles ({known}); choose one of them"
    )]
    ActiveProfile {
        /// What was asked for.
        active: String,
        /// What there is.
        known: String,
    },
    /// A character's value out of range.
    #[error(
        "the character's profile is not usable: {key} is {value}; choose a number from {low} to {high}"
    )]
    ProfileValue {
        /// The value's name.
        key: &'static str,
        /// What the character has.
        value: f32,
        /// The least.
        low: f32,
        /// The greatest.
        high: f32,
    },
    /// What is no origin of a web page.
    #[error(
        "`{origin}` is no origin of web pages; write scheme, host and port as the browser shows them (http://localhost:3000), or * for any"
    )]
    Origin {
        /// What was given.
        origin: String,
    },
    /// What is no name that a request could be for.
    #[error(
        "`{name}` is no name of a host; write it without scheme and port, as the browser shows it (cyrene.lan), or an address (192.0.2.7)"
    )]
    HostName {
        /// What was given.
        name: String,
    },
}

/// Seconds after which a client that was turned away may try again.
const RETRY_AFTER_S: u64 = 2;

/// Errors of a request; each has one status, type and code.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiError {
    #[error("the body is no JSON object: {detail}")]
    Json { detail: String },
    #[error("the body must be JSON with the header `content-type: application/json`")]
    ContentType,
    #[error("`{field}` {problem}")]
    Field { field: String, problem: String },
    #[error("the body is larger than {limit} bytes; send a shorter conversation")]
    TooLarge { limit: usize },
    #[error("the body could not be read to its end")]
    Body,
    #[error("the body was not here after {limit:?}; send it at once")]
    SlowBody { limit: std::time::Duration },
    #[error("model `{model}` is not served here; the model of this server is `{served}`")]
    ModelNotFound { model: String, served: String },
    #[error("this server needs an API key: send `authorization: Bearer KEY`")]
    Unauthorized,
    #[error("too many wrong keys came from this address; try again in a moment")]
    Guesses,
    #[error(
        "this server answers under the names of its machine, and was asked under {asked}; start it with --allow-host and that name if it is yours"
    )]
    Host { asked: String },
    #[error("too many connections are open {0}; close some, or try again in a moment")]
    Crowd(Crowd),
    #[error(
        "{most} replies of this key or address are waiting already, and the rest of the queue is for others; try again in a moment"
    )]
    Share { most: usize },
    #[error(
        "there is nothing at this address; see /v1/models, /v1/chat/completions, /health and /chat"
    )]
    NotFound,
    #[error(
        "pages of this origin may not ask this server; start it with --allow-origin and the page's scheme, host and port"
    )]
    Origin,
    #[error("this address does not take that method")]
    Method,
    #[error("the model is still loading; try again in a moment")]
    Loading,
    #[error("{error}")]
    Prompt {
        /// The field that it comes from.
        field: &'static str,
        error: engine::Error,
    },
    #[error(transparent)]
    Engine(#[from] engine::Error),
    #[error(transparent)]
    Text(text::Error),
    #[error("the server is stopping; try again in a moment")]
    Stopping,
}

impl From<text::Error> for ApiError {
    fn from(error: text::Error) -> Self {
        match error {
            text::Error::Message {
                index,
                field,
                problem,
            } => {
                let key = if field.is_empty() { "" } else { "." };
                ApiError::field(
                    format!("messages[{index}]{key}{field}"),
                    problem.to_string(),
                )
            }
            other => ApiError::Text(other),
        }
    }
}

impl ApiError {
    pub fn field(field: impl Into<String>, problem: impl Into<String>) -> Self {
        ApiError::Field {
            field: field.into(),
            problem: problem.into(),
        }
    }

    /// `asked` is the name that a request is for.
    pub fn host(asked: &str) -> Self {
        ApiError::Host {
            asked: asked.chars().take(100).collect(),
        }
    }

    /// Why a request can never run; `prompt` is the field that its prompt comes from.
    pub fn of_request(error: engine::Error, prompt: &'static str) -> Self {
        use engine::Error::{EmptyPrompt, PromptTooLong, TokenId};
        match error {
            EmptyPrompt | PromptTooLong { .. } | TokenId { .. } => ApiError::Prompt {
                field: prompt,
                error,
            },
            other => ApiError::Engine(other),
        }
    }

    /// Status, type and code, as OpenAI's clients sort errors.
    fn class(&self) -> (StatusCode, &'static str, &'static str) {
        const INVALID: &str = "invalid_request_error";
        const RATE: &str = "rate_limit_error";
        match self {
            ApiError::Json { .. } => (StatusCode::BAD_REQUEST, INVALID, "invalid_json"),
            ApiError::ContentType => (
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                INVALID,
                "invalid_content_type",
            ),
            ApiError::Field { .. } => (StatusCode::BAD_REQUEST, INVALID, "invalid_value"),
            ApiError::Body => (StatusCode::BAD_REQUEST, INVALID, "incomplete_body"),
            ApiError::SlowBody { .. } => (StatusCode::REQUEST_TIMEOUT, INVALID, "body_too_slow"),
            ApiError::TooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, INVALID, "body_too_large"),
            ApiError::ModelNotFound { .. } => (StatusCode::NOT_FOUND, INVALID, "model_not_found"),
            ApiError::Unauthorized => (
                StatusCode::UNAUTHORIZED,
                "authentication_error",
                "invalid_api_key",
            ),
            ApiError::Guesses => (StatusCode::TOO_MANY_REQUESTS, RATE, "too_many_wrong_keys"),
            ApiError::Host { .. } => (StatusCode::FORBIDDEN, INVALID, "host_not_allowed"),
            ApiError::Crowd(Crowd::ByAddress) => {
                (StatusCode::TOO_MANY_REQUESTS, RATE, "too_many_connections")
            }
            ApiError::Crowd(Crowd::InAll) => (
                StatusCode::SERVICE_UNAVAILABLE,
                "server_error",
                "too_many_connections",
            ),
            ApiError::Share { .. } => (StatusCode::TOO_MANY_REQUESTS, RATE, "share_full"),
            ApiError::Origin => (StatusCode::FORBIDDEN, INVALID, "origin_not_allowed"),
            ApiError::NotFound => (StatusCode::NOT_FOUND, INVALID, "not_found"),
            ApiError::Method => (
                StatusCode::METHOD_NOT_ALLOWED,
                INVALID,
                "method_not_allowed",
            ),
            ApiError::Loading => (StatusCode::SERVICE_UNAVAILABLE, "server_error", "loading"),
            ApiError::Stopping => (StatusCode::SERVICE_UNAVAILABLE, "server_error", "stopping"),
            ApiError::Prompt { error, .. } | ApiError::Engine(error) => engine_class(error),
            ApiError::Text(
                text::Error::TemplateRaised { .. } | text::Error::NothingToContinue { .. },
            ) => (StatusCode::BAD_REQUEST, INVALID, "invalid_messages"),
            ApiError::Text(_) => (
                StatusCode::INTERNAL_SERVER_ERROR,
                "server_error",
                "text_failed",
            ),
        }
    }

    /// Which field of the request is to blame, where one is.
    fn param(&self) -> Option<&str> {
        match self {
            ApiError::Field { field, .. } => Some(field),
            ApiError::Prompt { field, .. } => Some(field),
            ApiError::ModelNotFound { .. } => Some("model"),
            ApiError::Engine(
                engine::Error::Sampling { field, .. } | engine::Error::UnknownId { field, .. },
            ) => Some(field),
            ApiError::Engine(engine::Error::MinTokens { .. }) => Some("min_tokens"),
            _ => None,
        }
    }

    /// `{"error": {message, type, param, code}}`, also as the last event of a stream that fails.
    pub fn body(&self) -> serde_json::Value {
        let (_, kind, code) = self.class();
        json!({"error": {
            "message": self.to_string(),
            "type": kind,
            "param": self.param(),
            "code": code,
        }})
    }
}

fn engine_class(error: &engine::Error) -> (StatusCode, &'static str, &'static str) {
    use engine::Error;
    const INVALID: &str = "invalid_request_error";
    match error {
        Error::PromptTooLong { .. } => {
            (StatusCode::BAD_REQUEST, INVALID, "context_length_exceeded")
        }
        Error::EmptyPrompt => (StatusCode::BAD_REQUEST, INVALID, "empty_prompt"),
        Error::TokenId { .. } => (StatusCode::BAD_REQUEST, INVALID, "invalid_token_id"),
        Error::Sampling { .. }
        | Error::UnknownId { .. }
        | Error::TopLogprobs { .. }
        | Error::MaxTokens
        | Error::MinTokens { .. }
        | Error::NoCandidates => (StatusCode::BAD_REQUEST, INVALID, "invalid_value"),
        Error::QueueFull { .. } => (
            StatusCode::TOO_MANY_REQUESTS,
            "rate_limit_error",
            "queue_full",
        ),
        Error::Stopped => (
            StatusCode::SERVICE_UNAVAILABLE,
            "server_error",
            "engine_stopped",
        ),
        _ => (
            StatusCode::INTERNAL_SERVER_ERROR,
            "server_error",
            "generation_failed",
        ),
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let (status, _, _) = self.class();
        let mut response = (status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        if status == StatusCode::TOO_MANY_REQUESTS || status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER_S));
        }
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
