// The gated delta rule in chunks of 64 tokens for bf16 inputs with 128 key and 128 value dims, on the matrix units. Letters as in
// docs/gated_delta_rule.md and gated_delta_rule.cu: W = V - Γ K S, e = W - P (beta W), D = beta e, dR = dD - Pᵀ (beta dD).
//
//   prepare   a block a chunk and key head: P and M = L ⊙ tril(Q Kᵀ) of each of its value heads, and the decays
//   scan      a block a document, value head and slice of value columns, chunk after chunk: out, or what the backward pass needs
//   reverse   the same from the last chunk to the first, carrying the gradient of the state: dR
//   gradient  a block a chunk and key head: all that remains, its value heads in order
//
// The scans hold the state transposed, [V, K], in f32 registers: a warp has 16 value columns and all keys, so what it multiplies
// comes from its own registers (as the left operand) and from tiles of shared memory that all warps read. A second warp with the
// same columns takes what does not depend on the step before, and all writes.
//
// What goes through bf16: operands of products. State, its gradient, decays and all that leads to the gates' gradients is f32.
// Scratch is indexed by token or border (see gated_delta_rule.cu) and by `head` of the n_heads value heads from first_head on:
//   p, m      [T, n_heads, CHUNK], of row i of a chunk only the columns of blocks of 16 up to the diagonal
//   decays    of a chunk [n_heads, tokens] x (exp of gates from the start, exp of gates to the end, beta, g)
//   e         of a chunk [n_heads, 8 tiles of V, tokens, 16]
//   states    [border, n_heads, 8 tiles of V, 8 steps of K, 2 of K, 2 of V, 8 of V, 8 of K], and their gradients alike

constexpr u32 CHUNK = 64, DIM = 128;
constexpr u32 NONE = 0xffffffffu;

extern __shared__ __align__(128) u8 shared[];

// ---- tiles in shared memory, in units of 16 bytes that are spread over the banks: offsets in bytes

// [.., 128]
__device__ __forceinline__ u32 wide(u32 row, u32 unit) { return row * 256 + (unit ^ (row & 7)) * 16; }
// [.., 64]
__device__ __forceinline__ u32 middle(u32 row, u32 unit) { return row * 128 + (unit ^ (row & 7)) * 16; }
// [.., 16]
__device__ __forceinline__ u32 thin(u32 row, u32 unit) { return row * 32 + (unit ^ (row >> 2 & 1)) * 16; }
// Block (i, j <= i) of 16 x 16 of a lower triangle.
__device__ __forceinline__ u32 lower(u32 i, u32 j) { return (i * (i + 1) / 2 + j) * 512; }
// f32 [.., 64]: an index of floats.
__device__ __forceinline__ u32 square(u32 row, u32 column) { return row * CHUNK + (column ^ (row & 7) << 3); }

constexpr u32 WIDE_BYTES = CHUNK * 256, LOWER_BYTES = 10 * 512, THIN_BYTES = CHUNK * 32;

// A lane's place in fragments, and the offset of the row of a 16 x 16 block that it gives to load_block: `down` first for left
// operands and transposed right ones, `across` first for right operands and transposed left ones. A block `n` units further on
// along a row is at offset ^ n * 16, one 16 n rows further down at offset + 16 n rows.
struct Lane {
    u32 group, pair, wide_down, wide_across, middle_down, middle_across, thin_down, thin_across;
};
__device__ __forceinline__ Lane this_lane() {
    u32 lane = threadIdx.x % 32, down_row = lane % 16, down_unit = lane / 16, across_row = lane / 16 * 8 + lane % 8, across_unit = lane / 8 % 2;
    return {lane / 4,
            lane % 4,
            wide(down_row, down_unit),
            wide(across_row, across_unit),
            middle(down_row, down_unit),
            middle(across_row, across_unit),
            thin(down_row, down_unit),
            thin(across_row, across_unit)};
}

// Four 8x8 bf16 matrices; lane i gives the shared address of row i % 8 of matrix i / 8 (16 bytes, aligned).
__device__ __forceinline__ void load_block(u32 (&words)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(row)
                 : "memory");
}
__device__ __forceinline__ void load_block_transposed(u32 (&words)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(row)
                 : "memory");
}
__device__ __forceinline__ u32 load_word(u32 at) {
    u32 word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(at) : "memory");
    return word;
}
// A barrier of the whole block that its warps may reach at different places of the program.
__device__ __forceinline__ void block_barrier() { asm volatile("bar.sync 1, %0;" ::"r"(blockDim.x) : "memory"); }

// Left operand of 16 x 16.
struct Fragment {
    u32 words[4];
};

// ---- copies to tiles, by THREADS threads numbered `thread`

// 16 bytes, zeros where not `valid` (then nothing is read).
__device__ __forceinline__ void copy_unit(u32 to, const u8* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
// [CHUNK, 128] from rows `pitch` elements apart.
template <u32 THREADS> __device__ __forceinline__ void copy_wide(u32 tile, const bf16* from, u64 pitch, u32 count, u32 thread) {
    constexpr u32 ROWS = THREADS / 16;
    u32 row = thread / 16, unit = thread % 16, to = tile + wide(row, unit);
    const u8* source = (const u8*)(from + row * pitch + unit * 8);
#pragma unroll
    for (u32 n = 0; n < CHUNK / ROWS; n++) {
        copy_unit((to ^ (n * ROWS & 7) << 4) + n * ROWS * 256, source + n * ROWS * 2 * pitch, row + n * ROWS < count);
    }
}
// The blocks of a lower triangle from rows of CHUNK, `pitch` elements apart.
template <u32 THREADS> __device__ __forceinline__ void copy_lower(u32 blocks, const bf16* from, u64 pitch, u32 count, u32 thread) {
    constexpr u32 ROWS = THREADS / 8;
    u32 row = thread / 8, unit = thread % 8;
    const u8* source = (const u8*)(from + row * pitch + unit * 8);
#pragma unroll
    for (u32 n = 0; n < CHUNK / ROWS; n++) {
        u32 block = n * ROWS / 16, down = n * ROWS % 16 + row;
        if (ROWS > 16) block += row / 16, down %= 16;
        u32 to = blocks + lower(block, unit / 2) + thin(down, unit % 2);
        if (unit / 2 <= block) copy_unit(to, source + n * ROWS * 2 * pitch, row + n * ROWS < count);
    }
}
// TILES x [CHUNK, 16] from rows of 16 TILES, `pitch` elements apart.
template <u32 TILES, u32 THREADS> __device__ __forceinline__ void copy_thin(u32 tiles, const bf16* from, u64 pitch, u32 count, u32 thread) {
    constexpr u32 ROWS = THREADS / (2 * TILES);
    static_assert(ROWS % 8 == 0, "all rows of a thread are spread over the banks alike");
    u32 row = thread / (2 * TILES), unit = thread % (2 * TILES), to = tiles + unit / 2 * THIN_BYTES + thin(row, unit % 2);
    const u8* source = (const u8*)(from + row * pitch + unit * 8);
#pragma unroll
    for (u32 n = 0; n < CHUNK / ROWS; n++) copy_unit(to + n * ROWS * 32, source + n * ROWS * 2 * pitch, row + n * ROWS < count);
}
template <u32 THREADS> __device__ __forceinline__ void copy_decays(u32 to, const float4* decays, u32 first, u32 count, u32 head, u32 n_heads, u32 thread) {
    const float4* from = decays + (u64)first * n_heads + head * count;
#pragma unroll
    for (u32 i = 0; i < CHUNK; i += THREADS) {
        if (i + thread < CHUNK) copy_unit(to + (i + thread) * 16, (const u8*)(from + i + thread), i + thread < count);
    }
}

// ---- products of a warp: 16 value columns, their sums with tokens (or keys) across

typedef float Tokens[8][4];
typedef float Keys[16][4];

template <u32 N> __device__ __forceinline__ void clear(float (&sums)[N][4]) {
#pragma unroll
    for (u32 n = 0; n < N; n++) sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0.0f;
}

// sums[v, token] += a[v, key] tile[token, key]
__device__ __forceinline__ void times_rows(Tokens& sums, const Fragment (&a)[8], u32 tile, const Lane& lane) {
#pragma unroll
    for (u32 step = 0; step < 8; step++) {
#pragma unroll
        for (u32 block = 0; block < 4; block++) {
            u32 b[4];
            load_block(b, tile + 4096 * block + (lane.wide_across ^ step << 5));
            mma_16816(sums[2 * block], a[step].words, b[0], b[1]);
            mma_16816(sums[2 * block + 1], a[step].words, b[2], b[3]);
        }
    }
}
// sums[v, key] += a[v, token] tile[token, key]
__device__ __forceinline__ void times_columns(Keys& sums, const Fragment (&a)[4], u32 tile, const Lane& lane) {
#pragma unroll
    for (u32 step = 0; step < 4; step++) {
#pragma unroll
        for (u32 block = 0; block < 8; block++) {
            u32 b[4];
            load_block_transposed(b, tile + 4096 * step + (lane.wide_down ^ block << 5));
            mma_16816(sums[2 * block], a[step].words, b[0], b[1]);
            mma_16816(sums[2 * block + 1], a[step].words, b[2], b[3]);
        }
    }
}
// sums[v, i] += Σ_{j <= i} a[v, j] x[i, j]
__device__ __forceinline__ void times_lower(Tokens& sums, const Fragment (&a)[4], u32 blocks, const Lane& lane) {
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
#pragma unroll
        for (u32 i = j; i < 4; i++) {
            u32 b[4];
            load_block(b, blocks + lower(i, j) + lane.thin_across);
            mma_16816(sums[2 * i], a[j].words, b[0], b[1]);
            mma_16816(sums[2 * i + 1], a[j].words, b[2], b[3]);
        }
    }
}
// sums[v, j] += Σ_{i >= j} a[v, i] x[i, j]
__device__ __forceinline__ void times_lower_transposed(Tokens& sums, const Fragment (&a)[4], u32 blocks, const Lane& lane) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
#pragma unroll
        for (u32 j = 0; j <= i; j++) {
            u32 b[4];
            load_block_transposed(b, blocks + lower(i, j) + lane.thin_down);
            mma_16816(sums[2 * j], a[i].words, b[0], b[1]);
            mma_16816(sums[2 * j + 1], a[i].words, b[2], b[3]);
        }
    }
}

