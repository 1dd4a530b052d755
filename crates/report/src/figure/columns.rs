//! A histogram with the series stacked in each column.

use super::axis::{linear, short};
use super::canvas::{Anchor, Canvas, width};
use super::{Figure, Series, WIDTH, colour};

const LEFT: f64 = 44.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 26.0;
const PLOT: f64 = 220.0;

/// Stacked columns: `edges` are the columns' borders, one more than there are values. The first series is at the bottom;
/// an axis of powers of two is a logarithmic one. `unit` names what the edges count; the values are rows.
pub fn columns(name: &str, title: &str, edges: &[String], unit: &str, series: &[Series]) -> Figure {
    let mut canvas = Canvas::default();
    let n_columns = edges.len().saturating_sub(1);
    let value = |series: &Series, at: usize| series.values.get(at).copied().unwrap_or(0);
    let sums: Vec<u64> = (0..n_columns)
        .map(|at| series.iter().map(|s| value(s, at)).sum())
        .collect();
    let ticks = linear(sums.iter().copied().max().unwrap_or(0));
    let top = ticks[ticks.len() - 1].max(1) as f64;
    let y_of = |n: f64| TOP + PLOT * (1.0 - n / top);
    let step = (WIDTH - LEFT - RIGHT) / n_columns.max(1) as f64;

    // 1. the grid
    for tick in &ticks {
        let y = y_of(*tick as f64);
        canvas.line("axis", (LEFT, y), (WIDTH - RIGHT, y));
        canvas.text("soft", Anchor::End, LEFT - 6.0, y + 4.0, &short(*tick));
    }
    canvas.text("soft", Anchor::End, LEFT - 6.0, 12.0, "rows");

    // 2. the columns, with a name in each part that has room for it
    for (at, sum) in sums.iter().enumerate() {
        let x = LEFT + step * at as f64;
        let mut below = 0.0;
        for (idx, one) in series.iter().enumerate() {
            let n = value(one, at);
            if n == 0 {
                continue;
            }
            let (from, to) = (y_of(below), y_of(below + n as f64));
            let share = 100.0 * n as f64 / *sum as f64;
            let tip = format!(
                "{}: {n} rows of {} to {} {unit} ({share:.0} %)",
                one.name,
                edges[at],
                edges[at + 1]
            );
            canvas.rect(&colour(idx), x + 0.8, to, step - 1.6, from - to, &tip);
            if from - to >= 10.0 && step - 4.0 >= 0.8 * width(&one.name) {
                let class = if idx % 2 == 0 { "on-dark" } else { "on-light" };
                canvas.text(
                    class,
                    Anchor::Middle,
                    x + step / 2.0,
                    (from + to) / 2.0 + 3.4,
                    &one.name,
                );
            }
            below += n as f64;
        }
    }

    // 3. the borders' names, as many as fit
    let widest = edges.iter().map(|edge| width(edge)).fold(0.0, f64::max) + 6.0;
    let every = (widest / step).ceil().max(1.0) as usize;
    for (at, edge) in edges.iter().enumerate().step_by(every) {
        let x = LEFT + step * at as f64;
        canvas.line("axis", (x, TOP + PLOT), (x, TOP + PLOT + 4.0));
        canvas.text("soft", Anchor::Middle, x, TOP + PLOT + 16.0, edge);
    }
    canvas.text(
        "soft",
        Anchor::End,
        WIDTH - RIGHT,
        TOP + PLOT + 31.0,
        &format!("{unit} a row, logarithmic"),
    );
    canvas.text(
        "soft",
        Anchor::Start,
        8.0,
        TOP + PLOT + 31.0,
        "from the bottom up:",
    );
    let names: Vec<&str> = series.iter().map(|s| s.name.as_str()).collect();
    let height = TOP + PLOT + 36.0;
    let height = height + canvas.legend(&names, colour, height);

    let fullest = sums
        .iter()
        .enumerate()
        .max_by_key(|(at, sum)| (**sum, std::cmp::Reverse(*at)));
    let description = match fullest {
        Some((at, sum)) => format!(
            "Stacked columns of {} rows in {} series; most, {sum}, have {} to {} {unit}. The table has the numbers.",
            sums.iter().sum::<u64>(),
            series.len(),
            edges[at],
            edges[at + 1]
        ),
        None => "There are no rows.".to_owned(),
    };
    canvas.finish(name, title, description, height)
}
