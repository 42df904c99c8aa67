// Dense rows of a packed matrix: for many tokens, which the dense product multiplies faster, and for gradients.
#pragma once

static int32_t dense_type(const Matrix& m) { return m.type == INT8 ? m.peak_type : m.type; }

struct Dense {
  const Matrix* m;
  int64_t from, to;  // tiles
  char* out;
  int level;  // of the instruction set
};

// Two of four weights as one number: stores of single weights would have to be waited for.
template <class T, class Four>
static void expand_groups(const Matrix& m, int64_t tile, char* out) {
  const int64_t groups = m.columns / 4;
  for (int64_t r = 0; r < ROWS && ROWS * tile + r < m.rows; r++) {
    T* row = (T*)out + r * m.columns;
    const int64_t first = place(m.type, r, 0), second = place(m.type, r, 1);
    for (int64_t g = 0; g < groups; g += 8) {
      const uint32_t* codes = (const uint32_t*)step_of(m, tile, g / 8);
      const T* stored = (const T*)(codes + ROWS);
      uint32_t code = codes[r];
      for (int64_t k = 0; k < 8 && g + k < groups; k++, code >>= 4, stored += 32) {
        const Four low = (Four)stored[first] << 8 * sizeof(T) * (code & 3);
        const Four four = low | (Four)stored[second] << 8 * sizeof(T) * (code >> 2 & 3);
        memcpy(row + 4 * (g + k), &four, sizeof four);
      }
    }
  }
}

// A tile of int8 weights: they are expanded into the end of its rows, which are then written from the beginning.
static void expand_bytes(const Matrix& m, int64_t tile, char* out, bool wide) {
  const int64_t rows = m.rows - ROWS * tile < ROWS ? m.rows - ROWS * tile : ROWS, size = item(m.peak_type);
  char* bytes = out + rows * m.columns * (size - 1);
  if (m.kind == TWO_OF_FOUR) expand_groups<uint8_t, uint32_t>(m, tile, bytes);
  else wide ? avx512::expand_mask<avx512::Int8>(m, tile, bytes) : avx2::expand_mask<avx2::Int8>(m, tile, bytes);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < m.columns; c += FOLD) {
      const int64_t n = m.columns - c < FOLD ? m.columns - c : FOLD;
      int8_t q[FOLD] = {};
      memcpy(q, bytes + r * m.columns + c, n);
      float peak;
      const char* stored = at(m, m.peaks) + ((tile * folds(m) + c / FOLD) * ROWS + r) * size;
      avx2::to_floats(stored, m.peak_type, 1, &peak);
      avx2::scale(q, n, peak, m.peak_type, out + (r * m.columns + c) * size);
    }
}

static void expand_share(void* data) {
  const Dense& d = *(const Dense*)data;
  const Matrix& m = *d.m;
  int me;
  const int parts = team(&me);
  const bool wide = d.level == AVX512;
  for (int64_t t = d.from + (d.to - d.from) * me / parts; t < d.from + (d.to - d.from) * (me + 1) / parts; t++) {
    char* out = d.out + ROWS * (t - d.from) * m.columns * item(dense_type(m));
    if (m.type == INT8) expand_bytes(m, t, out, wide);
    else if (m.kind == TWO_OF_FOUR && m.type == FLOAT32) expand_groups<uint32_t, unsigned __int128>(m, t, out);
    else if (m.kind == TWO_OF_FOUR) expand_groups<uint16_t, uint64_t>(m, t, out);
    else if (m.type == FLOAT32) wide ? avx512::expand_mask<avx512::Float32>(m, t, out) : avx2::expand_mask<avx2::Float32>(m, t, out);
    else wide ? avx512::expand_mask<avx512::BFloat16>(m, t, out) : avx2::expand_mask<avx2::BFloat16>(m, t, out);
  }
}
