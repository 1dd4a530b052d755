//! `cyrene corpus stats`: what data sets hold and how often a mixture shows it, as a table, as pictures and as a page.

use std::path::{Path, PathBuf};

use anyhow::Result;
use corpus::pages::{stats as pages, stats_text};
use corpus::split::Split;
use corpus::stats::{MANY_PASSES, Passes, Stats};
use report::look::thousands;
use serde::Serialize;

use crate::cli::CorpusStats as Args;
use crate::misuse;
use crate::recipe::Recipe;
use crate::ui::{Ui, misused};

/// Name of the page in the output folder.
const PAGE: &str = "stats.html";

/// What the command found, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Report {
    datasets: Vec<Stats>,
    /// Of the recipe's mixture.
    passes: Option<Passes>,
    /// The page and the pictures.
    files: Vec<PathBuf>,
}

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
pub fn run(args: &Args, ui: &Ui) -> Result<()> {
    // 1. what is asked for
    let recipe = args.recipe.as_deref();
    let recipe = recipe.map(|path| Recipe::load(path, &[])).transpose()?;
    let folder = args.recipe.as_deref().and_then(Path::parent);
    let mixture = recipe
        .as_ref()
        .map(|recipe| recipe.mixture(folder.unwrap_or(Path::new(""))));
    let mut paths = args.paths.clone();
    if let Some(mixture) = mixture.filter(|_| paths.is_empty()) {
        for source in mixture.sources() {
            if !paths.contains(&source.path) {
                paths.push(source.path);
            }
        }
    }
    let split = match (&args.split, mixture) {
        (Some(path), _) => Some(misused(Split::load(path))?),
        (None, Some(mixture)) => misused(mixture.load_split())?,
        (None, None) => None,
    };

    // 2. the numbers
    let mut datasets = Vec::new();
    for path in &paths {
        for path in misused(corpus::rows::datasets(path))? {
            if !path.exists() {
                misuse!(
                    "{} does not exist; expected what `cyrene corpus build` wrote",
                    path.display()
                );
            }
            datasets.push(corpus::stats::stats(&path, split.as_ref())?);
        }
    }
    let passes = mixture
        .map(|mixture| mixture.passes(split.as_ref()))
        .transpose()?;
    let mut report = Report {
        datasets,
        passes,
        files: Vec::new(),
    };

    // 3. the pictures
    if let Some(out) = &args.out {
        let sections = pages::sections(&report.datasets, report.passes.as_ref());
        for section in &sections {
            for picture in &section.pictures {
                let path = out.join(format!("{}.svg", picture.figure.name));
                files::write(&path, picture.figure.file(&section.title).as_bytes())?;
                report.files.push(path);
            }
        }
        let path = out.join(PAGE);
        files::write(&path, pages::page(&sections).as_bytes())?;
        report.files.insert(0, path);
    }
    ui.result(&report, || text(&report))
}

/// The report for a terminal.
fn text(report: &Report) -> String {
    let mut lines = Vec::new();
    for stats in &report.datasets {
        stats_text::dataset_lines(stats, &mut lines);
    }
    if let Some(passes) = &report.passes {
        lines.push(format!(
            "passes over a scene in one epoch of the recipe: {:.1} in the same language (at most {:.1}), {:.1} in all languages (at most {:.1})",
            passes.same_language_mean, passes.same_language_most, passes.all_languages_mean, passes.all_languages_most
        ));
        if passes.n_above_limit > 0 {
            lines.push(format!(
                "warning: {} scenes of a language are shown more than {MANY_PASSES} times; lower their weight",
                thousands(passes.n_above_limit as u64)
            ));
        }
    }
    if let Some(page) = report.files.first() {
        lines.push(format!(
            "{} and {} pictures beside it",
            page.display(),
            report.files.len() - 1
        ));
    }
    lines.join("\n").trim_end().to_owned()
}
