//! The source `story` from files to rows, on a small story of our own.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

use std::path::{Path, PathBuf};

use corpus::{
    BuildRequest, Character, Error, Language, Side, SourceKind, Split, SplitOptions, SplitRequest,
    Task,
};

const STORY: &str = r#"{"campaign":"sea","scenario":"1","scene":"sea/1","lines":[{"kind":"narration","text":{"en":"The tide <i>turns</i>.","chs":"潮水转了。"}},{"kind":"dialogue","speaker_id":"bo","speaker_name":{"en":"Bo","chs":"波"},"text":{"en":"Where is the boat?","chs":"船在哪里？"}},{"kind":"dialogue","speaker_id":"me","speaker_name":{"en":"Sam","chs":"山姆"},"text":{"en":"I lost it."}},{"kind":"dialogue","speaker_id":"ada","speaker_name":{"en":"Ada","chs":"艾达"},"text":{"en":"(Of course you did.)","chs":"（当然了。）"}},{"kind":"option","text":{"en":"Say sorry"}},{"kind":"dialogue","speaker_id":"ada","speaker_name":{"en":"Ada"},"text":{"en":"Never mind, $name|!"},"variables":true},{"kind":"dialogue","speaker_id":"bo","speaker_name":{"en":"Bo"},"text":{"en":"Hm."}}]}
{"campaign":"sea","scenario":"1","scene":"sea/2","lines":[{"kind":"dialogue","speaker_id":"ada","speaker_name":{"en":"Ada"},"text":{"en":"I talk to myself."}}]}
{"campaign":"land","scenario":"1","scene":"land/1","lines":[{"kind":"objective","text":{"en":"Find the hill"}},{"kind":"dialogue","speaker_id":"bo","speaker_name":{"en":"Bo"},"text":{"en":"A hill."}},{"kind":"dialogue","speaker_id":"cy","speaker_name":{"en":"Cy"},"text":{"en":"A small one."}}]}
{"campaign":"sea","kind":"voice","id":"hello","title":{"en":"Greeting"},"text":{"en":"Hello, sailor."},"speaker_id":"ada","speaker_name":{"en":"Ada"}}
{"campaign":"sea","kind":"wiki","id":"tide","title":{"en":"Tides"},"text":{"en":"They come.\n\n They go. "}}
"#;

const ADA: &str = r#"
languages = ["chs", "en"]
[name]
en = "Ada"
chs = "艾达"
[player]
speaker_ids = ["me"]
[story]
speaker_ids = ["ada"]
[story.markup]
strip = ["i"]
[story.variables]
name = "Sam"
"#;

struct Setup {
    folder: tempfile::TempDir,
    character: Character,
}

impl Setup {
    fn new(story: &str) -> Setup {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("story.jsonl"), story).unwrap();
        let character = Character::parse(ADA, Path::new("ada.toml")).unwrap();
        Setup { folder, character }
    }

    fn root(&self) -> PathBuf {
        self.folder.path().join("story.jsonl")
    }

    fn out(&self) -> PathBuf {
        self.folder.path().join("out")
    }

    fn build(&self, tasks: &[Task]) -> Result<corpus::BuildReport, Error> {
        let request = BuildRequest {
            source: SourceKind::Story,
            root: &self.root(),
            character: &self.character,
            tasks,
            languages: None,
            out: &self.out(),
        };
        corpus::build(
            &request,
            corpus::Counters::of_rules(&|text| text.chars().count()),
            &|_| {},
        )
    }

    fn read(&self, path: &str) -> String {
        std::fs::read_to_string(self.out().join(path)).unwrap()
    }

    /// The contents of every row's messages.
    fn contents(&self, path: &str) -> Vec<Vec<String>> {
        let rows = corpus::rows::load(&self.out().join(path), None).unwrap();
        rows.into_iter()
            .map(|row| row.messages.into_iter().map(|m| m.content).collect())
            .collect()
    }
}

