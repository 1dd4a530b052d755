//! E4M3 bytes with one bf16 scale a 128 × 128 block: the numbers of compressed-tensors' FP8_BLOCK scheme.
//!
//! scale = bf16(amax / 448); byte = E4M3(w / scale), to nearest even, clamped to ±448; w ≈ byte · scale.
//! E4M3 ("fn"): 1 sign, 4 exponent (bias 7), 3 mantissa bits; largest 448, smallest 2^-9, no infinity, NaN = 0x7f and 0xff.
//! Source: arXiv 2209.05433; compressed-tensors 0.19 `calculate_qparams` and its CPU and GPU divisions.

use super::check;
use crate::{DType, Result, Tensor, bf16};

/// Rows and columns of a block; edge blocks are smaller.
pub const BLOCK: usize = 128;

/// Largest E4M3 value.
const MAX: f32 = 448.0;

/// How a weight is divided by its block's scale before it is rounded to E4M3.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Division {
    /// The quotient is rounded to bf16 first: what llm-compressor does on a CPU with bf16 weights.
    Bf16,
    /// The quotient stays f32: one rounding.
    F32,
}

/// A block-quantized matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct Fp8Blocks {
    /// O
    pub rows: usize,
    /// I
    pub cols: usize,
    /// [rows, cols] E4M3 bytes.
    pub bytes: Vec<u8>,
    /// [ceil(rows/128), ceil(cols/128)] bf16.
    pub scales: Vec<bf16>,
}

/// Quantizes w_oi [O,I] (bf16, or f32 as it stands). The scale of a block of zeros is bf16's machine epsilon 2^-7, as in
/// compressed-tensors. A NaN becomes 0x7f.
///
/// # Errors
/// [`crate::Error::Shape`] where w_oi is no matrix.
pub fn encode(w_oi: &Tensor, division: Division) -> Result<Fp8Blocks> {
    let [rows, cols] = check::dims("quantize_fp8::encode", "w_oi", w_oi, "[O,I]")?;
    Ok(cpu::encode(w_oi, rows, cols, division))
}

/// w = byte · scale, as a tensor [rows, cols] of `dtype` (the product is rounded once).
/// Panics if `bytes` or `scales` has not the length that `rows` and `cols` ask for.
pub fn decode(blocks: &Fp8Blocks, dtype: DType) -> Tensor {
    let scales_per_row = blocks.cols.div_ceil(BLOCK);
    assert_eq!(
        blocks.bytes.len(),
        blocks.rows * blocks.cols,
        "one byte a weight"
    );
    assert_eq!(
        blocks.scales.len(),
        blocks.rows.div_ceil(BLOCK) * scales_per_row,
        "one scale a block"
    );
    cpu::decode(blocks, dtype)
}

/// The E4M3 byte nearest to `x`, ties to even; beyond ±448 (infinities too) saturated, NaN 0x7f.
pub fn to_e4m3(x: f32) -> u8 {
    let sign = (x.to_bits() >> 24) as u8 & 0x80;
    let abs = x.abs();
    if abs.is_nan() {
        return 0x7f;
    }
    // Below 2^-6 the steps are 2^-9: adding 2^14 leaves the rounded multiple in the low bits of the mantissa.
    const STEPS: f32 = 16_384.0;
    let magnitude = if abs < 0.015_625 {
        (abs + STEPS).to_bits() - STEPS.to_bits()
    } else {
        let bits = abs.min(MAX).to_bits();
        // 20 mantissa bits go; the exponent's bias falls from 127 to 7.
        ((bits + 0x7_ffff + (bits >> 20 & 1)) >> 20) - (120 << 3)
    };
    sign | magnitude as u8
}

/// The value of an E4M3 byte.
pub fn from_e4m3(byte: u8) -> f32 {
    let exponent = (byte >> 3 & 15) as i32;
    let mantissa = (byte & 7) as f32;
    let abs = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if byte & 0x80 == 0 { abs } else { -abs }
}

mod cpu {
    use rayon::prelude::*;

    use super::{BLOCK, Division, Fp8Blocks, MAX, from_e4m3, to_e4m3};
    use crate::cpu::{View, ViewMut, simd};
    use crate::{DType, Tensor, bf16};

