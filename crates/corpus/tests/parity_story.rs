//! The real story of `../shared/story` builds and splits for Delfador.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

mod common;

use common::shared;
use corpus::{
    BuildRequest, Character, Language, Side, SourceKind, SplitOptions, SplitRequest, Task,
};

fn delfador() -> Character {
    common::character("delfador.toml")
}

#[test]
fn real_story_builds_for_delfador() {
    let Some(shared) = shared() else { return };
    let out = tempfile::tempdir().unwrap();
    let character = delfador();
    let request = BuildRequest {
        source: SourceKind::Story,
        root: &shared.join("story/wesnoth_story.jsonl.gz"),
        character: &character,
        tasks: &[
            Task::PtEverything,
            Task::PtAmphoreus,
            Task::SftCyrene,
            Task::SftEverything,
        ],
        languages: None,
        out: out.path(),
    };
    let report = corpus::build(
        &request,
        corpus::Counters::of_rules(&|text| text.len() / 4),
        &|_| {},
    )
    .unwrap();
    let sft = &report.datasets[&Task::SftCyrene];
    assert_eq!(sft.files.len(), 12);
    let english = &sft.files[3];
    assert_eq!(english.language, Some(Language::En));
    assert!((120..=174).contains(&english.n_rows), "{}", english.n_rows);
    assert!(!english.holes.contains_key("text"), "English is whole");
    let everything = &report.datasets[&Task::PtEverything];
    assert!(
        everything.files[3].n_rows >= 2400,
        "{}",
        everything.files[3].n_rows
    );
    for dataset in report.datasets.values() {
        assert_eq!(
            dataset.warnings,
            [],
            "all markup is known to the character file"
        );
    }

    let split_request = SplitRequest {
        source: SourceKind::Story,
        root: request.root,
        vendor: None,
        character: &character,
        options: SplitOptions::default(),
    };
    let split = corpus::make_split(&split_request).unwrap();
    corpus::check_split(&request, &split).unwrap();
    let rows = corpus::rows::load(&out.path().join("sft/cyrene"), Some(&split)).unwrap();
    let held_out = rows.iter().filter(|r| r.side == Side::Val).count();
    let share = held_out as f64 / rows.len() as f64;
    assert!((0.05..0.12).contains(&share), "{share}");
    // All translations of a scene are on one side, but for the one language of a probe.
    let mut sides = std::collections::HashMap::new();
    for row in rows
        .iter()
        .filter(|row| !split.probe_x.contains_key(&row.scene))
    {
        assert_eq!(*sides.entry(&row.scene).or_insert(row.side), row.side);
    }
    for side in [Side::Train, Side::Val, Side::ValStrict, Side::ProbeX] {
        assert!(rows.iter().any(|row| row.side == side), "{side}");
    }
}

#[test]
fn folder_with_the_other_texts_builds_too() {
    let Some(shared) = shared() else { return };
    let out = tempfile::tempdir().unwrap();
    let character = delfador();
    let request = BuildRequest {
        source: SourceKind::Story,
        root: &shared.join("story"),
        character: &character,
        tasks: &[Task::PtEverything],
        languages: Some(&[Language::En]),
        out: out.path(),
    };
    let report = corpus::build(
        &request,
        corpus::Counters::of_rules(&|text| text.len() / 4),
        &|_| {},
    )
    .unwrap();
    let rows = corpus::rows::load(&out.path().join("pt/everything"), None).unwrap();
    let page = rows
        .iter()
        .find(|r| r.scene == "core/unit_type/Blood Bat")
        .unwrap();
    assert!(
        page.text()
            .unwrap()
            .starts_with("Blood Bat\nBlood Bats are so named")
    );
    assert!(rows.len() as u64 == report.datasets[&Task::PtEverything].n_rows());
    println!("{:?}", report.datasets[&Task::PtEverything].warnings);
}
