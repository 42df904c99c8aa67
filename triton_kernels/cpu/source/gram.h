// The lower triangle of x^T x for bfloat16 x: exact products, float32 sums (subnormal products count as zero).
//
// Tokens are multiplied in pairs. x is packed into panels of 48 columns, [panels][pairs][48][2], which the product of 8
// by 48 columns reads from both sides. Each tile of the result is one thread's, so that it does not depend on how many.
#pragma once

constexpr int64_t PANEL = 48, SIDE = 8, PAIRS = 128;  // PAIRS of a panel, 24 KB, lie in the L1 cache

struct Gram {
  const uint16_t* x;  // [tokens][width]
  int64_t tokens, width;
  float* total;       // [width][width]
  uint32_t* packed;
  int64_t pairs() const { return (tokens + 1) / 2; }
  int64_t panels() const { return (width + PANEL - 1) / PANEL; }
};

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

TARGET static void pack_pairs(void* data) {
  const Gram& g = *(const Gram*)data;
  int me;
  const int parts = team(&me);
  const int64_t pairs = g.pairs();
  for (int64_t p = pairs * me / parts; p < pairs * (me + 1) / parts; p++) {
    const uint16_t *even = g.x + 2 * p * g.width, *odd = 2 * p + 1 < g.tokens ? even + g.width : nullptr;
    for (int64_t c = 0; c < g.panels() * PANEL; c += 16) {
      const int64_t left = g.width - c;
      const __mmask16 inside = left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
      const __m512i first = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, even + c));
      const __m512i second = odd ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, odd + c)) : _mm512_setzero_si512();
      uint32_t* to = g.packed + (c / PANEL * pairs + p) * PANEL + c % PANEL;
      _mm512_storeu_si512(to, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
    }
  }
}

// Adds SIDE rows of the left panel times the right one. Sums begin at zero: added to those of all tokens so far one by one,
// products would lose more digits.
TARGET static void add_side(const uint32_t* left, const uint32_t* right, int64_t pairs, float* to, int64_t stride) {
  __m512 sums[SIDE][3];
#pragma GCC unroll 8
  for (int i = 0; i < SIDE; i++)
#pragma GCC unroll 3
    for (int j = 0; j < 3; j++) sums[i][j] = _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; p++, left += PANEL, right += PANEL) {
    const __m512i columns[3] = {_mm512_loadu_si512(right), _mm512_loadu_si512(right + 16), _mm512_loadu_si512(right + 32)};
#pragma GCC unroll 8
    for (int i = 0; i < SIDE; i++) {
      const __m512i row = _mm512_set1_epi32(left[i]);
#pragma GCC unroll 3
      for (int j = 0; j < 3; j++) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], (__m512bh)row, (__m512bh)columns[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < SIDE; i++)
#pragma GCC unroll 3
    for (int j = 0; j < 3; j++) {
      float* place = to + i * stride + 16 * j;
      _mm512_storeu_ps(place, _mm512_add_ps(_mm512_loadu_ps(place), sums[i][j]));
    }
}

// One tile of PANEL by PANEL, through some pairs; at the edges in a copy.
TARGET static void add_tile(const Gram& g, int64_t row, int64_t column, int64_t first, int64_t count) {
  const uint32_t* left = g.packed + (row * g.pairs() + first) * PANEL;
  const uint32_t* right = g.packed + (column * g.pairs() + first) * PANEL;
  float* to = g.total + row * PANEL * g.width + column * PANEL;
  const int64_t rows = g.width - row * PANEL < PANEL ? g.width - row * PANEL : PANEL;
  const int64_t columns = g.width - column * PANEL < PANEL ? g.width - column * PANEL : PANEL;
  if (rows == PANEL && columns == PANEL) {
    for (int64_t i = 0; i < PANEL; i += SIDE) add_side(left + i, right, count, to + i * g.width, g.width);
    return;
  }
  alignas(64) float copy[PANEL][PANEL] = {};
  for (int64_t i = 0; i < rows; i++) memcpy(copy[i], to + i * g.width, columns * sizeof(float));
  for (int64_t i = 0; i < rows; i += SIDE) add_side(left + i, right, count, copy[i], PANEL);
  for (int64_t i = 0; i < rows; i++) memcpy(to + i * g.width, copy[i], columns * sizeof(float));
}

// Tiles in the order of rows; a thread has every n-th, which are about equally many.
static void gram_share(void* data) {
  const Gram& g = *(const Gram*)data;
  int me;
  const int parts = team(&me);
  for (int64_t first = 0; first < g.pairs(); first += PAIRS) {
    const int64_t count = g.pairs() - first < PAIRS ? g.pairs() - first : PAIRS;
    int64_t turn = 0;
    for (int64_t row = 0; row < g.panels(); row++)
      for (int64_t column = 0; column <= row; column++)
        if (turn++ % parts == me) add_tile(g, row, column, first, count);
  }
}
#undef TARGET
