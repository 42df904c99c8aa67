// Between the layouts on disk (llmprune/storage/formats) and those in memory. Everything that comes from disk is checked
// before it is followed: no content of a file leads out of a buffer.
#pragma once
#include <cstdlib>
#include "matrix.h"
#include "threads.h"

// A row of a mask on disk: bit j % 8 of byte j / 8.
static inline uint32_t two_bits(const uint8_t* row, int64_t pair) { return row[pair / 4] >> 2 * (pair % 4) & 3; }

// The number of stored weights before each row. The bits after the last column must be zero.
static int count_rows(const uint8_t* mask, int64_t rows, int64_t columns, int64_t nonzeros, int64_t* before) {
  const int64_t width = (columns + 7) / 8;
  int64_t total = 0;
  for (int64_t r = 0; r < rows; r++) {
    before[r] = total;
    const uint8_t* row = mask + r * width;
    for (int64_t b = 0; b < width; b++) total += __builtin_popcount(row[b]);
    if (columns % 8 && row[width - 1] >> columns % 8) return CORRUPT;
    if (total > nonzeros) return CORRUPT;
  }
  before[rows] = total;
  return total == nonzeros ? DONE : CORRUPT;
}

// Moves the stored weights of one tile; `Pack`: from the order of the rows to that of the tile, and makes its bits,
// otherwise back.
template <class T, bool Pack>
static void move_tile(const Matrix& m, int64_t tile, uint8_t* mask, T* values, const int64_t* before) {
  const int64_t width = (m.columns + 7) / 8, from = tile * ROWS;
  const int64_t rows = m.rows - from < ROWS ? m.rows - from : ROWS;
  uint32_t* bits = bits_of(m, tile);
  T* inside = (T*)at(m, m.values) + first_of(m)[tile];
  T* row[ROWS];
  for (int64_t r = 0; r < rows; r++) row[r] = values + before[from + r];
  for (int64_t p = 0; p < m.steps; p++) {
    uint32_t word = Pack ? 0 : bits[p];
    if (Pack)
      for (int64_t r = 0; r < rows; r++) {
        const uint32_t two = two_bits(mask + (from + r) * width, p);
        word |= (two & 1) << place(m.type, r, 0) | (two >> 1) << place(m.type, r, 1);
      }
    else
      for (int64_t r = 0; r < rows; r++) {
        const uint32_t two = (word >> place(m.type, r, 0) & 1) | (word >> place(m.type, r, 1) & 1) << 1;
        mask[(from + r) * width + p / 4] |= two << 2 * (p % 4);
      }
    if (Pack) bits[p] = word;
    for (; word; word &= word - 1) {
      const int n = __builtin_ctz(word), r = by_rows(m.type) ? n / 2 : n % ROWS;
      if (Pack) *inside++ = *row[r]++;
      else *row[r]++ = *inside++;
    }
  }
}

// The two stored weights and the code of each group of four; the last byte of a row may be half used.
template <class T>
static int pack_groups(const Matrix& m, int64_t tile, const uint8_t* meta, const T* values) {
  const int64_t width = (m.columns + 7) / 8, groups = m.columns / 4, from = tile * ROWS;
  for (int64_t s = 0; s < m.steps; s++) {
    uint32_t* codes = (uint32_t*)step_of(m, tile, s);
    T* stored = (T*)(codes + ROWS);
    for (int64_t r = 0; r < ROWS; r++) {
      codes[r] = 0;
      for (int64_t g = 0; g < 8; g++) {
        const int64_t group = 8 * s + g;
        const bool inside = from + r < m.rows && group < groups;
        const uint32_t code = inside ? meta[(from + r) * width + group / 2] >> 4 * (group % 2) & 15 : 4;
        if ((code & 3) >= code >> 2) return CORRUPT;
        codes[r] |= code << 4 * g;
        for (int64_t c = 0; c < 2; c++)
          stored[32 * g + place(m.type, r, c)] = inside ? values[(from + r) * (m.columns / 2) + 2 * group + c] : 0;
      }
      if (groups % 2 && from + r < m.rows && meta[(from + r + 1) * width - 1] >> 4) return CORRUPT;
    }
  }
  return DONE;
}

