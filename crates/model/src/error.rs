//! What can go wrong between a folder and a model; each text names the file or tensor and the remedy.

use std::path::PathBuf;

use kernel::DType;

/// What this crate returns.
pub type Result<T> = std::result::Result<T, Error>;

/// Errors of `model`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An op or a device failed.
    #[error(transparent)]
    Kernel(#[from] kernel::Error),

    /// A file or folder could not be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system or the parser said.
        source: std::io::Error,
    },

    /// A size that nobody has heard of.
    #[error("there is no such size; known are {known}")]
    NoSize {
        /// The names that there are.
        known: String,
    },

    /// A file that a model folder must have is not there.
    #[error("no model in {}: `{missing}` is missing; point to a Hugging Face folder with config.json and *.safetensors", dir.display())]
    NoModel {
        /// The folder.
        dir: PathBuf,
        /// The name of the file.
        missing: String,
    },

    /// A file of weights is damaged.
    #[error("{} is no readable safetensors file ({detail}); download or write it again", path.display())]
    Safetensors {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },

    /// The list of a model's files is damaged, or names something else than files beside it.
    #[error("{} cannot be followed: {detail}; download it again, or write it anew (transformers: save_pretrained)", path.display())]
    Index {
        /// The list.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },

    /// A file of settings is damaged.
    #[error("{} is not valid JSON: {source}", path.display())]
    Json {
        /// The file or folder.
        path: PathBuf,
        /// What the system or the parser said.
        source: serde_json::Error,
    },

    /// The folder holds a model of another kind.
    #[error(
        "model_type `{model_type}` is not supported; supported are qwen3_5 and qwen3_5_text (dense)"
    )]
    Architecture {
        /// What config.json says.
        model_type: String,
    },

    /// A key of config.json is missing or asks for something that is not computed here.
    #[error("config key `{key}`: {problem}; check config.json against the released one")]
    Config {
        /// The key.
        key: String,
        /// What is wrong with it.
        problem: String,
    },

    /// A weight is not in the folder.
    #[error("tensor `{name}` is missing from {}; the folder is incomplete or config.json is of another model", dir.display())]
    MissingTensor {
        /// The name.
        name: String,
        /// The folder.
        dir: PathBuf,
    },

    /// The folder holds a tensor that is no part of the model.
    #[error("tensor `{name}` in {} belongs to no part of this architecture; config.json and weights do not fit", path.display())]
    UnexpectedTensor {
        /// The name.
        name: String,
        /// The file or folder.
        path: PathBuf,
    },

    /// A tensor has another shape than config.json says.
    #[error("tensor `{name}` in {}: config.json asks for shape {expected:?}, the file has {got:?}; use the config.json of these weights", path.display())]
    TensorShape {
        /// The name.
        name: String,
        /// The file or folder.
        path: PathBuf,
        /// The shape by config.json.
        expected: Vec<usize>,
        /// The shape in the file.
        got: Vec<usize>,
    },

    /// A tensor is stored as numbers that cannot be read.
    #[error("tensor `{name}` in {} is stored as {dtype}; readable are F32, BF16, F16 and F8_E4M3 with block scales", path.display())]
    TensorType {
        /// The name.
        name: String,
        /// The file or folder.
        path: PathBuf,
        /// The stored type.
        dtype: String,
    },

    /// A folder says that the head is the embedding, and has another one.
    #[error("{} says tie_word_embeddings, and has a head of its own (lm_head.weight) that differs from the embedding; set tie_word_embeddings to false in config.json to use the head; or, to use the embedding, take lm_head.weight out of its file (Python's safetensors.torch: load_file, pop, save_file) and out of model.safetensors.index.json, if there is one", dir.display())]
    TwoHeads {
        /// The folder.
        dir: PathBuf,
    },

    /// A weight holds NaN or infinities.
    #[error(
        "tensor `{name}` holds NaN or infinite numbers ({place}); use an earlier checkpoint, or download the folder again"
    )]
    NotFinite {
        /// The name.
        name: String,
        /// Where it was found.
        place: String,
    },

    /// Tokens, targets and borders do not fit each other.
    #[error("{what}; hand in token ids, targets and borders of one packed row")]
    Batch {
        /// What does not fit.
        what: String,
    },

    /// Activations of a model of another type were handed in.
    #[error(
        "activations were saved as {saved} and the model is {model}; use one `Saved` for each dtype"
    )]
    SavedType {
        /// Type of the activations.
        saved: DType,
        /// Type of the model.
        model: DType,
    },

    /// Whole weights were asked for while an adapter stands beside them.
    #[error(
        "LoRA is attached; merge it (merge_lora) to save whole weights, or save the adapter (save_adapter)"
    )]
    UnmergedAdapter,

    /// An adapter was asked for, and there is none.
    #[error("no LoRA is attached; attach_lora or load_adapter first")]
    NoAdapter,

    /// The settings name a layer that there is not.
    #[error("LoRA target `{name}` is no linear layer; choose from {known}")]
    LoraTarget {
        /// The name.
        name: String,
        /// The layers that there are.
        known: String,
    },

    /// A setting of an adapter is out of range.
    #[error("LoRA {key} = {value} is out of range; {expected}")]
    LoraConfig {
        /// The key.
        key: &'static str,
        /// The value.
        value: f64,
        /// What would be in range.
        expected: &'static str,
    },

    /// A PEFT folder is damaged, does not fit, or holds more than plain LoRA.
    #[error("adapter in {}: {problem}", dir.display())]
    Adapter {
        /// The folder.
        dir: PathBuf,
        /// What is wrong, and the remedy.
        problem: String,
    },

    /// Weights that are quantized already were to be quantized.
    #[error("{} is quantized already ({method}); export from the unquantized folder", dir.display())]
    AlreadyQuantized {
        /// The folder.
        dir: PathBuf,
        /// How it is quantized.
        method: String,
    },
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
