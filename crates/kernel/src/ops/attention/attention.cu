// Causal softmax attention with grouped key:value heads over packed documents or over a cache; formulas stand in mod.rs.
//
// Where everything is bf16 and N is 64, 128 or 256, products run on the matrix units with f32 sums (names with _bf16_N); any other mix of
// types and any other N up to 256 runs in f32 throughout (names with _any). Tiles of q, k, v, d_out lie in shared memory in blocks of 64
// columns, a row of a block being 128 bytes whose eight 16-byte pieces are permuted by the row number: eight rows of one piece then lie in
// different banks. Scores are kept times scale · log2 e and exponentiated base 2. Nothing is reduced by atomics: a block owns what it writes.
// On Hopper, N = 256 has kernels whose products are issued by four warps at once (wgmma); they take more than 99 KB of shared memory.
//
// T tokens (packed), H query heads, G key:value heads (query head h reads key:value head h·G/H), N head dim, S cached positions.

extern __shared__ __align__(1024) u8 shared_memory[];

#define LOG2_E 1.4426950408889634f
#define INFINITE __int_as_float(0x7f800000)

// ---- instructions

// 16 bytes from global to shared memory; zeros, and nothing read, where not `valid`.
__device__ __forceinline__ void copy16(u32 shared, const void* global, bool valid) {
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}
// Four 8x8 matrices; lane i gives the address of row i % 8 of matrix i / 8. As they lie: a lane gets row lane / 4, columns 2 (lane % 4) + {0,1}.
__device__ __forceinline__ void matrices(u32 (&words)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address));
}
// Transposed: a lane gets column lane / 4, rows 2 (lane % 4) + {0,1}.
__device__ __forceinline__ void matrices_transposed(u32 (&words)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address));
}
// Two warps meet at barrier `id`: one only says that it was there, the other waits for it.
__device__ __forceinline__ void pair_arrive(int id) { asm volatile("bar.arrive %0, 64;" ::"r"(id) : "memory"); }
__device__ __forceinline__ void pair_wait(int id) { asm volatile("bar.sync %0, 64;" ::"r"(id) : "memory"); }

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define WARPGROUPS
#endif

#ifdef WARPGROUPS
// Products of a warpgroup run by themselves: begun after a fence, awaited by group. Until then nobody touches the sums, left operands in
// registers or tiles that they use. A warp holds 16 rows of the 64, laid out as mma_16816 has them.
__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most M groups are still under way.
template <int M> __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(M) : "memory"); }
// What this thread wrote to shared memory, cp.async included, is seen by products begun after the next barrier.
__device__ __forceinline__ void seen_by_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#define FOUR(how, d, i) how(d[i][0]), how(d[i][1]), how(d[i][2]), how(d[i][3])
#define SIXTEEN(how, d, i) FOUR(how, d, i), FOUR(how, d, i + 1), FOUR(how, d, i + 2), FOUR(how, d, i + 3)
// d [64,32] = a b, or += where it ADDS; b from the descriptor, its sums along the columns.
template <bool ADDS> __device__ __forceinline__ void wgmma_32(float (&d)[4][4], const u32 (&a)[4], u64 b) {
#define PRODUCT(how)                                                                                                                           \
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "                                                                      \
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, %21, 1, 1, 0;"                             \
                 : SIXTEEN(how, d, 0)                                                                                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"((i32)ADDS))
    if constexpr (ADDS) {
        PRODUCT("+f");
    } else {
        PRODUCT("=f");
    }
#undef PRODUCT
}
// d [64,64] = a b, or += where it ADDS; both from descriptors, their sums along the columns.
template <bool ADDS> __device__ __forceinline__ void wgmma_64(float (&d)[8][4], u64 a, u64 b) {
#define PRODUCT(how)                                                                                                                           \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "                                                                      \
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "  \
                 "%32, %33, %34, 1, 1, 0, 0;"                                                                                                  \
                 : SIXTEEN(how, d, 0), SIXTEEN(how, d, 4)                                                                                      \
                 : "l"(a), "l"(b), "n"((i32)ADDS))
    if constexpr (ADDS) {
        PRODUCT("+f");
    } else {
        PRODUCT("=f");
    }
#undef PRODUCT
}
// d [64,256] += a b; b from the descriptor, its sums along the rows.
__device__ __forceinline__ void wgmma_256(float (&d)[32][4], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
                 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
                 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
                 "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
                 "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,"
                 "%122,%123,%124,%125,%126,%127}, {%128,%129,%130,%131}, %132, 1, 1, 1, 1;"
                 : SIXTEEN("+f", d, 0), SIXTEEN("+f", d, 4), SIXTEEN("+f", d, 8), SIXTEEN("+f", d, 12), SIXTEEN("+f", d, 16), SIXTEEN("+f", d, 20),
                   SIXTEEN("+f", d, 24), SIXTEEN("+f", d, 28)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#endif

// ---- tiles in shared memory

// Byte of row `row`, piece `piece` (eight columns) of a tile of ROWS rows.
template <int ROWS> __device__ __forceinline__ u32 piece_at(u32 row, u32 piece) {
    return (piece >> 3) * (ROWS * 128) + row * 128 + (((piece ^ row) & 7) << 4);
}

// Rows `rows + i · stride` of N elements, i < ROWS; zeros from row `n_valid` on.
template <int ROWS, int N, int THREADS>
__device__ __forceinline__ void load_tile(u32 tile, const bf16* rows, u32 stride, int n_valid) {
    constexpr int PIECES = N / 8, STEP = THREADS / PIECES;
    static_assert(ROWS % STEP == 0, "every thread copies as much");
    const u32 row = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
    const bf16* from = rows + row * stride + 8 * piece;
#pragma unroll
    for (int i = 0; i < ROWS / STEP; i++) {
        copy16(tile + piece_at<ROWS>(row + i * STEP, piece), from, (int)row < n_valid - i * STEP);
        from += STEP * stride;
    }
}

// Where a lane points to for the four matrices of a 16x16 piece of a tile of ROWS rows.
template <int ROWS> struct Corner {
    u32 row, turn;

    // Matrices in the order (rows, columns) 00 10 01 11: the left operand; transposed, the right operand with its sums along the rows.
    static __device__ __forceinline__ Corner by_rows(u32 lane) { return {(lane & 15) * 128, ((lane >> 4) ^ (lane & 7)) << 4}; }
    // 00 01 10 11: the right operand with its sums along the columns.
    static __device__ __forceinline__ Corner by_columns(u32 lane) {
        return {((lane & 7) + ((lane >> 4) << 3)) * 128, (((lane >> 3) & 1) ^ (lane & 7)) << 4};
    }
    // The piece whose first row is 16 rows16 and first column 16 columns16.
    __device__ __forceinline__ u32 at(u32 rows16, u32 columns16) const {
        return (columns16 >> 2) * (ROWS * 128) + rows16 * 2048 + row + (((columns16 & 3) << 5) ^ turn);
    }
};

#ifdef WARPGROUPS
// Descriptors of a tile of ROWS rows for products of 16 terms: the 16 columns from 16 columns16 on, sums along the columns; or the 16 rows
// from 16 rows16 on, sums along the rows. Eight rows are 1024 bytes, a block of 64 columns ROWS · 128; the pattern is that of piece_at.
template <int ROWS> __device__ __forceinline__ u64 by_columns16(u32 tile, u32 columns16) {
    const u32 start = tile + (columns16 >> 2) * (ROWS * 128) + (columns16 & 3) * 32;
    return (u64)((start & 0x3ffff) >> 4) | 1ull << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}
template <int ROWS> __device__ __forceinline__ u64 by_rows16(u32 tile, u32 rows16) {
    return (u64)(((tile + rows16 * 2048) & 0x3ffff) >> 4) | (u64)(ROWS * 128 >> 4) << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}
#endif

// Sums of a 16xN piece, times `factor`, to `n_valid` rows of bf16 from `out` on, `stride` apart, by way of the warp's own tile of ROWS rows
// (rows 16 rows16 and on), so that 16 neighbouring bytes go out at once.
template <int ROWS, int N>
__device__ __forceinline__ void store_rows(bf16* out, i64 stride, int n_valid, const float (&sums)[N / 8][4], float low, float high, u32 tile,
                                           u32 rows16) {
    const u32 lane = threadIdx.x & 31, group = lane >> 2, pair = lane & 3;
    u8* memory = shared_memory + (tile - shared_address(shared_memory));
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        *(u32*)(memory + piece_at<ROWS>(16 * rows16 + group, j) + 4 * pair) = pack_bf16(sums[j][0] * low, sums[j][1] * low);
        *(u32*)(memory + piece_at<ROWS>(16 * rows16 + group + 8, j) + 4 * pair) = pack_bf16(sums[j][2] * high, sums[j][3] * high);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < N / 16; i++) {
        int index = lane + 32 * i, row = index / (N / 8), piece = index % (N / 8);
        uint4 words = *(const uint4*)(memory + piece_at<ROWS>(16 * rows16 + row, piece));
        if (row < n_valid) *(uint4*)(out + row * stride + 8 * piece) = words;
    }
}

