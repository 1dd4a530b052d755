//! `cyrene eval`: the losses of a model on both sides of a split, what counting models reach on the same rows, and replies to held-out turns.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use corpus::Language;
use eval::metric::loss_gap::Gap;
use eval::report::{Report, StageReport};
use eval::{Evaluation, Measurement, Progress, TrainedRows};
use model::{Config, Model};
use text::Persona;

use crate::cli::Eval;
use crate::ui::{Bar, Misuse, Ui, of_eval};
use crate::{load, misuse, speak};

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
pub fn run(args: &Eval, ui: &Ui) -> Result<()> {
    load::folder(&args.model.model)?;
    let subject = args.model.adapter.as_ref().unwrap_or(&args.model.model);
    load::folder(subject)?;
    let languages = Language::parse_all(&args.languages)
        .map_err(|error| anyhow::Error::new(Misuse(error.to_string())))?;
    let persona = load::persona(&args.model.model, args.model.adapter.as_deref(), None)?;
    let trained = of_eval(TrainedRows::read(subject))?;
    let device = load::device(&args.model.device.device)?;
    let base = args.base.as_deref().map(|dir| {
        move || {
            let base = Model::load(dir, load::dtype(args.model.dtype))
                .with_context(|| format!("loading {}", dir.display()))?;
            Ok(base.to_device(device)?)
        }
    });
    let out = match &args.out {
        Some(out) => out.clone(),
        None => new_folder(subject)?,
    };
    let asked = Asked {
        folder: &args.model.model,
        adapter: args.model.adapter.as_deref(),
        trained,
        split: &args.split,
        out: &out,
        n_replies: args.replies,
        seed: args.seed,
        profile: args.profile.as_deref(),
        languages,
        persona,
    };
    let report = evaluate(&asked, || load::model(&args.model), base, ui);
    if report.is_err() && args.out.is_none() {
        // Only if nothing lies in it.
        drop(std::fs::remove_dir(&out));
    }
    let report = report?;
    ui.result(&report, || describe(&report, &out))
}

/// A folder of its own beside the model: `<model>-eval`, or the first of `<model>-eval-2`, `-3`, ... that is not there or empty, so that
/// no report takes the place of an earlier one.
///
/// # Errors
/// [`Misuse`] where none can be made.
fn new_folder(model: &Path) -> Result<PathBuf> {
    // `.` and `..` have no name.
    let model = match model.file_name() {
        Some(_) => model.to_owned(),
        None => model
            .canonicalize()
            .with_context(|| format!("finding {}", model.display()))?,
    };
    let name = model.file_name().unwrap_or_default().to_string_lossy();
    let mut number = 1;
    loop {
        let name = match number {
            1 => format!("{name}-eval"),
            _ => format!("{name}-eval-{number}"),
        };
        let folder = model.with_file_name(name);
        match std::fs::create_dir(&folder) {
            Ok(()) => return Ok(folder),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                let is_empty =
                    std::fs::read_dir(&folder).is_ok_and(|mut in_it| in_it.next().is_none());
                if is_empty {
                    return Ok(folder);
                }
                number += 1;
            }
            Err(error) => misuse!(
                "cannot make {} for the report: {error}; name a folder with --out",
                folder.display()
            ),
        }
    }
}

/// What to evaluate where.
pub struct Asked<'a> {
    /// Folder of the model: tokenizer, template, persona.
    pub folder: &'a Path,
    /// Folder of an adapter on top.
    pub adapter: Option<&'a Path>,
    /// What the model, or its adapter, was trained on.
    pub trained: Option<TrainedRows>,
    /// `split.json`, with the data sets beside it.
    pub split: &'a Path,
    /// Where the report goes.
    pub out: &'a Path,
    /// Replies by language.
    pub n_replies: usize,
    /// Of the train probe, the choice of turns, and replies.
    pub seed: u64,
    /// Sampling profile of the replies; None: the persona's, else `Adopted`.
    pub profile: Option<&'a str>,
    /// Languages to look at; none: all.
    pub languages: Vec<Language>,
    /// Who speaks.
    pub persona: Persona,
}

/// Evaluates and writes `report.json`, `report.html`, `eval/replies.jsonl`. The base is measured first and gone before the model is loaded.
///
/// # Errors
/// Missing data sets or split, rows that do not fit, a model that cannot be loaded or fails.
pub fn evaluate(
    asked: &Asked<'_>,
    model: impl FnOnce() -> Result<Model>,
    base: Option<impl FnOnce() -> Result<Model>>,
    ui: &Ui,
) -> Result<Report> {
    let persona = &asked.persona;
    let evaluation = Evaluation {
        encoder: &load::chat_encoder(asked.folder, asked.adapter)?,
        name: persona
            .shown_name()
            .map_or_else(|| asked.folder.display().to_string(), str::to_owned),
        note: persona.shown_note().unwrap_or_default().to_owned(),
        trained: asked.trained.as_ref(),
        split: asked.split,
        n_replies: asked.n_replies,
        seed: asked.seed,
        sampling: speak::profile(asked.profile, persona)?,
        languages: &asked.languages,
    };
    let mut bars = Bars { ui, bar: None };
    let vocab_size = Config::load(asked.folder)?.vocab_size;
    let measurement = of_eval(Measurement::new(&evaluation, vocab_size))?;
    let base = match base {
        Some(load) => Some(of_eval(measurement.losses(&load()?, "base", &mut bars))?),
        None => None,
    };
    let report = of_eval(measurement.report(model()?, base, &mut bars))?;
    report.write(asked.out)?;
    Ok(report)
}

