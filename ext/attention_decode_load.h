// What an attention block reads: tiles of the cache, tile after tile across items; and the row that the step itself computes.
#pragma once
#include "attention_decode_parts.h"

namespace gptq {

// One warp's copies, into its ring. They run ahead of the products by the depth of the ring.
template <int D, bool FP8>
class TileLoader {
  using Shape = AttentionShape<D, FP8>;
  const AttentionDecodeArgs& a;
  const uint32_t ring;
  const int warp, lane;
  Cursor c;
  int left, fill = 0, block_id = -1;

 public:
  __device__ __forceinline__ TileLoader(const AttentionDecodeArgs& args, uint32_t ring_, const Cursor& begin, int steps)
      : a(args), ring(ring_), warp(threadIdx.x >> 5), lane(threadIdx.x & 31), c(begin), left(steps) {
    look_up();
  }

  // The tile's keys, or then its values, into the next entry; a group of copies of its own even when nothing is left.
  __device__ __forceinline__ void next(bool values) {
    if (left > 0 && c.sees(warp)) copy(values);
    cp_async_commit();
    if (++fill == Shape::kDepth) fill = 0;
    if (!values || left == 0 || --left == 0) return;
    advance(c, a);
    look_up();
  }

 private:
  // Blocks of the cursor's tile, a lane each where it spans several.
  __device__ __forceinline__ void look_up() {
    block_id = -1;
    if (left == 0) return;
    const int index = (c.first_token(warp) >> a.block_shift) + lane;
    if (lane <= kTile >> a.block_shift && index <= (c.span.length - 1) >> a.block_shift)
      block_id = a.block_tables[static_cast<size_t>(c.sequence) * a.table_stride + index];
  }

  __device__ __forceinline__ void copy(bool values) {
    constexpr int kRows = 32 / Shape::kChunks;  // of one instruction
    const int first = c.first_token(warp), end = a.cos_sin ? c.span.length - 1 : c.span.length;
    const int chunk = lane % Shape::kChunks, row0 = lane / Shape::kChunks;
    const size_t plane = static_cast<size_t>(a.block_size) * Shape::kRow;  // keys of one head in one block
    const uint8_t* base = a.cache + (c.head / a.parts + (values ? a.kv_heads : 0)) * plane + chunk * 16;
    const uint32_t entry = ring + fill * Shape::kEntry;
#pragma unroll
    for (int i = 0; i < kTile / kRows; i++) {
      const int row = i * kRows + row0, token = first + row;
      const int block = __shfl_sync(~0u, block_id, (token >> a.block_shift) - (first >> a.block_shift));
      const bool there = token >= c.span.low && token < end && block >= 0;
      const size_t offset = there ? 2 * a.kv_heads * plane * block + (token & (a.block_size - 1)) * Shape::kRow : 0;
      cp_async16_or_zero(entry + row * Shape::kRow + swizzled<Shape::kChunks>(chunk, row) * 16, base + offset, there);
    }
  }
};

// cos and sin of eight dimensions of a half, for a row.
template <int D, bool BF>
struct Rotation {
  float cos[8], sin[8];

  __device__ __forceinline__ void load(const AttentionDecodeArgs& a, int row, int d) {
    const float* from = a.cos_sin + static_cast<size_t>(max(0, a.positions[row])) * D + d;
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const float4 x = *reinterpret_cast<const float4*>(from + i), y = *reinterpret_cast<const float4*>(from + D / 2 + i);
      cos[i] = x.x, cos[i + 1] = x.y, cos[i + 2] = x.z, cos[i + 3] = x.w;
      sin[i] = y.x, sin[i + 1] = y.y, sin[i + 2] = y.z, sin[i + 3] = y.w;
    }
  }

