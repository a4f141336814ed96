#include "cpu/lanes_avx512.h"
#include "cpu/linear_ways.h"
#include "cpu/ops_ways.h"

namespace gptq_cpu {
const Ways& avx512() {
  static const Ways ways{"AVX-512 VNNI", quantize, multiply, dense, &kOps};
  return ways;
}
}  // namespace gptq_cpu
