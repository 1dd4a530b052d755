//! `cyrene eval`: the losses of a model on both sides of a split, what counting models reach on the same rows, and replies to held-out turns.

use std::path::Path;

use anyhow::{Context, Result};
use eval::metric::loss_gap::Gap;
use eval::report::Report;
use eval::{Evaluation, Progress, TrainedRows};
use model::Model;
use text::Persona;

use crate::cli::Eval;
use crate::ui::{Bar, Ui, of_eval};
use crate::{load, speak};

pub fn run(args: &Eval, ui: &Ui) -> Result<()> {
    let model = load::model(&args.model)?;
    let out = args
        .out
        .clone()
        .unwrap_or_else(|| args.model.model.with_file_name("eval"));
    let base = args
        .base
        .as_deref()
        .map(|dir| {
            let base = Model::load(dir, load::dtype(args.model.dtype))
                .with_context(|| format!("loading {}", dir.display()))?;
            Ok::<_, anyhow::Error>(base.to_device(model.device())?)
        })
        .transpose()?;
    let trained = args.model.adapter.as_ref().unwrap_or(&args.model.model);
    let report = evaluate(
        &Asked {
            folder: &args.model.model,
            adapter: args.model.adapter.as_deref(),
            trained: of_eval(TrainedRows::read(trained))?,
            split: &args.split,
            out: &out,
            n_replies: args.replies,
            seed: args.seed,
            profile: args.profile.as_deref(),
            persona: load::persona(&args.model.model, args.model.adapter.as_deref(), None)?,
        },
        model,
        base,
        ui,
    )?;
    ui.result(&report, || describe(&report, &out))
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
    /// Who speaks.
    pub persona: Persona,
}

/// Evaluates and writes `report.json`, `report.html`, `eval/replies.jsonl`.
///
/// # Errors
/// Missing data sets or split, rows that do not fit, a model that fails.
pub fn evaluate(asked: &Asked<'_>, model: Model, base: Option<Model>, ui: &Ui) -> Result<Report> {
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
    };
    let mut bars = Bars { ui, bar: None };
    let report = of_eval(eval::evaluate(&evaluation, model, base, &mut bars))?;
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
        text.push_str(&format!(
            "{}: held-out {:.4} nats a token, {:.3} bits a byte; gap {:+.1} %",
            stage.stage,
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
        for baseline in &stage.baselines {
            text.push_str(&format!(
                "; {} {:.3} bits a byte",
                baseline.name, baseline.bits_per_byte
            ));
        }
        if let Some(all) = stage.sides.first() {
            for (name, loss) in [("val-strict", all.val_strict), ("probe-x", all.probe_x)] {
                if let Some(loss) = loss {
                    text.push_str(&format!("; {name} {:.3} bits a byte", loss.bits_per_byte));
                }
            }
            if let Some(transfer) = all.transfer {
                text.push_str(&format!("; X {transfer:+.3}"));
            }
        }
        text.push('\n');
    }
    if report.red_flag {
        text.push_str("RED FLAG: the gap is above 10 %\n");
    }
    text.push_str(&out.join("report.html").display().to_string());
    text
}
