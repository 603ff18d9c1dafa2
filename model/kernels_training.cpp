// What training does between matrix products, for x86 processors with AVX-512 and bfloat16: the backward passes of the
// norm and of GeGLU, and the cross-entropy of logits with its gradient. model/kernels.py and model/differentiable.py
// call it and have the same in PyTorch.

#include <cmath>

#include "kernels.h"

#pragma GCC visibility push(default)
extern "C" {

// Given y = layer_norm(x) weight + bias and the gradient d_y (rows, width) bfloat16 of y: d_x (rows, width) float32 is
// that of x, plus d_rest (null: nothing), and d_added (null: not wanted) the same in bfloat16. Sums over the rows of each
// thread go to d_weight and d_bias (null: no bias), (threads, width) float32, zeros before.
void nightloom_norm_backward(const float* x, const float* weight, float eps, const bf16* d_y, const float* d_rest,
                             float* d_x, bf16* d_added, float* d_weight, float* d_bias, int64_t rows, int width,
                             int threads) {
#pragma omp parallel num_threads(threads)
  {
    int64_t begin, end;
    share_of_thread(rows, begin, end);
    float* weight_sums = d_weight + (int64_t)omp_get_thread_num() * width;
    float* bias_sums = d_bias ? d_bias + (int64_t)omp_get_thread_num() * width : nullptr;
    for (int64_t row = begin; row < end; row++) {
      const float* at = x + row * width;
      const bf16* d_at = d_y + row * width;
      __m512 total = _mm512_setzero_ps();
      for (int d = 0; d < width; d += 16) total = _mm512_add_ps(total, _mm512_loadu_ps(at + d));
      const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(total) / width);
      // Sums of squares, of the gradient before the scale, and of it times the centred value.
      __m512 squares = _mm512_setzero_ps(), slopes = _mm512_setzero_ps(), products = _mm512_setzero_ps();
      for (int d = 0; d < width; d += 16) {
        const __m512 value = _mm512_sub_ps(_mm512_loadu_ps(at + d), mean);
        const __m512 slope = _mm512_mul_ps(load(d_at + d), _mm512_loadu_ps(weight + d));
        squares = _mm512_fmadd_ps(value, value, squares);
        slopes = _mm512_add_ps(slopes, slope);
        products = _mm512_fmadd_ps(slope, value, products);
      }
      const float scale = 1.f / std::sqrt(_mm512_reduce_add_ps(squares) / width + eps);
      const __m512 factor = _mm512_set1_ps(scale);
      const __m512 level = _mm512_set1_ps(_mm512_reduce_add_ps(slopes) / width);
      const __m512 tilt = _mm512_set1_ps(_mm512_reduce_add_ps(products) / width * scale * scale);
      for (int d = 0; d < width; d += 16) {
        const __m512 value = _mm512_sub_ps(_mm512_loadu_ps(at + d), mean), given = load(d_at + d);
        const __m512 slope = _mm512_fmsub_ps(given, _mm512_loadu_ps(weight + d), level);
        __m512 gradient = _mm512_mul_ps(_mm512_fnmadd_ps(value, tilt, slope), factor);
        if (d_rest) gradient = _mm512_add_ps(gradient, _mm512_loadu_ps(d_rest + row * width + d));
        _mm512_storeu_ps(d_x + row * width + d, gradient);
        if (d_added) store(d_added + row * width + d, gradient);
        const __m512 normed = _mm512_mul_ps(value, factor);
        _mm512_storeu_ps(weight_sums + d, _mm512_fmadd_ps(given, normed, _mm512_loadu_ps(weight_sums + d)));
        if (bias_sums) _mm512_storeu_ps(bias_sums + d, _mm512_add_ps(given, _mm512_loadu_ps(bias_sums + d)));
      }
    }
  }
}

// d_x (rows, 2 width) of gelu(x[:, :width]) x[:, width:], whose gradient is d_out (rows, width); all bfloat16.
void nightloom_geglu_backward(const bf16* x, const bf16* d_out, bf16* d_x, int64_t rows, int width, int threads) {
#pragma omp parallel num_threads(threads)
  {
    int64_t begin, end;
    share_of_thread(rows, begin, end);
    const __m512 density = _mm512_set1_ps(0.39894228f);  // 1 / sqrt(2 pi)
    for (int64_t row = begin; row < end; row++)
      for (int d = 0; d < width; d += 16) {
        const int64_t place = 2 * row * width + d;
        const __m512 value = load(x + place), gate = load(x + place + width), given = load(d_out + row * width + d);
        const Gelu parts = gelu_parts(value);
        const __m512 slope = _mm512_fmadd_ps(_mm512_mul_ps(value, density), parts.exponential, parts.share);
        store(d_x + place, _mm512_mul_ps(_mm512_mul_ps(given, gate), slope));
        store(d_x + place + width, _mm512_mul_ps(given, _mm512_mul_ps(value, parts.share)));
      }
  }
}

// For each row of logits (rows, width) bfloat16: losses = log(sum of e^logit) - logit of the target, log_z = that
// logarithm, correct = whether no logit is above the target's. If `learning`, the logits are replaced by the gradient of
// loss + z_weight log_z^2: p (1 + 2 z_weight log_z) - (1 at the target). Any width.
void nightloom_cross_entropy(bf16* logits, const int64_t* targets, float* losses, float* log_z, uint8_t* correct,
                             int64_t rows, int width, float z_weight, int learning, int threads) {
#pragma omp parallel num_threads(threads)
  {
    int64_t begin, end;
    share_of_thread(rows, begin, end);
    const __m512 log2e = _mm512_set1_ps(LOG2E);
    for (int64_t row = begin; row < end; row++) {
      bf16* at = logits + row * width;
      const int whole = width & ~15;
      const __mmask16 rest = first(width - whole);
      const __m512 tail = widen(_mm256_maskz_loadu_epi16(rest, at + whole));
      __m512 high = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), rest, tail);
      for (int d = 0; d < whole; d += 16) high = _mm512_max_ps(high, load(at + d));
      const float top = _mm512_reduce_max_ps(high);
      __m512 shift = _mm512_set1_ps(-top * LOG2E), sum = _mm512_setzero_ps();
      for (int d = 0; d < whole; d += 16) sum = _mm512_add_ps(sum, exp2_ps(_mm512_fmadd_ps(load(at + d), log2e, shift)));
      sum = _mm512_mask_add_ps(sum, rest, sum, exp2_ps(_mm512_fmadd_ps(tail, log2e, shift)));
      const float z = top + std::log(_mm512_reduce_add_ps(sum));
      const int64_t target = targets[row];
      float chosen;
      const uint32_t bits = (uint32_t)at[target] << 16;
      __builtin_memcpy(&chosen, &bits, sizeof chosen);
      losses[row] = z - chosen;
      log_z[row] = z;
      correct[row] = chosen >= top;
      if (!learning) continue;
      const float factor = 1 + 2 * z_weight * z;
      const __m512 times = _mm512_set1_ps(factor);
      shift = _mm512_set1_ps(-z * LOG2E);
      for (int d = 0; d < whole; d += 16)
        store(at + d, _mm512_mul_ps(times, exp2_ps(_mm512_fmadd_ps(load(at + d), log2e, shift))));
      const __m512 last = _mm512_mul_ps(times, exp2_ps(_mm512_fmadd_ps(tail, log2e, shift)));
      _mm256_mask_storeu_epi16(at + whole, rest, (__m256i)_mm512_cvtneps_pbh(last));
      const float slope = factor * std::exp(chosen - z) - 1;
      at[target] = (bf16)_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(slope)), 0);
    }
  }
}

}  // extern "C"
