//! `cyrene corpus import` from outside: stories and cards of other forms become files that build.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

use std::path::PathBuf;
use std::process::{Command, Output};

const SCRIPT: &str = r#"define b = Character("Bo")
label start:
    "The tide turns."
    b "Where is the boat?"
    menu:
        "Ask":
            b "Gone."
"#;

const LOG: &str = r#"{"user_name":"You","character_name":"Bo","create_date":"2026-1-1@10h00m00s","chat_metadata":{}}
{"name":"Bo","is_user":false,"is_system":false,"mes":"*Bo looks up.* You again."}
{"name":"You","is_user":true,"is_system":false,"mes":"Where is the boat?"}
{"name":"Bo","is_user":false,"is_system":false,"mes":"Gone."}
"#;

const CARD: &str = r#"{"spec":"chara_card_v2","spec_version":"2.0","data":{"name":"Bo","description":"{{char}} is an old ferryman.","personality":"gruff","scenario":"The harbour at dusk.","first_mes":"*Bo looks up.* You again, {{user}}.","mes_example":"<START>\n{{user}}: Where is the boat?\n{{char}}: Gone.","alternate_greetings":[],"extensions":{}}}"#;

/// A folder with a tokenizer, where commands run.
struct Setup(tempfile::TempDir);

impl Setup {
    fn new(files: &[(&str, &str)]) -> Setup {
        let folder = tempfile::tempdir().unwrap();
        let tokenizer = text::Tokenizer::train(["the tide turns"].into_iter(), 260).unwrap();
        let template = text::ChatTemplate::history_stable().unwrap();
        let path = folder.path().join("tokenizer");
        tokenizer.save(&path, &template).unwrap();
        for (name, content) in files {
            std::fs::write(folder.path().join(name), content).unwrap();
        }
        Setup(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }

    fn run(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cyrene"));
        command.current_dir(self.0.path()).args(args);
        command.output().unwrap()
    }

    fn succeeds(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    fn fails(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(!output.status.success());
        stderr(&output)
    }

    /// Builds a story for the character of `bo.toml` and gives the rows of her conversations.
    fn build(&self, story: &str) -> String {
        self.succeeds(&[
            "corpus",
            "build",
            "--root",
            story,
            "--character",
            "bo.toml",
            "--tokenizer",
            "tokenizer",
            "--task",
            "pt/everything",
            "--task",
            "sft/cyrene",
            "--out",
            "data",
        ]);
        self.read("data/sft/cyrene/en.jsonl")
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn script_and_card_become_data_sets() {
    let setup = Setup::new(&[("story.rpy", SCRIPT), ("card.json", CARD)]);
    let said = setup.succeeds(&["corpus", "import", "story.rpy", "--out", "story.jsonl"]);
    assert!(
        said.contains("1 scenes, 4 lines") && said.contains("2 lines  bo  Bo"),
        "{said}"
    );
    let said = setup.succeeds(&["corpus", "import", "card.json", "--out", "bo.toml"]);
    assert!(
        said.contains("bo.toml: Bo") && said.contains("1  example dialogues"),
        "{said}"
    );
    let rows = setup.build("story.jsonl");
    assert!(
        rows.contains("Bo is an old ferryman.") && rows.contains("Where is the boat?"),
        "{rows}"
    );
    assert!(
        setup
            .read("data/pt/everything/en.jsonl")
            .contains(r"The tide turns.\nBo: Where is the boat?\nAsk\nBo: Gone.")
    );
}

#[test]
fn chat_log_has_the_player_of_the_card() {
    let setup = Setup::new(&[("chat.jsonl", LOG), ("card.json", CARD)]);
    setup.succeeds(&["corpus", "import", "chat.jsonl", "--out", "story.jsonl"]);
    setup.succeeds(&["corpus", "import", "card.json", "--out", "bo.toml"]);
    let rows = setup.build("story.jsonl");
    // What the player says stands as it is, not in parentheses.
    assert!(
        rows.contains(r#""content":"Where is the boat?""#)
            || rows.contains(r#""content": "Where is the boat?""#),
        "{rows}"
    );
}

#[test]
fn result_is_json_for_machines() {
    let setup = Setup::new(&[("story.rpy", SCRIPT)]);
    let said = setup.succeeds(&[
        "corpus",
        "import",
        "story.rpy",
        "--out",
        "story.jsonl",
        "--json",
        "--language",
        "zh",
    ]);
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!((&said["scenes"], &said["lines"]), (&1.into(), &4.into()));
    assert_eq!(said["files"][0]["form"], "renpy");
    assert_eq!(
        said["speakers"][0],
        serde_json::json!({ "id": "bo", "name": "Bo", "lines": 2 })
    );
    assert!(
        setup
            .read("story.jsonl")
            .contains(r#""text":{"chs":"Gone."}"#)
    );
}

#[test]
fn other_files_are_not_replaced_and_endings_must_fit() {
    let setup = Setup::new(&[
        ("story.rpy", SCRIPT),
        ("card.json", CARD),
        ("story.jsonl", "mine"),
        ("chat.jsonl", LOG),
    ]);
    let import = |out: &'static str| ["corpus", "import", "story.rpy", "--out", out];
    assert!(
        setup
            .fails(&import("story.jsonl"))
            .contains("story.jsonl exists already; use --force to replace it")
    );
    assert_eq!(setup.read("story.jsonl"), "mine");
    setup.succeeds(&[&import("story.jsonl")[..], &["--force"]].concat());
    setup.succeeds(&import("story.jsonl"));
    assert!(
        setup
            .fails(&import("story.toml"))
            .contains("goes into a .jsonl file; write --out story.jsonl")
    );
    assert!(
        setup
            .fails(&["corpus", "import", "card.json", "--out", "bo.jsonl"])
            .contains("--out bo.toml")
    );
    assert!(
        setup
            .fails(&["corpus", "import", "chat.jsonl", "--out", "chat.jsonl"])
            .contains("is what is imported")
    );
    assert!(
        setup
            .fails(&[&import("new.jsonl")[..], &["--language", "xx"]].concat())
            .contains("unknown language `xx`")
    );
    assert!(
        setup
            .fails(&[&import("new.jsonl")[..], &["--form", "pdf"]].concat())
            .contains("unknown form `pdf`")
    );
    assert!(!setup.path("new.jsonl").exists());
}

#[test]
fn other_commands_name_the_form_and_the_command_that_imports_it() {
    let setup = Setup::new(&[
        ("story.rpy", SCRIPT),
        ("card.json", CARD),
        (
            "bo.toml",
            "[name]\nen = \"Bo\"\n[story]\nspeaker_ids = [\"bo\"]\n",
        ),
    ]);
    let build = |character: &'static str| {
        let task = [
            "--task",
            "pt/everything",
            "--tokenizer",
            "tokenizer",
            "--out",
            "data",
        ];
        [
            &[
                "corpus",
                "build",
                "--root",
                "story.rpy",
                "--character",
                character,
            ][..],
            &task,
        ]
        .concat()
    };
    let script = "story.rpy is a Ren'Py script; turn it into a story with `cyrene corpus import story.rpy --out story.jsonl`";
    let card = "card.json is a character card; turn it into a character file with `cyrene corpus import card.json --out card.toml`";
    let error = setup.fails(&build("bo.toml"));
    assert!(error.contains(script), "{error}");
    let error = setup.fails(&build("card.json"));
    assert!(error.contains(card), "{error}");
    let error = setup.fails(&[
        "live",
        "--story",
        "story.rpy",
        "--character",
        "bo.toml",
        "--no-serve",
        "--device",
        "cpu",
    ]);
    assert!(
        error.contains(script) && !error.contains("mend the JSON"),
        "{error}"
    );
}
