//! Rows of a table by token id: out[t] = table[tokens[t]]; the gradient adds each row back to where it came from.

use super::check;
use crate::{Error, Result, Tensor};

/// `out` assigned. Shapes: out_td [T,D]; table_cd [C,D]; tokens_t [T].
///
/// # Errors
/// [`Error::Shape`] where shapes disagree, [`Error::Index`] for an id of C or above.
pub fn forward(out_td: &mut Tensor, table_cd: &Tensor, tokens_t: &[u32]) -> Result<()> {
    check_rows(
        "embedding::forward",
        ["out_td", "table_cd"],
        out_td,
        table_cd,
        tokens_t,
    )?;
    cpu::forward(out_td, table_cd, tokens_t);
    Ok(())
}

/// d_table_cd[tokens[t]] += d_out_td[t], in token order. Shapes as in [`forward`], d_table_cd f32.
///
/// # Errors
/// As [`forward`], and [`Error::DType`] where d_table_cd is not f32.
pub fn backward(d_table_cd: &mut Tensor, d_out_td: &Tensor, tokens_t: &[u32]) -> Result<()> {
    const OP: &str = "embedding::backward";
    check_rows(
        OP,
        ["d_out_td", "d_table_cd"],
        d_out_td,
        d_table_cd,
        tokens_t,
    )?;
    check::f32(OP, "d_table_cd", d_table_cd)?;
    cpu::backward(d_table_cd, d_out_td, tokens_t);
    Ok(())
}

fn check_rows(
    op: &'static str,
    [row_arg, table_arg]: [&'static str; 2],
    rows_td: &Tensor,
    table_cd: &Tensor,
    tokens_t: &[u32],
) -> Result<()> {
    let [c, d] = check::dims(op, table_arg, table_cd, "[C,D]")?;
    check::shape(op, row_arg, rows_td, &[tokens_t.len(), d])?;
    match tokens_t.iter().position(|id| *id as usize >= c) {
        Some(row) => Err(Error::Index {
            op,
            arg: "tokens_t",
            row,
            value: tokens_t[row] as i64,
            bound: c,
        }),
        None => Ok(()),
    }
}

mod cpu {
    use crate::Tensor;
    use crate::cpu::math::add;
    use crate::cpu::{Out, View, for_rows, simd};

    pub(super) fn forward(out_td: &mut Tensor, table_cd: &Tensor, tokens_t: &[u32]) {
        let d = table_cd.numel() / table_cd.shape()[0].max(1);
        let table = View::of(table_cd);
        for_rows(
            [Out::assign(out_td, d)],
            [],
            #[inline(always)]
            |first_row, [out], []| {
                let tokens = &tokens_t[first_row..];
                for (out, id) in out.chunks_exact_mut(d).zip(tokens) {
                    let start = *id as usize * d;
                    table.slice(start..start + d).read_into(out);
                }
            },
        );
    }

    /// One thread: a token may occur anywhere, and its rows must be added in order.
    pub(super) fn backward(d_table_cd: &mut Tensor, d_out_td: &Tensor, tokens_t: &[u32]) {
        let d = d_out_td.numel() / tokens_t.len().max(1);
        let d_out = View::of(d_out_td);
        let d_table = d_table_cd.f32s_mut();
        let mut scratch = Vec::new();
        simd(
            #[inline(always)]
            || {
                for (row, id) in tokens_t.iter().enumerate() {
                    let start = *id as usize * d;
                    let row = d_out.slice(row * d..(row + 1) * d).load(&mut scratch);
                    add(&mut d_table[start..start + d], row);
                }
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::ops::testing::{STORAGES, assert_close, f64s, tensor};

    #[test]
    fn forward_copies_the_rows() {
        for (dtype, _) in STORAGES {
            let (c, d) = (50, 33);
            let table = tensor(&[c, d], 1, dtype);
            let tokens: Vec<u32> = (0..3001).map(|t| t * 7 % c as u32).collect();
            let mut out = Tensor::poison(&[tokens.len(), d], dtype);
            forward(&mut out, &table, &tokens).unwrap();
            let (out, table) = (out.to_f32_vec(), table.to_f32_vec());
            for (out, id) in out.chunks(d).zip(&tokens) {
                assert_eq!(out, &table[*id as usize * d..][..d]);
            }
        }
    }

    #[test]
    fn backward_adds_every_occurrence_to_what_was_there() {
        for (dtype, _) in STORAGES {
            let (c, d) = (6, 5);
            let tokens = [3, 0, 3, 3, 5];
            let d_out = tensor(&[tokens.len(), d], 1, dtype);
            let before = tensor(&[c, d], 2, DType::F32);
            let mut d_table = before.clone();
            backward(&mut d_table, &d_out, &tokens).unwrap();
            let mut want = f64s(&before);
            for (t, id) in tokens.iter().enumerate() {
                for i in 0..d {
                    want[*id as usize * d + i] += f64s(&d_out)[t * d + i];
                }
            }
            assert_close("d_table", &d_table, &want, 1e-6);
        }
    }

    #[test]
    fn no_tokens_are_allowed() {
        let table = tensor(&[4, 3], 1, DType::F32);
        forward(&mut Tensor::zeros(&[0, 3], DType::F32), &table, &[]).unwrap();
        let mut d_table = table.clone();
        backward(&mut d_table, &Tensor::zeros(&[0, 3], DType::F32), &[]).unwrap();
        assert_eq!(d_table, table);
    }

    #[test]
    fn id_beyond_the_table_is_refused() {
        let table = tensor(&[4, 3], 1, DType::F32);
        let error = forward(&mut Tensor::zeros(&[2, 3], DType::F32), &table, &[0, 4]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "embedding::forward: `tokens_t` holds 4 at row 1, outside 0..4"
        );
    }
}
