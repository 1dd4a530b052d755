// Depthwise causal convolution of width 4 with SiLU, channels last, and the same with what the delta rule wants done to its
// output (q and k normalised head by head, q also scaled). A thread has eight channels and walks a run of tokens with the last
// three inputs in registers, so that each input is read once but for the three at the seam of two runs. Where a document
// begins, the three become zeros.
//
// x, d_x [n_tokens, n_channels]; w [n_channels, 4]; cu_seqlens [n_documents + 1], null for one document.
// grid: x over threads of channels, y over runs of `run` tokens.

constexpr u32 PAST = 3, WIDTH = 4;
// Tokens whose inputs are under way.
constexpr u32 AHEAD = 4;

// The document of a token that only moves on.
struct Document {
    u32 start, end;
    // The boundary `end`; null where there is but one document.
    const u32* boundary;

    __device__ __forceinline__ Document(const u32* cu_seqlens, u32 n_documents, u32 n_tokens, u32 t) {
        start = 0;
        end = n_tokens;
        boundary = nullptr;
        if (cu_seqlens == nullptr) return;
        // The first boundary above t; the last boundary is.
        u32 low = 1, high = n_documents;
        while (low < high) {
            u32 middle = (low + high) / 2;
            if (cu_seqlens[middle] > t) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        boundary = cu_seqlens + low;
        start = boundary[-1];
        end = boundary[0];
    }

    // Goes on to t, the token after the last one, below n_tokens; says whether a document begins there.
    __device__ __forceinline__ bool begins(u32 t) {
        if (t < end) return false;
        start = end;
        // Empty documents have a boundary and no token.
        do {
            end = *++boundary;
        } while (end <= t);
        return true;
    }
};

// Where a thread's eight channels (`n` of them real) lie in rows of all channels.
struct Channels {
    u32 first, n;
};

struct Taps {
    Eight w[WIDTH];

    __device__ __forceinline__ Taps(View w_c4, Channels at) {
#pragma unroll
        for (u32 quarter = 0; quarter < 4; quarter++) {
            // Two channels of four taps; w is small enough to be read at any width.
            u32 n = at.n > 2 * quarter ? min(4 * (at.n - 2 * quarter), 8u) : 0;
            Eight two = widen(fetch8(w_c4, 4 * (i64)at.first + 8 * quarter, n));
#pragma unroll
            for (u32 j = 0; j < 8; j++) w[j % 4].v[2 * quarter + j / 4] = two.v[j];
        }
    }
};

struct Window {
    Eight x[PAST];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (u32 k = 0; k < PAST; k++) {
#pragma unroll
            for (u32 j = 0; j < 8; j++) x[k].v[j] = 0.0f;
        }
    }

    // The inputs before token t: of its document, before that of the state (a document's first run only), else zeros.
    template <class P>
    __device__ __forceinline__ Window(P source, const float* state, u32 n_channels, Channels at, u32 t, u32 document_start) {
        clear();
#pragma unroll
        for (u32 k = 0; k < PAST; k++) {
            if (t + k >= document_start + PAST) {
                x[k] = widen(fetch8(source, (i64)(t + k - PAST) * n_channels + at.first, at.n));
            } else if (state != nullptr) {
                View old = {(void*)state, 0, 0};
                x[k] = widen(fetch8(old, (i64)(t + k) * n_channels + at.first, at.n));
            }
        }
    }

    __device__ __forceinline__ Eight filter(const Taps& taps, const Eight& last) const {
        Eight y;
#pragma unroll
        for (u32 j = 0; j < 8; j++) {
            y.v[j] = x[0].v[j] * taps.w[0].v[j] + x[1].v[j] * taps.w[1].v[j] + (x[2].v[j] * taps.w[2].v[j] + last.v[j] * taps.w[3].v[j]);
        }
        return y;
    }

    __device__ __forceinline__ void push(const Eight& last) {
        x[0] = x[1];
        x[1] = x[2];
        x[2] = last;
    }
};

// ---- forward

