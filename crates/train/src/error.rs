//! What can go wrong in a training run, each with what to do about it.

use std::path::{Path, PathBuf};

/// What this crate returns.
pub type Result<T> = std::result::Result<T, Error>;

/// Errors of `train`; every variant carries the data to find the cause.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model, its files or its adapter.
    #[error(transparent)]
    Model(#[from] model::Error),
    /// An op or a device failed outside a step.
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
    /// The GPU has too little memory for any plan.
    #[error(
        "training needs {} of the GPU even with one row of {row_tokens} tokens at a time and every layer recomputed in the backward pass, and it has {}; lower data.row_tokens, {}, or close other programs on the GPU", gib(*.needed), gib(*.available), lighter(*.is_lora)
    )]
    DoesNotFit {
        /// Bytes of the least demanding plan.
        needed: usize,
        /// Bytes that there are.
        available: usize,
        /// Tokens of a row.
        row_tokens: usize,
        /// Whether adapters train already.
        is_lora: bool,
    },
    /// The host has too little memory for the moments that do not fit on the GPU.
    #[error(
        "training within {} of the GPU needs {} of host memory for the optimizer's moments, and {} can be locked; close other programs, give the machine or its container more memory, {}, or use a GPU with more memory", gib(*.gpu_bytes), gib(*.needed), gib(*.available), lighter(*.is_lora)
    )]
    DoesNotFitHost {
        /// Bytes of the least demanding plan.
        needed: usize,
        /// Bytes that there are.
        available: usize,
        /// Bytes of the GPU that training may use.
        gpu_bytes: usize,
        /// Whether adapters train already.
        is_lora: bool,
    },
    /// The tokenizer.
    #[error(transparent)]
    Text(#[from] text::Error),
    /// A checkpoint cannot be written, cleared or removed.
    #[error(transparent)]
    Files(#[from] files::Error),
    /// A file or folder could not be read or written.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was tried, as a gerund.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system or the parser said.
        source: std::io::Error,
    },
    /// A checkpoint's state is damaged.
    #[error(
        "reading {path}: {source}; delete the folder it lies in to go on from an older checkpoint"
    )]
    State {
        /// The file or folder.
        path: PathBuf,
        /// What the system or the parser said.
        source: serde_json::Error,
    },
    /// A checkpoint's state says what no run can have written.
    #[error(
        "{path}: `{key}` is {value}, but must be {expected}; delete the folder it lies in to go on from an older checkpoint"
    )]
    StateValue {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What would be in range.
        expected: String,
    },
    /// No checkpoint can be gone on from.
    #[error(
        "no checkpoint in {dir} is whole, so there is nothing to go on from: in step-{step} {problem}; copy one back from where it is whole, or give another --out to begin again"
    )]
    NoWholeCheckpoint {
        /// The folder of checkpoints.
        dir: PathBuf,
        /// The newest.
        step: u64,
        /// What is wrong with it.
        problem: String,
    },
    /// The checkpoint with the weights that the run is to end with.
    #[error(
        "{folder} is damaged: {problem}; `--set run.result=last` ends the run with the last weights instead of the best"
    )]
    DamagedCheckpoint {
        /// The checkpoint.
        folder: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A checkpoint of a later program.
    #[error(
        "{folder} was written by a newer cyrene (form {version}); go on with that, or give another --out"
    )]
    NewerCheckpoint {
        /// The checkpoint.
        folder: PathBuf,
        /// The form of its state.
        version: u32,
    },
    /// A checkpoint's moments are damaged.
    #[error(
        "reading {path}: {source}; delete the folder it lies in to go on from an older checkpoint"
    )]
    OptimizerFile {
        /// The file or folder.
        path: PathBuf,
        /// What the system or the parser said.
        source: safetensors::SafeTensorError,
    },
    /// A checkpoint's moments are of another model.
    #[error(
        "{path} has no tensor `{name}` of shape {shape:?} and type {dtype}; it belongs to another model, or to a run on another kind of device (moments of bf16 weights are bf16 on a GPU, f32 on a CPU): go on there, or give another --out"
    )]
    OptimizerTensor {
        /// The file or folder.
        path: PathBuf,
        /// The name of the tensor.
        name: String,
        /// The shape it should have.
        shape: Vec<usize>,
        /// The type it should have.
        dtype: kernel::DType,
    },
    /// A checkpoint is of another model.
    #[error("{path} holds another model than the one that is to be trained; give another --out")]
    OtherModel {
        /// The file or folder.
        path: PathBuf,
    },
    /// A key of the recipe is out of range.
    #[error("`{key}` is {value}, but must be {expected}")]
    BadValue {
        /// The key as the recipe has it.
        key: &'static str,
        /// The value.
        value: String,
        /// What would be in range.
        expected: &'static str,
    },
    /// Nothing in the rows carries loss.
    #[error(
        "none of the {documents} training documents has a token to train on: every label after the first is -100; check the loss mask of the rows and the weights of the sources"
    )]
    NoTrainableToken {
        /// How many there are.
        documents: usize,
    },
    /// `document` counts from 0 in the order of the job.
    #[error(
        "document {document} of the {split} data (source {source_idx}) holds token id {id} at position {position}, but the model's vocabulary has {vocab_size}; encode the rows with this model's tokenizer"
    )]
    TokenBeyondVocabulary {
        /// `training` or `held-out`.
        split: &'static str,
        /// Its number, from 0, in the order of the job.
        document: usize,
        /// The source it is from.
        source_idx: u32,
        /// Where in the document.
        position: usize,
        /// The token id.
        id: u32,
        /// Ids that the model has.
        vocab_size: usize,
    },
    /// `document` counts from 0 in the order of the job.
    #[error("document {document} of the {split} data (source {source_idx}): {reason}")]
    Cut {
        /// `training` or `held-out`.
        split: &'static str,
        /// Its number, from 0, in the order of the job.
        document: usize,
        /// The source it is from.
        source_idx: u32,
        /// Why no row has room for it.
        reason: text::Error,
    },
    /// `document` counts from 0 in the order of the job.
    #[error(
        "document {document} of the {split} data (source {source_idx}) has {ids} ids and {labels} labels; they must be equally many"
    )]
    LabelCount {
        /// `training` or `held-out`.
        split: &'static str,
        /// Its number, from 0, in the order of the job.
        document: usize,
        /// The source it is from.
        source_idx: u32,
        /// Number of ids.
        ids: usize,
        /// Number of labels.
        labels: usize,
    },
    /// The loss or the gradient is NaN or infinite.
    #[error("{what} is {value} at step {step}; nothing of this step was kept. {remedy}", remedy = last_good(.last_checkpoint))]
    NotFinite {
        /// `loss` or `gradient norm`.
        what: &'static str,
        /// The value.
        value: f32,
        /// The step, from 1.
        step: u64,
        /// The checkpoint to go on from.
        last_checkpoint: Option<PathBuf>,
    },
    /// Weights are no numbers any more, and were about to be saved.
    #[error("{cause}. They were not saved at step {step}. {remedy}", remedy = last_good(.last_checkpoint))]
    WeightsNotFinite {
        /// Which.
        cause: Box<model::Error>,
        /// The step, from 1.
        step: u64,
        /// The checkpoint to go on from.
        last_checkpoint: Option<PathBuf>,
    },
    /// The GPU is gone, full or refused a call; `cause` says which.
    #[error("step {step} failed: {cause}. {remedy}", remedy = go_on(.last_checkpoint))]
    DeviceFailed {
        /// The step, from 1.
        step: u64,
        /// What the GPU said.
        cause: kernel::Error,
        /// The checkpoint to go on from.
        last_checkpoint: Option<PathBuf>,
    },
    /// Another process writes there.
    #[error("{folder} is in use by {holder}; wait for it, stop it, or choose another folder")]
    InUse {
        /// The run's folder.
        folder: PathBuf,
        /// Which process, on which machine, since when, as far as it is known.
        holder: String,
    },
    /// The folder belongs to another recipe or other data.
    #[error("{dir} was trained with another recipe or other data ({}); give another --out, restore the recipe, or use --force to go on with the new one", .differences.join("; "))]
    RecipeChanged {
        /// The folder.
        dir: PathBuf,
        /// `key: was X, is Y`, one entry a key.
        differences: Vec<String>,
    },
    /// A launcher's variables say that there are several processes, and not which this is.
    #[error("WORLD_SIZE is set and RANK is not; set both, or neither to train by one process")]
    RankUnset,
    /// A launcher's variables contradict each other.
    #[error("rank {rank} of {n_ranks} (RANK, WORLD_SIZE): ranks count from 0")]
    RankBeyond {
        /// This process.
        rank: usize,
        /// All of them.
        n_ranks: usize,
    },
    /// Nobody says where the processes meet.
    #[error("MASTER_ADDR is not set; give the name or address of rank 0's host")]
    MasterUnset,
    /// A launcher's variable that cannot be read.
    #[error("the variable {name} is `{text}`, which is no {expected}")]
    Variable {
        /// Its name.
        name: String,
        /// What it says.
        text: String,
        /// `number` or `port`.
        expected: &'static str,
    },
    /// Some ranks would have nothing to do.
    #[error(
        "a step has {micro_batches} micro-batches of {rows} rows, but {n_ranks} ranks are to share them; start fewer ranks, or give batch.accumulate = {n_ranks} or more and fewer batch.rows, whose product is what one step learns from"
    )]
    TooFewMicroBatches {
        /// Micro-batches of a step.
        micro_batches: usize,
        /// Rows of each.
        rows: usize,
        /// How many processes train together.
        n_ranks: usize,
    },
    /// The ranks did not find each other.
    #[error("rank {rank} of {n_ranks} at {place}: {what}")]
    Rendezvous {
        /// The process's number.
        rank: usize,
        /// How many processes train together.
        n_ranks: usize,
        /// Where rank 0 listens.
        place: String,
        /// What happened.
        what: String,
    },
    /// A rank failed.
    #[error(
        "rank {rank} failed, and with it the run: {what}; start all ranks again by the same command to go on from the last checkpoint"
    )]
    Rank {
        /// The process's number.
        rank: usize,
        /// What happened.
        what: String,
    },
    /// The ranks were not started alike.
    #[error(
        "{what} is {here} on rank {rank} and {first} on rank 0; start all ranks with one recipe, the same data and the same kind of device"
    )]
    RanksDiffer {
        /// What differs.
        what: String,
        /// The process's number.
        rank: usize,
        /// What it is on this rank.
        here: String,
        /// What it is on rank 0.
        first: String,
    },
    /// A stop was asked for; everything is saved.
    #[error("stopped after step {step}; run the same command again to go on from {checkpoint}")]
    Interrupted {
        /// The step, from 1.
        step: u64,
        /// The checkpoint that was written.
        checkpoint: PathBuf,
    },
}

