//! Where the recorded cases lie, and how they are read.
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, reason = "a test helper fails by panicking")]

use std::path::{Path, PathBuf};

use serde_json::Value;
use text::{Conversation, Message, Tokenizer, TurnJoin};

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

pub fn tiny() -> Tokenizer {
    Tokenizer::load(&fixture("tiny_tokenizer.json")).unwrap()
}

/// A file of the reference pack that lies beside the checkout; `None` (and a word about it) where the pack is not there.
pub fn shared(path: &str) -> Option<PathBuf> {
    let root = match std::env::var_os("CYRENE_SHARED") {
        Some(root) => PathBuf::from(root),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"),
    };
    let path = root.join(path);
    if path.exists() {
        return Some(path);
    }
    let required = std::env::var_os("CYRENE_REQUIRE_SHARED").is_some_and(|v| v == "1");
    assert!(!required, "{} is required but absent", path.display());
    eprintln!("skipped: no ../shared");
    None
}

pub fn json_lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

pub fn messages(case: &Value) -> Vec<Message> {
    Message::list_from_json(case["messages"].as_array().unwrap()).unwrap()
}

/// A recorded conversation, with turns of one role joined as ms-swift, which recorded it, joins them.
pub fn recorded_conversation(case: &Value) -> Conversation {
    Conversation::joined(messages(case), TurnJoin::Nothing)
}

pub fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

pub fn labels(value: &Value) -> Vec<i32> {
    serde_json::from_value(value.clone()).unwrap()
}
