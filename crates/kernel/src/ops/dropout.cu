// Inverted dropout, a thread an element or one for eight; which elements, the prelude's `keeps` says. `key` is that of
// (seed, stream). Product and sum are rounded one by one, as on the CPU.

__device__ __forceinline__ float drop(float x, u64 bits_of_four, int j, u32 threshold, float scale) {
    return keeps(bits_of_four, j, threshold) ? __fmul_rn(x, scale) : 0.0f;
}

// y = or += dropout(x)
template <bool ADDS> __device__ __forceinline__ void one(View y, View x, u64 n, u64 key, u32 threshold, float scale) {
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float value = drop(load(x, i), random_bits(key, i / 4), (int)(i % 4), threshold, scale);
    store(y, i, ADDS ? __fadd_rn(load(y, i), value) : value);
}
// n is a multiple of 8.
template <bool ADDS> __device__ __forceinline__ void eight(View y, View x, u64 n, u64 key, u32 threshold, float scale) {
    u64 i = 8 * ((u64)blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= n) return;
    Eight values = load8(x, i);
    u64 bits[2] = {random_bits(key, i / 4), random_bits(key, i / 4 + 1)};
#pragma unroll
    for (int j = 0; j < 8; j++) values.v[j] = drop(values.v[j], bits[j / 4], j % 4, threshold, scale);
    if (ADDS) {
        Eight before = load8(y, i);
#pragma unroll
        for (int j = 0; j < 8; j++) values.v[j] = __fadd_rn(before.v[j], values.v[j]);
    }
    store8(y, i, values);
}

extern "C" __global__ void __launch_bounds__(256) dropout_forward(View y, View x, u64 n, u64 key, u32 threshold, float scale) {
    one<false>(y, x, n, key, threshold, scale);
}
extern "C" __global__ void __launch_bounds__(256) dropout_forward_8(View y, View x, u64 n, u64 key, u32 threshold, float scale) {
    eight<false>(y, x, n, key, threshold, scale);
}
extern "C" __global__ void __launch_bounds__(256) dropout_forward_residual(View y, View x, u64 n, u64 key, u32 threshold, float scale) {
    one<true>(y, x, n, key, threshold, scale);
}
extern "C" __global__ void __launch_bounds__(256) dropout_forward_residual_8(View y, View x, u64 n, u64 key, u32 threshold, float scale) {
    eight<true>(y, x, n, key, threshold, scale);
}
