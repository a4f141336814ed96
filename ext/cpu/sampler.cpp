#include "cpu/sampler.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <type_traits>

#include "cpu/sampler_share.h"

namespace gptq_cpu {
namespace {

constexpr float kForbidden = -FLT_MAX;  // a forbidden token's logit: not -inf, which would be a broken row
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::uint64_t kMostSorted = 128;  // elements, around a cut

struct Keys {
  std::uint32_t key0, key1;
};

// 64 bits of Philox4x32-10: key = seed, counter = position (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
Keys random_bits(std::uint64_t seed, std::uint32_t position) {
  std::uint32_t key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
  std::uint32_t c0 = position, c1 = 0, c2 = 0, c3 = 0;
  for (int round = 0; round < 10; round++) {
    const std::uint64_t p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
    const std::uint32_t old1 = c1, old3 = c3;
    c0 = static_cast<std::uint32_t>(p1 >> 32) ^ old1 ^ key0, c1 = static_cast<std::uint32_t>(p1);
    c2 = static_cast<std::uint32_t>(p0 >> 32) ^ old3 ^ key1, c3 = static_cast<std::uint32_t>(p0);
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
  return {c0, c1};
}

float share(float x, const Scale& scale) { return share_of<1>(Vector<float, 1>{(x - scale.best) * scale.inverse_temperature})[0]; }

std::uint64_t weight(float x, const Scale& scale) {
  const float e = share(x, scale);
  return e < scale.min_p ? 0 : static_cast<std::uint64_t>(e * 0x1p40f);
}

bool finite(float x) { return std::fabs(x) <= FLT_MAX; }

// ---- bias, penalties, forbidden tokens -------------------------------------------------------------------------------------------------

bool penalizes(const RowParams& p) { return p.repetition_penalty != 1.0f || p.presence_penalty != 0.0f || p.frequency_penalty != 0.0f; }

bool adjusts(const SampledRow& row) {
  return row.params.num_bias > 0 || row.allowed != nullptr || row.length < row.params.may_stop_from ||
         (row.history != nullptr && penalizes(row.params));
}

// Never over a number that is none or infinite: the row has to be recognised as broken.
void forbid(float& x) {
  if (finite(x)) x = kForbidden;
}

void penalize(const SampledRow& row, int V) {
  thread_local std::vector<std::uint32_t> seen;  // of each token: 0, or 1 + how often the output has it
  if (static_cast<int>(seen.size()) < V) seen.resize(static_cast<std::size_t>(V));
  const RowParams& p = row.params;
  const auto each = [&](std::int64_t first, auto&& f) {
    for (std::int64_t i = first; i < row.length; i++)
      if (row.history[i] >= 0 && row.history[i] < V) f(row.history[i]);
  };
  each(0, [&](int id) { seen[id] = 1; });
  each(p.num_prompt_tokens, [&](int id) { seen[id]++; });
  each(0, [&](int id) {
    const std::uint32_t state = seen[id];
    if (state == 0) return;
    seen[id] = 0;
    float& x = row.logits[id];
    if (p.repetition_penalty != 1.0f) x = x > 0.0f ? x / p.repetition_penalty : x * p.repetition_penalty;
    if (state > 1) x -= p.presence_penalty + p.frequency_penalty * static_cast<float>(state - 1);
  });
}

void adjust(const SampledRow& row, int V) {
  const RowParams& p = row.params;
  float* x = row.logits;
  const auto known = [&](int id) { return id >= 0 && id < V; };
  for (int i = 0; i < p.num_bias; i++)
    if (known(p.bias_ids[i])) x[p.bias_ids[i]] += p.bias[i];
  if (row.history != nullptr && penalizes(p)) penalize(row, V);
  if (row.length < p.may_stop_from)
    for (int i = 0; i < p.num_stops; i++)
      if (known(p.stops[i])) forbid(x[p.stops[i]]);
  if (row.allowed == nullptr) return;
  for (int i = 0; i < V; i += 32) {
    const std::uint32_t word = row.allowed[i / 32];
    if (word == ~0u) continue;
    for (int k = i; k < std::min(i + 32, V); k++)
      if (!(word >> (k - i) & 1)) forbid(x[k]);
  }
}

// ---- a row ------------------------------------------------------------------------------------------------------------------------------

class Row {
 public:
  Row(const SamplerWays& ways, const float* x, int V) : ways_(ways), V_(V) {
    const int whole = V / kBlock, rest = V % kBlock;
    view_ = {x, tail_, whole + (rest > 0), whole};
    thread_local std::vector<float> scratch;
    scratch.resize(static_cast<std::size_t>(view_.num_blocks) * 2);
    largest_ = scratch.data(), sorted_ = largest_ + view_.num_blocks;
    finite_ = ways.survey(view_, largest_);
    if (rest > 0) {
      std::fill(std::copy_n(x + V - rest, rest, tail_), tail_ + kBlock, -kInfinity);
      finite_ = finite_ && std::all_of(tail_, tail_ + rest, finite);
      largest_[whole] = *std::max_element(tail_, tail_ + rest);
    }
    if (!finite_) return;
    best_block_ = static_cast<int>(std::max_element(largest_, largest_ + view_.num_blocks) - largest_);
    best_ = largest_[best_block_];
  }
  Row(const Row&) = delete;

  bool is_finite() const { return finite_; }
  float best() const { return best_; }
  // Of equal ones the lowest id.
  int best_id() const {
    const float* x = view_.block(best_block_);
    return best_block_ * kBlock + static_cast<int>(std::find(x, x + kBlock, best_) - x);
  }

  Total measure(const Scale& scale, float low = -kInfinity, float high = kInfinity) const {
    return ways_.measure(view_, largest_, scale, low, high);
  }
  int draw(const RowParams& params, std::int64_t length);
  std::vector<std::pair<int, float>> top(int num);

 private:
  struct Found {
    float x;
    int id;
    std::uint64_t weight;
  };
  struct Cut {
    float value = -kInfinity;
    int id = 0;
    std::uint64_t mass = 0;  // of what is kept
  };

  // Just below a number that about `num` elements reach, at least so many where there are so many blocks.
  float reached_by(std::uint64_t num) {
    std::copy_n(largest_, view_.num_blocks, sorted_);
    const std::uint64_t last = std::min<std::uint64_t>(num, static_cast<std::uint64_t>(view_.num_blocks)) - 1;
    std::nth_element(sorted_, sorted_ + last, sorted_ + view_.num_blocks, std::greater<>());
    return std::nextafter(sorted_[last], -kInfinity);
  }
  // Below all that weigh something.
  float weightless(const Scale& scale) const {
    const float least = scale.min_p > 0 ? std::min(30.0f, 0.01f - std::log(scale.min_p)) : 30.0f;
    return std::nextafter(std::max(best_ - least / scale.inverse_temperature, -FLT_MAX), -kInfinity);
  }
  template <typename Take>
  void list(float low, float high, Take&& take) const {
    const auto call = [](void* context, float x, int id) { return (*static_cast<std::remove_reference_t<Take>*>(context))(x, id); };
    ways_.list(view_, largest_, low, high, call, &take);
  }
  Cut cut(const Scale& scale, bool by_count, std::uint64_t need, const Total& all);
  std::pair<float, float> bracket(const Scale& scale, bool by_count, std::uint64_t need) const;
  Cut cut_within(const Scale& scale, bool by_count, std::uint64_t need, float low, float high, Total before, bool is_few) const;

  const SamplerWays& ways_;
  RowView view_{};
  const int V_;
  alignas(64) float tail_[kBlock];
  float *largest_, *sorted_;
  bool finite_;
  float best_ = 0;
  int best_block_ = 0;
};

// Where the ranking, by logit and then by id, reaches `need` tokens or so much mass; `all` that weigh something, count 0: not known. Where
// fewer tokens weigh anything, all of them.
Row::Cut Row::cut(const Scale& scale, bool by_count, std::uint64_t need, const Total& all) {
  const auto amount = [&](const Total& total) { return by_count ? total.count : total.mass; };
  // Elements above `high` are kept and do not suffice; those above `low` do, once `suffices` says so.
  float high = best_, low = weightless(scale);
  Total before, inside = all;
  bool suffices = all.count > 0;
  const auto split = [&](float middle) {
    if (!(middle > low && middle < high)) return;
    const Total part = measure(scale, middle, high);
    if (amount(before) + amount(part) >= need) {
      low = middle, inside = part, suffices = true;
    } else {
      high = middle, before += part, inside -= part;
    }
  };
  // Most rows are cut near their best.
  if (!suffices || inside.count > kMostSorted) split(reached_by(by_count ? need : 64));
  if (!suffices) {
    inside = measure(scale, low, high);
    if (amount(before) + amount(inside) <= need) return {low, V_, before.mass + inside.mass};
  }
  if (inside.count > kMostSorted) {
    const auto [upper, lower] = bracket(scale, by_count, need);
    split(upper);
    split(lower);
  }
  while (inside.count > kMostSorted) {
    const float middle = high * 0.5f + low * 0.5f;
    if (!(middle > low && middle < high)) break;
    split(middle);
  }
  return cut_within(scale, by_count, need, low, high, before, inside.count <= kMostSorted);
}

// Two numbers between which, most likely, the ranking reaches what is needed.
std::pair<float, float> Row::bracket(const Scale& scale, bool by_count, std::uint64_t need) const {
  std::uint64_t bins[kBins] = {};
  ways_.histogram(view_, largest_, scale, by_count, bins);
  int bin = 0;
  for (std::uint64_t before = 0; bin < kBins - 1 && before + bins[bin] < need; bin++) before += bins[bin];
  const auto edge = [&](float at) { return best_ - at / (kBinScale * scale.inverse_temperature); };
  return {edge(static_cast<float>(bin) - 0.01f), edge(static_cast<float>(bin) + 1.01f)};
}

// Of the elements above `low` and up to `high`; where they are many they are equal.
Row::Cut Row::cut_within(const Scale& scale, bool by_count, std::uint64_t need, float low, float high, Total before, bool is_few) const {
  Found found[kMostSorted];
  int num = 0;
  Cut result;
  const auto reaches = [&](const Found& element) {
    before.count++, before.mass += element.weight;
    result = {element.x, element.id, before.mass};
    return (by_count ? before.count : before.mass) >= need;
  };
  list(low, high, [&](float x, int id) {
    const Found element{x, id, weight(x, scale)};
    if (element.weight == 0) return true;
    if (!is_few) return !reaches(element);
    found[num++] = element;
    return true;
  });
  std::sort(found, found + num, [](const Found& a, const Found& b) { return a.x > b.x || (a.x == b.x && a.id < b.id); });
  for (int i = 0; i < num; i++)
    if (reaches(found[i])) break;
  return result;
}

int Row::draw(const RowParams& p, std::int64_t length) {
  const Scale scale{best_, p.inverse_temperature, p.min_p};
  Cut kept{weightless(scale), V_, 0};
  Total all;
  if (p.top_k > 0) kept = cut(scale, true, static_cast<std::uint64_t>(p.top_k), all);
  if (p.top_p < 1.0f) {
    if (p.top_k <= 0) all = measure(scale);
    // Of what top_k left, so this cut is never below the other.
    const double need = std::ceil(static_cast<double>(p.top_p) * static_cast<double>(p.top_k > 0 ? kept.mass : all.mass));
    kept = cut(scale, false, std::max<std::uint64_t>(1, static_cast<std::uint64_t>(need)), all);
  }
  const Keys keys = random_bits(p.seed, static_cast<std::uint32_t>(length));
  const int first = best_id();
  Race race{scale, keys.key0, keys.key1, kept.value, kept.id, 0.0, first};
  race.enter(best_, first);
  ways_.race(view_, largest_, race);
  return race.leader;
}

// The `num` largest, of equal ones the lowest id first.
std::vector<std::pair<int, float>> Row::top(int num) {
  std::vector<std::pair<int, float>> found;
  if (num <= 0) return found;
  found.reserve(static_cast<std::size_t>(num));
  const float least = num <= view_.num_blocks ? reached_by(static_cast<std::uint64_t>(num)) : -kInfinity;
  list(least, kInfinity, [&](float x, int id) {
    if (static_cast<int>(found.size()) == num) {
      if (!(x > found.back().second)) return true;
      found.pop_back();
    }
    auto place = found.end();
    while (place != found.begin() && (place - 1)->second < x) place--;
    found.insert(place, {id, x});
    return true;
  });
  return found;
}

// Of a logit of that row.
struct Logprob {
  double best, log_sum;

  explicit Logprob(const Row& row)
      : best(row.best()), log_sum(std::log(static_cast<double>(row.measure({row.best(), 1.0f, 0.0f}).mass) * 0x1p-40)) {}
  float operator()(float x) const { return static_cast<float>((static_cast<double>(x) - best) - log_sum); }
};

}  // namespace

void Race::enter(float x, int id) {
  if (!(x > value || (x == value && id <= this->id))) return;
  const float e = share(x, scale);
  if (e < scale.min_p || e < 0x1p-40f) return;  // below, no number makes it win
  const std::uint32_t word = random_word(static_cast<std::uint32_t>(id) * kIdStep + key0, key1);
  const double exponential = -std::log1p(-(word * 0x1p-32 + 0x1p-33));
  const double quotient = e / exponential;
  if (quotient > score || (quotient == score && id < leader)) score = quotient, leader = id;
}

const SamplerWays& sampler_ways(const std::string& instruction_set) {
  const bool any = instruction_set != "portable";
#ifdef GPTQ_CPU_AVX512
  if (any && instruction_set != "AVX2" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return sampler_avx512();
#endif
#ifdef GPTQ_CPU_AVX2
  if (any && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return sampler_avx2();
#endif
  return sampler_portable();
}

void log_softmax(const SamplerWays& ways, float* logits, int V) {
  const Row row(ways, logits, V);
  if (row.is_finite())
    std::transform(logits, logits + V, logits, Logprob(row));
  else
    std::fill_n(logits, V, std::numeric_limits<float>::quiet_NaN());
}

Draw sample_row(const SamplerWays& ways, const SampledRow& row, int V) {
  const RowParams& p = row.params;
  thread_local std::vector<float> raw;
  const float* unchanged = row.logits;
  if (adjusts(row)) {
    if (p.top_logprobs >= 0) {
      raw.assign(row.logits, row.logits + V);
      unchanged = raw.data();
    }
    adjust(row, V);
  }
  Draw result{-1, std::nullopt};
  {
    Row adjusted(ways, row.logits, V);
    if (!adjusted.is_finite()) return result;
    result.token = p.inverse_temperature > 0 ? adjusted.draw(p, row.length) : adjusted.best_id();
  }
  if (p.top_logprobs >= 0) {
    Row table(ways, unchanged, V);
    const Logprob logprob(table);
    result.logprobs = {logprob(unchanged[result.token]), table.top(std::min(p.top_logprobs, V))};
    for (auto& [id, value] : result.logprobs->top) value = logprob(value);
  }
  return result;
}

}  // namespace gptq_cpu
