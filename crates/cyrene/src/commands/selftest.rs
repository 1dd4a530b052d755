//! `cyrene selftest`: every GPU primitive against the CPU on the user's own card, pass or fail.

use anyhow::{Result, bail};
use kernel::selftest::{self, Outcome};
use kernel::{Device, cuda};
use serde_json::json;

use crate::cli::Selftest as Args;
use crate::ui::Ui;
use crate::{load, misuse};

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
pub fn run(args: &Args, ui: &Ui) -> Result<()> {
    let Device::Cuda(card) = load::device(&args.device.device)? else {
        misuse!(
            "selftest compares a GPU with the CPU: {}; the CPU's own tests are `cargo test`",
            match cuda::device_count() {
                0 => "no GPU was found",
                _ => "name one with --device cuda",
            }
        );
    };
    ui.note(format_args!(
        "{} · compute capability {}.{}",
        card.name(),
        card.compute() / 10,
        card.compute() % 10
    ));
    let mut lost = false;
    let outcomes = selftest::run(card, |outcome| {
        lost |= ui.json() && ui.line(&line(outcome)).is_err();
        if !ui.json() {
            lost |= ui.line(&describe(outcome)).is_err();
        }
    });
    if lost {
        bail!("stdout is closed");
    }
    let failed: Vec<&str> = outcomes
        .iter()
        .filter(|outcome| !outcome.passed())
        .map(|outcome| outcome.primitive)
        .collect();
    if failed.is_empty() {
        ui.note(format_args!(
            "all {} primitives agree with the CPU",
            outcomes.len()
        ));
        return Ok(());
    }
    bail!(
        "{} of {} primitives disagree with the CPU: {}; do not train on this card with this build, use --device cpu, and report the lines above",
        failed.len(),
        outcomes.len(),
        failed.join(", ")
    )
}

fn line(outcome: &Outcome) -> String {
    json!({
        "primitive": outcome.primitive,
        "pass": outcome.passed(),
        "seconds": outcome.took.as_secs_f64(),
        "error": outcome.error.as_ref().map(ToString::to_string),
        "comparisons": outcome.comparisons.iter().map(|c| json!({
            "what": c.what,
            "relative_error": c.error,
            "tolerance": c.tolerance,
            "repeatable": c.repeatable,
            "pass": c.passed(),
        })).collect::<Vec<_>>(),
    })
    .to_string()
}

fn describe(outcome: &Outcome) -> String {
    let verdict = if outcome.passed() { "pass" } else { "FAIL" };
    let worst = outcome
        .comparisons
        .iter()
        .map(|c| c.error / c.tolerance.max(f64::MIN_POSITIVE))
        .fold(
            0.0,
            |worst, x| if x.is_nan() || x > worst { x } else { worst },
        );
    let mut text = format!(
        "{verdict}  {:<24} {:>3} comparisons, worst at {:.2} of its tolerance, {:.1} s",
        outcome.primitive,
        outcome.comparisons.len(),
        worst,
        outcome.took.as_secs_f64()
    );
    if let Some(error) = &outcome.error {
        text.push_str(&format!("\n      {error}"));
    }
    for c in outcome.comparisons.iter().filter(|c| !c.passed()) {
        let repeat = if c.repeatable {
            ""
        } else {
            ", and a second run gave other bytes"
        };
        text.push_str(&format!(
            "\n      {}: relative error {:.2e}, tolerance {:.0e}{repeat}",
            c.what, c.error, c.tolerance
        ));
    }
    text
}
