//! What the user sees: results on stdout, progress and logs on stderr, errors with their chain of causes.

use std::fmt::Display;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use report::harmless::{harmless, harmless_json};
use serde::Serialize;

use crate::env;

/// The command line or a file the user wrote asks for something that cannot be: exit code 2.
#[derive(Debug)]
pub struct Misuse(pub String);

impl Display for Misuse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Misuse {}

/// `Err(Misuse)` with a formatted text.
#[macro_export]
macro_rules! misuse {
    ($($arg:tt)*) => { return Err(anyhow::Error::new($crate::ui::Misuse(format!($($arg)*)))) };
}

/// What `corpus` reports: misuse where rows that the user named are at fault, else a failure.
///
/// # Errors
/// What it is given.
pub fn of_rows<T>(result: corpus::Result<T>) -> anyhow::Result<T> {
    result.map_err(|error| match error.is_of_rows() {
        true => anyhow::Error::new(Misuse(error.to_string())),
        false => error.into(),
    })
}

/// What `eval` reports: misuse where what the user named is at fault, else a failure.
///
/// # Errors
/// What it is given.
pub fn of_eval<T>(result: eval::Result<T>) -> anyhow::Result<T> {
    result.map_err(|error| match error.is_misuse() {
        true => anyhow::Error::new(Misuse(error.to_string())),
        false => error.into(),
    })
}

/// A library's error that the user's own words led to, as a [`Misuse`].
///
/// # Errors
/// That one.
pub fn misused<T, E: Display>(result: Result<T, E>) -> anyhow::Result<T> {
    result.map_err(|error| anyhow::Error::new(Misuse(error.to_string())))
}

/// Where output goes.
#[derive(Debug, Clone, Copy)]
pub struct Ui {
    json: bool,
}

impl Ui {
    /// JSON on stdout, or text for people.
    pub fn new(json: bool) -> Self {
        Ui { json }
    }

    /// Whether the user asked for JSON on stdout.
    pub fn json(&self) -> bool {
        self.json
    }

    /// A command's result: `value` as one JSON document, or `text` for people.
    ///
    /// # Errors
    /// A closed or full stdout.
    pub fn result<T: Serialize>(
        &self,
        value: &T,
        text: impl FnOnce() -> String,
    ) -> anyhow::Result<()> {
        if self.json {
            self.json_line(value)
        } else {
            let text = text();
            if text.is_empty() {
                Ok(())
            } else {
                self.line(&text)
            }
        }
    }

    /// One line on stdout, flushed. What in it would act on a terminal is spelt out.
    ///
    /// # Errors
    /// A closed or full stdout.
    pub fn line(&self, text: &str) -> anyhow::Result<()> {
        self.painted(&harmless(text))
    }

    /// One line of JSON on stdout, flushed.
    ///
    /// # Errors
    /// A closed or full stdout.
    pub fn json_line<T: Serialize>(&self, value: &T) -> anyhow::Result<()> {
        self.painted(&harmless_json(&serde_json::to_string(value)?))
    }

    /// As [`Ui::line`], of a text with colours of our own: what others wrote in it is harmless already.
    ///
    /// # Errors
    /// A closed or full stdout.
    pub fn painted(&self, text: &str) -> anyhow::Result<()> {
        let mut out = std::io::stdout().lock();
        writeln!(out, "{text}")?;
        out.flush()?;
        Ok(())
    }

    /// Text on stdout without a line end, flushed: a reply as it comes.
    ///
    /// # Errors
    /// A closed or full stdout.
    pub fn text(&self, text: &str) -> anyhow::Result<()> {
        let mut out = std::io::stdout().lock();
        write!(out, "{}", harmless(text))?;
        out.flush()?;
        Ok(())
    }

    /// A line of news on stderr. What in it would act on a terminal is spelt out.
    pub fn note(&self, text: impl Display) {
        say(&harmless(&text.to_string()));
    }

    /// An error and its causes on stderr; with `--json`, one JSON object.
    pub fn error(&self, error: &anyhow::Error) {
        let causes = causes(error);
        if self.json {
            let error = serde_json::json!({ "error": causes.join(": ") });
            say(&harmless_json(&error.to_string()));
            return;
        }
        self.note(format_args!("error: {}", causes[0]));
        for cause in &causes[1..] {
            self.note(format_args!("  because {cause}"));
        }
    }

    /// A progress bar with an ETA; on a stderr that is no terminal, a line every ten seconds.
    pub fn bar(&self, label: &str, total: u64) -> Bar {
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
        let style =
            ProgressStyle::with_template("{prefix:>10} {bar:32} {percent:>3}% {pos}/{len} {msg}");
        bar.set_style(
            style
                .unwrap_or_else(|_| ProgressStyle::default_bar())
                .progress_chars("█▌·"),
        );
        bar.set_prefix(label.to_owned());
        Bar {
            bar,
            label: label.to_owned(),
            total,
            plain: !std::io::stderr().is_terminal(),
            first: None,
            said: Instant::now(),
        }
    }
}

