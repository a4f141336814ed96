// The CPU's products on random shapes, in memory that ends where they may read and write, so that a sanitizer sees every step beyond.
//
//     fuzz_cpu SEED ROUNDS          prints what it did, or what is wrong, and then ends with status 1
//     fuzz_cpu plant                reads a line beyond a weight, which has to be found
//
// Each instruction set that this processor has, AMX emulated (emulated_tiles.h), against sums in double; a row alone, among others and on
// several threads has the same bits.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cpu/engine.h"
#include "cpu/pack.h"

using namespace gptq_cpu;

namespace {

std::mt19937 random_bits;
int between(int least, int most) { return least + static_cast<int>(random_bits() % static_cast<unsigned>(most - least + 1)); }
float number() { return static_cast<float>(between(-30000, 30000)) / 10000.0f; }

// Memory that ends behind its last element, aligned as weights are.
template <typename T>
struct Exactly {
  std::unique_ptr<T, decltype(&std::free)> memory{nullptr, &std::free};
  std::size_t size;
  explicit Exactly(std::size_t n) : size(n) {
    void* found = nullptr;
    if (posix_memalign(&found, 64, n * sizeof(T)) != 0) std::abort();
    memory.reset(static_cast<T*>(found));
    std::memset(found, 0, n * sizeof(T));
  }
  T* data() const { return memory.get(); }
  T& operator[](std::size_t i) const { return memory.get()[i]; }
};

std::uint16_t bfloat(float v) {
  std::uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return static_cast<std::uint16_t>(bits >> 16);
}
double from_bfloat(std::uint16_t v) {
  const std::uint32_t bits = static_cast<std::uint32_t>(v) << 16;
  float found;
  std::memcpy(&found, &bits, 4);
  return found;
}
// Normal halves alone.
double from_half(std::uint16_t v) { return std::ldexp(1024 + (v & 1023), ((v >> 10) & 31) - 25) * (v & 0x8000 ? -1 : 1); }

std::string said;  // of the case in hand
[[noreturn]] void wrong(const std::string& what) {
  std::printf("WRONG: %s\n  %s\n", what.c_str(), said.c_str());
  std::exit(1);
}

struct Case {
  int bits = std::vector<int>{2, 3, 4, 8}[random_bits() % 4], stored = bits == 8 ? 8 : 4;
  int group = std::vector<int>{32, 64, 128}[random_bits() % 3], groups = between(1, 4), K = group * groups, N = between(1, 70);
  int inputs = std::max(32, (K - between(0, group)) / 32 * 32);  // files hold whole words of every bit width
  bool in_order = random_bits() % 2 == 0;
  Kind kind = static_cast<Kind>(random_bits() % 3);
  int M = random_bits() % 8 == 0 ? between(41, 150) : between(1, 40), strips = (N + kStrip - 1) / kStrip;
  std::int64_t ldx = inputs + between(0, 3), ldy = N + between(0, 3);

  Exactly<std::int32_t> qweight{static_cast<std::size_t>(inputs * bits / 32 * N)};
  Exactly<std::int32_t> places{static_cast<std::size_t>(K)};
  Exactly<std::uint8_t> q{static_cast<std::size_t>(strips * kStrip * K * stored / 8)};
  Exactly<std::uint8_t> zeros{static_cast<std::size_t>(strips * kStrip * groups)};
  Exactly<std::uint8_t> scales{static_cast<std::size_t>(strips * kStrip * groups * (kind == Kind::single ? 4 : 2))};
  Exactly<float> x{static_cast<std::size_t>((M - 1) * ldx + inputs)};
  std::vector<double> weight = std::vector<double>(static_cast<std::size_t>(inputs * N));  // [inputs][N]
  int bad_row = random_bits() % 4 == 0 ? between(0, M - 1) : -1;

