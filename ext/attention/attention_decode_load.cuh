// What an attention block reads: tiles of the cache, tile after tile across items; and the row that the step itself computes.
#pragma once
#include "attention/attention_decode_math.cuh"
#include "attention/rotary.cuh"

namespace gptq {

// One warp's copies, into its ring: of every step the keys and then the values of its tile, or of all tiles in turn where it is alone. They
// run ahead of the mma by the depth of the ring.
template <class Team, int D, bool FP8>
class TileLoader {
  using Shape = AttentionShape<D, FP8>;
  static constexpr int kGroup = 8;                   // rows that are in one block for certain
  static constexpr int kRows = 32 / Shape::kPieces;  // rows of one instruction: the warp's 512 bytes are contiguous
  static constexpr bool kAlone = Team::kWarps == 1;
  const AttentionDecodeArgs& a;
  const uint32_t ring;
  const int lane;
  const uint32_t plane;        // bytes of the keys of one head in one block
  const uint32_t first_piece;  // where a lane's piece of a group's first row goes, in the group
  Cursor c;
  int left, tile, block_id = -1;
  uint32_t fill = 0;

 public:
  __device__ __forceinline__ TileLoader(const AttentionDecodeArgs& args, uint32_t ring_, const Cursor& begin, int steps)
      : a(args),
        ring(ring_),
        lane(threadIdx.x & 31),
        plane(args.block_size * Shape::kRow),
        first_piece(lane / Shape::kPieces * Shape::kRow + swizzled<Shape::kPieces>(lane % Shape::kPieces, lane / Shape::kPieces) * 16),
        c(begin),
        left(steps),
        tile(__shfl_sync(~0u, Team::thread() >> 5, 0)) {
    look_up();
  }

  // What comes next, keys and `values` in turn, into the next entry; a group of copies of its own even when nothing is left.
  __device__ __forceinline__ void next(bool values) {
    if (left > 0 && c.sees(tile)) copy(values);
    cp_async_commit();
    fill = fill == (Shape::kDepth - 1) * Shape::kEntry ? 0 : fill + Shape::kEntry;
    if (!values) return;
    if constexpr (kAlone) {
      tile = (tile + 1) % kAttentionWarps;
      if (tile) return;
    }
    if (left == 0 || --left == 0) return;
    advance(c, a);
    look_up();
  }

 private:
  // Blocks of the cursor's tile or tiles, a lane each where they are several; 0 in the others, so that a vote can ask for -1.
  __device__ __forceinline__ void look_up() {
    block_id = 0;
    const int first = first_looked_up(), index = (first >> a.block_shift) + lane;
    if (left == 0 || index > (first + (kAlone ? kStepTokens : kTileTokens) - 1) >> a.block_shift) return;
    block_id = -1;
    if (index <= (c.span.length - 1) >> a.block_shift)
      block_id = a.block_tables[static_cast<size_t>(c.sequence) * a.table_stride + index];
  }

  __device__ __forceinline__ int first_looked_up() const { return c.first_token(kAlone ? 0 : tile); }

  __device__ __forceinline__ void copy(bool values) {
    const int first = c.first_token(tile), end = a.cos_sin ? c.span.length - 1 : c.span.length;
    const int within = first - (first_looked_up() & ~(a.block_size - 1));  // from the first block that was looked up
    const uint8_t* base = a.cache + static_cast<size_t>(c.kv_head + (values ? a.kv_heads : 0)) * plane + lane * 16;
    const uint32_t entry = ring + fill + first_piece, block_bytes = 2 * a.kv_heads * plane;
    const auto source = [&](int group) {
      const int at = within + group * kGroup, block = __shfl_sync(~0u, block_id, at >> a.block_shift);
      return base + static_cast<uint64_t>(static_cast<uint32_t>(max(block, 0))) * block_bytes + (at & (a.block_size - 1)) * Shape::kRow;
    };
    const auto target = [&](int group, int k) {
      return (entry ^ (Shape::kPieces >= 8 ? k * kRows * 16 : 0)) + (group * kGroup + k * kRows) * Shape::kRow;
    };
    const bool others = kAlone && (lane < within >> a.block_shift || lane > (within + kTileTokens - 1) >> a.block_shift);
    if (first >= c.span.low && first + kTileTokens <= end && __all_sync(~0u, others || block_id >= 0)) {
#pragma unroll
      for (int group = 0; group < kTileTokens / kGroup; group++) {
        const uint8_t* from = source(group);
#pragma unroll
        for (int k = 0; k < kGroup / kRows; k++) cp_async16(target(group, k), from + k * kRows * Shape::kRow);
      }
      return;
    }
#pragma unroll 1
    for (int group = 0; group < kTileTokens / kGroup; group++) {
      const uint8_t* from = source(group);
      const bool mapped = __shfl_sync(~0u, block_id, (within + group * kGroup) >> a.block_shift) >= 0;
#pragma unroll
      for (int k = 0; k < kGroup / kRows; k++) {
        const int token = first + group * kGroup + k * kRows + lane / Shape::kPieces;
        const bool there = mapped && token >= c.span.low && token < end;
        cp_async16_or_zero(target(group, k), there ? from + k * kRows * Shape::kRow : a.cache, there);
      }
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

// The new key and value of an item, in the cache's type, in the warp that has the tile they belong to: lanes below D / 16 hold the key, as
// many more the value, eight elements of either half each. Tiles are copied without them.
template <int D, bool BF, bool FP8>
class NewRow {
  using Shape = AttentionShape<D, FP8>;
  static constexpr int kLanes = D / 16;
  uint4 half[2];

  __device__ __forceinline__ static int part() { return (threadIdx.x & 31) / kLanes; }  // 0: key, 1: value, else nothing

 public:
  // Whether the item's new row is in this tile of its last step.
  __device__ __forceinline__ static bool is_in(const AttentionDecodeArgs& a, const Cursor& c, int tile) {
    return a.cos_sin && (c.span.length - 1) / kTileTokens % kAttentionWarps == tile;
  }

  // Where it is in qkv, whose row at the lane's dimension is `row`; null where not in this lane.
  __device__ __forceinline__ static const uint16_t* source(const AttentionDecodeArgs& a, const Cursor& c, const uint16_t* row, bool here) {
    return here && part() <= 1 ? row + (a.heads + c.kv_head + part() * a.kv_heads) * D : nullptr;
  }
  __device__ __forceinline__ void take(const uint4& low, const uint4& high) { half[0] = low, half[1] = high; }

  // The whole warp calls.
  __device__ __forceinline__ void prepare(const AttentionDecodeArgs& a, const Rotation<D, BF>& rotation, int d) {
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
      const int d = (threadIdx.x & 31) % kLanes * 8, row = (c.span.length - 1) % kTileTokens, slot = a.slot_mapping[c.span.row];
      const int plane = c.kv_head + values * a.kv_heads;
      const size_t at = static_cast<size_t>(slot >> a.block_shift) * 2 * a.kv_heads + plane;
      uint8_t* to = a.cache + (at * a.block_size + (slot & (a.block_size - 1))) * Shape::kRow;
      const bool cached = slot >= 0 && c.part == 0;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int byte = (d + i * D / 2) * Shape::kElement;
        const uint32_t shared = tile + row * Shape::kRow + swizzled<Shape::kPieces>(byte / 16, row) * 16 + byte % 16;
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