/// A line on stderr.
fn say(line: &str) {
    // A lost note must not end a long job.
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// An error's texts from the outside in, each once: many texts hold that of their cause already.
fn causes(error: &anyhow::Error) -> Vec<String> {
    let mut causes: Vec<String> = Vec::new();
    for cause in error.chain().map(ToString::to_string) {
        if !causes.iter().any(|said| said.contains(&cause)) {
            causes.push(cause);
        }
    }
    causes
}

/// A running progress bar.
pub struct Bar {
    bar: ProgressBar,
    label: String,
    total: u64,
    plain: bool,
    /// The first position seen, and when: what was done before, by an earlier start, says nothing of the speed.
    first: Option<(u64, Instant)>,
    said: Instant,
}

impl Bar {
    /// Moves to `position`; the time left follows from the positions since the first one.
    pub fn set(&mut self, position: u64, message: &str) {
        let (first, since) = *self.first.get_or_insert((position, Instant::now()));
        let left = time_left(since.elapsed(), first, position, self.total);
        self.draw(position, message, left);
    }

    /// As `set`, for a caller who knows the remaining time better (validation counted in).
    pub fn set_with_eta(&mut self, position: u64, message: &str, left: Duration) {
        self.draw(position, message, Some(left));
    }

    fn draw(&mut self, position: u64, message: &str, left: Option<Duration>) {
        let eta = left.map_or(String::new(), |left| format!(" · {} left", clock(left)));
        if !self.plain {
            self.bar.set_position(position);
            self.bar.set_message(format!("{message}{eta}"));
            return;
        }
        if self.said.elapsed() >= Duration::from_secs(10) {
            self.said = Instant::now();
            let line = format!("{} {position}/{} {message}{eta}", self.label, self.total);
            say(&harmless(&line));
        }
    }

    /// Takes the bar away.
    pub fn finish(self) {
        self.bar.finish_and_clear();
    }
}

/// Time from `position` to `total` at the speed since `first`; None before there is one.
fn time_left(elapsed: Duration, first: u64, position: u64, total: u64) -> Option<Duration> {
    let done = position.saturating_sub(first);
    let left = total.saturating_sub(position);
    (done > 0).then(|| elapsed.mul_f64(left as f64 / done as f64))
}

/// `1:02:03` or `2:03`.
pub fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds / 3600 {
        0 => format!("{}:{:02}", seconds / 60, seconds % 60),
        hours => format!("{hours}:{:02}:{:02}", seconds / 60 % 60, seconds % 60),
    }
}

/// Seconds as a clock shows them; `no end` for what no clock can show: negative, infinite or no number.
pub fn clock_of(seconds: f64) -> String {
    Duration::try_from_secs_f64(seconds).map_or_else(|_| "no end".to_owned(), clock)
}

/// `1.4 GiB`, `320 MiB`, `12 KiB`: the unit of `--memory`, everywhere.
pub fn size(bytes: u64) -> String {
    const KIB: f64 = 1024.0;
    let bytes = bytes as f64;
    match bytes {
        b if b >= KIB.powi(3) => format!("{:.1} GiB", b / KIB.powi(3)),
        b if b >= KIB.powi(2) => format!("{:.0} MiB", b / KIB.powi(2)),
        b => format!("{:.0} KiB", b / KIB),
    }
}

/// Sends the libraries' logs to stderr.
pub fn init_logs(verbose: bool) {
    let filter = env::get(env::CYRENE_LOG)
        .unwrap_or_else(|| if verbose { "debug" } else { "warn" }.to_owned());
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(filter))
        .with_writer(std::io::stderr)
        .without_time()
        .init();
}

/// Whether the reader of stdout has gone: not worth a message.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
        .any(|cause| cause.kind() == std::io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A download that goes on at nine tenths: the last tenth takes as long as this process's speed says.
    #[test]
    fn time_left_counts_only_what_this_process_did() {
        let second = Duration::from_secs(1);
        assert_eq!(time_left(second, 900, 900, 1000), None);
        assert_eq!(time_left(second, 900, 910, 1000), Some(9 * second));
        assert_eq!(time_left(second, 0, 500, 1000), Some(second));
        assert_eq!(time_left(second, 900, 1000, 1000), Some(Duration::ZERO));
    }

    #[test]
    fn cause_that_an_error_names_itself_is_said_once() {
        let path = std::path::PathBuf::from("story.jsonl");
        let source = std::io::Error::other("Is a directory");
        let error = anyhow::Error::new(corpus::Error::Read { path, source });
        let causes = causes(&error.context("stage corpus"));
        assert_eq!(causes.len(), 2, "{causes:?}");
        assert!(causes[1].contains("Is a directory"));
    }

    #[test]
    fn sizes_are_in_the_unit_of_memory() {
        for (bytes, text) in [
            (30 << 30, "30.0 GiB"),
            (3 << 29, "1.5 GiB"),
            (320 << 20, "320 MiB"),
            (12 << 10, "12 KiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }
}
