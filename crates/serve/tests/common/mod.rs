//! A server over a small seeded model and a tokenizer trained on the spot; requests go straight to the router.

#![allow(dead_code, reason = "each test binary uses a part of these helpers")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, Request, StatusCode, header};
use engine::{Engine, EngineConfig, EngineHandle};
use kernel::DType;
use model::{Config, Model};
use serde_json::{Value, json};
use serve::{
    AllowedHosts, AllowedOrigins, AppState, ConnectionLimits, Limits, Profiles, Setup, app,
};
use text::{ChatEncoder, ChatTemplate, Persona, Tokenizer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tower::ServiceExt;

pub const MODEL: &str = "tiny";

/// Until a test is given up.
pub const PATIENCE: Duration = Duration::from_secs(120);

const STORY: [&str; 4] = [
    "The lighthouse keeper counted the boats.\nNobody came home that night, and the lamp burned on.",
    "守灯人数着海上的船。\n那一夜没有人回来,灯还亮着。",
    "灯台守は船を数えた。その夜、誰も帰らなかった。",
    "Who is there? It is only the wind, she said, and laughed.",
];

pub fn setup() -> Setup {
    Setup {
        model: MODEL.to_owned(),
        chat: ChatEncoder::new(
            Tokenizer::train(STORY.into_iter(), 360).unwrap(),
            ChatTemplate::history_stable().unwrap(),
        ),
        profiles: Profiles::built_in().unwrap(),
        persona: Persona {
            name: [("en".to_owned(), "Mira".to_owned())].into(),
            system: [("en".to_owned(), "You are Mira.".to_owned())].into(),
            greeting: [("en".to_owned(), "Hello.".to_owned())].into(),
            ..Persona::default()
        },
        n_params: 4_200_000,
        api_keys: Vec::new(),
        allowed_origins: AllowedOrigins::default(),
        // Requests that go straight to the router name none.
        allowed_hosts: AllowedHosts::any(),
        limits: Limits::default(),
    }
}

/// One linear-attention layer: a token costs the same at any position, so that long replies stay cheap.
pub fn engine(tokenizer: &Tokenizer, config: EngineConfig) -> EngineHandle {
    let json = json!({
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "attention_bias": false,
        "attn_output_gate": true,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.3,
        "intermediate_size": 48,
        "layer_types": ["linear_attention"],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 32,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 1,
        "linear_value_head_dim": 32,
        "max_position_embeddings": 4096,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 10000, "rope_type": "default"},
        "tie_word_embeddings": true,
        // Three rows more than there are tokens, as released models have.
        "vocab_size": tokenizer.vocab_size() + 3,
    });
    let model = Model::init(Config::from_json(&json).unwrap(), 5, DType::F32);
    Engine::start(model, config).unwrap()
}

pub struct Server {
    pub app: Router,
    pub state: AppState,
}

pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub text: String,
}

impl Server {
    pub fn new() -> Self {
        Server::with(setup(), EngineConfig::default())
    }

    pub fn with(setup: Setup, config: EngineConfig) -> Self {
        let engine = engine(setup.chat.tokenizer(), config);
        let server = Server::without_engine(setup);
        server.state.set_engine(engine);
        server
    }

    pub fn without_engine(setup: Setup) -> Self {
        let state = AppState::new(setup);
        Server {
            app: app(state.clone()),
            state,
        }
    }

    pub fn stats(&self) -> engine::Stats {
        self.state.engine().unwrap().stats()
    }

    /// Listens on a free port of this machine until the test ends.
    pub async fn listen(&self, limits: ConnectionLimits) -> SocketAddr {
        let listener = serve::bind("127.0.0.1", 0).await.unwrap();
        let address = listener.local_addr().unwrap();
        let app = self.app.clone();
        tokio::spawn(serve::run(listener, app, limits, std::future::pending()));
        address
    }

