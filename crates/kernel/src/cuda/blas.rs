//! Matrix products through cuBLASLt, one plan for each shape.

use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::cublaslt::{result, sys};

use super::{Buffer, Cuda};
use crate::{DType, Error, Result};

/// What cuBLASLt may use beside the operands.
const WORKSPACE_BYTES: usize = 64 << 20;

/// One operand of a product, row-major.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Operand {
    pub pointer: u64,
    /// Whether memory holds the transpose.
    pub transposed: bool,
    /// Elements from one row in memory to the next.
    pub stride: usize,
}

/// d [M,N] = alpha · a [M,K] b [K,N] (+ d if `adds`), row-major, f32 sums. a and b have one dtype, d its own.
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
    pub adds: bool,
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

pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: Buffer,
    plans: HashMap<Key, Plan>,
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
            adds: gemm.adds,
            dtypes: [gemm.in_dtype, gemm.out_dtype],
            aligned: (gemm.a.pointer | gemm.b.pointer | gemm.d).is_multiple_of(16),
        };
        let plan = match self.plans.entry(key) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(plan(self.handle, gemm, key.aligned)?)
            }
        };
        let beta = if gemm.adds { 1.0f32 } else { 0.0 };
        let [first, second, out] = plan.layouts;
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
                    gemm.d as *const c_void,
                    out,
                    gemm.d as *mut c_void,
                    out,
                    &plan.algorithm,
                    self.workspace.pointer() as *mut c_void,
                    WORKSPACE_BYTES,
                    cuda.stream().cast(),
                )
            },
            Some(gemm),
        )
    }
}

/// Row-major [rows, cols] is column-major [cols, rows], so that d = a b is computed as dᵀ = bᵀ aᵀ.
fn plan(handle: sys::cublasLtHandle_t, gemm: &Gemm, aligned: bool) -> Result<Plan> {
    use sys::cublasLtMatmulDescAttributes_t as Attribute;
    let operation = check(
        result::create_matmul_desc(
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cudaDataType::CUDA_R_32F,
        ),
        Some(gemm),
    )?;
    let set = |attribute, transposed: bool| {
        // cublasOperation_t: N is 0, T is 1.
        let value = i32::from(transposed);
        // SAFETY: the attribute takes a value of this type.
        check(
            unsafe {
                result::set_matmul_desc_attribute(
                    operation,
                    attribute,
                    std::ptr::from_ref(&value).cast(),
                    size_of_val(&value),
                )
            },
            Some(gemm),
        )
    };
    set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, gemm.b.transposed)?;
    set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, gemm.a.transposed)?;
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
    let layouts = [
        layout(gemm.in_dtype, b_rows, b_cols, gemm.b.stride)?,
        layout(gemm.in_dtype, a_rows, a_cols, gemm.a.stride)?,
        layout(gemm.out_dtype, gemm.n, gemm.m, gemm.d_stride)?,
    ];
    let preference = check(result::create_matmul_pref(), Some(gemm))?;
    let prefer = |attribute, value: *const c_void, size| {
        // SAFETY: `value` points at `size` bytes of the attribute's type.
        check(
            unsafe { result::set_matmul_pref_attribute(preference, attribute, value, size) },
            Some(gemm),
        )
    };
    use sys::cublasLtMatmulPreferenceAttributes_t as Preference;
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
    // SAFETY: all descriptors were made above.
    let found = unsafe {
        result::get_matmul_algo_heuristic(
            handle, operation, layouts[0], layouts[1], layouts[2], layouts[2], preference,
        )
    };
    // SAFETY: made above, not used again.
    let _ = unsafe { result::destroy_matmul_pref(preference) };
    Ok(Plan {
        operation,
        layouts,
        algorithm: check(found, Some(gemm))?.algo,
    })
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
