// The backward pass of attention for x86 processors with AVX-512 and bfloat16 (see kernels_attention.h for names and
// layouts), as FlashAttention has it (arXiv 2307.08691): scores are computed again from queries, keys and what the
// forward pass kept of each softmax, and no matrix of queries by keys is ever whole.
//
// With weights P = softmax(Q K^T / sqrt(H)) and the gradient dO of the output O = P V:
//
//   dV = P^T dO,  dP = dO V^T,  dS = P * (dP - rowsum(dO * O)),  dQ = dS K / sqrt(H),  dK = dS^T Q / sqrt(H)

#include <omp.h>

#include <memory>
#include <vector>

#include "kernels_attention.h"

namespace {

constexpr int KEYS = 512;   // keys that are packed at a time, for all queries that see them: they stay in L2
constexpr int BLOCK = 128;  // keys of a block of scores, which stay in L1
constexpr int SCORES = BLOCK + 16, WEIGHTS = BLOCK + 32;  // no powers of two: rows would share places in L1

struct Gradients {
  const bf16* out;     // (T, N, H): of the output
  bf16 *q, *k, *v;     // to be written; token t, head n at q + t * stride + n * H
  int64_t stride;
};

struct Item {
  int start, length, head;  // a sequence's first token and length; a head
};

// One thread's memory, which grows to what its longest sequence needs.
class Space {
 public:
  // Room for everything below, for `rows` queries of H and KEYS keys.
  template <int H>
  void reserve(int rows) {
    const size_t bytes = (size_t)rows * H * (4 * sizeof(bf16) + sizeof(float)) + (size_t)rows * 2 * sizeof(float) +
                         (size_t)KEYS * H * (3 * sizeof(bf16) + 2 * sizeof(float)) + 64;
    if (bytes > size) memory.reset(new char[size = bytes]);
    char* at = (char*)(((uintptr_t)memory.get() + 63) & ~(uintptr_t)63);
    const auto take = [&](auto*& pointer, size_t count) {
      pointer = (std::remove_reference_t<decltype(pointer)>)at;
      at += count * sizeof *pointer;
    };
    for (bf16** pointer : {&queries, &query_rows, &outs, &out_rows}) take(*pointer, (size_t)rows * H);
    take(d_queries, (size_t)rows * H);
    for (bf16** pointer : {&key_columns, &value_columns, &key_rows}) take(*pointer, (size_t)KEYS * H);
    for (float** pointer : {&d_keys, &d_values}) take(*pointer, (size_t)KEYS * H);
    for (float** pointer : {&normalizers, &shares}) take(*pointer, rows);
  }

  bf16 *queries, *outs;                             // turned queries and dO, row after row
  bf16 *query_rows, *out_rows;                      // the same in tiles, to be multiplied as rows
  bf16 *key_columns, *value_columns, *key_rows;     // turned keys and values in tiles
  float *d_queries, *d_keys, *d_values;
  float *normalizers, *shares;                      // of each query: the softmax's, and rowsum(dO * O)

