//! Everything beside chat: completions, models, health, metrics, keys, the page, and what is refused before a handler sees it.

mod common;

use axum::body::Body;
use axum::http::{Request, StatusCode, header};
use common::{MODEL, Server, hello, post, setup, with};
use engine::EngineConfig;
use serde_json::{Value, json};

fn raw(max_tokens: usize) -> Value {
    json!({"prompt": "The lamp", "seed": 4, "temperature": 1.0, "top_k": 0, "ignore_eos": true, "max_tokens": max_tokens})
}

#[tokio::test]
async fn completions_take_text_or_its_ids() {
    let server = Server::new();
    let answer = server.post("/v1/completions", &raw(20)).await.json();
    assert_eq!(answer["object"], "text_completion");
    let choice = &answer["choices"][0];
    assert!(choice["text"].is_string());
    assert_eq!(choice["finish_reason"], "length");
    let ids = server
        .state
        .setup()
        .chat
        .tokenizer()
        .encode("The lamp")
        .unwrap();
    assert_eq!(answer["usage"]["prompt_tokens"], ids.len());
    let by_ids = with(&raw(20), json!({"prompt": ids}));
    let again = server.post("/v1/completions", &by_ids).await.json();
    assert_eq!(again["choices"][0]["text"], choice["text"]);
}