/// What takes less memory than the job does, of what it does not do already.
pub fn lighter(is_lora: bool) -> &'static str {
    match is_lora {
        true => "use a smaller base",
        false => "use tuner.kind = \"lora\" or a smaller base",
    }
}

fn gib(bytes: usize) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

fn last_good(last_checkpoint: &Option<PathBuf>) -> String {
    match last_checkpoint {
        Some(path) => format!(
            "The last good checkpoint is {}; lower optimizer.lr or look at the rows of this step, then run again",
            path.display()
        ),
        None => "There is no checkpoint yet; lower optimizer.lr or look at the rows of this step, then run again".to_string(),
    }
}

fn go_on(last_checkpoint: &Option<PathBuf>) -> String {
    match last_checkpoint {
        Some(path) => format!(
            "The last good checkpoint is {}; the same command goes on from it",
            path.display()
        ),
        None => "There is no checkpoint yet; the same command begins again".to_string(),
    }
}

impl Error {
    /// Whether all ranks of a run have this error at the same time by themselves, so that none must be told of it: they decided it together.
    pub fn is_of_all_ranks(&self) -> bool {
        matches!(
            self,
            Error::NotFinite { .. } | Error::Interrupted { .. } | Error::TooFewMicroBatches { .. }
        )
    }

    /// A failure of this step, with the checkpoint to go on from; an error that is no failure of a step stays as it is.
    pub(crate) fn in_step(self, step: u64, newest: Option<PathBuf>) -> Self {
        match self {
            Error::NotFinite {
                what, value, step, ..
            } => Error::NotFinite {
                what,
                value,
                step,
                last_checkpoint: newest,
            },
            Error::Kernel(cause) | Error::Model(model::Error::Kernel(cause)) => {
                Error::DeviceFailed {
                    step,
                    cause,
                    last_checkpoint: newest,
                }
            }
            error => error,
        }
    }
}

