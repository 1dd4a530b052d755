//! Over a real socket: clients that leave, ports that are taken, and stopping.

mod common;

use common::{Server, hello, post, rest, setup, wait_until, with};
use engine::EngineConfig;
use serde_json::json;
use serve::ConnectionLimits;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tower::ServiceExt;

fn long_winded() -> Server {
    let config = EngineConfig {
        context: 50_000_000,
        ..EngineConfig::default()
    };
    Server::with(setup(), config)
}

fn request(body: &str) -> String {
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

#[tokio::test]
async fn client_gone_mid_stream_cancels_the_sequence() {
    let server = long_winded();
    let address = server.listen(ConnectionLimits::default()).await;
    let body = with(&hello(40_000_000), json!({"stream": true})).to_string();
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(request(&body).as_bytes()).await.unwrap();
    let mut seen = String::new();
    while seen.matches("chat.completion.chunk").count() < 4 {
        let mut buffer = [0; 1024];
        let n = client.read(&mut buffer).await.unwrap();
        seen.push_str(&String::from_utf8_lossy(&buffer[..n]));
    }
    assert_eq!(server.stats().running, 1);
    drop(client);
    wait_until("cancelling", || server.stats().running == 0).await;
    assert_eq!(server.stats().cancelled, 1);
}

#[tokio::test]
async fn stopping_ends_idle_connections_and_lets_a_reply_be_finished() {
    let server = Server::new();
    let listener = serve::bind("127.0.0.1", 0).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let shutdown = async move {
        stopped.await.ok();
    };
    let limits = ConnectionLimits::default();
    let running = tokio::spawn(serve::run(listener, server.app.clone(), limits, shutdown));
    let mut idle = TcpStream::connect(address).await.unwrap();
    let mut client = TcpStream::connect(address).await.unwrap();
    let body = with(&hello(200), json!({"stream": true})).to_string();
    client.write_all(request(&body).as_bytes()).await.unwrap();
    let mut first = [0; 16];
    client.read_exact(&mut first).await.unwrap();

    stop.send(()).unwrap();
    assert_eq!(rest(&mut idle).await, "");
    let streamed = rest(&mut client).await;
    assert!(streamed.contains("data: [DONE]"), "{streamed}");
    running.await.unwrap();
}

#[tokio::test]
async fn dropped_whole_request_cancels_the_sequence() {
    let server = long_winded();
    let request = post("/v1/chat/completions", &hello(40_000_000));
    let waiting = tokio::spawn(server.app.clone().oneshot(request));
    wait_until("starting", || server.stats().running == 1).await;
    waiting.abort();
    wait_until("cancelling", || server.stats().running == 0).await;
}

#[tokio::test]
async fn taken_port_is_named_with_the_remedy() {
    let first = serve::bind("127.0.0.1", 0).await.unwrap();
    let port = first.local_addr().unwrap().port();
    let error = serve::bind("127.0.0.1", port).await.unwrap_err();
    assert!(matches!(&error, serve::Error::PortInUse { .. }));
    let text = error.to_string();
    assert!(
        text.contains(&format!("127.0.0.1:{port}")) && text.contains("--port"),
        "{text}"
    );
}
