//! `vdpbf16ps`: each lane of a vector adds both products of two pairs of bf16.
#![expect(
    unsafe_code,
    reason = "the instructions of one processor and not of another"
)]

use std::arch::x86_64::{
    __cpuid_count, __m256i, __m512, __m512bh, __m512i, __mmask16, _CMP_UNORD_Q, _MM_HINT_T0,
    _mm_prefetch, _mm256_mask_storeu_epi16, _mm256_maskz_loadu_epi16, _mm512_add_epi32,
    _mm512_add_ps, _mm512_and_si512, _mm512_castps_si512, _mm512_castsi512_ps, _mm512_cmp_ps_mask,
    _mm512_cvtepi32_epi16, _mm512_cvtepu16_epi32, _mm512_dpbf16_ps, _mm512_loadu_si512,
    _mm512_mask_blend_epi32, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_mul_ps,
    _mm512_or_si512, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512,
    _mm512_shuffle_i32x4, _mm512_slli_epi32, _mm512_srli_epi32, _mm512_storeu_ps,
    _mm512_storeu_si512, _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32,
    _mm512_unpacklo_epi64, CpuidResult,
};
use std::mem::transmute;

use half::bf16;

use super::{
    Instructions, LANES, MIN_HEIGHT, Microkernel, Rows, VectorMicrokernel, ViewMut, WIDTH,
};

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

/// Whether the processor says that Intel made it.
pub(super) fn is_intel() -> bool {
    let id = cpuid(0, 0);
    [id.ebx, id.edx, id.ecx]
        .map(u32::to_le_bytes)
        .as_flattened()
        == b"GenuineIntel"
}

/// What the processor says of itself, by leaf and subleaf.
#[allow(
    unused_unsafe,
    reason = "a safe function for newer compilers, and not for the oldest that builds this"
)]
pub(super) fn cpuid(leaf: u32, subleaf: u32) -> CpuidResult {
    // SAFETY: every processor of this architecture has the instruction.
    unsafe { __cpuid_count(leaf, subleaf) }
}

/// Whatever `body` inlines is compiled with these features.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn with_features(mut body: impl FnMut()) {
    body();
}

/// [`VectorMicrokernel::block`]. A function of its own with the features: in one without, as a closure's body is, the compiler leaves
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

/// [`Instructions::write`]: by hand, because the compiler leaves rows as short as these to scalars.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn write(mut dst: ViewMut, sums: &[f32], alpha: f32, beta: f32) {
    assert_eq!(dst.len(), sums.len(), "one sum an element");
    for (idx, sums) in sums.chunks(LANES).enumerate() {
        let first = idx * LANES;
        let mask = ((1u32 << sums.len()) - 1) as __mmask16;
        // SAFETY: the mask has a bit for each element of the chunk.
        let sums = unsafe { _mm512_maskz_loadu_ps(mask, sums.as_ptr()) };
        let scaled = _mm512_mul_ps(_mm512_set1_ps(alpha), sums);
        let plus = |old| _mm512_add_ps(_mm512_mul_ps(_mm512_set1_ps(beta), old), scaled);
        match &mut dst {
            ViewMut::F32(dst) => {
                let at = dst[first..].as_mut_ptr();
                // SAFETY: dst is as long as the sums, so the mask covers what is left of it.
                unsafe {
                    let new = match beta == 0.0 {
                        true => scaled,
                        false => plus(_mm512_maskz_loadu_ps(mask, at)),
                    };
                    _mm512_mask_storeu_ps(at, mask, new);
                }
            }
            ViewMut::Bf16(dst) => {
                let at: *mut i16 = dst[first..].as_mut_ptr().cast();
                // SAFETY: as above; bf16 is 16 bits of which every pattern is a value.
                unsafe {
                    let new = match beta == 0.0 {
                        true => scaled,
                        false => plus(widen(_mm256_maskz_loadu_epi16(mask, at))),
                    };
                    _mm256_mask_storeu_epi16(at, mask, narrow(new));
                }
            }
        }
    }
}

/// bf16 to f32, exact.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn widen(x: __m256i) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(x)))
}

/// f32 to bf16, to nearest even, a NaN quiet. `vcvtneps2bf16` would take denormal numbers for zero.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn narrow(x: __m512) -> __m256i {
    let bits = _mm512_castps_si512(x);
    let upper = _mm512_srli_epi32::<16>(bits);
    let is_odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
    let half = _mm512_add_epi32(is_odd, _mm512_set1_epi32(0x7fff));
    let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, half));
    let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
    let quiet = _mm512_or_si512(upper, _mm512_set1_epi32(0x40));
    _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(is_nan, rounded, quiet))
}

impl Instructions for Avx512Bf16 {
    #[inline(always)]
    fn transpose(self, block: &mut [[u32; LANES]; LANES]) {
        // SAFETY: `self` proves that the processor has each of the features.
        unsafe { transpose(block) }
    }

    #[inline(always)]
    fn write(self, dst: ViewMut, sums: &[f32], alpha: f32, beta: f32) {
        // SAFETY: as above.
        unsafe { write(dst, sums, alpha, beta) }
    }

    #[inline(always)]
    fn prefetch(self, data: &[bf16]) {
        // SAFETY: SSE, which has it, is part of the architecture; an address that cannot be read is passed over.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(data.as_ptr().cast()) }
    }

    #[inline(always)]
    fn run(self, body: impl FnMut()) {
        // SAFETY: as above.
        unsafe { with_features(body) }
    }
}

impl Microkernel for Avx512Bf16 {
    const ROWS: usize = MIN_HEIGHT;
    const COLUMNS: usize = LANES;
    const PAIRS: usize = 1;

    fn compute(self, rows: Rows) {
        rows.compute_in_vectors(self);
    }
}

impl VectorMicrokernel for Avx512Bf16 {
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
