//! The primitives of a training step with inputs of a model's shapes, and what each must at least move and multiply.
// T tokens, D hidden, F feed-forward, C vocabulary; attention: H heads, G key:value heads, N dims; delta rule: H value heads, G key
// heads, K key dims, V value dims. Scratch that a primitive takes for itself is part of what it could do without.

use anyhow::Result;
use kernel::DType;
use kernel::ops::adamw::{self, Update};
use kernel::ops::dropout::Dropout;
use kernel::ops::rope::{self, Rotation};
use kernel::ops::{
    attention, delta_gate, delta_inputs, embedding, gated_delta_rule, gated_rms_norm, grad_norm,
    linear_cross_entropy, low_rank, matmul, rms_norm, sigmoid_gate, split, swiglu,
};

use super::{Bench, Cost};

/// Measures a primitive, forward and backward.
type Cases = fn(&mut Bench) -> Result<()>;

/// By the name of the primitive.
pub(super) const ALL: &[(&str, Cases)] = &[
    ("matmul", matmul),
    ("low_rank", low_rank),
    ("rms_norm", rms_norm),
    ("swiglu", swiglu),
    ("attention", attention),
    ("rope", rope),
    ("sigmoid_gate", sigmoid_gate),
    ("split", split),
    ("gated_delta_rule", gated_delta_rule),
    ("delta_inputs", delta_inputs),
    ("delta_gate", delta_gate),
    ("gated_rms_norm", gated_rms_norm),
    ("linear_cross_entropy", linear_cross_entropy),
    ("embedding", embedding),
    ("grad_norm", grad_norm),
    ("adamw", adamw),
];

/// Of the adapters that `bench train --tuner lora` has.
const RANK: usize = 16;

/// T, D, F.
fn wide_dims(bench: &Bench) -> [usize; 3] {
    let config = &bench.config;
    [bench.t, config.hidden_size, config.intermediate_size]
}

/// T, H, G, N.
fn attention_dims(bench: &Bench) -> [usize; 4] {
    let config = &bench.config;
    [
        bench.t,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    ]
}

/// G, H, K, V.
fn delta_dims(bench: &Bench) -> [usize; 4] {
    let config = &bench.config;
    [
        config.linear_num_key_heads,
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
    ]
}

fn matmul(bench: &mut Bench) -> Result<()> {
    let [t, d, f] = wide_dims(bench);
    let shape = || format!("t{t}_i{d}_o{f}");
    let products = 2.0 * (t * d) as f64 * f as f64;
    let (x_td, w_fd, d_y_tf) = (
        bench.act(&[t, d])?,
        bench.act(&[f, d])?,
        bench.act(&[t, f])?,
    );

    let mut y_tf = bench.act_zeros(&[t, f])?;
    let cost = Cost::of(&[&x_td, &w_fd, &y_tf]).operations(products);
    bench.measure("matmul/forward", shape(), cost, || {
        matmul::forward(&mut y_tf, &x_td, &w_fd)
    })?;
    let mut d_x_td = bench.act_zeros(&[t, d])?;
    let cost = Cost::of(&[&d_y_tf, &w_fd, &d_x_td]).operations(products);
    bench.measure("matmul/backward_input", shape(), cost, || {
        matmul::backward_input(&mut d_x_td, &d_y_tf, &w_fd, 1.0)
    })?;
    let mut d_w_fd = bench.f32_zeros(&[f, d])?;
    let cost = Cost::of(&[&d_y_tf, &x_td])
        .updating(&[&d_w_fd])
        .operations(products);
    bench.measure("matmul/backward_weight", shape(), cost, || {
        matmul::backward_weight(&mut d_w_fd, &d_y_tf, &x_td, 1.0)
    })
}

