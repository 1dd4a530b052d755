//! Products of two bf16 matrices by instructions for them, where the processor has any: AMX's `tdpbf16ps`, which adds the products
//! of two tiles of 16 by 32 (amx.rs), else AVX512-BF16's `vdpbf16ps`, which adds two terms of a sum per lane (avx512.rs).
//!
//! Both matrices are read as they lie and packed two terms to a word; nothing is widened. The instructions are the one thing that
//! needs such a processor: the packing, the blocks and the edges are tested with a plain definition of them on any.
//! Both take denormal numbers, in bf16 as in f32, for zero, give zero where a result would be one, and round to nearest even
//! whatever the thread's floating-point state says; the f32 products of gemm.rs keep denormal numbers.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::OnceLock;

use half::bf16;
use rayon::prelude::*;

use super::{ViewMut, with_scratch};

/// Sums in a vector.
const LANES: usize = 16;
/// Vectors across a block of sums, but for the last columns, which may need one.
const VECTORS: usize = 2;
/// Columns of a block of sums, and its rows where it is made of AMX's tiles.
const WIDTH: usize = VECTORS * LANES;
/// Rows of the tallest block that stays in vectors: its 28 vectors of sums leave room in 32 registers for the operands.
const MAX_HEIGHT: usize = 14;
/// Rows of the lowest: two multiply-adds a cycle of six cycles' latency need 12 sums under way.
const MIN_HEIGHT: usize = 8;
/// Terms of a sum that are added in registers, so that the operands of a block lie in the second-level cache; a bf16 result, which
/// cannot keep a first block's sums, has all its terms in one. Few in tests, so that small shapes cross a border, as in the two
/// below.
const K_BLOCK: usize = if cfg!(test) { 32 } else { 4096 };
/// Elements of the left matrix that a task packs (512 KB).
const TASK_ELEMENTS: usize = if cfg!(test) { 32 * 20 } else { 1 << 18 };
/// Elements of the right matrix that are packed at once, for all tasks (8 MB).
const PANEL_ELEMENTS: usize = if cfg!(test) { 32 * 80 } else { 4 << 20 };

/// Elements of a row that packing asks for ahead of those it reads: four lines of the cache, read in four steps.
const AHEAD: usize = 128;
/// Terms likewise where the rows of a term lie side by side: each is another line of the cache, and mostly another page.
const TERMS_AHEAD: usize = 16;

/// An operand of a product: m rows of the left matrix or n columns of the right one, here both called rows, of k terms each.
#[derive(Clone, Copy)]
pub(crate) struct Operand<'a> {
    data: &'a [bf16],
    n_rows: usize,
    k: usize,
    /// Whether the terms of a row lie side by side, and not the rows of a term.
    k_is_inner: bool,
}

impl<'a> Operand<'a> {
    /// `data` is [n_rows, k], row-major. Panics if its length is another.
    pub(crate) fn row_major(data: &'a [bf16], n_rows: usize, k: usize) -> Self {
        Operand::new(data, n_rows, k, true)
    }

    /// `data` is [k, n_rows], row-major. Panics if its length is another.
    pub(crate) fn column_major(data: &'a [bf16], k: usize, n_rows: usize) -> Self {
        Operand::new(data, n_rows, k, false)
    }

    fn new(data: &'a [bf16], n_rows: usize, k: usize, k_is_inner: bool) -> Self {
        assert_eq!(data.len(), n_rows * k, "an operand of {n_rows} x {k}");
        Operand {
            data,
            n_rows,
            k,
            k_is_inner,
        }
    }

    /// out_pw[p][w] = terms 2p and 2p + 1 of row w, in `terms` and `rows`; zeros beyond their ends.
    #[inline(always)]
    fn pack<D: Instructions, const W: usize>(
        &self,
        kernel: D,
        out_pw: &mut [[u32; W]],
        rows: Range<usize>,
        terms: &Range<usize>,
    ) {
        if self.k_is_inner {
            self.pack_rows(kernel, out_pw, rows, terms);
        } else {
            self.pack_columns(kernel, out_pw, rows, terms);
        }
    }

