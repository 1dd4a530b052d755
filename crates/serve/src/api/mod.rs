//! The routes, one file each, and what stands before them: names of the server, keys, the request log, and reading a body.

mod answer;
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
use axum::http::uri::PathAndQuery;
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::Response;
use tracing::info;

use crate::connections::{self, Caller};
use crate::error::ApiError;
use crate::fields::Fields;
use crate::shares::Client;
use crate::state::AppState;
use crate::{cors, hosts, keys};

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
    let routes = Router::new()
        .merge(protected)
        .merge(health::routes())
        .merge(page::routes())
        .layer(DefaultBodyLimit::max(state.setup().limits.body_bytes))
        .with_state(state.clone());
    // Around the routes, the last one outermost, so that an address is mended before it is looked up and a preflight answered before a key is asked for.
    Router::new()
        .fallback_service(routes)
        .layer(middleware::from_fn(connections::turn_away))
        .layer(middleware::map_request(mend_address))
        .layer(middleware::from_fn_with_state(state.clone(), cors::share))
        .layer(middleware::from_fn_with_state(state.clone(), hosts::check))
        .layer(middleware::from_fn_with_state(state, log))
}

/// Takes addresses as clients put them together: slashes doubled or at the end, `/v1` twice or left out.
async fn mend_address(mut request: Request) -> Request {
    let uri = request.uri();
    let path = mended(uri.path());
    if path != uri.path() {
        let path_and_query = match uri.query() {
            Some(query) => format!("{path}?{query}"),
            None => path,
        };
        let mut parts = uri.clone().into_parts();
        parts.path_and_query = PathAndQuery::try_from(path_and_query).ok();
        if let Ok(mended) = Uri::from_parts(parts) {
            *request.uri_mut() = mended;
        }
    }
    request
}

fn mended(path: &str) -> String {
    let mut segments: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    while segments.starts_with(&["v1", "v1"]) {
        segments.remove(0);
    }
    if matches!(
        segments.as_slice(),
        ["chat", "completions"] | ["completions"] | ["models", ..]
    ) {
        segments.insert(0, "v1");
    }
    format!("/{}", segments.join("/"))
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
        let limits = &state.setup().limits;
        let bytes = tokio::time::timeout(limits.body_time, Bytes::from_request(request, state))
            .await
            .map_err(|_| ApiError::SlowBody {
                limit: limits.body_time,
            })?
            .map_err(|rejection| match rejection.status() {
                StatusCode::PAYLOAD_TOO_LARGE => ApiError::TooLarge {
                    limit: limits.body_bytes,
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

/// Whether the body is said to be JSON, whatever the parameters and the case of the type.
fn is_json(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(header::CONTENT_TYPE) else {
        return false;
    };
    let text = value.to_str().unwrap_or_default().to_ascii_lowercase();
    let media_type = text.split(';').next().unwrap_or_default().trim();
    media_type == "application/json"
        || (media_type.starts_with("application/") && media_type.ends_with("+json"))
}

/// The key of `authorization: Bearer KEY`; the scheme's case does not matter.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, key) = value.trim().split_once(' ')?;
    scheme
        .eq_ignore_ascii_case("bearer")
        .then_some(key.trim_start())
}

async fn check_key(
    State(state): State<AppState>,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let caller = request.extensions().get::<Caller>();
    let network = caller.map(|caller| caller.network);
    let key = bearer(request.headers()).map(keys::hash);
    let keys = state.keys();
    let key = keys.check(key, network).await?;
    if let Some(client) = Client::of(key, keys.n_keys(), network) {
        request.extensions_mut().insert(client);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_mended_as_clients_put_them_together() {
        for (path, expect) in [
            ("/v1/chat/completions", "/v1/chat/completions"),
            ("/v1/chat/completions/", "/v1/chat/completions"),
            ("//v1//chat/completions", "/v1/chat/completions"),
            ("/v1/v1/models", "/v1/models"),
            ("/chat/completions", "/v1/chat/completions"),
            ("/completions", "/v1/completions"),
            ("/models/tiny", "/v1/models/tiny"),
            ("/chat", "/chat"),
            ("/chat/", "/chat"),
            ("/", "/"),
            ("/nowhere", "/nowhere"),
        ] {
            assert_eq!(mended(path), expect, "{path}");
        }
    }
}
