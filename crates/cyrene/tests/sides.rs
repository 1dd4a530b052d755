//! The real story of `../shared/story`, cut to two campaigns and two languages, from its scenes to a report with every held-out side.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// With these two campaigns all sides are there: 25 missions, 235 scenes.
const CAMPAIGNS: [&str; 2] = ["dm", "tutorial"];
const LANGUAGES: [&str; 2] = ["chs", "en"];

/// The pack beside the checkout; None, with a note, where it is absent and not required.
fn shared() -> Option<PathBuf> {
    let shared = std::env::var_os("CYRENE_SHARED").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"),
        PathBuf::from,
    );
    if shared.join("story").is_dir() {
        return Some(shared);
    }
    assert!(
        std::env::var_os("CYRENE_REQUIRE_SHARED").is_none_or(|value| value != "1"),
        "{} is required",
        shared.display()
    );
    eprintln!("skipped: no ../shared");
    None
}

/// Of every scene, so that there are many and they are short.
const N_LINES: usize = 3;

/// Writes the beginnings of the campaigns' scenes in two languages.
fn cut_story(from: &Path, to: &Path) {
    let file = std::fs::File::open(from).unwrap();
    let lines = std::io::BufReader::new(flate2::read::GzDecoder::new(file)).lines();
    let mut cut = String::new();
    for line in lines {
        let mut scene: Value = serde_json::from_str(&line.unwrap()).unwrap();
        if !CAMPAIGNS.contains(&scene["campaign"].as_str().unwrap()) {
            continue;
        }
        let lines = scene["lines"].as_array_mut().unwrap();
        lines.truncate(N_LINES);
        for line in lines {
            let texts = line["text"].as_object_mut().unwrap();
            texts.retain(|language, _| LANGUAGES.contains(&language.as_str()));
        }
        cut.push_str(&scene.to_string());
        cut.push('\n');
    }
    std::fs::write(to, cut).unwrap();
}

/// Delfador, in the two languages.
fn character(to: &Path) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../characters/delfador.toml");
    let text = std::fs::read_to_string(path).unwrap();
    let lines = text.lines().map(|line| match line.split_once(" = ") {
        Some(("languages", _)) => format!("languages = {LANGUAGES:?}"),
        _ => line.to_owned(),
    });
    std::fs::write(to, lines.collect::<Vec<_>>().join("\n")).unwrap();
}

fn succeeds(args: &[&str]) -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_cyrene"))
        .args(args)
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {stderr}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn sum(map: &Value) -> u64 {
    let values = map.as_object().unwrap().values();
    values.map(|n| n.as_u64().unwrap()).sum()
}

/// Trains both stages for two steps, below `dir`: the run's folder, and what `live` says of it.
fn trained(story: &Path, dir: &Path) -> (PathBuf, Value) {
    let at = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    cut_story(story, Path::new(&at("story.jsonl")));
    character(Path::new(&at("d.toml")));
    let live = succeeds(&[
        "live",
        "--story",
        &at("story.jsonl"),
        "--character",
        &at("d.toml"),
        "--size",
        "tiny",
        "--until",
        "sft",
        "--runs",
        &at("runs"),
        "--set",
        "cpt.run.steps=2",
        "--set",
        "cpt.run.validate_at_start=false",
        "--set",
        "sft.run.steps=2",
        "--set",
        "sft.run.validate_at_start=false",
        "--json",
    ]);
    (PathBuf::from(at("runs/d")), live)
}

