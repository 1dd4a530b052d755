// Attention of one token of each of several sequences, from its projections to the input of the last one: norms of queries and keys,
// rotation, the new key and value into the cache, softmax over all positions so far, output gate.
//
// A block of decode_attention_part_* has one key:value head of one sequence, all R query heads that share it, and a stretch of its
// positions; how a sequence is cut into stretches depends on its length alone. decode_attention_join adds the stretches up in order.
// Keys and values of 64 positions are in registers at a time, and asked for before the projections are waited for: the new position,
// which alone depends on them, is put in afterwards. Both products go through the matrix instruction, queries and weights rounded to
// bf16: 16 positions by heads over dims for the scores, 16 dims by heads over positions for the values. A lane's 16 bytes serve as
// parts of several instructions, as the order of dims within them is free.
//
// qg [B, H, 2 N]: N of query, N of gate; k, v [B, G, N]; q_norm, k_norm [N], by 1 + w; positions [B];
// turns [B, half]: cosine and sine of position times inv_freq [half]; out [B, H, N].
// Pointers, one a sequence: k_cache, v_cache [S, G, N] bf16. parts [B, H, n_parts, N + 2] f32: weighted values, maximum, sum.
// N is at most 256 and a multiple of 32, R at most 8.

constexpr u32 STRETCH = 64, MOST = 256, THREADS = 256, HEADS = 8, MOST_PARTS = 32, LEAST_STRETCHES = 2;
// Rows of shared memory that 16-byte reads of the lanes of a matrix instruction spread over all banks.
constexpr u32 QUERY_STRIDE = MOST + 32, WEIGHT_STRIDE = STRETCH + 8;

// Stretches of 64 in a part, of a sequence of `length`.
__device__ __forceinline__ u32 stretches_of_part(u32 length) {
    u32 n_stretches = (length + STRETCH - 1) / STRETCH;
    return max(LEAST_STRETCHES, (n_stretches + MOST_PARTS - 1) / MOST_PARTS);
}

// One head by one warp: to[i] = x[i] rstd (1 + w[i]), turned by the position.
__device__ __forceinline__ void prepare_head(float* to, const bf16* x, const bf16* w, const float2* turns, u32 N, u32 half,
                                             float eps) {
    u32 lane = threadIdx.x % 32;
    float square = 0.0f;
    for (u32 i = lane; i < N; i += 32) {
        float value = to_f32(x[i]);
        square += value * value;
    }
    float rstd = 1.0f / sqrtf(warp_sum(square) / (float)N + eps);
    for (u32 i = lane; i < N; i += 32) to[i] = to_f32(x[i]) * rstd * (1.0f + to_f32(w[i]));
    __syncwarp();
    for (u32 i = lane; i < half; i += 32) {
        float2 turn = turns[i];
        float low = to[i], high = to[i + half];
        to[i] = low * turn.x - high * turn.y;
        to[i + half] = high * turn.x + low * turn.y;
    }
    __syncwarp();
}

// A query head into shared memory as bf16, by one warp; `row` is room for N numbers.
__device__ __forceinline__ void store_head(bf16* to, const float* row, u32 N) {
    for (u32 i = threadIdx.x % 32; i < N; i += 32) to[i] = from_f32<bf16>(row[i]);
}

__device__ __forceinline__ uint4 eight_of(const bf16* from) {
    return *(const uint4*)from;
}

// Elements j of two rows of eight, one above the other.
__device__ __forceinline__ u32 column_of(uint4 first, uint4 second, u32 j) {
    u32 a = j / 2 == 0 ? first.x : j / 2 == 1 ? first.y : j / 2 == 2 ? first.z : first.w;
    u32 b = j / 2 == 0 ? second.x : j / 2 == 1 ? second.y : j / 2 == 2 ? second.z : second.w;
    return __byte_perm(a, b, j % 2 ? 0x7632 : 0x5410);
}