    #[inline(always)]
    fn pack_rows<D: Instructions, const W: usize>(
        &self,
        kernel: D,
        out_pw: &mut [[u32; W]],
        rows: Range<usize>,
        terms: &Range<usize>,
    ) {
        for (step, out_pw) in out_pw.chunks_mut(LANES).enumerate() {
            let terms = terms.start + 2 * LANES * step..terms.end;
            for first in (0..W).step_by(LANES) {
                let mut block = [[0; LANES]; LANES];
                let rows = rows.clone().skip(first);
                for (row, pairs) in rows.zip(&mut block) {
                    let row = row * self.k;
                    *pairs = first_pairs(&self.data[row + terms.start..row + terms.end]);
                    kernel.prefetch(&self.data[(row + terms.start + AHEAD).min(self.data.len())..]);
                }
                kernel.transpose(&mut block);
                for (out_w, block) in out_pw.iter_mut().zip(&block) {
                    match out_w[first..].first_chunk_mut() {
                        Some(out) => *out = *block,
                        None => out_w[first..].copy_from_slice(&block[..W - first]),
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn pack_columns<D: Instructions, const W: usize>(
        &self,
        kernel: D,
        out_pw: &mut [[u32; W]],
        rows: Range<usize>,
        terms: &Range<usize>,
    ) {
        let row = |term: usize| match terms.contains(&term) {
            true => {
                let row = &self.data[term * self.n_rows..][rows.clone()];
                match row.try_into() {
                    Ok(row) => row,
                    Err(_) => {
                        let mut padded = [bf16::ZERO; W];
                        padded[..row.len()].copy_from_slice(row);
                        padded
                    }
                }
            }
            false => [bf16::ZERO; W],
        };
        for (pair, out_w) in out_pw.iter_mut().enumerate() {
            let term = terms.start + 2 * pair;
            let (even, odd) = (row(term), row(term + 1));
            for later in [term + TERMS_AHEAD, term + TERMS_AHEAD + 1] {
                let at = later * self.n_rows + rows.start;
                kernel.prefetch(&self.data[at.min(self.data.len())..]);
            }
            for w in 0..W {
                out_w[w] = word(even[w], odd[w]);
            }
        }
    }

    /// out_slw[s][l][w] = the terms of pair 16 s + w of row l, in `terms` and `rows`; zeros beyond their ends.
    #[inline(always)]
    fn pack_tiles<D: Instructions>(
        &self,
        kernel: D,
        out_slw: &mut [[[u32; LANES]; WIDTH]],
        rows: Range<usize>,
        terms: &Range<usize>,
    ) {
        for (step, out_lw) in out_slw.iter_mut().enumerate() {
            let terms = terms.start + 2 * LANES * step..terms.end;
            if self.k_is_inner {
                for (l, out_w) in out_lw.iter_mut().enumerate() {
                    let row = (rows.start + l) * self.k;
                    *out_w = match l < rows.len() {
                        true => first_pairs(&self.data[row + terms.start..row + terms.end]),
                        false => [0; LANES],
                    };
                    kernel.prefetch(&self.data[(row + terms.start + AHEAD).min(self.data.len())..]);
                }
                continue;
            }
            for (half, block) in out_lw.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                let first = (rows.start + half * LANES).min(rows.end);
                let rows = first..(first + LANES).min(rows.end);
                self.pack_columns(kernel, block, rows, &terms);
                kernel.transpose(block);
            }
        }
    }
}

/// What packing, and all around a block of sums, wants of a processor.
pub(crate) trait Instructions: Copy + Send + Sync {
    /// Element [i][j] changes places with [j][i].
    fn transpose(self, block: &mut [[u32; LANES]; LANES]);

    /// dst = alpha · sums + beta · dst, of as many elements, at most [`WIDTH`].
    fn write(self, dst: ViewMut, sums: &[f32], alpha: f32, beta: f32);

    /// Asks for the line of the cache that `data` begins in, which will be read soon. Nothing need happen.
    fn prefetch(self, data: &[bf16]);

    /// Runs `body` compiled with the processor's vectors; what is to profit must inline into it.
    fn run(self, body: impl FnMut());
}

/// The innermost loops: sums out of packed operands.
trait Microkernel: Instructions {
    /// What the rows of a task are a multiple of where there are several.
    const ROWS: usize;
    /// What the columns of a strip are a multiple of, up to [`WIDTH`].
    const COLUMNS: usize;
    /// What the packed pairs of a row are a multiple of.
    const PAIRS: usize;

    fn compute(self, rows: Rows);
}

/// Sums in vectors.
trait VectorMicrokernel: Instructions {
    /// sums[r][c] = Σ over the pairs p, in turn, of both products of the bf16 pairs a[p][r] and b[p][c], lower halves and upper
    /// halves, in R rows and V vectors of columns.
    fn block<const R: usize, const V: usize>(
        self,
        sums: &mut [[f32; WIDTH]; R],
        a: &[[u32; R]],
        b: &[[[u32; LANES]; V]],
    );
}

/// Sums in tiles.
trait TileMicrokernel: Instructions {
    /// sums[r][c] = Σ over the steps s, in turn, of the sums over w of both products of the bf16 pairs a[s][r][w] and b[s][w][c]:
    /// of the lower halves in turn, of the upper halves in turn, each by fused multiply-adds, and of both sums.
    fn block(self, sums: &mut Sums, a: &[[[u32; LANES]; WIDTH]], b: &[[[u32; WIDTH]; LANES]]);
}

/// A block of sums as tiles are stored.
#[repr(align(64))]
struct Sums([[f32; WIDTH]; WIDTH]);

/// The instructions for products of bf16 that this processor has, that the operating system lets a program use, and that are faster
/// than widening to f32. On Intel's processors `vdpbf16ps` is not: measured on a Xeon, 205 GFLOP/s on two cores for 300 with
/// the operands widened and 1,300 with AMX; it issues there at a quarter of the rate of the multiply-adds of f32.
#[derive(Clone, Copy)]
pub(crate) enum Native {
    #[cfg(target_arch = "x86_64")]
    Amx(amx::AmxBf16),
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Avx512Bf16),
}

/// The fastest of them, if there are any. Asked once in a process: the answer does not change.
pub(crate) fn native() -> Option<Native> {
    static NATIVE: OnceLock<Option<Native>> = OnceLock::new();
    *NATIVE.get_or_init(Native::detect)
}

impl Native {
    #[cfg(target_arch = "x86_64")]
    fn detect() -> Option<Self> {
        let vectors = avx512::Avx512Bf16::detect()?;
        match amx::AmxBf16::detect(vectors) {
            Some(tiles) => Some(Native::Amx(tiles)),
            None if avx512::is_intel() => None,
            None => Some(Native::Avx512(vectors)),
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn detect() -> Option<Self> {
        None
    }

    /// As `cyrene doctor` names the choice.
    pub(crate) fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Native::Amx(_) => "amx-bf16",
            #[cfg(target_arch = "x86_64")]
            Native::Avx512(_) => "avx512-bf16",
        }
    }

    /// dst = alpha · lhs rhs + beta · dst, dst [m, n] row-major, m rows of lhs and n of rhs. With beta = 0 what stood in `dst` is not read.
    /// A sum's terms are added in one order whatever the number of threads: the blocks of terms are divided between none.
    /// Panics if the shapes do not fit together.
    pub(crate) fn product(self, dst: ViewMut, alpha: f32, lhs: Operand, rhs: Operand, beta: f32) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Native::Amx(kernel) => product(kernel, dst, alpha, lhs, rhs, beta),
            #[cfg(target_arch = "x86_64")]
            Native::Avx512(kernel) => product(kernel, dst, alpha, lhs, rhs, beta),
        }
    }
}

/// [`Native::product`].
fn product<D: Microkernel>(
    kernel: D,
    mut dst: ViewMut,
    alpha: f32,
    lhs: Operand,
    rhs: Operand,
    beta: f32,
) {
    let (m, n, k) = (lhs.n_rows, rhs.n_rows, lhs.k);
    assert_eq!(k, rhs.k, "terms of both operands");
    assert_eq!(dst.len(), m * n, "sums of {m} rows and {n} columns");
    if m == 0 || n == 0 {
        return;
    }
    let n_blocks = match dst {
        ViewMut::F32(_) => k.div_ceil(K_BLOCK).max(1),
        ViewMut::Bf16(_) => 1,
    };
    let block = k.div_ceil(n_blocks).next_multiple_of(2).max(2);
    let panel = (PANEL_ELEMENTS / block).max(1).next_multiple_of(WIDTH);
    let rows_per_task = rows_per_task::<D>(m, block);
    for first_column in (0..n).step_by(panel) {
        let columns = first_column..(first_column + panel).min(n);
        for start in (0..k.max(1)).step_by(block) {
            let terms = start..(start + block).min(k);
            let beta = if start == 0 { beta } else { 1.0 };
            let n_pairs = n_pairs::<D>(&terms);
            with_scratch(
                n_pairs * columns.len().next_multiple_of(D::COLUMNS),
                |strips| {
                    let strips: &mut [u32] = bytemuck::cast_slice_mut(strips);
                    pack_strips(kernel, strips, rhs, &columns, &terms);
                    dst.slice(0..m * n)
                        .chunks(rows_per_task * n)
                        .into_par_iter()
                        .enumerate()
                        .for_each(|(task, dst)| {
                            let rows = Rows {
                                dst,
                                n,
                                columns: columns.clone(),
                                lhs,
                                first: task * rows_per_task,
                                terms: terms.clone(),
                                n_pairs,
                                strips,
                                alpha,
                                beta,
                            };
                            kernel.compute(rows);
                        });
                },
            );
        }
    }
}

/// Words of a packed row.
fn n_pairs<D: Microkernel>(terms: &Range<usize>) -> usize {
    terms.len().div_ceil(2).max(1).next_multiple_of(D::PAIRS)
}

/// The right matrix a block's width at a time; the last strip is as wide as `D` needs.
fn pack_strips<D: Microkernel>(
    kernel: D,
    strips: &mut [u32],
    rhs: Operand,
    columns: &Range<usize>,
    terms: &Range<usize>,
) {
    let n_pairs = n_pairs::<D>(terms);
    strips
        .par_chunks_mut(n_pairs * WIDTH)
        .enumerate()
        .for_each(|(strip, out)| {
            let first = columns.start + strip * WIDTH;
            let rows = first..(first + WIDTH).min(columns.end);
            kernel.run(
                #[inline(always)]
                || match rows.len() > LANES || D::COLUMNS > LANES {
                    true => rhs.pack::<D, WIDTH>(kernel, as_rows(out), rows.clone(), terms),
                    false => rhs.pack::<D, LANES>(kernel, as_rows(out), rows.clone(), terms),
                },
            );
        });
}

/// Rows of a task: as many for each as there are threads, or a multiple of that where they would be too many to pack.
fn rows_per_task<D: Microkernel>(m: usize, k: usize) -> usize {
    let most = (TASK_ELEMENTS / k).max(2 * D::ROWS);
    let threads = rayon::current_num_threads();
    let rounds = m.div_ceil(threads * most);
    m.div_ceil(threads * rounds).next_multiple_of(D::ROWS)
}

/// The rows of sums of one task, in the columns and for the terms that are packed.
struct Rows<'a> {
    dst: ViewMut<'a>,
    /// Columns of all of dst.
    n: usize,
    columns: Range<usize>,
    lhs: Operand<'a>,
    /// Which of the left matrix's rows is the first of `dst`.
    first: usize,
    terms: Range<usize>,
    /// Words of a packed row.
    n_pairs: usize,
    /// The right matrix, packed.
    strips: &'a [u32],
    alpha: f32,
    beta: f32,
}

