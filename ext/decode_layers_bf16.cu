#include "decode_layers_kernel.h"
#include "decode_layers_table.h"

namespace gptq {
namespace {
template <int G>
const void* pick(bool zeros) {
  return zeros ? reinterpret_cast<const void*>(decode_layers_kernel<G, true, true>) : reinterpret_cast<const void*>(decode_layers_kernel<G, false, true>);
}
}  // namespace

const void* decode_layers_bf16(int groups, bool zeros) { return groups == 1 ? pick<1>(zeros) : groups == 2 ? pick<2>(zeros) : pick<4>(zeros); }

}  // namespace gptq
