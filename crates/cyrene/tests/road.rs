//! One road from messages to ids: what is trained is what is asked for, in every folder that is written.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::path::{Path, PathBuf};

use kernel::DType;
use model::{Config, Model};
use serde_json::{Value, json};
use text::labels::{LossScale, sft};
use text::{
    ChatEncoder, ChatTemplate, Conversation, Message, PromptOptions, RenderOptions, Tokenizer,
};

use common::{cyrene, stderr, succeeds};

/// As released templates do it: think blocks in the last answer only, and thinking on or off by default.
const RELEASED: &str = "{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n<think>\\n' }}
{%- if DEFAULT %}{{- '\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}";
const THINKING_OFF: &str = "not (enable_thinking is defined and enable_thinking is true)";
const THINKING_ON: &str = "enable_thinking is defined and enable_thinking is false";

const TALK: [&str; 4] = [
    "Where is the boat?",
    "Gone with the tide.",
    "Who took it?",
    "The girl from the mill. She rowed alone.",
];

fn released(default: &str) -> ChatTemplate {
    ChatTemplate::from_source(&RELEASED.replace("DEFAULT", default)).unwrap()
}

/// A folder as a base is released: weights, tokenizer, and a template in two files, or none.
fn base(dir: &Path, name: &str, template: Option<&ChatTemplate>) -> PathBuf {
    let folder = dir.join(name);
    let tokenizer = Tokenizer::train(TALK.into_iter(), 330).unwrap();
    let config = json!({
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "attention_bias": false,
        "attn_output_gate": true,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.3,
        "intermediate_size": 48,
        "layer_types": ["linear_attention"],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 32,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 1,
        "linear_value_head_dim": 32,
        "max_position_embeddings": 4096,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 10000, "rope_type": "default"},
        "tie_word_embeddings": true,
        "vocab_size": tokenizer.vocab_size() + 3,
    });
    let model = Model::init(Config::from_json(&config).unwrap(), 5, DType::F32);
    model.save(&folder, None).unwrap();
    let own = ChatTemplate::history_stable().unwrap();
    tokenizer.save(&folder, template.unwrap_or(&own)).unwrap();
    if template.is_none() {
        std::fs::remove_file(folder.join("chat_template.jinja")).unwrap();
        let path = folder.join("tokenizer_config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        config.as_object_mut().unwrap().remove("chat_template");
        std::fs::write(path, config.to_string()).unwrap();
    }
    folder
}

fn row(messages: &[(&str, &str)]) -> String {
    let messages: Vec<Value> = messages
        .iter()
        .map(|(role, content)| json!({"role": role, "content": content}))
        .collect();
    json!({ "messages": messages }).to_string() + "\n"
}

/// Trains one step on `rows`; gives the run's folder and what was said.
fn train(dir: &Path, rows: &str, row_tokens: usize, tuner: &str) -> (PathBuf, String, Value) {
    std::fs::write(dir.join("rows.jsonl"), rows).unwrap();
    let recipe = dir.join("r.toml");
    let text = format!(
        "stage = \"sft\"\nbase = \"base\"\n[data]\nrow_tokens = {row_tokens}\nvalidation_share = 0.0\nsources = [{{ path = \"rows.jsonl\" }}]\n\
         [tuner]\n{tuner}\n[batch]\nrows = 8\naccumulate = 1\n[run]\nsteps = 1\nvalidate_every = 0\n"
    );
    std::fs::write(&recipe, text).unwrap();
    let out = dir.join("run");
    let args = [
        "train",
        recipe.to_str().unwrap(),
        "--out",
        out.to_str().unwrap(),
        "--device",
        "cpu",
        "--json",
    ];
    let output = cyrene(&args);
    assert!(output.status.success(), "{}", stderr(&output));
    let json = serde_json::from_slice(&output.stdout).unwrap();
    (out, stderr(&output), json)
}

/// The folder's template, as others read it: in both places, and for raw messages with every `enable_thinking` the ids of training.
fn check_carries_the_template_of_training(folder: &Path) {
    let own = ChatTemplate::history_stable().unwrap();
    let file = std::fs::read_to_string(folder.join("chat_template.jinja")).unwrap();
    assert_eq!(file, own.source(), "{}", folder.display());
    let config = std::fs::read(folder.join("tokenizer_config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    assert_eq!(config["chat_template"], own.source());

    let tokenizer = Tokenizer::load(folder).unwrap();
    let said: Vec<Message> = TALK
        .iter()
        .enumerate()
        .map(|(i, text)| match i % 2 {
            0 => Message::user(*text),
            _ => Message::assistant(*text),
        })
        .collect();
    let trained = sft(
        &tokenizer,
        &Conversation::new(said.clone()),
        LossScale::default(),
    )
    .unwrap();
    let encoder = ChatEncoder::load(folder, None).unwrap();
    for n in [1, 3] {
        let before = Conversation::new(said[..n].to_vec());
        let prompt = encoder.prompt(&before, PromptOptions::default()).unwrap();
        assert!(trained.input_ids.starts_with(&prompt));
        let raw = serde_json::to_value(&said[..n]).unwrap();
        for enable_thinking in [None, Some(true), Some(false)] {
            let options = RenderOptions {
                add_generation_prompt: true,
                enable_thinking,
                ..RenderOptions::default()
            };
            let text = ChatTemplate::load(folder)
                .unwrap()
                .render_json(&raw, &options);
            assert_eq!(tokenizer.encode(&text.unwrap()).unwrap(), prompt);
        }
    }
}

#[test]
fn folders_that_training_merge_and_export_write_carry_the_template_of_training() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    base(dir.path(), "base", Some(&released(THINKING_ON)));
    let rows = row(&[
        ("user", TALK[0]),
        ("assistant", TALK[1]),
        ("user", TALK[2]),
        ("assistant", TALK[3]),
    ]);
    let (run, ..) = train(dir.path(), &rows, 128, "kind = \"lora\"\nrank = 2");
    check_carries_the_template_of_training(&run.join("adapter"));
    succeeds(&[
        "merge",
        "--base",
        &path("base"),
        "--adapter",
        &path("run/adapter"),
        "--out",
        &path("merged"),
    ]);
    check_carries_the_template_of_training(&dir.path().join("merged"));
    for format in ["hf", "fp8-block"] {
        let out = path(format);
        succeeds(&[
            "export",
            "--model",
            &path("merged"),
            "--format",
            format,
            "--out",
            &out,
        ]);
        check_carries_the_template_of_training(Path::new(&out));
    }
    // On its base, too, an adapter is asked as it was trained; the base alone as it was released.
    let adapter = run.join("adapter");
    let base = dir.path().join("base");
    let on_top = ChatEncoder::load(&base, Some(&adapter)).unwrap();
    let own = ChatTemplate::history_stable().unwrap();
    assert_eq!(on_top.template().source(), own.source());
    let alone = ChatEncoder::load(&base, None).unwrap();
    assert_ne!(alone.template().source(), own.source());
    std::fs::remove_dir_all(&run).unwrap();
    let (run, ..) = train(dir.path(), &rows, 128, "kind = \"full\"");
    check_carries_the_template_of_training(&run.join("model"));
}

#[test]
fn bases_that_differ_in_their_thinking_default_answer_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let messages = dir.path().join("messages.json");
    std::fs::write(
        &messages,
        "[{\"role\":\"user\",\"content\":\"Who took it?\"}]",
    )
    .unwrap();
    let answers = [
        ("off", Some(released(THINKING_OFF))),
        ("on", Some(released(THINKING_ON))),
        ("none", None),
    ]
    .map(|(name, template)| {
        let folder = base(dir.path(), name, template.as_ref());
        let text = succeeds(&[
            "generate",
            "--model",
            folder.to_str().unwrap(),
            "--messages",
            messages.to_str().unwrap(),
            "--greedy",
            "--max-tokens",
            "8",
            "--json",
        ]);
        let answer: Value = serde_json::from_str(&text).unwrap();
        let ids: Vec<u32> = serde_json::from_value(answer["ids"].clone()).unwrap();
        let mask = Tokenizer::load(&folder).unwrap().sampling_mask(false);
        assert!(
            ids.iter()
                .all(|id| !mask.banned.contains(id) && *id < mask.vocab_limit)
        );
        ids
    });
    assert_eq!(answers[0], answers[1]);
    assert_eq!(answers[0], answers[2]);
}

#[test]
fn conversations_longer_than_a_row_are_cut_between_rounds_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    base(dir.path(), "base", None);
    let long = [
        ("system", "You are Bo."),
        ("user", TALK[0]),
        ("assistant", TALK[1]),
        ("user", TALK[2]),
        ("assistant", TALK[3]),
        ("user", TALK[0]),
        ("assistant", TALK[1]),
    ];
    let rows = row(&long) + &row(&long[..3]) + &row(&long);
    let tokenizer = Tokenizer::load(&dir.path().join("base")).unwrap();
    let encode = |messages: &[(&str, &str)]| {
        let messages = messages.iter().map(|(role, content)| {
            let value = json!({"role": role, "content": content});
            Message::from_json(0, &value).unwrap()
        });
        sft(
            &tokenizer,
            &Conversation::new(messages),
            LossScale::default(),
        )
        .unwrap()
    };
    // A row that holds the longest round alone and no two of them.
    let system = encode(&long[..3]).rounds[0].start;
    let row_tokens = [&long[1..3], &long[3..5]]
        .map(|round| system + encode(round).input_ids.len())
        .into_iter()
        .max()
        .unwrap();
    let (_, said, json) = train(dir.path(), &rows, row_tokens, "kind = \"lora\"\nrank = 2");
    let expect = format!(
        "2 conversations are longer than a row of {row_tokens} tokens and were cut between rounds into 6 pieces"
    );
    assert!(said.contains(&expect), "{said}");
    let account = &json["account"];
    assert_eq!(account["conversations_split"], 2);
    assert_eq!(account["conversation_pieces"], 6);
    assert_eq!(account["documents_split"], 0);
    assert_eq!(account["labels"], account["trained_labels_per_epoch"]);
    let whole = encode(&long);
    let tokens = 2 * (whole.input_ids.len() + 2 * system) + encode(&long[..3]).input_ids.len();
    assert_eq!(account["tokens_per_epoch"], tokens);

    let scene = "The sea. ".repeat(60);
    let rows = row(&[("system", scene.as_str()), long[1], long[2]]);
    std::fs::write(dir.path().join("rows.jsonl"), rows).unwrap();
    let recipe = dir.path().join("r.toml");
    common::fails(
        &[
            "train",
            recipe.to_str().unwrap(),
            "--out",
            dir.path().join("other").to_str().unwrap(),
        ],
        2,
        &[
            "rows.jsonl:1: the system message and a question take",
            "has no room for the answer",
            "rows of more tokens",
        ],
    );
}
