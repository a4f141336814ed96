// gptq_api._cpu: addresses in, an exception out. Shapes, types and alignment are checked in gptq_api/runner/cpu.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/linear.h"
#include "cpu/pack.h"
#include "cpu/pool.h"

namespace py = pybind11;
using py::literals::operator""_a;
using namespace gptq_cpu;

namespace {

std::vector<const Ways*> known() {
  std::vector<const Ways*> found;
#ifdef GPTQ_CPU_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
    found.push_back(&avx512());
#endif
#ifdef GPTQ_CPU_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) found.push_back(&avx2());
#endif
  found.push_back(&portable());
  return found;
}

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

constexpr std::int64_t kWorthSharing = 1 << 21;  // products: some 20 us

// Asks for pages of 2 MB where the system gives them only when asked: reading gets some 20 % faster. Before the memory is touched.
void huge_pages(std::uintptr_t address, std::size_t size) {
#ifdef MADV_HUGEPAGE
  constexpr std::uintptr_t page = 2 << 20;
  const std::uintptr_t first = (address + page - 1) / page * page, last = (address + size) / page * page;
  if (first < last) madvise(pointer<void>(first), last - first, MADV_HUGEPAGE);
#endif
}

// What one engine computes with: its threads, its instruction set and the memory between its calls. One call at a time.
class Engine {
 public:
  Engine(int num_threads, const std::string& wanted) : pool_(num_threads) {
    for (const Ways* ways : known())
      if (wanted.empty() || wanted == ways->name) {
        ways_ = ways;
        return;
      }
    throw std::invalid_argument("no kernels of '" + wanted + "' for this processor");
  }
  const char* name() const { return ways_->name; }

  void quantized(std::uintptr_t q, std::uintptr_t scales, std::uintptr_t zeros, std::uintptr_t order, int N, int K, int inputs, int group,
                 int bits, int kind, std::uintptr_t x, std::int64_t ldx, int M, std::uintptr_t y, std::int64_t ldy) {
    const Quantized w{pointer<const std::uint8_t>(q), pointer<const void>(scales), pointer<const std::uint8_t>(zeros),
                      pointer<const std::int32_t>(order), N, K, inputs, group, bits, static_cast<Kind>(kind)};
    const float* xs = pointer<const float>(x);
    float* ys = pointer<float>(y);
    py::gil_scoped_release without_python;
    std::lock_guard one_call(mutex_);
    const int groups = K / group, strips = (N + kStrip - 1) / kStrip;
    const std::size_t pairs = static_cast<std::size_t>(M) * groups;
    bytes_.resize(static_cast<std::size_t>(M) * K);
    scales_.resize(pairs);
    sums_.resize(pairs);
    const Rows rows{bytes_.data(), scales_.data(), sums_.data()};
    // Numbers are rounded some 4,096 at a time, and weights are read some 64 KB at a time: what takes less than a few microseconds is
    // done where it is.
    const int at_once = std::max(1, 4096 / group), per_row = (groups + at_once - 1) / at_once;
    auto round = [&](int i) {
      const int m = i / per_row, first = i % per_row * at_once;
      ways_->quantize(w, xs + m * ldx, m, first, std::min(groups, first + at_once), rows);
    };
    share(M * per_row, static_cast<std::int64_t>(M) * K > 32768, round);
    const int step = std::max(1, std::min(65536 / (K * kStrip * bits / 8), strips / (4 * pool_.size())));
    share((strips + step - 1) / step, static_cast<std::int64_t>(M) * N * K > kWorthSharing, [&](int i) {
      ways_->multiply(w, rows, M, i * step, std::min(strips, (i + 1) * step), ys, ldy);
    });
  }

  void pack_weight(std::uintptr_t qweight, int N, int bits, std::uintptr_t places, int K, std::uintptr_t out) {
    py::gil_scoped_release without_python;
    std::lock_guard one_call(mutex_);
    const int strips = (N + kStrip - 1) / kStrip;
    huge_pages(out, static_cast<std::size_t>(strips) * kStrip * K * (bits == 8 ? 8 : 4) / 8);
    pool_.run(strips, [&](int s) {
      pack(pointer<const std::int32_t>(qweight), N, bits, pointer<const std::int32_t>(places), K, pointer<std::uint8_t>(out), s, s + 1);
    });
  }

  void dense(std::uintptr_t w, int kind, int N, int K, std::uintptr_t x, std::int64_t ldx, int M, std::uintptr_t y, std::int64_t ldy) {
    py::gil_scoped_release without_python;
    std::lock_guard one_call(mutex_);
    const int width = kind == static_cast<int>(Kind::single) ? 4 : 2;
    const int step = std::max(4, std::min(65536 / (K * width), N / (4 * pool_.size())) / 4 * 4);
    share((N + step - 1) / step, static_cast<std::int64_t>(M) * N * K > kWorthSharing / 4, [&](int i) {
      ways_->dense(pointer<const void>(w), static_cast<Kind>(kind), K, pointer<const float>(x), ldx, M, i * step,
                   std::min(N, (i + 1) * step), pointer<float>(y), ldy);
    });
  }

 private:
  template <typename Task>
  void share(int n, bool worth_it, Task&& task) {
    if (worth_it) return pool_.run(n, task);
    for (int i = 0; i < n; i++) task(i);
  }

  std::mutex mutex_;
  Pool pool_;
  const Ways* ways_ = nullptr;
  std::vector<std::int8_t> bytes_;
  std::vector<float> scales_;
  std::vector<std::int32_t> sums_;
};

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const Ways* ways : known()) names.emplace_back(ways->name);
    return py::cast(names);
  });
  py::class_<Engine>(m, "Engine")
      .def(py::init<int, const std::string&>(), "num_threads"_a, "instruction_set"_a = "")
      .def_property_readonly("instruction_set", &Engine::name)
      .def("quantized", &Engine::quantized, "q"_a, "scales"_a, "zeros"_a, "order"_a, "N"_a, "K"_a, "inputs"_a, "group"_a, "bits"_a,
           "kind"_a, "x"_a, "ldx"_a, "M"_a, "y"_a, "ldy"_a)
      .def("pack", &Engine::pack_weight, "qweight"_a, "N"_a, "bits"_a, "places"_a, "K"_a, "out"_a)
      .def("dense", &Engine::dense, "w"_a, "kind"_a, "N"_a, "K"_a, "x"_a, "ldx"_a, "M"_a, "y"_a, "ldy"_a);
}
