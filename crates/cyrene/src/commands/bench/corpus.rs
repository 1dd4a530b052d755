//! `cyrene bench corpus`: what `corpus build` does with a story, into a folder that is removed again.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kernel::PeakMemory;
use serde::Serialize;
use text::{ChatTemplate, Tokenizer};

use crate::cli::{BenchCorpus, CorpusBuild};
use crate::ui::{Ui, size};
use crate::{corpus_request, demo, misuse};

/// Tokens learned from the bundled story.
const DEMO_VOCABULARY: usize = 2048;

/// One case, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Line {
    bench: &'static str,
    source: String,
    tasks: Vec<String>,
    threads: usize,
    runs: usize,
    /// The fastest run, from the first file opened to the last one named.
    seconds: f64,
    /// Sentences as the rows show them.
    lines: u64,
    tokens: u64,
    lines_per_s: f64,
    tokens_per_s: f64,
    /// Most main memory of the process up to the end of the first run; what a run leaves behind is no part of the next.
    peak_bytes: u64,
    stages_s: Stages,
    peer_seconds: Option<f64>,
    /// How many times faster than the peer.
    times_peer: Option<f64>,
}

/// Seconds by stage in a run of its own, where every count is timed; added up over threads.
#[derive(Debug, Serialize)]
struct Stages {
    load_tokenizer: f64,
    read_tables: f64,
    read_maps: f64,
    rules: f64,
    count: f64,
    write: f64,
    publish: f64,
}

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
pub fn run(args: BenchCorpus, ui: &Ui) -> Result<()> {
    if args.runs == 0 || args.peer_seconds.is_some_and(|s| s.is_nan() || s <= 0.0) {
        misuse!("--runs and --peer-seconds must be above 0");
    }
    let folder = tempfile::tempdir().context("making a folder for what is built")?;
    let (runs, peer_seconds) = (args.runs, args.peer_seconds);
    let args = build_args(args, folder.path())?;
    let (character, plan) = corpus_request::plan(&args)?;
    let request = plan.request(&character);

    // 1. as `corpus build` does it
    let peak = PeakMemory::watch();
    let mut seconds = f64::INFINITY;
    let mut peak_bytes = None;
    for run in 1..=runs {
        let start = Instant::now();
        corpus::build_counting(&request, || corpus_request::tokenizers(&args), &|_| {})?;
        let took = start.elapsed().as_secs_f64();
        ui.note(format_args!("run {run}: {took:.3} s"));
        seconds = seconds.min(took);
        peak_bytes.get_or_insert_with(|| peak.bytes());
    }

    // 2. once more, stage by stage
    let start = Instant::now();
    let tokenizers = corpus_request::tokenizers(&args)?;
    let load_tokenizer = start.elapsed();
    let (report, counting) = corpus::build_timing_counts(&request, &tokenizers)?;
    let lines = counting.n_texts;
    let times = report.times;
    let s = |duration: Duration| duration.as_secs_f64();
    let tokens = report.n_tokens();
    let line = Line {
        bench: "corpus",
        source: args.source.clone(),
        tasks: plan.tasks.iter().map(ToString::to_string).collect(),
        threads: rayon::current_num_threads(),
        runs,
        seconds,
        lines,
        tokens,
        lines_per_s: lines as f64 / seconds,
        tokens_per_s: tokens as f64 / seconds,
        peak_bytes: peak_bytes.unwrap_or_default(),
        stages_s: Stages {
            load_tokenizer: s(load_tokenizer),
            read_tables: s(times.tables),
            read_maps: s(times.maps),
            rules: s(times.rows.saturating_sub(times.write + counting.time)),
            count: s(counting.time),
            write: s(times.write),
            publish: s(times.publish),
        },
        peer_seconds,
        times_peer: peer_seconds.map(|peer| peer / seconds),
    };
    ui.result(&line, || line.text())
}

impl Line {
    fn text(&self) -> String {
        let s = &self.stages_s;
        let stages = [
            ("load tokenizer", s.load_tokenizer),
            ("read tables", s.read_tables),
            ("read maps", s.read_maps),
            ("rules", s.rules),
            ("count tokens", s.count),
            ("write", s.write),
            ("publish", s.publish),
        ];
        let sum: f64 = stages.iter().map(|(_, seconds)| seconds).sum();
        let mut text = format!(
            "{}: {} lines, {} tokens in {:.3} s on {} threads: {:.0} lines/s, {:.0} tokens/s, peak {}",
            self.tasks.join(" "),
            self.lines,
            self.tokens,
            self.seconds,
            self.threads,
            self.lines_per_s,
            self.tokens_per_s,
            size(self.peak_bytes)
        );
        if let Some(times) = self.times_peer {
            text += &format!(", {times:.1} times the peer's speed");
        }
        for (name, seconds) in stages {
            text += &format!(
                "\n{name:>16} {seconds:8.3} s {:4.0} %",
                100.0 * seconds / sum
            );
        }
        text
    }
}

/// The arguments of the build; without a story, those of the bundled one, laid into `folder`.
fn build_args(args: BenchCorpus, folder: &Path) -> Result<CorpusBuild> {
    let (root, character, tokenizer) = match (args.root, args.character, args.tokenizer) {
        (Some(root), Some(character), Some(tokenizer)) => (root, character, tokenizer),
        _ => {
            let write = |name: &str, text: &str| {
                let path = folder.join(name);
                std::fs::write(&path, text)
                    .with_context(|| format!("writing {}", path.display()))?;
                anyhow::Ok(path)
            };
            let root = write("story.jsonl", demo::STORY)?;
            let character = write("character.toml", demo::CHARACTER)?;
            let tokenizer = folder.join("tokenizer");
            Tokenizer::train(demo::STORY.lines(), DEMO_VOCABULARY)?
                .save(&tokenizer, &ChatTemplate::history_stable()?)?;
            (root, character, tokenizer)
        }
    };
    Ok(CorpusBuild {
        source: args.source,
        root,
        character,
        tasks: args.tasks,
        tokenizer,
        out: folder.join("corpora"),
        languages: args.languages,
        count_with: args.count_with,
    })
}