    pub(super) fn encode(w_oi: &Tensor, rows: usize, cols: usize, division: Division) -> Fp8Blocks {
        let view = View::of(w_oi);
        let scales_per_row = cols.div_ceil(BLOCK);
        let mut bytes = vec![0; rows * cols];
        let mut scales = vec![bf16::ZERO; rows.div_ceil(BLOCK) * scales_per_row];
        if !bytes.is_empty() {
            bytes
                .par_chunks_mut(BLOCK * cols)
                .zip(scales.par_chunks_mut(scales_per_row))
                .enumerate()
                .for_each_init(Vec::new, |scratch, (band, (bytes, scales))| {
                    let start = band * BLOCK * cols;
                    simd(
                        #[inline(always)]
                        || {
                            let w = view.slice(start..start + bytes.len()).load(scratch);
                            encode_band(bytes, scales, w, cols, division);
                        },
                    );
                });
        }
        Fp8Blocks {
            rows,
            cols,
            bytes,
            scales,
        }
    }

    /// Up to 128 rows.
    #[inline(always)]
    fn encode_band(
        bytes: &mut [u8],
        scales: &mut [bf16],
        w: &[f32],
        cols: usize,
        division: Division,
    ) {
        for (block, scale) in scales.iter_mut().enumerate() {
            let range = block * BLOCK..((block + 1) * BLOCK).min(cols);
            let amax = w.chunks_exact(cols).fold(0.0, |amax, row| {
                row[range.clone()]
                    .iter()
                    .fold(amax, |amax: f32, w| amax.max(w.abs()))
            });
            *scale = bf16::from_f32(amax / MAX);
            if *scale == bf16::ZERO {
                *scale = bf16::EPSILON;
            }
            let divisor = scale.to_f32();
            for (bytes, w) in bytes.chunks_exact_mut(cols).zip(w.chunks_exact(cols)) {
                let pairs = bytes[range.clone()].iter_mut().zip(&w[range.clone()]);
                match division {
                    Division::Bf16 => {
                        pairs.for_each(|(byte, w)| {
                            *byte = to_e4m3(bf16::from_f32(w / divisor).to_f32())
                        });
                    }
                    Division::F32 => pairs.for_each(|(byte, w)| *byte = to_e4m3(w / divisor)),
                }
            }
        }
    }

