// From logits to tokens. The order of steps and the arithmetic are those of gptq_api/runner/cpu/sampler.py.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace gptq {

struct SamplerRows {
  const float* logits;  // [S, V], row stride ldl elements
  int S, V;
  long long ldl;
  const int* fields;  // [SamplerField], row stride ldf: column i belongs to row i
  long long ldf;
};

// The words of a row, in the order of gptq_api/kernels/sampling.py; from kInverseTemperature on they are floats.
enum SamplerField : int {
  kSeat,  // -1: padding
  kLength,
  kNumPromptTokens,
  kSeedLow,
  kSeedHigh,
  kTopK,
  kTopLogprobs,  // -1: none
  kInverseTemperature,  // 0: greedy
  kTopP,
  kMinP,
  kRepetitionPenalty,
  kPresencePenalty,
  kFrequencyPenalty,
};

struct SamplerHistory {
  int* tokens;  // [seats, capacity], row stride ld
  long long ld;
  int capacity;
};

constexpr int kMaxTopLogprobs = 20;

cudaError_t launch_sample(const SamplerRows& rows, const SamplerHistory& history, int* tokens, cudaStream_t stream);

// entries: S + 1 starts, then (token, float bits) pairs; null: none. masks: for each row which of the masks behind these S words is its
// own, -1: none, then masks of ceil(V / 32) words, bit i % 32 of word i / 32 set where token i may be sampled; null: none.
// out may be the logits themselves.
cudaError_t launch_sample_adjust(const SamplerRows& rows, const SamplerHistory& history, const int* entries, const int* masks, float* out,
                                 long long ldo, cudaStream_t stream);

// out [S, 2, 1 + kMaxTopLogprobs]: ids, then float bits.
cudaError_t launch_sample_logprobs(const SamplerRows& rows, const int* tokens, int* out, cudaStream_t stream);

}  // namespace gptq
