//! The model as a Hugging Face folder: reading, and writing back what was read.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use kernel::{DType, Device, Tensor};
use safetensors::Dtype;

use crate::checkpoint::{self, Checkpoint, Planned, SaveOptions, View, Writer};
use crate::config::{Config, Form};
use crate::quant::fp8_block;
use crate::{Error, Result};

use super::{Kind, Model, names, table};

impl Model {
    /// Reads a Hugging Face folder: `config.json`, one or several safetensors, nested (`model.language_model.*`) or text-only (`model.*`)
    /// names, tied or untied head. Block-quantized FP8 weights are dequantized to `dtype`. `visual` and `mtp` tensors stay mapped, to be
    /// carried through [`Model::save`] byte for byte; do not change the folder's files in place while the model lives.
    ///
    /// # Errors
    /// A missing or unreadable file, another architecture, a tensor that is missing, unexpected, of another shape or of an unreadable type.
    pub fn load(dir: &Path, dtype: DType) -> Result<Self> {
        let config = Config::load(dir)?;
        let source = Checkpoint::open(dir)?;
        let form = names::form_of(|name| source.get(name).is_some(), config.form);
        // 1. what config.json asks for is in the files, before memory is taken for it
        check_shapes(&source, form, &config)?;
        // 2. the weights
        let mut model = Model::zeros(config, dtype);
        let mut known = HashSet::new();
        for (row, parameter) in model.parameters_mut() {
            let name = names::full(form, &row.name);
            let view = source.require(&name)?;
            parameter.tensor = read(&source, &name, view, parameter.tensor.dtype())?;
            parameter.disk = match view.dtype {
                Dtype::BF16 | Dtype::F8_E4M3 => DType::Bf16,
                _ => DType::F32,
            };
            known.insert(name);
        }
        // 3. and nothing else
        refuse_unexpected(&source, &known, model.config.tie_word_embeddings)?;
        check_head(&source, &model.config)?;
        model.source = Some(Arc::new(source));
        Ok(model)
    }

    /// Writes the folder that [`Model::load`] reads, each tensor in the type that it was read in unless `dtype` says otherwise
    /// (then `A_log` and the gated norms stay f32, as released). Shards of at most 5 GB. See [`Model::save_with`].
    ///
    /// # Errors
    /// As [`Model::save_with`].
    pub fn save(&self, dir: &Path, dtype: Option<DType>) -> Result<()> {
        self.save_with(
            dir,
            &SaveOptions {
                dtype,
                ..SaveOptions::default()
            },
        )
    }

    /// As [`Model::save`], with all options. Everything is written beside `dir`, flushed, then renamed into place.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::UnmergedAdapter`] while LoRA is attached.
    pub fn save_with(&self, dir: &Path, options: &SaveOptions) -> Result<()> {
        if self.lora.is_some() {
            return Err(Error::UnmergedAdapter);
        }
        let parameters: Vec<(String, &Tensor, DType)> = self
            .parameters()
            .into_iter()
            .map(|(row, parameter)| {
                let dtype = match options.dtype {
                    Some(_) if row.kind == Kind::PlainF32 => DType::F32,
                    Some(dtype) => dtype,
                    None => parameter.disk,
                };
                let full = names::full(self.config.form, &row.name);
                (full, &parameter.tensor, dtype)
            })
            .collect();
        let carried = self.carried();

        let planned = parameters.iter().map(|(name, tensor, dtype)| Planned {
            name: name.clone(),
            dtype: checkpoint::file_dtype(*dtype),
            shape: tensor.shape().to_vec(),
        });
        let planned_carried = carried.iter().map(|(name, view)| Planned {
            name: (*name).to_owned(),
            dtype: plain(view.dtype),
            shape: view.shape.to_vec(),
        });
        let mut writer = Writer::create(
            dir,
            "model",
            planned.chain(planned_carried).collect(),
            options.max_shard_bytes,
        )?;
        for (name, tensor, dtype) in parameters {
            writer.put(&name, &checkpoint::to_bytes(tensor, dtype)?)?;
        }
        for (name, view) in carried {
            match (view.dtype, &self.source) {
                (Dtype::F8_E4M3, Some(source)) => {
                    let tensor = read(source, name, view, DType::Bf16)?;
                    writer.put(name, &checkpoint::to_bytes(&tensor, DType::Bf16)?)?;
                }
                _ => writer.put(name, view.bytes)?,
            }
        }
        writer.put_json("config.json", &self.config.json_for(options.dtype))?;
        writer.commit()
    }

