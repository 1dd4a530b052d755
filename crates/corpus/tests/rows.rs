//! Rows as people have them: what each form becomes, what is refused and how, in files of every kind.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::Write;
use std::path::{Path, PathBuf};

use corpus::Error;
use corpus::examples::{self, Encoding, Examples, TrainingStage};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use text::labels::LossScale;
use text::{ADDED_TOKENS, Example, IGNORE, Tokenizer};

fn tokenizer() -> Tokenizer {
    let words = "Say hi. Where is the boat? Gone. You are Bo, the ferryman. Ask the river.";
    Tokenizer::train([words].into_iter(), 400).unwrap()
}

struct Rows {
    folder: tempfile::TempDir,
    tokenizer: Tokenizer,
}

impl Rows {
    fn new() -> Rows {
        Rows {
            folder: tempfile::tempdir().unwrap(),
            tokenizer: tokenizer(),
        }
    }

    fn put(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn encoding(&self, stage: TrainingStage) -> Encoding<'_> {
        Encoding {
            stage,
            loss_scale: LossScale::default(),
            tokenizer: Some(&self.tokenizer),
            vocab_size: Some(self.tokenizer.vocab_size()),
            row_tokens: None,
        }
    }

    fn read(&self, path: &Path) -> corpus::Result<Examples> {
        examples::source(path, None, self.encoding(TrainingStage::Sft))
    }

    /// What rows of one file become.
    fn of(&self, rows: &[Value]) -> corpus::Result<Examples> {
        let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
        let path = self.put("rows.jsonl", lines.join("\n"));
        self.read(&path)
    }

    fn ids(&self, row: &Value) -> Vec<Example> {
        encoded(self.of(std::slice::from_ref(row)).unwrap())
    }

    /// What is said of a row that cannot be used.
    fn refusal(&self, row: &Value) -> String {
        match self.of(std::slice::from_ref(row)) {
            Err(Error::BadRows(bad)) => bad.to_string(),
            other => panic!("{row}: {other:?}"),
        }
    }
}

fn encoded(examples: Examples) -> Vec<Example> {
    let examples = examples.examples.into_iter();
    examples.map(|example| example.encoded).collect()
}

fn user(content: &str) -> Value {
    json!({ "role": "user", "content": content })
}

fn assistant(content: &str) -> Value {
    json!({ "role": "assistant", "content": content })
}

fn system(content: &str) -> Value {
    json!({ "role": "system", "content": content })
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut packed = GzEncoder::new(Vec::new(), Compression::default());
    packed.write_all(bytes).unwrap();
    packed.finish().unwrap()
}

fn hi() -> Value {
    json!([user("Say hi."), assistant("Hi.")])
}

fn with_system() -> Value {
    json!([system("You are Bo."), user("Say hi."), assistant("Hi.")])
}

fn two() -> Value {
    json!([
        user("Boat?"),
        assistant("Gone."),
        user("Say hi."),
        assistant("Hi.")
    ])
}

/// [`two`], of which only the last answer is trained.
fn of_prompt() -> Value {
    let read_only = json!({ "role": "assistant", "content": "Gone.", "loss": false });
    json!([user("Boat?"), read_only, user("Say hi."), assistant("Hi.")])
}

/// Rows, each beside the messages that it says the same as.
fn check(cases: &[(Value, Value)]) {
    let rows = Rows::new();
    for (row, messages) in cases {
        let expected = rows.ids(&json!({ "messages": messages }));
        assert_eq!(rows.ids(row), expected, "{row}");
    }
}

#[test]
fn prompt_and_completion_are_a_question_and_its_answer() {
    check(&[
        (json!({ "prompt": "Say hi.", "completion": "Hi." }), hi()),
        (json!({ "prompt": "Say hi.", "response": "Hi." }), hi()),
        (
            json!({ "query": "Say hi.", "response": "Hi.", "history": null }),
            hi(),
        ),
        (json!({ "question": "Say hi.", "answer": "Hi." }), hi()),
        (json!({ "input": "Say hi.", "output": "Hi." }), hi()),
        (
            json!({ "prompt": [user("Say hi.")], "completion": [assistant("Hi.")] }),
            hi(),
        ),
        (
            json!({ "prompt": [system("You are Bo."), user("Say hi.")], "completion": "Hi." }),
            with_system(),
        ),
        (
            json!({ "prompt": "Say hi.", "completion": [{ "type": "text", "text": "Hi." }] }),
            hi(),
        ),
        (
            json!({ "prompt": [user("Boat?"), assistant("Gone."), user("Say hi.")], "completion": [assistant("Hi.")] }),
            of_prompt(),
        ),
        (
            json!({ "prompt": [{ "from": "human", "value": "Boat?" }, { "from": "gpt", "value": "Gone." }, user("Say hi.")], "completion": "Hi." }),
            of_prompt(),
        ),
    ]);
}

#[test]
fn alpaca_rows_are_conversations() {
    check(&[
        (
            json!({ "instruction": "Say hi.", "input": "", "output": "Hi." }),
            hi(),
        ),
        (json!({ "instruction": "Say hi.", "output": "Hi." }), hi()),
        (
            json!({ "instruction": "", "input": "Say hi.", "output": "Hi." }),
            hi(),
        ),
        (
            json!({ "instruction": "Say hi.", "input": "", "output": "Hi.", "text": "### Instruction: ..." }),
            hi(),
        ),
        (
            json!({ "instruction": "Say hi.", "output": "Hi.", "system": "You are Bo." }),
            with_system(),
        ),
        (
            json!({ "instruction": "Say hi.", "output": "Hi.", "history": [["Boat?", "Gone."]] }),
            two(),
        ),
        (
            json!({ "query": "Say hi.", "response": "Hi.", "history": [["Boat?", "Gone."]] }),
            two(),
        ),
    ]);
}

