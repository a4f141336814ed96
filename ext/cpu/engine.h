// What one engine computes with: its threads, its instruction set and the memory between its calls.
#pragma once
#include <algorithm>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "cpu/linear.h"
#include "cpu/pool.h"

namespace gptq_cpu {

// The ways of this processor, the fastest one first.
std::vector<const Ways*> known();

// The rows of one product, as it takes them.
struct Operand {
  std::vector<std::int8_t> bytes;
  std::vector<float> scales;
  std::vector<std::int32_t> sums;
  std::vector<float> places;

  // Room for M rows.
  Rows make(const Quantized& w, int M);
};

// One call at a time: a second one waits for the first.
class Engine {
 public:
  // `wanted`: the name of an instruction set; empty: the best. std::invalid_argument for one that this processor has not.
  Engine(int num_threads, const std::string& wanted);
  Engine(int num_threads, const Ways& ways) : pool_(num_threads), ways_(&ways) {}
  const char* name() const { return ways_->name; }
  int num_threads() const { return pool_.size(); }

  // y[m, n] = the sum of x[m, k] w[k, n], x rounded to int8 group by group or (`exact`) as it is. x [M, inputs] and
  // y [M, N] float32, rows ldx and ldy apart.
  void quantized(const Quantized& w, const float* x, std::int64_t ldx, int M, float* y, std::int64_t ldy);
  // y[m, n] = the sum of x[m, k] w[n, k] for N outputs.
  void dense(const void* w, Kind kind, int N, int K, const float* x, std::int64_t ldx, int M, float* y, std::int64_t ldy);
  // pack.h.
  void pack_weight(const std::int32_t* qweight, int N, int bits, const std::int32_t* places, int K, std::uint8_t* out);

  // For a caller that holds the engine for many products.
  std::unique_lock<std::mutex> lock() { return std::unique_lock(mutex_); }
  const Ways& ways() const { return *ways_; }
  // Groups [first, last) of one row of x, into row m of what `multiply` takes.
  void prepare(const Quantized& w, const float* x, int m, int first, int last, const Rows& rows) const;
  void multiply(const Quantized& w, const Rows& rows, int M, float* y, std::int64_t ldy);
  // task(i) for every i < n, by several threads where that is worth it.
  template <typename Task>
  void share(int n, bool worth_it, Task&& task) {
    if (worth_it) return pool_.run(n, task);
    for (int i = 0; i < n; i++) task(i);
  }

 private:
  // The outputs of a weight in pieces: task(first strip, the one behind the last).
  template <typename Task>
  void share_strips(const Quantized& w, int M, Task&& task) {
    const int strips = (w.N + kStrip - 1) / kStrip, most = strips / (4 * pool_.size());
    const int step = std::max({1, std::min(kSideBySide, most), std::min(65536 / (w.K * kStrip * w.bits / 8), most)});
    share((strips + step - 1) / step, static_cast<std::int64_t>(M) * w.N * w.K > kWorthSharing,
          [&](int i) { task(i * step, std::min(strips, (i + 1) * step)); });
  }

  static constexpr std::int64_t kWorthSharing = 1 << 21;  // products: some 20 us

  std::mutex mutex_;
  Pool pool_;
  const Ways* ways_ = nullptr;
  Operand operand_;
};

}  // namespace gptq_cpu
