//! Cards of every version, and the character files made of them.

use std::path::Path;

use super::*;
use crate::character::Character;

fn read_card(json: &str) -> (Character, Vec<String>) {
    let made = read(json, Language::En, None).unwrap();
    let character = Character::parse(&made.toml, Path::new("bo.toml")).unwrap();
    let notes = made
        .notes
        .0
        .iter()
        .map(|kind| format!("{} {}", kind.count, kind.what))
        .collect();
    (character, notes)
}

fn fault(json: &str) -> String {
    let fault = read(json, Language::En, None).unwrap_err();
    format!("{}: {}", fault.line, fault.problem)
}

const V2: &str = r#"{"spec":"chara_card_v2","spec_version":"2.0","data":{"name":"Bo","description":"{{char}} is an old ferryman.","personality":"gruff","scenario":"The harbour at dusk.","first_mes":"*Bo looks up.* You again, {{user}}.","mes_example":"<START>\n{{user}}: Where is the boat?\n{{char}}: Gone.","creator_notes":"","system_prompt":"","post_history_instructions":"","alternate_greetings":[],"tags":[],"creator":"","character_version":"","extensions":{}}}"#;

#[test]
fn v2_card_gives_name_greeting_and_system_prompt() {
    let (bo, notes) = read_card(V2);
    assert_eq!(bo.name_in(Language::En), "Bo");
    assert_eq!(bo.languages(), [Language::En]);
    assert_eq!(
        bo.greeting.get(Language::En),
        Some("*Bo looks up.* You again, User.")
    );
    assert_eq!(
        bo.system_in(Language::En),
        "Bo is an old ferryman.\n\nBo's personality: gruff\n\nScenario: The harbour at dusk."
    );
    assert_eq!(
        (&bo.story.speaker_ids[..], &bo.player.speaker_ids[..]),
        (&["bo".to_owned()][..], &["player".to_owned()][..])
    );
    assert_eq!(
        notes,
        [
            "1 example dialogues (a character learns from the story)",
            "1 times {{user}} became a name (--player NAME chooses it)"
        ]
    );
}

#[test]
fn player_and_language_are_put_in() {
    let made = read(V2, Language::Jp, Some("アン")).unwrap();
    let bo = Character::parse(&made.toml, Path::new("bo.toml")).unwrap();
    assert_eq!(
        bo.greeting.get(Language::Jp),
        Some("*Bo looks up.* You again, アン.")
    );
    assert_eq!(bo.player.name.get(Language::Jp), Some("アン"));
    assert_eq!(
        bo.system_in(Language::Jp),
        "Bo is an old ferryman.\n\ngruff\n\nThe harbour at dusk."
    );
}

#[test]
fn v1_cards_and_older_names_are_read() {
    let (bo, notes) = read_card(
        r#"{"name":"Bo","description":"Old.","personality":"","scenario":"","first_mes":"Hm.","mes_example":"","avatar":"none","chat":"x","fav":false}"#,
    );
    assert_eq!(
        (bo.system_in(Language::En), bo.greeting.get(Language::En)),
        ("Old.", Some("Hm."))
    );
    assert_eq!(
        notes,
        [
            "1 pictures and sounds",
            "2 settings of front ends (extensions)"
        ]
    );
    let (bo, _) = read_card(
        r#"{"char_name":"Bo","char_persona":"Old.","char_greeting":"Hm.","world_scenario":"Dusk.","example_dialogue":""}"#,
    );
    assert_eq!(bo.system_in(Language::En), "Old.\n\nScenario: Dusk.");
}

#[test]
fn v3_card_says_what_it_loses() {
    let (bo, notes) = read_card(
        r#"{"spec":"chara_card_v3","data":{"name":"Bo the Ferryman","nickname":"Bo","description":"{{char}} waits. {{random:a,b}}","first_mes":"Hm.\n\n\"Well?\" \\ '''","system_prompt":"Be {{char}}. {{original}}",
        "alternate_greetings":["a","b"],"group_only_greetings":["c"],"character_book":{"entries":[{},{},{}]},"post_history_instructions":"Stay brief.","creator_notes":"n","tags":["t"],"assets":[{"type":"icon"}],
        "extensions":{"depth_prompt":{"prompt":"p","depth":4},"world":"w"},"strange":1}}"#,
    );
    assert_eq!(bo.name_in(Language::En), "Bo the Ferryman");
    assert_eq!(
        bo.system_in(Language::En),
        "Be Bo.\n\nBo waits. {{random:a,b}}"
    );
    assert_eq!(
        bo.greeting.get(Language::En),
        Some("Hm.\n\n\"Well?\" \\ '''")
    );
    assert_eq!(bo.story.speaker_ids, ["bo-the-ferryman"]);
    assert_eq!(
        notes,
        [
            "3 alternate greetings",
            "3 entries of the lorebook",
            "2 instructions behind the history, or at a depth of it",
            "2 notes, tags, versions and sources of the card",
            "1 pictures and sounds",
            "1 settings of front ends (extensions)",
            "1 keys that no card has",
            "1 macros that only a front end fills in (they stay in the text)",
        ]
    );
}

#[test]
fn card_with_nothing_but_a_name_loads() {
    let (bo, notes) = read_card(r#"{"spec":"chara_card_v2","data":{"name":"Player"}}"#);
    assert_eq!(bo.system_in(Language::En), "Player");
    assert!(bo.greeting.is_empty() && notes.is_empty());
    assert_eq!(
        (&bo.story.speaker_ids[..], bo.player.speaker_ids.len()),
        (&["player".to_owned()][..], 0)
    );
}

#[test]
fn newer_card_of_a_picture_wins() {
    let chunk = |name: &str| {
        png::tests::to_base64(
            format!("{{\"spec\":\"chara_card_v3\",\"data\":{{\"name\":\"{name}\"}}}}").as_bytes(),
        )
    };
    let picture = png::tests::png(&[("chara", &chunk("Old")), ("ccv3", &chunk("Bo é"))]);
    assert_eq!(
        read(&of_png(&picture).unwrap(), Language::En, None)
            .unwrap()
            .name,
        "Bo é"
    );
}

#[test]
fn what_is_no_card_is_named() {
    assert_eq!(
        fault("{\"name\":"),
        "1: EOF while parsing a value (column 8)"
    );
    assert!(fault("{\"a\":1}").contains("no character card"));
    assert_eq!(
        fault(r#"{"spec":"chara_card_v2","data":{"name":" "}}"#),
        "1: the card has no name; write one at `name`"
    );
    let damaged = png::tests::png(&[("chara", "!!")]);
    assert!(
        of_png(&damaged)
            .unwrap_err()
            .problem
            .contains("is no base64")
    );
    let bare = png::tests::png(&[]);
    assert!(
        of_png(&bare)
            .unwrap_err()
            .problem
            .contains("holds no character card")
    );
}