template <u32 R>
__device__ __forceinline__ void part(float* parts, bf16* const* k_cache, bf16* const* v_cache, const bf16* qg, const bf16* k, const bf16* v,
                                     const bf16* q_norm, const bf16* k_norm, const float2* turns, const u32* positions, u32 G, u32 N, u32 half,
                                     float scale, float eps) {
    __shared__ __align__(16) bf16 queries[HEADS * QUERY_STRIDE], weights[HEADS * WEIGHT_STRIDE], new_key[MOST], new_value[MOST];
    // Rows of heads on their way; then the scores of both halves of the dims; at the end the values of the four quarters of positions.
    __shared__ float room[4 * R * MOST], maxima[HEADS], sums[HEADS], shrink[HEADS];
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, pair = lane % 4;
    u32 g = blockIdx.y, sequence = blockIdx.z, n_parts = gridDim.x, H = G * R;
    const float infinity = __int_as_float(0x7f800000);
    release_successor();
    u32 position = positions[sequence], length = position + 1;
    u32 per_part = stretches_of_part(length), first = blockIdx.x * per_part * STRETCH;
    u32 end = min(length, first + per_part * STRETCH);
    if (first >= length) {
        // Whoever waits for this kernel relies on its having waited for the one before.
        await_predecessor();
        return;
    }
    u64 stride = (u64)G * N;
    // A warp has a quarter of the positions and half of the dims of a stretch, in both products.
    u32 quarter = 16 * (warp % 4), dims = warp / 4 * (MOST / 2);
    const bf16* keys = k_cache[sequence] + (u64)g * N + dims;
    const bf16* values = v_cache[sequence] + (u64)g * N + dims;
    u32 n_dims = N > dims ? min(N - dims, MOST / 2) : 0;
    float mixed[8][4];
#pragma unroll
    for (u32 j = 0; j < 8; j++) mixed[j][0] = mixed[j][1] = mixed[j][2] = mixed[j][3] = 0.0f;

    // 1. ask for keys and values. Keys: positions group and group + 8, eight dims of each block of 32. Values: four positions, dims
    // 8 group and 64 + 8 group.
    uint4 key[4][2], value[4][2];
    auto fetch_keys = [&](u32 from) {
#pragma unroll
        for (u32 i = 0; i < 8; i++) {
            u32 at = from + quarter + group + 8 * (i % 2), dim = 32 * (i / 2) + 8 * pair;
            key[i / 2][i % 2] = at < position && dim < n_dims ? eight_of(keys + at * stride + dim) : make_uint4(0, 0, 0, 0);
        }
    };
    auto fetch_values = [&](u32 from) {
#pragma unroll
        for (u32 i = 0; i < 8; i++) {
            u32 at = from + quarter + 2 * pair + i / 2 % 2 + i / 4 * 8, dim = 64 * (i % 2) + 8 * group;
            value[i / 2][i % 2] = at < position && dim < n_dims ? eight_of(values + at * stride + dim) : make_uint4(0, 0, 0, 0);
        }
    };
    fetch_keys(first);
    fetch_values(first);

    for (u32 from = first; from < end; from += STRETCH) {
        if (from == first) {
            await_predecessor();
            // 2. queries, and in the last part the new key and value
            u64 row = (u64)sequence * G + g;
            const float2* of_position = turns + (u64)sequence * half;
            if (warp < R) {
                prepare_head(room + warp * MOST, qg + (row * R + warp) * 2 * N, q_norm, of_position, N, half, eps);
                store_head(queries + warp * QUERY_STRIDE, room + warp * MOST, N);
            } else {
                for (u32 i = lane; i < N; i += 32) queries[warp * QUERY_STRIDE + i] = from_f32<bf16>(0.0f);
            }
            if (end == length) {
                // The head that this warp has just put away makes room for the key.
                if (warp == 0) {
                    prepare_head(room, k + row * N, k_norm, of_position, N, half, eps);
                    store_head(new_key, room, N);
                    __syncwarp();
                    for (u32 i = lane; i < N; i += 32) k_cache[sequence][position * stride + (u64)g * N + i] = new_key[i];
                }
                if (warp == 1) {
                    for (u32 i = lane; i < N; i += 32) {
                        bf16 stored = v[row * N + i];
                        new_value[i] = stored;
                        v_cache[sequence][position * stride + (u64)g * N + i] = stored;
                    }
                }
            }
            if (threadIdx.x < HEADS) maxima[threadIdx.x] = -infinity, sums[threadIdx.x] = 0.0f;
            __syncthreads();
        }
        if (position - from < STRETCH) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                bool is_value = from + quarter + 2 * pair + i % 2 + i / 2 * 8 == position;
#pragma unroll
                for (u32 j = 0; j < 2; j++) {
                    u32 key_dim = 32 * i + 8 * pair, value_dim = 64 * j + 8 * group;
                    if (from + quarter + group + 8 * j == position && key_dim < n_dims) key[i][j] = eight_of(new_key + dims + key_dim);
                    if (is_value && value_dim < n_dims) value[i][j] = eight_of(new_value + dims + value_dim);
                }
            }
        }

        // 3. scores of this half of the dims
        float score[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            if (32 * i >= n_dims) break;
            uint4 q = eight_of(queries + group * QUERY_STRIDE + dims + 32 * i + 8 * pair);
            u32 low[4] = {key[i][0].x, key[i][1].x, key[i][0].y, key[i][1].y}, high[4] = {key[i][0].z, key[i][1].z, key[i][0].w, key[i][1].w};
            mma_16816(score, low, q.x, q.y);
            mma_16816(score, high, q.z, q.w);
        }
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            u32 head = 2 * pair + j % 2;
            if (head < R) room[(warp / 4 * R + head) * STRETCH + quarter + group + j / 2 * 8] = score[j];
        }
        // What the next stretch needs is asked for as soon as its registers are free.
        if (from + STRETCH < end) fetch_keys(from + STRETCH);
        __syncthreads();

        // 4. weights, a warp a head
        if (warp < R) {
            const float *of_low = room + warp * STRETCH, *of_high = room + (R + warp) * STRETCH;
            float low = from + lane < end ? scale * (of_low[lane] + of_high[lane]) : -infinity;
            float high = from + lane + 32 < end ? scale * (of_low[lane + 32] + of_high[lane + 32]) : -infinity;
            float before = maxima[warp], most = fmaxf(before, warp_max(fmaxf(low, high)));
            low = fast_exp2(low - most), high = fast_exp2(high - most);
            weights[warp * WEIGHT_STRIDE + lane] = from_f32<bf16>(low), weights[warp * WEIGHT_STRIDE + lane + 32] = from_f32<bf16>(high);
            float sum = warp_sum(low + high), factor = fast_exp2(before - most);
            __syncwarp();
            if (lane == 0) maxima[warp] = most, sums[warp] = sums[warp] * factor + sum, shrink[warp] = factor;
        } else {
            weights[warp * WEIGHT_STRIDE + lane] = weights[warp * WEIGHT_STRIDE + lane + 32] = from_f32<bf16>(0.0f);
            if (lane == 0) shrink[warp] = 0.0f;
        }
        __syncthreads();

        // 5. weighted values of this quarter of the positions
        float factor[2] = {shrink[2 * pair], shrink[2 * pair + 1]};
        const u32* weight = (const u32*)(weights + group * WEIGHT_STRIDE + quarter);
        u32 low = weight[pair], high = weight[pair + 4];
