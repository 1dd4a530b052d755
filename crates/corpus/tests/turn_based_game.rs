//! The source `turn-based-game` on small trees of our own: the rules' corners and what is an error.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

use std::collections::BTreeSet;
use std::path::Path;

use corpus::{
    BuildRequest, Character, Error, Language, Side, SourceKind, Split, SplitOptions, SplitRequest,
    Task,
};
use serde_json::{Map, Value, json};
use text::Role;

const ADA: u64 = u64::MAX;
const OTHER_FACE: u64 = 3;
const BO: u64 = 10;
const PLAYER: u64 = 7;

/// Name hashes: Ada has two faces, Bo is of her part of the story, 7 is the player.
const CHARACTER: &str = r#"
name = { en = "Ada" }
languages = ["chs", "en"]
[turn_based_game]
nickname = { chs = "小山", en = "Sam" }
player_name_hash = 7
name_hashes = ["18446744073709551615", 3]
avatar_id = 2
people = [{ avatar_id = 2, name_hash = "18446744073709551615" }, { avatar_id = 1, name_hash = 10 }]
mission_prefixes = [104]
book_worlds = [5]
fine_talk_blocks = [500]
replacements = [{ from = "{MCV#1}", to = "3" }]
"#;

/// A tree in memory: tables, and texts that are the same in all languages unless said otherwise.
struct Tree {
    folder: tempfile::TempDir,
    tables: Map<String, Value>,
    texts: Map<String, Value>,
}

impl Tree {
    fn new() -> Tree {
        let mut tables = Map::new();
        for name in [
            "TalkSentenceConfig",
            "AvatarConfigLD",
            "VoiceAtlas",
            "BookSeriesConfig",
            "LocalbookConfig",
            "StoryAtlas",
            "NounAtlas",
            "ChronicleConclusion",
            "MainMission",
            "SubMission",
            "TarotMails",
            "TarotMailbox",
            "TarotBookSentence",
            "TarotWikiData",
            "TarotWikiSubdata",
            "TarotWikiChangeinfo",
        ] {
            tables.insert(name.to_owned(), json!([]));
        }
        let mut tree = Tree {
            folder: tempfile::tempdir().unwrap(),
            tables,
            texts: Map::new(),
        };
        let people = json!([{"AvatarID": 1, "AvatarName": tree.text("Bo")},
            {"AvatarID": 2, "AvatarName": tree.text("Old Ada")},
            {"AvatarID": 2, "AvatarName": tree.text("Ada")}]);
        tree.tables.insert("AvatarConfig".to_owned(), people);
        for (hash, name) in [
            (ADA, "Ada"),
            (OTHER_FACE, "?Ada?"),
            (BO, "Bo"),
            (PLAYER, "{NICKNAME}"),
        ] {
            tree.texts.insert(hash.to_string(), json!(name));
        }
        tree
    }

    /// A new text; gives the object that names it.
    fn text(&mut self, text: &str) -> Value {
        let hash = 1000 + self.texts.len() as u64;
        self.texts.insert(hash.to_string(), json!(text));
        json!({ "Hash": hash })
    }

    fn row(&mut self, table: &str, row: Value) {
        self.tables[table].as_array_mut().unwrap().push(row);
    }

    fn talk(&mut self, id: i64, name: Option<u64>, text: &str) {
        let text = self.text(text);
        let mut row = json!({"TalkSentenceID": id, "TalkSentenceText": text});
        if let Some(name) = name {
            row["TextmapTalkSentenceName"] = json!({ "Hash": name });
        }
        self.row("TalkSentenceConfig", row);
    }

