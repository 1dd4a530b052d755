//! Whole imports, from files to a story, and how tests show what a reader gathered.

use super::*;

/// Scenes and notes as lines: `== id`, `<id Name> text`, `- narration`, `* option`, `+ objective`, `! note`; `$` behind the
/// mark of a line with variables.
pub(crate) fn show(imported: &Imported) -> String {
    let mut out = String::new();
    for scene in &imported.scenes {
        out.push_str(&format!("== {}\n", scene.id));
        for line in &scene.lines {
            let mark = match line.kind {
                LineKind::Dialogue => {
                    let name = line.speaker_name.iter().next().map_or("", |(_, name)| name);
                    format!("<{} {name}>", line.speaker_id)
                }
                LineKind::Narration => "-".to_owned(),
                LineKind::Option => "*".to_owned(),
                LineKind::Objective => "+".to_owned(),
            };
            let variables = if line.has_variables { "$" } else { "" };
            let text = line.text.iter().next().map_or("", |(_, text)| text);
            out.push_str(&format!("{mark}{variables} {text}\n"));
        }
    }
    for kind in &imported.notes.0 {
        out.push_str(&format!(
            "! {} {}, first at line {}\n",
            kind.count, kind.what, kind.line
        ));
    }
    out
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn with(files: &[(&str, &[u8])]) -> Folder {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        }
        Folder(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn import(&self, names: &[&str]) -> Result<Outcome> {
        let paths: Vec<PathBuf> = names.iter().map(|name| self.path(name)).collect();
        import(&ImportRequest {
            paths: &paths,
            language: Language::En,
            campaign: None,
            player: None,
            form: None,
        })
    }

    fn story(&self, names: &[&str]) -> ImportedStory {
        match self.import(names).unwrap() {
            Outcome::Story(story) => story,
            Outcome::Character(_) => panic!("a character"),
        }
    }

    /// The message of an error without the folder's name.
    fn error(&self, names: &[&str]) -> String {
        let error = self.import(names).unwrap_err().to_string();
        error.replace(&format!("{}/", self.0.path().display()), "")
    }
}

fn ids(story: &ImportedStory) -> Vec<&str> {
    story.scenes.iter().map(|scene| scene.id.as_str()).collect()
}

#[test]
fn story_is_written_in_the_plain_format() {
    let folder = Folder::with(&[("sea.txt", "The \"tide\".\nBo: Gone.\n".as_bytes())]);
    let story = folder.story(&["sea.txt"]);
    assert_eq!(
        String::from_utf8(story.to_jsonl()).unwrap(),
        "{\"campaign\":\"sea\",\"scene\":\"sea/1\",\"lines\":[{\"kind\":\"narration\",\"text\":{\"en\":\"The \\\"tide\\\".\"}},\
         {\"kind\":\"dialogue\",\"speaker_id\":\"bo\",\"speaker_name\":{\"en\":\"Bo\"},\"text\":{\"en\":\"Gone.\"}}]}\n"
    );
    let path = folder.path("sea.jsonl");
    std::fs::write(&path, story.to_jsonl()).unwrap();
    let read = crate::source::story::read(&path).unwrap();
    assert_eq!((read.scenes.len(), read.scenes[0].lines.len()), (1, 2));
    assert!(read.unknown_keys.is_empty());
}

#[test]
fn speakers_are_listed_by_their_lines() {
    let folder = Folder::with(&[("sea.txt", b"Ann: One.\nBo: Two.\nBo: Three.\n")]);
    let speakers = folder.story(&["sea.txt"]).speakers();
    let shown: Vec<_> = speakers
        .iter()
        .map(|s| (s.id.as_str(), s.name.as_str(), s.lines))
        .collect();
    assert_eq!(shown, [("bo", "Bo", 2), ("ann", "Ann", 1)]);
}

#[test]
fn files_of_a_folder_are_chapters_of_one_campaign() {
    let folder = Folder::with(&[
        ("game/script.rpy", b"label start:\n    b \"One.\"\n"),
        (
            "game/day/two.rpy",
            b"label start:\n    b \"Two.\"\nlabel start:\n    \"Again.\"\n",
        ),
        ("game/characters.rpy", b"define b = Character(\"Bo\")\n"),
        ("game/images/sky.png", b"\x89PNG\r\n\x1a\n"),
        ("game/README.txt", b"Bo: not me.\n"),
        ("game/.hidden.rpy", b"label x:\n    \"no\"\n"),
        ("game/notes.json", b"{}"),
    ]);
    let story = folder.story(&["game"]);
    assert_eq!(
        ids(&story),
        [
            "game/day/two/start",
            "game/day/two/start#2",
            "game/script/start"
        ]
    );
    assert_eq!(story.scenes[0].scenario, "day/two");
    assert_eq!(story.speakers()[0].id, "bo", "defined in another file");
    let others: Vec<_> = story
        .notes
        .iter()
        .filter(|note| note.what.starts_with("files"))
        .map(|note| note.count)
        .collect();
    assert_eq!(others, [3]);
}

#[test]
fn odd_files_of_a_folder_are_counted_and_those_of_its_form_are_not_passed_over() {
    let readable = "1\n00:00:01,000 --> 00:00:02,000\nBo: Gone.\n";
    let latin = b"1\n00:00:01,000 --> 00:00:02,000\nBo: Caf\xe9.\n";
    let folder = Folder::with(&[
        ("game/script.rpy", b"label start:\n    \"One.\"\n"),
        ("game/two.rpy", b"label start:\n    \"Two.\"\n"),
        ("game/README.txt", b"Bo: caf\xe9\n"),
        ("game/images/BG.PNG", b"\x89PNG\r\n\x1a\n"),
        ("game/images/sky.png", b"\xff\xd8\xff\xe0"),
        ("game/old/picture.json", b"\x89PNG\r\n\x1a\n"),
        (
            "game/old/story.jsonl",
            br#"{"campaign":"sea","scene":"s","lines":[]}"#,
        ),
        ("subs/1.srt", latin),
        ("subs/2.srt", latin),
        ("subs/README.txt", b"Bo: hello\n"),
        ("mixed/1.srt", readable.as_bytes()),
        ("mixed/2.srt", latin),
        (
            "story/sea.jsonl",
            br#"{"campaign":"sea","scene":"s","lines":[]}"#,
        ),
    ]);
    std::fs::File::create(folder.path("game/big.json"))
        .unwrap()
        .set_len((256 << 20) + 1)
        .unwrap();
    let story = folder.story(&["game"]);
    assert_eq!(ids(&story), ["game/script/start", "game/two/start"]);
    let mut notes = story.notes.iter();
    let others = notes.find(|note| note.what.starts_with("files"));
    assert_eq!(others.map(|note| note.count), Some(6));
    for (name, part) in [
        ("subs", "subs/1.srt is not UTF-8 (line 3)"),
        ("mixed", "mixed/2.srt is not UTF-8 (line 3)"),
        ("story", "sea.jsonl is a story already"),
    ] {
        let error = folder.error(&[name]);
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn arrows_make_no_subtitles() {
    let folder = Folder::with(&[
        (
            "script.rpy",
            b"# prologue --> day 1\nlabel start:\n    \"Bo\" \"One.\"\n",
        ),
        ("notes.md", b"<!-- the sea -->\nBo: One.\n"),
        ("list.txt", b"1\nA --> B\nBo: One.\n"),
        ("subs.txt", b"00:00:01,000 --> 00:00:02,000\nBo: One.\n"),
    ]);
    for (name, form) in [
        ("script.rpy", Form::RenPy),
        ("notes.md", Form::Plain),
        ("list.txt", Form::Plain),
        ("subs.txt", Form::Subtitles),
    ] {
        let story = folder.story(&[name]);
        assert_eq!(story.files[0].1, form, "{name}");
        assert_eq!(story.speakers()[0].id, "bo", "{name}");
    }
}

#[test]
fn files_named_together_are_chapters_in_that_order() {
    let folder = Folder::with(&[
        ("sea/b.srt", b"1\n00:00:01,000 --> 00:00:02,000\nBo: One.\n"),
        ("sea/a.txt", b"Bo: Two.\n"),
    ]);
    let story = folder.story(&["sea/b.srt", "sea/a.txt"]);
    assert_eq!(ids(&story), ["sea/b/1", "sea/a/1"]);
}

#[test]
fn endings_lie_and_content_decides() {
    let folder = Folder::with(&[
        ("a.txt", b"WEBVTT\n\n00:01.000 --> 00:02.000\n<v Bo>Gone.\n"),
        ("b.csv", b":: Start\nBo: Gone.\n"),
        ("c.JSONL", br#"{"name":"Bo","is_user":false,"mes":"Gone."}"#),
        ("d", b"[Script Info]\n[Events]\nFormat: Start, End, Name, Text\nDialogue: 0:00:01.00,0:00:02.00,Bo,Gone.\n"),
        ("e.RPY", b"\"Bo\" \"Gone.\"\n"),
    ]);
    let forms = [
        Form::Subtitles,
        Form::Twee,
        Form::ChatLog,
        Form::SubStation,
        Form::RenPy,
    ];
    for (name, form) in ["a.txt", "b.csv", "c.JSONL", "d", "e.RPY"]
        .into_iter()
        .zip(forms)
    {
        let story = folder.story(&[name]);
        assert_eq!(story.files[0].1, form, "{name}");
        assert_eq!(story.speakers()[0].id, "bo", "{name}");
    }
}

#[test]
fn what_cannot_be_imported_is_named_with_the_remedy() {
    let folder = Folder::with(&[
        (
            "story.jsonl",
            br#"{"campaign":"sea","scene":"s","lines":[]}"#,
        ),
        ("data.json", b"{\"a\":1}"),
        ("empty.txt", b"\n\n"),
        (
            "bo.json",
            br#"{"spec":"chara_card_v2","data":{"name":"Bo","first_mes":"Hm."}}"#,
        ),
        ("sea.txt", b"Bo: Gone.\n"),
        ("broken.rpy", b"label start:\n    b \"Gone.\n"),
        ("latin.txt", b"Bo: caf\xe9\n"),
        ("sky.png", b"\x89PNG\r\n\x1a\n"),
        (
            "cards/bo.json",
            br#"{"spec":"chara_card_v2","data":{"name":"Bo"}}"#,
        ),
    ]);
    assert_eq!(
        folder.error(&["story.jsonl"]),
        "story.jsonl is a story already; give it to `cyrene corpus build --root` as it is"
    );
    assert!(
        folder.error(&["data.json"]).starts_with(
            "data.json is of no form that is known; name its form with --form (renpy, "
        )
    );
    assert!(
        folder
            .error(&["empty.txt"])
            .starts_with("empty.txt holds no line of a story")
    );
    assert!(
        folder
            .error(&["sea.txt", "bo.json"])
            .contains("bo.json:1: a character card is no part of a story")
    );
    assert_eq!(
        folder.error(&["broken.rpy"]),
        "broken.rpy:2: a quote opens here and is never closed"
    );
    assert!(
        folder
            .error(&["latin.txt"])
            .contains("not UTF-8 (line 1); perhaps CP1252")
    );
    assert!(
        folder
            .error(&["sky.png"])
            .contains("holds no character card")
    );
    assert!(
        folder
            .error(&["cards"])
            .contains("holds no line of a story")
    );
    assert!(folder.error(&["none.txt"]).contains("cannot read none.txt"));
}

#[test]
fn file_above_the_limit_is_refused_unread() {
    let folder = Folder::with(&[]);
    let path = folder.path("big.txt");
    std::fs::File::create(&path)
        .unwrap()
        .set_len((256 << 20) + 1)
        .unwrap();
    assert_eq!(
        folder.error(&["big.txt"]),
        "big.txt is larger than 256 MiB; cut it into several files"
    );
}

fn recognised(folder: &Folder, name: &str) -> Option<String> {
    let text = recognise(&folder.path(name))?.to_string();
    Some(text.replace(&format!("{}/", folder.0.path().display()), ""))
}

#[test]
fn forms_are_recognised_with_the_command_that_imports_them() {
    let folder = Folder::with(&[
        ("story.rpy", b"label start:\n    \"Gone.\"\n"),
        (
            "my chat.jsonl",
            br#"{"user_name":"Ann","character_name":"Bo","chat_metadata":{}}"#,
        ),
        (
            "bo.json",
            br#"{"name":"Bo","description":"","personality":"","first_mes":""}"#,
        ),
        ("subs/1.srt", b"1\n00:00:01,000 --> 00:00:02,000\nGone.\n"),
        ("utf16.txt", b"\xff\xfea\0"),
    ]);
    assert_eq!(
        recognised(&folder, "story.rpy").unwrap(),
        "story.rpy is a Ren'Py script; turn it into a story with `cyrene corpus import story.rpy --out story.jsonl`"
    );
    assert!(recognised(&folder, "my chat.jsonl").unwrap().starts_with(
        "my chat.jsonl is a SillyTavern chat log; turn it into a story with `cyrene corpus import '"
    ));
    assert!(
        recognised(&folder, "my chat.jsonl")
            .unwrap()
            .ends_with("my chat.story.jsonl'`")
    );
    assert_eq!(
        recognised(&folder, "bo.json").unwrap(),
        "bo.json is a character card; turn it into a character file with `cyrene corpus import bo.json --out bo.toml`"
    );
    assert_eq!(
        recognised(&folder, "subs").unwrap(),
        "subs holds no story but subtitles; turn it into a story with `cyrene corpus import subs --out subs.jsonl`"
    );
    assert!(recognised(&folder, "utf16.txt").is_some());
}

#[test]
fn stories_rows_and_unknown_files_are_not_recognised() {
    let folder = Folder::with(&[
        (
            "sea/story.jsonl",
            br#"{"campaign":"sea","scene":"s","lines":[]}"#,
        ),
        ("sea/README.md", b"Bo: hello"),
        ("zip/story.jsonl.gz", b"\x1f\x8b"),
        ("zip/README.md", b"Bo: hello"),
        ("rows.jsonl", br#"{"messages":[]}"#),
        ("broken.jsonl", b"{\"campaign\": \"sea\",\n"),
        ("sky.png", b"\x89PNG\r\n\x1a\n"),
        ("x.toml", b"name = 1"),
        (
            "story.txt",
            b"{\"campaign\": \"sea\", \"scene\": \"s\", \"lines\": []}\n{\"campaign\":",
        ),
    ]);
    for name in [
        "sea",
        "sea/story.jsonl",
        "zip",
        "rows.jsonl",
        "broken.jsonl",
        "sky.png",
        "x.toml",
        "story.txt",
        "none",
    ] {
        assert_eq!(recognised(&folder, name), None, "{name}");
    }
}

#[test]
fn story_and_character_readers_name_what_they_were_given() {
    let folder = Folder::with(&[
        ("story.rpy", b"label start:\n    \"Gone.\"\n"),
        (
            "chat.jsonl",
            br#"{"user_name":"Ann","character_name":"Bo","chat_metadata":{}}"#,
        ),
        ("game/story.rpy", b"label start:\n    \"Gone.\"\n"),
        (
            "bo.json",
            br#"{"spec":"chara_card_v3","data":{"name":"Bo"}}"#,
        ),
        (
            "bo.png",
            &png::tests::png(&[(
                "chara",
                &png::tests::to_base64(br#"{"spec":"chara_card_v2","data":{"name":"Bo"}}"#),
            )]),
        ),
    ]);
    for (name, expect) in [
        ("story.rpy", "a Ren'Py script"),
        ("chat.jsonl", "a SillyTavern chat log"),
        ("game", "but a Ren'Py script"),
    ] {
        let error = crate::source::story::read(&folder.path(name))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(expect) && error.contains("`cyrene corpus import "),
            "{error}"
        );
    }
    for name in ["bo.json", "bo.png"] {
        let error = Character::load(&folder.path(name)).unwrap_err().to_string();
        assert!(
            error.contains("is a character card; turn it into a character file with"),
            "{error}"
        );
    }
}
