//! What somebody meets who starts the program for the first time: wrong words are named before anything is fetched, with a remedy that works.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::path::Path;

use common::{cyrene, demo, fails, stderr, succeeds};
use serde_json::Value;

const STORY: &str = concat!(
    r#"{"campaign":"c","scene":"s1","lines":[{"kind":"dialogue","speaker_id":"me","speaker_name":{"en":"Me"},"text":{"en":"Is the ferry late?","zh":"船晚了吗？"}},{"kind":"dialogue","speaker_id":"bo","speaker_name":{"en":"Bo"},"text":{"en":"It is only the wind.","zh":"只是风。"}}]}"#,
    "\n"
);
const BO: &str = "languages = [\"zh\", \"en\"]\n[name]\nen = \"Bo\"\n[player]\nspeaker_ids = [\"me\"]\n[story]\nspeaker_ids = [\"bo\"]\n";

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// `live` on a small story in `dir` with `more`, which may say other files.
fn live<'a>(dir: &'a Path, more: &[&'a str]) -> Vec<String> {
    let (story, character) = (dir.join("story.jsonl"), dir.join("bo.toml"));
    std::fs::write(&story, STORY).unwrap();
    if !character.exists() {
        std::fs::write(&character, BO).unwrap();
    }
    let mut args = vec!["live"];
    if !more.contains(&"--story") {
        args.extend(["--story", text(&story)]);
    }
    args.extend(["--character", text(&character), "--device", "cpu"]);
    args.extend(more);
    let runs = dir.join("runs");
    let mut args: Vec<String> = args.into_iter().map(str::to_owned).collect();
    args.extend(["--runs".to_owned(), text(&runs).to_owned()]);
    args
}

fn refuses(dir: &Path, more: &[&str], words: &[&str]) {
    let args = live(dir, more);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    fails(&args, 2, words);
    for stage in ["fetch", "corpus"] {
        assert!(!dir.join("runs/bo").join(stage).exists(), "{args:?}");
    }
}

#[test]
fn live_names_what_is_wrong_before_it_fetches_anything() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    // Keys and values of both recipes, sizes, bases.
    refuses(
        dir,
        &["--set", "sft.optimizer.lrr=1e-4"],
        &["`optimizer.lrr`", "`optimizer.lr`"],
    );
    refuses(
        dir,
        &["--set", "cpt.optimizer.lr=-1"],
        &["optimizer.lr", "from 0 to"],
    );
    refuses(dir, &["--set", "optimizer.lr=1"], &["cpt.KEY=VALUE"]);
    refuses(dir, &["--size", "3b"], &["3b", "4b"]);
    for base in ["../models/base", "fetch", "runs/cpt/model", "./base"] {
        refuses(
            dir,
            &["--size", "4B", "--base", base],
            &[base, "is no folder", "owner/name"],
        );
    }
    // Stories: what is no story is not the fault of a stage.
    let (notes, empty) = (dir.join("notes"), dir.join("empty"));
    for folder in [&notes, &empty] {
        std::fs::create_dir(folder).unwrap();
    }
    std::fs::write(notes.join("notes.txt"), "Bo: hello").unwrap();
    for folder in [&notes, &empty] {
        refuses(dir, &["--story", text(folder)], &[".jsonl"]);
    }
    let plain = notes.join("notes.txt");
    let args = live(dir, &["--story", text(&plain)]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let said = stderr(&cyrene(&args));
    assert!(
        said.contains("notes.txt") && !said.contains("stage"),
        "{said}"
    );
    // A character who does not speak, with who does.
    for ids in ["[\"Bo\"]", "[]"] {
        std::fs::write(dir.join("bo.toml"), BO.replace("[\"bo\"]", ids)).unwrap();
        refuses(dir, &[], &["bo.toml", "bo (1)"]);
    }
}