// Sums as left operand of the next product: eight tokens, of which the lane's two are scaled by x and y.
__device__ __forceinline__ void to_fragment(Fragment (&a)[4], const Tokens& sums, u32 n, float x, float y) {
    a[n / 2].words[n % 2 * 2] = pack_bf16(x * sums[n][0], y * sums[n][1]);
    a[n / 2].words[n % 2 * 2 + 1] = pack_bf16(x * sums[n][2], y * sums[n][3]);
}
template <u32 N> __device__ __forceinline__ void to_fragments(Fragment (&a)[N], const float (&sums)[2 * N][4]) {
#pragma unroll
    for (u32 n = 0; n < 2 * N; n++) {
        a[n / 2].words[n % 2 * 2] = pack_bf16(sums[n][0], sums[n][1]);
        a[n / 2].words[n % 2 * 2 + 1] = pack_bf16(sums[n][2], sums[n][3]);
    }
}
template <u32 N> __device__ __forceinline__ void put_fragments(u8* to, const Fragment (&a)[N]) {
#pragma unroll
    for (u32 n = 0; n < N; n++) *(uint4*)(to + (n * 32 + threadIdx.x % 32) * 16) = make_uint4(a[n].words[0], a[n].words[1], a[n].words[2], a[n].words[3]);
}
template <u32 N> __device__ __forceinline__ void get_fragments(Fragment (&a)[N], const u8* from) {
#pragma unroll
    for (u32 n = 0; n < N; n++) {
        uint4 words = *(const uint4*)(from + (n * 32 + threadIdx.x % 32) * 16);
        a[n].words[0] = words.x, a[n].words[1] = words.y, a[n].words[2] = words.z, a[n].words[3] = words.w;
    }
}
template <u32 N> __device__ __forceinline__ void put_sums(u8* to, const float (&sums)[N][4]) {
#pragma unroll
    for (u32 n = 0; n < N; n++) *(float4*)(to + (n * 32 + threadIdx.x % 32) * 16) = make_float4(sums[n][0], sums[n][1], sums[n][2], sums[n][3]);
}
__device__ __forceinline__ float4 get_sums(const u8* from, u32 n) { return *(const float4*)(from + (n * 32 + threadIdx.x % 32) * 16); }

// 16 bf16 of row `group`, of which a lane holds 2 pair + {0, 1} in `low` and those 8 further in `high`, to 32 bytes at `row`.
__device__ __forceinline__ void store_row16(bf16* row, u32 low, u32 high, u32 pair, bool valid) {
    bool odd = pair & 1;
    u32 other = __shfl_xor_sync(0xffffffffu, odd ? low : high, 1);
    uint2 words = odd ? make_uint2(other, high) : make_uint2(low, other);
    if (valid) *(uint2*)(row + 2 * pair + (odd ? 6 : 0)) = words;
}
// [16 values, tokens] as rows of tokens, `pitch` elements apart.
__device__ __forceinline__ void store_tokens(bf16* to, u64 pitch, u32 count, const Fragment (&a)[4], const Lane& lane) {
#pragma unroll
    for (u32 n = 0; n < 8; n++) {
        u32 token = 8 * n + lane.group;
        u32 low = transpose8(a[n / 2].words[n % 2 * 2]), high = transpose8(a[n / 2].words[n % 2 * 2 + 1]);
        store_row16(to + token * pitch, low, high, lane.pair, token < count);
    }
}
__device__ __forceinline__ void store_state(bf16* to, const Fragment (&a)[8]) {
#pragma unroll
    for (u32 n = 0; n < 32; n++) ((u32*)to)[n * 32 + threadIdx.x % 32] = a[n / 4].words[n % 4];
}

// ---- pairs of tokens: a warp of eight has a strip of 16 rows and half the columns, [4 of 8 columns][4]

typedef float Pairs[4][4];

struct Place {
    u32 strip, half;
};
// Warps that share a quarter of the multiprocessor share the work below the diagonal about evenly.
__device__ __forceinline__ Place place_of_pairs() {
    u32 warp = threadIdx.x / 32;
    return {0x21001233u >> 4 * warp & 15, 0xd2u >> warp & 1};
}

// sums = x zᵀ, up to the diagonal's blocks.
__device__ __forceinline__ void pair_product(Pairs& sums, u32 x, u32 z, Place place, const Lane& lane) {
    clear(sums);
    if (2 * place.half > place.strip) return;
    bool has_second = 2 * place.half < place.strip;
#pragma unroll 2
    for (u32 step = 0; step < 8; step++) {
        u32 a[4], b[4];
        load_block(a, x + 4096 * place.strip + (lane.wide_down ^ step << 5));
        load_block(b, z + 8192 * place.half + (lane.wide_across ^ step << 5));
        mma_16816(sums[0], a, b[0], b[1]);
        mma_16816(sums[1], a, b[2], b[3]);
        if (has_second) {
            load_block(b, z + 8192 * place.half + 4096 + (lane.wide_across ^ step << 5));
            mma_16816(sums[2], a, b[0], b[1]);
            mma_16816(sums[3], a, b[2], b[3]);
        }
    }
}

