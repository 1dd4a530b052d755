//! The table of weights: one line says a weight's name, shape, kind and first values, and allocation, checkpoints, FP8 and the memory
//! plan follow from it.

use kernel::DType;

use crate::config::CONV_WIDTH;
use crate::random;

/// A line of the table.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Row {
    /// Below the layer; below the text model once [`super::table::rows`] has put the layer before it.
    pub name: String,
    pub shape: Vec<usize>,
    pub kind: Kind,
    pub initial: Initial,
}

impl Row {
    /// The storage type in a model of `dtype`.
    pub fn dtype(&self, dtype: DType) -> DType {
        match self.kind {
            Kind::PlainF32 => DType::F32,
            _ => dtype,
        }
    }

    /// The linear layer that this is the weight of; None for norms, convolutions and tables.
    pub fn linear(&self) -> Option<&str> {
        match self.kind {
            Kind::Linear | Kind::QuantizedLinear => self.name.strip_suffix(".weight"),
            Kind::Plain | Kind::PlainF32 => None,
        }
    }
}

/// What a weight is to the rest of the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A norm, a convolution, a bias or a table.
    Plain,
    /// As `Plain`, held in f32 whatever the model's type, as released checkpoints have it.
    PlainF32,
    /// A linear layer without bias, which an adapter may stand beside.
    Linear,
    /// As `Linear`, and quantized by the FP8_BLOCK recipe.
    QuantizedLinear,
}

/// How a fresh weight is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Initial {
    /// normal(0, initializer_range): matrices and the embedding.
    Normal,
    /// uniform(±1/√4), torch's default for a convolution of width 4: a start near 0 would leave the delta rule without values.
    Convolution,
    /// ln uniform(0, 16)
    ALog,
    /// Gated norms and dt_bias.
    One,
    /// Norms that scale by 1 + w.
    Zero,
}

impl Initial {
    /// Element `i` of the weight with number `stream`; `std` is the config's `initializer_range`.
    pub fn value(self, std: f64, seed: u64, stream: u64, i: u64) -> f32 {
        let value = match self {
            Initial::Normal => random::normal(seed, stream, i) * std,
            Initial::Convolution => {
                (2.0 * random::uniform(seed, stream, i) - 1.0) / (CONV_WIDTH as f64).sqrt()
            }
            // The open interval keeps the logarithm finite.
            Initial::ALog => (16.0 * random::uniform(seed, stream, i)).ln(),
            Initial::One => 1.0,
            Initial::Zero => 0.0,
        };
        value as f32
    }
}

/// A weight of the model, by what it is.
#[derive(Debug)]
pub(crate) enum Part<L, P> {
    Linear(L),
    Plain(P),
}

/// Declares a struct of weights whose lines are those of the table: field, [`Kind`], checkpoint name, shape from the config `c`, and
/// [`Initial`]. The order is that of gradients and saves.
macro_rules! weights {
    (
        $(#[$about:meta])*
        $name:ident($c:ident) {
            $( $(#[$doc:meta])* $field:ident: $kind:ident $path:literal [$($dim:expr),+] $initial:ident, )+
        }
    ) => {
        $(#[$about])*
        #[derive(Debug)]
        pub(crate) struct $name {
            $( $(#[$doc])* pub $field: weights!(@type $kind), )+
        }

        impl $name {
            /// Lines of the table.
            pub fn rows($c: &crate::config::Config) -> Vec<crate::qwen3_5::weights::Row> {
                use crate::qwen3_5::weights::{Initial, Kind, Row};
                vec![ $( Row {
                    name: $path.to_owned(),
                    shape: vec![$($dim),+],
                    kind: Kind::$kind,
                    initial: Initial::$initial,
                } ),+ ]
            }

            /// All zero.
            pub fn zeros($c: &crate::config::Config, dtype: kernel::DType) -> Self {
                $name { $( $field: weights!(@zeros $kind, &[$($dim),+], dtype), )+ }
            }

            /// The weights, in the order of the table.
            pub fn parts(&self) -> Vec<crate::qwen3_5::weights::Part<&crate::linear::Linear, &crate::parameter::Parameter>> {
                vec![ $( weights!(@part $kind, &self.$field) ),+ ]
            }

            /// As `parts`, exclusively.
            pub fn parts_mut(
                &mut self,
            ) -> Vec<crate::qwen3_5::weights::Part<&mut crate::linear::Linear, &mut crate::parameter::Parameter>> {
                vec![ $( weights!(@part $kind, &mut self.$field) ),+ ]
            }
        }
    };
    (@type Plain) => { crate::parameter::Parameter };
    (@type PlainF32) => { crate::parameter::Parameter };
    (@type $linear:ident) => { crate::linear::Linear };
    (@zeros Plain, $shape:expr, $dtype:ident) => { crate::parameter::Parameter::zeros($shape, $dtype) };
    (@zeros PlainF32, $shape:expr, $dtype:ident) => { crate::parameter::Parameter::zeros($shape, kernel::DType::F32) };
    (@zeros $linear:ident, $shape:expr, $dtype:ident) => { crate::linear::Linear::zeros($shape, $dtype) };
    (@part Plain, $field:expr) => { crate::qwen3_5::weights::Part::Plain($field) };
    (@part PlainF32, $field:expr) => { crate::qwen3_5::weights::Part::Plain($field) };
    (@part $linear:ident, $field:expr) => { crate::qwen3_5::weights::Part::Linear($field) };
}
pub(crate) use weights;
