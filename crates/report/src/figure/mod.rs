//! Pictures as SVG: stacked columns, small panels, horizontal bars. Each is readable by itself as a file and inside a page,
//! in light and dark; no picture says anything by colour alone.

mod axis;
mod bars;
mod canvas;
mod columns;
mod panels;

pub use bars::{Bar, bars};
pub use columns::columns;
pub use panels::panels;

use crate::look::plain;

/// Width of every picture in its own units; a phone shows it at 0.9, a desk at 1.4 pixels a unit.
const WIDTH: f64 = 380.0;

/// What a picture's parts look like; the colours stand in pairs of dark and light, so that neighbours of a stack differ
/// in brightness too.
pub const STYLE: &str = "
.fig { background: var(--card); } .fig text { font: 12px system-ui, 'Noto Sans', 'Noto Sans CJK SC', sans-serif; fill: var(--ink); } .fig .soft { fill: var(--soft); font-size: 11px; }
.fig .axis { stroke: var(--line); stroke-width: 1; } .fig .limit { stroke: var(--red); stroke-width: 1.5; stroke-dasharray: 4 3; } .fig .on-dark { fill: #fff; font-size: 9.5px; } .fig .on-light { fill: #1d2733; font-size: 9.5px; }
.fig rect, .sw { stroke: var(--card); stroke-width: .7; }
.lone { fill: var(--blue); } .over { fill: var(--red); }
.c0 { fill: #b3261e; } .c1 { fill: #f2a19a; } .c2 { fill: #8a5a00; } .c3 { fill: #f3c04b; } .c4 { fill: #5f7a1f; } .c5 { fill: #bfd98a; } .c6 { fill: #1f7a5a; }
.c7 { fill: #86d6bd; } .c8 { fill: #1c5d99; } .c9 { fill: #93c6f2; } .c10 { fill: #5b3fa0; } .c11 { fill: #c9b2ee; } .c12 { fill: #9c2f77; }
@media (prefers-color-scheme: dark) { .c0 { fill: #cc443b; } .c2 { fill: #a06c0c; } .c4 { fill: #708f27; } .c6 { fill: #2a9370; } .c8 { fill: #2e79ba; } .c10 { fill: #7a5dc4; } .c12 { fill: #b8478f; } }
";

/// How many colours [`STYLE`] has.
const N_COLOURS: usize = 13;

/// A series of a picture: a name and a value for each place.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    /// What the legend calls it.
    pub name: String,
    /// Rows by column.
    pub values: Vec<u64>,
}

/// A finished picture.
#[derive(Debug, Clone, PartialEq)]
pub struct Figure {
    /// Stem of its file's name.
    pub name: String,
    /// What it shows.
    pub title: String,
    /// What a reader who cannot see it is told.
    pub description: String,
    height: f64,
    body: String,
}

impl Figure {
    /// The picture as part of a page that has the project's style sheet and [`STYLE`].
    pub fn inline(&self) -> String {
        format!("<svg {}>{}</svg>", self.opening(self.height), self.inside())
    }

    /// The picture as a file of its own, headed by what it is about and, below, its title: one line could be wider than the picture.
    pub fn file(&self, subject: &str) -> String {
        const HEAD: f64 = 38.0;
        // Bold letters are a tenth wider at most.
        let line = |text: &str| plain(&canvas::fit(text, 0.9 * (WIDTH - 16.0)));
        let height = self.height + HEAD;
        format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{}\" {}><style>{COLOURS}{STYLE}</style>\
             <rect width=\"100%\" height=\"100%\" style=\"fill:var(--card)\"/><text class=\"soft\" x=\"8\" y=\"15\">{}</text><text x=\"8\" y=\"31\" font-weight=\"600\">{}</text>\
             <g transform=\"translate(0 {HEAD})\">{}</g></svg>\n",
            1.5 * WIDTH,
            1.5 * height,
            self.opening(height),
            line(subject),
            line(&self.title),
            self.inside()
        )
    }

    fn opening(&self, height: f64) -> String {
        format!(
            "class=\"fig\" viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\" aria-labelledby=\"{name}-t {name}-d\"",
            name = self.name
        )
    }

    fn inside(&self) -> String {
        format!(
            "<title id=\"{name}-t\">{}</title><desc id=\"{name}-d\">{}</desc>{}",
            plain(&self.title),
            plain(&self.description),
            self.body,
            name = self.name
        )
    }
}

/// The page's colours, for a picture that stands alone.
const COLOURS: &str = "
:root { --ink: #1d2733; --soft: #5b6b7c; --line: #d5dde5; --card: #fff; --blue: #2f6db3; --red: #b3382f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf4; --soft: #9bacbd; --line: #2c3946; --card: #161e27; --blue: #7db4ee; --red: #f08a80; } }
";

/// The colour class of a series: a language.
fn colour(series_idx: usize) -> String {
    format!("c{}", series_idx % N_COLOURS)
}

/// The colour class of a kind (a side, a sort of hole): other neighbours than languages have, blue first.
fn kind_colour(kind_idx: usize) -> String {
    colour(8 + 8 * kind_idx)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series() -> Vec<Series> {
        let codes = [
            "chs", "cht", "de", "en", "es", "fr", "id", "jp", "kr", "pt", "ru", "th", "vi",
        ];
        let named = codes.iter().enumerate();
        named
            .map(|(at, code)| Series {
                name: (*code).to_owned(),
                values: vec![0, at as u64, 100_000, 1],
            })
            .collect()
    }

    fn labels() -> Vec<String> {
        ["1", "2", "4", "8", "16"].map(str::to_owned).to_vec()
    }

    /// Every picture there is, with texts that need escaping.
    fn all() -> Vec<Figure> {
        let bar = |label: &str, values: Vec<f64>| Bar {
            label: label.to_owned(),
            values,
            note: "<3>".to_owned(),
        };
        let rows = vec![
            bar("a & b\u{1}\u{ffff}", vec![1.0, 0.0]),
            bar(
                "一二三四五六七八九十一二三四五六七八九十一二三四五六七八九十一二三四五六七八九十",
                vec![0.0, 5.5],
            ),
        ];
        vec![
            columns("a", "T <1>", &labels(), "tokens", &series()),
            panels("b", "T", &labels(), "tokens", &series()),
            bars(
                "c",
                "T",
                &["x".to_owned(), "y & z".to_owned()],
                &rows,
                Some(4.0),
                "u",
            ),
            columns("d", "T", &[], "tokens", &[]),
            panels("e", "T", &[], "tokens", &[]),
            bars("f", "T", &[], &[], None, "u"),
        ]
    }

    #[test]
    fn pictures_are_xml_inside_their_frame() {
        for figure in all() {
            let file = figure.file("a & b");
            let xml = roxmltree::Document::parse(&file)
                .unwrap_or_else(|error| panic!("{}: {error}\n{file}", figure.name));
            let number = |node: &roxmltree::Node<'_, '_>, key| {
                node.attribute(key)
                    .and_then(|v| v.parse::<f64>().ok())
                    .unwrap_or(0.0)
            };
            for rect in xml
                .descendants()
                .filter(|node| node.has_tag_name("rect"))
                .skip(1)
            {
                let (x, y) = (number(&rect, "x"), number(&rect, "y"));
                let (width, height) = (number(&rect, "width"), number(&rect, "height"));
                assert!(
                    x >= 0.0 && x + width <= WIDTH + 0.1,
                    "{}: {rect:?}",
                    figure.name
                );
                assert!(
                    y >= 0.0 && y + height <= figure.height + 0.1,
                    "{}: {rect:?}",
                    figure.name
                );
                assert!(width >= 0.0 && height >= 0.0);
            }
            assert!(roxmltree::Document::parse(&figure.inline()).is_ok());
        }
    }

    #[test]
    fn picture_alone_brings_its_colours() {
        let file = all()[0].file("x");
        assert!(file.contains("prefers-color-scheme: dark") && file.contains(".c12"));
        assert!(!file.contains("script") && !file.contains("href"));
    }

    #[test]
    fn head_of_a_file_stays_inside_its_frame() {
        let mut figure = all().remove(0);
        figure.title = "Passes over a scene in the same language".to_owned();
        let subject = "a subject ".repeat(9);
        let file = figure.file(&subject);
        let xml = roxmltree::Document::parse(&file).unwrap();
        let texts = xml.descendants().filter(|node| node.has_tag_name("text"));
        let head: Vec<&str> = texts.take(2).filter_map(|text| text.text()).collect();
        assert_eq!(head[1], figure.title);
        assert!(subject.starts_with(head[0].trim_end_matches('…')) && head[0].ends_with('…'));
        for line in head {
            assert!(8.0 + 1.1 * canvas::width(line) <= WIDTH, "{line}");
        }
    }
}