// Gates of one chunk and head, zero beyond the chunk's end, and their sums in each eight tokens: up to a token, behind it, all.
struct Gates {
    float g[CHUNK], up_to[CHUNK], behind[CHUNK], all[CHUNK / 8];
};
// For token i, by its thread; every g must be there. `all` is there after another barrier.
__device__ __forceinline__ void sum_eights(Gates& gates, u32 i) {
    float up_to = 0.0f, behind = 0.0f;
#pragma unroll
    for (u32 l = 0; l < 8; l++) {
        float g = gates.g[i / 8 * 8 + l];
        if (l <= i % 8) up_to += g;
        else behind += g;
    }
    gates.up_to[i] = up_to;
    gates.behind[i] = behind;
    if (i % 8 == 7) gates.all[i / 8] = up_to;
}
// L_ij at a lane's places. Each exponent is the sum of its own gates: a difference of running sums would lose digits where the
// decay is strong. Masked before exp.
__device__ __forceinline__ void decays_between(Pairs& l_ij, const Gates& gates, Place place, const Lane& lane) {
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        u32 eight = 2 * place.strip + r, i = 8 * eight + lane.group;
        float between = 0.0f, up_to = gates.up_to[i];
        for (u32 e = 4 * place.half + 4; e < eight; e++) between += gates.all[e];
#pragma unroll
        for (u32 down = 0; down < 4; down++) {
            u32 n = 3 - down, of_j = 4 * place.half + n, j = 8 * of_j + 2 * lane.pair;
            float low = 0.0f, high = 0.0f;
            if (of_j < eight) {
                low = __expf(up_to + between + gates.behind[j]);
                high = __expf(up_to + between + gates.behind[j + 1]);
                between += gates.all[of_j];
            } else if (of_j == eight) {
                float sum = 0.0f;
                for (u32 l = i; l > j; l--) {
                    if (l == j + 1) high = __expf(sum);
                    sum += gates.g[l];
                }
                low = j <= i ? __expf(sum) : 0.0f;
            }
            l_ij[n][2 * r] = low;
            l_ij[n][2 * r + 1] = high;
        }
    }
}

// ---- prepare

struct Prepare {
    u8 queries[WIDE_BYTES], keys[WIDE_BYTES];
    float products[CHUNK * CHUNK];
    Gates gates[2];
    float beta[2][CHUNK];
};
static_assert(sizeof(Prepare) == 51264, "as cuda.rs says");

// Rows of a lane's places to [token, CHUNK] rows `pitch` elements apart.
__device__ __forceinline__ void store_pairs(bf16* to, u64 pitch, u32 count, const Pairs& x, Place place, const Lane& lane) {
#pragma unroll
    for (u32 block = 0; block < 2; block++) {
        u32 column = 2 * place.half + block;
        if (column > place.strip) continue;
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
            u32 row = 16 * place.strip + 8 * r + lane.group;
            u32 low = pack_bf16(x[2 * block][2 * r], x[2 * block][2 * r + 1]);
            u32 high = pack_bf16(x[2 * block + 1][2 * r], x[2 * block + 1][2 * r + 1]);
            store_row16(to + row * pitch + 16 * column, low, high, lane.pair, row < count);
        }
    }
}

// Column j of P without decays, by two lanes of a warp, 16 apart: one has the even rows (odd = 0), the other the odd ones. They read
// no other lane's.
__device__ __forceinline__ void solve_column(float* p, const float* n, const float* beta, u32 j, u32 odd) {
#pragma unroll 1
    for (u32 block = j / 16; block < 4; block++) {
        float sums[8];
#pragma unroll
        for (u32 i = 0; i < 8; i++) {
            u32 row = 16 * block + 2 * i + odd;
            sums[i] = j < row ? n[square(row, j)] : 0.0f;
        }
#pragma unroll 1
        for (u32 l = j / 16 * 16; l < 16 * block; l += 4) {
            float x[4];
#pragma unroll
            for (u32 c = 0; c < 4; c++) x[c] = beta[l + c] * p[square(l + c, j)];
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
                float4 f = *(const float4*)&n[square(16 * block + 2 * i + odd, l)];
                sums[i] -= f.x * x[0] + f.y * x[1] + f.z * x[2] + f.w * x[3];
            }
        }
#pragma unroll
        for (u32 r = 0; r < 16; r++) {
            u32 row = 16 * block + r;
            float solved = __shfl_sync(0xffffffffu, sums[r / 2], r % 2 * 16 + threadIdx.x % 16);
            if (odd == r % 2) p[square(row, j)] = solved;
            float x = beta[row] * solved;
            if (r % 2 == 0 && odd) sums[r / 2] -= n[square(row + 1, row)] * x;
#pragma unroll
            for (u32 i = r / 2 + 1; i < 8; i++) sums[i] -= n[square(16 * block + 2 * i + odd, row)] * x;
        }
        __syncwarp();
    }
}

extern "C" __global__ void __launch_bounds__(256, 2) gated_delta_rule_bf16_prepare(bf16* p, bf16* m, float4* decays, const bf16* q_tgk,
                                                                             const bf16* k_tgk, const float* g_th, const float* beta_th,
                                                                             const uint4* chunks, u32 H, u32 G, u32 first_head, u32 n_heads) {
    Prepare& own = *(Prepare*)shared;
    u32 ratio = H / G, n_key_heads = n_heads / ratio;
    uint4 chunk = chunks[blockIdx.x / n_key_heads];
    u32 first = chunk.x, count = chunk.y, of_key = blockIdx.x % n_key_heads * ratio, key_head = (first_head + of_key) / ratio;
    Lane lane = this_lane();
    Place place = place_of_pairs();
    u32 side = threadIdx.x / 128, i = threadIdx.x % 128;

    copy_wide<256>(shared_address(own.queries), q_tgk + ((u64)first * G + key_head) * DIM, (u64)G * DIM, count, threadIdx.x);
    copy_wide<256>(shared_address(own.keys), k_tgk + ((u64)first * G + key_head) * DIM, (u64)G * DIM, count, threadIdx.x);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    Pairs qk, kk;
    pair_product(qk, shared_address(own.queries), shared_address(own.keys), place, lane);
    pair_product(kk, shared_address(own.keys), shared_address(own.keys), place, lane);
#pragma unroll
    for (u32 n = 0; n < 4; n++) {
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
            u32 row = 16 * place.strip + 8 * r + lane.group, column = 32 * place.half + 8 * n + 2 * lane.pair;
            float2 two = make_float2(column < row ? kk[n][2 * r] : 0.0f, column + 1 < row ? kk[n][2 * r + 1] : 0.0f);
            *(float2*)&own.products[square(row, column)] = two;
        }
    }

    // Two heads at a time, a half of the threads each for the gates and the solution, which takes the place of the queries and keys.
    for (u32 head_of_key = 0; head_of_key < ratio; head_of_key += 2) {
        u32 n_sides = min(ratio - head_of_key, 2u);
        bool is_in = side < n_sides && i < CHUNK;
        u32 head = of_key + head_of_key + side;
        Gates& gates = own.gates[side];
        __syncthreads();
        if (is_in) {
            u64 at = (u64)(first + i) * H + first_head + head;
            gates.g[i] = i < count ? g_th[at] : 0.0f;
            own.beta[side][i] = i < count ? beta_th[at] : 0.0f;
        }
        __syncthreads();
        if (is_in) sum_eights(gates, i);
        // A warp has 16 columns.
        if (side < n_sides) solve_column((float*)(side == 0 ? own.queries : own.keys), own.products, own.beta[side], i / 32 * 16 + i % 16, i / 16 % 2);
        __syncthreads();
        if (is_in && i < count) {
            float from_start = gates.up_to[i], to_end = gates.behind[i];
            for (u32 e = 0; e < CHUNK / 8; e++) {
                if (e < i / 8) from_start += gates.all[e];
                if (e > i / 8) to_end += gates.all[e];
            }
            decays[(u64)first * n_heads + head * count + i] = make_float4(__expf(from_start), __expf(to_end), own.beta[side][i], gates.g[i]);
        }
        for (u32 s = 0; s < n_sides; s++) {
            const float* solved = (const float*)(s == 0 ? own.queries : own.keys);
            u64 to = ((u64)first * n_heads + of_key + head_of_key + s) * CHUNK;
            Pairs l_ij, x;
            decays_between(l_ij, own.gates[s], place, lane);
#pragma unroll
            for (u32 n = 0; n < 4; n++) {
#pragma unroll
                for (u32 c = 0; c < 4; c++) x[n][c] = l_ij[n][c] * qk[n][c];
            }
            store_pairs(m + to, (u64)n_heads * CHUNK, count, x, place, lane);
#pragma unroll
            for (u32 n = 0; n < 4; n++) {
#pragma unroll
                for (u32 r = 0; r < 2; r++) {
                    u32 row = 16 * place.strip + 8 * r + lane.group, column = 32 * place.half + 8 * n + 2 * lane.pair;
                    // Above the diagonal's blocks nothing was solved.
                    float2 two = 2 * place.half + n / 2 <= place.strip ? *(const float2*)&solved[square(row, column)] : make_float2(0.0f, 0.0f);
                    x[n][2 * r] = l_ij[n][2 * r] * two.x;
                    x[n][2 * r + 1] = l_ij[n][2 * r + 1] * two.y;
                }
            }
            store_pairs(p + to, (u64)n_heads * CHUNK, count, x, place, lane);
        }
    }
}

