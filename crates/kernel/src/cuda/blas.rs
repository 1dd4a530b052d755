//! Matrix products through cuBLASLt, one plan for each shape: the fastest of those that cuBLASLt proposes, timed once on this GPU
//! for all shapes of nearly one size and remembered on disk, so that later runs compute with the same bits.

use std::collections::HashMap;
use std::ffi::c_void;
use std::mem::MaybeUninit;

use cudarc::cublaslt::{result, sys};
use cudarc::driver::result as driver;

use super::choices::{Algorithm, Choices};
use super::{Buffer, Cuda, Timer};
use crate::{DType, Error, Result};

/// What cuBLASLt may use beside the operands.
pub const WORKSPACE_BYTES: usize = 64 << 20;
/// Algorithms of one product that are timed: with 32 a training step of the 4B is 1 % faster than with the first 8.
const CANDIDATES: usize = 32;
/// Timed runs of each, after one that is not.
const RUNS: usize = 3;
/// An algorithm whose run takes more than so many times the least so far is not run again.
const CLEARLY_SLOWER: f32 = 1.1;
/// Operations below which a product is over before its algorithm matters.
const WORTH_TIMING: usize = 1 << 31;
/// A copy of the result up to which a product that adds to itself is timed on the copy; one with a larger result takes the first proposal.
const COPY_BYTES: usize = 256 << 20;
/// Shapes whose sizes are the same in units of so many share a choice: packed rows have other numbers of tokens each time, and to
/// time every one would take seconds of the first steps.
const NEAR: usize = 128;
/// An algorithm must need less than this share of the first proposal's time to replace it.
const CLEARLY_FASTER: f32 = 0.98;

/// One operand of a product, row-major.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Operand {
    pub pointer: u64,
    /// Whether memory holds the transpose.
    pub transposed: bool,
    /// Elements from one row in memory to the next.
    pub stride: usize,
}

/// d [M,N] = alpha · a [M,K] b [K,N] (+ base [M,N]), row-major, f32 sums. a and b have one dtype, d its own.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gemm {
    pub a: Operand,
    pub b: Operand,
    pub d: u64,
    pub d_stride: usize,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub alpha: f32,
    /// Added; may be d itself. Type and stride are those of d.
    pub base: Option<u64>,
    pub in_dtype: DType,
    pub out_dtype: DType,
}

/// Everything of a product but pointers and alpha.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    sizes: [usize; 3],
    strides: [usize; 3],
    transposed: [bool; 2],
    adds: bool,
    dtypes: [DType; 2],
    /// Whether every pointer is a multiple of 16 bytes.
    aligned: bool,
}

impl Key {
    /// Its choice counts for all keys of the same name: sizes up to the next unit of [`NEAR`], all else as it is.
    fn near(&self) -> Key {
        Key {
            sizes: self.sizes.map(|size| size.next_multiple_of(NEAR)),
            ..*self
        }
    }

    /// One word that says all of it, for the file of choices.
    fn name(&self) -> String {
        let Key {
            sizes: [m, n, k],
            strides: [a, b, d],
            transposed: [a_transposed, b_transposed],
            adds,
            dtypes: [inner, outer],
            aligned,
        } = *self;
        let flags =
            [a_transposed, b_transposed, adds, aligned].map(|flag| if flag { 'y' } else { 'n' });
        let flags: String = flags.iter().collect();
        format!("{m}x{n}x{k}:{a},{b},{d}:{inner},{outer}:{flags}")
    }
}

pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: Buffer,
    plans: HashMap<Key, Plan>,
    choices: Choices,
}

struct Plan {
    operation: sys::cublasLtMatmulDesc_t,
    /// In cuBLASLt's column-major view: first operand (our b), second (our a), result.
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Blas {
    pub fn new(cuda: Cuda) -> Result<Blas> {
        // SAFETY: probes for the library by name.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::NoCublasLt);
        }
        Ok(Blas {
            handle: check(result::create_handle(), None)?,
            workspace: Buffer::new(cuda, WORKSPACE_BYTES)?,
            plans: HashMap::new(),
            // SAFETY: asks the library that was found above.
            choices: Choices::read(cuda, unsafe { sys::cublasLtGetVersion() }),
        })
    }

