#include "cpu/lanes_avx2.h"
#include "cpu/linear_ways.h"

namespace gptq_cpu {
const Ways& avxvnni() {
  static const Ways ways = ways_of("AVX-VNNI");
  return ways;
}
}  // namespace gptq_cpu
