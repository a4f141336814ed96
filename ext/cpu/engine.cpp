#include "cpu/engine.h"

#if defined(GPTQ_CPU_AMX) || defined(GPTQ_CPU_AVXVNNI)
#include <cpuid.h>
#endif
#ifdef GPTQ_CPU_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <stdexcept>

#include "cpu/pack.h"

namespace gptq_cpu {
namespace {

constexpr int kLine = 64;  // bytes of a line of the cache

#ifdef GPTQ_CPU_AMX
// The processor has AMX with int8, and the system lets this process use it, for which a process has to ask.
bool may_use_tiles() {
  constexpr unsigned tile_and_int8 = 3u << 24;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & tile_and_int8) != tile_and_int8) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

#ifdef GPTQ_CPU_AVXVNNI
// Which compilers' __builtin_cpu_supports does not know yet.
bool has_avxvnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
}
#endif

}  // namespace

std::vector<const Ways*> known() {
  std::vector<const Ways*> found;
#ifdef GPTQ_CPU_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) {
#ifdef GPTQ_CPU_AMX
    if (may_use_tiles()) found.push_back(&amx());
#endif
    found.push_back(&avx512());
  }
#endif
#ifdef GPTQ_CPU_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
#ifdef GPTQ_CPU_AVXVNNI
    if (has_avxvnni()) found.push_back(&avxvnni());
#endif
    found.push_back(&avx2());
  }
#endif
  found.push_back(&portable());
  return found;
}

static const Ways& named(const std::string& wanted) {
  for (const Ways* ways : known())
    if (wanted.empty() || wanted == ways->name) return *ways;
  throw std::invalid_argument("no kernels of '" + wanted + "' for this processor");
}

Engine::Engine(int num_threads, const std::string& wanted) : Engine(num_threads, named(wanted)) {}

Rows Operand::make(const Quantized& w, int M) {
  const std::size_t pairs = static_cast<std::size_t>(M) * static_cast<std::size_t>(w.K / w.group);
  const std::int64_t ld = w.K + kLine / (w.exact ? 4 : 1);
  const std::size_t numbers = static_cast<std::size_t>(M * ld);
  if (w.exact) {
    places.resize(numbers);
  } else {
    bytes.resize(numbers);
    scales.resize(pairs);
    sums.resize(pairs);
  }
  return {bytes.data(), scales.data(), sums.data(), places.data(), ld};
}

void Engine::quantized(const Quantized& w, const float* x, std::int64_t ldx, int M, float* y, std::int64_t ldy) {
  std::lock_guard one_call(mutex_);
  const int groups = w.K / w.group;
  const Rows rows = operand_.make(w, M);
  // Some 4,096 numbers at a time: what takes less than a few microseconds is done where it is.
  const int at_once = std::max(1, 4096 / w.group), per_row = (groups + at_once - 1) / at_once;
  share(M * per_row, static_cast<std::int64_t>(M) * w.K > 32768, [&](int i) {
    const int m = i / per_row, first = i % per_row * at_once;
    prepare(w, x + m * ldx, m, first, std::min(groups, first + at_once), rows);
  });
  multiply(w, rows, M, y, ldy);
}

void Engine::prepare(const Quantized& w, const float* x, int m, int first, int last, const Rows& rows) const {
  if (w.exact)
    ways_->gather(w, x, first, last, rows.places + m * rows.ld);
  else
    ways_->quantize(w, x, m, first, last, rows);
}

void Engine::multiply(const Quantized& w, const Rows& rows, int M, float* y, std::int64_t ldy) {
  if (M == 0) return;
  share_strips(w, M, [&](int first, int last) {
    if (w.exact)
      ways_->multiply_exact(w, rows.places, rows.ld, M, first, last, y, ldy);
    else
      ways_->multiply(w, rows, M, first, last, y, ldy);
  });
}

void Engine::dense(const void* w, Kind kind, int N, int K, const float* x, std::int64_t ldx, int M, float* y, std::int64_t ldy) {
  std::lock_guard one_call(mutex_);
  if (M > 1) {  // as in Rows
    const std::int64_t ld = K + kLine / 4;
    operand_.places.resize(static_cast<std::size_t>(M * ld));
    for (int m = 0; m < M; m++) std::copy_n(x + m * ldx, K, operand_.places.data() + m * ld);
    x = operand_.places.data();
    ldx = ld;
  }
  const int width = kind == Kind::single ? 4 : 2;
  const int step = std::max(4, std::min(65536 / (K * width), N / (4 * pool_.size())) / 4 * 4);
  share((N + step - 1) / step, static_cast<std::int64_t>(M) * N * K > kWorthSharing / 4,
        [&](int i) { ways_->dense(w, kind, K, x, ldx, M, i * step, std::min(N, (i + 1) * step), y, ldy); });
}

void Engine::pack_weight(const std::int32_t* qweight, int N, int bits, const std::int32_t* places, int K, std::uint8_t* out) {
  std::lock_guard one_call(mutex_);
  const int strips = (N + kStrip - 1) / kStrip;
  pool_.run(strips, [&](int s) { pack(qweight, N, bits, places, K, out, s, s + 1); });
}

}  // namespace gptq_cpu
