//! The page of `corpus stats`: every picture beside its numbers.

use std::fmt::Write;

use report::look::plain;
use report::{figure, frame};

pub use super::stats_figures::{Picture, Section, Table, sections};

const STYLE: &str = "
body { max-width: 78rem; } h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; } nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; } nav a { color: var(--blue); }
.pair { display: grid; gap: .8rem 1.6rem; align-items: start; } .pair > * { min-width: 0; } @media (min-width: 60rem) { .pair { grid-template-columns: 34rem minmax(0, 1fr); } }
figure { margin: 0; } figure svg { display: block; width: 100%; height: auto; max-width: 34rem; border-radius: 6px; } figcaption { color: var(--soft); font-size: .88rem; margin-top: .4rem; max-width: 34rem; }
.scroll { max-height: 36rem; overflow-y: auto; } .scroll:focus-visible { outline: 2px solid var(--blue); } .scroll table { font-variant-numeric: tabular-nums; }
.scroll th[scope=col] { position: sticky; top: 0; z-index: 1; background: var(--card); }
.scroll th[scope=row] { color: var(--ink); font-weight: 400; font-size: .94rem; white-space: normal; overflow-wrap: break-word; max-width: 14rem; } @media (max-width: 30rem) { .scroll th[scope=row] { font-size: .84rem; } }
";

/// The whole page.
pub fn page(sections: &[Section]) -> String {
    let mut out = "<nav aria-label=\"Data sets\">".to_owned();
    for (at, section) in sections.iter().enumerate() {
        let _ = write!(out, "<a href=\"#s{at}\">{}</a>", plain(&section.title));
    }
    out.push_str("</nav><main>");
    for (at, section) in sections.iter().enumerate() {
        let _ = write!(
            out,
            "<section aria-labelledby=\"s{at}\"><h2 id=\"s{at}\">{}</h2><p>{}</p>",
            plain(&section.title),
            plain(&section.summary)
        );
        if let Some(warning) = &section.warning {
            let _ = write!(out, "<p class=\"verdict flag\">{}</p>", plain(warning));
        }
        for picture in &section.pictures {
            let title = plain(&picture.figure.title);
            let _ = write!(
                out,
                "<h3>{title}</h3><div class=\"pair\"><figure>{}<figcaption>{}</figcaption></figure>",
                picture.figure.inline(),
                plain(&picture.caption)
            );
            table(&mut out, &title, &picture.table);
            out.push_str("</div>");
        }
        out.push_str("</section>");
    }
    out.push_str("</main>");
    out.push_str(&frame::made_by());
    frame::page("Data sets", &[figure::STYLE, STYLE], &out)
}

/// A table that scrolls by itself, by keyboard too, so that the page never does sideways.
fn table(out: &mut String, title: &str, table: &Table) {
    let _ = write!(
        out,
        "<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"{title}: numbers\"><table><thead><tr>"
    );
    for name in &table.head {
        let _ = write!(out, "<th scope=\"col\">{}</th>", plain(name));
    }
    out.push_str("</tr></thead><tbody>");
    for row in &table.rows {
        out.push_str("<tr>");
        for (at, cell) in row.iter().enumerate() {
            let cell = plain(cell);
            let _ = match at {
                0 => write!(out, "<th scope=\"row\">{cell}</th>"),
                _ => write!(out, "<td>{cell}</td>"),
            };
        }
        out.push_str("</tr>");
    }
    out.push_str("</tbody></table></div>");
}
