//! The report as one HTML file: no script, no network, readable at 360 px and in the dark.

use std::fmt::Write;

use report::frame;
use report::look::{escape, thousands};

use super::{Baseline, Report, StageReport};
use crate::metric::loss_gap::{Gap, Loss, RED_FLAG};

/// Bars of text and boxes, not a picture: letters keep their size on a narrow screen.
const BARS: &str = "
.bars { display: grid; grid-template-columns: max-content 1fr; gap: .35rem .9rem; margin: .6rem 0 1rem; max-width: 44rem; }
.bars dd { margin: 0; display: flex; align-items: center; gap: .5rem; } .bars span { height: 1.1em; border-radius: 3px; }
";

/// The whole page.
pub(super) fn page(report: &Report) -> String {
    let mut out = String::new();
    let _ = write!(
        out,
        "<p class=\"soft\">{params} parameters · {version} · split {split}</p><p>{note}</p>",
        params = thousands(report.n_params),
        version = escape(&report.version),
        split = escape(report.split_sha256.get(..12).unwrap_or("")),
        note = escape(&report.note),
    );
    let verdict = if report.red_flag {
        (
            "flag",
            format!(
                "Red flag: held-out loss is more than {:.0} % above the train probe. Train fewer passes, or use the best checkpoint.",
                100.0 * RED_FLAG
            ),
        )
    } else {
        (
            "",
            format!(
                "No red flag: held-out loss is within {:.0} % of the train probe.",
                100.0 * RED_FLAG
            ),
        )
    };
    let _ = write!(out, "<p class=\"verdict {}\">{}</p>", verdict.0, verdict.1);
    for stage in &report.stages {
        section(&mut out, stage);
    }
    if !report.replies.is_empty() {
        let known = report.known_words.map_or(String::new(), |share| {
            format!(
                " On average {:.0} % of a reply's words occur in the story.",
                100.0 * share
            )
        });
        let _ = write!(
            out,
            "<h2>Replies to held-out turns</h2><p class=\"soft\">Nothing here was chosen by hand.{known}</p>"
        );
        for reply in &report.replies {
            let _ = write!(
                out,
                "<div class=\"reply\"><div class=\"who\">{} · {}</div><b>▸</b> {}\n<b>{}</b> {}</div>",
                escape(&reply.language),
                escape(&reply.scene),
                escape(&reply.prompt),
                escape(&report.model),
                escape(&reply.reply),
            );
        }
    }
    frame::page(&format!("Evaluation of {}", report.model), &[BARS], &out)
}

fn section(out: &mut String, stage: &StageReport) {
    let title = match stage.stage {
        "pt" => "Story text",
        _ => "Conversations (the character's lines only)",
    };
    let _ = write!(out, "<h2>{title}</h2>");
    bars(out, stage);
    out.push_str("<div class=\"scroll\"><table><tr><th>language</th><th>held-out nats/token</th><th>train probe</th><th>gap</th><th>95 %</th><th>bits/byte</th><th>before training</th><th>rows</th><th>tokens</th></tr>");
    for gap in &stage.gaps {
        let before = stage
            .base
            .iter()
            .flatten()
            .find(|base| base.language == gap.language);
        let (gap_cell, interval) = match gap.gap.is_nan() {
            true => ("–".to_owned(), "–".to_owned()),
            false => (
                format!("{:+.1} %", 100.0 * gap.gap),
                format!(
                    "{:+.1} … {:+.1} %",
                    100.0 * gap.gap_low,
                    100.0 * gap.gap_high
                ),
            ),
        };
        let _ = write!(
            out,
            "<tr><td>{}</td><td>{:.3}</td><td>{}</td><td class=\"{}\">{gap_cell}</td><td>{interval}</td><td>{:.3}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            escape(&gap.language),
            gap.held_out.nats_per_token,
            match gap.train_probe.tokens {
                0 => "–".to_owned(),
                _ => format!("{:.3}", gap.train_probe.nats_per_token),
            },
            if gap.red_flag { "red" } else { "ok" },
            gap.held_out.bits_per_byte,
            before.map_or("–".into(), |base: &Gap| format!(
                "{:.3}",
                base.held_out.nats_per_token
            )),
            gap.held_out.rows,
            thousands(gap.held_out.tokens as u64),
        );
    }
    out.push_str("</table></div>");
    if !stage.probe_not_recorded.is_empty() {
        let _ = write!(
            out,
            "<p class=\"soft\">Train probe in {}: rows of the split's train side, which this model may not have been trained on: no record beside its weights (trained_rows.json) has any of them.</p>",
            escape(&stage.probe_not_recorded.join(", "))
        );
    }
    if let Some(added) = stage.gap_over_base {
        let _ = write!(
            out,
            "<p class=\"soft\">Relative to the model before training, whose gap on the same rows comes from the rows alone, training added {:+.1} %.</p>",
            100.0 * added
        );
    }
    sides(out, stage);
}

