// The forward pass of a LLaMA and its relatives: a step's tokens in, the stream behind the last layer out, K and V in the cache.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/engine.h"

namespace gptq_cpu {

// One quantized weight of a Linear, whose outputs stand from `offset` on.
struct Part {
  Quantized weight;
  const float* bias;  // [N] or null
  int offset;
};
using Linear = std::vector<Part>;

struct Layer {
  const float *input_norm, *post_attention_norm;  // [hidden]
  const float *q_norm, *k_norm;                   // [dim] or null
  int window;                                     // 0: none
  Linear qkv, o, gate_up, down;
};

struct Shape {
  int hidden, ffn, heads, kv_heads, dim, vocab;
  float eps;
};

// The sequences of a step, one after the other.
struct Span {
  int num_computed, num_tokens;
  std::vector<std::int32_t> blocks;
};

class Model {
 public:
  // Memory belongs to the caller: it stays where it is as long as the model. `frequencies`: radians per position, [dim / 2].
  Model(Engine& engine, const Shape& shape, const void* embedding, Kind embedding_kind, const float* frequencies, float rotary_scale);
  void add_layer(Layer layer) { layers_.push_back(std::move(layer)); }
  // Layer after layer, each as ops.h says.
  void set_cache(void* data, Kind kind, int num_blocks, int block_size);
  // Layers before which the stream is kept too, ascending; as many as there are layers: behind the last one.
  // std::invalid_argument for others.
  void set_taps(std::vector<int> layers);

  // Tokens [M] of the spans, in order -> x [M, hidden], and where there are taps `tapped` [M, taps, hidden].
  // std::invalid_argument for a token or a block that there is none of.
  void forward(const std::vector<std::int32_t>& tokens, const std::vector<Span>& spans, float* x, float* tapped = nullptr);
  // These rows of x behind the last norm, as the head takes them.
  void finish(const float* x, const std::vector<int>& rows, const float* norm, float* y);

 private:
  // Rows of one sequence and heads with the same K and V, whose attention one thread computes.
  struct Task {
    int span, first_token, num_tokens, kv_head, first_head, num_heads;
  };

  void check(const std::vector<std::int32_t>& tokens, const std::vector<Span>& spans) const;
  void begin(const std::vector<std::int32_t>& tokens, const std::vector<Span>& spans);
  void prepare(const Linear& linear, const float* x, int m);
  void product(const Linear& linear, int M, float* y);
  void finish_qkv(const Layer& layer, const Cache& cache, int m);
  void attend(const Layer& layer, const Cache& cache, const std::vector<Span>& spans);
  // task(m) for every row.
  template <typename F>
  void each_row(int M, F&& task);

  Engine& engine_;
  Shape shape_;
  const void* embedding_;
  Kind embedding_kind_;
  const float* frequencies_;
  float rotary_scale_;
  std::vector<Layer> layers_;
  std::vector<int> taps_;
  Cache cache_{};
  std::int64_t layer_bytes_ = 0;
  int num_blocks_ = 0;
  // Of one step: outputs of products, and what its rows are.
  std::vector<float> qkv_, attended_, gate_up_, product_, cos_, sin_;
  std::vector<std::int64_t> block_;  // where a row's K and V go
  std::vector<int> place_, first_row_;
  std::vector<Task> tasks_;
  // Of one product: rows as each of its parts takes them.
  std::vector<Operand> operands_;
  std::vector<Rows> rows_;
};

}  // namespace gptq_cpu