#[test]
fn sharegpt_rows_are_conversations() {
    check(&[
        (
            json!({ "conversations": [{ "from": "human", "value": "Say hi." }, { "from": "gpt", "value": "Hi." }] }),
            hi(),
        ),
        (
            json!({ "conversations": [{ "from": "system", "value": "You are Bo." }, { "from": "user", "value": "Say hi." }, { "from": "assistant", "value": "Hi." }] }),
            with_system(),
        ),
        (
            json!({ "conversations": [{ "from": "human", "value": "Say hi." }, { "from": "gpt", "value": "Hi." }], "system": "You are Bo." }),
            with_system(),
        ),
        (
            json!({ "conversation": [user("Say hi."), assistant("Hi.")] }),
            hi(),
        ),
        (
            json!({ "conversations": [user("Say hi."), assistant("Hi.")] }),
            hi(),
        ),
        (
            json!({ "dialog": [{ "role": "human", "content": "Say hi." }, { "role": "bot", "content": "Hi." }] }),
            hi(),
        ),
        (
            json!({ "conversation": [{ "human": "Boat?", "assistant": "Gone." }, { "human": "Say hi.", "assistant": "Hi." }] }),
            two(),
        ),
    ]);
}

#[test]
fn messages_may_have_a_system_beside_them_text_parts_or_nothing_around_them() {
    check(&[
        (
            json!({ "messages": [user("Say hi."), assistant("Hi.")], "system": "You are Bo." }),
            with_system(),
        ),
        (
            json!({ "messages": [user("Say hi."), assistant("Hi.")], "system_prompt": "You are Bo." }),
            with_system(),
        ),
        (
            json!({ "messages": [user("Say hi."), assistant("Hi.")], "system": "" }),
            hi(),
        ),
        (
            json!({ "messages": [user("Say hi."), assistant("Hi.")], "system": null, "tools": [], "images": null, "rejected": null }),
            hi(),
        ),
        (
            json!({ "messages": [user("Say hi."), assistant("Hi.")], "tools": "[]", "weight": 1, "objects": {} }),
            hi(),
        ),
        (
            json!({ "messages": [{ "role": "user", "content": [{ "type": "text", "text": "Say " }, { "type": "text", "text": "hi." }] }, assistant("Hi.")] }),
            hi(),
        ),
        (json!([user("Say hi."), assistant("Hi.")]), hi()),
    ]);
}

#[test]
fn input_stands_on_a_line_below_the_instruction() {
    let rows = Rows::new();
    let expected = rows.ids(&json!({ "messages": [user("Say hi.\nBo"), assistant("Hi.")] }));
    for row in [
        json!({ "instruction": "Say hi.", "input": "Bo", "output": "Hi." }),
        json!({ "instruction": "Say hi.", "context": "Bo", "response": "Hi." }),
    ] {
        assert_eq!(rows.ids(&row), expected, "{row}");
    }
}

#[test]
fn answer_without_content_is_the_empty_answer() {
    let rows = Rows::new();
    let expected = rows.ids(&json!({ "messages": [user("Say hi."), assistant("")] }));
    for row in [
        json!({ "messages": [user("Say hi."), { "role": "assistant", "content": null }] }),
        json!({ "messages": [user("Say hi."), { "role": "assistant" }] }),
        json!({ "conversations": [{ "from": "human", "value": "Say hi." }, { "from": "gpt", "value": null }] }),
    ] {
        assert_eq!(rows.ids(&row), expected, "{row}");
    }
}

#[test]
fn answer_of_weight_0_is_read_but_not_trained() {
    let rows = Rows::new();
    let row = |more: Value| {
        let mut first = json!({ "role": "assistant", "content": "Wrong answer." });
        first
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        json!({ "messages": [user("Hello."), first, user("Again."), assistant("Right answer.")] })
    };
    let trained = rows.ids(&row(json!({})));
    let masked = rows.ids(&row(json!({ "loss": false })));
    assert_eq!(trained[0].input_ids, masked[0].input_ids);
    assert!(masked[0].n_trained() < trained[0].n_trained());
    for key in [
        json!({ "weight": 0 }),
        json!({ "train": false }),
        json!({ "weight": 0.0 }),
    ] {
        assert_eq!(rows.ids(&row(key.clone())), masked, "{key}");
    }
    for key in [
        json!({ "weight": 1 }),
        json!({ "train": true }),
        json!({ "loss": true }),
    ] {
        assert_eq!(rows.ids(&row(key.clone())), trained, "{key}");
    }
    let said = rows.refusal(&row(json!({ "weight": 0.5 })));
    assert!(said.contains("weight"), "{said}");
}

#[test]
fn system_message_of_the_list_stands_and_the_other_is_told() {
    let rows = Rows::new();
    let messages = json!([system("You are Bo."), user("Say hi."), assistant("Hi.")]);
    let own = rows.ids(&json!({ "messages": messages }));
    let both = rows
        .of(&[json!({ "messages": messages, "system": "You are Ada." })])
        .unwrap();
    let notes = both.notes.lines();
    assert_eq!(encoded(both), own);
    assert_eq!(notes.len(), 1, "{notes:?}");
    assert!(
        notes[0].starts_with("1 row has another `system`"),
        "{notes:?}"
    );
    let same = rows
        .of(&[json!({ "messages": messages, "system": "You are Bo. " })])
        .unwrap();
    assert!(same.notes.lines().is_empty());
    let said = rows.refusal(
        &json!({ "messages": [user("a"), assistant("b")], "system": "c", "system_prompt": "d" }),
    );
    assert!(said.contains("different things"), "{said}");
}

