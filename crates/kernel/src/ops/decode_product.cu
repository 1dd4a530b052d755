// Products of few rows with large weights, for decoding: y[b][o] = sum_i w[o][i] x[b][i], every weight read once, straight into the
// registers of the matrix instruction. A block has M tiles of 16 rows of weights, of which its warps share the inner dimension in pieces
// of 128 bytes; the sums of the warps are added in their order. How many warps share is fixed for a kind of output, so what a row of x
// gives depends neither on the other rows nor on their number.
//
// The order of the inner dimension within a piece is free as long as w and x agree, so a lane takes 16 neighbouring bytes of w as the
// parts of several instructions. All but squares and wide outputs is bf16.
//
// Parts: up to four weights [rows, K] that share x, each with an output of its own [n_rows_x, rows]. x [n_rows_x, K] bf16 is either
// the input itself or, with `squares`, a residual stream times (1 + weight of its norm): the reciprocal norm is one number for a row
// and comes after the product. squares [n_rows_x, n_squares] are sums of squares of 16 neighbours of the stream.

constexpr u32 TILE = 16, STRIDE = 20, PIECE = 128;

enum Output {
    // out = y
    PLAIN,
    // out = y, f32
    WIDE,
    // out = silu(gate) up, of the parts gate and up, eight rows of each in a block
    SWIGLU,
    // stream += y; scaled = stream (1 + norm); squares of the new stream
    RESIDUAL,
};

struct Part {
    const u8* w;
    void* out;
    u32 rows;
};

__device__ __forceinline__ uint4 load_once(const u8* data) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(data));
    return x;
}

// A lane's two rows of weights, from its first byte of a piece on; an end of 0 is a row beyond the weight.
struct Rows {
    const u8 *low, *high;
    u32 end_low, end_high;
};

// A lane's 4 x 16 bytes of a piece: rows group and group + 8, bytes 16 pair and 64 + 16 pair. Zeros beyond the weight.
__device__ __forceinline__ void fetch(uint4 (&a)[4], const Rows& w, u32 piece) {
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        u32 at = piece * PIECE + 64 * half;
        a[2 * half] = at < w.end_low ? load_once(w.low + at) : make_uint4(0, 0, 0, 0);
        a[2 * half + 1] = at < w.end_high ? load_once(w.high + at) : make_uint4(0, 0, 0, 0);
    }
}

// A lane's rows of x: group, group + 8, ... of n_rows.
struct Columns {
    const bf16* x;
    u32 group, n_rows, K;

    __device__ __forceinline__ uint4 load(u32 n, u32 i) const {
        return 8 * n + group < n_rows && i < K ? *(const uint4*)(x + (u64)8 * n * K + i) : make_uint4(0, 0, 0, 0);
    }
};

// Loads of 16 bytes of a row of x for a piece of w.
constexpr u32 LOADS = 2;

__device__ __forceinline__ uint4 column(const Columns& columns, u32 n, u32 piece, u32 load, u32 pair) {
    return columns.load(n, piece * 64 + 32 * load + 8 * pair);
}

// sums += piece of w times piece of x
template <u32 NT, u32 MT>
__device__ __forceinline__ void multiply(float (&sums)[MT][NT][4], const uint4 (&a)[MT][4], const uint4 (&x)[NT][LOADS]) {
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
#pragma unroll
        for (u32 m = 0; m < MT; m++) {
            uint4 low = a[m][2 * half], high = a[m][2 * half + 1];
            u32 first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
            for (u32 n = 0; n < NT; n++) {
                mma_16816(sums[m][n], first, x[n][half].x, x[n][half].y);
                mma_16816(sums[m][n], second, x[n][half].z, x[n][half].w);
            }
        }
    }
}

struct Input {
    const bf16* x;
    const float* squares;
    u32 n_rows, K, n_squares;
    float eps;
};

struct Stream {
    bf16 *x, *scaled;
    float* squares;
    const bf16* norm;
};

// The part that a tile of rows belongs to; the tile's number becomes the one within it.
__device__ __forceinline__ Part find_part(Part part, const Part& part1, const Part& part2, const Part& part3, u32& tile) {
    const Part* const rest[3] = {&part1, &part2, &part3};
#pragma unroll
    for (u32 i = 0; i < 3; i++) {
        u32 n_tiles = (part.rows + TILE - 1) / TILE;
        if (tile < n_tiles) break;
        tile -= n_tiles;
        part = *rest[i];
    }
    return part;
}

// What a tile's rows are, for a lane.
struct Tile {
    Part part;
    u32 number;
    Rows w;
};

