#include "cpu/model.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace gptq_cpu {
namespace {

constexpr int kWorthRows = 4;           // rows whose norms and roundings are worth several threads
constexpr std::int64_t kWorthKeys = 1 << 15;  // queries times keys times heads' dimensions, likewise

int width(const Linear& linear) { return linear.back().offset + linear.back().weight.N; }

void add_bias(const Linear& linear, float* y) {
  for (const Part& part : linear)
    if (part.bias != nullptr)
      for (int n = 0; n < part.weight.N; n++) y[part.offset + n] += part.bias[n];
}

}  // namespace

Model::Model(Engine& engine, const Shape& shape, const void* embedding, Kind embedding_kind, const float* frequencies, float rotary_scale)
    : engine_(engine), shape_(shape), embedding_(embedding), embedding_kind_(embedding_kind), frequencies_(frequencies),
      rotary_scale_(rotary_scale) {}

void Model::set_cache(void* data, Kind kind, int num_blocks, int block_size) {
  cache_ = {data, kind, block_size, shape_.kv_heads, shape_.dim};
  num_blocks_ = num_blocks;
  layer_bytes_ = static_cast<std::int64_t>(num_blocks) * shape_.kv_heads * 2 * shape_.dim * block_size * (kind == Kind::single ? 4 : 2);
}

void Model::set_taps(std::vector<int> layers) {
  for (const int layer : layers)
    if (layer < 0 || layer > static_cast<int>(layers_.size()))
      throw std::invalid_argument("layer " + std::to_string(layer) + " is none of the " + std::to_string(layers_.size()) + " there are");
  taps_ = std::move(layers);
}

void Model::check(const std::vector<std::int32_t>& tokens, const std::vector<Span>& spans) const {
  std::int64_t rows = 0;
  for (const Span& span : spans) {
    const std::int64_t end = static_cast<std::int64_t>(span.num_computed) + span.num_tokens;
    if (span.num_tokens < 1 || span.num_computed < 0) throw std::invalid_argument("a sequence of a step has no tokens");
    if (end > static_cast<std::int64_t>(span.blocks.size()) * cache_.block_size)
      throw std::invalid_argument("position " + std::to_string(end - 1) + " is beyond the " + std::to_string(span.blocks.size()) +
                                  " blocks of its sequence");
    for (const std::int32_t block : span.blocks)
      if (block < 0 || block >= num_blocks_)
        throw std::invalid_argument("block " + std::to_string(block) + " is none of the " + std::to_string(num_blocks_) + " there are");
    rows += span.num_tokens;
  }
  if (rows != static_cast<std::int64_t>(tokens.size())) throw std::invalid_argument("the sequences' tokens are not those of the step");
  for (const std::int32_t token : tokens)
    if (token < 0 || token >= shape_.vocab)
      throw std::invalid_argument("token " + std::to_string(token) + " is none of the " + std::to_string(shape_.vocab) + " there are");
}

// What every layer needs of a row: its slot in the cache, and the cosines and sines of its position.
void Model::begin(const std::vector<std::int32_t>& tokens, const std::vector<Span>& spans) {
  const std::size_t M = tokens.size(), half = static_cast<std::size_t>(shape_.dim / 2);
  qkv_.resize(M * static_cast<std::size_t>(width(layers_[0].qkv)));
  attended_.resize(M * static_cast<std::size_t>(shape_.heads * shape_.dim));
  gate_up_.resize(M * 2 * static_cast<std::size_t>(shape_.ffn));
  product_.resize(M * static_cast<std::size_t>(shape_.hidden));
  cos_.resize(M * half);
  sin_.resize(M * half);
  block_.resize(M);
  place_.resize(M);
  first_row_.clear();
  std::size_t m = 0;
  for (const Span& span : spans) {
    first_row_.push_back(static_cast<int>(m));
    for (int t = 0; t < span.num_tokens; t++, m++) {
      const int position = span.num_computed + t;
      block_[m] = span.blocks[static_cast<std::size_t>(position / cache_.block_size)];
      place_[m] = position % cache_.block_size;
      for (std::size_t i = 0; i < half; i++) {
        const float angle = static_cast<float>(position) * frequencies_[i];
        cos_[m * half + i] = std::cos(angle) * rotary_scale_;
        sin_[m * half + i] = std::sin(angle) * rotary_scale_;
      }
    }
  }
}

