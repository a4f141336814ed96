#include "cpu/lanes_portable.h"
#include "cpu/linear_ways.h"
#include "cpu/ops_ways.h"

namespace gptq_cpu {
const Ways& portable() {
  static const Ways ways{"portable", quantize, multiply, dense, &kOps};
  return ways;
}
}  // namespace gptq_cpu
