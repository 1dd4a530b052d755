//! Opening what a command line names: a model with its adapter, the tokenizer and template beside it, the persona stored with the weights.

use std::path::Path;

use anyhow::{Context, Result};
use corpus::{Character, Language};
use eval::TrainedRows;
use kernel::{DType, Device};
use model::Model;
use text::{ChatEncoder, ChatTemplate, Persona, Tokenizer};

use crate::cli::{DTypeArg, Memory, ModelArgs};
use crate::ui::{Misuse, of_eval};
use crate::{env, misuse, speak};

/// The persona of a character file.
///
/// # Errors
/// [`Misuse`] for a file that is not there or holds something else, and for a profile that there is not.
pub fn character(path: &Path) -> Result<Persona> {
    let misuse = |error: String| anyhow::Error::new(Misuse(error));
    let character = Character::load(path).map_err(|error| misuse(error.to_string()))?;
    let persona = character.persona();
    speak::profiles(None, &persona)
        .map_err(|error| misuse(format!("{}: {error}", path.display())))?;
    Ok(persona)
}

/// The language that a flag names.
///
/// # Errors
/// [`Misuse`] for one that there is not.
pub fn language(name: &str) -> Result<Language> {
    let names = [name.to_owned()];
    let languages = Language::parse_all(&names);
    let languages = languages.map_err(|error| anyhow::Error::new(Misuse(error.to_string())))?;
    languages.into_iter().next().context("a name is a language")
}

/// Who speaks: `--character`, else the adapter's persona, else that of the model's folder.
///
/// # Errors
/// As [`character`]; a persona that cannot be read.
pub fn persona(model: &Path, adapter: Option<&Path>, of: Option<&Path>) -> Result<Persona> {
    let with_weights = match adapter.map(Persona::read).transpose()?.flatten() {
        Some(persona) => Some(persona),
        None => Persona::read(model)?,
    };
    match of {
        Some(path) => Ok(character(path)?.in_place_of(with_weights)),
        None => Ok(with_weights.unwrap_or_default()),
    }
}

/// Opens what `--device` names.
///
/// # Errors
/// [`Misuse`] for a device that is not there; otherwise what opening it says.
pub fn device(name: &str) -> Result<Device> {
    if let Some(dir) = env::cache_dir() {
        kernel::cuda::set_kernel_cache(dir.join("kernels"));
    }
    name.parse().map_err(|error: kernel::Error| match error {
        kernel::Error::NoDevice { .. } => anyhow::Error::new(Misuse(error.to_string())),
        other => other.into(),
    })
}

/// Opens what `--device` names, and has it behave as a GPU with the memory that `--memory` gives it.
///
/// # Errors
/// As [`device`]; [`Misuse`] for a limit on a CPU or one that is no number of GiB.
pub fn device_within(name: &str, limit: &Memory) -> Result<Device> {
    let device = device(name)?;
    match (limit.memory, device) {
        (None, _) => {}
        (Some(gib), Device::Cuda(cuda)) => cuda.limit_memory(memory_bytes("--memory", gib)?),
        (Some(_), Device::Cpu) => misuse!("--memory limits a GPU's memory; this is the CPU"),
    }
    Ok(device)
}

/// Bytes of a flag that gives GiB.
///
/// # Errors
/// [`Misuse`] for what is no number of GiB.
pub fn memory_bytes(flag: &str, gib: f64) -> Result<usize> {
    if !(gib.is_finite() && gib > 0.0) {
        misuse!("{flag} is {gib}; give GiB, a number above 0");
    }
    Ok((gib * f64::from(1 << 30)) as usize)
}

/// The number type that an argument means.
pub fn dtype(arg: DTypeArg) -> DType {
    match arg {
        DTypeArg::F32 => DType::F32,
        DTypeArg::Bf16 => DType::Bf16,
    }
}

/// The model that the arguments name, with its adapter attached.
///
/// # Errors
/// [`Misuse`] for a folder that does not exist; otherwise what the checkpoint's reader says.
pub fn model(args: &ModelArgs) -> Result<Model> {
    let device = device(&args.device.device)?;
    folder(&args.model)?;
    let mut model = Model::load(&args.model, dtype(args.dtype))
        .with_context(|| format!("loading {}", args.model.display()))?;
    if let Some(adapter) = &args.adapter {
        folder(adapter)?;
        model
            .load_adapter(adapter)
            .with_context(|| format!("loading adapter {}", adapter.display()))?;
    }
    Ok(model.to_device(device)?)
}

/// Checks that a folder named on the command line is there.
///
/// # Errors
/// [`Misuse`] if it is not.
pub fn folder(path: &Path) -> Result<()> {
    if !path.is_dir() {
        misuse!(
            "{} is no folder; expected a Hugging Face folder (config.json, *.safetensors) or a PEFT adapter",
            path.display()
        );
    }
    Ok(())
}

/// An error of weights, with the checkpoint to go back to where they are no numbers and lie in a run's folder.
pub fn with_last_good(error: model::Error, weights: &Path) -> anyhow::Error {
    let run = weights.parent();
    let good = match &error {
        model::Error::NotFinite { .. } => run.and_then(train::last_finite),
        _ => None,
    };
    let error = anyhow::Error::new(error);
    match good {
        Some(folder) => error.context(format!(
            "the weights in {} are of no use; the last good checkpoint is {}",
            weights.display(),
            folder.display()
        )),
        None => error,
    }
}

/// The tokenizer of a model's folder, if it has one: data that comes as ids needs none.
///
/// # Errors
/// One that cannot be read.
pub fn tokenizer(dir: &Path) -> Result<Option<Tokenizer>> {
    let has_one = dir.join("tokenizer.json").exists();
    Ok(has_one.then(|| Tokenizer::load(dir)).transpose()?)
}

/// The way from conversations to ids of a model's folder, and of an adapter on top.
///
/// # Errors
/// No tokenizer, or one or a template that cannot be read.
pub fn chat_encoder(dir: &Path, adapter: Option<&Path>) -> Result<ChatEncoder> {
    ChatEncoder::load(dir, adapter)
        .with_context(|| format!("loading tokenizer and chat template of {}", dir.display()))
}

/// The template that a folder brings itself.
///
/// # Errors
/// One that cannot be read.
pub fn own_template(dir: &Path) -> Result<Option<ChatTemplate>> {
    match ChatTemplate::load(dir) {
        Err(text::Error::NoChatTemplate { .. }) => Ok(None),
        template => Ok(Some(template.with_context(|| {
            format!("loading the chat template of {}", dir.display())
        })?)),
    }
}

/// Copies what a model's folder holds beside weights and configuration: tokenizer, template, generation settings, persona, the record of
/// what it was trained on. `trained_on` replaces that record, where the weights have learned more since.
/// What was trained carries the template of training, whichever its base came with.
///
/// # Errors
/// Names the file that cannot be copied.
pub fn copy_companions(from: &Path, to: &Path, trained_on: Option<&TrainedRows>) -> Result<()> {
    model::checkpoint::copy_companions(from, to)?;
    if let Some(persona) = Persona::read(from)? {
        persona.write(to)?;
    }
    let of_base = of_eval(TrainedRows::read(from))?;
    if let Some(rows) = trained_on.or(of_base.as_ref()) {
        rows.write(to)?;
        ChatTemplate::history_stable()?.save(to)?;
    }
    Ok(())
}
