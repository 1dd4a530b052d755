//! `GET /metrics`: counters in Prometheus' text form.

use std::fmt::Write;

use axum::Router;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use crate::state::AppState;

pub(crate) fn routes() -> Router<AppState> {
    Router::new().route("/metrics", get(metrics))
}

async fn metrics(State(state): State<AppState>) -> Response {
    let content_type = [(header::CONTENT_TYPE, "text/plain; version=0.0.4")];
    (content_type, render(&state)).into_response()
}

fn render(state: &AppState) -> String {
    let stats = state.engine().map(|e| e.stats()).unwrap_or_default();
    let gauges = [
        (
            "uptime_seconds",
            "Seconds since the server started",
            state.uptime_s(),
        ),
        (
            "sequences_running",
            "Sequences being computed",
            stats.running,
        ),
        ("requests_waiting", "Requests in the queue", stats.waiting),
        (
            "snapshots",
            "Sequence states kept for reuse",
            stats.snapshots,
        ),
        (
            "snapshot_bytes",
            "Memory of the kept states",
            stats.snapshot_bytes,
        ),
    ];
    let counters = [
        ("requests_total", "Sequences taken", stats.requests),
        (
            "requests_finished_total",
            "Sequences that ended by themselves",
            stats.finished,
        ),
        (
            "requests_cancelled_total",
            "Sequences whose client left",
            stats.cancelled,
        ),
        (
            "requests_failed_total",
            "Sequences that failed",
            stats.failed,
        ),
        (
            "requests_refused_total",
            "Sequences refused at a full queue",
            stats.refused,
        ),
        (
            "prefill_tokens_total",
            "Prompt tokens computed",
            stats.prefill_tokens,
        ),
        (
            "prefix_hit_tokens_total",
            "Prompt tokens taken from kept states",
            stats.prefix_hit_tokens,
        ),
        (
            "generated_tokens_total",
            "Tokens generated",
            stats.generated_tokens,
        ),
        (
            "decode_steps_total",
            "Batched decode steps",
            stats.decode_steps,
        ),
    ];
    let mut text = String::new();
    for (name, help, value) in gauges {
        metric(&mut text, name, help, "gauge", value);
    }
    for (name, help, value) in counters {
        metric(&mut text, name, help, "counter", value);
    }
    head(
        &mut text,
        "http_responses_total",
        "Answers by status",
        "counter",
    );
    for (status, count) in state.statuses() {
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "cyrene_http_responses_total{{status=\"{status}\"}} {count}"
        );
    }
    text
}

fn metric(text: &mut String, name: &str, help: &str, kind: &str, value: u64) {
    head(text, name, help, kind);
    let _ = writeln!(text, "cyrene_{name} {value}");
}

fn head(text: &mut String, name: &str, help: &str, kind: &str) {
    let _ = writeln!(text, "# HELP cyrene_{name} {help}");
    let _ = writeln!(text, "# TYPE cyrene_{name} {kind}");
}
