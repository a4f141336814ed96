// From logits to tokens on the CPU. The order of steps, the ranks and the random numbers are those of ext/sampler and of
// gptq_api/runner/cpu/sampler.py; which sums are made of what is below. A row's result depends on the row alone.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace gptq_cpu {

// What a sequence asks for, as gptq_api/runner/cpu/native_sampler.py packs it.
struct RowParams {
  std::uint64_t seed;
  float inverse_temperature;  // 0: greedy
  float top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
  std::int32_t top_k;         // 0: off
  std::int32_t top_logprobs;  // -1: none
  std::int32_t num_prompt_tokens;
  std::int32_t num_bias, num_stops;
  std::int32_t may_stop_from;  // stop tokens are forbidden where fewer tokens than this stand before the row's
  const std::int32_t* bias_ids;
  const float* bias;
  const std::int32_t* stops;
};
static_assert(sizeof(RowParams) == 80);

struct SampledRow {
  RowParams params;
  float* logits;  // [V], overwritten
  std::int64_t length;            // tokens that stand before the one to draw
  const std::int32_t* history;    // those tokens, where there are penalties; null: none
  const std::uint32_t* allowed;   // bit i % 32 of word i / 32: whether token i may be drawn; null: all
};

struct RowLogprobs {
  float logprob;  // of the token
  std::vector<std::pair<int, float>> top;
};

struct Draw {
  int token;  // -1: the row is not finite
  std::optional<RowLogprobs> logprobs;
};

// ---- what each instruction set does its own way; all of them make the same bits --------------------------------------------------------

constexpr int kBlock = 64;  // logits that are looked at together
constexpr int kBins = 2048;
constexpr float kBinScale = kBins / 32.0f;

// A row in blocks; the last one, where it is partial, is a copy that goes on with -inf.
struct RowView {
  const float* x;
  const float* tail;
  int num_blocks, num_whole;

  const float* block(int i) const { return i < num_whole ? x + static_cast<std::int64_t>(i) * kBlock : tail; }
};

// exp((x - best) / temperature), a float, is a token's share; shares of less than min_p count for nothing. As a weight it is an integer,
// share * 2^40 rounded down, so that sums have no order.
struct Scale {
  float best, inverse_temperature, min_p;
};

struct Total {
  std::uint64_t mass = 0, count = 0;  // of weights above 0

  void operator+=(const Total& other) { mass += other.mass, count += other.count; }
  void operator-=(const Total& other) { mass -= other.mass, count -= other.count; }
};

// Every token's share divided by an exponential random number of its own, and the largest quotient wins.
struct Race {
  Scale scale;
  std::uint32_t key0, key1;
  float value;  // what may win: above `value`, or equal with an id of at most `id`
  int id;
  double score;  // of the leader
  int leader;

  // Exact, for those few that may beat the leader.
  void enter(float x, int id);
};

struct SamplerWays {
  // The largest of every block, num_whole of them. False where one of the row's numbers is none or infinite.
  bool (*survey)(const RowView& row, float* largest);
  // The elements above `low` and up to `high`.
  Total (*measure)(const RowView& row, const float* largest, const Scale& scale, float low, float high);
  // Adds every weight, or 1 for every one, to the bin of its (best - x) / temperature, kBinScale bins for each unit.
  void (*histogram)(const RowView& row, const float* largest, const Scale& scale, bool by_count, std::uint64_t* bins);
  // Calls `take` with each of them in the order of ids, as long as it says true.
  void (*list)(const RowView& row, const float* largest, float low, float high, bool (*take)(void* context, float x, int id),
               void* context);
  void (*race)(const RowView& row, const float* largest, Race& race);
};

const SamplerWays& sampler_portable();
#ifdef GPTQ_CPU_AVX2
const SamplerWays& sampler_avx2();
#endif
#ifdef GPTQ_CPU_AVX512
const SamplerWays& sampler_avx512();
#endif

// Those that go with an Engine's instruction set.
const SamplerWays& sampler_ways(const std::string& instruction_set);

Draw sample_row(const SamplerWays& ways, const SampledRow& row, int V);
// Logits [V] become logprobs, those that sample_row tells; NaN where one of them is none or infinite.
void log_softmax(const SamplerWays& ways, float* logits, int V);

}  // namespace gptq_cpu
