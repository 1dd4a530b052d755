//! The routes, one file each, and what stands before them: keys, the request log, and reading a body.

pub(crate) mod chat_completions;
pub(crate) mod completions;
pub(crate) mod health;
pub(crate) mod metrics;
pub(crate) mod models;
pub(crate) mod page;
mod stream;

use std::time::Instant;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, FromRequest, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::Response;
use tracing::info;

use crate::error::ApiError;
use crate::fields::Fields;
use crate::state::AppState;

/// All routes of the server.
pub fn app(state: AppState) -> Router {
    let protected = Router::new()
        .merge(chat_completions::routes())
        .merge(completions::routes())
        .merge(models::routes())
        .merge(health::protected_routes())
        .merge(metrics::routes())
        .merge(page::protected_routes())
        .fallback(async || ApiError::NotFound)
        .method_not_allowed_fallback(async || ApiError::Method)
        .layer(middleware::from_fn_with_state(state.clone(), check_key));
    Router::new()
        .merge(protected)
        .merge(health::routes())
        .merge(page::routes())
        .layer(DefaultBodyLimit::max(state.setup().limits.body_bytes))
        .layer(middleware::from_fn_with_state(state.clone(), log))
        .with_state(state)
}

/// A JSON body of bounded size.
pub(crate) struct JsonBody(pub Fields);

impl FromRequest<AppState> for JsonBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, ApiError> {
        // A form or plain text can be sent by any web page without asking; JSON cannot.
        if !is_json(request.headers()) {
            return Err(ApiError::ContentType);
        }
        let bytes =
            Bytes::from_request(request, state)
                .await
                .map_err(|rejection| match rejection.status() {
                    StatusCode::PAYLOAD_TOO_LARGE => ApiError::TooLarge {
                        limit: state.setup().limits.body_bytes,
                    },
                    _ => ApiError::Body,
                })?;
        Fields::parse(&bytes).map(JsonBody)
    }
}

/// The request's model must be the one served; naming none means that one.
pub(crate) fn check_model(fields: &Fields, state: &AppState) -> Result<(), ApiError> {
    let served = &state.setup().model;
    match fields.string("model")? {
        Some(model) if model != served => Err(ApiError::ModelNotFound {
            model: model.chars().take(100).collect(),
            served: served.clone(),
        }),
        _ => Ok(()),
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|value| value.to_ascii_lowercase().starts_with("application/json"))
}

async fn check_key(
    State(state): State<AppState>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let key = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.strip_prefix("Bearer "));
    if !state.accepts_key(key) {
        return Err(ApiError::Unauthorized);
    }
    Ok(next.run(request).await)
}

/// Address, status and time of every request; nothing of what was said.
async fn log(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let response = next.run(request).await;
    let status = response.status().as_u16();
    state.count_status(status);
    let elapsed_ms = started.elapsed().as_millis() as u64;
    info!(%method, path, status, elapsed_ms, "answered");
    response
}