// ---- forward

// Queries of one document: `n_rows` of them from row `row` of q on, the first at `position`; position 0 is row `first_key` of k and v.
struct Tile {
    u32 row, n_rows, first_key, position;
};

// From the table, or without one from T tokens after `past` cached ones. The longest come first.
__device__ __forceinline__ Tile tile_of(const uint4* tiles, u32 index, u32 n_tiles, u32 rows, u32 n_tokens, u32 past) {
    if (tiles) {
        uint4 tile = tiles[index];
        return {tile.x, tile.y, tile.z, tile.w};
    }
    u32 row = (n_tiles - 1 - index) * rows;
    return {row, min(rows, n_tokens - row), 0, past + row};
}

// Running maximum (of the unscaled scores) and this lane's share of the running sum of a lane's two rows, group and group + 8.
struct Running {
    float max[2], sum[2];
};

// Scores to probabilities under the maximum so far; `factor` is what sums under the older maximum are to be scaled down by.
template <int TILES> __device__ __forceinline__ void weigh(float (&scores)[TILES][4], float (&factor)[2], Running& running, float scale2) {
    float shift[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float largest = running.max[half];
#pragma unroll
        for (int j = 0; j < TILES; j++) largest = fmaxf(largest, fmaxf(scores[j][2 * half], scores[j][2 * half + 1]));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
        // Only a row that has seen nothing yet has no maximum.
        shift[half] = largest == -INFINITE ? 0.0f : largest * scale2;
        factor[half] = fast_exp2(running.max[half] * scale2 - shift[half]);
        running.max[half] = largest;
        running.sum[half] *= factor[half];
    }
#pragma unroll
    for (int j = 0; j < TILES; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            scores[j][e] = fast_exp2(scores[j][e] * scale2 - shift[e >> 1]);
            running.sum[e >> 1] += scores[j][e];
        }
    }
}
template <int TILES> __device__ __forceinline__ void scale_down(float (&sums)[TILES][4], const float (&factor)[2]) {
    // The maximum seldom changes after the first few tiles.
    if (!__any_sync(0xffffffffu, factor[0] != 1.0f || factor[1] != 1.0f)) return;
#pragma unroll
    for (int j = 0; j < TILES; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) sums[j][e] *= factor[e >> 1];
    }
}

// Hides the keys that a query does not see; `limit`: the last key that the lane's first row sees, counted from the lane's first key.
template <int TILES> __device__ __forceinline__ void hide_later(float (&scores)[TILES][4], int limit) {
#pragma unroll
    for (int j = 0; j < TILES; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            if (8 * j + (e & 1) > limit + 8 * (e >> 1)) scores[j][e] = -INFINITE;
        }
    }
}

// Probabilities of 16 keys as a left operand.
__device__ __forceinline__ void left_operand(u32 (&a)[4], const float (&first)[4], const float (&second)[4]) {
    a[0] = pack_bf16(first[0], first[1]);
    a[1] = pack_bf16(first[2], first[3]);
    a[2] = pack_bf16(second[0], second[1]);
    a[3] = pack_bf16(second[2], second[3]);
}

// Scores of 16 queries (rows 16 rows16 of the query tile) and 8 TILES keys.
template <int TILES, int N, int QUERY_ROWS, int KEY_ROWS>
__device__ __forceinline__ void score(float (&scores)[TILES][4], u32 q_tile, u32 rows16, u32 k_tile) {
    const u32 lane = threadIdx.x & 31;
    const Corner<QUERY_ROWS> left = Corner<QUERY_ROWS>::by_rows(lane);
    const Corner<KEY_ROWS> right = Corner<KEY_ROWS>::by_columns(lane);
#pragma unroll
    for (int j = 0; j < TILES; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) scores[j][e] = 0.0f;
    }
#pragma unroll
    for (int c = 0; c < N / 16; c++) {
        u32 a[4];
        matrices(a, q_tile + left.at(rows16, c));
#pragma unroll
        for (int j = 0; j < TILES; j += 2) {
            u32 b[4];
            matrices(b, k_tile + right.at(j / 2, c));
            mma_16816(scores[j], a, b[0], b[1]);
            mma_16816(scores[j + 1], a, b[2], b[3]);
        }
    }
}

// sums += probabilities · values, 16 x N over 8 TILES keys.
template <int TILES, int N, int KEY_ROWS>
__device__ __forceinline__ void add_values(float (&sums)[N / 8][4], const float (&probabilities)[TILES][4], u32 v_tile) {
    const Corner<KEY_ROWS> right = Corner<KEY_ROWS>::by_rows(threadIdx.x & 31);
#pragma unroll
    for (int j = 0; j < TILES; j += 2) {
        u32 a[4];
        left_operand(a, probabilities[j], probabilities[j + 1]);
#pragma unroll
        for (int c = 0; c < N / 16; c++) {
            u32 b[4];
            matrices_transposed(b, v_tile + right.at(j / 2, c));
            mma_16816(sums[2 * c], a, b[0], b[1]);
            mma_16816(sums[2 * c + 1], a, b[2], b[3]);
        }
    }
}

// The warp's 16 rows (16 rows16 and on of a tile whose first row in [T,H] is `first_row`), by way of the query tile.
template <int ROWS, int N>
__device__ __forceinline__ void finish(bf16* out_thn, float* lse_th, const float (&sums)[N / 8][4], Running& running, i64 first_row, u32 n_heads,
                                       int n_rows, u32 q_tile, u32 rows16, float scale) {
    const u32 lane = threadIdx.x & 31;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        running.sum[half] += __shfl_xor_sync(0xffffffffu, running.sum[half], 1);
        running.sum[half] += __shfl_xor_sync(0xffffffffu, running.sum[half], 2);
        const int row = 16 * rows16 + (lane >> 2) + 8 * half;
        if (lse_th && (lane & 3) == 0 && row < n_rows) {
            lse_th[first_row + (i64)row * n_heads] = running.max[half] * scale + logf(running.sum[half]);
        }
    }
    const i64 stride = (i64)n_heads * N;
    bf16* out = out_thn + first_row * N + 16 * rows16 * stride;
    store_rows<ROWS, N>(out, stride, n_rows - 16 * (int)rows16, sums, 1.0f / running.sum[0], 1.0f / running.sum[1], q_tile, rows16);
}

