//! The program from outside: exit codes, errors that name the thing and the remedy, runs that survive a kill.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use common::{cyrene, demo, fails, stderr, succeeds};

fn model() -> String {
    demo().join("fetch/model").to_str().unwrap().to_owned()
}

/// A copy of the demo's model that a test may damage.
fn copied_model(dir: &Path) -> PathBuf {
    let copy = dir.join("model");
    std::fs::create_dir(&copy).unwrap();
    for entry in std::fs::read_dir(model()).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
    }
    copy
}

fn write_recipe(dir: &Path, more: &str) -> PathBuf {
    let rows: String = (0..40)
        .map(|i| json!({ "text": format!("Page {i} of the tide book. The water came to the {i}th step and went.") }).to_string() + "\n")
        .collect();
    std::fs::write(dir.join("rows.jsonl"), rows).unwrap();
    let recipe = dir.join("recipe.toml");
    let text = format!(
        "stage = \"cpt\"\nbase = \"{}\"\n[data]\nrow_tokens = 48\nvalidation_share = 0.2\nsources = [{{ path = \"rows.jsonl\" }}]\n\
         [batch]\nrows = 1\naccumulate = 2\n[optimizer]\nlr = 1e-3\n{more}",
        model().replace('\\', "/"),
    );
    std::fs::write(&recipe, text).unwrap();
    recipe
}

#[test]
fn misuse_is_2_and_failure_is_1() {
    let dir = tempfile::tempdir().unwrap();
    fails(&["no-such-command"], 2, &["unrecognized subcommand"]);
    fails(
        &["score", "--model", "nowhere", "--ids", "nothing.jsonl"],
        2,
        &["nothing.jsonl"],
    );
    fails(
        &["generate", "--model", "nowhere", "--prompt", "x"],
        2,
        &["nowhere", "Hugging Face folder"],
    );
    fails(
        &[
            "generate",
            "--model",
            &model(),
            "--prompt",
            "x",
            "--device",
            "cuda",
        ],
        2,
        &["cuda", "--device cpu"],
    );
    fails(
        &[
            "generate",
            "--model",
            &model(),
            "--prompt",
            "x",
            "--profile",
            "Wild",
        ],
        2,
        &["Wild", "Adopted"],
    );
    let empty = dir.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    fails(
        &[
            "generate",
            "--model",
            empty.to_str().unwrap(),
            "--prompt",
            "x",
        ],
        1,
        &["config.json"],
    );
}

#[test]
fn unknown_recipe_key_names_line_and_near_miss() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = write_recipe(dir.path(), "warmup_ration = 0.1\n");
    fails(
        &["train", recipe.to_str().unwrap()],
        2,
        &[
            "optimizer.warmup_ration",
            "recipe.toml:12",
            "optimizer.warmup_ratio",
        ],
    );
    let recipe = write_recipe(dir.path(), "");
    fails(
        &[
            "train",
            recipe.to_str().unwrap(),
            "--set",
            "optimizer.lr=fast",
        ],
        2,
        &["lr"],
    );
    fails(
        &["train", "no-such-recipe.toml"],
        2,
        &["no-such-recipe.toml"],
    );
}

#[test]
fn damaged_checkpoints_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let copy = copied_model(dir.path());
    let weights = copy.join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    fails(
        &[
            "generate",
            "--model",
            copy.to_str().unwrap(),
            "--prompt",
            "x",
        ],
        1,
        &["model.safetensors"],
    );

    let config = copy.join("config.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    json["model_type"] = "llama".into();
    std::fs::write(&config, json.to_string()).unwrap();
    fails(
        &[
            "generate",
            "--model",
            copy.to_str().unwrap(),
            "--prompt",
            "x",
        ],
        1,
        &["llama", "qwen3_5"],
    );
}

#[test]
fn token_beyond_the_vocabulary_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let ids = dir.path().join("ids.jsonl");
    std::fs::write(&ids, "{\"input_ids\":[1,2,3]}\n{\"input_ids\":[1,99999]}\n").unwrap();
    fails(
        &["score", "--model", &model(), "--ids", ids.to_str().unwrap()],
        1,
        &["99999", "document 2"],
    );
    std::fs::write(&ids, "{\"input_ids\":[1,2,3]}\n{\"input_ids\":[1,\n").unwrap();
    fails(
        &["score", "--model", &model(), "--ids", ids.to_str().unwrap()],
        2,
        &["ids.jsonl:2"],
    );

    let recipe = write_recipe(dir.path(), "");
    std::fs::write(
        dir.path().join("rows.jsonl"),
        "{\"input_ids\":[1,99999],\"labels\":[-100,99999]}\n",
    )
    .unwrap();
    fails(
        &[
            "train",
            recipe.to_str().unwrap(),
            "--out",
            dir.path().join("o").to_str().unwrap(),
            "--set",
            "data.validation_share=0",
        ],
        2,
        &["rows.jsonl:1: ", "99999", "vocabulary"],
    );
}

