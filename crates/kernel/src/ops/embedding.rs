//! Rows of a table by token id: out[t] = table[tokens[t]]; the gradient adds each row back to where it came from.

use super::check;
use crate::{Device, Error, Result, Tensor};

/// `out` assigned. Shapes: out_td [T,D]; table_cd [C,D]; tokens_t [T].
///
/// # Errors
/// [`Error::Shape`] where shapes disagree, [`Error::Index`] for an id of C or above.
pub fn forward(out_td: &mut Tensor, table_cd: &Tensor, tokens_t: &[u32]) -> Result<()> {
    const OP: &str = "embedding::forward";
    check_rows(OP, ["out_td", "table_cd"], out_td, table_cd, tokens_t)?;
    match check::device(OP, out_td, &[("table_cd", table_cd)])? {
        Device::Cpu => cpu::forward(out_td, table_cd, tokens_t),
        Device::Cuda(cuda) => cuda::forward(cuda, out_td, table_cd, tokens_t)?,
    }
    Ok(())
}

/// d_table_cd[tokens[t]] += d_out_td[t], in token order (on a GPU, rows of an id that occurs often are first added up in
/// stretches). Shapes as in [`forward`], d_table_cd f32.
///
/// # Errors
/// As [`forward`], and [`Error::DType`] where d_table_cd is not f32.
pub fn backward(d_table_cd: &mut Tensor, d_out_td: &Tensor, tokens_t: &[u32]) -> Result<()> {
    const OP: &str = "embedding::backward";
    check_rows(
        OP,
        ["d_out_td", "d_table_cd"],
        d_out_td,
        d_table_cd,
        tokens_t,
    )?;
    check::f32(OP, "d_table_cd", d_table_cd)?;
    match check::device(OP, d_table_cd, &[("d_out_td", d_out_td)])? {
        Device::Cpu => cpu::backward(d_table_cd, d_out_td, tokens_t),
        Device::Cuda(cuda) => cuda::backward(cuda, d_table_cd, d_out_td, tokens_t)?,
    }
    Ok(())
}

