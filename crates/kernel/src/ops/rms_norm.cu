// RMSNorm: out = x rstd (1 + w). `group` threads share a row of d columns, eight each: a part of a warp for heads, the whole
// block for hidden states. Backward walks many rows a block and leaves one row of d_w a block in `partials`.
//
// x, out, d_x, d_branch, d_out [n_rows, d]; w [d]; rstd [n_rows]; partials [blocks, d], null where w is frozen.

template <class P>
__device__ __forceinline__ void forward(View out, float* rstd, View x, View w, u32 n_rows, u32 d, u32 group, float eps) {
    u32 lane = threadIdx.x % group, col = 8 * lane;
    u32 row = blockIdx.x * (blockDim.x / group) + threadIdx.x / group;
    u32 n_cols = n_in_eight(d, lane);
    u32 n = row < n_rows ? n_cols : 0;
    i64 i = (i64)row * d + col;
    auto fetched = fetch8(data_of<P>(x), i, n);
    Eight scale = widen(fetch8(w, col, n_cols));
    Eight y = widen(fetched);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; j++) sum += y.v[j] * y.v[j];
    sum = group_sum(sum, group);
    float r = 1.0f / sqrtf(sum / (float)d + eps);
    if (lane == 0 && row < n_rows) rstd[row] = r;
#pragma unroll
    for (int j = 0; j < 8; j++) y.v[j] = y.v[j] * r * (1.0f + scale.v[j]);
    put8(data_of<P>(out), i, n, y);
}

// One thread's share of a row, asked for a row ahead.
template <class P> struct Share {
    Fetched<P> d_out, x;
    float r;

    __device__ __forceinline__ Share(View d_out_, View x_, const float* rstd, u32 row, u32 n_rows, u32 d, u32 col, u32 n_cols) {
        u32 n = row < n_rows ? n_cols : 0;
        i64 i = (i64)row * d + col;
        d_out = fetch8(data_of<P>(d_out_), i, n);
        x = fetch8(data_of<P>(x_), i, n);
        r = row < n_rows ? rstd[row] : 0.0f;
    }
};

// Where it ADDS, d_branch is given the sum as well.
template <class P, bool ADDS>
__device__ __forceinline__ void backward(View d_x, View d_branch, float* partials, View d_out, View x, View w, const float* rstd, u32 n_rows, u32 d,
                                         u32 group) {
    u32 n_groups = blockDim.x / group, lane = threadIdx.x % group, col = 8 * lane, n_cols = n_in_eight(d, lane);
    Eight scale = widen(fetch8(w, col, n_cols));
    Eight d_w;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        scale.v[j] += 1.0f;
        d_w.v[j] = 0.0f;
    }
    // Rows of this block's groups, the first of them `first`.
    u32 first = blockIdx.x * n_groups, row = first + threadIdx.x / group, step = gridDim.x * n_groups;
    Share<P> next(d_out, x, rstd, row, n_rows, d, col, n_cols);
    for (; first < n_rows; first += step, row += step) {
        Share<P> at = next;
        next = Share<P>(d_out, x, rstd, row + step, n_rows, d, col, n_cols);
        i64 i = (i64)row * d + col;
        u32 n = row < n_rows ? n_cols : 0;
        Fetched<P> before;
        if (ADDS) before = fetch8(data_of<P>(d_x), i, n);
        Eight y = widen(at.x), e = widen(at.d_out);
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            y.v[j] *= at.r;
            d_w.v[j] += e.v[j] * y.v[j];
            e.v[j] *= scale.v[j];
            sum += e.v[j] * y.v[j];
        }
        float mean = group_sum(sum, group) / (float)d;
#pragma unroll
        for (int j = 0; j < 8; j++) e.v[j] = at.r * (e.v[j] - y.v[j] * mean);
        if (ADDS) {
            Eight d_x_before = widen(before);
#pragma unroll
            for (int j = 0; j < 8; j++) e.v[j] += d_x_before.v[j];
        }
        put8(data_of<P>(d_x), i, n, e);
        if (ADDS) put8(data_of<P>(d_branch), i, n, e);
    }
    if (partials != nullptr) add_groups(partials, d_w, d, group);
}

#define FORWARD(NAME, P)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(1024)                                                                          \
        NAME(View out, float* rstd, View x, View w, u32 n_rows, u32 d, u32 group, float eps) {                                  \
        forward<P>(out, rstd, x, w, n_rows, d, group, eps);                                                                     \
    }
FORWARD(rms_norm_forward_bf16, bf16*)
FORWARD(rms_norm_forward_any, View)

#define BACKWARD(NAME, P)                                                                                                       \
    extern "C" __global__ void __launch_bounds__(1024)                                                                          \
        NAME(View d_x, float* partials, View d_out, View x, View w, const float* rstd, u32 n_rows, u32 d, u32 group) {          \
        backward<P, false>(d_x, View{}, partials, d_out, x, w, rstd, n_rows, d, group);                                         \
    }
BACKWARD(rms_norm_backward_bf16, bf16*)
BACKWARD(rms_norm_backward_any, View)

#define BACKWARD_ACCUMULATE(NAME, P)                                                                                            \
    extern "C" __global__ void __launch_bounds__(1024) NAME(View d_x, View d_branch, float* partials, View d_out, View x,       \
                                                            View w, const float* rstd, u32 n_rows, u32 d, u32 group) {          \
        backward<P, true>(d_x, d_branch, partials, d_out, x, w, rstd, n_rows, d, group);                                        \
    }
BACKWARD_ACCUMULATE(rms_norm_backward_accumulate_bf16, bf16*)
BACKWARD_ACCUMULATE(rms_norm_backward_accumulate_any, View)
