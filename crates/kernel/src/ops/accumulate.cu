// y += alpha x, eight elements a thread.

template <class P> __device__ __forceinline__ void forward_residual(View y, View x, float alpha, u64 n) {
    u64 i = 8 * ((u64)blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= n) return;
    u32 here = n - i < 8 ? (u32)(n - i) : 8;
    auto fetched_y = fetch8(data_of<P>(y), i, here);
    auto fetched_x = fetch8(data_of<P>(x), i, here);
    Eight sum = widen(fetched_y), share = widen(fetched_x);
#pragma unroll
    for (int j = 0; j < 8; j++) sum.v[j] += alpha * share.v[j];
    put8(data_of<P>(y), i, here, sum);
}

extern "C" __global__ void accumulate_forward_residual_bf16(View y, View x, float alpha, u64 n) {
    forward_residual<bf16*>(y, x, alpha, n);
}
extern "C" __global__ void accumulate_forward_residual_any(View y, View x, float alpha, u64 n) {
    forward_residual<View>(y, x, alpha, n);
}
