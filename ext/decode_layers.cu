#include "decode_layers.h"

#include <algorithm>
#include <atomic>

#include "decode_layers_kernel.h"
#include "decode_layers_table.h"
#include "launch.h"

namespace gptq {
namespace {

constexpr int kLeastDepth = 4;  // slots; with less, memory waits for the multiprocessors

int chunks_of(const LayerProduct& p) { return (p.K + kChunkK - 1) / kChunkK; }
int units_of(const LayerProduct& p) { return p.N / kPairRows * chunks_of(p); }

// The deepest ring that fits; false: none of at least kLeastDepth.
bool choose_plan(DecodeLayersArgs& args, const Device& device, int groups, bool zeros, bool ordered) {
  for (int depth = kLayersMaxDepth; depth >= kLeastDepth; depth--) {
    args.plan = plan_layers(args.product, depth, chunk_bytes(groups, zeros), groups, args.attention.part_heads, ordered);
    if (args.plan.total <= device.smem) return true;
  }
  return false;
}

}  // namespace

void describe(DecodeLayersArgs& args, const LayersShape& s) {
  const int heads = s.heads * s.head_dim, qkv = heads + 2 * s.kv_heads * s.head_dim;
  args.layers = s.layers;
  args.attended = qkv;
  const int sizes[4][2] = {{qkv, s.hidden}, {s.hidden, heads}, {2 * s.ffn, s.hidden}, {s.hidden, s.ffn}};
  const int out[4] = {0, qkv + heads, qkv + heads + s.hidden, qkv + heads + s.hidden + s.ffn};
  int bias = 0;
  for (int k = 0; k < 4; k++) {
    LayerProduct& p = args.product[k];
    p.N = sizes[k][0], p.K = sizes[k][1];
    p.bias = bias, p.out = out[k];
    bias += p.N;
  }
  args.exchange_row = out[3] + s.hidden;
  args.attention.heads = s.heads, args.attention.kv_heads = s.kv_heads;
}

bool decode_layers_takes(const LayersShape& shape, int groups, bool zeros, bool ordered) {
  Device device;
  if (current_device(device) != cudaSuccess || device.capability != 90) return false;
  if (shape.head_dim != kLayersHead || shape.layers < kLayersMin || shape.hidden > kLayersMaxHidden || shape.heads * shape.head_dim > kLayersMaxHeads)
    return false;
  DecodeLayersArgs args = {};
  describe(args, shape);
  for (const LayerProduct& p : args.product)
    if (p.N % kPairRows || p.K % 8 || units_of(p) < device.sms) return false;
  args.attention.block_size = 8;
  complete(args.attention);
  return choose_plan(args, device, groups, zeros, ordered);
}

size_t decode_layers_partials_bytes() {
  Device device;
  return current_device(device) == cudaSuccess ? sizeof(uint32_t) * 2 * 4 * device.sms * kPairRows : 0;
}

cudaError_t launch_decode_layers(DecodeLayersArgs args, int head_dim, int groups, bool zeros, bool bf16, cudaStream_t stream) {
  Device device;
  if (const cudaError_t status = current_device(device); status != cudaSuccess) return status;
  complete(args.attention);
  if (args.layers < kLayersMin || head_dim != kLayersHead || device.capability != 90) return cudaErrorInvalidValue;
  if (!choose_plan(args, device, groups, zeros, args.orders || args.o_orders)) return cudaErrorInvalidConfiguration;
  for (LayerProduct& p : args.product) {
    p.chunks = chunks_of(p);
    p.units = units_of(p) / device.sms, p.spare = units_of(p) % device.sms;
    if (!p.units) return cudaErrorInvalidValue;
  }
  args.workspace_half = static_cast<int>(attention_decode_workspace_bytes(args.attention.heads, args.attention.kv_heads, kLayersHead) / 2);
  const void* kernel = bf16 ? decode_layers_bf16(groups, zeros) : decode_layers_fp16(groups, zeros);
  static std::atomic<uint64_t> done[3][2][2];
  if (const cudaError_t status = set_limits(kernel, done[groups / 2][zeros][bf16], device.smem, device); status != cudaSuccess) return status;
  return launch_kernel(kernel, {dim3(device.sms), kLayersThreads, args.plan.total, stream}, device, args);
}

}  // namespace gptq