#[test]
fn scenes_become_documents_of_named_lines() {
    let setup = Setup::new(STORY);
    setup.build(&[Task::PtEverything]).unwrap();
    assert_eq!(
        setup.contents("pt/everything/en.jsonl"),
        [
            [
                "The tide turns.\nBo: Where is the boat?\nSam: I lost it.\nAda: (Of course you did.)\nSay sorry\nAda: Never mind, Sam!\nBo: Hm."
            ],
            ["Ada: I talk to myself."],
            ["Find the hill\nBo: A hill.\nCy: A small one."],
            ["Greeting\nAda: Hello, sailor."],
            ["Tides\nThey come.\nThey go."],
        ]
    );
    assert_eq!(
        setup.contents("pt/everything/chs.jsonl"),
        [["潮水转了。\n波：船在哪里？\n艾达：（当然了。）"]]
    );
}

#[test]
fn character_part_is_the_campaigns_she_speaks_in() {
    let setup = Setup::new(STORY);
    setup.build(&[Task::PtAmphoreus]).unwrap();
    let contents = setup.contents("pt/amphoreus/en.jsonl");
    assert_eq!(contents.len(), 4);
    assert!(!contents.iter().any(|c| c[0].contains("hill")));
}

#[test]
fn conversations_bracket_everyone_but_the_player() {
    let setup = Setup::new(STORY);
    let report = setup.build(&[Task::SftCyrene]).unwrap();
    assert_eq!(
        setup.read("sft/cyrene/en.jsonl"),
        "{\"messages\": [{\"role\": \"system\", \"content\": \"Ada\"}, \
         {\"role\": \"user\", \"content\": \"(The tide turns.)\\n(Where is the boat?)\\nI lost it.\"}, \
         {\"role\": \"assistant\", \"content\": \"Of course you did.\"}, \
         {\"role\": \"user\", \"content\": \"Say sorry\"}, \
         {\"role\": \"assistant\", \"content\": \"Never mind, Sam!\"}]}\n\
         {\"messages\": [{\"role\": \"system\", \"content\": \"Ada\"}, \
         {\"role\": \"user\", \"content\": \"Greeting\"}, \
         {\"role\": \"assistant\", \"content\": \"Hello, sailor.\"}]}\n"
    );
    assert_eq!(
        setup.read("sft/cyrene/chs.jsonl"),
        "{\"messages\": [{\"role\": \"system\", \"content\": \"艾达\"}, \
         {\"role\": \"user\", \"content\": \"（潮水转了。）\\n（船在哪里？）\"}, \
         {\"role\": \"assistant\", \"content\": \"当然了。\"}]}\n"
    );
    assert_eq!(
        setup.read("sft/cyrene.json"),
        "{\"chs\": [18], \"en\": [90, 22]}"
    );
    let filtered = &report.datasets[&Task::SftCyrene].files[1].filtered;
    assert_eq!(filtered["assistant talks to nobody"].tokens, 17);
    assert_eq!(
        filtered["user lines that nobody answers"].tokens, 5,
        "(Hm.)"
    );
}

#[test]
fn everyone_who_has_a_name_gets_conversations() {
    let setup = Setup::new(STORY);
    setup.build(&[Task::SftEverything]).unwrap();
    let rows = setup.contents("sft/everything/en.jsonl");
    let systems: Vec<_> = rows.iter().map(|r| r[0].as_str()).collect();
    assert_eq!(systems, ["Bo", "Sam", "Ada", "Cy", "Ada"]);
    assert_eq!(rows[3], ["Cy", "A hill.", "A small one."]);
}

#[test]
fn holes_are_counted() {
    let setup = Setup::new(STORY);
    let report = setup.build(&[Task::SftCyrene]).unwrap();
    let chs = &report.datasets[&Task::SftCyrene].files[0];
    assert_eq!(chs.holes["text"], 6);
}

