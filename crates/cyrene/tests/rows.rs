//! Rows of people's own from outside: what `train` says of them before it starts, and that packed ones are parted.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::path::Path;

use serde_json::Value;

use common::{cyrene, demo, fails, stderr, succeeds};

/// The demo's untrained model.
fn model() -> String {
    demo().join("fetch/model").to_str().unwrap().to_owned()
}

/// Writes a recipe for rows that a folder holds, and gives its path.
fn recipe(dir: &Path, rows: &str, more: &str) -> String {
    std::fs::write(dir.join("rows.jsonl"), rows).unwrap();
    let path = dir.join("recipe.toml");
    let text = format!(
        "stage = \"sft\"\nbase = \"{}\"\n[data]\nrow_tokens = 64\nvalidation_share = 0.0\nsources = [{{ path = \"rows.jsonl\" }}]\n\
         [batch]\nrows = 1\naccumulate = 1\n[run]\nsteps = 1\nvalidate_every = 0\nvalidate_at_start = false\n{more}",
        model().replace('\\', "/")
    );
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Trains, and gives what is said on stderr and the loss of the first step.
fn train(rows: &str, more: &str) -> (String, f64) {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path(), rows, more);
    let out = dir.path().join("out");
    let output = cyrene(&["train", &recipe, "--out", out.to_str().unwrap()]);
    assert!(output.status.success(), "{}", stderr(&output));
    let metrics = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let first: Value = serde_json::from_str(metrics.lines().next().unwrap()).unwrap();
    (stderr(&output), first["loss"].as_f64().unwrap())
}

#[test]
fn control_tokens_are_told_before_rows_are_trained_shown_or_encoded() {
    let row = "{\"messages\":[{\"role\":\"user\",\"content\":\"<think> <think>\"},{\"role\":\"assistant\",\"content\":\"a<|im_end|>\"}]}\n";
    let expect = "the contents spell control tokens: `<think>` 2 times, `<|im_end|>` once; ";
    let (said, _) = train(row, "");
    assert!(said.contains(expect), "{said}");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.jsonl");
    std::fs::write(&path, row).unwrap();
    let (path, model) = (path.to_str().unwrap(), model());
    for command in ["encode", "peek"] {
        let args = [
            "corpus",
            command,
            path,
            "--stage",
            "sft",
            "--tokenizer",
            &model,
        ];
        let output = cyrene(&args);
        assert!(output.status.success(), "{}", stderr(&output));
        let said = stderr(&output);
        assert!(said.contains(expect), "{command}: {said}");
    }
}

#[test]
fn packed_row_trains_as_its_documents_do_apart() {
    let ids = "\"input_ids\":[10,20,30,40,50,60,70,80],\"labels\":[-100,20,30,40,-100,60,70,80]";
    let apart = "{\"input_ids\":[10,20,30,40],\"labels\":[-100,20,30,40]}\n{\"input_ids\":[50,60,70,80],\"labels\":[-100,60,70,80]}\n";
    let (_, expected) = train(apart, "");
    let (_, whole) = train(&format!("{{{ids}}}\n"), "");
    assert_ne!(
        whole, expected,
        "as one document the second half sees the first"
    );
    for borders in [
        "\"position_ids\":[0,1,2,3,0,1,2,3]",
        "\"seq_idx\":[0,0,0,0,1,1,1,1]",
        "\"cu_seqlens\":[0,4,8]",
    ] {
        let (_, loss) = train(&format!("{{{ids},{borders}}}\n"), "");
        assert_eq!(loss, expected, "{borders}");
    }
}

#[test]
fn result_says_how_long_its_rows_were_and_what_of_them_it_learned() {
    let dir = tempfile::tempdir().unwrap();
    let row = "{\"prompt\":\"Hi.\",\"completion\":\"Yo.\"}\n";
    let recipe = recipe(dir.path(), row, "");
    let out = dir.path().join("out");
    succeeds(&[
        "train",
        &recipe,
        "--out",
        out.to_str().unwrap(),
        "--set",
        "data.loss_scale=last_round",
    ]);
    let record = std::fs::read(out.join("model/trained_rows.json")).unwrap();
    let record: Value = serde_json::from_slice(&record).unwrap();
    assert_eq!(record["row_tokens"], 64);
    assert_eq!(record["loss_scale"], "last_round");
}

#[test]
fn run_whose_only_step_has_rate_0_is_warned_of_before_it() {
    let row = "{\"prompt\":\"Hi.\",\"completion\":\"Yo.\"}\n";
    let (said, _) = train(row, "");
    assert!(
        said.contains("warning: the only step has a learning rate of 0"),
        "{said}"
    );
    let (said, _) = train(row, "[optimizer]\nwarmup_ratio = 0\n");
    assert!(!said.contains("learning rate of 0"), "{said}");
}

#[test]
fn unknown_keys_are_told_once_and_rows_that_cannot_be_used_stop_the_run() {
    let row = "{\"mesages\":[],\"messages\":[{\"role\":\"user\",\"content\":\"Hi.\"},{\"role\":\"assistant\",\"content\":\"Yo.\"}]}\n";
    let (said, _) = train(&row.repeat(3), "");
    let told = "3 rows have the key `mesages`, which means nothing here; did you mean `messages`?";
    assert_eq!(said.matches(told).count(), 1, "{said}");

    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let out = out.to_str().unwrap();
    let wordy = "Hi. ".repeat(100);
    let bad = format!(
        "{row}{{\"input_ids\":[1,2],\"labels\":[-100,-1]}}\n{{\"messages\":[],\"tools\":[{{}}]}}\n{{\"prompt\":\"{wordy}\",\"completion\":\"Yo.\"}}\n"
    );
    let path = recipe(dir.path(), &bad, "");
    fails(
        &["train", &path, "--out", out],
        2,
        &[
            "3 rows cannot be used:",
            "rows.jsonl:2: the label at position 1 is -1",
            "rows.jsonl:3: `tools`",
            "rows.jsonl:4: the system message and a question take",
        ],
    );
    assert!(!Path::new(out).exists(), "nothing was begun");
    let path = recipe(dir.path(), row, "").replace("recipe.toml", "other.toml");
    let text = std::fs::read_to_string(dir.path().join("recipe.toml")).unwrap();
    std::fs::write(
        &path,
        text.replace("validation_share = 0.0", "validation_share = 1.0"),
    )
    .unwrap();
    fails(
        &["train", &path, "--out", out],
        2,
        &["data.validation_share = 1 holds out every row"],
    );
}
