//! Another character of the same engine needs a character file and no code: Kalenz of the small tree, with another
//! player, other missions, books and blocks. What comes out is worked out here anew, from the page of rules alone.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests fail by panicking, as tests do"
)]

#[expect(
    dead_code,
    reason = "the tests of one folder share it, and each uses its part"
)]
mod common;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use common::shared;
use corpus::{BuildRequest, Character, Language, SourceKind, Task};
use serde_json::Value;
use text::Role;

const KALENZ: u64 = 8347254212154585286;
const LISAR: u64 = 12286569378821401368;
const HALDRIC: u64 = 12172129776731566058;

const CHARACTER: &str = r#"
languages = ["chs", "en"]
[name]
en = "Kalenz"
[turn_based_game]
avatar_id = 1402
player_name_hash = "12286569378821401368"
name_hashes = ["8347254212154585286"]
people = [
    { avatar_id = 1404, name_hash = "12172129776731566058" },
    { avatar_id = 1402, name_hash = "8347254212154585286" },
]
mission_prefixes = [204]
book_worlds = [3]
fine_talk_blocks = [504119, 146789]
replacements = [{ from = "{MCV#8015162#OldValue_1}", to = "seven" }]
[turn_based_game.nickname]
chs = "测试者"
en = "Tess"
"#;
const FINE: [i64; 2] = [504_119, 146_789];

/// A row of messages: who says what.
type Messages = Vec<(Role, String)>;

/// The tables and one text map, as serde_json reads them.
struct Tree<'a> {
    folder: &'a Path,
    language: Language,
    texts: HashMap<String, String>,
    joins: HashMap<u64, String>,
}

/// A talk row with its shown parts.
struct Talk {
    name_hash: Option<u64>,
    name: String,
    text: String,
}

