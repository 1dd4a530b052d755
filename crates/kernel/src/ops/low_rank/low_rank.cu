// A low-rank update beside a linear layer: u = dropout(x) Aᵀ, y += s u Bᵀ, and the gradients. All of it is bound by reading and
// writing x, y and their gradients once, so these go between memory and registers directly, and dropout is made in registers.
//
// A lane holds eight neighbours of rows `group` and `group + 8`: columns 8 pair .. 8 pair + 7 of a block of 32. As words of two,
// these serve as the `a` operand of two products over 16 columns, and transposed in eights as the `b` operand of four
// products over 16 rows, since the order in which columns are counted is free as long as the other operand counts alike:
// word j of pair p is columns 8 p + 2 j + {0, 1}. What such products give lies in the same places. Sums over blocks of rows
// or columns go through `partials` in f32 and are added up in their order by a second kernel.
//
// T rows, I in features, O out features, R rank: A [R,I] f32, B [O,R] f32; u and d_u [T,R] bf16. Ranks above 64 come in slices,
// of which `stride` is the whole rank. Kernels named `_any` take every type and size, and keep f32 exact.

struct Lane {
    u32 group, pair, warp;
};
__device__ __forceinline__ Lane lane_place() { return Lane{threadIdx.x % 32 / 4, threadIdx.x % 4, threadIdx.x / 32}; }

// Eight neighbours as bf16, zeros where not `valid`.
__device__ __forceinline__ void words8(u32 (&words)[4], const bf16* t, u64 i, bool valid) {
    uint4 w = valid ? *(const uint4*)(t + i) : make_uint4(0, 0, 0, 0);
    words[0] = w.x;
    words[1] = w.y;
    words[2] = w.z;
    words[3] = w.w;
}
__device__ __forceinline__ void words8(u32 (&words)[4], const float* t, u64 i, bool valid) {
    Eight x = {};
    if (valid) x = load8(t, i);
#pragma unroll
    for (int j = 0; j < 4; j++) words[j] = pack_bf16(x.v[2 * j], x.v[2 * j + 1]);
}

// Each half of the word all ones where its upper bit is set, else zero; the same for one half's bit over a whole word.
__device__ __forceinline__ u32 spread_halves(u32 word) {
    u32 masks;
    asm("prmt.b32 %0, %1, %1, 0xbb99;" : "=r"(masks) : "r"(word));
    return masks;
}
__device__ __forceinline__ u32 spread_low(u32 word) {
    u32 mask;
    asm("prmt.b32 %0, %1, %1, 0x9999;" : "=r"(mask) : "r"(word));
    return mask;
}
__device__ __forceinline__ u32 spread_high(u32 word) {
    u32 mask;
    asm("prmt.b32 %0, %1, %1, 0xbbbb;" : "=r"(mask) : "r"(word));
    return mask;
}
// The prelude's `keeps` for eight neighbours: the upper bit of each half is set where the element is kept. `counter` is
// key + GOLDEN (i / 4 + 1) of the first, `thresholds` the threshold in both halves.
__device__ __forceinline__ void keep8(u32 (&kept)[4], u64 counter, u32 thresholds) {
    u64 bits[2] = {random_mix(counter), random_mix(counter + GOLDEN)};
#pragma unroll
    for (int j = 0; j < 4; j++) {
        u32 pair = (u32)(bits[j / 2] >> (32 * (j % 2)));
        kept[j] = ((pair & 0x7fff7fffu) | 0x80008000u) - thresholds;
    }
}

