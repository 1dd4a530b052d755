//! `cyrene corpus build` from outside, where it goes wrong: bad input, a full disk, a kill. Nothing half-written ever
//! has its final name, and the next build goes through.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

const ADA: &str = r#"
languages = ["chs", "en", "jp"]
[name]
en = "Ada"
[story]
speaker_ids = ["ada"]
"#;

const TASKS: [&str; 3] = ["pt/everything", "sft/cyrene", "sft/everything"];

/// A folder with a tokenizer, a character and a story.
struct Setup {
    folder: tempfile::TempDir,
}

impl Setup {
    fn new(story: &str) -> Setup {
        let folder = tempfile::tempdir().unwrap();
        let tokenizer = text::Tokenizer::train(["the tide turns"].into_iter(), 260).unwrap();
        let template = text::ChatTemplate::history_stable().unwrap();
        tokenizer
            .save(&folder.path().join("tokenizer"), &template)
            .unwrap();
        std::fs::write(folder.path().join("ada.toml"), ADA).unwrap();
        std::fs::write(folder.path().join("story.jsonl"), story).unwrap();
        Setup { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn args(&self) -> Vec<String> {
        let mut args: Vec<String> = [
            "corpus",
            "build",
            "--source",
            "story",
            "--root",
            &self.text("story.jsonl"),
            "--character",
            &self.text("ada.toml"),
            "--tokenizer",
            &self.text("tokenizer"),
            "--out",
            &self.text("out"),
        ]
        .map(str::to_owned)
        .into();
        for task in TASKS {
            args.extend(["--task".to_owned(), task.to_owned()]);
        }
        args
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cyrene"));
        command.args(self.args());
        command
    }

    fn build(&self) -> Output {
        self.command().output().unwrap()
    }

    fn succeeds(&self) {
        let output = self.build();
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!(self.files("tmp"), [""; 0]);
    }

    /// Files below the output folder whose name ends so.
    fn files(&self, ending: &str) -> Vec<String> {
        let mut found = Vec::new();
        collect(&self.path("out"), ending, &mut found);
        found.sort();
        found
    }

    /// What was built can be read and counts what the manifest says.
    fn rows(&self, task: &str) -> corpus::Result<usize> {
        corpus::rows::load(&self.path("out").join(task), None).map(|rows| rows.len())
    }
}

fn collect(folder: &Path, ending: &str, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if path.is_dir() {
            collect(&path, ending, found);
        } else if name.ends_with(ending) {
            found.push(name);
        }
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A story of `n_scenes` scenes in two languages, every text another.
fn story(n_scenes: usize) -> String {
    let scene = |n: usize| {
        let line = |kind: &str, speaker: &str, i: usize| {
            let name = &speaker[..speaker.len().min(3)];
            format!(
                r#"{{"kind":"{kind}","speaker_id":"{speaker}","speaker_name":{{"en":"{name}"}},"text":{{"en":"Line {i} of scene {n}: the tide came to the {n}th step and went.","chs":"第{n}场第{i}句：潮水来了又去。"}}}}"#
            )
        };
        let lines: Vec<String> = (0..6)
            .map(|i| line("dialogue", ["bo", "ada"][i % 2], i))
            .collect();
        format!(
            "{{\"campaign\":\"sea\",\"scenario\":\"{}\",\"scene\":\"sea/{n}\",\"lines\":[{}]}}\n",
            n / 50,
            lines.join(",")
        )
    };
    (0..n_scenes).map(scene).collect()
}

#[test]
fn broken_line_is_named_and_nothing_is_written() {
    let setup = Setup::new(&(story(2) + "{\"campaign\": \"sea\",\n"));
    let output = setup.build();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("story.jsonl:3:19: EOF while parsing"),
        "{}",
        stderr(&output)
    );
    assert_eq!(setup.files(""), [""; 0]);
}

/// The tokenizer is loaded while the story is read, and its fault comes before anything has its name.
#[test]
fn missing_tokenizer_is_named_and_nothing_is_written() {
    let setup = Setup::new(&story(2));
    std::fs::remove_file(setup.path("tokenizer/tokenizer.json")).unwrap();
    let output = setup.build();
    assert_eq!(output.status.code(), Some(1));
    let said = stderr(&output);
    assert!(
        said.contains("cannot read ") && said.contains("tokenizer.json"),
        "{said}"
    );
    assert_eq!(setup.files(""), [""; 0]);
}

/// The account of the data sets beside a split is made first: where that fails, no split is left that nobody was told of.
#[test]
fn failed_split_leaves_no_file_and_a_build_beside_an_old_one_is_refused() {
    let setup = Setup::new(&story(40));
    setup.succeeds();
    let split = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cyrene"));
        let (root, character) = (setup.text("story.jsonl"), setup.text("ada.toml"));
        let out = setup.text("out/split.json");
        let args = ["--root", &root, "--character", &character, "--out", &out];
        let command = command.args(["corpus", "split", "--source", "story"]);
        command.args(args).output().unwrap()
    };
    let manifest = setup.path("out/manifest.json");
    let good = std::fs::read(&manifest).unwrap();
    std::fs::write(&manifest, "{}").unwrap();
    let output = split();
    assert_eq!(output.status.code(), Some(1));
    let said = stderr(&output);
    assert!(said.contains("is no manifest of data sets"), "{said}");
    assert_eq!(setup.files("split.json"), [""; 0]);

    std::fs::write(&manifest, good).unwrap();
    let output = split();
    assert!(output.status.success(), "{}", stderr(&output));
    setup.succeeds();
    let changed = story(40).replace("Line 3 of scene 7", "Line three of scene 7");
    std::fs::write(setup.path("story.jsonl"), changed).unwrap();
    let output = setup.build();
    assert_eq!(output.status.code(), Some(1));
    let said = stderr(&output);
    assert!(
        said.contains("another version of the story's `story`"),
        "{said}"
    );
    assert!(said.contains("cyrene corpus split --force"), "{said}");
}

#[test]
fn bench_says_what_a_build_of_the_story_does() {
    let setup = Setup::new(&story(20));
    let (root, character) = (setup.text("story.jsonl"), setup.text("ada.toml"));
    let tokenizer = setup.text("tokenizer");
    let args = [
        "--json",
        "bench",
        "corpus",
        "--runs",
        "1",
        "--task",
        "sft/cyrene",
        "--peer-seconds",
        "100",
    ];
    let mut command = Command::new(env!("CARGO_BIN_EXE_cyrene"));
    command.args(args).args([
        "--root",
        &root,
        "--character",
        &character,
        "--tokenizer",
        &tokenizer,
    ]);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let line: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&line["bench"], &line["tasks"]),
        (&"corpus".into(), &serde_json::json!(["sft/cyrene"]))
    );
    // Six lines a scene, in two of the three languages; nobody's name is counted.
    assert_eq!(line["lines"], 240);
    assert!(line["tokens"].as_u64().unwrap() > 240);
    assert!(line["stages_s"]["count"].as_f64().unwrap() > 0.0);
    assert!(line["times_peer"].as_f64().unwrap() > 0.0);
    assert!(line["peak_bytes"].as_u64().unwrap() > 1 << 20);
    assert_eq!(setup.files(""), [""; 0], "a bench leaves nothing");
}

