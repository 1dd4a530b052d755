//! Which pictures a data set and a mixture have, and the table beside each.

use std::collections::BTreeMap;

use corpus::manifest::Tally;
use corpus::stats::{MANY_PASSES, PassCount, Passes, Stats};
use eval::report::look::thousands;

use super::Report;
use crate::figure::{self, Bar, Figure, Series};

/// Speakers in the picture, and in the table beside it.
const DRAWN_SPEAKERS: usize = 12;
const LISTED_SPEAKERS: usize = 30;
/// Bars of a picture of passes at most; more values share bars.
const PASS_BARS: usize = 14;

/// A part of the page.
pub struct Section {
    pub title: String,
    pub summary: String,
    /// What a reader should worry about.
    pub warning: Option<String>,
    pub pictures: Vec<Picture>,
}

/// A picture, what it says, and its numbers.
pub struct Picture {
    pub figure: Figure,
    pub caption: String,
    pub table: Table,
}

/// Numbers as text; the first column names the row.
pub struct Table {
    pub head: Vec<String>,
    pub rows: Vec<Vec<String>>,
}

impl Table {
    fn new(head: &[&str]) -> Table {
        Table {
            head: head.iter().map(|name| (*name).to_owned()).collect(),
            rows: Vec::new(),
        }
    }
}

pub fn sections(report: &Report) -> Vec<Section> {
    let mut sections: Vec<Section> = Vec::new();
    for stats in &report.datasets {
        // The same data set may come twice, as two of its files.
        let n_before = sections
            .iter()
            .filter(|section| section.title == stats.task)
            .count();
        let mut slug = stats.task.replace('/', "-");
        if n_before > 0 {
            slug = format!("{slug}-{}", n_before + 1);
        }
        sections.push(of_dataset(stats, &slug));
    }
    sections.extend(report.passes.as_ref().map(of_passes));
    sections
}

fn of_dataset(stats: &Stats, slug: &str) -> Section {
    let mut pictures = vec![lengths(stats, slug), tails(stats, slug)];
    pictures.extend(sides_picture(stats, slug));
    pictures.extend(holes_picture(stats, slug));
    pictures.extend(filtered_picture(stats, slug));
    pictures.extend(speakers_picture(stats, slug));
    let sum = |f: fn(&corpus::stats::FileStats) -> u64| thousands(stats.files.iter().map(f).sum());
    Section {
        title: stats.task.clone(),
        summary: format!(
            "{} rows, {} tokens, {} scenes",
            sum(|f| f.n_rows),
            sum(|f| f.n_tokens),
            thousands(stats.n_scenes as u64)
        ),
        warning: None,
        pictures,
    }
}

/// The first bin in which any language has a row.
pub fn first_bin(stats: &Stats) -> usize {
    let first =
        |file: &corpus::stats::FileStats| file.histogram.iter().position(|bin| bin.n_rows > 0);
    stats.files.iter().filter_map(first).min().unwrap_or(0)
}

/// The borders of the bins from the first that is not empty.
pub fn edges(stats: &Stats) -> Vec<String> {
    let Some(most) = stats
        .files
        .iter()
        .map(|file| &file.histogram)
        .max_by_key(|bins| bins.len())
    else {
        return Vec::new();
    };
    let used = most.get(first_bin(stats)..).unwrap_or_default();
    let Some(last) = used.last() else {
        return Vec::new();
    };
    used.iter()
        .map(|bin| bin.from)
        .chain([last.to])
        .map(power_of_two)
        .collect()
}

/// `512`, `1k` (1024), `2k`.
fn power_of_two(n: u64) -> String {
    match n {
        n if n >= 1 << 20 => format!("{}M", n >> 20),
        n if n >= 1 << 10 => format!("{}k", n >> 10),
        n => n.to_string(),
    }
}

fn series(stats: &Stats) -> Vec<Series> {
    let first = first_bin(stats);
    let of_file = |file: &corpus::stats::FileStats| Series {
        name: file.key.clone(),
        values: file
            .histogram
            .iter()
            .skip(first)
            .map(|bin| bin.n_rows)
            .collect(),
    };
    stats.files.iter().map(of_file).collect()
}

fn lengths(stats: &Stats, slug: &str) -> Picture {
    let mut table = Table::new(&["", "rows", "tokens", "median", "95 %", "longest"]);
    for file in &stats.files {
        let numbers = [
            file.n_rows,
            file.n_tokens,
            file.median,
            file.p95,
            file.longest,
        ];
        table.rows.push(row(&file.key, numbers));
    }
    Picture {
        figure: figure::columns(&format!("{slug}-lengths"), "Length of rows", &edges(stats), "tokens", &series(stats)),
        caption: "How long rows are, the languages stacked. Half of a language's rows are at most as long as its median, 95 % at most as long as the next column says.".to_owned(),
        table,
    }
}

