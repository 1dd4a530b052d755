//! The page of `corpus peek`: the same spans as on a terminal, told apart by colour, and by underlines where they are trained.

use std::collections::BTreeSet;
use std::fmt::Write;

use report::look::plain;
use report::{figure, frame};

use crate::peek::{Kind, Span, visible};

const STYLE: &str = "
:root { --system: #8a3ea8; --user: #0f6f7c; --assistant: #2c7a4b; --think: #2f6db3; --mark: #96600a; }
@media (prefers-color-scheme: dark) { :root { --system: #d59bec; --user: #6cc9d6; --assistant: #7fce9f; --think: #7db4ee; --mark: #e0ab52; } }
h2 { font-size: 1rem; margin: 1.8rem 0 .2rem; overflow-wrap: anywhere; } .facts { font-size: .88rem; overflow-wrap: anywhere; }
.row { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .7rem .9rem; margin: .5rem 0; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.75; }
.legend { display: flex; flex-wrap: wrap; align-items: baseline; gap: .3rem 1.2rem; }
.document { color: var(--ink); } .system { color: var(--system); } .user { color: var(--user); } .assistant { color: var(--assistant); } .think { color: var(--think); } .mark { color: var(--mark); font: .84em ui-monospace, monospace; }
.trained { text-decoration: underline; text-decoration-thickness: 2px; text-underline-offset: .22em; text-decoration-skip-ink: none; background: color-mix(in srgb, currentColor 9%, transparent); }
.mark.trained { text-underline-offset: .4em; } .feed { opacity: .55; text-decoration: none; } .token { border-right: 1px solid color-mix(in srgb, currentColor 60%, transparent); }
";

/// A row: its place as a heading, what is known of it, its spans.
#[derive(Debug)]
pub struct Shown {
    /// Its place.
    pub title: String,
    /// Language, scene, side, counts.
    pub facts: String,
    /// What it says.
    pub spans: Vec<Span>,
}

/// The whole page; `every_token`: each span is a token, with a bar behind it.
pub fn page(rows: &[Shown], summary: &str, every_token: bool) -> String {
    let kinds: BTreeSet<Kind> = rows
        .iter()
        .flat_map(|row| row.spans.iter().map(|span| span.kind))
        .collect();
    let mut body = format!("<p>{}</p><p class=\"legend\">", plain(summary));
    for kind in kinds {
        let _ = write!(body, "<span class=\"{0}\">{0}</span>", kind.name());
    }
    body.push_str("<span><span class=\"trained\">underlined</span>: carries loss</span><span>plain: read only</span><span>↵: a line feed</span>");
    if every_token {
        body.push_str("<span><span class=\"token\">bar</span>: a token ends</span>");
    }
    body.push_str("</p>");
    for row in rows {
        let _ = write!(
            body,
            "<h2>{}</h2><p class=\"soft facts\">{}</p><div class=\"row\">",
            plain(&row.title),
            plain(&row.facts)
        );
        for span in &row.spans {
            let trained = if span.trained { " trained" } else { "" };
            let token = if every_token { " token" } else { "" };
            let text = plain(&visible(&span.text)).replace('↵', "<span class=\"feed\">↵</span>");
            let _ = write!(
                body,
                "<span class=\"{}{trained}{token}\">{text}</span>",
                span.kind.name()
            );
        }
        body.push_str("</div>");
    }
    body.push_str(&frame::made_by());
    frame::page("Rows as training sees them", &[figure::STYLE, STYLE], &body)
}
