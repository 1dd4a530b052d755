//! A small histogram for each series, all with the same axes, the vertical one logarithmic: the tails that stacks hide.

use super::axis::{decades, log_share, short};
use super::canvas::{Anchor, Canvas, fit, width};
use super::{Figure, Series, WIDTH, colour};

const LEFT: f64 = 34.0;
const GAP: f64 = 10.0;
const PLOT: f64 = 62.0;
const HEAD: f64 = 18.0;
const N_COLUMNS: usize = 3;

/// As [`super::columns`], but a panel for each series.
pub fn panels(name: &str, title: &str, edges: &[String], unit: &str, series: &[Series]) -> Figure {
    let mut canvas = Canvas::default();
    let most = series
        .iter()
        .flat_map(|s| &s.values)
        .copied()
        .max()
        .unwrap_or(0);
    let n_bins = edges.len().saturating_sub(1);
    let panel = (WIDTH - LEFT - 8.0 - GAP * (N_COLUMNS - 1) as f64) / N_COLUMNS as f64;
    let step = panel / n_bins.max(1) as f64;
    let widest = edges.iter().map(|edge| width(edge)).fold(0.0, f64::max) + 8.0;
    let every = (widest / step).ceil().max(1.0) as usize;
    // A panel's names end where its columns end: the next panel's begin there.
    let n_named = (panel / step - widest / step / 2.0).max(0.0) as usize;
    let mut bottom = 0.0;
    for (idx, one) in series.iter().enumerate() {
        let left = LEFT + (panel + GAP) * (idx % N_COLUMNS) as f64;
        let top = 4.0 + HEAD + (PLOT + HEAD + 6.0) * (idx / N_COLUMNS) as f64;
        let base = top + PLOT;
        // 1. the name, the grid
        let n_rows: u64 = one.values.iter().sum();
        let count = format!("{} rows", short(n_rows));
        canvas.text("soft", Anchor::End, left + panel, top - 5.0, &count);
        canvas.text(
            "",
            Anchor::Start,
            left,
            top - 5.0,
            &fit(&one.name, panel - width(&count) - 6.0),
        );
        for tick in decades(most) {
            let y = base - PLOT * log_share(tick, most);
            canvas.line("axis", (left, y), (left + panel, y));
            if idx % N_COLUMNS == 0 {
                canvas.text("soft", Anchor::End, LEFT - 5.0, y + 4.0, &short(tick));
            }
        }
        canvas.line("axis", (left, base), (left + panel, base));
        // 2. the columns
        for (at, n) in one.values.iter().enumerate().filter(|(_, n)| **n > 0) {
            let height = PLOT * log_share(*n, most);
            let tip = format!(
                "{}: {n} rows of {} to {} {unit}",
                one.name,
                edges[at],
                edges[at + 1]
            );
            canvas.rect(
                &colour(idx),
                left + step * at as f64,
                base - height,
                step,
                height,
                &tip,
            );
        }
        // 3. the borders' names under the lowest panels
        if idx + N_COLUMNS >= series.len() {
            for (at, edge) in edges.iter().enumerate().step_by(every) {
                let anchor = match at {
                    0 => Anchor::Start,
                    _ if at > n_named => Anchor::End,
                    _ => Anchor::Middle,
                };
                canvas.text("soft", anchor, left + step * at as f64, base + 14.0, edge);
            }
        }
        bottom = f64::max(bottom, base);
    }
    canvas.text(
        "soft",
        Anchor::End,
        WIDTH - 8.0,
        bottom + 31.0,
        &format!("across: {unit} a row; up: rows; both logarithmic"),
    );
    let description = format!(
        "{} small histograms with logarithmic axes of at most {most} rows a column; the table has the numbers.",
        series.len()
    );
    canvas.finish(name, title, description, bottom + 38.0)
}
