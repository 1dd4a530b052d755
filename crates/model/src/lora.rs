//! Low-rank adapters on linear layers, read and written as PEFT does.
// T tokens, I in features, O out features, R rank.

use std::collections::BTreeMap;
use std::path::Path;

use kernel::cuda::footprint;
use kernel::ops::dropout::Dropout;
use kernel::ops::{low_rank, matmul};
use kernel::{DType, Device, Tensor};
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::checkpoint::{self, Checkpoint, Planned, Writer};
use crate::config::{Config, read_json};
use crate::linear::Linear;
use crate::parameter::{Gradients, Parameter};
use crate::qwen3_5::{Qwen3_5, memory, names};
use crate::{Error, Result, random};

/// Settings of an adapter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraConfig {
    /// Columns of B and rows of A.
    pub rank: usize,
    /// The update is scaled by alpha / rank.
    pub alpha: f32,
    /// Share of A's inputs that are zeroed in training; the rest is scaled up.
    #[serde(default)]
    pub dropout: f32,
    /// Last parts of module names, such as `q_proj`; empty: every linear layer of the text model but the head.
    #[serde(default)]
    pub targets: Vec<String>,
}

/// The adapter of one linear layer: y += scale · dropout(x) Aᵀ Bᵀ.
#[derive(Debug)]
pub(crate) struct Adapter {
    /// A [R,I] f32
    pub a_ri: Parameter,
    /// B [O,R] f32
    pub b_or: Parameter,
    pub scale: f32,
    pub dropout: f32,
    /// The layer's number, so that no two layers drop the same pattern.
    pub layer_number: u64,
}

/// What the adapters of one pass share.
#[derive(Debug)]
pub(crate) struct Scratch {
    /// Seed of a training pass's dropout; None: nothing is dropped, and nothing kept for backward.
    pub dropout_seed: Option<u64>,
    dtype: DType,
    device: Device,
    /// dropout(x) Aᵀ [T,R] of each layer by its number, kept from forward to backward; without training all layers use the first.
    u_tr: Vec<Tensor>,
    /// Its gradient [T,R].
    d_u_tr: Tensor,
}

impl Scratch {
    /// f32 on the CPU; on a GPU the model's type, whose products are many times faster there.
    pub fn new(dtype: DType, device: Device) -> Self {
        let dtype = match device {
            Device::Cpu => DType::F32,
            Device::Cuda(_) => dtype,
        };
        Scratch {
            dropout_seed: None,
            dtype,
            device,
            u_tr: Vec::new(),
            d_u_tr: Tensor::empty_on(device, dtype),
        }
    }

    pub fn bytes(&self) -> usize {
        let tensors = self.u_tr.iter().chain([&self.d_u_tr]);
        tensors.map(|tensor| footprint(tensor.bytes())).sum()
    }

    /// Bytes on a GPU once every layer has had its turn: one [T,R] for each adapter, and one gradient.
    pub fn bytes_for(config: &Config, lora: &LoraConfig, n_tokens: usize, dtype: DType) -> usize {
        let n_adapters = memory::adapters(config, lora).len() / 2;
        (n_adapters + 1) * footprint(n_tokens * lora.rank * dtype.size())
    }

    /// Allocates what a training pass over `n_tokens` needs.
    ///
    /// # Errors
    /// [`Error::Kernel`] if the GPU has no room.
    pub fn reserve(&mut self, config: &Config, lora: &LoraConfig, n_tokens: usize) -> Result<()> {
        self.make_places(memory::adapters(config, lora).len() / 2);
        for tensor in self.u_tr.iter_mut().chain([&mut self.d_u_tr]) {
            tensor.resize(&[n_tokens, lora.rank])?;
        }
        Ok(())
    }

    fn make_places(&mut self, n: usize) {
        let n = n.max(self.u_tr.len());
        let empty = || Tensor::empty_on(self.device, self.dtype);
        self.u_tr.resize_with(n, empty);
    }
}