// A block is a tile of 16 WARPS queries of one head (blockIdx.x = tile · H + head); a warp has 16 of them and meets 64 keys at a time.
// With two stages keys and values are fetched a step ahead; with one, keys are fetched while values are used and the other way round.
template <int N, int WARPS, int STAGES>
__device__ __forceinline__ void forward_bf16(bf16* out_thn, float* lse_th, const bf16* q_thn, const bf16* k_sgn, const bf16* v_sgn,
                                             const uint4* tiles, u32 n_tokens, u32 past, u32 n_heads, u32 n_kv_heads, float scale) {
    constexpr int ROWS = 16 * WARPS, KEYS = 64, THREADS = 32 * WARPS;
    constexpr u32 TILE_BYTES = KEYS * N * 2;
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group = lane >> 2, pair = lane & 3;
    const u32 head = blockIdx.x % n_heads, kv_head = head / (n_heads / n_kv_heads);
    const Tile tile = tile_of(tiles, blockIdx.x / n_heads, gridDim.x / n_heads, ROWS, n_tokens, past);
    const int n_keys = tile.position + tile.n_rows, n_steps = (n_keys + KEYS - 1) / KEYS;
    const u32 q_stride = n_heads * N, kv_stride = n_kv_heads * N;
    const u32 first_row = tile.row * n_heads + head;
    const u32 first_key = tile.first_key * n_kv_heads + kv_head;
    const u32 q_tile = shared_address(shared_memory), k_tiles = q_tile + ROWS * N * 2, v_tiles = k_tiles + STAGES * TILE_BYTES;
    const float scale2 = scale * LOG2_E;

    float sums[N / 8][4];
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) sums[j][e] = 0.0f;
    }
    Running running = {{-INFINITE, -INFINITE}, {0.0f, 0.0f}};

    auto load_keys = [&](u32 to, const bf16* from, int key) {
        load_tile<KEYS, N, THREADS>(to, from + (i64)(first_key + key * n_kv_heads) * N, kv_stride, n_keys - key);
    };
    load_tile<ROWS, N, THREADS>(q_tile, q_thn + (i64)first_row * N, q_stride, tile.n_rows);
    load_keys(k_tiles, k_sgn, 0);
    copy_async_commit();
    load_keys(v_tiles, v_sgn, 0);
    copy_async_commit();

    const int warp_position = tile.position + 16 * warp;
    for (int step = 0; step < n_steps; step++) {
        const int key = step * KEYS, next = key + KEYS;
        const bool sees = key <= warp_position + 15;
        const u32 slot = STAGES == 2 ? (step & 1) * TILE_BYTES : 0, next_slot = STAGES == 2 ? TILE_BYTES - slot : 0;
        float scores[KEYS / 8][4];

        // 1. scores
        copy_async_wait<STAGES == 2 ? 0 : 1>();
        __syncthreads();
        if (STAGES == 2 && step + 1 < n_steps) {
            load_keys(k_tiles + next_slot, k_sgn, next);
            load_keys(v_tiles + next_slot, v_sgn, next);
            copy_async_commit();
        }
        if (sees) score<KEYS / 8, N, ROWS, KEYS>(scores, q_tile, warp, k_tiles + slot);
        if (STAGES == 1) {
            __syncthreads();
            if (step + 1 < n_steps) load_keys(k_tiles, k_sgn, next);
            copy_async_commit();
        }

        // 2. probabilities
        if (sees) {
            if (next - 1 > warp_position) hide_later(scores, warp_position + (int)group - key - 2 * (int)pair);
            float factor[2];
            weigh(scores, factor, running, scale2);
            scale_down(sums, factor);
        }

        // 3. values
        if (STAGES == 1) {
            copy_async_wait<1>();
            __syncthreads();
        }
        if (sees) add_values<KEYS / 8, N, KEYS>(sums, scores, v_tiles + slot);
        if (STAGES == 1) {
            __syncthreads();
            if (step + 1 < n_steps) load_keys(v_tiles, v_sgn, next);
            copy_async_commit();
        }
    }

    // 4. the warp's rows
    finish<ROWS, N>(out_thn, lse_th, sums, running, first_row, n_heads, (int)tile.n_rows, q_tile, warp, scale);
}

#define FORWARD_BF16(NAME, N, WARPS, STAGES, BLOCKS)                                                                                            \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)                                                                           \
        NAME(bf16* out_thn, float* lse_th, const bf16* q_thn, const bf16* k_sgn, const bf16* v_sgn, const uint4* tiles, u32 n_tokens, u32 past, \
             u32 n_heads, u32 n_kv_heads, float scale) {                                                                                       \
        forward_bf16<N, WARPS, STAGES>(out_thn, lse_th, q_thn, k_sgn, v_sgn, tiles, n_tokens, past, n_heads, n_kv_heads, scale);               \
    }
FORWARD_BF16(attention_forward_bf16_64, 64, 8, 2, 1)
FORWARD_BF16(attention_forward_bf16_128, 128, 8, 2, 1)
FORWARD_BF16(attention_forward_bf16_256, 256, 4, 1, 2)
// Needs 192 KB of shared memory.
FORWARD_BF16(attention_forward_bf16_256_large, 256, 8, 2, 1)

#ifdef WARPGROUPS
// A block is 64 queries of two heads that share keys and values, a warpgroup each (blockIdx.x = tile · H/2 + pair of heads). The scores of
// the next 64 keys are under way while the values of the last are added, and probabilities are made while the values still are.
extern "C" __global__ void __launch_bounds__(256, 1)
    attention_forward_warpgroups_256(bf16* out_thn, float* lse_th, const bf16* q_thn, const bf16* k_sgn, const bf16* v_sgn, const uint4* tiles,
                                     u32 n_tokens, u32 past, u32 n_heads, u32 n_kv_heads, float scale) {
    constexpr int N = 256, ROWS = 64, KEYS = 64, THREADS = 256;
    constexpr u32 TILE_BYTES = KEYS * N * 2;
    const u32 lane = threadIdx.x & 31, rows16 = threadIdx.x >> 5 & 3, group = lane >> 2, pair = lane & 3;
    const u32 n_pairs = n_heads / 2, first_head = 2 * (blockIdx.x % n_pairs), kv_head = first_head / (n_heads / n_kv_heads);
    const u32 mine = threadIdx.x >> 7;
    const Tile tile = tile_of(tiles, blockIdx.x / n_pairs, gridDim.x / n_pairs, ROWS, n_tokens, past);
    const int n_keys = tile.position + tile.n_rows, n_steps = (n_keys + KEYS - 1) / KEYS;
    const u32 q_stride = n_heads * N, kv_stride = n_kv_heads * N;
    const i64 first_row = (i64)tile.row * n_heads + first_head, first_key = (i64)tile.first_key * n_kv_heads + kv_head;
    const bf16 *k = k_sgn + first_key * N, *v = v_sgn + first_key * N;
    const u32 q_tiles = shared_address(shared_memory), k_tiles = q_tiles + 2 * TILE_BYTES, v_tiles = k_tiles + 2 * TILE_BYTES;
    const u32 q_tile = q_tiles + mine * TILE_BYTES;
    const int warp_position = tile.position + 16 * rows16;
    const float scale2 = scale * LOG2_E;

    float sums[N / 8][4], scores[KEYS / 8][4], factor[2];
    u32 probabilities[KEYS / 16][4];
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) sums[j][e] = 0.0f;
    }
    Running running = {{-INFINITE, -INFINITE}, {0.0f, 0.0f}};

    // Keys of a step and values of the step before come together.
    auto fetch = [&](int step) {
        const int key = step * KEYS, before = key - KEYS;
        if (step < n_steps) {
            load_tile<KEYS, N, THREADS>(k_tiles + (step & 1) * TILE_BYTES, k + (i64)key * kv_stride, kv_stride, n_keys - key);
        }
        if (before >= 0) {
            load_tile<KEYS, N, THREADS>(v_tiles + (~step & 1) * TILE_BYTES, v + (i64)before * kv_stride, kv_stride, n_keys - before);
        }
        copy_async_commit();
    };
    auto arrive = [&]() {
        copy_async_wait<0>();
        seen_by_wgmma();
        __syncthreads();
    };
    auto begin_scores = [&](int step) {
        const u32 k_tile = k_tiles + (step & 1) * TILE_BYTES;
        wgmma_64<false>(scores, by_columns16<ROWS>(q_tile, 0), by_columns16<KEYS>(k_tile, 0));
#pragma unroll
        for (int c = 1; c < N / 16; c++) wgmma_64<true>(scores, by_columns16<ROWS>(q_tile, c), by_columns16<KEYS>(k_tile, c));
        wgmma_commit();
    };
    auto begin_values = [&](int step) {
        const u32 v_tile = v_tiles + (step & 1) * TILE_BYTES;
#pragma unroll
        for (int c = 0; c < KEYS / 16; c++) wgmma_256(sums, probabilities[c], by_rows16<KEYS>(v_tile, c));
        wgmma_commit();
    };
    auto make_probabilities = [&](int step) {
        const int key = step * KEYS;
        if (key + KEYS - 1 > warp_position) hide_later(scores, warp_position + (int)group - key - 2 * (int)pair);
        weigh(scores, factor, running, scale2);
    };
    auto pack = [&]() {
#pragma unroll
        for (int c = 0; c < KEYS / 16; c++) left_operand(probabilities[c], scores[2 * c], scores[2 * c + 1]);
    };

    load_tile<ROWS, N, THREADS>(q_tiles, q_thn + first_row * N, q_stride, tile.n_rows);
    load_tile<ROWS, N, THREADS>(q_tiles + TILE_BYTES, q_thn + (first_row + 1) * N, q_stride, tile.n_rows);
    fetch(0);
    arrive();
    fetch(1);
    wgmma_begin();
    begin_scores(0);
    wgmma_wait<0>();
    make_probabilities(0);
    pack();
    for (int step = 1; step < n_steps; step++) {
        arrive();
        fetch(step + 1);
        wgmma_begin();
        begin_scores(step);
        begin_values(step - 1);
        wgmma_wait<1>();
        make_probabilities(step);
        wgmma_wait<0>();
        scale_down(sums, factor);
        pack();
    }
    arrive();
    wgmma_begin();
    begin_values(n_steps - 1);
    wgmma_wait<0>();
    finish<ROWS, N>(out_thn, lse_th, sums, running, first_row + mine, n_heads, (int)tile.n_rows, q_tile, rows16, scale);
}
#endif

