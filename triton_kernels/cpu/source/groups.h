// Which weights of N:M groups stay: those with the highest scores, in groups of consecutive numbers.
#pragma once

struct Groups {
  const float* scores;
  int64_t count, keep, of;  // groups; how many stay in each
  uint8_t* stays;
};

// A score stays if fewer than `keep` others of its group beat it: higher ones, and equal ones behind it.
static void choose_each(const float* scores, int64_t keep, int64_t of, uint8_t* stays) {
  for (int64_t i = 0; i < of; i++) {
    int64_t beaten_by = 0;
    for (int64_t j = 0; j < i; j++) beaten_by += scores[j] > scores[i];
    for (int64_t j = i + 1; j < of; j++) beaten_by += scores[j] >= scores[i];
    stays[i] = beaten_by < keep;
  }
}

// Groups of 2, 4 or 8 in a vector of 8: each turn compares every score with the one `turn` places behind it, which for
// the last ones of a group is one before.
template <int OF>
__attribute__((target("avx2"))) static void choose_vectors(const float* scores, int64_t count, int64_t keep,
                                                           uint8_t* stays) {
  __m256i turned[OF];
  __m256 around[OF];
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), last = _mm256_set1_epi32(OF - 1);
  const __m256i in_group = _mm256_and_si256(lane, last);
  for (int turn = 1; turn < OF; turn++) {
    const __m256i moved = _mm256_add_epi32(in_group, _mm256_set1_epi32(turn));
    turned[turn] = _mm256_or_si256(_mm256_andnot_si256(last, lane), _mm256_and_si256(moved, last));
    around[turn] = _mm256_castsi256_ps(_mm256_cmpgt_epi32(moved, last));
  }
  const __m256i least = _mm256_set1_epi32(-(int)keep);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const auto eight = [&](const float* from) __attribute__((target("avx2"), always_inline)) {
    const __m256 own = _mm256_loadu_ps(from);
    __m256i beaten_by = _mm256_setzero_si256();  // negative
    for (int turn = 1; turn < OF; turn++) {
      const __m256 other = _mm256_permutevar8x32_ps(own, turned[turn]);
      const __m256 behind = _mm256_cmp_ps(other, own, _CMP_GE_OQ), before = _mm256_cmp_ps(other, own, _CMP_GT_OQ);
      const __m256 beats = _mm256_blendv_ps(behind, before, around[turn]);
      beaten_by = _mm256_add_epi32(beaten_by, _mm256_castps_si256(beats));
    }
    return _mm256_cmpgt_epi32(beaten_by, least);
  };
  const int64_t n = count * OF;
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const __m256i low = _mm256_packs_epi32(eight(scores + i), eight(scores + i + 8));
    const __m256i high = _mm256_packs_epi32(eight(scores + i + 16), eight(scores + i + 24));
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    _mm256_storeu_si256((__m256i*)(stays + i), _mm256_and_si256(bytes, _mm256_set1_epi8(1)));
  }
  for (; i < n; i += OF) choose_each(scores + i, keep, OF, stays + i);
}

static void choose_share(void* data) {
  const Groups& g = *(const Groups*)data;
  int me;
  const int parts = team(&me);
  // Whole vectors for all threads but the last.
  const int64_t unit = 64, from = g.count / unit * me / parts * unit;
  const int64_t to = me + 1 == parts ? g.count : g.count / unit * (me + 1) / parts * unit;
  const float* scores = g.scores + from * g.of;
  uint8_t* stays = g.stays + from * g.of;
  if (g.of == 2) choose_vectors<2>(scores, to - from, g.keep, stays);
  else if (g.of == 4) choose_vectors<4>(scores, to - from, g.keep, stays);
  else if (g.of == 8) choose_vectors<8>(scores, to - from, g.keep, stays);
  else
    for (int64_t i = 0; i < to - from; i++) choose_each(scores + i * g.of, g.keep, g.of, stays + i * g.of);
}