    fn write(&self) {
        let put = |path: String, text: String| {
            let path = self.folder.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        for (name, table) in &self.tables {
            put(format!("ExcelOutput/{name}.json"), table.to_string());
        }
        for language in ["CHS", "EN"] {
            put(
                format!("TextMap/TextMap{language}.json"),
                Value::Object(self.texts.clone()).to_string(),
            );
        }
    }

    /// Writes a file as it stands, after the tree.
    fn put(&self, path: &str, bytes: &[u8]) {
        std::fs::write(self.folder.path().join(path), bytes).unwrap();
    }

    fn build(&self, task: Task) -> Result<corpus::BuildReport, Error> {
        let character = Character::parse(CHARACTER, Path::new("ada.toml")).unwrap();
        let request = BuildRequest {
            source: SourceKind::TurnBasedGame,
            root: self.folder.path(),
            character: &character,
            tasks: &[task],
            languages: None,
            out: &self.folder.path().join("out"),
        };
        corpus::build(
            &request,
            corpus::Counters::of_rules(&|text| text.chars().count()),
            &|_| {},
        )
    }

    fn split(&self, vendor: Option<&Path>) -> Split {
        let character = Character::parse(CHARACTER, Path::new("ada.toml")).unwrap();
        let request = SplitRequest {
            source: SourceKind::TurnBasedGame,
            root: self.folder.path(),
            vendor,
            character: &character,
            options: SplitOptions::default(),
        };
        corpus::make_split(&request).unwrap()
    }

    /// Holds a split against the build of a task.
    fn check_split(&self, task: Task, split: &Split) -> Result<(), Error> {
        let character = Character::parse(CHARACTER, Path::new("ada.toml")).unwrap();
        let request = BuildRequest {
            source: SourceKind::TurnBasedGame,
            root: self.folder.path(),
            character: &character,
            tasks: &[task],
            languages: None,
            out: &self.folder.path().join("out"),
        };
        corpus::check_split(&request, split)
    }

    /// A vendor folder with these pages and no exercise.
    fn pages(&self, pages: &[(&str, &str)]) {
        std::fs::create_dir_all(self.folder.path().join("coig")).unwrap();
        std::fs::create_dir_all(self.folder.path().join("miyoushe")).unwrap();
        self.put("coig/leetcode_instructions.jsonl", b"");
        for (name, text) in pages {
            self.put(&format!("miyoushe/{name}"), text.as_bytes());
        }
    }

    /// The contents of the messages of every English row.
    fn rows(&self, task: Task) -> Vec<Vec<String>> {
        self.write();
        self.build(task).unwrap();
        self.built(task, Language::En)
    }

    fn built(&self, task: Task, language: Language) -> Vec<Vec<String>> {
        let path = self
            .folder
            .path()
            .join(format!("out/{task}/{language}.jsonl"));
        let rows = corpus::rows::load(&path, None).unwrap();
        rows.into_iter()
            .map(|row| row.messages.into_iter().map(|m| m.content).collect())
            .collect()
    }

    fn check_error(&self, task: Task, expect: &str) {
        // What an earlier build of the test wrote is out of the way.
        let _ = std::fs::remove_dir_all(self.folder.path().join("out"));
        let error = self.build(task).unwrap_err().to_string();
        assert!(error.contains(expect), "{error}\n  lacks: {expect}");
        assert!(!self.folder.path().join(format!("out/{task}.json")).exists());
        assert!(
            !self
                .folder
                .path()
                .join(format!("out/{task}/en.jsonl"))
                .exists()
        );
    }
}

#[test]
fn talks_are_sorted_grouped_and_named() {
    let mut tree = Tree::new();
    tree.talk(2001, Some(BO), "third");
    tree.talk(1002, Some(ADA), "<b>second</b>");
    tree.talk(1001, None, "{F#she}{M#he} first");
    tree.talk(500_101, Some(0), "fine");
    tree.talk(500_201, Some(999), "finer");
    tree.row(
        "TalkSentenceConfig",
        json!({"TalkSentenceText": {"Hash": BO}}),
    );
    tree.row(
        "TalkSentenceConfig",
        json!({"TalkSentenceID": 1003, "TalkSentenceText": {"Hash": 404}}),
    );
    tree.row(
        "TalkSentenceConfig",
        json!({"TalkSentenceID": 1003, "TalkSentenceText": {"Hash": "10"}}),
    );
    tree.row(
        "TalkSentenceConfig",
        json!({"TalkSentenceID": 1004.0, "TalkSentenceText": {"Hash": 10.0}}),
    );
    assert_eq!(
        tree.rows(Task::PtEverything),
        [
            ["Sam: she first\nAda: second\nSam: Bo"],
            ["Bo: third"],
            ["Sam: fine"],
            ["Sam: finer"],
        ]
    );
    assert_eq!(
        tree.built(Task::PtEverything, Language::Chs)[0],
        ["小山：she first\nAda：second\n小山：Bo"]
    );
    assert_eq!(
        tree.rows(Task::PtAmphoreus),
        [["Sam: she first\nAda: second\nSam: Bo"], ["Bo: third"]]
    );
}

#[test]
fn brackets_are_for_strangers_and_for_hash_zero() {
    let mut tree = Tree::new();
    tree.talk(1001, Some(BO), "((Hm.)");
    tree.talk(1002, Some(PLAYER), "(I think.)");
    tree.talk(1003, Some(0), "nobody");
    tree.talk(1004, None, "me");
    tree.talk(1005, Some(OTHER_FACE), "(who?)");
    tree.talk(1006, Some(ADA), "It is me.");
    tree.talk(1007, Some(BO), "unanswered");
    assert_eq!(
        tree.rows(Task::SftCyrene),
        [
            // Ada's first face: everything before is the user's, her other face without brackets.
            vec!["Ada", "(Hm.)\nI think.\n(nobody)\nme\nwho?", "It is me."],
            vec!["?Ada?", "(Hm.)\nI think.\n(nobody)\nme", "who?"],
        ]
    );
}

#[test]
fn everyone_talks_as_everyone_and_as_the_player() {
    let mut tree = Tree::new();
    tree.talk(1001, None, "a");
    tree.talk(1002, Some(BO), "b");
    tree.talk(1003, None, "c");
    tree.talk(1004, Some(0), "d");
    tree.talk(2001, None, "nobody has a hash here");
    assert_eq!(
        tree.rows(Task::SftEverything),
        [
            // "No name hash" comes first; its opening round has no user line, and the next one has.
            vec!["Sam", "", "a", "b", "c"],
            vec!["Bo", "a", "b"],
            vec!["Sam", "a\nb\nc", "d"],
        ]
    );
}

#[test]
fn voices_come_sorted_for_reading_and_in_file_order_for_talking() {
    let mut tree = Tree::new();
    for (person, sort, title, text) in [
        (2, json!(null), "t1", "v1"),
        (2, json!(2), "t2", "v2"),
        (1, json!(9), "t3", "v3"),
    ] {
        let (title, text) = (tree.text(title), tree.text(text));
        tree.row(
            "VoiceAtlas",
            json!({"AvatarID": person, "VoiceTitle": title, "Voice_M": text, "SortID": sort, "AudioEvent": ""}),
        );
    }
    assert_eq!(
        tree.rows(Task::PtEverything),
        [["Sam: t3\nBo: v3"], ["Sam: t2\nAda: v2\nSam: t1\nAda: v1"]]
    );
    assert_eq!(
        tree.rows(Task::SftCyrene),
        [["Ada", "t1", "v1"], ["Ada", "t2", "v2"]]
    );
    // Everything goes by the list of people, the part by the character file's.
    let systems =
        |task| -> Vec<String> { tree.rows(task).into_iter().map(|r| r[0].clone()).collect() };
    assert_eq!(systems(Task::SftEverything), ["Bo", "Ada", "Ada"]);
    assert_eq!(systems(Task::SftAmphoreus), ["Ada", "Ada", "Bo"]);
}

#[test]
fn voice_rows_of_one_person_come_back_scene_by_scene() {
    let mut tree = Tree::new();
    for n in 0..2 {
        let (title, text) = (tree.text(&format!("t{n}")), tree.text("v\\nw"));
        tree.row(
            "VoiceAtlas",
            json!({"AvatarID": 2, "VoiceTitle": title, "Voice_M": text, "AudioEvent": ""}),
        );
    }
    tree.write();
    tree.build(Task::PtEverything).unwrap();
    let mut split = tree.split(None);
    split.val = BTreeSet::from(["voice/2/2".to_owned()]);
    split.train = BTreeSet::from(["voice/2/1".to_owned()]);
    let path = tree.folder.path().join("out/pt/everything/en.jsonl");
    let rows = corpus::rows::load(&path, Some(&split)).unwrap();
    let got: Vec<_> = rows.iter().map(|r| (r.side, r.text().unwrap())).collect();
    assert_eq!(
        got,
        [
            (corpus::Side::Train, "Sam: t0\nAda: v\nw"),
            (corpus::Side::Val, "Sam: t1\nAda: v\nw")
        ]
    );
    assert_eq!(rows[0].messages[0].role, Role::Assistant);
}

#[test]
fn books_stories_and_nouns_are_lines() {
    let mut tree = Tree::new();
    let series = (tree.text("Series"), tree.text("Comments"));
    tree.row("BookSeriesConfig", json!({"BookSeriesID": 1, "BookSeries": series.0, "BookSeriesComments": series.1, "BookSeriesWorld": 5}));
    tree.row(
        "BookSeriesConfig",
        json!({"BookSeriesID": 2, "BookSeries": {"Hash": 404}, "BookSeriesWorld": 6}),
    );
    for n in 0..2 {
        let (name, content) = (
            tree.text(&format!(" Book {n}")),
            tree.text("one\\n\\n \u{a0}two\\n\u{a0}three"),
        );
        tree.row(
            "LocalbookConfig",
            json!({"BookSeriesID": 1, "BookInsideName": name, "BookContent": content}),
        );
    }
    for (story, replace, text) in [
        (2, None, "b"),
        (1, None, "a"),
        (3, Some(2), "B"),
        (4, None, "d"),
    ] {
        let text = tree.text(text);
        let mut row = json!({"AvatarID": 1, "StoryID": story, "Story": text});
        if let Some(replace) = replace {
            row["ReplaceID"] = json!(replace);
        }
        tree.row("StoryAtlas", row);
    }
    let (title, text) = (tree.text("Noun"), tree.text("means\\nthis"));
    tree.row("NounAtlas", json!({"NounTitle": title, "NounDesc": text}));
    assert_eq!(
        tree.rows(Task::PtEverything),
        [
            ["Series\nComments\n Book 0\none\ntwo\nthree"],
            ["Series\nComments\n Book 1\none\ntwo\nthree"],
            ["Bo\na\nB\nd"],
            ["Noun\nmeans\nthis"],
        ]
    );
}

#[test]
fn missions_take_each_step_once() {
    let mut tree = Tree::new();
    let (name, conclusion) = (tree.text("Mission"), tree.text("It ended."));
    tree.row(
        "MainMission",
        json!({"MainMissionID": 1_040_001, "Name": name}),
    );
    tree.row(
        "MainMission",
        json!({"MainMissionID": 1_050_001, "Name": {"Hash": 404}}),
    );
    tree.row(
        "ChronicleConclusion",
        json!({"MissionID": 1_050_001, "MissionConclusion": conclusion}),
    );
    tree.row(
        "ChronicleConclusion",
        json!({"MissionID": 1_040_001, "MissionConclusion": conclusion}),
    );
    let (go, there, back) = (tree.text("Go"), tree.text("There\\nnow"), tree.text("Back"));
    let unknown = json!({"Hash": 404});
    for (id, target, text) in [
        (104_000_104, Some(&go), Some(&there)),
        (104_000_101, Some(&go), Some(&there)),
        (104_000_102, Some(&go), None),
        (104_000_103, None, Some(&there)),
        (104_000_105, Some(&go), Some(&unknown)),
        (104_000_106, Some(&go), Some(&back)),
        (104_000_107, Some(&go), Some(&there)),
        (104_000_201, Some(&go), Some(&back)),
    ] {
        tree.row(
            "SubMission",
            json!({"SubMissionID": id, "TargetText": target, "DescrptionText": text}),
        );
    }
    let mission = "Mission\nIt ended.\nGo\nThere\nnow\nGo\nBack\nGo\nThere\nnow";
    assert_eq!(tree.rows(Task::PtEverything), [[mission], ["It ended."]]);
    assert_eq!(tree.rows(Task::PtAmphoreus), [[mission]]);

    tree.row(
        "ChronicleConclusion",
        json!({"MissionID": 9, "MissionConclusion": conclusion}),
    );
    tree.row("MainMission", json!({"MainMissionID": 9}));
    tree.write();
    tree.check_error(
        Task::PtEverything,
        "there is no row 9 in MainMission (with a Name)",
    );
}

#[test]
fn letters_tales_and_wiki_are_put_together() {
    let mut tree = Tree::new();
    let (a, b) = (tree.text(" first\\n"), tree.text("second"));
    tree.row("TarotMails", json!({"ID": 1, "Sentence": {"Hash": 404}}));
    tree.row("TarotMails", json!({"ID": 1, "Sentence": a}));
    tree.row("TarotMails", json!({"ID": 2, "Sentence": b}));
    tree.row("TarotMailbox", json!({"Title": b, "From": {"Hash": BO}, "To": {"Hash": PLAYER}, "MailSentenceIDList": [2, 1]}));
    tree.row("TarotBookSentence", json!({"ID": 2001, "Sentence": b}));
    tree.row("TarotBookSentence", json!({"ID": 1002, "Sentence": b}));
    tree.row("TarotBookSentence", json!({"ID": 1001, "Sentence": a}));
    let (page, part, new) = (tree.text("Page"), tree.text("Part"), tree.text("New"));
    tree.row(
        "TarotWikiData",
        json!({"ID": 102, "Title": page, "Details": b, "ChangeID": [], "SubdataList": [8, 7, 8]}),
    );
    tree.row("TarotWikiData", json!({"ID": 101, "Title": {"Hash": 404}, "Details": b, "ChangeID": [2, 5, 3], "SubdataList": []}));
    tree.row(
        "TarotWikiSubdata",
        json!({"ID": 8, "Title": part, "Details": b, "ChangeID": []}),
    );
    tree.row(
        "TarotWikiSubdata",
        json!({"ID": 7, "Title": part, "Details": a, "ChangeID": []}),
    );
    tree.row(
        "TarotWikiChangeinfo",
        json!({"ChangeID": 5, "NewTitle": new, "NewDetails": a}),
    );
    assert_eq!(
        tree.rows(Task::PtEverything),
        [
            ["second\nBo\nSam\nsecond\n first\n"],
            ["first\nsecond"],
            ["second"],
            ["New\nfirst\nPage\nsecond\nPart\nfirst\nPart\nsecond\nPart\nsecond"],
        ]
    );
}

#[test]
fn missing_text_map_is_an_empty_one_and_reported() {
    let mut tree = Tree::new();
    tree.talk(1001, Some(ADA), "hello");
    tree.tables["AvatarConfig"] = json!([]);
    tree.write();
    std::fs::remove_file(tree.folder.path().join("TextMap/TextMapCHS.json")).unwrap();
    let report = tree.build(Task::PtEverything).unwrap();
    let dataset = &report.datasets[&Task::PtEverything];
    assert_eq!(dataset.files[0].n_rows, 0);
    assert_eq!(dataset.files[0].holes["text of a talk row"], 1);
    assert_eq!(dataset.warnings[0].text, "there is no text map of chs");
}

#[test]
fn empty_text_map_has_no_text_and_an_empty_file_is_an_error() {
    let mut tree = Tree::new();
    tree.talk(1001, Some(ADA), "hello");
    tree.tables["AvatarConfig"] = json!([]);
    tree.write();
    tree.put("TextMap/TextMapEN.json", b" {}\n");
    let report = tree.build(Task::PtEverything).unwrap();
    let dataset = &report.datasets[&Task::PtEverything];
    assert_eq!((dataset.files[0].n_rows, dataset.files[1].n_rows), (1, 0));
    assert_eq!(
        dataset.warnings.len(),
        0,
        "a map that is there is not missing"
    );
    tree.put("TextMap/TextMapEN.json", b"");
    tree.check_error(Task::PtEverything, "TextMapEN.json:1:1: EOF while parsing");
}

#[test]
fn later_of_equal_ids_wins() {
    let mut tree = Tree::new();
    let (old, new) = (tree.text("old"), tree.text("new"));
    let unknown = json!({"Hash": 404});
    for text in [&unknown, &new] {
        tree.row(
            "TarotWikiSubdata",
            json!({"ID": 7, "Title": text, "Details": text, "ChangeID": []}),
        );
        tree.row(
            "TarotWikiChangeinfo",
            json!({"ChangeID": 5, "NewTitle": text, "NewDetails": text}),
        );
        tree.row(
            "MainMission",
            json!({"MainMissionID": 1_040_001, "Name": text}),
        );
        tree.row(
            "StoryAtlas",
            json!({"AvatarID": 1, "StoryID": 3, "Story": text}),
        );
    }
    tree.row(
        "TarotWikiData",
        json!({"ID": 101, "Title": old, "Details": old, "ChangeID": [5], "SubdataList": [7]}),
    );
    tree.row(
        "ChronicleConclusion",
        json!({"MissionID": 1_040_001, "MissionConclusion": old}),
    );
    assert_eq!(
        tree.rows(Task::PtEverything),
        [["Bo\nnew"], ["new\nold"], ["new\nnew\nnew\nnew"]]
    );
}

#[test]
fn unknown_markers_are_reported_once_with_their_count() {
    let mut tree = Tree::new();
    tree.talk(1001, Some(ADA), "{ODD#1} and {ODD#2}");
    tree.write();
    let report = tree.build(Task::PtEverything).unwrap();
    let warnings = &report.datasets[&Task::PtEverything].warnings;
    assert_eq!(warnings.len(), 1);
    assert_eq!(
        (warnings[0].text.as_str(), warnings[0].count),
        ("unknown markup {ODD}", 4)
    );
}

#[test]
fn strict_look_ups_fail_and_name_the_row() {
    let mut tree = Tree::new();
    tree.row(
        "NounAtlas",
        json!({"NounTitle": {"Hash": 404}, "NounDesc": {"Hash": BO}}),
    );
    tree.write();
    tree.check_error(
        Task::PtEverything,
        "NounAtlas 1: `NounTitle` has the text hash 404, which the text map of",
    );

    let mut tree = Tree::new();
    let text = tree.text("v");
    tree.row(
        "VoiceAtlas",
        json!({"AvatarID": 77, "VoiceTitle": text, "Voice_M": text, "AudioEvent": ""}),
    );
    tree.write();
    tree.check_error(
        Task::PtEverything,
        "VoiceAtlas 77: there is no row 77 in AvatarConfig and AvatarConfigLD",
    );
    tree.build(Task::SftEverything).unwrap();

    let mut tree = Tree::new();
    tree.tables["AvatarConfigLD"] = json!([{"AvatarID": 99, "AvatarName": {"Hash": 404}}]);
    tree.write();
    tree.build(Task::PtEverything).unwrap();
    tree.check_error(
        Task::SftEverything,
        "AvatarConfig 99: `AvatarName` has the text hash 404",
    );
}

#[test]
fn damaged_files_are_named() {
    let mut tree = Tree::new();
    tree.talk(1001, Some(ADA), "hello");
    tree.write();
    let task = Task::SftCyrene;

    tree.put("ExcelOutput/NounAtlas.json", b"not read for this task");
    tree.build(task).unwrap();

    tree.put("TextMap/TextMapEN.json", b"{\"1\": \"a\"}\n{}");
    tree.check_error(task, "TextMapEN.json:2:1: trailing characters");
    tree.put("TextMap/TextMapEN.json", b"\xef\xbb\xbf{}");
    tree.check_error(task, "TextMapEN.json begins with a byte order mark");
    tree.put("TextMap/TextMapEN.json", b"{\"1\":\n\"\xff\"}");
    tree.check_error(task, "TextMapEN.json:2:2: this byte is not UTF-8");
    tree.put("TextMap/TextMapEN.json", b"{\"1\": \"a\",\n\"2\": \"b");
    tree.check_error(task, "TextMapEN.json:2:7: EOF while parsing a string");
    tree.put("TextMap/TextMapEN.json", b"{\"one\": \"a\"}");
    tree.check_error(task, "the key `one` is not a number");

    tree.write();
    tree.put("ExcelOutput/VoiceAtlas.json", b"[{\"AvatarID\": 1},\n]");
    tree.check_error(task, "VoiceAtlas.json:2:1: trailing comma");
    tree.put("ExcelOutput/VoiceAtlas.json", b"[{\"AvatarID\": 1},\n{\"Av");
    tree.check_error(task, "VoiceAtlas.json:2:4: EOF while parsing a string");
    tree.put("ExcelOutput/VoiceAtlas.json", b"[{\"AvatarID\": 1}]");
    tree.check_error(
        task,
        "VoiceAtlas.json:1: `AudioEvent` is missing in this row",
    );
    std::fs::remove_file(tree.folder.path().join("ExcelOutput/VoiceAtlas.json")).unwrap();
    tree.check_error(task, "VoiceAtlas.json");
}

#[test]
fn text_that_cannot_be_encoded_fails_where_it_is_used() {
    let mut tree = Tree::new();
    tree.talk(1001, Some(ADA), "hello");
    tree.write();
    let broken = |tree: &Tree| {
        let text = serde_json::to_string(&tree.texts).unwrap();
        text.replacen('{', "{\"5555\": \"\\ud800\", ", 1)
    };
    tree.put("TextMap/TextMapEN.json", broken(&tree).as_bytes());
    tree.build(Task::PtEverything).unwrap();
    tree.row(
        "NounAtlas",
        json!({"NounTitle": {"Hash": 5555}, "NounDesc": {"Hash": BO}}),
    );
    tree.write();
    for language in ["CHS", "EN"] {
        tree.put(
            &format!("TextMap/TextMap{language}.json"),
            broken(&tree).as_bytes(),
        );
    }
    let error = tree.build(Task::PtEverything).unwrap_err().to_string();
    assert!(error.contains("5555"), "{error}");
}

#[test]
fn character_file_without_the_game_is_named() {
    let tree = Tree::new();
    tree.write();
    let character = Character::parse("name = { en = \"Ada\" }", Path::new("ada.toml")).unwrap();
    let request = BuildRequest {
        source: SourceKind::TurnBasedGame,
        root: tree.folder.path(),
        character: &character,
        tasks: &[Task::SftCyrene],
        languages: None,
        out: &tree.folder.path().join("out"),
    };
    let error = corpus::build(&request, corpus::Counters::of_rules(&|_| 1), &|_| {}).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("ada.toml: has no table [turn_based_game]"),
        "{error}"
    );
}

