// Sixteen floats as two registers of AVX2, and how stored weights become floats.
namespace avx2 {
#define TARGET __attribute__((target("avx2,fma,f16c,popcnt,bmi2")))
#define INLINE TARGET __attribute__((always_inline)) static inline

constexpr int FETCHED = 4;  // tokens from which steps of 2:4 are fetched ahead: see matrix.h
// Partial sums of a token that take turns: as many as there are registers for.
constexpr int turns(int tokens) { return tokens > 2 ? 1 : 2; }
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
template <int Bytes>  // of a weight
struct Spread {
  uint8_t places[256][8 * Bytes];
};
template <int Bytes>
constexpr Spread<Bytes> spread() {
  Spread<Bytes> s{};
  for (int b = 0; b < 256; b++)
    for (int i = 0, n = 0; i < 8; i++) {
      const bool on = b >> i & 1;
      for (int k = 0; k < Bytes; k++) s.places[b][Bytes * i + k] = on ? Bytes * n + k : 0x80;
      n += on;
    }
  return s;
}
alignas(64) static constexpr Spread<1> BYTES = spread<1>();
alignas(64) static constexpr Spread<2> HALVES = spread<2>();

// Eight places of 16 bits, filled from the next stored weights, which are then behind us: for byte i of a mask. The byte
// is left where it is an offset into the table.
INLINE __m128i fill_halves(uint32_t bits, int i, const uint16_t*& v) {
  const uint32_t byte = (i ? bits >> (8 * i - 4) : bits << 4) & 0xff0;
  const __m128i from = *(const __m128i*)((const char*)HALVES.places + byte);
  const __m128i eight = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)v), from);
  v += __builtin_popcount(byte);
  return eight;
}
INLINE __m256 fill(uint32_t byte, const float*& v) {
  const __m256i from = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)BYTES.places[byte]));
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
    for (int i = 0; i < 4; i++) q[i] = fill_halves(bits, i, v);
    return split(_mm256_set_m128i(q[1], q[0]), _mm256_set_m128i(q[3], q[2]));
  }
  INLINE void copy(uint32_t bits, const Element*& v, Element* to) {
    for (int i = 0; i < 4; i++) _mm_storeu_si128((__m128i*)(to + 8 * i), fill_halves(bits, i, v));
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
    for (int i = 0; i < 4; i++) q[i] = fill_halves(bits, i, v);
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

// ------------------------------------------------------------------------------------------------- int8
struct Words { __m256i low, high; };
typedef Words Ints;
typedef Words GroupCodes;
typedef Words Places;
struct WordPair { Words first, second; };

INLINE Floats multiply(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
INLINE __m256 load_peaks(const char* from, int64_t type, int64_t first) {
  if (type == FLOAT32) return _mm256_loadu_ps((const float*)from + first);
  const __m128i half = _mm_loadu_si128((const __m128i*)((const uint16_t*)from + first));
  if (type == FLOAT16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
INLINE Floats load_peaks(const char* from, int64_t type) { return {load_peaks(from, type, 0), load_peaks(from, type, 8)}; }
INLINE Ints no_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
INLINE Ints add_ints(Ints a, Ints b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
INLINE Floats to_float(Ints a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
INLINE Ints add_products(Ints sum, Words w, Words x) {
  return add_ints(sum, {_mm256_madd_epi16(w.low, x.low), _mm256_madd_epi16(w.high, x.high)});
}
INLINE Words same_pair(const int32_t* x) { const __m256i all = _mm256_set1_epi32(*x); return {all, all}; }
INLINE Words widen(const void* from) {
  const __m128i* v = (const __m128i*)from;
  return {_mm256_cvtepi8_epi16(_mm_loadu_si128(v)), _mm256_cvtepi8_epi16(_mm_loadu_si128(v + 1))};
}
// Eight bytes for a byte of a mask, and sixteen for two, as 16-bit numbers.
INLINE __m128i fill_eight(uint32_t byte, const uint8_t*& v) {
  const __m128i stored = _mm_loadl_epi64((const __m128i*)v);
  v += __builtin_popcount(byte);
  return _mm_shuffle_epi8(stored, _mm_loadl_epi64((const __m128i*)BYTES.places[byte]));
}
INLINE __m256i fill_bytes(uint32_t bits, const uint8_t*& v) {
  const __m128i first = fill_eight(bits & 255, v), second = fill_eight(bits >> 8, v);
  return _mm256_cvtepi8_epi16(_mm_unpacklo_epi64(first, second));
}
INLINE WordPair expand_bytes(uint64_t bits, const uint8_t*& v) {
  __m256i part[4];
  for (int i = 0; i < 4; i++) part[i] = fill_bytes(bits >> 16 * i & 0xffff, v);
  return {{part[0], part[1]}, {part[2], part[3]}};
}
struct Int8 {
  typedef uint8_t Element;
  INLINE void copy(uint32_t bits, const Element*& v, Element* to) {
    for (int i = 0; i < 4; i++, to += 8) _mm_storel_epi64((__m128i*)to, fill_eight(bits >> 8 * i & 255, v));
  }
};
INLINE GroupCodes group_codes(const uint32_t* from) { return {_mm256_loadu_si256((const __m256i*)from), _mm256_loadu_si256((const __m256i*)(from + 8))}; }
INLINE GroupCodes next_group(GroupCodes c) { return {_mm256_srli_epi32(c.low, 4), _mm256_srli_epi32(c.high, 4)}; }
// Where the bytes of the two activations are among the eight of a group: 2 i0, 2 i0 + 1, 2 i1, 2 i1 + 1.
INLINE __m256i byte_places(__m256i c) {
  const __m256i first = _mm256_and_si256(c, _mm256_set1_epi32(3)), second = _mm256_and_si256(c, _mm256_set1_epi32(12));
  const __m256i twice = _mm256_or_si256(_mm256_slli_epi32(first, 1), _mm256_slli_epi32(second, 15));
  return _mm256_add_epi32(_mm256_or_si256(twice, _mm256_slli_epi32(twice, 8)), _mm256_set1_epi32(0x01000100));
}
INLINE Places places(GroupCodes c) { return {byte_places(c.low), byte_places(c.high)}; }
INLINE Words pick_pairs(const int64_t* four, Places where) {
  const __m256i all = _mm256_set1_epi64x(*four);
  return {_mm256_shuffle_epi8(all, where.low), _mm256_shuffle_epi8(all, where.high)};
}
#include "bytes.h"

// n dense weights of a row and a group: in float32 for types of 16 bits, in float64 for float32.
TARGET static void scale(const int8_t* q, int64_t n, float peak, int32_t type, char* to) {
  float dense[ROWS];
  for (int64_t i = 0; i < n; i += ROWS) {
    for (int64_t k = 0; k < ROWS; k++)
      dense[k] = type == FLOAT32 ? (float)(q[i + k] * (double)peak / 127) : q[i + k] * (peak / 127.0f);
    from_floats(dense, type, n - i < ROWS ? n - i : ROWS, to + i * item(type));
  }
}

// A row of activations as 16-bit numbers, and their scale; not a number for what is not finite.
TARGET static float to_words(const float* from, int64_t n, int16_t* to) {
  __m256 peaks = _mm256_setzero_ps(), zeros = peaks;  // a zero times what is not finite is not a number
  const __m256 sign = _mm256_set1_ps(-0.0f);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 eight = _mm256_loadu_ps(from + i);
    peaks = _mm256_max_ps(peaks, _mm256_andnot_ps(sign, eight));
    zeros = _mm256_fmadd_ps(eight, _mm256_setzero_ps(), zeros);
  }
  float all[16], most = 0, wrong = 0;
  _mm256_storeu_ps(all, peaks), _mm256_storeu_ps(all + 8, zeros);
  for (int k = 0; k < 8; k++) most = all[k] > most ? all[k] : most, wrong += all[8 + k];
  for (; i < n; i++) most = __builtin_fabsf(from[i]) > most ? __builtin_fabsf(from[i]) : most, wrong += from[i] * 0.0f;
  if (wrong != 0 || most == 0) {
    memset(to, 0, n * sizeof(int16_t));
    return wrong != 0 ? wrong : 0;
  }
  const double factor = 32767.0 / most;
  i = 0;
  const __m256d by = _mm256_set1_pd(factor);
  for (; i + 4 <= n; i += 4) {
    const __m128i four = _mm256_cvtpd_epi32(_mm256_mul_pd(_mm256_cvtps_pd(_mm_loadu_ps(from + i)), by));
    _mm_storel_epi64((__m128i*)(to + i), _mm_packs_epi32(four, four));
  }
  for (; i < n; i++) to[i] = (int16_t)_mm_cvtsd_si32(_mm_set_sd(from[i] * factor));
  return (float)(most / 32767.0);
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