#[test]
fn live_until_doctor_plans_every_stage_and_fetches_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let character = BO.replace("[\"me\"]", "[\"me\", \"mee\"]");
    std::fs::write(dir.path().join("bo.toml"), character).unwrap();
    let args = live(dir.path(), &["--size", "4B", "--until", "doctor", "--json"]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let output = cyrene(&args);
    let said = stderr(&output);
    assert!(output.status.success(), "{said}");
    for words in [
        "mee",
        "fetch: ",
        "to download",
        "cpt: ",
        "sft: ",
        "export: ",
        "in all: ",
    ] {
        assert!(said.contains(words), "no `{words}` in {said}");
    }
    let result: Value = serde_json::from_slice(&output.stdout).unwrap();
    let plan = &result["stages"][0]["plan"];
    assert!(plan["download_bytes"].as_u64().unwrap() > 8_000_000_000);
    assert!(plan["disk_bytes"].as_u64() > plan["download_bytes"].as_u64());
    let names: Vec<&str> = plan["stages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|stage| stage["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["fetch", "corpus", "cpt", "sft", "eval", "export"]);
    assert!(!dir.path().join("runs/bo/fetch").exists());
}

/// Sockets, folders and other people's files beside a story change nothing.
#[cfg(unix)]
#[test]
fn story_folder_is_read_for_its_story_files_alone() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("story");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("a.jsonl"), STORY).unwrap();
    let run = || {
        let args = live(dir.path(), &["--story", text(&folder), "--until", "corpus"]);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let output = cyrene(&args);
        assert!(output.status.success(), "{}", stderr(&output));
        stderr(&output)
    };
    run();
    std::os::unix::net::UnixListener::bind(folder.join("editor.sock")).unwrap();
    std::os::unix::net::UnixListener::bind(folder.join("b.jsonl")).unwrap();
    std::fs::create_dir(folder.join("c.jsonl")).unwrap();
    std::fs::write(folder.join("notes.txt"), "not a story").unwrap();
    let again = run();
    assert!(
        again.contains("fetch: ") && again.contains("corpus: "),
        "{again}"
    );
    assert!(!again.contains("done in"), "{again}");
}

#[test]
fn base_that_is_no_hub_id_is_not_answered_with_a_fetch() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("rows.jsonl"), "{\"text\":\"a\"}\n").unwrap();
    std::fs::create_dir(dir.path().join("runs")).unwrap();
    for (base, fetchable) in [
        ("fetch", false),
        ("../runs/cpt/model", false),
        ("../model", false),
        ("/nowhere/model", false),
        ("runs/model", false),
        ("Qwen/Nothing-Here", true),
    ] {
        let recipe = dir.path().join("r.toml");
        let toml = format!(
            "stage = \"cpt\"\nbase = \"{base}\"\n[data]\nsources = [{{ path = \"rows.jsonl\" }}]\n"
        );
        std::fs::write(&recipe, toml).unwrap();
        let out = dir.path().join("out");
        let output = cyrene(&["train", text(&recipe), "--out", text(&out)]);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert_eq!(
            said.contains(&format!("cyrene fetch {base}")),
            fetchable,
            "{said}"
        );
        if !fetchable {
            assert!(said.contains("is no folder"), "{said}");
        }
        if !fetchable && base != "runs/model" {
            fails(&["fetch", base], 2, &["no Hub id"]);
        }
    }
}

#[test]
fn bench_refuses_what_does_not_fit_in_memory() {
    let args = [
        "bench",
        "train",
        "--device",
        "cpu",
        "--size",
        "9B",
        "--rows",
        "64",
        "--row-tokens",
        "100000",
    ];
    fails(&args, 2, &["of memory", "are free", "--tuner lora"]);
    let args = [&args[..], &["--tuner", "lora"]].concat();
    let said = stderr(&cyrene(&args));
    assert!(
        said.contains("smaller --size") && !said.contains("or --tuner lora"),
        "{said}"
    );
    let ops = [
        "bench",
        "ops",
        "--device",
        "cpu",
        "--row-tokens",
        "1000000000",
    ];
    fails(&ops, 2, &["of memory", "are free", "fewer --row-tokens"]);
}