// Element (row, r) and its neighbour of a [T,R] tensor; zeros beyond.
__device__ __forceinline__ u32 word_of(const bf16* t, u32 row, u32 r, u32 n_rows, u32 rank, u32 stride) {
    return row < n_rows && r < rank ? *(const u32*)(t + (u64)row * stride + r) : 0;
}
// 16 rows from `row` on, 16 columns from `r` on: as the `a` operand, and transposed.
__device__ __forceinline__ void load_factor(u32 (&words)[4], const bf16* t, u32 row, u32 r, u32 n_rows, u32 rank, u32 stride, const Lane& lane) {
#pragma unroll
    for (int w = 0; w < 4; w++) words[w] = word_of(t, row + lane.group + 8 * (w % 2), r + 2 * lane.pair + 8 * (w / 2), n_rows, rank, stride);
}
__device__ __forceinline__ void turn(u32 (&turned)[4], const u32 (&words)[4]) {
    turned[0] = transpose8(words[0]);
    turned[1] = transpose8(words[2]);
    turned[2] = transpose8(words[1]);
    turned[3] = transpose8(words[3]);
}
// Rows `first` + group + {0, 8} of BLOCKS blocks of 32 columns from `start` on of [.., width]; zeros from row `end` on.
template <int BLOCKS, class X>
__device__ __forceinline__ void fetch_rows(u32 (&words)[2][BLOCKS][4], const X* x, u32 first, u32 start, u32 end, u32 width, const Lane& lane) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int block = 0; block < BLOCKS; block++) {
            u32 row = first + 8 * h + lane.group, column = start + 32 * block + 8 * lane.pair;
            words8(words[h][block], x, (u64)row * width + column, row < end && column < width);
        }
}
template <int BLOCKS> __device__ __forceinline__ void take_over(u32 (&words)[2][BLOCKS][4], const u32 (&next)[2][BLOCKS][4]) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int block = 0; block < BLOCKS; block++)
#pragma unroll
            for (int j = 0; j < 4; j++) words[h][block][j] = next[h][block][j];
}
// Sums of TILES times 16 ranks over this block's rows (blockIdx.y), to partials [blocks of rows, 16 TILES, width].
template <int TILES, int BLOCKS>
__device__ __forceinline__ void store_partials(float* partials, const float (&acc)[TILES][4 * BLOCKS][4], u32 start, u32 width, const Lane& lane) {
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int block = 0; block < BLOCKS; block++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                u32 column = start + 32 * block + 8 * lane.pair, r = 16 * t + 8 * h + lane.group;
                Eight sum;
#pragma unroll
                for (int e = 0; e < 8; e++) sum.v[e] = acc[t][4 * block + e / 2][2 * h + e % 2];
                if (column < width) store8(partials, (i64)(blockIdx.y * (16 * TILES) + r) * width + column, sum);
            }
}
// Column of the block of 32 that is number `group` of product j.
__device__ __forceinline__ u32 column_of(u32 j, const Lane& lane) { return 32 * (j / 4) + lane.group / 2 * 8 + j % 4 * 2 + lane.group % 2; }

// ---- u = scale dropout(x) Aᵀ for N adapters of up to 16 RT ranks that read the same x
//
// Blocks of 32 HALVES rows: 8 warps beside each other take every eighth block of 64 columns of 32 rows.

