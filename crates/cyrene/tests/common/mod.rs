//! The program as the tests run it, and the demo's run folder.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

pub fn cyrene(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cyrene"))
        .args(args)
        .output()
        .unwrap()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs and expects an exit code and words of the error.
pub fn fails(args: &[&str], code: i32, words: &[&str]) {
    let output = cyrene(args);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {text}");
    for word in words {
        assert!(text.contains(word), "{args:?}: no `{word}` in: {text}");
    }
}

pub fn succeeds(args: &[&str]) -> String {
    let output = cyrene(args);
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// The demo's run folder: tokenizer, untrained model and data sets, made once for all tests of a file.
pub fn demo() -> &'static Path {
    static DEMO: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = DEMO.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        succeeds(&[
            "live",
            "--demo",
            "--until",
            "corpus",
            "--runs",
            dir.path().to_str().unwrap(),
        ]);
        let run = dir.path().join("demo");
        (dir, run)
    });
    path
}
