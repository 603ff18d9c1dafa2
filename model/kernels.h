// What the kernels share: bfloat16 in and out of registers, masks, a fast exponential, GELU, shares of threads.
#pragma once

#include <immintrin.h>
#include <omp.h>

#include <cstdint>

namespace {

using bf16 = uint16_t;

constexpr float LOG2E = 1.44269504088896341f;

inline __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline __m512 load(const bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
inline void store(bf16* p, __m512 x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x)); }
inline __mmask16 first(int n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }

// 2^x with a relative error under 4e-6, far below a rounding to bfloat16; 0 for -inf.
inline __m512 exp2_ps(__m512 x) {
  const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);  // x - floor(x), in [0, 1)
  __m512 p = _mm512_set1_ps(1.3534167e-2f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.2011464e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4144275e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9300383e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0000026f));
  return _mm512_scalef_ps(p, x);  // p * 2^floor(x)
}

// GELU by the error function: Abramowitz and Stegun 7.1.26, absolute error of erf 1.5e-7. `share` is the normal
// distribution's: gelu(x) = x share(x).
struct Gelu {
  __m512 share, exponential;  // the second is e^(-x^2 / 2)
};

inline Gelu gelu_parts(__m512 x) {
  const __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.70710678f));
  const __m512 d = _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), _mm512_set1_ps(1.f));
  __m512 t = _mm512_rcp14_ps(d);
  t = _mm512_mul_ps(t, _mm512_fnmadd_ps(d, t, _mm512_set1_ps(2.f)));  // one step of Newton
  __m512 p = _mm512_set1_ps(1.061405429f);
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.453152027f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.421413741f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.284496736f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.254829592f));
  const __m512 e = exp2_ps(_mm512_mul_ps(_mm512_mul_ps(z, z), _mm512_set1_ps(-LOG2E)));
  const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(p, t), e);  // 1 - erf(|x| / sqrt 2)
  const __mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
  const __m512 twice = _mm512_mask_sub_ps(tail, positive, _mm512_set1_ps(2.f), tail);
  return {_mm512_mul_ps(_mm512_set1_ps(0.5f), twice), e};
}

// Rows [begin, end) of `rows` for this thread.
inline void share_of_thread(int64_t rows, int64_t& begin, int64_t& end) {
  const int64_t n = omp_get_num_threads(), i = omp_get_thread_num();
  begin = rows * i / n;
  end = rows * (i + 1) / n;
}

}  // namespace
