// One token of the gated delta rule for each of several sequences. A block holds 32 value columns of one head's state in registers,
// so that the state is read once and written once; a warp's rows are 128 bytes.

constexpr u32 WARPS = 8;

// ROWS >= K / WARPS. Each of `states` points to the f32 state [H, K, V] of a sequence.
template <u32 ROWS>
__device__ void step(View out_bhv, float* const* states, View q_bgk, View k_bgk, View v_bhv, const float* g_bh, const float* beta_bh, u32 H,
                     u32 G, u32 K, u32 V) {
    __shared__ float queries[WARPS * ROWS], keys[WARPS * ROWS], by_query[WARPS][32], by_key[WARPS][32];
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 n_slices = (V + 31) / 32, v = blockIdx.x % n_slices * 32 + lane;
    u32 row = blockIdx.x / n_slices, sequence = row / H, h = row % H;
    u64 key_row = ((u64)sequence * G + h / (H / G)) * K;
    float* state = states[sequence] + (u64)h * K * V + v;
    bool is_in = v < V;

    float s[ROWS];
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
        u32 x = warp + r * WARPS;
        s[r] = is_in && x < K ? state[(u64)x * V] : 0.0f;
    }
    float decay = expf(g_bh[row]), beta = beta_bh[row], value = is_in ? load(v_bhv, (i64)row * V + v) : 0.0f;
    for (u32 x = threadIdx.x; x < WARPS * ROWS; x += blockDim.x) {
        queries[x] = x < K ? load(q_bgk, key_row + x) : 0.0f;
        keys[x] = x < K ? load(k_bgk, key_row + x) : 0.0f;
    }
    __syncthreads();
    float q_sum = 0.0f, k_sum = 0.0f, qk = 0.0f;
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
        u32 x = warp + r * WARPS;
        q_sum += queries[x] * s[r];
        k_sum += keys[x] * s[r];
    }
    by_query[warp][lane] = q_sum;
    by_key[warp][lane] = k_sum;
    for (u32 x = lane; x < K; x += 32) qk += queries[x] * keys[x];
    qk = warp_sum(qk);
    __syncthreads();
    q_sum = k_sum = 0.0f;
#pragma unroll
    for (u32 w = 0; w < WARPS; w++) {
        q_sum += by_query[w][lane];
        k_sum += by_key[w][lane];
    }
    float delta = beta * (value - decay * k_sum);
    if (!is_in) return;
    if (warp == 0) store(out_bhv, (i64)row * V + v, decay * q_sum + delta * qk);
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
        u32 x = warp + r * WARPS;
        if (x < K) state[(u64)x * V] = decay * s[r] + keys[x] * delta;
    }
}

#define STEP(keys, rows)                                                                                                               \
    extern "C" __global__ void __launch_bounds__(256)                                                                                  \
        gated_delta_step_##keys(View out_bhv, float* const* states, View q_bgk, View k_bgk, View v_bhv, const float* g_bh,             \
                                const float* beta_bh, u32 H, u32 G, u32 K, u32 V) {                                                    \
        step<rows>(out_bhv, states, q_bgk, k_bgk, v_bhv, g_bh, beta_bh, H, G, K, V);                                                   \
    }
// By the most key dims that each takes.
STEP(32, 4)
STEP(64, 8)
STEP(128, 16)
STEP(256, 32)
