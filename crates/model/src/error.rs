//! What can go wrong between a folder and a model; each text names the file or tensor and the remedy.

use std::path::PathBuf;

use kernel::DType;

pub type Result<T> = std::result::Result<T, Error>;

/// Errors of `model`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error(transparent)]
    Kernel(#[from] kernel::Error),

    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },

    #[error("no model in {}: `{missing}` is missing; point to a Hugging Face folder with config.json and *.safetensors", dir.display())]
    NoModel { dir: PathBuf, missing: String },

    #[error("{} is no readable safetensors file ({detail}); download or write it again", path.display())]
    Safetensors { path: PathBuf, detail: String },

    #[error("{} is not valid JSON: {source}", path.display())]
    Json {
        path: PathBuf,
        source: serde_json::Error,
    },

    #[error(
        "model_type `{model_type}` is not supported; supported are qwen3_5 and qwen3_5_text (dense)"
    )]
    Architecture { model_type: String },

    #[error("config key `{key}`: {problem}; check config.json against the released one")]
    Config { key: String, problem: String },

    #[error("tensor `{name}` is missing from {}; the folder is incomplete or config.json is of another model", dir.display())]
    MissingTensor { name: String, dir: PathBuf },

    #[error("tensor `{name}` in {} belongs to no part of this architecture; config.json and weights do not fit", path.display())]
    UnexpectedTensor { name: String, path: PathBuf },

    #[error("tensor `{name}` in {}: config.json asks for shape {expected:?}, the file has {got:?}; use the config.json of these weights", path.display())]
    TensorShape {
        name: String,
        path: PathBuf,
        expected: Vec<usize>,
        got: Vec<usize>,
    },

    #[error("tensor `{name}` in {} is stored as {dtype}; readable are F32, BF16, F16 and F8_E4M3 with block scales", path.display())]
    TensorType {
        name: String,
        path: PathBuf,
        dtype: String,
    },

    #[error("{} says tie_word_embeddings, and has a head of its own (lm_head.weight) that differs from the embedding; set tie_word_embeddings to false in config.json to use the head, or remove lm_head.weight to use the embedding", dir.display())]
    TwoHeads { dir: PathBuf },

    #[error(
        "tensor `{name}` holds NaN or infinite numbers ({place}); use an earlier checkpoint, or download the folder again"
    )]
    NotFinite { name: String, place: String },

    #[error("{what}; hand in token ids, targets and borders of one packed row")]
    Batch { what: String },

    #[error(
        "activations were saved as {saved} and the model is {model}; use one `Saved` for each dtype"
    )]
    SavedType { saved: DType, model: DType },

    #[error(
        "LoRA is attached; merge it (merge_lora) to save whole weights, or save the adapter (save_adapter)"
    )]
    UnmergedAdapter,

    #[error("no LoRA is attached; attach_lora or load_adapter first")]
    NoAdapter,

    #[error("LoRA target `{name}` is no linear layer; choose from {known}")]
    LoraTarget { name: String, known: String },

    #[error("LoRA {key} = {value} is out of range; {expected}")]
    LoraConfig {
        key: &'static str,
        value: f64,
        expected: &'static str,
    },

    #[error("adapter in {}: {problem}", dir.display())]
    Adapter { dir: PathBuf, problem: String },

    #[error("{} is quantized already ({method}); export from the unquantized folder", dir.display())]
    AlreadyQuantized { dir: PathBuf, method: String },
}

impl From<files::Error> for Error {
    fn from(error: files::Error) -> Self {
        let (action, path, source) = error.into_parts();
        Error::Io {
            action,
            path,
            source,
        }
    }
}

impl Error {
    /// Wraps an I/O error with what was tried on which path; for `map_err`.
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io {
            action,
            path,
            source,
        }
    }
}