template <Output OUTPUT>
__device__ __forceinline__ Tile find_tile(const Part& part0, const Part& part1, const Part& part2, const Part& part3, u32 number, u32 n_bytes) {
    u32 lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
    Tile tile;
    tile.part = OUTPUT == SWIGLU ? part0 : find_part(part0, part1, part2, part3, number);
    tile.number = number;
    const Part other = OUTPUT == SWIGLU ? part1 : tile.part;
    u32 low = OUTPUT == SWIGLU ? number * 8 + group : number * TILE + group, high = OUTPUT == SWIGLU ? low : low + 8;
    // The lane's own first byte is in the pointers, so it is taken from the ends.
    u32 end = n_bytes - min(n_bytes, 16 * pair);
    tile.w = {tile.part.w + (u64)low * n_bytes + 16 * pair, other.w + (u64)high * n_bytes + 16 * pair, low < tile.part.rows ? end : 0,
              high < other.rows ? end : 0};
    return tile;
}

// Puts the sums of a tile where they belong. `partial` [WARPS][8 NT rows of x][STRIDE].
template <u32 NT, u32 WARPS, Output OUTPUT>
__device__ __forceinline__ void finish(const float* partial, const float* reciprocal, const Tile& tile, u32 first_row, u32 n_rows, Stream stream) {
#pragma unroll
    for (u32 first = 0; first < TILE * 8 * NT; first += 32 * WARPS) {
        u32 e = first + threadIdx.x;
        if (e >= TILE * 8 * NT) break;
        u32 r = e % TILE, b = e / TILE, rows = tile.part.rows;
        float y = 0.0f;
#pragma unroll
        for (u32 w = 0; w < WARPS; w++) y += partial[(w * 8 * NT + b) * STRIDE + r];
        y *= reciprocal[b];
        u64 row = first_row + b;
        if (OUTPUT == SWIGLU) {
            float up = __shfl_down_sync(0xffffffffu, y, 8, 16);
            u32 o = tile.number * 8 + r;
            if (r < 8 && b < n_rows && o < rows) ((bf16*)tile.part.out)[row * rows + o] = from_f32<bf16>(silu(y) * up);
            continue;
        }
        u32 o = tile.number * TILE + r;
        bool is_in = b < n_rows && o < rows;
        u64 i = row * rows + o;
        if (OUTPUT == RESIDUAL) {
            float x = 0.0f;
            if (is_in) {
                bf16 stored = from_f32<bf16>(to_f32(stream.x[i]) + y);
                x = to_f32(stored);
                stream.x[i] = stored;
                stream.scaled[i] = from_f32<bf16>(x * (1.0f + to_f32(stream.norm[o])));
            }
            float square = x * x;
#pragma unroll
            for (u32 offset = 8; offset > 0; offset /= 2) square += __shfl_xor_sync(0xffffffffu, square, offset);
            if (r == 0 && b < n_rows && o < rows) stream.squares[row * ((rows + TILE - 1) / TILE) + tile.number] = square;
        } else if (is_in) {
            if (OUTPUT == WIDE) ((float*)tile.part.out)[i] = y;
            else ((bf16*)tile.part.out)[i] = from_f32<bf16>(y);
        }
    }
}

// NT times 8 rows of x, MT tiles, DEPTH pieces of w (and with AHEAD of x) asked for ahead.
template <u32 NT, u32 MT, u32 WARPS, u32 DEPTH, bool AHEAD, Output OUTPUT>
__device__ __forceinline__ void product(const Part& part0, const Part& part1, const Part& part2, const Part& part3, Input in, Stream stream) {
    __shared__ float partial[WARPS * 8 * NT * STRIDE], reciprocal[8 * NT];
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, pair = lane % 4;
    u32 first_row = blockIdx.y * 8 * NT, n_rows = in.n_rows - first_row, n_bytes = 2 * in.K;
    u32 n_pieces = (n_bytes + PIECE - 1) / PIECE;
    release_successor();

    // 1. rows of weights: the first pieces are asked for before the input is waited for
    Tile tiles[MT];
    uint4 a[DEPTH][MT][4];
#pragma unroll
    for (u32 m = 0; m < MT; m++) tiles[m] = find_tile<OUTPUT>(part0, part1, part2, part3, blockIdx.x * MT + m, n_bytes);
#pragma unroll
    for (u32 d = 0; d < DEPTH; d++) {
#pragma unroll
        for (u32 m = 0; m < MT; m++) fetch(a[d][m], tiles[m].w, warp + d * WARPS);
    }
    await_predecessor();

    // 2. the first pieces of x, and the reciprocal norms of its rows
    Columns columns = {in.x + (u64)(first_row + group) * in.K, group, n_rows, in.K};
    uint4 x[AHEAD ? DEPTH : 1][NT][LOADS];
    if (AHEAD) {
#pragma unroll
        for (u32 d = 0; d < DEPTH; d++) {
#pragma unroll
            for (u32 i = 0; i < NT * LOADS; i++) x[d][i / LOADS][i % LOADS] = column(columns, i / LOADS, warp + d * WARPS, i % LOADS, pair);
        }
    }
    for (u32 b = warp; b < 8 * NT; b += WARPS) {
        float sum = 0.0f;
        if (in.squares != nullptr && b < n_rows) {
            for (u32 i = lane; i < in.n_squares; i += 32) sum += in.squares[(u64)(first_row + b) * in.n_squares + i];
        }
        sum = warp_sum(sum);
        if (lane == 0) reciprocal[b] = in.squares != nullptr ? 1.0f / sqrtf(sum / (float)in.K + in.eps) : 1.0f;
    }

    // 3. multiply
    float sums[MT][NT][4];
#pragma unroll
    for (u32 i = 0; i < MT * NT * 4; i++) sums[i / (NT * 4)][i / 4 % NT][i % 4] = 0.0f;
    for (u32 piece = warp; piece < n_pieces; piece += DEPTH * WARPS) {
#pragma unroll
        for (u32 d = 0; d < DEPTH; d++) {
            u32 now = piece + d * WARPS, next = now + DEPTH * WARPS;
            if (now >= n_pieces) break;
            if (!AHEAD) {
#pragma unroll
                for (u32 i = 0; i < NT * LOADS; i++) x[0][i / LOADS][i % LOADS] = column(columns, i / LOADS, now, i % LOADS, pair);
            }
            multiply<NT, MT>(sums, a[d], x[AHEAD ? d : 0]);
#pragma unroll
            for (u32 m = 0; m < MT; m++) fetch(a[d][m], tiles[m].w, next);
            if (AHEAD) {
#pragma unroll
                for (u32 i = 0; i < NT * LOADS; i++) x[d][i / LOADS][i % LOADS] = column(columns, i / LOADS, next, i % LOADS, pair);
            }
        }
    }

    // 4. add up the warps
#pragma unroll
    for (u32 m = 0; m < MT; m++) {
        if (m > 0) __syncthreads();
#pragma unroll
        for (u32 n = 0; n < NT; n++) {
#pragma unroll
            for (u32 j = 0; j < 4; j++) partial[(warp * 8 * NT + 8 * n + 2 * pair + j % 2) * STRIDE + group + j / 2 * 8] = sums[m][n][j];
        }
        __syncthreads();
        finish<NT, WARPS, OUTPUT>(partial, reciprocal, tiles[m], first_row, n_rows, stream);
    }
}