// ---- scan

// Warps 0.. hold the state, warps TILES.. are their helpers.
template <u32 TILES> struct Scan {
    u8 keys[2][WIDE_BYTES], queries[2][WIDE_BYTES], m[2][LOWER_BYTES], p[LOWER_BYTES];
    // Of a tile used up, the place of D (or e).
    u8 values[2][TILES][THIN_BYTES];
    u8 states[TILES][8 * 512];
    float4 decays[2][CHUNK];
};

static_assert(sizeof(Scan<1>) == 91136 && sizeof(Scan<2>) == 99328, "as cuda.rs says");

// Without SAVES: out [T, H, V], and state_hkv (f32, may be null) read first and written last. With SAVES: e and states.
template <u32 TILES, bool SAVES>
__device__ __forceinline__ void scan(bf16* out_thv, float* state_hkv, bf16* e, bf16* states, const bf16* q_tgk, const bf16* k_tgk,
                                     const bf16* v_thv, const bf16* p, const bf16* m, const float4* decays, const uint4* documents, u32 H,
                                     u32 G, u32 first_head, u32 n_heads) {
    Scan<TILES>& own = *(Scan<TILES>*)shared;
    constexpr u32 N_SLICES = 8 / TILES;
    u32 slice = blockIdx.x % N_SLICES, head = blockIdx.x / N_SLICES % n_heads, h = first_head + head, key_head = h / (H / G);
    uint4 document = documents[blockIdx.x / (N_SLICES * n_heads)];
    u32 n_chunks = (document.y + CHUNK - 1) / CHUNK;
    u32 warp = threadIdx.x / 32, tile = warp % TILES, value_tile = slice * TILES + tile;
    bool is_helper = warp >= TILES;
    // Of the helpers, which do all copies.
    u32 thread = threadIdx.x - 32 * TILES;
    Lane lane = this_lane();

    auto copy = [&](u32 idx) {
        u32 first = document.x + idx * CHUNK, count = min(CHUNK, document.y - idx * CHUNK);
        u64 row = ((u64)first * G + key_head) * DIM;
        copy_wide<32 * TILES>(shared_address(own.keys[idx & 1]), k_tgk + row, (u64)G * DIM, count, thread);
        if (!SAVES) {
            copy_wide<32 * TILES>(shared_address(own.queries[idx & 1]), q_tgk + row, (u64)G * DIM, count, thread);
            copy_lower<32 * TILES>(shared_address(own.m[idx & 1]), m + ((u64)first * n_heads + head) * CHUNK, (u64)n_heads * CHUNK, count, thread);
        }
        copy_thin<TILES, 32 * TILES>(shared_address(own.values[idx & 1]), v_thv + ((u64)first * H + h) * DIM + slice * TILES * 16, (u64)H * DIM, count, thread);
        copy_decays<32 * TILES>(shared_address(own.decays[idx & 1]), decays, first, count, head, n_heads, thread);
    };
    auto copy_p = [&](u32 idx) {
        u32 first = document.x + idx * CHUNK, count = min(CHUNK, document.y - idx * CHUNK);
        copy_lower<32 * TILES>(shared_address(own.p), p + ((u64)first * n_heads + head) * CHUNK, (u64)n_heads * CHUNK, count, thread);
    };

    u32 key_tiles = shared_address(own.keys), query_tiles = shared_address(own.queries), m_blocks = shared_address(own.m);
    u32 p_blocks = shared_address(own.p);
    // The roles meet twice a chunk: when its tiles are there, and when P and the values are used up and e is there.
    bool starts_empty = SAVES || !state_hkv;

    if (is_helper) {
        copy(0);
        copy_p(0);
        copy_async_commit();
        for (u32 idx = 0; idx < n_chunks; idx++) {
            u32 first = document.x + idx * CHUNK, count = min(CHUNK, document.y - idx * CHUNK), stage = idx & 1;
            const u8* exchange = own.values[stage][tile];
            copy_async_wait<0>();
            block_barrier();
            if (idx + 1 < n_chunks) copy(idx + 1);
            copy_async_commit();
            Tokens out;
            Fragment d[4];
            if (SAVES) {
                if (idx > 0) {
                    Fragment a[8];
                    get_fragments(a, own.states[tile]);
                    store_state(states + (((u64)(document.z + idx - 1) * n_heads + head) * 8 + value_tile) * 16 * DIM, a);
                }
            } else {
                // 1. out from the state
                clear(out);
                if (idx > 0 || !starts_empty) {
                    Fragment a[8];
                    get_fragments(a, own.states[tile]);
                    times_rows(out, a, query_tiles + stage * WIDE_BYTES, lane);
#pragma unroll
                    for (u32 n = 0; n < 8; n++) {
                        float x = own.decays[stage][8 * n + 2 * lane.pair].x, y = own.decays[stage][8 * n + 2 * lane.pair + 1].x;
                        out[n][0] *= x, out[n][1] *= y, out[n][2] *= x, out[n][3] *= y;
                    }
                }
            }
            block_barrier();
            if (idx + 1 < n_chunks) copy_p(idx + 1);
            copy_async_commit();
            get_fragments(d, exchange);
            if (SAVES) {
                store_tokens(e + (u64)first * n_heads * DIM + ((u64)head * 8 + value_tile) * count * 16, 16, count, d, lane);
            } else {
                // 2. out from the chunk itself
                times_lower(out, d, m_blocks + stage * LOWER_BYTES, lane);
                to_fragments(d, out);
                store_tokens(out_thv + ((u64)first * H + h) * DIM + 16 * value_tile, (u64)H * DIM, count, d, lane);
            }
        }
        return;
    }

    // The state [16 values, keys].
    Keys s;
    Fragment a[8];
    auto place_of = [&](u32 n, u32 c) {
        return ((u64)h * DIM + 8 * n + 2 * lane.pair + c % 2) * DIM + 16 * value_tile + lane.group + c / 2 * 8;
    };
#pragma unroll
    for (u32 n = 0; n < 16; n++) {
#pragma unroll
        for (u32 c = 0; c < 4; c++) s[n][c] = starts_empty ? 0.0f : state_hkv[place_of(n, c)];
    }
    to_fragments(a, s);
    put_fragments(own.states[tile], a);
    for (u32 idx = 0; idx < n_chunks; idx++) {
        u32 count = min(CHUNK, document.y - idx * CHUNK), stage = idx & 1;
        const float4* decay = own.decays[stage];
        u8* exchange = own.values[stage][tile];
        u32 keys = key_tiles + stage * WIDE_BYTES;
        block_barrier();

        // 1. W
        Tokens w;
        Fragment d[4];
        clear(w);
        if (idx > 0 || !starts_empty) times_rows(w, a, keys, lane);
#pragma unroll
        for (u32 block = 0; block < 4; block++) {
            u32 v[4];
            load_block_transposed(v, shared_address(exchange) + 512 * block + lane.thin_across);
#pragma unroll
            for (u32 c = 0; c < 2; c++) {
                u32 n = 2 * block + c;
                float4 x = decay[8 * n + 2 * lane.pair], y = decay[8 * n + 2 * lane.pair + 1];
                w[n][0] = low_bf16(v[2 * c]) - x.x * w[n][0];
                w[n][1] = high_bf16(v[2 * c]) - y.x * w[n][1];
                w[n][2] = low_bf16(v[2 * c + 1]) - x.x * w[n][2];
                w[n][3] = high_bf16(v[2 * c + 1]) - y.x * w[n][3];
                to_fragment(d, w, n, -x.z, -y.z);
            }
        }
        // 2. e
        times_lower(w, d, p_blocks, lane);
        __syncwarp();
        Fragment behind[4];
#pragma unroll
        for (u32 n = 0; n < 8; n++) {
            float4 x = decay[8 * n + 2 * lane.pair], y = decay[8 * n + 2 * lane.pair + 1];
            to_fragment(d, w, n, SAVES ? 1.0f : x.z, SAVES ? 1.0f : y.z);
            to_fragment(behind, w, n, x.y * x.z, y.y * y.z);
        }
        put_fragments(exchange, d);
        block_barrier();

        // 3. the state behind the chunk
        if (idx + 1 < n_chunks || !starts_empty) {
            float whole = decay[count - 1].x;
#pragma unroll
            for (u32 n = 0; n < 16; n++) s[n][0] *= whole, s[n][1] *= whole, s[n][2] *= whole, s[n][3] *= whole;
            times_columns(s, behind, keys, lane);
            to_fragments(a, s);
            put_fragments(own.states[tile], a);
        }
    }
    if (!starts_empty) {
#pragma unroll
        for (u32 n = 0; n < 16; n++) {
#pragma unroll
            for (u32 c = 0; c < 4; c++) state_hkv[place_of(n, c)] = s[n][c];
        }
    }
}

