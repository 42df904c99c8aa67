// Activations in the order in which the kernels of packed weights read them.
#pragma once

// x [tokens][columns] becomes blocks of M = 1, 2, 4, 8 or 16 tokens, each [units][M][elements of a unit], so that one
// pointer walks through all of them: token rows 2^n bytes apart would fall into one set of the L1 cache. A unit is what
// one instruction broadcasts. Columns are padded with zeros to whole steps.
template <int64_t Bytes>
static void place_units(const char* row, int64_t count, int64_t stride, char* to) {
  for (int64_t i = 0; i < count; i++) memcpy(to + i * stride, row + i * Bytes, Bytes);
}

// 16-bit numbers of one token instead of floats, each fold with its scale.
static void scale_words(const float* row, int64_t columns, int64_t stride, float* scales, int16_t* words) {
  for (int64_t c = 0; c < columns; c += FOLD)
    scales[c / FOLD * stride] = avx2::to_words(row + c, columns - c < FOLD ? columns - c : FOLD, words + c);
}

// `row`: room for one token as floats.
static void arrange(const Job& job, const Activations& a, const char* x, int64_t given, float* row, char* to) {
  const int64_t unit = a.unit * a.element, units = a.columns / a.unit;
  for (int64_t t0 = 0; t0 < job.tokens;) {
    const int64_t m = INT64_C(1) << block(job.tokens - t0, job.most);
    for (int64_t t = 0; t < m; t++) {
      const char* from = x + (t0 + t) * given * item(job.type);
      char* block = to + t0 * a.bytes();
      if (a.pairs) memcpy(row, from, given * a.element);
      else avx2::to_floats(from, job.type, given, row);
      // In place: a number is read before its half is written.
      if (a.words) scale_words(row, given, m, (float*)block + t, (int16_t*)row);
      memset((char*)row + given * a.element, 0, (a.columns - given) * a.element);
      char* place = block + m * a.scales * sizeof(float) + t * unit;
      if (m == 1) memcpy(place, row, a.columns * a.element);
      else if (unit == 4) place_units<4>((const char*)row, units, m * unit, place);
      else if (unit == 8) place_units<8>((const char*)row, units, m * unit, place);
      else place_units<16>((const char*)row, units, m * unit, place);
    }
    t0 += m;
  }
}