    pub fn run(&mut self, cuda: Cuda, gemm: &Gemm) -> Result<()> {
        if gemm.m == 0 || gemm.n == 0 {
            return Ok(());
        }
        let key = Key {
            sizes: [gemm.m, gemm.n, gemm.k],
            strides: [gemm.a.stride, gemm.b.stride, gemm.d_stride],
            transposed: [gemm.a.transposed, gemm.b.transposed],
            adds: gemm.base.is_some(),
            dtypes: [gemm.in_dtype, gemm.out_dtype],
            aligned: (gemm.a.pointer | gemm.b.pointer | gemm.d | gemm.base.unwrap_or(0))
                .is_multiple_of(16),
        };
        if let Some(plan) = self.plans.get(&key) {
            return self.queue(cuda, gemm, plan, &plan.algorithm, gemm.d);
        }
        let (mut plan, candidates) = plan(self.handle, gemm, key.aligned)?;
        if 2 * gemm.m * gemm.n * gemm.k >= WORTH_TIMING && candidates.len() > 1 {
            // The choice for shapes near this one, or, where that algorithm cannot compute this one, its own.
            let names = [key.near().name(), key.name()];
            let can_compute = |algorithm: &Algorithm| self.can_compute(&plan, *algorithm);
            match known_choice(&self.choices, &names, can_compute) {
                Ok(data) => plan.algorithm = sys::cublasLtMatmulAlgo_t { data },
                Err(name) => {
                    if let Some(fastest) = self.fastest(cuda, gemm, &plan, &candidates)? {
                        plan.algorithm = candidates[fastest];
                        self.choices.put(name.clone(), plan.algorithm.data);
                    }
                }
            }
        }
        self.queue(cuda, gemm, &plan, &plan.algorithm, gemm.d)?;
        self.plans.insert(key, plan);
        Ok(())
    }

    /// The candidate that takes the least time, by its place: the first if none is clearly faster. None, where nothing was timed: the
    /// result is too large to be copied, the GPU has no room for a copy now, or there is no cache on disk, so that each process would
    /// time for itself and compute with other bits.
    fn fastest(
        &self,
        cuda: Cuda,
        gemm: &Gemm,
        plan: &Plan,
        candidates: &[sys::cublasLtMatmulAlgo_t],
    ) -> Result<Option<usize>> {
        if !self.choices.are_kept() {
            return Ok(None);
        }
        // d itself can be written again and again unless it is added to.
        let copy = if gemm.base == Some(gemm.d) {
            let bytes = gemm.m * gemm.d_stride * gemm.out_dtype.size();
            // SAFETY: freed below.
            match (bytes <= COPY_BYTES).then(|| unsafe { driver::malloc_sync(bytes) }) {
                Some(Ok(copy)) => Some(copy),
                _ => return Ok(None),
            }
        } else {
            None
        };
        let out = copy.unwrap_or(gemm.d);
        let mut times = Vec::new();
        let mut best = f32::INFINITY;
        for algorithm in candidates {
            let time = self.milliseconds(cuda, gemm, plan, algorithm, out, best);
            if let Ok(time) = time {
                best = best.min(time);
            }
            times.push(time);
        }
        if let Some(copy) = copy {
            cuda.synchronize()?;
            // SAFETY: allocated above, and nothing queued uses it any more.
            let _ = unsafe { driver::free_sync(copy) };
        }
        Ok(Some(least(&times)))
    }

