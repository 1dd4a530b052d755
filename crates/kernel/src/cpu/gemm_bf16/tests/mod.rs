//! Products against f64, by plain definitions of the instructions and, where the processor has them, by the instructions.

use super::*;

/// `vdpbf16ps` by its definition, but for denormal numbers.
#[derive(Clone, Copy)]
struct PlainPairs;

impl Microkernel for PlainPairs {
    const ROWS: usize = MIN_HEIGHT;
    const COLUMNS: usize = LANES;
    const PAIRS: usize = 1;

    fn compute(self, rows: Rows) {
        rows.compute_in_vectors(self);
    }
}

impl VectorMicrokernel for PlainPairs {
    fn block<const R: usize, const V: usize>(
        self,
        sums: &mut [[f32; WIDTH]; R],
        a: &[[u32; R]],
        b: &[[[u32; LANES]; V]],
    ) {
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
}

/// `tdpbf16ps` likewise.
#[derive(Clone, Copy)]
struct PlainTiles;

impl Microkernel for PlainTiles {
    const ROWS: usize = WIDTH;
    const COLUMNS: usize = WIDTH;
    const PAIRS: usize = LANES;

    fn compute(self, rows: Rows) {
        rows.compute_in_tiles(self);
    }
}

impl TileMicrokernel for PlainTiles {
    fn block(self, sums: &mut Sums, a: &[[[u32; LANES]; WIDTH]], b: &[[[u32; WIDTH]; LANES]]) {
        for (row, sums) in sums.0.iter_mut().enumerate() {
            for (column, sum) in sums.iter_mut().enumerate() {
                *sum = a.iter().zip(b).fold(0.0, |sum, (a, b)| {
                    let [even, odd] = [0, 1].map(|half| {
                        a[row].iter().zip(b).fold(0.0f32, |sum, (a, b)| {
                            halves(*a)[half].mul_add(halves(b[column])[half], sum)
                        })
                    });
                    sum + (even + odd)
                });
            }
        }
    }
}

fn halves(pair: u32) -> [f32; 2] {
    [pair << 16, pair & 0xffff_0000].map(f32::from_bits)
}

macro_rules! plain_instructions {
    ($($kernel:ty),*) => {$(
impl Instructions for $kernel {
    fn transpose(self, block: &mut [[u32; LANES]; LANES]) {
        let old = *block;
        for (i, line) in block.iter_mut().enumerate() {
            *line = old.map(|line| line[i]);
        }
    }

    fn write(self, dst: ViewMut, sums: &[f32], alpha: f32, beta: f32) {
        let new = |old: f32, sum: f32| match beta == 0.0 {
            true => alpha * sum,
            false => beta * old + alpha * sum,
        };
        match dst {
            ViewMut::F32(dst) => dst.iter_mut().zip(sums).for_each(|(y, sum)| *y = new(*y, *sum)),
            ViewMut::Bf16(dst) => dst
                .iter_mut()
                .zip(sums)
                .for_each(|(y, sum)| *y = bf16::from_f32(new(y.to_f32(), *sum))),
        }
    }

    fn prefetch(self, _: &[bf16]) {}

    fn run(self, mut body: impl FnMut()) {
        body();
    }
}
    )*};
}
plain_instructions!(PlainPairs, PlainTiles);

/// Values between -1 and 1, in [n_rows, depth] or [depth, n_rows].
fn values(n: usize, seed: usize) -> Vec<bf16> {
    (0..n)
        .map(|i| ((i * 2_654_435_761 + seed * 40_503) % 1009) as f32 / 504.5 - 1.0)
        .map(bf16::from_f32)
        .collect()
}

/// Every layout, beta and storage against f64, with the same bytes from one thread and several.
fn check(kernel: impl Microkernel) {
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
            let operand = |data, n_rows, inner| match inner {
                true => Operand::row_major(data, n_rows, k),
                false => Operand::column_major(data, k, n_rows),
            };
            let term = |data: &[bf16], n_rows: usize, inner, line: usize, l: usize| {
                let at = if inner {
                    line * k + l
                } else {
                    l * n_rows + line
                };
                data[at].to_f64()
            };
            let (lhs, rhs) = (operand(&a, m, a_inner), operand(&b, n, b_inner));
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
                        product(kernel, ViewMut::F32(&mut y), alpha, lhs, rhs, beta);
                    });
                    y
                };
                let bf16s = |pool: &rayon::ThreadPool| {
                    let mut y: Vec<bf16> = (0..m * n).map(start).collect();
                    pool.install(|| {
                        product(kernel, ViewMut::Bf16(&mut y), alpha, lhs, rhs, beta);
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
    check(PlainPairs);
}

#[test]
fn packing_of_tiles_agrees_with_f64() {
    check(PlainTiles);
}

/// Where the processor has them; `cyrene doctor` says which.
#[test]
#[cfg(target_arch = "x86_64")]
fn avx512_bf16_agrees_with_f64() {
    match avx512::Avx512Bf16::detect() {
        Some(kernel) => check(kernel),
        None => eprintln!("skipped: this processor has no AVX512-BF16"),
    }
}

/// As above.
#[test]
#[cfg(target_arch = "x86_64")]
fn amx_bf16_agrees_with_f64() {
    match avx512::Avx512Bf16::detect().and_then(amx::AmxBf16::detect) {
        Some(kernel) => check(kernel),
        None => {
            eprintln!("skipped: this processor has no AMX for bf16, or it is not permitted")
        }
    }
}

/// The order of a sum is that of the definition, to the bit.
#[test]
#[cfg(target_arch = "x86_64")]
fn amx_bf16_adds_in_the_order_of_its_definition() {
    let Some(kernel) = avx512::Avx512Bf16::detect().and_then(amx::AmxBf16::detect) else {
        eprintln!("skipped: this processor has no AMX for bf16, or it is not permitted");
        return;
    };
    let words = |n: usize, seed| -> Vec<u32> {
        let terms = values(2 * n, seed);
        let (pairs, _) = terms.as_chunks();
        pairs.iter().map(|[even, odd]| word(*even, *odd)).collect()
    };
    for n_steps in [1, 2, 7] {
        let n_words = n_steps * LANES * WIDTH;
        let (a, b) = (words(n_words, 1), words(n_words, 2));
        let a = a.as_chunks().0.as_chunks().0;
        let b = b.as_chunks().0.as_chunks().0;
        let [mut got, mut want] = [(); 2].map(|()| Sums([[f32::NAN; WIDTH]; WIDTH]));
        kernel.block(&mut got, a, b);
        PlainTiles.block(&mut want, a, b);
        assert_eq!(
            got.0.map(|row| row.map(f32::to_bits)),
            want.0.map(|row| row.map(f32::to_bits))
        );
    }
}

/// Vectors write what scalars do, whatever a row's length: NaN, infinities, halves and denormal numbers among it.
#[test]
#[cfg(target_arch = "x86_64")]
fn avx512_writes_as_scalars_do() {
    let Some(kernel) = avx512::Avx512Bf16::detect() else {
        eprintln!("skipped: this processor has no AVX512-BF16");
        return;
    };
    let bits = [0u32, 1, 0x7fff, 0x8000, 0x8001, 0x1_8000, 0xffff];
    let highs = [0u32, 0x3f80, 0x7f7f, 0x7f80, 0x7fc0, 0x8000, 0xbf80, 0xff80];
    let sums: Vec<f32> = highs
        .iter()
        .flat_map(|high| bits.map(|low| f32::from_bits((high << 16).wrapping_add(low))))
        .collect();
    for sums in (1..=WIDTH).flat_map(|n| sums.windows(n)) {
        for (alpha, beta) in [(1.0, 0.0), (-0.5, 0.0), (1.0, 1.0), (2.0, 0.25)] {
            let old = values(sums.len(), 3);
            let (mut got, mut want) = (old.clone(), old.clone());
            kernel.write(ViewMut::Bf16(&mut got), sums, alpha, beta);
            PlainPairs.write(ViewMut::Bf16(&mut want), sums, alpha, beta);
            let bits = |x: &[bf16]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&got), bits(&want), "{sums:?}, {alpha} {beta}");

            let old: Vec<f32> = old.iter().map(|x| x.to_f32()).collect();
            let (mut got, mut want) = (old.clone(), old);
            kernel.write(ViewMut::F32(&mut got), sums, alpha, beta);
            PlainPairs.write(ViewMut::F32(&mut want), sums, alpha, beta);
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&got), bits(&want), "{sums:?}, {alpha} {beta}");
        }
    }
}

#[test]
#[should_panic(expected = "an operand of")]
fn operand_of_another_length_panics() {
    Operand::row_major(&[bf16::ZERO; 10], 3, 4);
}
