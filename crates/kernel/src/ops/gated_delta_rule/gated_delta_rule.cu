// The gated delta rule in chunks of 32 tokens, every number f32, inputs of any type: what f32 models use and what the bf16
// kernels are compared with. Algebra of docs/gated_delta_rule.md, with D = beta e and (I + A)^-1 = I - diag(beta) P, so that
//   P = N - N diag(beta) P           N = L ⊙ strict(K Kᵀ), strictly lower triangular like P
//   e = W - P (beta W)               W = V - Γ K S
//   dR = dD - Pᵀ (beta dD)           d_v = beta dR, d_beta_i = dR_i · e_i
// and no step divides by beta or by a decay.
//
// T tokens, H value heads, G key heads, K key dim, V value dim; n_heads value heads from first_head on are in hand (all heads of
// some key heads), and scratch is indexed by their number `head` among them.
//   documents: first token, tokens, first border, 0       chunks: first token, tokens, border before, border after (or NONE)
// A border lies between two chunks of one document; the state there and its gradient are kept transposed, [border, head, V, K].

constexpr u32 SPAN = 32;
constexpr u32 NONE = 0xffffffffu;
constexpr u32 COLUMNS = 16;
constexpr u32 PITCH = COLUMNS + 1;

// One chunk's gates of one head: g and beta, zero beyond the chunk's end.
struct Gates {
    float g[SPAN], beta[SPAN];
    // exp of the gates from the chunk's start up to i, and of those behind j up to its end.
    float from_start[SPAN], to_end[SPAN];
};

// By the first SPAN threads; the caller synchronises before and after.
__device__ void load_gates(Gates& gates, const float* g_th, const float* beta_th, u32 first, u32 n, u32 H, u32 h) {
    u32 i = threadIdx.x;
    if (i < SPAN) {
        u64 at = (u64)(first + i) * H + h;
        gates.g[i] = i < n ? g_th[at] : 0.0f;
        gates.beta[i] = i < n ? beta_th[at] : 0.0f;
    }
}
// Each exponent is the sum of its own gates: a difference of two running sums would lose digits where the decay is strong.
__device__ void sum_gates(Gates& gates) {
    u32 i = threadIdx.x;
    if (i < SPAN) {
        float before = 0.0f, behind = 0.0f;
        for (u32 l = 0; l <= i; l++) before += gates.g[l];
        for (u32 l = i + 1; l < SPAN; l++) behind += gates.g[l];
        gates.from_start[i] = expf(before);
        gates.to_end[i] = expf(behind);
    }
}
// L_ij, masked before exp.
__device__ float decay_between(const Gates& gates, u32 i, u32 j) {
    if (j > i) return 0.0f;
    float sum = 0.0f;
    for (u32 l = j + 1; l <= i; l++) sum += gates.g[l];
    return expf(sum);
}

// A chunk's rows of one key head of x_tgk to [SPAN, K + 1], zeros beyond the chunk's end.
__device__ void load_rows(float* rows, View x_tgk, u32 first, u32 count, u32 G, u32 key_head, u32 K) {
    for (u32 at = threadIdx.x; at < SPAN * K; at += blockDim.x) {
        u32 i = at / K, x = at % K;
        rows[i * (K + 1) + x] = i < count ? load(x_tgk, ((i64)(first + i) * G + key_head) * K + x) : 0.0f;
    }
}

struct Prepare {
    Gates gates;
    float pairs[SPAN][SPAN + 1], solved[SPAN][SPAN + 1];
};