/// A stage of the report has every side of one kind of rows, with all their rows as `corpus stats` counts them.
fn check_stage(stage: &Value, task: &str, stats: &Value) {
    let datasets = stats["datasets"].as_array().unwrap().iter();
    let dataset = datasets.clone().find(|dataset| dataset["task"] == task);
    let files = dataset.unwrap()["files"].as_array().unwrap();
    let n_rows = |language: &str, side: &str| -> u64 {
        let files = files.iter();
        let files = files.filter(|file| language == "all" || file["key"] == language);
        let sides = files.flat_map(|file| file["sides"].as_array().unwrap());
        let tallies = sides.filter(|pair| pair[0] == side);
        tallies.map(|pair| pair[1]["rows"].as_u64().unwrap()).sum()
    };
    let lines = stage["sides"].as_array().unwrap();
    let languages: Vec<_> = lines.iter().map(|line| &line["language"]).collect();
    assert_eq!(languages, ["all", "chs", "en"]);
    for line in lines {
        let language = line["language"].as_str().unwrap();
        for (key, side) in [
            ("val", "val"),
            ("val_strict", "val-strict"),
            ("probe_x", "probe-x"),
        ] {
            assert_eq!(line[key]["rows"], n_rows(language, side), "{task} {line}");
            assert!(line[key]["bits_per_byte"].as_f64().unwrap() > 0.0);
        }
    }
    // The train probe is of rows that the few steps saw.
    assert_eq!(stage["probe_not_recorded"], Value::Array(Vec::new()));
    let all = &stage["gaps"][0];
    let rows = |side: &str| all[side]["rows"].as_u64().unwrap();
    let (probe, held_out) = (rows("train_probe"), rows("held_out"));
    // Two rows hold less than what is held out; the train side is more.
    assert!(
        (1..held_out).contains(&probe),
        "{task}: {probe} of {held_out}"
    );
}

#[test]
fn real_story_is_trained_and_reported_side_by_side() {
    let Some(shared) = shared() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (run, live) = trained(&shared.join("story/wesnoth_story.jsonl.gz"), dir.path());
    let outcome = |name: &str| {
        let stages = live["stages"].as_array().unwrap().iter();
        let mut found = stages.filter(|stage| stage["stage"] == name);
        &found.next().unwrap()["outcome"]
    };

    // 1. training says where every token is, in its result as in its folder
    for stage in ["cpt", "sft"] {
        let sources = &outcome(stage)["sources"];
        assert_eq!(sources, &read(&run.join(stage).join("account.json")));
        let accounts = sources["tokens"].as_array().unwrap();
        assert_eq!(accounts.len(), 2);
        for account in accounts {
            let parts = sum(&account["sides"]) + sum(&account["filtered"]);
            assert_eq!(account["total"], parts, "{account}");
            for side in ["train", "val", "val-strict", "probe-x"] {
                assert!(account["sides"][side].as_u64().unwrap() > 0, "{account}");
            }
        }
        // 2. each held-out side is measured while training
        let metrics = std::fs::read_to_string(run.join(stage).join("metrics.jsonl")).unwrap();
        for side in ["val", "val-strict", "probe-x"] {
            let line = format!("\"split\":\"{side}\"");
            assert!(metrics.contains(&line), "{stage}: no {side}");
        }
    }

    // 3. the report has every side of both kinds of rows, with all their rows
    let corpus = run.join("corpus");
    let split = corpus.join("split.json");
    let evaluated = succeeds(&[
        "eval",
        "--model",
        run.join("sft/model").to_str().unwrap(),
        "--split",
        split.to_str().unwrap(),
        "--replies",
        "1",
        "--out",
        run.join("sft/eval").to_str().unwrap(),
        "--json",
    ]);
    let report = read(&run.join("sft/eval/report.json"));
    assert_eq!(evaluated["stages"], report["stages"]);
    let stats = succeeds(&[
        "corpus",
        "stats",
        corpus.to_str().unwrap(),
        "--split",
        split.to_str().unwrap(),
        "--json",
    ]);
    let stages = report["stages"].as_array().unwrap().iter();
    for (stage, task) in stages.zip(["pt/everything", "sft/cyrene"]) {
        check_stage(stage, task, &stats);
    }
    let page = std::fs::read_to_string(run.join("sft/eval/report.html")).unwrap();
    assert_eq!(
        page.matches("<th>val</th><th>val-strict</th><th>probe-x</th>")
            .count(),
        2
    );
}
