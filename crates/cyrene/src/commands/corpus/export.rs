//! `cyrene corpus export`: the rows of data sets for other tools.

use anyhow::Result;
use corpus::split::Split;
use report::look::thousands;

use crate::cli::{CorpusExport as Args, TableFormat};
use crate::ui::{Ui, misused, size};

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
pub fn run(args: &Args, ui: &Ui) -> Result<()> {
    let split = misused(args.split.as_deref().map(Split::load).transpose())?;
    let mut files = Vec::new();
    for path in &args.paths {
        for path in misused(corpus::rows::datasets(path))? {
            files.extend(match args.format {
                TableFormat::Parquet => {
                    corpus::export::parquet(&path, split.as_ref(), args.out.as_deref())?
                }
            });
        }
    }
    ui.result(&serde_json::json!({ "files": files }), || {
        let line = |file: &corpus::export::Exported| {
            format!(
                "{}: {} rows, {}",
                file.path.display(),
                thousands(file.n_rows),
                size(file.bytes)
            )
        };
        files.iter().map(line).collect::<Vec<_>>().join("\n")
    })
}
