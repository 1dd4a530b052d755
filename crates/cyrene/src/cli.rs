//! The command line: what was typed, not yet what it means.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use model::sizes;

#[derive(Debug, Parser)]
#[command(name = "cyrene", version, about = "From a game's story to a character that speaks.", long_version = LONG_VERSION)]
pub struct Cli {
    /// Print one JSON document (or JSON lines) on stdout
    #[arg(long, global = true)]
    pub json: bool,
    /// Show the libraries' debug logs on stderr
    #[arg(long, short, global = true)]
    pub verbose: bool,
    #[command(subcommand)]
    pub command: Command,
}

const LONG_VERSION: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    "\ncode: MIT OR Apache-2.0\nbase model: none shipped; its publisher's licence applies\ncharacter and story: none shipped; they belong to their owners"
);

#[derive(Debug, Subcommand)]
pub enum Command {
    /// The whole chain: from a story to a server with a character to talk to
    Live(Live),
    /// What is there, what is missing, and what a recipe will need
    Doctor(Doctor),
    /// Get a base model from the Hub: resumable, hash checked
    Fetch(Fetch),
    /// Data sets from a story
    #[command(subcommand)]
    Corpus(Corpus),
    /// Train a model as a recipe says: on a story's text (cpt) or on conversations (sft), all weights or LoRA
    Train(Train),
    /// How likely a model finds given token ids
    Score(Score),
    /// Text from a model
    Generate(Generate),
    /// Report on a model: how well it knows text that it was trained on and text that was kept from it, and what it answers
    Eval(Eval),
    /// Put a LoRA adapter into its base's weights
    Merge(Merge),
    /// Write weights as vLLM and transformers load them
    Export(Export),
    /// OpenAI-compatible API and the chat page
    Serve(Serve),
    /// Talk in the terminal
    Chat(Chat),
    /// Print a recipe with every key explained
    Recipe(Recipe),
    /// Speed of this machine, with random weights of the real shapes
    #[command(subcommand)]
    Bench(Bench),
    /// Check the arithmetic of your own GPU against the CPU
    Selftest(Selftest),
}

