// out = x sigmoid(gate) and its gradients, eight elements a thread.

template <class P> __device__ __forceinline__ void forward(View out, View x, View gate, u64 n) {
    u64 i = 8 * ((u64)blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= n) return;
    u32 here = n - i < 8 ? (u32)(n - i) : 8;
    auto fetched_x = fetch8(data_of<P>(x), i, here);
    auto fetched_gate = fetch8(data_of<P>(gate), i, here);
    Eight y = widen(fetched_x), g = widen(fetched_gate);
#pragma unroll
    for (int j = 0; j < 8; j++) y.v[j] *= sigmoid(g.v[j]);
    put8(data_of<P>(out), i, here, y);
}

template <class P>
__device__ __forceinline__ void backward(View d_x, View d_gate, View d_out, View x, View gate, u64 n) {
    u64 i = 8 * ((u64)blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= n) return;
    u32 here = n - i < 8 ? (u32)(n - i) : 8;
    auto fetched_d = fetch8(data_of<P>(d_out), i, here);
    auto fetched_x = fetch8(data_of<P>(x), i, here);
    auto fetched_gate = fetch8(data_of<P>(gate), i, here);
    Eight d = widen(fetched_d), y = widen(fetched_x), g = widen(fetched_gate);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        float s = sigmoid(g.v[j]);
        g.v[j] = d.v[j] * y.v[j] * (s * (1.0f - s));
        d.v[j] *= s;
    }
    put8(data_of<P>(d_x), i, here, d);
    put8(data_of<P>(d_gate), i, here, g);
}

extern "C" __global__ void sigmoid_gate_forward_bf16(View out, View x, View gate, u64 n) { forward<bf16*>(out, x, gate, n); }
extern "C" __global__ void sigmoid_gate_forward_any(View out, View x, View gate, u64 n) { forward<View>(out, x, gate, n); }

extern "C" __global__ void sigmoid_gate_backward_bf16(View d_x, View d_gate, View d_out, View x, View gate, u64 n) {
    backward<bf16*>(d_x, d_gate, d_out, x, gate, n);
}
extern "C" __global__ void sigmoid_gate_backward_any(View d_x, View d_gate, View d_out, View x, View gate, u64 n) {
    backward<View>(d_x, d_gate, d_out, x, gate, n);
}