#[test]
fn keys_that_would_change_training_are_refused_by_name() {
    let rows = Rows::new();
    let said_of = |key: &str, value: Value| {
        let mut row = json!({ "messages": [user("Say hi."), assistant("Hi.")] });
        row[key] = value;
        rows.refusal(&row)
    };
    let tool = json!([{ "type": "function", "function": { "name": "weigh" } }]);
    for (key, value) in [
        ("tools", tool.clone()),
        ("tools", json!(tool.to_string())),
        ("functions", tool),
        ("images", json!(["boat.png"])),
        ("image", json!("boat.png")),
        ("videos", json!(["a.mp4"])),
        ("audios", json!(["a.wav"])),
        ("objects", json!({ "bbox": [1, 2] })),
        ("rejected", json!("No.")),
        ("rejected_response", json!("No.")),
        ("chosen", json!([assistant("Hi.")])),
        ("margin", json!(0.5)),
        ("label", json!(false)),
        ("kto_tag", json!(true)),
        ("weight", json!(0.5)),
        ("weight", json!(0)),
        ("train", json!(false)),
        ("loss_scale", json!([0, 1])),
        ("loss_mask", json!([0, 1])),
        ("labels", json!([1])),
        ("history", json!([["a", "b"]])),
        ("chat_template_kwargs", json!({ "enable_thinking": true })),
    ] {
        let said = said_of(key, value);
        assert!(said.contains(&format!("`{key}`")), "{key}: {said}");
        assert!(said.contains("rows.jsonl:1: "), "{said}");
    }
    let said = rows.refusal(&json!({ "text": "a", "prompt": "b", "completion": "c", "messages": [user("a"), assistant("b")] }));
    assert!(
        said.contains("`messages` and `prompt` and `completion`"),
        "{said}"
    );
    for (row, key) in [
        (
            json!({ "prompt": "a", "chosen": "b", "rejected": "c" }),
            "`rejected`",
        ),
        (
            json!({ "input": {}, "preferred_output": [{}], "non_preferred_output": [{}] }),
            "`preferred_output`",
        ),
        (
            json!({ "prompt": "a", "completion": "b", "label": true }),
            "`label`",
        ),
    ] {
        let said = rows.refusal(&row);
        assert!(said.contains(key), "{key}: {said}");
    }
    for message in [
        json!({ "role": "assistant", "content": "", "tool_calls": [{ "id": "1" }] }),
        json!({ "from": "function_call", "value": "{}" }),
    ] {
        let said = rows.refusal(&json!({ "messages": [user("a"), message] }));
        assert!(said.contains("tool"), "{said}");
    }
}

#[test]
fn keys_that_say_nothing_are_as_if_absent() {
    check(&[
        (
            json!({ "messages": hi(), "input_ids": [], "prompt": "", "completion": {}, "text": " " }),
            hi(),
        ),
        (
            json!({ "messages": hi(), "history": [], "labels": [], "attention_mask": [], "weight": "" }),
            hi(),
        ),
        (
            json!({ "prompt": "Say hi.", "completion": "Hi.", "response": "", "messages": [] }),
            hi(),
        ),
        (
            json!({ "messages": [{ "role": "user", "content": "Say hi.", "tool_calls": "", "function_call": {}, "weight": "" }, assistant("Hi.")] }),
            hi(),
        ),
        // An input is words, whatever they look like.
        (
            json!({ "instruction": "Say hi.", "input": "[]", "output": "Hi." }),
            json!([user("Say hi.\n[]"), assistant("Hi.")]),
        ),
    ]);
    let rows = Rows::new();
    let read = rows.of(&[json!({ "messages": hi(), "history": [], "labels": {}, "input": "" })]);
    assert!(read.unwrap().notes.lines().is_empty());
    let path = rows.put(
        "t.jsonl",
        json!({ "text": "abc", "prompt": "", "completion": "" }).to_string(),
    );
    let text = examples::source(&path, None, rows.encoding(TrainingStage::Cpt)).unwrap();
    assert_eq!(text.examples[0].text, "abc");
}

#[test]
fn null_of_a_merged_table_hides_nothing_in_a_message() {
    let table = |role: &str, from: &str, said: &str| json!({ "role": null, "from": from, "value": said, "content": null, "name": role });
    check(&[
        (
            json!({ "conversations": [table("a", "human", "Say hi."), table("b", "gpt", "Hi.")] }),
            hi(),
        ),
        (
            json!({ "prompt": [user("Boat?"), { "role": null, "from": "gpt", "value": "Gone.", "weight": null }, user("Say hi.")], "completion": "Hi." }),
            of_prompt(),
        ),
    ]);
}

#[test]
fn two_pairs_in_one_row_are_refused() {
    let rows = Rows::new();
    for (row, keys) in [
        (
            json!({ "prompt": "a", "completion": "b", "question": "c", "answer": "d" }),
            "`prompt` and `completion` and `question` and `answer`",
        ),
        (
            json!({ "prompt": "a", "completion": "b", "response": "c" }),
            "`prompt` and `completion` and `response`",
        ),
        (
            json!({ "instruction": "a", "input": "b", "output": "c", "response": "d" }),
            "`instruction` and `output` and `response`",
        ),
    ] {
        let said = rows.refusal(&row);
        assert!(said.contains(&format!("{keys} stand in one row")), "{said}");
    }
}

#[test]
fn known_key_is_no_misspelt_one_and_a_question_lacks_its_answer() {
    let rows = Rows::new();
    let row = json!({ "prompt": "Say hi.", "prompt_id": "7", "messages": hi() });
    assert_eq!(
        rows.of(&[row]).unwrap().notes.lines(),
        ["1 row has the keys `prompt`, `prompt_id`, which mean nothing here"]
    );
    for (row, words) in [
        (
            json!({ "question": "a", "context": "b" }),
            "`question` needs `answer` beside it",
        ),
        (
            json!({ "prompt": "a" }),
            "`prompt` needs `completion` or `response` beside it",
        ),
        (
            json!({ "output": "a" }),
            "`output` needs `instruction` or `input` beside it",
        ),
        (
            json!({ "question": "a", "anser": "b" }),
            "did you mean `answer` by `anser`?",
        ),
    ] {
        let said = rows.refusal(&row);
        assert!(said.contains(words), "{words}: {said}");
    }
}

#[test]
fn errors_of_messages_name_the_key_of_their_list() {
    let rows = Rows::new();
    for (row, words) in [
        (
            json!({ "conversations": [{ "from": "narrator", "value": "a" }] }),
            "`conversations`[0] is `from` `narrator`",
        ),
        (
            json!({ "dialog": [user("a"), { "role": "narrator", "content": "b" }] }),
            "dialog[1].role: must be system",
        ),
        (
            json!({ "prompt": [{ "role": "user", "content": 7 }], "completion": "b" }),
            "prompt[0].content: must be a text",
        ),
    ] {
        let said = rows.refusal(&row);
        assert!(said.contains(words), "{words}: {said}");
    }
}

