#include "cpu/sampler_ways.h"

namespace gptq_cpu {
const SamplerWays& sampler_avx512() {
  static const SamplerWays ways{survey, measure, histogram, list, race};
  return ways;
}
}  // namespace gptq_cpu