#[test]
fn doctor_says_what_is_missing_for_a_gpu_and_speaks_in_gib() {
    let report: Value = serde_json::from_str(&succeeds(&["doctor", "--json"])).unwrap();
    let said = succeeds(&["doctor"]);
    match report["gpu_missing"].as_str() {
        Some(missing) => assert!(said.contains("no GPU") && said.contains(missing), "{said}"),
        None => assert!(!said.contains("no GPU"), "{said}"),
    }
    let said = succeeds(&[
        "doctor", "--device", "cpu", "--size", "4B", "--memory", "30",
    ]);
    assert!(said.contains("GiB") && !said.contains(" GB"), "{said}");
    // A plan with adapters is not told to use adapters.
    let said = succeeds(&["doctor", "--device", "cpu", "--size", "9b", "--memory", "2"]);
    let lora = said
        .lines()
        .find(|line| line.starts_with("9b LoRA"))
        .unwrap();
    assert!(
        lora.contains("DOES NOT FIT") && !lora.contains("tuner.kind"),
        "{lora}"
    );
}

#[test]
fn languages_are_taken_by_their_common_codes() {
    let dir = tempfile::tempdir().unwrap();
    live(dir.path(), &[]);
    let build = |languages: &str, out: &Path| {
        let story = dir.path().join("story.jsonl");
        let character = dir.path().join("bo.toml");
        let tokenizer = demo().join("fetch/model");
        let args = [
            "corpus",
            "build",
            "--root",
            text(&story),
            "--character",
            text(&character),
            "--task",
            "pt/everything",
        ];
        let more = [
            "--tokenizer",
            text(&tokenizer),
            "--out",
            text(out),
            "--languages",
            languages,
        ];
        cyrene(&[&args[..], &more[..]].concat())
    };
    let out = dir.path().join("out");
    let output = build("zh-CN", &out);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(out.join("pt/everything/chs.jsonl").exists());
    let output = build("zz", &out);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("`zz`"), "{}", stderr(&output));
}

#[test]
fn what_the_command_line_names_in_vain_is_misuse() {
    let dir = tempfile::tempdir().unwrap();
    let [corpus, rows, split, model] = ["", "pt/everything", "split.json", "../fetch/model"]
        .map(|name| demo().join("corpus").join(name));
    let [nowhere, out] = ["nowhere.json", "out"].map(|name| dir.path().join(name));
    let [corpus, rows, split, model] = [&corpus, &rows, &split, &model].map(|path| text(path));
    let [nowhere, out] = [&nowhere, &out].map(|path| text(path));
    let tokenizer = ["--tokenizer", model];
    let peek = ["corpus", "peek", rows, "--stage", "cpt", "--split", nowhere];
    fails(&[&peek[..], &tokenizer].concat(), 2, &[nowhere]);
    let export = ["corpus", "export", corpus, "--out", out, "--split", nowhere];
    fails(&export, 2, &[nowhere]);
    fails(
        &["corpus", "stats", corpus, "--split", nowhere],
        2,
        &[nowhere],
    );
    let build = ["corpus", "build", "--root", rows, "--task", "pt/everything"];
    let more = ["--character", nowhere, "--out", out];
    fails(&[&build[..], &more, &tokenizer].concat(), 2, &[nowhere]);
    let recipe = dir.path().join("r.toml");
    let toml = format!(
        "stage = \"cpt\"\nbase = {model:?}\n[data]\nsplit = \"nowhere.json\"\nsources = [{{ path = {rows:?} }}]\n"
    );
    std::fs::write(&recipe, toml).unwrap();
    let train = ["train", text(&recipe), "--out", out];
    fails(&train, 2, &["nowhere.json"]);
    let import = ["corpus", "import", nowhere, "--out", "story.jsonl"];
    fails(&import, 2, &[nowhere]);
    let eval = ["eval", "--model", model, "--split", split, "--out", out];
    fails(
        &[&eval[..], &["--languages", "fr"]].concat(),
        2,
        &["the languages"],
    );
    // Those that are there are looked at alone.
    let said = succeeds(
        &[
            &eval[..],
            &["--languages", "en", "--replies", "1", "--json"],
        ]
        .concat(),
    );
    let report: Value = serde_json::from_str(&said).unwrap();
    let stages = report["stages"].as_array().unwrap();
    for gap in stages
        .iter()
        .flat_map(|stage| stage["gaps"].as_array().unwrap())
    {
        assert!(
            ["all", "en"].contains(&gap["language"].as_str().unwrap()),
            "{gap}"
        );
    }
    assert_eq!(report["replies"].as_array().unwrap().len(), 1);
}