#[test]
fn row_without_an_answer_to_learn_is_told() {
    let rows = Rows::new();
    let unlearned = json!({ "role": "assistant", "content": "Hi.", "weight": 0 });
    for (row, is_told) in [
        (json!({ "messages": [user("a"), unlearned] }), true),
        (json!({ "messages": [user("a"), assistant("")] }), true),
        (
            json!({ "messages": [user("a"), unlearned, user("b"), assistant("c")] }),
            false,
        ),
    ] {
        let lines = rows.of(std::slice::from_ref(&row)).unwrap().notes.lines();
        let told = lines
            .iter()
            .filter(|line| line.starts_with("1 row has no answer to learn"));
        assert_eq!(told.count(), usize::from(is_told), "{row}");
        assert_eq!(lines.len(), usize::from(is_told), "{row}");
    }
}

#[test]
fn unknown_keys_are_counted_once_each_and_spelt_right() {
    let rows = Rows::new();
    let row = json!({ "messages": [user("Say hi."), assistant("Hi.")], "mesages": [], "id": 7, "source": "x" });
    let plain = json!({ "messages": [user("Say hi."), { "role": "assistant", "content": "Hi.", "weigth": 0 }] });
    let notes = rows
        .of(&[row.clone(), plain, row.clone(), row])
        .unwrap()
        .notes;
    assert_eq!(
        notes.lines(),
        [
            "3 rows have the key `mesages`, which means nothing here; did you mean `messages`?",
            "1 row has the key `weigth` in a message, which means nothing here; did you mean `weight`?",
            "3 rows have the keys `id`, `source`, which mean nothing here",
        ]
    );
    let said = rows.refusal(&json!({ "mesages": [user("a")] }));
    assert!(
        said.contains("did you mean `messages` by `mesages`?"),
        "{said}"
    );
}

#[test]
fn files_of_every_kind_hold_the_same_rows() {
    let rows = Rows::new();
    let one = json!({ "messages": [user("Say hi."), assistant("Hi.")] });
    let two = json!({ "messages": [user("Boat?"), assistant("Gone.")] });
    let expected = encoded(rows.of(&[one.clone(), two.clone()]).unwrap());
    let lines = format!("{one}\n{two}\n");
    let array = format!(
        "{}\n",
        serde_json::to_string_pretty(&json!([one, two])).unwrap()
    );
    let pretty = format!(
        "{}\n{}",
        serde_json::to_string_pretty(&one).unwrap(),
        serde_json::to_string_pretty(&two).unwrap()
    );
    let files: Vec<(&str, Vec<u8>)> = vec![
        ("a/mark.jsonl", format!("\u{feff}{lines}").into_bytes()),
        (
            "a/joined.jsonl",
            format!("\u{feff}{one}\n\u{feff}{two}\n").into_bytes(),
        ),
        ("a/windows.jsonl", lines.replace('\n', "\r\n").into_bytes()),
        (
            "a/empty_lines.jsonl",
            format!("\n  \n{one}\n\n\t\n{two}").into_bytes(),
        ),
        ("a/array.json", array.clone().into_bytes()),
        (
            "a/marked_array.json",
            format!("\u{feff}\r\n{array}").into_bytes(),
        ),
        (
            "a/one_line.json",
            json!([one, two]).to_string().into_bytes(),
        ),
        ("a/lines.json", lines.clone().into_bytes()),
        ("a/array.jsonl", array.clone().into_bytes()),
        ("a/pretty.json", pretty.into_bytes()),
        ("a/lines.ndjson", lines.clone().into_bytes()),
        ("a/lines.jsonl.gz", gzip(lines.as_bytes())),
        ("a/array.json.gz", gzip(array.as_bytes())),
        (
            "a/marked.jsonl.gz",
            gzip(format!("\u{feff}{lines}").as_bytes()),
        ),
        ("a/packed_in_secret.jsonl", gzip(lines.as_bytes())),
        ("a/no_ending", lines.clone().into_bytes()),
    ];
    for (name, bytes) in &files {
        let path = rows.put(name, bytes);
        assert_eq!(encoded(rows.read(&path).unwrap()), expected, "{name}");
    }
    // A folder holds all of them but the one whose name says nothing, and passes over what lies beside rows.
    rows.put(
        "a/dataset_info.json",
        "{\"x\": {\"file_name\": \"array.json\"}}",
    );
    rows.put("a/._array.json", [0, 5, 22]);
    rows.put("a/README.md", "# Rows");
    let all = encoded(rows.read(&rows.folder.path().join("a")).unwrap());
    assert_eq!(all.len(), expected.len() * (files.len() - 1));
}

#[test]
fn language_is_the_name_of_the_file_whatever_its_ending() {
    let rows = Rows::new();
    let row = json!({ "messages": [user("Say hi."), assistant("Hi.")] }).to_string();
    let language = |name: &str, bytes: &[u8]| {
        let path = rows.put(name, bytes);
        rows.read(&path).unwrap().examples[0]
            .encoded
            .origin
            .language
            .clone()
    };
    let packed = gzip(row.as_bytes());
    let row = row.as_bytes();
    for name in ["en.jsonl", "en.json", "en.ndjson", "en-US.jsonl"] {
        assert_eq!(language(name, row).as_deref(), Some("en"), "{name}");
    }
    for name in ["chs.jsonl.gz", "zh.JSONL.GZ", "zh-Hans.json"] {
        let code = language(name, &packed);
        assert_eq!(code.as_deref(), Some("chs"), "{name}");
    }
    assert_eq!(language("ja.json", row).as_deref(), Some("jp"));
    assert_eq!(language("en_notes.jsonl", row), None);
    assert_eq!(language("rows.jsonl", row), None);
    assert_eq!(language("en.train.jsonl", row), None);
}

#[test]
fn first_ten_bad_rows_are_named_in_order_and_the_others_counted() {
    let rows = Rows::new();
    let good = json!({ "messages": [user("a"), assistant("b")] }).to_string();
    let lines: Vec<String> = (1..=60)
        .map(|line| match line % 4 {
            0 => "{\"conversations\":[]}".to_owned(),
            _ if line == 7 => "{\"messages\":".to_owned(),
            _ => good.clone(),
        })
        .collect();
    rows.put("b/1.jsonl", lines[..20].join("\n"));
    rows.put("b/2.jsonl", lines[20..].join("\n"));
    let folder = rows.folder.path().join("b");
    let said = |n_threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(n_threads)
            .build()
            .unwrap();
        pool.install(|| rows.read(&folder).unwrap_err().to_string())
    };
    let expected = said(1);
    let places: Vec<&str> = expected
        .lines()
        .skip(1)
        .filter_map(|line| line.rsplit_once(".jsonl:").map(|(_, rest)| rest))
        .map(|rest| rest.split(": ").next().unwrap())
        .collect();
    assert!(
        expected.starts_with("16 rows cannot be used:"),
        "{expected}"
    );
    assert_eq!(
        places,
        ["4", "7:12", "8", "12", "16", "20", "4", "8", "12", "16"],
        "{expected}"
    );
    assert!(expected.ends_with("and 6 more"), "{expected}");
    for n_threads in [2, 4, 7] {
        assert_eq!(said(n_threads), expected);
    }
}