// ---- forward over a cache, for a few queries

// The splits of one row put together: partial [splits][rows][N] and its (maximum, sum) [splits][rows]. A block is a row of q.
extern "C" __global__ void __launch_bounds__(256) attention_combine(View out, const float* partial, const float2* runs, u32 n_splits, u32 n_rows,
                                                                    u32 n) {
    float* factors = (float*)shared_memory;
    const u32 row = blockIdx.x;
    float largest = -INFINITE;
    for (u32 split = threadIdx.x; split < n_splits; split += blockDim.x) largest = fmaxf(largest, runs[(i64)split * n_rows + row].x);
    largest = block_max(largest);
    float sum = 0.0f;
    for (u32 split = threadIdx.x; split < n_splits; split += blockDim.x) {
        float2 run = runs[(i64)split * n_rows + row];
        factors[split] = expf(run.x - largest);
        sum += run.y * factors[split];
    }
    // Its barriers also make the factors seen.
    const float scale = 1.0f / block_sum(sum);
    for (u32 column = threadIdx.x; column < n; column += blockDim.x) {
        float value = 0.0f;
#pragma unroll 8
        for (u32 split = 0; split < n_splits; split++) value += factors[split] * partial[((i64)split * n_rows + row) * n + column];
        store(out, (i64)row * n + column, value * scale);
    }
}

// A block is one split of the keys (blockIdx.x) for all queries of a key:value head (blockIdx.y): at most 16 rows, token by token. Each warp
// walks its own tiles of 16 keys through three slots of shared memory, keys and values in turn; the warps meet only at the end.
template <int N>
__device__ __forceinline__ void cached_bf16(bf16* out_thn, float* partial, float2* runs, const bf16* q_thn, const bf16* k_sgn,
                                            const bf16* v_sgn, u32 n_tokens, u32 past, u32 n_heads, u32 n_kv_heads, u32 split_keys,
                                            float scale) {
    constexpr int WARPS = 4, KEYS = 16, SLOTS = 3;
    constexpr u32 SLOT_BYTES = KEYS * N * 2;
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group = lane >> 2, pair = lane & 3;
    const u32 ratio = n_heads / n_kv_heads, kv_head = blockIdx.y, n_rows = n_tokens * ratio;
    const i64 kv_stride = (i64)n_kv_heads * N;
    const u32 first_key = blockIdx.x * split_keys, end_key = min(first_key + split_keys, past + n_tokens);
    const u32 slots = shared_address(shared_memory) + warp * SLOTS * SLOT_BYTES;

    // 1. queries, as left operands
    u32 q[N / 16][4];
#pragma unroll
    for (int i = 0; i < N / 16; i++) {
        u32 index = lane + 32 * i, row = index / (N / 8), piece = index % (N / 8);
        u32 token = row / ratio, head = kv_head * ratio + row % ratio;
        bool valid = row < n_rows;
        copy16(slots + piece_at<16>(row, piece), q_thn + (valid ? ((i64)token * n_heads + head) * N + 8 * piece : 0), valid);
    }
    copy_async_commit();
    copy_async_wait<0>();
    __syncwarp();
    const Corner<16> corner = Corner<16>::by_rows(lane);
#pragma unroll
    for (int c = 0; c < N / 16; c++) matrices(q[c], slots + corner.at(0, c));
    __syncwarp();

    // 2. this warp's tiles; the i-th fetch is of keys or values of its tile i / 2
    auto fetch = [&](u32 i) {
        u32 key = first_key + (warp + WARPS * (i >> 1)) * KEYS;
        if (key < end_key) {
            const bf16* rows = (i & 1 ? v_sgn : k_sgn) + ((i64)key * n_kv_heads + kv_head) * N;
            const u32 slot = slots + i % SLOTS * SLOT_BYTES;
#pragma unroll
            for (int part = 0; part < N / 16; part++) {
                u32 index = lane + 32 * part, row = index / (N / 8), piece = index % (N / 8);
                copy16(slot + piece_at<16>(row, piece), rows + row * kv_stride + 8 * piece, key + row < end_key);
            }
        }
        copy_async_commit();
    };
    float sums[N / 8][4];
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) sums[j][e] = 0.0f;
    }
    Running running = {{-INFINITE, -INFINITE}, {0.0f, 0.0f}};
    const float scale2 = scale * LOG2_E;
    const Corner<16> by_columns = Corner<16>::by_columns(lane);
    fetch(0);
    fetch(1);
    fetch(2);
    u32 i = 0;
    for (u32 key = first_key + warp * KEYS; key < end_key; key += WARPS * KEYS, i += 2) {
        float scores[2][4];
#pragma unroll
        for (int e = 0; e < 4; e++) scores[0][e] = scores[1][e] = 0.0f;
        copy_async_wait<2>();
        __syncwarp();
        const u32 k_slot = slots + i % SLOTS * SLOT_BYTES, v_slot = slots + (i + 1) % SLOTS * SLOT_BYTES;
#pragma unroll
        for (int c = 0; c < N / 16; c++) {
            u32 b[4];
            matrices(b, k_slot + by_columns.at(0, c));
            mma_16816(scores[0], q[c], b[0], b[1]);
            mma_16816(scores[1], q[c], b[2], b[3]);
        }
        __syncwarp();
        fetch(i + 3);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            // The query's own position is the last it sees; rows that are no queries may see anything.
            u32 last = min(past + (group + 8 * half) / ratio, end_key - 1);
#pragma unroll
            for (int j = 0; j < 2; j++) {
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; e++) {
                    if (key + 8 * j + 2 * pair + (e & 1) > last) scores[j][e] = -INFINITE;
                }
            }
        }
        float factor[2];
        weigh(scores, factor, running, scale2);
        scale_down(sums, factor);
        copy_async_wait<2>();
        __syncwarp();
        add_values<2, N, 16>(sums, scores, v_slot);
        __syncwarp();
        fetch(i + 4);
    }
    copy_async_wait<0>();

    // 3. the warps put together: [warps][16][N] sums, then [warps][16] maxima and sums
    __syncthreads();
    float* all_sums = (float*)shared_memory;
    float2* all_runs = (float2*)(all_sums + WARPS * 16 * N);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        running.sum[half] += __shfl_xor_sync(0xffffffffu, running.sum[half], 1);
        running.sum[half] += __shfl_xor_sync(0xffffffffu, running.sum[half], 2);
        u32 row = group + 8 * half;
        if (pair == 0) all_runs[warp * 16 + row] = make_float2(running.max[half] * scale, running.sum[half]);
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
            *(float2*)(all_sums + (warp * 16 + row) * N + 8 * j + 2 * pair) = make_float2(sums[j][2 * half], sums[j][2 * half + 1]);
        }
    }
    __syncthreads();
    for (u32 row = warp; row < n_rows; row += WARPS) {
        float largest = -INFINITE, sum = 0.0f, factor[WARPS];
#pragma unroll
        for (int w = 0; w < WARPS; w++) largest = fmaxf(largest, all_runs[w * 16 + row].x);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float2 run = all_runs[w * 16 + row];
            factor[w] = run.x == -INFINITE ? 0.0f : expf(run.x - largest);
            sum += run.y * factor[w];
        }
        // [T,H], as out has it.
        const u32 out_row = row / ratio * n_heads + kv_head * ratio + row % ratio;
        const i64 split_row = (i64)blockIdx.x * n_tokens * n_heads + out_row;
        if (runs && lane == 0) runs[split_row] = make_float2(largest, sum);
        for (u32 column = lane; column < N; column += 32) {
            float value = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) value += factor[w] * all_sums[(w * 16 + row) * N + column];
            if (runs) {
                partial[split_row * N + column] = value;
            } else {
                out_thn[(i64)out_row * N + column] = from_f32<bf16>(value / sum);
            }
        }
    }
}

#define CACHED_BF16(N)                                                                                                                           \
    extern "C" __global__ void __launch_bounds__(128) attention_cached_bf16_##N(                                                                \
        bf16* out_thn, float* partial, float2* runs, const bf16* q_thn, const bf16* k_sgn, const bf16* v_sgn, u32 n_tokens, u32 past,           \
        u32 n_heads, u32 n_kv_heads, u32 split_keys, float scale) {                                                                              \
        cached_bf16<N>(out_thn, partial, runs, q_thn, k_sgn, v_sgn, n_tokens, past, n_heads, n_kv_heads, split_keys, scale);                     \
    }
CACHED_BF16(64)
CACHED_BF16(128)
CACHED_BF16(256)

