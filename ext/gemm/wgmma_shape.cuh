// The compile-time choices of a wgmma kernel and what follows from them.
#pragma once
#include "common/layout.cuh"
#include "gemm/wgmma_table.cuh"

namespace gptq {
namespace {

// A kernel: TN tokens and 64*FR rows for each of NWG consumer warpgroups, CL blocks per cluster. ONE: one scale group per chunk, or fewer.
// SCALED: the operand is weight times scale, rounded to 16 bits: one rounding (2^-11 relative) before that of the result. Otherwise it is
// weight minus zero point, an exact integer, and sums are scaled in fp32 group by group: an instruction less for two weights, a second set
// of accumulators.
template <bool BF_, bool ONE_, bool SCALED_, int TN_, int FR_, int CL_, int NWG_>
struct WgmmaShape {
  static constexpr bool BF = BF_, ONE = ONE_, SCALED = SCALED_;
  static constexpr int TN = TN_, FR = FR_, CL = CL_, NWG = NWG_;
  static constexpr int kStrips = 4 * FR * NWG, kRows = 16 * kStrips, kThreads = 128 * (NWG + 1);
  static constexpr int kTokenBytes = TN * kChunkK * 2;                      // of one slot
  static constexpr int kGroups = ONE ? 1 : 4;                               // scales per chunk: with 2 groups each comes twice
  static constexpr int kPass = TN == 256 && !ONE ? 16 : TN < 32 ? TN : 32;  // tokens the epilogue turns at a time
  static constexpr int kPassBytes = kPass * 128;                            // per warpgroup
  static constexpr int kMinBlocks = TN * FR <= 32 && NWG == 2 ? 2 : 1;
  // Registers per thread, of the 64,512 (2 groups), 30,720 (2 groups, twice per SM) or 65,536 (3) at the start.
  static constexpr int kProducerRegisters = NWG == 2 && kMinBlocks == 1 ? 40 : 32;
  static constexpr int kConsumerRegisters = NWG == 3 ? 160 : kMinBlocks == 2 ? 104 : 232;
  // k16 steps between two commits: as many as registers allow, since two steps' operands are alive at once.
  static constexpr int kScaledStep = FR == 1 && TN * NWG < 512 ? 4 : FR == 1 && TN == 256 ? 4 : 2;
  static constexpr int kWholeStep = ONE && FR == 1 && (TN < 64 || kConsumerRegisters == 232) ? 4 : 2;
  static constexpr int kK16PerStep = SCALED ? kScaledStep : kWholeStep, kSteps = 8 / kK16PerStep;
};

}  // namespace
}  // namespace gptq
