// Kernels for x86 processors with AVX-512 and bfloat16: what stands between matrix products. Plain C symbols,
// raw pointers, OpenMP: no header of PyTorch is needed, so the library fits any version of it. model/kernels.py loads it
// and says when it may be called; where it may not, the same arithmetic runs in PyTorch. Attention is in
// files of its own, and so are backward passes.

#include <omp.h>

#include <cmath>
#include <cstring>

#include "kernels.h"

#pragma GCC visibility push(default)
extern "C" {

// x (rows, width) float32 += added (rows, width) bfloat16 (null: nothing); out = layer_norm(x) weight + bias (null:
// none) in bfloat16. `width` is a multiple of 16.
void nightloom_add_norm(float* x, const bf16* added, const float* weight, const float* bias, float eps, bf16* out,
                        int64_t rows, int width, int threads) {
#pragma omp parallel num_threads(threads)
  {
    int64_t begin, end;
    share_of_thread(rows, begin, end);
    for (int64_t row = begin; row < end; row++) {
      float* at = x + row * width;
      __m512 total = _mm512_setzero_ps();
      for (int d = 0; d < width; d += 16) {
        __m512 value = _mm512_loadu_ps(at + d);
        if (added) {
          value = _mm512_add_ps(value, load(added + row * width + d));
          _mm512_storeu_ps(at + d, value);
        }
        total = _mm512_add_ps(total, value);
      }
      const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(total) / width);
      __m512 squares = _mm512_setzero_ps();
      for (int d = 0; d < width; d += 16) {
        const __m512 value = _mm512_sub_ps(_mm512_loadu_ps(at + d), mean);
        squares = _mm512_fmadd_ps(value, value, squares);
      }
      const __m512 scale = _mm512_set1_ps(1.f / std::sqrt(_mm512_reduce_add_ps(squares) / width + eps));
      for (int d = 0; d < width; d += 16) {
        const __m512 factor = _mm512_mul_ps(scale, _mm512_loadu_ps(weight + d));
        const __m512 offset = bias ? _mm512_loadu_ps(bias + d) : _mm512_setzero_ps();
        store(out + row * width + d, _mm512_fmadd_ps(_mm512_sub_ps(_mm512_loadu_ps(at + d), mean), factor, offset));
      }
    }
  }
}

// out (rows, width) = gelu(x[:, :width]) x[:, width:], bfloat16; `width` is a multiple of 16.
void nightloom_geglu(const bf16* x, bf16* out, int64_t rows, int width, int threads) {
#pragma omp parallel num_threads(threads)
  {
    int64_t begin, end;
    share_of_thread(rows, begin, end);
    for (int64_t row = begin; row < end; row++)
      for (int d = 0; d < width; d += 16) {
        const bf16* at = x + 2 * row * width + d;
        const __m512 value = load(at);
        store(out + row * width + d, _mm512_mul_ps(_mm512_mul_ps(value, gelu_parts(value).share), load(at + width)));
      }
  }
}

// Each row of x (rows, width) bfloat16 as int8: out = round(x / scale), scale = largest size of the row / 127. A row with
// a NaN or an infinity gets a scale that is neither finite, so that what is made of it shows. `width` is a multiple of 32.
void nightloom_quantize_rows(const bf16* x, int8_t* out, float* scales, int64_t rows, int width, int threads) {
#pragma omp parallel num_threads(threads)
  {
    int64_t begin, end;
    share_of_thread(rows, begin, end);
    const __m512i size = _mm512_set1_epi16(0x7fff);
    for (int64_t row = begin; row < end; row++) {
      const bf16* at = x + row * width;
      __m512i high = _mm512_setzero_si512();  // as bits: larger numbers have larger bits, and NaN the largest
      for (int d = 0; d < width; d += 32)
        high = _mm512_max_epu16(high, _mm512_and_si512(_mm512_loadu_si512(at + d), size));
      const __m512i halves = _mm512_max_epu32(_mm512_slli_epi32(high, 16), _mm512_and_si512(high, _mm512_set1_epi32(0xffff0000)));
      const uint32_t bits = _mm512_reduce_max_epu32(halves);
      float largest;
      std::memcpy(&largest, &bits, sizeof largest);
      scales[row] = largest == 0 ? 1.f : largest / 127;
      const __m512 steps = _mm512_set1_ps(1.f / scales[row]);
      for (int d = 0; d < width; d += 16) {
        const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(load(at + d), steps));
        _mm_storeu_si128((__m128i*)(out + row * width + d), _mm512_cvtsepi32_epi8(rounded));
      }
    }
  }
}

// out (rows, width) bfloat16 = sums * row_scales of the row * column_scales of the column. `width` is a multiple of 16.
void nightloom_scale_sums(const int32_t* sums, const float* row_scales, const float* column_scales, bf16* out,
                          int64_t rows, int width, int threads) {
#pragma omp parallel num_threads(threads)
  {
    int64_t begin, end;
    share_of_thread(rows, begin, end);
    for (int64_t row = begin; row < end; row++) {
      const __m512 scale = _mm512_set1_ps(row_scales[row]);
      for (int d = 0; d < width; d += 16) {
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_loadu_si512(sums + row * width + d));
        store(out + row * width + d, _mm512_mul_ps(_mm512_mul_ps(sum, scale), _mm512_loadu_ps(column_scales + d)));
      }
    }
  }
}

}  // extern "C"
