// gptq_api._cpu: addresses in, an exception out. Shapes, types and alignment are checked in gptq_api/runner/cpu.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/engine.h"

namespace py = pybind11;
using py::literals::operator""_a;
using namespace gptq_cpu;

namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void quantized(Engine& engine, std::uintptr_t q, std::uintptr_t scales, std::uintptr_t zeros, std::uintptr_t order, int N, int K,
               int inputs, int group, int bits, int kind, std::uintptr_t x, std::int64_t ldx, int M, std::uintptr_t y, std::int64_t ldy) {
  const Quantized w{pointer<const std::uint8_t>(q), pointer<const void>(scales), pointer<const std::uint8_t>(zeros),
                    pointer<const std::int32_t>(order), N, K, inputs, group, bits, static_cast<Kind>(kind)};
  engine.quantized(w, pointer<const float>(x), ldx, M, pointer<float>(y), ldy);
}

void pack_weight(Engine& engine, std::uintptr_t qweight, int N, int bits, std::uintptr_t places, int K, std::uintptr_t out) {
  engine.pack_weight(pointer<const std::int32_t>(qweight), N, bits, pointer<const std::int32_t>(places), K, pointer<std::uint8_t>(out));
}

void dense(Engine& engine, std::uintptr_t w, int kind, int N, int K, std::uintptr_t x, std::int64_t ldx, int M, std::uintptr_t y,
           std::int64_t ldy) {
  engine.dense(pointer<const void>(w), static_cast<Kind>(kind), N, K, pointer<const float>(x), ldx, M, pointer<float>(y), ldy);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  using without_python = py::call_guard<py::gil_scoped_release>;
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const Ways* ways : known()) names.emplace_back(ways->name);
    return names;
  });
  py::class_<Engine>(m, "Engine")
      .def(py::init<int, const std::string&>(), "num_threads"_a, "instruction_set"_a = "")
      .def_property_readonly("instruction_set", &Engine::name)
      .def("quantized", &quantized, without_python(), "q"_a, "scales"_a, "zeros"_a, "order"_a, "N"_a, "K"_a, "inputs"_a, "group"_a,
           "bits"_a, "kind"_a, "x"_a, "ldx"_a, "M"_a, "y"_a, "ldy"_a)
      .def("pack", &pack_weight, without_python(), "qweight"_a, "N"_a, "bits"_a, "places"_a, "K"_a, "out"_a)
      .def("dense", &dense, without_python(), "w"_a, "kind"_a, "N"_a, "K"_a, "x"_a, "ldx"_a, "M"_a, "y"_a, "ldy"_a);
}
