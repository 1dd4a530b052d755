// Gated RMSNorm of heads: out = x rstd w silu(z). `group` threads share a row of v columns, eight each: a part of a warp, or the
// whole block where heads are wide. Backward walks many rows a block and leaves one row of d_w a block in `partials`.
//
// x, z, out, d_x, d_z, d_out [n_rows, v]; w [v]; rstd [n_rows]; partials [blocks, v], null where w is frozen.

template <class P>
__device__ __forceinline__ void forward(View out, float* rstd, View x, View z, View w, u32 n_rows, u32 v, u32 group, float eps) {
    u32 lane = threadIdx.x % group, col = 8 * lane, n_cols = n_in_eight(v, lane);
    u32 row = blockIdx.x * (blockDim.x / group) + threadIdx.x / group;
    u32 n = row < n_rows ? n_cols : 0;
    i64 i = (i64)row * v + col;
    auto fetched_x = fetch8(data_of<P>(x), i, n);
    auto fetched_z = fetch8(data_of<P>(z), i, n);
    Eight scale = widen(fetch8(w, col, n_cols));
    Eight y = widen(fetched_x), gate = widen(fetched_z);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; j++) sum += y.v[j] * y.v[j];
    sum = group_sum(sum, group);
    float r = 1.0f / sqrtf(sum / (float)v + eps);
    if (lane == 0 && row < n_rows) rstd[row] = r;
#pragma unroll
    for (int j = 0; j < 8; j++) y.v[j] = y.v[j] * r * scale.v[j] * silu(gate.v[j]);
    put8(data_of<P>(out), i, n, y);
}

// One thread's share of a row, asked for a row ahead.
template <class P> struct Share {
    Fetched<P> d_out, x, z;
    float r;

    __device__ __forceinline__ Share(View d_out_, View x_, View z_, const float* rstd, u32 row, u32 n_rows, u32 v, u32 col, u32 n_cols) {
        u32 n = row < n_rows ? n_cols : 0;
        i64 i = (i64)row * v + col;
        d_out = fetch8(data_of<P>(d_out_), i, n);
        x = fetch8(data_of<P>(x_), i, n);
        z = fetch8(data_of<P>(z_), i, n);
        r = row < n_rows ? rstd[row] : 0.0f;
    }
};

template <class P>
__device__ __forceinline__ void backward(View d_x, View d_z, float* partials, View d_out, View x, View z, View w, const float* rstd,
                                         u32 n_rows, u32 v, u32 group) {
    u32 n_groups = blockDim.x / group, lane = threadIdx.x % group, col = 8 * lane, n_cols = n_in_eight(v, lane);
    Eight scale = widen(fetch8(w, col, n_cols));
    Eight d_w;
#pragma unroll
    for (int j = 0; j < 8; j++) d_w.v[j] = 0.0f;
    // Rows of this block's groups, the first of them `first`.
    u32 first = blockIdx.x * n_groups, row = first + threadIdx.x / group, step = gridDim.x * n_groups;
    Share<P> next(d_out, x, z, rstd, row, n_rows, v, col, n_cols);
    for (; first < n_rows; first += step, row += step) {
        Share<P> at = next;
        next = Share<P>(d_out, x, z, rstd, row + step, n_rows, v, col, n_cols);
        i64 i = (i64)row * v + col;
        u32 n = row < n_rows ? n_cols : 0;
        // e = d_out w silu(z); the gate's gradient goes first, so that its row leaves the registers.
        Eight y = widen(at.x), e = widen(at.d_out), gate = widen(at.z);
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            y.v[j] *= at.r;
            float s = sigmoid(gate.v[j]), gated = gate.v[j] * s, d_y = e.v[j] * y.v[j];
            d_w.v[j] += d_y * gated;
            gate.v[j] = d_y * scale.v[j] * (s * (1.0f + gate.v[j] * (1.0f - s)));
            e.v[j] *= scale.v[j] * gated;
            sum += e.v[j] * y.v[j];
        }
        put8(data_of<P>(d_z), i, n, gate);
        float mean = group_sum(sum, group) / (float)v;
#pragma unroll
        for (int j = 0; j < 8; j++) e.v[j] = at.r * (e.v[j] - y.v[j] * mean);
        put8(data_of<P>(d_x), i, n, e);
    }
    if (partials != nullptr) add_groups(partials, d_w, v, group);
}

#define KERNELS(P, INSTANCE)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(1024) gated_rms_norm_forward_##INSTANCE(                                       \
        View out, float* rstd, View x, View z, View w, u32 n_rows, u32 v, u32 group, float eps) {                               \
        forward<P>(out, rstd, x, z, w, n_rows, v, group, eps);                                                                  \
    }                                                                                                                           \
    extern "C" __global__ void __launch_bounds__(1024) gated_rms_norm_backward_##INSTANCE(                                      \
        View d_x, View d_z, float* partials, View d_out, View x, View z, View w, const float* rstd, u32 n_rows, u32 v,          \
        u32 group) {                                                                                                            \
        backward<P>(d_x, d_z, partials, d_out, x, z, w, rstd, n_rows, v, group);                                                \
    }
KERNELS(bf16*, bf16)
KERNELS(View, any)
