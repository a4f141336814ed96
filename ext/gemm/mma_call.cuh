// What the launchers of the GEMMs that take an MmaGemm have in common.
#pragma once
#include "common/layout.cuh"
#include "gemm/mma.h"
#include "gemm/mma_table.cuh"

namespace gptq {

// Whether a call keeps the rules of mma.h. last_tile: the highest number of a tile.
inline bool mma_accepts(const MmaGemm& call, int last_tile) {
  const auto aligned = [](const void* pointer, int bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; };
  return call.m > 0 && call.n > 0 && call.k > 0 && call.n % 16 == 0 && call.k % 8 == 0 && call.ldx % 8 == 0 &&
         (call.f32 || call.ldy % 2 == 0) && call.ldr % 2 == 0 && aligned(call.weight, 16) && aligned(call.x, 16) && aligned(call.y, 4) &&
         aligned(call.residual, 4) && aligned(call.workspace, 16) && (call.groups == 1 || call.groups == 2 || call.groups == 4) &&
         call.paired >= kApart && call.paired <= kPlanesGate && (call.paired != kPlanesGate || call.residual != nullptr) &&
         !(call.f32 && call.residual != nullptr) &&
         call.tile >= 0 && call.tile <= last_tile && call.split >= 0 && call.split <= static_cast<int>(GemmSplit::kLast);
}

// The parameters that depend neither on the tile nor on the order of sums; the workspace begins with `flag_bytes` of flags.
inline void take_call(MmaParams& p, const MmaGemm& call, size_t flag_bytes) {
  p.weight = static_cast<const uint8_t*>(call.weight);
  p.x = static_cast<const uint16_t*>(call.x);
  p.y = call.y;
  p.bias = static_cast<const uint16_t*>(call.bias);
  p.residual = static_cast<const uint16_t*>(call.residual);
  p.flags = static_cast<int*>(call.workspace);
  p.partials = reinterpret_cast<float*>(static_cast<uint8_t*>(call.workspace) + flag_bytes);
  p.m = call.m, p.n = call.n, p.k = call.k;
  p.strips = call.n / kStripRows;
  p.ldx = call.ldx, p.ldy = call.ldy, p.ldr = call.ldr;
  p.groups = call.groups, p.zeros = call.zeros, p.paired = call.paired, p.f32 = call.f32;
  p.chunk_bytes = chunk_bytes(call.groups, call.zeros);
}

}  // namespace gptq
