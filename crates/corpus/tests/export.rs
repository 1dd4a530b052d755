//! Parquet files hold the rows of the JSON lines: written by us, read back by the `parquet` crate.
#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

use std::fs::File;
use std::path::{Path, PathBuf};

use corpus::{BuildRequest, Character, SourceKind, SplitOptions, SplitRequest, Task, export, rows};
use parquet::file::reader::{FileReader, SerializedFileReader};
use serde_json::{Value, json};

fn read(path: &Path) -> Vec<Value> {
    let reader = SerializedFileReader::new(File::open(path).unwrap()).unwrap();
    let rows = reader.get_row_iter(None).unwrap();
    rows.map(|row| row.unwrap().to_json_value()).collect()
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// A data set with the corners that builds have: no message, no scene, several scenes, no language.
fn write_corners(out: &Path) {
    let lines = [
        json!({"messages": [{"role": "system", "content": "Ada"}, {"role": "user", "content": ""}, {"role": "assistant", "content": "好"}]}),
        json!({"messages": [{"role": "assistant", "content": "a\nb\nc"}]}),
        json!({"messages": []}),
    ];
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    std::fs::create_dir_all(out.join("pt/vendor")).unwrap();
    std::fs::write(out.join("pt/vendor/wiki.jsonl"), text).unwrap();
    std::fs::write(
        out.join("pt/vendor.json"),
        r#"{"wiki": [3, 4000000000, 0]}"#,
    )
    .unwrap();
    let manifest = json!({ "version": 3, "datasets": { "pt/vendor": {
        "source": "story", "source_sha256": "", "source_files": {}, "character": "ada", "character_sha256": "",
        "tokens_file": "pt/vendor.json", "tokens_sha256": "", "scenes": ["s", "t"], "warnings": [],
        "files": [{
            "path": "pt/vendor/wiki.jsonl", "key": "wiki", "language": null, "sha256": "", "bytes": 0, "n_rows": 3, "n_tokens": 0,
            "holes": {}, "filtered": {}, "rows": [0, [[1, 1, 1], [0, 2, 2]], []],
        }],
    }}});
    std::fs::write(out.join("manifest.json"), manifest.to_string()).unwrap();
}

#[test]
fn corners_survive_the_round_trip() {
    let folder = tempfile::tempdir().unwrap();
    write_corners(folder.path());
    let written = export::parquet(&folder.path().join("pt/vendor"), None, None).unwrap();
    assert_eq!(written.len(), 1);
    assert_eq!(
        (written[0].n_rows, names(&folder.path().join("pt/vendor"))),
        (3, vec!["wiki.jsonl".to_owned(), "wiki.parquet".to_owned()])
    );
    let scene =
        |scene, n: Option<u32>| json!({ "scene": scene, "lines": n, "tokens": n, "side": null });
    assert_eq!(
        read(&written[0].path),
        [
            json!({
                "messages": [{"role": "system", "content": "Ada"}, {"role": "user", "content": ""}, {"role": "assistant", "content": "好"}],
                "language": null, "scene": "s", "scenes": [scene("s", None)], "tokens": 3, "side": null,
            }),
            json!({
                "messages": [{"role": "assistant", "content": "a\nb\nc"}],
                "language": null, "scene": "t", "scenes": [scene("t", Some(1)), scene("s", Some(2))], "tokens": 4_000_000_000_u64, "side": null,
            }),
            json!({ "messages": [], "language": null, "scene": null, "scenes": [], "tokens": 0, "side": null }),
        ]
    );
}

#[test]
fn damaged_data_set_leaves_no_file() {
    let folder = tempfile::tempdir().unwrap();
    write_corners(folder.path());
    let jsonl = folder.path().join("pt/vendor/wiki.jsonl");
    let text = std::fs::read_to_string(&jsonl).unwrap();
    std::fs::write(&jsonl, &text[..text.len() - 10]).unwrap();
    let error = export::parquet(&folder.path().join("pt/vendor"), None, None).unwrap_err();
    assert!(error.to_string().contains("wiki.jsonl:3:"), "{error}");
    assert_eq!(names(&folder.path().join("pt/vendor")), ["wiki.jsonl"]);
}

/// The story and the character that come with the program.
fn demo(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .join(name)
}

#[test]
fn parquet_has_the_rows_and_sides_of_the_json_lines() {
    let folder = tempfile::tempdir().unwrap();
    let character = Character::load(&demo("characters/ovelle.toml")).unwrap();
    let tasks = [Task::PtEverything, Task::SftCyrene];
    let request = BuildRequest {
        source: SourceKind::Story,
        root: &demo("demo/story.jsonl"),
        character: &character,
        tasks: &tasks,
        languages: None,
        out: folder.path(),
    };
    corpus::build(
        &request,
        corpus::Counters::of_rules(&|text| text.chars().count()),
        &|_| {},
    )
    .unwrap();
    let split = corpus::make_split(&SplitRequest {
        source: request.source,
        root: request.root,
        vendor: None,
        character: &character,
        options: SplitOptions::default(),
    })
    .unwrap();
    for path in rows::datasets(folder.path()).unwrap() {
        let out = folder.path().join("parquet");
        let written = export::parquet(&path, Some(&split), Some(&out)).unwrap();
        let got: Vec<Value> = written.iter().flat_map(|file| read(&file.path)).collect();
        let expected: Vec<Value> = rows::load(&path, Some(&split)).unwrap().into_iter().map(|row| {
            let messages: Vec<Value> = row.messages.iter().map(|m| json!({ "role": m.role, "content": m.content })).collect();
            json!({ "messages": messages, "language": row.language, "scene": row.scene, "side": row.side })
        }).collect();
        assert_eq!(got.len(), expected.len());
        let counts: Value =
            serde_json::from_slice(&std::fs::read(path.with_extension("json")).unwrap()).unwrap();
        let counts = counts
            .as_object()
            .unwrap()
            .values()
            .flat_map(|c| c.as_array().unwrap());
        for ((mut got, expected), tokens) in got.into_iter().zip(expected).zip(counts) {
            let row = got.as_object_mut().unwrap();
            assert_eq!(row.remove("tokens").as_ref(), Some(tokens));
            assert_eq!(row.remove("scenes").unwrap()[0]["side"], expected["side"]);
            assert_eq!(got, expected);
        }
        let sides = |side| {
            rows::load(&path, Some(&split))
                .unwrap()
                .iter()
                .any(|row| (row.side == corpus::Side::Train) == side)
        };
        assert!(sides(true) && sides(false), "the demo holds scenes out");
    }
}

#[test]
fn long_data_set_has_several_row_groups() {
    let folder = tempfile::tempdir().unwrap();
    write_corners(folder.path());
    let long = json!({"messages": [{"role": "assistant", "content": "x".repeat(20 << 20)}]});
    std::fs::write(
        folder.path().join("pt/vendor/wiki.jsonl"),
        format!("{long}\n").repeat(3),
    )
    .unwrap();
    let written = export::parquet(&folder.path().join("pt/vendor"), None, None).unwrap();
    let reader = SerializedFileReader::new(File::open(&written[0].path).unwrap()).unwrap();
    let groups: Vec<i64> = reader
        .metadata()
        .row_groups()
        .iter()
        .map(|g| g.num_rows())
        .collect();
    assert_eq!(groups, [2, 1]);
    assert_eq!(read(&written[0].path).len(), 3);
    assert_eq!(
        std::fs::metadata(&written[0].path).unwrap().len(),
        written[0].bytes
    );
}