// p, m, n [T, n_heads, SPAN]: P, M = L ⊙ tril(Q Kᵀ) and N of each chunk, one row a token; n may be null. A block a chunk and head; shared:
// Prepare, keys and queries [SPAN, K + 1].
extern "C" __global__ void __launch_bounds__(256) gated_delta_rule_prepare(View q_tgk, View k_tgk, const float* g_th, const float* beta_th,
                                                                        float* p, float* m, float* n, const uint4* chunks, u32 H, u32 G,
                                                                        u32 K, u32 first_head, u32 n_heads) {
    extern __shared__ float shared[];
    auto& [gates, pairs, solved] = *(Prepare*)shared;
    uint4 chunk = chunks[blockIdx.x / n_heads];
    u32 head = blockIdx.x % n_heads, h = first_head + head, key_head = h / (H / G);
    u32 first = chunk.x, count = chunk.y, pitch = K + 1;
    float *keys = shared + sizeof(Prepare) / sizeof(float), *queries = keys + SPAN * pitch;

    load_gates(gates, g_th, beta_th, first, count, H, h);
    load_rows(keys, k_tgk, first, count, G, key_head, K);
    load_rows(queries, q_tgk, first, count, G, key_head, K);
    __syncthreads();
    for (u32 at = threadIdx.x; at < SPAN * SPAN; at += blockDim.x) {
        u32 i = at / SPAN, j = at % SPAN;
        float kk = 0.0f, qk = 0.0f;
        for (u32 x = 0; x < K; x++) {
            kk += keys[i * pitch + x] * keys[j * pitch + x];
            qk += queries[i * pitch + x] * keys[j * pitch + x];
        }
        float decay = decay_between(gates, i, j);
        pairs[i][j] = j < i ? decay * kk : 0.0f;
        u64 to = ((u64)(first + i) * n_heads + head) * SPAN + j;
        if (i < count) {
            m[to] = j <= i ? decay * qk : 0.0f;
            if (n) n[to] = pairs[i][j];
        }
    }
    __syncthreads();
    // A thread a column, row by row.
    if (threadIdx.x < SPAN) {
        u32 j = threadIdx.x;
        for (u32 i = 0; i < SPAN; i++) {
            float sum = pairs[i][j];
            for (u32 l = 0; l < i; l++) sum -= pairs[i][l] * gates.beta[l] * solved[l][j];
            solved[i][j] = sum;
        }
    }
    __syncthreads();
    for (u32 at = threadIdx.x; at < SPAN * SPAN; at += blockDim.x) {
        u32 i = at / SPAN, j = at % SPAN;
        if (i < count) p[((u64)(first + i) * n_heads + head) * SPAN + j] = solved[i][j];
    }
}

// What a scan over the chunks of one head and COLUMNS of its value columns holds in shared memory, with rows of keys and queries
// [SPAN, K + 1] and the state (or its gradient) [K, PITCH] behind it.
struct Scan {
    Gates gates;
    float p[SPAN][SPAN + 1], m[SPAN][SPAN + 1];
    float a[SPAN][PITCH], b[SPAN][PITCH], d_out[SPAN][PITCH];
};

// Keys, queries, P, M and gates of a chunk, zeros beyond its end.
__device__ void load_chunk(Scan& scan, float* keys, float* queries, View q_tgk, View k_tgk, const float* g_th, const float* beta_th,
                           const float* p, const float* m, u32 first, u32 count, u32 H, u32 G, u32 K, u32 h, u32 head, u32 n_heads) {
    load_gates(scan.gates, g_th, beta_th, first, count, H, h);
    load_rows(keys, k_tgk, first, count, G, h / (H / G), K);
    load_rows(queries, q_tgk, first, count, G, h / (H / G), K);
    for (u32 at = threadIdx.x; at < SPAN * SPAN; at += blockDim.x) {
        u32 i = at / SPAN, j = at % SPAN;
        u64 from = ((u64)(first + i) * n_heads + head) * SPAN + j;
        scan.p[i][j] = i < count ? p[from] : 0.0f;
        scan.m[i][j] = i < count ? m[from] : 0.0f;
    }
    __syncthreads();
    sum_gates(scan.gates);
    __syncthreads();
}