// `put(t, silu(y))` takes each token's eight results.
template <class P, class Put>
__device__ __forceinline__ void walk(P x, View w, const float* state, float* new_state, const u32* cu_seqlens, u32 n_documents,
                                     u32 n_tokens, u32 n_channels, u32 run, Channels at, Put put) {
    u32 t = blockIdx.y * run, end = min(t + run, n_tokens);
    Taps taps(w, at);
    Document document(cu_seqlens, n_documents, n_tokens, t);
    Window window(x, state, n_channels, at, t, document.start);
    auto fetch = [&](u32 t) { return fetch8(x, (i64)t * n_channels + at.first, t < end ? at.n : 0); };
    Fetched<P> fetched[AHEAD];
#pragma unroll
    for (u32 k = 0; k < AHEAD; k++) fetched[k] = fetch(t + k);
    while (t < end) {
#pragma unroll
        for (u32 k = 0; k < AHEAD; k++, t++) {
            if (t >= end) break;
            Fetched<P> here = fetched[k];
            fetched[k] = fetch(t + AHEAD);
            if (document.begins(t)) window.clear();
            Eight last = widen(here);
            Eight y = window.filter(taps, last);
#pragma unroll
            for (u32 j = 0; j < 8; j++) y.v[j] = silu(y.v[j]);
            put(t, y);
            window.push(last);
        }
    }
    if (new_state != nullptr && end == n_tokens) {
        View kept = {new_state, 0, 0};
#pragma unroll
        for (u32 k = 0; k < PAST; k++) put8(kept, (i64)k * n_channels + at.first, at.n, window.x[k]);
    }
}

// state [3, n_channels] or null; new_state: the same, null where another kernel writes it (several runs).
template <class P>
__device__ __forceinline__ void forward(View out, View x, View w, const float* state, float* new_state, const u32* cu_seqlens,
                                        u32 n_documents, u32 n_tokens, u32 n_channels, u32 run) {
    u32 eight = blockIdx.x * blockDim.x + threadIdx.x;
    Channels at = {8 * eight, n_in_eight(n_channels, eight)};
    if (at.n == 0) return;
    P to = data_of<P>(out);
    walk(data_of<P>(x), w, state, new_state, cu_seqlens, n_documents, n_tokens, n_channels, run, at,
         [&](u32 t, const Eight& y) { put8(to, (i64)t * n_channels + at.first, at.n, y); });
}

extern "C" __global__ void __launch_bounds__(128) causal_conv1d_forward_bf16(View out, View x, View w, const float* state, float* new_state,
                                                                             const u32* cu_seqlens, u32 n_documents, u32 n_tokens,
                                                                             u32 n_channels, u32 run) {
    forward<bf16*>(out, x, w, state, new_state, cu_seqlens, n_documents, n_tokens, n_channels, run);
}
extern "C" __global__ void __launch_bounds__(128) causal_conv1d_forward_any(View out, View x, View w, const float* state, float* new_state,
                                                                            const u32* cu_seqlens, u32 n_documents, u32 n_tokens,
                                                                            u32 n_channels, u32 run) {
    forward<View>(out, x, w, state, new_state, cu_seqlens, n_documents, n_tokens, n_channels, run);
}

// The last three of n_tokens >= 3 inputs, one thread a number.
extern "C" __global__ void causal_conv1d_keep_state(float* state, View x, u32 n_tokens, u32 n_channels) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < PAST * n_channels) state[i] = load(x, (i64)(n_tokens - PAST) * n_channels + i);
}

// ---- backward