 private:
  std::unique_ptr<char[]> memory;
  size_t size = 0;
};

// Queries of an item and what belongs to them, zeros from `length` up to a multiple of QUERIES.
template <int H>
void pack_queries(const Attention& p, const Gradients& g, const Item& item, Space& s) {
  const int padded = (item.length + QUERIES - 1) & ~(QUERIES - 1);
  for (int i = 0; i < padded; i++) {
    bf16 *query = s.queries + (size_t)i * H, *out = s.outs + (size_t)i * H;
    s.normalizers[i] = s.shares[i] = 0;
    if (i >= item.length) {
      std::memset(query, 0, H * sizeof(bf16));
      std::memset(out, 0, H * sizeof(bf16));
      continue;
    }
    const int64_t token = item.start + i, place = token * p.heads + item.head;
    rotated<H>(p, p.q + token * p.stride + item.head * H, token, query);
    std::memcpy(out, g.out + place * H, H * sizeof(bf16));
    __m512 sum = _mm512_setzero_ps();
    for (int d = 0; d < H; d += 16) sum = _mm512_fmadd_ps(load(out + d), load(p.out + place * H + d), sum);
    s.normalizers[i] = p.normalizers[place];
    s.shares[i] = _mm512_reduce_add_ps(sum);
  }
  for (int i = 0; i < padded; i += 2) {
    const size_t at = (size_t)(i & ~31) * H + i % 32 / 2 * PAIRS;
    as_rows<H>(s.queries + (size_t)i * H, s.queries + (size_t)(i + 1) * H, s.query_rows + at);
    as_rows<H>(s.outs + (size_t)i * H, s.outs + (size_t)(i + 1) * H, s.out_rows + at);
  }
  std::memset(s.d_queries, 0, (size_t)padded * H * sizeof(float));
}

// Keys [first, last) of an item, zeros up to a multiple of 32.
template <int H>
void pack_keys(const Attention& p, const Item& item, int first, int last, Space& s) {
  alignas(64) bf16 keys[2 * ROWS * H], values[2 * ROWS * H];
  for (int at = 0; first + at < last; at += 2 * ROWS) {
    for (int i = 0; i < 2 * ROWS; i++) {
      const int64_t token = item.start + first + at + i;
      if (first + at + i < last) {
        rotated<H>(p, p.k + token * p.stride + item.head * H, token, keys + i * H);
        std::memcpy(values + i * H, p.v + token * p.stride + item.head * H, H * sizeof(bf16));
      } else {
        std::memset(keys + i * H, 0, H * sizeof(bf16));
        std::memset(values + i * H, 0, H * sizeof(bf16));
      }
    }
    for (int half = 0; half < 2 * ROWS; half += ROWS) {
      as_columns<H>(keys + half * H, s.key_columns + (size_t)(at + half) * H);
      as_columns<H>(values + half * H, s.value_columns + (size_t)(at + half) * H);
    }
    for (int i = 0; i < 2 * ROWS; i += 2)
      as_rows<H>(keys + i * H, keys + (i + 1) * H, s.key_rows + (size_t)at * H + i / 2 * PAIRS);
  }
  const size_t padded = (last - first + 31) & ~31;
  std::memset(s.d_keys, 0, padded * H * sizeof(float));
  std::memset(s.d_values, 0, padded * H * sizeof(float));
}

// One row of scores and of dP to P and dS, within [from, to); 0 elsewhere.
inline void slopes(const float* scores, const float* d_weights, bf16* weights, bf16* d_scores, int from, int to,
                   int width, float scale, float normalizer, float share) {
  const __m512 factor = _mm512_set1_ps(scale), shift = _mm512_set1_ps(-normalizer), less = _mm512_set1_ps(share);
  for (int j = 0; j < width; j += 16) {
    const __mmask16 seen = lanes(j, from, to);
    const __m512 w = exp2_ps(_mm512_fmadd_ps(_mm512_loadu_ps(scores + j), factor, shift));
    const __m512 d = _mm512_mul_ps(w, _mm512_sub_ps(_mm512_loadu_ps(d_weights + j), less));
    store(weights + j, _mm512_maskz_mov_ps(seen, w));
    store(d_scores + j, _mm512_maskz_mov_ps(seen, d));
  }
}

// 32 rows of `width` values, the columns as rows of 32.
inline void transpose_block(const bf16* in, int width, bf16* out) {
  alignas(64) bf16 pairs[TILE];
  for (int j = 0; j < width; j += ROWS, out += ROWS * QUERIES) {
    for (int i = 0; i < ROWS; i++) {
      const __m256i even = _mm256_loadu_si256((const __m256i*)(in + 2 * i * WEIGHTS + j));
      const __m256i odd = _mm256_loadu_si256((const __m256i*)(in + (2 * i + 1) * WEIGHTS + j));
      const __m512i both = _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
      _mm512_store_si512(pairs + i * PAIRS, both);
    }
    transpose_pairs(pairs, PAIRS, out);
  }
}

// `rows` rows of H times `factor`, turned back by the positions of their tokens if `turn`.
template <int H>
void write_rows(const Attention& p, const Item& item, int first, int rows, const float* from, float factor, bool turn,
                bf16* to, int64_t stride) {
  const __m512 f = _mm512_set1_ps(factor);
  for (int i = 0; i < rows; i++, from += H) {
    const int64_t token = item.start + first + i;
    bf16* out = to + token * stride + item.head * H;
    for (int d = 0; d < H / 2; d += 16) {
      const __m512 low = _mm512_mul_ps(_mm512_loadu_ps(from + d), f);
      const __m512 high = _mm512_mul_ps(_mm512_loadu_ps(from + d + H / 2), f);
      if (!turn || !p.cos) {
        store(out + d, low);
        store(out + d + H / 2, high);
        continue;
      }
      const __m512 c = _mm512_loadu_ps(p.cos + token * p.table_stride + d);
      const __m512 s = _mm512_loadu_ps(p.sin + token * p.table_stride + d);
      store(out + d, _mm512_fmadd_ps(high, s, _mm512_mul_ps(low, c)));
      store(out + d + H / 2, _mm512_fnmadd_ps(low, s, _mm512_mul_ps(high, c)));
    }
  }
}

template <int H, class Products>
void gradients_of_item(const Attention& p, const Gradients& g, const Item& item, Space& s) {
  s.reserve<H>((item.length + QUERIES - 1) & ~(QUERIES - 1));
  pack_queries<H>(p, g, item, s);
  alignas(64) float scores[QUERIES * SCORES], d_weights[QUERIES * SCORES];
  alignas(64) bf16 weights[QUERIES * WEIGHTS], d_scores[QUERIES * WEIGHTS];
  alignas(64) bf16 weights_across[BLOCK * QUERIES], d_scores_across[BLOCK * QUERIES];
  const float root = 1 / std::sqrt((float)H);
  for (int first = 0; first < item.length; first += KEYS) {
    const int last = std::min(item.length, first + KEYS);
    pack_keys<H>(p, item, first, last, s);
    // Queries that see a key of these: from first - ahead to last - 1 + back.
    const int end_queries = std::min(item.length, last + p.back);
    for (int query = std::max(0, first - p.ahead) & ~(QUERIES - 1); query < end_queries; query += QUERIES) {
      const int rows = std::min(QUERIES, item.length - query);
      if (rows < QUERIES) {
        std::memset(weights, 0, sizeof weights);
        std::memset(d_scores, 0, sizeof d_scores);
      }
      // Places of keys are counted from `first` from here on.
      const int begin = (std::max(first, query - p.back) - first) & ~31;
      const int end = std::min(last, query + rows + p.ahead) - first;
      const bf16 *left = s.queries + (size_t)query * H, *d_left = s.outs + (size_t)query * H;
      for (int at = begin; at < end; at += BLOCK) {
        const int width = std::min(BLOCK, (end - at + 31) & ~31);
        const size_t place = (size_t)at * H;
        Products::product(left, H, s.key_columns + place, TILE, H / PAIRS * TILE, H / PAIRS, scores, SCORES, width / 16,
                          false, rows);
        Products::product(d_left, H, s.value_columns + place, TILE, H / PAIRS * TILE, H / PAIRS, d_weights, SCORES,
                          width / 16, false, rows);
        for (int r = 0; r < rows; r++) {
          const int q = query + r - first - at;
          const int from = std::min(width, std::max(0, q - p.back));
          const int to = std::max(from, std::min({width, end - at, q + p.ahead + 1}));
          slopes(scores + r * SCORES, d_weights + r * SCORES, weights + r * WEIGHTS, d_scores + r * WEIGHTS, from, to,
                 width, LOG2E * root, s.normalizers[query + r], s.shares[query + r]);
        }
        Products::product(d_scores, WEIGHTS, s.key_rows + place, H / 16 * TILE, TILE, width / PAIRS,
                          s.d_queries + (size_t)query * H, H, H / 16, true, rows);
        transpose_block(weights, width, weights_across);
        transpose_block(d_scores, width, d_scores_across);
        for (int j = 0; j < width; j += QUERIES) {
          const size_t key = (size_t)(at + j) * H;
          Products::product(weights_across + j * QUERIES, QUERIES, s.out_rows + (size_t)query * H, 0, TILE, 1,
                            s.d_values + key, H, H / 16, true, QUERIES);
          Products::product(d_scores_across + j * QUERIES, QUERIES, s.query_rows + (size_t)query * H, 0, TILE, 1,
                            s.d_keys + key, H, H / 16, true, QUERIES);
        }
      }
    }
    write_rows<H>(p, item, first, last - first, s.d_keys, root, true, g.k, g.stride);
    write_rows<H>(p, item, first, last - first, s.d_values, 1, false, g.v, g.stride);
  }
  write_rows<H>(p, item, 0, item.length, s.d_queries, root, true, g.q, g.stride);
}

template <int H, class Products>
void gradients_of_items(const Attention& p, const Gradients& g, const std::vector<Item>& items, int threads) {
#pragma omp parallel num_threads(threads)
  {
    thread_local Space space;
    Products::begin();
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < items.size(); i++) gradients_of_item<H, Products>(p, g, items[i], space);
    Products::end();
  }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// The gradients of queries, keys and values (as `stride` of `gradient_stride` has them) from that of the output, (T, N, H).
// The rest as for `nightloom_attend`, with its `out` and `normalizers`. One thread has all queries of a sequence's head.
void nightloom_attend_backward(const bf16* q, const bf16* k, const bf16* v, const bf16* out, const float* normalizers,
                               int64_t stride, const float* cos, const float* sin, int64_t table_stride,
                               const int32_t* cu_seqlens, int sequences, int heads, int head_size, int back, int ahead,
                               int tiles, int threads, const bf16* d_out, bf16* d_q, bf16* d_k, bf16* d_v,
                               int64_t gradient_stride) {
  back = bound(back), ahead = bound(ahead);
  const Attention p = {q,   k,      v,            (bf16*)out, (float*)normalizers, cos, sin,
                       stride, table_stride, heads,      back,  ahead};
  const Gradients g = {d_out, d_q, d_k, d_v, gradient_stride};
  std::vector<Item> items;
  for (int s = 0; s < sequences; s++)
    for (int head = 0; head < heads; head++)
      items.push_back({cu_seqlens[s], cu_seqlens[s + 1] - cu_seqlens[s], head});
  // The costly first, so that no thread is left with one at the end.
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.length > b.length; });
  if (tiles)
    head_size == 64 ? gradients_of_items<64, OnTiles>(p, g, items, threads)
                    : gradients_of_items<32, OnTiles>(p, g, items, threads);
  else
    head_size == 64 ? gradients_of_items<64, OnVectors>(p, g, items, threads)
                    : gradients_of_items<32, OnVectors>(p, g, items, threads);
}

}  // extern "C"