template <int N, int RT, int HALVES>
__device__ __forceinline__ void down_forward(bf16* const (&u)[N], const bf16* x, const float* const (&a)[N], const u64 (&keys)[N], u32 n_rows, u32 n_in,
                                             u32 rank, u32 stride, u32 threshold, float scale) {
    static const u32 ROWS = 32 * HALVES;
    __shared__ float sums[8][ROWS][16];
    Lane lane = lane_place();
    u32 slice = lane.warp % 8, half = lane.warp / 8, thresholds = threshold * 0x10001u;
    u32 first_row = blockIdx.x * ROWS + 32 * half + lane.group;
    float acc[N * RT][2][2][4] = {};
    for (u32 start = 64 * slice; start < n_in; start += 512) {
        u32 words[2][2][2][4];
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int block = 0; block < 2; block++) {
                    u32 row = first_row + 16 * m + 8 * h, column = start + 32 * block + 8 * lane.pair;
                    words8(words[block][m][h], x, (u64)row * n_in + column, row < n_rows && column < n_in);
                }
#pragma unroll
        for (int block = 0; block < 2; block++) {
            u32 column = start + 32 * block + 8 * lane.pair;
#pragma unroll
            for (int n = 0; n < N; n++) {
                u32 kept[2][2][4];
#pragma unroll
                for (int m = 0; m < 2; m++)
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        u64 i = (u64)(first_row + 16 * m + 8 * h) * n_in + column;
                        if (threshold > 0) {
                            keep8(kept[m][h], keys[n] + GOLDEN * (i / 4 + 1), thresholds);
#pragma unroll
                            for (int j = 0; j < 4; j++) kept[m][h][j] = words[block][m][h][j] & spread_halves(kept[m][h][j]);
                        } else {
#pragma unroll
                            for (int j = 0; j < 4; j++) kept[m][h][j] = words[block][m][h][j];
                        }
                    }
#pragma unroll
                for (int t = 0; t < 2 * RT; t++) {
                    u32 r = 8 * t + lane.group, b[4];
                    words8(b, a[n], (u64)r * n_in + column, r < rank && column < n_in);
#pragma unroll
                    for (int m = 0; m < 2; m++)
#pragma unroll
                        for (int k = 0; k < 2; k++) {
                            u32 left[4] = {kept[m][0][2 * k], kept[m][1][2 * k], kept[m][0][2 * k + 1], kept[m][1][2 * k + 1]};
                            mma_16816(acc[n * RT + t / 2][m][t % 2], left, b[2 * k], b[2 * k + 1]);
                        }
                }
            }
        }
    }
#pragma unroll
    for (int t = 0; t < N * RT; t++) {
        __syncthreads();
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int c = 0; c < 2; c++)
#pragma unroll
                for (int h = 0; h < 2; h++)
                    *(float2*)&sums[slice][32 * half + 16 * m + 8 * h + lane.group][8 * c + 2 * lane.pair] =
                        make_float2(acc[t][m][c][2 * h], acc[t][m][c][2 * h + 1]);
        __syncthreads();
        u32 at = threadIdx.x / 8, row = blockIdx.x * ROWS + at, column = threadIdx.x % 8 * 2, r = 16 * (t % RT) + column;
        float low = 0.0f, high = 0.0f;
#pragma unroll
        for (int s = 0; s < 8; s++) {
            float2 part = *(const float2*)&sums[s][at][column];
            low += part.x;
            high += part.y;
        }
        if (row < n_rows && r < rank) *(u32*)(u[t / RT] + (u64)row * stride + r) = pack_bf16(scale * low, scale * high);
    }
}

#define DOWN_FORWARD(NAME, RT, HALVES)                                                                                                         \
    extern "C" __global__ void __launch_bounds__(256 * HALVES) NAME(bf16* u, const bf16* x, const float* a, u64 key, u32 n_rows, u32 n_in, u32 rank, \
                                                                    u32 stride, u32 threshold, float scale) {                                 \
        bf16* const us[1] = {u};                                                                                                              \
        const float* const as[1] = {a};                                                                                                       \
        const u64 keys[1] = {key};                                                                                                            \
        down_forward<1, RT, HALVES>(us, x, as, keys, n_rows, n_in, rank, stride, threshold, scale);                                           \
    }
DOWN_FORWARD(low_rank_down_forward_1, 1, 2)
DOWN_FORWARD(low_rank_down_forward_2, 2, 2)
DOWN_FORWARD(low_rank_down_forward_3, 3, 1)
DOWN_FORWARD(low_rank_down_forward_4, 4, 1)

// ---- y = or += scale u Bᵀ
//
// Blocks of 8 warps beside each other, 64 columns each, over 128 rows.

