//! `cyrene corpus split`: which scenes are held out.

use std::path::Path;

use anyhow::Result;
use corpus::account::{self, Account};
use corpus::manifest::DataFile;
use corpus::split::{Side, Split};
use corpus::{Character, Language, SourceKind, SplitOptions, SplitRequest};

use crate::cli::CorpusSplit;
use crate::misuse;
use crate::ui::{Ui, misused};

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
pub fn run(args: &CorpusSplit, ui: &Ui) -> Result<()> {
    for (name, share) in [
        ("--share", args.share),
        ("--share-rest", args.share_rest),
        ("--share-strict", args.share_strict),
        ("--share-probe", args.share_probe),
    ] {
        if !(0.0..0.5).contains(&share) {
            misuse!("{name} {share}: expected a share from 0 to below 0.5");
        }
    }
    let character = misused(Character::load(&args.character))?;
    let request = SplitRequest {
        source: misused(SourceKind::parse(&args.source))?,
        root: &args.root,
        vendor: args.vendor.as_deref(),
        character: &character,
        options: SplitOptions {
            seed: args.seed,
            share: args.share,
            share_rest: args.share_rest,
            share_strict: args.share_strict,
            share_probe: args.share_probe,
        },
    };
    let split = corpus::make_split(&request)?;
    // What can fail comes first: a command that fails leaves no split behind.
    let tokens = tokens_beside(&args.out, &split)?;
    split.save(&args.out, args.force)?;
    ui.result(
        &serde_json::json!({
            "out": args.out,
            "train": split.train.len(),
            "val": split.val.len(),
            "val-strict": split.val_strict.len(),
            "probe-x": split.probe_x.len(),
            "contaminated": split.contaminated.len(),
            "filtered": split.filtered.len(),
            "report": split.report,
            "tokens": tokens,
        }),
        || {
            let table = account::table(&tokens);
            format!("{}\n{table}{}", describe(&split), args.out.display())
        },
    )
}

/// The accounts of the data sets that lie beside the split and were built from the same story, vendor pages aside if they were not split.
fn tokens_beside(out: &Path, split: &Split) -> Result<Vec<Account>> {
    let folder = match out.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let Some(manifest) = corpus::Manifest::load(folder)? else {
        return Ok(Vec::new());
    };
    let mut accounts = Vec::new();
    for (task, dataset) in &manifest.datasets {
        let is_known = |file: &DataFile| {
            dataset
                .scenes
                .iter()
                .all(|s| split.side(s, file.language).is_some())
        };
        if dataset.files.iter().all(is_known) {
            accounts.extend(account::account(&folder.join(task), Some(split))?);
        }
    }
    Ok(accounts)
}

/// What a split came to: components, then a line a side with its scenes, and its lines by language.
pub fn describe(split: &Split) -> String {
    let report = &split.report;
    let mut text = format!(
        "{} scenes in {} groups that stay on one side (the largest has {}): {} pairs share a text, {} more are nearly alike",
        report.n_scenes,
        report.n_components,
        report.largest_component,
        report.ties_by_text,
        report.ties_by_likeness,
    );
    let has_lines = |language: &Language| {
        report
            .sides
            .values()
            .any(|s| s.lines.contains_key(language))
    };
    let languages: Vec<Language> = Language::ALL.into_iter().filter(has_lines).collect();
    text.push_str(&format!("\n{:<13}{:>7}", "side", "scenes"));
    for language in &languages {
        text.push_str(&format!("{:>8}", language.code()));
    }
    for side in Side::ALL {
        let Some(count) = report.sides.get(&side) else {
            continue;
        };
        text.push_str(&format!("\n{side:<13}{:>7}", count.scenes));
        for language in &languages {
            text.push_str(&format!("{:>8}", count.lines.get(language).unwrap_or(&0)));
        }
    }
    text.push_str(
        "\n(lines by language. train: learned from; val: held out; val-strict: whole missions held out; probe-x: held out in one language, \
         its other lines are trained on; contaminated, filtered: on neither side; docs/split.md)",
    );
    if report.copied_lines_left > 0 {
        text.push_str(&format!(
            "\n{} copied lines (over all languages) stay in held-out scenes that are new otherwise",
            report.copied_lines_left
        ));
    }
    if !report.strict_missions.is_empty() {
        text.push_str(&format!(
            "\nval-strict: {}",
            report.strict_missions.join(", ")
        ));
    }
    for note in &report.notes {
        text.push_str(&format!("\n{note}"));
    }
    text
}