impl Adapter {
    /// y_to assigned.
    pub fn forward(&self, y_to: &mut Tensor, x_ti: &Tensor, scratch: &mut Scratch) -> Result<()> {
        let u_tr = self.down(x_ti, scratch)?;
        low_rank::up_forward(y_to, u_tr, &self.b_or.tensor, self.scale)?;
        Ok(())
    }

    /// y_to added to.
    pub fn forward_residual(
        &self,
        y_to: &mut Tensor,
        x_ti: &Tensor,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let u_tr = self.down(x_ti, scratch)?;
        low_rank::up_forward_residual(y_to, u_tr, &self.b_or.tensor, self.scale)?;
        Ok(())
    }

    /// d_x_ti assigned; gradients of A and B are added up in `grads`. Needs what forward kept of the same x under the same seed.
    pub fn backward(
        &self,
        d_x_ti: &mut Tensor,
        grads: &mut Gradients,
        d_y_to: &Tensor,
        x_ti: &Tensor,
        scratch: &mut Scratch,
    ) -> Result<()> {
        self.up_backward(grads, d_y_to, scratch)?;
        low_rank::down_backward(
            d_x_ti,
            grads.of(&self.a_ri),
            &scratch.d_u_tr,
            x_ti,
            &self.a_ri.tensor,
            self.drops(scratch).as_ref(),
        )?;
        Ok(())
    }

    /// As `backward`, with d_x_ti added to.
    pub fn backward_residual(
        &self,
        d_x_ti: &mut Tensor,
        grads: &mut Gradients,
        d_y_to: &Tensor,
        x_ti: &Tensor,
        scratch: &mut Scratch,
    ) -> Result<()> {
        self.up_backward(grads, d_y_to, scratch)?;
        low_rank::down_backward_residual(
            d_x_ti,
            grads.of(&self.a_ri),
            &scratch.d_u_tr,
            x_ti,
            &self.a_ri.tensor,
            self.drops(scratch).as_ref(),
        )?;
        Ok(())
    }

    /// dropout(x) Aᵀ, at its place in the scratch.
    fn down<'a>(&self, x_ti: &Tensor, scratch: &'a mut Scratch) -> Result<&'a Tensor> {
        let [rank, n_in] = [self.a_ri.tensor.shape()[0], self.a_ri.tensor.shape()[1]];
        let drops = self.drops(scratch);
        let place = match scratch.dropout_seed {
            Some(_) => self.layer_number as usize,
            None => 0,
        };
        scratch.make_places(place + 1);
        let u_tr = &mut scratch.u_tr[place];
        u_tr.resize(&[x_ti.numel() / n_in, rank])?;
        low_rank::down_forward(u_tr, x_ti, &self.a_ri.tensor, drops.as_ref())?;
        Ok(u_tr)
    }

    /// The gradient of `down`'s result, and that of B.
    fn up_backward(
        &self,
        grads: &mut Gradients,
        d_y_to: &Tensor,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let u_tr = &scratch.u_tr[self.layer_number as usize];
        scratch.d_u_tr.resize(u_tr.shape())?;
        low_rank::up_backward(
            &mut scratch.d_u_tr,
            grads.of(&self.b_or),
            d_y_to,
            u_tr,
            &self.b_or.tensor,
            self.scale,
        )?;
        Ok(())
    }

    /// What this layer drops in the pass.
    fn drops(&self, scratch: &Scratch) -> Option<Dropout> {
        let seed = scratch.dropout_seed.filter(|_| self.dropout > 0.0)?;
        Some(Dropout {
            rate: self.dropout,
            seed,
            stream: self.layer_number,
        })
    }
}

/// See [`crate::Model::attach_lora`].
pub(crate) fn attach(model: &mut Qwen3_5, config: &LoraConfig, seed: u64) -> Result<()> {
    check_range(config)?;
    let targets = resolve_targets(model, &config.targets)?;
    for (layer_number, (name, linear)) in names::linears_mut(model).into_iter().enumerate() {
        let stream = layer_number as u64;
        linear.adapter = targets
            .iter()
            .any(|target| *target == names::last_part(&name))
            .then(|| fresh(linear, config, stream, seed));
    }
    model.lora = Some(LoraConfig {
        targets,
        ..config.clone()
    });
    model.number_parameters();
    Ok(())
}

