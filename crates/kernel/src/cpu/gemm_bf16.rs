//! Products of two bf16 matrices by AVX512-BF16's `vdpbf16ps`, which adds two terms of a sum per lane, where the processor has it.
//!
//! Both matrices are read as they lie and packed two terms to a word; nothing is widened. The instruction is the one thing that
//! needs such a processor: the packing, the blocks and the edges are tested with a plain definition of it on any.
//! It takes denormal numbers, in bf16 as in f32, for zero, gives zero where a result would be one, and rounds to nearest even
//! whatever the thread's floating-point state says; the f32 products of gemm.rs keep denormal numbers.

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::{ViewMut, with_scratch};
use crate::dtype::Element;

/// Sums in a vector.
const LANES: usize = 16;
/// Vectors across a tile, but for the last columns, which may need one.
const VECTORS: usize = 2;
/// Columns of a tile.
const WIDTH: usize = VECTORS * LANES;
/// Rows of the tallest tile: its 28 vectors of sums leave room in 32 registers for the operands.
const MAX_HEIGHT: usize = 14;
/// Rows of the lowest: two multiply-adds a cycle of six cycles' latency need 12 sums under way.
const MIN_HEIGHT: usize = 8;
/// Terms of a sum that are added in registers, so that the operands of tiles lie in the second-level cache; a bf16 result, which
/// cannot keep a first block's sums, has all its terms in one. Few in tests, so that small shapes cross a border, as in the two
/// below.
const DEPTH_BLOCK: usize = if cfg!(test) { 32 } else { 4096 };
/// Elements of the left matrix that a task packs (512 KB).
const TASK_ELEMENTS: usize = if cfg!(test) { 32 * 20 } else { 1 << 18 };
/// Elements of the right matrix that are packed at once, for all tasks (8 MB).
const PANEL_ELEMENTS: usize = if cfg!(test) { 32 * 80 } else { 4 << 20 };

/// A matrix to read: `lines` rows of the left one or columns of the right one, `depth` terms each.
#[derive(Clone, Copy)]
pub(crate) struct Factor<'a> {
    data: &'a [bf16],
    lines: usize,
    depth: usize,
    /// Whether the terms of a line lie side by side, and not the lines of a term.
    depth_is_inner: bool,
}

impl<'a> Factor<'a> {
    /// `data` is [lines, depth], row-major. Panics if its length is another.
    pub(crate) fn lines(data: &'a [bf16], lines: usize, depth: usize) -> Self {
        Factor::new(data, lines, depth, true)
    }

    /// `data` is [depth, lines], row-major. Panics if its length is another.
    pub(crate) fn columns(data: &'a [bf16], depth: usize, lines: usize) -> Self {
        Factor::new(data, lines, depth, false)
    }

    fn new(data: &'a [bf16], lines: usize, depth: usize, depth_is_inner: bool) -> Self {
        assert_eq!(data.len(), lines * depth, "a factor of {lines} x {depth}");
        Factor {
            data,
            lines,
            depth,
            depth_is_inner,
        }
    }

    /// out_pw[p][w] = terms 2p and 2p + 1 of line w, in `terms` and `lines`; zeros beyond their ends.
    #[inline(always)]
    fn pack<D: DotPairs, const W: usize>(
        &self,
        dots: D,
        out_pw: &mut [[u32; W]],
        lines: Range<usize>,
        terms: &Range<usize>,
    ) {
        if self.depth_is_inner {
            self.pack_lines(dots, out_pw, lines, terms);
        } else {
            self.pack_columns(out_pw, lines, terms);
        }
    }

