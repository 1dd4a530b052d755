// Rows taken apart into two or three stretches, and put together again. A thread copies eight neighbours where all widths are
// multiples of eight and all tensors bf16, else one element.
//
// whole [n_rows, a_width + b_width + c_width]; a, b, c [n_rows, their width]; c_width may be 0. n_steps: threads with work.

// Where a thread's elements lie in the whole and in one of its parts.
struct Place {
    i64 in_whole, in_part;
    View part;
};
__device__ __forceinline__ Place place_of(View a, View b, View c, u32 a_width, u32 b_width, u32 c_width, u64 row, u32 col) {
    Place at;
    at.in_whole = row * (a_width + b_width + c_width) + col;
    if (col < a_width) {
        at.part = a;
        at.in_part = row * a_width + col;
    } else if (col < a_width + b_width) {
        at.part = b;
        at.in_part = row * b_width + (col - a_width);
    } else {
        at.part = c;
        at.in_part = row * c_width + (col - a_width - b_width);
    }
    return at;
}

__device__ __forceinline__ Place place_of_eight(View a, View b, View c, u32 a_width, u32 b_width, u32 c_width, u32 step) {
    u32 eights = (a_width + b_width + c_width) / 8;
    return place_of(a, b, c, a_width, b_width, c_width, step / eights, 8 * (step % eights));
}

extern "C" __global__ void split_deal_bf16(View a, View b, View c, View whole, u32 a_width, u32 b_width, u32 c_width, u64 n_steps) {
    u32 step = blockIdx.x * blockDim.x + threadIdx.x;
    if (step >= n_steps) return;
    Place at = place_of_eight(a, b, c, a_width, b_width, c_width, step);
    *(uint4*)((bf16*)at.part.data + at.in_part) = *(const uint4*)((const bf16*)whole.data + at.in_whole);
}

extern "C" __global__ void split_join_bf16(View whole, View a, View b, View c, u32 a_width, u32 b_width, u32 c_width, u64 n_steps) {
    u32 step = blockIdx.x * blockDim.x + threadIdx.x;
    if (step >= n_steps) return;
    Place at = place_of_eight(a, b, c, a_width, b_width, c_width, step);
    *(uint4*)((bf16*)whole.data + at.in_whole) = *(const uint4*)((const bf16*)at.part.data + at.in_part);
}

extern "C" __global__ void split_deal_any(View a, View b, View c, View whole, u32 a_width, u32 b_width, u32 c_width, u64 n_steps) {
    u64 step = (u64)blockIdx.x * blockDim.x + threadIdx.x, width = a_width + b_width + c_width;
    if (step >= n_steps) return;
    Place at = place_of(a, b, c, a_width, b_width, c_width, step / width, step % width);
    store(at.part, at.in_part, load(whole, at.in_whole));
}

extern "C" __global__ void split_join_any(View whole, View a, View b, View c, u32 a_width, u32 b_width, u32 c_width, u64 n_steps) {
    u64 step = (u64)blockIdx.x * blockDim.x + threadIdx.x, width = a_width + b_width + c_width;
    if (step >= n_steps) return;
    Place at = place_of(a, b, c, a_width, b_width, c_width, step / width, step % width);
    store(whole, at.in_whole, load(at.part, at.in_part));
}
