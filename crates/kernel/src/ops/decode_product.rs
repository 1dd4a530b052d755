//! Products of a few rows with large weights, for decoding: y = x wᵀ with what stands before and behind it in a layer, so that a layer
//! has few launches. Each weight is read once, and a row's result does not depend on the rows beside it, to the bit.
//!
//! Before: the norm of the residual stream. Its factor (1 + w) is multiplied into the stream by whoever wrote it last ([`Stream`]), its
//! reciprocal root mean square r is one number a row and is multiplied to the product: y = r · (x (1 + w)) Wᵀ, one rounding as in
//! [`super::rms_norm`]. Behind: SwiGLU ([`swiglu`]), or the sum with the stream ([`accumulate`]).
//! On a GPU everything but `squares` and logits is bf16.

// B rows (one token each), K inner, O out, F feed-forward, D hidden, C vocabulary, P = ceil(D / 16).

use super::check;
use crate::cuda::Placed;
use crate::{DType, Device, Error, Result, Tensor};

/// Neighbours whose squares are added up.
const TILE: usize = 16;

/// The most weights that one call multiplies with.
const MOST_WEIGHTS: usize = 4;

/// A residual stream, and what the next norm needs of it.
#[derive(Debug)]
pub struct Stream {
    /// [B,D]
    pub x_bd: Tensor,
    /// x (1 + w) [B,D], w that of the next norm.
    pub scaled_bd: Tensor,
    /// Sums of squares of 16 neighbours of x each [B,P] f32.
    pub squares_bp: Tensor,
}

impl Stream {
    /// With no rows yet.
    pub fn new(dtype: DType, device: Device) -> Self {
        Stream {
            x_bd: Tensor::empty_on(device, dtype),
            scaled_bd: Tensor::empty_on(device, dtype),
            squares_bp: Tensor::empty_on(device, DType::F32),
        }
    }

    /// Gives it `b` rows of width `d`; contents are unspecified.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub fn resize(&mut self, b: usize, d: usize) -> Result<()> {
        self.x_bd.resize(&[b, d])?;
        self.scaled_bd.resize(&[b, d])?;
        self.squares_bp.resize(&[b, d.div_ceil(TILE)])
    }

    /// Its norm, as the input of a product.
    pub fn normed(&self, eps: f32) -> Input<'_> {
        Input {
            x_bk: &self.scaled_bd,
            squares_bp: Some(&self.squares_bp),
            eps,
        }
    }

    fn check(&self, op: &'static str, b: usize, d: usize, norm_d: &Tensor) -> Result<()> {
        check::shape(op, "x_bd", &self.x_bd, &[b, d])?;
        check::shape(op, "scaled_bd", &self.scaled_bd, &[b, d])?;
        check::shape(op, "squares_bp", &self.squares_bp, &[b, d.div_ceil(TILE)])?;
        check::f32(op, "squares_bp", &self.squares_bp)?;
        check::shape(op, "norm_d", norm_d, &[d])
    }

    fn others(&self) -> [(&'static str, &Tensor); 3] {
        [
            ("x_bd", &self.x_bd),
            ("scaled_bd", &self.scaled_bd),
            ("squares_bp", &self.squares_bp),
        ]
    }
}

/// What a product reads beside weights: rows as they are, or the norm of a [`Stream`].
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// [B,K]
    pub x_bk: &'a Tensor,
    /// As in [`Stream`], of a norm's input.
    pub squares_bp: Option<&'a Tensor>,
    /// Added to the mean square.
    pub eps: f32,
}

impl<'a> Input<'a> {
    /// Rows as they are.
    pub fn plain(x_bk: &'a Tensor) -> Self {
        Input {
            x_bk,
            squares_bp: None,
            eps: 0.0,
        }
    }

    /// (B, K)
    fn check(&self, op: &'static str) -> Result<(usize, usize)> {
        let (b, k) = check::matrix(op, "x_bk", self.x_bk)?;
        if let Some(squares) = self.squares_bp {
            check::shape(op, "squares_bp", squares, &[b, k.div_ceil(TILE)])?;
            check::f32(op, "squares_bp", squares)?;
        }
        Ok((b, k))
    }
}

