// What the launchers ask the current device, once.
#pragma once
#include <algorithm>
#include <atomic>
#include <utility>

#include "common/device.h"

namespace gptq {

struct Device {
  int id, sms, smem;  // smem: bytes one block may ask for, no more than `code` can count on
  int capability;     // of the device, 10 * major + minor
  int code;           // for which the kernels that run here were compiled, as __CUDA_ARCH__ / 10 in them; never above `capability`
};

// Shared memory that one block may have on the smallest device that `code` was made for: so that code of 8.0 is launched on a newer device
// as it is on its own.
inline int shared_memory_of(int code) {
  const int kib = code < 90 ? (code == 80 ? 163 : 99) : code < 120 ? 227 : 99;
  return kib << 10;
}

inline cudaError_t current_device(Device& out) {
  constexpr int kMax = 64;
  static std::atomic<long long> known[kMax];  // sms | smem << 16 | capability << 40 | code << 52; 0 = not asked yet
  int id;
  if (const cudaError_t status = cudaGetDevice(&id); status != cudaSuccess) return status;
  long long packed = id < kMax ? known[id].load(std::memory_order_relaxed) : 0;
  if (!packed) {
    int sms, smem, major, minor, code;
    for (const auto& [value, attribute] :
         {std::pair{&sms, cudaDevAttrMultiProcessorCount}, std::pair{&smem, cudaDevAttrMaxSharedMemoryPerBlockOptin},
          std::pair{&major, cudaDevAttrComputeCapabilityMajor}, std::pair{&minor, cudaDevAttrComputeCapabilityMinor}})
      if (const cudaError_t status = cudaDeviceGetAttribute(value, attribute, id); status != cudaSuccess) return status;
    if (const cudaError_t status = compiled_for(code); status != cudaSuccess) return status;
    smem = std::min(smem, shared_memory_of(code));
    packed = sms | static_cast<long long>(smem) << 16 | static_cast<long long>(10 * major + minor) << 40 |
             static_cast<long long>(code) << 52;
    if (id < kMax) known[id].store(packed, std::memory_order_relaxed);
  }
  const auto field = [&](int shift, int bits) { return static_cast<int>(packed >> shift & ((1 << bits) - 1)); };
  out = {id, field(0, 16), field(16, 24), field(40, 12), field(52, 11)};
  return cudaSuccess;
}

}  // namespace gptq
