//! Which pictures a data set and a mixture have, and the table beside each.

use report::figure::{self, Bar, Figure, Series};
use report::look::thousands;

use crate::manifest::Tally;
use crate::stats::{FileStats, MANY_PASSES, PassCount, Passes, Stats};

/// Speakers in the picture, and in the table beside it.
const DRAWN_SPEAKERS: usize = 12;
const LISTED_SPEAKERS: usize = 30;
/// Bars of a picture of passes at most; more values share bars.
const PASS_BARS: usize = 14;

/// A part of the page.
#[derive(Debug)]
pub struct Section {
    /// Its heading, and the subject of its pictures as files.
    pub title: String,
    /// A line of numbers.
    pub summary: String,
    /// What a reader should worry about.
    pub warning: Option<String>,
    /// What is drawn.
    pub pictures: Vec<Picture>,
}

/// A picture, what it says, and its numbers.
#[derive(Debug)]
pub struct Picture {
    /// The picture.
    pub figure: Figure,
    /// How it is to be read.
    pub caption: String,
    /// Its numbers.
    pub table: Table,
}

/// Numbers as text; the first column names the row.
#[derive(Debug)]
pub struct Table {
    /// Names of the columns.
    pub head: Vec<String>,
    /// The cells, a line a row.
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

/// A section for each data set, then one for the passes of a mixture.
pub fn sections(datasets: &[Stats], passes: Option<&Passes>) -> Vec<Section> {
    let mut sections: Vec<Section> = Vec::new();
    for stats in datasets {
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
    sections.extend(passes.map(of_passes));
    sections
}

fn of_dataset(stats: &Stats, slug: &str) -> Section {
    let mut pictures = vec![lengths(stats, slug), tails(stats, slug)];
    pictures.extend(sides_picture(stats, slug));
    pictures.extend(holes_picture(stats, slug));
    pictures.extend(filtered_picture(stats, slug));
    pictures.extend(speakers_picture(stats, slug));
    let sum = |f: fn(&FileStats) -> u64| thousands(stats.files.iter().map(f).sum());
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

fn series(stats: &Stats) -> Vec<Series> {
    let first = stats.first_bin();
    let of_file = |file: &FileStats| Series {
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
        figure: figure::columns(&format!("{slug}-lengths"), "Length of rows", &stats.edges(), "tokens", &series(stats)),
        caption: "How long rows are, the languages stacked. Half of a language's rows are at most as long as its median, 95 % at most as long as the next column says.".to_owned(),
        table,
    }
}

fn tails(stats: &Stats, slug: &str) -> Picture {
    let edges = stats.edges();
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
    let names: Vec<String> = stats
        .tallies_by_side()
        .into_iter()
        .map(|(side, _)| side)
        .collect();
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
    let kinds: Vec<String> = stats.holes().into_keys().collect();
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
    let rules = stats.filtered();
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

fn row(name: &str, numbers: impl IntoIterator<Item = u64>) -> Vec<String> {
    let numbers = numbers.into_iter().map(thousands);
    std::iter::once(name.to_owned()).chain(numbers).collect()
}

/// `3`, `3.5`.
fn tenths(n: f64) -> String {
    let text = format!("{n:.1}");
    text.strip_suffix(".0").map_or(text.clone(), str::to_owned)
}
