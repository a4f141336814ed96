#include "cpu/lanes_avx2.h"
#include "cpu/linear_ways.h"

namespace gptq_cpu {
const Ways& avx2() {
  static const Ways ways = ways_of("AVX2");
  return ways;
}
}  // namespace gptq_cpu