// ---- backward: d_s = p (d_p - delta) with p = exp(scale q·k - lse), d_p = d_out·v, delta = d_out·out; then d_v = pᵀ d_out,
// d_k = scale d_sᵀ q, d_q = scale d_s k. The first kernel leaves d_s behind, so that the second is one product.

// What backward needs of 32 queries of a head, [tiles][H][2][32]: lse · log2 e (infinite where there is no query, which makes p zero), delta.
// A block is a tile (row, n_rows) and a head, a warp four of its rows.
extern "C" __global__ void __launch_bounds__(256) attention_backward_rows_bf16(float* rows, const bf16* d_out_thn, const bf16* out_thn,
                                                                               const float* lse_th, const uint2* tiles, u32 n_heads, u32 n) {
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, head = blockIdx.x % n_heads;
    const uint2 tile = tiles[blockIdx.x / n_heads];
#pragma unroll
    for (u32 i = 4 * warp; i < 4 * warp + 4; i++) {
        float lse = INFINITE, delta = 0.0f;
        if (i < tile.y) {
            const i64 row = (i64)(tile.x + i) * n_heads + head;
            for (u32 column = 8 * lane; column < n; column += 256) {
                Eight a = load8(d_out_thn, row * n + column), b = load8(out_thn, row * n + column);
#pragma unroll
                for (int j = 0; j < 8; j++) delta += a.v[j] * b.v[j];
            }
            lse = lse_th[row] * LOG2_E;
        }
        delta = warp_sum(delta);
        if (lane == 0) {
            rows[(i64)blockIdx.x * 64 + i] = lse;
            rows[(i64)blockIdx.x * 64 + 32 + i] = delta;
        }
    }
}

// 64 keys (`n_keys` of them, from row `key` of k and v on) and the queries from row `query` to `query_end` that see them; in 32s, the first
// of those is number `tile` in `rows`, and what they leave in d_s begins at block `block`.
struct KeyItem {
    u32 key, n_keys, query, query_end, tile, block, carry, flags;
};
// What is not needed before the end, kept in shared memory: registers are scarce.
struct KeyEnd {
    // Of the first element of d_k and d_v, in N; where the sums are left for later queries, if they are.
    u32 row, n_keys, carry;
};
// Sums of earlier queries of the same keys are taken from `carry`, or left there for later ones.
#define CARRY_IN 1
#define CARRY_OUT 2

// d_k and d_v. Four warps hold 16 keys each as left operands, take scores, make p and sum up d_v; the other four hold the values of the same
// keys, take d_p, get p from the first, make d_s and sum up d_k. Everything is transposed (keys by queries): sums of the first products are
// then left operands of the second as they stand. A block is an item and one of `n_pass` key:value heads from `first_head` on.
//
// A block of d_s, 4 KB, is 64 keys of 32 queries as left operands (queries by keys): [4 of 16 keys][2 of 16 queries][lane][4 words].
template <int N, bool BY_WARPGROUPS>
__device__ __forceinline__ void backward_keys_bf16(bf16* d_k_tgn, bf16* d_v_tgn, uint4* d_s, float4* carry, const float* rows,
                                                   const bf16* d_out_thn, const bf16* q_thn, const bf16* k_tgn, const bf16* v_tgn,
                                                   const uint4* items, u32 first_head, u32 n_pass, u32 head_blocks, u32 n_heads,
                                                   u32 n_kv_heads, float scale) {
    constexpr int KEYS = 64, QUERIES = 32, THREADS = 256, STAGES = BY_WARPGROUPS ? 4 : 2, AHEAD = STAGES / 2;
    constexpr u32 TILE_BYTES = QUERIES * N * 2, STAGE_BYTES = 2 * TILE_BYTES;
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, group = lane >> 2, pair = lane & 3;
    const u32 part = warp & 3;
    const bool makes_d_s = warp >= 4;
    const u32 pass_head = blockIdx.x % n_pass, kv_head = first_head + pass_head, ratio = n_heads / n_kv_heads;
    const uint4* words = items + 2 * (blockIdx.x / n_pass);
    const uint4 low = words[0], high = words[1];
    const KeyItem item = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    const u32 kv_stride = n_kv_heads * N;
    const i64 first_key = (i64)item.key * n_kv_heads + kv_head;
    // Queries of a head, in whole tiles.
    const u32 turn = (item.query_end - item.query + QUERIES - 1) / QUERIES * QUERIES;
    const u32 stages = shared_address(shared_memory);
    float4* exchange = (float4*)(shared_memory + STAGES * STAGE_BYTES);
    float* row_stages = (float*)(shared_memory + STAGES * STAGE_BYTES + KEYS * QUERIES * 4);
    const u32 carried = item.carry * n_pass + pass_head;
    KeyEnd* at_end = (KeyEnd*)(row_stages + STAGES * 2 * QUERIES);
    if (threadIdx.x == 0) *at_end = {item.key * n_kv_heads + kv_head, item.n_keys, item.flags & CARRY_OUT ? carried : ~0u};

    // 1. keys or values, as left operands
    u32 fixed[N / 16][4];
    load_tile<KEYS, N, THREADS>(stages, k_tgn + first_key * N, kv_stride, item.n_keys);
    load_tile<KEYS, N, THREADS>(stages + STAGE_BYTES, v_tgn + first_key * N, kv_stride, item.n_keys);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    const Corner<KEYS> corner = Corner<KEYS>::by_rows(lane);
#pragma unroll
    for (int c = 0; c < N / 16; c++) matrices(fixed[c], stages + (makes_d_s ? STAGE_BYTES : 0) + corner.at(part, c));
    __syncthreads();

    float sums[N / 8][4];
    const float4* earlier = carry + ((i64)carried * 8 + warp) * (N / 8) * 32 + lane;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
        const float4 before = item.flags & CARRY_IN ? earlier[j * 32] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        sums[j][0] = before.x;
        sums[j][1] = before.y;
        sums[j][2] = before.z;
        sums[j][3] = before.w;
    }

    // 2. the queries of each head in turn; q and d_out are fetched ahead
    u32 n_left = turn / QUERIES * ratio, fetch_row = item.query * n_heads + kv_head * ratio, fetch_rows = item.tile * n_heads + kv_head * ratio;
    int fetch_valid = item.query_end - item.query;
    auto fetch = [&](u32 slot, bool is_one) {
        if (is_one) {
            const u32 stage = stages + slot * STAGE_BYTES;
            load_tile<QUERIES, N, THREADS>(stage, q_thn + (i64)fetch_row * N, n_heads * N, fetch_valid);
            load_tile<QUERIES, N, THREADS>(stage + TILE_BYTES, d_out_thn + (i64)fetch_row * N, n_heads * N, fetch_valid);
            if (threadIdx.x < 16) {
                copy16(shared_address(row_stages + slot * 64 + 4 * threadIdx.x), rows + (i64)fetch_rows * 64 + 4 * threadIdx.x, true);
            }
            fetch_row += QUERIES * n_heads;
            fetch_rows += n_heads;
            fetch_valid -= QUERIES;
            if (fetch_valid <= 0) {
                // The first queries of the next head.
                fetch_row += 1 - turn * n_heads;
                fetch_rows += 1 - turn / QUERIES * n_heads;
                fetch_valid += turn;
            }
        }
        copy_async_commit();
    };
    const float scale2 = scale * LOG2_E;
    const Corner<QUERIES> by_columns = Corner<QUERIES>::by_columns(lane), by_rows = Corner<QUERIES>::by_rows(lane);
    u32 left_d_s = (pass_head * head_blocks + item.block) * 256 + part * 64 + lane;
    // Queries before the keys, which happens within the first 64 of a head.
    int ahead = (int)item.query - (int)item.key;
    const int end = ahead + (int)turn;
    u32 slot = 0;
