// What every kernel file begins with: types, loads and stores by run-time dtype, reductions, matrix instructions.
// No header of the toolkit is needed, so NVRTC alone compiles it.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

// ---- storage types

struct bf16 {
    u16 bits;
};

__device__ __forceinline__ float to_f32(float x) { return x; }
__device__ __forceinline__ float to_f32(bf16 x) { return __uint_as_float((u32)x.bits << 16); }

template <class T> __device__ __forceinline__ T from_f32(float x);
template <> __device__ __forceinline__ float from_f32<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_f32<bf16>(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

// Two bf16 in a word, `low` at the lower address.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
__device__ __forceinline__ float low_bf16(u32 word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float high_bf16(u32 word) { return __uint_as_float(word & 0xffff0000u); }

// A tensor whose dtype is known at run time; the branch is the same for a whole launch.
struct View {
    void* data;
    u32 is_bf16;
    u32 unused;
};

__device__ __forceinline__ float load(View t, i64 i) {
    return t.is_bf16 ? to_f32(((const bf16*)t.data)[i]) : ((const float*)t.data)[i];
}
__device__ __forceinline__ void store(View t, i64 i, float x) {
    if (t.is_bf16) {
        ((bf16*)t.data)[i] = from_f32<bf16>(x);
    } else {
        ((float*)t.data)[i] = x;
    }
}

// Eight neighbours; `i` must be a multiple of 8 (allocations begin at multiples of 256 bytes).
struct Eight {
    float v[8];
};
__device__ __forceinline__ Eight load8(const bf16* data, i64 i) {
    uint4 words = *(const uint4*)(data + i);
    Eight x;
    x.v[0] = low_bf16(words.x);
    x.v[1] = high_bf16(words.x);
    x.v[2] = low_bf16(words.y);
    x.v[3] = high_bf16(words.y);
    x.v[4] = low_bf16(words.z);
    x.v[5] = high_bf16(words.z);
    x.v[6] = low_bf16(words.w);
    x.v[7] = high_bf16(words.w);
    return x;
}
__device__ __forceinline__ Eight load8(const float* data, i64 i) {
    float4 a = *(const float4*)(data + i);
    float4 b = *(const float4*)(data + i + 4);
    Eight x;
    x.v[0] = a.x;
    x.v[1] = a.y;
    x.v[2] = a.z;
    x.v[3] = a.w;
    x.v[4] = b.x;
    x.v[5] = b.y;
    x.v[6] = b.z;
    x.v[7] = b.w;
    return x;
}
__device__ __forceinline__ void store8(bf16* data, i64 i, const Eight& x) {
    uint4 words;
    words.x = pack_bf16(x.v[0], x.v[1]);
    words.y = pack_bf16(x.v[2], x.v[3]);
    words.z = pack_bf16(x.v[4], x.v[5]);
    words.w = pack_bf16(x.v[6], x.v[7]);
    *(uint4*)(data + i) = words;
}
__device__ __forceinline__ void store8(float* data, i64 i, const Eight& x) {
    *(float4*)(data + i) = make_float4(x.v[0], x.v[1], x.v[2], x.v[3]);
    *(float4*)(data + i + 4) = make_float4(x.v[4], x.v[5], x.v[6], x.v[7]);
}
__device__ __forceinline__ Eight load8(View t, i64 i) {
    return t.is_bf16 ? load8((const bf16*)t.data, i) : load8((const float*)t.data, i);
}
__device__ __forceinline__ void store8(View t, i64 i, const Eight& x) {
    if (t.is_bf16) {
        store8((bf16*)t.data, i, x);
    } else {
        store8((float*)t.data, i, x);
    }
}

// ---- arithmetic

// 2^x and 1/x by the special function units, correct but for the last bit or two; results below 2^-126 are zero.
__device__ __forceinline__ float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float fast_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float sigmoid(float x) { return fast_reciprocal(1.0f + fast_exp2(x * -1.44269504f)); }
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }
// ln(1 + exp(x)), without overflow and without losing small values.
__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

// ---- random numbers

static const u64 GOLDEN = 0x9E3779B97F4A7C15ull;
__device__ __forceinline__ u64 random_mix(u64 z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}
// Sixty-four bits of element `index` of the stream with this key: `random::bits_of` of the host.
__device__ __forceinline__ u64 random_bits(u64 key, u64 index) { return random_mix(key + GOLDEN * (index + 1)); }
// Dropout: four neighbours share 64 bits, and an element is dropped where its 15 of them are below `threshold`.
__device__ __forceinline__ bool keeps(u64 bits_of_four, int j, u32 threshold) {
    return ((u32)(bits_of_four >> (16 * j)) & 0x7fffu) >= threshold;
}

// ---- reductions, in an order that does not depend on timing

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}
// Sum over a block of at most 1024 threads, a multiple of 32; every thread gets it. Every thread of the block must call it.
__device__ __forceinline__ float block_sum(float x) {
    __shared__ float warps[32];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n_warps = blockDim.x >> 5;
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) warps[warp] = x;
    __syncthreads();
    x = lane < n_warps ? warps[lane] : 0.0f;
    return warp_sum(x);
}
__device__ __forceinline__ float block_max(float x) {
    __shared__ float warps[32];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n_warps = blockDim.x >> 5;
    x = warp_max(x);
    __syncthreads();
    if (lane == 0) warps[warp] = x;
    __syncthreads();
    x = lane < n_warps ? warps[lane] : -__int_as_float(0x7f800000);
    return warp_max(x);
}

// ---- rows, eight columns a thread
//
// A kernel over rows has two instances: P = bf16*, where every tensor is bf16 and every row a multiple of eight, so that each
// access is 16 bytes, and P = View for any types and widths.