// The chunks of one document in order: a block a document, head and COLUMNS value columns. out_thv, e [T, n_heads, V], states and
// state_hkv (read first, written last) may be null.
extern "C" __global__ void __launch_bounds__(256) gated_delta_rule_scan(View out_thv, float* e, float* states, float* state_hkv, View q_tgk,
                                                                     View k_tgk, View v_thv, const float* g_th, const float* beta_th,
                                                                     const float* p, const float* m, const uint4* documents, u32 H, u32 G,
                                                                     u32 K, u32 V, u32 first_head, u32 n_heads) {
    extern __shared__ float shared[];
    Scan& scan = *(Scan*)shared;
    float* keys = (float*)(&scan + 1);
    float *queries = keys + SPAN * (K + 1), *state = queries + SPAN * (K + 1);
    u32 n_slices = (V + COLUMNS - 1) / COLUMNS;
    uint4 document = documents[blockIdx.x / (n_heads * n_slices)];
    u32 head = blockIdx.x / n_slices % n_heads, h = first_head + head;
    u32 column = threadIdx.x % COLUMNS, group = threadIdx.x / COLUMNS, n_groups = blockDim.x / COLUMNS;
    u32 v = blockIdx.x % n_slices * COLUMNS + column;
    bool is_in = v < V;

    for (u32 x = group; x < K; x += n_groups) {
        state[x * PITCH + column] = state_hkv && is_in ? state_hkv[((u64)h * K + x) * V + v] : 0.0f;
    }
    for (u32 done = 0; done < document.y; done += SPAN) {
        u32 first = document.x + done, count = min(SPAN, document.y - done);
        __syncthreads();
        load_chunk(scan, keys, queries, q_tgk, k_tgk, g_th, beta_th, p, m, first, count, H, G, K, h, head, n_heads);

        // 1. W into a
        for (u32 i = group; i < SPAN; i += n_groups) {
            float sum = 0.0f;
            for (u32 x = 0; x < K; x++) sum += keys[i * (K + 1) + x] * state[x * PITCH + column];
            float value = i < count && is_in ? load(v_thv, ((i64)(first + i) * H + h) * V + v) : 0.0f;
            scan.a[i][column] = value - scan.gates.from_start[i] * sum;
        }
        __syncthreads();

        // 2. e into b
        for (u32 i = group; i < SPAN; i += n_groups) {
            float sum = scan.a[i][column];
            for (u32 j = 0; j < i; j++) sum -= scan.p[i][j] * (scan.gates.beta[j] * scan.a[j][column]);
            scan.b[i][column] = sum;
            if (e && i < count && is_in) e[((u64)(first + i) * n_heads + head) * V + v] = sum;
        }
        __syncthreads();

        // 3. out
        if (out_thv.data) {
            for (u32 i = group; i < count; i += n_groups) {
                float sum = 0.0f;
                for (u32 x = 0; x < K; x++) sum += queries[i * (K + 1) + x] * state[x * PITCH + column];
                sum *= scan.gates.from_start[i];
                for (u32 j = 0; j <= i; j++) sum += scan.m[i][j] * (scan.gates.beta[j] * scan.b[j][column]);
                if (is_in) store(out_thv, ((i64)(first + i) * H + h) * V + v, sum);
            }
            __syncthreads();
        }

        // 4. the state behind the chunk
        float decay = scan.gates.from_start[SPAN - 1];
        for (u32 x = group; x < K; x += n_groups) {
            float sum = decay * state[x * PITCH + column];
            for (u32 j = 0; j < SPAN; j++) {
                sum += keys[j * (K + 1) + x] * (scan.gates.to_end[j] * scan.gates.beta[j] * scan.b[j][column]);
            }
            state[x * PITCH + column] = sum;
        }
        __syncthreads();
        if (states && done + SPAN < document.y) {
            float* to = states + ((u64)(document.z + done / SPAN) * n_heads + head) * V * K;
            for (u32 at = threadIdx.x; at < COLUMNS * K; at += blockDim.x) {
                u32 c = at / K, x = at % K;
                u32 row = blockIdx.x % n_slices * COLUMNS + c;
                if (row < V) to[(u64)row * K + x] = state[x * PITCH + c];
            }
        }
    }
    if (state_hkv && is_in) {
        for (u32 x = group; x < K; x += n_groups) state_hkv[((u64)h * K + x) * V + v] = state[x * PITCH + column];
    }
}

