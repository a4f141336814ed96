// Threads that share the work of one call after another and sleep in between.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <vector>

namespace gptq_cpu {

class Pool {
 public:
  explicit Pool(int num_threads);
  ~Pool();
  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // task(i) for every i < n, once, on whichever thread is free; returns when all are done. One caller at a time. A thread that the
  // system takes away holds up its own piece alone, so pieces are small and more than threads. Where that happens, because others want
  // the processors, the caller goes on alone for some calls: half the speed, and not the hundredth of it.
  template <typename Task>
  void run(int n, Task&& task) {
    if (n <= 0) return;
    if (workers_.empty() || n == 1 || busy()) {
      for (int i = 0; i < n; i++) task(i);
      return;
    }
    call_ = [](void* context, int i) { (*static_cast<std::remove_reference_t<Task>*>(context))(i); };
    context_ = &task;
    share(n);
  }

 private:
  void share(int n);
  bool busy();
  void work(std::uint32_t seen);
  void take(std::uint32_t epoch);

  std::vector<std::thread> workers_;
  void (*call_)(void*, int) = nullptr;
  void* context_ = nullptr;
  int calls_alone_ = 0, patience_ = 0;  // calls that the caller still does alone, and how many it did the last time
  alignas(64) std::atomic<std::uint64_t> next_{0};   // epoch in the upper half, the next piece in the lower
  alignas(64) std::atomic<int> left_{0};             // pieces that are not done
  alignas(64) std::atomic<std::uint32_t> epoch_{0};  // what workers wait for
  std::atomic<int> asleep_{0};
  std::atomic<bool> ends_{false};
};

}  // namespace gptq_cpu