#[test]
fn unknown_markup_is_said_once_with_its_count() {
    let story = story(3).replace("the tide", "the <blink>tide</blink>");
    let setup = Setup::new(&story);
    let output = setup.build();
    assert!(output.status.success(), "{}", stderr(&output));
    let said = stderr(&output);
    assert_eq!(said.matches("unknown markup <blink>").count(), 1, "{said}");
}

/// A file-size limit stands in for a full disk.
#[cfg(unix)]
#[test]
fn full_disk_is_named_and_leaves_nothing() {
    let setup = Setup::new(&story(400));
    let args: Vec<String> = setup.args().iter().map(|a| format!("'{a}'")).collect();
    let script = format!(
        "trap '' XFSZ; ulimit -f 16; exec '{}' {}",
        env!("CARGO_BIN_EXE_cyrene"),
        args.join(" ")
    );
    let output = Command::new("bash").args(["-c", &script]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let said = stderr(&output);
    assert!(
        said.contains("cannot write ") && said.contains(".jsonl.tmp"),
        "{said}"
    );
    assert!(said.contains("check the free space"), "{said}");
    assert_eq!(setup.files(""), [""; 0]);
    setup.succeeds();
    assert_eq!(setup.rows("sft/cyrene").unwrap(), 800);
}

/// Starts a build and ends it as soon as it has begun to write; false if it was done before it could be ended.
fn interrupt(setup: &Setup, end: impl Fn(&mut std::process::Child)) -> bool {
    let mut child = setup
        .command()
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while setup.files(".tmp").is_empty() {
        assert!(
            child.try_wait().unwrap().is_none(),
            "the build was too quick"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    end(&mut child);
    !child.wait().unwrap().success()
}

#[test]
fn killed_build_names_no_file_and_the_next_one_clears_up() {
    let setup = Setup::new(&story(6000));
    assert!(interrupt(&setup, |child| child.kill().unwrap()));
    assert_eq!(setup.files("json"), [""; 0]);
    assert_eq!(setup.files("jsonl"), [""; 0]);
    std::fs::write(setup.path("story.jsonl"), story(5)).unwrap();
    setup.succeeds();
    assert_eq!(setup.rows("sft/cyrene").unwrap(), 10);
}

#[cfg(unix)]
#[test]
fn interrupted_build_keeps_what_an_earlier_one_made() {
    let setup = Setup::new(&story(5));
    setup.succeeds();
    let before = setup.files("");
    // On a loaded machine the signal may come when a short build is over.
    let interrupted = [6000, 24_000, 96_000].into_iter().find(|n_scenes| {
        std::fs::write(setup.path("story.jsonl"), story(*n_scenes)).unwrap();
        interrupt(&setup, |child| {
            let kill = format!("kill -INT {}", child.id());
            Command::new("bash").args(["-c", &kill]).status().unwrap();
        })
    });
    let n_scenes = interrupted.expect("the builds were too quick");
    for task in TASKS {
        assert!(setup.rows(task).is_ok(), "{task}");
    }
    let mut after = setup.files("");
    after.retain(|name| !name.ends_with(".tmp") && !name.ends_with(".tmp.lock"));
    assert_eq!(before, after);
    setup.succeeds();
    assert_eq!(setup.rows("sft/cyrene").unwrap(), 2 * n_scenes);
}

/// What the manifest says of conversations is what training makes of the same rows, whichever pattern the rules count with, and whatever
/// the story spells.
#[test]
fn counted_conversations_are_those_that_training_sees() {
    let setup = Setup::new(&story(5).replace("went.", "went<|im_end|> <think>."));
    let tokenizer = text::Tokenizer::load(&setup.path("tokenizer")).unwrap();
    let encoding = corpus::examples::Encoding {
        stage: corpus::examples::TrainingStage::Sft,
        loss_scale: text::labels::LossScale::default(),
        tokenizer: Some(&tokenizer),
        vocab_size: None,
        row_tokens: None,
    };
    for pattern in ["qwen2", "qwen3_5"] {
        let output = setup.command().args(["--count-with", pattern]).output();
        let output = output.unwrap();
        let said = String::from_utf8(output.stdout.clone()).unwrap();
        let manifest = corpus::Manifest::load(&setup.path("out")).unwrap().unwrap();
        let dataset = &manifest.datasets["sft/cyrene"];
        for file in dataset.files.iter().filter(|file| file.n_rows > 0) {
            let path = setup.path("out").join(&file.path);
            let examples = corpus::examples::of_file(&path, encoding).unwrap().examples;
            let (tokens, trained) = examples.iter().fold((0, 0), |(tokens, trained), example| {
                let encoded = &example.encoded;
                (
                    tokens + encoded.input_ids.len(),
                    trained + encoded.n_trained(),
                )
            });
            let counted = file.training.unwrap();
            assert_eq!(
                (counted.tokens, counted.trained),
                (tokens as u64, trained as u64),
                "{path:?}"
            );
            assert!(counted.tokens > file.n_tokens, "the template is counted in");
        }
        let all = dataset.training().unwrap();
        assert!(
            all.trained > 0 && said.contains("as training reads them"),
            "{said}"
        );
        assert!(manifest.datasets["pt/everything"].training().is_none());
        check_control_tokens_are_told(&setup, &manifest, &stderr(&output));
    }
}

/// Each data set warns of as many control tokens as its rows spell, and the command says so.
fn check_control_tokens_are_told(setup: &Setup, manifest: &corpus::Manifest, said: &str) {
    for (task, dataset) in &manifest.datasets {
        for token in ["<|im_end|>", "<think>"] {
            let spelt = dataset.files.iter().map(|file| {
                let rows = std::fs::read_to_string(setup.path("out").join(&file.path)).unwrap();
                rows.matches(token).count() as u64
            });
            let spelt: u64 = spelt.sum();
            assert!(spelt > 0, "{task}");
            let mut warnings = dataset.warnings.iter();
            let warning =
                warnings.find(|w| w.text.starts_with(&format!("{token}, a control token")));
            assert_eq!(warning.map(|w| w.count), Some(spelt), "{task} {token}");
            let told = format!("warning: {token}, a control token");
            assert!(said.contains(&told), "{said}");
        }
    }
}