template <int RT, bool ADDS>
__device__ __forceinline__ void up_forward(View y, const bf16* u, const float* b, u32 n_rows, u32 n_out, u32 rank, u32 stride, float scale) {
    Lane lane = lane_place();
    u32 start = (blockIdx.x * 8 + lane.warp) * 64;
    if (start >= n_out) return;
    u32 factor[8][RT][2];
#pragma unroll
    for (int j = 0; j < 8; j++) {
        u32 o = start + column_of(j, lane);
#pragma unroll
        for (int t = 0; t < RT; t++)
#pragma unroll
            for (int k = 0; k < 2; k++) {
                u32 r = 16 * t + 8 * k + 2 * lane.pair;
                bool valid = o < n_out && r < rank;
                float2 x = valid ? *(const float2*)(b + (u64)o * stride + r) : make_float2(0.0f, 0.0f);
                factor[j][t][k] = pack_bf16(x.x, x.y);
            }
    }
    u32 end = min(n_rows, (blockIdx.y + 1) * 128);
    for (u32 first = blockIdx.y * 128; first < end; first += 16) {
        u32 left[RT][4];
#pragma unroll
        for (int t = 0; t < RT; t++) load_factor(left[t], u, first, 16 * t, n_rows, rank, stride, lane);
#pragma unroll
        for (int block = 0; block < 2; block++) {
            float acc[4][4] = {};
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int t = 0; t < RT; t++) mma_16816(acc[j], left[t], factor[4 * block + j][t][0], factor[4 * block + j][t][1]);
            u32 column = start + 32 * block + 8 * lane.pair;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                u32 row = first + 8 * h + lane.group;
                if (row >= n_rows || column >= n_out) continue;
                i64 i = (i64)row * n_out + column;
                Eight sum = {};
                if (ADDS) sum = load8(y, i);
#pragma unroll
                for (int e = 0; e < 8; e++) sum.v[e] += scale * acc[e / 2][2 * h + e % 2];
                store8(y, i, sum);
            }
        }
    }
}

#define UP_FORWARD(NAME, RT, ADDS)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) NAME(View y, const bf16* u, const float* b, u32 n_rows, u32 n_out, u32 rank, u32 stride, \
                                                           float scale) {                                                              \
        up_forward<RT, ADDS>(y, u, b, n_rows, n_out, rank, stride, scale);                                                             \
    }
UP_FORWARD(low_rank_up_forward_1, 1, false)
UP_FORWARD(low_rank_up_forward_2, 2, false)
UP_FORWARD(low_rank_up_forward_3, 3, false)
UP_FORWARD(low_rank_up_forward_4, 4, false)
UP_FORWARD(low_rank_up_forward_accumulate_1, 1, true)
UP_FORWARD(low_rank_up_forward_accumulate_2, 2, true)
UP_FORWARD(low_rank_up_forward_accumulate_3, 3, true)
UP_FORWARD(low_rank_up_forward_accumulate_4, 4, true)

// ---- d_u = scale d_y B, d_b += scale d_yᵀ u
//
// Blocks of 8 warps beside each other, 32 BLOCKS columns each, over `rows_per_block` rows, a multiple of 16. A warp keeps its columns'
// d_bᵀ; the block's part of d_u is added up over its warps every STEPS times 16 rows.
// partial_u [blocks of columns, T, 16 RT], partial_b [blocks of rows, 16 RT, O].

