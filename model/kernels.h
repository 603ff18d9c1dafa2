// What the kernels share: bfloat16 in and out of registers, masks, a fast exponential.
#pragma once

#include <immintrin.h>

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

}  // namespace
