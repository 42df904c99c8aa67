// Sixteen floats as two registers of AVX2, and how stored weights become floats.
namespace avx2 {
#define TARGET __attribute__((target("avx2,fma,f16c,popcnt,bmi2")))
#define INLINE TARGET __attribute__((always_inline)) static inline

constexpr int FETCHED = 4;  // tokens from which steps of 2:4 are fetched ahead: see matrix.h
struct Floats { __m256 low, high; };
struct Codes { __m256i low, high; };
struct Pair { Floats first, second; };  // the weights of two columns, or the two stored in a group, for 16 rows

INLINE Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
INLINE Floats broadcast(const float* x) { const __m256 one = _mm256_broadcast_ss(x); return {one, one}; }
INLINE void store(float* to, Floats a) { _mm256_storeu_ps(to, a.low), _mm256_storeu_ps(to + 8, a.high); }

// The activation that belongs to each row's weight: element `codes & 3` of four.
INLINE Codes load_codes(const uint32_t* from) {
  return {_mm256_loadu_si256((const __m256i*)from), _mm256_loadu_si256((const __m256i*)(from + 8))};
}
INLINE Codes next(Codes c) { return {_mm256_srli_epi32(c.low, 2), _mm256_srli_epi32(c.high, 2)}; }
INLINE Floats pick(const float* four, Codes c) {
  const __m256 all = _mm256_broadcast_ps((const __m128*)four);
  return {_mm256_permutevar_ps(all, c.low), _mm256_permutevar_ps(all, c.high)};
}

// For each byte of a mask, which of the next eight stored weights goes to each of eight places; 0x80: none, a zero.
struct Spread {
  uint8_t places[256][8];
  uint8_t halves[256][16];  // the same for pairs of bytes
};
constexpr Spread spread() {
  Spread s{};
  for (int b = 0; b < 256; b++)
    for (int i = 0, n = 0; i < 8; i++) {
      const bool on = b >> i & 1;
      s.places[b][i] = on ? n : 0x80;
      s.halves[b][2 * i] = on ? 2 * n : 0x80;
      s.halves[b][2 * i + 1] = on ? 2 * n + 1 : 0x80;
      n += on;
    }
  return s;
}
alignas(64) static constexpr Spread SPREAD = spread();

// Eight places of 16 bits, filled from the next stored weights, which are then behind us.
INLINE __m128i fill(uint32_t byte, const uint16_t*& v) {
  const __m128i eight = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)v), *(const __m128i*)SPREAD.halves[byte]);
  v += __builtin_popcount(byte);
  return eight;
}
INLINE __m256 fill(uint32_t byte, const float*& v) {
  const __m256i from = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)SPREAD.places[byte]));
  const __m256 eight = _mm256_permutevar8x32_ps(_mm256_loadu_ps(v), from);
  v += __builtin_popcount(byte);
  return _mm256_blendv_ps(eight, _mm256_setzero_ps(), _mm256_castsi256_ps(from));
}

struct BFloat16 {
  typedef uint16_t Element;
  INLINE Pair split(__m256i low, __m256i high) {
    const __m256i top = _mm256_set1_epi32(0xffff0000);
    const __m256 a = _mm256_castsi256_ps(_mm256_slli_epi32(low, 16)), b = _mm256_castsi256_ps(_mm256_slli_epi32(high, 16));
    return {{a, b}, {_mm256_castsi256_ps(_mm256_and_si256(low, top)), _mm256_castsi256_ps(_mm256_and_si256(high, top))}};
  }
  INLINE Pair load(const Element* v) {
    return split(_mm256_loadu_si256((const __m256i*)v), _mm256_loadu_si256((const __m256i*)(v + 16)));
  }
  INLINE Pair expand(uint32_t bits, const Element*& v) {
    __m128i q[4];
    for (int i = 0; i < 4; i++) q[i] = fill(bits >> 8 * i & 255, v);
    return split(_mm256_set_m128i(q[1], q[0]), _mm256_set_m128i(q[3], q[2]));
  }
  INLINE void copy(uint32_t bits, const Element*& v, Element* to) {
    for (int i = 0; i < 4; i++) _mm_storeu_si128((__m128i*)(to + 8 * i), fill(bits >> 8 * i & 255, v));
  }
};

