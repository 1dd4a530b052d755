//! A run's folder: one process at a time, and a recipe in it that can be run again.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{cyrene, demo, stderr, succeeds};
use serde_json::{Value, json};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A recipe in `dir/recipes` on the demo's base, with rows in `dir/data`.
fn recipe(dir: &Path) -> PathBuf {
    let [recipes, data] = ["recipes", "data"].map(|name| {
        let folder = dir.join(name);
        std::fs::create_dir(&folder).unwrap();
        folder
    });
    let rows: String = (0..40)
        .map(|i| json!({ "text": format!("Page {i} of the tide book. The water came to the {i}th step and went.") }).to_string() + "\n")
        .collect();
    std::fs::write(data.join("rows.jsonl"), rows).unwrap();
    std::fs::write(recipes.join("bo.toml"), "[name]\nen = \"Bo\"\n").unwrap();
    let toml = format!(
        "stage = \"cpt\"\nbase = {:?}\ncharacter = \"bo.toml\"\n[data]\nrow_tokens = 48\nsources = [{{ path = \"../data/rows.jsonl\" }}]\n\
         [batch]\nrows = 1\naccumulate = 1\n[run]\nsteps = 3\nvalidate_every = 0\n",
        demo().join("fetch/model")
    );
    let recipe = recipes.join("short.toml");
    std::fs::write(&recipe, toml).unwrap();
    recipe
}

#[test]
fn second_start_in_a_run_folder_is_told_who_has_it_and_a_killed_one_frees_it() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path());
    let run = dir.path().join("run");
    let mut first = Command::new(env!("CARGO_BIN_EXE_cyrene"))
        .args(["train", text(&recipe), "--out", text(&run)])
        .args(["--set", "run.steps=1000000"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while !run.join("run.lock.json").exists() {
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(first.try_wait().unwrap(), None);
    }
    let again = || cyrene(&["train", text(&recipe), "--out", text(&run)]);
    let output = again();
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{said}");
    let process = format!("in use by process {} on ", first.id());
    assert!(said.contains(&process), "{said}");
    let (_, since) = said.split_once(", which started ").unwrap();
    let (seconds, _) = since.split_once(" s ago").unwrap();
    assert!(seconds.parse::<u32>().is_ok(), "{said}");

    first.kill().unwrap();
    first.wait().unwrap();
    let output = again();
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn recipe_saved_in_a_run_runs_from_there_with_the_same_losses() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path());
    let [run, again] = ["runs/first", "again"].map(|name| dir.path().join(name));
    succeeds(&["train", text(&recipe), "--out", text(&run)]);
    let saved = run.join("recipe.toml");
    succeeds(&["train", text(&saved), "--out", text(&again)]);
    let losses = |run: &Path| -> Vec<Value> {
        let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
        let lines = metrics
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.map(|line| line["loss"].clone()).collect()
    };
    assert_eq!(losses(&run), losses(&again));
    let persona = |run: &Path| std::fs::read(run.join("model/persona.json")).unwrap();
    assert_eq!(persona(&run), persona(&again));
}
