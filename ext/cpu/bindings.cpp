// gptq_api._cpu: addresses in, an exception out. Shapes, types and alignment are checked in gptq_api/runner/cpu.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/checksum.h"
#include "cpu/engine.h"
#include "cpu/model.h"
#include "cpu/sampler.h"

namespace py = pybind11;
using py::literals::operator""_a;
using namespace gptq_cpu;

namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// What Python knows of a quantized weight: q, scales, zeros, order, N, K, inputs, group, bits, kind, exact.
using Fields = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t, int, int, int, int, int, int, bool>;

Quantized quantized_of(const Fields& fields) {
  const auto& [q, scales, zeros, order, N, K, inputs, group, bits, kind, exact] = fields;
  return {pointer<const std::uint8_t>(q), pointer<const void>(scales), pointer<const std::uint8_t>(zeros),
          pointer<const std::int32_t>(order), N, K, inputs, group, bits, static_cast<Kind>(kind), exact};
}

void quantized(Engine& engine, const Fields& w, std::uintptr_t x, std::int64_t ldx, int M, std::uintptr_t y, std::int64_t ldy) {
  engine.quantized(quantized_of(w), pointer<const float>(x), ldx, M, pointer<float>(y), ldy);
}

void pack_weight(Engine& engine, std::uintptr_t qweight, int N, int bits, std::uintptr_t places, int K, std::uintptr_t out) {
  engine.pack_weight(pointer<const std::int32_t>(qweight), N, bits, pointer<const std::int32_t>(places), K, pointer<std::uint8_t>(out));
}

void dense(Engine& engine, std::uintptr_t w, int kind, int N, int K, std::uintptr_t x, std::int64_t ldx, int M, std::uintptr_t y,
           std::int64_t ldy) {
  engine.dense(pointer<const void>(w), static_cast<Kind>(kind), N, K, pointer<const float>(x), ldx, M, pointer<float>(y), ldy);
}

// Weights of a Linear, one beside the other, with the address of the bias of each.
using Parts = std::vector<std::pair<Fields, std::uintptr_t>>;

Linear linear_of(const Parts& parts) {
  Linear linear;
  int offset = 0;
  for (const auto& [fields, bias] : parts) {
    linear.push_back({quantized_of(fields), pointer<const float>(bias), offset});
    offset += linear.back().weight.N;
  }
  return linear;
}

void add_layer(Model& model, std::uintptr_t input_norm, std::uintptr_t post_attention_norm, std::uintptr_t q_norm, std::uintptr_t k_norm,
               int window, const Parts& qkv, const Parts& o, const Parts& gate_up, const Parts& down) {
  model.add_layer({pointer<const float>(input_norm), pointer<const float>(post_attention_norm), pointer<const float>(q_norm),
                   pointer<const float>(k_norm), window, linear_of(qkv), linear_of(o), linear_of(gate_up), linear_of(down)});
}

void forward(Model& model, const std::vector<std::int32_t>& tokens, const std::vector<int>& num_computed,
             const std::vector<int>& num_tokens, std::vector<std::vector<std::int32_t>> blocks, std::uintptr_t x, std::uintptr_t tapped) {
  if (num_computed.size() != blocks.size() || num_tokens.size() != blocks.size()) throw std::invalid_argument("columns of unequal length");
  const py::gil_scoped_release without_python;
  std::vector<Span> spans;
  for (std::size_t i = 0; i < blocks.size(); i++) spans.push_back({num_computed[i], num_tokens[i], std::move(blocks[i])});
  model.forward(tokens, spans, pointer<float>(x), pointer<float>(tapped));
}

constexpr std::int64_t kLogitsWorthSharing = 1 << 16;

using Logprobs = std::pair<float, std::vector<std::pair<int, float>>>;