// Walks a run and the three tokens behind it that see into it; `source` gives the gradient of the convolution's output. Of the
// gradient of inputs, three wait for what later tokens add.
// partials [runs, n_channels, 4] (rows begin at multiples of eight), null where w is frozen.
template <class P, class Source>
__device__ __forceinline__ void walk_backward(P d_x, float* partials, P x, View w, const u32* cu_seqlens, u32 n_documents, u32 n_tokens,
                                              u32 n_channels, u32 run, Channels at, const Source& source) {
    u32 start = blockIdx.y * run, end = min(start + run, n_tokens);
    Taps taps(w, at);
    Document document(cu_seqlens, n_documents, n_tokens, start);
    Window window(x, nullptr, n_channels, at, start, document.start);
    Eight waiting[PAST], d_w[WIDTH];
#pragma unroll
    for (u32 j = 0; j < 8; j++) {
#pragma unroll
        for (u32 k = 0; k < PAST; k++) waiting[k].v[j] = 0.0f;
#pragma unroll
        for (u32 k = 0; k < WIDTH; k++) d_w[k].v[j] = 0.0f;
    }
    u32 seen = min(end + PAST, n_tokens);
    auto fetch_x = [&](u32 t) { return fetch8(x, (i64)t * n_channels + at.first, t < seen ? at.n : 0); };
    Fetched<P> fetched_x[AHEAD];
    typename Source::Fetched fetched_d[AHEAD];
#pragma unroll
    for (u32 k = 0; k < AHEAD; k++) {
        fetched_x[k] = fetch_x(start + k);
        fetched_d[k] = source.fetch(start + k, start + k < seen);
    }
    for (u32 t = start; t < end + PAST;) {
#pragma unroll
        for (u32 k = 0; k < AHEAD; k++, t++) {
            if (t >= end + PAST) break;
            Fetched<P> here = fetched_x[k];
            typename Source::Fetched d_here = fetched_d[k];
            fetched_x[k] = fetch_x(t + AHEAD);
            fetched_d[k] = source.fetch(t + AHEAD, t + AHEAD < seen);
            Eight d_y;
#pragma unroll
            for (u32 j = 0; j < 8; j++) d_y.v[j] = 0.0f;
            if (t < n_tokens) {
                if (document.begins(t)) window.clear();
                Eight last = widen(here);
                Eight slope = window.filter(taps, last), out;
#pragma unroll
                for (u32 j = 0; j < 8; j++) {
                    float s = sigmoid(slope.v[j]);
                    out.v[j] = slope.v[j] * s;
                    slope.v[j] = s * (1.0f + slope.v[j] * (1.0f - s));
                }
                d_y = source.gradient(d_here, out);
                u32 n_before = t - document.start;
#pragma unroll
                for (u32 j = 0; j < 8; j++) {
                    d_y.v[j] *= slope.v[j];
                    if (n_before >= 3) waiting[0].v[j] += d_y.v[j] * taps.w[0].v[j];
                    if (n_before >= 2) waiting[1].v[j] += d_y.v[j] * taps.w[1].v[j];
                    if (n_before >= 1) waiting[2].v[j] += d_y.v[j] * taps.w[2].v[j];
                }
                if (t < end) {
#pragma unroll
                    for (u32 j = 0; j < 8; j++) {
                        d_w[0].v[j] += d_y.v[j] * window.x[0].v[j];
                        d_w[1].v[j] += d_y.v[j] * window.x[1].v[j];
                        d_w[2].v[j] += d_y.v[j] * window.x[2].v[j];
                        d_w[3].v[j] += d_y.v[j] * last.v[j];
                    }
                }
                window.push(last);
            }
            if (t >= start + PAST) put8(d_x, (i64)(t - PAST) * n_channels + at.first, at.n, waiting[0]);
            waiting[0] = waiting[1];
            waiting[1] = waiting[2];
#pragma unroll
            for (u32 j = 0; j < 8; j++) waiting[2].v[j] = d_y.v[j] * taps.w[3].v[j];
        }
    }
    if (partials == nullptr) return;
    float* row = partials + (u64)blockIdx.y * ((WIDTH * n_channels + 7) / 8 * 8);
#pragma unroll
    for (u32 j = 0; j < 8; j++) {
        if (j < at.n) *(float4*)(row + WIDTH * (at.first + j)) = make_float4(d_w[0].v[j], d_w[1].v[j], d_w[2].v[j], d_w[3].v[j]);
    }
}

// ---- what the delta rule takes: q and k normalised, q scaled, v as it is

// How threads share a row: `group` of them a head of q, then of k, then from a new warp on one for eight channels of v.
struct Role {
    bool is_head, is_query, leads;
    // Among the heads of q, or of k.
    u32 head;
    // In a row of q, of k or of v, which has `width` columns.
    u32 column, width;
    Channels at;

    __device__ __forceinline__ Role(u32 n_heads, u32 head_dim, u32 value_width, u32 group) {
        u32 idx = blockIdx.x * blockDim.x + threadIdx.x, first_of_v = (2 * n_heads * group + 31) / 32 * 32;
        is_head = idx < first_of_v;
        if (is_head) {
            u32 either = idx / group, lane = idx % group;
            is_query = either < n_heads;
            leads = lane == 0 && either < 2 * n_heads;
            head = is_query ? either : either - n_heads;
            column = head * head_dim + 8 * lane;
            width = n_heads * head_dim;
            at.first = either * head_dim + 8 * lane;
            at.n = either < 2 * n_heads ? n_in_eight(head_dim, lane) : 0;
        } else {
            u32 eight = idx - first_of_v;
            is_query = leads = false;
            head = 0;
            column = 8 * eight;
            width = value_width;
            at.first = 2 * n_heads * head_dim + column;
            at.n = n_in_eight(value_width, eight);
        }
    }

    template <class T> __device__ __forceinline__ T of(T q, T k, T v) const { return is_query ? q : is_head ? k : v; }
};

