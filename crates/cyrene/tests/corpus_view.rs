//! `corpus stats`, `peek` and `export` from outside: pages that are XML, numbers that agree, masks that training has.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::path::Path;

use serde_json::Value;

use common::{demo, fails, succeeds};

fn json_lines(text: &str) -> Vec<Value> {
    let lines = text.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// A path in the demo's run folder.
fn of(relative: &str) -> String {
    demo().join(relative).to_str().unwrap().to_owned()
}

/// A recipe that shows the conversations five times, three languages alike.
fn recipe(dir: &Path) -> String {
    let path = dir.join("recipe.toml");
    let text = format!(
        "stage = \"sft\"\nbase = \"x\"\n[data]\nsplit = '{}'\nsources = [{{ path = '{}', weight = 5 }}]\n",
        of("corpus/split.json"),
        of("corpus/sft/cyrene")
    );
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

/// The page's tables: its head and body cells, behind the heading they stand under.
fn tables(page: &str) -> Vec<(String, Vec<Vec<String>>)> {
    let options = roxmltree::ParsingOptions {
        allow_dtd: true,
        ..Default::default()
    };
    let xml = roxmltree::Document::parse_with_options(page, options).unwrap();
    let text = |node: roxmltree::Node<'_, '_>| -> String {
        let texts = node
            .descendants()
            .filter_map(|n| n.text().filter(|_| n.is_text()));
        texts.collect()
    };
    let mut heads = Vec::new();
    let mut found = Vec::new();
    for node in xml.descendants() {
        match node.tag_name().name() {
            "h2" => heads = vec![text(node)],
            "h3" => {
                heads.truncate(1);
                heads.push(text(node));
            }
            "table" => {
                let rows = node.descendants().filter(|n| n.has_tag_name("tr"));
                let cells = |row: roxmltree::Node<'_, '_>| row.children().map(text).collect();
                found.push((heads.join(": "), rows.map(cells).collect()));
            }
            _ => {}
        }
    }
    found
}

fn number(cell: &str) -> f64 {
    cell.replace(',', "").parse().unwrap()
}

#[test]
fn page_and_pictures_are_xml_without_script_and_agree_with_json() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("stats");
    let json = succeeds(&[
        "corpus",
        "stats",
        &of("corpus"),
        "--recipe",
        &recipe(dir.path()),
        "--out",
        out.to_str().unwrap(),
        "--json",
    ]);
    let json: Value = serde_json::from_str(&json).unwrap();
    let files: Vec<&str> = json["files"]
        .as_array()
        .unwrap()
        .iter()
        .map(|f| f.as_str().unwrap())
        .collect();
    assert!(
        files[0].ends_with("stats.html") && files.len() > 8,
        "{files:?}"
    );
    for file in &files {
        let text = std::fs::read_to_string(file).unwrap();
        for word in ["<script", "http://", "https://", "url(", "@import"] {
            let text = text.replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
            assert!(!text.contains(word), "{word} in {file}");
        }
        if file.ends_with(".svg") {
            let xml = roxmltree::Document::parse(&text).unwrap();
            assert!(
                xml.root_element()
                    .has_tag_name(("http://www.w3.org/2000/svg", "svg"))
            );
        }
    }

    let page = std::fs::read_to_string(files[0]).unwrap();
    let tables = tables(&page);
    let table = |name: String| {
        &tables
            .iter()
            .find(|(head, _)| *head == name)
            .unwrap_or_else(|| panic!("no {name}"))
            .1
    };
    for dataset in json["datasets"].as_array().unwrap() {
        let task = dataset["task"].as_str().unwrap();
        // 1. lengths, and the histogram
        let lengths = table(format!("{task}: Length of rows"));
        let tails = table(format!("{task}: Length of rows, language by language"));
        let sides = table(format!("{task}: Sides of the split"));
        for (at, file) in dataset["files"].as_array().unwrap().iter().enumerate() {
            let row = &lengths[at + 1];
            assert_eq!(row[0], file["key"].as_str().unwrap());
            for (cell, key) in row[1..]
                .iter()
                .zip(["n_rows", "n_tokens", "median", "p95", "longest"])
            {
                assert_eq!(number(cell), file[key].as_f64().unwrap(), "{task} {key}");
            }
            let bins = file["histogram"]
                .as_array()
                .unwrap()
                .iter()
                .map(|bin| bin["n_rows"].as_f64().unwrap());
            let column: Vec<f64> = tails[1..].iter().map(|row| number(&row[at + 1])).collect();
            let bins: Vec<f64> = bins.skip_while(|n| *n == 0.0).collect();
            let skipped: Vec<f64> = column
                .iter()
                .copied()
                .skip_while(|n| *n == 0.0)
                .take(bins.len())
                .collect();
            assert_eq!(skipped, bins, "{task} {}", row[0]);
            // 2. the sides together are the whole
            let sum = |from: usize| {
                sides[at + 1][from..]
                    .iter()
                    .step_by(2)
                    .map(|cell| number(cell))
                    .sum::<f64>()
            };
            assert_eq!(
                (sum(1), sum(2)),
                (
                    file["n_rows"].as_f64().unwrap(),
                    file["n_tokens"].as_f64().unwrap()
                )
            );
        }
    }
    // 3. passes, which are too many
    let passes = table("Passes of the recipe: Passes over a scene in the same language".to_owned());
    for (row, language) in passes[1..]
        .iter()
        .zip(json["passes"]["languages"].as_array().unwrap())
    {
        assert_eq!(row[0], language["key"].as_str().unwrap());
        assert_eq!((number(&row[2]), number(&row[3])), (5.0, 5.0));
    }
    assert!(json["passes"]["n_above_limit"].as_u64().unwrap() > 0);
    assert!(page.contains("more than 4 times"));
}

#[test]
fn stats_says_on_the_terminal_what_json_says() {
    let text = succeeds(&[
        "corpus",
        "stats",
        &of("corpus/sft/cyrene"),
        "--split",
        &of("corpus/split.json"),
    ]);
    let json = succeeds(&["corpus", "stats", &of("corpus/sft/cyrene"), "--json"]);
    let json: Value = serde_json::from_str(&json).unwrap();
    let dataset = &json["datasets"][0];
    assert_eq!(dataset["sides"], Value::Array(vec![]), "no split was given");
    for file in dataset["files"].as_array().unwrap() {
        let key = file["key"].as_str().unwrap();
        let line = text
            .lines()
            .find(|line| line.trim_start().starts_with(&format!("{key} ")))
            .unwrap();
        let cells: Vec<&str> = line.split_whitespace().collect();
        for (cell, name) in cells[1..]
            .iter()
            .zip(["n_rows", "n_tokens", "median", "p95", "longest"])
        {
            assert_eq!(number(cell), file[name].as_f64().unwrap(), "{key} {name}");
        }
        assert!(line.contains('█'), "{line}");
    }
    assert!(text.contains("scenes by side: train "));
}

#[test]
fn stats_names_what_is_no_data_set() {
    fails(&["corpus", "stats"], 2, &["PATHS"]);
    fails(
        &["corpus", "stats", "nowhere"],
        2,
        &["nowhere", "corpus build"],
    );
    let dir = tempfile::tempdir().unwrap();
    let empty = dir.path().to_str().unwrap();
    fails(&["corpus", "stats", empty], 1, &["manifest.json"]);
}

/// Peeked rows beside what `corpus encode` says of the same rows.
fn peek_equals_encode(stage: &str, dataset: &str, more: &[&str]) {
    let tokenizer = of("fetch/model");
    let folder = of(dataset);
    let mut args = vec![
        "corpus",
        "peek",
        &folder,
        "--stage",
        stage,
        "--tokenizer",
        &tokenizer,
        "-n",
        "12",
        "--json",
    ];
    args.extend(more);
    let rows = json_lines(&succeeds(&args));
    assert_eq!(rows.len(), 12);
    for row in rows {
        let file = row["file"].as_str().unwrap();
        let mut args = vec![
            "corpus",
            "encode",
            "--stage",
            stage,
            "--tokenizer",
            &tokenizer,
            file,
        ];
        args.extend(more);
        let encoded = json_lines(&succeeds(&args));
        let encoded = &encoded[row["row"].as_u64().unwrap() as usize - 1];
        for key in ["input_ids", "labels"] {
            assert_eq!(row[key], encoded[key], "{file} {key}");
        }
        let labels = row["labels"].as_array().unwrap();
        let trained = labels.iter().filter(|label| **label != -100).count() as u64;
        assert_eq!(
            (row["tokens"].as_u64(), row["trained"].as_u64()),
            (Some(labels.len() as u64), Some(trained))
        );
    }
}

#[test]
fn peeked_mask_is_that_of_encode() {
    peek_equals_encode("sft", "corpus/sft/cyrene", &[]);
    peek_equals_encode("sft", "corpus/sft/cyrene", &["--loss-scale", "last-round"]);
    peek_equals_encode("cpt", "corpus/pt/everything", &[]);
}

#[test]
fn peek_draws_the_same_rows_for_the_same_seed_and_language() {
    let peek = |seed: &str| {
        let args = [
            "corpus",
            "peek",
            &of("corpus/sft/cyrene"),
            "--stage",
            "sft",
            "--tokenizer",
            &of("fetch/model"),
            "--seed",
            seed,
            "--language",
            "en",
        ];
        succeeds(&args)
    };
    let text = peek("1");
    assert_eq!(text, peek("1"));
    assert!((2..6).any(|seed| peek(&seed.to_string()) != text));
    assert!(
        !text.contains('\u{1b}'),
        "no colours where there is no terminal"
    );
    assert_eq!(text.matches("en.jsonl row ").count(), 4, "{text}");
    assert!(text.contains("<think>↵\n↵\n</think>"), "{text}");
    assert!(text.contains("<|im_end|>↵⟧"), "{text}");
    assert!(text.contains("4 rows, "));
}

#[test]
fn peeked_page_has_the_rows_and_their_mask() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("peek.html");
    let args = [
        "corpus",
        "peek",
        &of("corpus/sft/cyrene"),
        "--stage",
        "sft",
        "--tokenizer",
        &of("fetch/model"),
        "--json",
        "--html",
        path.to_str().unwrap(),
    ];
    let rows = json_lines(&succeeds(&args));
    let page = std::fs::read_to_string(path).unwrap();
    let options = roxmltree::ParsingOptions {
        allow_dtd: true,
        ..Default::default()
    };
    let xml = roxmltree::Document::parse_with_options(&page, options).unwrap();
    let class = |node: &roxmltree::Node<'_, '_>| node.attribute("class").unwrap_or("").to_owned();
    let shown: Vec<_> = xml
        .descendants()
        .filter(|node| class(node) == "row")
        .collect();
    assert_eq!(shown.len(), rows.len());
    for (shown, row) in shown.iter().zip(&rows) {
        let shown: Vec<(String, String)> = shown
            .children()
            .map(|span| {
                let texts = span.descendants().filter(|n| n.is_text());
                (class(&span), texts.filter_map(|n| n.text()).collect())
            })
            .collect();
        let spans = row["spans"].as_array().unwrap().iter().map(|span| {
            let kind = span["kind"].as_str().unwrap();
            let trained = if span["trained"] == true {
                " trained"
            } else {
                ""
            };
            let text = span["text"].as_str().unwrap().replace('\n', "↵\n");
            (format!("{kind}{trained}"), text)
        });
        assert_eq!(shown, spans.collect::<Vec<_>>());
        let last = shown.last().unwrap();
        assert_eq!(
            (last.0.as_str(), last.1.as_str()),
            ("mark trained", "<|im_end|>↵\n")
        );
    }
}

