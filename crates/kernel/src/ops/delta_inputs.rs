//! What the delta rule takes, from the projected row in one pass: q and k convolved, passed through SiLU and l2-normalised head by
//! head (q scaled too), v convolved and passed through SiLU. One pass because on a GPU the memory traffic is all it costs.
//!
//! Forward is the same as [`causal_conv1d`], [`super::split::qkv`] and [`super::l2_norm`] one after the other, on the CPU to the
//! bit; a GPU does not round to the storage type in between. Backward convolves again rather than keep what lies between.

// T tokens (packed), G key heads, K key dim, H value heads, V value dim, C = 2·G·K + H·V channels: q, then k, then v.

use super::{causal_conv1d, check};
use crate::cuda::DeviceProperties;
use crate::{Device, Result, Tensor};

/// What both passes read.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// Queries, keys and values as they were projected [T,C].
    pub qkv_tc: &'a Tensor,
    /// The convolution's filter [C,1,4].
    pub w: &'a Tensor,
    /// Document boundaries: n_docs + 1 offsets, from 0 to T.
    pub cu_seqlens: &'a [u32],
    /// What q is multiplied by.
    pub q_scale: f32,
}

/// What forward gives, all assigned.
#[derive(Debug)]
pub struct Outputs<'a> {
    /// [T,G,K]
    pub q_tgk: &'a mut Tensor,
    /// [T,G,K]
    pub k_tgk: &'a mut Tensor,
    /// [T,H,V]
    pub v_thv: &'a mut Tensor,
    /// Over the norm of q's heads [T,G] f32.
    pub q_rstd_tg: &'a mut Tensor,
    /// Over the norm of k's heads [T,G] f32.
    pub k_rstd_tg: &'a mut Tensor,
}

/// The gradients of forward's outputs, and what it gave as rstd.
#[derive(Debug, Clone, Copy)]
pub struct Saved<'a> {
    /// [T,G,K]
    pub d_q_tgk: &'a Tensor,
    /// [T,G,K]
    pub d_k_tgk: &'a Tensor,
    /// [T,H,V]
    pub d_v_thv: &'a Tensor,
    /// [T,G] f32
    pub q_rstd_tg: &'a Tensor,
    /// [T,G] f32
    pub k_rstd_tg: &'a Tensor,
}

/// All five outputs assigned. `eps` is added to the sums of squares.
///
/// # Errors
/// [`crate::Error::Shape`] where shapes disagree or `cu_seqlens` does not rise from 0 to T, [`crate::Error::DType`] where an rstd
/// is not f32, [`crate::Error::Unsupported`] on a GPU for K above 256.
pub fn forward(outputs: Outputs, inputs: &Inputs, eps: f32) -> Result<()> {
    const OP: &str = "delta_inputs::forward";
    let heads = Heads {
        q_tgk: outputs.q_tgk,
        k_tgk: outputs.k_tgk,
        v_thv: outputs.v_thv,
        q_rstd_tg: outputs.q_rstd_tg,
        k_rstd_tg: outputs.k_rstd_tg,
    };
    let dims = Dims::new(OP, &heads, inputs)?;
    match heads.device(OP, outputs.q_tgk, &inputs.tensors())? {
        Device::Cpu => cpu::forward(outputs, dims, inputs, eps),
        Device::Cuda(cuda) => cuda::forward(cuda, outputs, dims, inputs, eps)?,
    }
    Ok(())
}

/// d_qkv_tc assigned, d_w [C,1,4] f32 added to (None: frozen).
///
/// # Errors
/// As [`forward`]; [`crate::Error::DType`] where d_w is not f32.
pub fn backward(
    d_qkv_tc: &mut Tensor,
    d_w: Option<&mut Tensor>,
    saved: &Saved,
    inputs: &Inputs,
) -> Result<()> {
    const OP: &str = "delta_inputs::backward";
    let heads = Heads {
        q_tgk: saved.d_q_tgk,
        k_tgk: saved.d_k_tgk,
        v_thv: saved.d_v_thv,
        q_rstd_tg: saved.q_rstd_tg,
        k_rstd_tg: saved.k_rstd_tg,
    };
    let dims = Dims::new(OP, &heads, inputs)?;
    check::shape(OP, "d_qkv_tc", d_qkv_tc, inputs.qkv_tc.shape())?;
    let mut others = inputs.tensors().to_vec();
    if let Some(d_w) = d_w.as_deref() {
        check::shape(OP, "d_w", d_w, inputs.w.shape())?;
        check::f32(OP, "d_w", d_w)?;
        others.push(("d_w", d_w));
    }
    match heads.device(OP, d_qkv_tc, &others)? {
        Device::Cpu => cpu::backward(d_qkv_tc, d_w, saved, dims, inputs),
        Device::Cuda(cuda) => cuda::backward(cuda, d_qkv_tc, d_w, saved, dims, inputs)?,
    }
    Ok(())
}

/// Forward's outputs, or their gradients with the rstd: what has the shapes of heads.
struct Heads<'a> {
    q_tgk: &'a Tensor,
    k_tgk: &'a Tensor,
    v_thv: &'a Tensor,
    q_rstd_tg: &'a Tensor,
    k_rstd_tg: &'a Tensor,
}

