//! Horizontal bars, one or several parts each, with the value written out beside every bar.

use super::canvas::{Anchor, Canvas, fit, width};
use super::{Figure, WIDTH, kind_colour};

const ROW: f64 = 20.0;
const BAR: f64 = 14.0;
/// Labels wider than this stand above their bars.
const LABEL: f64 = 120.0;

/// A bar: the parts in the order of the names, and what is written at its end.
#[derive(Debug, Clone, PartialEq)]
pub struct Bar {
    /// What stands before or above it.
    pub label: String,
    /// Lengths of its parts.
    pub values: Vec<f64>,
    /// What stands behind it.
    pub note: String,
}

/// Bars from the top down. With more than one name there is a legend; a bar beyond the line that `limit` draws is red. `unit` says what
/// the lengths and the numbers count.
pub fn bars(
    name: &str,
    title: &str,
    names: &[String],
    rows: &[Bar],
    limit: Option<f64>,
    unit: &str,
) -> Figure {
    let mut canvas = Canvas::default();
    let length = |bar: &Bar| bar.values.iter().sum::<f64>();
    let longest = rows
        .iter()
        .map(length)
        .chain(limit)
        .fold(f64::EPSILON, f64::max);
    let label = rows.iter().map(|bar| width(&bar.label)).fold(0.0, f64::max);
    let is_above = label > LABEL;
    let left = if is_above { 8.0 } else { 16.0 + label };
    let note = rows
        .iter()
        .map(|bar| width(&bar.note))
        .fold(0.0, f64::max)
        .min(150.0);
    let right = WIDTH - note - 14.0;
    let row = if is_above { ROW + 15.0 } else { ROW };
    let top = if limit.is_some() { 20.0 } else { 6.0 };
    for (at, bar) in rows.iter().enumerate() {
        let mut y = top + row * at as f64;
        if is_above {
            canvas.text(
                "",
                Anchor::Start,
                left,
                y + 11.0,
                &fit(&bar.label, WIDTH - 16.0),
            );
            y += 15.0;
        } else {
            canvas.text("", Anchor::End, left - 8.0, y + 11.0, &bar.label);
        }
        let is_over = limit.is_some_and(|limit| length(bar) > limit);
        let mut x = left;
        for (idx, value) in bar
            .values
            .iter()
            .enumerate()
            .filter(|(_, value)| **value > 0.0)
        {
            let part = (right - left) * value / longest;
            let series = names.get(idx).map_or("", String::as_str);
            let tip = [&bar.label, series, &bar.note].map(str::trim).join(" ");
            let class = match names.len() {
                0 | 1 if is_over => "over".to_owned(),
                0 | 1 => "lone".to_owned(),
                _ => kind_colour(idx),
            };
            canvas.rect(&class, x, y, part, BAR, &tip);
            x += part;
        }
        let note = fit(&bar.note, 150.0);
        match limit {
            // The line must not run through the notes.
            Some(_) => canvas.text("soft", Anchor::End, WIDTH - 8.0, y + 11.0, &note),
            None => canvas.text("soft", Anchor::Start, x + 6.0, y + 11.0, &note),
        }
    }
    let bottom = top + row * rows.len() as f64;
    if let Some(limit) = limit {
        let x = left + (right - left) * limit / longest;
        canvas.line("limit", (x, top - 4.0), (x, bottom));
        canvas.text("soft", Anchor::Middle, x, 11.0, &format!("{limit}"));
    }
    canvas.text("soft", Anchor::End, WIDTH - 8.0, bottom + 12.0, unit);
    let mut height = bottom + 18.0;
    if names.len() > 1 {
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        height += canvas.legend(&names, kind_colour, height);
    }
    let listed: Vec<String> = rows
        .iter()
        .map(|bar| format!("{}: {}", bar.label, bar.note))
        .collect();
    let description = format!("Bars, {unit}. {}.", listed.join("; "));
    canvas.finish(name, title, description, height)
}
