//! `cyrene corpus split`: which scenes are held out.

use anyhow::Result;
use corpus::{Character, SourceKind, SplitOptions, SplitRequest};

use super::as_misuse;
use crate::cli::CorpusSplit;
use crate::ui::Ui;

pub fn run(args: &CorpusSplit, ui: &Ui) -> Result<()> {
    let character = Character::load(&args.character)?;
    let request = SplitRequest {
        source: as_misuse(SourceKind::parse(&args.source))?,
        root: &args.root,
        character: &character,
        options: SplitOptions {
            seed: args.seed,
            share: args.share,
            share_rest: args.share_rest,
        },
    };
    let split = corpus::make_split(&request)?;
    split.save(&args.out, args.force)?;
    ui.result(
        &serde_json::json!({ "out": args.out, "held_out": split.held_out.len(), "train": split.train.len(), "contaminated": split.contaminated.len() }),
        || format!("{} scenes held out, {} to train on, {} set aside as contaminated: {}", split.held_out.len(), split.train.len(), split.contaminated.len(), args.out.display()),
    )
}
