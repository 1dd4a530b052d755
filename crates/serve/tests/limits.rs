//! Over a real socket: one client that is slow, idle, many or deaf, and what is left for the others.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::net::SocketAddr;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, StatusCode, header};
use axum::response::Response;
use common::{PATIENCE, Server, answer, ask, hello, post, rest, setup, wait_until, with};
use engine::EngineConfig;
use serde_json::{Value, json};
use serve::ConnectionLimits;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tower::ServiceExt;

/// A deadline that a test can wait for.
const SOON: Duration = Duration::from_millis(50);

const HEALTH: &str = "GET /health HTTP/1.1\r\nhost: localhost\r\n";
const MODELS: &str = "GET /v1/models HTTP/1.1\r\nhost: localhost\r\n";

async fn connect(address: SocketAddr, bytes: &str) -> TcpStream {
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(bytes.as_bytes()).await.unwrap();
    client
}

fn code(body: &str) -> String {
    let json: Value = serde_json::from_str(body).unwrap_or_else(|e| panic!("{e}: {body}"));
    json["error"]["code"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn connection_without_a_whole_head_is_closed() {
    let limits = ConnectionLimits {
        header_time: SOON,
        ..ConnectionLimits::default()
    };
    let address = Server::new().listen(limits).await;
    for start in ["", "GET", "GET /health HTTP/1.1\r\n", HEALTH] {
        let mut client = connect(address, start).await;
        assert_eq!(rest(&mut client).await, "", "{start:?}");
    }
    // A head that grows a byte at a time is no better.
    let client = connect(address, HEALTH).await;
    let (mut reading, mut writing) = client.into_split();
    let trickle = tokio::spawn(async move {
        writing.write_all(b"x-slow: ").await.ok();
        while writing.write_all(b"x").await.is_ok() {
            tokio::time::sleep(SOON / 10).await;
        }
    });
    let mut buffer = [0; 16];
    assert!(!matches!(reading.read(&mut buffer).await, Ok(1..)));
    drop(reading);
    trickle.await.unwrap();
}

#[tokio::test]
async fn idle_connection_is_closed_after_its_answer() {
    let limits = ConnectionLimits {
        header_time: SOON,
        ..ConnectionLimits::default()
    };
    let address = Server::new().listen(limits).await;
    let mut client = connect(address, &format!("{HEALTH}\r\n")).await;
    let (status, head, _) = answer(&mut client).await;
    assert_eq!(status, 200);
    assert!(!head.contains("connection: close"), "{head}");
}

#[tokio::test]
async fn head_of_more_than_16_kib_is_refused() {
    let address = Server::new().listen(ConnectionLimits::default()).await;
    for (n_bytes, expect) in [(15 << 10, 200), (17 << 10, 431)] {
        let head = format!("{HEALTH}x-long: {}\r\n", "x".repeat(n_bytes));
        assert_eq!(ask(address, &head, "").await.0, expect, "{n_bytes}");
    }
}

#[tokio::test]
async fn body_that_does_not_end_is_refused() {
    let mut setup = setup();
    setup.limits.body_time = SOON;
    let server = Server::with(setup, EngineConfig::default());
    let address = server.listen(ConnectionLimits::default()).await;
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n";

    let mut client = connect(address, &format!("{head}content-length: 100\r\n\r\n{{")).await;
    let (status, _, body) = answer(&mut client).await;
    assert_eq!((status, code(&body).as_str()), (408, "body_too_slow"));

    // Bytes that keep coming do not put it off.
    let client = connect(
        address,
        &format!("{head}transfer-encoding: chunked\r\n\r\n"),
    )
    .await;
    let (mut reading, mut writing) = client.into_split();
    let trickle = tokio::spawn(async move {
        while writing.write_all(b"1\r\n \r\n").await.is_ok() {
            tokio::time::sleep(SOON / 10).await;
        }
    });
    let mut seen = String::new();
    let mut buffer = [0; 1024];
    while let Ok(n @ 1..) = reading.read(&mut buffer).await {
        seen.push_str(&String::from_utf8_lossy(&buffer[..n]));
    }
    assert!(seen.starts_with("HTTP/1.1 408"), "{seen}");
    drop(reading);
    trickle.await.unwrap();
    assert_eq!(ask(address, HEALTH, "").await.0, 200);
}

#[tokio::test]
async fn idle_crowd_leaves_health_and_a_clear_answer() {
    for (by_address, status) in [(4, 429), (100, 503)] {
        let limits = ConnectionLimits {
            in_all: 4,
            by_address,
            reserve: 2,
            ..ConnectionLimits::default()
        };
        let address = Server::new().listen(limits).await;
        let mut crowd = Vec::new();
        for _ in 0..4 {
            crowd.push(connect(address, "").await);
        }
        let (got, head, body) = ask(address, MODELS, "").await;
        assert_eq!(
            (got, code(&body).as_str()),
            (status, "too_many_connections")
        );
        assert!(head.contains("retry-after: "), "{head}");
        assert_eq!(ask(address, HEALTH, "").await.0, 200);

        // Idle ones do not keep the reserve either: the newest takes the oldest's place.
        for _ in 0..20 {
            crowd.push(connect(address, "GET").await);
        }
        assert_eq!(ask(address, HEALTH, "").await.0, 200);
        let mut oldest_beyond = crowd.remove(4);
        assert_eq!(rest(&mut oldest_beyond).await, "");
        // A connection of the reserve takes one request.
        let mut client = connect(address, &format!("{HEALTH}\r\n")).await;
        assert_eq!(answer(&mut client).await.0, 200);

        drop(crowd);
        let freed = async {
            while ask(address, MODELS, "").await.0 != 200 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, freed).await.unwrap();
    }
}

#[tokio::test]
async fn reader_that_stalls_loses_its_slot() {
    let config = EngineConfig {
        max_sequences: 1,
        context: 50_000_000,
        // The engine's own patience is not what is seen here.
        reader_timeout: Duration::from_secs(3600),
        ..EngineConfig::default()
    };
    let server = Server::with(setup(), config);
    let limits = ConnectionLimits {
        stall_time: SOON,
        ..ConnectionLimits::default()
    };
    let address = server.listen(limits).await;
    let more = json!({"stream": true, "logprobs": true, "top_logprobs": 20});
    let body = with(&hello(40_000_000), more).to_string();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let deaf = connect(address, &format!("{head}{body}")).await;
    wait_until("cancelling", || {
        let stats = server.stats();
        (stats.cancelled, stats.running) == (1, 0)
    })
    .await;
    // The slot is another's.
    let answered = server.chat(hello(5)).await;
    assert_eq!(answered.status, StatusCode::OK);
    drop(deaf);
}

async fn begin(server: &Server, key: &str) -> Response {
    let mut request: Request<Body> = post(
        "/v1/chat/completions",
        &with(&hello(40_000_000), json!({"stream": true})),
    );
    let value = format!("Bearer {key}").parse().unwrap();
    request.headers_mut().insert(header::AUTHORIZATION, value);
    server.app.clone().oneshot(request).await.unwrap()
}

#[tokio::test]
async fn one_key_does_not_fill_the_queue() {
    let config = || EngineConfig {
        max_sequences: 1,
        max_waiting: 4,
        context: 50_000_000,
        ..EngineConfig::default()
    };
    let mut two_keys = setup();
    two_keys.api_keys = vec!["one".to_owned(), "two".to_owned()];
    let server = Server::with(two_keys, config());
    // Nobody reads these, so all of them count as waiting.
    let mut open = Vec::new();
    for _ in 0..2 {
        open.push(begin(&server, "one").await);
    }
    assert!(open.iter().all(|answer| answer.status() == StatusCode::OK));
    let third = begin(&server, "one").await;
    assert_eq!(third.status(), StatusCode::TOO_MANY_REQUESTS);
    assert!(third.headers().contains_key(header::RETRY_AFTER));
    let body = axum::body::to_bytes(third.into_body(), 1 << 16)
        .await
        .unwrap();
    assert_eq!(code(std::str::from_utf8(&body).unwrap()), "share_full");
    let other = begin(&server, "two").await;
    assert_eq!(other.status(), StatusCode::OK);
    // What ends makes room.
    drop(open.remove(0));
    assert_eq!(begin(&server, "one").await.status(), StatusCode::OK);

    // Where there is one key, there is nobody to share with.
    let mut one_key = setup();
    one_key.api_keys = vec!["one".to_owned()];
    let server = Server::with(one_key, config());
    let mut open = Vec::new();
    for _ in 0..4 {
        open.push(begin(&server, "one").await);
    }
    assert!(open.iter().all(|answer| answer.status() == StatusCode::OK));
}