#[test]
fn conversation_that_no_training_row_has_room_for_is_named_where_it_stands() {
    let rows = Rows::new();
    let wordy = "Where is the boat? ".repeat(40);
    let told = [
        hi(),
        json!([user(&wordy), assistant("Gone.")]),
        json!([user("Say hi."), assistant(&wordy)]),
        json!([system(&wordy), user("Say hi."), assistant("Hi.")]),
    ];
    let lines = told.map(|messages| json!({ "messages": messages }).to_string());
    let path = rows.put("rows.jsonl", lines.join("\n"));
    let read = |stage, row_tokens| {
        let encoding = Encoding {
            row_tokens,
            ..rows.encoding(stage)
        };
        examples::source(&path, None, encoding)
    };
    let said = read(TrainingStage::Sft, Some(100)).unwrap_err().to_string();
    assert!(said.starts_with("2 rows cannot be used:"), "{said}");
    for words in [
        "rows.jsonl:2: the system message and a question take",
        "rows.jsonl:4: the system message and a question take",
        "a row of 100 has no room for the answer",
    ] {
        assert!(said.contains(words), "{said}");
    }
    // Where rows are long enough, where nobody trains, and where nothing is asked.
    for (stage, row_tokens) in [
        (TrainingStage::Sft, Some(2000)),
        (TrainingStage::Sft, None),
        (TrainingStage::Cpt, Some(100)),
    ] {
        assert_eq!(read(stage, row_tokens).unwrap().examples.len(), 4);
    }
}

#[test]
fn key_that_stands_twice_in_a_row_is_refused_with_file_and_line() {
    let rows = Rows::new();
    let good = hi().to_string();
    for twice in [
        r#"{"messages":[],"messages":[{"role":"user","content":"a"}]}"#,
        r#"{"messages":[{"role":"user","content":"a","content":"b"}]}"#,
    ] {
        let path = rows.put("twice.jsonl", format!("{good}\n{twice}\n"));
        let error = rows.read(&path).unwrap_err().to_string();
        assert!(error.contains("twice.jsonl:2:"), "{error}");
        assert!(error.contains("stands twice in one object"), "{error}");
    }
}

#[test]
fn rows_that_unpack_or_go_on_without_end_are_refused_with_the_limit() {
    let rows = Rows::new();
    let path = rows.put("bomb.jsonl.gz", gzip(&vec![b'\n'; 65 << 20]));
    let error = rows.read(&path).unwrap_err().to_string();
    assert!(error.contains("unpacks to more than 64 MiB"), "{error}");
    let long = format!("{}\n\"{}\"", hi(), "a".repeat(64 << 20));
    let path = rows.put("long.jsonl", long);
    let error = rows.read(&path).unwrap_err().to_string();
    assert!(
        error.contains("long.jsonl:2: a line holds more than 64 MiB"),
        "{error}"
    );
}

#[cfg(unix)]
#[test]
fn rows_come_from_a_pipe_and_not_from_a_device() {
    let rows = Rows::new();
    let error = rows.read(Path::new("/dev/zero")).unwrap_err().to_string();
    assert!(error.contains("it is a device"), "{error}");
    let pipe = rows.folder.path().join("pipe");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    assert!(made.unwrap().success());
    let writer = {
        let pipe = pipe.clone();
        std::thread::spawn(move || std::fs::write(pipe, hi().to_string()).unwrap())
    };
    assert_eq!(rows.read(&pipe).unwrap().examples.len(), 1);
    writer.join().unwrap();
}

#[test]
fn bad_row_of_an_array_is_named_by_the_line_it_begins_on() {
    let rows = Rows::new();
    let path = rows.put("a.json", "[\n{\"text\": 1},\n\n{\n\"messages\": []}]");
    let said = rows.read(&path).unwrap_err().to_string();
    assert!(said.contains("a.json:2: `text` must be a text"), "{said}");
    assert!(
        said.contains("a.json:4: `messages` holds no message"),
        "{said}"
    );
    let path = rows.put("b.json", "[\n{\"messages\": [}]\n");
    let said = rows.read(&path).unwrap_err().to_string();
    assert!(said.contains("b.json:2:15: "), "{said}");
}

#[test]
fn bad_rows_of_one_line_are_told_apart_by_their_numbers() {
    let rows = Rows::new();
    let path = rows.put("a.json", "[{\"a\":1},{\"a\":1},{\"a\":1}]");
    let said = rows.read(&path).unwrap_err().to_string();
    assert!(said.starts_with("3 rows cannot be used:"), "{said}");
    assert!(said.contains("a.json:1: row 2: it has `a`"), "{said}");
    // A row may say where it is from, which makes the list no conversation.
    let good = json!({ "from": "wiki", "messages": hi() });
    let bad = json!({ "from": "wiki", "text": "a" });
    let path = rows.put("b.json", json!([good, bad]).to_string());
    let said = rows.read(&path).unwrap_err().to_string();
    assert!(said.contains("b.json:1: row 2: a row of `text`"), "{said}");
    assert!(!said.contains('\n'), "{said}");
}

