//! What the CPU side of the ops shares: views of stored elements, row-parallel loops, vector functions, matrix products.
//!
//! The way an op uses it: state its tensors as [`Out`] and [`In`] with a row width, and give [`for_rows`] a kernel over f32 slices.
//! bf16 rows are widened into scratch that stays in cache and rounded back, so that each op has one kernel and not one a dtype.

mod documents;
pub(crate) mod gemm;
#[cfg_attr(
    not(target_arch = "x86_64"),
    allow(
        dead_code,
        unused_variables,
        reason = "no other architecture has such instructions"
    )
)]
pub(crate) mod gemm_bf16;
pub(crate) mod math;
mod reduce;
mod rows;
mod scratch;
mod view;

pub(crate) use documents::{documents, load_rows, split_rows};
pub(crate) use rows::{In, Out, add_rows, for_rows, for_rows_summing};
pub(crate) use scratch::with_scratch;
pub(crate) use view::{View, ViewMut, par_read_into};

/// Runs `body` compiled for the widest vectors this machine has (SSE2, AVX2 or AVX-512).
/// Whatever is to profit must inline into it: mark closures and the functions they call `#[inline(always)]`.
#[inline(always)]
pub(crate) fn simd<R>(body: impl FnMut() -> R) -> R {
    pulp::Arch::new().dispatch(Body(body))
}

/// The instructions that the CPU's ops have chosen on this processor: `amx-bf16` (products of two bf16 matrices by tiles; all else as
/// `avx512`), `avx512-bf16` (those products by pairs), `avx512`, `avx2`, or `portable` for what every processor of the architecture
/// has. An Intel processor without AMX, or where AMX is not permitted, is `avx512`: its instruction for pairs is slower than f32.
pub fn cpu_vectors() -> &'static str {
    if let Some(native) = gemm_bf16::native() {
        return native.name();
    }
    match pulp::Arch::new() {
        #[cfg(target_arch = "x86_64")]
        pulp::Arch::V4(_) => "avx512",
        #[cfg(target_arch = "x86_64")]
        pulp::Arch::V3(_) => "avx2",
        _ => "portable",
    }
}

/// A body called in place. Handing pulp the closure itself would go through a `call_once` shim that the compiler does not inline,
/// and what is not inlined is compiled for SSE2.
struct Body<F>(F);

impl<R, F: FnMut() -> R> pulp::NullaryFnOnce for Body<F> {
    type Output = R;

    #[inline(always)]
    fn call(mut self) -> R {
        (self.0)()
    }
}