// The chunks of one document in reverse, carrying the gradient of the state: d_states, and dR into d_r [T, n_heads, V] and d_v.
extern "C" __global__ void __launch_bounds__(256) gated_delta_rule_reverse(View d_v_thv, float* d_r, float* d_states, View d_out_thv, View q_tgk,
                                                                        View k_tgk, const float* g_th, const float* beta_th, const float* p,
                                                                        const float* m, const uint4* documents, u32 H, u32 G, u32 K, u32 V,
                                                                        u32 first_head, u32 n_heads) {
    extern __shared__ float shared[];
    Scan& scan = *(Scan*)shared;
    float* keys = (float*)(&scan + 1);
    float *queries = keys + SPAN * (K + 1), *d_state = queries + SPAN * (K + 1);
    u32 n_slices = (V + COLUMNS - 1) / COLUMNS;
    uint4 document = documents[blockIdx.x / (n_heads * n_slices)];
    u32 head = blockIdx.x / n_slices % n_heads, h = first_head + head;
    u32 column = threadIdx.x % COLUMNS, group = threadIdx.x / COLUMNS, n_groups = blockDim.x / COLUMNS;
    u32 v = blockIdx.x % n_slices * COLUMNS + column;
    bool is_in = v < V;

    for (u32 x = group; x < K; x += n_groups) d_state[x * PITCH + column] = 0.0f;
    u32 n_chunks = (document.y + SPAN - 1) / SPAN;
    for (u32 idx = n_chunks; idx-- > 0;) {
        u32 first = document.x + idx * SPAN, count = min(SPAN, document.y - idx * SPAN);
        __syncthreads();
        if (idx + 1 < n_chunks) {
            float* to = d_states + ((u64)(document.z + idx) * n_heads + head) * V * K;
            for (u32 at = threadIdx.x; at < COLUMNS * K; at += blockDim.x) {
                u32 c = at / K, x = at % K;
                u32 row = blockIdx.x % n_slices * COLUMNS + c;
                if (row < V) to[(u64)row * K + x] = d_state[x * PITCH + c];
            }
        }
        for (u32 i = group; i < SPAN; i += n_groups) {
            scan.d_out[i][column] = i < count && is_in ? load(d_out_thv, ((i64)(first + i) * H + h) * V + v) : 0.0f;
        }
        load_chunk(scan, keys, queries, q_tgk, k_tgk, g_th, beta_th, p, m, first, count, H, G, K, h, head, n_heads);

        // 1. dD into a
        for (u32 j = group; j < SPAN; j += n_groups) {
            float sum = 0.0f;
            for (u32 x = 0; x < K; x++) sum += keys[j * (K + 1) + x] * d_state[x * PITCH + column];
            sum *= scan.gates.to_end[j];
            for (u32 i = j; i < SPAN; i++) sum += scan.m[i][j] * scan.d_out[i][column];
            scan.a[j][column] = sum;
        }
        __syncthreads();

        // 2. dR into b
        for (u32 j = group; j < SPAN; j += n_groups) {
            float sum = scan.a[j][column];
            for (u32 i = j + 1; i < SPAN; i++) sum -= scan.p[i][j] * (scan.gates.beta[i] * scan.a[i][column]);
            scan.b[j][column] = sum;
            if (j < count && is_in) {
                d_r[((u64)(first + j) * n_heads + head) * V + v] = sum;
                store(d_v_thv, ((i64)(first + j) * H + h) * V + v, scan.gates.beta[j] * sum);
            }
        }
        __syncthreads();

        // 3. the gradient of the state before the chunk
        float decay = scan.gates.from_start[SPAN - 1];
        for (u32 x = group; x < K; x += n_groups) {
            float sum = decay * d_state[x * PITCH + column];
            for (u32 i = 0; i < SPAN; i++) {
                float by_query = scan.gates.from_start[i] * scan.d_out[i][column];
                float by_key = scan.gates.from_start[i] * scan.gates.beta[i] * scan.b[i][column];
                sum += queries[i * (K + 1) + x] * by_query - keys[i * (K + 1) + x] * by_key;
            }
            d_state[x * PITCH + column] = sum;
        }
    }
}