#[tokio::test]
async fn completions_stream_and_report_parallel_logprobs() {
    let server = Server::new();
    let body = with(&raw(20), json!({"logprobs": 2}));
    let whole = server.post("/v1/completions", &body).await.json();
    let logprobs = &whole["choices"][0]["logprobs"];
    for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[list].as_array().unwrap().len(), 20, "{list}");
    }
    let streamed = server
        .post("/v1/completions", &with(&body, json!({"stream": true})))
        .await;
    assert!(streamed.text.ends_with("data: [DONE]\n\n"));
    let text: String = streamed
        .chunks()
        .iter()
        .map(|chunk| chunk["choices"][0]["text"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(text, whole["choices"][0]["text"].as_str().unwrap());
}

#[tokio::test]
async fn completions_refuse_ids_beyond_the_vocabulary() {
    let server = Server::new();
    for (prompt, code) in [
        (json!([99_999_999]), "invalid_token_id"),
        (json!([]), "empty_prompt"),
        (json!([-1]), "invalid_value"),
        (json!(7), "invalid_value"),
    ] {
        let body = json!({"prompt": prompt});
        let answer = server.post("/v1/completions", &body).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{body}");
        assert_eq!(answer.json()["error"]["code"], code, "{body}");
    }
}

#[tokio::test]
async fn models_list_the_one_served() {
    let server = Server::new();
    let list = server.get("/v1/models").await.json();
    assert_eq!(list["object"], "list");
    assert_eq!(list["data"][0]["id"], MODEL);
    assert_eq!(server.get("/v1/models/tiny").await.json()["id"], MODEL);
    let other = server.get("/v1/models/other").await;
    assert_eq!(other.status, StatusCode::NOT_FOUND);
    assert_eq!(other.json()["error"]["code"], "model_not_found");
}

#[tokio::test]
async fn health_tells_loading_from_ready() {
    let setup = setup();
    let engine = common::engine(setup.chat.tokenizer(), EngineConfig::default());
    let server = Server::without_engine(setup);
    let health = server.get("/health").await;
    assert_eq!(health.status, StatusCode::OK);
    assert_eq!(health.json()["status"], "loading");
    for answer in [server.get("/ready").await, server.chat(hello(5)).await] {
        assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(answer.json()["error"]["code"], "loading");
        assert!(answer.headers.contains_key(header::RETRY_AFTER));
    }

    server.state.set_engine(engine);
    let health = server.get("/health").await.json();
    assert_eq!(health["status"], "ok");
    assert_eq!(health["model"], MODEL);
    assert_eq!(health["profile"], "Adopted");
    assert_eq!(health["queue"], json!({"running": 0, "waiting": 0}));
    assert!(health["uptime_s"].is_u64());
    assert_eq!(server.get("/ready").await.status, StatusCode::OK);
}

#[tokio::test]
async fn metrics_count_tokens_and_answers() {
    let server = Server::new();
    server.chat(hello(11)).await;
    let text = server.get("/metrics").await.text;
    assert!(
        text.contains("\ncyrene_generated_tokens_total 11\n"),
        "{text}"
    );
    assert!(text.contains("\ncyrene_http_responses_total{status=\"200\"} 1\n"));
    assert!(text.contains("# TYPE cyrene_sequences_running gauge"));
}

#[tokio::test]
async fn keys_open_every_route_but_health_and_the_page() {
    let mut setup = setup();
    setup.api_keys = vec!["first-key".to_owned(), "second-key".to_owned()];
    let server = Server::with(setup, EngineConfig::default());
    for path in ["/v1/models", "/ready", "/metrics", "/ui/info", "/nowhere"] {
        let answer = server.get(path).await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{path}");
        assert_eq!(answer.json()["error"]["code"], "invalid_api_key");
    }
    let closed = server.chat(hello(5)).await;
    assert_eq!(closed.status, StatusCode::UNAUTHORIZED);
    for path in ["/health", "/chat", "/chat/chat.js"] {
        assert_eq!(server.get(path).await.status, StatusCode::OK, "{path}");
    }
    for (key, status) in [
        ("Bearer second-key", StatusCode::OK),
        ("Bearer second-ke", StatusCode::UNAUTHORIZED),
        ("Bearer ", StatusCode::UNAUTHORIZED),
        ("second-key", StatusCode::UNAUTHORIZED),
    ] {
        let mut request = post("/v1/chat/completions", &hello(5));
        let headers = request.headers_mut();
        headers.insert(header::AUTHORIZATION, key.parse().unwrap());
        assert_eq!(server.send(request).await.status, status, "{key}");
    }
}

#[tokio::test]
async fn bodies_are_checked_before_anything_else() {
    let server = Server::new();
    let send = async |content_type: &str, body: String| {
        let request = Request::post("/v1/chat/completions")
            .header(header::CONTENT_TYPE, content_type)
            .body(Body::from(body))
            .unwrap();
        let answer = server.send(request).await;
        (answer.status, answer.json()["error"]["code"].clone())
    };
    let json = "application/json; charset=utf-8";
    assert_eq!(
        send(json, "{\"messages\": [".to_owned()).await,
        (StatusCode::BAD_REQUEST, json!("invalid_json"))
    );
    assert_eq!(
        send(json, "[]".to_owned()).await,
        (StatusCode::BAD_REQUEST, json!("invalid_json"))
    );
    assert_eq!(
        send("text/plain", hello(5).to_string()).await,
        (
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            json!("invalid_content_type")
        )
    );
    let huge = json!({"messages": [{"role": "user", "content": "x".repeat(2 << 20)}]});
    assert_eq!(
        send(json, huge.to_string()).await,
        (StatusCode::PAYLOAD_TOO_LARGE, json!("body_too_large"))
    );
}

#[tokio::test]
async fn unknown_addresses_and_methods_are_json_errors() {
    let server = Server::new();
    let nowhere = server.get("/v2/chat").await;
    assert_eq!(nowhere.status, StatusCode::NOT_FOUND);
    assert_eq!(nowhere.json()["error"]["code"], "not_found");
    let wrong = server.get("/v1/chat/completions").await;
    assert_eq!(wrong.status, StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(wrong.json()["error"]["code"], "method_not_allowed");
}

#[tokio::test]
async fn page_comes_whole_from_this_server() {
    let server = Server::new();
    let root = server.get("/").await;
    assert!(root.status.is_redirection());
    assert_eq!(root.headers[header::LOCATION], "/chat");
    let page = server.get("/chat").await;
    assert_eq!(
        page.headers[header::CONTENT_TYPE],
        "text/html; charset=utf-8"
    );
    let policy = page.headers[header::CONTENT_SECURITY_POLICY]
        .to_str()
        .unwrap();
    assert!(policy.contains("default-src 'none'"));
    for path in [
        "chat.css",
        "chat.js",
        "api.js",
        "movie.js",
        "status.js",
        "words.js",
    ] {
        let file = server.get(&format!("/chat/{path}")).await;
        assert_eq!(file.status, StatusCode::OK, "{path}");
        assert!(
            !file.text.contains("http://") && !file.text.contains("https://"),
            "{path}"
        );
        assert!(!file.text.contains("innerHTML"), "{path}");
    }
    assert!(!page.text.contains("http://") && !page.text.contains("https://"));
}

#[tokio::test]
async fn page_learns_who_speaks_and_how() {
    let server = Server::new();
    let info = server.get("/ui/info").await.json();
    assert_eq!(info["name"], "Mira");
    assert_eq!(info["greeting"]["en"], "Hello.");
    assert_eq!(info["system_prompt"], "You are Mira.");
    assert_eq!(info["n_params"], 4_200_000);
    assert_eq!(info["active_profile"], "Adopted");
    assert_eq!(info["profiles"][1]["name"], "Legacy");
    assert_eq!(info["profiles"][1]["top_k"], 10);
}
