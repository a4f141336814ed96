// The draw: an exponential race among the token ids that are kept, each with a random number of its own.
#pragma once
#include "common/ptx.cuh"
#include "sampler/sampler_cut.cuh"

namespace gptq {

// 64 bits of Philox4x32-10: key = seed, counter = position (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
__device__ __forceinline__ u64 random_bits(uint32_t key0, uint32_t key1, uint32_t position) {
  uint32_t c0 = position, c1 = 0, c2 = 0, c3 = 0;
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint32_t low0 = 0xD2511F53u * c0, low1 = 0xCD9E8D57u * c2;
    const uint32_t high0 = __umulhi(0xD2511F53u, c0), high1 = __umulhi(0xCD9E8D57u, c2);
    c0 = high1 ^ c1 ^ key0, c1 = low1, c2 = high0 ^ c3 ^ key1, c3 = low0;
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
  return static_cast<u64>(c1) << 32 | c0;
}

// The random number of a token id in the row whose random_bits are (key0, key1): two rounds of multiply and xor-shift, the second key
// between them (the constants of lowbias32, Wellons and others, "Prospecting for hash functions").
__device__ __forceinline__ uint32_t random_word(uint32_t key0, uint32_t key1, uint32_t id) {
  uint32_t x = id * 0x9E3779B9u + key0;
  x = (x ^ x >> 16) * 0x21F0AAADu + key1;
  x = (x ^ x >> 15) * 0xD35A2D97u;
  return x ^ x >> 15;
}


// Gumbel noise in units of log 2: -log2(E), E = -log2(1 - v), v = (word + 1/2) / 2^32. E is accurate where it is small, which is where
// races are won.
__device__ __forceinline__ float race_noise(uint32_t word) {
  const float v = __fmaf_rn(__uint2float_rn(word), 0x1p-32f, 0x1p-33f);
  float e;
  if (v < 0.0625f) {
    float p = __fmaf_rn(v, 0.2f, 0.25f);
    p = __fmaf_rn(v, p, 0.333333333f);
    p = __fmaf_rn(v, p, 0.5f);
    e = v * __fmaf_rn(v, p, 1.f) * 1.44269504f;
  } else {
    e = -log2_approx(__fmaf_rn(__uint2float_rn(~word), 0x1p-32f, 0x1p-33f));
  }
  return -log2_approx(e);
}

// What may be drawn: elements from the cut up.
struct Kept {
  Weights weights;
  float value;
  int id;

  __device__ __forceinline__ bool has(float x, int i) const {
    return (x > value || (x == value && i <= id)) && weights.of(weights.scaled(x));
  }
};

// The exponential race of a row: every element that is kept scores its scaled logit plus Gumbel noise of its own, in units of log 2; the
// highest wins.
struct Race {
  Kept kept;
  uint32_t key0, key1;
  float score;  // of the leader, as far as this lane knows
  int id;

  __device__ __forceinline__ Race(const Kept& kept, u64 bits, int best_id)
      : kept(kept),
        key0(static_cast<uint32_t>(bits)),
        key1(static_cast<uint32_t>(bits >> 32)),
        score(race_noise(random_word(key0, key1, best_id))),
        id(best_id) {}

  __device__ __forceinline__ void enter(float x, int i, uint32_t word) {
    const float s = __fmaf_rn(kept.weights.scaled(x), 1.44269504f, race_noise(word));
    if (s > score && kept.has(x, i)) score = s, id = i;
  }

  // One warp's elements, four chunks in flight. E is at least v / log(2), so only words below a bound can beat the leader, even beside the
  // likeliest of the lane's four elements: the logarithms are for those. (The bound's margin, 1 %, is far above the rounding of all that is
  // in it.)
  __device__ __forceinline__ void run(const Row& row) {
#pragma unroll 1
    for (int c = row.first; c < row.last; c += 4) {
      float4 x[4];
#pragma unroll
      for (int u = 0; u < 4; u++) x[u] = row.load(c + u, -INFINITY);
#pragma unroll
      for (int u = 0; u < 4; u++) chunk(x[u], (c + u) * kRowChunk + (threadIdx.x & 31) * 4);
    }
  }

  __device__ __forceinline__ void chunk(float4 x, int i) {
    const float largest = fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w));
    const float lead = __fmaf_rn(kept.weights.scaled(largest), 1.44269504f, 31.49f - score);
    const uint32_t bound = largest < kept.value ? 0 : __float2uint_rn(exp2_approx(lead));
    if (!__any_sync(~0u, bound > 0)) return;
    const uint32_t w0 = random_word(key0, key1, i), w1 = random_word(key0, key1, i + 1), w2 = random_word(key0, key1, i + 2),
                   w3 = random_word(key0, key1, i + 3);
    const bool may_win = min(min(w0, w1), min(w2, w3)) < bound;
    if (!__any_sync(~0u, may_win)) return;
    if (may_win) enter(x.x, i, w0), enter(x.y, i + 1, w1), enter(x.z, i + 2, w2), enter(x.w, i + 3, w3);
    follow();
  }

  // Every lane takes over the leader of the warp.
  __device__ __forceinline__ void follow() {
    const u64 leader = warp_max(rank_key(score, id));
    score = key_value(leader), id = key_id(leader);
  }
};

}  // namespace gptq