#pragma unroll
    for (u32 i = 0; i < AHEAD; i++) fetch(i, i < n_left);
    auto meet = [&]() {
        copy_async_wait<AHEAD - 1>();
#ifdef WARPGROUPS
        if constexpr (BY_WARPGROUPS) seen_by_wgmma();
#endif
        __syncthreads();
        fetch((slot + AHEAD) % STAGES, n_left > AHEAD);
        const u32 q_tile = stages + slot * STAGE_BYTES, d_out_tile = q_tile + TILE_BYTES;
        const float* row_stage = row_stages + slot * 64;
        const u32 first_tile = makes_d_s ? d_out_tile : q_tile, second_tile = makes_d_s ? q_tile : d_out_tile;

        // scores or d_p
        float products[QUERIES / 8][4];
        if constexpr (BY_WARPGROUPS) {
#ifdef WARPGROUPS
            wgmma_begin();
            wgmma_32<false>(products, fixed[0], by_columns16<QUERIES>(first_tile, 0));
#pragma unroll
            for (int c = 1; c < N / 16; c++) wgmma_32<true>(products, fixed[c], by_columns16<QUERIES>(first_tile, c));
            wgmma_commit();
            // The step before is done as well: its tiles may be overwritten after the next barrier, but not yet.
            wgmma_wait<0>();
#endif
        } else {
#pragma unroll
            for (int j = 0; j < QUERIES / 8; j++) {
#pragma unroll
                for (int e = 0; e < 4; e++) products[j][e] = 0.0f;
            }
#pragma unroll
            for (int c = 0; c < N / 16; c++) {
#pragma unroll
                for (int j = 0; j < QUERIES / 8; j += 2) {
                    u32 b[4];
                    matrices(b, first_tile + by_columns.at(j / 2, c));
                    mma_16816(products[j], fixed[c], b[0], b[1]);
                    mma_16816(products[j + 1], fixed[c], b[2], b[3]);
                }
            }
        }

        // p or d_s
        float4* exchanged = exchange + part * 128 + lane;
        if (!makes_d_s) {
            const bool masked = ahead < KEYS;
#pragma unroll
            for (int j = 0; j < QUERIES / 8; j++) {
                const float2 lse = *(const float2*)(row_stage + 8 * j + 2 * pair);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int key = 16 * part + group + 8 * (e >> 1), query = ahead + 8 * j + 2 * pair + (e & 1);
                    const float p = fast_exp2(products[j][e] * scale2 - (e & 1 ? lse.y : lse.x));
                    products[j][e] = masked && key > query ? 0.0f : p;
                }
                exchanged[j * 32] = make_float4(products[j][0], products[j][1], products[j][2], products[j][3]);
            }
            pair_arrive(1 + part);
        } else {
            pair_wait(1 + part);
#pragma unroll
            for (int j = 0; j < QUERIES / 8; j++) {
                const float2 delta = *(const float2*)(row_stage + QUERIES + 8 * j + 2 * pair);
                const float4 p = exchanged[j * 32];
                products[j][0] = p.x * (products[j][0] - delta.x);
                products[j][1] = p.y * (products[j][1] - delta.y);
                products[j][2] = p.z * (products[j][2] - delta.x);
                products[j][3] = p.w * (products[j][3] - delta.y);
            }
        }

        // d_v or d_k
        u32 left[QUERIES / 16][4];
#pragma unroll
        for (int j = 0; j < QUERIES / 16; j++) {
            left_operand(left[j], products[2 * j], products[2 * j + 1]);
            if (makes_d_s) {
                // Queries by keys: the second and third matrix change places.
                d_s[left_d_s + j * 32] =
                    make_uint4(transpose8(left[j][0]), transpose8(left[j][2]), transpose8(left[j][1]), transpose8(left[j][3]));
            }
        }
        if constexpr (BY_WARPGROUPS) {
#ifdef WARPGROUPS
            wgmma_begin();
#pragma unroll
            for (int j = 0; j < QUERIES / 16; j++) wgmma_256(sums, left[j], by_rows16<QUERIES>(second_tile, j));
            wgmma_commit();
#endif
        } else {
#pragma unroll
            for (int j = 0; j < QUERIES / 16; j++) {
#pragma unroll
                for (int c = 0; c < N / 16; c++) {
                    u32 b[4];
                    matrices_transposed(b, second_tile + by_rows.at(j, c));
                    mma_16816(sums[2 * c], left[j], b[0], b[1]);
                    mma_16816(sums[2 * c + 1], left[j], b[2], b[3]);
                }
            }
        }
        left_d_s += 256;
        slot = (slot + 1) % STAGES;
        ahead += QUERIES;
        if (ahead == end) ahead -= turn;
        n_left--;
    };
    // The first by itself, so that within the loop the sums of a step are always under way when the next begins.
    if constexpr (BY_WARPGROUPS) meet();
    while (n_left > 0) meet();

    // 3. out, by way of the stages
#ifdef WARPGROUPS
    if constexpr (BY_WARPGROUPS) wgmma_wait<0>();
#endif
    __syncthreads();
    if (at_end->carry != ~0u) {
        float4* later = carry + ((i64)at_end->carry * 8 + warp) * (N / 8) * 32 + lane;
#pragma unroll
        for (int j = 0; j < N / 8; j++) later[j * 32] = make_float4(sums[j][0], sums[j][1], sums[j][2], sums[j][3]);
        return;
    }
    const i64 first = at_end->row + 16 * part * n_kv_heads;
    const float factor = makes_d_s ? scale : 1.0f;
    store_rows<128, N>((makes_d_s ? d_k_tgn : d_v_tgn) + first * N, n_kv_heads * N, (int)at_end->n_keys - 16 * (int)part, sums, factor, factor,
                       stages, warp);
}

// Up to 128 queries from row `query` on, the first at `position` of the document that begins at row `key`; the piece of d_s they lie in begins
// at block `block` and holds the 32s of queries from number `first` of the document on, `n_tiles` of them.
struct QueryItem {
    u32 query, n_rows, key, position, block, first, n_tiles, unused;
};

// d_q = scale d_s k: d_s lies in memory as left operands. Two warps share 32 queries, half of the columns each, and meet 32 keys at a time,
// fetched three steps ahead. A block is an item and one of the query heads of `n_pass` key:value heads from `first_head` on.
template <int N>
__device__ __forceinline__ void backward_queries_bf16(bf16* d_q_thn, const uint4* d_s, const bf16* k_tgn, const uint4* items, u32 first_head,
                                                      u32 n_pass, u32 head_blocks, u32 n_heads, u32 n_kv_heads, float scale) {
    constexpr int ROWS = 128, KEYS = 32, THREADS = 256, STAGES = 4;
    constexpr u32 KEY_BYTES = KEYS * N * 2, STAGE_BYTES = KEY_BYTES + 4 * 2048;
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, mine = warp >> 1, half = warp & 1;
    const u32 ratio = n_heads / n_kv_heads, pass_head = blockIdx.x % (n_pass * ratio) / ratio, group_head = blockIdx.x % ratio;
    const u32 kv_head = first_head + pass_head, head = kv_head * ratio + group_head;
    const uint4* words = items + 2 * (blockIdx.x / (n_pass * ratio));
    const uint4 low = words[0], high = words[1];
    const QueryItem item = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    const u32 kv_stride = n_kv_heads * N;
    const bf16* k = k_tgn + ((i64)item.key * n_kv_heads + kv_head) * N;
    const uint4* d_s_head = d_s + (i64)pass_head * head_blocks * 256;
    const u32 stages = shared_address(shared_memory);
    const int n_keys = item.position + item.n_rows, n_steps = (n_keys + KEYS - 1) / KEYS;
    const u32 end = item.first + item.n_tiles;

    auto fetch = [&](int step) {
        if (step < n_steps) {
            const u32 stage = stages + (step % STAGES) * STAGE_BYTES;
            load_tile<KEYS, N, THREADS>(stage, k + (i64)(step * KEYS) * kv_stride, kv_stride, n_keys - step * KEYS);
            // The 64 keys that the step lies in, and where their blocks of d_s begin: see `blocks_before` in cuda.rs.
            const u32 keys64 = step >> 1, whole = min(keys64, item.first / 2), cut = keys64 - whole;
            const u32 first = max(item.first, 2 * keys64), n_tiles = item.n_tiles - 2 * cut;
            const u32 before = ratio * (keys64 * item.n_tiles - cut * (cut - 1));
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const u32 index = threadIdx.x + i * THREADS, tile = index >> 7, query_tile = item.position / 32 + tile;
                const bool valid = query_tile >= first && query_tile < end;
                const i64 block = valid ? item.block + before + group_head * n_tiles + (query_tile - first) : 0;
                copy16(stage + KEY_BYTES + index * 16, d_s_head + block * 256 + (step & 1) * 128 + (index & 127), valid);
            }
        }
        copy_async_commit();
    };
    float sums[2][N / 16][4];
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
        for (int j = 0; j < N / 16; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) sums[r][j][e] = 0.0f;
        }
    }
    const Corner<KEYS> right = Corner<KEYS>::by_rows(lane);
    for (int step = 0; step < STAGES - 1; step++) fetch(step);
    for (int step = 0; step < n_steps; step++) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();
        fetch(step + STAGES - 1);
        // A warp whose queries all come before these keys has nothing to add.
        if (step * KEYS > (int)(item.position + 32 * mine + 31)) continue;
        const u32 offset = (step % STAGES) * STAGE_BYTES, stage = stages + offset;
        const uint4* left = (const uint4*)(shared_memory + offset + KEY_BYTES) + mine * 128 + lane;