#[derive(Debug, Args)]
pub struct Live {
    /// The bundled story and a tiny model, offline, in minutes
    #[arg(long, conflicts_with_all = ["story", "character", "base"])]
    pub demo: bool,
    /// A story file or folder (docs/story-format.md)
    #[arg(long, required_unless_present = "demo")]
    pub story: Option<PathBuf>,
    /// Who shall speak: a file as in characters/
    #[arg(long, required_unless_present = "demo")]
    pub character: Option<PathBuf>,
    /// tiny or small (2 and 100 million parameters, from a seed), 0.8b, 2b, 4b or 9b
    #[arg(long, default_value = "tiny", value_parser = sizes::parse)]
    pub size: String,
    /// Weights from a seed and a vocabulary learned from the story, whatever the size: tries the road without a download
    #[arg(long, conflicts_with = "base")]
    pub from_seed: bool,
    /// A base model instead of the size's own: a folder or a Hub id
    #[arg(long)]
    pub base: Option<String>,
    /// Name of the run; default is the character's
    #[arg(long)]
    pub name: Option<String>,
    /// Where runs live
    #[arg(long, default_value = "runs")]
    pub runs: PathBuf,
    /// Last stage to run; `doctor` plans and fetches nothing
    #[arg(long, value_enum, default_value = "serve")]
    pub until: StageName,
    /// Stop after the last stage before the server
    #[arg(long)]
    pub no_serve: bool,
    /// Change a recipe key for this run, e.g. cpt.optimizer.lr=1e-3
    #[arg(long = "set", value_name = "STAGE.KEY=VALUE")]
    pub set: Vec<String>,
    #[command(flatten)]
    pub address: Address,
    #[command(flatten)]
    pub access: Access,
    #[command(flatten)]
    pub device: Device,
    #[command(flatten)]
    pub memory: Memory,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum StageName {
    Doctor,
    Fetch,
    Corpus,
    Cpt,
    Sft,
    Eval,
    Export,
    Serve,
}

#[derive(Debug, Subcommand)]
pub enum Bench {
    /// Training steps: tokens a second, milliseconds, peak memory
    Train(BenchTrain),
    /// Each primitive of a training step by itself, against the time that its bytes and operations need at the least
    Ops(BenchOps),
    /// Speaking: tokens a second of several conversations at once, against the time that their bytes need at the least
    Decode(BenchDecode),
    /// Listening: milliseconds from a fresh prompt to the first token
    Prefill(BenchPrefill),
    /// The lines of `bench train --json` and `bench ops --json` as Markdown tables
    Table(BenchTable),
    /// Data sets from a story: lines and tokens a second, peak memory, where the time goes
    Corpus(BenchCorpus),
    /// Held-out loss after the same steps with f32 weights and with bf16 weights rounded stochastically and to nearest
    Rounding(BenchRounding),
}

#[derive(Debug, Args)]
pub struct BenchDecode {
    #[command(flatten)]
    pub speaker: BenchSpeaker,
    /// Conversations at once
    #[arg(long, default_value_t = 1)]
    pub batch: usize,
    /// Tokens of each reply that are timed
    #[arg(long, default_value_t = 128)]
    pub tokens: usize,
    /// Afterwards once more with every kernel timed by itself, printed on stderr; GPU only
    #[arg(long)]
    pub profile: bool,
}

#[derive(Debug, Args)]
pub struct BenchPrefill {
    #[command(flatten)]
    pub speaker: BenchSpeaker,
    /// Prompts that are timed, after one that is not
    #[arg(long, default_value_t = 5)]
    pub prompts: usize,
}

/// A model of random weights that speaks.
#[derive(Debug, Args)]
pub struct BenchSpeaker {
    /// tiny, small, 0.8b, 2b, 4b or 9b
    #[arg(long, default_value = "tiny", value_parser = sizes::parse)]
    pub size: String,
    /// Storage of weights and activations; default is f32 on a CPU, bf16 on a GPU
    #[arg(long, value_enum)]
    pub dtype: Option<DTypeArg>,
    /// Tokens of each prompt
    #[arg(long, default_value_t = 512)]
    pub context: usize,
    #[command(flatten)]
    pub device: Device,
    #[command(flatten)]
    pub memory: Memory,
}

#[derive(Debug, Args)]
pub struct BenchRounding {
    /// A TOML file that says rows, batch and optimizer; its dtype, base and steps do not count where given here
    pub recipe: PathBuf,
    /// Checkpoint to go on from: a Hugging Face folder; default is the recipe's base
    #[arg(long)]
    pub model: Option<PathBuf>,
    /// Optimizer steps of each of the three trainings
    #[arg(long, default_value_t = 300)]
    pub steps: u64,
    /// Change a recipe key, e.g. optimizer.lr=1e-5
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    #[command(flatten)]
    pub device: Device,
    #[command(flatten)]
    pub memory: Memory,
}

#[derive(Debug, Args)]
pub struct BenchOps {
    /// Primitives, such as swiglu and attention; default is all
    pub ops: Vec<String>,
    /// tiny, small, 0.8b, 2b, 4b or 9b
    #[arg(long, default_value = "tiny", value_parser = sizes::parse)]
    pub size: String,
    #[arg(long, default_value_t = 5120)]
    pub row_tokens: usize,
    /// Tokens of each document in a row; default is a row
    #[arg(long)]
    pub document_tokens: Option<usize>,
    /// Timed runs of each, after two that are not
    #[arg(long, default_value_t = 9)]
    pub runs: usize,
    /// Storage of weights and activations; default is f32 on a CPU, bf16 on a GPU
    #[arg(long, value_enum)]
    pub dtype: Option<DTypeArg>,
    #[command(flatten)]
    pub device: Device,
    #[command(flatten)]
    pub memory: Memory,
}

#[derive(Debug, Args)]
pub struct BenchTable {
    /// Files of JSON lines
    #[arg(required = true)]
    pub files: Vec<PathBuf>,
}

#[derive(Debug, Args)]
pub struct BenchCorpus {
    /// The story: file or folder; without it the bundled one with a vocabulary learned from it
    #[arg(long, requires_all = ["character", "tokenizer"])]
    pub root: Option<PathBuf>,
    #[arg(long, default_value = "story")]
    pub source: String,
    #[arg(long, requires = "root")]
    pub character: Option<PathBuf>,
    /// pt/everything, sft/cyrene, ... (repeatable)
    #[arg(long = "task", default_value = "pt/everything")]
    pub tasks: Vec<String>,
    /// Folder, tokenizer.json or tokenizer.json.gz
    #[arg(long, requires = "root")]
    pub tokenizer: Option<PathBuf>,
    /// e.g. chs,en
    #[arg(long, value_delimiter = ',')]
    pub languages: Vec<String>,
    /// Word pattern for token counts
    #[arg(long, value_enum, default_value = "qwen2")]
    pub count_with: CountWith,
    /// Builds, of which the fastest counts; one more shows the stages
    #[arg(long, default_value_t = 3)]
    pub runs: usize,
    /// What another tool needs for the same, to print the ratio
    #[arg(long)]
    pub peer_seconds: Option<f64>,
}

#[derive(Debug, Args)]
pub struct BenchTrain {
    /// tiny, small, 0.8b, 2b, 4b or 9b
    #[arg(long, default_value = "tiny", value_parser = sizes::parse)]
    pub size: String,
    /// What trains
    #[arg(long, value_enum, default_value = "full")]
    pub tuner: TunerArg,
    /// Packed rows a micro-batch
    #[arg(long, default_value_t = 1)]
    pub rows: usize,
    #[arg(long, default_value_t = 5120)]
    pub row_tokens: usize,
    /// Tokens of each document in a row; default is a row
    #[arg(long)]
    pub document_tokens: Option<usize>,
    /// Micro-batches an optimizer step
    #[arg(long, default_value_t = 1)]
    pub accumulate: usize,
    /// Optimizer steps timed, after two that are not
    #[arg(long, default_value_t = 5)]
    pub steps: usize,
    /// Storage of weights and activations; default is f32 on a CPU, bf16 on a GPU
    #[arg(long, value_enum)]
    pub dtype: Option<DTypeArg>,
    /// After the timed steps, one more with every kernel timed by itself, printed on stderr; GPU only
    #[arg(long)]
    pub profile: bool,
    #[command(flatten)]
    pub device: Device,
    #[command(flatten)]
    pub memory: Memory,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TunerArg {
    Full,
    /// Rank 16 on every linear layer
    Lora,
}

#[derive(Debug, Args)]
pub struct Selftest {
    #[command(flatten)]
    pub device: Device,
}

#[derive(Debug, Args)]
pub struct Device {
    /// auto, cpu or cuda[:N]
    #[arg(long, default_value = "auto")]
    pub device: String,
}

#[derive(Debug, Args)]
pub struct Memory {
    /// GiB of the GPU that training may take, context and kernels included; default is all that is free
    #[arg(long, value_name = "GIB")]
    pub memory: Option<f64>,
}

#[derive(Debug, Args)]
pub struct Address {
    #[arg(long, default_value = "127.0.0.1")]
    pub host: String,
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
}

// Who may ask the server; no doc comment, which clap would take for the commands that this is part of.
#[derive(Debug, Args)]
pub struct Access {
    /// One key a line; every API call must carry one
    #[arg(long)]
    pub api_key_file: Option<PathBuf>,
    /// Ask no key of other machines: whoever reaches the port can use the model
    #[arg(long, conflicts_with = "api_key_file")]
    pub insecure: bool,
    /// Answer under this name too, beside localhost and addresses written as such; repeat it for more
    #[arg(long, value_name = "NAME")]
    pub allow_host: Vec<String>,
}

#[derive(Debug, Args)]
pub struct Doctor {
    /// Recipes to plan for
    pub recipes: Vec<PathBuf>,
    /// Plan for a released size, full and LoRA, with the default recipe's rows: 0.8b, 2b, 4b or 9b
    #[arg(long, value_parser = sizes::parse)]
    pub size: Option<String>,
    #[command(flatten)]
    pub device: Device,
    /// GiB of GPU memory to plan for, context and kernels included, also where there is no GPU; default is all that is free
    #[arg(long, value_name = "GIB")]
    pub memory: Option<f64>,
    /// GiB of memory of the GPU's host to plan for; default is what can be had now, and enough where there is no GPU
    #[arg(long, value_name = "GIB")]
    pub host_memory: Option<f64>,
}

#[derive(Debug, Args)]
pub struct Fetch {
    /// e.g. Qwen/Qwen3.5-4B-Base
    pub hub_id: String,
    /// Folder to write; default is models/<name>
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Branch, tag or commit; the commit it means is recorded
    #[arg(long, default_value = "main")]
    pub revision: String,
}

#[derive(Debug, Subcommand)]
pub enum Corpus {
    /// Build data sets from a story
    Build(CorpusBuild),
    /// A story from Ren'Py, subtitles, Twine, `Name: text`, CSV or a chat log; a character file from a card
    Import(CorpusImport),
    /// Hold scenes out for validation, all languages together
    Split(CorpusSplit),
    /// What the rows hold: lengths, missing translations, speakers, what is held out, how often training shows a scene
    Stats(CorpusStats),
    /// A random sample, coloured by who speaks, with what of it is trained on
    Peek(CorpusPeek),
    /// What training sees of each row
    Encode(CorpusEncode),
    /// Rows for Polars, Spark, Ray and DuckDB
    Export(CorpusExport),
}

#[derive(Debug, Args)]
pub struct CorpusBuild {
    #[arg(long, default_value = "story")]
    pub source: String,
    /// The story: file or folder
    #[arg(long)]
    pub root: PathBuf,
    /// Who shall speak: a file as in characters/
    #[arg(long)]
    pub character: PathBuf,
    /// pt/everything, pt/amphoreus, sft/cyrene, ... (repeatable)
    #[arg(long = "task", required = true)]
    pub tasks: Vec<String>,
    /// Folder, tokenizer.json or tokenizer.json.gz
    #[arg(long)]
    pub tokenizer: PathBuf,
    #[arg(long)]
    pub out: PathBuf,
    /// e.g. chs,en
    #[arg(long, value_delimiter = ',')]
    pub languages: Vec<String>,
    /// Word pattern for token counts
    #[arg(long, value_enum, default_value = "qwen2")]
    pub count_with: CountWith,
}

#[derive(Debug, Args)]
pub struct CorpusImport {
    /// Files or a folder of one story, or one character card as JSON or PNG (docs/import.md)
    #[arg(required = true)]
    pub paths: Vec<PathBuf>,
    /// The file to write: a story (.jsonl), or of a card the character file (.toml)
    #[arg(long)]
    pub out: PathBuf,
    /// Language of the texts, e.g. en, zh, ja
    #[arg(long, default_value = "en")]
    pub language: String,
    /// Campaign of all scenes; default is the name of the file or folder
    #[arg(long)]
    pub campaign: Option<String>,
    /// Name that {{user}} becomes in a card; default is User
    #[arg(long)]
    pub player: Option<String>,
    /// renpy, subtitles, substation, twee, twine, table, chat-log, discord, card or plain; default is what content and ending say
    #[arg(long)]
    pub form: Option<String>,
    /// Replace the file to write
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CountWith {
    Qwen2,
    #[value(name = "qwen3_5")]
    Qwen3_5,
}

#[derive(Debug, Args)]
pub struct CorpusSplit {
    #[arg(long, default_value = "story")]
    pub source: String,
    /// The story: file or folder
    #[arg(long)]
    pub root: PathBuf,
    /// The vendor folder, if data sets are built from it: its pages are split with the story
    #[arg(long)]
    pub vendor: Option<PathBuf>,
    /// Who shall speak: a file as in characters/
    #[arg(long)]
    pub character: PathBuf,
    /// The file to write, beside the data sets
    #[arg(long, default_value = "split.json")]
    pub out: PathBuf,
    /// Share of the character's lines to hold out
    #[arg(long, default_value_t = 0.08)]
    pub share: f64,
    /// Share of everyone else's lines to hold out
    #[arg(long, default_value_t = 0.03)]
    pub share_rest: f64,
    /// Share of the character's lines to hold out with their whole missions (val-strict); 0: none
    #[arg(long, default_value_t = 0.05)]
    pub share_strict: f64,
    /// Share of the lines to hold out in one language each (probe-x); 0: none
    #[arg(long, default_value_t = 0.1)]
    pub share_probe: f64,
    #[arg(long, default_value_t = 7)]
    pub seed: u64,
    /// Replace another split
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TrainStage {
    Cpt,
    Sft,
}

#[derive(Debug, Args)]
pub struct CorpusEncode {
    #[arg(long, value_enum)]
    pub stage: TrainStage,
    #[arg(long)]
    pub tokenizer: PathBuf,
    #[command(flatten)]
    pub loss: Loss,
    /// Rows (docs/rows.md)
    pub file: PathBuf,
}

#[derive(Debug, Args)]
pub struct CorpusStats {
    /// Data sets, files of them, or the folder that `corpus build` wrote; default: the recipe's sources
    #[arg(required_unless_present = "recipe")]
    pub paths: Vec<PathBuf>,
    /// split.json: also rows, tokens and scenes by side; default: the recipe's
    #[arg(long)]
    pub split: Option<PathBuf>,
    /// Passes over each scene that this recipe's mixture makes
    #[arg(long)]
    pub recipe: Option<PathBuf>,
    /// Folder for stats.html and an SVG file of each picture
    #[arg(long)]
    pub out: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct CorpusPeek {
    /// A data set, a file of it, or any rows that `train` reads
    pub path: PathBuf,
    /// How rows are encoded
    #[arg(long, value_enum)]
    pub stage: TrainStage,
    /// Folder, tokenizer.json or tokenizer.json.gz
    #[arg(long)]
    pub tokenizer: PathBuf,
    /// Rows to draw
    #[arg(short = 'n', long = "rows", default_value_t = 4)]
    pub rows: usize,
    /// The same seed draws the same rows
    #[arg(long, default_value_t = 7)]
    pub seed: u64,
    /// e.g. en
    #[arg(long)]
    pub language: Option<String>,
    /// split.json: say the side of each row
    #[arg(long)]
    pub split: Option<PathBuf>,
    #[command(flatten)]
    pub loss: Loss,
    /// Show where each token ends
    #[arg(long)]
    pub tokens: bool,
    /// Brackets instead of colours, as without a terminal or with NO_COLOR
    #[arg(long)]
    pub no_color: bool,
    /// Also write the sample as a page
    #[arg(long)]
    pub html: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct CorpusExport {
    /// Data sets, files of them, or the folder that `corpus build` wrote
    #[arg(required = true)]
    pub paths: Vec<PathBuf>,
    #[arg(long, value_enum, default_value = "parquet")]
    pub format: TableFormat,
    /// split.json: fill the column `side`
    #[arg(long)]
    pub split: Option<PathBuf>,
    /// Folder to write into; default: beside the JSON lines
    #[arg(long)]
    pub out: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TableFormat {
    Parquet,
}

#[derive(Debug, Args)]
pub struct Loss {
    /// What of a conversation carries loss: each answer (ignore-empty-think), its think block too (default), the last answer (last-round)
    #[arg(
        long,
        value_enum,
        default_value = "ignore-empty-think",
        hide_possible_values = true
    )]
    pub loss_scale: LossScale,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LossScale {
    /// Every assistant turn, not the empty think block (ms-swift 4.6)
    IgnoreEmptyThink,
    /// Every assistant turn, think block included (ms-swift 4.2, 4.3)
    Default,
    /// The last assistant turn only
    LastRound,
}

#[derive(Debug, Args)]
pub struct Train {
    /// A TOML file (`cyrene recipe` explains every key)
    pub recipe: PathBuf,
    /// Default is runs/<recipe name>
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Change a recipe key, e.g. optimizer.lr=1e-5
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Whose name, system prompt, greeting and profile the result carries: a file as in characters/; default is the recipe's, else the base's
    #[arg(long)]
    pub character: Option<PathBuf>,
    /// Go on from the folder's checkpoint although recipe or data changed
    #[arg(long)]
    pub force: bool,
    /// Rows at a time, at most: fewer than batch.rows take less memory and more time, for the same steps
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub rows_at_once: Option<u32>,
    /// Started by torchrun, srun or mpirun: seconds to wait until all processes are there
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub wait_for_ranks: u64,
    #[command(flatten)]
    pub device: Device,
    #[command(flatten)]
    pub memory: Memory,
}

#[derive(Debug, Args)]
pub struct ModelArgs {
    /// A Hugging Face folder
    #[arg(long)]
    pub model: PathBuf,
    /// A PEFT adapter on top
    #[arg(long)]
    pub adapter: Option<PathBuf>,
    /// Storage of weights and activations
    #[arg(long, value_enum, default_value = "f32")]
    pub dtype: DTypeArg,
    #[command(flatten)]
    pub device: Device,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DTypeArg {
    F32,
    Bf16,
}

#[derive(Debug, Args)]
pub struct Score {
    #[command(flatten)]
    pub model: ModelArgs,
    /// JSON lines {"input_ids":[...]}; - reads standard input
    #[arg(long)]
    pub ids: PathBuf,
}

#[derive(Debug, Args)]
pub struct Generate {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub input: GenerateInput,
    /// Most likely token each time
    #[arg(long)]
    pub greedy: bool,
    #[arg(long, default_value_t = 256)]
    pub max_tokens: usize,
    #[arg(long)]
    pub seed: Option<u64>,
    /// Sampling values: Suggested, Legacy or Adopted; default is the character's, else Adopted
    #[arg(long)]
    pub profile: Option<String>,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct GenerateInput {
    /// JSON lines {"input_ids":[...]}
    #[arg(long)]
    pub ids: Option<PathBuf>,
    /// A JSON list of messages, or JSON lines {"messages":[...]}; - reads standard input
    #[arg(long)]
    pub messages: Option<PathBuf>,
    /// Plain text to go on from
    #[arg(long)]
    pub prompt: Option<String>,
}

#[derive(Debug, Args)]
pub struct Eval {
    #[command(flatten)]
    pub model: ModelArgs,
    /// The model before training, for comparison
    #[arg(long)]
    pub base: Option<PathBuf>,
    /// split.json beside the data sets
    #[arg(long)]
    pub split: PathBuf,
    /// Folder of the report; default is a new one beside the model: MODEL-eval, MODEL-eval-2, ...
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Look at these languages alone, e.g. zh,en
    #[arg(long, value_delimiter = ',')]
    pub languages: Vec<String>,
    /// Replies to held-out turns, by language
    #[arg(long, default_value_t = 4)]
    pub replies: usize,
    #[arg(long, default_value_t = 7)]
    pub seed: u64,
    /// Sampling values of the replies: Suggested, Legacy or Adopted; default is the character's, else Adopted
    #[arg(long)]
    pub profile: Option<String>,
}

#[derive(Debug, Args)]
pub struct Merge {
    /// The model that the adapter was trained on: a Hugging Face folder
    #[arg(long)]
    pub base: PathBuf,
    /// A PEFT adapter
    #[arg(long)]
    pub adapter: PathBuf,
    /// Folder to write
    #[arg(long)]
    pub out: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ExportFormat {
    /// bf16 weights in a Hugging Face folder
    Hf,
    /// FP8_BLOCK as llm-compressor writes it (compressed-tensors): vLLM, SGLang
    Fp8Block,
    /// The same numbers as Qwen's own FP8 releases have them
    Fp8Hf,
}

#[derive(Debug, Args)]
pub struct Export {
    /// A Hugging Face folder
    #[arg(long)]
    pub model: PathBuf,
    #[arg(long, value_enum)]
    pub format: ExportFormat,
    /// Folder to write
    #[arg(long)]
    pub out: PathBuf,
    /// bf16: the bytes llm-compressor writes on a CPU; f32: one rounding instead of two
    #[arg(long, value_enum, default_value = "f32")]
    pub division: DTypeArg,
    /// Replace an existing folder
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub struct Serve {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Who speaks, in place of the character stored with the weights: a file as in characters/
    #[arg(long)]
    pub character: Option<PathBuf>,
    #[command(flatten)]
    pub address: Address,
    #[command(flatten)]
    pub access: Access,
    /// Pages of this origin may use the API (http://localhost:3000); repeat it for more, * for any
    #[arg(long, value_name = "ORIGIN")]
    pub allow_origin: Vec<String>,
    /// Name clients use; default is the folder's
    #[arg(long)]
    pub name: Option<String>,
    /// Sampling values: Suggested, Legacy or Adopted; default is the character's, else Adopted
    #[arg(long)]
    pub profile: Option<String>,
    /// Conversations answered at the same time
    #[arg(long, default_value_t = 4, value_parser = sequences)]
    pub max_sequences: usize,
    /// Longest conversation in tokens; default is the model's, but 32768 at most
    #[arg(long, value_parser = context)]
    pub context: Option<usize>,
}

#[derive(Debug, Args)]
pub struct Chat {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Who speaks, in place of the character stored with the weights: a file as in characters/
    #[arg(long)]
    pub character: Option<PathBuf>,
    /// Sampling values: Suggested, Legacy or Adopted; default is the character's, else Adopted
    #[arg(long)]
    pub profile: Option<String>,
    /// Language of her greeting and system prompt, e.g. ja; default is English, else the first she has
    #[arg(long)]
    pub language: Option<String>,
    /// System prompt; default is the character's
    #[arg(long)]
    pub system: Option<String>,
    #[arg(long, default_value_t = 256)]
    pub max_tokens: usize,
    #[arg(long)]
    pub seed: Option<u64>,
}

#[derive(Debug, Args)]
pub struct Recipe {
    /// A recipe's name or file; without one, every key with its default
    pub name: Option<String>,
}

fn sequences(text: &str) -> Result<usize, String> {
    within(text, 1, 1024)
}

fn context(text: &str) -> Result<usize, String> {
    within(text, 2, 1 << 24)
}

/// A whole number in a range, for flags.
fn within(text: &str, least: usize, most: usize) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if (least..=most).contains(&number) => Ok(number),
        _ => Err(format!("give a whole number from {least} to {most}")),
    }
}
