#include "cpu/lanes_portable.h"
#include "cpu/linear_ways.h"

namespace gptq_cpu {
const Ways& portable() {
  static const Ways ways = ways_of("portable");
  return ways;
}
}  // namespace gptq_cpu