struct Float16 {
  typedef uint16_t Element;
  INLINE Pair join(const __m128i* q) {
    return {{_mm256_cvtph_ps(q[0]), _mm256_cvtph_ps(q[1])}, {_mm256_cvtph_ps(q[2]), _mm256_cvtph_ps(q[3])}};
  }
  INLINE Pair load(const Element* v) {
    __m128i q[4];
    for (int i = 0; i < 4; i++) q[i] = _mm_loadu_si128((const __m128i*)(v + 8 * i));
    return join(q);
  }
  INLINE Pair expand(uint32_t bits, const Element*& v) {
    __m128i q[4];
    for (int i = 0; i < 4; i++) q[i] = fill(bits >> 8 * i & 255, v);
    return join(q);
  }
  INLINE void copy(uint32_t bits, const Element*& v, Element* to) { BFloat16::copy(bits, v, to); }
};

struct Float32 {
  typedef float Element;
  INLINE Pair load(const Element* v) {
    return {{_mm256_loadu_ps(v), _mm256_loadu_ps(v + 8)}, {_mm256_loadu_ps(v + 16), _mm256_loadu_ps(v + 24)}};
  }
  INLINE Pair expand(uint32_t bits, const Element*& v) {
    __m256 q[4];
    for (int i = 0; i < 4; i++) q[i] = fill(bits >> 8 * i & 255, v);
    return {{q[0], q[1]}, {q[2], q[3]}};
  }
  INLINE void copy(uint32_t bits, const Element*& v, Element* to) {
    for (int i = 0; i < 4; i++) _mm256_storeu_ps(to + 8 * i, fill(bits >> 8 * i & 255, v));
  }
};

#include "tiles.h"

// ------------------------------------------------------------------------------- activations and results of any type
// A row of activations as floats.
TARGET static void to_floats(const void* from, int32_t type, int64_t n, float* to) {
  int64_t i = 0;
  const uint16_t* half = (const uint16_t*)from;
  if (type == FLOAT32) {
    memcpy(to, from, n * sizeof(float));
  } else if (type == FLOAT16) {
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(half + i))));
    for (; i < n; i++) to[i] = _cvtsh_ss(half[i]);
  } else {
    for (; i < n; i++) {
      const uint32_t bits = (uint32_t)half[i] << 16;
      memcpy(to + i, &bits, 4);
    }
  }
}

// Round sixteen floats to the nearest, ties to even; `n` of them are written.
TARGET static void from_floats(const float* from, int32_t type, int64_t n, void* to) {
  uint16_t half[ROWS];
  if (type == FLOAT32) {
    memcpy(to, from, n * sizeof(float));
    return;
  }
  if (type == FLOAT16) {
    for (int i = 0; i < 16; i += 8)
      _mm_storeu_si128((__m128i*)(half + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  } else {
    for (int i = 0; i < 16; i++) {
      uint32_t bits;
      memcpy(&bits, from + i, 4);
      half[i] = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
  }
  memcpy(to, half, n * sizeof(uint16_t));
}
// The sum of n floats, a multiple of 64.
TARGET static float sum(const float* from, int64_t n) {
  __m256 sums[8];
  for (__m256& one : sums) one = _mm256_setzero_ps();
  for (int64_t i = 0; i < n; i += 64) {
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) {
      if (k % 2 == 0) _mm_prefetch((const char*)(from + i + 8 * k) + 1024, _MM_HINT_T0);
      sums[k] = _mm256_add_ps(sums[k], _mm256_loadu_ps(from + i + 8 * k));
    }
  }
  for (int k = 1; k < 8; k++) sums[0] = _mm256_add_ps(sums[0], sums[k]);
  float all[8], total = 0;
  _mm256_storeu_ps(all, sums[0]);
  for (float one : all) total += one;
  return total;
}
#undef TARGET
#undef INLINE
}  // namespace avx2