    /// Whether the plan's product can be computed by an algorithm that was chosen for another size, within the workspace.
    fn can_compute(&self, plan: &Plan, data: Algorithm) -> bool {
        let algorithm = sys::cublasLtMatmulAlgo_t { data };
        let [first, second, layout] = plan.layouts;
        let mut needs = MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::zeroed();
        // SAFETY: the plan's descriptors live as long as it; the library only reads the algorithm, which came from it.
        let status = unsafe {
            sys::cublasLtMatmulAlgoCheck(
                self.handle,
                plan.operation,
                first,
                second,
                layout,
                layout,
                &algorithm,
                needs.as_mut_ptr(),
            )
        };
        // SAFETY: plain numbers, for which zeros are valid too (CUBLAS_STATUS_SUCCESS is 0).
        let needs = unsafe { needs.assume_init() };
        status == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS
            && needs.workspaceSize <= WORKSPACE_BYTES
    }

    /// Least of a few runs, or of the first where that is clearly slower than `best`.
    fn milliseconds(
        &self,
        cuda: Cuda,
        gemm: &Gemm,
        plan: &Plan,
        algorithm: &sys::cublasLtMatmulAlgo_t,
        out: u64,
        best: f32,
    ) -> Result<f32> {
        self.queue(cuda, gemm, plan, algorithm, out)?;
        let mut least = f32::INFINITY;
        for _ in 0..RUNS {
            let timer = Timer::start(cuda)?;
            self.queue(cuda, gemm, plan, algorithm, out)?;
            least = least.min(timer.stop()?);
            if least > CLEARLY_SLOWER * best {
                break;
            }
        }
        Ok(least)
    }

    fn queue(
        &self,
        cuda: Cuda,
        gemm: &Gemm,
        plan: &Plan,
        algorithm: &sys::cublasLtMatmulAlgo_t,
        out: u64,
    ) -> Result<()> {
        let beta = if gemm.base.is_some() { 1.0f32 } else { 0.0 };
        let [first, second, layout] = plan.layouts;
        // SAFETY: layouts describe memory that the caller's tensors own (shapes checked by the op); alpha and beta are read during the call.
        check(
            unsafe {
                result::matmul(
                    self.handle,
                    plan.operation,
                    std::ptr::from_ref(&gemm.alpha).cast(),
                    std::ptr::from_ref(&beta).cast(),
                    gemm.b.pointer as *const c_void,
                    first,
                    gemm.a.pointer as *const c_void,
                    second,
                    gemm.base.unwrap_or(out) as *const c_void,
                    layout,
                    out as *mut c_void,
                    layout,
                    algorithm,
                    self.workspace.pointer() as *mut c_void,
                    WORKSPACE_BYTES,
                    cuda.stream().cast(),
                )
            },
            Some(gemm),
        )
    }
}

/// The kept choice for a product, or else the name to keep its next choice under. The names go from general (shared by similar
/// shapes) to the product's own. A choice that cannot compute this product is passed over but stays, since it serves others.
fn known_choice<'a>(
    choices: &Choices,
    names: &'a [String; 2],
    can_compute: impl Fn(&Algorithm) -> bool,
) -> std::result::Result<Algorithm, &'a String> {
    for name in names {
        let chosen = choices.get(name).ok_or(name)?;
        if can_compute(&chosen) {
            return Ok(chosen);
        }
    }
    Err(&names[1])
}

/// The place of the least time; an earlier one that is hardly longer is preferred, and what failed is not chosen unless all did.
fn least(times: &[Result<f32>]) -> usize {
    let mut least = 0;
    for (place, time) in times.iter().enumerate() {
        let is_less = match (time, &times[least]) {
            (Ok(time), Ok(best)) => *time < CLEARLY_FASTER * best,
            (Ok(_), Err(_)) => true,
            (Err(_), _) => false,
        };
        if is_less {
            least = place;
        }
    }
    least
}