template <class T>
static void unpack_groups(const Matrix& m, int64_t tile, uint8_t* meta, T* values) {
  const int64_t width = (m.columns + 7) / 8, groups = m.columns / 4, from = tile * ROWS;
  for (int64_t group = 0; group < groups; group++) {
    const uint32_t* codes = (const uint32_t*)step_of(m, tile, group / 8);
    const T* stored = (const T*)(codes + ROWS) + 32 * (group % 8);
    for (int64_t r = 0; r < ROWS && from + r < m.rows; r++) {
      meta[(from + r) * width + group / 2] |= (codes[r] >> 4 * (group % 8) & 15) << 4 * (group % 2);
      for (int64_t c = 0; c < 2; c++) values[(from + r) * (m.columns / 2) + 2 * group + c] = stored[place(m.type, r, c)];
    }
  }
}

// The peaks of a tile: those of a row are repeated for each fold of their group.
template <bool Pack>
static void move_peaks(const Matrix& m, int64_t tile, char* peaks) {
  const int64_t size = item(m.peak_type), groups = (m.columns + m.group - 1) / m.group;
  for (int64_t f = 0; f < folds(m); f++)
    for (int64_t r = 0; r < ROWS && ROWS * tile + r < m.rows; r++) {
      char* outside = peaks + ((ROWS * tile + r) * groups + f * FOLD / m.group) * size;
      char* inside = at(m, m.peaks) + ((tile * folds(m) + f) * ROWS + r) * size;
      memcpy(Pack ? inside : outside, Pack ? outside : inside, size);
    }
}

struct Packing {
  Matrix* m;
  uint8_t* bits;  // mask or meta
  void* values;
  void* peaks;
  const int64_t* before;
  bool pack;
  int failed;
};

template <class T>
static int pack_tile(const Packing& p, int64_t tile) {
  const Matrix& m = *p.m;
  if (m.type == INT8) p.pack ? move_peaks<true>(m, tile, (char*)p.peaks) : move_peaks<false>(m, tile, (char*)p.peaks);
  if (m.kind == TWO_OF_FOUR && p.pack) return pack_groups(m, tile, p.bits, (const T*)p.values);
  if (m.kind == TWO_OF_FOUR) unpack_groups(m, tile, p.bits, (T*)p.values);
  else if (p.pack) move_tile<T, true>(m, tile, p.bits, (T*)p.values, p.before);
  else move_tile<T, false>(m, tile, p.bits, (T*)p.values, p.before);
  return DONE;
}

static void pack_share(void* data) {
  Packing& p = *(Packing*)data;
  int me;
  const int parts = team(&me);
  for (int64_t t = tiles(*p.m) * me / parts; t < tiles(*p.m) * (me + 1) / parts; t++) {
    const int64_t size = item(p.m->type);
    const int result = size == 4 ? pack_tile<uint32_t>(p, t) : size == 2 ? pack_tile<uint16_t>(p, t) : pack_tile<uint8_t>(p, t);
    if (result) __atomic_store_n(&p.failed, result, __ATOMIC_RELAXED);
  }
}

// The number of stored weights before each row, from the tiles; `before` has rows + 1 places.
static void count_from_tiles(const Matrix& m, int64_t* before) {
  memset(before, 0, 8 * (m.rows + 1));
  for (int64_t t = 0; t < tiles(m); t++)
    for (int64_t p = 0; p < m.steps; p++)
      for (uint32_t word = bits_of(m, t)[p]; word; word &= word - 1) {
        const int n = __builtin_ctz(word);
        before[ROWS * t + (by_rows(m.type) ? n / 2 : n % ROWS) + 1]++;
      }
  for (int64_t r = 0; r < m.rows; r++) before[r + 1] += before[r];
}