template <class P> __device__ __forceinline__ P data_of(View t);
template <> __device__ __forceinline__ bf16* data_of<bf16*>(View t) { return (bf16*)t.data; }
template <> __device__ __forceinline__ View data_of<View>(View t) { return t; }

// Eight elements asked for, but not yet looked at: many can be under way at once. Of a View they are read when looked at.
template <class P> struct Fetched;
template <> struct Fetched<bf16*> {
    uint4 words;
};
template <> struct Fetched<View> {
    View t;
    i64 i;
    u32 n;
};

// `n` elements from `i` on (8 or 0 of bf16*), zeros behind them.
__device__ __forceinline__ Fetched<bf16*> fetch8(const bf16* t, i64 i, u32 n) {
    Fetched<bf16*> x;
    x.words = n > 0 ? *(const uint4*)(t + i) : make_uint4(0, 0, 0, 0);
    return x;
}
__device__ __forceinline__ Fetched<View> fetch8(View t, i64 i, u32 n) {
    Fetched<View> x;
    x.t = t;
    x.i = i;
    x.n = n;
    return x;
}
__device__ __forceinline__ Eight widen(const Fetched<bf16*>& x) { return load8((const bf16*)&x.words, 0); }
__device__ __forceinline__ Eight widen(const Fetched<View>& x) {
    if (x.n == 8 && x.i % 8 == 0) return load8(x.t, x.i);
    Eight y;
#pragma unroll
    for (u32 j = 0; j < 8; j++) y.v[j] = j < x.n ? load(x.t, x.i + j) : 0.0f;
    return y;
}
__device__ __forceinline__ void put8(bf16* t, i64 i, u32 n, const Eight& x) {
    if (n > 0) store8(t, i, x);
}
__device__ __forceinline__ void put8(View t, i64 i, u32 n, const Eight& x) {
    if (n == 8 && i % 8 == 0) {
        store8(t, i, x);
        return;
    }
#pragma unroll
    for (u32 j = 0; j < 8; j++) {
        if (j < n) store(t, i + j, x.v[j]);
    }
}

// Of `n` things in eights, how many fall to number `eight`.
__device__ __forceinline__ u32 n_in_eight(u32 n, u32 eight) { return n > 8 * eight ? min(n - 8 * eight, 8u) : 0; }

// Sum over `group` neighbouring lanes, a power of two up to 32. Every lane of the warp must call it.
__device__ __forceinline__ float lanes_sum(float x, u32 group) {
    for (u32 offset = group >> 1; offset > 0; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}
// Sum over `group` neighbouring threads: lanes as above, or the whole block. Every thread of the block must call it.
__device__ __forceinline__ float group_sum(float x, u32 group) { return group > 32 ? block_sum(x) : lanes_sum(x, group); }

// Each block's row of `partials` (rows of `width` columns, begun at multiples of eight): what the block's groups hold of the
// columns, eight a thread, added up in their order. Every thread of the block must call it; groups are parts of a warp of 256
// threads, or one group is the block.
__device__ __forceinline__ void add_groups(float* partials, const Eight& x, u32 width, u32 group) {
    __shared__ float columns[8][256];
    float* row = partials + (u64)blockIdx.x * ((width + 7) / 8 * 8);
    if (group > 32) {
        put8(View{row, 0, 0}, 8 * threadIdx.x, n_in_eight(width, threadIdx.x), x);
        return;
    }
#pragma unroll
    for (int j = 0; j < 8; j++) columns[j][threadIdx.x] = x.v[j];
    __syncthreads();
    if (threadIdx.x < width) {
        float sum = 0.0f;
        for (u32 at = threadIdx.x / 8; at < blockDim.x; at += group) sum += columns[threadIdx.x % 8][at];
        row[threadIdx.x] = sum;
    }
}

// ---- one launch over many tensors

// Whose block this is, where tensor i of `n` has the blocks from firsts[i] on, in rising order: the last that begins at or before
// it, so one of no blocks has none. Every lane of the warp must call it.
__device__ __forceinline__ u32 tensor_of_block(const u32* firsts, u32 n) {
    u32 begun = 0;
    for (u32 i = threadIdx.x % 32; i < n; i += 32) begun += firsts[i] <= blockIdx.x;
    return (u32)warp_sum((float)begun) - 1;
}

// ---- launches that overlap (sm_90 and later; elsewhere, and of kernels launched without overlap, these do nothing)

// Waits until the kernels before this one are done and what they wrote can be read.
__device__ __forceinline__ void await_predecessor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next kernel start, which waits in turn before it reads.
__device__ __forceinline__ void release_successor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- asynchronous copies to shared memory (sm_80 and later)

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return (u32)__cvta_generic_to_shared(pointer);
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N groups are still under way.
template <int N> __device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- 16x8x16 matrix products of bf16 with f32 sums (sm_80 and later)
//
// d[16x8] += a[16x16] b[16x8]. With group = lane / 4 and pair = lane % 4, a lane holds
//   a: rows group (words 0, 2) and group + 8 (words 1, 3), columns 2 pair + {0,1} (words 0, 1) and 2 pair + 8 + {0,1} (words 2, 3)
//   b: column group, rows 2 pair + {0,1} (word 0) and 2 pair + 8 + {0,1} (word 1)
//   d: rows group (0, 1) and group + 8 (2, 3), columns 2 pair + {0,1}

__device__ __forceinline__ void mma_16816(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// An 8x8 matrix, of which a lane holds row `group`, columns 2 pair + {0,1}, transposed within the warp.
__device__ __forceinline__ u32 transpose8(u32 word) {
    u32 transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(word));
    return transposed;
}
