//! What pages of other origins may do, over a real socket.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Server, ask, hello, setup, with};
use engine::EngineConfig;
use serde_json::json;
use serve::{AllowedOrigins, ConnectionLimits};

const PAGE: &str = "http://localhost:3000";
const OTHER: &str = "http://evil.example";

struct Running {
    address: std::net::SocketAddr,
    /// Keeps the engine.
    _server: Server,
}

async fn start(origins: &[&str], keys: &[&str]) -> Running {
    let mut setup = setup();
    let origins: Vec<String> = origins.iter().map(|&origin| origin.to_owned()).collect();
    setup.allowed_origins = AllowedOrigins::parse(&origins).unwrap();
    setup.api_keys = keys.iter().map(|&key| key.to_owned()).collect();
    let server = Server::with(setup, EngineConfig::default());
    let address = server.listen(ConnectionLimits::default()).await;
    Running {
        address,
        _server: server,
    }
}

impl Running {
    /// Status and head of the answer in lower case, and its body.
    async fn send(&self, head: &str, body: &str) -> (u16, String, String) {
        ask(self.address, &format!("{head}host: localhost\r\n"), body).await
    }

    async fn preflight(&self, origin: &str, more: &str) -> (u16, String, String) {
        let head = format!(
            "OPTIONS /v1/chat/completions HTTP/1.1\r\norigin: {origin}\r\naccess-control-request-method: POST\r\n\
             access-control-request-headers: authorization,content-type,x-stainless-os\r\n{more}"
        );
        self.send(&head, "").await
    }

    async fn chat(&self, origin: &str, key: &str, body: &str) -> (u16, String, String) {
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\norigin: {origin}\r\ncontent-type: application/json\r\nauthorization: Bearer {key}\r\n"
        );
        self.send(&head, body).await
    }
}

#[tokio::test]
async fn preflight_is_answered_before_the_key_is_asked_for() {
    let server = start(&[PAGE, "https://chat.example"], &["key"]).await;
    for origin in [PAGE, "https://chat.example"] {
        let (status, head, body) = server.preflight(origin, "").await;
        assert_eq!((status, body.as_str()), (204, ""), "{head}");
        assert!(
            head.contains(&format!("access-control-allow-origin: {origin}")),
            "{head}"
        );
        assert!(
            head.contains("access-control-allow-methods: get, head, post"),
            "{head}"
        );
        assert!(
            head.contains(
                "access-control-allow-headers: authorization,content-type,x-stainless-os"
            ),
            "{head}"
        );
        assert!(head.contains("vary: origin"), "{head}");
        assert!(!head.contains("private-network: true"), "{head}");
    }
    let asked = "access-control-request-private-network: true\r\n";
    let (_, head, _) = server.preflight(PAGE, asked).await;
    assert!(
        head.contains("access-control-allow-private-network: true"),
        "{head}"
    );
}

#[tokio::test]
async fn answers_streams_and_errors_say_who_may_read_them() {
    let server = start(&[PAGE], &["key"]).await;
    let stream = with(&hello(5), json!({"stream": true})).to_string();
    for (key, body, status) in [
        ("key", hello(5).to_string(), 200),
        ("key", stream, 200),
        ("key", "{".to_owned(), 400),
        ("wrong", hello(5).to_string(), 401),
    ] {
        let (got, head, text) = server.chat(PAGE, key, &body).await;
        assert_eq!(got, status, "{text}");
        assert!(
            head.contains(&format!("access-control-allow-origin: {PAGE}")),
            "{head}"
        );
        assert!(head.contains("vary: origin"), "{head}");
    }
    let (_, head, _) = server
        .send("GET /nowhere HTTP/1.1\r\nauthorization: Bearer key\r\n", "")
        .await;
    assert!(
        !head.contains("allow-origin") && head.contains("vary: origin"),
        "{head}"
    );
}

#[tokio::test]
async fn pages_of_other_origins_are_told_nothing() {
    let server = start(&[PAGE], &[]).await;
    let (status, head, body) = server.preflight(OTHER, "").await;
    assert_eq!(status, 403);
    assert!(!head.contains("access-control-allow"), "{head}");
    assert!(body.contains("--allow-origin"), "{body}");
    let (_, head, _) = server.chat(OTHER, "", &hello(5).to_string()).await;
    assert!(!head.contains("access-control-allow"), "{head}");
}

#[tokio::test]
async fn star_allows_every_origin() {
    let server = start(&["*"], &[]).await;
    let (status, head, _) = server.preflight(OTHER, "").await;
    assert_eq!(status, 204);
    assert!(head.contains("access-control-allow-origin: *"), "{head}");
    let (status, head, _) = server.chat(OTHER, "", &hello(5).to_string()).await;
    assert_eq!(status, 200);
    assert!(head.contains("access-control-allow-origin: *"), "{head}");
}

#[tokio::test]
async fn nothing_is_shared_unless_an_origin_is_named() {
    let open = start(&[], &[]).await;
    assert_eq!(open.preflight(PAGE, "").await.0, 405);
    let (status, head, _) = open.chat(PAGE, "", &hello(5).to_string()).await;
    assert_eq!(status, 200);
    assert!(
        !head.contains("access-control") && !head.contains("vary"),
        "{head}"
    );
    let locked = start(&[], &["key"]).await;
    assert_eq!(locked.preflight(PAGE, "").await.0, 401);
}