template <int RT, int BLOCKS, class Y>
__device__ __forceinline__ void up_backward(float* partial_u, float* partial_b, const Y* d_y, const bf16* u, const float* b, u32 n_rows, u32 n_out,
                                            u32 rank, u32 stride, u32 rows_per_block) {
    static const int STEPS = 4 / RT, WIDTH = 16 * RT;
    __shared__ float sums[8][16 * STEPS][WIDTH];
    Lane lane = lane_place();
    u32 start = (blockIdx.x * 8 + lane.warp) * 32 * BLOCKS;
    u32 factor[BLOCKS][2][2 * RT][2];
#pragma unroll
    for (int block = 0; block < BLOCKS; block++)
#pragma unroll
        for (int k = 0; k < 4; k++) {
            u32 o = start + 32 * block + 8 * lane.pair + 2 * k;
#pragma unroll
            for (int t = 0; t < 2 * RT; t++) {
                u32 r = 8 * t + lane.group;
                bool valid = o < n_out && r < rank;
                float low = valid ? b[(u64)o * stride + r] : 0.0f, high = valid ? b[(u64)(o + 1) * stride + r] : 0.0f;
                factor[block][k / 2][t][k % 2] = pack_bf16(low, high);
            }
        }
    float acc[RT][4 * BLOCKS][4] = {};
    u32 begin = blockIdx.y * rows_per_block, end = min(n_rows, begin + rows_per_block);
    u32 next[2][BLOCKS][4];
    fetch_rows(next, d_y, begin, start, end, n_out, lane);
    for (u32 batch = begin; batch < end; batch += 16 * STEPS) {
#pragma unroll 1
        for (int step = 0; step < STEPS; step++) {
            u32 first = batch + 16 * step;
            u32 words[2][BLOCKS][4];
            take_over(words, next);
            fetch_rows(next, d_y, first + 16, start, end, n_out, lane);
            u32 left[RT][4];
#pragma unroll
            for (int t = 0; t < RT; t++) {
                u32 straight[4];
                load_factor(straight, u, first, 16 * t, end, rank, stride, lane);
                turn(left[t], straight);
            }
            float acc_u[2 * RT][4] = {};
#pragma unroll
            for (int block = 0; block < BLOCKS; block++) {
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    u32 rows[4] = {words[0][block][2 * k], words[1][block][2 * k], words[0][block][2 * k + 1], words[1][block][2 * k + 1]};
#pragma unroll
                    for (int t = 0; t < 2 * RT; t++) mma_16816(acc_u[t], rows, factor[block][k][t][0], factor[block][k][t][1]);
                }
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    u32 b0 = transpose8(words[0][block][j]), b1 = transpose8(words[1][block][j]);
#pragma unroll
                    for (int t = 0; t < RT; t++) mma_16816(acc[t][4 * block + j], left[t], b0, b1);
                }
            }
#pragma unroll
            for (int t = 0; t < 2 * RT; t++)
#pragma unroll
                for (int h = 0; h < 2; h++)
                    *(float2*)&sums[lane.warp][16 * step + 8 * h + lane.group][8 * t + 2 * lane.pair] =
                        make_float2(acc_u[t][2 * h], acc_u[t][2 * h + 1]);
        }
        __syncthreads();
#pragma unroll
        for (u32 at = threadIdx.x; at < 16 * STEPS * WIDTH; at += 256) {
            u32 row = at / WIDTH, r = at % WIDTH;
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < 8; w++) sum += sums[w][row][r];
            if (batch + row < end) partial_u[((u64)blockIdx.x * n_rows + batch + row) * WIDTH + r] = sum;
        }
        __syncthreads();
    }
    store_partials<RT, BLOCKS>(partial_b, acc, start, n_out, lane);
}

#define UP_BACKWARD(NAME, RT, BLOCKS, Y)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(256, RT > 2 ? 1 : 2) NAME(float* partial_u, float* partial_b, const Y* d_y, const bf16* u, const float* b, \
                                                           u32 n_rows, u32 n_out, u32 rank, u32 stride, u32 rows_per_block) {               \
        up_backward<RT, BLOCKS>(partial_u, partial_b, d_y, u, b, n_rows, n_out, rank, stride, rows_per_block);                             \
    }
UP_BACKWARD(low_rank_up_backward_bf16_1, 1, 2, bf16)
UP_BACKWARD(low_rank_up_backward_bf16_2, 2, 1, bf16)
UP_BACKWARD(low_rank_up_backward_bf16_3, 3, 1, bf16)
UP_BACKWARD(low_rank_up_backward_bf16_4, 4, 1, bf16)
UP_BACKWARD(low_rank_up_backward_f32_1, 1, 2, float)
UP_BACKWARD(low_rank_up_backward_f32_2, 2, 1, float)
UP_BACKWARD(low_rank_up_backward_f32_3, 3, 1, float)
UP_BACKWARD(low_rank_up_backward_f32_4, 4, 1, float)