#[test]
fn folder_is_read_in_name_order_and_gzip_too() {
    use std::io::Write;
    let setup = Setup::new("");
    let folder = setup.folder.path().join("parts");
    std::fs::create_dir(&folder).unwrap();
    let (first, second) = STORY.split_at(STORY.find("\n{\"campaign\":\"land\"").unwrap() + 1);
    std::fs::write(folder.join("2.jsonl"), second).unwrap();
    std::fs::write(folder.join("notes.txt"), "not a story").unwrap();
    let file = std::fs::File::create(folder.join("1.jsonl.gz")).unwrap();
    let mut gzip = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
    gzip.write_all(first.as_bytes()).unwrap();
    gzip.finish().unwrap();

    let whole = Setup::new(STORY);
    whole.build(&[Task::PtEverything]).unwrap();
    let request = BuildRequest {
        source: SourceKind::Story,
        root: &folder,
        character: &setup.character,
        tasks: &[Task::PtEverything],
        languages: Some(&[Language::En]),
        out: &setup.out(),
    };
    corpus::build(&request, corpus::Counters::of_rules(&|t| t.len()), &|_| {}).unwrap();
    assert_eq!(
        setup.read("pt/everything/en.jsonl"),
        whole.read("pt/everything/en.jsonl")
    );
    assert!(!setup.out().join("pt/everything/chs.jsonl").exists());
}

#[test]
fn build_is_the_same_bytes_again_and_keeps_other_data_sets() {
    let setup = Setup::new(STORY);
    setup.build(&[Task::PtEverything]).unwrap();
    setup.build(&[Task::SftCyrene]).unwrap();
    let before = (
        setup.read("manifest.json"),
        setup.read("sft/cyrene/en.jsonl"),
    );
    setup.build(&[Task::SftCyrene, Task::PtEverything]).unwrap();
    assert_eq!(
        before,
        (
            setup.read("manifest.json"),
            setup.read("sft/cyrene/en.jsonl")
        )
    );
}

#[test]
fn failed_build_leaves_no_new_file() {
    let setup = Setup::new(STORY);
    let blocked = setup.out().join("pt/everything/en.jsonl.tmp");
    std::fs::create_dir_all(&blocked).unwrap();
    let error = setup.build(&[Task::PtEverything]).unwrap_err();
    assert!(matches!(error, Error::Write { .. }), "{error}");
    assert!(!setup.out().join("pt/everything/chs.jsonl").exists());
    assert!(!setup.out().join("pt/everything/chs.jsonl.tmp").exists());
    assert!(!setup.out().join("manifest.json").exists());
}

#[test]
fn rows_come_back_with_scene_and_side() {
    let setup = Setup::new(STORY);
    setup.build(&[Task::PtEverything]).unwrap();
    let ids = |ids: &[&str]| ids.iter().map(|s| (*s).to_owned()).collect();
    let mut split = corpus::make_split(&corpus::SplitRequest {
        source: SourceKind::Story,
        root: &setup.root(),
        vendor: None,
        character: &setup.character,
        options: SplitOptions::default(),
    })
    .unwrap();
    split.val = ids(&["sea/1"]);
    split.train = ids(&["sea/2", "land/1", "sea/voice/hello", "sea/wiki/tide"]);
    let rows = corpus::rows::load(&setup.out().join("pt/everything"), Some(&split)).unwrap();
    let sides: Vec<_> = rows
        .iter()
        .map(|r| (r.language.unwrap(), r.scene.as_str(), r.side))
        .collect();
    assert_eq!(sides[0], (Language::Chs, "sea/1", Side::Val));
    assert_eq!(sides[1], (Language::En, "sea/1", Side::Val));
    assert_eq!(sides[5], (Language::En, "sea/wiki/tide", Side::Train));
    assert_eq!(sides.len(), 6);

    split.train = ids(&[]);
    let error = corpus::rows::load(&setup.out().join("pt/everything"), Some(&split)).unwrap_err();
    assert!(
        error.to_string().contains("which the split does not know"),
        "{error}"
    );
}

#[test]
fn task_named_twice_is_built_once() {
    let setup = Setup::new(STORY);
    setup.build(&[Task::SftCyrene, Task::PtEverything]).unwrap();
    let once = setup.read("manifest.json");
    std::fs::remove_dir_all(setup.out()).unwrap();
    let twice = [Task::SftCyrene, Task::PtEverything, Task::SftCyrene];
    let report = setup.build(&twice).unwrap();
    assert_eq!(report.datasets.len(), 2);
    assert_eq!(setup.read("manifest.json"), once);
    assert_eq!(setup.contents("sft/cyrene/en.jsonl").len(), 2);
}

