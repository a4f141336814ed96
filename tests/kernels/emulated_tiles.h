// AMX's tiles in plain C++, for processors and sanitizers that do not know them: `-include` it before a source that uses them.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace emulated {

struct Tile {
  std::uint8_t bytes[16][64];
};
inline thread_local Tile tiles[8];
inline thread_local int rows[8], width[8];
inline thread_local bool configured = false;

inline void configure(const void* config) {
  std::uint8_t bytes[64];
  std::memcpy(bytes, config, 64);
  if (bytes[0] != 1 || bytes[1] != 0) std::abort();
  for (int t = 0; t < 8; t++) {
    std::uint16_t columns;
    std::memcpy(&columns, bytes + 16 + 2 * t, 2);
    rows[t] = bytes[48 + t];
    width[t] = columns;
    if (rows[t] > 16 || width[t] > 64 || width[t] % 4) std::abort();
  }
  configured = true;
}

inline Tile& used(int t) {
  if (!configured || rows[t] == 0) std::abort();
  return tiles[t];
}
inline void load(int t, const void* base, std::int64_t stride) {
  Tile& tile = used(t);
  std::memset(&tile, 0, sizeof tile);
  const auto size = static_cast<std::size_t>(width[t]);
  for (int r = 0; r < rows[t]; r++) std::memcpy(tile.bytes[r], static_cast<const char*>(base) + r * stride, size);
}
inline void store(int t, void* base, std::int64_t stride) {
  const Tile& tile = used(t);
  for (int r = 0; r < rows[t]; r++) std::memcpy(static_cast<char*>(base) + r * stride, tile.bytes[r], static_cast<std::size_t>(width[t]));
}
inline void zero(int t) { std::memset(&used(t), 0, sizeof(Tile)); }

// sums[m][n] += a[m][4 k ..] by b[k][4 n ..]; a's bytes are signed.
template <typename B>
void multiply(int sums, int a, int b) {
  if (rows[sums] != rows[a] || width[a] != 4 * rows[b] || width[sums] != width[b]) std::abort();
  used(b);
  for (int m = 0; m < rows[a]; m++)
    for (int n = 0; n < width[b] / 4; n++) {
      std::int32_t sum;
      std::memcpy(&sum, used(sums).bytes[m] + 4 * n, 4);
      for (int k = 0; k < rows[b]; k++)
        for (int i = 0; i < 4; i++)
          sum += static_cast<std::int8_t>(used(a).bytes[m][4 * k + i]) * static_cast<B>(tiles[b].bytes[k][4 * n + i]);
      std::memcpy(tiles[sums].bytes[m] + 4 * n, &sum, 4);
    }
}

}  // namespace emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbsud
#undef _tile_dpbssd
#define _tile_loadconfig(config) emulated::configure(config)
#define _tile_release() (emulated::configured = false)
#define _tile_loadd(t, base, stride) emulated::load(t, base, stride)
#define _tile_stored(t, base, stride) emulated::store(t, base, stride)
#define _tile_zero(t) emulated::zero(t)
#define _tile_dpbsud(sums, a, b) emulated::multiply<std::uint8_t>(sums, a, b)
#define _tile_dpbssd(sums, a, b) emulated::multiply<std::int8_t>(sums, a, b)
