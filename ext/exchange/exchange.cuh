// What the kernels of an exchange have in common: words that carry their round, and the wait for a peer.
#pragma once
#include "exchange/exchange.h"

namespace gptq {
namespace {

constexpr int kLooks = 256;  // between two looks at the clock

__device__ __forceinline__ void push(uint64_t* at, uint64_t word) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(at), "l"(word) : "memory");
}
__device__ __forceinline__ uint64_t look(const uint64_t* at) {
  uint64_t word;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(word) : "l"(at) : "memory");
  return word;
}
__device__ __forceinline__ void release(uint32_t* at, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}
__device__ __forceinline__ uint32_t acquire(const uint32_t* at) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
// Two words side by side, each of them whole when it is seen.
__device__ __forceinline__ void push2(uint64_t* at, uint64_t first, uint64_t second) {
  asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(at), "l"(first), "l"(second) : "memory");
}
__device__ __forceinline__ ulonglong2 look2(const uint64_t* at) {
  ulonglong2 words;
  asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(words.x), "=l"(words.y) : "l"(at) : "memory");
  return words;
}
__device__ __forceinline__ uint64_t now_ns() {
  uint64_t ns;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
  return ns;
}

// Until it is there. A rank that does not come ends the kernel, and with it everything on this device: the host says why.
template <typename Arrived>
__device__ __forceinline__ void wait_for(const ExchangeArgs& a, int peer, Arrived&& arrived) {
  if (arrived()) return;
  const uint64_t begun = now_ns();
  for (int looks = 1; !arrived(); looks++) {
    if (looks % kLooks || now_ns() - begun < a.limit_ns) continue;
    *reinterpret_cast<volatile uint32_t*>(a.stuck) = peer + 1;
    __threadfence_system();
    asm volatile("trap;");
  }
}

// What a kernel finds when it begins.
struct Round {
  uint32_t number;
  bool live;
  __device__ __forceinline__ explicit Round(const ExchangeState& state)
      : number(*reinterpret_cast<const volatile uint32_t*>(&state.round) + 1),
        live(*reinterpret_cast<const volatile uint32_t*>(&state.live)) {}
};

// Whether this block is the last of its kernel to come here. One thread of each block asks, once.
__device__ __forceinline__ bool is_last(ExchangeState& state) {
  if (atomicAdd(&state.ticket, 1) != gridDim.x - 1) return false;
  state.ticket = 0;
  return true;
}

// When every thread of the block has read the round: whoever is last begins the next one, whose kernel waits for this one to end.
__device__ __forceinline__ void pass_round(ExchangeState& state, const Round& round) {
  __syncthreads();
  if (threadIdx.x == 0 && is_last(state) && round.live) state.round = round.number;
}

}  // namespace
}  // namespace gptq