    /// Refuses weights that no model has, before they are written for others to use.
    ///
    /// # Errors
    /// [`Error::NotFinite`] with the first tensor that holds NaN or infinities; [`Error::Kernel`] if the GPU failed.
    pub fn check_finite(&self) -> Result<()> {
        for (row, parameter) in self.parameters() {
            self.check_tensor(&parameter.tensor, || {
                names::full(self.config.form, &row.name)
            })?;
        }
        if self.lora.is_some() {
            self.check_trainable_finite()?;
        }
        match self
            .carried()
            .into_iter()
            .find(|(_, view)| !checkpoint::view_is_finite(*view))
        {
            Some((name, _)) => Err(Error::NotFinite {
                name: name.to_owned(),
                place: "carried through from the base".to_owned(),
            }),
            None => Ok(()),
        }
    }

    /// As [`Model::check_finite`], of what is trained alone: the weights, or the adapter beside them.
    ///
    /// # Errors
    /// As [`Model::check_finite`].
    pub fn check_trainable_finite(&self) -> Result<()> {
        let tensors = self.trainable_names().into_iter().zip(self.trainable());
        for (name, tensor) in tensors {
            self.check_tensor(tensor, || name)?;
        }
        Ok(())
    }

    fn check_tensor(&self, tensor: &Tensor, name: impl FnOnce() -> String) -> Result<()> {
        let finite = match self.device {
            Device::Cpu => checkpoint::is_finite(tensor),
            Device::Cuda(_) => checkpoint::is_finite(&tensor.to_device(Device::Cpu)?),
        };
        match finite {
            true => Ok(()),
            false => Err(Error::NotFinite {
                name: name(),
                place: "in memory, before it is written".to_owned(),
            }),
        }
    }

    /// Tensors that go through unread. Quantized ones lose their scales, because the saved config states no quantization.
    fn carried(&self) -> Vec<(&str, View<'_>)> {
        let Some(source) = &self.source else {
            return Vec::new();
        };
        source
            .names()
            .filter(|name| names::is_carried(name) && fp8_block::scaled_weight(name).is_none())
            .filter_map(|name| Some((name, source.get(name)?)))
            .collect()
    }
}

/// Holds the shape of every weight against the one in the files.
///
/// # Errors
/// [`Error::MissingTensor`], [`Error::TensorShape`].
fn check_shapes(source: &Checkpoint, form: Form, config: &Config) -> Result<()> {
    for row in table::rows(config) {
        let name = names::full(form, &row.name);
        let view = source.require(&name)?;
        if view.shape != row.shape {
            return Err(Error::TensorShape {
                path: source.path_of(&name),
                expected: row.shape,
                got: view.shape.to_vec(),
                name,
            });
        }
    }
    Ok(())
}

/// A tensor of any readable type as one of `dtype`.
fn read(source: &Checkpoint, name: &str, view: View, dtype: DType) -> Result<Tensor> {
    let tensor = match view.dtype {
        Dtype::F8_E4M3 => Some(fp8_block::read(source, name, view, dtype)?),
        _ => checkpoint::to_tensor(view, dtype),
    };
    tensor.ok_or_else(|| Error::TensorType {
        name: name.to_owned(),
        path: source.path_of(name),
        dtype: view.dtype.to_string(),
    })
}

/// The type a carried tensor is saved in.
fn plain(dtype: Dtype) -> Dtype {
    match dtype {
        Dtype::F8_E4M3 => Dtype::BF16,
        other => other,
    }
}

/// Whether there is one head: a head of its own in a folder that says tied is the embedding once more, to the bit.
///
/// # Errors
/// [`Error::TwoHeads`]; [`Error::MissingTensor`] without an embedding.
pub(crate) fn check_head(source: &Checkpoint, config: &Config) -> Result<()> {
    let own = source.get(names::HEAD);
    let (true, Some(own)) = (config.tie_word_embeddings, own) else {
        return Ok(());
    };
    let form = names::form_of(|name| source.get(name).is_some(), config.form);
    let table_name = names::full(form, names::EMBEDDING);
    let table = source.require(&table_name)?;
    let is_same = own.shape == table.shape
        && match own.dtype == table.dtype {
            true => own.bytes == table.bytes,
            false => {
                read(source, names::HEAD, own, DType::F32)?
                    == read(source, &table_name, table, DType::F32)?
            }
        };
    match is_same {
        true => Ok(()),
        false => Err(Error::TwoHeads {
            dir: source.dir().to_owned(),
        }),
    }
}

/// Anything that is no weight, no weight's scale and not carried would be lost in silence, and may change what the model computes.
fn refuse_unexpected(source: &Checkpoint, known: &HashSet<String>, tied: bool) -> Result<()> {
    let unexpected = source.names().find(|name| {
        let scale_of_known = fp8_block::scaled_weight(name).is_some_and(|w| known.contains(w));
        let tied_head = tied && *name == names::HEAD;
        !(known.contains(*name) || names::is_carried(name) || scale_of_known || tied_head)
    });
    match unexpected {
        Some(name) => Err(Error::UnexpectedTensor {
            name: name.to_owned(),
            path: source.path_of(name),
        }),
        None => Ok(()),
    }
}