fn low_rank(bench: &mut Bench) -> Result<()> {
    let [t, d, f] = wide_dims(bench);
    let shape = || format!("t{t}_i{d}_o{f}_r{RANK}");
    let (down, up) = (2.0 * (t * d * RANK) as f64, 2.0 * (t * f * RANK) as f64);
    let drops = Dropout {
        rate: 0.01,
        seed: 1,
        stream: 2,
    };
    let (x_td, d_y_tf) = (bench.act(&[t, d])?, bench.act(&[t, f])?);
    let a_rd = bench.random(&[RANK, d], DType::F32)?;
    let b_fr = bench.random(&[f, RANK], DType::F32)?;
    let (mut u_tr, mut d_u_tr) = (bench.act(&[t, RANK])?, bench.act(&[t, RANK])?);

    let cost = Cost::of(&[&x_td, &a_rd, &u_tr]).operations(down);
    bench.measure("low_rank/down_forward", shape(), cost, || {
        low_rank::down_forward(&mut u_tr, &x_td, &a_rd, Some(&drops))
    })?;
    let mut y_tf = bench.act_zeros(&[t, f])?;
    let cost = Cost::of(&[&u_tr, &b_fr, &y_tf]).operations(up);
    bench.measure("low_rank/up_forward", shape(), cost, || {
        low_rank::up_forward(&mut y_tf, &u_tr, &b_fr, 2.0)
    })?;
    let mut d_b_fr = bench.f32_zeros(&[f, RANK])?;
    let cost = Cost::of(&[&d_y_tf, &u_tr, &b_fr, &d_u_tr])
        .updating(&[&d_b_fr])
        .operations(2.0 * up);
    bench.measure("low_rank/up_backward", shape(), cost, || {
        low_rank::up_backward(&mut d_u_tr, Some(&mut d_b_fr), &d_y_tf, &u_tr, &b_fr, 2.0)
    })?;
    let (mut d_x_td, mut d_a_rd) = (bench.act_zeros(&[t, d])?, bench.f32_zeros(&[RANK, d])?);
    let cost = Cost::of(&[&d_u_tr, &x_td, &a_rd, &d_x_td])
        .updating(&[&d_a_rd])
        .operations(2.0 * down);
    bench.measure("low_rank/down_backward", shape(), cost, || {
        let d_a_rd = Some(&mut d_a_rd);
        low_rank::down_backward(&mut d_x_td, d_a_rd, &d_u_tr, &x_td, &a_rd, Some(&drops))
    })
}

fn rms_norm(bench: &mut Bench) -> Result<()> {
    let (t, d, eps) = (bench.t, bench.config.hidden_size, bench.config.rms_norm_eps);
    let (x_td, w_d) = (bench.act(&[t, d])?, bench.act(&[d])?);
    let (mut out_td, mut rstd_t) = (bench.act_zeros(&[t, d])?, bench.f32_zeros(&[t])?);
    let cost = Cost::of(&[&x_td, &w_d, &out_td, &rstd_t]);
    bench.measure("rms_norm/forward", format!("t{t}_d{d}"), cost, || {
        rms_norm::forward(&mut out_td, &mut rstd_t, &x_td, &w_d, eps)
    })?;
    // As between two branches: the residual stream's gradient is f32.
    let (mut d_x_td, mut d_branch_td) = (bench.f32_zeros(&[t, d])?, bench.act_zeros(&[t, d])?);
    let mut d_w_d = bench.f32_zeros(&[d])?;
    let cost =
        Cost::of(&[&out_td, &x_td, &w_d, &rstd_t, &d_branch_td]).updating(&[&d_x_td, &d_w_d]);
    bench.measure(
        "rms_norm/backward_residual",
        format!("t{t}_d{d}"),
        cost,
        || {
            let d_w_d = Some(&mut d_w_d);
            rms_norm::backward_residual(
                &mut d_x_td,
                &mut d_branch_td,
                d_w_d,
                &out_td,
                &x_td,
                &w_d,
                &rstd_t,
            )
        },
    )
}

fn swiglu(bench: &mut Bench) -> Result<()> {
    let [t, _, f] = wide_dims(bench);
    let (gate_tf, up_tf) = (bench.act(&[t, f])?, bench.act(&[t, f])?);
    let mut out_tf = bench.act_zeros(&[t, f])?;
    let cost = Cost::of(&[&gate_tf, &up_tf, &out_tf]);
    bench.measure("swiglu/forward", format!("t{t}_f{f}"), cost, || {
        swiglu::forward(&mut out_tf, &gate_tf, &up_tf)
    })?;
    let (mut d_gate_tf, mut d_up_tf) = (bench.act_zeros(&[t, f])?, bench.act_zeros(&[t, f])?);
    let cost = Cost::of(&[&out_tf, &gate_tf, &up_tf, &d_gate_tf, &d_up_tf]);
    bench.measure("swiglu/backward", format!("t{t}_f{f}"), cost, || {
        swiglu::backward(&mut d_gate_tf, &mut d_up_tf, &out_tf, &gate_tf, &up_tf)
    })
}

