// The same for every instruction set, over 16 lanes (`lanes_*.h`): included by one source for each.
#pragma once
#include <cmath>
#include <cstring>
#include <initializer_list>

#include "cpu/dense_ways.h"
#include "cpu/ops.h"

namespace gptq_cpu {
namespace {

// e^x to the last bit or two; 0 below -104. Cody and Waite's reduction, Cephes' polynomial.
Lanes::Floats exponential(Lanes::Floats x) {
  x = Lanes::minimum(Lanes::broadcast(88.7f), Lanes::maximum(Lanes::broadcast(-104.0f), x));
  const Lanes::Floats n = Lanes::round(Lanes::multiply(x, Lanes::broadcast(1.44269504f)));
  Lanes::Floats r = Lanes::multiply_subtract_from(n, Lanes::broadcast(0.693359375f), x);
  r = Lanes::multiply_subtract_from(n, Lanes::broadcast(-2.12194440e-4f), r);
  Lanes::Floats p = Lanes::broadcast(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = Lanes::multiply_add(p, r, Lanes::broadcast(c));
  p = Lanes::multiply_add(Lanes::multiply(p, r), r, r);
  return Lanes::times_power_of_two(Lanes::add(p, Lanes::broadcast(1.0f)), n);
}

template <Kind kind>
void embed_as(const void* data, std::int64_t first, int n, float* out) {
  int i = 0;
  for (; i + 16 <= n; i += 16) Lanes::store(out + i, load_dense<kind>(data, first + i));
  for (; i < n; i++) out[i] = element(data, kind, first + i);
}

void embed(const void* data, Kind kind, std::int64_t first, int n, float* out) {
  if (kind == Kind::half) embed_as<Kind::half>(data, first, n, out);
  if (kind == Kind::bfloat) embed_as<Kind::bfloat>(data, first, n, out);
  if (kind == Kind::single) embed_as<Kind::single>(data, first, n, out);
}

void rms_norm(const float* x, const float* weight, float eps, int n, float* out) {
  Lanes::Floats squares[4] = {Lanes::zero(), Lanes::zero(), Lanes::zero(), Lanes::zero()};
  int i = 0;
  for (; i + 64 <= n; i += 64)
    for (int j = 0; j < 4; j++) {
      const Lanes::Floats v = Lanes::load_floats(x + i + 16 * j);
      squares[j] = Lanes::multiply_add(v, v, squares[j]);
    }
  for (; i + 16 <= n; i += 16) {
    const Lanes::Floats v = Lanes::load_floats(x + i);
    squares[0] = Lanes::multiply_add(v, v, squares[0]);
  }
  float sum = Lanes::sum(Lanes::add(Lanes::add(squares[0], squares[1]), Lanes::add(squares[2], squares[3])));
  for (; i < n; i++) sum += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(sum / static_cast<float>(n) + eps);
  for (i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}

void silu_and_multiply(const float* gate, const float* up, int n, float* out) {
  const auto lanes = [](Lanes::Floats g, Lanes::Floats u) {
    const Lanes::Floats e = exponential(Lanes::subtract(Lanes::zero(), g));
    return Lanes::divide(Lanes::multiply(g, u), Lanes::add(Lanes::broadcast(1.0f), e));
  };
  int i = 0;
  for (; i + 16 <= n; i += 16) Lanes::store(out + i, lanes(Lanes::load_floats(gate + i), Lanes::load_floats(up + i)));
  if (i == n) return;
  float rest[3][16] = {};
  std::memcpy(rest[0], gate + i, sizeof(float) * static_cast<std::size_t>(n - i));
  std::memcpy(rest[1], up + i, sizeof(float) * static_cast<std::size_t>(n - i));
  Lanes::store(rest[2], lanes(Lanes::load_floats(rest[0]), Lanes::load_floats(rest[1])));
  std::memcpy(out + i, rest[2], sizeof(float) * static_cast<std::size_t>(n - i));
}

void rotate(float* x, int heads, int dim, const float* cos, const float* sin) {
  const int half = dim / 2;
  for (int h = 0; h < heads; h++, x += dim)
    for (int i = 0; i < half; i++) {
      const float a = x[i], b = x[i + half];
      x[i] = a * cos[i] - b * sin[i];
      x[i + half] = b * cos[i] + a * sin[i];
    }
}

std::uint16_t to_bfloat(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<std::uint16_t>(bits >> 16 | 0x40);  // NaN stays one
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <typename T>
T stored(float x) {
  if constexpr (sizeof(T) == 2) return to_bfloat(x);
  else return x;
}

template <typename T>
Lanes::Floats load_stored(const T* p) {
  if constexpr (sizeof(T) == 2) return Lanes::load_bfloat(p);
  else return Lanes::load_floats(p);
}

template <typename T>
void write_as(const Cache& c, std::int64_t block, int offset, const float* k, const float* v) {
  const std::int64_t part = static_cast<std::int64_t>(c.dim) * c.block_size;
  T* to = static_cast<T*>(c.data) + block * c.kv_heads * 2 * part;
  for (int h = 0; h < c.kv_heads; h++, to += 2 * part, k += c.dim, v += c.dim) {
    for (int d = 0; d < c.dim; d++) to[static_cast<std::int64_t>(d) * c.block_size + offset] = stored<T>(k[d]);
    T* row = to + part + static_cast<std::int64_t>(offset) * c.dim;
    for (int d = 0; d < c.dim; d++) row[d] = stored<T>(v[d]);
  }
}

void write(const Cache& cache, std::int64_t block, int offset, const float* k, const float* v) {
  cache.kind == Kind::bfloat ? write_as<std::uint16_t>(cache, block, offset, k, v) : write_as<float>(cache, block, offset, k, v);
}

// Scores of R rows with S times 16 keys: a score is one sum over the dimensions, in their order, in whichever tile.
template <typename T, int R, int S>
void scores(const T* const* keys, int stride, int dim, const float* q, float* out) {
  Lanes::Floats acc[R][S];
  for (int r = 0; r < R; r++)
    for (int s = 0; s < S; s++) acc[r][s] = Lanes::zero();
  for (int d = 0; d < dim; d++) {
    Lanes::Floats k[S];
    for (int s = 0; s < S; s++) k[s] = load_stored(keys[s] + static_cast<std::int64_t>(d) * stride);
    for (int r = 0; r < R; r++) {
      const Lanes::Floats v = Lanes::broadcast(q[r * dim + d]);
      for (int s = 0; s < S; s++) acc[r][s] = Lanes::multiply_add(v, k[s], acc[r][s]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int s = 0; s < S; s++) Lanes::store(out + r * kKeyBlock + 16 * s, acc[r][s]);
}

// acc[r] = acc[r] * keep[r] + the sum of p[r][k] V[k], for D times 16 dimensions, in the order of the keys.
template <typename T, int R, int D>
void weigh(const T* const* values, int num_keys, int dim, const float* p, const float* keep, float* acc) {
  Lanes::Floats sum[R][D];
  for (int r = 0; r < R; r++)
    for (int i = 0; i < D; i++) sum[r][i] = Lanes::multiply(Lanes::load_floats(acc + r * dim + 16 * i), Lanes::broadcast(keep[r]));
  for (int k = 0; k < num_keys; k++) {
    const T* from = values[k / 16] + static_cast<std::int64_t>(k % 16) * dim;
    Lanes::Floats v[D];
    for (int i = 0; i < D; i++) v[i] = load_stored(from + 16 * i);
    for (int r = 0; r < R; r++) {
      const Lanes::Floats weight = Lanes::broadcast(p[r * kKeyBlock + k]);
      for (int i = 0; i < D; i++) sum[r][i] = Lanes::multiply_add(weight, v[i], sum[r][i]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int i = 0; i < D; i++) Lanes::store(acc + r * dim + 16 * i, sum[r][i]);
}

// The state of the rows of one call, each as if it were alone: a block of keys that a row does not see changes nothing of it.
struct Softmax {
  float *q, *acc, *p, *most, *total;
};

template <typename T, int R>
void rows_by_block(const T* const* keys, const T* const* values, int stride, int dim, int num_keys, int first_key, const int* begins,
                   const int* ends, const Softmax& s) {
  constexpr int S = Lanes::kTile < 2 * R ? 1 : Lanes::kTile / R > 4 ? 4 : Lanes::kTile / R, D = S;
  const int groups = (num_keys + 15) / 16;
  int g = 0;
  for (; g + S <= groups; g += S) scores<T, R, S>(keys + g, stride, dim, s.q, s.p + 16 * g);
  for (; g < groups; g++) scores<T, R, 1>(keys + g, stride, dim, s.q, s.p + 16 * g);
  float keep[R];
  for (int r = 0; r < R; r++) {
    float* p = s.p + r * kKeyBlock;
    const int begin = begins[r] - first_key, end = ends[r] - first_key;
    for (int k = 0; k < 16 * groups; k++)
      if (k < begin || k >= end) p[k] = -INFINITY;
    Lanes::Floats best = Lanes::broadcast(s.most[r]);
    for (int k = 0; k < 16 * groups; k += 16) best = Lanes::maximum(best, Lanes::load_floats(p + k));
    const float most = Lanes::largest_lane(best);
    Lanes::Floats sum = Lanes::zero();
    for (int k = 0; k < kKeyBlock; k += 16) {
      if (k >= 16 * groups) break;
      const Lanes::Floats e = exponential(Lanes::subtract(Lanes::load_floats(p + k), Lanes::broadcast(most)));
      sum = Lanes::add(sum, e);
      Lanes::store(p + k, e);
    }
    float lanes[16];
    Lanes::store(lanes, exponential(Lanes::broadcast(s.most[r] - most)));
    keep[r] = lanes[0];
    s.total[r] = s.total[r] * keep[r] + Lanes::sum(sum);
    s.most[r] = most;
  }
  int d = 0;
  for (; d + 16 * D <= dim; d += 16 * D) {
    const T* from[kKeyBlock / 16];
    for (int i = 0; i < groups; i++) from[i] = values[i] + d;
    weigh<T, R, D>(from, num_keys, dim, s.p, keep, s.acc + d);
  }
  for (; d < dim; d += 16) {
    const T* from[kKeyBlock / 16];
    for (int i = 0; i < groups; i++) from[i] = values[i] + d;
    weigh<T, R, 1>(from, num_keys, dim, s.p, keep, s.acc + d);
  }
}

template <typename T>
void attend_as(const Cache& c, const Queries& a, float* room) {
  const int dim = c.dim, rows = a.tokens * a.share;
  const std::int64_t part = static_cast<std::int64_t>(dim) * c.block_size;
  const T* data = static_cast<const T*>(c.data) + a.kv_head * 2 * part;
  Softmax s{room, room + rows * dim, room + 2 * rows * dim, nullptr, nullptr};
  s.most = s.p + rows * kKeyBlock;
  s.total = s.most + rows;
  int begins[kMostRows], ends[kMostRows];
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  for (int t = 0; t < a.tokens; t++)
    for (int h = 0; h < a.share; h++) {
      const int r = t * a.share + h;
      for (int d = 0; d < dim; d++) s.q[r * dim + d] = a.q[t * a.ld + h * dim + d] * scale;
      ends[r] = a.first_position + t + 1;
      begins[r] = a.window > 0 && ends[r] > a.window ? ends[r] - a.window : 0;
      s.most[r] = -3.4e38f;
      s.total[r] = 0;
    }
  std::memset(s.acc, 0, sizeof(float) * static_cast<std::size_t>(rows) * dim);
  const int last = ends[rows - 1];
  for (int first = begins[0] / kKeyBlock * kKeyBlock; first < last; first += kKeyBlock) {
    const int num_keys = last - first < kKeyBlock ? last - first : kKeyBlock;
    const T *keys[kKeyBlock / 16], *values[kKeyBlock / 16];
    for (int g = 0; 16 * g < num_keys; g++) {
      const int at = first + 16 * g, offset = at % c.block_size;
      const T* block = data + static_cast<std::int64_t>(a.table[at / c.block_size]) * c.kv_heads * 2 * part;
      keys[g] = block + offset;
      values[g] = block + part + static_cast<std::int64_t>(offset) * dim;
    }
    for (int r = 0; r < rows;) {
      const Softmax at{s.q + r * dim, s.acc + r * dim, s.p + r * kKeyBlock, s.most + r, s.total + r};
      const auto tile = [&]<int R>() { rows_by_block<T, R>(keys, values, c.block_size, dim, num_keys, first, begins + r, ends + r, at); };
      if (rows - r >= 8 && Lanes::kTile >= 16) {
        tile.template operator()<8>();
        r += 8;
      } else if (rows - r >= 4) {
        tile.template operator()<4>();
        r += 4;
      } else if (rows - r >= 2) {
        tile.template operator()<2>();
        r += 2;
      } else {
        tile.template operator()<1>();
        r += 1;
      }
    }
  }
  for (int t = 0; t < a.tokens; t++)
    for (int h = 0; h < a.share; h++) {
      const int r = t * a.share + h;
      const float by = 1.0f / s.total[r];
      for (int d = 0; d < dim; d++) a.out[t * a.ld_out + h * dim + d] = s.acc[r * dim + d] * by;
    }
}

void attend(const Cache& cache, const Queries& queries, float* room) {
  cache.kind == Kind::bfloat ? attend_as<std::uint16_t>(cache, queries, room) : attend_as<float>(cache, queries, room);
}

constexpr Ops kOps{embed, rms_norm, silu_and_multiply, rotate, write, attend};

}  // namespace
}  // namespace gptq_cpu
