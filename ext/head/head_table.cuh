// Between the kernels of the head and the code that chooses and launches them.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "head/head.h"

namespace gptq {

constexpr int kHeadRows = 128;        // of the weight in a tile
constexpr int kHeadK = 64;            // in a slot: rows of 128 bytes, whose 16-byte pieces are permuted by the row modulo 8
constexpr int kHeadRowBytes = 2 * kHeadK;
constexpr int kHeadThreads = 256;     // of the kernel by mma.sync
constexpr int kHeadWarps = kHeadThreads / 32;
constexpr int kHeadMinDepth = 3, kHeadMaxDepth = 9;  // slots of its ring
constexpr int kHeadTiles[] = {8, 16, 32, 64, 128};   // its tokens

struct HeadParams {
  const uint16_t* weight;
  const uint16_t* x;
  float* logits;
  int m, n, k;
  int chunks;          // of kHeadK, along k
  int m_tiles, tiles;  // of tokens; in all. Tiles of the same rows follow each other
  int stages;          // slots of the ring
  int64_t ldx, ldl;
};

constexpr int head_slot_bytes(int tokens) { return (kHeadRows + tokens) * kHeadRowBytes; }

inline bool head_takes(const HeadProduct& call) {
  const auto aligned = [](const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; };
  return call.m > 0 && call.n > 0 && call.k > 0 && call.k % 8 == 0 && call.ldx % 8 == 0 && call.ldx >= call.k && call.ldl >= call.n &&
         aligned(call.weight, 16) && aligned(call.x, 16) && aligned(call.logits, 4);
}

// For tiles of so many tokens, `across` tiles of rows at a time.
inline HeadParams head_params(const HeadProduct& call, int tokens, int across) {
  HeadParams p = {};
  p.weight = static_cast<const uint16_t*>(call.weight), p.x = static_cast<const uint16_t*>(call.x), p.logits = call.logits;
  p.m = call.m, p.n = call.n, p.k = call.k, p.ldx = call.ldx, p.ldl = call.ldl;
  p.chunks = (call.k + kHeadK - 1) / kHeadK;
  p.m_tiles = (call.m + tokens - 1) / tokens;
  p.tiles = p.m_tiles * ((call.n + kHeadRows * across - 1) / (kHeadRows * across));
  return p;
}

// By mma.sync; null where there is no tile of so many tokens.
const void* head_fp16(int tokens);
const void* head_bf16(int tokens);

}  // namespace gptq