/// The plan with cuBLASLt's first proposal, and all its proposals.
/// Row-major [rows, cols] is column-major [cols, rows], so that d = a b is computed as dᵀ = bᵀ aᵀ.
fn plan(
    handle: sys::cublasLtHandle_t,
    gemm: &Gemm,
    aligned: bool,
) -> Result<(Plan, Vec<sys::cublasLtMatmulAlgo_t>)> {
    let operation = operation(gemm)?;
    let layouts = layouts(gemm)?;
    let preference = preference(gemm, aligned)?;
    let mut proposals = [MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::uninit(); CANDIDATES];
    let mut n_proposals = 0;
    // SAFETY: all descriptors were made above, and there is room for as many results as are asked for.
    let found = unsafe {
        sys::cublasLtMatmulAlgoGetHeuristic(
            handle,
            operation,
            layouts[0],
            layouts[1],
            layouts[2],
            layouts[2],
            preference,
            CANDIDATES as i32,
            proposals[0].as_mut_ptr(),
            &mut n_proposals,
        )
    };
    // SAFETY: made above, not used again.
    let _ = unsafe { result::destroy_matmul_pref(preference) };
    check(found.result(), Some(gemm))?;
    let candidates: Vec<sys::cublasLtMatmulAlgo_t> = proposals[..n_proposals.max(0) as usize]
        .iter()
        // SAFETY: the call filled the first `n_proposals`.
        .map(|proposal| unsafe { proposal.assume_init_ref() })
        .filter(|proposal| proposal.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS)
        .map(|proposal| proposal.algo)
        .collect();
    let Some(first) = candidates.first() else {
        let status = sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED;
        return check(Err(result::CublasError(status)), Some(gemm));
    };
    let plan = Plan {
        operation,
        layouts,
        algorithm: *first,
    };
    Ok((plan, candidates))
}

/// A product in f32, with the transpositions of b and a.
fn operation(gemm: &Gemm) -> Result<sys::cublasLtMatmulDesc_t> {
    use sys::cublasLtMatmulDescAttributes_t as Attribute;
    let operation = check(
        result::create_matmul_desc(
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cudaDataType::CUDA_R_32F,
        ),
        Some(gemm),
    )?;
    for (attribute, transposed) in [
        (Attribute::CUBLASLT_MATMUL_DESC_TRANSA, gemm.b.transposed),
        (Attribute::CUBLASLT_MATMUL_DESC_TRANSB, gemm.a.transposed),
    ] {
        // cublasOperation_t: N is 0, T is 1.
        let value = i32::from(transposed);
        // SAFETY: the attribute takes a value of this type.
        let outcome = unsafe {
            result::set_matmul_desc_attribute(
                operation,
                attribute,
                std::ptr::from_ref(&value).cast(),
                size_of_val(&value),
            )
        };
        check(outcome, Some(gemm))?;
    }
    Ok(operation)
}

/// Of bᵀ, aᵀ and dᵀ as memory holds them.
fn layouts(gemm: &Gemm) -> Result<[sys::cublasLtMatrixLayout_t; 3]> {
    let layout = |dtype, rows: usize, cols: usize, stride: usize| {
        check(
            result::create_matrix_layout(data_type(dtype), rows as u64, cols as u64, stride as i64),
            Some(gemm),
        )
    };
    let stored = |transposed, rows, cols| {
        if transposed {
            (cols, rows)
        } else {
            (rows, cols)
        }
    };
    let (b_rows, b_cols) = stored(gemm.b.transposed, gemm.n, gemm.k);
    let (a_rows, a_cols) = stored(gemm.a.transposed, gemm.k, gemm.m);
    Ok([
        layout(gemm.in_dtype, b_rows, b_cols, gemm.b.stride)?,
        layout(gemm.in_dtype, a_rows, a_cols, gemm.a.stride)?,
        layout(gemm.out_dtype, gemm.n, gemm.m, gemm.d_stride)?,
    ])
}

