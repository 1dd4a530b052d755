// Sums of squares in two steps: a partial sum in f32 for each block of a tensor's elements, in one launch for all tensors, then all
// of them in f64, in an order that depends on their number alone.

static const int THREADS = 256;
// Vectors of eight that a thread squares.
static const int VECTORS = 8;

// A tensor of the table, 24 bytes.
struct Part {
    const void* data;
    u64 n;
    u32 is_bf16, unused;
};

// partials[b] = Σ grad² over the block's elements of its tensor: those from (b - firsts[tensor]) * 8 * VECTORS * THREADS on.
extern "C" __global__ void __launch_bounds__(THREADS) grad_norm_partial(float* partials, const u32* firsts, const Part* parts, u32 n_parts) {
    u32 which = tensor_of_block(firsts, n_parts), block = blockIdx.x - firsts[which];
    View grad = {(void*)parts[which].data, parts[which].is_bf16, 0};
    u64 n = parts[which].n, n_vectors = n / 8, first = (u64)block * VECTORS * THREADS + threadIdx.x;
    float sum = 0.0f;
#pragma unroll
    for (int a = 0; a < VECTORS; a++) {
        u64 i = first + a * THREADS;
        if (i < n_vectors) {
            Eight x = load8(grad, 8 * i);
#pragma unroll
            for (int j = 0; j < 8; j++) sum += x.v[j] * x.v[j];
        }
    }
    // The last block has the elements that fill no vector.
    u64 rest = 8 * n_vectors + threadIdx.x;
    if ((u64)(block + 1) * 8 * VECTORS * THREADS >= n && rest < n) {
        float x = load(grad, rest);
        sum += x * x;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// norm[0] = sqrt(Σ partials), by one block of 1024 threads.
extern "C" __global__ void __launch_bounds__(1024) grad_norm_total(float* norm, const float* partials, u64 n) {
    __shared__ double sums[1024];
    double sum = 0.0;
#pragma unroll 8
    for (u64 i = threadIdx.x; i < n; i += 1024) sum += (double)partials[i];
    sums[threadIdx.x] = sum;
    for (u32 half = 512; half > 0; half >>= 1) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) norm[0] = (float)sqrt(sums[0]);
}
