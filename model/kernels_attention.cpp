// Attention for x86 processors with AVX-512 and bfloat16, its matrix products on AMX tiles or on vector registers.
//
// Names: T tokens, N heads, H head size. Matrices are laid out in tiles of 16 rows of 64 bytes, whichever way they are
// multiplied. A right-hand tile holds pairs: row p, column n is (B[2p][n], B[2p + 1][n]), as TDPBF16PS and VDPBF16PS
// read it.

#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

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
  const float *cos, *sin;  // token t at cos + t * table_stride, H / 2 values; null: no rotation
  int64_t stride, table_stride;
  int heads, window;       // window < 0: every key of the sequence
};

struct Item {
  int start, length, begin, end, head;  // a sequence's first token and length; queries [begin, end) of it; a head
};

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

// Keys [low, high) of an item, zeros up to `padded`: `keys` in tiles of 16 keys by 32 dimensions, transposed, `values`
// in tiles of 32 keys by 16 dimensions.
template <int H>
void pack_keys(const Attention& p, const Item& item, int low, int high, int padded, bf16* keys, bf16* values) {
  alignas(64) bf16 rows[ROWS * H];
  const __m512i lower = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
  for (int at = 0; at < padded; at += ROWS) {
    for (int i = 0; i < ROWS; i++) {
      const int64_t token = item.start + low + at + i;
      // Rows of a head lie kilobytes apart, where no hardware looks ahead.
      const int64_t ahead = std::min<int64_t>(token + ROWS, item.start + high - 1) * p.stride + item.head * H;
      for (int d = 0; d < H; d += PAIRS) {
        _mm_prefetch((const char*)(p.k + ahead + d), _MM_HINT_T0);
        _mm_prefetch((const char*)(p.v + ahead + d), _MM_HINT_T0);
        _mm_prefetch((const char*)(p.q + ahead + d), _MM_HINT_T0);
      }
      if (low + at + i < high)
        rotated<H>(p, p.k + token * p.stride + item.head * H, token, rows + i * H);
      else
        std::memset(rows + i * H, 0, H * sizeof(bf16));
    }
    for (int d = 0; d < H; d += PAIRS, keys += TILE) transpose_pairs(rows + d, H, keys);
  }
  for (int at = 0; at < padded; at += 2 * ROWS, values += TILE * (H / 16))
    for (int i = 0; i < ROWS; i++)
      for (int d = 0; d < H; d += PAIRS) {
        __m512i row[2];
        for (int j = 0; j < 2; j++) {
          const int key = low + at + 2 * i + j;
          row[j] = _mm512_setzero_si512();
          if (key < high) row[j] = _mm512_loadu_si512(p.v + (item.start + key) * p.stride + item.head * H + d);
        }
        bf16* to = values + d / 16 * TILE + i * PAIRS;
        _mm512_storeu_si512(to, _mm512_permutex2var_epi16(row[0], lower, row[1]));
        _mm512_storeu_si512(to + TILE, _mm512_permutex2var_epi16(row[0], upper, row[1]));
      }
}

// Lanes of the vector at `j` that lie in [from, to).
inline __mmask16 lanes(int j, int from, int to) { return first(to - j) & (__mmask16)~first(from - j); }

inline float largest(const float* scores, int from, int to) {
  __m512 high = _mm512_set1_ps(-INFINITY);
  int j = from & ~15;
  if (j < from) high = _mm512_mask_max_ps(high, lanes(j, from, to), high, _mm512_loadu_ps(scores + j)), j += 16;
  for (; j + 16 <= to; j += 16) high = _mm512_max_ps(high, _mm512_loadu_ps(scores + j));
  if (j < to) high = _mm512_mask_max_ps(high, lanes(j, from, to), high, _mm512_loadu_ps(scores + j));
  return _mm512_reduce_max_ps(high);
}

// weights[0:width] = 2^(scores * scale - top) within [from, to), 0 elsewhere; their sum is added to `sum`.
inline void weigh(const float* scores, bf16* weights, int from, int to, int width, float scale, float top, __m512& sum) {
  const __m512 factor = _mm512_set1_ps(scale), shift = _mm512_set1_ps(-top);
  const int begin = from & ~15, end = (to + 15) & ~15;
  for (int j = 0; j < begin; j += 16) _mm256_store_si256((__m256i*)(weights + j), _mm256_setzero_si256());
  for (int j = begin; j < end; j += 16) {
    __m512 w = exp2_ps(_mm512_fmadd_ps(_mm512_loadu_ps(scores + j), factor, shift));
    if (j < from || j + 16 > to) w = _mm512_maskz_mov_ps(lanes(j, from, to), w);
    sum = _mm512_add_ps(sum, w);
    store(weights + j, w);
  }
  for (int j = end; j < width; j += 16) _mm256_store_si256((__m256i*)(weights + j), _mm256_setzero_si256());
}