impl<'a> Tree<'a> {
    fn read(folder: &'a Path, language: Language) -> Tree<'a> {
        let code = language.code().to_uppercase();
        let map = std::fs::read(folder.join(format!("TextMap/TextMap{code}.json"))).unwrap();
        let mut tree = Tree {
            folder,
            language,
            texts: serde_json::from_slice(&map).unwrap(),
            joins: HashMap::new(),
        };
        let items: HashMap<i64, String> = tree
            .table("TextJoinItem")
            .iter()
            .filter_map(|item| {
                let text = tree.raw(hash(&item["TextJoinText"])?)?;
                Some((item["TextJoinItemID"].as_i64().unwrap(), text))
            })
            .collect();
        for row in tree.table("TextJoinConfig") {
            let mut ids: Vec<i64> =
                serde_json::from_value(row["TextJoinItemList"].clone()).unwrap();
            ids.sort_unstable();
            ids.insert(0, row["DefaultItem"].as_i64().unwrap());
            if let Some(text) = ids.iter().find_map(|id| items.get(id)) {
                let id = row["TextJoinID"].as_u64().unwrap();
                tree.joins.insert(id, text.clone());
            }
        }
        tree
    }

    fn table(&self, name: &str) -> Vec<Value> {
        let bytes = std::fs::read(self.folder.join(format!("ExcelOutput/{name}.json"))).unwrap();
        serde_json::from_slice(&bytes).unwrap()
    }

    fn raw(&self, hash: u64) -> Option<String> {
        self.texts.get(&hash.to_string()).cloned()
    }

    fn text(&self, hash: u64) -> Option<String> {
        let mut text = self.raw(hash)?;
        for (id, joined) in &self.joins {
            text = text.replace(&format!("{{TEXTJOIN#{id}}}"), joined);
        }
        Some(text.replace("\\n", "\n"))
    }

    /// Groups of talk rows by their number.
    fn groups(&self) -> BTreeMap<i64, Vec<Talk>> {
        let mut rows: Vec<(i64, Value)> = self
            .table("TalkSentenceConfig")
            .into_iter()
            .filter_map(|row| Some((row["TalkSentenceID"].as_i64()?, row)))
            .collect();
        rows.sort_by_key(|(id, _)| *id);
        let mut groups: BTreeMap<i64, Vec<Talk>> = BTreeMap::new();
        for (id, row) in rows {
            let Some(text) = hash(&row["TalkSentenceText"]).and_then(|h| self.text(h)) else {
                continue;
            };
            let fine = FINE.contains(&(id / 1000));
            let name_hash = hash(&row["TextmapTalkSentenceName"]);
            let name = name_hash
                .filter(|h| *h != 0)
                .and_then(|h| self.text(h))
                .filter(|name| !name.is_empty());
            groups
                .entry(id / if fine { 100 } else { 1000 })
                .or_default()
                .push(Talk {
                    name_hash,
                    name: name.unwrap_or_else(|| "{NICKNAME}".to_owned()),
                    text,
                });
        }
        groups
    }

    /// Section 5.1, bracketed.
    fn bracketed(&self, talk: &Talk) -> String {
        let (open, close) = match self.language {
            Language::Chs => ('（', '）'),
            _ => ('(', ')'),
        };
        let inner = talk.text.trim_start_matches(open).trim_end_matches(close);
        match talk.name_hash {
            Some(hash) if hash != KALENZ && hash != LISAR => {
                self.clean(&format!("{open}{inner}{close}"))
            }
            _ => self.clean(inner),
        }
    }

    /// Section 5.2.
    fn clean(&self, text: &str) -> String {
        let nickname = match self.language {
            Language::Chs => "测试者",
            _ => "Tess",
        };
        let text = text
            .replace("{NICKNAME}", nickname)
            .replace("{MCV#8015162#OldValue_1}", "seven")
            .replace("{SPACE}", " ");
        let gone = [
            ("<", ">"),
            ("{RUBY_B#", "}"),
            ("{RUBY_E#}", ""),
            ("{F#{M#}}", ""),
            ("{Img#", "}"),
            ("{Img ", "}"),
            ("{LAYOUT_CONTROLLER#", "}"),
            ("{LAYOUT_KEYBOARD#", "}"),
        ];
        let text = pass(&text, &gone, false);
        let text = pass(&text, &[("{LAYOUT_MOBILE#", "}")], true);
        let text = pass(&text, &[("{F#", "}")], true);
        pass(&text, &[("{M#", "}")], false)
    }

    /// `sft/cyrene` for Kalenz.
    fn conversations(&self) -> Vec<Messages> {
        let mut all = Vec::new();
        for talks in self.groups().values() {
            let mut messages: Messages = Vec::new();
            let mut tokens = 0;
            let mut user: Vec<String> = Vec::new();
            let mut assistant: Vec<String> = Vec::new();
            let mut close = |user: &mut Vec<String>, assistant: &mut Vec<String>| {
                if !assistant.is_empty() {
                    let last = user.split_off(user.len().saturating_sub(10));
                    let lines = last.iter().chain(&*assistant);
                    tokens += lines.map(|l| l.chars().count()).sum::<usize>();
                    messages.push((Role::User, last.join("\n")));
                    messages.push((Role::Assistant, std::mem::take(assistant).join("\n")));
                    user.clear();
                }
            };
            for talk in talks {
                if talk.name_hash == Some(KALENZ) {
                    assistant.push(self.bracketed(talk));
                } else {
                    close(&mut user, &mut assistant);
                    user.push(self.bracketed(talk));
                }
            }
            close(&mut user, &mut assistant);
            let opens = talks.first().is_some_and(|t| t.name_hash == Some(KALENZ));
            let alone = messages.len() == 2 && opens;
            if messages.is_empty() || alone || tokens > 8192 {
                continue;
            }
            let name = self.clean(&self.text(KALENZ).unwrap());
            messages.insert(0, (Role::System, name));
            all.push(messages);
        }
        let people = self.table("AvatarConfig");
        let own = people.iter().find(|p| p["AvatarID"] == 1402).unwrap();
        let name = self.text(hash(&own["AvatarName"]).unwrap()).unwrap();
        for row in self.table("VoiceAtlas") {
            if row["AvatarID"] == 1402 {
                let said = |key: &str| {
                    self.bracketed(&Talk {
                        name_hash: None,
                        name: String::new(),
                        text: self.text(hash(&row[key]).unwrap()).unwrap(),
                    })
                };
                all.push(vec![
                    (Role::System, self.clean(&name)),
                    (Role::User, said("VoiceTitle")),
                    (Role::Assistant, said("Voice_M")),
                ]);
            }
        }
        all
    }

    /// The talks of `pt/amphoreus` for the part of Kalenz and Haldric.
    fn talk_documents(&self) -> Vec<String> {
        let colon = match self.language {
            Language::Chs => "：",
            _ => ": ",
        };
        let mut documents = Vec::new();
        for talks in self.groups().values() {
            let of_part = |t: &Talk| matches!(t.name_hash, Some(KALENZ | HALDRIC));
            if !talks.iter().any(of_part) {
                continue;
            }
            let (mut piece, mut sum) = (Vec::new(), 0);
            for talk in talks {
                let shown = self.clean(&[&talk.name, colon, &talk.text].concat());
                let tokens = shown.chars().count();
                if sum + tokens > 4096 && !piece.is_empty() {
                    documents.push(std::mem::take(&mut piece).join("\n"));
                    sum = 0;
                }
                sum += tokens;
                piece.push(shown);
            }
            documents.push(piece.join("\n"));
        }
        documents
    }
}

fn hash(text: &Value) -> Option<u64> {
    text.get("Hash")?.as_u64()
}

/// One pass from left to right: what a start and an end enclose goes, or stays without them.
fn pass(text: &str, marks: &[(&str, &str)], keep: bool) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let found = marks.iter().find_map(|(start, end)| {
            let inner = rest.strip_prefix(start)?;
            let length = inner.find(end)?;
            Some((&inner[..length], &inner[length + end.len()..]))
        });
        match found {
            Some((inner, behind)) => {
                out.push_str(if keep { inner } else { "" });
                rest = behind;
            }
            None => {
                out.push(c);
                rest = &rest[c.len_utf8()..];
            }
        }
    }
    out
}