fn attention(bench: &mut Bench) -> Result<()> {
    let [t, h, g, n] = attention_dims(bench);
    let shape = format!("t{t}_doc{}_h{h}_g{g}_n{n}", bench.document_tokens);
    let cu_seqlens = bench.cu_seqlens.clone();
    let scale = 1.0 / (n as f32).sqrt();
    // One product of every pair of tokens and head.
    let product = 2.0 * bench.pairs() * (h * n) as f64;
    let (q_thn, k_tgn, v_tgn) = (
        bench.act(&[t, h, n])?,
        bench.act(&[t, g, n])?,
        bench.act(&[t, g, n])?,
    );
    let (mut out_thn, mut lse_th) = (bench.act_zeros(&[t, h, n])?, bench.f32_zeros(&[t, h])?);
    let cost = Cost::of(&[&q_thn, &k_tgn, &v_tgn, &out_thn, &lse_th]).operations(2.0 * product);
    bench.measure("attention/forward", shape.clone(), cost, || {
        attention::forward(
            &mut out_thn,
            &mut lse_th,
            &q_thn,
            &k_tgn,
            &v_tgn,
            &cu_seqlens,
            scale,
        )
    })?;
    let d_out_thn = bench.act(&[t, h, n])?;
    let mut d_q_thn = bench.act_zeros(&[t, h, n])?;
    let (mut d_k_tgn, mut d_v_tgn) = (bench.act_zeros(&[t, g, n])?, bench.act_zeros(&[t, g, n])?);
    let cost = Cost::of(&[&q_thn, &k_tgn, &v_tgn, &out_thn, &lse_th, &d_out_thn])
        .and(&[&d_q_thn, &d_k_tgn, &d_v_tgn])
        .operations(5.0 * product);
    bench.measure("attention/backward", shape, cost, || {
        attention::backward(
            &mut d_q_thn,
            &mut d_k_tgn,
            &mut d_v_tgn,
            &d_out_thn,
            &out_thn,
            &lse_th,
            &q_thn,
            &k_tgn,
            &v_tgn,
            &cu_seqlens,
            scale,
        )
    })
}

fn rope(bench: &mut Bench) -> Result<()> {
    let [t, h, _, n] = attention_dims(bench);
    let rotation = Rotation::new(bench.config.rope_theta, bench.config.rotary_dims);
    let positions_t: Vec<u32> = (0..t as u32).collect();
    let mut x_thn = bench.act(&[t, h, n])?;
    // Only the dims that turn are touched.
    let mut cost = Cost::default().updating(&[&x_thn]);
    cost.bytes *= bench.config.rotary_dims as f64 / n as f64;
    let shape = format!("t{t}_h{h}_n{n}_r{}", bench.config.rotary_dims);
    bench.measure("rope/forward", shape, cost, || {
        rope::forward(&mut x_thn, &rotation, &positions_t)
    })
}

fn sigmoid_gate(bench: &mut Bench) -> Result<()> {
    let [t, h, _, n] = attention_dims(bench);
    let shape = || format!("t{t}_h{h}_n{n}");
    let (x, gate) = (bench.act(&[t, h, n])?, bench.act(&[t, h, n])?);
    let mut out = bench.act_zeros(&[t, h, n])?;
    let cost = Cost::of(&[&x, &gate, &out]);
    bench.measure("sigmoid_gate/forward", shape(), cost, || {
        sigmoid_gate::forward(&mut out, &x, &gate)
    })?;
    let (mut d_x, mut d_gate) = (bench.act_zeros(&[t, h, n])?, bench.act_zeros(&[t, h, n])?);
    let cost = Cost::of(&[&out, &x, &gate, &d_x, &d_gate]);
    bench.measure("sigmoid_gate/backward", shape(), cost, || {
        sigmoid_gate::backward(&mut d_x, &mut d_gate, &out, &x, &gate)
    })
}

