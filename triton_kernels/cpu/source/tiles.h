// The kernels for float activations, compiled once for each instruction set: included inside a namespace that defines
// TARGET, INLINE, Floats, Codes and the stored types. Each multiplies one tile of 16 rows by M tokens: out [M][16].

// Add up U partial sums of M tokens, in a fixed order.
template <int U, int M>
TARGET static inline void finish(Floats (&sums)[U][M], float* out) {
#pragma GCC unroll 16
  for (int t = 0; t < M; t++) {
#pragma GCC unroll 4
    for (int u = 1; u < U; u++) sums[0][t] = add(sums[0][t], sums[u][t]);
    store(out + ROWS * t, sums[0][t]);
  }
}

// x: [columns][M] float.
template <class Stored, int M>
TARGET static void mask_floats(const Matrix& m, int64_t tile, const void* activations, float* out) {
  const uint32_t* bits = bits_of(m, tile);
  const typename Stored::Element* v = (const typename Stored::Element*)at(m, m.values) + first_of(m)[tile];
  const float* x = (const float*)activations;
  constexpr int S = M == 1 ? 2 : 1, C = M > 2 ? 1 : 2, U = S * C;  // steps at a time, sums for each column
  Floats sums[U][M];
  for (auto& row : sums)
    for (auto& sum : row) sum = zero();
  int64_t p = 0;
  for (; p + S <= m.steps; p += S) {
    _mm_prefetch((const char*)v + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 2
    for (int s = 0; s < S; s++) {
      const Pair w = Stored::expand(bits[p + s], v);
#pragma GCC unroll 16
      for (int t = 0; t < M; t++) {
        const float* xs = x + 2 * (p + s) * M + t;
        sums[C * s][t] = multiply_add(w.first, broadcast(xs), sums[C * s][t]);
        sums[C * s + C - 1][t] = multiply_add(w.second, broadcast(xs + M), sums[C * s + C - 1][t]);
      }
    }
  }
  for (; p < m.steps; p++) {
    const Pair w = Stored::expand(bits[p], v);
#pragma GCC unroll 16
    for (int t = 0; t < M; t++) {
      sums[0][t] = multiply_add(w.first, broadcast(x + 2 * p * M + t), sums[0][t]);
      sums[C - 1][t] = multiply_add(w.second, broadcast(x + (2 * p + 1) * M + t), sums[C - 1][t]);
    }
  }
  finish<U, M>(sums, out);
}

// x: [groups][M][4] float.
template <class Stored, int M>
TARGET static void group_floats(const Matrix& m, int64_t tile, const void* activations, float* out) {
  const float* x = (const float*)activations;
  constexpr int U = turns(M);
  Floats sums[U][M];
  for (auto& row : sums)
    for (auto& sum : row) sum = zero();
  for (int64_t s = 0; s < m.steps; s++, x += COLUMNS * M) {
    const char* step = step_of(m, tile, s);
    const typename Stored::Element* v = (const typename Stored::Element*)(step + 4 * ROWS);
    Codes codes = load_codes((const uint32_t*)step);
    for (int g = 0; g < 8; g++, v += 2 * ROWS) {
      if (M >= FETCHED) _mm_prefetch((const char*)v + STEPS_AHEAD, _MM_HINT_T0);
      const Pair w = Stored::load(v);
      const Codes second = next(codes);
#pragma GCC unroll 16
      for (int t = 0; t < M; t++) {
        const float* four = x + 4 * (g * M + t);
        sums[0][t] = multiply_add(w.first, pick(four, codes), sums[0][t]);
        sums[U - 1][t] = multiply_add(w.second, pick(four, second), sums[U - 1][t]);
      }
      codes = next(second);
    }
  }
  finish<U, M>(sums, out);
}

// Sixteen columns at a time of a tile's bitmask, as rows [16][columns] at `to`; the padding is not written.
template <class Stored>
TARGET static void expand_mask(const Matrix& m, int64_t tile, char* to) {
  typedef typename Stored::Element Element;
  const int64_t rows = m.rows - ROWS * tile < ROWS ? m.rows - ROWS * tile : ROWS;
  const Element* v = (const Element*)at(m, m.values) + first_of(m)[tile];
  const uint32_t* bits = bits_of(m, tile);
  constexpr int64_t P = 16;  // steps: a cache line of 16-bit weights in each row
  Element dense[P][2 * ROWS], line[2 * P];
  for (int64_t p = 0; p < m.steps; p += P) {
    const int64_t steps = m.steps - p < P ? m.steps - p : P, left = m.columns - 2 * p;
    for (int64_t s = 0; s < steps; s++) Stored::copy(bits[p + s], v, dense[s]);
    for (int64_t r = 0; r < rows; r++) {
      if (by_rows(m.type))
        for (int64_t s = 0; s < P; s++) memcpy(line + 2 * s, dense[s] + 2 * r, 2 * sizeof(Element));
      else
        for (int64_t s = 0; s < P; s++) line[2 * s] = dense[s][r], line[2 * s + 1] = dense[s][ROWS + r];
      Element* row = (Element*)to + r * m.columns + 2 * p;
      if (left >= 2 * P) memcpy(row, line, sizeof line);
      else memcpy(row, line, left * sizeof(Element));
    }
  }
}