#[test]
fn rows_without_a_trainable_token_stop_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = write_recipe(dir.path(), "");
    std::fs::write(
        dir.path().join("rows.jsonl"),
        "{\"input_ids\":[1,2,3],\"labels\":[-100,-100,-100]}\n",
    )
    .unwrap();
    fails(
        &[
            "train",
            recipe.to_str().unwrap(),
            "--out",
            dir.path().join("o").to_str().unwrap(),
            "--set",
            "data.validation_share=0",
        ],
        1,
        &["token to train on"],
    );
}

#[test]
fn scores_are_log_probabilities_of_the_next_ids() {
    let dir = tempfile::tempdir().unwrap();
    let ids = dir.path().join("ids.jsonl");
    std::fs::write(
        &ids,
        "{\"input_ids\":[10,20,30,40]}\n{\"input_ids\":[10,20]}\n{\"input_ids\":[7]}\n",
    )
    .unwrap();
    let out = succeeds(&["score", "--model", &model(), "--ids", ids.to_str().unwrap()]);
    let rows: Vec<Value> = out
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let lengths: Vec<usize> = rows
        .iter()
        .map(|row| row["logprobs"].as_array().unwrap().len())
        .collect();
    assert_eq!(lengths, [3, 1, 0]);
    assert_eq!(
        rows[0]["logprobs"][0], rows[1]["logprobs"][0],
        "the same ids, the same bits"
    );
    assert!(
        rows[0]["logprobs"][0].as_f64().unwrap() < -5.0,
        "an untrained model is near uniform"
    );
}

#[test]
fn greedy_generation_agrees_with_scores() {
    let dir = tempfile::tempdir().unwrap();
    let out = succeeds(&[
        "generate",
        "--model",
        &model(),
        "--prompt",
        "The tide",
        "--greedy",
        "--max-tokens",
        "5",
        "--json",
    ]);
    let reply: Value = serde_json::from_str(&out).unwrap();
    let out = succeeds(&[
        "generate",
        "--model",
        &model(),
        "--prompt",
        "The tide",
        "--greedy",
        "--max-tokens",
        "5",
        "--json",
    ]);
    assert_eq!(reply, serde_json::from_str::<Value>(&out).unwrap());
    assert_eq!(
        reply["ids"].as_array().unwrap().len(),
        reply["logprobs"].as_array().unwrap().len()
    );
    let ids = dir.path().join("ids.jsonl");
    std::fs::write(&ids, json!({ "input_ids": reply["ids"] }).to_string()).unwrap();
    succeeds(&["score", "--model", &model(), "--ids", ids.to_str().unwrap()]);
}

#[test]
fn encode_masks_what_carries_no_loss() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    std::fs::write(&rows, json!({ "messages": [{ "role": "user", "content": "Hello" }, { "role": "assistant", "content": "Mind the tide." }] }).to_string()).unwrap();
    let encode = |stage: &str| -> Value {
        let out = succeeds(&[
            "corpus",
            "encode",
            "--stage",
            stage,
            "--tokenizer",
            &model(),
            rows.to_str().unwrap(),
        ]);
        serde_json::from_str(out.trim()).unwrap()
    };
    let (sft, cpt) = (encode("sft"), encode("cpt"));
    let masked = |row: &Value| {
        row["labels"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|label| **label == json!(-100))
            .count()
    };
    assert_eq!(
        sft["labels"].as_array().unwrap().len(),
        sft["input_ids"].as_array().unwrap().len()
    );
    assert!(masked(&sft) > 5);
    assert_eq!(
        masked(&cpt),
        1,
        "in pre-training only the first token has nothing before it"
    );
}

/// Losses of the training lines of a run, with everything that must repeat.
fn losses(out: &Path) -> Vec<(Value, Value, Value)> {
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .filter(|line| line.get("grad_norm").is_some() || line.get("split").is_some())
        .map(|line| {
            (
                line["step"].clone(),
                line["loss"].clone(),
                line["grad_norm"].clone(),
            )
        })
        .collect()
}

