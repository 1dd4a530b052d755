// Gates of the delta rule: g = -exp(a_log) softplus(a + dt_bias), beta = sigmoid(b), one thread an element. Backward keeps a
// thread at one head, walks many tokens a block, and leaves one row (d_a_log, d_dt_bias) a block in `partials`.
//
// g, beta, d_g, d_beta, a, b, d_a, d_b [T, h]; a_log, dt_bias [h]; partials [blocks, 2 h] (rows begin at multiples of
// eight), null where both are frozen.

extern "C" __global__ void delta_gate_forward(float* g, float* beta, View a, View b, View a_log, View dt_bias, u64 n, u32 h) {
    u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    u32 head = i % h;
    g[i] = -expf(load(a_log, head)) * softplus(load(a, i) + load(dt_bias, head));
    beta[i] = sigmoid(load(b, i));
}

// A block has blockDim.x / h rows at a time, h of its threads each; h is at most blockDim.x.
extern "C" __global__ void __launch_bounds__(1024) delta_gate_backward(View d_a, View d_b, float* partials, View d_g, View d_beta, View a,
                                                                       View b, View a_log, View dt_bias, u32 n_tokens, u32 h) {
    __shared__ float sums[2][1024];
    u32 n_rows = blockDim.x / h, head = threadIdx.x % h;
    float d_a_log = 0.0f, d_dt_bias = 0.0f;
    if (threadIdx.x < n_rows * h) {
        float rate = -expf(load(a_log, head)), bias = load(dt_bias, head);
        for (u32 t = blockIdx.x * n_rows + threadIdx.x / h; t < n_tokens; t += gridDim.x * n_rows) {
            i64 i = (i64)t * h + head;
            float x = load(a, i) + bias, strength = sigmoid(load(b, i));
            float scaled = load(d_g, i) * rate;
            float d_x = scaled * sigmoid(x);
            store(d_a, i, d_x);
            store(d_b, i, load(d_beta, i) * (strength * (1.0f - strength)));
            d_a_log += scaled * softplus(x);
            d_dt_bias += d_x;
        }
    }
    if (partials == nullptr) return;
    sums[0][threadIdx.x] = d_a_log;
    sums[1][threadIdx.x] = d_dt_bias;
    __syncthreads();
    if (threadIdx.x < h) {
        float* row_of_block = partials + (u64)blockIdx.x * ((2 * h + 7) / 8 * 8);
        for (u32 which = 0; which < 2; which++) {
            float sum = 0.0f;
            for (u32 row = 0; row < n_rows; row++) sum += sums[which][row * h + threadIdx.x];
            row_of_block[which * h + threadIdx.x] = sum;
        }
    }
}
