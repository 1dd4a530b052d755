//! Every task on the small tree of `../shared/story` gives the expected files, byte for byte.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::shared;
use corpus::{BuildRequest, Side, SourceKind, SplitOptions, SplitRequest, Task};

struct Golden {
    folder: tempfile::TempDir,
    tokenizer: text::Tokenizer,
}

impl Golden {
    fn unpack() -> Option<Golden> {
        let shared = shared()?;
        let folder = tempfile::tempdir().unwrap();
        for archive in ["tree_small.tar.gz", "expected_small.tar.gz"] {
            let file = std::fs::File::open(shared.join("story").join(archive)).unwrap();
            tar::Archive::new(flate2::read::GzDecoder::new(file))
                .unpack(folder.path())
                .unwrap();
        }
        let tokenizer =
            text::Tokenizer::load(&shared.join("reference/tokenizer/tokenizer.json.gz"))
                .unwrap()
                .with_pattern(text::WordPattern::Qwen2);
        Some(Golden { folder, tokenizer })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn build(&self, root: &str, tasks: &[Task]) -> corpus::BuildReport {
        let character = common::character("cyrene.toml");
        let request = BuildRequest {
            source: SourceKind::TurnBasedGame,
            root: &self.path(root),
            character: &character,
            tasks,
            languages: None,
            out: &self.path("out"),
        };
        let count = |text: &str| self.tokenizer.count(text).unwrap();
        corpus::build(&request, corpus::Counters::of_rules(&count), &|_| {}).unwrap()
    }

    fn check_same(&self, relative: &str) {
        let read = |root: &str| std::fs::read(self.path(root).join(relative)).unwrap();
        let (got, expect) = (read("out"), read("expected"));
        if got == expect {
            return;
        }
        let mut got = got.split(|b| *b == b'\n');
        for (idx, expect) in expect.split(|b| *b == b'\n').enumerate() {
            let got = got.next().unwrap_or_default();
            let differs = got.iter().zip(expect).position(|(a, b)| a != b);
            let from = differs
                .unwrap_or(got.len().min(expect.len()))
                .saturating_sub(60);
            let lossy = |bytes: &[u8]| {
                let end = bytes.len().min(from + 200);
                String::from_utf8_lossy(&bytes[from.min(end)..end]).into_owned()
            };
            assert!(
                got == expect,
                "{relative}, line {}, byte {from}:\n{}\nexpected\n{}",
                idx + 1,
                lossy(got),
                lossy(expect)
            );
        }
        panic!("{relative}: there is more than expected");
    }

    fn check_task(&self, task: Task) {
        for entry in std::fs::read_dir(self.path("expected").join(task.name())).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            self.check_same(&format!("{task}/{name}"));
        }
        self.check_same(&format!("{task}.json"));
    }
}

#[test]
fn small_tree_gives_the_expected_files() {
    let Some(golden) = Golden::unpack() else {
        return;
    };
    let tasks = [
        Task::PtEverything,
        Task::PtAmphoreus,
        Task::SftEverything,
        Task::SftAmphoreus,
        Task::SftCyrene,
    ];
    let report = golden.build("tree", &tasks);
    for task in tasks {
        golden.check_task(task);
    }
    assert_eq!(report.datasets[&Task::PtEverything].n_tokens(), 1_872_196);
    assert_eq!(report.datasets[&Task::SftCyrene].n_rows(), 1_320);

    // The split knows every row and keeps all translations of a scene on one side.
    let character = common::character("cyrene.toml");
    let request = SplitRequest {
        source: SourceKind::TurnBasedGame,
        root: &golden.path("tree"),
        vendor: None,
        character: &character,
        options: SplitOptions::default(),
    };
    let split = corpus::make_split(&request).unwrap();
    for task in tasks {
        let path: &Path = &golden.path("out").join(task.name());
        let rows = corpus::rows::load(path, Some(&split)).unwrap();
        assert!(rows.iter().any(|r| r.side == Side::Val), "{task}");
        assert!(rows.iter().any(|r| r.side == Side::Train), "{task}");
    }

    // Split with its pages, tree and vendor folder may be built beside the split, each after the other.
    golden.build("vendor", &[Task::PtVendor]);
    let vendor = golden.path("vendor");
    let split = corpus::make_split(&SplitRequest {
        vendor: Some(&vendor),
        ..request
    })
    .unwrap();
    for (root, task) in [("tree", Task::SftEverything), ("vendor", Task::PtVendor)] {
        let request = BuildRequest {
            source: SourceKind::TurnBasedGame,
            root: &golden.path(root),
            character: &character,
            tasks: &[task],
            languages: None,
            out: &golden.path("out"),
        };
        corpus::check_split(&request, &split).unwrap();
        let path = golden.path("out").join(task.name());
        corpus::rows::load(&path, Some(&split)).unwrap();
    }
}

#[test]
fn vendor_folder_gives_the_expected_files() {
    let Some(golden) = Golden::unpack() else {
        return;
    };
    let report = golden.build("vendor", &[Task::PtVendor]);
    golden.check_same("pt/vendor/coig.jsonl");
    // The expected pages stand in the order in which some system listed its folder: compare as a set.
    let sorted = |root: &str| {
        let text =
            std::fs::read_to_string(golden.path(root).join("pt/vendor/miyoushe.jsonl")).unwrap();
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert!(sorted("out") == sorted("expected"), "pages differ");
    let tokens = |root: &str| {
        let text = std::fs::read(golden.path(root).join("pt/vendor.json")).unwrap();
        let mut tokens: BTreeMap<String, Vec<u64>> = serde_json::from_slice(&text).unwrap();
        tokens.values_mut().for_each(|t| t.sort_unstable());
        tokens
    };
    assert_eq!(tokens("out"), tokens("expected"));
    assert_eq!(report.n_tokens(), 5_347 + 11_964);
}
