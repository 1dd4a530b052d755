//! `cyrene export`: the folder that vLLM, transformers or llama.cpp load.

use std::path::Path;

use anyhow::{Context, Result};
use files::NewFolder;
use kernel::DType;
use model::Model;
use model::quant::fp8_block::{Division, Layout, Options};

use crate::cli::{DTypeArg, Export, ExportFormat};
use crate::ui::{Ui, size};
use crate::{load, misuse};

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
pub fn run(args: &Export, ui: &Ui) -> Result<()> {
    load::folder(&args.model)?;
    if args.out.exists() && !args.force {
        misuse!(
            "{} exists; choose another --out, or --force to replace it",
            args.out.display()
        );
    }
    match args.format {
        ExportFormat::Hf => hf(&args.model, &args.out)?,
        ExportFormat::Fp8Block => fp8(
            &args.model,
            &args.out,
            Layout::CompressedTensors,
            division(args.division),
        )?,
        ExportFormat::Fp8Hf => fp8(
            &args.model,
            &args.out,
            Layout::HuggingFace,
            division(args.division),
        )?,
    }
    let (before, after) = (
        files::folder_bytes(&args.model)?,
        files::folder_bytes(&args.out)?,
    );
    ui.result(
        &serde_json::json!({ "folder": args.out, "bytes": after, "source_bytes": before }),
        || {
            format!(
                "{} -> {} in {}",
                size(before),
                size(after),
                args.out.display()
            )
        },
    )
}

/// Block-quantized weights; what the format leaves alone is copied bit for bit, tokenizer, template and persona come along. A folder that
/// is at `to` already stays until the new one is whole.
///
/// # Errors
/// A source that cannot be read or holds no weights to quantize, a place that cannot be written.
pub fn fp8(from: &Path, to: &Path, layout: Layout, division: Division) -> Result<()> {
    let options = Options {
        layout,
        division,
        ..Options::default()
    };
    let folder = NewFolder::create(to)?;
    model::quant::fp8_block::export(from, folder.path(), &options)
        .map_err(|error| load::with_last_good(error, from))
        .with_context(|| format!("quantizing {} to {}", from.display(), to.display()))?;
    load::copy_companions(from, folder.path(), None)?;
    Ok(folder.replace()?)
}

fn division(arg: DTypeArg) -> Division {
    match arg {
        DTypeArg::Bf16 => Division::Bf16,
        DTypeArg::F32 => Division::F32,
    }
}

/// bf16 weights as released, everything else as it is. A folder that is at `to` already stays until the new one is whole.
fn hf(from: &Path, to: &Path) -> Result<()> {
    let model =
        Model::load(from, DType::F32).with_context(|| format!("loading {}", from.display()))?;
    let folder = NewFolder::create(to)?;
    model
        .check_finite()
        .map_err(|error| load::with_last_good(error, from))
        .with_context(|| format!("exporting {}", from.display()))?;
    model
        .save(folder.path(), Some(DType::Bf16))
        .with_context(|| format!("writing {}", to.display()))?;
    load::copy_companions(from, folder.path(), None)?;
    Ok(folder.replace()?)
}