#[test]
fn story_that_changed_after_the_split_is_refused() {
    let setup = Setup::new(STORY);
    let split = |setup: &Setup| {
        let root = setup.root();
        let request = SplitRequest {
            source: SourceKind::Story,
            root: &root,
            vendor: None,
            character: &setup.character,
            options: SplitOptions::default(),
        };
        corpus::make_split(&request).unwrap()
    };
    let old = split(&setup);
    setup.build(&[Task::PtEverything]).unwrap();
    let set = setup.out().join("pt/everything");
    corpus::rows::load(&set, Some(&old)).unwrap();
    // A line more in a scene that the split knows.
    std::fs::write(setup.root(), STORY.replace("A small one.", "A large one.")).unwrap();
    setup.build(&[Task::PtEverything]).unwrap();
    let said = corpus::rows::load(&set, Some(&old))
        .unwrap_err()
        .to_string();
    assert!(
        said.contains("another version of the story's `story`"),
        "{said}"
    );
    assert!(said.contains("cyrene corpus split --force"), "{said}");
    corpus::rows::load(&set, Some(&split(&setup))).unwrap();
}

#[test]
fn texts_of_a_story_tie_as_the_rows_show_them() {
    let line = |text: &str| {
        format!("{{\"kind\":\"narration\",\"text\":{{\"en\":\"{text}\"}},\"variables\":true}}")
    };
    let scene = |n: usize, text: &str| {
        format!(
            "{{\"campaign\":\"c\",\"scenario\":\"{n}\",\"scene\":\"s{n}\",\"lines\":[{}]}}\n",
            line(text)
        )
    };
    let story = [
        scene(1, "The <i>tide</i> turns, $name|."),
        scene(2, "The tide turns, Sam."),
        scene(3, "The tide turns, Tom."),
    ];
    let setup = Setup::new(&story.concat());
    let root = setup.root();
    let request = SplitRequest {
        source: SourceKind::Story,
        root: &root,
        vendor: None,
        character: &setup.character,
        options: SplitOptions::default(),
    };
    let report = corpus::make_split(&request).unwrap().report;
    assert_eq!(report.ties_by_text, 1);
}

#[test]
fn folder_without_manifest_is_no_data_set() {
    let setup = Setup::new(STORY);
    let error = corpus::rows::load(&setup.out().join("pt/everything"), None::<&Split>).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("no folder or file of a data set"),
        "{error}"
    );
}

#[test]
fn character_who_says_nothing_is_an_error_that_names_who_does() {
    let story = STORY.replace("\"ada\"", "\"eve\"");
    let error = Setup::new(&story).build(&[Task::SftCyrene]).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("bo (3), eve (3), cy (1), me (1)"),
        "{error}"
    );
}

// Bad input: each case is one broken line or file and what the error says.

fn check_error(story: &[u8], expect: &str) {
    let setup = Setup::new("");
    std::fs::write(setup.root(), story).unwrap();
    let error = setup.build(&[Task::PtEverything]).unwrap_err().to_string();
    assert!(error.contains(expect), "{error}\n  lacks: {expect}");
    assert!(
        !setup.out().join("pt").exists() || !setup.out().join("pt/everything/en.jsonl").exists()
    );
}

const GOOD: &str = r#"{"campaign":"a","scene":"x","lines":[]}"#;

fn scene_line(line: &str) -> String {
    format!(
        "{GOOD}\n{{\"campaign\":\"a\",\"scene\":\"y\",\"lines\":[{{\"kind\":\"narration\",\"text\":{{}}}},{line}]}}\n"
    )
}

#[test]
fn broken_json_names_line_and_column() {
    check_error(b"{\"campaign\":\"a\"\n", "story.jsonl:1:");
    check_error(
        format!("{GOOD}\n\n{{\"scene\": x}}").as_bytes(),
        "story.jsonl:3:11: expected value; mend",
    );
    check_error(
        b"[]",
        "story.jsonl:1: `the line` must be an object, not a list",
    );
}

#[test]
fn file_that_breaks_off_names_its_last_line() {
    check_error(
        format!("{GOOD}\n{{\"campaign\":\"a\",\"sce").as_bytes(),
        "story.jsonl:2:20: EOF while parsing a string; mend",
    );
}