    pub(super) fn decode(blocks: &Fp8Blocks, dtype: DType) -> Tensor {
        let Fp8Blocks {
            rows,
            cols,
            ref bytes,
            ref scales,
        } = *blocks;
        let mut w_oi = Tensor::zeros(&[rows, cols], dtype);
        if bytes.is_empty() {
            return w_oi;
        }
        let values: [f32; 256] = std::array::from_fn(|byte| from_e4m3(byte as u8));
        let scales_per_row = cols.div_ceil(BLOCK);
        ViewMut::of(&mut w_oi)
            .chunks(BLOCK * cols)
            .into_par_iter()
            .zip(bytes.par_chunks(BLOCK * cols))
            .zip(scales.par_chunks(scales_per_row))
            .for_each_init(
                || vec![0.0; cols],
                |row, ((mut w, bytes), scales)| {
                    for (i, bytes) in bytes.chunks_exact(cols).enumerate() {
                        let stretches = row.chunks_mut(BLOCK).zip(bytes.chunks(BLOCK));
                        for ((row, bytes), scale) in stretches.zip(scales) {
                            for (w, byte) in row.iter_mut().zip(bytes) {
                                *w = values[*byte as usize] * scale.to_f32();
                            }
                        }
                        w.slice(i * cols..(i + 1) * cols).store(row);
                    }
                },
            );
        w_oi
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{STORAGES, tensor};

    /// Every non-negative E4M3 value, by byte.
    fn values() -> Vec<f32> {
        (0..0x7f).map(from_e4m3).collect()
    }

    #[test]
    fn every_byte_survives_decoding_and_encoding() {
        for byte in 0..=255u8 {
            let x = from_e4m3(byte);
            if byte & 0x7f == 0x7f {
                assert!(x.is_nan());
                assert_eq!(to_e4m3(x), 0x7f);
            } else {
                assert_eq!(to_e4m3(x), byte, "{x}");
                assert_eq!(x.is_sign_negative(), byte & 0x80 != 0);
            }
        }
        assert_eq!(from_e4m3(0x7e), 448.0);
        assert_eq!(from_e4m3(0x01), 1.0 / 512.0);
        assert_eq!(from_e4m3(0x08), 1.0 / 64.0);
        assert_eq!(from_e4m3(0x38), 1.0);
    }

    #[test]
    fn halfway_rounds_to_the_even_byte_and_its_neighbours_to_theirs() {
        let values = values();
        for (byte, pair) in values.windows(2).enumerate() {
            // Exact: two neighbours differ by one bit in a format far narrower than f32.
            let middle = (pair[0] + pair[1]) / 2.0;
            let byte = byte as u8;
            assert_eq!(to_e4m3(middle), byte + (byte & 1), "{middle}");
            assert_eq!(to_e4m3(middle.next_down()), byte, "below {middle}");
            assert_eq!(to_e4m3(middle.next_up()), byte + 1, "above {middle}");
            assert_eq!(to_e4m3(-middle), 0x80 | (byte + (byte & 1)));
        }
    }

    #[test]
    fn beyond_the_range_saturates() {
        for x in [448.1, 464.0, 1e9, f32::MAX, f32::INFINITY] {
            assert_eq!(to_e4m3(x), 0x7e);
            assert_eq!(to_e4m3(-x), 0xfe);
        }
        assert_eq!(to_e4m3(1e-30), 0);
        assert_eq!(to_e4m3(-1e-30), 0x80);
    }

    #[test]
    fn each_block_has_its_own_scale_and_edges_are_smaller() {
        let (rows, cols) = (130, 300);
        let mut w = tensor(&[rows, cols], 1, DType::F32);
        w.f32s_mut()[129 * cols + 299] = 896.0;
        let blocks = encode(&w.to_dtype(DType::Bf16), Division::F32).unwrap();
        assert_eq!(blocks.scales.len(), 2 * 3);
        assert_eq!(blocks.scales[5].to_f32(), 2.0);
        assert_eq!(blocks.bytes[129 * cols + 299], 0x7e);
        for (band, columns) in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)] {
            let mut amax = 0.0f32;
            for row in band * 128..(band * 128 + 128).min(rows) {
                for col in columns * 128..(columns * 128 + 128).min(cols) {
                    amax = amax.max(bf16::from_f32(w.f32s()[row * cols + col]).to_f32().abs());
                }
            }
            assert_eq!(
                blocks.scales[band * 3 + columns],
                bf16::from_f32(amax / 448.0)
            );
        }
    }

    #[test]
    fn decoded_weights_are_within_half_a_step() {
        for (dtype, _) in STORAGES {
            for division in [Division::Bf16, Division::F32] {
                let w = tensor(&[200, 257], 1, dtype);
                let blocks = encode(&w, division).unwrap();
                let back = decode(&blocks, DType::F32);
                for ((w, back), i) in w.to_f32_vec().iter().zip(back.f32s()).zip(0..) {
                    let scale = blocks.scales[i / 257 / 128 * 3 + i % 257 / 128].to_f32();
                    // Half of a step of 1/8 relative, or of 2^-9 scales; a clamped amax may lie 2^-9 above 448 scales.
                    let allowed = (w.abs() / 15.9).max(scale / 1024.0);
                    assert!((w - back).abs() <= allowed, "{w} became {back}");
                }
                assert_eq!(decode(&blocks, DType::Bf16), back.to_dtype(DType::Bf16));
            }
        }
    }

    #[test]
    fn divisions_differ_by_one_step_in_a_few_bytes() {
        let w = tensor(&[256, 256], 1, DType::Bf16);
        let exact = encode(&w, Division::F32).unwrap();
        let double = encode(&w, Division::Bf16).unwrap();
        assert_eq!(exact.scales, double.scales);
        let pairs = exact.bytes.iter().zip(&double.bytes);
        let n_differing = pairs.clone().filter(|(a, b)| a != b).count();
        assert!((1..256 * 256 / 10).contains(&n_differing), "{n_differing}");
        for (a, b) in pairs {
            assert!(a.abs_diff(*b) <= 1);
        }
    }

    #[test]
    fn zero_block_has_scale_epsilon() {
        let blocks = encode(&Tensor::zeros(&[2, 2], DType::Bf16), Division::Bf16).unwrap();
        assert_eq!(blocks.scales, [bf16::from_f32(0.007_812_5)]);
        assert_eq!(blocks.bytes, [0; 4]);
        assert_eq!(
            decode(&blocks, DType::F32),
            Tensor::zeros(&[2, 2], DType::F32)
        );
    }

    #[test]
    fn empty_matrix_has_no_blocks() {
        let blocks = encode(&Tensor::zeros(&[0, 5], DType::F32), Division::F32).unwrap();
        assert_eq!((blocks.bytes.len(), blocks.scales.len()), (0, 0));
        assert_eq!(decode(&blocks, DType::F32).shape(), [0, 5]);
    }

    #[test]
    fn a_vector_is_refused() {
        assert!(encode(&Tensor::zeros(&[5], DType::F32), Division::F32).is_err());
    }
}