#define SCAN(tiles)                                                                                                                    \
    extern "C" __global__ void __launch_bounds__(64 * tiles) gated_delta_rule_bf16_scan_##tiles(                                       \
        bf16* out_thv, float* state_hkv, const bf16* q_tgk, const bf16* k_tgk, const bf16* v_thv, const bf16* p, const bf16* m,        \
        const float4* decays, const uint4* documents, u32 H, u32 G, u32 first_head, u32 n_heads) {                                     \
        scan<tiles, false>(out_thv, state_hkv, nullptr, nullptr, q_tgk, k_tgk, v_thv, p, m, decays, documents, H, G, first_head,       \
                           n_heads);                                                                                                   \
    }                                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(64 * tiles) gated_delta_rule_bf16_again_##tiles(                                      \
        bf16* e, bf16* states, const bf16* k_tgk, const bf16* v_thv, const bf16* p, const float4* decays, const uint4* documents,      \
        u32 H, u32 G, u32 first_head, u32 n_heads) {                                                                                   \
        scan<tiles, true>(nullptr, nullptr, e, states, nullptr, k_tgk, v_thv, p, nullptr, decays, documents, H, G, first_head,         \
                          n_heads);                                                                                                    \
    }
SCAN(1)
SCAN(2)

// ---- reverse

template <u32 TILES> struct Reverse {
    u8 keys[2][WIDE_BYTES], queries[WIDE_BYTES], m[LOWER_BYTES], p[2][LOWER_BYTES];
    u8 d_outs[2][TILES][THIN_BYTES];
    float4 decays[2][CHUNK];
    // Mᵀ dO, then dR; (Γ Q)ᵀ dO, then the gradient of the state behind the chunk. A lane reads and writes its own places alone.
    u8 by_pairs[TILES][8 * 512], by_state[TILES][16 * 512];
};

static_assert(sizeof(Reverse<1>) == 82944 && sizeof(Reverse<2>) == 99328, "as cuda.rs says");

// dR to d_r_thv [T, H, V], gradients of states to d_states.
template <u32 TILES>
__device__ __forceinline__ void reverse(bf16* d_r_thv, bf16* d_states, const bf16* d_out_thv, const bf16* q_tgk, const bf16* k_tgk, const bf16* p,
                                        const bf16* m, const float4* decays, const uint4* documents, u32 H, u32 G, u32 first_head, u32 n_heads) {
    Reverse<TILES>& own = *(Reverse<TILES>*)shared;
    constexpr u32 N_SLICES = 8 / TILES;
    u32 slice = blockIdx.x % N_SLICES, head = blockIdx.x / N_SLICES % n_heads, h = first_head + head, key_head = h / (H / G);
    uint4 document = documents[blockIdx.x / (N_SLICES * n_heads)];
    u32 n_chunks = (document.y + CHUNK - 1) / CHUNK;
    u32 warp = threadIdx.x / 32, tile = warp % TILES, value_tile = slice * TILES + tile;
    bool is_helper = warp >= TILES;
    // Of the helpers, which do all copies.
    u32 thread = threadIdx.x - 32 * TILES;
    Lane lane = this_lane();

    auto copy = [&](u32 idx) {
        u32 first = document.x + idx * CHUNK, count = min(CHUNK, document.y - idx * CHUNK);
        copy_wide<32 * TILES>(shared_address(own.keys[idx & 1]), k_tgk + ((u64)first * G + key_head) * DIM, (u64)G * DIM, count, thread);
        copy_lower<32 * TILES>(shared_address(own.p[idx & 1]), p + ((u64)first * n_heads + head) * CHUNK, (u64)n_heads * CHUNK, count, thread);
        copy_thin<TILES, 32 * TILES>(shared_address(own.d_outs[idx & 1]), d_out_thv + ((u64)first * H + h) * DIM + slice * TILES * 16, (u64)H * DIM, count, thread);
        copy_decays<32 * TILES>(shared_address(own.decays[idx & 1]), decays, first, count, head, n_heads, thread);
    };
    auto copy_queries = [&](u32 idx) {
        u32 first = document.x + idx * CHUNK, count = min(CHUNK, document.y - idx * CHUNK);
        copy_wide<32 * TILES>(shared_address(own.queries), q_tgk + ((u64)first * G + key_head) * DIM, (u64)G * DIM, count, thread);
    };
    auto copy_m = [&](u32 idx) {
        u32 first = document.x + idx * CHUNK, count = min(CHUNK, document.y - idx * CHUNK);
        copy_lower<32 * TILES>(shared_address(own.m), m + ((u64)first * n_heads + head) * CHUNK, (u64)n_heads * CHUNK, count, thread);
    };
    auto store_d_r = [&](u32 idx) {
        u32 first = document.x + idx * CHUNK, count = min(CHUNK, document.y - idx * CHUNK);
        Fragment r[4];
        get_fragments(r, own.by_pairs[tile]);
        store_tokens(d_r_thv + ((u64)first * H + h) * DIM + 16 * value_tile, (u64)H * DIM, count, r, lane);
    };

    u32 key_tiles = shared_address(own.keys), p_blocks = shared_address(own.p);
    // The roles meet twice a chunk: when its tiles (but the queries) and (Γ Q)ᵀ dO are there, and when M is used up and the queries
    // and Mᵀ dO are there.
    if (is_helper) {
        copy(n_chunks - 1);
        copy_m(n_chunks - 1);
        copy_async_commit();
        for (u32 idx = n_chunks; idx-- > 0;) {
            u32 stage = idx & 1;
            bool is_last = idx + 1 == n_chunks;
            copy_async_wait<0>();
            block_barrier();
            copy_queries(idx);
            copy_async_commit();
            if (idx > 0) copy(idx - 1);
            copy_async_commit();
            // 1. Mᵀ dO
            if (!is_last) store_d_r(idx + 1);
            Fragment d[4];
#pragma unroll
            for (u32 step = 0; step < 4; step++) {
                load_block_transposed(d[step].words, shared_address(own.d_outs[stage][tile]) + 512 * step + lane.thin_across);
            }
            Tokens by_pairs;
            clear(by_pairs);
            times_lower_transposed(by_pairs, d, shared_address(own.m), lane);
            put_sums(own.by_pairs[tile], by_pairs);
            copy_async_wait<1>();
            block_barrier();
            if (idx > 0) copy_m(idx - 1);
            copy_async_commit();
            if (!is_last) {
                Fragment a[8];
                get_fragments(a, own.by_state[tile]);
                store_state(d_states + (((u64)(document.z + idx) * n_heads + head) * 8 + value_tile) * 16 * DIM, a);
            }
            // 2. (Γ Q)ᵀ dO
            if (idx > 0) {
#pragma unroll
                for (u32 n = 0; n < 8; n++) {
                    float x = own.decays[stage][8 * n + 2 * lane.pair].x, y = own.decays[stage][8 * n + 2 * lane.pair + 1].x;
                    u32 &low = d[n / 2].words[n % 2 * 2], &high = d[n / 2].words[n % 2 * 2 + 1];
                    low = pack_bf16(x * low_bf16(low), y * high_bf16(low));
                    high = pack_bf16(x * low_bf16(high), y * high_bf16(high));
                }
                Keys by_state;
                clear(by_state);
                times_columns(by_state, d, shared_address(own.queries), lane);
                put_sums(own.by_state[tile], by_state);
            }
        }
        block_barrier();
        store_d_r(0);
        return;
    }

    // The gradient of the state [16 values, keys].
    Keys s;
    clear(s);
    for (u32 idx = n_chunks; idx-- > 0;) {
        u32 count = min(CHUNK, document.y - idx * CHUNK), stage = idx & 1, keys = key_tiles + stage * WIDE_BYTES;
        const float4* decay = own.decays[stage];
        block_barrier();
        // 1. K dS
        Tokens w;
        Fragment d[4];
        clear(w);
        if (idx + 1 < n_chunks) {
            Fragment a[8];
#pragma unroll
            for (u32 n = 0; n < 16; n++) {
                float4 x = get_sums(own.by_state[tile], n);
                s[n][0] += x.x, s[n][1] += x.y, s[n][2] += x.z, s[n][3] += x.w;
            }
            to_fragments(a, s);
            put_fragments(own.by_state[tile], a);
            times_rows(w, a, keys, lane);
        }
        block_barrier();
        // 2. dD, dR
#pragma unroll
        for (u32 n = 0; n < 8; n++) {
            float4 x = decay[8 * n + 2 * lane.pair], y = decay[8 * n + 2 * lane.pair + 1], z = get_sums(own.by_pairs[tile], n);
            w[n][0] = x.y * w[n][0] + z.x;
            w[n][1] = y.y * w[n][1] + z.y;
            w[n][2] = x.y * w[n][2] + z.z;
            w[n][3] = y.y * w[n][3] + z.w;
            to_fragment(d, w, n, -x.z, -y.z);
        }
        times_lower_transposed(w, d, p_blocks + stage * LOWER_BYTES, lane);
        to_fragments(d, w);
        put_fragments(own.by_pairs[tile], d);
        // 3. the gradient of the state before the chunk, but for what the queries give
        if (idx > 0) {
#pragma unroll
            for (u32 n = 0; n < 8; n++) {
                float4 x = decay[8 * n + 2 * lane.pair], y = decay[8 * n + 2 * lane.pair + 1];
                to_fragment(d, w, n, -x.z * x.x, -y.z * y.x);
            }
            float whole = decay[count - 1].x;
#pragma unroll
            for (u32 n = 0; n < 16; n++) s[n][0] *= whole, s[n][1] *= whole, s[n][2] *= whole, s[n][3] *= whole;
            times_columns(s, d, keys, lane);
        }
    }
    block_barrier();
}