// Adds up the parts. The first `u_blocks` blocks make d_u, a thread two neighbours; the others d_b, if there is one, a block 32
// columns by 8 ranks.
extern "C" __global__ void __launch_bounds__(256) low_rank_up_backward_sum(bf16* d_u, float* d_b, const float* partial_u, const float* partial_b, u32 u_parts,
                                                                           u32 b_parts, u32 u_blocks, u32 n_rows, u32 n_out, u32 width, u32 rank,
                                                                           u32 stride, float scale) {
    __shared__ float turned[8][33];
    if (blockIdx.x < u_blocks) {
        u64 i = 2 * ((u64)blockIdx.x * 256 + threadIdx.x), n = (u64)n_rows * width;
        u32 r = (u32)(i % width);
        if (i >= n || r >= rank) return;
        float low = 0.0f, high = 0.0f;
#pragma unroll 8
        for (u32 part = 0; part < u_parts; part++) {
            float2 x = *(const float2*)(partial_u + part * n + i);
            low += x.x;
            high += x.y;
        }
        *(u32*)(d_u + i / width * stride + r) = pack_bf16(scale * low, scale * high);
        return;
    }
    u32 tile = blockIdx.x - u_blocks, tiles = width / 8, first = tile / tiles * 32, rank_at = tile % tiles * 8;
    u32 column = first + threadIdx.x % 32, r = threadIdx.x / 32;
    float sum = 0.0f;
    if (column < n_out && rank_at + r < rank) {
#pragma unroll 8
        for (u32 part = 0; part < b_parts; part++) sum += partial_b[((u64)part * width + rank_at + r) * n_out + column];
    }
    turned[r][threadIdx.x % 32] = sum;
    __syncthreads();
    column = first + threadIdx.x / 8;
    r = threadIdx.x % 8;
    if (column < n_out && rank_at + r < rank) d_b[(u64)column * stride + rank_at + r] += scale * turned[r][threadIdx.x / 8];
}

// ---- d_x = or += scale dropped(d_u A), d_a += scale d_uᵀ dropped(x) for N adapters of the same x
//
// Blocks of 8 warps beside each other, 32 BLOCKS columns each, over `rows_per_block` rows, a multiple of 16. A warp keeps its columns
// of A and of d_a. partials [blocks of rows, N, 16 RT, I].

