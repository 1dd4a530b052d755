//! The chat page: files built into the binary, and what the page wants to know about the character and the model.

use axum::extract::State;
use axum::http::{HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};

use crate::state::AppState;

/// Nothing from elsewhere, nothing inline, no framing.
const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
     img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Address, type and content of each file.
const FILES: [(&str, &str, &str); 7] = [
    ("/chat", HTML, include_str!("../../web/chat.html")),
    ("/chat/chat.css", CSS, include_str!("../../web/chat.css")),
    ("/chat/chat.js", JS, include_str!("../../web/chat.js")),
    ("/chat/api.js", JS, include_str!("../../web/api.js")),
    ("/chat/movie.js", JS, include_str!("../../web/movie.js")),
    ("/chat/status.js", JS, include_str!("../../web/status.js")),
    ("/chat/words.js", JS, include_str!("../../web/words.js")),
];
const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const JS: &str = "text/javascript; charset=utf-8";

pub(crate) fn routes() -> Router<AppState> {
    let mut router = Router::new()
        .route("/", get(async || Redirect::temporary("/chat")))
        .route("/favicon.ico", get(async || StatusCode::NO_CONTENT));
    for (path, content_type, content) in FILES {
        router = router.route(path, get(async move || file(content_type, content)));
    }
    router
}

pub(crate) fn protected_routes() -> Router<AppState> {
    Router::new().route("/ui/info", get(info))
}

fn file(content_type: &'static str, content: &'static str) -> Response {
    let headers: [(HeaderName, &str); 5] = [
        (header::CONTENT_TYPE, content_type),
        (header::CONTENT_SECURITY_POLICY, CONTENT_SECURITY_POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, content).into_response()
}

async fn info(State(state): State<AppState>) -> Json<Value> {
    let setup = state.setup();
    let persona = &setup.persona;
    Json(json!({
        "name": persona.shown_name().unwrap_or_default(),
        "names": persona.name,
        "model": setup.model,
        "greeting": persona.greeting,
        "system_prompt": persona.system_prompt(),
        "system_prompts": persona.system,
        "n_params": setup.n_params,
        "note": persona.note,
        "profiles": setup.profiles.list(),
        "active_profile": setup.profiles.active_name(),
    }))
}
