// dst[dst_from + i] = src[src_from + i], one thread an element, or one for eight.

extern "C" __global__ void copy_forward(View dst, View src, u64 dst_from, u64 src_from, u64 n) {
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) store(dst, dst_from + i, load(src, src_from + i));
}

// All three numbers are multiples of 8.
extern "C" __global__ void copy_forward_8(View dst, View src, u64 dst_from, u64 src_from, u64 n) {
    u64 i = 8 * ((u64)blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) store8(dst, dst_from + i, load8(src, src_from + i));
}
