#include "common/device.h"

namespace gptq {
namespace {

__global__ void compiled_as_all_others() {}

}  // namespace

cudaError_t compiled_for(int& code) {
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, compiled_as_all_others);
  code = status == cudaSuccess ? attributes.ptxVersion : 0;
  return status;
}

}  // namespace gptq