    #[inline(always)]
    fn pack_lines<D: DotPairs, const W: usize>(
        &self,
        dots: D,
        out_pw: &mut [[u32; W]],
        lines: Range<usize>,
        terms: &Range<usize>,
    ) {
        for (step, out_pw) in out_pw.chunks_mut(LANES).enumerate() {
            let terms = terms.start + 2 * LANES * step..terms.end;
            for first in (0..W).step_by(LANES) {
                let mut block = [[0; LANES]; LANES];
                let lines = lines.clone().skip(first);
                for (line, pairs) in lines.zip(&mut block) {
                    let line = line * self.depth;
                    *pairs = first_pairs(&self.data[line + terms.start..line + terms.end]);
                }
                dots.transpose(&mut block);
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
    fn pack_columns<const W: usize>(
        &self,
        out_pw: &mut [[u32; W]],
        lines: Range<usize>,
        terms: &Range<usize>,
    ) {
        let row = |term: usize| match terms.contains(&term) {
            true => {
                let row = &self.data[term * self.lines..][lines.clone()];
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
            for w in 0..W {
                out_w[w] = word(even[w], odd[w]);
            }
        }
    }
}

/// Sixteen sums, to which the products of sixteen pairs are added, and what else wants instructions of its own.
pub(crate) trait DotPairs: Copy + Send + Sync {
    /// sums[r][c] = Σ over the pairs p of both products of the bf16 pairs a[p][r] and b[p][c], lower halves and upper halves,
    /// in R rows and V vectors of columns.
    fn tile<const R: usize, const V: usize>(
        self,
        sums: &mut [[f32; WIDTH]; R],
        a: &[[u32; R]],
        b: &[[[u32; LANES]; V]],
    );

    /// Element [i][j] changes places with [j][i].
    fn transpose(self, block: &mut [[u32; LANES]; LANES]);

    /// Runs `body` compiled with the instructions that `tile` needs; what is to profit must inline into it.
    fn run(self, body: impl FnMut());
}

/// The instructions, if the processor has them.
pub(crate) fn native() -> Option<Native> {
    Native::detect()
}

/// dst = alpha · lhs rhs + beta · dst, dst [lhs.lines, rhs.lines] row-major. With beta = 0 what stood in `dst` is not read.
/// A sum's terms are added in one order whatever the number of threads: the blocks of terms are divided between none.
/// Panics if the shapes do not fit together.
pub(crate) fn product<D: DotPairs>(
    dots: D,
    mut dst: ViewMut,
    alpha: f32,
    lhs: Factor,
    rhs: Factor,
    beta: f32,
) {
    let (m, n, depth) = (lhs.lines, rhs.lines, lhs.depth);
    assert_eq!(depth, rhs.depth, "terms of both factors");
    assert_eq!(dst.len(), m * n, "sums of {m} rows and {n} columns");
    if m == 0 || n == 0 {
        return;
    }
    let n_blocks = match dst {
        ViewMut::F32(_) => depth.div_ceil(DEPTH_BLOCK).max(1),
        ViewMut::Bf16(_) => 1,
    };
    let block = depth.div_ceil(n_blocks).next_multiple_of(2).max(2);
    let panel = (PANEL_ELEMENTS / block).next_multiple_of(WIDTH);
    let rows_per_task = rows_per_task(m, block);
    for first_column in (0..n).step_by(panel) {
        let columns = first_column..(first_column + panel).min(n);
        for start in (0..depth.max(1)).step_by(block) {
            let terms = start..(start + block).min(depth);
            let beta = if start == 0 { beta } else { 1.0 };
            let n_pairs = terms.len().div_ceil(2).max(1);
            with_scratch(n_pairs * columns.len().next_multiple_of(LANES), |strips| {
                let strips: &mut [u32] = bytemuck::cast_slice_mut(strips);
                pack_strips(dots, strips, rhs, &columns, &terms);
                dst.slice(0..m * n)
                    .chunks(rows_per_task * n)
                    .into_par_iter()
                    .enumerate()
                    .for_each(|(task, dst)| {
                        Rows {
                            dst,
                            n,
                            columns: columns.clone(),
                            lhs,
                            first: task * rows_per_task,
                            terms: terms.clone(),
                            strips,
                            alpha,
                            beta,
                        }
                        .compute(dots);
                    });
            });
        }
    }
}

/// The right matrix a tile's width at a time; the last strip is a vector wide where that is enough.
fn pack_strips<D: DotPairs>(
    dots: D,
    strips: &mut [u32],
    rhs: Factor,
    columns: &Range<usize>,
    terms: &Range<usize>,
) {
    let n_pairs = terms.len().div_ceil(2).max(1);
    strips
        .par_chunks_mut(n_pairs * WIDTH)
        .enumerate()
        .for_each(|(strip, out)| {
            let first = columns.start + strip * WIDTH;
            let lines = first..(first + WIDTH).min(columns.end);
            dots.run(
                #[inline(always)]
                || match lines.len() > LANES {
                    true => rhs.pack::<D, WIDTH>(dots, as_rows(out), lines.clone(), terms),
                    false => rhs.pack::<D, LANES>(dots, as_rows(out), lines.clone(), terms),
                },
            );
        });
}

/// Rows of a task: as many for each as there are threads, or a multiple of that where they would be too many to pack.
fn rows_per_task(m: usize, depth: usize) -> usize {
    let most = (TASK_ELEMENTS / depth).max(MAX_HEIGHT);
    let threads = rayon::current_num_threads();
    let rounds = m.div_ceil(threads * most);
    m.div_ceil(threads * rounds).max(MIN_HEIGHT)
}

/// The rows of sums of one task, in the columns and for the terms that are packed.
struct Rows<'a> {
    dst: ViewMut<'a>,
    /// Columns of all of dst.
    n: usize,
    columns: Range<usize>,
    lhs: Factor<'a>,
    /// Which of the left matrix's lines is the first row of `dst`.
    first: usize,
    terms: Range<usize>,
    /// The right matrix, packed.
    strips: &'a [u32],
    alpha: f32,
    beta: f32,
}

impl Rows<'_> {
    fn compute<D: DotPairs>(mut self, dots: D) {
        let n_rows = self.dst.len() / self.n;
        let n_pairs = self.terms.len().div_ceil(2).max(1);
        // Tiles of one height, so that the last is not nearly empty.
        let height = n_rows.div_ceil(n_rows.div_ceil(MAX_HEIGHT));
        let height = height.clamp(MIN_HEIGHT, MAX_HEIGHT);
        // The scratch outside of `run`: what is called with a closure there may not be compiled with its instructions.
        with_scratch(n_rows.next_multiple_of(height) * n_pairs, |packed| {
            let packed: &mut [u32] = bytemuck::cast_slice_mut(packed);
            dots.run(
                #[inline(always)]
                || match height {
                    MIN_HEIGHT => self.compute_in::<D, MIN_HEIGHT>(dots, packed, n_pairs),
                    9 => self.compute_in::<D, 9>(dots, packed, n_pairs),
                    10 => self.compute_in::<D, 10>(dots, packed, n_pairs),
                    11 => self.compute_in::<D, 11>(dots, packed, n_pairs),
                    12 => self.compute_in::<D, 12>(dots, packed, n_pairs),
                    13 => self.compute_in::<D, 13>(dots, packed, n_pairs),
                    _ => self.compute_in::<D, MAX_HEIGHT>(dots, packed, n_pairs),
                },
            );
        });
    }

    /// In tiles of R rows; `packed` is the left matrix's place [tiles, pairs, R].
    #[inline(always)]
    fn compute_in<D: DotPairs, const R: usize>(
        &mut self,
        dots: D,
        packed: &mut [u32],
        n_pairs: usize,
    ) {
        let n_rows = self.dst.len() / self.n;
        for (tile, out) in packed.chunks_exact_mut(R * n_pairs).enumerate() {
            let first = self.first + tile * R;
            let lines = first..(first + R).min(self.first + n_rows);
            self.lhs
                .pack::<D, R>(dots, as_rows(out), lines, &self.terms);
        }
        let mut sums = [[0.0; WIDTH]; R];
        for (strip, b) in self.strips.chunks(n_pairs * WIDTH).enumerate() {
            let first = self.columns.start + strip * WIDTH;
            let columns = first..(first + WIDTH).min(self.columns.end);
            for (tile, a) in packed.chunks_exact(R * n_pairs).enumerate() {
                match columns.len() > LANES {
                    true => add_tile::<D, R, VECTORS>(dots, &mut sums, a, b),
                    false => add_tile::<D, R, 1>(dots, &mut sums, a, b),
                }
                self.write(dots, tile * R, columns.clone(), &sums);
            }
        }
    }

    /// Puts a tile whose first row is `first` into its place, as far as it lies within `dst`. Compiled once, not for every height.
    #[inline(never)]
    fn write<D: DotPairs>(
        &mut self,
        dots: D,
        first: usize,
        columns: Range<usize>,
        sums: &[[f32; WIDTH]],
    ) {
        let n_rows = self.dst.len() / self.n;
        dots.run(
            #[inline(always)]
            || {
                for (row, sums) in (first..n_rows).zip(sums) {
                    let at = row * self.n;
                    let dst = self.dst.slice(at + columns.start..at + columns.end);
                    write(dst, &sums[..columns.len()], self.alpha, self.beta);
                }
            },
        );
    }
}

/// sums[r][c] = Σ of pairs of row r and column c, in R rows and V vectors of columns; a [pairs, R], b [pairs, V · LANES].
#[inline(always)]
fn add_tile<D: DotPairs, const R: usize, const V: usize>(
    dots: D,
    sums: &mut [[f32; WIDTH]; R],
    a: &[u32],
    b: &[u32],
) {
    let (a, _) = a.as_chunks::<R>();
    let (b, _) = b.as_chunks::<LANES>().0.as_chunks::<V>();
    dots.tile(sums, a, b);
}

/// dst = alpha · sums + beta · dst.
#[inline(always)]
fn write(dst: ViewMut, sums: &[f32], alpha: f32, beta: f32) {
    match dst {
        ViewMut::F32(dst) if beta == 0.0 => update(dst, sums, |_, sum| alpha * sum),
        ViewMut::F32(dst) => update(dst, sums, |y, sum| beta * y + alpha * sum),
        ViewMut::Bf16(dst) if beta == 0.0 => {
            update(dst, sums, |_, sum| Element::from_f32(alpha * sum));
        }
        ViewMut::Bf16(dst) => update(dst, sums, |y, sum| {
            Element::from_f32(beta * Element::to_f32(y) + alpha * sum)
        }),
    }
}

/// A vector at a time: rows of a tile are too short for what the compiler makes of loops of unknown length.
#[inline(always)]
fn update<T: Copy>(dst: &mut [T], sums: &[f32], new: impl Fn(T, f32) -> T) {
    let (vectors, last) = dst.as_chunks_mut::<LANES>();
    let (sums, last_sums) = sums.as_chunks::<LANES>();
    for (vector, sums) in vectors.iter_mut().zip(sums) {
        for (y, sum) in vector.iter_mut().zip(sums) {
            *y = new(*y, *sum);
        }
    }
    for (y, sum) in last.iter_mut().zip(last_sums) {
        *y = new(*y, *sum);
    }
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

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::Avx512Bf16 as Native;

#[cfg(target_arch = "x86_64")]
mod x86 {
    #![expect(
        unsafe_code,
        reason = "the instructions of one processor and not of another"
    )]

    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_set1_epi32,
        _mm512_setzero_ps, _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_storeu_ps,
        _mm512_storeu_si512, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32,
        _mm512_unpacklo_epi64,
    };
    use std::mem::transmute;

