//! `cyrene corpus peek`: a random sample as training sees it: who speaks, what carries loss, where a turn ends.

use std::collections::BTreeSet;
use std::io::IsTerminal;

use anyhow::Result;
use corpus::examples::{self, SampleRequest, SampledExample};
use corpus::pages::peek::{self as pages, Shown};
use corpus::pages::peek_text::{Style, legend, paint, painted};
use corpus::peek::{Span, spans};
use corpus::split::Split;
use corpus::{Language, RowNotes};
use report::harmless::harmless;
use text::Tokenizer;

use super::encode::encoding;
use crate::cli::CorpusPeek as Args;
use crate::ui::{Ui, misused, of_rows};
use crate::{env, misuse};

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
pub fn run(args: &Args, ui: &Ui) -> Result<()> {
    let tokenizer = Tokenizer::load(&args.tokenizer)?;
    let language = match &args.language {
        None => None,
        Some(name) => misused(Language::parse_all(std::slice::from_ref(name)))?.pop(),
    };
    let datasets = misused(corpus::rows::datasets(&args.path))?;
    if datasets[..] != [args.path.clone()] {
        let names: Vec<String> = datasets
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        misuse!(
            "{} holds several data sets; name one: {}",
            args.path.display(),
            names.join(", ")
        );
    }
    let split = misused(args.split.as_deref().map(Split::load).transpose())?;
    let encoding = encoding(args.stage, args.loss.loss_scale, &tokenizer);
    let sample = of_rows(examples::sample(
        SampleRequest {
            path: &args.path,
            split: split.as_ref(),
            language,
            n_rows: args.rows,
            seed: args.seed,
        },
        encoding,
    ))?;
    if sample.is_empty() {
        misuse!(
            "{} has no row{}",
            args.path.display(),
            language.map_or(String::new(), |l| format!(" in {l}"))
        );
    }
    let mut notes = RowNotes::default();
    for one in &sample {
        notes.add_written(&one.example.written);
    }
    notes.lines().iter().for_each(|line| ui.note(line));
    let style = match !args.no_color
        && env::get(env::NO_COLOR).is_none()
        && std::io::stdout().is_terminal()
    {
        true => Style::Colour,
        false => Style::Brackets,
    };
    let between = if args.tokens { "│" } else { "" };
    let (mut n_tokens, mut n_trained) = (0, 0);
    let mut kinds = BTreeSet::new();
    let mut shown = Vec::new();
    for (at, one) in sample.iter().enumerate() {
        let encoded = &one.example.encoded;
        n_tokens += encoded.input_ids.len();
        n_trained += encoded.n_trained();
        let spans = spans(&tokenizer, encoded, args.tokens);
        kinds.extend(spans.iter().map(|span| span.kind));
        if ui.json() {
            ui.json_line(&json(one, &spans))?;
        } else {
            let title = format!("{}/{} {}: {}", at + 1, sample.len(), place(one), facts(one));
            ui.painted(&format!(
                "{}\n{}\n",
                painted(&harmless(&title), "1", style),
                paint(&spans, style, between)
            ))?;
        }
        if args.html.is_some() {
            shown.push(Shown {
                title: format!("{} row {}", name(one), one.row_number),
                facts: facts(one),
                spans,
            });
        }
    }
    let share = 100.0 * n_trained as f64 / n_tokens.max(1) as f64;
    let rows = if sample.len() == 1 { "row" } else { "rows" };
    let counts = format!(
        "{} {rows}, {n_tokens} tokens, {n_trained} trained ({share:.1} %)",
        sample.len()
    );
    if let Some(path) = &args.html {
        let drawn = format!(
            "{counts}; drawn with seed {} from {}",
            args.seed,
            args.path.display()
        );
        files::write(path, pages::page(&shown, &drawn, args.tokens).as_bytes())?;
    }
    if !ui.json() {
        ui.painted(&format!("{counts}\n{}", legend(&kinds, style)))?;
    }
    Ok(())
}

fn json(one: &SampledExample, spans: &[Span]) -> serde_json::Value {
    serde_json::json!({
        "file": one.path,
        "row": one.row_number,
        "language": one.example.encoded.origin.language,
        "scene": one.example.scene,
        "side": one.side,
        "tokens": one.example.encoded.input_ids.len(),
        "trained": one.example.encoded.n_trained(),
        "input_ids": one.example.encoded.input_ids,
        "labels": one.example.encoded.labels,
        "spans": spans,
    })
}

/// `en.jsonl`: a page that is passed on need not say where it was made.
fn name(one: &SampledExample) -> String {
    let name = one.path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// `corpora/sft/cyrene/en.jsonl row 3`.
fn place(one: &SampledExample) -> String {
    format!("{} row {}", one.path.display(), one.row_number)
}

/// `en, scene harbour/2, side train, 60 tokens, 12 trained`.
fn facts(one: &SampledExample) -> String {
    let mut known = Vec::new();
    known.extend(one.example.encoded.origin.language.clone());
    known.extend(
        one.example
            .scene
            .as_ref()
            .map(|scene| format!("scene {scene}")),
    );
    known.extend(one.side.map(|side| format!("side {}", side.name())));
    known.push(format!("{} tokens", one.example.encoded.input_ids.len()));
    known.push(format!("{} trained", one.example.encoded.n_trained()));
    known.join(", ")
}
