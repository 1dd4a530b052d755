//! The persona on its way: from a character file through training, merge and export to everything that talks.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::{cyrene, demo, fails, succeeds};
use serde_json::{Value, json};

const BO: &str = "languages = [\"chs\", \"en\"]\nprofile = \"Legacy\"\n[name]\nen = \"Bo\"\nchs = \"波\"\n[system]\nen = \"You are Bo of the ferry.\"\n[greeting]\nen = \"Mind the step.\"\n";
const ADA: &str = "languages = [\"en\"]\n[name]\nen = \"Ada\"\n[profile]\ntemperature = 0.25\n";

fn model() -> PathBuf {
    demo().join("fetch/model")
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A LoRA recipe on the demo's base with `more` in front of its tables.
fn recipe(dir: &Path, more: &str) -> PathBuf {
    let rows: String = (0..40)
        .map(|i| json!({ "text": format!("Page {i} of the tide book. The water came to the {i}th step and went.") }).to_string() + "\n")
        .collect();
    std::fs::write(dir.join("rows.jsonl"), rows).unwrap();
    let recipe = dir.join("recipe.toml");
    let toml = format!(
        "stage = \"cpt\"\nbase = {:?}\n{more}[data]\nrow_tokens = 48\nsources = [{{ path = \"rows.jsonl\" }}]\n\
         [batch]\nrows = 1\naccumulate = 1\n[tuner]\nkind = \"lora\"\nrank = 4\n[run]\nsteps = 2\n",
        model()
    );
    std::fs::write(&recipe, toml).unwrap();
    recipe
}

fn persona(folder: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(folder.join("persona.json")).unwrap()).unwrap()
}

/// What a server of `args` says of itself at `/ui/info`.
fn info(args: &[&str]) -> Value {
    let mut server = Command::new(env!("CARGO_BIN_EXE_cyrene"))
        .args(["--json", "serve", "--port", "0"])
        .args(args)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(server.stdout.as_mut().unwrap())
        .read_line(&mut line)
        .unwrap();
    let port = serde_json::from_str::<Value>(&line).unwrap()["port"]
        .as_u64()
        .unwrap();
    let mut stream = TcpStream::connect(("127.0.0.1", port as u16)).unwrap();
    write!(
        stream,
        "GET /ui/info HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    server.kill().unwrap();
    server.wait().unwrap();
    serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
}

#[test]
fn persona_travels_from_training_through_merge_and_export_to_the_server() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("bo.toml"), BO).unwrap();
    let recipe = recipe(dir.path(), "character = \"bo.toml\"\n");
    let [run, merged, fp8, hf] = ["run", "merged", "fp8", "hf"].map(|name| dir.path().join(name));
    succeeds(&["train", text(&recipe), "--out", text(&run)]);
    let (adapter, base) = (run.join("adapter"), model());
    let bo = persona(&adapter);
    assert_eq!(bo["name"], json!({ "chs": "波", "en": "Bo" }));
    assert_eq!(
        bo["system"],
        json!({ "chs": "波", "en": "You are Bo of the ferry." })
    );
    assert_eq!(bo["greeting"], json!({ "en": "Mind the step." }));
    assert_eq!(bo["profile"], json!("Legacy"));
    // The note is on the base's weights.
    assert_eq!(bo["note"], persona(&base)["note"]);

    succeeds(&[
        "merge",
        "--base",
        text(&base),
        "--adapter",
        text(&adapter),
        "--out",
        text(&merged),
    ]);
    for (format, out) in [("fp8-block", &fp8), ("hf", &hf)] {
        succeeds(&[
            "export",
            "--model",
            text(&merged),
            "--format",
            format,
            "--out",
            text(out),
        ]);
        assert_eq!(persona(out), bo);
    }

    let served = info(&["--model", text(&merged)]);
    assert_eq!(
        (&served["name"], &served["system_prompt"]),
        (&json!("Bo"), &json!("You are Bo of the ferry."))
    );
    assert_eq!(served["active_profile"], "Legacy");
    // The adapter's persona is served with it, and the command line's values go before it.
    let served = info(&[
        "--model",
        text(&base),
        "--adapter",
        text(&adapter),
        "--profile",
        "suggested",
    ]);
    assert_eq!(
        (&served["name"], &served["active_profile"]),
        (&json!("Bo"), &json!("Suggested"))
    );

    // Another character for the same weights.
    let ada = dir.path().join("ada.toml");
    std::fs::write(&ada, ADA).unwrap();
    let served = info(&["--model", text(&merged), "--character", text(&ada)]);
    assert_eq!(
        (&served["name"], &served["system_prompt"]),
        (&json!("Ada"), &json!("Ada"))
    );
    assert_eq!(
        (&served["greeting"], &served["note"]),
        (&json!({}), &bo["note"])
    );
    assert_eq!(served["active_profile"], "Character");
    let own = served["profiles"].as_array().unwrap().last().unwrap();
    assert_eq!(
        (&own["temperature"], &own["top_k"]),
        (&json!(0.25), &json!(20))
    );
}