    use super::{DotPairs, LANES, WIDTH};

    /// Quarters 0 and 2 of two vectors, and 1 and 3.
    const EVEN: i32 = 0b10_00_10_00;
    const ODD: i32 = 0b11_01_11_01;

    /// Proof that this processor has AVX512-BF16: nothing but `detect` makes one.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512Bf16(());

    impl Avx512Bf16 {
        pub(super) fn detect() -> Option<Self> {
            let has_all = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512bf16");
            has_all.then_some(Avx512Bf16(()))
        }
    }

    /// Whatever `body` inlines is compiled with these features.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn with_features(mut body: impl FnMut()) {
        body();
    }

    /// [`DotPairs::tile`]. A function of its own with the features: in one without, as a closure's body is, the compiler leaves
    /// `vdpbf16ps` a call, which costs more than all it computes.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn tile<const R: usize, const V: usize>(
        sums: &mut [[f32; WIDTH]; R],
        a: &[[u32; R]],
        b: &[[[u32; LANES]; V]],
    ) {
        let mut vectors = [[_mm512_setzero_ps(); V]; R];
        for (a, b) in a.iter().zip(b) {
            // SAFETY: 64 readable bytes each.
            let b = b.each_ref().map(|b| unsafe { load(b) });
            for r in 0..R {
                let a = pairs(_mm512_set1_epi32(a[r] as i32));
                for v in 0..V {
                    vectors[r][v] = _mm512_dpbf16_ps(vectors[r][v], a, pairs(b[v]));
                }
            }
        }
        for (sums, vectors) in sums.iter_mut().zip(&vectors) {
            let (sums, _) = sums.as_chunks_mut::<LANES>();
            for (sums, vector) in sums.iter_mut().zip(vectors) {
                // SAFETY: `sums` is 64 writable bytes.
                unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), *vector) };
            }
        }
    }

    /// The same bits as pairs of bf16.
    #[inline(always)]
    fn pairs(words: __m512i) -> __m512bh {
        // SAFETY: both are 64 bytes of which every pattern is a value.
        unsafe { transmute::<__m512i, __m512bh>(words) }
    }

    /// # Safety
    /// The processor has avx512f.
    #[inline(always)]
    unsafe fn load(words: &[u32; LANES]) -> __m512i {
        // SAFETY: 64 readable bytes.
        unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
    }

    /// [`DotPairs::transpose`]: neighbouring lines change elements, then neighbouring pairs of lines, then the fours their quarters.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn transpose(block: &mut [[u32; LANES]; LANES]) {
        let mut x = [_mm512_setzero_si512(); LANES];
        for (x, line) in x.iter_mut().zip(&*block) {
            // SAFETY: a line is 64 readable bytes.
            *x = unsafe { load(line) };
        }
        let mut y = x;
        for i in (0..LANES).step_by(2) {
            y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
            y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
        }
        for i in (0..LANES).step_by(4) {
            x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
            x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
            x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
            x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
        }
        // Quarter q of x[4 g + i] holds lines 4 g to 4 g + 3 of column 4 q + i.
        for i in 0..4 {
            let even = _mm512_shuffle_i32x4::<EVEN>(x[i], x[4 + i]);
            let odd = _mm512_shuffle_i32x4::<ODD>(x[i], x[4 + i]);
            let even_below = _mm512_shuffle_i32x4::<EVEN>(x[8 + i], x[12 + i]);
            let odd_below = _mm512_shuffle_i32x4::<ODD>(x[8 + i], x[12 + i]);
            y[i] = _mm512_shuffle_i32x4::<EVEN>(even, even_below);
            y[4 + i] = _mm512_shuffle_i32x4::<EVEN>(odd, odd_below);
            y[8 + i] = _mm512_shuffle_i32x4::<ODD>(even, even_below);
            y[12 + i] = _mm512_shuffle_i32x4::<ODD>(odd, odd_below);
        }
        for (y, line) in y.iter().zip(block) {
            // SAFETY: a line is 64 writable bytes.
            unsafe { _mm512_storeu_si512(line.as_mut_ptr().cast(), *y) };
        }
    }

    impl DotPairs for Avx512Bf16 {
        #[inline(always)]
        fn tile<const R: usize, const V: usize>(
            self,
            sums: &mut [[f32; WIDTH]; R],
            a: &[[u32; R]],
            b: &[[[u32; LANES]; V]],
        ) {
            // SAFETY: `self` proves that the processor has each of the features.
            unsafe { tile(sums, a, b) }
        }

        #[inline(always)]
        fn transpose(self, block: &mut [[u32; LANES]; LANES]) {
            // SAFETY: as above.
            unsafe { transpose(block) }
        }

        #[inline(always)]
        fn run(self, body: impl FnMut()) {
            // SAFETY: `self` proves that the processor has each of the features.
            unsafe { with_features(body) }
        }
    }
}