#define REVERSE(tiles)                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(64 * tiles) gated_delta_rule_bf16_reverse_##tiles(                                    \
        bf16* d_r_thv, bf16* d_states, const bf16* d_out_thv, const bf16* q_tgk, const bf16* k_tgk, const bf16* p, const bf16* m,      \
        const float4* decays, const uint4* documents, u32 H, u32 G, u32 first_head, u32 n_heads) {                                     \
        reverse<tiles>(d_r_thv, d_states, d_out_thv, q_tgk, k_tgk, p, m, decays, documents, H, G, first_head, n_heads);                \
    }
REVERSE(1)
REVERSE(2)

// ---- gradient

struct Gradient {
    u8 queries[WIDE_BYTES], keys[WIDE_BYTES];
    // Of the value head in hand.
    u8 d_outs[WIDE_BYTES], d_rs[WIDE_BYTES], es[WIDE_BYTES];
    // In turn: gradients of the logs of decays between tokens, f32 [CHUNK, CHUNK]; what all heads give to Q Kᵀ and to K Kᵀ;
    // half the keys of the state before the chunk and of the gradient behind it, [DIM, 64].
    u8 room[16384];
    float4 decays[CHUNK];
    union {
        // While pairs are in hand.
        Gates gates;
        // Gradients of the logs of decays from the start and to the end, sums over half of the keys each; of the whole chunk's, a
        // number a warp.
        struct {
            float from_start[2][CHUNK], to_end[2][CHUNK], through[8];
        };
    };
};

static_assert(sizeof(Gradient) == 100384, "as cuda.rs says");

__device__ __forceinline__ void copy_head(Gradient& own, const bf16* d_out_thv, const bf16* d_r_thv, const bf16* e, const float4* decays, u32 first,
                                          u32 count, u32 head, u32 h, u32 H, u32 n_heads) {
    u64 row = ((u64)first * H + h) * DIM;
    copy_wide<256>(shared_address(own.d_outs), d_out_thv + row, (u64)H * DIM, count, threadIdx.x);
    copy_wide<256>(shared_address(own.d_rs), d_r_thv + row, (u64)H * DIM, count, threadIdx.x);
    // Two tiles of 16 values at a time.
    u32 tile = threadIdx.x / 128, token = threadIdx.x / 2 % CHUNK, unit = threadIdx.x % 2, to = shared_address(own.es);
    const bf16* from = e + (u64)first * n_heads * DIM + (head * 8 + tile) * count * 16 + token * 16 + unit * 8;
#pragma unroll
    for (u32 n = 0; n < 4; n++) copy_unit(to + wide(token, 2 * tile + 4 * n + unit), (const u8*)(from + n * 32 * count), token < count);
    copy_decays<256>(shared_address(own.decays), decays, first, count, head, n_heads, threadIdx.x);
}

// Keys 64 half.. of a state.
__device__ __forceinline__ void copy_half_state(u32 room, const bf16* state, u32 half) {
    u32 tile = threadIdx.x / 128, within = threadIdx.x % 128, step = within / 32, word = within / 8 % 4, row = within % 8;
    u32 to = room + middle(16 * tile + word % 2 * 8 + row, 2 * step + word / 2);
    const u8* from = (const u8*)state + ((tile * 8 + 4 * half) * 32 + within) * 16;
#pragma unroll
    for (u32 n = 0; n < 4; n++) copy_unit(to + n * 4096, from + n * 8192, true);
}

// sums[token, key] = Σ_v x[token, v] state[v, key], for 16 tokens and 32 of the keys in `room`.
__device__ __forceinline__ void times_state(Pairs& sums, u32 x, u32 room, u32 strip, u32 quarter, const Lane& lane) {
    clear(sums);
#pragma unroll 4
    for (u32 step = 0; step < 8; step++) {
        u32 a[4], b[4];
        load_block(a, x + 4096 * strip + (lane.wide_down ^ step << 5));
#pragma unroll
        for (u32 block = 0; block < 2; block++) {
            load_block_transposed(b, room + 2048 * step + (lane.middle_down ^ (2 * quarter + block) << 5));
            mma_16816(sums[2 * block], a, b[0], b[1]);
            mma_16816(sums[2 * block + 1], a, b[2], b[3]);
        }
    }
}