/// Whether a GPU multiplies with weights of this inner dimension: rows of 16 bytes' multiples.
pub fn supports(k: usize) -> bool {
    k > 0 && k.is_multiple_of(8)
}

/// outs[i] = x w[i]ᵀ, assigned. Shapes: x [B,K]; up to four w[i] [O_i,K]; outs[i] [B,O_i], or heads that multiply up to it. On a GPU all
/// outs are bf16 or all f32.
///
/// # Errors
/// [`Error::Shape`] where shapes disagree; [`Error::Unsupported`] on a GPU for other types, or a K that is no multiple of 8.
pub fn forward(outs: &mut [&mut Tensor], input: Input, weights: &[&Tensor]) -> Result<()> {
    const OP: &str = "decode_product::forward";
    let (b, k) = input.check(OP)?;
    check::len(OP, "outs", outs.len(), weights.len())?;
    if weights.is_empty() || weights.len() > MOST_WEIGHTS {
        check::len(OP, "weights", weights.len(), MOST_WEIGHTS)?;
    }
    for (out, w) in outs.iter().zip(weights) {
        let [o, _] = check::dims(OP, "w_ok", w, "[O,K]")?;
        check::shape(OP, "w_ok", w, &[o, k])?;
        check::numel(OP, "outs", out, b * o)?;
        check::device(OP, out, &[("w_ok", w), ("x_bk", input.x_bk)])?;
    }
    match input.x_bk.device() {
        Device::Cpu => cpu::forward(outs, input, weights),
        Device::Cuda(cuda) => cuda::forward(cuda, OP, outs, input, weights)?,
    }
    Ok(())
}

/// out = silu(x gateᵀ) · (x upᵀ), assigned. Shapes: out [B,F]; x [B,K]; gate, up [F,K].
///
/// # Errors
/// As [`forward`].
pub fn swiglu(out_bf: &mut Tensor, input: Input, gate_fk: &Tensor, up_fk: &Tensor) -> Result<()> {
    const OP: &str = "decode_product::swiglu";
    let (b, k) = input.check(OP)?;
    let [f, _] = check::dims(OP, "gate_fk", gate_fk, "[F,K]")?;
    check::shape(OP, "gate_fk", gate_fk, &[f, k])?;
    check::shape(OP, "up_fk", up_fk, &[f, k])?;
    check::shape(OP, "out_bf", out_bf, &[b, f])?;
    let others = [("x_bk", input.x_bk), ("gate_fk", gate_fk), ("up_fk", up_fk)];
    match check::device(OP, out_bf, &others)? {
        Device::Cpu => cpu::swiglu(out_bf, input, gate_fk, up_fk),
        Device::Cuda(cuda) => cuda::swiglu(cuda, OP, out_bf, input, gate_fk, up_fk)?,
    }
    Ok(())
}

/// The stream += x wᵀ; what its next norm, of weight `norm`, needs is assigned. Shapes: x [B,K]; w [D,K]; norm [D].
///
/// # Errors
/// As [`forward`].
pub fn accumulate(stream: &mut Stream, input: Input, w_dk: &Tensor, norm_d: &Tensor) -> Result<()> {
    const OP: &str = "decode_product::accumulate";
    let (b, k) = input.check(OP)?;
    let [d, _] = check::dims(OP, "w_dk", w_dk, "[D,K]")?;
    check::shape(OP, "w_dk", w_dk, &[d, k])?;
    stream.check(OP, b, d, norm_d)?;
    let [first, second, third] = stream.others();
    let others = [first, second, third, ("w_dk", w_dk), ("norm_d", norm_d)];
    match check::device(OP, input.x_bk, &others)? {
        Device::Cpu => cpu::accumulate(stream, input, w_dk, norm_d),
        Device::Cuda(cuda) => cuda::accumulate(cuda, OP, stream, input, w_dk, norm_d)?,
    }
    Ok(())
}