#[test]
fn vendor_pages_are_on_a_side_of_the_split() {
    let tree = Tree::new();
    tree.write();
    std::fs::create_dir_all(tree.folder.path().join("coig")).unwrap();
    std::fs::create_dir_all(tree.folder.path().join("miyoushe")).unwrap();
    tree.put("miyoushe/a.md", b"a");
    tree.put("miyoushe/b.md", b"b");
    let exercise = br#"{"q": "Add", "given": "", "a": "x", "t1": 1, "t2": []}"#;
    tree.put("coig/leetcode_instructions.jsonl", exercise);
    tree.build(Task::PtVendor).unwrap();
    let pages = tree.folder.path().join("out/pt/vendor");
    let split = tree.split(Some(tree.folder.path()));
    for row in corpus::rows::load(&pages, Some(&split)).unwrap() {
        assert_eq!(split.side(&row.scene, None), Some(row.side));
    }
    for scene in ["miyoushe/a.md", "miyoushe/b.md", "coig/1"] {
        assert!(split.side(scene, None).is_some(), "{scene}");
    }
    // Held out by hand: the row is held out.
    let mut held_out = split.clone();
    held_out.train.remove("miyoushe/a.md");
    held_out.val.insert("miyoushe/a.md".to_owned());
    let rows = corpus::rows::load(&pages.join("miyoushe.jsonl"), Some(&held_out)).unwrap();
    assert_eq!(rows[0].side, Side::Val);

    let without = tree.split(None);
    let error = corpus::rows::load(&pages, Some(&without))
        .unwrap_err()
        .to_string();
    assert!(error.contains("scene `miyoushe/a.md`"), "{error}");
    assert!(error.contains("--vendor FOLDER"), "{error}");
}

