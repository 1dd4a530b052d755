//! `vdpbf16ps`: each lane of a vector adds both products of two pairs of bf16.
#![expect(
    unsafe_code,
    reason = "the instructions of one processor and not of another"
)]

use std::arch::x86_64::{
    __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_setzero_ps,
    _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_storeu_ps, _mm512_storeu_si512,
    _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};
use std::mem::transmute;

use super::{DotPairs, Dots, Instructions, LANES, MIN_HEIGHT, Rows, WIDTH};

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

/// [`DotPairs::block`]. A function of its own with the features: in one without, as a closure's body is, the compiler leaves
/// `vdpbf16ps` a call, which costs more than all it computes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn block<const R: usize, const V: usize>(
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

/// [`Instructions::transpose`]: neighbouring lines change elements, then neighbouring pairs of lines, then the fours their quarters.
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

impl Instructions for Avx512Bf16 {
    #[inline(always)]
    fn transpose(self, block: &mut [[u32; LANES]; LANES]) {
        // SAFETY: `self` proves that the processor has each of the features.
        unsafe { transpose(block) }
    }

    #[inline(always)]
    fn run(self, body: impl FnMut()) {
        // SAFETY: as above.
        unsafe { with_features(body) }
    }
}

impl Dots for Avx512Bf16 {
    const ROWS: usize = MIN_HEIGHT;
    const COLUMNS: usize = LANES;
    const PAIRS: usize = 1;

    fn compute(self, rows: Rows) {
        rows.compute_in_vectors(self);
    }
}

impl DotPairs for Avx512Bf16 {
    #[inline(always)]
    fn block<const R: usize, const V: usize>(
        self,
        sums: &mut [[f32; WIDTH]; R],
        a: &[[u32; R]],
        b: &[[[u32; LANES]; V]],
    ) {
        // SAFETY: `self` proves that the processor has each of the features.
        unsafe { block(sums, a, b) }
    }
}