    pub async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.app.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = to_bytes(body, usize::MAX).await.unwrap();
        Answer {
            status: parts.status,
            headers: parts.headers,
            text: String::from_utf8(bytes.to_vec()).unwrap(),
        }
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.send(Request::get(path).body(Body::empty()).unwrap())
            .await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(post(path, body)).await
    }

    pub async fn chat(&self, body: Value) -> Answer {
        self.post("/v1/chat/completions", &body).await
    }
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e}: {}", self.text))
    }

    /// The data of each event with its name (`message` if it has none); comments left out.
    pub fn events(&self) -> Vec<(String, String)> {
        self.text
            .split("\n\n")
            .filter(|block| !block.is_empty() && !block.starts_with(':'))
            .map(|block| {
                let mut name = "message".to_owned();
                let mut data = Vec::new();
                for line in block.lines() {
                    match line.split_once(": ") {
                        Some(("event", value)) => value.clone_into(&mut name),
                        Some(("data", value)) => data.push(value),
                        _ => panic!("{line:?} in {block:?}"),
                    }
                }
                (name, data.join("\n"))
            })
            .collect()
    }

    /// The JSON chunks of a stream, without `line` events and `[DONE]`.
    pub fn chunks(&self) -> Vec<Value> {
        self.events()
            .into_iter()
            .filter(|(name, data)| name == "message" && data != "[DONE]")
            .map(|(_, data)| serde_json::from_str(&data).unwrap())
            .collect()
    }

    /// The text of a streamed chat reply.
    pub fn streamed_text(&self, index: u64) -> String {
        self.chunks()
            .iter()
            .flat_map(|chunk| chunk["choices"].as_array().unwrap().clone())
            .filter(|choice| choice["index"] == index)
            .filter_map(|choice| choice["delta"]["content"].as_str().map(str::to_owned))
            .collect()
    }

    /// The text of a whole chat reply.
    pub fn content(&self) -> String {
        let json = self.json();
        let content = json["choices"][0]["message"]["content"].as_str();
        content.unwrap_or_else(|| panic!("{json}")).to_owned()
    }
}

pub fn post(path: &str, body: &Value) -> Request<Body> {
    Request::post(path)
        .header(header::CONTENT_TYPE, "application/json")
        .body(Body::from(body.to_string()))
        .unwrap()
}

/// The answer to `head` (without its end) and `body` on a connection of its own, which is closed after it.
pub async fn ask(address: SocketAddr, head: &str, body: &str) -> (u16, String, String) {
    let mut client = TcpStream::connect(address).await.unwrap();
    let request = format!(
        "{head}connection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    client.write_all(request.as_bytes()).await.unwrap();
    answer(&mut client).await
}

/// Status and head of the answer in lower case, and its body: all until the server closes the connection.
pub async fn answer(client: &mut TcpStream) -> (u16, String, String) {
    let text = rest(client).await;
    let (head, body) = text
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("no answer: {text:?}"));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head.to_ascii_lowercase(), body.to_owned())
}

/// What still comes until the server closes the connection, which it must.
pub async fn rest(client: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let reading = async {
        let mut buffer = [0; 4096];
        // A server that closes before it has read all ends the connection with an error.
        while let Ok(n @ 1..) = client.read(&mut buffer).await {
            bytes.extend_from_slice(&buffer[..n]);
        }
    };
    let closed = tokio::time::timeout(PATIENCE, reading).await;
    assert!(closed.is_ok(), "the connection was not closed");
    String::from_utf8(bytes).unwrap()
}

/// Waits for what must happen, however slow the machine is.
pub async fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let happened = tokio::time::timeout(PATIENCE, waiting).await;
    assert!(happened.is_ok(), "{what} did not happen");
}

/// A chat request that always gives `max_tokens` tokens.
pub fn hello(max_tokens: usize) -> Value {
    json!({
        "model": MODEL,
        "messages": [{"role": "user", "content": "Who is there?"}],
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "seed": 17,
        "ignore_eos": true,
        "max_tokens": max_tokens,
    })
}

/// `base` with more fields.
pub fn with(base: &Value, more: Value) -> Value {
    let mut body = base.clone();
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}
