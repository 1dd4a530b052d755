//! Matrix products of f32 sub-matrices through the `gemm` crate: unsafe, because that crate takes raw pointers. On the CPU side
//! only the products are, these and those of gemm_bf16.rs.

/// A strided matrix to read.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// Row-major, the rows directly behind each other.
    pub(crate) fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Mat::strided(data, rows, cols, cols)
    }

    /// Row-major with `row_stride` elements from one row's start to the next; `data` begins at the first element.
    /// Panics if the last element lies outside `data`.
    pub(crate) fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert_inside(data.len(), rows, cols, row_stride);
        Mat {
            data,
            rows,
            cols,
            row_stride,
            col_stride: 1,
        }
    }

    /// The transpose, without moving an element.
    pub(crate) fn t(self) -> Self {
        Mat {
            data: self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }
}

/// A row-major strided matrix to write.
pub(crate) struct MatMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a> MatMut<'a> {
    /// Row-major, the rows directly behind each other.
    pub(crate) fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        MatMut::strided(data, rows, cols, cols)
    }

    /// Row-major with `row_stride >= cols` elements from one row's start to the next; `data` begins at the first element.
    /// Panics if the last element lies outside `data` or rows overlap.
    pub(crate) fn strided(
        data: &'a mut [f32],
        rows: usize,
        cols: usize,
        row_stride: usize,
    ) -> Self {
        assert_inside(data.len(), rows, cols, row_stride);
        assert!(rows <= 1 || row_stride >= cols, "rows of an output overlap");
        MatMut {
            data,
            rows,
            cols,
            row_stride,
        }
    }
}

/// Who does the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Threads {
    /// The calling thread: inside a task that is itself one of many.
    One,
    /// All of rayon's, where the product is large enough to pay for it.
    All,
}

/// dst = alpha · lhs rhs + beta · dst. With beta = 0 what stood in `dst` is not read (it may be NaN).
/// Panics if the shapes do not fit together. The k dimension is never divided between threads, so the result is the same for
/// any number of them.
#[expect(
    unsafe_code,
    reason = "the gemm crate's only entry point takes raw pointers"
)]
pub(crate) fn gemm(dst: MatMut, alpha: f32, lhs: Mat, rhs: Mat, beta: f32, threads: Threads) {
    assert_eq!(
        (dst.rows, dst.cols, lhs.cols),
        (lhs.rows, rhs.cols, rhs.rows),
        "gemm: shapes of dst, lhs and rhs"
    );
    let parallelism = match threads {
        Threads::One => gemm::Parallelism::None,
        Threads::All => gemm::Parallelism::Rayon(0),
    };
    // SAFETY: every element that the strides reach lies inside its slice (`assert_inside` in each constructor, and a transpose
    // reaches the same elements); `dst` is borrowed mutably, so it overlaps neither input, and its rows do not overlap each
    // other; the shapes agree (assert above). Empty dimensions are handled by the crate without touching memory outside `dst`.
    unsafe {
        gemm::gemm(
            dst.rows,
            dst.cols,
            lhs.cols,
            dst.data.as_mut_ptr(),
            1,
            dst.row_stride as isize,
            beta != 0.0,
            lhs.data.as_ptr(),
            lhs.col_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
            rhs.col_stride as isize,
            rhs.row_stride as isize,
            beta,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

fn assert_inside(len: usize, rows: usize, cols: usize, row_stride: usize) {
    if rows > 0 && cols > 0 {
        assert!(
            (rows - 1) * row_stride + cols <= len,
            "a {rows} x {cols} matrix of row stride {row_stride} does not fit into {len} elements"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize, seed: usize) -> Vec<f32> {
        (0..n)
            .map(|i| ((i * 2_654_435_761 + seed * 40_503) % 1009) as f32 / 504.5 - 1.0)
            .collect()
    }

    #[test]
    fn gemm_agrees_with_f64_for_strides_transposes_and_beta() {
        for (m, k, n) in [
            (1, 1, 1),
            (1, 70, 33),
            (3, 5, 7),
            (17, 64, 64),
            (64, 31, 1),
            (65, 129, 130),
            (200, 300, 100),
        ] {
            for threads in [Threads::One, Threads::All] {
                for (alpha, beta) in [(1.0, 0.0), (0.5, 0.0), (1.0, 1.0), (-2.0, 1.0), (1.0, 0.25)]
                {
                    for transposed in [false, true] {
                        let pad = 3;
                        let a = values(m * (k + pad), 1);
                        let b = values(k * n, 2);
                        let old = values(m * (n + pad), 3);
                        let mut c = if beta == 0.0 {
                            vec![f32::NAN; old.len()]
                        } else {
                            old.clone()
                        };
                        let rhs = if transposed {
                            Mat::new(&b, n, k).t()
                        } else {
                            Mat::new(&b, k, n)
                        };
                        let lhs = Mat::strided(&a, m, k, k + pad);
                        gemm(
                            MatMut::strided(&mut c, m, n, n + pad),
                            alpha,
                            lhs,
                            rhs,
                            beta,
                            threads,
                        );
                        for i in 0..m {
                            for j in 0..n {
                                let mut want = 0.0f64;
                                for l in 0..k {
                                    let b = if transposed {
                                        b[j * k + l]
                                    } else {
                                        b[l * n + j]
                                    };
                                    want += a[i * (k + pad) + l] as f64 * b as f64;
                                }
                                let at = i * (n + pad) + j;
                                want *= alpha as f64;
                                if beta != 0.0 {
                                    want += beta as f64 * old[at] as f64;
                                }
                                let got = c[at] as f64;
                                assert!(
                                    (got - want).abs() < 1e-6 * (1 + k) as f64,
                                    "{m}x{k}x{n} [{i},{j}]: {got} for {want}"
                                );
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn gemm_over_no_terms_assigns_zero_or_scales() {
        let mut c = vec![f32::NAN; 6];
        gemm(
            MatMut::new(&mut c, 2, 3),
            1.0,
            Mat::new(&[], 2, 0),
            Mat::new(&[], 0, 3),
            0.0,
            Threads::One,
        );
        assert_eq!(c, [0.0; 6]);
        let mut c = vec![2.0; 6];
        gemm(
            MatMut::new(&mut c, 2, 3),
            1.0,
            Mat::new(&[], 2, 0),
            Mat::new(&[], 0, 3),
            1.0,
            Threads::All,
        );
        assert_eq!(c, [2.0; 6]);
    }

    #[test]
    #[should_panic(expected = "does not fit")]
    fn mat_beyond_its_slice_panics() {
        Mat::strided(&[0.0; 10], 3, 4, 4);
    }
}