#[test]
fn killed_run_continues_with_the_same_losses() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = write_recipe(
        dir.path(),
        "[run]\nsteps = 14\nsave_every = 3\nvalidate_every = 5\n",
    );
    let (whole, broken) = (dir.path().join("whole"), dir.path().join("broken"));
    succeeds(&[
        "train",
        recipe.to_str().unwrap(),
        "--out",
        whole.to_str().unwrap(),
    ]);

    // Killed as soon as a checkpoint lies there and the run has gone on beyond it.
    let mut child = Command::new(env!("CARGO_BIN_EXE_cyrene"))
        .args([
            "train",
            recipe.to_str().unwrap(),
            "--out",
            broken.to_str().unwrap(),
        ])
        .stderr(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    for _ in 0..6000 {
        let far = broken.join("checkpoints/step-3").exists()
            || broken.join("checkpoints/step-6").exists();
        if far || child.try_wait().unwrap().is_some() {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    // SIGKILL on Unix, TerminateProcess on Windows.
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(
        !broken.join("model").exists(),
        "the run was to be killed before its end"
    );

    let output = cyrene(&[
        "train",
        recipe.to_str().unwrap(),
        "--out",
        broken.to_str().unwrap(),
    ]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(
        stderr(&output).contains("going on from step"),
        "{}",
        stderr(&output)
    );
    assert_eq!(losses(&whole), losses(&broken));
    let weights = |run: &Path| std::fs::read(run.join("model/model.safetensors")).unwrap();
    assert!(
        weights(&whole) == weights(&broken),
        "the same weights, bit for bit"
    );

    // Another recipe in the same folder is refused.
    fails(
        &[
            "train",
            recipe.to_str().unwrap(),
            "--out",
            broken.to_str().unwrap(),
            "--set",
            "optimizer.lr=5e-4",
        ],
        1,
        &["optimizer.lr", "--force"],
    );
}

#[test]
fn lora_run_merges_and_exports() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = write_recipe(
        dir.path(),
        "[tuner]\nkind = \"lora\"\nrank = 4\nalpha = 8\n[run]\nsteps = 4\n",
    );
    let run = dir.path().join("run");
    succeeds(&[
        "train",
        recipe.to_str().unwrap(),
        "--out",
        run.to_str().unwrap(),
    ]);
    let adapter = run.join("adapter");
    assert!(
        adapter.join("adapter_config.json").exists()
            && adapter.join("adapter_model.safetensors").exists()
    );

    let (merged, fp8) = (dir.path().join("merged"), dir.path().join("fp8"));
    succeeds(&[
        "merge",
        "--base",
        &model(),
        "--adapter",
        adapter.to_str().unwrap(),
        "--out",
        merged.to_str().unwrap(),
    ]);
    fails(
        &[
            "merge",
            "--base",
            &model(),
            "--adapter",
            adapter.to_str().unwrap(),
            "--out",
            merged.to_str().unwrap(),
        ],
        2,
        &["exists"],
    );
    succeeds(&[
        "export",
        "--model",
        merged.to_str().unwrap(),
        "--format",
        "fp8-block",
        "--out",
        fp8.to_str().unwrap(),
    ]);

    // Adapter, merged weights and FP8 weights say nearly the same.
    let ids = dir.path().join("ids.jsonl");
    std::fs::write(
        &ids,
        json!({ "input_ids": (100..140).collect::<Vec<u32>>() }).to_string(),
    )
    .unwrap();
    let score = |args: &[&str]| -> Vec<f64> {
        let mut all = vec!["score", "--ids", ids.to_str().unwrap()];
        all.extend(args);
        let row: Value = serde_json::from_str(succeeds(&all).trim()).unwrap();
        row["logprobs"]
            .as_array()
            .unwrap()
            .iter()
            .map(|x| x.as_f64().unwrap())
            .collect()
    };
    let with_adapter = score(&["--model", &model(), "--adapter", adapter.to_str().unwrap()]);
    let with_merged = score(&["--model", merged.to_str().unwrap()]);
    let with_fp8 = score(&["--model", fp8.to_str().unwrap()]);
    let farthest = |a: &[f64], b: &[f64]| {
        a.iter()
            .zip(b)
            .map(|(x, y)| (x - y).abs())
            .fold(0.0, f64::max)
    };
    assert!(farthest(&with_adapter, &with_merged) < 1e-3);
    assert!(farthest(&with_merged, &with_fp8) < 0.2);
    assert!(
        farthest(&with_merged, &score(&["--model", &model()])) > 1e-6,
        "training changed something"
    );
}

#[test]
fn numbers_out_of_range_are_told_with_key_and_range() {
    let dir = tempfile::tempdir().unwrap();
    let model = model();
    let serve = |flag: &str, value: &str, words: &[&str]| {
        fails(&["serve", "--model", &model, flag, value], 2, words);
    };
    serve("--context", "0", &["--context", "from 2 to 16777216"]);
    serve(
        "--context",
        "16777216",
        &["--context is 16777216", "2 to 4096"],
    );
    serve(
        "--max-sequences",
        "0",
        &["--max-sequences", "from 1 to 1024"],
    );
    serve("--max-sequences", "1099511627776", &["from 1 to 1024"]);
    let ids = dir.path().join("ids.jsonl");
    std::fs::write(&ids, json!({ "input_ids": vec![5; 4097] }).to_string()).unwrap();
    fails(
        &["score", "--model", &model, "--ids", ids.to_str().unwrap()],
        2,
        &["document 1 has 4097 ids", "1 to 4096"],
    );
    let recipe = write_recipe(dir.path(), "");
    let out = dir.path().join("out");
    for (change, words) in [
        (
            "run.steps=1099511627776",
            ["`run.steps` is 1099511627776", "from 1 to 10000000"],
        ),
        (
            "run.save_every_minutes=1e-320",
            ["`run.save_every_minutes`", "from 0.01 to 1000000"],
        ),
        (
            "data.validation_share=1.5",
            ["`data.validation_share` is 1.5", "from 0 to 1"],
        ),
        (
            "data.sources=[{path=\"rows.jsonl\",weight=1e6}]",
            ["`data.sources.weight` is 1000000", "from 0 to 1000"],
        ),
        (
            "tuner={kind=\"lora\",rank=1099511627776}",
            ["`tuner.rank` is 1099511627776", "from 1 to 65536"],
        ),
    ] {
        let recipe = recipe.to_str().unwrap();
        let args = [
            "train",
            recipe,
            "--out",
            out.to_str().unwrap(),
            "--set",
            change,
        ];
        fails(&args, 2, &words);
        assert!(!out.exists(), "{change}");
    }
}

/// What a row says never acts on the terminal: neither its text nor its names, nor what an error quotes of it.
#[test]
fn control_and_bidi_characters_of_rows_do_not_reach_the_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = model();
    let said = "a\u{1b}[2J\u{9b}1m\u{202e}\u{2066}b";
    let rows = dir.path().join("rows.jsonl");
    let is_harmful = |c: char| {
        let turns = matches!(c, '\u{202e}' | '\u{2066}');
        turns || (c.is_control() && c != '\n')
    };
    let peek = |more: &[&str]| {
        let mut args = vec!["corpus", "peek", rows.to_str().unwrap(), "--stage", "cpt"];
        args.extend(["--tokenizer", tokenizer.as_str()]);
        args.extend(more);
        cyrene(&args)
    };
    std::fs::write(&rows, json!({ "text": said }).to_string()).unwrap();
    for more in [&[][..], &["--json"][..]] {
        let output = peek(more);
        assert!(output.status.success(), "{}", stderr(&output));
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(!text.contains(is_harmful), "{more:?}: {text:?}");
        assert!(text.contains("202e"), "{more:?}: {text:?}");
    }
    let spans = String::from_utf8(peek(&["--json"]).stdout).unwrap();
    let spans: Value = serde_json::from_str(spans.trim()).unwrap();
    let texts = spans["spans"].as_array().unwrap().iter();
    let text: String = texts.map(|span| span["text"].as_str().unwrap()).collect();
    assert!(text.starts_with(said), "{text:?}");
    // A key that nobody knows is quoted.
    std::fs::write(
        &rows,
        json!({ "text": "a", "tools": said, (said): 1 }).to_string(),
    )
    .unwrap();
    let output = peek(&[]);
    let text = stderr(&output);
    assert!(!text.contains(is_harmful), "{text:?}");
}

#[test]
fn live_prints_cached_when_nothing_changed() {
    let runs = demo().parent().unwrap().to_str().unwrap();
    let output = cyrene(&["live", "--demo", "--until", "corpus", "--runs", runs]);
    assert!(output.status.success());
    let text = stderr(&output);
    assert!(
        text.contains("fetch: cached") && text.contains("corpus: cached"),
        "{text}"
    );
}

/// Arguments of a split of the demo's story into `out`.
fn split_demo<'a>(out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    const STORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../demo/story.jsonl");
    const CHARACTER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../characters/ovelle.toml");
    let args = [
        "corpus",
        "split",
        "--root",
        STORY,
        "--character",
        CHARACTER,
        "--out",
        out,
    ];
    [&args[..], more].concat()
}