#pragma unroll
        for (u32 j = 0; j < 8; j++) {
            u32 a[4] = {column_of(value[0][0], value[1][0], j), column_of(value[0][1], value[1][1], j), column_of(value[2][0], value[3][0], j),
                        column_of(value[2][1], value[3][1], j)};
#pragma unroll
            for (u32 i = 0; i < 4; i++) mixed[j][i] *= factor[i % 2];
            mma_16816(mixed[j], a, low, high);
        }
        if (from + STRETCH < end) fetch_values(from + STRETCH);
        __syncthreads();
    }

    // 6. the four quarters of the positions, and what the part gives
#pragma unroll
    for (u32 j = 0; j < 8; j++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 head = 2 * pair + i % 2, dim = dims + 8 * group + j + i / 2 * 64;
            if (head < R) room[(warp % 4 * R + head) * MOST + dim] = mixed[j][i];
        }
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < R * N; i += THREADS) {
        u32 head = i / N, dim = i % N;
        float* to = parts + (((u64)sequence * H + g * R + head) * n_parts + blockIdx.x) * (N + 2);
        float sum = 0.0f;
#pragma unroll
        for (u32 w = 0; w < 4; w++) sum += room[(w * R + head) * MOST + dim];
        to[dim] = sum;
        if (dim == 0) to[N] = maxima[head], to[N + 1] = sums[head];
    }
}

#define PART(R)                                                                                                                             \
    extern "C" __global__ void __launch_bounds__(256, 2) decode_attention_part_##R(                                                         \
        float* parts, bf16* const* k_cache, bf16* const* v_cache, const bf16* qg, const bf16* k, const bf16* v, const bf16* q_norm,         \
        const bf16* k_norm, const float2* turns, const u32* positions, u32 G, u32 N, u32 half, float scale, float eps) {                  \
        part<R>(parts, k_cache, v_cache, qg, k, v, q_norm, k_norm, turns, positions, G, N, half, scale, eps);                            \
    }
PART(1)
PART(2)
PART(4)
PART(6)
PART(8)

// A block has one sequence.
extern "C" __global__ void decode_attention_turns(float2* turns, const float* inv_freq, const u32* positions, u32 half) {
    release_successor();
    await_predecessor();
    for (u32 i = threadIdx.x; i < half; i += blockDim.x) {
        float sine, cosine;
        sincosf((float)positions[blockIdx.x] * inv_freq[i], &sine, &cosine);
        turns[(u64)blockIdx.x * half + i] = make_float2(cosine, sine);
    }
}

// A block of N threads has one head of one sequence.
extern "C" __global__ void __launch_bounds__(256)
    decode_attention_join(bf16* out, const float* parts, const bf16* qg, const u32* positions, u32 n_parts, u32 H, u32 N) {
    release_successor();
    u32 sequence = blockIdx.y, i = threadIdx.x, length = positions[sequence] + 1;
    u64 head = (u64)sequence * H + blockIdx.x;
    u32 per_part = stretches_of_part(length) * STRETCH, n = (length + per_part - 1) / per_part;
    await_predecessor();
    const float* of_head = parts + head * n_parts * (N + 2);
    float most = -__int_as_float(0x7f800000), sum = 0.0f, value = 0.0f;
    for (u32 p = 0; p < n; p++) most = fmaxf(most, of_head[(u64)p * (N + 2) + N]);
    for (u32 p = 0; p < n; p++) {
        const float* of_part = of_head + (u64)p * (N + 2);
        float factor = fast_exp2(of_part[N] - most);
        sum += factor * of_part[N + 1];
        value += factor * of_part[i];
    }
    out[head * N + i] = from_f32<bf16>(value / sum * sigmoid(to_f32(qg[head * 2 * N + N + i])));
}