impl Heads<'_> {
    /// Where `first`, these and `others` all lie.
    fn device(
        &self,
        op: &'static str,
        first: &Tensor,
        others: &[(&'static str, &Tensor)],
    ) -> Result<Device> {
        let heads = [
            ("q_tgk", self.q_tgk),
            ("k_tgk", self.k_tgk),
            ("v_thv", self.v_thv),
            ("q_rstd_tg", self.q_rstd_tg),
            ("k_rstd_tg", self.k_rstd_tg),
        ];
        check::device(op, first, &heads)?;
        check::device(op, first, others)
    }
}

impl<'a> Inputs<'a> {
    fn tensors(&self) -> [(&'static str, &'a Tensor); 2] {
        [("qkv_tc", self.qkv_tc), ("w", self.w)]
    }
}

#[derive(Debug, Clone, Copy)]
struct Dims {
    t: usize,
    /// Key heads, and their width.
    g: usize,
    k: usize,
    /// Value heads, and their width.
    h: usize,
    v: usize,
}

impl Dims {
    fn new(op: &'static str, heads: &Heads, inputs: &Inputs) -> Result<Dims> {
        let [t, g, k] = check::dims(op, "q_tgk", heads.q_tgk, "[T,G,K]")?;
        let [v_t, h, v] = check::dims(op, "v_thv", heads.v_thv, "[T,H,V]")?;
        let c = 2 * g * k + h * v;
        check::shape(op, "k_tgk", heads.k_tgk, &[t, g, k])?;
        check::len(op, "v_thv", v_t, t)?;
        for (arg, rstd) in [
            ("q_rstd_tg", heads.q_rstd_tg),
            ("k_rstd_tg", heads.k_rstd_tg),
        ] {
            check::shape(op, arg, rstd, &[t, g])?;
            check::f32(op, arg, rstd)?;
        }
        check::shape(op, "qkv_tc", inputs.qkv_tc, &[t, c])?;
        check::shape(op, "w", inputs.w, &[c, 1, 4])?;
        check::cu_seqlens(op, inputs.cu_seqlens, t)?;
        Ok(Dims { t, g, k, h, v })
    }
}

/// Bytes of scratch that [`backward`] takes on a GPU for the shape [T,H,G,K,V].
pub fn backward_scratch_bytes(gpu: DeviceProperties, [t, h, g, k, v]: [usize; 5]) -> usize {
    cuda::scratch_bytes(gpu, Dims { t, g, k, h, v })
}

mod cpu {
    //! The convolution's tiles, of which one is as wide as a head of q or k, so that its norm is taken where it is made.

    use std::ops::Range;

    use super::causal_conv1d::cpu::{Convolution, Output, tiles};
    use super::{Dims, Inputs, Outputs, Saved};
    use crate::cpu::math::{self, dot, sum_squares};
    use crate::cpu::{View, documents, load_rows};
    use crate::dtype::Element;
    use crate::{DType, Tensor, bf16};

    pub(super) fn forward(outputs: Outputs, dims: Dims, inputs: &Inputs, eps: f32) {
        let (key_width, value_width) = (dims.g * dims.k, dims.h * dims.v);
        let (dtype, q_scale) = (inputs.qkv_tc.dtype(), inputs.q_scale);
        let outs = vec![
            Output::of(outputs.q_tgk, key_width),
            Output::of(outputs.k_tgk, key_width),
            Output::of(outputs.v_thv, value_width),
            Output::of(outputs.q_rstd_tg, dims.g),
            Output::of(outputs.k_rstd_tg, dims.g),
        ];
        let convolution = Convolution {
            x_tc: inputs.qkv_tc,
            w: inputs.w,
            documents: &documents(inputs.cu_seqlens),
            tiles: &dims.tiles(),
        };
        convolution.forward(
            outs,
            None,
            #[inline(always)]
            |outs, row, channels, y| {
                round(y, dtype);
                let place = dims.place(channels);
                if let Part::Head { head, .. } = place.part {
                    let r = 1.0 / (sum_squares(y) + eps).sqrt();
                    outs[place.part.rstd()].row(row, head..head + 1).store(&[r]);
                    let factor = place.part.scale(q_scale) * r;
                    y.iter_mut().for_each(|y| *y *= factor);
                }
                outs[place.part.out()].row(row, place.columns).store(y);
            },
        );
    }

    pub(super) fn backward(
        d_qkv_tc: &mut Tensor,
        d_w: Option<&mut Tensor>,
        saved: &Saved,
        dims: Dims,
        inputs: &Inputs,
    ) {
        let (dtype, d_dtype) = (inputs.qkv_tc.dtype(), d_qkv_tc.dtype());
        let q_scale = inputs.q_scale;
        let widths = [dims.g * dims.k, dims.g * dims.k, dims.h * dims.v];
        let d_outs = [saved.d_q_tgk, saved.d_k_tgk, saved.d_v_thv];
        let rstds = [saved.q_rstd_tg, saved.k_rstd_tg].map(Tensor::f32s);
        let convolution = Convolution {
            x_tc: inputs.qkv_tc,
            w: inputs.w,
            documents: &documents(inputs.cu_seqlens),
            tiles: &dims.tiles(),
        };
        convolution.backward(
            d_qkv_tc,
            d_w,
            #[inline(always)]
            |d_y, row, channels| {
                let Place { part, columns } = dims.place(channels);
                let width = widths[part.out()];
                let first = row * width + columns.start;
                let d_out = View::of(d_outs[part.out()]);
                load_rows(d_y, d_out, first, width, columns.len());
            },
            #[inline(always)]
            |d_y, row, channels, y| {
                let part = dims.place(channels).part;
                if let Part::Head { is_query, head } = part {
                    let r = rstds[usize::from(!is_query)][row * dims.g + head];
                    let factor = part.scale(q_scale) * r;
                    dims.with_activated(y, dtype, |x| {
                        let pull = dot(d_y, x) * (r * r);
                        for (d_y, x) in d_y.iter_mut().zip(x) {
                            *d_y = factor * (*d_y - x * pull);
                        }
                    });
                }
                round(d_y, d_dtype);
            },
        );
    }

    /// What a tile's channels are.
    #[derive(Clone, Copy)]
    enum Part {
        Head { is_query: bool, head: usize },
        Values,
    }

    impl Part {
        /// Among q, k, v.
        fn out(self) -> usize {
            match self {
                Part::Head { is_query: true, .. } => 0,
                Part::Head { .. } => 1,
                Part::Values => 2,
            }
        }

        /// Among the outputs of the forward pass.
        fn rstd(self) -> usize {
            3 + self.out()
        }

        fn scale(self, q_scale: f32) -> f32 {
            match self {
                Part::Head { is_query: true, .. } => q_scale,
                _ => 1.0,
            }
        }
    }

    /// A tile's part, and its columns there.
    struct Place {
        part: Part,
        columns: Range<usize>,
    }

    /// Widest head that is activated on the stack.
    const MAX_KEY_DIM: usize = 256;

    impl Dims {
        /// A head of q or k each, then the values.
        fn tiles(self) -> Vec<Range<usize>> {
            let keys = 2 * self.g * self.k;
            let heads = (0..keys).step_by(self.k.max(1));
            let mut all: Vec<_> = heads.map(|start| start..start + self.k).collect();
            all.extend(tiles(keys..keys + self.h * self.v));
            all
        }

        #[inline(always)]
        fn place(self, channels: &Range<usize>) -> Place {
            let width = self.g * self.k;
            let (part, first) = if channels.start < 2 * width {
                let either = channels.start / self.k;
                let is_query = either < self.g;
                let first = if is_query { 0 } else { width };
                let head = either - first / self.k;
                (Part::Head { is_query, head }, first)
            } else {
                (Part::Values, 2 * width)
            };
            Place {
                part,
                columns: channels.start - first..channels.end - first,
            }
        }

        /// `body` with silu(y), rounded as the forward pass stored it.
        #[inline(always)]
        fn with_activated(self, y: &[f32], dtype: DType, body: impl FnOnce(&[f32])) {
            let mut on_stack = [0.0; MAX_KEY_DIM];
            let mut on_heap = Vec::new();
            let x = match on_stack.get_mut(..y.len()) {
                Some(x) => x,
                None => {
                    on_heap.resize(y.len(), 0.0);
                    &mut on_heap[..]
                }
            };
            for (x, y) in x.iter_mut().zip(y) {
                *x = math::silu(*y);
            }
            round(x, dtype);
            body(x);
        }
    }

    /// As they would be read back after being stored.
    #[inline(always)]
    fn round(values: &mut [f32], dtype: DType) {
        if dtype == DType::Bf16 {
            for value in values {
                *value = <bf16 as Element>::from_f32(*value).to_f32();
            }
        }
    }
}

mod cuda {
    use super::causal_conv1d::WIDTH;
    use super::causal_conv1d::cuda::Walk;
    use super::{Dims, Inputs, Outputs, Saved};
    use crate::cuda::sources::CAUSAL_CONV1D;
    use crate::cuda::{Args, Cuda, DeviceProperties};
    use crate::ops::rows::{self, Partials};
    use crate::{Error, Result, Tensor};

    /// Widest head of q and k: eight channels for each lane of a warp.
    const MAX_KEY_DIM: usize = 256;
    const CHANNELS: usize = 8;

    pub(super) fn forward(
        cuda: Cuda,
        outputs: Outputs,
        dims: Dims,
        inputs: &Inputs,
        eps: f32,
    ) -> Result<()> {
        let (qkv, w) = (inputs.qkv_tc, inputs.w);
        let (q, k, v) = (outputs.q_tgk, outputs.k_tgk, outputs.v_thv);
        let shape = Shape::new("delta_inputs::forward", dims)?;
        let walk = Walk::forward(cuda.properties(), dims.t, shape.threads_of_row);
        let names = ["delta_inputs_forward_bf16", "delta_inputs_forward_any"];
        let kernel = rows::instance(names, &[q, k, v, qkv], &[dims.k, shape.value_width]);
        let args = Args::new()
            .view_mut(q)
            .view_mut(k)
            .view_mut(v)
            .tensor_mut(outputs.q_rstd_tg)
            .tensor_mut(outputs.k_rstd_tg)
            .view(qkv)
            .view(w);
        let args = shape
            .put(cuda, args, dims, inputs.cu_seqlens, walk)?
            .f32(inputs.q_scale)
            .f32(eps);
        cuda.launch(&CAUSAL_CONV1D, kernel, walk.grid(), args)
    }

    pub(super) fn scratch_bytes(gpu: DeviceProperties, dims: Dims) -> usize {
        let n_runs = Shape::new("delta_inputs::backward", dims).map_or(0, |shape| {
            Walk::backward(gpu, dims.t, shape.threads_of_row).n_runs
        });
        Partials::bytes(n_runs, WIDTH * (2 * dims.g * dims.k + dims.h * dims.v))
    }

    pub(super) fn backward(
        cuda: Cuda,
        d_qkv: &mut Tensor,
        d_w: Option<&mut Tensor>,
        saved: &Saved,
        dims: Dims,
        inputs: &Inputs,
    ) -> Result<()> {
        let (qkv, w) = (inputs.qkv_tc, inputs.w);
        let (d_q, d_k, d_v) = (saved.d_q_tgk, saved.d_k_tgk, saved.d_v_thv);
        let shape = Shape::new("delta_inputs::backward", dims)?;
        let walk = Walk::backward(cuda.properties(), dims.t, shape.threads_of_row);
        let partials = Partials::new(cuda, d_w.is_some(), walk.n_runs, WIDTH * qkv.shape()[1])?;
        let names = ["delta_inputs_backward_bf16", "delta_inputs_backward_any"];
        let tensors = [d_qkv, d_q, d_k, d_v, qkv];
        let kernel = rows::instance(names, &tensors, &[dims.k, shape.value_width]);
        let args = Args::new()
            .view_mut(d_qkv)
            .pointer(partials.pointer)
            .view(d_q)
            .view(d_k)
            .view(d_v)
            .view(qkv)
            .view(w)
            .tensor(saved.q_rstd_tg)
            .tensor(saved.k_rstd_tg);
        let args = shape
            .put(cuda, args, dims, inputs.cu_seqlens, walk)?
            .f32(inputs.q_scale);
        cuda.launch(&CAUSAL_CONV1D, kernel, walk.grid(), args)?;
        match d_w {
            Some(d_w) => partials.add_to(cuda, d_w, 0),
            None => Ok(()),
        }
    }

    /// What the threads of a row do, as `Role` in causal_conv1d.cu has it.
    #[derive(Debug, Clone, Copy)]
    struct Shape {
        /// Threads of a head of q or k.
        group: usize,
        value_width: usize,
        threads_of_row: usize,
    }

    impl Shape {
        fn new(op: &'static str, dims: Dims) -> Result<Shape> {
            if dims.k > MAX_KEY_DIM {
                let what = format!("heads of {} (at most {MAX_KEY_DIM})", dims.k);
                return Err(Error::Unsupported { op, what });
            }
            let group = dims.k.div_ceil(CHANNELS).next_power_of_two();
            let value_width = dims.h * dims.v;
            let threads_of_heads = (2 * dims.g * group).next_multiple_of(32);
            Ok(Shape {
                group,
                value_width,
                threads_of_row: threads_of_heads + value_width.div_ceil(CHANNELS),
            })
        }

        /// The arguments that both kernels take after their tensors.
        fn put(
            self,
            cuda: Cuda,
            args: Args,
            dims: Dims,
            cu_seqlens: &[u32],
            walk: Walk,
        ) -> Result<Args> {
            Ok(args
                .pointer(cuda.upload(cu_seqlens)?)
                .u32(cu_seqlens.len() - 1)
                .u32(dims.t)
                .u32(dims.g)
                .u32(dims.k)
                .u32(self.value_width)
                .u32(self.group)
                .u32(walk.run))
        }
    }
}

pub(crate) mod examples {
    use super::{Inputs, Outputs, Saved};
    use crate::DType::{self, F32};
    use crate::example::{Example, Sizes, TYPES, Tolerance, offsets, zeros_like};

    const EPS: f32 = 1e-6;
    /// Lengths of packed documents: none, shorter than the filter, borders in and at the ends of runs of tokens.
    const DOCUMENTS: [&[usize]; 6] = [
        &[1],
        &[2],
        &[5, 1, 2],
        &[1, 2, 0, 3, 122, 1, 63, 64, 65, 130, 4],
        &[0, 16, 16, 0, 0, 17, 15, 0],
        &[700],
    ];

    pub(crate) fn compared() -> Vec<Example> {
        let mut all = Vec::new();
        for types in TYPES {
            for lengths in DOCUMENTS {
                for heads in [
                    [2, 2, 128, 128],
                    [2, 4, 128, 128],
                    [1, 3, 64, 64],
                    [1, 1, 256, 256],
                    [3, 3, 12, 10],
                    [2, 2, 24, 40],
                ] {
                    let call = Call {
                        cu_seqlens: offsets(lengths),
                        heads,
                        types,
                        n_zeros: 0,
                    };
                    all.extend([call.forward(), call.backward(), call.backward_frozen()]);
                }
            }
            // Heads of norm 0, whose gradients eps alone keeps finite.
            let zeros = Call {
                cu_seqlens: offsets(&[70, 61]),
                heads: [2, 4, 128, 128],
                types,
                n_zeros: 70,
            };
            all.extend([zeros.forward(), zeros.backward(), zeros.backward_frozen()]);
        }
        all
    }

    pub(crate) fn timed(sizes: &Sizes) -> Vec<Example> {
        let call = Call {
            cu_seqlens: sizes.cu_seqlens.clone(),
            heads: sizes.delta,
            types: [sizes.dtype; 3],
            n_zeros: 0,
        };
        vec![call.forward(), call.backward()]
    }

    struct Call {
        cu_seqlens: Vec<u32>,
        /// Key heads, value heads, key dim, value dim.
        heads: [usize; 4],
        types: [DType; 3],
        /// Tokens from the first that are zeros: whole documents.
        n_zeros: usize,
    }

    impl Call {
        fn example(&self, name: &'static str) -> Example {
            let [g, h, k, v] = self.heads;
            let (t, n_documents) = (self.n_tokens(), self.cu_seqlens.len() - 1);
            // In f32, a head's norm near zero is divided by. In bf16 the CPU rounds what lies between to the type of its input,
            // the GPU does not, and f32 outputs show it.
            let f32 = if self.types[0] == F32 { 2e-5 } else { 1e-2 };
            let documents = match n_documents {
                1 => String::new(),
                n => format!("_docs{n}"),
            };
            let zeros = match self.n_zeros {
                0 => String::new(),
                n => format!("_zeros{n}"),
            };
            Example::new(name, format!("t{t}{documents}{zeros}_g{g}_h{h}_k{k}_v{v}"))
                .tolerance(Tolerance { f32, bf16: 1e-2 })
        }

        fn n_tokens(&self) -> usize {
            self.cu_seqlens[self.cu_seqlens.len() - 1] as usize
        }

        fn n_channels(&self) -> usize {
            let [g, h, k, v] = self.heads;
            2 * g * k + h * v
        }

        /// The input that the zeros are in.
        fn with_qkv(&self, example: Example) -> Example {
            let (t, c) = (self.n_tokens(), self.n_channels());
            let n_zeros = self.n_zeros * c;
            example
                .input_in("qkv", &[t, c], self.types[0], [-2.0, 2.0])
                .changed(move |qkv| qkv[..n_zeros].fill(0.0))
        }

        fn q_scale(&self) -> f32 {
            1.0 / (self.heads[2] as f32).sqrt()
        }

        fn forward(&self) -> Example {
            let ([_, out_type, w_type], [g, h, k, v]) = (self.types, self.heads);
            let (t, c) = (self.n_tokens(), self.n_channels());
            let (cu_seqlens, q_scale) = (self.cu_seqlens.clone(), self.q_scale());
            let example = self
                .example("delta_inputs/forward")
                .out("q", &[t, g, k], out_type)
                .out("k", &[t, g, k], out_type)
                .out("v", &[t, h, v], out_type)
                .out("q_rstd", &[t, g], F32)
                .out("k_rstd", &[t, g], F32);
            self.with_qkv(example).input("w", &[c, 1, 4], w_type).run(
                move |[q_tgk, k_tgk, v_thv, q_rstd_tg, k_rstd_tg], [qkv_tc, w]| {
                    let outputs = Outputs {
                        q_tgk,
                        k_tgk,
                        v_thv,
                        q_rstd_tg,
                        k_rstd_tg,
                    };
                    let inputs = Inputs {
                        qkv_tc,
                        w,
                        cu_seqlens: &cu_seqlens,
                        q_scale,
                    };
                    super::forward(outputs, &inputs, EPS)
                },
            )
        }

        fn backward_inputs(&self, example: Example) -> Example {
            let ([_, d_type, w_type], [g, h, k, v]) = (self.types, self.heads);
            let (t, c) = (self.n_tokens(), self.n_channels());
            let (cu_seqlens, q_scale) = (self.cu_seqlens.clone(), self.q_scale());
            let example = example
                .input("d_q", &[t, g, k], d_type)
                .input("d_k", &[t, g, k], d_type)
                .input("d_v", &[t, h, v], d_type);
            self.with_qkv(example)
                .input("w", &[c, 1, 4], w_type)
                .saved("q_rstd", &[t, g], F32)
                .saved("k_rstd", &[t, g], F32)
                .prepared(move |[q, k, v, qkv_tc, w, q_rstd_tg, k_rstd_tg]| {
                    let outputs = Outputs {
                        q_tgk: &mut zeros_like(q)?,
                        k_tgk: &mut zeros_like(k)?,
                        v_thv: &mut zeros_like(v)?,
                        q_rstd_tg,
                        k_rstd_tg,
                    };
                    let inputs = Inputs {
                        qkv_tc,
                        w,
                        cu_seqlens: &cu_seqlens,
                        q_scale,
                    };
                    super::forward(outputs, &inputs, EPS)
                })
        }

        fn backward(&self) -> Example {
            let (t, c) = (self.n_tokens(), self.n_channels());
            let (cu_seqlens, q_scale) = (self.cu_seqlens.clone(), self.q_scale());
            let example = self
                .example("delta_inputs/backward")
                .out("d_qkv", &[t, c], self.types[1])
                .updated("d_w", &[c, 1, 4], F32);
            self.backward_inputs(example).run(
                move |[d_qkv, d_w], [d_q_tgk, d_k_tgk, d_v_thv, qkv_tc, w, q_rstd_tg, k_rstd_tg]| {
                    let saved = Saved {
                        d_q_tgk,
                        d_k_tgk,
                        d_v_thv,
                        q_rstd_tg,
                        k_rstd_tg,
                    };
                    let inputs = Inputs {
                        qkv_tc,
                        w,
                        cu_seqlens: &cu_seqlens,
                        q_scale,
                    };
                    super::backward(d_qkv, Some(d_w), &saved, &inputs)
                },
            )
        }

        fn backward_frozen(&self) -> Example {
            let (t, c) = (self.n_tokens(), self.n_channels());
            let (cu_seqlens, q_scale) = (self.cu_seqlens.clone(), self.q_scale());
            let example =
                self.example("delta_inputs/backward")
                    .out("d_qkv, frozen", &[t, c], self.types[1]);
            self.backward_inputs(example).run(
                move |[d_qkv], [d_q_tgk, d_k_tgk, d_v_thv, qkv_tc, w, q_rstd_tg, k_rstd_tg]| {
                    let saved = Saved {
                        d_q_tgk,
                        d_k_tgk,
                        d_v_thv,
                        q_rstd_tg,
                        k_rstd_tg,
                    };
                    let inputs = Inputs {
                        qkv_tc,
                        w,
                        cu_seqlens: &cu_seqlens,
                        q_scale,
                    };
                    super::backward(d_qkv, None, &saved, &inputs)
                },
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{
        BF16_REL, assert_close, bits_from_row, dot, f64s, gradient, offsets, plus, poison_like,
        pool, rows, tensor,
    };
    use crate::ops::{l2_norm, split};
    use crate::{DType, Error};

    const EPS: f32 = 1e-6;
    const SCALE: f32 = 0.5;
    /// Borders inside a task, at its end, documents shorter than the filter, one longer than a task.
    const LENGTHS: [usize; 11] = [1, 2, 0, 3, 122, 1, 63, 64, 65, 130, 4];
    /// G, K, H, V; the last with more channels of values than a tile has. Heads of one dim have hardly a gradient: 0 but for eps.
    const HEADS: [[usize; 4]; 3] = [[1, 8, 1, 1], [2, 12, 3, 10], [2, 96, 3, 80]];
    /// Relative error (of norms) of f32 sums.
    const F32_REL: f64 = 1e-6;

    struct Case {
        dims: Dims,
        qkv: Tensor,
        w: Tensor,
        /// Of q, k and v.
        d_outs: [Tensor; 3],
        cu_seqlens: Vec<u32>,
    }

    impl Case {
        fn new(lengths: &[usize], [g, k, h, v]: [usize; 4], dtype: DType) -> Self {
            let t = lengths.iter().sum();
            let dims = Dims { t, g, k, h, v };
            let c = 2 * g * k + h * v;
            let heads = [3, 4].map(|seed| tensor(&[t, g, k], seed, dtype));
            let [d_q, d_k] = heads;
            Case {
                dims,
                qkv: tensor(&[t, c], 1, dtype),
                w: tensor(&[c, 1, 4], 2, dtype),
                d_outs: [d_q, d_k, tensor(&[t, h, v], 5, dtype)],
                cu_seqlens: offsets(lengths),
            }
        }

        /// q, k, v and the two rstd.
        fn forward(&self) -> Result<[Tensor; 5]> {
            let dtype = self.d_outs[0].dtype();
            let [q, k, v] = self.d_outs.each_ref().map(|like| poison_like(like, dtype));
            let shape = [self.dims.t, self.dims.g];
            let rstds = [0, 1].map(|_| Tensor::poison(&shape, DType::F32));
            let [q_rstd, k_rstd] = rstds;
            let mut outs = [q, k, v, q_rstd, k_rstd];
            let [q, k, v, q_rstd, k_rstd] = &mut outs;
            let outputs = Outputs {
                q_tgk: q,
                k_tgk: k,
                v_thv: v,
                q_rstd_tg: q_rstd,
                k_rstd_tg: k_rstd,
            };
            forward(outputs, &self.inputs(), EPS)?;
            Ok(outs)
        }

        fn inputs(&self) -> Inputs<'_> {
            Inputs {
                qkv_tc: &self.qkv,
                w: &self.w,
                cu_seqlens: &self.cu_seqlens,
                q_scale: SCALE,
            }
        }

        /// d_qkv, after adding to `d_w`.
        fn backward(&self, d_w: Option<&mut Tensor>) -> Tensor {
            let [.., q_rstd, k_rstd] = self.forward().unwrap();
            let mut d_qkv = poison_like(&self.qkv, self.qkv.dtype());
            let [d_q, d_k, d_v] = &self.d_outs;
            let saved = Saved {
                d_q_tgk: d_q,
                d_k_tgk: d_k,
                d_v_thv: d_v,
                q_rstd_tg: &q_rstd,
                k_rstd_tg: &k_rstd,
            };
            backward(&mut d_qkv, d_w, &saved, &self.inputs()).unwrap();
            d_qkv
        }

        /// q, k, v, d_qkv and d_w.
        fn run(&self) -> [Tensor; 5] {
            let [q, k, v, ..] = self.forward().unwrap();
            let mut d_w = Tensor::zeros(self.w.shape(), DType::F32);
            let d_qkv = self.backward(Some(&mut d_w));
            [q, k, v, d_qkv, d_w]
        }

        /// The gradients of q, k and v of each token side by side.
        fn d_out(&self) -> Vec<f64> {
            side_by_side(self.dims.t, self.d_outs.each_ref())
        }
    }

    fn side_by_side(t: usize, parts: [&Tensor; 3]) -> Vec<f64> {
        let parts = parts.map(f64s);
        (0..t)
            .flat_map(|row| {
                let row_of = |part: &Vec<f64>| {
                    let width = part.len() / t;
                    part[row * width..][..width].to_vec()
                };
                parts.iter().flat_map(row_of).collect::<Vec<_>>()
            })
            .collect()
    }

    /// (index in w, index in x) of what the filter multiplies for a token and channel.
    fn taps(document_start: usize, t: usize, c: usize, channel: usize) -> Vec<(usize, usize)> {
        (0..4)
            .filter(|j| t + j >= document_start + 3)
            .map(|j| (channel * 4 + j, (t + j - 3) * c + channel))
            .collect()
    }

    /// Scales of a token's heads of q and k, in their order.
    fn head_scales(dims: Dims) -> impl Iterator<Item = f64> {
        (0..2 * dims.g).map(move |head| if head < dims.g { SCALE.into() } else { 1.0 })
    }

    /// q, k and v of each token side by side.
    fn define(case: &Case, x: &[f64], w: &[f64]) -> Vec<f64> {
        let (dims, c) = (case.dims, w.len() / 4);
        let keys = 2 * dims.g * dims.k;
        let mut out = Vec::new();
        for ends in case.cu_seqlens.windows(2) {
            for t in ends[0] as usize..ends[1] as usize {
                let activated = |channel| {
                    let seen = taps(ends[0] as usize, t, c, channel);
                    let y: f64 = seen
                        .iter()
                        .map(|(w_idx, x_idx)| w[*w_idx] * x[*x_idx])
                        .sum();
                    y / (1.0 + (-y).exp())
                };
                let conv: Vec<f64> = (0..c).map(activated).collect();
                for (raw, scale) in conv[..keys].chunks(dims.k).zip(head_scales(dims)) {
                    let norm = (dot(raw, raw) + f64::from(EPS)).sqrt();
                    out.extend(raw.iter().map(|x| scale * x / norm));
                }
                out.extend(&conv[keys..]);
            }
        }
        out
    }

    /// d_qkv and d_w, by the derivatives of norm, SiLU and filter.
    fn define_backward(case: &Case, x: &[f64], w: &[f64]) -> [Vec<f64>; 2] {
        let (dims, c, d_out) = (case.dims, w.len() / 4, case.d_out());
        let keys = 2 * dims.g * dims.k;
        let (mut d_x, mut d_w) = (vec![0.0; x.len()], vec![0.0; w.len()]);
        for ends in case.cu_seqlens.windows(2) {
            for t in ends[0] as usize..ends[1] as usize {
                let seen: Vec<_> = (0..c)
                    .map(|channel| taps(ends[0] as usize, t, c, channel))
                    .collect();
                let y: Vec<f64> = seen
                    .iter()
                    .map(|seen| {
                        seen.iter()
                            .map(|(w_idx, x_idx)| w[*w_idx] * x[*x_idx])
                            .sum()
                    })
                    .collect();
                let mut d_y = d_out[t * c..][..c].to_vec();
                let conv: Vec<f64> = y.iter().map(|y| y / (1.0 + (-y).exp())).collect();
                let heads = d_y[..keys].chunks_mut(dims.k).zip(conv.chunks(dims.k));
                for ((d, raw), scale) in heads.zip(head_scales(dims)) {
                    let r = 1.0 / (dot(raw, raw) + f64::from(EPS)).sqrt();
                    let pull = dot(d, raw) * r * r;
                    for (d, raw) in d.iter_mut().zip(raw) {
                        *d = scale * r * (*d - raw * pull);
                    }
                }
                for ((d_y, y), seen) in d_y.iter().zip(&y).zip(&seen) {
                    let s = 1.0 / (1.0 + (-y).exp());
                    let d_y = d_y * (s + y * s * (1.0 - s));
                    for (w_idx, x_idx) in seen {
                        d_x[*x_idx] += d_y * w[*w_idx];
                        d_w[*w_idx] += d_y * x[*x_idx];
                    }
                }
            }
        }
        [d_x, d_w]
    }

    #[test]
    fn definition_agrees_with_finite_differences() {
        let case = Case::new(&[5, 1, 2], [2, 4, 1, 3], DType::F32);
        let (at, d_out) = ([f64s(&case.qkv), f64s(&case.w)], case.d_out());
        let loss = |at: &[Vec<f64>]| dot(&d_out, &define(&case, &at[0], &at[1]));
        for (which, want) in define_backward(&case, &at[0], &at[1]).iter().enumerate() {
            for (slope, want) in gradient(&at, which, loss).iter().zip(want) {
                assert!((slope - want).abs() < 1e-7, "{slope} for {want}");
            }
        }
    }

    #[test]
    fn outputs_and_gradients_agree_with_the_definition() {
        for (dtype, tolerance) in [(DType::F32, F32_REL), (DType::Bf16, BF16_REL)] {
            for heads in HEADS {
                let case = Case::new(&LENGTHS, heads, dtype);
                let (x, w) = (f64s(&case.qkv), f64s(&case.w));
                let [q, k, v, q_rstd, k_rstd] = case.forward().unwrap();
                let got = side_by_side(case.dims.t, [&q, &k, &v]);
                let got = Tensor::from_f32(&[got.len()], got.iter().map(|x| *x as f32).collect());
                assert_close("out", &got, &define(&case, &x, &w), tolerance);
                for rstd in [q_rstd, k_rstd] {
                    assert!(rstd.f32s().iter().all(|r| r.is_finite() && *r > 0.0));
                }
                let before = tensor(case.w.shape(), 6, DType::F32);
                let mut d_w = before.clone();
                let d_qkv = case.backward(Some(&mut d_w));
                let [want_d_qkv, want_d_w] = define_backward(&case, &x, &w);
                assert_close("d_qkv", &d_qkv, &want_d_qkv, tolerance);
                assert_close("d_w", &d_w, &plus(&want_d_w, &before), tolerance);
            }
        }
    }

    /// A token of zeros in a document of zeros has heads of norm 0: their reciprocal is 1/√eps, and so much larger are their gradients.
    #[test]
    fn zeroed_tokens_give_zeros_and_the_gradient_that_eps_bounds() {
        const ZEROS: usize = 6;
        for (dtype, tolerance) in [(DType::F32, F32_REL), (DType::Bf16, BF16_REL)] {
            for heads in HEADS {
                let mut case = Case::new(&[ZEROS, 9], heads, dtype);
                let (t, c) = (case.dims.t, case.qkv.shape()[1]);
                let mut values = case.qkv.to_f32_vec();
                values[..ZEROS * c].fill(0.0);
                case.qkv = Tensor::from_f32(&[t, c], values).to_dtype(dtype);
                let [q, k, v, q_rstd, k_rstd] = case.forward().unwrap();
                for out in [q, k, v] {
                    let zeroed = rows(&out, 0..ZEROS).to_f32_vec();
                    assert!(zeroed.iter().all(|x| *x == 0.0));
                }
                for rstd in [q_rstd, k_rstd] {
                    let zeroed = rows(&rstd, 0..ZEROS).to_f32_vec();
                    assert!(zeroed.iter().all(|r| (r * EPS.sqrt() - 1.0).abs() < 1e-5));
                }
                let mut d_w = Tensor::zeros(case.w.shape(), DType::F32);
                let d_qkv = case.backward(Some(&mut d_w));
                let (x, w) = (f64s(&case.qkv), f64s(&case.w));
                let [want, want_d_w] = define_backward(&case, &x, &w);
                // Apart: beside the zeroed document's gradients those of the other would not show.
                let (zeroed, others) = want.split_at(ZEROS * c);
                assert_close("zeroed", &rows(&d_qkv, 0..ZEROS), zeroed, tolerance);
                assert_close("others", &rows(&d_qkv, ZEROS..t), others, tolerance);
                assert_close("d_w", &d_w, &want_d_w, tolerance);
            }
        }
    }

    #[test]
    fn a_frozen_weight_changes_no_other_gradient() {
        let case = Case::new(&LENGTHS, HEADS[1], DType::F32);
        let [.., d_qkv, _] = case.run();
        assert_eq!(case.backward(None), d_qkv);
    }

    #[test]
    fn changing_one_document_changes_no_bit_of_the_next() {
        let mut case = Case::new(&[70, 90], HEADS[1], DType::F32);
        let [q, k, v, d_qkv, _] = case.run();
        let before = [q, k, v, d_qkv];
        let [d_q, d_k, d_v] = &mut case.d_outs;
        for tensor in [&mut case.qkv, d_q, d_k, d_v] {
            let width = tensor.numel() / 160;
            let first = &mut tensor.f32s_mut()[..70 * width];
            first.iter_mut().for_each(|x| *x = 3.0 - *x);
        }
        let [q, k, v, d_qkv, _] = case.run();
        let after = [q, k, v, d_qkv];
        assert!(bits_from_row(&before, 0) != bits_from_row(&after, 0));
        assert!(bits_from_row(&before, 70) == bits_from_row(&after, 70));
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let case = Case::new(&LENGTHS, HEADS[2], DType::F32);
        assert!(pool(1).install(|| case.run()) == pool(5).install(|| case.run()));
    }

    #[test]
    fn no_tokens_are_allowed() {
        let case = Case::new(&[0], HEADS[1], DType::F32);
        let [.., d_w] = case.run();
        assert!(d_w.f32s().iter().all(|d_w| *d_w == 0.0));
    }

    #[test]
    fn one_pass_equals_single_steps_one_after_the_other_bit_for_bit() {
        for dtype in [DType::F32, DType::Bf16] {
            let case = Case::new(&[130, 1, 0, 2, 167], HEADS[2], dtype);
            let got = case.forward().unwrap();
            let c = case.qkv.shape()[1];
            for ends in case.cu_seqlens.windows(2) {
                let document = ends[0] as usize..ends[1] as usize;
                let qkv = rows(&case.qkv, document.clone());
                let mut conv = poison_like(&qkv, dtype);
                let mut state = Tensor::zeros(&[3, c], DType::F32);
                causal_conv1d::forward_with_state(&mut conv, &mut state, &qkv, &case.w).unwrap();
                let mut want = got.each_ref().map(|got| {
                    let got = rows(got, document.clone());
                    poison_like(&got, got.dtype())
                });
                let [q, k, v, q_rstd, k_rstd] = &mut want;
                let (mut raw_q, mut raw_k) = (q.clone(), k.clone());
                split::qkv(&mut raw_q, &mut raw_k, v, &conv).unwrap();
                l2_norm::forward(q, q_rstd, &raw_q, SCALE, EPS).unwrap();
                l2_norm::forward(k, k_rstd, &raw_k, 1.0, EPS).unwrap();
                for (got, want) in got.iter().zip(&want) {
                    assert!(rows(got, document.clone()) == *want, "{dtype} {document:?}");
                }
            }
        }
    }

    #[test]
    fn wrong_arguments_are_refused() {
        let good = || Case::new(&[5, 3], HEADS[1], DType::F32);
        let mut case = good();
        case.qkv = tensor(&[8, 18], 1, DType::F32);
        assert!(matches!(
            case.forward(),
            Err(Error::Shape { arg: "qkv_tc", .. })
        ));
        let mut case = good();
        case.w = tensor(&[case.w.shape()[0], 1, 3], 1, DType::F32);
        assert!(matches!(case.forward(), Err(Error::Shape { arg: "w", .. })));
        let mut case = good();
        case.cu_seqlens = vec![0, 9];
        let arg = "cu_seqlens";
        assert!(matches!(case.forward(), Err(Error::Shape { arg: a, .. }) if a == arg));
    }
}