#[test]
fn split_says_where_every_scene_and_token_is_and_replaces_nothing_unasked() {
    let dir = tempfile::tempdir().unwrap();
    let corpus = demo().join("corpus");
    for file in ["manifest.json", "pt/everything.json", "sft/cyrene.json"] {
        std::fs::create_dir_all(dir.path().join(file).parent().unwrap()).unwrap();
        std::fs::copy(corpus.join(file), dir.path().join(file)).unwrap();
    }
    let out = dir.path().join("split.json");
    let out = out.to_str().unwrap();
    let said: Value = serde_json::from_str(&succeeds(&split_demo(out, &["--json"]))).unwrap();
    let scenes = ["train", "val", "val-strict", "probe-x"].map(|side| said[side].as_u64().unwrap());
    assert!(scenes.iter().all(|&n| n > 0), "{scenes:?}");
    assert_eq!(scenes.iter().sum::<u64>(), 1807);
    assert_eq!(said["report"]["n_components"], 1807);
    assert_eq!(said["report"]["notes"], json!([]));
    let tokens = said["tokens"].as_array().unwrap();
    assert_eq!(tokens.len(), 6, "two data sets, three languages");
    for account in tokens {
        let sum = |map: &Value| -> u64 {
            map.as_object()
                .unwrap()
                .values()
                .map(|n| n.as_u64().unwrap())
                .sum()
        };
        assert_eq!(
            sum(&account["sides"]) + sum(&account["filtered"]),
            account["total"].as_u64().unwrap()
        );
    }
    let text = succeeds(&split_demo(out, &[]));
    for word in [
        "1807 scenes in 1807 groups",
        "probe-x",
        "tokens pt/everything",
        "nobody answers",
    ] {
        assert!(text.contains(word), "no `{word}` in: {text}");
    }
    fails(
        &split_demo(out, &["--seed", "8"]),
        1,
        &["exists already", "seed 7", "--force"],
    );
    succeeds(&split_demo(out, &["--seed", "8", "--force"]));
    fails(&split_demo(out, &["--share", "0.7"]), 2, &["--share 0.7"]);
}