/// The stream's beginning: rows of the table, and what the first norm needs. Shapes: table [C,D]; norm [D]; tokens [B].
///
/// # Errors
/// [`Error::Shape`], [`Error::Index`] for an id of C or above, [`Error::Unsupported`] as [`forward`].
pub fn embed(
    stream: &mut Stream,
    table_cd: &Tensor,
    norm_d: &Tensor,
    tokens_b: Placed,
) -> Result<()> {
    const OP: &str = "decode_product::embed";
    let [c, d] = check::dims(OP, "table_cd", table_cd, "[C,D]")?;
    stream.check(OP, tokens_b.words.len(), d, norm_d)?;
    if let Some(row) = tokens_b.words.iter().position(|id| *id as usize >= c) {
        return Err(Error::Index {
            op: OP,
            arg: "tokens_b",
            row,
            value: i64::from(tokens_b.words[row]),
            bound: c,
        });
    }
    let [first, second, third] = stream.others();
    let others = [first, second, third, ("norm_d", norm_d)];
    match check::device(OP, table_cd, &others)? {
        Device::Cpu => cpu::embed(stream, table_cd, norm_d, tokens_b.words),
        Device::Cuda(cuda) => cuda::embed(cuda, OP, stream, table_cd, norm_d, tokens_b)?,
    }
    Ok(())
}

/// The definition, plainly.
mod cpu {
    use rayon::prelude::*;

    use super::{Input, Stream, TILE};
    use crate::Tensor;
    use crate::cpu::math::silu;
    use crate::cpu::{View, ViewMut};

    pub(super) fn forward(outs: &mut [&mut Tensor], input: Input, weights: &[&Tensor]) {
        for (out, w) in outs.iter_mut().zip(weights) {
            ViewMut::of(out).store(&product(input, w));
        }
    }

    pub(super) fn swiglu(out: &mut Tensor, input: Input, gate: &Tensor, up: &Tensor) {
        let (gate, up) = (product(input, gate), product(input, up));
        let both = gate.iter().zip(&up);
        let values: Vec<f32> = both.map(|(gate, up)| silu(*gate) * up).collect();
        ViewMut::of(out).store(&values);
    }

    pub(super) fn accumulate(stream: &mut Stream, input: Input, w: &Tensor, norm: &Tensor) {
        let y = product(input, w);
        let x = stream.x_bd.to_f32_vec();
        let sum: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
        assign(stream, &sum, norm);
    }

    pub(super) fn embed(stream: &mut Stream, table: &Tensor, norm: &Tensor, tokens: &[u32]) {
        let d = norm.numel();
        let table = View::of(table);
        let mut x = vec![0.0; tokens.len() * d];
        for (row, id) in x.chunks_exact_mut(d).zip(tokens) {
            let first = *id as usize * d;
            table.slice(first..first + d).read_into(row);
        }
        assign(stream, &x, norm);
    }

    /// A stream of these numbers.
    fn assign(stream: &mut Stream, x: &[f32], norm: &Tensor) {
        ViewMut::of(&mut stream.x_bd).store(x);
        // What is stored, not what was rounded to it, is scaled and squared.
        let x = stream.x_bd.to_f32_vec();
        let factors: Vec<f32> = norm.to_f32_vec().iter().map(|w| 1.0 + w).collect();
        let rows = x.chunks_exact(factors.len());
        let scaled = rows.flat_map(|row| row.iter().zip(&factors).map(|(x, factor)| x * factor));
        let scaled: Vec<f32> = scaled.collect();
        ViewMut::of(&mut stream.scaled_bd).store(&scaled);
        let tiles = x
            .chunks_exact(factors.len())
            .flat_map(|row| row.chunks(TILE));
        let squares = tiles.map(|tile| tile.iter().map(|x| x * x).sum());
        let squares: Vec<f32> = squares.collect();
        stream.squares_bp.f32s_mut().copy_from_slice(&squares);
    }

    /// y [B,O]
    fn product(input: Input, w: &Tensor) -> Vec<f32> {
        let k = w.shape()[1];
        let (x, w) = (input.x_bk.to_f32_vec(), w.to_f32_vec());
        let rows: Vec<(usize, &[f32])> = x.chunks_exact(k).enumerate().collect();
        rows.into_par_iter()
            .flat_map_iter(|(b, x)| {
                let factor = reciprocal(input, b, k);
                let dot = move |w: &[f32]| {
                    let products = x.iter().zip(w).map(|(x, w)| f64::from(x * w));
                    products.sum::<f64>() as f32 * factor
                };
                w.chunks_exact(k).map(dot).collect::<Vec<_>>()
            })
            .collect()
    }