  // D / 16 neighbouring lanes hold a head; the whole warp calls.
  __device__ __forceinline__ void apply(float (&low)[8], float (&high)[8], const uint16_t* norm, float eps, int d) const {
    if (norm) {
      float squares[2] = {};
#pragma unroll
      for (int i = 0; i < 8; i++) squares[0] = __fmaf_rn(low[i], low[i], squares[0]), squares[1] = __fmaf_rn(high[i], high[i], squares[1]);
      float sum = squares[0] + squares[1];
#pragma unroll
      for (int step = D / 32; step; step >>= 1) sum += __shfl_xor_sync(~0u, sum, step);
      const float scale = rsqrtf(sum / static_cast<float>(D) + eps);
      float w[8];
      unpack8<BF>(w, *reinterpret_cast<const uint4*>(norm + d));
#pragma unroll
      for (int i = 0; i < 8; i++) low[i] = low[i] * scale * w[i];
      unpack8<BF>(w, *reinterpret_cast<const uint4*>(norm + D / 2 + d));
#pragma unroll
      for (int i = 0; i < 8; i++) high[i] = high[i] * scale * w[i];
    }
    rotate8(low, high, cos, sin);
  }
};

// The new key and value of an item, in the cache's type, in the warp whose tile they belong to: lanes below D / 16 hold the key, as many more
// the value, eight elements of either half each. Tiles are copied without them.
template <int D, bool BF, bool FP8>
class NewRow {
  using Shape = AttentionShape<D, FP8>;
  static constexpr int kLanes = D / 16;
  uint4 half[2];
  bool here = false;

  __device__ __forceinline__ static int part() { return (threadIdx.x & 31) / kLanes; }  // 0: key, 1: value, else nothing

 public:
  __device__ __forceinline__ bool is_in(const AttentionDecodeArgs& a, const Cursor& c, int warp) const {
    return a.cos_sin && c.step + 1 == c.span.count && (c.span.length - 1) / kTile % kAttentionWarps == warp;
  }

  // `row`: of qkv, at the lane's dimension.
  __device__ __forceinline__ void load(const AttentionDecodeArgs& a, const Cursor& c, const uint16_t* row, int warp) {
    here = a.cos_sin && (c.span.length - 1) / kTile % kAttentionWarps == warp;
    if (!here || part() > 1) return;
    const uint16_t* from = row + (a.heads + c.head / a.parts + part() * a.kv_heads) * D;
    half[0] = *reinterpret_cast<const uint4*>(from), half[1] = *reinterpret_cast<const uint4*>(from + D / 2);
  }

  __device__ __forceinline__ void prepare(const AttentionDecodeArgs& a, const Rotation<D, BF>& rotation, int d) {
    if (!here) return;
    float key[2][8];
    unpack8<BF>(key[0], half[0]);
    unpack8<BF>(key[1], half[1]);
    rotation.apply(key[0], key[1], a.k_norm, a.eps, d);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if constexpr (FP8) {
        float value[8];
        unpack8<BF>(value, half[i]);
#pragma unroll
        for (int k = 0; k < 8; k++) key[i][k] = part() ? value[k] : key[i][k];
        const uint2 packed = pack8_e4m3(key[i]);
        half[i].x = packed.x, half[i].y = packed.y;
      } else if (!part()) {
        half[i] = pack8<BF>(key[i]);
      }
    }
  }

  // Into the tile, and into the cache.
  __device__ __forceinline__ void put(const AttentionDecodeArgs& a, const Cursor& c, uint32_t tile, bool values) const {
    if (part() == values) {
      const int d = (threadIdx.x & 31) % kLanes * 8, row = (c.span.length - 1) % kTile, slot = a.slot_mapping[c.span.row];
      const int plane = c.head / a.parts + values * a.kv_heads;
      const size_t at = static_cast<size_t>(slot >> a.block_shift) * 2 * a.kv_heads + plane;
      uint8_t* to = a.cache + (at * a.block_size + (slot & (a.block_size - 1))) * Shape::kRow;
      const bool cached = slot >= 0 && c.head % a.parts == 0;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int byte = (d + i * D / 2) * Shape::kElement;
        const uint32_t shared = tile + row * Shape::kRow + swizzled<Shape::kChunks>(byte / 16, row) * 16 + byte % 16;
        if constexpr (FP8) {
          sts64(shared, half[i].x, half[i].y);
          if (cached) *reinterpret_cast<uint2*>(to + byte) = make_uint2(half[i].x, half[i].y);
        } else {
          sts128(shared, half[i]);
          if (cached) *reinterpret_cast<uint4*>(to + byte) = half[i];
        }
      }
    }
    __syncwarp();
  }
};

}  // namespace gptq