/// Names the file and the action that an input or output error belongs to.
pub(crate) trait IoContext<T> {
    fn during(self, action: &'static str, path: &Path) -> Result<T>;
}

impl<T> IoContext<T> for std::io::Result<T> {
    fn during(self, action: &'static str, path: &Path) -> Result<T> {
        self.map_err(|source| Error::Io {
            action,
            path: path.to_path_buf(),
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_with_adapters_is_not_told_to_use_adapters() {
        let error = |is_lora| Error::DoesNotFit {
            needed: 30 << 30,
            available: 8 << 30,
            row_tokens: 64,
            is_lora,
        };
        let full = error(false).to_string();
        assert!(full.contains("needs 30.0 GiB") && full.contains("has 8.0 GiB"));
        assert!(full.contains("lora"), "{full}");
        assert!(!error(true).to_string().contains("lora"));
    }

    #[test]
    fn a_gpu_that_fails_in_a_step_names_the_checkpoint_to_go_on_from() {
        let full = kernel::Error::OutOfMemory {
            device: "cuda:0".into(),
            bytes: 7,
            free: 3,
        };
        let checkpoint = PathBuf::from("out/checkpoints/step-40");
        let from_model = Error::Model(model::Error::Kernel(full.clone()));
        let message = from_model.in_step(41, Some(checkpoint)).to_string();
        assert!(
            message.contains("step 41 failed: cuda:0 has no room"),
            "{message}"
        );
        assert!(message.contains("step-40; the same command"), "{message}");
        let message = Error::Kernel(full).in_step(1, None).to_string();
        assert!(message.contains("no checkpoint yet"), "{message}");
        let other = Error::NoTrainableToken { documents: 1 }.in_step(1, None);
        assert!(matches!(other, Error::NoTrainableToken { documents: 1 }));
    }
}