#[test]
fn another_character_of_the_engine_needs_no_code() {
    let Some(shared) = shared() else { return };
    let folder = tempfile::tempdir().unwrap();
    let archive = std::fs::File::open(shared.join("story/tree_small.tar.gz")).unwrap();
    tar::Archive::new(flate2::read::GzDecoder::new(archive))
        .unpack(folder.path())
        .unwrap();
    let root = folder.path().join("tree");
    let out = folder.path().join("out");
    let character = Character::parse(CHARACTER, Path::new("kalenz.toml")).unwrap();
    let request = BuildRequest {
        source: SourceKind::TurnBasedGame,
        root: &root,
        character: &character,
        tasks: &[Task::SftCyrene, Task::PtAmphoreus],
        languages: None,
        out: &out,
    };
    corpus::build(
        &request,
        corpus::Counters::of_rules(&|text| text.chars().count()),
        &|_| {},
    )
    .unwrap();

    for language in [Language::Chs, Language::En] {
        let tree = Tree::read(&root, language);
        let load = |task: Task| {
            corpus::rows::load(&out.join(format!("{task}/{language}.jsonl")), None).unwrap()
        };
        let got: Vec<Messages> = load(Task::SftCyrene)
            .into_iter()
            .map(|row| row.messages.into_iter().map(|m| (m.role, m.content)))
            .map(Iterator::collect)
            .collect();
        let expect = tree.conversations();
        assert!(expect.len() > 20, "{} conversations", expect.len());
        for (got, expect) in got.iter().zip(&expect) {
            assert_eq!(got, expect);
        }
        assert_eq!(got.len(), expect.len());

        let rows = load(Task::PtAmphoreus);
        let talks = rows.iter().filter(|r| r.scene.starts_with("talk/"));
        let talks: Vec<&str> = talks.map(|r| r.text().unwrap()).collect();
        let expect = tree.talk_documents();
        assert!(expect.len() > 20, "{} documents", expect.len());
        assert_eq!(talks, expect);

        // Missions, books and people are those of the file.
        let scenes: BTreeSet<&str> = rows.iter().map(|r| r.scene.as_str()).collect();
        let of = |kind: &str| -> BTreeSet<String> {
            let ids = scenes.iter().filter_map(|s| s.strip_prefix(kind));
            ids.map(|id| id.split('/').next().unwrap().to_owned())
                .collect()
        };
        let ids = |table: &str, id: &str, takes: &dyn Fn(&Value) -> bool| -> BTreeSet<String> {
            let rows = tree.table(table).into_iter();
            rows.filter(|r| takes(r))
                .map(|r| r[id].to_string())
                .collect()
        };
        let is_204 = |r: &Value| r["MissionID"].as_i64().unwrap() / 10000 == 204;
        assert_eq!(
            of("mission/"),
            ids("ChronicleConclusion", "MissionID", &is_204)
        );
        let is_3 = |r: &Value| r["BookSeriesWorld"] == 3;
        assert_eq!(of("book/"), ids("BookSeriesConfig", "BookSeriesID", &is_3));
        let is_ours = |r: &Value| r["AvatarID"] == 1402 || r["AvatarID"] == 1404;
        assert_eq!(of("story/"), ids("StoryAtlas", "AvatarID", &is_ours));
        assert_eq!(of("voice/"), ids("VoiceAtlas", "AvatarID", &is_ours));

        // Nothing of the other character file is left.
        for row in &rows {
            let text = row.text().unwrap();
            for other in ["FelysNeko", "银河猫猫侠", "{NICKNAME}", "{MCV"] {
                assert!(!text.contains(other), "{text}");
            }
        }
    }
}
