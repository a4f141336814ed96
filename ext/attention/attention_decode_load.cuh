// What an attention block reads: tiles of the cache, tile after tile across items; and the rows that the step itself computes.
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
    advance<Team>(c, a);
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
    const int first = c.first_token(tile);
    const int end = Team::kShares ? c.span.cached() : a.cos_sin ? c.span.length - 1 : c.span.length;
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

  __device__ __forceinline__ static const float* of(const AttentionDecodeArgs& a, int row, int d) {
    return a.cos_sin + static_cast<size_t>(max(0, a.positions[row])) * D + d;
  }
  __device__ __forceinline__ static void prefetch(const AttentionDecodeArgs& a, int row, int d) {
    prefetch_line(of(a, row, d));
    prefetch_line(of(a, row, d) + D / 2);
  }
  __device__ __forceinline__ void load(const AttentionDecodeArgs& a, int row, int d) {
    const float* from = of(a, row, d);
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

// The new keys and values of an item, in the cache's type; tiles are copied without them. A thread holds eight elements of either half of
// one. Of a row by itself the warp that has its tile holds both, and puts them into it. Of several rows all threads of the block hold some,
// and leave them in shared memory when a step comes that they belong to; their order there is keys of all rows, then values.
template <class Team, int D, bool BF, bool FP8>
class NewRows {
  using Shape = AttentionShape<D, FP8>;
  static constexpr int kLanes = D / 16, kPlaces = Team::kWarps * 32 / kLanes;
  uint4 half[2];

  // Places are counted from the block's end: queries are at its beginning.
  __device__ __forceinline__ static int place() { return kPlaces - 1 - Team::thread() / kLanes; }
  __device__ __forceinline__ static int dimension() { return Team::thread() % kLanes * 8; }
  // 0: key, 1: value, else nothing.
  __device__ __forceinline__ static int kind() {
    return Team::kShares ? place() & 1 : (threadIdx.x & 31) / kLanes;
  }
  // Which of the new rows; not all of them are there.
  __device__ __forceinline__ static int index() { return Team::kShares ? place() >> 1 : 0; }
  __device__ __forceinline__ static int row_of(const Cursor& c, int index) {
    return Team::kShares ? c.span.row + c.span.rows() - c.span.fresh() + index : c.span.row;
  }
  // Whether there is such a one.
  __device__ __forceinline__ static bool exists(const Cursor& c) { return !Team::kShares || index() < c.span.fresh(); }

 public:
  // Whether a thread of this warp holds some of the item's.
  __device__ __forceinline__ static bool any(const AttentionDecodeArgs& a, const Cursor& c) {
    if (!a.cos_sin) return false;
    if (Team::kShares) return (kPlaces - (Team::thread() / 32 + 1) * (32 / kLanes)) / 2 < c.span.fresh();
    return Team::kWarps == 1 || is_in(a, c, Team::thread() / 32);
  }
  // Whether the new token of a row by itself is in this tile of its last step.
  __device__ __forceinline__ static bool is_in(const AttentionDecodeArgs& a, const Cursor& c, int tile) {
    return a.cos_sin && !Team::kShares && (c.span.length - 1) / kTileTokens % kAttentionWarps == tile;
  }
  // Whether some of several rows are in this step.
  __device__ __forceinline__ static bool are_in(const AttentionDecodeArgs& a, const Cursor& c) {
    return Team::kShares && c.first_token(kAttentionWarps) > c.span.cached();
  }

  // Row of qkv with this thread's elements.
  __device__ __forceinline__ static int row(const Cursor& c) {
    return row_of(c, min(index(), c.span.fresh() - 1));
  }
  __device__ __forceinline__ void load(const AttentionDecodeArgs& a, const Cursor& c) {
    const int plane = kind();
    half[0] = half[1] = uint4{};
    if (!any(a, c) || plane > 1 || !exists(c)) return;
    const uint16_t* from =
        a.qkv + static_cast<size_t>(row(c)) * a.ldqkv + (a.heads + c.kv_head + plane * a.kv_heads) * D + dimension();
    half[0] = *reinterpret_cast<const uint4*>(from), half[1] = *reinterpret_cast<const uint4*>(from + D / 2);
  }

  // Into the cache's type. Of several rows the item's own go into the cache: `last`, the item's last step is this block's, so that one
  // block writes. The whole warp calls.
  __device__ __forceinline__ void prepare(const AttentionDecodeArgs& a, const Cursor& c, const Rotation<D, BF>& rotation, bool last) {
    const bool own = Team::kShares && last && c.part == 0 && exists(c) && index() >= c.span.fresh() - c.span.rows();
    const int slot = own ? a.slot_mapping[row(c)] : -1, plane = kind(), d = dimension();
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
        for (int k = 0; k < 8; k++) key[i][k] = plane ? value[k] : key[i][k];
        const uint2 packed = pack8_e4m3(key[i]);
        half[i].x = packed.x, half[i].y = packed.y;
      } else if (!plane) {
        half[i] = pack8<BF>(key[i]);
      }
    }
    if (slot >= 0) write(a, slot, c.kv_head + plane * a.kv_heads);
  }

  // A row by itself: into the tile, and into the cache.
  __device__ __forceinline__ void put(const AttentionDecodeArgs& a, const Cursor& c, uint32_t tile, bool values) const {
    if (kind() == values) {
      const int row = (c.span.length - 1) % kTileTokens, slot = a.slot_mapping[c.span.row];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int byte = byte_of(i);
        store(tile + row * Shape::kRow + swizzled<Shape::kPieces>(byte / 16, row) * 16 + byte % 16, i);
      }
      if (slot >= 0 && c.part == 0) write(a, slot, c.kv_head + values * a.kv_heads);
    }
    __syncwarp();
  }

  // Several rows: to `area`, and from there into a tile. The block waits for itself between the two, and before the area is another's.
  __device__ __forceinline__ void leave(const Cursor& c, uint32_t area) const {
    if (!exists(c)) return;
#pragma unroll
    for (int i = 0; i < 2; i++) store(area + (kind() * kMaxNewRows + index()) * Shape::kRow + byte_of(i), i);
  }
  __device__ __forceinline__ static void fetch(const Cursor& c, int tile, uint32_t area, uint32_t to, bool values) {
    const int first = c.first_token(tile), begin = max(first, max(c.span.cached(), c.span.low)),
              end = min(first + kTileTokens, c.span.length);
    const uint32_t from = area + (values * kMaxNewRows - c.span.cached()) * Shape::kRow;
#pragma unroll 1
    for (int i = threadIdx.x & 31; i < (end - begin) * Shape::kPieces; i += 32) {
      const int token = begin + i / Shape::kPieces, piece = i % Shape::kPieces, row = token - first;
      sts128(to + row * Shape::kRow + swizzled<Shape::kPieces>(piece, row) * 16, lds128(from + token * Shape::kRow + piece * 16));
    }
    __syncwarp();
  }

 private:
  __device__ __forceinline__ static int byte_of(int i) { return (dimension() + i * D / 2) * Shape::kElement; }
  __device__ __forceinline__ void store(uint32_t to, int i) const {
    if constexpr (FP8) sts64(to, half[i].x, half[i].y);
    else sts128(to, half[i]);
  }
  __device__ __forceinline__ void write(const AttentionDecodeArgs& a, int slot, int plane) const {
    const size_t at = static_cast<size_t>(slot >> a.block_shift) * 2 * a.kv_heads + plane;
    uint8_t* to = a.cache + (at * a.block_size + (slot & (a.block_size - 1))) * Shape::kRow;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if constexpr (FP8) *reinterpret_cast<uint2*>(to + byte_of(i)) = make_uint2(half[i].x, half[i].y);
      else *reinterpret_cast<uint4*>(to + byte_of(i)) = half[i];
    }
  }
};

// Whether one of the elements is infinite or none.
template <bool BF, bool FP8>
__device__ __forceinline__ bool not_finite(const uint4& v) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  uint32_t found = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (FP8) {
      found |= ((words[i] & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u;
    } else {  // the exponent of either half, all ones
      constexpr uint32_t kExponent = BF ? 0x7f80u : 0x7c00u, kLast = BF ? 0x80u : 0x400u;
      found |= ((words[i] & (kExponent | kExponent << 16)) + (kLast | kLast << 16)) & 0x80008000u;
    }
  }
  return found;
}

}  // namespace gptq