// to += factor x, and the products of x with two rows 8 apart of a [.., DIM] tile, added up over a lane's columns; `row` is the
// address of its first two columns in the first row.
__device__ __forceinline__ float2 add_scaled(Pairs& to, const Pairs& x, float factor0, float factor1, u32 row) {
    float2 dots = make_float2(0.0f, 0.0f);
#pragma unroll
    for (u32 n = 0; n < 4; n++) {
        u32 two0 = load_word(row ^ n << 4), two1 = load_word((row ^ n << 4) + 2048);
        dots.x += low_bf16(two0) * x[n][0] + high_bf16(two0) * x[n][1];
        dots.y += low_bf16(two1) * x[n][2] + high_bf16(two1) * x[n][3];
        to[n][0] += factor0 * x[n][0], to[n][1] += factor0 * x[n][1];
        to[n][2] += factor1 * x[n][2], to[n][3] += factor1 * x[n][3];
    }
    return dots;
}

__device__ __forceinline__ void swap(float& a, float& b) {
    float c = a;
    a = b;
    b = c;
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

extern "C" __global__ void __launch_bounds__(256, 2) gated_delta_rule_bf16_gradient(bf16* d_q_tgk, bf16* d_k_tgk, bf16* d_v_thv, float* d_g_th,
                                                                                 float* d_beta_th, const bf16* d_out_thv, const bf16* q_tgk,
                                                                                 const bf16* k_tgk, const float4* decays, const bf16* e,
                                                                                 const bf16* states, const bf16* d_states, const uint4* chunks,
                                                                                 u32 H, u32 G, u32 first_head, u32 n_heads) {
    Gradient& own = *(Gradient*)shared;
    u32 ratio = H / G, n_key_heads = n_heads / ratio;
    uint4 chunk = chunks[blockIdx.x / n_key_heads];
    u32 first = chunk.x, count = chunk.y, of_key = blockIdx.x % n_key_heads * ratio, key_head = (first_head + of_key) / ratio;
    u32 warp = threadIdx.x / 32, lane_idx = threadIdx.x % 32;
    Lane lane = this_lane();
    // What the heads give to Q Kᵀ and to K Kᵀ: lower triangles of [CHUNK, CHUNK].
    u8 *d_qks = own.room, *d_kks = own.room + 8192;
    u32 queries = shared_address(own.queries), keys = shared_address(own.keys), d_outs = shared_address(own.d_outs);
    u32 d_rs = shared_address(own.d_rs), es = shared_address(own.es), room = shared_address(own.room);

    copy_wide<256>(queries, q_tgk + ((u64)first * G + key_head) * DIM, (u64)G * DIM, count, threadIdx.x);
    copy_wide<256>(keys, k_tgk + ((u64)first * G + key_head) * DIM, (u64)G * DIM, count, threadIdx.x);
    copy_head(own, d_out_thv, d_v_thv, e, decays, first, count, of_key, first_head + of_key, H, n_heads);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();

    // 1. the pairs of tokens inside the chunk, all value heads
    {
        Place place = place_of_pairs();
        Pairs qk, kk, d_qk, d_kk;
        pair_product(qk, queries, keys, place, lane);
        pair_product(kk, keys, keys, place, lane);
        clear(d_qk);
        clear(d_kk);
#pragma unroll 1
        for (u32 r = 0; r < ratio; r++) {
            u32 h = first_head + of_key + r;
            if (r > 0) {
                __syncthreads();
                copy_head(own, d_out_thv, d_v_thv, e, decays, first, count, of_key + r, h, H, n_heads);
                copy_async_commit();
                copy_async_wait<0>();
                __syncthreads();
            }
            if (threadIdx.x < CHUNK) own.gates.g[threadIdx.x] = own.decays[threadIdx.x].w;
            __syncthreads();
            if (threadIdx.x < CHUNK) sum_eights(own.gates, threadIdx.x);
            __syncthreads();
            float* spans = (float*)own.room;
            Pairs l_ij, sums;
            decays_between(l_ij, own.gates, place, lane);
            pair_product(sums, d_outs, es, place, lane);
#pragma unroll
            for (u32 n = 0; n < 4; n++) {
#pragma unroll
                for (u32 c = 0; c < 4; c++) {
                    u32 i = 16 * place.strip + c / 2 * 8 + lane.group, j = 32 * place.half + 8 * n + 2 * lane.pair + c % 2;
                    l_ij[n][c] *= own.decays[j].z;
                    float x = sums[n][c] * l_ij[n][c];
                    d_qk[n][c] += x;
                    // The diagonal holds no decay.
                    spans[square(i, j)] = j < i ? x * qk[n][c] : 0.0f;
                }
            }
            pair_product(sums, d_rs, es, place, lane);
#pragma unroll
            for (u32 n = 0; n < 4; n++) {
#pragma unroll
                for (u32 c = 0; c < 4; c++) {
                    u32 i = 16 * place.strip + c / 2 * 8 + lane.group, j = 32 * place.half + 8 * n + 2 * lane.pair + c % 2;
                    float x = j < i ? -own.decays[i].z * sums[n][c] * l_ij[n][c] : 0.0f;
                    d_kk[n][c] += x;
                    spans[square(i, j)] += x * kk[n][c];
                    if (j == i && i < count) d_beta_th[(u64)(first + i) * H + h] = sums[n][c];
                }
            }
            __syncthreads();
            // A span (j, i] gives its gradient to the gates inside it and to no other, so that a strong gate's tiny gradient is never
            // the difference of two large sums. A lane has the gates 2 lane and 2 lane + 1, a warp eight rows.
            float2 gates = make_float2(0.0f, 0.0f);
#pragma unroll
            for (u32 row = 0; row < 8; row++) {
                u32 i = 8 * warp + row;
                float2 span = *(const float2*)&spans[square(i, 2 * lane_idx)];
                float sum = span.x + span.y;
#pragma unroll
                for (u32 offset = 1; offset < 32; offset <<= 1) {
                    float other = __shfl_up_sync(0xffffffffu, sum, offset);
                    if (lane_idx >= offset) sum += other;
                }
                float before = __shfl_up_sync(0xffffffffu, sum, 1);
                if (lane_idx == 0) before = 0.0f;
                if (2 * lane_idx <= i) gates.x += before;
                if (2 * lane_idx + 1 <= i) gates.y += before + span.x;
            }
            __syncthreads();
            *(float2*)&spans[warp * CHUNK + 2 * lane_idx] = gates;
            __syncthreads();
            if (threadIdx.x < count) {
                float sum = 0.0f;
                for (u32 w = 0; w < 8; w++) sum += spans[w * CHUNK + threadIdx.x];
                d_g_th[(u64)(first + threadIdx.x) * H + h] = sum;
            }
        }
        __syncthreads();
#pragma unroll
        for (u32 n = 0; n < 4; n++) {
#pragma unroll
            for (u32 r8 = 0; r8 < 2; r8++) {
                u32 at = middle(16 * place.strip + 8 * r8 + lane.group, 4 * place.half + n) + 4 * lane.pair;
                *(u32*)(d_qks + at) = pack_bf16(d_qk[n][2 * r8], d_qk[n][2 * r8 + 1]);
                *(u32*)(d_kks + at) = pack_bf16(d_kk[n][2 * r8], d_kk[n][2 * r8 + 1]);
            }
        }
        __syncthreads();
    }

    // 2. what the pairs give to queries and keys: a warp has 16 tokens and, of each half of the keys, a half
    u32 strip = warp % 4, quarter = warp / 4;
    Pairs d_query[2], d_key[2];
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        clear(d_query[half]);
        clear(d_key[half]);
    }
#pragma unroll 1
    for (u32 step = 0; step < 4; step++) {
        u32 qk[4], qk_t[4], kk[4], kk_t[4];
        if (step <= strip) {
            u32 at = room + 2048 * strip + (lane.middle_down ^ step << 5);
            load_block(qk, at);
            load_block(kk, at + 8192);
        }
        if (step >= strip) {
            u32 at = room + 2048 * step + (lane.middle_across ^ strip << 5);
            load_block_transposed(qk_t, at);
            load_block_transposed(kk_t, at + 8192);
        }
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
#pragma unroll
            for (u32 block = 0; block < 2; block++) {
                u32 at = 4096 * step + (lane.wide_down ^ (4 * half + 2 * quarter + block) << 5), b[4];
                load_block_transposed(b, keys + at);
                if (step <= strip) {
                    mma_16816(d_query[half][2 * block], qk, b[0], b[1]);
                    mma_16816(d_query[half][2 * block + 1], qk, b[2], b[3]);
                    mma_16816(d_key[half][2 * block], kk, b[0], b[1]);
                    mma_16816(d_key[half][2 * block + 1], kk, b[2], b[3]);
                }
                if (step >= strip) {
                    mma_16816(d_key[half][2 * block], kk_t, b[0], b[1]);
                    mma_16816(d_key[half][2 * block + 1], kk_t, b[2], b[3]);
                    load_block_transposed(b, queries + at);
                    mma_16816(d_key[half][2 * block], qk_t, b[0], b[1]);
                    mma_16816(d_key[half][2 * block + 1], qk_t, b[2], b[3]);
                }
            }
        }
    }

    // 3. the states, value head by value head; the last one's tiles are still there
    bool has_before = chunk.z != NONE, has_after = chunk.w != NONE;
