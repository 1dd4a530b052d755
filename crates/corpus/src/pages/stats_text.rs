//! The numbers of a data set for a terminal.

use report::look::thousands;

use crate::stats::{FileStats, Stats};

/// Appends a data set's lines: one for each language, then what else there is to know, and an empty one.
pub fn dataset_lines(stats: &Stats, lines: &mut Vec<String>) {
    let sum = |f: fn(&FileStats) -> u64| thousands(stats.files.iter().map(f).sum());
    lines.push(format!(
        "{}: {} rows, {} tokens, {} scenes",
        stats.task,
        sum(|f| f.n_rows),
        sum(|f| f.n_tokens),
        thousands(stats.n_scenes as u64)
    ));
    table(stats, lines);
    if let Some(training) = stats.training() {
        lines.push(format!(
            "  as training reads them, with system prompt and template: {} tokens, {} of them trained on",
            thousands(training.tokens),
            thousands(training.trained)
        ));
    }
    // What else there is to know, a line each.
    let mut more = |name: &str, values: Vec<String>| {
        if !values.is_empty() {
            lines.push(format!("  {name}: {}", values.join(", ")));
        }
    };
    more(
        "scenes by side",
        stats
            .sides
            .iter()
            .map(|(side, n)| format!("{side} {}", thousands(*n)))
            .collect(),
    );
    let sides = stats.tallies_by_side();
    more(
        "rows by side",
        sides
            .iter()
            .map(|(side, tally)| {
                format!(
                    "{side} {} ({} tokens)",
                    thousands(tally.rows),
                    thousands(tally.tokens)
                )
            })
            .collect(),
    );
    more(
        "holes",
        stats
            .holes()
            .iter()
            .map(|(what, n)| format!("{what} {}", thousands(*n)))
            .collect(),
    );
    let filtered = stats.filtered();
    more(
        "left out",
        filtered
            .iter()
            .map(|(rule, tally)| {
                format!(
                    "{rule} {} ({} tokens)",
                    thousands(tally.rows),
                    thousands(tally.tokens)
                )
            })
            .collect(),
    );
    let speakers = stats.speakers.iter().take(6);
    more(
        "speakers",
        speakers
            .map(|(name, n)| format!("{name} {}", thousands(*n)))
            .collect(),
    );
    lines.push(String::new());
}

/// A line for each language: rows, tokens, and how long rows are.
fn table(stats: &Stats, lines: &mut Vec<String>) {
    let first = stats.first_bin();
    let edges = stats.edges();
    let range = match (edges.first(), edges.last()) {
        (Some(from), Some(to)) => format!("rows by tokens, {from} to {to}"),
        _ => String::new(),
    };
    let key = stats.files.iter().map(|f| f.key.len()).max().unwrap_or(0);
    lines.push(format!(
        "  {:key$} {:>9} {:>13} {:>8} {:>8} {:>8}  {range}",
        "", "rows", "tokens", "median", "95 %", "longest"
    ));
    for file in &stats.files {
        let counts: Vec<u64> = file
            .histogram
            .iter()
            .skip(first)
            .map(|bin| bin.n_rows)
            .collect();
        lines.push(format!(
            "  {:key$} {:>9} {:>13} {:>8} {:>8} {:>8}  {}",
            file.key,
            thousands(file.n_rows),
            thousands(file.n_tokens),
            thousands(file.median),
            thousands(file.p95),
            thousands(file.longest),
            small_bars(&counts)
        ));
    }
}

/// Heights as eighths of a character; what is not zero is seen.
fn small_bars(counts: &[u64]) -> String {
    const HEIGHTS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let most = counts.iter().copied().max().unwrap_or(0).max(1);
    counts
        .iter()
        .map(|n| HEIGHTS[(8 * n).div_ceil(most) as usize])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_bars_show_every_bin_that_is_not_empty() {
        assert_eq!(small_bars(&[0, 1, 500, 1000]), " ▁▄█");
        assert_eq!(small_bars(&[0]), " ");
        assert_eq!(small_bars(&[]), "");
    }
}
