#include "cpu/pool.h"

#include <chrono>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
static inline void relax() { _mm_pause(); }
#elif defined(__aarch64__)
static inline void relax() { asm volatile("yield"); }
#else
static inline void relax() {}
#endif

namespace gptq_cpu {
namespace {
// A step is many short calls: a worker looks out for the next one for this long before it sleeps.
constexpr auto kAwake = std::chrono::microseconds(60);
constexpr int kLooks = 64;  // between two looks at the clock
// A piece takes some 10 us, so whoever waits longer than this for one waits for a processor.
constexpr auto kLate = std::chrono::microseconds(500);
constexpr int kLeastAlone = 16, kMostAlone = 4096;
}  // namespace

Pool::Pool(int num_threads) {
  for (int i = 1; i < num_threads; i++) workers_.emplace_back([this] { work(0); });
}

Pool::~Pool() {
  ends_.store(true);
  epoch_.fetch_add(1);
  epoch_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Pool::share(int n) {
  const std::uint32_t epoch = epoch_.load(std::memory_order_relaxed) + 1;
  left_.store(n, std::memory_order_relaxed);
  next_.store(static_cast<std::uint64_t>(epoch) << 32 | static_cast<std::uint32_t>(n), std::memory_order_release);
  epoch_.store(epoch, std::memory_order_seq_cst);
  if (asleep_.load(std::memory_order_seq_cst)) epoch_.notify_all();
  take(epoch);
  if (left_.load(std::memory_order_acquire) == 0) return;
  const auto begun = std::chrono::steady_clock::now();
  for (int looks = 0; left_.load(std::memory_order_acquire) > 0; looks++) {
    if (looks < 4096)
      relax();
    else
      std::this_thread::yield();
  }
  if (std::chrono::steady_clock::now() - begun > kLate) {
    patience_ = patience_ == 0 ? kLeastAlone : patience_ < kMostAlone ? patience_ * 2 : kMostAlone;
    calls_alone_ = patience_;
  } else if (patience_ > 0) {
    patience_--;
  }
}

bool Pool::busy() {
  if (calls_alone_ == 0) return false;
  calls_alone_--;
  return true;
}

// The count of a call's pieces that nobody has taken yet lies beside its epoch, so that a thread that comes late takes none of the next.
void Pool::take(std::uint32_t epoch) {
  std::uint64_t seen = next_.load(std::memory_order_acquire);
  while (static_cast<std::uint32_t>(seen >> 32) == epoch && static_cast<std::uint32_t>(seen) != 0) {
    if (!next_.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
    call_(context_, static_cast<int>(static_cast<std::uint32_t>(seen)) - 1);
    left_.fetch_sub(1, std::memory_order_release);
    seen = next_.load(std::memory_order_acquire);
  }
}

void Pool::work(std::uint32_t seen) {
  while (true) {
    auto until = std::chrono::steady_clock::now() + kAwake;
    std::uint32_t epoch;
    for (int looks = 0; (epoch = epoch_.load(std::memory_order_acquire)) == seen; looks++) {
      relax();
      if (looks % kLooks == kLooks - 1 && std::chrono::steady_clock::now() > until) {
        asleep_.fetch_add(1, std::memory_order_seq_cst);
        epoch_.wait(seen, std::memory_order_seq_cst);
        asleep_.fetch_sub(1, std::memory_order_relaxed);
      }
    }
    if (ends_.load()) return;
    seen = epoch;
    take(epoch);
  }
}

}  // namespace gptq_cpu