/// See [`crate::Model::load_adapter`].
pub(crate) fn load(model: &mut Qwen3_5, dir: &Path) -> Result<()> {
    let json_path = dir.join("adapter_config.json");
    if !json_path.is_file() {
        return Err(Error::NoModel {
            dir: dir.to_owned(),
            missing: "adapter_config.json".to_owned(),
        });
    }
    let (config, scale) = read_config(&read_json(&json_path)?, dir)?;
    let file = Checkpoint::open_files(dir, &["adapter_model.safetensors".to_owned()])?;

    // Module name below the text model -> (A, B).
    let mut found: BTreeMap<String, (Tensor, Tensor)> = BTreeMap::new();
    for name in file.names() {
        let Some(module) = names::adapted_module(name) else {
            if names::is_lora_b(name) {
                continue;
            }
            return Err(adapter_error(
                dir,
                format!("tensor `{name}` is no lora_A or lora_B"),
            ));
        };
        let a = read(&file, name)?;
        let b = read(&file, &names::lora_b_beside(name))?;
        found.insert(module, (a, b));
    }

    let mut targets = Vec::new();
    for (layer_number, (name, linear)) in names::linears_mut(model).into_iter().enumerate() {
        linear.adapter = None;
        let Some((a, b)) = found.remove(&name) else {
            continue;
        };
        let [n_out, n_in] = [
            linear.weight.tensor.shape()[0],
            linear.weight.tensor.shape()[1],
        ];
        if a.shape() != [config.rank, n_in] || b.shape() != [n_out, config.rank] {
            return Err(adapter_error(
                dir,
                format!(
                    "`{name}` has A {:?} and B {:?} for a weight [{n_out}, {n_in}] and rank {}",
                    a.shape(),
                    b.shape(),
                    config.rank
                ),
            ));
        }
        linear.adapter = Some(Adapter {
            a_ri: parameter(a),
            b_or: parameter(b),
            scale,
            dropout: config.dropout,
            layer_number: layer_number as u64,
        });
        let target = names::last_part(&name).to_owned();
        if !targets.contains(&target) {
            targets.push(target);
        }
    }
    if let Some(name) = found.keys().next() {
        return Err(adapter_error(
            dir,
            format!("`{name}` is no linear layer of this model"),
        ));
    }
    model.lora = Some(LoraConfig { targets, ..config });
    model.number_parameters();
    Ok(())
}

/// See [`crate::Model::save_adapter`].
pub(crate) fn save(model: &Qwen3_5, dir: &Path, base_name: &str) -> Result<()> {
    let lora = model.lora.as_ref().ok_or(Error::NoAdapter)?;
    let tensors: Vec<(String, &Tensor)> = model
        .trainable_names()
        .into_iter()
        .zip(model.trainable())
        .collect();
    let planned = tensors
        .iter()
        .map(|(name, tensor)| Planned {
            name: name.clone(),
            dtype: Dtype::F32,
            shape: tensor.shape().to_vec(),
        })
        .collect();
    let mut writer = Writer::create(dir, "adapter_model", planned, u64::MAX)?;
    for (name, tensor) in &tensors {
        writer.put(name, &checkpoint::to_bytes(tensor, DType::F32)?)?;
    }
    let target_modules = names::target_pattern(model.config.form, &lora.targets);
    writer.put_json(
        "adapter_config.json",
        &config_json(lora, base_name, &target_modules),
    )?;
    writer.commit()
}