fn split(bench: &mut Bench) -> Result<()> {
    let [t, h, _, n] = attention_dims(bench);
    let qg_th2n = bench.act(&[t, h, 2 * n])?;
    let (mut q_thn, mut gate_thn) = (bench.act_zeros(&[t, h, n])?, bench.act_zeros(&[t, h, n])?);
    let cost = Cost::of(&[&qg_th2n, &q_thn, &gate_thn]);
    bench.measure("split/query_gate", format!("t{t}_h{h}_n{n}"), cost, || {
        split::query_gate(&mut q_thn, &mut gate_thn, &qg_th2n)
    })
}

fn gated_delta_rule(bench: &mut Bench) -> Result<()> {
    let (t, [g, h, k, v]) = (bench.t, delta_dims(bench));
    let shape = format!("t{t}_doc{}_g{g}_h{h}_k{k}_v{v}", bench.document_tokens);
    let cu_seqlens = bench.cu_seqlens.clone();
    // A product with the state, and one with the lower triangle of a chunk's pairs, for all tokens and value heads.
    let chunk = gated_delta_rule::CHUNK;
    let (state, values) = (2.0 * (t * h * k * v) as f64, (t * h * chunk * v) as f64);
    let keys = (t * g * chunk * k) as f64;
    let unit = 1.0 / (k as f32).sqrt();
    let q_tgk = bench.random_in(&[t, g, k], bench.dtype, -unit, unit)?;
    let k_tgk = bench.random_in(&[t, g, k], bench.dtype, -unit, unit)?;
    let (v_thv, d_out_thv) = (bench.act(&[t, h, v])?, bench.act(&[t, h, v])?);
    let g_th = bench.random_in(&[t, h], DType::F32, -0.5, 0.0)?;
    let beta_th = bench.random_in(&[t, h], DType::F32, 0.0, 1.0)?;
    let inputs = Cost::of(&[&q_tgk, &k_tgk, &v_thv, &g_th, &beta_th]);

    let mut out_thv = bench.act_zeros(&[t, h, v])?;
    let cost = inputs
        .and(&[&out_thv])
        .operations(3.0 * state + 2.0 * values + 2.0 * keys);
    bench.measure("gated_delta_rule/forward", shape.clone(), cost, || {
        gated_delta_rule::forward(
            &mut out_thv,
            &q_tgk,
            &k_tgk,
            &v_thv,
            &g_th,
            &beta_th,
            &cu_seqlens,
        )
    })?;
    let (mut d_q_tgk, mut d_k_tgk) = (bench.act_zeros(&[t, g, k])?, bench.act_zeros(&[t, g, k])?);
    let mut d_v_thv = bench.act_zeros(&[t, h, v])?;
    let (mut d_g_th, mut d_beta_th) = (bench.f32_zeros(&[t, h])?, bench.f32_zeros(&[t, h])?);
    // The states again (2), their gradients (3), and what both give to queries, keys and values (3).
    let cost = inputs
        .and(&[
            &d_out_thv, &d_q_tgk, &d_k_tgk, &d_v_thv, &d_g_th, &d_beta_th,
        ])
        .operations(8.0 * state + 5.0 * values + 6.0 * keys);
    bench.measure("gated_delta_rule/backward", shape, cost, || {
        gated_delta_rule::backward(
            &mut d_q_tgk,
            &mut d_k_tgk,
            &mut d_v_thv,
            &mut d_g_th,
            &mut d_beta_th,
            &d_out_thv,
            &q_tgk,
            &k_tgk,
            &v_thv,
            &g_th,
            &beta_th,
            &cu_seqlens,
        )
    })
}