#[test]
fn build_beside_a_doctored_split_fails() {
    let dir = tempfile::tempdir().unwrap();
    let line = |scene: &str| {
        let line =
            json!({ "kind": "narration", "text": { "en": "The tide turned before the bell." } });
        json!({ "campaign": "c", "scene": scene, "lines": [line] }).to_string()
    };
    let story = dir.path().join("story.jsonl");
    std::fs::write(&story, format!("{}\n{}\n", line("a"), line("b"))).unwrap();
    let character = dir.path().join("a.toml");
    std::fs::write(
        &character,
        "languages = [\"en\"]\n[name]\nen = \"A\"\n[story]\nspeaker_ids = [\"a\"]\n",
    )
    .unwrap();
    let split = dir.path().join("split.json");
    let of_story = [
        "--root",
        story.to_str().unwrap(),
        "--character",
        character.to_str().unwrap(),
    ];
    succeeds(
        &[
            &["corpus", "split", "--out", split.to_str().unwrap()],
            &of_story[..],
        ]
        .concat(),
    );
    let model = model();
    let build = [
        "corpus",
        "build",
        "--task",
        "pt/everything",
        "--tokenizer",
        &model,
        "--out",
        dir.path().to_str().unwrap(),
    ];
    let build = [&build[..], &of_story[..]].concat();
    succeeds(&build);
    let mut doctored: Value = serde_json::from_slice(&std::fs::read(&split).unwrap()).unwrap();
    doctored["train"] = json!(["a"]);
    doctored["val"] = json!(["b"]);
    std::fs::write(&split, doctored.to_string()).unwrap();
    fails(
        &build,
        1,
        &[
            "The tide turned before the bell.",
            "b (held out)",
            "a (training)",
            "corpus split --force",
        ],
    );
}

#[test]
fn port_in_use_is_said() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    fails(
        &["serve", "--model", &model(), "--port", &port],
        1,
        &[&port, "in use"],
    );
}

#[test]
fn origin_that_no_browser_sends_is_misuse() {
    fails(
        &[
            "serve",
            "--model",
            &model(),
            "--allow-origin",
            "localhost:3000",
        ],
        2,
        &["localhost:3000", "http://localhost:3000"],
    );
}

#[test]
fn server_for_other_machines_asks_for_keys_or_is_told_not_to() {
    let words = ["0.0.0.0", "--api-key-file", "--insecure"];
    let host = ["--host", "0.0.0.0"];
    fails(
        &[&["serve", "--model", &model()][..], &host].concat(),
        2,
        &words,
    );
    // The end of `live` is known at its beginning.
    let dir = tempfile::tempdir().unwrap();
    let runs = dir.path().to_str().unwrap();
    fails(
        &[&["live", "--demo", "--runs", runs][..], &host].concat(),
        2,
        &words,
    );
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn name_that_no_request_is_for_is_misuse() {
    fails(
        &[
            "serve",
            "--model",
            &model(),
            "--allow-host",
            "http://cyrene.lan",
        ],
        2,
        &["--allow-host", "http://cyrene.lan", "without scheme"],
    );
}

#[test]
fn key_file_is_checked_before_the_model_is() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("keys.txt");
    let path = file.to_str().unwrap();
    let args = ["serve", "--model", "nowhere", "--api-key-file", path];
    for text in ["", "# sk-1\n\n"] {
        std::fs::write(&file, text).unwrap();
        fails(&args, 2, &[path, "holds no key"]);
    }
    std::fs::write(&file, "# of the house\nsk-1 \u{e9}\n").unwrap();
    fails(&args, 2, &[&format!("{path}:2")]);
    std::fs::write(&file, "# of the house\nsk-1\n").unwrap();
    fails(&args, 2, &["nowhere"]);
    let both = [&args[..], &["--insecure"]].concat();
    fails(&both, 2, &["--insecure", "--api-key-file"]);
}

