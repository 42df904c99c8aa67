// Sixteen floats as one register of AVX-512, with VBMI2 to expand 16-bit weights and BF16 for exact products of pairs.
namespace avx512 {
#define TARGET                                                                                                     \
  __attribute__((target("avx2,fma,f16c,popcnt,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512bf16,avx512vnni")))
#define INLINE TARGET __attribute__((always_inline)) static inline

constexpr int FETCHED = 8;  // tokens from which steps of 2:4 are fetched ahead: see matrix.h
constexpr int turns(int) { return 2; }  // partial sums of a token: see avx2.h
typedef __m512 Floats;
typedef __m512i Codes;
struct Pair { Floats first, second; };  // the weights of two columns, or the two stored in a group, for 16 rows

INLINE Floats zero() { return _mm512_setzero_ps(); }
INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Floats broadcast(const float* x) { return _mm512_set1_ps(*x); }
INLINE void store(float* to, Floats a) { _mm512_storeu_ps(to, a); }

INLINE Codes load_codes(const uint32_t* from) { return _mm512_loadu_si512(from); }
INLINE Codes next(Codes c) { return _mm512_srli_epi32(c, 2); }
INLINE Floats pick(const float* four, Codes c) {
  return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(four)), c);
}

// Expanding with zeros in between, by merging into a zero that the compiler does not know: the instruction waits for its
// result register's old value even where it overwrites all of it, at least on Zen 4, and the wait is twice what a step of
// one token takes otherwise.
INLINE __m512i unknown_zero() {
  __m512i zero;
  asm("vpxord %0, %0, %0" : "=v"(zero));
  return zero;
}
INLINE __m512i fill(uint32_t bits, const uint16_t*& v) {
  const __m512i all = _mm512_mask_expand_epi16(unknown_zero(), bits, _mm512_loadu_si512(v));
  v += __builtin_popcount(bits);
  return all;
}
INLINE __m512 fill(uint32_t bits, const float*& v) {
  const __m512 all = _mm512_mask_expand_ps(_mm512_castsi512_ps(unknown_zero()), bits, _mm512_loadu_ps(v));
  v += __builtin_popcount(bits);
  return all;
}

struct BFloat16 {
  typedef uint16_t Element;
  INLINE Pair split(__m512i w) {
    const __m512i top = _mm512_set1_epi32(0xffff0000);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), _mm512_castsi512_ps(_mm512_and_si512(w, top))};
  }
  INLINE Pair load(const Element* v) { return split(_mm512_loadu_si512(v)); }
  INLINE Pair expand(uint32_t bits, const Element*& v) { return split(fill(bits, v)); }
  INLINE void copy(uint32_t bits, const Element*& v, Element* to) { _mm512_storeu_si512(to, fill(bits, v)); }
};

struct Float16 {
  typedef uint16_t Element;
  INLINE Pair join(__m512i w) {
    return {_mm512_cvtph_ps(_mm512_castsi512_si256(w)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(w, 1))};
  }
  INLINE Pair load(const Element* v) { return join(_mm512_loadu_si512(v)); }
  INLINE Pair expand(uint32_t bits, const Element*& v) { return join(fill(bits, v)); }
  INLINE void copy(uint32_t bits, const Element*& v, Element* to) { _mm512_storeu_si512(to, fill(bits, v)); }
};

struct Float32 {
  typedef float Element;
  INLINE Pair load(const Element* v) { return {_mm512_loadu_ps(v), _mm512_loadu_ps(v + 16)}; }
  INLINE Pair expand(uint32_t bits, const Element*& v) {
    const Floats first = fill(bits & 0xffff, v);
    return {first, fill(bits >> 16, v)};
  }
  INLINE void copy(uint32_t bits, const Element*& v, Element* to) {
    _mm512_storeu_ps(to, fill(bits & 0xffff, v));
    _mm512_storeu_ps(to + 16, fill(bits >> 16, v));
  }
};

#include "tiles.h"

// ------------------------------------------------------------------------------- pairs of bfloat16, without conversion
INLINE __m512 dot(__m512 sum, __m512i w, __m512i x) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }

// x: [pairs][M][2] bfloat16.
template <int M>
TARGET static void mask_pairs(const Matrix& m, int64_t tile, const void* activations, float* out) {
  const uint32_t* bits = bits_of(m, tile);
  const uint16_t* v = (const uint16_t*)at(m, m.values) + first_of(m)[tile];
  const int32_t* x = (const int32_t*)activations;
  constexpr int U = M == 1 ? 4 : M < 8 ? 2 : 1;  // steps at a time: independent sums hide the latency of the products
  __m512 sums[U][M];
  for (auto& row : sums)
    for (auto& sum : row) sum = zero();
  int64_t p = 0;
  for (; p + U <= m.steps; p += U) {
#pragma GCC unroll 4
    for (int u = 0; u < U; u++) {
      // A cache line at half sparsity is two steps.
      if (u % 2 == 0) _mm_prefetch((const char*)v + AHEAD, _MM_HINT_T0);
      const __m512i w = fill(bits[p + u], v);
#pragma GCC unroll 16
      for (int t = 0; t < M; t++) sums[u][t] = dot(sums[u][t], w, _mm512_set1_epi32(x[(p + u) * M + t]));
    }
  }
  for (; p < m.steps; p++) {
    const __m512i w = fill(bits[p], v);
    for (int t = 0; t < M; t++) sums[0][t] = dot(sums[0][t], w, _mm512_set1_epi32(x[p * M + t]));
  }
  finish<U, M>(sums, out);
}