/// What proposals may count on: the workspace, and how operands are aligned.
fn preference(gemm: &Gemm, aligned: bool) -> Result<sys::cublasLtMatmulPreference_t> {
    use sys::cublasLtMatmulPreferenceAttributes_t as Preference;
    let preference = check(result::create_matmul_pref(), Some(gemm))?;
    let prefer = |attribute, value: *const c_void, size| {
        // SAFETY: `value` points at `size` bytes of the attribute's type.
        check(
            unsafe { result::set_matmul_pref_attribute(preference, attribute, value, size) },
            Some(gemm),
        )
    };
    prefer(
        Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
        std::ptr::from_ref(&WORKSPACE_BYTES).cast(),
        size_of_val(&WORKSPACE_BYTES),
    )?;
    let alignment: u32 = if aligned { 16 } else { 2 };
    for attribute in [
        Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
        Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
        Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
    ] {
        prefer(
            attribute,
            std::ptr::from_ref(&alignment).cast(),
            size_of_val(&alignment),
        )?;
    }
    Ok(preference)
}

fn data_type(dtype: DType) -> sys::cudaDataType {
    match dtype {
        DType::F32 => sys::cudaDataType::CUDA_R_32F,
        DType::Bf16 => sys::cudaDataType::CUDA_R_16BF,
    }
}

fn check<T>(
    outcome: std::result::Result<T, result::CublasError>,
    gemm: Option<&Gemm>,
) -> Result<T> {
    outcome.map_err(|error| Error::CublasLt {
        status: format!("{:?}", error.0),
        product: gemm.map_or_else(String::new, |g| {
            format!("[{},{}] = [{},{}] x [{},{}]", g.m, g.n, g.m, g.k, g.k, g.n)
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_shapes_share_a_choice_and_no_choice_replaces_another() {
        let key = |tokens: usize| Key {
            sizes: [tokens, 9216, 2560],
            strides: [2560, 2560, 9216],
            transposed: [false, true],
            adds: false,
            dtypes: [DType::Bf16, DType::Bf16],
            aligned: true,
        };
        assert_eq!(key(15_300).near().name(), key(15_360).near().name());
        assert_eq!(key(15_360).near(), key(15_360));
        assert_ne!(key(15_361).near().name(), key(15_360).near().name());

        let mut choices = Choices::in_memory();
        let names = [key(15_300).near().name(), key(15_300).name()];
        const FIRST: Algorithm = [1; 8];
        const SECOND: Algorithm = [2; 8];
        let computed_by = |able: &'static [Algorithm]| move |one: &Algorithm| able.contains(one);
        // Nothing is known: the choice will count for all near shapes, and then does.
        let known = known_choice(&choices, &names, computed_by(&[FIRST]));
        assert_eq!(known, Err(&names[0]));
        choices.put(names[0].clone(), FIRST);
        let known = known_choice(&choices, &names, computed_by(&[SECOND, FIRST]));
        assert_eq!(known, Ok(FIRST));
        // It cannot compute this one, which gets its own beside it.
        let known = known_choice(&choices, &names, computed_by(&[SECOND]));
        assert_eq!(known, Err(&names[1]));
        choices.put(names[1].clone(), SECOND);
        let known = known_choice(&choices, &names, computed_by(&[SECOND]));
        assert_eq!(known, Ok(SECOND));
        let known = known_choice(&choices, &names, computed_by(&[SECOND, FIRST]));
        assert_eq!(known, Ok(FIRST));
        // Neither can.
        let known = known_choice(&choices, &names, computed_by(&[]));
        assert_eq!(known, Err(&names[1]));
    }

    #[test]
    fn algorithm_replaces_an_earlier_one_only_where_it_is_clearly_faster_or_that_failed() {
        let failed = || Err(Error::NoNvrtc);
        assert_eq!(least(&[Ok(1.0), Ok(0.99), Ok(1.2)]), 0);
        assert_eq!(least(&[Ok(1.0), Ok(0.9), Ok(0.89), Ok(0.5)]), 3);
        assert_eq!(least(&[failed(), Ok(2.0), Ok(1.99)]), 1);
        assert_eq!(least(&[Ok(1.0), failed()]), 0);
        assert_eq!(least(&[failed(), failed()]), 0);
    }
}
