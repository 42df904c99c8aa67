// The column loop of an optimal-brain-surgeon solver: rows of the weight matrix are independent given the mask, so that
// one thread takes some rows through all columns. Compiled once for each instruction set, by the compiler's vectors.
#pragma once

// All operands are transposed: [columns][rows], rows contiguous.
struct Columns {
  int64_t columns, rows, keep, of;  // N:M groups to choose; of is 0 where the mask is fixed
  float* sums;                      // what earlier columns contribute to each column, then each column's error
  const float* original;
  const float* upper;               // [columns][columns]
  const float* importance;          // [columns]
  uint8_t* stays;                   // the mask
  int level;
};

constexpr int64_t LANES = 64;  // rows that go through the columns together
constexpr int64_t MOST_COLUMNS = 256, MOST_GROUP = 32;

struct ColumnTile { float sums[MOST_COLUMNS][LANES], original[MOST_COLUMNS][LANES]; uint8_t stays[MOST_COLUMNS][LANES]; };

#define BODY __attribute__((always_inline)) static inline

// Which of the columns k, k + 1, ... k + of - 1 stay: the best by their values if all of them stayed.
BODY void choose_group(const Columns& c, ColumnTile& t, int64_t k) {
  float pending[MOST_GROUP][LANES], scores[MOST_GROUP][LANES];
  memcpy(pending, t.sums[k], c.of * sizeof *pending);
  for (int64_t i = 0; i < c.of; i++) {
    const float* row = c.upper + (k + i) * c.columns + k;
    const float scale = -1.0f / row[i], importance = c.importance[k + i];
    float moved[LANES];
    for (int64_t r = 0; r < LANES; r++) moved[r] = pending[i][r] * scale;
    for (int64_t j = i + 1; j < c.of; j++)
      for (int64_t r = 0; r < LANES; r++) pending[j][r] = __builtin_fmaf(row[j], moved[r], pending[j][r]);
    for (int64_t r = 0; r < LANES; r++) {
      const float value = t.original[k + i][r] - moved[r];
      scores[i][r] = value * value * importance;
    }
  }
  for (int64_t i = 0; i < c.of; i++) {
    int32_t beaten_by[LANES] = {};
    // Among ties the earlier column is pruned first.
    for (int64_t j = 0; j < i; j++)
      for (int64_t r = 0; r < LANES; r++) beaten_by[r] += scores[j][r] > scores[i][r];
    for (int64_t j = i + 1; j < c.of; j++)
      for (int64_t r = 0; r < LANES; r++) beaten_by[r] += scores[j][r] >= scores[i][r];
    for (int64_t r = 0; r < LANES; r++) t.stays[k + i][r] = beaten_by[r] < c.keep;
  }
}

BODY void sweep_rows(const Columns& c, ColumnTile& t, int64_t first) {
  const int64_t count = c.rows - first < LANES ? c.rows - first : LANES;
  for (int64_t k = 0; k < c.columns; k++) {
    memset(t.sums[k], 0, sizeof t.sums[k]), memset(t.original[k], 0, sizeof t.original[k]);
    memset(t.stays[k], 0, sizeof t.stays[k]);
    memcpy(t.sums[k], c.sums + k * c.rows + first, count * sizeof(float));
    memcpy(t.original[k], c.original + k * c.rows + first, count * sizeof(float));
    if (!c.of) memcpy(t.stays[k], c.stays + k * c.rows + first, count);
  }
  for (int64_t k = 0; k < c.columns; k++) {
    if (c.of && k % c.of == 0) choose_group(c, t, k);
    const float* row = c.upper + k * c.columns;
    const float scale = -1.0f / row[k];
    float error[LANES];
    for (int64_t r = 0; r < LANES; r++) error[r] = t.stays[k][r] ? t.sums[k][r] * scale : t.original[k][r];
    memcpy(t.sums[k], error, sizeof error);
    for (int64_t j = k + 1; j < c.columns; j++)
      for (int64_t r = 0; r < LANES; r++) t.sums[j][r] = __builtin_fmaf(row[j], error[r], t.sums[j][r]);
  }
  for (int64_t k = 0; k < c.columns; k++) {
    memcpy(c.sums + k * c.rows + first, t.sums[k], count * sizeof(float));
    if (c.of) memcpy(c.stays + k * c.rows + first, t.stays[k], count);
  }
}
#undef BODY

__attribute__((target("avx2,fma"))) static void sweep_rows_avx2(const Columns& c, ColumnTile& t, int64_t first) {
  sweep_rows(c, t, first);
}
// clang, which does not know the preference, would ignore the whole attribute.
#ifdef __clang__
#define WIDE ""
#else
#define WIDE ",prefer-vector-width=512"
#endif
__attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq" WIDE))) static void sweep_rows_avx512(
    const Columns& c, ColumnTile& t, int64_t first) {
  sweep_rows(c, t, first);
}
#undef WIDE

static void sweep_share(void* data) {
  const Columns& c = *(const Columns*)data;
  int me;
  const int parts = team(&me);
  const int64_t all = (c.rows + LANES - 1) / LANES;
  alignas(64) ColumnTile tile;
  for (int64_t i = all * me / parts; i < all * (me + 1) / parts; i++)
    c.level == AVX512 ? sweep_rows_avx512(c, tile, i * LANES) : sweep_rows_avx2(c, tile, i * LANES);
}