// Sum over a row of `width` f32 in shared memory for each of SPAN rows, a warp a row.
__device__ void sum_rows(float (&sums)[SPAN], const float* rows, u32 width, u32 pitch) {
    u32 lane = threadIdx.x % 32;
    for (u32 i = threadIdx.x / 32; i < SPAN; i += blockDim.x / 32) {
        float sum = 0.0f;
        for (u32 x = lane; x < width; x += 32) sum += rows[i * pitch + x];
        sum = warp_sum(sum);
        if (lane == 0) sums[i] = sum;
    }
}

constexpr u32 HALF = SPAN / 2, TILE = 32, TILE_PITCH = SPAN + 4;

struct Gradient {
    // Columns of values: gradient of out, dR and e, one row a column.
    float d_outs[TILE][TILE_PITCH], d_rs[TILE][TILE_PITCH], es[TILE][TILE_PITCH];
    Gates gates;
    // dO eᵀ and dR eᵀ; what they give to Q Kᵀ and to K Kᵀ, summed over heads; gradients of the logs of decays between tokens.
    float by_out[SPAN][SPAN + 1], by_r[SPAN][SPAN + 1], d_qk[SPAN][SPAN + 1], d_kk[SPAN][SPAN + 1], spans[SPAN][SPAN + 1];
    // The same of decays from the chunk's start and to its end, and of the decay of the whole chunk, one number a warp.
    float from_start[SPAN], to_end[SPAN], through[SPAN];
};