  Case() {
    said = std::to_string(bits) + " bits, group " + std::to_string(group) + ", K " + std::to_string(K) + ", inputs " +
           std::to_string(inputs) + ", N " + std::to_string(N) + ", M " + std::to_string(M) + (in_order ? "" : ", act-order") + ", kind " +
           std::to_string(static_cast<int>(kind)) + ", bad row " + std::to_string(bad_row);
    std::vector<int> order(static_cast<std::size_t>(K));
    std::iota(order.begin(), order.end(), 0);
    if (!in_order) std::shuffle(order.begin(), order.end(), random_bits);
    for (int k = 0; k < K; k++) places[k] = order[k] < inputs ? order[k] : -1;
    for (std::size_t i = 0; i < qweight.size; i++) qweight[i] = static_cast<std::int32_t>(random_bits());
    for (std::size_t i = 0; i < zeros.size; i++) zeros[i] = static_cast<std::uint8_t>(between(0, bits == 8 ? 255 : 16));
    for (std::size_t i = 0; i < zeros.size; i++) {
      const float scale = 0.001f * static_cast<float>(between(1, 40));
      const std::uint16_t half = static_cast<std::uint16_t>(between(8 << 10, 12 << 10)), narrow = bfloat(scale);
      if (kind == Kind::single)
        std::memcpy(scales.data() + 4 * i, &scale, 4);
      else
        std::memcpy(scales.data() + 2 * i, kind == Kind::half ? &half : &narrow, 2);
    }
    for (std::size_t i = 0; i < x.size; i++) x[i] = number();
    if (bad_row >= 0) x[bad_row * ldx + between(0, inputs - 1)] = std::numeric_limits<float>::quiet_NaN();
    for (int k = 0; k < K; k++)
      if (places[k] >= 0)
        for (int n = 0; n < N; n++) weight[places[k] * N + n] = value(places[k], n, k / group);
    for (int s = 0; s < strips; s++) pack(qweight.data(), N, bits, places.data(), K, q.data(), s, s + 1);
  }

  double value(int input, int n, int g) const {
    std::int64_t bit = static_cast<std::int64_t>(input) * bits;
    int found = 0;
    for (int b = 0; b < bits; b++, bit++)
      found |= static_cast<int>(static_cast<std::uint32_t>(qweight[bit / 32 * N + n]) >> (bit % 32) & 1) << b;
    const std::size_t at = (static_cast<std::size_t>(n / kStrip) * groups + g) * kStrip + n % kStrip;
    float scale;
    std::uint16_t narrow;
    std::memcpy(&narrow, scales.data() + 2 * at, 2);
    double factor = kind == Kind::half ? from_half(narrow) : from_bfloat(narrow);
    if (kind == Kind::single) {
      std::memcpy(&scale, scales.data() + 4 * at, 4);
      factor = scale;
    }
    return (found - zeros[at]) * factor;
  }

