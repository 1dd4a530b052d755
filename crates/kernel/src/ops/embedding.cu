// Rows of a table by number, and their gradient added back. A thread works on W neighbouring columns, 8 or 1; the instances
// for 8 need a width D that is a multiple of 8.

static const int WARPS = 8;
static const u32 NO_ROW = 0xffffffffu;

template <int W> __device__ __forceinline__ void read_columns(float (&x)[W], View t, i64 i) {
    if constexpr (W == 8) {
        Eight eight = load8(t, i);
#pragma unroll
        for (int c = 0; c < 8; c++) x[c] = eight.v[c];
    } else {
        x[0] = load(t, i);
    }
}
template <int W> __device__ __forceinline__ void write_columns(View t, i64 i, const float (&x)[W]) {
    if constexpr (W == 8) {
        Eight eight;
#pragma unroll
        for (int c = 0; c < 8; c++) eight.v[c] = x[c];
        store8(t, i, eight);
    } else {
        store(t, i, x[0]);
    }
}

// out[r] = table[rows[r]], zeros where rows[r] is NO_ROW; a block a row.
template <int W> __device__ __forceinline__ void gather(View out_rd, View table_cd, const u32* rows_r, u32 d) {
    u32 row = rows_r[blockIdx.x];
    i64 from = (i64)row * d, to = (i64)blockIdx.x * d;
    for (u32 i = W * threadIdx.x; i < d; i += W * blockDim.x) {
        float x[W] = {};
        if (row != NO_ROW) read_columns<W>(x, table_cd, from + i);
        write_columns<W>(out_rd, to + i, x);
    }
}
extern "C" __global__ void __launch_bounds__(128) embedding_gather(View out_rd, View table_cd, const u32* rows_r, u32 d) {
    gather<1>(out_rd, table_cd, rows_r, d);
}
extern "C" __global__ void __launch_bounds__(128) embedding_gather_8(View out_rd, View table_cd, const u32* rows_r, u32 d) {
    gather<8>(out_rd, table_cd, rows_r, d);
}

// out[rows[r]] = x[r], skipped where rows[r] is NO_ROW; no row twice; a block a row.
template <int W> __device__ __forceinline__ void scatter(View out_td, View x_rd, const u32* rows_r, u32 d) {
    u32 row = rows_r[blockIdx.x];
    if (row == NO_ROW) return;
    i64 to = (i64)row * d, from = (i64)blockIdx.x * d;
    for (u32 i = W * threadIdx.x; i < d; i += W * blockDim.x) {
        float x[W];
        read_columns<W>(x, x_rd, from + i);
        write_columns<W>(out_td, to + i, x);
    }
}
extern "C" __global__ void __launch_bounds__(128) embedding_scatter(View out_td, View x_rd, const u32* rows_r, u32 d) {
    scatter<1>(out_td, x_rd, rows_r, d);
}
extern "C" __global__ void __launch_bounds__(128) embedding_scatter_8(View out_td, View x_rd, const u32* rows_r, u32 d) {
    scatter<8>(out_td, x_rd, rows_r, d);
}

// One distinct id: where its occurrences stand in `order`, which lists the rows of d_out by id and then by row.
struct Segment {
    u32 id, first, n;
};

// sum += d_out[order[i], columns from `column` on] for i in first..end, in that order.
template <int W>
__device__ __forceinline__ void add_rows(float (&sum)[W], View d_out_td, const u32* order_t, u32 first, u32 end, u32 d, u32 column) {
#pragma unroll 4
    for (u32 i = first; i < end; i++) {
        float x[W];
        read_columns<W>(x, d_out_td, (i64)order_t[i] * d + column);
#pragma unroll
        for (int c = 0; c < W; c++) sum[c] += x[c];
    }
}

// d_table[id] += its few rows of d_out, in the order of the CPU. Blocks: segments x columns / (W * threads).
template <int W> __device__ __forceinline__ void few(float* d_table_cd, View d_out_td, const Segment* segments, const u32* order_t, u32 d) {
    View table = {d_table_cd, 0, 0};
    Segment segment = segments[blockIdx.x];
    u32 column = W * (blockIdx.y * blockDim.x + threadIdx.x);
    if (column >= d) return;
    i64 to = (i64)segment.id * d + column;
    float sum[W];
    read_columns<W>(sum, table, to);
    add_rows<W>(sum, d_out_td, order_t, segment.first, segment.first + segment.n, d, column);
    write_columns<W>(table, to, sum);
}
extern "C" __global__ void __launch_bounds__(128, 8)
    embedding_backward_few(float* d_table_cd, View d_out_td, const Segment* segments, const u32* order_t, u32 d) {
    few<1>(d_table_cd, d_out_td, segments, order_t, d);
}
extern "C" __global__ void __launch_bounds__(128, 8)
    embedding_backward_few_8(float* d_table_cd, View d_out_td, const Segment* segments, const u32* order_t, u32 d) {
    few<8>(d_table_cd, d_out_td, segments, order_t, d);
}

// As above for many rows: each warp of a block sums a stretch of them, then the stretches are added in order.
// Blocks: segments x columns / (W * 32).
template <int W> __device__ __forceinline__ void many(float* d_table_cd, View d_out_td, const Segment* segments, const u32* order_t, u32 d) {
    __shared__ float sums[WARPS][W][32];
    View table = {d_table_cd, 0, 0};
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    Segment segment = segments[blockIdx.x];
    u32 column = W * (blockIdx.y * 32 + lane);
    u32 stretch = (segment.n + WARPS - 1) / WARPS;
    u32 first = min(warp * stretch, segment.n), end = min(first + stretch, segment.n);
    float sum[W] = {};
    if (column < d) add_rows<W>(sum, d_out_td, order_t, segment.first + first, segment.first + end, d, column);
#pragma unroll
    for (int c = 0; c < W; c++) sums[warp][c][lane] = sum[c];
    __syncthreads();
    if (warp > 0 || column >= d) return;
    i64 to = (i64)segment.id * d + column;
    read_columns<W>(sum, table, to);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
#pragma unroll
        for (int c = 0; c < W; c++) sum[c] += sums[w][c][lane];
    }
    write_columns<W>(table, to, sum);
}
extern "C" __global__ void __launch_bounds__(32 * WARPS, 4)
    embedding_backward_many(float* d_table_cd, View d_out_td, const Segment* segments, const u32* order_t, u32 d) {
    many<1>(d_table_cd, d_out_td, segments, order_t, d);
}
extern "C" __global__ void __launch_bounds__(32 * WARPS, 4)
    embedding_backward_many_8(float* d_table_cd, View d_out_td, const Segment* segments, const u32* order_t, u32 d) {
    many<8>(d_table_cd, d_out_td, segments, order_t, d);
}