#define PRODUCT(OUTPUT, output, NT, MT, WARPS, DEPTH, AHEAD, BLOCKS)                                                                  \
    extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) decode_product_##output##_##NT(                                  \
        const bf16* x, const float* squares, u32 n_rows, u32 K, u32 n_squares, float eps, const u8* w0, void* out0, u32 rows0,        \
        const u8* w1, void* out1, u32 rows1, const u8* w2, void* out2, u32 rows2, const u8* w3, void* out3, u32 rows3, bf16* stream_x, \
        bf16* stream_scaled, float* stream_squares, const bf16* norm) {                                                               \
        product<NT, MT, WARPS, DEPTH, AHEAD, OUTPUT>({w0, out0, rows0}, {w1, out1, rows1}, {w2, out2, rows2}, {w3, out3, rows3},      \
                                                     {x, squares, n_rows, K, n_squares, eps},                                         \
                                                     {stream_x, stream_scaled, stream_squares, norm});                                \
    }
#define PRODUCTS(NT, MT, DEPTH, AHEAD, BLOCKS)                \
    PRODUCT(PLAIN, plain, NT, MT, 8, DEPTH, AHEAD, BLOCKS)    \
    PRODUCT(WIDE, wide, NT, MT, 8, DEPTH, AHEAD, BLOCKS)      \
    PRODUCT(SWIGLU, swiglu, NT, MT, 8, DEPTH, AHEAD, BLOCKS)
// Up to 8 NT rows of x; tiles, depth, x ahead, blocks of a multiprocessor: the fastest of those tried on an H200.
PRODUCTS(1, 1, 2, true, 3)
PRODUCTS(2, 1, 2, false, 3)
PRODUCTS(4, 2, 1, false, 2)
PRODUCT(RESIDUAL, residual, 1, 1, 16, 1, true, 2)
PRODUCT(RESIDUAL, residual, 2, 1, 16, 2, true, 1)
PRODUCT(RESIDUAL, residual, 4, 2, 16, 1, false, 1)

// The stream's beginning: rows of the table, as RESIDUAL leaves a stream. A thread has 16 neighbours, a block a row.
extern "C" __global__ void decode_product_embed(bf16* stream_x, bf16* stream_scaled, float* stream_squares, const bf16* table, const bf16* norm,
                                                const u32* tokens, u32 D) {
    release_successor();
    await_predecessor();
    u32 n_tiles = (D + TILE - 1) / TILE;
    u64 from = (u64)tokens[blockIdx.x] * D, to = (u64)blockIdx.x * D;
    for (u32 tile = threadIdx.x; tile < n_tiles; tile += blockDim.x) {
        float square = 0.0f;
        for (u32 o = tile * TILE; o < D && o < (tile + 1) * TILE; o++) {
            bf16 stored = table[from + o];
            float x = to_f32(stored);
            stream_x[to + o] = stored;
            stream_scaled[to + o] = from_f32<bf16>(x * (1.0f + to_f32(norm[o])));
            square += x * x;
        }
        stream_squares[(u64)blockIdx.x * n_tiles + tile] = square;
    }
}
