// Loss of rows of logits, and their gradient in place; a block a row.
//
// A row is read once for its maximum and the sum of its exponentials (each thread keeps both of its share and rescales the
// sum when the maximum grows). For the gradient it is read again from the end, where the first pass left it in the cache.

static const int THREADS = 512;
static const u32 NO_ROW = 0xffffffffu;
// Vectors of 16 bytes that a thread has under way.
static const int AHEAD = 4;

// e^x for x <= 0: to f32's precision where the logits are f32; bf16's 8 bits are far coarser than ex2.approx.
__device__ __forceinline__ float exponential(float x, float) { return expf(x); }
__device__ __forceinline__ float exponential(float x, bf16) { return __expf(x); }

template <class T> struct Vector {
    static const int N = 16 / sizeof(T);
    union {
        uint4 words;
        T items[N];
    };
};

// max and Σ e^(x - max) of some logits; max is -inf and the sum 0 for none.
struct Tally {
    float max, sum;
};

// N logits more.
template <class T, int N> __device__ __forceinline__ void count(Tally& tally, const float (&x)[N]) {
    float top = tally.max;
#pragma unroll
    for (int i = 0; i < N; i++) top = fmaxf(top, x[i]);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < N; i++) sum += exponential(x[i] - top, T{});
    tally.sum = tally.sum * exponential(tally.max - top, T{}) + sum;
    tally.max = top;
}

// Rows of `logits_rc` lie `stride` elements apart (a multiple of 8), C of them logits. rows_r holds the row's number among the
// tokens, targets_r its class; a row numbered NO_ROW fills a chunk up: its gradient is zero.
template <class T, bool GRADIENT>
__device__ __forceinline__ void loss(float* nll_t, T* logits_rc, const u32* rows_r, const i32* targets_r, u32 c, u32 stride, float d_nll) {
    using V = Vector<T>;
    static const int N = V::N;
    T* logits = logits_rc + (i64)blockIdx.x * stride;
    uint4* vectors = (uint4*)logits;
    u32 row = rows_r[blockIdx.x];
    i32 n_vectors = c / N, rest = n_vectors * N;
    i32 thread = threadIdx.x;
    if (row == NO_ROW) {
        if (GRADIENT) {
            for (i32 i = thread; i < n_vectors; i += THREADS) vectors[i] = make_uint4(0, 0, 0, 0);
            for (i32 i = rest + thread; i < (i32)c; i += THREADS) logits[i] = from_f32<T>(0.0f);
        }
        return;
    }
    i32 target = targets_r[blockIdx.x];
    float at_target = to_f32(logits[target]);

    // 1. maximum and sum: a finite start keeps -inf - -inf out of the rescaling
    Tally tally = {-3.402823466e38f, 0.0f};
    i32 i = thread;
    for (; i + (AHEAD - 1) * THREADS < n_vectors; i += AHEAD * THREADS) {
        V v[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; a++) v[a].words = vectors[i + a * THREADS];
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            float x[N];
#pragma unroll
            for (int j = 0; j < N; j++) x[j] = to_f32(v[a].items[j]);
            count<T, N>(tally, x);
        }
    }
    for (; i < n_vectors; i += THREADS) {
        V v;
        v.words = vectors[i];
        float x[N];
#pragma unroll
        for (int j = 0; j < N; j++) x[j] = to_f32(v.items[j]);
        count<T, N>(tally, x);
    }
    for (i = rest + thread; i < (i32)c; i += THREADS) {
        float x[1] = {to_f32(logits[i])};
        count<T, 1>(tally, x);
    }
    float top = block_max(tally.max);
    float sum = block_sum(tally.sum * exponential(tally.max - top, T{}));

    // 2. loss
    if (thread == 0) nll_t[row] = logf(sum) + (top - at_target);
    if (!GRADIENT) return;

    // 3. gradient, from the end
    float scale = d_nll / sum;
    auto gradient = [&](float logit) { return exponential(logit - top, T{}) * scale; };
    for (i = rest + thread; i < (i32)c; i += THREADS) logits[i] = from_f32<T>(gradient(to_f32(logits[i])));
    auto step = [&](V v, i32 at) {
#pragma unroll
        for (int j = 0; j < N; j++) v.items[j] = from_f32<T>(gradient(to_f32(v.items[j])));
        vectors[at] = v.words;
    };
    i = n_vectors - 1 - thread;
    for (; i - (AHEAD - 1) * THREADS >= 0; i -= AHEAD * THREADS) {
        V v[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; a++) v[a].words = vectors[i - a * THREADS];
#pragma unroll
        for (int a = 0; a < AHEAD; a++) step(v[a], i - a * THREADS);
    }
    for (; i >= 0; i -= THREADS) {
        V v;
        v.words = vectors[i];
        step(v, i);
    }

    // 4. less one at the target, over what the loop wrote there
    __syncthreads();
    if (thread == 0) logits[target] = from_f32<T>(gradient(at_target) - d_nll);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) linear_cross_entropy_forward_f32(
    float* nll_t, float* logits_rc, const u32* rows_r, const i32* targets_r, u32 c, u32 stride, float d_nll) {
    loss<float, false>(nll_t, logits_rc, rows_r, targets_r, c, stride, d_nll);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) linear_cross_entropy_forward_bf16(
    float* nll_t, bf16* logits_rc, const u32* rows_r, const i32* targets_r, u32 c, u32 stride, float d_nll) {
    loss<bf16, false>(nll_t, logits_rc, rows_r, targets_r, c, stride, d_nll);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) linear_cross_entropy_forward_backward_f32(
    float* nll_t, float* logits_rc, const u32* rows_r, const i32* targets_r, u32 c, u32 stride, float d_nll) {
    loss<float, true>(nll_t, logits_rc, rows_r, targets_r, c, stride, d_nll);
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) linear_cross_entropy_forward_backward_bf16(
    float* nll_t, bf16* logits_rc, const u32* rows_r, const i32* targets_r, u32 c, u32 stride, float d_nll) {
    loss<bf16, true>(nll_t, logits_rc, rows_r, targets_r, c, stride, d_nll);
}