template <int N, int RT, int BLOCKS, bool ADDS>
__device__ __forceinline__ void down_backward(View d_x, float* partials, const bf16* const (&d_u)[N], const bf16* x, const float* const (&a)[N],
                                              const u64 (&keys)[N], u32 n_rows, u32 n_in, u32 rank, u32 stride, u32 rows_per_block, u32 threshold,
                                              float scale) {
    Lane lane = lane_place();
    u32 start = (blockIdx.x * 8 + lane.warp) * 32 * BLOCKS, thresholds = threshold * 0x10001u;
    if (start >= n_in) return;
    u32 factor[N * RT][4 * BLOCKS][2];
#pragma unroll
    for (int t = 0; t < N * RT; t++)
#pragma unroll
        for (int j = 0; j < 4 * BLOCKS; j++)
#pragma unroll
            for (int k = 0; k < 2; k++) {
                u32 column = start + column_of(j, lane), r = 16 * (t % RT) + 8 * k + 2 * lane.pair;
                bool valid = column < n_in && r < rank;
                const float* at = a[t / RT] + (u64)r * n_in + column;
                float low = valid ? at[0] : 0.0f, high = valid ? at[n_in] : 0.0f;
                factor[t][j][k] = pack_bf16(low, high);
            }
    float acc[N * RT][4 * BLOCKS][4] = {};
    u32 begin = blockIdx.y * rows_per_block, end = min(n_rows, begin + rows_per_block);
    u32 next[2][BLOCKS][4];
    fetch_rows(next, x, begin, start, end, n_in, lane);
    for (u32 first = begin; first < end; first += 16) {
        u32 words[2][BLOCKS][4];
        take_over(words, next);
        fetch_rows(next, x, first + 16, start, end, n_in, lane);
        float sums[2][BLOCKS][8] = {};
#pragma unroll
        for (int n = 0; n < N; n++) {
            u32 straight[RT][4], turned[RT][4];
#pragma unroll
            for (int t = 0; t < RT; t++) {
                load_factor(straight[t], d_u[n], first, 16 * t, end, rank, stride, lane);
                turn(turned[t], straight[t]);
            }
#pragma unroll
            for (int block = 0; block < BLOCKS; block++) {
                u32 kept[2][4];
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    u64 i = (u64)(first + 8 * h + lane.group) * n_in + start + 32 * block + 8 * lane.pair;
                    if (threshold > 0) {
                        keep8(kept[h], keys[n] + GOLDEN * (i / 4 + 1), thresholds);
                    } else {
#pragma unroll
                        for (int j = 0; j < 4; j++) kept[h][j] = 0x80008000u;
                    }
                }
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    u32 b0 = transpose8(words[0][block][j] & spread_halves(kept[0][j]));
                    u32 b1 = transpose8(words[1][block][j] & spread_halves(kept[1][j]));
                    float product[4] = {};
#pragma unroll
                    for (int t = 0; t < RT; t++) {
                        mma_16816(acc[n * RT + t][4 * block + j], turned[t], b0, b1);
                        mma_16816(product, straight[t], factor[n * RT + t][4 * block + j][0], factor[n * RT + t][4 * block + j][1]);
                    }
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        sums[h][block][2 * j] += __uint_as_float(__float_as_uint(product[2 * h]) & spread_low(kept[h][j]));
                        sums[h][block][2 * j + 1] += __uint_as_float(__float_as_uint(product[2 * h + 1]) & spread_high(kept[h][j]));
                    }
                }
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int block = 0; block < BLOCKS; block++) {
                u32 row = first + 8 * h + lane.group, column = start + 32 * block + 8 * lane.pair;
                if (row >= end || column >= n_in) continue;
                i64 i = (i64)row * n_in + column;
                Eight sum = {};
                if (ADDS) sum = load8(d_x, i);
#pragma unroll
                for (int e = 0; e < 8; e++) sum.v[e] += scale * sums[h][block][e];
                store8(d_x, i, sum);
            }
    }
    store_partials<N * RT, BLOCKS>(partials, acc, start, n_in, lane);
}

#define DOWN_BACKWARD(NAME, RT, BLOCKS, ADDS)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(256) NAME(View d_x, float* partials, const bf16* d_u, const bf16* x, const float* a, u64 key,   \
                                                           u32 n_rows, u32 n_in, u32 rank, u32 stride, u32 rows_per_block, u32 threshold,        \
                                                           float scale) {                                                                        \
        const bf16* const d_us[1] = {d_u};                                                                                                       \
        const float* const as[1] = {a};                                                                                                          \
        const u64 keys[1] = {key};                                                                                                               \
        down_backward<1, RT, BLOCKS, ADDS>(d_x, partials, d_us, x, as, keys, n_rows, n_in, rank, stride, rows_per_block, threshold, scale);      \
    }
DOWN_BACKWARD(low_rank_down_backward_1, 1, 2, false)
DOWN_BACKWARD(low_rank_down_backward_2, 2, 1, false)
DOWN_BACKWARD(low_rank_down_backward_3, 3, 1, false)
DOWN_BACKWARD(low_rank_down_backward_4, 4, 1, false)
DOWN_BACKWARD(low_rank_down_backward_accumulate_1, 1, 2, true)
DOWN_BACKWARD(low_rank_down_backward_accumulate_2, 2, 1, true)
DOWN_BACKWARD(low_rank_down_backward_accumulate_3, 3, 1, true)
DOWN_BACKWARD(low_rank_down_backward_accumulate_4, 4, 1, true)

