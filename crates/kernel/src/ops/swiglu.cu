// out = silu(gate) up and its gradients, eight elements a thread.

template <class P> __device__ __forceinline__ void forward(View out, View gate, View up, u64 n) {
    u64 i = 8 * ((u64)blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= n) return;
    u32 here = n - i < 8 ? (u32)(n - i) : 8;
    auto fetched_gate = fetch8(data_of<P>(gate), i, here);
    auto fetched_up = fetch8(data_of<P>(up), i, here);
    Eight g = widen(fetched_gate), u = widen(fetched_up);
#pragma unroll
    for (int j = 0; j < 8; j++) u.v[j] *= silu(g.v[j]);
    put8(data_of<P>(out), i, here, u);
}

template <class P>
__device__ __forceinline__ void backward(View d_gate, View d_up, View d_out, View gate, View up, u64 n) {
    u64 i = 8 * ((u64)blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= n) return;
    u32 here = n - i < 8 ? (u32)(n - i) : 8;
    auto fetched_d = fetch8(data_of<P>(d_out), i, here);
    auto fetched_gate = fetch8(data_of<P>(gate), i, here);
    auto fetched_up = fetch8(data_of<P>(up), i, here);
    Eight d = widen(fetched_d), g = widen(fetched_gate), u = widen(fetched_up);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        float s = sigmoid(g.v[j]);
        float d_here = d.v[j];
        d.v[j] = d_here * (g.v[j] * s);
        g.v[j] = d_here * u.v[j] * (s * (1.0f + g.v[j] * (1.0f - s)));
    }
    put8(data_of<P>(d_gate), i, here, g);
    put8(data_of<P>(d_up), i, here, d);
}

extern "C" __global__ void swiglu_forward_bf16(View out, View gate, View up, u64 n) { forward<bf16*>(out, gate, up, n); }
extern "C" __global__ void swiglu_forward_any(View out, View gate, View up, u64 n) { forward<View>(out, gate, up, n); }

extern "C" __global__ void swiglu_backward_bf16(View d_gate, View d_up, View d_out, View gate, View up, u64 n) {
    backward<bf16*>(d_gate, d_up, d_out, gate, up, n);
}
extern "C" __global__ void swiglu_backward_any(View d_gate, View d_up, View d_out, View gate, View up, u64 n) {
    backward<View>(d_gate, d_up, d_out, gate, up, n);
}