#[test]
fn peek_reads_any_rows_that_train_reads() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("rows.jsonl");
    std::fs::write(
        &file,
        "{\"text\":\"The water came.\"}\n{\"input_ids\":[1,2,3],\"labels\":[-100,-100,3]}\n",
    )
    .unwrap();
    let args = [
        "corpus",
        "peek",
        file.to_str().unwrap(),
        "--stage",
        "cpt",
        "--tokenizer",
        &of("fetch/model"),
        "--json",
    ];
    let mut rows = json_lines(&succeeds(&args));
    rows.sort_by_key(|row| row["row"].as_u64());
    assert_eq!(rows.len(), 2);
    assert_eq!(
        rows[0]["spans"].as_array().unwrap().last().unwrap()["text"],
        "<|im_end|>"
    );
    assert_eq!(rows[1]["trained"], 1);
    let mut args = args;
    args[2] = "nowhere.jsonl";
    fails(&args, 2, &["nowhere.jsonl"]);
}

#[test]
fn export_writes_parquet_beside_every_file() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().to_str().unwrap();
    let json = succeeds(&[
        "corpus",
        "export",
        &of("corpus"),
        "--split",
        &of("corpus/split.json"),
        "--out",
        out,
        "--json",
    ]);
    let json: Value = serde_json::from_str(&json).unwrap();
    let files = json["files"].as_array().unwrap();
    let stats = succeeds(&["corpus", "stats", &of("corpus"), "--json"]);
    let stats: Value = serde_json::from_str(&stats).unwrap();
    let expected = stats["datasets"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|dataset| {
            let task = dataset["task"].as_str().unwrap();
            let files = dataset["files"].as_array().unwrap().iter();
            files.map(move |file| {
                (
                    format!("{task}/{}.parquet", file["key"].as_str().unwrap()),
                    &file["n_rows"],
                )
            })
        });
    let expected: Vec<_> = expected.collect();
    assert_eq!(files.len(), expected.len());
    for (file, (path, n_rows)) in files.iter().zip(expected) {
        let bytes = std::fs::read(dir.path().join(&path)).unwrap();
        assert_eq!(
            (&bytes[..4], &bytes[bytes.len() - 4..]),
            (&b"PAR1"[..], &b"PAR1"[..])
        );
        assert_eq!(
            (&file["n_rows"], file["bytes"].as_u64()),
            (n_rows, Some(bytes.len() as u64)),
            "{path}"
        );
    }
}