// d_a += scale Σ partials, a thread an element of the rank's first `rank` rows.
extern "C" __global__ void __launch_bounds__(256) low_rank_down_backward_sum(float* d_a, const float* partials, u32 parts, u32 n_in, u32 width, u32 rank,
                                                                             float scale) {
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x, part_size = (u64)width * n_in;
    if (i >= (u64)rank * n_in) return;
    float sum = 0.0f;
#pragma unroll 8
    for (u32 part = 0; part < parts; part++) sum += partials[part * part_size + i];
    d_a[i] += scale * sum;
}

// ---- any types, any sizes

// What is dropped of a tensor; nothing where `threshold` is 0.
struct Drops {
    u64 key;
    u32 threshold;
    float scale;
};
__device__ __forceinline__ float dropped(float x, u64 i, const Drops& drops) {
    if (drops.threshold == 0) return x;
    return keeps(random_bits(drops.key, i / 4), (int)(i % 4), drops.threshold) ? __fmul_rn(x, drops.scale) : 0.0f;
}

// out [T,R] = alpha Σ_c dropped(x)[t,c] w(r,c), with w's element at r * w_row + c * w_column. A block a row and 8 ranks.
extern "C" __global__ void __launch_bounds__(256) low_rank_any_narrow(View out, View x, View w, u32 rank, u32 width, u32 w_row, u32 w_column, float alpha,
                                                                      u64 key, u32 threshold, float scale) {
    Drops drops = {key, threshold, scale};
    u32 first = 8 * blockIdx.y, n = min(rank - first, 8u);
    u64 row = blockIdx.x;
    float acc[8] = {};
    for (u32 c = threadIdx.x; c < width; c += 256) {
        u64 i = row * width + c;
        float value = dropped(load(x, i), i, drops);
#pragma unroll
        for (u32 j = 0; j < 8; j++) {
            if (j < n) acc[j] += value * load(w, (u64)(first + j) * w_row + (u64)c * w_column);
        }
    }
#pragma unroll
    for (u32 j = 0; j < 8; j++) {
        float sum = block_sum(acc[j]);
        if (threadIdx.x == 0 && j < n) store(out, row * rank + first + j, alpha * sum);
    }
}

// out [T,C] = or += dropped(alpha Σ_r u[t,r] w(r,c)), with w's element at r * w_row + c * w_column. A thread an element.
extern "C" __global__ void __launch_bounds__(256) low_rank_any_wide(View out, View u, View w, u64 n, u32 rank, u32 width, u32 w_row, u32 w_column, u32 adds,
                                                                    float alpha, u64 key, u32 threshold, float scale) {
    Drops drops = {key, threshold, scale};
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x, row = i / width, c = i % width;
    if (i >= n) return;
    float sum = 0.0f;
    for (u32 r = 0; r < rank; r++) sum += load(u, row * rank + r) * load(w, (u64)r * w_row + c * w_column);
    float value = dropped(alpha * sum, i, drops);
    store(out, i, adds ? load(out, i) + value : value);
}

// d_w [P,Q] += alpha Σ_t p[t,·] dropped(q)[t,·]. A thread an element.
extern "C" __global__ void __launch_bounds__(256) low_rank_any_weight(float* d_w, View p, View q, u32 n_rows, u32 p_width, u32 q_width, float alpha, u64 key,
                                                                      u32 threshold, float scale) {
    Drops drops = {key, threshold, scale};
    u64 i = (u64)blockIdx.x * 256 + threadIdx.x;
    if (i >= (u64)p_width * q_width) return;
    u32 row = (u32)(i / q_width), column = (u32)(i % q_width);
    float sum = 0.0f;
    for (u32 t = 0; t < n_rows; t++) {
        u64 at = (u64)t * q_width + column;
        sum += load(p, (u64)t * p_width + row) * dropped(load(q, at), at, drops);
    }
    d_w[i] += alpha * sum;
}