#pragma unroll
        for (int kk = 0; kk < 2; kk++) {
            const uint4 first = left[kk * 64], second = left[kk * 64 + 32];
            const u32 a0[4] = {first.x, first.y, first.z, first.w}, a1[4] = {second.x, second.y, second.z, second.w};
#pragma unroll
            for (int c = 0; c < N / 32; c++) {
                u32 b[4];
                matrices_transposed(b, stage + right.at(kk, half * (N / 32) + c));
                mma_16816(sums[0][2 * c], a0, b[0], b[1]);
                mma_16816(sums[0][2 * c + 1], a0, b[2], b[3]);
                mma_16816(sums[1][2 * c], a1, b[0], b[1]);
                mma_16816(sums[1][2 * c + 1], a1, b[2], b[3]);
            }
        }
    }

    copy_async_wait<0>();
    __syncthreads();
    bf16* d_q = d_q_thn + ((i64)item.query * n_heads + head) * N + half * (N / 2);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int first = 32 * mine + 16 * r;
        bf16* out = d_q + (i64)first * n_heads * N;
        // Eight warps' 16 rows of N / 2 columns; N / 2 = 32 takes half of a block of 64 columns.
        store_rows<ROWS, N / 2>(out, (i64)n_heads * N, (int)item.n_rows - first, sums[r], scale, scale, stages, warp);
        __syncwarp();
    }
}

#define BACKWARD_KEYS(NAME, N, BY_WARPGROUPS)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, 1)                                                                                       \
        NAME(bf16* d_k_tgn, bf16* d_v_tgn, uint4* d_s, float4* carry, const float* rows, const bf16* d_out_thn, const bf16* q_thn,             \
             const bf16* k_tgn, const bf16* v_tgn, const uint4* items, u32 first_head, u32 n_pass, u32 head_blocks, u32 n_heads,               \
             u32 n_kv_heads, float scale) {                                                                                                    \
        backward_keys_bf16<N, BY_WARPGROUPS>(d_k_tgn, d_v_tgn, d_s, carry, rows, d_out_thn, q_thn, k_tgn, v_tgn, items, first_head, n_pass,    \
                                             head_blocks, n_heads, n_kv_heads, scale);                                                        \
    }
#define BACKWARD_QUERIES(NAME, N)                                                                                                              \
    extern "C" __global__ void __launch_bounds__(256, 1)                                                                                       \
        NAME(bf16* d_q_thn, const uint4* d_s, const bf16* k_tgn, const uint4* items, u32 first_head, u32 n_pass, u32 head_blocks,              \
             u32 n_heads, u32 n_kv_heads, float scale) {                                                                                       \
        backward_queries_bf16<N>(d_q_thn, d_s, k_tgn, items, first_head, n_pass, head_blocks, n_heads, n_kv_heads, scale);                     \
    }
BACKWARD_KEYS(attention_backward_keys_bf16_64, 64, false)
BACKWARD_KEYS(attention_backward_keys_bf16_128, 128, false)
BACKWARD_KEYS(attention_backward_keys_bf16_256, 256, false)
#ifdef WARPGROUPS
BACKWARD_KEYS(attention_backward_keys_warpgroups_256, 256, true)
#endif
BACKWARD_QUERIES(attention_backward_queries_bf16_64, 64)
BACKWARD_QUERIES(attention_backward_queries_bf16_128, 128)
BACKWARD_QUERIES(attention_backward_queries_bf16_256, 256)

// ---- any mix of types, any N up to 256, in f32

// Rows of `n` elements from `first` on, `stride` apart, widened into rows of `pitch` floats; zeros beyond `n_valid` rows and beyond N up to
// the next multiple of four. The pitch is 4 more than a multiple of 32, so that eight lanes read 16 bytes of eight rows at once.
__device__ __forceinline__ void load_rows(float* tile, u32 n_rows, u32 pitch, View view, i64 first, i64 stride, i32 n_valid, u32 n) {
    const u32 padded = (n + 3) & ~3u;
    for (u32 index = threadIdx.x; index < n_rows * padded; index += blockDim.x) {
        const u32 row = index / padded, column = index % padded;
        const bool valid = (i32)row < n_valid && column < n;
        tile[row * pitch + column] = valid ? load(view, first + row * stride + column) : 0.0f;
    }
}

// products[r] = a row of the warp's own (the same for all lanes) times the lane's row of a tile.
template <int OWN> __device__ __forceinline__ void multiply_rows(float (&products)[OWN], const float* own, const float* tile, u32 pitch, u32 n) {
    const float* row = tile + (threadIdx.x & 31) * pitch;
#pragma unroll
    for (int r = 0; r < OWN; r++) products[r] = 0.0f;
    for (u32 column = 0; column < n; column += 4) {
        const float4 b = *(const float4*)(row + column);
#pragma unroll
        for (int r = 0; r < OWN; r++) {
            const float4 a = *(const float4*)(own + r * pitch + column);
            products[r] += a.x * b.x;
            products[r] += a.y * b.y;
            products[r] += a.z * b.z;
            products[r] += a.w * b.w;
        }
    }
}

// sums[r] += Σ over the 32 lanes of the lane's factor times the lane's row of a tile; a lane keeps columns lane, lane + 32, ...
template <int OWN>
__device__ __forceinline__ void add_rows(float (&sums)[OWN][8], const float (&factors)[OWN], const float* tile, u32 pitch, u32 n) {
    const u32 lane = threadIdx.x & 31;
#pragma unroll 4
    for (u32 row = 0; row < 32; row++) {
        float factor[OWN];
#pragma unroll
        for (int r = 0; r < OWN; r++) factor[r] = __shfl_sync(0xffffffffu, factors[r], row);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (lane + 32 * i < n) {
                const float x = tile[row * pitch + lane + 32 * i];
#pragma unroll
                for (int r = 0; r < OWN; r++) sums[r][i] += factor[r] * x;
            }
        }
    }
}

// A block is a tile of 32 queries of one head (blockIdx.x = tile · H + head) and one split of its keys (blockIdx.y); a warp has four queries
// and meets 32 keys at a time, one a lane. With `runs` the split leaves [splits][T·H] (maximum, sum) and [splits][T·H][N] for
// attention_combine.
extern "C" __global__ void __launch_bounds__(256, 1) attention_forward_any(View out_thn, float* lse_th, float* partial, float2* runs, View q_thn,
                                                                        View k_sgn, View v_sgn, const uint4* tiles, u32 n_tokens, u32 past,
                                                                        u32 n_heads, u32 n_kv_heads, u32 n, u32 split_keys, float scale) {
    constexpr int ROWS = 32, KEYS = 32, OWN = 4;
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, pitch = (n + 31) / 32 * 32 + 4;
    const u32 head = blockIdx.x % n_heads, kv_head = head / (n_heads / n_kv_heads);
    const Tile tile = tile_of(tiles, blockIdx.x / n_heads, gridDim.x / n_heads, ROWS, n_tokens, past);
    float *q = (float*)shared_memory, *k = q + ROWS * pitch, *v = k + KEYS * pitch;
    const i64 kv_stride = (i64)n_kv_heads * n;
    const i64 first_row = (i64)tile.row * n_heads + head, first_key = (i64)tile.first_key * n_kv_heads + kv_head;
    const u32 from = blockIdx.y * split_keys, end = min(tile.position + tile.n_rows, from + split_keys);

    float sums[OWN][8], largest[OWN], sum[OWN];
#pragma unroll
    for (int r = 0; r < OWN; r++) {
        largest[r] = -INFINITE;
        sum[r] = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; i++) sums[r][i] = 0.0f;
    }
    load_rows(q, ROWS, pitch, q_thn, first_row * n, (i64)n_heads * n, tile.n_rows, n);
    for (u32 key = from; key < end; key += KEYS) {
        __syncthreads();
        load_rows(k, KEYS, pitch, k_sgn, first_key * n + key * kv_stride, kv_stride, end - key, n);
        load_rows(v, KEYS, pitch, v_sgn, first_key * n + key * kv_stride, kv_stride, end - key, n);
        __syncthreads();
        if (OWN * warp >= tile.n_rows) continue;
        float scores[OWN];
        multiply_rows<OWN>(scores, q + OWN * warp * pitch, k, pitch, n);
#pragma unroll
        for (int r = 0; r < OWN; r++) {
            const bool seen = key + lane < end && key + lane <= tile.position + OWN * warp + r;
            const float score = seen ? scores[r] * scale : -INFINITE;
            const float now = fmaxf(largest[r], warp_max(score));
            // Nothing seen yet leaves everything at zero.
            const float factor = now == -INFINITE ? 1.0f : expf(largest[r] - now);
            scores[r] = seen ? expf(score - now) : 0.0f;
            largest[r] = now;
            sum[r] = sum[r] * factor + warp_sum(scores[r]);
#pragma unroll
            for (int i = 0; i < 8; i++) sums[r][i] *= factor;
        }
        add_rows<OWN>(sums, scores, v, pitch, n);
    }
