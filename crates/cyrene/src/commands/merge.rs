//! `cyrene merge`: W + scale · B A, written as a folder like the base's.

use std::path::Path;

use anyhow::{Context, Result};
use eval::TrainedRows;
use files::NewFolder;
use kernel::DType;
use model::Model;
use text::Persona;

use crate::cli::Merge;
use crate::ui::{Ui, of_eval, size};
use crate::{load, misuse};

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
pub fn run(args: &Merge, ui: &Ui) -> Result<()> {
    if args.out.exists() {
        misuse!(
            "{} exists; choose another --out or move it away",
            args.out.display()
        );
    }
    merge(&args.base, &args.adapter, &args.out)?;
    let bytes = files::folder_bytes(&args.out)?;
    ui.result(
        &serde_json::json!({ "folder": args.out, "bytes": bytes }),
        || format!("{} in {}", size(bytes), args.out.display()),
    )
}

/// Merges in f32 and writes each tensor in the base's number type.
///
/// # Errors
/// What the readers and the writer say.
pub fn merge(base: &Path, adapter: &Path, out: &Path) -> Result<()> {
    load::folder(base)?;
    load::folder(adapter)?;
    let mut model =
        Model::load(base, DType::F32).with_context(|| format!("loading {}", base.display()))?;
    model
        .load_adapter(adapter)
        .map_err(|error| load::with_last_good(error, adapter))
        .with_context(|| format!("loading adapter {}", adapter.display()))?;
    model.merge_lora().context("merging the adapter")?;
    let folder = NewFolder::create(out)?;
    model
        .check_finite()
        .map_err(|error| load::with_last_good(error, base))
        .with_context(|| format!("merging {} into {}", adapter.display(), base.display()))?;
    model
        .save(folder.path(), None)
        .with_context(|| format!("writing {}", out.display()))?;
    // The adapter's record has the base's rows too.
    let trained_on = of_eval(TrainedRows::read(adapter))?;
    load::copy_companions(base, folder.path(), trained_on.as_ref())?;
    if let Some(persona) = Persona::read(adapter)? {
        persona.write(folder.path())?;
    }
    if trained_on.is_none()
        && let Some(template) = load::own_template(adapter)?
    {
        template.save(folder.path())?;
    }
    Ok(folder.replace()?)
}
