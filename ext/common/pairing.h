// What rows g and g+8 of a strip (common/layout.cuh) are to each other, and what a product makes of them.
#pragma once

namespace gptq {

enum Pairing : int {
  kApart,      // outputs of their own, side by side
  kHalves,     // outputs i and N/2 + i, i = 8 strip + g
  kGated,      // the same, and y[i] = silu(row i) * row (N/2 + i), then + residual
  kPlanes,     // the upper and the lower nibble of a weight of 8 bits: y[i] = their sum, then + residual. N counts rows; bias is [N/2]
  kPlanesGate  // the same, and y[i] = silu(sum) * residual
};

}  // namespace gptq
