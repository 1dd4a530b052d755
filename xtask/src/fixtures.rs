//! The small part of the reference pack that tests need in a fresh clone, copied from `../shared/reference`.

use std::path::Path;

use anyhow::{Context, Result, bail};

/// (file in the pack, folder in the repository). The cut-down checkpoint of `model` is described in its own README.
const COPIES: &[(&str, &str)] = &[
    ("chat/chat_cases.jsonl", "crates/text/tests/fixtures"),
    ("chat/chat_template.jinja", "crates/text/tests/fixtures"),
    (
        "chat/chat_template_thinking_default.jinja",
        "crates/text/tests/fixtures",
    ),
    ("chat/packing_cases.json", "crates/text/tests/fixtures"),
    ("chat/pt_cases.jsonl", "crates/text/tests/fixtures"),
    ("chat/sft_label_cases.jsonl", "crates/text/tests/fixtures"),
    (
        "tokenizer/tiny_tokenizer.json",
        "crates/text/tests/fixtures",
    ),
    (
        "tokenizer/tiny_tokenizer_cases.jsonl",
        "crates/text/tests/fixtures",
    ),
    (
        "sampler/sampler_cases.jsonl",
        "crates/engine/tests/fixtures",
    ),
];

pub fn run(root: &Path) -> Result<()> {
    let pack = root.join("../shared/reference");
    if !pack.is_dir() {
        bail!("no reference pack at {}", pack.display());
    }
    for (from, to) in COPIES {
        let folder = root.join(to);
        std::fs::create_dir_all(&folder).with_context(|| format!("making {to}"))?;
        let name = Path::new(from).file_name().context("a file of the pack")?;
        let target = folder.join(name);
        std::fs::copy(pack.join(from), &target)
            .with_context(|| format!("copying {from} to {to}"))?;
        println!("{}", target.display());
    }
    Ok(())
}