  Quantized quantized(bool exact) const {
    const bool as_it_is = in_order && K == inputs;
    return {q.data(), scales.data(), zeros.data(), as_it_is ? nullptr : places.data(), N, K, inputs, group, stored, kind, exact};
  }
};

std::vector<float> product(Engine& engine, const Case& c, bool exact, int first, int M) {
  Exactly<float> y(static_cast<std::size_t>((M - 1) * c.ldy + c.N));
  for (std::size_t i = 0; i < y.size; i++) y[i] = -77;
  engine.quantized(c.quantized(exact), c.x.data() + first * c.ldx, c.ldx, M, y.data(), c.ldy);
  std::vector<float> rows;
  for (std::size_t i = 0; i < y.size; i++) {
    if (static_cast<std::int64_t>(i) % c.ldy < c.N)
      rows.push_back(y[i]);
    else if (y[i] != -77)
      wrong("written between two rows");
  }
  return rows;
}

bool same(const float* a, const float* b, int n) { return std::memcmp(a, b, sizeof(float) * static_cast<std::size_t>(n)) == 0; }

std::vector<float> try_quantized(Engine& engine, Engine& threads, const Case& c, bool exact) {
  const std::vector<float> y = product(engine, c, exact, 0, c.M);
  for (int m = 0; m < c.M; m++) {
    double off = 0, all = 0;
    for (int n = 0; n < c.N; n++) {
      double sum = 0, size = 0;
      for (int k = 0; k < c.inputs; k++) {
        const double part = c.x[m * c.ldx + k] * c.weight[k * c.N + n];
        sum += part;
        size += part * part;
      }
      const double found = y[m * c.N + n];
      if (m == c.bad_row ? std::isfinite(found) : !std::isfinite(found)) wrong("a row that is no number is not alone");
      off += (found - sum) * (found - sum);
      all += size;
    }
    if (m != c.bad_row && std::sqrt(off / all) > (exact ? 3e-6 : 3e-2)) wrong("off by " + std::to_string(std::sqrt(off / all)));
  }
  const int first = between(0, c.M - 1), M = between(1, c.M - first);
  const std::vector<float> some = product(engine, c, exact, first, M), shared = product(threads, c, exact, 0, c.M);
  if (!same(some.data(), y.data() + first * c.N, M * c.N)) wrong("other bits in other company");
  if (!same(shared.data(), y.data(), c.M * c.N)) wrong("other bits on several threads");
  return y;
}

void try_dense(Engine& engine) {
  const Kind kind = static_cast<Kind>(random_bits() % 3);
  const int N = between(1, 40), K = between(1, 150), M = between(1, 20);
  const std::int64_t ldx = K + between(0, 3), ldy = N + between(0, 3);
  said = "dense, K " + std::to_string(K) + ", N " + std::to_string(N) + ", M " + std::to_string(M) + ", kind " +
         std::to_string(static_cast<int>(kind));
  const std::size_t width = kind == Kind::single ? 4 : 2;
  Exactly<std::uint8_t> w(static_cast<std::size_t>(N * K) * width);
  Exactly<float> x(static_cast<std::size_t>((M - 1) * ldx + K)), y(static_cast<std::size_t>((M - 1) * ldy + N));
  std::vector<double> values;
  for (int i = 0; i < N * K; i++) {
    const float v = number();
    const std::uint16_t half = static_cast<std::uint16_t>(between(8 << 10, 12 << 10)), narrow = kind == Kind::half ? half : bfloat(v);
    std::memcpy(w.data() + width * static_cast<std::size_t>(i), kind == Kind::single ? static_cast<const void*>(&v) : &narrow, width);
    values.push_back(kind == Kind::single ? v : kind == Kind::half ? from_half(half) : from_bfloat(narrow));
  }
  for (std::size_t i = 0; i < x.size; i++) x[i] = number();
  engine.dense(w.data(), kind, N, K, x.data(), ldx, M, y.data(), ldy);
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) {
      double sum = 0, size = 0;
      for (int k = 0; k < K; k++) sum += values[n * K + k] * x[m * ldx + k], size += std::fabs(values[n * K + k] * x[m * ldx + k]);
      if (!(std::fabs(y[m * ldy + n] - sum) <= 2e-6 * size)) wrong("dense: off");
    }
  Exactly<float> alone(static_cast<std::size_t>(N));
  const int m = between(0, M - 1);
  engine.dense(w.data(), kind, N, K, x.data() + m * ldx, ldx, 1, alone.data(), N);
  if (!same(alone.data(), y.data() + m * ldy, N)) wrong("dense: other bits alone");
}

// A weight of which the last line is missing.
void plant() {
  const Case c;
  const std::size_t line = 64;
  Exactly<std::uint8_t> shorter(c.q.size - line);
  Quantized w = c.quantized(false);
  w.q = shorter.data();
  Exactly<float> y(static_cast<std::size_t>((c.M - 1) * c.ldy + c.N));
  Engine engine(1, "");
  engine.quantized(w, c.x.data(), c.ldx, c.M, y.data(), c.ldy);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::string(argv[1]) == "plant") {
    plant();
    std::printf("nothing was found\n");
    return 0;
  }
  if (argc != 3) return 2;
  random_bits.seed(static_cast<unsigned>(std::atoi(argv[1])));
  const int rounds = std::atoi(argv[2]);
  std::vector<const Ways*> sets = known();
#ifdef GPTQ_CPU_AMX
  if (sets[0] == &avx512()) sets.insert(sets.begin(), &amx());  // emulated
#endif
  std::vector<std::unique_ptr<Engine>> alone, threads;
  for (const Ways* ways : sets) {
    alone.push_back(std::make_unique<Engine>(1, *ways));
    threads.push_back(std::make_unique<Engine>(3, *ways));
  }
  for (int i = 0; i < rounds; i++) {
    const Case c;
    for (bool exact : {false, true}) {
      std::vector<float> first;
      for (std::size_t e = 0; e < sets.size(); e++) {
        const std::vector<float> y = try_quantized(*alone[e], *threads[e], c, exact);
        if (e == 0) first = y;
        // Plain C++ rounds a product before it is added, and may have other NaNs.
        if (sets[e] != &portable() && c.bad_row < 0 && !same(first.data(), y.data(), c.M * c.N))
          wrong(std::string(sets[e]->name) + " has other bits than " + sets[0]->name);
      }
    }
    for (const auto& engine : alone) try_dense(*engine);
  }
  for (const Ways* ways : sets) std::printf("%s: %d rounds\n", ways->name, rounds);
}