    fn reciprocal(input: Input, b: usize, k: usize) -> f32 {
        let Some(squares) = input.squares_bp else {
            return 1.0;
        };
        let p = k.div_ceil(TILE);
        let sum: f32 = squares.f32s()[b * p..(b + 1) * p].iter().sum();
        1.0 / (sum / k as f32 + input.eps).sqrt()
    }
}

mod cuda {
    use super::{Input, MOST_WEIGHTS, Stream, TILE, supports};
    use crate::cuda::sources::DECODE_PRODUCT;
    use crate::cuda::{Args, Cuda, Grid, Placed};
    use crate::{DType, Error, Result, Tensor};

    const WARP: u32 = 32;

    /// What a kernel does with its product.
    #[derive(Clone, Copy, PartialEq, Eq)]
    enum Output {
        Plain,
        Wide,
        Swiglu,
        Residual,
    }

    /// Instances of a kernel by the most rows of x: names by [`Output`], and the tiles of 16 weight rows that a block has where warps
    /// share the inner dimension by eight, and by sixteen (as decode_product.cu has them).
    struct Instance {
        most_rows: usize,
        names: [&'static str; 4],
        tiles: [usize; 2],
    }

    const INSTANCES: [Instance; 3] = [
        Instance {
            most_rows: 8,
            names: [
                "decode_product_plain_1",
                "decode_product_wide_1",
                "decode_product_swiglu_1",
                "decode_product_residual_1",
            ],
            tiles: [1, 1],
        },
        Instance {
            most_rows: 16,
            names: [
                "decode_product_plain_2",
                "decode_product_wide_2",
                "decode_product_swiglu_2",
                "decode_product_residual_2",
            ],
            tiles: [1, 1],
        },
        Instance {
            most_rows: 32,
            names: [
                "decode_product_plain_4",
                "decode_product_wide_4",
                "decode_product_swiglu_4",
                "decode_product_residual_4",
            ],
            tiles: [2, 2],
        },
    ];

    pub(super) fn forward(
        cuda: Cuda,
        op: &'static str,
        outs: &mut [&mut Tensor],
        input: Input,
        weights: &[&Tensor],
    ) -> Result<()> {
        let dtype = outs[0].dtype();
        if outs.iter().any(|out| out.dtype() != dtype) {
            return Err(unsupported(op, "outputs of mixed types"));
        }
        let parts: Vec<Part> = outs
            .iter_mut()
            .zip(weights)
            .map(|(out, w)| Part::new(w, out.device_pointer()))
            .collect();
        let output = match dtype {
            DType::Bf16 => Output::Plain,
            DType::F32 => Output::Wide,
        };
        check_bf16(op, input.x_bk, weights)?;
        launch(cuda, output, input, &parts, None)
    }

    pub(super) fn swiglu(
        cuda: Cuda,
        op: &'static str,
        out: &mut Tensor,
        input: Input,
        gate: &Tensor,
        up: &Tensor,
    ) -> Result<()> {
        check_bf16(op, input.x_bk, &[out, gate, up])?;
        let parts = [gate, up].map(|w| Part::new(w, out.device_pointer()));
        launch(cuda, Output::Swiglu, input, &parts, None)
    }

    pub(super) fn accumulate(
        cuda: Cuda,
        op: &'static str,
        stream: &mut Stream,
        input: Input,
        w: &Tensor,
        norm: &Tensor,
    ) -> Result<()> {
        let others = [&stream.x_bd, &stream.scaled_bd, w, norm];
        check_bf16(op, input.x_bk, &others)?;
        let part = Part::new(w, 0);
        launch(cuda, Output::Residual, input, &[part], Some((stream, norm)))
    }

    pub(super) fn embed(
        cuda: Cuda,
        op: &'static str,
        stream: &mut Stream,
        table: &Tensor,
        norm: &Tensor,
        tokens: Placed,
    ) -> Result<()> {
        check_types(op, table, &[&stream.x_bd, &stream.scaled_bd, norm])?;
        let args = Args::new()
            .tensor_mut(&mut stream.x_bd)
            .tensor_mut(&mut stream.scaled_bd)
            .tensor_mut(&mut stream.squares_bp)
            .tensor(table)
            .tensor(norm)
            .pointer(tokens.pointer)
            .u32(norm.numel());
        let grid = Grid::line(tokens.words.len(), 256);
        cuda.launch_early(&DECODE_PRODUCT, "decode_product_embed", grid, args)
    }