/// A build beside a split is refused, with all of these words.
fn refuses(tree: &Tree, task: Task, split: &Split, words: &[&str]) {
    says(tree.check_split(task, split).unwrap_err(), words);
}

fn says(error: Error, words: &[&str]) {
    let said = error.to_string();
    for word in words {
        assert!(said.contains(word), "no `{word}` in: {said}");
    }
}

#[test]
fn texts_tie_as_the_rows_show_them() {
    let mut tree = Tree::new();
    tree.talk(104_001_001, Some(BO), "We sail <b>at</b> dawn, {NICKNAME}.");
    tree.talk(104_002_001, Some(ADA), "We sail at dawn, {F#Sam}{M#Tom}.");
    tree.talk(
        104_003_001,
        Some(ADA),
        "At {MCV#1} o'clock\\nthe tide turns.",
    );
    tree.talk(104_004_001, Some(ADA), "At 3 o'clock\nthe tide turns.");
    tree.talk(104_005_001, Some(ADA), "Nobody else says any of this.");
    tree.write();
    let mut split = tree.split(None);
    // In Chinese the player has another name, in English the two first are one text.
    assert_eq!(split.report.ties_by_text, 2);
    tree.check_split(Task::PtEverything, &split).unwrap();
    split.train.remove("talk/104001");
    split.val.insert("talk/104001".to_owned());
    let words = [
        "`We sail at dawn, Sam.` (en, hash ",
        "stands in talk/104001 (held out) and in talk/104002 (training)",
    ];
    refuses(&tree, Task::SftCyrene, &split, &words);
}