// q, k [T, n_heads, head_dim]; v [T, value_width]; q_rstd, k_rstd [T, n_heads]; x the three side by side.
template <class P>
__device__ __forceinline__ void delta_forward(View q, View k, View v, float* q_rstd, float* k_rstd, View x, View w,
                                              const u32* cu_seqlens, u32 n_documents, u32 n_tokens, u32 n_heads, u32 head_dim,
                                              u32 value_width, u32 group, u32 run, float q_scale, float eps) {
    Role role(n_heads, head_dim, value_width, group);
    P out = role.of(data_of<P>(q), data_of<P>(k), data_of<P>(v));
    float* rstd = role.is_query ? q_rstd : k_rstd;
    float scale = role.is_query ? q_scale : 1.0f;
    u32 n_channels = 2 * n_heads * head_dim + value_width;
    walk(data_of<P>(x), w, nullptr, nullptr, cu_seqlens, n_documents, n_tokens, n_channels, run, role.at, [&](u32 t, Eight y) {
        if (role.is_head) {
            float sum = 0.0f;
#pragma unroll
            for (u32 j = 0; j < 8; j++) sum += y.v[j] * y.v[j];
            float r = 1.0f / sqrtf(lanes_sum(sum, group) + eps);
            if (role.leads) rstd[(i64)t * n_heads + role.head] = r;
#pragma unroll
            for (u32 j = 0; j < 8; j++) y.v[j] *= scale * r;
        }
        put8(out, (i64)t * role.width + role.column, role.at.n, y);
    });
}

// The gradient of the convolution's output, by way of the norm where there is one.
template <class P> struct Normalised {
    struct Fetched {
        ::Fetched<P> d;
        float r;
    };
    P d;
    const float* rstd;
    u32 n_heads, group;
    float scale;
    Role role;

    __device__ __forceinline__ Fetched fetch(u32 t, bool there) const {
        Fetched fetched;
        fetched.d = fetch8(d, (i64)t * role.width + role.column, there ? role.at.n : 0);
        fetched.r = there && role.at.n > 0 && role.is_head ? rstd[(i64)t * n_heads + role.head] : 0.0f;
        return fetched;
    }
    __device__ __forceinline__ Eight gradient(const Fetched& fetched, const Eight& out) const {
        Eight x = widen(fetched.d);
        if (!role.is_head) return x;
        float sum = 0.0f;
#pragma unroll
        for (u32 j = 0; j < 8; j++) sum += x.v[j] * out.v[j];
        float pull = lanes_sum(sum, group) * (fetched.r * fetched.r), factor = scale * fetched.r;
#pragma unroll
        for (u32 j = 0; j < 8; j++) x.v[j] = factor * (x.v[j] - out.v[j] * pull);
        return x;
    }
};

template <class P>
__device__ __forceinline__ void delta_backward(View d_x, float* partials, View d_q, View d_k, View d_v, View x, View w,
                                               const float* q_rstd, const float* k_rstd, const u32* cu_seqlens, u32 n_documents,
                                               u32 n_tokens, u32 n_heads, u32 head_dim, u32 value_width, u32 group, u32 run,
                                               float q_scale) {
    Role role(n_heads, head_dim, value_width, group);
    P d = role.of(data_of<P>(d_q), data_of<P>(d_k), data_of<P>(d_v));
    Normalised<P> source = {d, role.is_query ? q_rstd : k_rstd, n_heads, group, role.is_query ? q_scale : 1.0f, role};
    u32 n_channels = 2 * n_heads * head_dim + value_width;
    walk_backward(data_of<P>(d_x), partials, data_of<P>(x), w, cu_seqlens, n_documents, n_tokens, n_channels, run, role.at, source);
}

#define DELTA_KERNELS(P, INSTANCE)                                                                                              \
    extern "C" __global__ void __launch_bounds__(128)                                                                           \
        delta_inputs_forward_##INSTANCE(View q, View k, View v, float* q_rstd, float* k_rstd, View x, View w,                   \
                                        const u32* cu_seqlens, u32 n_documents, u32 n_tokens, u32 n_heads, u32 head_dim,        \
                                        u32 value_width, u32 group, u32 run, float q_scale, float eps) {                        \
        delta_forward<P>(q, k, v, q_rstd, k_rstd, x, w, cu_seqlens, n_documents, n_tokens, n_heads, head_dim, value_width,      \
                         group, run, q_scale, eps);                                                                             \
    }                                                                                                                           \
    extern "C" __global__ void __launch_bounds__(128, 2)                                                                        \
        delta_inputs_backward_##INSTANCE(View d_x, float* partials, View d_q, View d_k, View d_v, View x, View w,               \
                                         const float* q_rstd, const float* k_rstd, const u32* cu_seqlens, u32 n_documents,      \
                                         u32 n_tokens, u32 n_heads, u32 head_dim, u32 value_width, u32 group, u32 run,          \
                                         float q_scale) {                                                                       \
        delta_backward<P>(d_x, partials, d_q, d_k, d_v, x, w, q_rstd, k_rstd, cu_seqlens, n_documents, n_tokens, n_heads,       \
                          head_dim, value_width, group, run, q_scale);                                                          \
    }
DELTA_KERNELS(bf16*, bf16)
DELTA_KERNELS(View, any)