    struct Part {
        w: u64,
        out: u64,
        rows: usize,
    }

    impl Part {
        fn new(w: &Tensor, out: u64) -> Part {
            Part {
                w: w.device_pointer(),
                out,
                rows: w.shape()[0],
            }
        }
    }

    fn launch(
        cuda: Cuda,
        output: Output,
        input: Input,
        parts: &[Part],
        stream: Option<(&mut Stream, &Tensor)>,
    ) -> Result<()> {
        let k = input.x_bk.shape().last().copied().unwrap_or(0);
        let b = input.x_bk.numel() / k.max(1);
        // Beyond the largest instance, several rows of blocks read the weights.
        let instance = INSTANCES.iter().find(|i| b <= i.most_rows);
        let instance = instance.unwrap_or(&INSTANCES[INSTANCES.len() - 1]);
        let n_tiles: usize = match output {
            Output::Swiglu => parts[0].rows.div_ceil(TILE / 2),
            _ => parts.iter().map(|part| part.rows.div_ceil(TILE)).sum(),
        };
        let (n_warps, tiles) = match output {
            Output::Residual => (16, instance.tiles[1]),
            _ => (8, instance.tiles[0]),
        };
        let mut args = Args::new()
            .tensor(input.x_bk)
            .pointer(input.squares_bp.map_or(0, Tensor::device_pointer))
            .u32(b)
            .u32(k)
            .u32(input.squares_bp.map_or(0, |squares| squares.shape()[1]))
            .f32(input.eps);
        for idx in 0..MOST_WEIGHTS {
            let (w, out, rows) = parts
                .get(idx)
                .map_or((0, 0, 0), |part| (part.w, part.out, part.rows));
            args = args.pointer(w).pointer(out).u32(rows);
        }
        let args = match stream {
            Some((stream, norm)) => args
                .tensor_mut(&mut stream.x_bd)
                .tensor_mut(&mut stream.scaled_bd)
                .tensor_mut(&mut stream.squares_bp)
                .tensor(norm),
            None => args.pointer(0).pointer(0).pointer(0).pointer(0),
        };
        let blocks = [
            n_tiles.div_ceil(tiles) as u32,
            b.div_ceil(instance.most_rows) as u32,
            1,
        ];
        let grid = Grid {
            blocks,
            threads: n_warps * WARP,
            shared_bytes: 0,
        };
        let name = instance.names[output as usize];
        cuda.launch_early(&DECODE_PRODUCT, name, grid, args)
    }

    /// Types, and the inner dimension of x.
    fn check_bf16(op: &'static str, x: &Tensor, others: &[&Tensor]) -> Result<()> {
        check_types(op, x, others)?;
        let k = x.shape().last().copied().unwrap_or(0);
        match supports(k) {
            true => Ok(()),
            false => Err(unsupported(
                op,
                &format!("{k} inner dims; a multiple of 8 goes"),
            )),
        }
    }

    fn check_types(op: &'static str, first: &Tensor, others: &[&Tensor]) -> Result<()> {
        let mut all = others.iter().chain([&first]);
        match all.all(|tensor| tensor.dtype() == DType::Bf16) {
            true => Ok(()),
            false => Err(unsupported(op, "other types than bf16")),
        }
    }

    fn unsupported(op: &'static str, what: &str) -> Error {
        Error::Unsupported {
            op,
            what: what.to_owned(),
        }
    }
}

pub(crate) mod examples {
    use super::{Input, Stream};
    use crate::DType::{Bf16, F32};
    use crate::cuda::StepTable;
    use crate::example::{Example, Tolerance};
    use crate::ops::copy;
    use crate::{Device, Result, Tensor};

    /// Rows of every instance, inner dims that end within a piece of 128 bytes and beyond one, rows of weights that fill no tile.
    const SHAPES: [[usize; 3]; 6] = [
        [1, 64, 40],
        [3, 2560, 48],
        [8, 96, 33],
        [13, 224, 80],
        [32, 1032, 64],
        [70, 128, 24],
    ];

