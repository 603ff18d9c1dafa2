// Attention for x86 processors with AVX-512 and bfloat16 (see kernels_attention.h for names and layouts).

#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <vector>

#include "kernels_attention.h"

namespace {

struct Item {
  int start, length, begin, end, head;  // a sequence's first token and length; queries [begin, end) of it; a head
};

// Keys [low, high) of an item, zeros up to `padded`, in the tiles in which they are multiplied: keys as columns, values
// as rows.
template <int H>
void pack_keys(const Attention& p, const Item& item, int low, int high, int padded, bf16* keys, bf16* values) {
  alignas(64) bf16 rows[ROWS * H];
  for (int at = 0; at < padded; at += ROWS, keys += ROWS * H) {
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
    as_columns<H>(rows, keys);
  }
  const bf16* first = p.v + item.start * p.stride + item.head * H;
  for (int at = low; at < low + padded; at += 2 * ROWS, values += 2 * ROWS * H)
    for (int i = 0; i < ROWS; i++) {
      const int key = at + 2 * i;
      as_rows<H>(key < high ? first + key * p.stride : nullptr, key + 1 < high ? first + (key + 1) * p.stride : nullptr,
                 values + i * PAIRS);
    }
}

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
  const int low = std::max(0, item.begin - p.back) & ~31, high = std::min(item.length, item.end + p.ahead);
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
    const int begin = (std::max(0, query - p.back) & ~31) - low;
    const int end = std::min(item.length, query + rows + p.ahead) - low;
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
        from[r] = std::min(width, std::max(0, q - p.back - at));
        to[r] = std::max(from[r], std::min(width, std::min(end, q + p.ahead + 1) - at));
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
      const float total = _mm512_reduce_add_ps(sum[r]);
      const __m512 share = _mm512_set1_ps(1.f / total);
      const int64_t place = (int64_t)(item.start + query + r) * p.heads + item.head;
      if (p.normalizers) p.normalizers[place] = top[r] + std::log2(total);
      bf16* to = p.out + place * H;
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

// Attention within each of `sequences` sequences, cu_seqlens (sequences + 1); see struct Attention, where negative
// `back` and `ahead` are without a bound. H is 32 or 64; `tiles`: whether to use AMX.
void nightloom_attend(const bf16* q, const bf16* k, const bf16* v, bf16* out, float* normalizers, int64_t stride,
                      const float* cos, const float* sin, int64_t table_stride, const int32_t* cu_seqlens,
                      int sequences, int heads, int head_size, int back, int ahead, int tiles, int threads) {
  back = bound(back), ahead = bound(ahead);
  const Attention p = {q, k, v, out, normalizers, cos, sin, stride, table_stride, heads, back, ahead};
  const int64_t tokens = cu_seqlens[sequences];
  // Items of a few hundred queries where there is a window; where there is none, keys are packed once for each item,
  // so that items are as large as they can be with several for each thread.
  const int64_t share = tokens * heads / (8 * (int64_t)threads);
  const int queries = back < UNBOUNDED ? 256 : (int)std::max<int64_t>(256, (share + 15) & ~15);
  std::vector<Item> items;
  for (int s = 0; s < sequences; s++) {
    const int start = cu_seqlens[s], length = cu_seqlens[s + 1] - start;
    for (int begin = 0; begin < length; begin += queries)
      for (int head = 0; head < heads; head++)
        items.push_back({start, length, begin, std::min(length, begin + queries), head});
  }
  if (back == UNBOUNDED)  // the costly first, so that no thread is left with one at the end
    std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) {
      return (int64_t)(a.end - a.begin) * a.length > (int64_t)(b.end - b.begin) * b.length;
    });
  if (tiles)
    head_size == 64 ? attend_items<64, OnTiles>(p, items, threads) : attend_items<32, OnTiles>(p, items, threads);
  else
    head_size == 64 ? attend_items<64, OnVectors>(p, items, threads) : attend_items<32, OnVectors>(p, items, threads);
}

}  // extern "C"
