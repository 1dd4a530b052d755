// Scaled L2 norm: out = scale x rstd. `group` threads share a row of k columns, eight each: a part of a warp, or the whole block
// where rows are wide.
//
// x, out [n_rows, k]; rstd [n_rows].

template <class P>
__device__ __forceinline__ void forward(View out, float* rstd, View x, u32 n_rows, u32 k, u32 group, float scale, float eps) {
    u32 lane = threadIdx.x % group;
    u32 row = blockIdx.x * (blockDim.x / group) + threadIdx.x / group;
    u32 n = row < n_rows ? n_in_eight(k, lane) : 0;
    i64 i = (i64)row * k + 8 * lane;
    Eight y = widen(fetch8(data_of<P>(x), i, n));
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; j++) sum += y.v[j] * y.v[j];
    sum = group_sum(sum, group);
    float r = 1.0f / sqrtf(sum + eps);
    if (lane == 0 && row < n_rows) rstd[row] = r;
    float factor = scale * r;
#pragma unroll
    for (int j = 0; j < 8; j++) y.v[j] *= factor;
    put8(data_of<P>(out), i, n, y);
}

#define KERNELS(P, INSTANCE)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(1024) l2_norm_forward_##INSTANCE(                                              \
        View out, float* rstd, View x, u32 n_rows, u32 k, u32 group, float scale, float eps) {                                  \
        forward<P>(out, rstd, x, n_rows, k, group, scale, eps);                                                                 \
    }
KERNELS(bf16*, bf16)
KERNELS(View, any)