    pub(crate) fn compared() -> Vec<Example> {
        let mut all = Vec::new();
        for [b, k, o] in SHAPES {
            let shape = format!("b{b}_k{k}_o{o}");
            all.extend([Bf16, F32].map(|out| forward(&shape, [b, k, o], out)));
            all.push(swiglu(&shape, [b, k, o]));
            all.push(accumulate(&shape, [b, k, o]));
            all.push(embed(&shape, [b, o]));
        }
        all
    }

    /// A norm's squares are those of sixteen neighbours each, so positive.
    fn with_input(example: Example, [b, k, _]: [usize; 3]) -> Example {
        let squares = [b, k.div_ceil(16)];
        let example = example.input("x", &[b, k], Bf16);
        example.input_in("squares", &squares, F32, [1.0, 16.0])
    }

    fn forward(shape: &str, [b, k, o]: [usize; 3], out: crate::DType) -> Example {
        let example = Example::new("decode_product/forward", shape.to_owned());
        let example = example.out("y", &[b, o], out).out("narrow", &[b, 5], out);
        with_input(example, [b, k, o])
            .input("w", &[o, k], Bf16)
            .input("w_narrow", &[5, k], Bf16)
            .run(|[y, narrow], [x, squares, w, w_narrow]| {
                let input = normed(x, squares);
                super::forward(&mut [y, narrow], input, &[w, w_narrow])
            })
    }

    fn swiglu(shape: &str, [b, k, f]: [usize; 3]) -> Example {
        let example =
            Example::new("decode_product/swiglu", shape.to_owned()).out("out", &[b, f], Bf16);
        with_input(example, [b, k, f])
            .input_in("gate", &[f, k], Bf16, [-0.1, 0.1])
            .input_in("up", &[f, k], Bf16, [-0.1, 0.1])
            .run(|[out], [x, squares, gate, up]| super::swiglu(out, normed(x, squares), gate, up))
    }

    fn accumulate(shape: &str, [b, k, d]: [usize; 3]) -> Example {
        let example = Example::new("decode_product/accumulate", shape.to_owned());
        example
            .updated("x", &[b, d], Bf16)
            .out("scaled", &[b, d], Bf16)
            .out("squares", &[b, d.div_ceil(16)], F32)
            .input("input", &[b, k], Bf16)
            .input_in("w", &[d, k], Bf16, [-0.1, 0.1])
            .input("norm", &[d], Bf16)
            // Squares of numbers that are rounded to bf16 on both sides, now and then to neighbours.
            .tolerance(Tolerance {
                f32: 5e-3,
                bf16: 5e-3,
            })
            .run(|outs, [input, w, norm]| {
                on_stream(outs, |stream| {
                    super::accumulate(stream, Input::plain(input), w, norm)
                })
            })
    }

    fn embed(shape: &str, [b, d]: [usize; 2]) -> Example {
        let example = Example::new("decode_product/embed", shape.to_owned());
        example
            .out("x", &[b, d], Bf16)
            .out("scaled", &[b, d], Bf16)
            .out("squares", &[b, d.div_ceil(16)], F32)
            .input("table", &[19, d], Bf16)
            .input("norm", &[d], Bf16)
            .run(move |outs, [table, norm]| {
                let mut step = StepTable::new(table.device(), b + 1)?;
                let tokens = step.push((0..b as u32).map(|row| row * 7 % 19));
                step.upload()?;
                on_stream(outs, |stream| {
                    super::embed(stream, table, norm, step.at(tokens))
                })
            })
    }

    fn normed<'a>(x: &'a Tensor, squares: &'a Tensor) -> Input<'a> {
        Input {
            x_bk: x,
            squares_bp: Some(squares),
            eps: 1e-6,
        }
    }

