//! Low-rank adapters of a whole model: which layers get one, how it is put beside them, and how it is merged into them.

use std::path::Path;

use kernel::ops::{Write, matmul};
use kernel::{DType, Tensor};

use crate::config::Config;
use crate::linear::Linear;
use crate::lora::{Adapter, LoraConfig, Scaling};
use crate::parameter::Parameter;
use crate::{Error, Result, peft, random};

use super::table::{TensorSpec, rows};
use super::{Model, names};

impl Model {
    /// Freezes the weights and puts a low-rank adapter beside each target: A kaiming-uniform (±1/√in), B 0, so that nothing changes yet.
    ///
    /// # Errors
    /// [`Error::LoraTarget`] for a name that is no linear layer, [`Error::LoraConfig`] for a rank or dropout out of range.
    pub fn attach_lora(&mut self, lora: &LoraConfig, seed: u64) -> Result<()> {
        lora.check()?;
        let targets = known_targets(&self.config, &lora.targets)?;
        for (layer_number, (module, linear)) in self.linears_mut().into_iter().enumerate() {
            let is_target = targets.iter().any(|t| t == names::last_part(&module));
            let layer_number = layer_number as u64;
            linear.adapter = is_target.then(|| fresh(linear, lora, layer_number, seed));
        }
        self.lora = Some(LoraConfig {
            targets,
            ..lora.clone()
        });
        self.adapters_changed()
    }

    /// Attaches the adapter of a PEFT folder (`adapter_config.json`, `adapter_model.safetensors`), replacing any attached one.
    ///
    /// # Errors
    /// A missing or unreadable file; a setting of adapter_config.json that changes the arithmetic in a way that is not computed here; a
    /// tensor without its other half, of NaN or infinite numbers, or that fits no linear layer; a target without tensors.
    pub fn load_adapter(&mut self, dir: &Path) -> Result<()> {
        peft::load(self, dir)?;
        self.adapters_changed()
    }

    /// Writes the attached adapter as PEFT does; `base_name` becomes `base_model_name_or_path`.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] without an adapter, [`Error::Io`].
    pub fn save_adapter(&self, dir: &Path, base_name: &str) -> Result<()> {
        peft::save(self, dir, base_name)
    }

    /// W += scale · B A for every adapted layer; the adapter is gone and all weights train again.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] without an adapter.
    pub fn merge_lora(&mut self) -> Result<()> {
        if self.lora.take().is_none() {
            return Err(Error::NoAdapter);
        }
        for (_, linear) in self.linears_mut() {
            if let Some(adapter) = linear.adapter.take() {
                // W [O,I] += scale · B [O,R] A [R,I]: the product that backward_input makes.
                matmul::backward_input(
                    &mut linear.weight.tensor,
                    &adapter.b_or.tensor,
                    &adapter.a_ri.tensor,
                    adapter.scale(),
                    Write::Accumulate,
                )?;
            }
        }
        self.number_parameters();
        Ok(())
    }

    /// Gives new adapters their places in the scratch, their gradients, and their place beside the weights.
    fn adapters_changed(&mut self) -> Result<()> {
        let linears = self.linears_mut().into_iter();
        let adapters = linears.filter_map(|(_, linear)| linear.adapter.as_mut());
        for (place, adapter) in adapters.enumerate() {
            adapter.place = place;
        }
        self.number_parameters();
        self.move_to(self.device)
    }
}

/// A and B of every adapted layer, f32, in the order in which they train.
pub(crate) fn specs(config: &Config, lora: &LoraConfig) -> Vec<TensorSpec> {
    let is_target = |module: &str| {
        lora.targets.is_empty() || lora.targets.iter().any(|t| t == names::last_part(module))
    };
    let linears = rows(config).into_iter().filter_map(|row| {
        let module = row.linear()?.to_owned();
        Some((module, row.shape))
    });
    linears
        .filter(|(module, _)| is_target(module))
        .flat_map(|(module, shape)| {
            let part = |name: &str, shape: [usize; 2]| TensorSpec {
                name: format!("{module}.{name}.weight"),
                shape: shape.to_vec(),
                dtype: DType::F32,
            };
            [
                part("lora_A", [lora.rank, shape[1]]),
                part("lora_B", [shape[0], lora.rank]),
            ]
        })
        .collect()
}

/// A from the same range as torch's kaiming_uniform(a = √5): ±1/√in; B zero.
fn fresh(linear: &Linear, config: &LoraConfig, layer_number: u64, seed: u64) -> Adapter {
    let [n_out, n_in] = [
        linear.weight.tensor.shape()[0],
        linear.weight.tensor.shape()[1],
    ];
    let bound = 1.0 / (n_in as f64).sqrt();
    let a = (0..(config.rank * n_in) as u64)
        .map(|i| ((2.0 * random::uniform(seed, layer_number, i) - 1.0) * bound) as f32)
        .collect();
    Adapter {
        a_ri: Parameter::of(Tensor::from_f32(&[config.rank, n_in], a)),
        b_or: Parameter::zeros(&[n_out, config.rank], DType::F32),
        alpha: config.alpha,
        scaling: Scaling::Rank,
        dropout: config.dropout,
        layer_number,
        place: 0,
    }
}

/// The asked-for targets, each checked; all of them if none is named.
fn known_targets(config: &Config, asked: &[String]) -> Result<Vec<String>> {
    let mut known: Vec<String> = Vec::new();
    for row in rows(config) {
        let Some(target) = row.linear().map(names::last_part) else {
            continue;
        };
        if !known.iter().any(|k| k == target) {
            known.push(target.to_owned());
        }
    }
    if let Some(name) = asked.iter().find(|name| !known.contains(name)) {
        return Err(Error::LoraTarget {
            name: name.clone(),
            known: known.join(", "),
        });
    }
    Ok(match asked.is_empty() {
        true => known,
        false => asked.to_vec(),
    })
}
