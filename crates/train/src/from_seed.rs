//! A base model from a seed: random weights, and a vocabulary learned from the texts that it will be trained on.

use std::path::Path;

use kernel::DType;
use model::{Config, Model, sizes};
use serde_json::json;
use text::{ChatTemplate, Persona, Tokenizer};

use crate::error::Result;

/// What was made.
#[derive(Debug, Clone, Copy)]
pub struct Made {
    /// Values of the model.
    pub n_params: u64,
    /// Tokens of its vocabulary.
    pub vocab_size: usize,
}

/// Writes a Hugging Face folder: a model of a size that [`sizes::config_for`] knows, a byte-level BPE trained on `texts`, the template that
/// training uses, and a note of what such a model is. The same arguments give the same bytes.
///
/// # Errors
/// A size that no model has, too few texts for its vocabulary, or a folder that cannot be written.
pub fn make(folder: &Path, size: &str, seed: u64, texts: &[String]) -> Result<Made> {
    let tokenizer = Tokenizer::train(
        texts.iter().map(String::as_str),
        sizes::vocabulary(size) - text::ADDED_TOKENS.len(),
    )?;
    let json = sizes::config_for(size, tokenizer.vocab_size(), tokenizer.eos());
    let json = json.ok_or_else(|| model::Error::NoSize {
        known: sizes::names(),
    })?;
    let dtype = match size {
        sizes::TINY => DType::F32,
        _ => DType::Bf16,
    };
    let model = Model::init(Config::from_json(&json)?, seed, dtype);
    model.save(folder, None)?;
    tokenizer.save(folder, &ChatTemplate::history_stable()?)?;
    note(model.config().n_params()).write(folder)?;
    let generation = json!({ "eos_token_id": tokenizer.end_ids(), "do_sample": true, "temperature": 0.5, "top_p": 0.8, "top_k": 20 });
    files::write(
        &folder.join("generation_config.json"),
        format!("{generation:#}").as_bytes(),
    )?;
    Ok(Made {
        n_params: model.config().n_params(),
        vocab_size: tokenizer.vocab_size(),
    })
}

/// A plain sentence on a model from a seed, which training keeps.
fn note(n_params: u64) -> Persona {
    let millions = n_params as f64 / 1e6;
    let en = format!(
        "A model of {millions:.1} million parameters that has read nothing but the story: it imitates the story's wording and understands nothing."
    );
    let chs = format!(
        "这是一个约 {:.0} 万参数、只读过这个故事的模型：它模仿故事里的词句，并不理解任何事。",
        n_params as f64 / 1e4
    );
    Persona {
        note: [("en".to_owned(), en), ("chs".to_owned(), chs)].into(),
        ..Persona::default()
    }
}