    /// Calls with the outputs as a stream.
    fn on_stream(
        [x, scaled, squares]: [&mut Tensor; 3],
        call: impl FnOnce(&mut Stream) -> Result<()>,
    ) -> Result<()> {
        let device: Device = x.device();
        let mut stream = Stream::new(Bf16, device);
        stream.resize(x.shape()[0], x.shape()[1])?;
        stream.x_bd.copy_from(x)?;
        call(&mut stream)?;
        let made = [&stream.x_bd, &stream.scaled_bd, &stream.squares_bp];
        for (out, made) in [x, scaled, squares].into_iter().zip(made) {
            copy::forward(out, 0, made, 0, made.numel())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Random, assert_close, f64s};
    use crate::ops::{matmul, rms_norm, swiglu};

    /// A product behind a norm is what the ops of training make of it.
    #[test]
    fn products_agree_with_norm_and_product_apart() {
        let [b, k, f] = [3, 40, 24];
        let mut random = Random::new(5);
        let x = random.tensor(&[b, k], -2.0, 2.0);
        let norm = random.tensor(&[k], -0.5, 0.5);
        let [gate, up, back] =
            [[f, k], [f, k], [k, f]].map(|shape| random.tensor(&shape, -1.0, 1.0));

        let mut stream = Stream::new(DType::F32, Device::Cpu);
        stream.resize(b, k).unwrap();
        let mut table = StepTableOf::new(b);
        embed(&mut stream, &x, &norm, table.rows()).unwrap();
        let mut product = Tensor::poison(&[b, f], DType::F32);
        super::swiglu(&mut product, stream.normed(1e-6), &gate, &up).unwrap();
        let mut projected = Tensor::poison(&[b, f], DType::F32);
        forward(&mut [&mut projected], stream.normed(1e-6), &[&gate]).unwrap();
        accumulate(&mut stream, Input::plain(&product), &back, &norm).unwrap();

        let mut normed = Tensor::poison(&[b, k], DType::F32);
        let mut rstd = Tensor::poison(&[b], DType::F32);
        rms_norm::forward(&mut normed, &mut rstd, &x, &norm, 1e-6).unwrap();
        let of = |x: &Tensor, w: &Tensor| {
            let mut y = Tensor::poison(&[b, w.shape()[0]], DType::F32);
            matmul::forward(&mut y, x, w).unwrap();
            y
        };
        let mut want = Tensor::poison(&[b, f], DType::F32);
        swiglu::forward(&mut want, &of(&normed, &gate), &of(&normed, &up)).unwrap();
        assert_close("product", &product, &f64s(&want), 1e-5);
        assert_close("projected", &projected, &f64s(&of(&normed, &gate)), 1e-5);
        let mut sum = Tensor::poison(&[b, k], DType::F32);
        matmul::forward_onto(&mut sum, &x, &want, &back).unwrap();
        assert_close("stream", &stream.x_bd, &f64s(&sum), 1e-5);
        rms_norm::forward(&mut normed, &mut rstd, &sum, &norm, 1e-6).unwrap();
        forward(&mut [&mut projected], stream.normed(1e-6), &[&gate]).unwrap();
        assert_close("next", &projected, &f64s(&of(&normed, &gate)), 1e-5);
    }

    /// Rows 0, 1, ... of a table, as tokens.
    struct StepTableOf(crate::cuda::StepTable, crate::cuda::Slot);

    impl StepTableOf {
        fn new(b: usize) -> Self {
            let mut table = crate::cuda::StepTable::new(Device::Cpu, b).unwrap();
            let slot = table.push(0..b as u32);
            StepTableOf(table, slot)
        }

        fn rows(&mut self) -> Placed<'_> {
            self.0.at(self.1)
        }
    }

    #[test]
    fn an_unknown_token_and_a_fifth_weight_are_refused() {
        let x = Tensor::zeros(&[1, 8], DType::F32);
        let mut stream = Stream::new(DType::F32, Device::Cpu);
        stream.resize(1, 8).unwrap();
        let mut table = crate::cuda::StepTable::new(Device::Cpu, 1).unwrap();
        let slot = table.push([1]);
        let norm = Tensor::zeros(&[8], DType::F32);
        let refused = embed(&mut stream, &x, &norm, table.at(slot));
        assert!(matches!(refused, Err(Error::Index { .. })));
        let w = Tensor::zeros(&[2, 8], DType::F32);
        let mut outs: Vec<Tensor> = (0..5).map(|_| Tensor::zeros(&[1, 2], DType::F32)).collect();
        let mut outs: Vec<&mut Tensor> = outs.iter_mut().collect();
        assert!(forward(&mut outs, Input::plain(&x), &[&w; 5]).is_err());
    }
}
