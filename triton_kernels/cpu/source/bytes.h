// The kernels for int8 weights, compiled once for each instruction set: included as tiles.h is, whose types it uses, with
// Words (16-bit pairs for 16 rows) and Ints (32-bit sums of 16 rows). Activations are 16-bit numbers with a scale for each
// fold of columns; products of a fold are exact in 32 bits (128 x 127 x 32767), and folds are added up as floats.
//
// x of M tokens: float [folds][M], the scales, then 16-bit [pairs or groups][M][2 or 4].

static constexpr float SHARE = 1.0f / 127;

// The scales of sixteen rows in a fold: peak / 127.
INLINE Floats row_scales(const Matrix& m, int64_t tile, int64_t fold) {
  const char* peaks = at(m, m.peaks) + (tile * folds(m) + fold) * ROWS * item(m.peak_type);
  return multiply(load_peaks(peaks, m.peak_type), broadcast(&SHARE));
}

template <int U, int M>
INLINE void fold_up(Ints (&sums)[U][M], const Floats& rows, const float* scales, Floats (&total)[M]) {
#pragma GCC unroll 8
  for (int t = 0; t < M; t++) {
    Ints sum = sums[0][t];
#pragma GCC unroll 4
    for (int u = 1; u < U; u++) sum = add_ints(sum, sums[u][t]);
    total[t] = multiply_add(multiply(to_float(sum), rows), broadcast(scales + t), total[t]);
#pragma GCC unroll 4
    for (int u = 0; u < U; u++) sums[u][t] = no_ints();
  }
}

template <int U, int M>
INLINE void begin(Ints (&sums)[U][M], Floats (&total)[M]) {
  for (auto& row : sums)
    for (auto& sum : row) sum = no_ints();
  for (auto& sum : total) sum = zero();
}

// Four columns: the weights of two and of two.
template <int M>
INLINE void add_quad(const uint64_t* bits, const uint8_t*& v, const int32_t* x, int64_t q, Ints (&first)[M], Ints (&second)[M]) {
  const WordPair w = expand_bytes(bits[q], v);
#pragma GCC unroll 8
  for (int t = 0; t < M; t++) {
    first[t] = add_products(first[t], w.first, same_pair(x + 2 * q * M + t));
    second[t] = add_products(second[t], w.second, same_pair(x + (2 * q + 1) * M + t));
  }
}

template <int M>
TARGET static void mask_bytes(const Matrix& m, int64_t tile, const void* activations, float* out) {
  const uint64_t* bits = (const uint64_t*)bits_of(m, tile);
  const uint8_t* v = (const uint8_t*)at(m, m.values) + first_of(m)[tile];
  const float* scales = (const float*)activations;
  const int32_t* x = (const int32_t*)(scales + folds(m) * M);
  constexpr int Q = M == 1 ? 2 : 1, C = turns(M), U = Q * C;  // quads at a time, sums for each
  Ints sums[U][M];
  Floats total[M];
  begin(sums, total);
  const int64_t quads = m.steps / 2;
  for (int64_t f = 0, q = 0; q < quads; f++) {
    const int64_t end = q + FOLD / 4 < quads ? q + FOLD / 4 : quads;
    for (; q + Q <= end; q += Q) {
      _mm_prefetch((const char*)v + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 2
      for (int u = 0; u < Q; u++) add_quad(bits, v, x, q + u, sums[C * u], sums[C * u + C - 1]);
    }
    for (; q < end; q++) add_quad(bits, v, x, q, sums[0], sums[C - 1]);
    fold_up(sums, row_scales(m, tile, f), scales + f * M, total);
  }
#pragma GCC unroll 8
  for (int t = 0; t < M; t++) store(out + ROWS * t, total[t]);
}

template <int M>
TARGET static void group_bytes(const Matrix& m, int64_t tile, const void* activations, float* out) {
  const float* scales = (const float*)activations;
  const int64_t* x = (const int64_t*)(scales + folds(m) * M);
  constexpr int U = turns(M);
  Ints sums[U][M];
  Floats total[M];
  begin(sums, total);
  constexpr int64_t S = FOLD / COLUMNS;  // steps of a fold
  for (int64_t s = 0; s < m.steps; s++, x += 8 * M) {
    const char* step = step_of(m, tile, s);
    GroupCodes codes = group_codes((const uint32_t*)step);
#pragma GCC unroll 2
    for (int g = 0; g < 8; g++) {
      const char* stored = step + 4 * ROWS + 2 * ROWS * g;
      if (M >= FETCHED) _mm_prefetch(stored + STEPS_AHEAD, _MM_HINT_T0);
      const Words w = widen(stored);
      const Places where = places(codes);
#pragma GCC unroll 8
      for (int t = 0; t < M; t++) sums[g % U][t] = add_products(sums[g % U][t], w, pick_pairs(x + g * M + t, where));
      codes = next_group(codes);
    }
    if (s % S == S - 1 || s == m.steps - 1) fold_up(sums, row_scales(m, tile, s / S), scales + s / S * M, total);
  }
#pragma GCC unroll 8
  for (int t = 0; t < M; t++) store(out + ROWS * t, total[t]);
}
