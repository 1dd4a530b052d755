// AdamW, a thread an element or one for eight. Every operation is rounded by itself, never fused, so that the results are the
// CPU's bit for bit. Steps over many tensors go in one launch, over a table of them.

// The scalars of adamw.rs, combined on the host.
struct Scalars {
    float grad_scale, to_m, beta2, to_v, root_correction, eps, keep, step_size;
    // Whether bf16 results are rounded to the nearest, not by chance.
    u32 to_nearest;
};

__device__ __forceinline__ void step(float& w, float& m, float& v, float grad, const Scalars& s) {
    float g = __fmul_rn(grad, s.grad_scale);
    m = __fadd_rn(m, __fmul_rn(s.to_m, __fsub_rn(g, m)));
    v = __fadd_rn(__fmul_rn(v, s.beta2), __fmul_rn(s.to_v, __fmul_rn(g, g)));
    float denominator = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), s.root_correction), s.eps);
    w = __fsub_rn(__fmul_rn(w, s.keep), __fmul_rn(s.step_size, __fdiv_rn(m, denominator)));
}

// x as a bf16 in a word's upper half, rounded up with the chance that x's lower half is of the step, `noise` having 16 bits; or to the
// nearest, ties to even.
__device__ __forceinline__ u32 rounded(float x, u32 noise, u32 to_nearest) {
    u32 bits = __float_as_uint(x);
    if (to_nearest) noise = 0x7fffu + (bits >> 16 & 1u);
    bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return is_nan ? (bits | 0x400000u) : bits + noise;
}

__device__ __forceinline__ void store_rounded(View t, u64 i, float x, u32 noise, u32 to_nearest) {
    if (t.is_bf16) {
        ((u16*)t.data)[i] = (u16)(rounded(x, noise, to_nearest) >> 16);
    } else {
        ((float*)t.data)[i] = x;
    }
}
// `shift`: which 16 bits of an element's 64 are this tensor's.
__device__ __forceinline__ void store8_rounded(View t, u64 i, const Eight& x, const u64 (&random)[8], int shift, u32 to_nearest) {
    if (!t.is_bf16) {
        store8((float*)t.data, i, x);
        return;
    }
    u32 words[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        u32 low = rounded(x.v[2 * j], (u32)(random[2 * j] >> shift) & 0xffffu, to_nearest);
        u32 high = rounded(x.v[2 * j + 1], (u32)(random[2 * j + 1] >> shift) & 0xffffu, to_nearest);
        words[j] = low >> 16 | (high & 0xffff0000u);
    }
    *(uint4*)((bf16*)t.data + i) = make_uint4(words[0], words[1], words[2], words[3]);
}

// Element i, and eight from i on, a multiple of 8. `key` is that of (seed, step); without a bf16 tensor among w, m and v no random
// bits are made.
__device__ __forceinline__ void step_one(View w, View m, View v, View grad, u64 i, u64 key, const Scalars& s) {
    float w_new = load(w, i), m_new = load(m, i), v_new = load(v, i);
    step(w_new, m_new, v_new, load(grad, i), s);
    u64 random = w.is_bf16 | m.is_bf16 | v.is_bf16 ? random_bits(key, i) : 0;
    store_rounded(w, i, w_new, (u32)random & 0xffffu, s.to_nearest);
    store_rounded(m, i, m_new, (u32)(random >> 16) & 0xffffu, s.to_nearest);
    store_rounded(v, i, v_new, (u32)(random >> 32) & 0xffffu, s.to_nearest);
}
__device__ __forceinline__ void step_eight(View w, View m, View v, View grad, u64 i, u64 key, const Scalars& s) {
    Eight w8 = load8(w, i), m8 = load8(m, i), v8 = load8(v, i), grad8 = load8(grad, i);
#pragma unroll
    for (int j = 0; j < 8; j++) step(w8.v[j], m8.v[j], v8.v[j], grad8.v[j], s);
    u64 random[8] = {};
    if (w.is_bf16 | m.is_bf16 | v.is_bf16) {
#pragma unroll
        for (int j = 0; j < 8; j++) random[j] = random_bits(key, i + j);
    }
    store8_rounded(w, i, w8, random, 0, s.to_nearest);
    store8_rounded(m, i, m8, random, 16, s.to_nearest);
    store8_rounded(v, i, v8, random, 32, s.to_nearest);
}

extern "C" __global__ void __launch_bounds__(256) adamw_step(View w, View m, View v, View grad, u64 n, u64 key, float grad_scale, float to_m,
                                                             float beta2, float to_v, float root_correction, float eps, float keep, float step_size,
                                                             u32 to_nearest) {
    Scalars s = {grad_scale, to_m, beta2, to_v, root_correction, eps, keep, step_size, to_nearest};
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) step_one(w, m, v, grad, i, key, s);
}

// n is a multiple of 8.
extern "C" __global__ void __launch_bounds__(256) adamw_step_8(View w, View m, View v, View grad, u64 n, u64 key, float grad_scale, float to_m,
                                                               float beta2, float to_v, float root_correction, float eps, float keep, float step_size,
                                                               u32 to_nearest) {
    Scalars s = {grad_scale, to_m, beta2, to_v, root_correction, eps, keep, step_size, to_nearest};
    u64 i = 8 * ((u64)blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) step_eight(w, m, v, grad, i, key, s);
}

// A tensor of the table, 56 bytes; bit k of `narrow` says whether w, m, v, grad is bf16.
struct Part {
    void *w, *m, *v, *grad;
    u64 n, key;
    float keep;
    u32 narrow;
};

// A block 4 * 256 * 8 elements.
extern "C" __global__ void __launch_bounds__(256, 3) adamw_step_all(const u32* firsts, const Part* parts, u32 n_parts, float grad_scale, float to_m,
                                                                    float beta2, float to_v, float root_correction, float eps, float step_size,
                                                                    u32 to_nearest) {
    u32 which = tensor_of_block(firsts, n_parts);
    const Part& part = parts[which];
    Scalars s = {grad_scale, to_m, beta2, to_v, root_correction, eps, part.keep, step_size, to_nearest};
    u32 narrow = part.narrow;
    View w = {part.w, narrow & 1, 0}, m = {part.m, narrow >> 1 & 1, 0}, v = {part.v, narrow >> 2 & 1, 0}, grad = {part.grad, narrow >> 3 & 1, 0};
    u64 n = part.n, key = part.key, first = 8192 * (u64)(blockIdx.x - firsts[which]) + 8 * threadIdx.x;
#pragma unroll 1
    for (int turn = 0; turn < 4; turn++) {
        u64 i = first + 2048 * turn;
        if (i + 8 <= n) {
            step_eight(w, m, v, grad, i, key, s);
        } else {
            for (; i < n; i++) step_one(w, m, v, grad, i, key, s);
        }
    }
}