#[cfg(unix)]
#[test]
fn key_file_that_others_may_read_is_told() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("keys.txt");
    std::fs::write(&file, "sk-1\n").unwrap();
    let path = file.to_str().unwrap();
    for (mode, is_told) in [(0o644, true), (0o604, true), (0o640, false), (0o600, false)] {
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
        let output = cyrene(&["serve", "--model", "nowhere", "--api-key-file", path]);
        let text = stderr(&output);
        assert_eq!(text.contains("other users"), is_told, "{mode:o}: {text}");
        assert!(!text.contains("sk-1"), "{text}");
    }
}

/// A file-size limit stands in for a full disk: writing fails half-way, and nothing may lie under its final name.
#[cfg(unix)]
#[test]
fn full_disk_leaves_nothing_half_written() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("export");
    let script = format!(
        "trap '' XFSZ; ulimit -f 64; exec '{}' export --model '{}' --format fp8-block --out '{}'",
        env!("CARGO_BIN_EXE_cyrene"),
        model(),
        out.display(),
    );
    let output = Command::new("bash").args(["-c", &script]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("export"), "{}", stderr(&output));
    assert!(!out.join("model.safetensors").exists());
    // With room again the same command goes through.
    succeeds(&[
        "export",
        "--model",
        &model(),
        "--format",
        "fp8-block",
        "--out",
        out.to_str().unwrap(),
        "--force",
    ]);
}

/// Everything below a folder that is a file, by its path, with its bytes.
fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => files.extend(contents(&path)),
            false => drop(files.insert(path.clone(), std::fs::read(&path).unwrap())),
        }
    }
    files
}

#[test]
fn export_that_fails_midway_leaves_the_old_folder_whole() {
    let dir = tempfile::tempdir().unwrap();
    let model = copied_model(dir.path());
    let out = dir.path().join("export");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(
        out.join("mine.txt"),
        "kept until a whole export stands here",
    )
    .unwrap();
    let before = contents(&out);
    // The weights can be written, and what lies beside them cannot be read.
    std::fs::write(model.join("persona.json"), "{ half").unwrap();
    for format in ["hf", "fp8-block", "fp8-hf"] {
        let args = [
            "export",
            "--model",
            model.to_str().unwrap(),
            "--format",
            format,
            "--out",
            out.to_str().unwrap(),
            "--force",
        ];
        fails(&args, 1, &["persona.json"]);
        assert_eq!(contents(&out), before, "{format}");
    }
    std::fs::remove_file(model.join("persona.json")).unwrap();
    let mut beside: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
    assert_eq!(beside.len(), 2, "{beside:?}");
    succeeds(&[
        "export",
        "--model",
        model.to_str().unwrap(),
        "--format",
        "fp8-block",
        "--out",
        out.to_str().unwrap(),
        "--force",
    ]);
    let after = contents(&out);
    assert!(after.contains_key(&out.join("model.safetensors")));
    assert!(after.contains_key(&out.join("tokenizer.json")));
    assert!(!after.contains_key(&out.join("mine.txt")));
    beside = std::fs::read_dir(dir.path()).unwrap().collect();
    assert_eq!(beside.len(), 2, "{beside:?}");
}

#[test]
fn export_onto_its_own_model_reads_it_to_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let model = copied_model(dir.path());
    let folder = model.to_str().unwrap();
    succeeds(&[
        "export", "--model", folder, "--format", "hf", "--out", folder, "--force",
    ]);
    succeeds(&[
        "generate",
        "--model",
        folder,
        "--prompt",
        "a",
        "--max-tokens",
        "1",
    ]);
}

#[test]
fn doctor_predicts_memory_and_time() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = write_recipe(dir.path(), "[run]\nsteps = 10\n");
    let report: Value =
        serde_json::from_str(&succeeds(&["doctor", recipe.to_str().unwrap(), "--json"])).unwrap();
    assert_eq!(report["device"], "cpu");
    assert!(report["memory_bytes"].as_u64().unwrap() > 1 << 30);
    let stage = &report["stages"][0];
    assert!(
        stage["fits"].as_bool().unwrap()
            && stage["tokens"].as_u64().unwrap() > 0
            && stage["eta_s"].as_f64().unwrap() > 0.0
    );
    // Four copies of the weights (weight, gradient, two moments) at the least.
    assert!(stage["peak_bytes"].as_u64().unwrap() > 16 * 2_000_000);
}