template <typename F>
void Model::each_row(int M, F&& task) {
  engine_.share(M, M >= kWorthRows, std::forward<F>(task));
}

// Row m of what a Linear takes, `x`, as its products take it.
void Model::prepare(const Linear& linear, const float* x, int m) {
  for (std::size_t i = 0; i < linear.size(); i++) {
    const Quantized& w = linear[i].weight;
    engine_.prepare(w, x, m, 0, w.K / w.group, rows_[i]);
  }
}

// y [M, width] without biases.
void Model::product(const Linear& linear, int M, float* y) {
  for (std::size_t i = 0; i < linear.size(); i++) engine_.multiply(linear[i].weight, rows_[i], M, y + linear[i].offset, width(linear));
}

// Bias, norms of the heads, rotation, and K and V into the cache.
void Model::finish_qkv(const Layer& layer, const Cache& cache, int m) {
  const int dim = shape_.dim, half = dim / 2, heads = shape_.heads, kv_heads = shape_.kv_heads;
  const Ops& ops = *engine_.ways().ops;
  float* row = qkv_.data() + static_cast<std::int64_t>(m) * width(layer.qkv);
  add_bias(layer.qkv, row);
  float *k = row + heads * dim, *v = k + kv_heads * dim;
  if (layer.q_norm != nullptr) {
    for (int h = 0; h < heads; h++) ops.rms_norm(row + h * dim, layer.q_norm, shape_.eps, dim, row + h * dim);
    for (int h = 0; h < kv_heads; h++) ops.rms_norm(k + h * dim, layer.k_norm, shape_.eps, dim, k + h * dim);
  }
  const std::int64_t at = static_cast<std::int64_t>(m) * half;
  ops.rotate(row, heads + kv_heads, dim, cos_.data() + at, sin_.data() + at);
  ops.write(cache, block_[m], place_[m], k, v);
}

void Model::attend(const Layer& layer, const Cache& cache, const std::vector<Span>& spans) {
  const int dim = shape_.dim, share = shape_.heads / shape_.kv_heads, ld = width(layer.qkv);
  const int pairs = static_cast<int>(spans.size()) * shape_.kv_heads, threads = engine_.num_threads();
  const int at_once = std::min({share, kMostRows, std::max(1, share * pairs / threads)});  // so that every thread has some
  tasks_.clear();
  std::int64_t work = 0;
  for (std::size_t s = 0; s < spans.size(); s++) {
    const int n = spans[s].num_tokens, tokens = std::max(1, kMostRows / share);
    work += static_cast<std::int64_t>(n) * (spans[s].num_computed + n);
    for (int t = 0; t < n; t += tokens)
      for (int h = 0; h < shape_.kv_heads; h++)
        for (int j = 0; j < share; j += at_once)
          tasks_.push_back({static_cast<int>(s), t, std::min(tokens, n - t), h, j, std::min(at_once, share - j)});
  }
  const Ops& ops = *engine_.ways().ops;
  engine_.share(static_cast<int>(tasks_.size()), work * shape_.heads * dim > kWorthKeys, [&](int i) {
    thread_local std::vector<float> room;
    const Task& task = tasks_[static_cast<std::size_t>(i)];
    const Span& span = spans[static_cast<std::size_t>(task.span)];
    room.resize(static_cast<std::size_t>(attention_room(kMostRows, dim)));
    const std::int64_t row = first_row_[static_cast<std::size_t>(task.span)] + task.first_token;
    const int head = task.kv_head * share + task.first_head;
    ops.attend(cache,
               {qkv_.data() + row * ld + head * dim, ld, attended_.data() + row * shape_.heads * dim + head * dim, shape_.heads * dim,
                span.blocks.data(), task.num_tokens, task.num_heads, span.num_computed + task.first_token, layer.window, task.kv_head},
               room.data());
  });
}

