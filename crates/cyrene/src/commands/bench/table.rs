//! `cyrene bench table`: the Markdown tables of docs/training-speed.md from the lines that `bench train --json` and `bench ops --json`
//! printed.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::cli::BenchTable as Args;
use crate::misuse;
use crate::ui::Ui;

const TRAIN_HEAD: &str = "| device | case | tokens/s | ms a step | share of the product ceiling | peak GiB | predicted |\n| --- | --- | --- | --- | --- | --- | --- |\n";
const OPS_HEAD: &str = "| device | primitive | shape | ms | floor | bound by | share of the floor |\n| --- | --- | --- | --- | --- | --- | --- |\n";

/// Runs the command; the error is a [`crate::ui::Misuse`] where the arguments are at fault.
pub fn run(args: &Args, ui: &Ui) -> Result<()> {
    let (mut train, mut ops) = (String::new(), String::new());
    for path in &args.files {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        for (at, line) in text.lines().enumerate() {
            let Some(line) = Line::read(path, at + 1, line)? else {
                continue;
            };
            match line.value["bench"].as_str() {
                Some("train") => train.push_str(&line.train_row()?),
                Some("ops") => ops.push_str(&line.ops_row()?),
                // Of another bench.
                _ => (),
            }
        }
    }
    if train.is_empty() && ops.is_empty() {
        misuse!("no line of `cyrene bench train --json` or `bench ops --json` in these files");
    }
    let with_head = |head: &str, rows: String| match rows.is_empty() {
        true => rows,
        false => format!("{head}{rows}"),
    };
    let tables = [with_head(TRAIN_HEAD, train), with_head(OPS_HEAD, ops)];
    let table = tables.join("\n").trim().to_owned();
    ui.result(&json!({ "table": table }), || table.clone())
}

/// A line of JSON, and where it stands.
struct Line<'a> {
    path: &'a Path,
    number: usize,
    value: Value,
}

impl Line<'_> {
    /// None of an empty one.
    fn read<'a>(path: &'a Path, number: usize, text: &str) -> Result<Option<Line<'a>>> {
        if text.trim().is_empty() {
            return Ok(None);
        }
        let value = serde_json::from_str(text)
            .with_context(|| format!("{}, line {number}: no JSON", path.display()))?;
        Ok(Some(Line {
            path,
            number,
            value,
        }))
    }

    fn text(&self, key: &str) -> Result<&str> {
        self.value[key].as_str().with_context(|| self.lacks(key))
    }

    fn number(&self, key: &str) -> Result<f64> {
        self.value[key].as_f64().with_context(|| self.lacks(key))
    }

    fn lacks(&self, key: &str) -> String {
        format!("{}, line {}: no `{key}`", self.path.display(), self.number)
    }

    fn train_row(&self) -> Result<String> {
        let gib = |key: &str| match self.value[key].as_f64() {
            Some(bytes) => format!("{:.1}", bytes / f64::from(1u32 << 30)),
            None => String::new(),
        };
        let share = match self.value["ceiling_tflops"].as_f64() {
            Some(ceiling) => format!(
                "{:.0} % of {ceiling:.0} TFLOP/s",
                100.0 * self.number("model_tflops")? / ceiling
            ),
            None => String::new(),
        };
        Ok(format!(
            "| {} | {} {} {}, {} x {} x {} | {:.0} | {:.0} | {share} | {} | {} |\n",
            self.text("device_name").or_else(|_| self.text("device"))?,
            self.text("size")?,
            self.text("tuner")?,
            self.text("dtype")?,
            self.number("accumulate")?,
            self.number("rows")?,
            self.number("row_tokens")?,
            self.number("tokens_per_s")?,
            self.number("ms_step")?,
            gib("peak_bytes"),
            gib("predicted_peak_bytes"),
        ))
    }

    fn ops_row(&self) -> Result<String> {
        Ok(format!(
            "| {} | {} {} | {} | {:.3} | {:.3} | {} | {:.0} % |\n",
            self.text("device_name")?,
            self.text("op")?,
            self.text("dtype")?,
            self.text("shape")?,
            self.number("ms")?,
            self.number("floor_ms")?,
            self.text("bound")?,
            100.0 * self.number("share")?,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(number: usize, text: &str) -> Line<'static> {
        Line::read(Path::new("x.jsonl"), number, text)
            .unwrap()
            .unwrap()
    }

    #[test]
    fn a_training_line_becomes_a_row_and_a_broken_one_an_error() {
        let line = r#"{"bench":"train","device":"cuda:0","device_name":"H100","size":"4b","tuner":"full","dtype":"bf16","accumulate":1,"rows":3,"row_tokens":5120,"tokens_per_s":18000.4,"ms_step":853.3,"model_tflops":475.0,"ceiling_tflops":760.0,"peak_bytes":81604378624}"#;
        assert_eq!(
            read(1, line).train_row().unwrap(),
            "| H100 | 4b full bf16, 1 x 3 x 5120 | 18000 | 853 | 62 % of 760 TFLOP/s | 76.0 |  |\n"
        );
        let error = read(4, "{\"bench\":\"train\"}").train_row().unwrap_err();
        assert_eq!(format!("{error}"), "x.jsonl, line 4: no `device`");
    }

    #[test]
    fn a_primitives_line_becomes_a_row() {
        let line = r#"{"bench":"ops","op":"swiglu/forward","shape":"t8_f9","dtype":"bf16","ms":2.0,"floor_ms":1.5,"bound":"memory","share":0.75,"device_name":"H100"}"#;
        assert_eq!(
            read(1, line).ops_row().unwrap(),
            "| H100 | swiglu/forward bf16 | t8_f9 | 2.000 | 1.500 | memory | 75 % |\n"
        );
    }
}
