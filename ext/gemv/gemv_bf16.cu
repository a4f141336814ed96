#include "gemv/gemv_kernel.cuh"
#include "gemv/gemv_table.cuh"

namespace gptq {
namespace {
template <int NT, int G>
const void* pick(bool zeros) {
  return zeros ? reinterpret_cast<const void*>(gemv_kernel<NT, G, true, true>)
               : reinterpret_cast<const void*>(gemv_kernel<NT, G, false, true>);
}
}  // namespace

const void* gemv_bf16(int groups, bool zeros, int column_tiles) {
  if (column_tiles == 1) return groups == 1 ? pick<1, 1>(zeros) : groups == 2 ? pick<1, 2>(zeros) : pick<1, 4>(zeros);
  return groups == 1 ? pick<2, 1>(zeros) : groups == 2 ? pick<2, 2>(zeros) : pick<2, 4>(zeros);
}
}  // namespace gptq
