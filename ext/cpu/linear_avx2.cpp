#include "cpu/lanes_avx2.h"
#include "cpu/linear_ways.h"
#include "cpu/ops_ways.h"

namespace gptq_cpu {
const Ways& avx2() {
  static const Ways ways{"AVX2", quantize, multiply, dense, &kOps};
  return ways;
}
}  // namespace gptq_cpu
