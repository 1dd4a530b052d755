//! Lines by crate, code and tests apart, blank lines and comments not counted: a thermometer, not a limit.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};

pub fn run(root: &Path) -> Result<()> {
    let mut sizes: BTreeMap<String, [usize; 3]> = BTreeMap::new();
    let mut long = Vec::new();
    for path in crate::tracked(root)? {
        let kind = match path.rsplit('.').next() {
            Some("rs") => 0,
            Some("cu" | "js" | "css" | "html") => 2,
            _ => continue,
        };
        let text = std::fs::read_to_string(root.join(&path)).with_context(|| path.clone())?;
        let parts: Vec<&str> = path.split('/').collect();
        let name = if parts[0] == "crates" {
            parts[1]
        } else {
            parts[0]
        };
        let entry = sizes.entry(name.to_owned()).or_default();
        if kind == 2 {
            entry[2] += text.lines().count();
            continue;
        }
        let (code, tests) = match text.split_once("#[cfg(test)]") {
            _ if path.contains("/tests/") => ("", text.as_str()),
            Some((code, tests)) => (code, tests),
            None => (text.as_str(), ""),
        };
        entry[0] += lines_of_code(code);
        entry[1] += lines_of_code(tests);
        let n_lines = code.lines().count();
        if n_lines > 450 {
            long.push(format!("{path}: {n_lines} lines, is it two files?"));
        }
    }
    println!(
        "{:10} {:>7} {:>7} {:>9}",
        "crate", "code", "tests", "cuda+web"
    );
    for (name, [code, tests, other]) in &sizes {
        println!("{name:10} {code:>7} {tests:>7} {other:>9}");
    }
    for line in long {
        println!("{line}");
    }
    Ok(())
}

fn lines_of_code(text: &str) -> usize {
    let lines = text.lines().map(str::trim_start);
    lines
        .filter(|line| !line.is_empty() && !line.starts_with("//"))
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blank_lines_and_comments_are_no_code() {
        let text = "//! What.\n\n/// Doc.\nfn f() {\n    // Why.\n    g(); // too\n}\n";
        assert_eq!(lines_of_code(text), 3);
    }
}
