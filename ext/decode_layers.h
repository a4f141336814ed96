// All layers of a decode step of one sequence in one persistent kernel. See decode_layers_kernel.h.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "attention_decode.h"

namespace gptq {

constexpr int kLayersMin = 3;  // layers: the places of the last two are emptied when the next launch begins
constexpr int kLayersMaxHidden = 8192, kLayersMaxHeads = 16384;  // (times head_dim), which the warps that normalise, or sort, hold in registers

// One of a layer's four products (qkv, o, gate_up, down), the same in all layers.
struct LayerProduct {
  int N, K, chunks;  // chunks: of 128 k
  int units, spare;  // (pair of strips, chunk), pairs one after the other: every block takes so many in a row, the first `spare` one more
  int bias;          // elements in a layer's biases before this product's
  int out;           // elements in a layer's exchange before this product's output
};

// Where things are in shared memory, in bytes from its start.
struct LayersPlan {
  int depth;  // slots of the ring
  int norms, ring, normed, x, weight, order, raw, o_order, sums[2], red, total;
};

struct DecodeLayersArgs {
  const uint8_t* const* weights;  // [layers][4] strip streams; gate_up paired
  const uint8_t* const* caches;   // [layers]
  const uint16_t* norms;          // [layers][2][H] weights, in the order in which qkv and gate_up take their inputs
  const uint16_t* orders;         // [layers][2][H] input i of the product is column orders[i] of the stream, or null
  const uint16_t* bias;           // [layers][sum of N] or null
  const uint16_t* o_orders;       // [layers][heads head_dim] input i of o is column o_orders[i] of the attention, or null
  const uint16_t* head_norms;     // [layers][2][head_dim] of queries and keys, or null
  const int* windows;             // [layers], 0: all
  uint16_t* x;                    // [H]: what the first layer takes, and what the last one gives
  uint16_t* exchange;             // [layers][exchange_row]: every byte 255 before the first launch
  uint32_t* partials;             // decode_layers_partials_bytes, likewise
  AttentionDecodeArgs attention;  // of all layers: pointers that change from layer to layer are filled in; workspace for two layers
  int layers, exchange_row;
  int attended;        // elements in a layer's exchange before the attention's output
  int workspace_half;  // bytes of the attention's workspace for every second layer
  float eps;
  LayerProduct product[4];
  LayersPlan plan;  // by launch_decode_layers
};

// What follows from a model's shape: product[], exchange_row, attended, layers and the attention's heads.
struct LayersShape {
  int layers, hidden, ffn, heads, kv_heads, head_dim;
};
void describe(DecodeLayersArgs& args, const LayersShape& shape);

// Whether launch_decode_layers takes such a model on the current device. `ordered`: there are orders, or o_orders.
bool decode_layers_takes(const LayersShape& shape, int groups, bool zeros, bool ordered);
size_t decode_layers_partials_bytes();

// args: described, and all pointers, sizes and strides set. attention: as for launch_attention_decode, with prefetch.
cudaError_t launch_decode_layers(DecodeLayersArgs args, int head_dim, int groups, bool zeros, bool bf16, cudaStream_t stream);

}  // namespace gptq