fn check_rows(
    op: &'static str,
    [row_arg, table_arg]: [&'static str; 2],
    rows_td: &Tensor,
    table_cd: &Tensor,
    tokens_t: &[u32],
) -> Result<()> {
    let [c, d] = check::dims(op, table_arg, table_cd, "[C,D]")?;
    check::shape(op, row_arg, rows_td, &[tokens_t.len(), d])?;
    match tokens_t.iter().position(|id| *id as usize >= c) {
        Some(row) => Err(Error::Index {
            op,
            arg: "tokens_t",
            row,
            value: tokens_t[row] as i64,
            bound: c,
        }),
        None => Ok(()),
    }
}

mod cpu {
    use crate::Tensor;
    use crate::cpu::math::add;
    use crate::cpu::{Out, View, for_rows, simd};

    pub(super) fn forward(out_td: &mut Tensor, table_cd: &Tensor, tokens_t: &[u32]) {
        let d = table_cd.numel() / table_cd.shape()[0].max(1);
        let table = View::of(table_cd);
        for_rows(
            [Out::assign(out_td, d)],
            [],
            #[inline(always)]
            |first_row, [out], []| {
                let tokens = &tokens_t[first_row..];
                for (out, id) in out.chunks_exact_mut(d).zip(tokens) {
                    let start = *id as usize * d;
                    table.slice(start..start + d).read_into(out);
                }
            },
        );
    }

    /// One thread: a token may occur anywhere, and its rows must be added in order.
    pub(super) fn backward(d_table_cd: &mut Tensor, d_out_td: &Tensor, tokens_t: &[u32]) {
        let d = d_out_td.numel() / tokens_t.len().max(1);
        let d_out = View::of(d_out_td);
        let d_table = d_table_cd.f32s_mut();
        let mut scratch = Vec::new();
        simd(
            #[inline(always)]
            || {
                for (row, id) in tokens_t.iter().enumerate() {
                    let start = *id as usize * d;
                    let row = d_out.slice(row * d..(row + 1) * d).load(&mut scratch);
                    add(&mut d_table[start..start + d], row);
                }
            },
        );
    }
}

pub(super) mod cuda {
    use crate::cuda::sources::EMBEDDING;
    use crate::cuda::{Args, Cuda, Grid};
    use crate::{DType, Result, Tensor};

    /// A row number that reads as zeros and is not written.
    pub(in crate::ops) const NO_ROW: u32 = u32::MAX;
    const THREADS: usize = 128;
    /// Occurrences of an id up to which one thread adds them all.
    const FEW: u32 = 16;

    pub(super) fn forward(
        cuda: Cuda,
        out: &mut Tensor,
        table: &Tensor,
        tokens_t: &[u32],
    ) -> Result<()> {
        if tokens_t.is_empty() {
            return Ok(());
        }
        let rows = cuda.upload(tokens_t)?;
        let out = (out.device_pointer(), out.dtype());
        gather(cuda, out, table, rows, tokens_t.len())
    }

    /// out[r] = table[rows[r]] for `n_rows` row numbers at `rows`; zeros for [`NO_ROW`].
    pub(in crate::ops) fn gather(
        cuda: Cuda,
        (out, dtype): (u64, DType),
        table: &Tensor,
        rows: u64,
        n_rows: usize,
    ) -> Result<()> {
        let d = width(table);
        let args = Args::new().view_at(out, dtype).view(table).pointer(rows);
        let kernel = wide(d, ["embedding_gather", "embedding_gather_8"]);
        let grid = Grid::line(n_rows, THREADS as u32);
        cuda.launch(&EMBEDDING, kernel, grid, args.u32(d))
    }

    /// out[rows[r]] = x[r] for `n_rows` row numbers at `rows`, no two alike; [`NO_ROW`] is skipped.
    pub(in crate::ops) fn scatter(
        cuda: Cuda,
        out: &mut Tensor,
        (x, dtype): (u64, DType),
        rows: u64,
        n_rows: usize,
    ) -> Result<()> {
        let d = width(out);
        let args = Args::new().view_mut(out).view_at(x, dtype).pointer(rows);
        let kernel = wide(d, ["embedding_scatter", "embedding_scatter_8"]);
        let grid = Grid::line(n_rows, THREADS as u32);
        cuda.launch(&EMBEDDING, kernel, grid, args.u32(d))
    }

    pub(super) fn backward(
        cuda: Cuda,
        d_table: &mut Tensor,
        d_out: &Tensor,
        tokens_t: &[u32],
    ) -> Result<()> {
        if tokens_t.is_empty() {
            return Ok(());
        }
        let d = width(d_table);
        let Segments { few, many, order } = Segments::of(tokens_t);
        // One table: segments (three words each), then the order.
        let mut table = Vec::with_capacity(3 * (few.len() + many.len()) + order.len());
        table.extend(few.iter().chain(&many).flatten());
        table.extend(&order);
        let segments = cuda.upload(&table)?;
        let at = |words: usize| segments + 4 * words as u64;
        let order = at(3 * (few.len() + many.len()));
        let columns = if d.is_multiple_of(8) { d / 8 } else { d };
        let mut queue = |kernel, segments, blocks: [usize; 2], threads| {
            let args = Args::new().tensor_mut(d_table).view(d_out);
            let args = args.pointer(segments).pointer(order).u32(d);
            let grid = Grid {
                blocks: [blocks[0] as u32, blocks[1] as u32, 1],
                threads,
                shared_bytes: 0,
            };
            cuda.launch(&EMBEDDING, kernel, grid, args)
        };
        queue(
            wide(d, ["embedding_backward_few", "embedding_backward_few_8"]),
            segments,
            [few.len(), columns.div_ceil(THREADS)],
            THREADS as u32,
        )?;
        queue(
            wide(d, ["embedding_backward_many", "embedding_backward_many_8"]),
            at(3 * few.len()),
            [many.len(), columns.div_ceil(32)],
            256,
        )
    }

    fn width(table: &Tensor) -> usize {
        table.shape().last().copied().unwrap_or(1)
    }

    /// The kernel for a width that is no multiple of 8, or the one for a width that is.
    fn wide(d: usize, [narrow, wide]: [&'static str; 2]) -> &'static str {
        if d.is_multiple_of(8) { wide } else { narrow }
    }

    /// Where each id occurs: (id, first, n) with its rows at `order[first..first + n]`, rising.
    #[derive(Debug, PartialEq)]
    pub(super) struct Segments {
        /// Ids of at most [`FEW`] occurrences.
        pub few: Vec<[u32; 3]>,
        pub many: Vec<[u32; 3]>,
        pub order: Vec<u32>,
    }

    impl Segments {
        pub fn of(tokens_t: &[u32]) -> Segments {
            let mut keys: Vec<u64> = (0u64..)
                .zip(tokens_t)
                .map(|(row, id)| u64::from(*id) << 32 | row)
                .collect();
            keys.sort_unstable();
            let order: Vec<u32> = keys.iter().map(|key| *key as u32).collect();
            let (mut few, mut many) = (Vec::new(), Vec::new());
            let mut first = 0;
            for segment in keys.chunk_by(|a, b| a >> 32 == b >> 32) {
                let n = segment.len() as u32;
                let kind = if n <= FEW { &mut few } else { &mut many };
                kind.push([(segment[0] >> 32) as u32, first, n]);
                first += n;
            }
            Segments { few, many, order }
        }
    }
}

pub(crate) mod examples {
    use crate::DType::{self, Bf16, F32};
    use crate::example::{Example, Sizes, Tolerance};

    /// Rows of the released embedding.
    const VOCABULARY: usize = 248_320;

    /// Shape of the table, and ids: at the ends of the released vocabulary, repeated, often and once; widths that are and are no
    /// multiple of 8.
    fn tables() -> [([usize; 2], Vec<u32>); 7] {
        let last = VOCABULARY as u32 - 1;
        let spread = |t: u32, c: u32| t.wrapping_mul(2_654_435_761) % c;
        let often = |t: u32, c: u32| if t.is_multiple_of(3) { spread(t, c) } else { 5 };
        [
            ([10, 40], vec![9]),
            ([4000, 64], (0..300).map(|t| spread(t, 4000)).collect()),
            ([50, 33], (0..700).map(|t| spread(t, 50)).collect()),
            ([7, 72], vec![6; 5000]),
            ([900, 2560], (0..600).map(|t| often(t, 900)).collect()),
            ([90, 129], (0..601).map(|t| often(t, 90)).collect()),
            ([VOCABULARY, 16], vec![last, 0, last, 5, last - 1]),
        ]
    }

    pub(crate) fn compared() -> Vec<Example> {
        let mut all = Vec::new();
        for (shape, tokens) in tables() {
            for (from, to) in [(F32, F32), (Bf16, Bf16), (F32, Bf16), (Bf16, F32)] {
                let example = forward(shape, tokens.clone(), [from, to]);
                all.push(example.tolerance(Tolerance::EXACT));
            }
            for dtype in [F32, Bf16] {
                all.push(backward(shape, tokens.clone(), dtype));
            }
        }
        all
    }

    pub(crate) fn timed(sizes: &Sizes) -> Vec<Example> {
        let shape = [sizes.vocabulary, sizes.hidden];
        let tokens: Vec<u32> = sizes.spread().map(|id| id as u32).collect();
        // A row of the table for each token.
        let rows = (sizes.n_tokens * sizes.hidden) as f64;
        let forward = forward(shape, tokens.clone(), [sizes.dtype; 2])
            .bytes_at_least(2.0 * rows * sizes.dtype.size() as f64);
        // As many rows of the table's gradient as there are tokens; these are f32 like what is added to them.
        let backward = backward(shape, tokens, F32).bytes_at_least(3.0 * rows * 4.0);
        vec![forward, backward]
    }

    fn forward([c, d]: [usize; 2], tokens: Vec<u32>, [from, to]: [DType; 2]) -> Example {
        let t = tokens.len();
        Example::new("embedding/forward", format!("t{t}_d{d}_c{c}"))
            .out("out", &[t, d], to)
            .input("table", &[c, d], from)
            .run(move |[out], [table]| super::forward(out, table, &tokens))
    }

    fn backward([c, d]: [usize; 2], tokens: Vec<u32>, dtype: DType) -> Example {
        let t = tokens.len();
        Example::new("embedding/backward", format!("t{t}_d{d}_c{c}"))
            .updated("d_table", &[c, d], F32)
            .input("d_out", &[t, d], dtype)
            .run(move |[d_table], [d_out]| super::backward(d_table, d_out, &tokens))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::ops::testing::{STORAGES, assert_close, f64s, tensor};

    #[test]
    fn forward_copies_the_rows() {
        for (dtype, _) in STORAGES {
            let (c, d) = (50, 33);
            let table = tensor(&[c, d], 1, dtype);
            let tokens: Vec<u32> = (0..3001).map(|t| t * 7 % c as u32).collect();
            let mut out = Tensor::poison(&[tokens.len(), d], dtype);
            forward(&mut out, &table, &tokens).unwrap();
            let (out, table) = (out.to_f32_vec(), table.to_f32_vec());
            for (out, id) in out.chunks(d).zip(&tokens) {
                assert_eq!(out, &table[*id as usize * d..][..d]);
            }
        }
    }

    #[test]
    fn backward_adds_every_occurrence_to_what_was_there() {
        for (dtype, _) in STORAGES {
            let (c, d) = (6, 5);
            let tokens = [3, 0, 3, 3, 5];
            let d_out = tensor(&[tokens.len(), d], 1, dtype);
            let before = tensor(&[c, d], 2, DType::F32);
            let mut d_table = before.clone();
            backward(&mut d_table, &d_out, &tokens).unwrap();
            let mut want = f64s(&before);
            for (t, id) in tokens.iter().enumerate() {
                for i in 0..d {
                    want[*id as usize * d + i] += f64s(&d_out)[t * d + i];
                }
            }
            assert_close("d_table", &d_table, &want, 1e-6);
        }
    }

    #[test]
    fn no_tokens_are_allowed() {
        let table = tensor(&[4, 3], 1, DType::F32);
        forward(&mut Tensor::zeros(&[0, 3], DType::F32), &table, &[]).unwrap();
        let mut d_table = table.clone();
        backward(&mut d_table, &Tensor::zeros(&[0, 3], DType::F32), &[]).unwrap();
        assert_eq!(d_table, table);
    }

    #[test]
    fn segments_hold_every_row_once_under_its_id() {
        let mut tokens = vec![9, 2, 9, 0];
        tokens.extend([7; 20]);
        tokens.push(2);
        let segments = cuda::Segments::of(&tokens);
        assert_eq!(segments.few, [[0, 0, 1], [2, 1, 2], [9, 23, 2]]);
        assert_eq!(segments.many, [[7, 3, 20]]);
        let mut want = vec![3, 1, 24];
        want.extend(4..24);
        want.extend([0, 2]);
        assert_eq!(segments.order, want);
    }

    #[test]
    fn id_beyond_the_table_is_refused() {
        let table = tensor(&[4, 3], 1, DType::F32);
        let error = forward(&mut Tensor::zeros(&[2, 3], DType::F32), &table, &[0, 4]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "embedding::forward: `tokens_t` holds 4 at row 1, outside 0..4"
        );
    }
}
