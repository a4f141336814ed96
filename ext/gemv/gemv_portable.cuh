// The GEMV kernel for devices without bulk copies, or without the shared memory for the other one's ring: 1 to 8 tokens.
//
// A block owns consecutive strips and takes up to kPortableStrips of them at a time, in passes of nearly equal size. Chunk c of them is
// warp c % 8's, which brings it in with cp.async, the tokens of the chunk beside it, into a ring of its own: no barrier between warps while
// they multiply. The ring runs over all passes without a break, so that weights of the next one are under way while the sums of this one
// are added. The order of a row's sum depends on K and the format alone: the same bits for 1 to 8 tokens, and on every device.
#pragma once
#include "gemv/gemv_math.cuh"

namespace gptq {

// A value that the compiler keeps instead of computing it again where it is used.
template <typename T>
__device__ __forceinline__ T kept(T v) {
  if constexpr (sizeof(T) == 8) asm volatile("" : "+l"(v));
  else asm volatile("" : "+r"(v));
  return v;
}

template <int G, bool ZP, bool BF>
__device__ __forceinline__ void gemv_portable(const GemvArgs& a, uint8_t* smem) {
  using C = Chunk<G, ZP>;
  constexpr int kMeta = (C::kBytes - kWeightBytes) / 16;  // 16-byte pieces of scales and zero points
  const GemvPlan& at = a.plan;
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  const int nch = (a.K + kChunkK - 1) / kChunkK;
  const int first = blockIdx.x * at.strips + min(static_cast<int>(blockIdx.x), at.spare);
  const int count = at.strips + (static_cast<int>(blockIdx.x) < at.spare), passes = (count + at.pass - 1) / at.pass;
  const uint32_t base = smem_addr(smem), ring = base + warp * at.depth * at.slot;
  // Passes of nearly equal size, the larger ones first.
  const int strips_of_last = count / passes, larger = kept(passes - count % passes);
  const auto strips_of = [&](int passes_left) { return passes_left > 0 ? strips_of_last + (passes_left > larger) : 0; };

  // What comes next into the ring: a chunk of the strips of a pass, and its tokens. Addresses run along, since computing them anew for
  // every chunk would cost as much as the products.
  const int strip_bytes = kept(nch * C::kBytes);
  const uint32_t first_to = kept(ring + lane * 16), last_to = kept(first_to + (at.depth - 1) * at.slot);
  const int meta = lane / kMeta * C::kBytes + kWeightBytes + lane % kMeta * 16 - lane * 16;
  const int64_t meta_from = kept(int64_t{lane / kMeta} * strip_bytes + kWeightBytes + lane % kMeta * 16 - lane * 16);
  const int meta_to = kept(meta), meta_strip = kept(lane / kMeta);
  const int x_to = kept(at.pass * C::kBytes + (lane >> 4) * (kTokenBytes - 256));
  const int x_rows = kept((a.M - (lane >> 4) + 1) / 2);
  const int64_t x_step = kept(int64_t{4} * a.ldx);
  const uint8_t* src = a.w + int64_t{first} * strip_bytes + warp * C::kBytes + lane * 16;  // of that chunk of the pass's first strip
  const uint8_t* const x0 = reinterpret_cast<const uint8_t*>(a.x + int64_t{lane >> 4} * a.ldx + warp * kChunkK + (lane & 15) * 8);
  const uint8_t* x = x0;
  const int k_left0 = kept(a.K - warp * kChunkK - (lane & 15) * 8), mine = max(0, nch - warp + kMathWarps - 1) / kMathWarps;
  const int64_t to_next = kept(int64_t{strips_of_last} * strip_bytes - mine * kMathWarps * C::kBytes);  // pass, from a smaller one's end
  int passes_ahead = warp < nch ? passes : 0, strips_ahead = strips_of(passes_ahead), left = mine, k_left = k_left0;
  const int shallow = kept(at.depth < kPortableDepth ? 1 : 0);
  uint32_t to = first_to;
  const auto fetch = [&] {
    if (strips_ahead > 0) {
      const uint8_t* from = src;
#pragma unroll
      for (int s = 0; s < kPortableStrips; s++) {
        if (s == 0 || s < strips_ahead) {
          cp_async16(to + s * C::kBytes, from);
          cp_async16(to + s * C::kBytes + kBlockBytes, from + kBlockBytes);
        }
        from = kept(from + strip_bytes);
      }
      if (meta_strip < strips_ahead) cp_async16(to + meta_to, src + meta_from);
      if constexpr (kPortableStrips * kMeta > 32) {
        const int piece = lane + 32, s = piece / kMeta, within = kWeightBytes + piece % kMeta * 16 - lane * 16;
        if (s < strips_ahead) cp_async16(to + s * C::kBytes + within, src + int64_t{s} * strip_bytes + within);
      }
      const int bytes = k_left > 0 ? 16 : 0;
      const uint8_t* row = x;
#pragma unroll
      for (int i = 0; i < kPortableMaxM / 2; i++) {
        if (i < x_rows) cp_async16_or_zeros(to + x_to + i * 2 * kTokenBytes, row, bytes);
        row = kept(row + x_step);
      }
      src = kept(src + kMathWarps * C::kBytes), x = kept(x + kMathWarps * kChunkK * 2), k_left -= kMathWarps * kChunkK;
      if (__builtin_expect(--left == 0, 0)) {
        src = kept(src + to_next + (strips_ahead > strips_of_last ? strip_bytes : 0));
        x = x0, k_left = k_left0, left = mine, strips_ahead = strips_of(--passes_ahead);
      }
    }
    cp_async_commit();
    if (shallow) cp_async_commit();  // an empty group, so that the wait below is the same for both depths
    to = to == last_to ? first_to : to + at.slot;
  };
  for (int i = 0; i < at.depth - 1; i++) fetch();

  const uint32_t x_lane = kept(at.pass * C::kBytes + min(lane & 7, a.M - 1) * kTokenBytes + (lane >> 3) * 16);  // as ldmatrix wants it
  const uint32_t lane_slot = ((lane & 3) * 8 + (lane >> 2)) * 16;
  const bool has_token = (lane & 3) * 8 < at.red_lanes;
  const uint32_t last = kept(ring + (at.depth - 1) * at.slot);
  uint32_t chunk = ring;
  int strip = first;
  using O = Offset<BF, ZP>;
  const uint32_t ones[4] = {kept(O::kRowG), kept(O::kRowG8), kept(O::kRowG), kept(O::kRowG8)};
#pragma unroll 1
  for (int passes_left = passes; passes_left > 0; passes_left--) {
    const int strips = strips_of(passes_left);
    float acc[kPortableStrips][1][4] = {};
    const auto multiply = [&](auto strips_of_pass) {
#pragma unroll 1
      for (int c = mine; c > 0; c--) {
        cp_async_wait<kPortableDepth - 2>();
        __syncwarp();  // the slot has come through all lanes, and none still reads the one before
        fetch();
        const uint32_t tokens = chunk + x_lane;
        const auto load_x = [&](int, int u, uint32_t(&b)[4]) { ldmatrix_x4(b, tokens + u * 64); };
        chunk_mma<decltype(strips_of_pass)::value, 1, G, ZP, BF, Sums::kCompute>(acc, chunk, C::kBytes, 0, lane, load_x, ones);
        chunk = chunk == last ? ring : chunk + at.slot;
      }
    };
    switch (strips) {
      case 4: multiply(std::integral_constant<int, 4>{}); break;
      case 3: multiply(std::integral_constant<int, 3>{}); break;
      case 2: multiply(std::integral_constant<int, 2>{}); break;
      default: multiply(std::integral_constant<int, 1>{});
    }
    __syncthreads();  // the sums of the pass before have been read
#pragma unroll
    for (int s = 0; s < kPortableStrips; s++)
      if (s < strips && has_token) sts128(base + at.red + (s * kMathWarps + warp) * at.red_lanes * 16 + lane_slot, acc[s][0]);
    // A strip to each of the last warps, which have fewer chunks where they do not come out even.
    const int summed = kMathWarps - 1 - warp;
    const bool adds = summed < strips && lane < at.red_lanes;
    Outputs<BF> out;
    if (adds) out.load(a, strip + summed, lane & 7, (lane >> 3) * 2);
    __syncthreads();
    if (adds) {
      float v[4] = {};
#pragma unroll
      for (int w = 0; w < kMathWarps; w++) {
        const uint4 f = lds128(base + at.red + ((summed * kMathWarps + w) * at.red_lanes + lane) * 16);
        v[0] += __uint_as_float(f.x), v[1] += __uint_as_float(f.y), v[2] += __uint_as_float(f.z), v[3] += __uint_as_float(f.w);
      }
      out.store(a, v);
    }
    strip += strips;
  }
}

}  // namespace gptq
