//! What the layout promises, checked: which crate may use which, what stays in its one place, links that lead somewhere, words that have no business here.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// The arrows of ARCHITECTURE.md: a crate and those of ours it may depend on. `cyrene` may use everything, `xtask` the kernels that it compiles.
const ARROWS: &[(&str, &[&str])] = &[
    ("files", &[]),
    ("report", &[]),
    ("hub", &["files"]),
    ("kernel", &["files"]),
    ("text", &["files"]),
    ("model", &["kernel", "files"]),
    ("engine", &["model", "kernel"]),
    ("corpus", &["text", "files", "report"]),
    ("train", &["model", "kernel", "text", "files"]),
    (
        "eval",
        &["engine", "model", "text", "corpus", "files", "report"],
    ),
    ("serve", &["engine", "text"]),
    (
        "cyrene",
        &[
            "files", "report", "hub", "kernel", "text", "model", "engine", "corpus", "train",
            "eval", "serve",
        ],
    ),
    ("xtask", &["kernel"]),
];

/// Third-party crates that have one home.
const HOMES: &[(&str, &[&str])] = &[
    ("anyhow", &["cyrene", "xtask"]),
    ("axum", &["serve"]),
    ("hyper", &["serve"]),
    ("hyper-util", &["serve"]),
    ("tokio", &["serve", "cyrene"]),
    ("clap", &["cyrene"]),
    ("indicatif", &["cyrene"]),
    ("rustyline", &["cyrene"]),
    ("ureq", &["hub"]),
    ("cudarc", &["kernel"]),
    ("gemm", &["kernel"]),
    ("libloading", &["kernel"]),
    ("memmap2", &["model"]),
    ("safetensors", &["model", "train"]),
    ("tokenizers", &["text"]),
    ("minijinja", &["text"]),
];

/// Text that may stand in some files of a kind only: (text, file ending, paths where it may stand, why).
const PLACES: &[(&str, &str, &[&str], &str)] = &[
    (
        "println!",
        ".rs",
        &["crates/cyrene/", "xtask/", "/tests/", "/benches/"],
        "only the binary speaks on stdout; libraries return data",
    ),
    (
        "std::env::var",
        ".rs",
        &["crates/cyrene/src/env.rs", "/tests/", "crates/kernel/src/"],
        "environment variables are read in one file",
    ),
    (
        "use crate::commands::",
        ".rs",
        &["crates/cyrene/src/commands/live.rs"],
        "a command calls no other; `live` alone is them in order",
    ),
    (
        "unsafe {",
        ".rs",
        &[
            "crates/kernel/src/",
            "crates/model/src/checkpoint",
            "xtask/src/tidy.rs",
        ],
        "unsafe lives in kernel and in one mmap",
    ),
    (
        "process::exit",
        ".rs",
        &["crates/cyrene/src/interrupt.rs"],
        "main returns an exit code",
    ),
];

/// Words that never belong into a tracked text file. Written in halves, so that this list does not find itself.
const FORBIDDEN: &[(&str, &str, &str)] = &[
    ("/wo", "rk/", "a path of one machine"),
    ("/ro", "ot/", "a path of one machine"),
    ("/ho", "me/", "a path of one machine"),
    ("FIX", "ME", "an unfinished mark"),
    ("todo", "!(", "an unfinished mark"),
    ("unimplemented", "!(", "an unfinished mark"),
    ("#[ig", "nore", "a test that does not run"),
];

pub fn run(root: &Path) -> Result<()> {
    let mut faults = Vec::new();
    arrows(root, &mut faults)?;
    let files = crate::tracked(root)?;
    for path in &files {
        let Ok(text) = std::fs::read_to_string(root.join(path)) else {
            continue;
        };
        // Test data may hold any text.
        if path.contains("/fixtures/") || path.starts_with("demo/") || path.ends_with(".lock") {
            continue;
        }
        words(path, &text, &mut faults);
        if path.ends_with(".md") {
            links(root, path, &text, &mut faults);
        }
    }
    if faults.is_empty() {
        println!("tidy: {} files, nothing to say", files.len());
        return Ok(());
    }
    for fault in &faults {
        eprintln!("{fault}");
    }
    bail!("{} faults", faults.len())
}

fn arrows(root: &Path, faults: &mut Vec<String>) -> Result<()> {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()))
        .args([
            "metadata",
            "--format-version",
            "1",
            "--no-deps",
            "--offline",
        ])
        .current_dir(root)
        .output()
        .context("running cargo metadata")?;
    if !output.status.success() {
        bail!(
            "cargo metadata: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata["packages"]
        .as_array()
        .context("cargo metadata lists packages")?;
    let ours: Vec<&str> = packages
        .iter()
        .filter_map(|package| package["name"].as_str())
        .collect();
    for package in packages {
        let name = package["name"].as_str().unwrap_or_default();
        let Some((_, allowed)) = ARROWS.iter().find(|(known, _)| *known == name) else {
            faults.push(format!("crate {name} has no arrows in xtask/src/tidy.rs"));
            continue;
        };
        // Tests may need more: serve's make themselves a tiny model.
        let dependencies = package["dependencies"].as_array().into_iter().flatten();
        let targets: Vec<&str> = dependencies
            .filter(|dependency| dependency["kind"].is_null())
            .filter_map(|dependency| dependency["name"].as_str())
            .collect();
        for unused in allowed.iter().filter(|arrow| !targets.contains(arrow)) {
            faults.push(format!(
                "crate {name} does not depend on {unused}; take the arrow out of xtask/src/tidy.rs and ARCHITECTURE.md"
            ));
        }
        for target in targets {
            if ours.contains(&target) && !allowed.contains(&target) {
                faults.push(format!("crate {name} must not depend on {target}"));
            }
            if let Some((_, homes)) = HOMES.iter().find(|(known, _)| *known == target)
                && !homes.contains(&name)
            {
                faults.push(format!(
                    "{target} belongs into {}, not into {name}",
                    homes.join(" and ")
                ));
            }
        }
    }
    Ok(())
}

fn words(path: &str, text: &str, faults: &mut Vec<String>) {
    let is_list = path == "xtask/src/tidy.rs" || path == "Cargo.toml";
    for (at, line) in text.lines().enumerate() {
        for (first, second, why) in FORBIDDEN {
            if !is_list && line.contains(&format!("{first}{second}")) {
                faults.push(format!("{path}:{}: `{first}{second}` is {why}", at + 1));
            }
        }
        for (word, ending, places, why) in PLACES {
            let comment = line.trim_start().starts_with("//");
            if !is_list
                && !comment
                && path.ends_with(ending)
                && line.contains(word)
                && !places.iter().any(|place| path.contains(place))
            {
                faults.push(format!("{path}:{}: `{word}`: {why}", at + 1));
            }
        }
    }
}

/// Relative links of a Markdown file must lead to a file or folder of the repository.
fn links(root: &Path, path: &str, text: &str, faults: &mut Vec<String>) {
    let folder = Path::new(path).parent().unwrap_or(Path::new(""));
    for (at, line) in text.lines().enumerate() {
        for part in line.split("](").skip(1) {
            let target = part.split([')', '#', ' ']).next().unwrap_or("");
            if target.is_empty() || target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            if !root.join(folder).join(target).exists() {
                faults.push(format!("{path}:{}: dead link to {target}", at + 1));
            }
        }
    }
}
