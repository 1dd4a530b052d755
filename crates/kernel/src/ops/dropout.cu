// Inverted dropout, a thread an element or one for eight. An element is dropped where its 52 upper random bits are below
// `threshold`; `key` is that of (seed, stream). Product and sum are rounded one by one, as on the CPU.

__device__ __forceinline__ float drop(float x, u64 i, u64 key, u64 threshold, float scale) {
    return random_bits(key, i) >> 12 < threshold ? 0.0f : __fmul_rn(x, scale);
}

// y = or += dropout(x)
template <bool ADDS> __device__ __forceinline__ void one(View y, View x, u64 n, u64 key, u64 threshold, float scale) {
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float value = drop(load(x, i), i, key, threshold, scale);
    store(y, i, ADDS ? __fadd_rn(load(y, i), value) : value);
}
// n is a multiple of 8.
template <bool ADDS> __device__ __forceinline__ void eight(View y, View x, u64 n, u64 key, u64 threshold, float scale) {
    u64 i = 8 * ((u64)blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= n) return;
    Eight values = load8(x, i);
#pragma unroll
    for (int j = 0; j < 8; j++) values.v[j] = drop(values.v[j], i + j, key, threshold, scale);
    if (ADDS) {
        Eight before = load8(y, i);
#pragma unroll
        for (int j = 0; j < 8; j++) values.v[j] = __fadd_rn(before.v[j], values.v[j]);
    }
    store8(y, i, values);
}

extern "C" __global__ void __launch_bounds__(256) dropout_forward(View y, View x, u64 n, u64 key, u64 threshold, float scale) {
    one<false>(y, x, n, key, threshold, scale);
}
extern "C" __global__ void __launch_bounds__(256) dropout_forward_8(View y, View x, u64 n, u64 key, u64 threshold, float scale) {
    eight<false>(y, x, n, key, threshold, scale);
}
extern "C" __global__ void __launch_bounds__(256) dropout_forward_residual(View y, View x, u64 n, u64 key, u64 threshold, float scale) {
    one<true>(y, x, n, key, threshold, scale);
}
extern "C" __global__ void __launch_bounds__(256) dropout_forward_residual_8(View y, View x, u64 n, u64 key, u64 threshold, float scale) {
    eight<true>(y, x, n, key, threshold, scale);
}
