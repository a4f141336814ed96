// For which architecture the code was compiled that the current device runs.
#pragma once
#include <cuda_runtime.h>

namespace gptq {

// 10 * major + minor, as __CUDA_ARCH__ / 10 in every kernel of the portable ones. A device may run code that was made for an older one (of
// its major version as it is, of others compiled by the driver), and what the code is decides how it is launched. 0, and
// cudaErrorNoKernelImageForDevice or its like, where there is none for it.
cudaError_t compiled_for(int& code);

}  // namespace gptq
