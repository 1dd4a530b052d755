//! `GET /health`: always an answer while the process lives. `GET /ready`: whether a request would be taken now.

use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};

use crate::error::ApiError;
use crate::state::AppState;

pub(crate) fn routes() -> Router<AppState> {
    Router::new().route("/health", get(health))
}

pub(crate) fn protected_routes() -> Router<AppState> {
    Router::new().route("/ready", get(ready))
}

async fn health(State(state): State<AppState>) -> Json<Value> {
    let (status, stats) = match state.engine() {
        None => ("loading", engine::Stats::default()),
        Some(engine) if engine.is_running() => ("ok", engine.stats()),
        Some(engine) => ("stopped", engine.stats()),
    };
    let setup = state.setup();
    Json(json!({
        "status": status,
        "model": setup.model,
        "profile": setup.profiles.active_name(),
        "queue": {"running": stats.running, "waiting": stats.waiting},
        "uptime_s": state.uptime_s(),
    }))
}

async fn ready(State(state): State<AppState>) -> Result<(StatusCode, Json<Value>), ApiError> {
    let engine = state.loaded_engine()?;
    if !engine.is_running() {
        return Err(engine::Error::Stopped.into());
    }
    let waiting = engine.stats().waiting;
    if waiting >= engine.config().max_waiting as u64 {
        return Err(engine::Error::QueueFull {
            waiting: waiting as usize,
        }
        .into());
    }
    Ok((StatusCode::OK, Json(json!({"status": "ready"}))))
}