impl<'a> Rows<'a> {
    /// In blocks that stay in vectors.
    fn compute_in_vectors<D: VectorMicrokernel>(mut self, kernel: D) {
        let n_rows = self.dst.len() / self.n;
        // Blocks of one height, so that the last is not nearly empty.
        let height = n_rows.div_ceil(n_rows.div_ceil(MAX_HEIGHT));
        let height = height.clamp(MIN_HEIGHT, MAX_HEIGHT);
        // The scratch outside of `run`: what is called with a closure there may not be compiled with its instructions.
        with_scratch(n_rows.next_multiple_of(height) * self.n_pairs, |packed| {
            let packed: &mut [u32] = bytemuck::cast_slice_mut(packed);
            kernel.run(
                #[inline(always)]
                || match height {
                    MIN_HEIGHT => self.compute_in::<D, MIN_HEIGHT>(kernel, packed),
                    9 => self.compute_in::<D, 9>(kernel, packed),
                    10 => self.compute_in::<D, 10>(kernel, packed),
                    11 => self.compute_in::<D, 11>(kernel, packed),
                    12 => self.compute_in::<D, 12>(kernel, packed),
                    13 => self.compute_in::<D, 13>(kernel, packed),
                    _ => self.compute_in::<D, MAX_HEIGHT>(kernel, packed),
                },
            );
        });
    }