#[test]
fn other_forms_are_named_with_what_makes_rows_of_them() {
    let rows = Rows::new();
    for (name, content, words) in [
        (
            "a.csv",
            "a,b\n1,2\n",
            &["a.csv", "a table", "cyrene corpus import"][..],
        ),
        (
            "a.parquet",
            "PAR1",
            &["a.parquet", "Parquet", "read_parquet(r'", "to_json"],
        ),
        (
            "a.txt",
            "Bo: Hi.\n",
            &["a.txt", "plain text", "cyrene corpus import"],
        ),
        (
            "a.rpy",
            "label start:\n",
            &["a.rpy", "Ren'Py", "cyrene corpus import"],
        ),
        ("a.zip", "PK", &["a.zip", "unpack"]),
        (
            "log.jsonl",
            "{\"user_name\":\"A\",\"character_name\":\"B\"}\n{\"name\":\"A\",\"is_user\":true,\"mes\":\"Hi.\"}\n",
            &["log.jsonl", "chat log", "cyrene corpus import"],
        ),
        (
            "card.json",
            "{\"spec\":\"chara_card_v2\",\"spec_version\":\"2.0\",\"data\":{\"name\":\"Bo\"}}",
            &["card.json", "character card", "cyrene corpus import"],
        ),
        (
            "story.jsonl",
            "{\"campaign\":\"c\",\"scene\":\"s\",\"lines\":[]}\n",
            &["story.jsonl", "a story", "cyrene corpus build"],
        ),
        (
            "export.json",
            "[{\"title\":\"t\",\"mapping\":{}},{\"title\":\"u\",\"mapping\":{}}]",
            &["export.json", "ChatGPT", "`messages`"],
        ),
    ] {
        let path = rows.put(name, content);
        let said = rows.read(&path).unwrap_err();
        assert!(said.is_of_rows(), "{said}");
        for word in words {
            assert!(
                said.to_string().contains(word),
                "{name} lacks {word}: {said}"
            );
        }
    }
    rows.put("only_tables/a.csv", "a,b");
    let said = rows
        .read(&rows.folder.path().join("only_tables"))
        .unwrap_err()
        .to_string();
    assert!(said.contains("a.csv is a table"), "{said}");
    std::fs::create_dir(rows.folder.path().join("empty")).unwrap();
    let said = rows
        .read(&rows.folder.path().join("empty"))
        .unwrap_err()
        .to_string();
    assert!(said.contains("holds no file of rows"), "{said}");
    let said = rows
        .read(Path::new("nowhere.jsonl"))
        .unwrap_err()
        .to_string();
    assert!(said.contains("nowhere.jsonl does not exist"), "{said}");
}

#[test]
fn text_that_is_not_utf8_is_named_with_its_place() {
    let rows = Rows::new();
    let path = rows.put("a.jsonl", b"{\"text\":\"a\"}\n{\"text\":\"\xe9\"}\n");
    let said = rows.read(&path).unwrap_err().to_string();
    assert!(said.contains("a.jsonl:2:10"), "{said}");
    let path = rows.put("b.jsonl", b"\xff\xfe{\x00");
    let said = rows.read(&path).unwrap_err().to_string();
    assert!(said.contains("UTF-16"), "{said}");
    let mut packed = gzip(b"{\"text\":\"a\"}\n");
    packed.truncate(packed.len() - 6);
    let path = rows.put("c.jsonl.gz", packed);
    let said = rows.read(&path).unwrap_err().to_string();
    assert!(said.contains("gzip"), "{said}");
}

const PACKED: [u32; 8] = [10, 20, 30, 40, 50, 60, 70, 80];
const LABELS: [i32; 8] = [IGNORE, 20, 30, 40, IGNORE, 60, 70, 80];

fn packed(more: Value) -> Value {
    let mut row = json!({ "input_ids": PACKED, "labels": LABELS });
    row.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    row
}

fn part(range: std::ops::Range<usize>) -> Example {
    Example::document(PACKED[range.clone()].to_vec(), LABELS[range].to_vec())
}

#[test]
fn packed_rows_are_parted_at_their_borders() {
    let rows = Rows::new();
    for more in [
        json!({ "position_ids": [0, 1, 2, 3, 0, 1, 2, 3] }),
        json!({ "position_ids": [0, 1, 2, 3, 0, 1, 2, 3], "attention_mask": [1, 1, 1, 1, 1, 1, 1, 1] }),
        json!({ "seq_idx": [0, 0, 0, 0, 1, 1, 1, 1] }),
        json!({ "seq_idx": [4, 4, 4, 4, 2, 2, 2, 2], "position_ids": [0, 1, 2, 3, 0, 1, 2, 3] }),
        json!({ "cu_seqlens": [0, 4, 8] }),
        json!({ "cu_seq_lens": [0, 4, 8] }),
        json!({ "cu_seq_lens_q": [0, 4, 8], "cu_seq_lens_k": [0, 4, 8], "max_length_q": 4, "max_length_k": 4 }),
        json!({ "seq_lengths": [4, 4] }),
        json!({ "attention_mask": [1, 1, 1, 1, 2, 2, 2, 2] }),
    ] {
        let read = rows.of(&[packed(more.clone())]).unwrap();
        assert!(read.notes.lines().is_empty(), "{more}");
        assert_eq!(encoded(read), [part(0..4), part(4..8)], "{more}");
    }
}

#[test]
fn row_of_one_document_stays_whole() {
    let rows = Rows::new();
    for more in [
        json!({}),
        json!({ "position_ids": [0, 1, 2, 3, 4, 5, 6, 7], "attention_mask": [1, 1, 1, 1, 1, 1, 1, 1] }),
        json!({ "attention_mask": [true, true, true, true, true, true, true, true], "length": 8 }),
        json!({ "cu_seqlens": [0, 8], "seq_idx": [0, 0, 0, 0, 0, 0, 0, 0] }),
    ] {
        assert_eq!(rows.ids(&packed(more.clone())), [part(0..8)], "{more}");
    }
}

#[test]
fn padding_is_taken_off_both_ends() {
    let rows = Rows::new();
    let row = |ids: Value, labels: Value, mask: Value, positions: Value| json!({ "input_ids": ids, "labels": labels, "attention_mask": mask, "position_ids": positions });
    let whole = Example::document(vec![10, 20, 30], vec![IGNORE, 20, 30]);
    let right = row(
        json!([10, 20, 30, 0, 0]),
        json!([-100, 20, 30, -100, -100]),
        json!([1, 1, 1, 0, 0]),
        json!([0, 1, 2, 3, 4]),
    );
    let left = row(
        json!([0, 0, 10, 20, 30]),
        json!([-100, -100, -100, 20, 30]),
        json!([0, 0, 1, 1, 1]),
        json!([1, 1, 0, 1, 2]),
    );
    for row in [right, left] {
        assert_eq!(rows.ids(&row), std::slice::from_ref(&whole), "{row}");
    }
    let blocks = json!({ "input_ids": [10, 20, 50, 60, 0], "labels": [-100, 20, -100, 60, -100], "attention_mask": [1, 1, 2, 2, 0] });
    let lengths: Vec<usize> = rows
        .ids(&blocks)
        .iter()
        .map(|part| part.input_ids.len())
        .collect();
    assert_eq!(lengths, [2, 2]);
}