// For each code i0 | i1 << 2, where the bytes of the two activations lie among the eight of a group.
struct Picks { uint32_t bytes[16]; };
constexpr Picks picks() {
  Picks p{};
  for (uint32_t c = 0; c < 16; c++) {
    const uint32_t i = 2 * (c & 3), j = 2 * (c >> 2);
    p.bytes[c] = i | (i + 1) << 8 | j << 16 | (j + 1) << 24;
  }
  return p;
}
alignas(64) static constexpr Picks PICKS = picks();

// x: [groups][M][4] bfloat16. Activations are moved to the weights, not weights to their columns: half the products.
template <int M>
TARGET static void group_pairs(const Matrix& m, int64_t tile, const void* activations, float* out) {
  const int64_t* x = (const int64_t*)activations;
  const __m512i table = _mm512_load_si512(PICKS.bytes);
  constexpr int U = M >= 8 ? 1 : M >= 2 ? 2 : 4;
  __m512 sums[U][M];
  for (auto& row : sums)
    for (auto& sum : row) sum = zero();
  for (int64_t s = 0; s < m.steps; s++, x += 8 * M) {
    const char* step = step_of(m, tile, s);
    Codes codes = load_codes((const uint32_t*)step);
    if (M >= FETCHED) _mm_prefetch(step + STEPS_AHEAD, _MM_HINT_T0);
#pragma GCC unroll 8
    for (int g = 0; g < 8; g++) {
      const char* stored = step + 64 + 64 * g;
      const __m512i w = _mm512_loadu_si512(stored), where = _mm512_permutexvar_epi32(codes, table);
      if (M >= FETCHED) _mm_prefetch(stored + STEPS_AHEAD, _MM_HINT_T0);
#pragma GCC unroll 16
      for (int t = 0; t < M; t++)
        sums[g % U][t] = dot(sums[g % U][t], w, _mm512_shuffle_epi8(_mm512_set1_epi64(x[g * M + t]), where));
      codes = _mm512_srli_epi32(codes, 4);
    }
  }
  finish<U, M>(sums, out);
}

// ------------------------------------------------------------------------------------------------- int8
typedef __m512i Words;
typedef __m512i Ints;
typedef __m512i GroupCodes;
typedef __m512i Places;
struct WordPair { Words first, second; };

INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
INLINE Floats load_peaks(const void* from, int64_t type) {
  if (type == FLOAT32) return _mm512_loadu_ps(from);
  const __m256i half = _mm256_loadu_si256((const __m256i*)from);
  if (type == FLOAT16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
INLINE Ints no_ints() { return _mm512_setzero_si512(); }
INLINE Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
INLINE Floats to_float(Ints a) { return _mm512_cvtepi32_ps(a); }
INLINE Ints add_products(Ints sum, Words w, Words x) { return _mm512_dpwssd_epi32(sum, w, x); }
INLINE Words same_pair(const int32_t* x) { return _mm512_set1_epi32(*x); }
INLINE Words widen(const void* from) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)from)); }
INLINE WordPair expand_bytes(uint64_t bits, const uint8_t*& v) {
  const __m512i all = _mm512_mask_expand_epi8(unknown_zero(), bits, _mm512_loadu_si512(v));
  v += __builtin_popcountll(bits);
  return {_mm512_cvtepi8_epi16(_mm512_castsi512_si256(all)), _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(all, 1))};
}
INLINE GroupCodes group_codes(const uint32_t* from) { return _mm512_loadu_si512(from); }
INLINE GroupCodes next_group(GroupCodes c) { return _mm512_srli_epi32(c, 4); }
INLINE Places places(GroupCodes c) { return _mm512_permutexvar_epi32(c, _mm512_load_si512(PICKS.bytes)); }
INLINE Words pick_pairs(const int64_t* four, Places where) { return _mm512_shuffle_epi8(_mm512_set1_epi64(*four), where); }

struct Int8 {
  typedef uint8_t Element;
  INLINE void copy(uint32_t bits, const Element*& v, Element* to) {
    _mm256_storeu_si256((__m256i*)to, _mm256_maskz_expand_epi8(bits, _mm256_loadu_si256((const __m256i*)v)));
    v += __builtin_popcount(bits);
  }
};
#include "bytes.h"
#undef TARGET
#undef INLINE
}  // namespace avx512
