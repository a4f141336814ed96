// Bias, penalties, forbidden stop tokens and masks: a block per row and per slice of the vocabulary counts the history in shared memory.
#include "sampler/sampler_row.cuh"

namespace gptq {
namespace {

constexpr int kAdjustThreads = 256, kSlice = 4096;
constexpr uint32_t kSeen = 1u << 30, kForbidden = 1u << 31, kCount = kSeen - 1;

__global__ void __launch_bounds__(kAdjustThreads)
    adjust_kernel(const SamplerRows a, const SamplerHistory history, const int* entries, const int* masks, float* out, long long ldo) {
  __shared__ uint32_t state[kSlice];  // occurrences in the output, and flags
  __shared__ float bias[kSlice];
  grid_launch_dependents();
  grid_wait();
  const int r = blockIdx.y, first = blockIdx.x * kSlice, size = min(kSlice, a.V - first), seat = field(a, r, kSeat);
  const float* x = a.logits + r * a.ldl + first;
  float* y = out + r * ldo + first;
  const float repetition = float_field(a, r, kRepetitionPenalty), presence = float_field(a, r, kPresencePenalty),
              frequency = float_field(a, r, kFrequencyPenalty);
  const int entry = entries ? entries[r] : 0, entry_end = entries ? entries[r + 1] : 0;
  const bool penalised = repetition != 1.f || presence != 0.f || frequency != 0.f;
  const int mask = masks ? masks[r] : -1;
  const int* allowed = masks + a.S + static_cast<long long>(max(mask, 0)) * ((a.V + 31) / 32) + first / 32;
  if (seat < 0 || (!penalised && entry == entry_end && mask < 0)) {
    if (x != y)
      for (int i = threadIdx.x; i < size; i += kAdjustThreads) y[i] = x[i];
    return;
  }
  for (int i = threadIdx.x; i < size; i += kAdjustThreads) state[i] = 0, bias[i] = 0.f;
  __syncthreads();
  const int prompt = field(a, r, kNumPromptTokens), length = min(field(a, r, kLength), history.capacity);
  if (penalised)
    for (int p = threadIdx.x; p < length; p += kAdjustThreads) {
      const int i = history.tokens[seat * history.ld + p] - first;
      if (i < 0 || i >= size) continue;
      atomicOr(&state[i], kSeen);
      if (p >= prompt) atomicAdd(&state[i], 1u);
    }
  for (int e = entry + threadIdx.x; e < entry_end; e += kAdjustThreads) {
    const int i = entries[a.S + 1 + 2 * e] - first;
    if (i < 0 || i >= size) continue;
    const float value = __int_as_float(entries[a.S + 2 + 2 * e]);
    if (value == -INFINITY) atomicOr(&state[i], kForbidden);
    else bias[i] = value;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < size; i += kAdjustThreads) {
    const uint32_t s = state[i];
    const float add = bias[i];
    const bool forbidden = s & kForbidden || (mask >= 0 && !(allowed[i / 32] >> i % 32 & 1));
    if (x == y && !s && add == 0.f && !forbidden) continue;
    float v = x[i];
    if (add != 0.f) v = __fadd_rn(v, add);
    if (s & kSeen && repetition != 1.f) v = v > 0.f ? __fdiv_rn(v, repetition) : __fmul_rn(v, repetition);
    if (s & kCount) v = __fsub_rn(v, __fadd_rn(presence, __fmul_rn(frequency, static_cast<float>(s & kCount))));
    // The lowest number instead of -inf, and not over what is not finite: the row has to be recognised as such.
    if (forbidden && fabsf(v) <= FLT_MAX) v = -FLT_MAX;
    y[i] = v;
  }
}

}  // namespace

cudaError_t launch_sample_adjust(const SamplerRows& rows, const SamplerHistory& history, const int* entries, const int* masks, float* out,
                                 long long ldo, cudaStream_t stream) {
  return launch_overlapped(adjust_kernel, dim3((rows.V + kSlice - 1) / kSlice, rows.S), kAdjustThreads, 1, stream, rows, history, entries,
                           masks, out, ldo);
}

}  // namespace gptq