#[test]
fn rows_whose_borders_make_no_sense_are_refused_by_name() {
    let rows = Rows::new();
    for (more, words) in [
        (
            json!({ "position_ids": [0, 1, 2, 3, 7, 8, 9, 10] }),
            "`position_ids`",
        ),
        (
            json!({ "position_ids": [[0, 1], [0, 1]] }),
            "`position_ids`",
        ),
        (json!({ "position_ids": [0, 1, 2] }), "`position_ids`"),
        (
            json!({ "position_ids": [5, 6, 7, 8, 9, 10, 11, 12] }),
            "`position_ids`",
        ),
        (json!({ "seq_idx": [0, 0, 1, 1, 0, 0, 1, 1] }), "`seq_idx`"),
        (json!({ "cu_seqlens": [0, 4] }), "`cu_seqlens`"),
        (json!({ "cu_seqlens": [0, 5, 4, 8] }), "`cu_seqlens`"),
        (json!({ "cu_seqlens": [4, 8] }), "`cu_seqlens`"),
        (json!({ "seq_lengths": [4, 5] }), "`seq_lengths`"),
        (
            json!({ "seq_lengths": [i64::MAX, i64::MAX] }),
            "`seq_lengths`",
        ),
        (
            json!({ "attention_mask": [1, 1, 0, 1, 1, 1, 1, 1] }),
            "`attention_mask`",
        ),
        (
            json!({ "attention_mask": [1, 2, 1, 2, 1, 2, 1, 2] }),
            "`attention_mask`",
        ),
        (
            json!({ "attention_mask": [1, 1, 1, 1, 1, 1, 1, 0] }),
            "padding has labels of -100",
        ),
        (
            json!({ "attention_mask": [[1, 0], [1, 1]] }),
            "`attention_mask`",
        ),
        (
            json!({ "position_ids": [0, 1, 2, 3, 0, 1, 2, 3], "cu_seqlens": [0, 3, 8] }),
            "different places",
        ),
        (
            json!({ "loss_mask": [1, 1, 1, 1, 1, 1, 1, 1] }),
            "`loss_mask`",
        ),
        (
            json!({ "assistant_masks": [1, 1, 1, 1, 1, 1, 1, 1] }),
            "`assistant_masks`",
        ),
        (
            json!({ "messages": [user("a"), assistant("b")] }),
            "`input_ids` and `messages`",
        ),
    ] {
        let said = rows.refusal(&packed(more));
        assert!(said.contains(words), "{words}: {said}");
    }
}

#[test]
fn ids_are_trained_from_the_second_on_and_a_text_beside_them_is_told() {
    let rows = Rows::new();
    let row = json!({ "input_ids": [10, 20, 30], "labels": [10, 20, 30], "text": "abc" });
    let expected = Example::document(vec![10, 20, 30], vec![IGNORE, 20, 30]);
    for stage in [TrainingStage::Cpt, TrainingStage::Sft] {
        let path = rows.put("i.jsonl", row.to_string());
        let read = examples::source(&path, None, rows.encoding(stage)).unwrap();
        assert_eq!(
            read.notes.lines(),
            ["1 row has a `text` beside `input_ids`, which are what is trained"]
        );
        assert_eq!(encoded(read), std::slice::from_ref(&expected));
    }
}

#[test]
fn rows_of_no_tokens_are_refused_by_name() {
    let rows = Rows::new();
    for (row, words) in [
        (
            json!({ "input_ids": [], "labels": [] }),
            "`input_ids` holds no token",
        ),
        (
            json!({ "input_ids": [1, 2], "labels": [-100, -100], "attention_mask": [0, 0] }),
            "`attention_mask` is 0 everywhere",
        ),
    ] {
        let said = rows.refusal(&row);
        assert!(said.contains(words), "{words}: {said}");
    }
}

#[test]
fn labels_are_minus_100_or_an_id_of_the_model() {
    let rows = Rows::new();
    let n_ids = rows.tokenizer.vocab_size();
    let with = |label: Value| json!({ "input_ids": [10, 20, 30, 40, 50], "labels": [-100, 20, 30, label, 50] });
    assert_eq!(rows.ids(&with(json!(-100)))[0].n_trained(), 3);
    assert_eq!(rows.ids(&with(json!(n_ids - 1)))[0].n_trained(), 4);
    for label in [
        json!(-1),
        json!(-101),
        json!(n_ids),
        json!(99_999),
        json!(i64::MAX),
        json!(4_294_967_196_u64),
    ] {
        let said = rows.refusal(&with(label.clone()));
        assert!(
            said.contains("rows.jsonl:1: the label at position 3"),
            "{label}: {said}"
        );
    }
    for (row, words) in [
        (
            json!({ "input_ids": [1, n_ids], "labels": [-100, -100] }),
            "the model's vocabulary has",
        ),
        (
            json!({ "input_ids": [1, -1], "labels": [-100, -100] }),
            "no token id",
        ),
        (
            json!({ "input_ids": [1, 2], "labels": [-100] }),
            "2 input_ids but 1 labels",
        ),
        (json!({ "input_ids": [1, 2] }), "without `labels`"),
        (
            json!({ "input_ids": [1, 2], "labels": "none" }),
            "`labels` must be a list",
        ),
        (
            json!({ "input_ids": [1.5], "labels": [1] }),
            "`input_ids` must be a list of whole numbers",
        ),
        (
            json!({ "input_ids": [[1, 2]], "labels": [[1, 2]] }),
            "a list: one row",
        ),
    ] {
        let said = rows.refusal(&row);
        assert!(said.contains(words), "{words}: {said}");
    }
}