#[test]
fn build_beside_a_split_guards_pages_and_knows_every_scene() {
    let mut tree = Tree::new();
    tree.talk(104_001_001, Some(BO), "我们明天黎明时分一起出发去看海。");
    tree.talk(104_002_001, Some(BO), "Nobody else says any of this.");
    tree.write();
    tree.pages(&[
        ("a.md", "无关的内容"),
        ("b.md", "我们明天黎明时分一起出发去看海。"),
        ("c.md", "我们明天黎明时分一起出发去看海。"),
    ]);
    let root = tree.folder.path();
    let split = tree.split(Some(root));
    for task in [Task::PtEverything, Task::PtVendor] {
        tree.check_split(task, &split).unwrap();
        tree.build(task).unwrap();
    }
    // Parted by hand: the talks are held against the page that was built before, and pages against each other.
    let part = |pages: &[&str]| {
        let mut parted = split.clone();
        for page in pages {
            parted.train.remove(*page);
            parted.val.insert((*page).to_owned());
        }
        parted
    };
    let page = part(&["miyoushe/b.md"]);
    for (task, other) in [
        (Task::PtEverything, "talk/104001"),
        (Task::PtVendor, "miyoushe/c.md"),
    ] {
        let said = format!("stands in miyoushe/b.md (held out) and in {other} (training)");
        refuses(&tree, task, &page, &[&said]);
    }
    let talk_too = part(&["miyoushe/b.md", "miyoushe/c.md", "talk/104001"]);
    for task in [Task::PtEverything, Task::PtVendor] {
        tree.check_split(task, &talk_too).unwrap();
    }
    // A split without pages does not know them; the story may be built beside them all the same.
    let without = tree.split(None);
    tree.check_split(Task::PtEverything, &without).unwrap();
    let words = ["holds scene `miyoushe/a.md`", "--vendor FOLDER"];
    refuses(&tree, Task::PtVendor, &without, &words);
    // A scene taken out by hand is no longer known.
    let mut lacking = split.clone();
    lacking.train.remove("talk/104002");
    std::fs::remove_dir_all(root.join("out")).unwrap();
    let unknown = "holds scene `talk/104002`, which the split does not know";
    refuses(&tree, Task::SftEverything, &lacking, &[unknown]);
}