    /// In blocks of R rows; `packed` is the left matrix's place [blocks, pairs, R].
    #[inline(always)]
    fn compute_in<D: VectorMicrokernel, const R: usize>(&mut self, kernel: D, packed: &mut [u32]) {
        let n_rows = self.dst.len() / self.n;
        let n_pairs = self.n_pairs;
        for (block, out) in packed.chunks_exact_mut(R * n_pairs).enumerate() {
            let first = self.first + block * R;
            let rows = first..(first + R).min(self.first + n_rows);
            self.lhs
                .pack::<D, R>(kernel, as_rows(out), rows, &self.terms);
        }
        let mut sums = [[0.0; WIDTH]; R];
        for (columns, b) in self.strips() {
            for (block, a) in packed.chunks_exact(R * n_pairs).enumerate() {
                match columns.len() > LANES {
                    true => add_block::<D, R, VECTORS>(kernel, &mut sums, a, b),
                    false => add_block::<D, R, 1>(kernel, &mut sums, a, b),
                }
                self.write(kernel, block * R, columns.clone(), &sums);
            }
        }
    }

    /// In blocks of four tiles.
    fn compute_in_tiles<D: TileMicrokernel>(mut self, kernel: D) {
        let n_rows = self.dst.len() / self.n;
        let block_words = WIDTH * self.n_pairs;
        with_scratch(n_rows.next_multiple_of(WIDTH) * self.n_pairs, |packed| {
            let packed: &mut [u32] = bytemuck::cast_slice_mut(packed);
            kernel.run(
                #[inline(always)]
                || {
                    for (block, out) in packed.chunks_exact_mut(block_words).enumerate() {
                        let first = self.first + block * WIDTH;
                        let rows = first..(first + WIDTH).min(self.first + n_rows);
                        let out = as_rows(out).as_chunks_mut().0;
                        self.lhs.pack_tiles(kernel, out, rows, &self.terms);
                    }
                },
            );
            let mut sums = Sums([[0.0; WIDTH]; WIDTH]);
            for (columns, b) in self.strips() {
                let b = b.as_chunks().0.as_chunks().0;
                for (block, a) in packed.chunks_exact(block_words).enumerate() {
                    kernel.block(&mut sums, a.as_chunks().0.as_chunks().0, b);
                    self.write(kernel, block * WIDTH, columns.clone(), &sums.0);
                }
            }
        });
    }

