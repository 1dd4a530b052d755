//! `cyrene bench table`: the Markdown table of docs/training-speed.md from the lines that `bench train --json` printed.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::cli::BenchTable as Args;
use crate::misuse;
use crate::ui::Ui;

pub fn run(args: &Args, ui: &Ui) -> Result<()> {
    let mut table = String::from(
        "| device | case | tokens/s | ms a step | share of the product ceiling | peak GiB | predicted |\n| --- | --- | --- | --- | --- | --- | --- |\n",
    );
    let mut n_lines = 0;
    for path in &args.files {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        for (at, line) in text.lines().enumerate() {
            if let Some(row) = row(path, at + 1, line)? {
                table.push_str(&row);
                n_lines += 1;
            }
        }
    }
    if n_lines == 0 {
        misuse!("no line of `cyrene bench train --json` in these files");
    }
    ui.result(&json!({ "table": table }), || table.trim_end().to_owned())
}

/// A line of another kind gives no row.
fn row(path: &Path, line_no: usize, line: &str) -> Result<Option<String>> {
    if line.trim().is_empty() {
        return Ok(None);
    }
    let place = || format!("{}, line {line_no}", path.display());
    let case: Value =
        serde_json::from_str(line).with_context(|| format!("{}: no JSON", place()))?;
    if case["bench"] != "train" {
        return Ok(None);
    }
    let text = |key: &str| {
        case[key]
            .as_str()
            .with_context(|| format!("{}: no `{key}`", place()))
    };
    let number = |key: &str| {
        case[key]
            .as_f64()
            .with_context(|| format!("{}: no `{key}`", place()))
    };
    let gib = |key: &str| match case[key].as_f64() {
        Some(bytes) => format!("{:.1}", bytes / f64::from(1u32 << 30)),
        None => String::new(),
    };
    let share = match case["ceiling_tflops"].as_f64() {
        Some(ceiling) => format!(
            "{:.0} % of {ceiling:.0} TFLOP/s",
            100.0 * number("model_tflops")? / ceiling
        ),
        None => String::new(),
    };
    let mut row = String::new();
    write!(
        row,
        "| {} | {} {} {}, {} x {} x {} | {:.0} | {:.0} | {share} | {} | {} |",
        text("device_name").or_else(|_| text("device"))?,
        text("size")?,
        text("tuner")?,
        text("dtype")?,
        number("accumulate")?,
        number("rows")?,
        number("row_tokens")?,
        number("tokens_per_s")?,
        number("ms_step")?,
        gib("peak_bytes"),
        gib("predicted_peak_bytes"),
    )?;
    row.push('\n');
    Ok(Some(row))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_becomes_a_row_and_a_broken_one_an_error() {
        let line = r#"{"bench":"train","device":"cuda:0","device_name":"H100","size":"4b","tuner":"full","dtype":"bf16","accumulate":1,"rows":3,"row_tokens":5120,"tokens_per_s":18000.4,"ms_step":853.3,"model_tflops":475.0,"ceiling_tflops":760.0,"peak_bytes":81604378624}"#;
        let path = Path::new("x.jsonl");
        assert_eq!(
            row(path, 1, line).unwrap().unwrap(),
            "| H100 | 4b full bf16, 1 x 3 x 5120 | 18000 | 853 | 62 % of 760 TFLOP/s | 76.0 |  |\n"
        );
        assert!(row(path, 1, "{\"bench\":\"corpus\"}").unwrap().is_none());
        let error = row(path, 4, "{\"bench\":\"train\"}").unwrap_err();
        assert_eq!(format!("{error}"), "x.jsonl, line 4: no `device`");
    }
}