#[test]
fn split_of_an_older_tree_is_refused_by_build_and_by_readers() {
    let mut tree = Tree::new();
    tree.talk(104_001_001, Some(BO), "Low tide.");
    tree.write();
    tree.pages(&[("a.md", "a")]);
    let root = tree.folder.path().to_owned();
    let split = tree.split(Some(&root));
    let load = |task: Task| corpus::rows::load(&root.join("out").join(task.name()), Some(&split));
    for task in [Task::SftEverything, Task::PtVendor] {
        tree.build(task).unwrap();
        load(task).unwrap();
    }
    // 1. a page has changed
    tree.put("miyoushe/a.md", b"another a");
    tree.build(Task::PtVendor).unwrap();
    let expect = "the split was made from another version of the story's `vendor/miyoushe`";
    let words = [expect, "corpus split --force"];
    refuses(&tree, Task::PtVendor, &split, &words);
    says(load(Task::PtVendor).unwrap_err(), &words);
    tree.put("miyoushe/a.md", b"a");
    tree.build(Task::PtVendor).unwrap();
    // 2. a talk has changed, in the texts alone
    let text = tree
        .texts
        .values_mut()
        .find(|t| **t == json!("Low tide."))
        .unwrap();
    *text = json!("High tide.");
    tree.write();
    load(Task::SftEverything).unwrap();
    tree.build(Task::SftEverything).unwrap();
    let words = ["another version of the story's `TextMap/CHS`"];
    refuses(&tree, Task::PtEverything, &split, &words);
    says(load(Task::SftEverything).unwrap_err(), &words);
}