#[test]
fn doctor_holds_moments_against_the_hosts_memory() {
    let plan = |host: &str| -> Value {
        let args = ["doctor", "--size", "4b", "--memory", "30", "--json"];
        let report = succeeds(&[&args[..], &["--device", "cpu", "--host-memory", host]].concat());
        serde_json::from_str::<Value>(&report).unwrap()["stages"][0].take()
    };
    let ample = plan("64");
    assert_eq!(ample["fits"], true);
    let moments = ample["choices"]["offloaded_bytes"].as_u64().unwrap();
    assert!(moments > 8 << 30 && moments <= ample["host_available_bytes"].as_u64().unwrap());
    let small = plan("8");
    assert_eq!(small["fits"], false);
    let remedy = small["remedy"].as_str().unwrap();
    assert!(remedy.contains(" GiB of host memory for the optimizer's moments"));
    fails(
        &["doctor", "--size", "4b", "--host-memory", "0"],
        2,
        &["--host-memory is 0"],
    );
}

#[test]
fn rounding_to_nearest_loses_what_stochastic_rounding_keeps() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = write_recipe(dir.path(), "schedule = \"constant\"\nwarmup_steps = 0\n");
    let bench = |more: &[&str]| {
        let args = [
            "bench",
            "rounding",
            recipe.to_str().unwrap(),
            "--device",
            "cpu",
        ];
        [&args[..], more]
            .concat()
            .into_iter()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let args = bench(&["--steps", "12", "--set", "optimizer.lr=3e-5", "--json"]);
    let report = succeeds(&args.iter().map(String::as_str).collect::<Vec<_>>());
    let report: Value = serde_json::from_str(&report).unwrap();
    let case = |at: usize, key: &str| report["cases"][at][key].clone();
    let number = |value: &Value| value.as_f64().unwrap();
    let names: Vec<_> = (0..3)
        .map(|at| [case(at, "weights"), case(at, "rounding")])
        .collect();
    assert_eq!(
        names,
        [
            [json!("f32"), Value::Null],
            [json!("bf16"), json!("stochastic")],
            [json!("bf16"), json!("nearest")]
        ]
    );
    // A fifth of the weights is small enough for a nearest step; by chance as many move as in f32, and more.
    let [f32, stochastic, nearest] = [0, 1, 2].map(|at| number(&case(at, "moved")));
    assert!(
        nearest < 0.8 * f32 && stochastic > nearest,
        "{f32} {stochastic} {nearest}"
    );
    let gained = |at: usize| {
        number(&report["before"]["nats_per_token"])
            - number(&case(at, "held_out")["nats_per_token"])
    };
    assert!(gained(0) > 0.0);
    assert!(
        (gained(1) / gained(0) - 1.0).abs() < 0.1,
        "{} of {}",
        gained(1),
        gained(0)
    );
    assert!(
        gained(2) < 0.9 * gained(0),
        "{} of {}",
        gained(2),
        gained(0)
    );
    let apart = &report["stochastic_over_nearest"];
    assert!(number(&apart["nats_per_token"]) < 0.0 && number(&apart["high"]) < 0.0);

    let large = bench(&["--set", "data.row_tokens=100000000"]);
    fails(
        &large.iter().map(String::as_str).collect::<Vec<_>>(),
        2,
        &["f32 weights", "of memory"],
    );
    let lora = bench(&["--set", "tuner.kind=lora"]);
    fails(
        &lora.iter().map(String::as_str).collect::<Vec<_>>(),
        2,
        &["tuner.kind"],
    );
}

#[test]
fn doctor_plans_for_each_of_several_gpus() {
    let plan = |n_ranks: &str| -> Value {
        let output = Command::new(env!("CARGO_BIN_EXE_cyrene"))
            .args(["doctor", "--size", "4b", "--device", "cpu"])
            .args(["--memory", "140", "--json"])
            .env("WORLD_SIZE", n_ranks)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        report["stages"][0].clone()
    };
    let (alone, of_eight) = (plan("1"), plan("8"));
    let bytes = |plan: &Value, part: &str| plan["bytes"][part].as_f64().unwrap();
    assert_eq!(of_eight["choices"]["ranks"], 8);
    assert_eq!(bytes(&of_eight, "weights"), bytes(&alone, "weights"));
    // The embedding is the largest tensor, 15 % of all.
    let share = bytes(&of_eight, "moments") / bytes(&alone, "moments");
    assert!((0.125..0.2).contains(&share), "{share}");
    assert_eq!(bytes(&alone, "nccl"), 0.0);
    assert!(bytes(&of_eight, "nccl") > 0.0);
}

