//! `GET /v1/models`: the one model of this server.

use axum::extract::{Path, State};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};

use crate::error::ApiError;
use crate::state::{AppState, unix_time};

pub(crate) fn routes() -> Router<AppState> {
    Router::new()
        .route("/v1/models", get(list))
        .route("/v1/models/{model}", get(one))
}

async fn list(State(state): State<AppState>) -> Json<Value> {
    Json(json!({"object": "list", "data": [describe(&state)]}))
}

async fn one(
    State(state): State<AppState>,
    Path(model): Path<String>,
) -> Result<Json<Value>, ApiError> {
    if model != state.setup().model {
        return Err(ApiError::ModelNotFound {
            model: model.chars().take(100).collect(),
            served: state.setup().model.clone(),
        });
    }
    Ok(Json(describe(&state)))
}

fn describe(state: &AppState) -> Value {
    let context = state.engine().map(|engine| engine.config().context);
    json!({
        "id": state.setup().model,
        "object": "model",
        "created": unix_time().saturating_sub(state.uptime_s()),
        "owned_by": "cyrene",
        "max_model_len": context,
    })
}