/// Bits a byte on every held-out side, by language.
fn sides(out: &mut String, stage: &StageReport) {
    if stage.sides.is_empty() {
        return;
    }
    out.push_str("<p class=\"soft\">Bits a byte by held-out side: val (scenes), val-strict (whole missions with all that retells them), probe-x (scenes whose other translations were trained on). X: val minus probe-x between rows of the same length; above zero, the other translations taught something.</p><div class=\"scroll\"><table><tr><th>language</th><th>val</th><th>val-strict</th><th>probe-x</th><th>X</th></tr>");
    let bits = |loss: &Option<Loss>| {
        loss.map_or("–".to_owned(), |loss| {
            format!("{:.3}", loss.bits_per_byte)
        })
    };
    for line in &stage.sides {
        let _ = write!(
            out,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            escape(&line.language),
            bits(&Some(line.val).filter(|loss| loss.rows > 0)),
            bits(&line.val_strict),
            bits(&line.probe_x),
            line.transfer.map_or("–".to_owned(), |x| format!("{x:+.3}")),
        );
    }
    out.push_str("</table></div>");
}

/// Held-out bits a byte of every contestant, as horizontal bars.
fn bars(out: &mut String, stage: &StageReport) {
    let mut rows: Vec<(String, f64, &str)> = Vec::new();
    if let Some(all) = stage.gaps.first() {
        rows.push(("this model".into(), all.held_out.bits_per_byte, "--blue"));
    }
    if let Some(base) = stage.base.as_ref().and_then(|base| base.first()) {
        rows.push((
            "before training".into(),
            base.held_out.bits_per_byte,
            "--soft",
        ));
    }
    rows.extend(stage.baselines.iter().map(
        |Baseline {
             name,
             bits_per_byte,
             ..
         }| (String::from(*name), *bits_per_byte, "--amber"),
    ));
    rows.sort_by(|a, b| a.1.total_cmp(&b.1));
    let longest = rows.iter().map(|row| row.1).fold(f64::EPSILON, f64::max);
    out.push_str(
        "<p class=\"soft\">Held-out bits a byte; shorter is better.</p><dl class=\"bars\">",
    );
    for (name, bits, colour) in rows {
        let _ = write!(
            out,
            "<dt>{}</dt><dd><span style=\"width:{:.1}%;background:var({colour})\"></span>{bits:.3}</dd>",
            escape(&name),
            80.0 * bits / longest,
        );
    }
    out.push_str("</dl>");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_escapes_what_a_model_says() {
        let report = Report {
            model: "<b>".into(),
            n_params: 4_321_000,
            note: "a & b".into(),
            version: String::new(),
            split_sha256: String::new(),
            stages: vec![],
            replies: vec![super::super::Reply {
                language: "en".into(),
                scene: "s".into(),
                prompt: "hi".into(),
                reply: "<script>alert(1)</script>".into(),
                finish_reason: "stop".into(),
                known_words: None,
            }],
            known_words: None,
            red_flag: true,
        };
        let page = page(&report);
        assert!(!page.contains("<script>") && page.contains("&lt;script&gt;"));
        assert!(page.contains("4,321,000") && page.contains("Red flag"));
    }
}
