#include "cpu/lanes_avx512.h"
#include "cpu/linear_ways.h"

namespace gptq_cpu {
const Ways& avx512() {
  static const Ways ways = ways_of("AVX-512 VNNI");
  return ways;
}
}  // namespace gptq_cpu