/// No other processor has the instruction.
#[cfg(not(target_arch = "x86_64"))]
#[derive(Clone, Copy)]
pub(crate) enum Native {}

#[cfg(not(target_arch = "x86_64"))]
impl Native {
    fn detect() -> Option<Self> {
        None
    }
}

#[cfg(not(target_arch = "x86_64"))]
impl DotPairs for Native {
    fn tile<const R: usize, const V: usize>(
        self,
        _: &mut [[f32; WIDTH]; R],
        _: &[[u32; R]],
        _: &[[[u32; LANES]; V]],
    ) {
        match self {}
    }

    fn transpose(self, _: &mut [[u32; LANES]; LANES]) {
        match self {}
    }

    fn run(self, _: impl FnMut()) {
        match self {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The instruction's definition, but for denormal numbers.
    #[derive(Clone, Copy)]
    struct Plain;

    impl DotPairs for Plain {
        fn tile<const R: usize, const V: usize>(
            self,
            sums: &mut [[f32; WIDTH]; R],
            a: &[[u32; R]],
            b: &[[[u32; LANES]; V]],
        ) {
            let halves = |pair: u32| [pair << 16, pair & 0xffff_0000].map(f32::from_bits);
            for (row, sums) in sums.iter_mut().enumerate() {
                for (column, sum) in sums.iter_mut().enumerate().take(V * LANES) {
                    let pairs = a.iter().zip(b);
                    *sum = pairs.fold(0.0, |sum, (a, b)| {
                        let [even_a, odd_a] = halves(a[row]);
                        let [even_b, odd_b] = halves(b[column / LANES][column % LANES]);
                        sum + (even_a * even_b + odd_a * odd_b)
                    });
                }
            }
        }

        fn transpose(self, block: &mut [[u32; LANES]; LANES]) {
            let old = *block;
            for (i, line) in block.iter_mut().enumerate() {
                *line = old.map(|line| line[i]);
            }
        }

        fn run(self, mut body: impl FnMut()) {
            body();
        }
    }

    /// Values between -1 and 1, in [lines, depth] or [depth, lines].
    fn values(n: usize, seed: usize) -> Vec<bf16> {
        (0..n)
            .map(|i| ((i * 2_654_435_761 + seed * 40_503) % 1009) as f32 / 504.5 - 1.0)
            .map(bf16::from_f32)
            .collect()
    }

    /// Every layout, beta and storage against f64, with the same bytes from one thread and several.
    fn check(dots: impl DotPairs) {
        // Tiles of every height, one and two vectors and parts of them; several blocks of terms, panels and tasks; odd terms.
        let mut shapes: Vec<[usize; 3]> = (1..=30).map(|m| [m, 3, m + 3]).collect();
        shapes.extend([
            [1, 1, 1],
            [3, 70, 33],
            [17, 64, 64],
            [64, 31, 1],
            [65, 129, 130],
        ]);
        shapes.extend([[200, 300, 100], [33, 32, 170], [5, 0, 7], [130, 63, 16]]);
        let [one, two, five] = [1, 2, 5].map(|n_threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads);
            pool.build().unwrap()
        });
        for [m, k, n] in shapes {
            let (a, b) = (values(m * k, 1), values(k * n, 2));
            for (a_inner, b_inner) in [(true, true), (true, false), (false, true), (false, false)] {
                let factor = |data, lines, inner| match inner {
                    true => Factor::lines(data, lines, k),
                    false => Factor::columns(data, k, lines),
                };
                let term = |data: &[bf16], lines: usize, inner, line: usize, l: usize| {
                    let at = if inner {
                        line * k + l
                    } else {
                        l * lines + line
                    };
                    data[at].to_f64()
                };
                let (lhs, rhs) = (factor(&a, m, a_inner), factor(&b, n, b_inner));
                let mut want = vec![0.0; m * n];
                for (at, want) in want.iter_mut().enumerate() {
                    let (i, j) = (at / n, at % n);
                    *want = (0..k)
                        .map(|l| term(&a, m, a_inner, i, l) * term(&b, n, b_inner, j, l))
                        .sum();
                }
                for (alpha, beta) in [
                    (1.0f32, 0.0f32),
                    (-0.5, 0.0),
                    (1.0, 1.0),
                    (-2.0, 1.0),
                    (1.0, 0.25),
                ] {
                    let old = values(m * n, 3);
                    let of = |at: usize| {
                        let old = if beta == 0.0 {
                            0.0
                        } else {
                            beta as f64 * old[at].to_f64()
                        };
                        alpha as f64 * want[at] + old
                    };
                    let start = |at: usize| if beta == 0.0 { bf16::NAN } else { old[at] };
                    let f32s = |pool: &rayon::ThreadPool| {
                        let mut y: Vec<f32> = (0..m * n).map(|at| start(at).to_f32()).collect();
                        pool.install(|| {
                            product(dots, ViewMut::F32(&mut y), alpha, lhs, rhs, beta);
                        });
                        y
                    };
                    let bf16s = |pool: &rayon::ThreadPool| {
                        let mut y: Vec<bf16> = (0..m * n).map(start).collect();
                        pool.install(|| {
                            product(dots, ViewMut::Bf16(&mut y), alpha, lhs, rhs, beta);
                        });
                        y
                    };
                    let name = format!("{m} x {k} x {n}, {a_inner} {b_inner}, {alpha} {beta}");
                    let (y, narrow) = (f32s(&one), bf16s(&one));
                    for at in 0..m * n {
                        let (got, rounded, want) = (y[at] as f64, narrow[at].to_f64(), of(at));
                        assert!(
                            (got - want).abs() < 1e-6 * (1 + k) as f64,
                            "{name} [{at}]: {got} for {want}"
                        );
                        // Half a unit of bf16's eighth bit.
                        let slack = want.abs() / 256.0 + 1e-6 * (1 + k) as f64;
                        assert!(
                            (rounded - want).abs() < slack,
                            "{name} [{at}]: {rounded} for {want}"
                        );
                    }
                    for pool in [&two, &five] {
                        assert!(f32s(pool) == y, "{name}: f32, {pool:?}");
                        assert!(bf16s(pool) == narrow, "{name}: bf16, {pool:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn packing_blocks_and_edges_agree_with_f64() {
        check(Plain);
    }

    /// Where the processor has them; `cyrene doctor` says which.
    #[test]
    fn avx512_bf16_agrees_with_f64() {
        if let Some(dots) = native() {
            check(dots);
        }
    }

    #[test]
    #[should_panic(expected = "a factor of")]
    fn factor_of_another_length_panics() {
        Factor::lines(&[bf16::ZERO; 10], 3, 4);
    }
}