#[test]
fn half_a_surrogate_pair_names_line_and_column() {
    check_error(
        format!("{GOOD}\n{{\"campaign\":\"\\ud83d\"}}").as_bytes(),
        "story.jsonl:2:20: unexpected end of hex escape",
    );
}

#[test]
fn unknown_markup_is_listed_once_with_its_count() {
    let story = STORY
        .replace("boat", "<blink>boat</blink>")
        .replace("hill", "<blink>hill");
    let report = Setup::new(&story).build(&[Task::PtEverything]).unwrap();
    let warnings = &report.datasets[&Task::PtEverything].warnings;
    let said: Vec<_> = warnings
        .iter()
        .map(|w| (w.text.as_str(), w.count))
        .collect();
    assert_eq!(said, [("unknown markup <blink>", 4)]);
}

#[test]
fn missing_and_mistyped_keys_are_named() {
    check_error(
        br#"{"campaign":"a","scene":"x","line":[]}"#,
        "1: `lines` is missing (there is a `line`)",
    );
    check_error(br#"{"scene":"x","lines":[]}"#, "`campaign` is missing");
    check_error(
        br#"{"campaign":"a","scene":7,"lines":[]}"#,
        "`scene` must be a text, not the number 7",
    );
    check_error(br#"{"campaign":"a"}"#, "`scene` is missing");
    check_error(
        br#"{"campaign":"a","kind":"voice","text":{"en":"x"}}"#,
        "`speaker_id` is missing",
    );
    check_error(
        scene_line(r#"{"kind":"dialog","text":{}}"#).as_bytes(),
        "story.jsonl:2: `lines[1].kind` must be dialogue, narration, objective or option, not `dialog`; did you mean `dialogue`?",
    );
    check_error(
        scene_line(r#"{"kind":"dialogue","text":{}}"#).as_bytes(),
        "story.jsonl:2: `lines[1].speaker_id` is missing",
    );
    check_error(
        scene_line(r#"{"kind":"narration","text":{"en":null}}"#).as_bytes(),
        "`lines[1].text.en` must be a text, not null",
    );
}

#[test]
fn key_that_stands_twice_is_refused_with_file_and_line() {
    check_error(
        br#"{"campaign":"a","scene":"x","lines":[],"lines":[]}"#,
        "the key `lines` stands twice in one object, keep one; mend the JSON there",
    );
    check_error(
        scene_line(r#"{"kind":"narration","text":{"en":"x","en":"y"}}"#).as_bytes(),
        "story.jsonl:2:",
    );
    check_error(
        scene_line(r#"{"kind":"narration","text":{"en":"x","en":"y"}}"#).as_bytes(),
        "the key `en` stands twice",
    );
}

#[test]
fn line_beyond_the_limit_is_refused_with_it() {
    let long = format!("{GOOD}\n{{\"campaign\":\"{}\"}}", "a".repeat(64 << 20));
    check_error(
        long.as_bytes(),
        "story.jsonl:2: a line holds more than 64 MiB",
    );
}

#[test]
fn gzip_that_unpacks_without_end_is_refused_with_the_limit() {
    use std::io::Write;
    let setup = Setup::new("");
    let path = setup.folder.path().join("story.jsonl.gz");
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let blank = [b'\n'; 1 << 20];
    for _ in 0..65 {
        gzip.write_all(&blank).unwrap();
    }
    std::fs::write(&path, gzip.finish().unwrap()).unwrap();
    let request = BuildRequest {
        source: SourceKind::Story,
        root: &path,
        character: &setup.character,
        tasks: &[Task::PtEverything],
        languages: None,
        out: Path::new("never"),
    };
    let error = corpus::build(&request, corpus::Counters::of_rules(&|_| 1), &|_| {}).unwrap_err();
    let error = error.to_string();
    assert!(error.contains("unpacks to more than 64 MiB"), "{error}");
}

#[cfg(unix)]
#[test]
fn story_that_is_no_file_is_refused() {
    let error = corpus::story_sha256(Path::new("/dev/zero")).unwrap_err();
    assert!(
        error.to_string().contains("/dev/zero is no story"),
        "{error}"
    );
}

#[test]
fn unknown_language_is_named() {
    check_error(
        scene_line(r#"{"kind":"narration","text":{"xx":"x"}}"#).as_bytes(),
        "story.jsonl:2: `lines[1].text` names the unknown language `xx`",
    );
}

#[test]
fn scene_id_used_twice_names_both_lines() {
    check_error(
        format!("{GOOD}\n{GOOD}\n").as_bytes(),
        "story.jsonl:2: scene id `x` was already used at",
    );
}

#[test]
fn encoding_faults_are_named() {
    check_error(format!("\u{feff}{GOOD}").as_bytes(), "byte order mark");
    check_error(
        b"{\"campaign\":\"\xff\"}",
        "story.jsonl:1:14: this byte is not UTF-8",
    );
    check_error(b"\n \n", "holds no scene and no text");
}

#[test]
fn truncated_gzip_is_named() {
    use std::io::Write;
    let setup = Setup::new("");
    let path = setup.folder.path().join("story.jsonl.gz");
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(STORY.as_bytes()).unwrap();
    let bytes = gzip.finish().unwrap();
    let request = |root| BuildRequest {
        source: SourceKind::Story,
        root,
        character: &setup.character,
        tasks: &[Task::PtEverything],
        languages: None,
        out: Path::new("never"),
    };
    std::fs::write(&path, &bytes[..bytes.len() - 100]).unwrap();
    let error =
        corpus::build(&request(&path), corpus::Counters::of_rules(&|_| 1), &|_| {}).unwrap_err();
    assert!(matches!(error, Error::Gzip { .. }), "{error}");
    std::fs::write(&path, STORY).unwrap();
    let error =
        corpus::build(&request(&path), corpus::Counters::of_rules(&|_| 1), &|_| {}).unwrap_err();
    assert!(error.to_string().contains("invalid gzip header"), "{error}");
}

#[test]
fn missing_root_and_empty_folder_are_named() {
    let setup = Setup::new(STORY);
    std::fs::remove_file(setup.root()).unwrap();
    let error = setup.build(&[Task::PtEverything]).unwrap_err();
    assert!(error.to_string().starts_with("cannot read "), "{error}");
    std::fs::create_dir(setup.root()).unwrap();
    let error = setup.build(&[Task::PtEverything]).unwrap_err();
    assert!(matches!(error, Error::NoStoryFile { .. }), "{error}");
}

#[test]
fn vendor_is_no_task_of_a_story() {
    let error = Setup::new(STORY).build(&[Task::PtVendor]).unwrap_err();
    assert!(matches!(error, Error::TaskOfSource { .. }), "{error}");
}

#[test]
fn task_name_near_miss_is_named() {
    assert_eq!(Task::parse("sft/character").unwrap(), Task::SftCyrene);
    let error = Task::parse("pt/amphoreu").unwrap_err().to_string();
    assert!(error.ends_with("did you mean `pt/amphoreus`?"), "{error}");
}

#[test]
fn bundled_story_builds_and_splits_for_its_heroine() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let character = Character::load(&root.join("characters/ovelle.toml")).unwrap();
    let out = tempfile::tempdir().unwrap();
    let request = BuildRequest {
        source: SourceKind::Story,
        root: &root.join("demo/story.jsonl"),
        character: &character,
        tasks: &[Task::PtEverything, Task::SftCyrene],
        languages: None,
        out: out.path(),
    };
    let report = corpus::build(
        &request,
        corpus::Counters::of_rules(&|text| text.chars().count()),
        &|_| {},
    )
    .unwrap();
    for dataset in report.datasets.values() {
        assert_eq!(dataset.files.len(), 3);
        assert_eq!(dataset.warnings, []);
        assert!(
            dataset
                .files
                .iter()
                .all(|f| f.holes.is_empty() && f.n_rows == dataset.files[0].n_rows)
        );
    }
    let split = corpus::make_split(&SplitRequest {
        source: request.source,
        root: request.root,
        vendor: None,
        character: &character,
        options: SplitOptions::default(),
    })
    .unwrap();
    let rows = corpus::rows::load(&out.path().join("sft/cyrene"), Some(&split)).unwrap();
    assert!(rows.iter().any(|r| r.side == Side::Val));
}

/// The examples of the page that says how to write a story are a story.
#[test]
fn examples_of_the_format_page_build() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/story-format.md");
    let page = std::fs::read_to_string(page).unwrap();
    let blocks = |language: &str| -> Vec<&str> {
        let start = format!("```{language}\n");
        let blocks = page.split(start.as_str()).skip(1);
        blocks.map(|b| b.split("```").next().unwrap()).collect()
    };
    let [scene, texts] = blocks("json")[..] else {
        panic!("two examples of JSON")
    };
    let [character, profile] = blocks("toml")[..] else {
        panic!("a character file and its profile")
    };
    let character = &format!("{character}\n{profile}");
    let mut setup = Setup::new(&format!("{}\n{texts}", scene.replace('\n', " ")));
    setup.character = Character::parse(character, Path::new("bo.toml")).unwrap();
    let tasks = [Task::PtEverything, Task::SftCyrene, Task::SftEverything];
    let report = setup.build(&tasks).unwrap();
    for dataset in report.datasets.values() {
        assert_eq!(dataset.warnings, []);
    }
    assert_eq!(
        setup.contents("pt/everything/en.jsonl"),
        [
            ["The tide turns.\nBo: Where is the boat?"],
            ["Greeting\nBo: Mind the gulls."],
            ["Tides\nThey come.\nThey go."],
        ]
    );
    assert_eq!(
        setup.contents("sft/cyrene/jp.jsonl"),
        [["ボー", "(潮が変わる。)", "船はどこだ。"]]
    );
}

#[test]
fn stats_passes_and_sample_say_what_a_mixture_shows() {
    let setup = Setup::new(STORY);
    setup.build(&[Task::PtEverything]).unwrap();
    let folder = setup.out().join("pt/everything");
    let stats = corpus::stats::stats(&folder, None).unwrap();
    assert_eq!(stats.n_scenes, 5);
    assert_eq!(
        stats.files.iter().map(|f| f.n_rows).collect::<Vec<_>>(),
        [1, 5]
    );
    let in_bins: u64 = stats.files[1].histogram.iter().map(|b| b.n_rows).sum();
    assert_eq!(in_bins, 5);

    let english = folder.join("en.jsonl");
    let source = |path: &Path, weight| corpus::WeightedSource {
        path: path.to_owned(),
        weight,
    };
    let mixture = corpus::Mixture {
        folder: Path::new(""),
        sources: &[source(&folder, 3.0), source(&english, 2.0)],
        split: None,
        validation_share: 0.0,
        validation_tokens: 0,
        seed: 7,
    };
    let passes = mixture.passes(None).unwrap();
    assert_eq!(passes.n_scenes, 5);
    assert_eq!(passes.same_language_most, 5.0);
    assert_eq!(
        passes.all_languages_most, 8.0,
        "3 in Chinese and 5 in English"
    );
    assert_eq!(passes.n_above_limit, 5);

    let peek = |seed| corpus::stats::peek(&folder, None, Some(Language::En), 3, seed).unwrap();
    assert_eq!(peek(1), peek(1));
    assert_eq!(peek(1).len(), 3);
    assert!((2..9).any(|seed| peek(seed) != peek(1)));
}

/// A story, its data sets and a split of it, every token a character.
struct Accounted {
    out: tempfile::TempDir,
    split: Split,
    scenes: Vec<serde_json::Value>,
}

impl Accounted {
    fn demo(change: impl FnOnce(&mut Split)) -> Accounted {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let story = root.join("demo/story.jsonl");
        let character = Character::load(&root.join("characters/ovelle.toml")).unwrap();
        let out = tempfile::tempdir().unwrap();
        let request = BuildRequest {
            source: SourceKind::Story,
            root: &story,
            character: &character,
            tasks: &[Task::PtEverything, Task::SftCyrene],
            languages: None,
            out: out.path(),
        };
        corpus::build(
            &request,
            corpus::Counters::of_rules(&|text| text.chars().count()),
            &|_| {},
        )
        .unwrap();
        let mut split = corpus::make_split(&SplitRequest {
            source: request.source,
            root: request.root,
            vendor: None,
            character: &character,
            options: SplitOptions::default(),
        })
        .unwrap();
        change(&mut split);
        let lines = std::fs::read_to_string(&story).unwrap();
        let scenes = lines.lines().map(|l| serde_json::from_str(l).unwrap());
        Accounted {
            out,
            split,
            scenes: scenes.collect(),
        }
    }

    fn accounts(&self, task: Task) -> Vec<corpus::account::Account> {
        let path = self.out.path().join(task.name());
        let accounts = corpus::account::account(&path, Some(&self.split)).unwrap();
        for account in &accounts {
            let on_sides: u64 = account.sides.values().sum();
            assert_eq!(
                on_sides + account.n_filtered(),
                account.total,
                "{account:?}"
            );
        }
        assert_eq!(accounts.len(), 3);
        accounts
    }
}

#[test]
fn every_token_of_the_bundled_story_has_one_place() {
    // A scene on each side, whatever the split of so small a story has.
    let demo = Accounted::demo(|split| {
        let drawn = std::mem::take(&mut split.probe_x);
        split.train.extend(drawn.into_keys());
        let mut scenes = split.train.clone().into_iter();
        let mut take = || {
            let id = scenes.next().unwrap();
            split.train.remove(&id);
            id
        };
        let (strict, probe, copied, retold) = (take(), take(), take(), take());
        split.val_strict.insert(strict);
        split.probe_x.insert(probe, Language::En);
        split.contaminated.insert(copied);
        split.filtered.insert(retold, "a rule".to_owned());
    });
    for account in demo.accounts(Task::PtEverything) {
        // Counted by hand from the file: `Name: text` of every line, titles and pages line by line.
        let colon = if account.key == "chs" { 1 } else { 2 };
        let chars = |value: &serde_json::Value| -> usize {
            let text = value[&account.key].as_str().unwrap_or_default();
            text.lines().map(|l| l.trim().chars().count()).sum()
        };
        let named = |name: usize| if name > 0 { name + colon } else { 0 };
        let mut total = 0;
        for scene in &demo.scenes {
            if let Some(lines) = scene["lines"].as_array() {
                for line in lines {
                    let name = if line["kind"] == "dialogue" {
                        chars(&line["speaker_name"])
                    } else {
                        0
                    };
                    total += named(name) + chars(&line["text"]);
                }
            } else if scene["kind"] == "voice" {
                total += chars(&scene["title"])
                    + named(chars(&scene["speaker_name"]))
                    + chars(&scene["text"]);
            } else {
                total += chars(&scene["title"]) + chars(&scene["text"]);
            }
        }
        assert_eq!(account.total, total as u64, "{}", account.key);
        let on = |side| account.on(side) > 0;
        assert!(on(Side::Train) && on(Side::Val) && on(Side::ValStrict) && on(Side::Contaminated));
        assert_eq!(on(Side::ProbeX), account.key == "en");
        assert_eq!(account.filtered.keys().collect::<Vec<_>>(), ["a rule"]);
    }
}

#[test]
fn conversations_and_what_their_rules_leave_out_add_up_to_the_scenes() {
    let demo = Accounted::demo(|_| {});
    for account in demo.accounts(Task::SftCyrene) {
        let (open, close) = if account.key == "chs" {
            ('（', '）')
        } else {
            ('(', ')')
        };
        let chars = |value: &serde_json::Value, is_aside: bool| -> usize {
            let text = value[&account.key].as_str().unwrap().trim();
            let text = text.trim_start_matches(open).trim_end_matches(close);
            text.chars().count() + if is_aside { 2 } else { 0 }
        };
        let mut total = 0;
        for scene in &demo.scenes {
            let is_own = |line: &serde_json::Value| {
                line["kind"] == "dialogue" && line["speaker_id"] == "ovelle"
            };
            let lines = scene["lines"].as_array();
            for line in lines.filter(|l| l.iter().any(is_own)).into_iter().flatten() {
                let is_player = line["kind"] == "option" || line["speaker_id"] == "player";
                total += chars(&line["text"], !is_own(line) && !is_player);
            }
            if scene["kind"] == "voice" && scene["speaker_id"] == "ovelle" {
                total += chars(&scene["title"], false) + chars(&scene["text"], false);
            }
        }
        assert_eq!(account.total, total as u64, "{}", account.key);
        let rules: Vec<_> = account.filtered.keys().map(String::as_str).collect();
        assert_eq!(rules, ["user lines that nobody answers"]);
    }
}
