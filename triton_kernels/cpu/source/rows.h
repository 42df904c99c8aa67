// Products of dense weights as they are on disk, [rows][columns], and float activations, for processors that multiply only
// floats: a copy of weights of 16 bits as floats would take twice the bytes, in memory and for each token.
#pragma once

constexpr int BLOCK = 4;  // rows that are multiplied together

struct Rows {
  const void* weights;
  int32_t type;
  int64_t rows, columns, tokens;
  const float *x, *bias;  // [tokens][columns], [rows] or null
  float* y;               // [tokens][rows]
};

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE TARGET __attribute__((always_inline)) static inline

INLINE __m256 eight_floats(const char* from, int32_t type) {
  if (type == FLOAT32) return _mm256_loadu_ps((const float*)from);
  const __m128i half = _mm_loadu_si128((const __m128i*)from);
  if (type == FLOAT16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
INLINE float one_float(const char* from, int32_t type) {
  char padded[32] = {};
  memcpy(padded, from, item(type));
  return _mm256_cvtss_f32(eight_floats(padded, type));
}
INLINE float sum_of_eight(__m256 a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// R rows times M tokens. Every sum is added up in the same order, whatever R and M.
template <int R, int M>
INLINE void multiply_rows(const Rows& job, int64_t row, int64_t token, int32_t type) {
  const int64_t size = item(type);
  const char* w = (const char*)job.weights + row * job.columns * size;
  const float* x = job.x + token * job.columns;
  __m256 sums[R][M];
  for (auto& one : sums)
    for (auto& sum : one) sum = _mm256_setzero_ps();
  int64_t c = 0;
  for (; c + 8 <= job.columns; c += 8) {
    // The next rows, since some processors fetch nothing beyond the end of a short one by themselves.
    if (M == 1 && c % (64 / size) == 0)
      for (int r = 0; r < R; r++) _mm_prefetch(w + ((r + R) * job.columns + c) * size, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const __m256 eight = eight_floats(w + (r * job.columns + c) * size, type);
#pragma GCC unroll 4
      for (int t = 0; t < M; t++)
        sums[r][t] = _mm256_fmadd_ps(eight, _mm256_loadu_ps(x + t * job.columns + c), sums[r][t]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int t = 0; t < M; t++) {
      float sum = sum_of_eight(sums[r][t]);
      for (int64_t k = c; k < job.columns; k++)
        sum += one_float(w + (r * job.columns + k) * size, type) * x[t * job.columns + k];
      job.y[(token + t) * job.rows + row + r] = job.bias ? sum + job.bias[row + r] : sum;
    }
}

template <int R>
INLINE void multiply_tokens(const Rows& job, int64_t row, int32_t type) {
  int64_t t = 0;
  for (; t + 2 <= job.tokens; t += 2) multiply_rows<R, 2>(job, row, t, type);
  if (t < job.tokens) multiply_rows<R, 1>(job, row, t, type);
}

// The type is a constant in each loop.
template <int32_t Type>
TARGET static void multiply_until(const Rows& job, int64_t row, int64_t end) {
  for (; row + BLOCK <= end; row += BLOCK) multiply_tokens<BLOCK>(job, row, Type);
  for (; row < end; row++) multiply_tokens<1>(job, row, Type);
}

static void rows_share(void* data) {
  const Rows& job = *(const Rows*)data;
  int me;
  const int parts = team(&me);
  const int64_t blocks = (job.rows + BLOCK - 1) / BLOCK;
  const int64_t row = blocks * me / parts * BLOCK, last = blocks * (me + 1) / parts * BLOCK;
  const int64_t end = last < job.rows ? last : job.rows;
  if (job.type == FLOAT16) multiply_until<FLOAT16>(job, row, end);
  else if (job.type == FLOAT32) multiply_until<FLOAT32>(job, row, end);
  else multiply_until<BFLOAT16>(job, row, end);
}
#undef TARGET
#undef INLINE
