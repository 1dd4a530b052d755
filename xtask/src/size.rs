//! Lines by crate, code and tests apart: a thermometer, not a limit.

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
        let all = text.lines().count();
        if kind == 2 {
            entry[2] += all;
            continue;
        }
        let code = if path.contains("/tests/") {
            0
        } else {
            text.split("#[cfg(test)]")
                .next()
                .unwrap_or("")
                .lines()
                .count()
        };
        entry[0] += code;
        entry[1] += all - code;
        if code > 450 {
            long.push(format!("{path}: {code} lines of code, is it two files?"));
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