/// See [`crate::Model::merge_lora`].
pub(crate) fn merge(model: &mut Qwen3_5) -> Result<()> {
    if model.lora.take().is_none() {
        return Err(Error::NoAdapter);
    }
    for (_, linear) in names::linears_mut(model) {
        if let Some(adapter) = linear.adapter.take() {
            // W [O,I] += scale · B [O,R] A [R,I]: the product that backward_input makes.
            matmul::backward_input_residual(
                &mut linear.weight.tensor,
                &adapter.b_or.tensor,
                &adapter.a_ri.tensor,
                adapter.scale,
            )?;
        }
    }
    model.number_parameters();
    Ok(())
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
        a_ri: parameter(Tensor::from_f32(&[config.rank, n_in], a)),
        b_or: Parameter::zeros(&[n_out, config.rank], DType::F32),
        scale: config.alpha / config.rank as f32,
        dropout: config.dropout,
        layer_number,
    }
}

fn parameter(tensor: Tensor) -> Parameter {
    Parameter {
        tensor,
        disk: DType::F32,
        slot: None,
    }
}

fn check_range(config: &LoraConfig) -> Result<()> {
    if config.rank == 0 {
        return Err(Error::LoraConfig {
            key: "rank",
            value: 0.0,
            expected: "give 1 or more",
        });
    }
    if !(0.0..1.0).contains(&config.dropout) {
        return Err(Error::LoraConfig {
            key: "dropout",
            value: f64::from(config.dropout),
            expected: "give 0 or more, less than 1",
        });
    }
    Ok(())
}

