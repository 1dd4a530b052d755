// The likeliest of many logits, and what their probabilities need: for each row the logits of at least the K largest (all that are not
// below the K-th largest of the maxima of equal groups), ids ascending, the largest logit, and sum exp(logit - largest).
//
// logits [B, C] f32; maxima, masses [B, n_groups]; a row of `out` is HEADER words, then `room` ids, then `room` logits. A group of C is
// `group` neighbours; at most 2048 groups.

constexpr u32 MOST_GROUPS = 2048, THREADS = 1024, HEADER = 4;

// Rises with x; NaN of either sign above all numbers.
__device__ __forceinline__ u32 key_of(float x) {
    u32 bits = __float_as_uint(x);
    if (x != x) return 0xffffffffu;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float of_key(u32 key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// A warp a group: its largest logit and sum exp(logit - largest). A NaN or an infinity makes the largest infinite.
extern "C" __global__ void __launch_bounds__(256) top_candidates_groups(float* maxima, float* masses, const float* logits, u32 C, u32 group,
                                                                        u32 n_groups) {
    const float infinity = __int_as_float(0x7f800000);
    release_successor();
    await_predecessor();
    u32 lane = threadIdx.x % 32, at = blockIdx.x * 8 + threadIdx.x / 32;
    if (at >= n_groups) return;
    const float* row = logits + (u64)blockIdx.y * C;
    u32 first = at * group, end = min(C, first + group);
    float most = -infinity;
    bool is_broken = false;
    for (u32 i = first + lane; i < end; i += 32) {
        float x = row[i];
        is_broken |= x != x;
        most = fmaxf(most, x);
    }
    most = warp_max(is_broken ? infinity : most);
    float mass = 0.0f;
    for (u32 i = first + lane; i < end; i += 32) mass += most > -infinity ? expf(row[i] - most) : 0.0f;
    mass = warp_sum(mass);
    if (lane == 0) {
        maxima[(u64)blockIdx.y * n_groups + at] = most;
        masses[(u64)blockIdx.y * n_groups + at] = mass;
    }
}

// Where this thread's count begins among those of all threads, and their total.
__device__ __forceinline__ u32 block_offset(u32 count, u32& total) {
    __shared__ u32 warps[32];
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, sum = count;
#pragma unroll
    for (u32 offset = 1; offset < 32; offset *= 2) {
        u32 other = __shfl_up_sync(0xffffffffu, sum, offset);
        if (lane >= offset) sum += other;
    }
    __syncthreads();
    if (lane == 31) warps[warp] = sum;
    __syncthreads();
    u32 before = 0;
    total = 0;
    for (u32 w = 0; w < 32; w++) {
        if (w < warp) before += warps[w];
        total += warps[w];
    }
    return before + sum - count;
}

// A block a row. Header: number of candidates (more than `room`: none are written), 1 if a logit is no finite number or -infinity,
// the largest logit, the sum.
extern "C" __global__ void __launch_bounds__(1024) top_candidates_select(u32* out, const float* maxima, const float* masses, const float* logits,
                                                                         u32 C, u32 group, u32 n_groups, u32 K, u32 room) {
    __shared__ u32 keys[MOST_GROUPS], chosen[MOST_GROUPS], counts[MOST_GROUPS];
    __shared__ double sums[32];
    const float infinity = __int_as_float(0x7f800000);
    u32 thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    release_successor();
    await_predecessor();
    const float* row = logits + (u64)blockIdx.x * C;
    maxima += (u64)blockIdx.x * n_groups;
    masses += (u64)blockIdx.x * n_groups;
    u32* to = out + (u64)blockIdx.x * (HEADER + 2 * room);

    // 1. sort the maxima, the largest first
    for (u32 i = thread; i < MOST_GROUPS; i += THREADS) keys[i] = i < n_groups ? key_of(maxima[i]) : 0;
    for (u32 size = 2; size <= MOST_GROUPS; size *= 2) {
        for (u32 step = size / 2; step > 0; step /= 2) {
            __syncthreads();
            u32 i = 2 * thread - (thread & (step - 1)), a = keys[i], b = keys[i + step];
            bool falls = (i & size) == 0;
            if (falls ? a < b : a > b) keys[i] = b, keys[i + step] = a;
        }
    }
    __syncthreads();
    float most = of_key(keys[0]), floor = K <= n_groups ? of_key(keys[K - 1]) : -infinity;
    if (!(most < infinity) || most == -infinity) {
        if (thread == 0) to[0] = 0, to[1] = most == -infinity ? 0 : 1, to[2] = __float_as_uint(most), to[3] = 0;
        return;
    }

    // 2. the sum, two groups a thread
    double sum = 0.0;
    for (u32 i = thread; i < n_groups; i += THREADS) sum += (double)(masses[i] * expf(maxima[i] - most));
#pragma unroll
    for (u32 offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (lane == 0) sums[warp] = sum;

    // 3. groups with a candidate, in order: each thread looks at two neighbours
    u32 first = 2 * thread, flags[2], total;
    for (u32 j = 0; j < 2; j++) flags[j] = first + j < n_groups && maxima[first + j] >= floor;
    u32 offset = block_offset(flags[0] + flags[1], total);
    if (flags[0]) chosen[offset] = first;
    if (flags[1]) chosen[offset + flags[0]] = first + 1;
    u32 n_chosen = total;
    __syncthreads();

    // 4. candidates of each such group, a warp a group
    for (u32 i = warp; i < n_chosen; i += 32) {
        u32 begin = chosen[i] * group, end = min(C, begin + group), count = 0;
        for (u32 at = begin; at < end; at += 32) {
            bool is_in = at + lane < end && row[at + lane] >= floor;
            count += __popc(__ballot_sync(0xffffffffu, is_in));
        }
        if (lane == 0) counts[i] = count;
    }
    __syncthreads();
    u32 pair[2];
    for (u32 j = 0; j < 2; j++) pair[j] = first + j < n_chosen ? counts[first + j] : 0;
    offset = block_offset(pair[0] + pair[1], total);
    if (first < n_chosen) counts[first] = offset;
    if (first + 1 < n_chosen) counts[first + 1] = offset + pair[0];
    if (thread == 0) {
        double all = 0.0;
        for (u32 w = 0; w < 32; w++) all += sums[w];
        to[0] = total, to[1] = 0, to[2] = __float_as_uint(most), to[3] = __float_as_uint((float)all);
    }
    if (total > room) return;
    __syncthreads();
    for (u32 i = warp; i < n_chosen; i += 32) {
        u32 begin = chosen[i] * group, end = min(C, begin + group), place = counts[i];
        for (u32 at = begin; at < end; at += 32) {
            float x = at + lane < end ? row[at + lane] : -infinity;
            bool is_in = at + lane < end && x >= floor;
            u32 mask = __ballot_sync(0xffffffffu, is_in), before = __popc(mask & ((1u << lane) - 1));
            if (is_in) to[HEADER + place + before] = at + lane, to[HEADER + room + place + before] = __float_as_uint(x);
            place += __popc(mask);
        }
    }
}