fn tails(stats: &Stats, slug: &str) -> Picture {
    let edges = edges(stats);
    let series = series(stats);
    let mut table = Table::new(&["tokens"]);
    table.head.extend(series.iter().map(|one| one.name.clone()));
    for (at, pair) in edges.windows(2).enumerate() {
        let counts = series
            .iter()
            .map(|one| one.values.get(at).copied().unwrap_or(0));
        table.rows.push(row(
            &format!("{}\u{a0}to\u{a0}{}", pair[0], pair[1]),
            counts,
        ));
    }
    Picture {
        figure: figure::panels(&format!("{slug}-tails"), "Length of rows, language by language", &edges, "tokens", &series),
        caption: "The same rows apart and on a logarithmic axis, so that single long rows are seen. A row is counted where its tokens are at least the first and below the second number.".to_owned(),
        table,
    }
}

fn sides_picture(stats: &Stats, slug: &str) -> Option<Picture> {
    let names: Vec<String> = sides(stats).into_iter().map(|(side, _)| side).collect();
    if names.is_empty() {
        return None;
    }
    let mut table = Table::new(&[""]);
    table.head.extend(
        names
            .iter()
            .flat_map(|side| [format!("{side}: rows"), format!("{side}: tokens")]),
    );
    let mut bars = Vec::new();
    for file in &stats.files {
        let tally = |side: &String| {
            file.sides
                .iter()
                .find(|(name, _)| name == side)
                .map_or(Tally::default(), |(_, tally)| *tally)
        };
        let tallies: Vec<Tally> = names.iter().map(tally).collect();
        table.rows.push(row(
            &file.key,
            tallies.iter().flat_map(|tally| [tally.rows, tally.tokens]),
        ));
        let all = file.n_tokens.max(1) as f64;
        let shares: Vec<f64> = tallies
            .iter()
            .map(|tally| 100.0 * tally.tokens as f64 / all)
            .collect();
        bars.push(Bar {
            label: file.key.clone(),
            note: format!("{:.1} %", shares[0]),
            values: shares,
        });
    }
    let scenes: Vec<String> = stats
        .sides
        .iter()
        .map(|(side, n)| format!("{} {side}", thousands(*n)))
        .collect();
    Some(Picture {
        figure: figure::bars(
            &format!("{slug}-sides"),
            "Sides of the split",
            &names,
            &bars,
            None,
            &format!("tokens by side; share of {}, %", names[0]),
        ),
        caption: format!(
            "Tokens by the side of the split; beside each bar the share of {}. A row with lines on several sides is a row on each. Scenes: {}.",
            names[0],
            scenes.join(", ")
        ),
        table,
    })
}

fn holes_picture(stats: &Stats, slug: &str) -> Option<Picture> {
    let kinds: Vec<String> = holes(stats).into_keys().collect();
    if kinds.is_empty() {
        return None;
    }
    let mut table = Table::new(&[""]);
    table.head.extend(kinds.iter().cloned());
    let mut bars = Vec::new();
    for file in &stats.files {
        let counts: Vec<u64> = kinds
            .iter()
            .map(|kind| file.holes.get(kind).copied().unwrap_or(0))
            .collect();
        table.rows.push(row(&file.key, counts.iter().copied()));
        bars.push(Bar {
            label: file.key.clone(),
            note: thousands(counts.iter().sum()),
            values: counts.iter().map(|n| *n as f64).collect(),
        });
    }
    Some(Picture {
        figure: figure::bars(&format!("{slug}-holes"), "Holes", &kinds, &bars, None, "holes"),
        caption: "What a language lacks and other languages have: untranslated texts, names, values of variables.".to_owned(),
        table,
    })
}

fn filtered_picture(stats: &Stats, slug: &str) -> Option<Picture> {
    let rules = filtered(stats);
    if rules.is_empty() {
        return None;
    }
    let mut table = Table::new(&["rule", "rows", "tokens"]);
    let mut bars = Vec::new();
    for (rule, tally) in &rules {
        table.rows.push(row(rule, [tally.rows, tally.tokens]));
        bars.push(Bar {
            label: rule.clone(),
            values: vec![tally.tokens as f64],
            note: thousands(tally.tokens),
        });
    }
    Some(Picture {
        figure: figure::bars(
            &format!("{slug}-filtered"),
            "Left out by the rules",
            &[],
            &bars,
            None,
            "tokens",
        ),
        caption: "Tokens that the rules left out, all languages together.".to_owned(),
        table,
    })
}

fn speakers_picture(stats: &Stats, slug: &str) -> Option<Picture> {
    if stats.speakers.is_empty() {
        return None;
    }
    let mut table = Table::new(&["speaker", "rows"]);
    for (name, n) in stats.speakers.iter().take(LISTED_SPEAKERS) {
        table.rows.push(row(name, [*n]));
    }
    let bar = |(name, n): &(String, u64)| Bar {
        label: name.clone(),
        values: vec![*n as f64],
        note: thousands(*n),
    };
    let bars: Vec<Bar> = stats
        .speakers
        .iter()
        .take(DRAWN_SPEAKERS)
        .map(bar)
        .collect();
    Some(Picture {
        figure: figure::bars(
            &format!("{slug}-speakers"),
            "Who answers",
            &[],
            &bars,
            None,
            "rows",
        ),
        caption: format!(
            "Rows by the name that the assistant speaks under; a name in another language is another name. {} names in all.",
            thousands(stats.speakers.len() as u64)
        ),
        table,
    })
}

