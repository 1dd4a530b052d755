//! `cyrene corpus split`: which scenes are held out.

use std::path::Path;

use anyhow::Result;
use corpus::account::{self, Account};
use corpus::manifest::DataFile;
use corpus::split::Split;
use corpus::{Character, SourceKind, SplitOptions, SplitRequest};

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
            format!("{}\n{table}{}", split.describe(), args.out.display())
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