fn delta_inputs(bench: &mut Bench) -> Result<()> {
    let (t, [g, h, k, v]) = (bench.t, delta_dims(bench));
    let shape = || format!("t{t}_g{g}_h{h}_k{k}_v{v}");
    let n_channels = 2 * g * k + h * v;
    let cu_seqlens = bench.cu_seqlens.clone();
    let (scale, eps) = (1.0 / (k as f32).sqrt(), 1e-6);
    let (qkv_tc, w) = (
        bench.act(&[t, n_channels])?,
        bench.act(&[n_channels, 1, 4])?,
    );
    let (mut q_tgk, mut k_tgk) = (bench.act_zeros(&[t, g, k])?, bench.act_zeros(&[t, g, k])?);
    let mut v_thv = bench.act_zeros(&[t, h, v])?;
    let (mut q_rstd_tg, mut k_rstd_tg) = (bench.f32_zeros(&[t, g])?, bench.f32_zeros(&[t, g])?);
    let cost = Cost::of(&[&qkv_tc, &w, &q_tgk, &k_tgk, &v_thv, &q_rstd_tg, &k_rstd_tg]);
    bench.measure("delta_inputs/forward", shape(), cost, || {
        delta_inputs::forward(
            &mut q_tgk,
            &mut k_tgk,
            &mut v_thv,
            &mut q_rstd_tg,
            &mut k_rstd_tg,
            &qkv_tc,
            &w,
            &cu_seqlens,
            scale,
            eps,
        )
    })?;
    let (mut d_qkv_tc, mut d_w) = (
        bench.act_zeros(&[t, n_channels])?,
        bench.f32_zeros(&[n_channels, 1, 4])?,
    );
    let cost = Cost::of(&[&q_tgk, &k_tgk, &v_thv, &q_rstd_tg, &k_rstd_tg, &qkv_tc, &w])
        .and(&[&d_qkv_tc])
        .updating(&[&d_w]);
    bench.measure("delta_inputs/backward", shape(), cost, || {
        delta_inputs::backward(
            &mut d_qkv_tc,
            Some(&mut d_w),
            &q_tgk,
            &k_tgk,
            &v_thv,
            &qkv_tc,
            &w,
            &q_rstd_tg,
            &k_rstd_tg,
            &cu_seqlens,
            scale,
        )
    })
}

fn delta_gate(bench: &mut Bench) -> Result<()> {
    let (t, [_, h, ..]) = (bench.t, delta_dims(bench));
    let (a_th, b_th) = (bench.act(&[t, h])?, bench.act(&[t, h])?);
    let (a_log_h, dt_bias_h) = (bench.random(&[h], DType::F32)?, bench.act(&[h])?);
    let (mut g_th, mut beta_th) = (bench.f32_zeros(&[t, h])?, bench.f32_zeros(&[t, h])?);
    let cost = Cost::of(&[&a_th, &b_th, &a_log_h, &dt_bias_h, &g_th, &beta_th]);
    bench.measure("delta_gate/forward", format!("t{t}_h{h}"), cost, || {
        delta_gate::forward(&mut g_th, &mut beta_th, &a_th, &b_th, &a_log_h, &dt_bias_h)
    })?;
    let (mut d_a_th, mut d_b_th) = (bench.act_zeros(&[t, h])?, bench.act_zeros(&[t, h])?);
    let (mut d_a_log_h, mut d_dt_bias_h) = (bench.f32_zeros(&[h])?, bench.f32_zeros(&[h])?);
    let cost = Cost::of(&[&a_th, &b_th, &g_th, &beta_th, &d_a_th, &d_b_th])
        .updating(&[&d_a_log_h, &d_dt_bias_h]);
    bench.measure("delta_gate/backward", format!("t{t}_h{h}"), cost, || {
        delta_gate::backward(
            &mut d_a_th,
            &mut d_b_th,
            Some((&mut d_a_log_h, &mut d_dt_bias_h)),
            &g_th,
            &beta_th,
            &a_th,
            &b_th,
            &a_log_h,
            &dt_bias_h,
        )
    })
}

fn gated_rms_norm(bench: &mut Bench) -> Result<()> {
    let (t, [_, h, _, v], eps) = (bench.t, delta_dims(bench), bench.config.rms_norm_eps);
    let shape = || format!("t{t}_h{h}_v{v}");
    let (x_thv, z_thv) = (bench.act(&[t, h, v])?, bench.act(&[t, h, v])?);
    let w_v = bench.random(&[v], DType::F32)?;
    let (mut out_thv, mut rstd_th) = (bench.act_zeros(&[t, h, v])?, bench.f32_zeros(&[t, h])?);
    let cost = Cost::of(&[&x_thv, &z_thv, &w_v, &out_thv, &rstd_th]);
    bench.measure("gated_rms_norm/forward", shape(), cost, || {
        gated_rms_norm::forward(&mut out_thv, &mut rstd_th, &x_thv, &z_thv, &w_v, eps)
    })?;
    let (mut d_x_thv, mut d_z_thv) = (bench.act_zeros(&[t, h, v])?, bench.act_zeros(&[t, h, v])?);
    let mut d_w_v = bench.f32_zeros(&[v])?;
    let cost = Cost::of(&[&out_thv, &x_thv, &z_thv, &w_v, &rstd_th, &d_x_thv, &d_z_thv])
        .updating(&[&d_w_v]);
    bench.measure("gated_rms_norm/backward", shape(), cost, || {
        gated_rms_norm::backward(
            &mut d_x_thv,
            &mut d_z_thv,
            Some(&mut d_w_v),
            &out_thv,
            &x_thv,
            &z_thv,
            &w_v,
            &rstd_th,
        )
    })
}

