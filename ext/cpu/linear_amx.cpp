// AVX-512 VNNI for few rows; from 16 on, AMX's products of matrices in int8: 16 rows by 16 outputs by 64 inputs at a time. The integers are
// the same, and what follows on them is done in the same order, so a row's bits do not tell which it was.
#include "cpu/lanes_avx512.h"
#include "cpu/linear_ways.h"

namespace gptq_cpu {
namespace {

constexpr int kTileRows = 16, kTiles = 4;  // rows of a tile, and tiles of rows that share one unpacked weight

// Tiles 0 to 3: sums, int32 [16][16]. 4: rows of x, [16][inputs]. 5: weights, [inputs / 4][16][4].
struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16};

  explicit TileConfig(int inputs) {
    row_bytes[4] = static_cast<std::uint16_t>(inputs);
    rows[4] = 16;
    row_bytes[5] = 64;
    rows[5] = static_cast<std::uint8_t>(inputs / 4);
  }
};

// The compiler does not know that tiles read memory: what is to be read has to be written before this.
inline void written() { asm volatile("" ::: "memory"); }

// The weights of `inputs` inputs as the tile wants them: where they lie, if each has a byte of its own.
template <int bits>
const std::uint8_t* unpacked(const std::uint8_t* q, int inputs, std::uint8_t* room) {
  if constexpr (bits == 8) return q;
  const __m512i low = _mm512_set1_epi8(15);
  for (int k = 0; k < inputs; k += 8, q += 64) {
    __builtin_prefetch(q + kAhead);
    const __m512i v = _mm512_load_si512(q);
    _mm512_store_si512(room + 16 * k, _mm512_and_si512(v, low));
    _mm512_store_si512(room + 16 * k + 64, _mm512_and_si512(_mm512_srli_epi16(v, 4), low));
  }
  return room;
}

// `num_tiles` times 16 rows from m on, by strip s.
template <int bits>
void tiles(const Quantized& w, const Rows& rows, int m, int num_tiles, int s, float* y, std::int64_t ld) {
  const int groups = w.K / w.group, inputs = w.group < 64 ? w.group : 64;
  alignas(64) std::uint8_t room[64 * 16];
  alignas(64) std::int32_t sums[kTiles][kTileRows][16];
  alignas(64) float acc[kTiles * kTileRows][16] = {};
  const std::uint8_t* q = w.q + static_cast<std::int64_t>(s) * w.K * 2 * bits;
  const std::int8_t* x = rows.bytes + m * rows.ld;
  const std::int64_t step = kTileRows * rows.ld;
  for (int g = 0; g < groups; g++) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int k = g * w.group; k < (g + 1) * w.group; k += inputs, q += inputs * 2 * bits) {
      const std::uint8_t* weights = unpacked<bits>(q, inputs, room);
      written();
      _tile_loadd(5, weights, 64);
      _tile_loadd(4, x + k, rows.ld);
      _tile_dpbsud(0, 4, 5);
      if (num_tiles > 1) {
        _tile_loadd(4, x + k + step, rows.ld);
        _tile_dpbsud(1, 4, 5);
      }
      if (num_tiles > 2) {
        _tile_loadd(4, x + k + 2 * step, rows.ld);
        _tile_dpbsud(2, 4, 5);
      }
      if (num_tiles > 3) {
        _tile_loadd(4, x + k + 3 * step, rows.ld);
        _tile_dpbsud(3, 4, 5);
      }
    }
    _tile_stored(0, sums[0], 64);
    if (num_tiles > 1) _tile_stored(1, sums[1], 64);
    if (num_tiles > 2) _tile_stored(2, sums[2], 64);
    if (num_tiles > 3) _tile_stored(3, sums[3], 64);
    const std::int64_t at = (static_cast<std::int64_t>(s) * groups + g) * 16;
    const __m512 scale = load_scales(w, at), zero = Lanes::load_u8(w.zeros + at);
    for (int i = 0; i < num_tiles * kTileRows; i++) {
      const std::int64_t row = static_cast<std::int64_t>(m + i) * groups + g;
      const __m512 sum = Lanes::to_floats(_mm512_load_si512(sums[i / kTileRows][i % kTileRows]));
      _mm512_store_ps(acc[i], add_group(_mm512_load_ps(acc[i]), sum, zero, scale, rows.sums[row], rows.scales[row]));
    }
  }
  for (int i = 0; i < num_tiles * kTileRows; i++) store_strip(w, s, _mm512_load_ps(acc[i]), y + (m + i) * ld);
}

void multiply_by_tiles(const Quantized& w, const Rows& rows, int M, int first, int last, float* y, std::int64_t ld) {
  const int whole = M / kTileRows * kTileRows;
  if (whole) {
    const TileConfig config(w.group < 64 ? w.group : 64);
    written();
    _tile_loadconfig(&config);
    for (int m = 0; m < whole; m += kTiles * kTileRows) {
      const int num_tiles = whole - m < kTiles * kTileRows ? (whole - m) / kTileRows : kTiles;
      for (int s = first; s < last; s++)
        w.bits == 4 ? tiles<4>(w, rows, m, num_tiles, s, y, ld) : tiles<8>(w, rows, m, num_tiles, s, y, ld);
    }
    _tile_release();
  }
  if (whole == M) return;
  const std::int64_t groups = w.K / w.group;
  const Rows rest{rows.bytes + whole * rows.ld, rows.scales + whole * groups, rows.sums + whole * groups, nullptr, rows.ld};
  multiply(w, rest, M - whole, first, last, y + whole * ld, ld);
}

}  // namespace

const Ways& amx() {
  static const Ways ways = [] {
    Ways found = ways_of("AMX");
    found.multiply = multiply_by_tiles;
    return found;
  }();
  return ways;
}
}  // namespace gptq_cpu