fn of_passes(passes: &Passes) -> Section {
    let mut table = Table::new(&["", "scenes", "mean", "most"]);
    let mut bars = Vec::new();
    for language in &passes.languages {
        let mut cells = row(&language.key, [language.n_scenes as u64]);
        cells.extend([tenths(language.mean), tenths(language.most)]);
        table.rows.push(cells);
        let note = if language.most > MANY_PASSES {
            format!(
                "{}, at most {}: too many",
                tenths(language.mean),
                tenths(language.most)
            )
        } else {
            format!(
                "{}, at most {}",
                tenths(language.mean),
                tenths(language.most)
            )
        };
        bars.push(Bar {
            label: language.key.clone(),
            values: vec![language.mean],
            note,
        });
    }
    let same = Picture {
        figure: figure::bars(
            "passes-languages",
            "Passes over a scene in the same language",
            &[],
            &bars,
            Some(MANY_PASSES),
            "passes, on average",
        ),
        caption: format!(
            "How often one epoch of the recipe shows a scene in one language, on average over its scenes. Above {MANY_PASSES} (the dashed line) text begins to be learnt by heart."
        ),
        table,
    };
    let mut table = Table::new(&["passes", "scenes"]);
    let mut bars = Vec::new();
    for (label, n) in grouped(&passes.all_languages) {
        table.rows.push(row(&label, [n]));
        bars.push(Bar {
            label,
            values: vec![n as f64],
            note: thousands(n),
        });
    }
    let all = Picture {
        figure: figure::bars("passes-scenes", "Passes over a scene in all languages", &[], &bars, None, "scenes by passes"),
        caption: "Scenes by how often they are shown in all languages together; translations of a scene teach the same events.".to_owned(),
        table,
    };
    Section {
        title: "Passes of the recipe".to_owned(),
        summary: format!(
            "{} scenes; {} passes in the same language on average, {} at most; {} in all languages on average, {} at most",
            thousands(passes.n_scenes as u64),
            tenths(passes.same_language_mean),
            tenths(passes.same_language_most),
            tenths(passes.all_languages_mean),
            tenths(passes.all_languages_most)
        ),
        warning: (passes.n_above_limit > 0).then(|| {
            format!(
                "{} scenes of a language are shown more than {MANY_PASSES} times; lower the weight of their source.",
                thousands(passes.n_above_limit as u64)
            )
        }),
        pictures: vec![same, all],
    }
}

/// Scenes by passes; neighbours share a line if there would be too many.
fn grouped(counts: &[PassCount]) -> Vec<(String, u64)> {
    let per_line = counts.len().div_ceil(PASS_BARS).max(1);
    let line = |group: &[PassCount]| {
        let (first, last) = (
            tenths(group[0].passes),
            tenths(group[group.len() - 1].passes),
        );
        let label = if first == last {
            first
        } else {
            format!("{first} to {last}")
        };
        (label, group.iter().map(|count| count.count).sum())
    };
    counts.chunks(per_line).map(line).collect()
}

/// Rows and tokens by side over all files, in the order of the sides.
pub fn sides(stats: &Stats) -> Vec<(String, Tally)> {
    let mut sums: Vec<(String, Tally)> = Vec::new();
    // A side that a language lacks must not come after one that follows it: the file with the most sides says the order.
    let mut files: Vec<_> = stats.files.iter().collect();
    files.sort_by_key(|file| std::cmp::Reverse(file.sides.len()));
    for (side, tally) in files.into_iter().flat_map(|file| &file.sides) {
        match sums.iter_mut().find(|(name, _)| name == side) {
            Some((_, sum)) => add(sum, tally),
            None => sums.push((side.clone(), *tally)),
        }
    }
    sums
}

pub fn holes(stats: &Stats) -> BTreeMap<String, u64> {
    let mut sums = BTreeMap::new();
    for (kind, n) in stats.files.iter().flat_map(|file| &file.holes) {
        *sums.entry(kind.clone()).or_default() += n;
    }
    sums
}

pub fn filtered(stats: &Stats) -> BTreeMap<String, Tally> {
    let mut sums: BTreeMap<String, Tally> = BTreeMap::new();
    for (rule, tally) in stats.files.iter().flat_map(|file| &file.filtered) {
        add(sums.entry(rule.clone()).or_default(), tally);
    }
    sums
}

fn add(sum: &mut Tally, tally: &Tally) {
    sum.rows += tally.rows;
    sum.tokens += tally.tokens;
}

fn row(name: &str, numbers: impl IntoIterator<Item = u64>) -> Vec<String> {
    let numbers = numbers.into_iter().map(thousands);
    std::iter::once(name.to_owned()).chain(numbers).collect()
}

/// `3`, `3.5`.
fn tenths(n: f64) -> String {
    let text = format!("{n:.1}");
    text.strip_suffix(".0").map_or(text.clone(), str::to_owned)
}