// d_q, d_k, d_g and d_beta from the states, their gradients, e and dR: a block a chunk and key head, its value heads in order.
// A thread holds one key column of half the chunk's tokens, so blockDim.x >= 2 K; shared: Gradient, [SPAN, K + 1].
extern "C" __global__ void __launch_bounds__(512) gated_delta_rule_gradient(View d_q_tgk, View d_k_tgk, float* d_g_th, float* d_beta_th,
                                                                         View d_out_thv, View q_tgk, View k_tgk, const float* g_th,
                                                                         const float* beta_th, const float* m, const float* n, const float* e,
                                                                         const float* d_r, const float* states, const float* d_states,
                                                                         const uint4* chunks, u32 H, u32 G, u32 K, u32 V, u32 first_head,
                                                                         u32 n_heads) {
    extern __shared__ float shared[];
    auto& [d_outs, d_rs, es, gates, by_out, by_r, d_qk, d_kk, spans, from_start, to_end, through] = *(Gradient*)shared;
    float* products = shared + sizeof(Gradient) / sizeof(float);
    u32 ratio = H / G, n_key_heads = n_heads / ratio, pitch = K + 1;
    uint4 chunk = chunks[blockIdx.x / n_key_heads];
    u32 first = chunk.x, count = chunk.y, key_head = first_head / ratio + blockIdx.x % n_key_heads;
    bool has_before = chunk.z != NONE, has_after = chunk.w != NONE;
    bool is_in = threadIdx.x < 2 * K;
    u32 x = threadIdx.x % K, row = is_in ? threadIdx.x / K * HALF : 0;

    float d_query[HALF], d_key[HALF];
#pragma unroll
    for (u32 c = 0; c < HALF; c++) d_query[c] = d_key[c] = 0.0f;
    for (u32 at = threadIdx.x; at < SPAN * SPAN; at += blockDim.x) d_qk[at / SPAN][at % SPAN] = d_kk[at / SPAN][at % SPAN] = 0.0f;

    for (u32 of_key = 0; of_key < ratio; of_key++) {
        u32 head = blockIdx.x % n_key_heads * ratio + of_key, h = first_head + head;
        __syncthreads();
        load_gates(gates, g_th, beta_th, first, count, H, h);
        __syncthreads();
        sum_gates(gates);
        for (u32 at = threadIdx.x; at < SPAN * SPAN; at += blockDim.x) by_out[at / SPAN][at % SPAN] = by_r[at / SPAN][at % SPAN] = 0.0f;

        // 1. X = dO Sᵀ, Y = dR Sᵀ, Z = e dSᵀ, the products of dO and dR with e, and the state with its gradient
        float xs[HALF], ys[HALF], zs[HALF], state_sum = 0.0f;
#pragma unroll
        for (u32 c = 0; c < HALF; c++) xs[c] = ys[c] = zs[c] = 0.0f;
        for (u32 v0 = 0; v0 < V; v0 += TILE) {
            __syncthreads();
            for (u32 at = threadIdx.x; at < SPAN * TILE; at += blockDim.x) {
                u32 i = at / TILE, v = at % TILE;
                bool valid = i < count && v0 + v < V;
                u64 from = ((u64)(first + i) * n_heads + head) * V + v0 + v;
                d_outs[v][i] = valid ? load(d_out_thv, ((i64)(first + i) * H + h) * V + v0 + v) : 0.0f;
                d_rs[v][i] = valid ? d_r[from] : 0.0f;
                es[v][i] = valid ? e[from] : 0.0f;
            }
            __syncthreads();
            u32 width = min(TILE, V - v0);
            if (is_in) {
#pragma unroll 1
                for (u32 v = 0; v < width; v++) {
                    float s = has_before ? states[(((u64)chunk.z * n_heads + head) * V + v0 + v) * K + x] : 0.0f;
                    float d_s = has_after ? d_states[(((u64)chunk.w * n_heads + head) * V + v0 + v) * K + x] : 0.0f;
                    if (row == 0) state_sum += s * d_s;
#pragma unroll
                    for (u32 c = 0; c < HALF; c += 4) {
                        float4 o = *(float4*)&d_outs[v][row + c], r = *(float4*)&d_rs[v][row + c], d = *(float4*)&es[v][row + c];
                        xs[c] += s * o.x, xs[c + 1] += s * o.y, xs[c + 2] += s * o.z, xs[c + 3] += s * o.w;
                        ys[c] += s * r.x, ys[c + 1] += s * r.y, ys[c + 2] += s * r.z, ys[c + 3] += s * r.w;
                        zs[c] += d_s * d.x, zs[c + 1] += d_s * d.y, zs[c + 2] += d_s * d.z, zs[c + 3] += d_s * d.w;
                    }
                }
            }
            for (u32 at = threadIdx.x; at < SPAN * SPAN; at += blockDim.x) {
                u32 i = at / SPAN, j = at % SPAN;
                float out_sum = by_out[i][j], r_sum = by_r[i][j];
#pragma unroll 2
                for (u32 v = 0; v < width; v++) {
                    out_sum += d_outs[v][i] * es[v][j];
                    r_sum += d_rs[v][i] * es[v][j];
                }
                by_out[i][j] = out_sum;
                by_r[i][j] = r_sum;
            }
        }
        state_sum = warp_sum(state_sum);
        if (threadIdx.x % 32 == 0) through[threadIdx.x / 32] = gates.from_start[SPAN - 1] * state_sum;

        // 2. keys and queries through the states; gradients of the logs of the decays from the start and to the end
        load_rows(products, q_tgk, first, count, G, key_head, K);
        __syncthreads();
        if (is_in) {
#pragma unroll
            for (u32 c = 0; c < HALF; c++) {
                u32 i = row + c;
                float decay = gates.from_start[i], beta = gates.beta[i];
                d_query[c] += decay * xs[c];
                d_key[c] += gates.to_end[i] * beta * zs[c] - decay * beta * ys[c];
                xs[c] *= products[i * pitch + x];
                ys[c] *= beta;
            }
        }
        __syncthreads();
        load_rows(products, k_tgk, first, count, G, key_head, K);
        __syncthreads();
        if (is_in) {
#pragma unroll
            for (u32 c = 0; c < HALF; c++) {
                u32 at = (row + c) * pitch + x;
                float key = products[at];
                products[at] = xs[c] - key * ys[c];
                zs[c] *= key;
            }
        }
        __syncthreads();
        sum_rows(from_start, products, K, pitch);
        __syncthreads();
        if (is_in) {
#pragma unroll
            for (u32 c = 0; c < HALF; c++) products[(row + c) * pitch + x] = zs[c];
        }
        __syncthreads();
        sum_rows(to_end, products, K, pitch);

        // 3. the pairs of tokens inside the chunk
        for (u32 at = threadIdx.x; at < SPAN * SPAN; at += blockDim.x) {
            u32 i = at / SPAN, j = at % SPAN;
            float span = 0.0f;
            if (j <= i && i < count) {
                u64 from = ((u64)(first + i) * n_heads + head) * SPAN + j;
                float decay = decay_between(gates, i, j), beta_j = gates.beta[j], beta_i = gates.beta[i];
                d_qk[i][j] += by_out[i][j] * beta_j * decay;
                if (j < i) {
                    d_kk[i][j] -= by_r[i][j] * beta_j * beta_i * decay;
                    span = beta_j * (by_out[i][j] * m[from] - beta_i * by_r[i][j] * n[from]);
                }
            }
            spans[i][j] = span;
        }
        __syncthreads();

        // 4. gates: a span (j, i] gives its gradient to the gates inside it and to no other, so that a strong gate's tiny gradient is
        //    never the difference of two large sums
        if (threadIdx.x < SPAN) {
            u32 i = threadIdx.x;
            float sum = gates.from_start[i] * from_start[i];
            for (u32 t = 0; t <= i; t++) {
                float span = spans[i][t];
                spans[i][t] = sum;
                sum += span;
            }
        }
        __syncthreads();
        if (threadIdx.x < count) {
            u32 t = threadIdx.x;
            float sum = 0.0f;
            for (u32 warp = 0; warp < blockDim.x / 32; warp++) sum += through[warp];
            for (u32 j = 0; j < t; j++) sum += gates.to_end[j] * gates.beta[j] * to_end[j];
            for (u32 i = t; i < SPAN; i++) sum += spans[i][t];
            u64 to = (u64)(first + t) * H + h;
            d_g_th[to] = sum;
            d_beta_th[to] = by_r[t][t];
        }
    }
    __syncthreads();

    // 5. keys and queries through the pairs, all heads at once
    if (is_in) {
#pragma unroll 1
        for (u32 j = 0; j < count; j++) {
            i64 from = ((i64)(first + j) * G + key_head) * K + x;
            float query = load(q_tgk, from), key = load(k_tgk, from);
#pragma unroll
            for (u32 c = 0; c < HALF; c++) {
                u32 i = row + c;
                d_query[c] += d_qk[i][j] * key;
                d_key[c] += d_qk[j][i] * query + (d_kk[i][j] + d_kk[j][i]) * key;
            }
        }
#pragma unroll
        for (u32 c = 0; c < HALF; c++) {
            if (row + c < count) {
                i64 to = ((i64)(first + row + c) * G + key_head) * K + x;
                store(d_q_tgk, to, d_query[c]);
                store(d_k_tgk, to, d_key[c]);
            }
        }
    }
}