#[test]
fn late_bad_label_is_found_before_anything_is_trained() {
    let rows = Rows::new();
    let mut lines: Vec<Value> = (0..9)
        .map(|n| json!({ "input_ids": [10, 20, 50 + n], "labels": [-100, 20, 50 + n] }))
        .collect();
    lines.push(json!({ "input_ids": [10, 20, 59], "labels": [-100, 99_999, 59] }));
    let said = rows.of(&lines).unwrap_err().to_string();
    assert!(
        said.contains("rows.jsonl:10: the label at position 1 is 99999"),
        "{said}"
    );
}

#[test]
fn rows_that_are_no_conversation_say_what_they_are() {
    let rows = Rows::new();
    for (row, words) in [
        (json!({}), "there is nothing in it"),
        (json!(7), "not a number"),
        (json!({ "foo": 1, "bar": 2 }), "it has `foo`, `bar`"),
        (
            json!({ "data": [{ "messages": [] }] }),
            "it holds one list, `data`",
        ),
        (json!({ "messages": "hi" }), "`messages` must be a list"),
        (json!({ "messages": ["hi", "yo"] }), "must say who speaks"),
        (json!({ "dialog": ["hi", "yo"] }), "must say who speaks"),
        (
            json!({ "messages": [{ "content": "hi" }] }),
            "must say who speaks",
        ),
        (
            json!({ "messages": [{ "role": "narrator", "content": "hi" }] }),
            "narrator",
        ),
        (json!({ "messages": [user("a")] }), "answer"),
        (
            json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url", "image_url": {} }] }, assistant("b")] }),
            "image_url",
        ),
        (
            json!({ "prompt": 7, "completion": "a" }),
            "`prompt` must be a text",
        ),
        (
            json!({ "instruction": "a", "output": "b", "history": "c" }),
            "`history` must be",
        ),
        (json!({ "text": "a" }), "sft"),
        (json!({ "text": ["a"], "system": "b" }), "`system`"),
    ] {
        let said = rows.refusal(&row);
        assert!(said.contains(words), "{row} lacks {words}: {said}");
    }
}

#[test]
fn pre_training_takes_texts_and_what_is_said_in_conversations() {
    let rows = Rows::new();
    let read = |row: Value| {
        let path = rows.put("p.jsonl", row.to_string());
        examples::source(&path, None, rows.encoding(TrainingStage::Cpt))
    };
    let text = encoded(read(json!({ "text": "Say hi.\nHi." })).unwrap());
    let said = encoded(read(json!({ "messages": [user("Say hi."), assistant("Hi.")] })).unwrap());
    assert_eq!(text, said);
    let both = read(json!({ "text": "a", "messages": [user("Say hi."), assistant("Hi.")] }));
    assert!(
        both.unwrap_err()
            .to_string()
            .contains("`messages` and `text`")
    );
}

#[test]
fn control_tokens_in_rows_are_text_and_told_with_their_counts() {
    let rows = Rows::new();
    let added = |example: &Example| -> Vec<u32> {
        let ids = example.input_ids.iter().copied();
        ids.filter(|id| rows.tokenizer.is_added(*id)).collect()
    };
    let conversation = |said: &str| {
        let messages = json!([
            system(said),
            user(said),
            assistant(said),
            user("b"),
            assistant(said)
        ]);
        json!({ "messages": messages })
    };
    let line = |token: &str, times: &str| {
        format!(
            "the contents spell control tokens: `{token}` {times}; there they are text and no tokens (docs/conversation.md)"
        )
    };
    let honest = rows.ids(&conversation("hi"));
    for (token, _) in ADDED_TOKENS {
        let said = format!("a {token} b");
        let read = rows
            .of(&[conversation(&said), conversation(&said)])
            .unwrap();
        assert_eq!(read.notes.lines(), [line(token, "8 times")]);
        for example in encoded(read) {
            assert_eq!(added(&example), added(&honest[0]), "{said}");
            assert!(example.n_trained() > honest[0].n_trained(), "{said}");
        }
        for document in [
            json!({ "text": said }),
            json!({ "messages": [user("b"), assistant(&said)] }),
        ] {
            let path = rows.put("p.jsonl", document.to_string());
            let read = examples::source(&path, None, rows.encoding(TrainingStage::Cpt)).unwrap();
            assert_eq!(read.notes.lines(), [line(token, "once")]);
            let eos = rows.tokenizer.eos();
            assert_eq!(added(&encoded(read)[0]), [eos], "{document}");
        }
    }
    // The marks of thoughts are the rules' own, and ids are what they are.
    let ids = rows.tokenizer.encode("a<|im_end|>").unwrap();
    let quiet = [
        json!({ "messages": [user("b"), assistant("<think>hm</think>a")] }),
        json!({ "input_ids": ids, "labels": ids }),
    ];
    assert!(rows.of(&quiet).unwrap().notes.lines().is_empty());
}

#[test]
fn pre_training_refuses_what_a_document_cannot_heed() {
    let rows = Rows::new();
    let read = |answer: Value| {
        let row = json!({ "messages": [user("Say hi."), answer] });
        let path = rows.put("p.jsonl", row.to_string());
        examples::source(&path, None, rows.encoding(TrainingStage::Cpt))
    };
    let answer = |key: &str, value: Value| {
        let mut answer = assistant("Hi.");
        answer[key] = value;
        answer
    };
    for (key, value) in [
        ("weight", json!(0)),
        ("loss", json!(false)),
        ("train", json!(false)),
        ("reasoning_content", json!("hm")),
    ] {
        let said = read(answer(key, value)).unwrap_err().to_string();
        assert!(
            said.contains(&format!("`messages`[1] has `{key}`")),
            "{said}"
        );
    }
    for (key, value) in [
        ("weight", json!(1)),
        ("loss", json!(null)),
        ("reasoning_content", json!("")),
    ] {
        assert!(read(answer(key, value)).is_ok(), "{key}");
    }
    // A prompt is read, not trained, where answers are; a document is all of it.
    let row = json!({ "prompt": two(), "completion": "Bo." });
    let path = rows.put("p.jsonl", row.to_string());
    let read = examples::source(&path, None, rows.encoding(TrainingStage::Cpt)).unwrap();
    assert_eq!(read.examples[0].messages.len(), 5);
}