/// Progress as bars on stderr.
struct Bars<'a> {
    ui: &'a Ui,
    bar: Option<Bar>,
}

impl Progress for Bars<'_> {
    fn begin(&mut self, what: &str, total: u64) {
        self.bar = Some(self.ui.bar(what, total));
    }

    fn advance(&mut self, done: u64, of: &str) {
        if let Some(bar) = &mut self.bar {
            bar.set(done, of);
        }
    }

    fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish();
        }
    }
}

/// A few lines for the terminal.
pub fn describe(report: &Report, out: &Path) -> String {
    let mut text = String::new();
    for stage in &report.stages {
        let all: &Gap = match stage.gaps.first() {
            Some(all) => all,
            None => continue,
        };
        let what = match stage.stage {
            "pt" => "story text",
            _ => "conversations",
        };
        let probe = match &stage.probe_not_recorded[..] {
            [] => "rows it was trained on".to_owned(),
            unknown => format!(
                "rows of the split's train side (nothing beside the weights says that it was trained on those in {})",
                unknown.join(", ")
            ),
        };
        text.push_str(&format!(
            "{what}: loss on held-out rows {:.4} a token ({:.3} bits for each byte of text), {:+.1} % against {probe}",
            all.held_out.nats_per_token,
            all.held_out.bits_per_byte,
            100.0 * all.gap
        ));
        if let Some(base) = stage.base.as_ref().and_then(|base| base.first()) {
            text.push_str(&format!(
                "; before training {:.4}",
                base.held_out.nats_per_token
            ));
        }
        if let Some(all) = stage.sides.first() {
            for (name, loss) in [
                ("whole missions held out (val-strict)", all.val_strict),
                ("scenes held out in one language (probe-x)", all.probe_x),
            ] {
                if let Some(loss) = loss {
                    text.push_str(&format!("; {name} {:.3} bits", loss.bits_per_byte));
                }
            }
            if let Some(transfer) = all.transfer {
                text.push_str(&format!(
                    "; the other languages' translations save {transfer:+.3} bits"
                ));
            }
        }
        text.push('\n');
        for baseline in &stage.baselines {
            text.push_str(&format!(
                "  for comparison, counting alone ({}): {:.3} bits\n",
                baseline.name, baseline.bits_per_byte
            ));
        }
    }
    if report.red_flag {
        let by_heart = |stage: &StageReport| {
            let is_flagged = stage.gaps.first().is_some_and(|all| all.red_flag);
            is_flagged && stage.probe_not_recorded.is_empty()
        };
        let flag = match report.stages.iter().any(by_heart) {
            true => {
                "RED FLAG: the model knows what it was trained on more than 10 % better than what was held out; it learns by heart. Train fewer epochs, or take an earlier checkpoint\n"
            }
            false => {
                "RED FLAG: the model knows the split's train side more than 10 % better than what was held out; if it was trained on that, it learns by heart\n"
            }
        };
        text.push_str(flag);
    }
    text.push_str(&out.join("report.html").display().to_string());
    text
}

#[cfg(test)]
mod tests {
    use eval::metric::loss_gap::Loss;

    use super::*;

    #[test]
    fn report_gets_a_folder_of_its_own_beside_the_model() {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("model");
        std::fs::create_dir(&model).unwrap();
        let first = new_folder(&model).unwrap();
        assert_eq!(first, dir.path().join("model-eval"));
        // An empty one is what a failure left.
        assert_eq!(new_folder(&model).unwrap(), first);
        std::fs::write(first.join("report.json"), "{}").unwrap();
        assert_eq!(new_folder(&model).unwrap(), dir.path().join("model-eval-2"));
        let nowhere = dir.path().join("report.json/model");
        std::fs::write(dir.path().join("report.json"), "").unwrap();
        let error = new_folder(&nowhere).unwrap_err().to_string();
        assert!(error.contains("--out"), "{error}");
    }

    #[test]
    fn model_of_unknown_training_is_not_said_to_learn_by_heart() {
        let loss = |nats_per_token| Loss {
            tokens: 10,
            nats_per_token,
            ..Loss::default()
        };
        let gap = Gap {
            language: "all".to_owned(),
            train_probe: loss(2.0),
            held_out: loss(2.4),
            gap: 0.2,
            gap_low: 0.1,
            gap_high: 0.3,
            red_flag: true,
        };
        let said = |probe_not_recorded: &[&str]| {
            let stage = StageReport {
                stage: "pt",
                probe_not_recorded: probe_not_recorded.iter().map(|&l| l.to_owned()).collect(),
                gaps: vec![gap.clone()],
                base: None,
                gap_over_base: None,
                sides: Vec::new(),
                baselines: Vec::new(),
            };
            let report = Report {
                model: String::new(),
                n_params: 0,
                note: String::new(),
                version: String::new(),
                split_sha256: String::new(),
                stages: vec![stage],
                replies: Vec::new(),
                known_words: None,
                red_flag: true,
            };
            describe(&report, Path::new("out"))
        };
        let text = said(&[]);
        assert!(
            text.contains("+20.0 % against rows it was trained on\n"),
            "{text}"
        );
        assert!(text.contains("; it learns by heart."), "{text}");
        let text = said(&["en", "chs"]);
        assert!(
            text.contains("rows of the split's train side") && text.contains("in en, chs)"),
            "{text}"
        );
        assert!(
            text.contains("RED FLAG") && text.contains("if it was trained on that"),
            "{text}"
        );
    }
}
