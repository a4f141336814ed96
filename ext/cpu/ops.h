// What a layer does between its products: norms, rotation, attention over the paged cache, the gate.
#pragma once
#include <cstdint>

namespace gptq_cpu {

enum class Kind : int { half = 0, bfloat = 1, single = 2 };  // of scales, of dense weights, and (but for half) of K and V

constexpr int kLanes = 16;
constexpr int kKeyBlock = 64;  // keys whose scores are added up together; the same for every row, whoever computes it
constexpr int kMostRows = 32;  // of one call of `attend`

// K and V of one layer: kind[blocks][kv_heads][2][dim * block_size], K as [dim][block_size] and V as [block_size][dim]. A block holds
// `block_size` tokens, a multiple of 16.
struct Cache {
  void* data;
  Kind kind;
  int block_size, kv_heads, dim;
};

// Rows of one sequence that read K and V of one head together.
struct Queries {
  const float* q;          // the first row's first head: [tokens][.., share, dim], `ld` floats from token to token
  std::int64_t ld;
  float* out;              // alike, `ld_out` floats from token to token
  std::int64_t ld_out;
  const std::int32_t* table;  // of the sequence
  int tokens, share;       // rows are tokens by share
  int first_position;      // of token 0; it sees positions 0 to its own
  int window;              // and of these the last so many; 0: all
  int kv_head;
};

struct Ops {
  // out = n numbers of `data` from `first` on.
  void (*embed)(const void* data, Kind kind, std::int64_t first, int n, float* out);
  // out = x / sqrt(mean of squares + eps) * weight
  void (*rms_norm)(const float* x, const float* weight, float eps, int n, float* out);
  // out = silu(gate) * up
  void (*silu_and_multiply)(const float* gate, const float* up, int n, float* out);
  // Pairs (i, i + dim / 2) of each head, in place.
  void (*rotate)(float* x, int heads, int dim, const float* cos, const float* sin);
  // One token's K and V, [kv_heads][dim] each, into slot `offset` of a block.
  void (*write)(const Cache& cache, std::int64_t block, int offset, const float* k, const float* v);
  // softmax(q k / sqrt(dim)) v. `room`: floats of `room(rows, dim)` many.
  void (*attend)(const Cache& cache, const Queries& queries, float* room);
};

inline int attention_room(int rows, int dim) { return rows * (2 * dim + kKeyBlock + 2) + kLanes; }

}  // namespace gptq_cpu