#pragma unroll
    for (int r = 0; r < OWN; r++) {
        const u32 row = OWN * warp + r;
        if (row >= tile.n_rows) break;
        const i64 out_row = first_row + (i64)row * n_heads, split_row = (i64)blockIdx.y * n_tokens * n_heads + out_row;
        if (lane == 0) {
            if (runs) runs[split_row] = make_float2(largest[r], sum[r]);
            if (lse_th) lse_th[out_row] = largest[r] + logf(sum[r]);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const u32 column = lane + 32 * i;
            if (column >= n) break;
            if (runs) {
                partial[split_row * n + column] = sums[r][i];
            } else {
                store(out_thn, out_row * n + column, sums[r][i] / sum[r]);
            }
        }
    }
}

// delta [T,H]: a warp a row.
extern "C" __global__ void __launch_bounds__(256) attention_backward_delta_any(float* delta_th, View d_out_thn, View out_thn, u32 n_rows, u32 n) {
    const u32 lane = threadIdx.x & 31;
    const i64 row = (i64)blockIdx.x * 8 + (threadIdx.x >> 5);
    if (row >= n_rows) return;
    float delta = 0.0f;
    for (u32 column = lane; column < n; column += 32) delta += load(d_out_thn, row * n + column) * load(out_thn, row * n + column);
    delta = warp_sum(delta);
    if (lane == 0) delta_th[row] = delta;
}

// p and d_s of the warp's own two rows with the lane's row, `own` and `tile` in the order (q or k, d_out or v).
__device__ __forceinline__ void score_gradients(float (&p)[2], float (&d_s)[2], const float* own, u32 own_rows, const float* tile, u32 pitch,
                                                u32 n, const bool (&seen)[2], const float (&lse)[2], const float (&delta)[2], float scale) {
    float scores[2], d_p[2];
    multiply_rows<2>(scores, own, tile, pitch, n);
    multiply_rows<2>(d_p, own + own_rows * pitch, tile + 32 * pitch, pitch, n);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        p[r] = seen[r] ? expf(scores[r] * scale - lse[r]) : 0.0f;
        d_s[r] = p[r] * (d_p[r] - delta[r]) * scale;
    }
}

// d_k and d_v. A block is a tile (key, n_keys, end of the document) of 16 keys of one key:value head, a warp has two of them and meets 32
// queries at a time, one a lane.
extern "C" __global__ void __launch_bounds__(256, 1) attention_backward_keys_any(View d_k_tgn, View d_v_tgn, View d_out_thn, View q_thn, View k_tgn,
                                                                              View v_tgn, const float* lse_th, const float* delta_th,
                                                                              const uint4* tiles, u32 n_heads, u32 n_kv_heads, u32 n,
                                                                              float scale) {
    constexpr int KEYS = 16, QUERIES = 32;
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, pitch = (n + 31) / 32 * 32 + 4;
    const u32 kv_head = blockIdx.x % n_kv_heads, ratio = n_heads / n_kv_heads;
    const uint4 tile = tiles[blockIdx.x / n_kv_heads];
    const u32 first = tile.x, n_keys = tile.y, end = tile.z;
    float *keys = (float*)shared_memory, *queries = keys + 2 * KEYS * pitch;
    const i64 kv_stride = (i64)n_kv_heads * n, q_stride = (i64)n_heads * n, first_key = ((i64)first * n_kv_heads + kv_head) * n;
    load_rows(keys, KEYS, pitch, k_tgn, first_key, kv_stride, n_keys, n);
    load_rows(keys + KEYS * pitch, KEYS, pitch, v_tgn, first_key, kv_stride, n_keys, n);

    float d_k[2][8], d_v[2][8];
#pragma unroll
    for (int i = 0; i < 8; i++) d_k[0][i] = d_k[1][i] = d_v[0][i] = d_v[1][i] = 0.0f;
    for (u32 head = kv_head * ratio; head < (kv_head + 1) * ratio; head++) {
        for (u32 query = first; query < end; query += QUERIES) {
            const i64 first_query = ((i64)query * n_heads + head) * n;
            __syncthreads();
            load_rows(queries, QUERIES, pitch, q_thn, first_query, q_stride, end - query, n);
            load_rows(queries + QUERIES * pitch, QUERIES, pitch, d_out_thn, first_query, q_stride, end - query, n);
            __syncthreads();
            if (2 * warp >= n_keys) continue;
            const bool is_query = query + lane < end;
            const i64 row = (i64)(is_query ? query + lane : query) * n_heads + head;
            bool seen[2];
            float lse[2], delta[2], p[2], d_s[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                seen[r] = is_query && first + 2 * warp + r <= query + lane;
                lse[r] = lse_th[row];
                delta[r] = delta_th[row];
            }
            score_gradients(p, d_s, keys + 2 * warp * pitch, KEYS, queries, pitch, n, seen, lse, delta, scale);
            add_rows<2>(d_v, p, queries + QUERIES * pitch, pitch, n);
            add_rows<2>(d_k, d_s, queries, pitch, n);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        if (2 * warp + r >= n_keys) break;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const u32 column = lane + 32 * i;
            if (column >= n) break;
            store(d_k_tgn, first_key + (2 * warp + r) * kv_stride + column, d_k[r][i]);
            store(d_v_tgn, first_key + (2 * warp + r) * kv_stride + column, d_v[r][i]);
        }
    }
}

// d_q. A block is a tile (query, n_queries, first row of the document) of 16 queries of one head, a warp has two of them and meets 32 keys at a
// time, one a lane.
extern "C" __global__ void __launch_bounds__(256, 1) attention_backward_queries_any(View d_q_thn, View d_out_thn, View q_thn, View k_tgn,
                                                                                 View v_tgn, const float* lse_th, const float* delta_th,
                                                                                 const uint4* tiles, u32 n_heads, u32 n_kv_heads, u32 n,
                                                                                 float scale) {
    constexpr int QUERIES = 16, KEYS = 32;
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, pitch = (n + 31) / 32 * 32 + 4;
    const u32 head = blockIdx.x % n_heads, kv_head = head / (n_heads / n_kv_heads);
    const uint4 tile = tiles[blockIdx.x / n_heads];
    const u32 first = tile.x, n_queries = tile.y, end = first + n_queries;
    float *queries = (float*)shared_memory, *keys = queries + 2 * QUERIES * pitch;
    const i64 kv_stride = (i64)n_kv_heads * n, q_stride = (i64)n_heads * n, first_query = ((i64)first * n_heads + head) * n;
    load_rows(queries, QUERIES, pitch, q_thn, first_query, q_stride, n_queries, n);
    load_rows(queries + QUERIES * pitch, QUERIES, pitch, d_out_thn, first_query, q_stride, n_queries, n);

    float d_q[2][8], lse[2], delta[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const i64 row = (i64)min(first + 2 * warp + r, end - 1) * n_heads + head;
        lse[r] = lse_th[row];
        delta[r] = delta_th[row];
#pragma unroll
        for (int i = 0; i < 8; i++) d_q[r][i] = 0.0f;
    }
    for (u32 key = tile.z; key < end; key += KEYS) {
        const i64 first_key = ((i64)key * n_kv_heads + kv_head) * n;
        __syncthreads();
        load_rows(keys, KEYS, pitch, k_tgn, first_key, kv_stride, end - key, n);
        load_rows(keys + KEYS * pitch, KEYS, pitch, v_tgn, first_key, kv_stride, end - key, n);
        __syncthreads();
        if (2 * warp >= n_queries) continue;
        bool seen[2];
        float p[2], d_s[2];
#pragma unroll
        for (int r = 0; r < 2; r++) seen[r] = key + lane <= first + 2 * warp + r;
        score_gradients(p, d_s, queries + 2 * warp * pitch, QUERIES, keys, pitch, n, seen, lse, delta, scale);
        add_rows<2>(d_q, d_s, keys, pitch, n);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        if (2 * warp + r >= n_queries) break;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const u32 column = lane + 32 * i;
            if (column >= n) break;
            store(d_q_thn, first_query + (2 * warp + r) * q_stride + column, d_q[r][i]);
        }
    }
}