#[test]
fn titles_tie_where_chinese_has_twelve_characters() {
    let mut tree = Tree::new();
    for (n, title) in ["First Meeting", "On the Nature of Weights"]
        .iter()
        .enumerate()
    {
        let title = tree.text(title);
        for m in 0..2 {
            let text = tree.text(&format!("v{n}{m}"));
            tree.row(
                "VoiceAtlas",
                json!({"AvatarID": 2, "VoiceTitle": title, "Voice_M": text, "AudioEvent": ""}),
            );
        }
    }
    tree.write();
    let chinese = Value::Object(tree.texts.clone()).to_string();
    let chinese = chinese.replace("First Meeting", "初次见面");
    tree.put("TextMap/TextMapCHS.json", chinese.as_bytes());
    assert_eq!(tree.split(None).report.ties_by_text, 1);
}

#[test]
fn exercises_take_their_fields_by_place() {
    let tree = Tree::new();
    std::fs::create_dir_all(tree.folder.path().join("coig")).unwrap();
    std::fs::create_dir_all(tree.folder.path().join("miyoushe/deeper")).unwrap();
    tree.put("miyoushe/b.md", "b {NICKNAME}\u{3000}{F#c}".as_bytes());
    tree.put("miyoushe/a.md", b"a");
    tree.put(
        "coig/leetcode_instructions.jsonl",
        br#"{"q": "Add\\n", "given": "", "a": "x\\ny", "t1": 1, "t2": []}
{"t2": 0, "a": "z", "q": "Sub", "given": "1\\t2", "t1": null}
"#,
    );
    tree.build(Task::PtVendor).unwrap();
    let read = |name: &str| {
        let rows =
            corpus::rows::load(&tree.folder.path().join("out/pt/vendor").join(name), None).unwrap();
        rows.iter()
            .map(|r| r.text().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(read("coig.jsonl"), ["Add\\n\nx\ny", "Sub\n1\t2\nz"]);
    assert_eq!(read("miyoushe.jsonl"), ["a", "b\n小山\n{F#c}"]);

    tree.put(
        "coig/leetcode_instructions.jsonl",
        br#"{"q": "Add", "given": "", "a": "x"}"#,
    );
    tree.check_error(
        Task::PtVendor,
        "leetcode_instructions.jsonl:1: `the line` must be an object of five fields",
    );
    tree.put("coig/leetcode_instructions.jsonl", b"\n{\"q\": ");
    tree.check_error(Task::PtVendor, "leetcode_instructions.jsonl:2:");
}
