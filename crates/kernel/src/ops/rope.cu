// Turns pairs (i, i + half) of each head by position · inv_freq[i], in place. A thread has one token and up to eight pairs, and
// turns those of a few heads by the same sines.
//
// x [n_tokens, n_heads, head_dim]; inv_freq [half]; positions [n_tokens]; direction 1 forward, -1 backward.

constexpr u32 HEADS = 4;

template <class P>
__device__ __forceinline__ void turn(View x_view, const float* inv_freq, const u32* positions, u32 n_tokens, u32 n_heads, u32 head_dim,
                                     u32 half, float direction) {
    P x = data_of<P>(x_view);
    u32 n_octets = (half + 7) / 8, n_bunches = (n_heads + HEADS - 1) / HEADS;
    u32 idx = blockIdx.x * blockDim.x + threadIdx.x;
    u32 octet = idx % n_octets, bunch = idx / n_octets % n_bunches, t = idx / n_octets / n_bunches;
    if (t >= n_tokens) return;
    u32 n = n_in_eight(half, octet), first_head = bunch * HEADS;
    i64 i = ((i64)t * n_heads + first_head) * head_dim + 8 * octet;
    Fetched<P> low[HEADS], high[HEADS];
#pragma unroll
    for (u32 h = 0; h < HEADS; h++) {
        u32 n_here = first_head + h < n_heads ? n : 0;
        low[h] = fetch8(x, i + h * head_dim, n_here);
        high[h] = fetch8(x, i + h * head_dim + half, n_here);
    }
    float position = (float)positions[t], cosines[8], sines[8];
#pragma unroll
    for (u32 j = 0; j < 8; j++) {
        float angle = position * (j < n ? inv_freq[8 * octet + j] : 0.0f);
        sincosf(angle, &sines[j], &cosines[j]);
        sines[j] *= direction;
    }
#pragma unroll
    for (u32 h = 0; h < HEADS; h++) {
        if (first_head + h >= n_heads) break;
        Eight a = widen(low[h]), b = widen(high[h]);
#pragma unroll
        for (u32 j = 0; j < 8; j++) {
            float turned = a.v[j] * cosines[j] - b.v[j] * sines[j];
            b.v[j] = b.v[j] * cosines[j] + a.v[j] * sines[j];
            a.v[j] = turned;
        }
        put8(x, i + h * head_dim, n, a);
        put8(x, i + h * head_dim + half, n, b);
    }
}

#define KERNEL(P, INSTANCE)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(128) rope_turn_##INSTANCE(View x, const float* inv_freq, const u32* positions, \
                                                                           u32 n_tokens, u32 n_heads, u32 head_dim, u32 half,   \
                                                                           float direction) {                                   \
        turn<P>(x, inv_freq, positions, n_tokens, n_heads, head_dim, half, direction);                                          \
    }
KERNEL(bf16*, bf16)
KERNEL(View, any)