void Model::forward(const std::vector<std::int32_t>& tokens, const std::vector<Span>& spans, float* x, float* tapped) {
  const auto one_call = engine_.lock();
  if (!taps_.empty() && tapped == nullptr) throw std::invalid_argument("there is nowhere to put what is tapped");
  check(tokens, spans);
  begin(tokens, spans);
  const Ops& ops = *engine_.ways().ops;
  const int M = static_cast<int>(tokens.size()), hidden = shape_.hidden, attended = shape_.heads * shape_.dim;
  const auto row = [&](float* data, int m, int n) { return data + static_cast<std::int64_t>(m) * n; };
  const auto make = [&](const Linear& linear) {
    operands_.resize(std::max(operands_.size(), linear.size()));
    rows_.resize(operands_.size());
    for (std::size_t i = 0; i < linear.size(); i++) rows_[i] = operands_[i].make(linear[i].weight, M);
  };
  // What a product gave, and its bias, to the stream.
  const auto add = [&](const Linear& linear, int m) {
    float* to = row(x, m, hidden);
    const float* from = row(product_.data(), m, hidden);
    for (int n = 0; n < hidden; n++) to[n] += from[n];
    add_bias(linear, to);
  };
  // The stream before a layer, where somebody wants it.
  const auto tap = [&](std::size_t l, int m) {
    for (std::size_t i = 0; i < taps_.size(); i++)
      if (taps_[i] == static_cast<int>(l))
        std::copy_n(row(x, m, hidden), hidden, row(tapped, m * static_cast<int>(taps_.size()) + static_cast<int>(i), hidden));
  };
  const auto norm = [&](const float* weight, const Linear& linear, int m) {
    thread_local std::vector<float> normed;
    normed.resize(static_cast<std::size_t>(hidden));
    ops.rms_norm(row(x, m, hidden), weight, shape_.eps, hidden, normed.data());
    prepare(linear, normed.data(), m);
  };
  for (std::size_t l = 0; l < layers_.size(); l++) {
    const Layer& layer = layers_[l];
    Cache cache = cache_;
    cache.data = static_cast<char*>(cache_.data) + static_cast<std::int64_t>(l) * layer_bytes_;
    make(layer.qkv);
    each_row(M, [&](int m) {
      if (l == 0)
        ops.embed(embedding_, embedding_kind_, static_cast<std::int64_t>(tokens[static_cast<std::size_t>(m)]) * hidden, hidden,
                  row(x, m, hidden));
      else
        add(layers_[l - 1].down, m);
      tap(l, m);
      norm(layer.input_norm, layer.qkv, m);
    });
    product(layer.qkv, M, qkv_.data());
    // All of a step's K and V are there before a row reads: sequences may share blocks.
    each_row(M, [&](int m) { finish_qkv(layer, cache, m); });
    attend(layer, cache, spans);
    make(layer.o);
    each_row(M, [&](int m) { prepare(layer.o, row(attended_.data(), m, attended), m); });
    product(layer.o, M, product_.data());
    make(layer.gate_up);
    each_row(M, [&](int m) {
      add(layer.o, m);
      norm(layer.post_attention_norm, layer.gate_up, m);
    });
    product(layer.gate_up, M, gate_up_.data());
    make(layer.down);
    each_row(M, [&](int m) {
      float* gate = row(gate_up_.data(), m, 2 * shape_.ffn);
      add_bias(layer.gate_up, gate);
      ops.silu_and_multiply(gate, gate + shape_.ffn, shape_.ffn, gate);
      prepare(layer.down, gate, m);
    });
    product(layer.down, M, product_.data());
  }
  each_row(M, [&](int m) {
    add(layers_.back().down, m);
    tap(layers_.size(), m);
  });
}

void Model::finish(const float* x, const std::vector<int>& rows, const float* norm, float* y) {
  const auto one_call = engine_.lock();
  const std::int64_t hidden = shape_.hidden;
  each_row(static_cast<int>(rows.size()), [&](int i) {
    engine_.ways().ops->rms_norm(x + rows[static_cast<std::size_t>(i)] * hidden, norm, shape_.eps, shape_.hidden, y + i * hidden);
  });
}

}  // namespace gptq_cpu
