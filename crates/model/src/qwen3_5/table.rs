//! The whole table of weights in the order of gradients and saves, beside a model and without one.

use kernel::DType;

use crate::config::Config;
use crate::linear::Linear;
use crate::parameter::Parameter;

use super::weights::{Part, Row};
use super::{Head, Model, Outer, block};

/// A weight, or a part of an adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorSpec {
    /// Below the text model, such as `layers.0.mlp.up_proj.weight`.
    pub name: String,
    /// Its dimensions, as a checkpoint has them.
    pub shape: Vec<usize>,
    /// The storage type.
    pub dtype: DType,
}

impl TensorSpec {
    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }
}

impl Config {
    /// Trainable numbers of the text model; a tied head counts once, visual and mtp tensors do not.
    pub fn n_params(&self) -> u64 {
        let rows = rows(self).into_iter();
        rows.map(|row| row.shape.iter().product::<usize>() as u64)
            .sum()
    }
}

/// Every weight of the text model, by its name below it.
pub(crate) fn rows(config: &Config) -> Vec<Row> {
    let layers = config.layer_types.iter().enumerate();
    let layers = layers.flat_map(|(layer_idx, layer_type)| {
        let rows = block::Weights::rows(*layer_type, config).into_iter();
        rows.map(move |row| Row {
            name: format!("layers.{layer_idx}.{}", row.name),
            ..row
        })
    });
    let head = match config.tie_word_embeddings {
        true => Vec::new(),
        false => Head::rows(config),
    };
    in_order(Outer::rows(config), layers.collect(), head)
}

impl Model {
    /// Every weight with its line of the table.
    pub(crate) fn parts(&self) -> Vec<(Row, Part<&Linear, &Parameter>)> {
        let layers = self.layers.iter().flat_map(block::Weights::parts);
        let head = self.head.iter().flat_map(Head::parts);
        let parts = in_order(self.outer.parts(), layers.collect(), head.collect());
        rows(&self.config).into_iter().zip(parts).collect()
    }

    /// As [`Model::parts`], exclusively.
    pub(crate) fn parts_mut(&mut self) -> Vec<(Row, Part<&mut Linear, &mut Parameter>)> {
        let rows = rows(&self.config);
        let layers = self.layers.iter_mut().flat_map(block::Weights::parts_mut);
        let head = self.head.iter_mut().flat_map(Head::parts_mut);
        let parts = in_order(self.outer.parts_mut(), layers.collect(), head.collect());
        rows.into_iter().zip(parts).collect()
    }

    /// Every weight, linear or not.
    pub(crate) fn parameters(&self) -> Vec<(Row, &Parameter)> {
        let parts = self.parts().into_iter();
        parts
            .map(|(row, part)| match part {
                Part::Linear(linear) => (row, &linear.weight),
                Part::Plain(parameter) => (row, parameter),
            })
            .collect()
    }

    /// As [`Model::parameters`], exclusively.
    pub(crate) fn parameters_mut(&mut self) -> Vec<(Row, &mut Parameter)> {
        let parts = self.parts_mut().into_iter();
        parts
            .map(|(row, part)| match part {
                Part::Linear(linear) => (row, &mut linear.weight),
                Part::Plain(parameter) => (row, parameter),
            })
            .collect()
    }

    /// Every linear layer, by module name (without `.weight`).
    pub(crate) fn linears(&self) -> Vec<(String, &Linear)> {
        let linears = self.parts().into_iter();
        linears
            .filter_map(|(row, part)| match part {
                Part::Linear(linear) => Some((row.linear()?.to_owned(), linear)),
                Part::Plain(_) => None,
            })
            .collect()
    }

    /// As [`Model::linears`], exclusively.
    pub(crate) fn linears_mut(&mut self) -> Vec<(String, &mut Linear)> {
        let linears = self.parts_mut().into_iter();
        linears
            .filter_map(|(row, part)| match part {
                Part::Linear(linear) => Some((row.linear()?.to_owned(), linear)),
                Part::Plain(_) => None,
            })
            .collect()
    }
}

/// The embedding, the layers, the last norm, and a head of its own.
fn in_order<T>(outer: Vec<T>, layers: Vec<T>, head: Vec<T>) -> Vec<T> {
    let mut outer = outer.into_iter();
    let embedding = outer.next();
    let in_order = embedding.into_iter().chain(layers).chain(outer).chain(head);
    in_order.collect()
}
