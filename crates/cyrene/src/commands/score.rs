//! `cyrene score`: log-probabilities of given ids, one document a line, as training and evaluation compute them.

use anyhow::{Context, Result};
use corpus::row_file;
use model::{Config, Saved};
use serde::Deserialize;
use text::Example;
use text::pack::{self, Piece};
use train::data::as_batch;

use crate::cli::Score;
use crate::ui::{Ui, of_rows};
use crate::{load, misuse};

#[derive(Deserialize)]
struct Row {
    input_ids: Vec<u32>,
}

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
pub fn run(args: &Score, ui: &Ui) -> Result<()> {
    let rows: Vec<Row> = of_rows(row_file::read(&args.ids, "{\"input_ids\":[...]}"))?;
    if let Some(at) = rows.iter().position(|row| row.input_ids.is_empty()) {
        misuse!("{}: document {} has no ids", args.ids.display(), at + 1);
    }
    load::folder(&args.model.model)?;
    let context = Config::load(&args.model.model)?.max_position_embeddings;
    let is_too_long = |row: &Row| row.input_ids.len() > context;
    if let Some(at) = rows.iter().position(is_too_long) {
        misuse!(
            "{}: document {} has {} ids, but the model in {} knows 1 to {context}",
            args.ids.display(),
            at + 1,
            rows[at].input_ids.len(),
            args.model.model.display()
        );
    }
    let model = load::model(&args.model)?;
    let mut saved = Saved::forward_only(model.config());
    let mut bar = ui.bar("score", rows.len() as u64);
    for (at, row) in rows.iter().enumerate() {
        let labels = row.input_ids.iter().map(|&id| id as i32).collect();
        let packed = pack::row([&Piece {
            example_idx: at,
            example: Example::document(row.input_ids.clone(), labels),
        }]);
        let mut nll_t = model
            .nll(&mut saved, &as_batch(&packed))
            .with_context(|| format!("document {} of {}", at + 1, args.ids.display()))?;
        nll_t.pop();
        let logprobs: Vec<f32> = nll_t.iter().map(|nll| -nll).collect();
        ui.line(&serde_json::json!({ "logprobs": logprobs }).to_string())?;
        bar.set(at as u64 + 1, "");
    }
    bar.finish();
    Ok(())
}