#[test]
fn generate_puts_the_stored_system_prompt_in_front_of_messages_that_bring_none() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("bo.toml"), BO).unwrap();
    let recipe = recipe(dir.path(), "");
    let (run, merged) = (dir.path().join("run"), dir.path().join("merged"));
    let character = dir.path().join("bo.toml");
    succeeds(&[
        "train",
        text(&recipe),
        "--out",
        text(&run),
        "--character",
        text(&character),
    ]);
    succeeds(&[
        "merge",
        "--base",
        text(&model()),
        "--adapter",
        text(&run.join("adapter")),
        "--out",
        text(&merged),
    ]);
    let reply = |messages: Value| -> Value {
        let path = dir.path().join("messages.json");
        std::fs::write(&path, messages.to_string()).unwrap();
        let said = succeeds(&[
            "--json",
            "generate",
            "--model",
            text(&merged),
            "--messages",
            text(&path),
            "--greedy",
            "--max-tokens",
            "8",
        ]);
        serde_json::from_str(said.trim()).unwrap()
    };
    let user = json!({ "role": "user", "content": "Is the ferry late?" });
    let system = |content: &str| json!({ "role": "system", "content": content });
    let without = reply(json!([user]));
    assert_eq!(
        without,
        reply(json!([system("You are Bo of the ferry."), user]))
    );
    assert_ne!(
        without["logprobs"],
        reply(json!([system("Be brief."), user]))["logprobs"]
    );
    // Through a pipe they are the same messages.
    let args = [
        "--json",
        "generate",
        "--messages",
        "-",
        "--greedy",
        "--max-tokens",
        "8",
        "--model",
    ];
    let mut piped = Command::new(env!("CARGO_BIN_EXE_cyrene"))
        .args(args)
        .arg(&merged)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = piped.stdin.take().unwrap();
    stdin
        .write_all(json!([user]).to_string().as_bytes())
        .unwrap();
    drop(stdin);
    let said = piped.wait_with_output().unwrap();
    assert!(said.status.success(), "{}", common::stderr(&said));
    let said: Value = serde_json::from_slice(&said.stdout).unwrap();
    assert_eq!(said["ids"], without["ids"]);
}

#[test]
fn character_that_cannot_be_is_named_before_training() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path(), "");
    let character = dir.path().join("bo.toml");
    let out = dir.path().join("run");
    for (toml, words) in [
        (
            "profile = \"Wild\"\n[name]\nen = \"Bo\"\n",
            ["bo.toml", "Wild", "Adopted"],
        ),
        (
            "[name]\nen = \"Bo\"\n[profile]\ntemprature = 1.0\n",
            ["bo.toml:4", "temprature", "temperature"],
        ),
        (
            "[name]\nen = \"Bo\"\n[profile]\ntop_p = 3.0\n",
            ["bo.toml", "top_p is 3", "1"],
        ),
        ("[nam]\nen = \"Bo\"\n", ["bo.toml:1", "`nam`", "`name`"]),
    ] {
        std::fs::write(&character, toml).unwrap();
        fails(
            &[
                "train",
                text(&recipe),
                "--out",
                text(&out),
                "--character",
                text(&character),
            ],
            2,
            &words,
        );
        fails(
            &[
                "serve",
                "--model",
                text(&model()),
                "--character",
                text(&character),
            ],
            2,
            &words,
        );
    }
    let output = cyrene(&[
        "chat",
        "--model",
        text(&model()),
        "--character",
        "nobody.toml",
    ]);
    assert_eq!(output.status.code(), Some(2));
    assert!(!out.exists());
}

/// A program that talks through a pipe sees the greeting and the answers, and no prompt; the greeting is among what the model reads.
#[test]
fn chat_takes_lines_from_a_pipe_and_begins_with_her_greeting() {
    let dir = tempfile::tempdir().unwrap();
    let character = dir.path().join("bo.toml");
    let chat = |toml: &str, more: &[&str], lines: &str| -> (String, String) {
        std::fs::write(&character, toml).unwrap();
        let base = model();
        let mut chat = Command::new(env!("CARGO_BIN_EXE_cyrene"))
            .args([
                "chat",
                "--model",
                text(&base),
                "--character",
                text(&character),
            ])
            .args(["--seed", "3", "--max-tokens", "6"])
            .args(more)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        chat.stdin
            .take()
            .unwrap()
            .write_all(lines.as_bytes())
            .unwrap();
        let output = chat.wait_with_output().unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        let notes = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{notes}");
        (said, notes)
    };
    let (said, notes) = chat(BO, &[], "hello\n/again\n/hlep\n/help\n/quit\nnot said\n");
    assert!(said.starts_with("Bo: Mind the step.\nBo: "), "{said}");
    assert_eq!(said.matches("Bo: ").count(), 3, "{said}");
    assert!(!said.contains("> "), "{said}");
    assert!(
        notes.contains("there is no /hlep") && notes.contains("/undo"),
        "{notes}"
    );
    // In her other language she has a name and no greeting of her own.
    let (said, _) = chat(BO, &["--language", "zh"], "");
    assert_eq!(said, "波: Mind the step.\n");
    // What the model reads: with another greeting it finds the same answer more or less likely.
    let first_token = |toml: &str| -> Value {
        let (said, _) = chat(toml, &["--json"], "hello\n");
        let reply: Value = serde_json::from_str(said.trim()).unwrap();
        reply["logprobs"][0].clone()
    };
    let other = BO.replace(
        "Mind the step.",
        "The ferry is late, and the rain comes in.",
    );
    assert_ne!(first_token(BO), first_token(&other));
}