template <int H, class Products>
void attend_item(const Attention& p, const Item& item, std::vector<bf16>& space) {
  const bool local = p.window >= 0;
  const int low = local ? std::max(0, item.begin - p.window) & ~31 : 0;
  const int high = local ? (int)std::min<int64_t>(item.length, (int64_t)item.end + p.window) : item.length;
  const int padded = (high - low + 31) & ~31;
  const size_t need = (size_t)2 * padded * H + 32;
  if (space.size() < need) space.resize(need);
  bf16* keys = (bf16*)(((uintptr_t)space.data() + 63) & ~(uintptr_t)63);
  bf16* values = keys + (size_t)padded * H;
  pack_keys<H>(p, item, low, high, padded, keys, values);

  constexpr int BLOCK = Products::BLOCK;
  constexpr int SCORES = BLOCK + 16, WEIGHTS = BLOCK + 32;  // no powers of two: rows would share places in L1
  alignas(64) float scores[QUERIES * SCORES], out[QUERIES * H];
  alignas(64) bf16 weights[QUERIES * WEIGHTS], queries[QUERIES * H];
  const float scale = LOG2E / std::sqrt((float)H);
  for (int query = item.begin; query < item.end; query += QUERIES) {
    const int rows = std::min(QUERIES, item.end - query);
    if (rows < QUERIES) {
      std::memset(queries, 0, sizeof queries);
      std::memset(weights, 0, sizeof weights);
    }
    for (int r = 0; r < rows; r++) {
      const int64_t token = item.start + query + r;
      rotated<H>(p, p.q + token * p.stride + item.head * H, token, queries + r * H);
    }
    // Places of keys are counted from `low` from here on.
    const int begin = local ? (std::max(0, query - p.window) & ~31) - low : 0;
    const int end = (local ? std::min(item.length, query + rows + p.window) : item.length) - low;
    float top[QUERIES];
    __m512 sum[QUERIES];
    for (int r = 0; r < QUERIES; r++) top[r] = -INFINITY, sum[r] = _mm512_setzero_ps();
    for (int at = begin; at < end; at += BLOCK) {
      const int width = std::min(BLOCK, (end - at + 31) & ~31);
      const bool fresh = at == begin;
      Products::product(queries, H, keys + (size_t)at * H, TILE, H / PAIRS * TILE, H / PAIRS, scores, SCORES,
                        width / 16, false, rows);
      // The running softmax (arXiv 1805.02867), in passes over all rows, so that no row waits for another's maximum.
      int from[QUERIES], to[QUERIES];
      float high[QUERIES];
      for (int r = 0; r < rows; r++) {
        const int q = query + r - low;
        from[r] = local ? std::min(width, std::max(0, q - p.window - at)) : 0;
        to[r] = std::max(from[r], std::min(width, (local ? std::min(end, q + p.window + 1) : end) - at));
        high[r] = largest(scores + r * SCORES, from[r], to[r]) * scale;
      }
      for (int r = 0; r < rows; r++) {
        if (high[r] <= top[r]) continue;
        if (!fresh) {
          const __m512 shrink = exp2_ps(_mm512_set1_ps(top[r] - high[r]));
          sum[r] = _mm512_mul_ps(sum[r], shrink);
          for (int d = 0; d < H; d += 16)
            _mm512_store_ps(out + r * H + d, _mm512_mul_ps(_mm512_load_ps(out + r * H + d), shrink));
        }
        top[r] = high[r];
      }
      for (int r = 0; r < rows; r++)
        weigh(scores + r * SCORES, weights + r * WEIGHTS, from[r], to[r], width, scale, top[r], sum[r]);
      Products::product(weights, WEIGHTS, values + (size_t)at * H, H / 16 * TILE, TILE, width / PAIRS, out, H, H / 16,
                        !fresh, rows);
    }
    for (int r = 0; r < rows; r++) {
      const __m512 share = _mm512_set1_ps(1.f / _mm512_reduce_add_ps(sum[r]));
      bf16* to = p.out + ((int64_t)(item.start + query + r) * p.heads + item.head) * H;
      for (int d = 0; d < H; d += 16) store(to + d, _mm512_mul_ps(_mm512_loadu_ps(out + r * H + d), share));
    }
  }
}

template <int H, class Products>
void attend_items(const Attention& p, const std::vector<Item>& items, int threads) {
#pragma omp parallel num_threads(threads)
  {
    thread_local std::vector<bf16> space;
    Products::begin();
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < items.size(); i++) attend_item<H, Products>(p, items[i], space);
    Products::end();
  }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Whether Linux lets this process use AMX; asked once, before any thread uses a tile.
int nightloom_request_amx() {
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

// Attention within each of `sequences` sequences, cu_seqlens (sequences + 1); see struct Attention. H is 32 or 64; `tiles`: whether
// to use AMX.
void nightloom_attend(const bf16* q, const bf16* k, const bf16* v, bf16* out, int64_t stride, const float* cos,
                      const float* sin, int64_t table_stride, const int32_t* cu_seqlens, int sequences, int heads,
                      int head_size, int window, int tiles, int threads) {
  const Attention p = {q, k, v, out, cos, sin, stride, table_stride, heads, window};
  const int64_t tokens = cu_seqlens[sequences];
  // Items of a few hundred queries where there is a window; where there is none, keys are packed once for each item,
  // so that items are as large as they can be with several for each thread.
  const int64_t share = tokens * heads / (8 * (int64_t)threads);
  const int queries = window >= 0 ? 256 : (int)std::max<int64_t>(256, (share + 15) & ~15);
  std::vector<Item> items;
  for (int s = 0; s < sequences; s++) {
    const int start = cu_seqlens[s], length = cu_seqlens[s + 1] - start;
    for (int begin = 0; begin < length; begin += queries)
      for (int head = 0; head < heads; head++)
        items.push_back({start, length, begin, std::min(length, begin + queries), head});
  }
  if (window < 0)  // the costly first, so that no thread is left with one at the end
    std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) {
      return (int64_t)(a.end - a.begin) * a.length > (int64_t)(b.end - b.begin) * b.length;
    });
  if (tiles)
    head_size == 64 ? attend_items<64, OnTiles>(p, items, threads) : attend_items<32, OnTiles>(p, items, threads);
  else
    head_size == 64 ? attend_items<64, OnVectors>(p, items, threads) : attend_items<32, OnVectors>(p, items, threads);
}

}  // extern "C"