#pragma unroll 1
    for (u32 r = ratio; r-- > 0;) {
        u32 head = of_key + r, h = first_head + head;
        const bf16* before = states + ((u64)(has_before ? chunk.z : 0) * n_heads + head) * DIM * DIM;
        const bf16* after = d_states + ((u64)(has_after ? chunk.w : 0) * n_heads + head) * DIM * DIM;
        __syncthreads();
        if (r + 1 < ratio) copy_head(own, d_out_thv, d_v_thv, e, decays, first, count, head, h, H, n_heads);
        if (has_before) copy_half_state(room, before, 0);
        copy_async_commit();
        copy_async_wait<0>();
        __syncthreads();
        u32 row = 16 * strip + lane.group;

        // q · X - beta k · Y and k · Z, of rows `group` and `group` + 8; the state with its gradient.
        float2 from_start = make_float2(0.0f, 0.0f), to_end = make_float2(0.0f, 0.0f);
        float through = 0.0f;
#pragma unroll 1
        for (u32 half = 0; half < 2; half++) {
            // The half in hand is always the first of the sums.
            u32 place = wide(row, 8 * half + 4 * quarter) + 4 * lane.pair;
            uint4 state[4];
            if (half > 0) {
                __syncthreads();
                if (has_before) copy_half_state(room, before, half);
                copy_async_commit();
                copy_async_wait<0>();
                __syncthreads();
            }
            Pairs x;
            if (has_before) {
                times_state(x, d_outs, room, strip, quarter, lane);
                float2 dots = add_scaled(d_query[0], x, own.decays[row].x, own.decays[row + 8].x, queries + place);
                from_start.x += dots.x, from_start.y += dots.y;
                times_state(x, d_rs, room, strip, quarter, lane);
                dots = add_scaled(d_key[0], x, -own.decays[row].x * own.decays[row].z, -own.decays[row + 8].x * own.decays[row + 8].z, keys + place);
                from_start.x -= own.decays[row].z * dots.x, from_start.y -= own.decays[row + 8].z * dots.y;
                if (has_after) {
#pragma unroll
                    for (u32 n = 0; n < 4; n++) state[n] = ((const uint4*)own.room)[threadIdx.x + 256 * n];
                }
            }
            if (has_after) {
                __syncthreads();
                copy_half_state(room, after, half);
                copy_async_commit();
                copy_async_wait<0>();
                __syncthreads();
                times_state(x, es, room, strip, quarter, lane);
                float2 dots = add_scaled(d_key[0], x, own.decays[row].y * own.decays[row].z, own.decays[row + 8].y * own.decays[row + 8].z, keys + place);
                to_end.x += dots.x, to_end.y += dots.y;
                if (has_before) {
#pragma unroll
                    for (u32 n = 0; n < 4; n++) {
                        uint4 d_state = ((const uint4*)own.room)[threadIdx.x + 256 * n];
                        through += low_bf16(state[n].x) * low_bf16(d_state.x) + high_bf16(state[n].x) * high_bf16(d_state.x);
                        through += low_bf16(state[n].y) * low_bf16(d_state.y) + high_bf16(state[n].y) * high_bf16(d_state.y);
                        through += low_bf16(state[n].z) * low_bf16(d_state.z) + high_bf16(state[n].z) * high_bf16(d_state.z);
                        through += low_bf16(state[n].w) * low_bf16(d_state.w) + high_bf16(state[n].w) * high_bf16(d_state.w);
                    }
                }
            }
#pragma unroll
            for (u32 n = 0; n < 4; n++) {
#pragma unroll
                for (u32 c = 0; c < 4; c++) {
                    swap(d_query[0][n][c], d_query[1][n][c]);
                    swap(d_key[0][n][c], d_key[1][n][c]);
                }
            }
        }
        // 4. d_v = beta dR, and what the states give to the gates
        for (u32 at = threadIdx.x; at < count * 16; at += blockDim.x) {
            Eight x = load8((const bf16*)(own.d_rs + wide(at / 16, at % 16)), 0);
            float beta = own.decays[at / 16].z;
#pragma unroll
            for (u32 c = 0; c < 8; c++) x.v[c] *= beta;
            store8(d_v_thv, ((i64)(first + at / 16) * H + h) * DIM + at % 16 * 8, x);
        }
        from_start.x = own.decays[row].x * quad_sum(from_start.x);
        from_start.y = own.decays[row + 8].x * quad_sum(from_start.y);
        to_end.x = own.decays[row].y * own.decays[row].z * quad_sum(to_end.x);
        to_end.y = own.decays[row + 8].y * own.decays[row + 8].z * quad_sum(to_end.y);
        through = warp_sum(through);
        if (lane.pair == 0) {
            own.from_start[quarter][row] = from_start.x;
            own.from_start[quarter][row + 8] = from_start.y;
            own.to_end[quarter][row] = to_end.x;
            own.to_end[quarter][row + 8] = to_end.y;
        }
        if (lane_idx == 0) own.through[warp] = own.decays[count - 1].x * through;
        __syncthreads();
        if (threadIdx.x < count) {
            u32 t = threadIdx.x;
            u64 at = (u64)(first + t) * H + h;
            float sum = 0.0f;
            for (u32 w = 0; w < 8; w++) sum += own.through[w];
            for (u32 j = 0; j < t; j++) sum += own.to_end[0][j] + own.to_end[1][j];
            for (u32 i = t; i < count; i++) sum += own.from_start[0][i] + own.from_start[1][i];
            d_g_th[at] += sum;
        }
    }

    // 5. d_q and d_k
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
#pragma unroll
        for (u32 block = 0; block < 2; block++) {
#pragma unroll
            for (u32 r8 = 0; r8 < 2; r8++) {
                u32 row = 16 * strip + 8 * r8 + lane.group, column = 64 * half + 32 * quarter + 16 * block;
                u64 at = ((u64)(first + row) * G + key_head) * DIM + column;
                u32 n = 2 * block, c = 2 * r8;
                u32 low = pack_bf16(d_query[half][n][c], d_query[half][n][c + 1]), high = pack_bf16(d_query[half][n + 1][c], d_query[half][n + 1][c + 1]);
                store_row16(d_q_tgk + at, low, high, lane.pair, row < count);
                low = pack_bf16(d_key[half][n][c], d_key[half][n][c + 1]), high = pack_bf16(d_key[half][n + 1][c], d_key[half][n + 1][c + 1]);
                store_row16(d_k_tgk + at, low, high, lane.pair, row < count);
            }
        }
    }
}
