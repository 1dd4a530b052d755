// Second stage of a sum over rows: out[column] += Σ_i partials[i, column], in an order that the launch fixes. A block has 32
// columns; its warps deal the partials out among them, and the first warp adds up what they found.
//
// out [n_columns]; partials [n_partials, stride], of which the first n_columns columns are taken.

extern "C" __global__ void __launch_bounds__(1024) rows_add_partials(float* out, const float* partials, u32 n_partials, u32 stride,
                                                                     u32 n_columns) {
    __shared__ float sums[32][32];
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
    float sum = 0.0f;
    if (column < n_columns) {
        for (u32 i = warp; i < n_partials; i += 32) sum += partials[(u64)i * stride + column];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || column >= n_columns) return;
    sum = 0.0f;
#pragma unroll
    for (u32 i = 0; i < 32; i++) sum += sums[i][lane];
    out[column] += sum;
}
