// The delta net of one token of each of several sequences, from its projections to the input of the last one: convolution, SiLU, l2
// norms, gates, delta rule, gated norm. A block has one value head of one sequence, whose state is in its registers: read once, before
// the projections are waited for, and written once.
//
// qkv [B, C], C = 2 G K + H V; z [B, H, V]; a, b [B, H]; w [C, 4]; a_log, dt_bias [H]; norm [V]; out [B, H, V]. Pointers, one a sequence:
// conv_in and conv_out [3, C] f32, the last inputs of the convolution before and after; states [H, K, V] f32.
// A row of the state is V / 4 threads wide, a power of two of at most 32; K is at most 8 rows of the block's threads.

constexpr u32 THREADS = 512, ROWS = 8, MOST = 128;

__device__ __forceinline__ float4 scaled_sum(float4 sum, float x, float4 y) {
    return make_float4(sum.x + x * y.x, sum.y + x * y.y, sum.z + x * y.z, sum.w + x * y.w);
}

extern "C" __global__ void __launch_bounds__(512, 2)
    decode_delta_net(bf16* out, float* const* states, const float* const* conv_in, float* const* conv_out, const bf16* qkv, const bf16* z,
                     const bf16* a, const bf16* b, const bf16* w, const float* a_log, const bf16* dt_bias, const float* norm, u32 H, u32 G, u32 K,
                     u32 V, float q_scale, float l2_eps, float eps) {
    __shared__ float keys[MOST], queries[MOST], values[MOST], deltas[MOST], squares[THREADS / 32];
    __shared__ float4 sums[2][THREADS];
    u32 h = blockIdx.x, sequence = blockIdx.y, repeat = H / G, g = h / repeat, C = 2 * G * K + H * V;
    u32 thread = threadIdx.x, lane = thread % 32, warp = thread / 32, width = V / 4, column = thread % width, group = thread / width;
    u32 n_groups = THREADS / width;
    release_successor();

    // 1. the state, which no kernel of this step has touched
    float4* state = (float4*)(states[sequence] + (u64)h * K * V) + column;
    float4 s[ROWS];
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
        u32 row = group + r * n_groups;
        s[r] = row < K ? state[(u64)row * width] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    await_predecessor();

    // 2. convolve: queries and keys of the key head, values of the head. The first head of a key head keeps its inputs.
    for (u32 i = thread; i < 2 * K + V; i += THREADS) {
        u32 kind = i < K ? 0 : i < 2 * K ? 1 : 2, at = i - kind * K;
        u32 channel = kind == 0 ? g * K + at : kind == 1 ? (G + g) * K + at : 2 * G * K + h * V + at;
        const float* before = conv_in[sequence];
        float x0 = before[channel], x1 = before[C + channel], x2 = before[2 * C + channel], x3 = to_f32(qkv[(u64)sequence * C + channel]);
        const bf16* taps = w + 4 * channel;
        float y = silu(to_f32(taps[0]) * x0 + to_f32(taps[1]) * x1 + to_f32(taps[2]) * x2 + to_f32(taps[3]) * x3);
        if (kind == 2 || h % repeat == 0) {
            float* after = conv_out[sequence];
            after[channel] = x1;
            after[C + channel] = x2;
            after[2 * C + channel] = x3;
        }
        if (kind == 0) queries[at] = y;
        if (kind == 1) keys[at] = y;
        if (kind == 2) values[at] = y;
    }
    __syncthreads();

    // 3. norms and gates, by every warp for itself
    float qq = 0.0f, kk = 0.0f, qk = 0.0f;
    for (u32 i = lane; i < K; i += 32) {
        float q = queries[i], k = keys[i];
        qq += q * q;
        kk += k * k;
        qk += q * k;
    }
    float by_query = q_scale / sqrtf(warp_sum(qq) + l2_eps), by_key = 1.0f / sqrtf(warp_sum(kk) + l2_eps);
    qk = warp_sum(qk) * by_query * by_key;
    u64 gate = (u64)sequence * H + h;
    float decay = expf(-expf(a_log[h]) * softplus(to_f32(a[gate]) + to_f32(dt_bias[h]))), beta = sigmoid(to_f32(b[gate]));

    // 4. what the state holds for query and key
    float4 q_sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f), k_sum = q_sum;
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
        u32 row = group + r * n_groups;
        if (row >= K) break;
        q_sum = scaled_sum(q_sum, queries[row] * by_query, s[r]);
        k_sum = scaled_sum(k_sum, keys[row] * by_key, s[r]);
    }
    sums[0][thread] = q_sum;
    sums[1][thread] = k_sum;
    __syncthreads();

    // 5. one thread a column: what is written, and the output before its norm
    float y = 0.0f;
    if (thread < V) {
        const float* of_query = (const float*)sums[0] + thread;
        const float* of_key = (const float*)sums[1] + thread;
        float q = 0.0f, k = 0.0f;
        for (u32 i = 0; i < n_groups; i++) {
            q += of_query[i * V];
            k += of_key[i * V];
        }
        float delta = beta * (values[thread] - decay * k);
        deltas[thread] = delta;
        y = decay * q + delta * qk;
    }
    float square = warp_sum(y * y);
    if (lane == 0) squares[warp] = square;
    __syncthreads();

    // 6. the new state, and the gated norm
    float4 delta = *(const float4*)(deltas + 4 * column);
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
        u32 row = group + r * n_groups;
        if (row >= K) break;
        float k = keys[row] * by_key;
        float4 x = make_float4(decay * s[r].x, decay * s[r].y, decay * s[r].z, decay * s[r].w);
        state[(u64)row * width] = scaled_sum(x, k, delta);
    }
    if (thread >= V) return;
    float sum = 0.0f;
    for (u32 i = 0; i * 32 < V; i++) sum += squares[i];
    u64 i = gate * V + thread;
    out[i] = from_f32<bf16>(y / sqrtf(sum / (float)V + eps) * norm[thread] * silu(to_f32(z[i])));
}