    /// The strips with the columns of dst that they are for.
    #[inline(always)]
    fn strips(&self) -> impl Iterator<Item = (Range<usize>, &'a [u32])> + use<'a> {
        let columns = self.columns.clone();
        let strips = self.strips.chunks(self.n_pairs * WIDTH).enumerate();
        strips.map(move |(strip, words)| {
            let first = columns.start + strip * WIDTH;
            (first..(first + WIDTH).min(columns.end), words)
        })
    }

    /// Puts a block whose first row is `first` into its place, as far as it lies within `dst`. Compiled once, not for every height.
    #[inline(never)]
    fn write<D: Instructions>(
        &mut self,
        kernel: D,
        first: usize,
        columns: Range<usize>,
        sums: &[[f32; WIDTH]],
    ) {
        let n_rows = self.dst.len() / self.n;
        kernel.run(
            #[inline(always)]
            || {
                for (row, sums) in (first..n_rows).zip(sums) {
                    let at = row * self.n;
                    let dst = self.dst.slice(at + columns.start..at + columns.end);
                    kernel.write(dst, &sums[..columns.len()], self.alpha, self.beta);
                }
            },
        );
    }
}

/// sums[r][c] = Σ of pairs of row r and column c, in R rows and V vectors of columns; a [pairs, R], b [pairs, V · LANES].
#[inline(always)]
fn add_block<D: VectorMicrokernel, const R: usize, const V: usize>(
    kernel: D,
    sums: &mut [[f32; WIDTH]; R],
    a: &[u32],
    b: &[u32],
) {
    let (a, _) = a.as_chunks::<R>();
    let (b, _) = b.as_chunks::<LANES>().0.as_chunks::<V>();
    kernel.block(sums, a, b);
}

fn as_rows<const W: usize>(words: &mut [u32]) -> &mut [[u32; W]] {
    words.as_chunks_mut().0
}

/// The first sixteen pairs of terms, zeros where there are fewer.
#[inline(always)]
fn first_pairs(terms: &[bf16]) -> [u32; LANES] {
    let Some(terms) = terms.first_chunk::<{ 2 * LANES }>() else {
        let mut padded = [bf16::ZERO; 2 * LANES];
        padded[..terms.len()].copy_from_slice(terms);
        return pairs(&padded);
    };
    pairs(terms)
}

#[inline(always)]
fn pairs(terms: &[bf16; 2 * LANES]) -> [u32; LANES] {
    std::array::from_fn(|pair| word(terms[2 * pair], terms[2 * pair + 1]))
}

/// Two terms of a sum, the earlier one below.
#[inline(always)]
fn word(even: bf16, odd: bf16) -> u32 {
    even.to_bits() as u32 | (odd.to_bits() as u32) << 16
}
