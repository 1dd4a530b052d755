//! `cyrene corpus encode`: what training sees of each row.

use anyhow::Result;
use corpus::examples::{self, Encoding, TrainingStage};
use text::Tokenizer;
use text::labels::LossScale;

use crate::cli::{self, CorpusEncode, TrainStage};
use crate::misuse;
use crate::ui::{Ui, of_rows};

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
pub fn run(args: &CorpusEncode, ui: &Ui) -> Result<()> {
    let tokenizer = Tokenizer::load(&args.tokenizer)?;
    let encoding = encoding(args.stage, args.loss.loss_scale, &tokenizer);
    if !args.file.is_file() {
        misuse!(
            "{} is no file; expected rows (docs/rows.md)",
            args.file.display()
        );
    }
    let read = of_rows(examples::of_file(&args.file, encoding))?;
    read.notes.lines().iter().for_each(|line| ui.note(line));
    for row in read.examples {
        ui.line(&serde_json::json!({ "input_ids": row.encoded.input_ids, "labels": row.encoded.labels }).to_string())?;
    }
    Ok(())
}

/// How training encodes rows of a stage.
pub fn encoding(
    stage: TrainStage,
    loss_scale: cli::LossScale,
    tokenizer: &Tokenizer,
) -> Encoding<'_> {
    Encoding {
        stage: match stage {
            TrainStage::Cpt => TrainingStage::Cpt,
            TrainStage::Sft => TrainingStage::Sft,
        },
        loss_scale: match loss_scale {
            cli::LossScale::IgnoreEmptyThink => LossScale::IgnoreEmptyThink,
            cli::LossScale::Default => LossScale::Default,
            cli::LossScale::LastRound => LossScale::LastRound,
        },
        tokenizer: Some(tokenizer),
        // Rows of ids may be of a model whose vocabulary is larger than its tokenizer's.
        vocab_size: None,
        row_tokens: None,
    }
}
