// The launchers on a card that is not there: every call of the CUDA runtime is answered from four numbers, and a launch is a line of output.
//
//   pretend_card SMS SHARED CAPABILITY CODE        SHARED: bytes that one block may ask for; CODE: __CUDA_ARCH__ / 10 of the kernels
//
// Reads calls, a line each, and answers each with a line for every launch, then an empty one:
//
//   gemv M N K GROUPS ZEROS                         ->  KERNEL GRID THREADS SHARED CLUSTER OVERLAPPED
//   mma M N K GROUPS ZEROS
//   head M V H
//   attention SEQUENCES HEADS KV_HEADS HEAD_DIM FP8 CONTEXT
//
// KERNEL is the mangled name, as ptxas tells it. Linked with the objects of the launchers and of their fp16 kernels, without a runtime.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <iostream>
#include <map>
#include <sstream>
#include <string>

#include "attention/attention_decode.h"
#include "attention/attention_decode_table.cuh"
#include "gemm/mma.h"
#include "gemm/mma_table.cuh"
#include "gemv/gemv.h"
#include "head/head.h"

namespace {

int sms, shared, capability, code;

std::map<const void*, std::string>& names() {  // filled before main()
  static std::map<const void*, std::string> map;
  return map;
}

}  // namespace

namespace gptq {
const void* gemv_bf16(int, bool, int) { return nullptr; }
MmaKernel mma_bf16(MmaTile, MmaFormat) { return {}; }
const void* head_bf16(int) { return nullptr; }
const void* attention_decode_bf16(int, bool, AttendedBy) { return nullptr; }
}  // namespace gptq

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, void*, void*, void*, void*, int*) {
  names()[function] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
unsigned __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return 1; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = sms; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = shared; break;
    case cudaDevAttrComputeCapabilityMajor: *value = capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = capability % 10; break;
    default: return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  std::memset(attributes, 0, sizeof *attributes);
  attributes->ptxVersion = attributes->binaryVersion = code;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
// As where every GPC has a multiple of the cluster's SMs.
cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void*, const cudaLaunchConfig_t* config) {
  *count = sms / static_cast<int>(config->attrs[0].val.clusterDim.x);
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void**) {
  unsigned cluster = 1;
  bool overlapped = false;
  for (unsigned i = 0; i < config->numAttrs; i++) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = config->attrs[i].val.clusterDim.x;
    if (config->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization) overlapped = true;
  }
  if (!names().count(function) || static_cast<int>(config->dynamicSmemBytes) > shared) return cudaErrorInvalidValue;
  std::printf("%s %u %u %zu %u %d\n", names()[function].c_str(), config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes, cluster,
              overlapped);
  return cudaSuccess;
}

}  // extern "C"

int main(int, char** argv) {
  sms = std::stoi(argv[1]), shared = std::stoi(argv[2]), capability = std::stoi(argv[3]), code = std::stoi(argv[4]);
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string what;
    words >> what;
    cudaError_t status = cudaErrorInvalidValue;
    if (what == "gemv") {
      gptq::GemvArgs args = {};
      int groups, zeros;
      words >> args.M >> args.N >> args.K >> groups >> zeros;
      args.ldx = args.K, args.ldy = args.N;
      status = gptq::launch_gemv(args, groups, zeros, false, false, nullptr);
    } else if (what == "mma") {
      gptq::MmaGemm call = {};
      int zeros;
      words >> call.m >> call.n >> call.k >> call.groups >> zeros;
      call.zeros = zeros, call.ldx = call.k, call.ldy = call.n;
      status = gptq::launch_mma(call, nullptr);
    } else if (what == "head") {
      gptq::HeadProduct call = {};
      words >> call.m >> call.n >> call.k;
      call.ldx = call.k, call.ldl = call.n;
      status = gptq::launch_head(call, nullptr);
    } else if (what == "attention") {
      gptq::AttentionDecodeArgs args = {};
      int head_dim, fp8, context;
      words >> args.sequences >> args.heads >> args.kv_heads >> head_dim >> fp8 >> context;
      args.block_size = 16, args.table_stride = (context + 15) / 16;
      status = gptq::launch_attention_decode(args, head_dim, false, fp8, 0, gptq::Teams::kBest, nullptr);
    }
    if (status != cudaSuccess) {
      std::fprintf(stderr, "%s: error %d\n", line.c_str(), status);
      return 1;
    }
    std::puts("");
  }
}