fn linear_cross_entropy(bench: &mut Bench) -> Result<()> {
    let (t, d, c) = (bench.t, bench.config.hidden_size, bench.config.vocab_size);
    let targets_t: Vec<i32> = (0..t).map(|i| (i * 7919 % c) as i32).collect();
    let (x_td, head_cd) = (bench.act(&[t, d])?, bench.act(&[c, d])?);
    let (mut nll_t, mut d_x_td) = (bench.f32_zeros(&[t])?, bench.act_zeros(&[t, d])?);
    let mut d_head_cd = bench.f32_zeros(&[c, d])?;
    let cost = Cost::of(&[&x_td, &head_cd, &nll_t, &d_x_td])
        .updating(&[&d_head_cd])
        .operations(3.0 * 2.0 * (t * d) as f64 * c as f64);
    let shape = format!("t{t}_d{d}_c{c}");
    bench.measure("linear_cross_entropy/forward_backward", shape, cost, || {
        linear_cross_entropy::forward_backward(
            &mut nll_t,
            &mut d_x_td,
            Some(&mut d_head_cd),
            &x_td,
            &head_cd,
            &targets_t,
            1.0 / t as f32,
        )
    })
}

fn embedding(bench: &mut Bench) -> Result<()> {
    let (t, d, c) = (bench.t, bench.config.hidden_size, bench.config.vocab_size);
    let tokens_t: Vec<u32> = (0..t).map(|i| (i * 7919 % c) as u32).collect();
    let shape = || format!("t{t}_d{d}_c{c}");
    let table_cd = bench.act(&[c, d])?;
    let mut out_td = bench.act_zeros(&[t, d])?;
    // A row of the table for each token.
    let cost = Cost::default().updating(&[&out_td]);
    bench.measure("embedding/forward", shape(), cost, || {
        embedding::forward(&mut out_td, &table_cd, &tokens_t)
    })?;
    let d_out_td = bench.random(&[t, d], DType::F32)?;
    let mut d_table_cd = bench.f32_zeros(&[c, d])?;
    // As many rows of the table's gradient as there are tokens; these are f32 like what is added to them.
    let cost = Cost::of(&[&d_out_td]).updating(&[&d_out_td]);
    bench.measure("embedding/backward", shape(), cost, || {
        embedding::backward(&mut d_table_cd, &d_out_td, &tokens_t)
    })
}

fn grad_norm(bench: &mut Bench) -> Result<()> {
    let [_, d, f] = wide_dims(bench);
    let grad_fd = bench.random(&[f, d], DType::F32)?;
    let cost = Cost::of(&[&grad_fd]);
    bench.measure("grad_norm/forward", format!("f{f}_d{d}"), cost, || {
        grad_norm::forward(&[&grad_fd]).map(drop)
    })
}

fn adamw(bench: &mut Bench) -> Result<()> {
    let [_, d, f] = wide_dims(bench);
    let grad_fd = bench.random(&[f, d], DType::F32)?;
    let mut w_fd = bench.act(&[f, d])?;
    let (mut m_fd, mut v_fd) = (bench.act_zeros(&[f, d])?, bench.act_zeros(&[f, d])?);
    let cost = Cost::of(&[&grad_fd]).updating(&[&w_fd, &m_fd, &v_fd]);
    let mut update = Update {
        lr: 2e-5,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        step: 0,
        grad_scale: 1.0,
        seed: 1,
        rounding: adamw::Rounding::Stochastic,
    };
    bench.measure("adamw/step", format!("f{f}_d{d}"), cost, || {
        update.step += 1;
        adamw::step(&mut w_fd, &mut m_fd, &mut v_fd, &grad_fd, &update)
    })
}
