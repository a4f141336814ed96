#include "ops/ops.h"

#include <algorithm>
#include <atomic>

#include "attention/rotary.cuh"
#include "common/launch.cuh"
#include "common/ptx.cuh"
#include "common/vector.cuh"
#include "ops/rms_norm.cuh"

namespace gptq {
namespace {

__device__ __forceinline__ void load_floats(float (&to)[8], const float* from) {
  const float4 a = *reinterpret_cast<const float4*>(from), b = *reinterpret_cast<const float4*>(from + 4);
  to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}

// ---- embedding ---------------------------------------------------------------------------------------------------------------------
// A token outside the table (a sequence whose logits were not finite holds -1) reads as zeros: its result is dropped anyway.
__global__ void __launch_bounds__(512) embed_kernel(const EmbedArgs a) {
  grid_launch_dependents();
  grid_wait();
  const int row = blockIdx.x, position = a.positions[row], seat = a.row_seat[row];
  const int token = position < 0 || seat < 0 ? -1 : a.history[static_cast<size_t>(seat) * a.ldh + position];
  const bool known = token >= 0 && token < a.V;
  const uint16_t* from = a.table + static_cast<size_t>(known ? token : 0) * a.H;
  uint16_t* to = a.out + static_cast<size_t>(row) * a.H;
  for (int k = threadIdx.x * kVector; k < a.H; k += blockDim.x * kVector) store16(to + k, known ? load16(from + k) : uint4{});
}

// ---- RMSNorm -----------------------------------------------------------------------------------------------------------------------
template <bool BF, bool PERM, int N>
__global__ void __launch_bounds__(512) rms_norm_kernel(const RmsNormArgs a) {
  rms_norm_rows<BF, PERM, N>(a, [&](uint4(&x)[N], int row) {
#pragma unroll
    for (int j = 0; j < N; j++) {
      const int k = vector_at(j);
      x[j] = k < a.H && row < a.T ? load16(a.x + static_cast<size_t>(row) * a.ldx + k) : uint4{};
    }
  });
}

// By value: a reference to one of two arrays would put both into local memory.
__device__ __forceinline__ uint4 select(bool first, const uint4& a, const uint4& b) {
  return make_uint4(first ? a.x : b.x, first ? a.y : b.y, first ? a.z : b.z, first ? a.w : b.w);
}

// ---- rotary embedding, and keys and values into their slots ---------------------------------------------------------------------------
// A head is L lanes, each with eight elements of its first half and the eight they pair with. A thread serves HEADS heads: one where rows
// are few, several where cosines and sines are worth keeping.
template <bool BF, bool FP8, int L, int HEADS>
__global__ void __launch_bounds__(256) rope_kernel(const RopeArgs a) {
  constexpr int kPerBlock = 256 / L;
  const int lane = threadIdx.x % L, d = lane * kVector, half = a.head_dim / 2;
  const bool inside = d < half;
  const int row = blockIdx.x, heads = a.num_heads + 2 * a.num_kv_heads, first = blockIdx.y * kPerBlock * HEADS + threadIdx.x / L;
  uint4 q_norm[2] = {}, k_norm[2] = {};
  if (inside && a.q_norm) q_norm[0] = load16(a.q_norm + d), q_norm[1] = load16(a.q_norm + half + d);
  if (inside && a.k_norm) k_norm[0] = load16(a.k_norm + d), k_norm[1] = load16(a.k_norm + half + d);
  grid_launch_dependents();
  grid_wait();
  const int position = a.positions[row], slot = a.slot_mapping[row];
  uint16_t* qkv = a.qkv + static_cast<size_t>(row) * a.ldq + d;
  uint4 in[HEADS][2];
#pragma unroll
  for (int j = 0; j < HEADS; j++) {
    const int head = first + j * kPerBlock;
    const bool there = inside && head < heads;
    in[j][0] = there ? load16(qkv + head * a.head_dim) : uint4{}, in[j][1] = there ? load16(qkv + head * a.head_dim + half) : uint4{};
  }
  if (position < 0) return;
  float cos[8] = {}, sin[8] = {};
  if (inside) {
    const float* turn = a.cos_sin + static_cast<size_t>(position) * a.head_dim + d;
    load_floats(cos, turn);
    load_floats(sin, turn + half);
  }
  const int block = slot / a.block_size, offset = slot % a.block_size;
#pragma unroll
  for (int j = 0; j < HEADS; j++) {
    const int head = first + j * kPerBlock;
    const bool is_q = head < a.num_heads, is_v = head >= a.num_heads + a.num_kv_heads;
    const uint16_t* norm = is_q ? a.q_norm : is_v ? nullptr : a.k_norm;
    float low[8], high[8];
    unpack8<BF>(low, in[j][0]);
    unpack8<BF>(high, in[j][1]);
    float sum = sum_of_squares(low) + sum_of_squares(high);
#pragma unroll
    for (int step = L / 2; step; step >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (!inside || head >= heads) continue;
    if (norm) {
      const float scale = rsqrtf(sum / static_cast<float>(a.head_dim) + a.eps);
      float w[8];
      unpack8<BF>(w, select(is_q, q_norm[0], k_norm[0]));
#pragma unroll
      for (int i = 0; i < 8; i++) low[i] = low[i] * scale * w[i];
      unpack8<BF>(w, select(is_q, q_norm[1], k_norm[1]));
#pragma unroll
      for (int i = 0; i < 8; i++) high[i] = high[i] * scale * w[i];
    }
    if (!is_v) {
      rotate8(low, high, cos, sin);
      store16(qkv + head * a.head_dim, pack8<BF>(low));
      store16(qkv + head * a.head_dim + half, pack8<BF>(high));
    }
    if (is_q || slot < 0) continue;
    const int pair = head - a.num_heads;  // keys of all heads, then values: the order of a block in the cache
    const size_t to = ((static_cast<size_t>(block) * 2 * a.num_kv_heads + pair) * a.block_size + offset) * a.head_dim + d;
    cache8<BF, FP8>(a.cache, to, low);
    cache8<BF, FP8>(a.cache, to + half, high);
  }
}

// ---- launching ---------------------------------------------------------------------------------------------------------------------
template <auto kernel, typename... Args>
cudaError_t launch_op(dim3 grid, int threads, int smem, cudaStream_t stream, const Args&... args) {
  static std::atomic<uint64_t> done;
  const void* function = reinterpret_cast<const void*>(kernel);
  Device device;
  if (const cudaError_t status = current_device(device); status != cudaSuccess) return status;
  if (const cudaError_t status = set_limits(function, done, 4 * kMaxWidth, device); status != cudaSuccess) return status;
  return launch_kernel(function, {grid, threads, smem, stream}, device, args...);
}

template <bool BF, bool PERM, int N>
cudaError_t norm(const RmsNormArgs& a, cudaStream_t stream) {
  Device device;
  if (const cudaError_t status = current_device(device); status != cudaSuccess) return status;
  const int threads = norm_threads(a.H, N), blocks = std::min(a.T, 4 * device.sms);
  const int smem = PERM ? (a.T > blocks ? 4 : 2) * a.H : 0;  // a block with one row needs no second
  return launch_op<rms_norm_kernel<BF, PERM, N>>(dim3(blocks), threads, smem, stream, a);
}

template <bool BF, bool PERM>
cudaError_t norm(const RmsNormArgs& a, cudaStream_t stream) {
  if (a.H <= kOneVector) return norm<BF, PERM, 1>(a, stream);
  if (a.H <= kTwoVectors) return norm<BF, PERM, 2>(a, stream);
  return norm<BF, PERM, 4>(a, stream);
}

template <bool BF, bool FP8, int L>
cudaError_t rope(const RopeArgs& a, cudaStream_t stream) {
  const int heads = a.num_heads + 2 * a.num_kv_heads, per_block = 256 / L;
  // Rows on x, which alone of a grid's dimensions goes beyond 65,535.
  const auto grid = [&](int each) { return dim3(a.T, (heads + per_block * each - 1) / (per_block * each)); };
  if (a.T < 128) return launch_op<rope_kernel<BF, FP8, L, 1>>(grid(1), 256, 0, stream, a);
  return launch_op<rope_kernel<BF, FP8, L, 4>>(grid(4), 256, 0, stream, a);
}

template <bool BF, bool FP8>
cudaError_t rope(const RopeArgs& a, cudaStream_t stream) {
  if (a.head_dim <= 64) return rope<BF, FP8, 4>(a, stream);
  return rope<BF, FP8, 8>(a, stream);
}

}  // namespace

cudaError_t launch_embed(const EmbedArgs& a, cudaStream_t stream) {
  return launch_op<embed_kernel>(dim3(a.T), warps_for(std::clamp(a.H / kVector / 2, 32, 512)), 0, stream, a);
}

cudaError_t launch_rms_norm(const RmsNormArgs& a, bool bf16, cudaStream_t stream) {
  if (a.H > kMaxWidth || a.H % kVector) return cudaErrorInvalidValue;
  if (bf16) return a.perm ? norm<true, true>(a, stream) : norm<true, false>(a, stream);
  return a.perm ? norm<false, true>(a, stream) : norm<false, false>(a, stream);
}

cudaError_t launch_rope_and_write(const RopeArgs& a, bool bf16, bool fp8_cache, cudaStream_t stream) {
  if (a.head_dim % 16 || a.head_dim > 128) return cudaErrorInvalidValue;
  if (bf16) return fp8_cache ? rope<true, true>(a, stream) : rope<true, false>(a, stream);
  return fp8_cache ? rope<false, true>(a, stream) : rope<false, false>(a, stream);
}

}  // namespace gptq