/// `cyrene train` as one of several processes, as a launcher starts it.
fn rank(recipe: &Path, out: &Path, rank: usize, n_ranks: usize, port: u16) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cyrene"));
    command
        .args(["train", recipe.to_str().unwrap(), "--device", "cpu"])
        .args(["--out", out.to_str().unwrap()])
        .env("RANK", rank.to_string())
        .env("WORLD_SIZE", n_ranks.to_string())
        .env("LOCAL_RANK", rank.to_string())
        .env("MASTER_ADDR", "127.0.0.1")
        .env("MASTER_PORT", port.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn assert_close_losses(got: &Path, expect: &Path) {
    let (got, expect) = (losses(got), losses(expect));
    assert_eq!(got.len(), expect.len());
    for (got, expect) in got.iter().zip(&expect) {
        assert_eq!(got.0, expect.0);
        let (got, expect) = (got.1.as_f64().unwrap(), expect.1.as_f64().unwrap());
        assert!((got - expect).abs() <= 1e-5 * expect, "{got} for {expect}");
    }
}

#[test]
fn processes_of_a_launcher_train_as_one_and_go_on_after_one_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = write_recipe(
        dir.path(),
        "[run]\nsteps = 14\nsave_every = 3\nvalidate_every = 5\n",
    );
    let (alone, together) = (dir.path().join("alone"), dir.path().join("together"));
    let (recipe_name, alone_name) = (recipe.to_str().unwrap(), alone.to_str().unwrap());
    succeeds(&["train", recipe_name, "--device", "cpu", "--out", alone_name]);

    // 1. two ranks, of which the second is killed once a checkpoint lies there
    let port = free_port();
    let first = rank(&recipe, &together, 0, 2, port).spawn().unwrap();
    let mut second = rank(&recipe, &together, 1, 2, port).spawn().unwrap();
    for _ in 0..6000 {
        let far = together.join("checkpoints/step-3").exists();
        if far || second.try_wait().unwrap().is_some() {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    second.kill().unwrap();
    second.wait().unwrap();
    let first = first.wait_with_output().unwrap();
    let text = stderr(&first);
    assert_eq!(first.status.code(), Some(1), "{text}");
    assert!(
        text.contains("rank 1 failed, and with it the run: it ended without a word"),
        "{text}"
    );
    assert!(
        text.contains("2 ranks over TCP") && text.contains("2 ranks share the 2 micro-batches"),
        "{text}"
    );

    // 2. the same command goes on; rank 0 alone speaks
    let port = free_port();
    let ranks = [0, 1].map(|at| rank(&recipe, &together, at, 2, port).spawn().unwrap());
    let [first, second] = ranks.map(|rank| rank.wait_with_output().unwrap());
    assert!(first.status.success(), "{}", stderr(&first));
    assert!(second.status.success(), "{}", stderr(&second));
    assert!(
        stderr(&first).contains("going on from step"),
        "{}",
        stderr(&first)
    );
    assert!(String::from_utf8_lossy(&first.stdout).contains("14 steps"));
    assert!(
        second.stdout.is_empty() && second.stderr.is_empty(),
        "{}",
        stderr(&second)
    );
    assert_close_losses(&together, &alone);
    let listing = |run: &Path| {
        let mut names: Vec<_> = std::fs::read_dir(run)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .filter(|name| !name.to_string_lossy().starts_with("events"))
            .collect();
        names.sort();
        names
    };
    assert_eq!(listing(&together), listing(&alone));
}

#[test]
fn processes_with_room_for_different_rows_train_as_one() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = write_recipe(dir.path(), "[run]\nsteps = 4\n");
    let (alone, together) = (dir.path().join("alone"), dir.path().join("together"));
    let (recipe_name, alone_name) = (recipe.to_str().unwrap(), alone.to_str().unwrap());
    let args = ["train", recipe_name, "--device", "cpu", "--out", alone_name];
    succeeds(&[&args[..], &["--set", "batch.rows=3"]].concat());

    let port = free_port();
    let ranks = [(0, "3"), (1, "2")].map(|(at, rows)| {
        rank(&recipe, &together, at, 2, port)
            .args(["--set", "batch.rows=3", "--rows-at-once", rows])
            .spawn()
            .unwrap()
    });
    let [first, second] = ranks.map(|rank| rank.wait_with_output().unwrap());
    assert!(first.status.success(), "{}", stderr(&first));
    assert!(second.status.success(), "{}", stderr(&second));
    // Six rows a step, two at a time.
    let text = stderr(&first);
    assert!(
        text.contains("share the 3 micro-batches of a step, 2 at most each"),
        "{text}"
    );
    assert_close_losses(&together, &alone);
}

#[test]
fn a_rank_that_was_not_started_is_named_and_a_lonely_one_runs() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = write_recipe(dir.path(), "[run]\nsteps = 2\n");
    let out = dir.path().join("out");
    let mut waiting = rank(&recipe, &out, 0, 2, free_port());
    let output = waiting.args(["--wait-for-ranks", "1"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = stderr(&output);
    assert!(
        text.contains("rank 1 of 2 did not come within 1 s"),
        "{text}"
    );
    assert!(!out.join("checkpoints").exists());

    let output = rank(&recipe, &out, 0, 1, free_port()).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));

    let mut half = rank(&recipe, &out, 0, 2, free_port());
    let output = half.env_remove("RANK").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(
        stderr(&output).contains("RANK is not"),
        "{}",
        stderr(&output)
    );
}
