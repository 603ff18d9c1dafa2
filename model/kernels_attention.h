// What attention's forward and backward pass share, for x86 processors with AVX-512 and bfloat16: matrix products on AMX
// tiles or on vector registers, and the layouts that they read.
//
// Names: T tokens, N heads, H head size. Matrices are laid out in tiles of 16 rows of 64 bytes, whichever way they are
// multiplied. A right-hand tile holds pairs: row p, column n is (B[2p][n], B[2p + 1][n]), as TDPBF16PS and VDPBF16PS
// read it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace {

constexpr int ROWS = 16;             // rows of a tile
constexpr int QUERIES = 32;          // queries of a block: two tiles share what is loaded of keys and values
constexpr int PAIRS = 32;            // bfloat16 in a row of a tile
constexpr int TILE = ROWS * PAIRS;   // elements of a tile
// How C[32][16 columns] (+)= A[32][32 steps] B is computed; B in tiles, step k and column tile n at b + k * step +
// n * next, `columns` even. Rows from `rows` on may be left out. BLOCK is how many keys one step of the softmax takes.

struct OnTiles {
  static constexpr int BLOCK = 256;

  static void begin() {
    struct alignas(64) Config {  // eight tiles of 16 rows of 64 bytes
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {ROWS, ROWS, ROWS, ROWS, ROWS, ROWS, ROWS, ROWS};
    };
    static const Config config;
    _tile_loadconfig(&config);
  }

  static void end() { _tile_release(); }

  // Two column tiles at a time: tiles 0 to 3 sum, 4 and 5 are left, 6 and 7 right; four sums hide the latency of each.
  static void product(const bf16* a, int lda, const bf16* b, int step, int next, int steps, float* c, int ldc,
                      int columns, bool add, int) {
    for (int n = 0; n < columns; n += 2, c += 32, b += 2 * next) {
      float* below = c + ROWS * ldc;
      if (add) {
        _tile_loadd(0, c, ldc * 4);
        _tile_loadd(1, c + 16, ldc * 4);
        _tile_loadd(2, below, ldc * 4);
        _tile_loadd(3, below + 16, ldc * 4);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int k = 0; k < steps; k++) {
        _tile_loadd(4, a + k * PAIRS, lda * 2);
        _tile_loadd(6, b + k * step, 64);
        _tile_loadd(7, b + k * step + next, 64);
        _tile_loadd(5, a + ROWS * lda + k * PAIRS, lda * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, c, ldc * 4);
      _tile_stored(1, c + 16, ldc * 4);
      _tile_stored(2, below, ldc * 4);
      _tile_stored(3, below + 16, ldc * 4);
    }
  }
};

struct OnVectors {
  static constexpr int BLOCK = 128;

  static void begin() {}
  static void end() {}

  static void product(const bf16* a, int lda, const bf16* b, int step, int next, int steps, float* c, int ldc,
                      int columns, bool add, int rows) {
    int n = 0;
    for (; n + 4 <= columns; n += 4)
      for (int r = 0; r < rows; r += 4)
        strip<4>(a + r * lda, lda, b + n * next, step, next, steps, c + r * ldc + 16 * n, ldc, add);
    if (n < columns)
      for (int r = 0; r < rows; r += 4)
        strip<2>(a + r * lda, lda, b + n * next, step, next, steps, c + r * ldc + 16 * n, ldc, add);
  }

 private:
  // Four rows of N column tiles: 4 N sums in registers, each row's pair broadcast from memory.
  template <int N>
  static void strip(const bf16* a, int lda, const bf16* b, int step, int next, int steps, float* c, int ldc, bool add) {
    __m512 sum[4][N];
    for (int r = 0; r < 4; r++)
      for (int n = 0; n < N; n++) sum[r][n] = add ? _mm512_loadu_ps(c + r * ldc + 16 * n) : _mm512_setzero_ps();
    for (int k = 0; k < steps; k++)
      for (int p = 0; p < ROWS; p++) {
        __m512bh right[N];
        for (int n = 0; n < N; n++) right[n] = (__m512bh)_mm512_load_si512(b + k * step + n * next + p * PAIRS);
        for (int r = 0; r < 4; r++) {
          int pair;
          std::memcpy(&pair, a + r * lda + k * PAIRS + 2 * p, sizeof pair);
          const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
          for (int n = 0; n < N; n++) sum[r][n] = _mm512_dpbf16_ps(sum[r][n], left, right[n]);
        }
      }
    for (int r = 0; r < 4; r++)
      for (int n = 0; n < N; n++) _mm512_storeu_ps(c + r * ldc + 16 * n, sum[r][n]);
  }
};

// 16 rows of 16 pairs to 16 columns of pairs: transposes 32-bit elements.
inline void transpose_pairs(const bf16* in, int stride, bf16* out) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(in + i * stride);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
  for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + i * PAIRS, r[i]);
}

struct Attention {
  const bf16 *q, *k, *v;   // token t, head n at q + t * stride + n * H
  bf16* out;               // (T, N, H)
  float* normalizers;      // (T, N): log2 of the sum over a query's keys of e^(q k / sqrt(H)); null: not wanted
  const float *cos, *sin;  // token t at cos + t * table_stride, H / 2 values; null: no rotation
  int64_t stride, table_stride;
  int heads, back, ahead;  // query i sees keys i - back to i + ahead of its sequence; UNBOUNDED: all of that side
};

constexpr int UNBOUNDED = 1 << 30;

// A bound as callers have it, where a negative one is none.
inline int bound(int keys) { return keys < 0 ? UNBOUNDED : std::min(keys, UNBOUNDED); }

template <int H>
inline void rotated(const Attention& p, const bf16* x, int64_t token, bf16* out) {
  if (!p.cos) {
    std::memcpy(out, x, H * sizeof(bf16));
    return;
  }
  const float *cos = p.cos + token * p.table_stride, *sin = p.sin + token * p.table_stride;
  for (int d = 0; d < H / 2; d += 16) {
    const __m512 c = _mm512_loadu_ps(cos + d), s = _mm512_loadu_ps(sin + d);
    const __m512 low = load(x + d), high = load(x + d + H / 2);
    store(out + d, _mm512_fnmadd_ps(high, s, _mm512_mul_ps(low, c)));
    store(out + d + H / 2, _mm512_fmadd_ps(low, s, _mm512_mul_ps(high, c)));
  }
}

// The tiles in which 16 rows of H are multiplied as columns, transposed: H / 32 tiles.
template <int H>
inline void as_columns(const bf16* rows, bf16* to) {
  for (int d = 0; d < H; d += PAIRS, to += TILE) transpose_pairs(rows + d, H, to);
}

// Two rows of H, as one row of pairs in each of the H / 16 tiles in which 32 rows are multiplied as rows.
template <int H>
inline void as_rows(const bf16* even, const bf16* odd, bf16* to) {
  const __m512i lower = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
  for (int d = 0; d < H; d += PAIRS, to += 2 * TILE) {
    const __m512i a = even ? _mm512_loadu_si512(even + d) : _mm512_setzero_si512();
    const __m512i b = odd ? _mm512_loadu_si512(odd + d) : _mm512_setzero_si512();
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, lower, b));
    _mm512_storeu_si512(to + TILE, _mm512_permutex2var_epi16(a, upper, b));
  }
}

// Lanes of the vector at `j` that lie in [from, to).
inline __mmask16 lanes(int j, int from, int to) { return first(to - j) & (__mmask16)~first(from - j); }

}  // namespace