/// The asked-for targets, each checked; all of them if none is named.
fn resolve_targets(model: &Qwen3_5, asked: &[String]) -> Result<Vec<String>> {
    let mut known: Vec<String> = Vec::new();
    for (name, _) in names::linears(model) {
        let target = names::last_part(&name);
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
    Ok(if asked.is_empty() {
        known
    } else {
        asked.to_vec()
    })
}

fn read(file: &Checkpoint, name: &str) -> Result<Tensor> {
    let view = file.require(name)?;
    checkpoint::to_tensor(view, DType::F32).ok_or_else(|| Error::TensorType {
        name: name.to_owned(),
        path: file.path_of(name),
        dtype: view.dtype.to_string(),
    })
}

/// Settings and scale out of PEFT's JSON; targets are taken from the tensors instead.
fn read_config(json: &Value, dir: &Path) -> Result<(LoraConfig, f32)> {
    let kind = json.get("peft_type").and_then(Value::as_str);
    if kind != Some("LORA") {
        return Err(adapter_error(dir, format!("peft_type is {kind:?}")));
    }
    for key in ["use_dora", "lora_bias", "use_qalora"] {
        if json.get(key).and_then(Value::as_bool) == Some(true) {
            return Err(adapter_error(dir, format!("{key} is on")));
        }
    }
    for key in ["rank_pattern", "alpha_pattern", "layer_replication"] {
        let plain = match json.get(key) {
            None | Some(Value::Null) => true,
            Some(Value::Object(map)) => map.is_empty(),
            Some(_) => false,
        };
        if !plain {
            return Err(adapter_error(dir, format!("{key} is set")));
        }
    }
    let number = |key: &str| {
        json.get(key)
            .and_then(Value::as_f64)
            .ok_or_else(|| adapter_error(dir, format!("`{key}` is missing")))
    };
    let rank = number("r")? as usize;
    let alpha = number("lora_alpha")? as f32;
    let config = LoraConfig {
        rank,
        alpha,
        dropout: number("lora_dropout").unwrap_or(0.0) as f32,
        targets: Vec::new(),
    };
    check_range(&config)?;
    let by_root = json.get("use_rslora").and_then(Value::as_bool) == Some(true);
    let divisor = if by_root {
        (rank as f32).sqrt()
    } else {
        rank as f32
    };
    Ok((config, alpha / divisor))
}

/// What PEFT 0.21 writes for plain LoRA.
fn config_json(lora: &LoraConfig, base_name: &str, target_modules: &str) -> Value {
    let alpha: Value = if lora.alpha.fract() == 0.0 {
        (lora.alpha as i64).into()
    } else {
        f64::from(lora.alpha).into()
    };
    // Shortest decimal that reads back as the same f32: 0.05 rather than 0.05000000074505806.
    let dropout: f64 = lora.dropout.to_string().parse().unwrap_or(0.0);
    json!({
        "alora_invocation_tokens": null,
        "alpha_pattern": {},
        "arrow_config": null,
        "auto_mapping": null,
        "base_model_name_or_path": base_name,
        "bias": "none",
        "corda_config": null,
        "ensure_weight_tying": false,
        "eva_config": null,
        "exclude_modules": null,
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "kasa_config": null,
        "layer_replication": null,
        "layers_pattern": null,
        "layers_to_transform": null,
        "loftq_config": {},
        "lora_alpha": alpha,
        "lora_bias": false,
        "lora_dropout": dropout,
        "lora_ga_config": null,
        "megatron_config": null,
        "megatron_core": "megatron.core",
        "modules_to_save": null,
        "monteclora_config": null,
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "qalora_group_size": 16,
        "r": lora.rank,
        "rank_pattern": {},
        "revision": null,
        "target_modules": target_modules,
        "target_parameters": null,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": null,
        "use_bdlora": null,
        "use_dora": false,
        "use_qalora": false,
        "use_rslora": false,
        "velora_config": null
    })
}

fn adapter_error(dir: &Path, problem: String) -> Error {
    Error::Adapter {
        dir: dir.to_owned(),
        problem,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapter(dropout: f32) -> Adapter {
        let values = |n: usize, stream| {
            (0..n)
                .map(|i| random::normal(11, stream, i as u64) as f32)
                .collect()
        };
        let mut a_ri = parameter(Tensor::from_f32(&[3, 40], values(120, 0)));
        let mut b_or = parameter(Tensor::from_f32(&[7, 3], values(21, 1)));
        a_ri.slot = Some(0);
        b_or.slot = Some(1);
        Adapter {
            a_ri,
            b_or,
            scale: 2.0,
            dropout,
            layer_number: 5,
        }
    }

    fn normals(shape: &[usize], stream: u64) -> Tensor {
        let n: usize = shape.iter().product();
        Tensor::from_f32(
            shape,
            (0..n as u64)
                .map(|i| random::normal(3, stream, i) as f32)
                .collect(),
        )
    }

    #[test]
    fn backward_recomputes_the_forward_mask() {
        // <d_y, y(x)> is linear in x, so it equals <d_x, x> exactly when both passes drop the same inputs.
        let adapter = adapter(0.5);
        let x = normals(&[9, 40], 1);
        let d_y = normals(&[9, 7], 2);
        let mut scratch = Scratch {
            dropout_seed: Some(99),
            ..Scratch::new(DType::F32, Device::Cpu)
        };
        let mut y = Tensor::zeros(&[9, 7], DType::F32);
        adapter.forward_residual(&mut y, &x, &mut scratch).unwrap();
        let mut d_x = Tensor::zeros(&[9, 40], DType::F32);
        let tensors = vec![
            Tensor::zeros(&[3, 40], DType::F32),
            Tensor::zeros(&[7, 3], DType::F32),
        ];
        let mut grads = Gradients::new(tensors, vec![false; 2]);
        adapter
            .backward_residual(&mut d_x, &mut grads, &d_y, &x, &mut scratch)
            .unwrap();
        let dot = |a: &Tensor, b: &Tensor| -> f64 {
            std::iter::zip(a.f32s(), b.f32s())
                .map(|(a, b)| f64::from(*a) * f64::from(*b))
                .sum()
        };
        let through_y = dot(&d_y, &y);
        for through in [
            dot(&d_x, &x),
            dot(&grads.tensors[0], &adapter.a_ri.tensor),
            dot(&grads.tensors[1], &adapter.b_or.tensor),
        ] {
            assert!(
                (through - through_y).abs() < 1e-3 * through_y.abs(),
                "{through} {through_y}"
            );
        }
        assert!(y.f32s().iter().any(|v| *v != 0.0));
    }
}