// `params`: RowParams of each row; `histories` and `allowed`: an address for each row, 0: none; empty: none for any.
std::pair<std::vector<int>, std::vector<std::optional<Logprobs>>> sample(Engine& engine, std::uintptr_t logits, std::int64_t ld, int V,
                                                                         std::string_view params, const std::vector<std::int64_t>& lengths,
                                                                         const std::vector<std::uintptr_t>& histories,
                                                                         const std::vector<std::uintptr_t>& allowed) {
  std::vector<SampledRow> rows(lengths.size());
  if (params.size() != rows.size() * sizeof(RowParams)) throw std::invalid_argument("parameters are not of as many rows");
  for (std::size_t i = 0; i < rows.size(); i++) {
    std::memcpy(&rows[i].params, params.data() + i * sizeof(RowParams), sizeof(RowParams));
    rows[i].logits = pointer<float>(logits) + static_cast<std::int64_t>(i) * ld;
    rows[i].length = lengths[i];
    rows[i].history = histories.empty() ? nullptr : pointer<const std::int32_t>(histories.at(i));
    rows[i].allowed = allowed.empty() ? nullptr : pointer<const std::uint32_t>(allowed.at(i));
  }
  std::pair<std::vector<int>, std::vector<std::optional<Logprobs>>> result;
  const int num = static_cast<int>(rows.size());
  std::vector<Draw> draws(rows.size());
  const SamplerWays& ways = sampler_ways(engine.name());
  const auto one_call = engine.lock();
  engine.share(num, static_cast<std::int64_t>(num) * V > kLogitsWorthSharing,
               [&](int i) { draws[static_cast<std::size_t>(i)] = sample_row(ways, rows[static_cast<std::size_t>(i)], V); });
  for (Draw& draw : draws) {
    result.first.push_back(draw.token);
    if (draw.logprobs) {
      result.second.resize(draws.size());
      result.second[result.first.size() - 1] = Logprobs{draw.logprobs->logprob, std::move(draw.logprobs->top)};
    }
  }
  return result;
}

void log_softmax_rows(Engine& engine, std::uintptr_t logits, std::int64_t ld, int M, int V) {
  const SamplerWays& ways = sampler_ways(engine.name());
  const auto one_call = engine.lock();
  engine.share(M, static_cast<std::int64_t>(M) * V > kLogitsWorthSharing,
               [&](int i) { log_softmax(ways, pointer<float>(logits) + i * ld, V); });
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  using without_python = py::call_guard<py::gil_scoped_release>;
  m.def(
      "checksum", [](std::uintptr_t data, std::size_t size) { return checksum(pointer<const std::uint8_t>(data), size); },
      without_python(), "data"_a, "size"_a);
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const Ways* ways : known()) names.emplace_back(ways->name);
    return names;
  });
  py::class_<Engine>(m, "Engine")
      .def(py::init<int, const std::string&>(), "num_threads"_a, "instruction_set"_a = "")
      .def_property_readonly("instruction_set", &Engine::name)
      .def("quantized", &quantized, without_python(), "weight"_a, "x"_a, "ldx"_a, "M"_a, "y"_a, "ldy"_a)
      .def("sample", &sample, without_python(), "logits"_a, "ld"_a, "V"_a, "params"_a, "lengths"_a, "histories"_a, "allowed"_a)
      .def("log_softmax", &log_softmax_rows, without_python(), "logits"_a, "ld"_a, "M"_a, "V"_a)
      .def("pack", &pack_weight, without_python(), "qweight"_a, "N"_a, "bits"_a, "places"_a, "K"_a, "out"_a)
      .def("dense", &dense, without_python(), "w"_a, "kind"_a, "N"_a, "K"_a, "x"_a, "ldx"_a, "M"_a, "y"_a, "ldy"_a);
  py::class_<Model>(m, "Model")
      .def(py::init([](Engine& engine, int hidden, int ffn, int heads, int kv_heads, int dim, int vocab, float eps,
                       std::uintptr_t embedding, int embedding_kind, std::uintptr_t frequencies, float rotary_scale) {
             return new Model(engine, {hidden, ffn, heads, kv_heads, dim, vocab, eps}, pointer<const void>(embedding),
                              static_cast<Kind>(embedding_kind), pointer<const float>(frequencies), rotary_scale);
           }),
           py::keep_alive<1, 2>(), "engine"_a, py::kw_only(), "hidden"_a, "ffn"_a, "heads"_a, "kv_heads"_a, "dim"_a, "vocab"_a, "eps"_a,
           "embedding"_a, "embedding_kind"_a, "frequencies"_a, "rotary_scale"_a)
      .def("add_layer", &add_layer, py::kw_only(), "input_norm"_a, "post_attention_norm"_a, "q_norm"_a, "k_norm"_a, "window"_a, "qkv"_a,
           "o"_a, "gate_up"_a, "down"_a)
      .def(
          "set_cache",
          [](Model& model, std::uintptr_t data, int kind, int num_blocks, int block_size) {
            model.set_cache(pointer<void>(data), static_cast<Kind>(kind), num_blocks, block_size);
          },
          "data"_a, "kind"_a, "num_blocks"_a, "block_size"_a)
      .def("set_taps", &Model::set_taps, "layers"_a)
      .def("forward", &forward, "tokens"_a, "num_computed"_a, "num_tokens"_a, "blocks"_a, "x"_a, "tapped"_a = 0)
      .def(
          "finish",
          [](Model& model, std::uintptr_t x, const std::vector<int>& rows, std::uintptr_t norm, std::uintptr_t y) {
            model.finish(pointer<const float>(x), rows, pointer<const float>(norm), pointer<float>(y));
          },
          without_python(), "x"_a, "rows"_a, "norm"_a, "y"_a);
}
