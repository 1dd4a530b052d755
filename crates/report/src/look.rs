//! How every page of the project looks: one style sheet, and how numbers and texts are written.

/// Colours for light and dark, tables, paragraphs.
pub const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1d2733; --soft: #5b6b7c; --line: #d5dde5; --paper: #fbfcfd; --card: #fff; --blue: #2f6db3; --amber: #b97a13; --red: #b3382f; --green: #2c7a4b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf4; --soft: #9bacbd; --line: #2c3946; --paper: #10161d; --card: #161e27; --blue: #7db4ee; --amber: #e0ab52; --red: #f08a80; --green: #75c79a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, 'Noto Sans CJK SC', sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; background: var(--card); }
th, td { padding: .38rem .5rem; font-size: .94rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; } th:first-child, td:first-child { text-align: left; }
th { color: var(--soft); font-weight: 600; font-size: .86rem; white-space: normal; vertical-align: bottom; } th:first-child, td:first-child { position: sticky; left: 0; background: var(--card); }
@media (max-width: 30rem) { th, td { padding: .38rem .3rem; font-size: .84rem; } }
.red { color: var(--red); font-weight: 600; } .ok { color: var(--green); font-weight: 600; }
.verdict { padding: .7rem 1rem; border-left: 4px solid var(--green); background: var(--card); } .verdict.flag { border-color: var(--red); }
.reply { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .6rem .9rem; margin: .7rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.reply .who { color: var(--soft); font-size: .84rem; }
";

/// `1,234,567`.
pub fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Text as it stands in HTML and XML.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// Text that any XML reader takes: escaped, and without the characters that XML has no way to write.
pub fn plain(text: &str) -> String {
    let shown = |c: char| match c {
        '\t' | '\n' => c,
        '\0'..='\u{1f}' | '\u{fffe}' | '\u{ffff}' => '\u{fffd}',
        c => c,
    };
    escape(&text.chars().map(shown).collect::<String>())
}
