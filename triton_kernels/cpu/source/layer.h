// A decoder layer for one token, around its key-value cache: norm, q, k and v, rotary embedding; then attention, its output
// matrix, norm and gated MLP. Between the products there are a few thousand numbers, which one thread takes less time for
// than a call of any library. All of it is computed in floats, and rounded where it leaves the layer: one token is bound
// by the bytes of its weights, so that a product of pairs of 16-bit numbers would not be faster.
#pragma once

enum Norm { BEFORE_ATTENTION, BEFORE_MLP, OF_Q, OF_K };
enum Place { Q, K, V, O, GATE, UP, DOWN };

// Keys and values of one layer, [heads][length][width] of each, a row contiguous; the strides of keys' heads and rows, and
// those of values, in numbers of the layer's type.
struct Cached {
  const char *keys, *values;
  int64_t length;
  const int64_t* strides;
  float scale;
};

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE TARGET __attribute__((always_inline)) static inline

// ------------------------------------------------------------------------------------------------- between the products
INLINE float dot(const float* a, const float* b, int64_t n) {
  __m256 sums[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int k = 0; k < 2; k++)
      sums[k] = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 8 * k), _mm256_loadu_ps(b + i + 8 * k), sums[k]);
  float sum = sum_of_eight(_mm256_add_ps(sums[0], sums[1]));
  for (; i < n; i++) sum += a[i] * b[i];
  return sum;
}

// Some numbers of a type at a time, as floats: what is done with number i is the body's.
constexpr int64_t SOME = 64;
template <class Body>
INLINE void each_float(const void* from, int32_t type, int64_t n, Body body) {
  float some[SOME];
  for (int64_t i = 0; i < n; i += SOME) {
    const int64_t count = n - i < SOME ? n - i : SOME;
    avx2::to_floats((const char*)from + i * item(type), type, count, some);
    for (int64_t k = 0; k < count; k++) body(i + k, some[k]);
  }
}
TARGET static void add(float* y, const void* from, int32_t type, int64_t n) {
  each_float(from, type, n, [&](int64_t i, float one) __attribute__((always_inline)) { y[i] += one; });
}

// n floats as numbers of a type; there is room to read a multiple of 16 of them.
TARGET static void store(const float* from, int32_t type, int64_t n, void* to) {
  for (int64_t i = 0; i < n; i += ROWS)
    avx2::from_floats(from + i, type, n - i < ROWS ? n - i : ROWS, (char*)to + i * item(type));
}

// x / rms(x), times the weight; `to` may be x.
TARGET static void normalise(const float* x, int64_t n, const void* weight, int32_t type, float eps, float* to) {
  const float scale = 1 / __builtin_sqrtf(dot(x, x, n) / n + eps);
  each_float(weight, type, n, [&](int64_t i, float one) __attribute__((always_inline)) { to[i] = one * (x[i] * scale); });
}

// Number i and number i + width / 2 of a head are a pair that is turned.
TARGET static void rotate(float* head, int64_t width, const float* cos, const float* sin) {
  const int64_t half = width / 2;
  float *a = head, *b = head + half;
  for (int64_t i = 0; i < half; i++) {
    const float first = a[i], second = b[i];
    a[i] = first * cos[i] - second * sin[i];
    b[i] = second * cos[half + i] + first * sin[half + i];
  }
}

// e^x to about one unit in the last place (the polynomial of Cephes' expf); below 2^-126 it stays there.
INLINE __m256 exponential(__m256 x) {
  // What is not a number is the second operand, and stays.
  x = _mm256_max_ps(_mm256_set1_ps(-87.3f), _mm256_min_ps(_mm256_set1_ps(88.3f), x));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 y = _mm256_set1_ps(1.9875691500e-4f);
  constexpr float lower[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  for (float next : lower) y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(next));
  y = _mm256_add_ps(_mm256_fmadd_ps(y, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1));
  const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), power));
}

// SiLU of gate [n], times up; n is rounded up to a multiple of 8, for which there is room.
TARGET static void gate_by_silu(float* gate, const float* up, int64_t n) {
  const __m256 one = _mm256_set1_ps(1), minus = _mm256_set1_ps(-0.0f);
  for (int64_t i = 0; i < n; i += 8) {
    const __m256 x = _mm256_loadu_ps(gate + i), below = _mm256_add_ps(one, exponential(_mm256_xor_ps(x, minus)));
    _mm256_storeu_ps(gate + i, _mm256_mul_ps(_mm256_div_ps(x, below), _mm256_loadu_ps(up + i)));
  }
}

// ------------------------------------------------------------------------------------------------- attention
struct Attention {
  const Layer* layer;
  const Cached* cached;
  const float* q;
  float *scores, *to;  // [heads][length rounded up to 8], [heads][width]
};

// The scores of N keys, each `stride` bytes behind the one before.
template <int32_t Type, int N>
INLINE void score_keys(const float* q, const char* keys, int64_t stride, int64_t width, float scale, float* scores) {
  const int64_t even = width / 8 * 8;
  __m256 sums[N] = {};
  for (int64_t i = 0; i < even; i += 8) {
    const __m256 eight = _mm256_loadu_ps(q + i);
#pragma GCC unroll 4
    for (int n = 0; n < N; n++)
      sums[n] = _mm256_fmadd_ps(eight, eight_floats(keys + n * stride + i * item(Type), Type), sums[n]);
  }
  for (int n = 0; n < N; n++) {
    float sum = sum_of_eight(sums[n]);
    for (int64_t i = even; i < width; i++) sum += q[i] * one_float(keys + n * stride + i * item(Type), Type);
    scores[n] = sum * scale;
  }
}
template <int32_t Type>
INLINE void score(const Layer& l, const Cached& c, const float* q, const char* keys, float* scores) {
  const int64_t stride = c.strides[1] * item(Type);
  int64_t t = 0;
  for (; t + 4 <= c.length; t += 4) score_keys<Type, 4>(q, keys + t * stride, stride, l.width, c.scale, scores + t);
  for (; t < c.length; t++) score_keys<Type, 1>(q, keys + t * stride, stride, l.width, c.scale, scores + t);
}

// Scores become weights, whose sum is returned; what is behind them becomes zero.
INLINE float weigh(float* scores, int64_t n) {
  float most = scores[0];
  for (int64_t t = 1; t < n; t++) most = scores[t] > most ? scores[t] : most;
  __m256 sums = _mm256_setzero_ps();
  for (int64_t t = n; t % 8; t++) scores[t] = -1e30f;
  for (int64_t t = 0; t < n; t += 8) {
    __m256 eight = exponential(_mm256_sub_ps(_mm256_loadu_ps(scores + t), _mm256_set1_ps(most)));
    const __m256i behind = _mm256_setr_epi32(t, t + 1, t + 2, t + 3, t + 4, t + 5, t + 6, t + 7);
    eight = _mm256_and_ps(eight, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), behind)));
    _mm256_storeu_ps(scores + t, eight), sums = _mm256_add_ps(sums, eight);
  }
  return sum_of_eight(sums);
}

// Sixty-four numbers of a head at a time, or what is left of them.
template <int32_t Type>
INLINE void average(const Layer& l, const Cached& c, const char* values, const float* weights, float total, float* to) {
  const int64_t size = item(Type), stride = c.strides[3] * size;
  int64_t from = 0;
  for (; from + 64 <= l.width; from += 64) {
    __m256 sums[8] = {};
    for (int64_t t = 0; t < c.length; t++) {
      const __m256 weight = _mm256_set1_ps(weights[t]);
#pragma GCC unroll 8
      for (int k = 0; k < 8; k++)
        sums[k] = _mm256_fmadd_ps(weight, eight_floats(values + t * stride + (from + 8 * k) * size, Type), sums[k]);
    }
    for (int k = 0; k < 8; k++) _mm256_storeu_ps(to + from + 8 * k, _mm256_div_ps(sums[k], _mm256_set1_ps(total)));
  }
  float sums[64] = {};
  for (int64_t t = 0; t < c.length; t++)
    for (int64_t i = from; i < l.width; i++) sums[i - from] += weights[t] * one_float(values + t * stride + i * size, Type);
  for (int64_t i = from; i < l.width; i++) to[i] = sums[i - from] / total;
}

template <int32_t Type>
TARGET static void attend_share(void* data) {
  const Attention& a = *(const Attention*)data;
  const Layer& l = *a.layer;
  const Cached& c = *a.cached;
  int me;
  const int parts = team(&me);
  for (int64_t h = l.heads * me / parts; h < l.heads * (me + 1) / parts; h++) {
    const int64_t of = h / (l.heads / l.shared);
    float* scores = a.scores + h * ((c.length + 7) / 8 * 8);
    score<Type>(l, c, a.q + h * l.width, c.keys + of * c.strides[0] * item(Type), scores);
    const float total = weigh(scores, c.length);
    average<Type>(l, c, c.values + of * c.strides[2] * item(Type), scores, total, a.to + h * l.width);
  }
}
#undef TARGET
#undef INLINE

// ------------------------------------------------------------------------------------------------- products
// Up to three products of one x, for which threads are woken once.
struct Products {
  Job jobs[3];
  Rows rows[3];
  const Matrix* matrices[3];
  struct { void (*body)(void*); void* data; } shares[3];
  void* scratch[3];
  int64_t count;
};

static void products_share(void* data) {
  const Products& all = *(const Products*)data;
  for (int64_t i = 0; i < all.count; i++) all.shares[i].body(all.shares[i].data);
}

static int begin_packed(Products& all, int64_t i, const Part& part, const float* x, float* y, int level) {
  Job& job = all.jobs[i];
  all.matrices[i] = (const Matrix*)part.data;
  job = {&all.matrices[i], 1, (const char*)x, 0, 1, 0, (char*)y, nullptr, FLOAT32, {}, 0};
  if (const int result = check(part.data, part.bytes)) return result;
  const int64_t needed = scratch_bytes(*all.matrices[i], FLOAT32, 1, level);
  if (needed && !(all.scratch[i] = malloc(needed))) return NO_MEMORY;
  all.shares[i] = {multiply_share, &job};
  return begin(job, &part.bytes, part.columns, part.rows, all.scratch[i], level);
}

// The results of some parts, one after another, in y.
static int multiply_parts(const Layer& l, int first, int count, const float* x, float* y, int level, int threads) {
  Products all;
  memset(&all, 0, sizeof all);
  float* const results = y;
  int64_t bytes = 0;
  int result = DONE;
  for (int i = 0; i < count && !result; i++) {
    const Part& part = l.parts[first + i];
    all.rows[i] = {part.data, (int32_t)part.type, part.rows, part.columns, 1, x, nullptr, y};
    all.shares[i] = {rows_share, &all.rows[i]};
    if (part.type < 0) result = begin_packed(all, i, part, x, y, level);
    bytes += part.bytes, y += part.rows, all.count++;
  }
  const int64_t most = 1 + bytes / l.thread_bytes;
  if (!result) in_threads(products_share, &all, threads < most ? threads : most);
  for (void* scratch : all.scratch) free(scratch);
  y = results;
  for (int i = first; i < first + count && !result; y += l.parts[i++].rows)
    if (l.parts[i].bias) add(y, l.parts[i].bias, l.type, l.parts[i].rows);
  return result;
}

// ------------------------------------------------------------------------------------------------- the two halves
static bool misfits(const Part& part, int64_t rows, int64_t columns) {
  if (part.rows != rows || part.columns != columns || part.type > FLOAT32) return true;
  return part.type >= 0 && (part.bytes != rows * columns * item(part.type) || misaligned(part.data, item(part.type)));
}

// Why the sizes of a layer do not go together. Those of packed matrices are compared with the matrices themselves later.
static int refused(const Layer& l, int level) {
  if (level < AVX2 || level > llmprune_level()) return UNSUPPORTED;
  const int64_t inner = l.parts[GATE].rows, q = l.heads * l.width, kv = l.shared * l.width;
  if (l.hidden < 1 || l.shared < 1 || l.heads < l.shared || l.heads % l.shared || l.width < 2 || l.width % 2) return REFUSED;
  if (inner < 1 || l.thread_bytes < 1 || !l.norms[BEFORE_ATTENTION] || !l.norms[BEFORE_MLP]) return REFUSED;
  if (l.type < BFLOAT16 || l.type > FLOAT32) return REFUSED;
  for (const void* norm : l.norms)
    if (misaligned(norm, item(l.type))) return MISALIGNED;
  for (const Part& part : l.parts)
    if (misaligned(part.bias, item(l.type))) return MISALIGNED;
  const bool fits = !misfits(l.parts[Q], q, l.hidden) && !misfits(l.parts[K], kv, l.hidden) &&
                    !misfits(l.parts[V], kv, l.hidden) && !misfits(l.parts[O], l.hidden, q) &&
                    !misfits(l.parts[GATE], inner, l.hidden) && !misfits(l.parts[UP], inner, l.hidden) &&
                    !misfits(l.parts[DOWN], l.hidden, inner);
  return fits ? DONE : REFUSED;
}

// Room for n floats and for whole vectors of them, aligned as the kernels want.
static int64_t room(int64_t n) { return (n + 15) / 16 * 16; }
static float* new_floats(int64_t n) { return (float*)aligned_alloc(64, room(n) * sizeof(float)); }

static int begin_layer(const Layer& l, const void* x, const void* cos, const void* sin, void* qkv, int level, int threads) {
  const int64_t rows = (l.heads + 2 * l.shared) * l.width, hidden = room(l.hidden), width = room(l.width);
  float* heads = new_floats(room(rows) + 2 * width + hidden);
  if (!heads) return NO_MEMORY;
  float *cosines = heads + room(rows), *sines = cosines + width, *normal = sines + width;
  const int32_t type = l.type;
  avx2::to_floats(x, type, l.hidden, normal);
  avx2::to_floats(cos, type, l.width, cosines);
  avx2::to_floats(sin, type, l.width, sines);
  normalise(normal, l.hidden, l.norms[BEFORE_ATTENTION], type, l.eps[BEFORE_ATTENTION], normal);
  const int result = multiply_parts(l, Q, 3, normal, heads, level, threads);
  for (int64_t h = 0; h < l.heads + l.shared && !result; h++) {
    const int norm = h < l.heads ? OF_Q : OF_K;
    float* head = heads + h * l.width;
    if (l.norms[norm]) normalise(head, l.width, l.norms[norm], type, l.eps[norm], head);
    rotate(head, l.width, cosines, sines);
  }
  if (!result) store(heads, type, rows, qkv);
  free(heads);
  return result;
}

// y [hidden] is the token first, then with attention, then with the MLP.
static int finish_layer(const Layer& l, float* attended, float* normal, float* inner, float* y, int level, int threads) {
  if (const int result = multiply_parts(l, O, 1, attended, normal, level, threads)) return result;
  add(y, normal, FLOAT32, l.hidden);
  normalise(y, l.hidden, l.norms[BEFORE_MLP], l.type, l.eps[BEFORE_MLP], normal);
  const int64_t n = l.parts[GATE].rows;
  memset(inner + 2 * n, 0, 16 * sizeof(float));
  if (const int result = multiply_parts(l, GATE, 2, normal, inner, level, threads)) return result;
  // Its last vector reaches into the first numbers of up, which are read by then, and that of up into the zeros.
  gate_by_silu(inner, inner + n, n);
  if (const int result = multiply_parts(l, DOWN, 1, inner, normal, level, threads)) return result;
  add(y, normal, FLOAT32, l.hidden);
  return DONE;
}

static void attend(const Layer& l, const Cached& c, const float* q, float* scores, float* to, int threads) {
  Attention work{&l, &c, q, scores, to};
  const int64_t most = 1 + 2 * c.length * l.heads * l.width * item(l.type) / l.thread_bytes;
  const auto body = l.type == FLOAT32 ? attend_share<FLOAT32> : l.type == FLOAT16 ? attend_share<FLOAT16> : attend_share<BFLOAT16>;
  in_threads(body, &work, threads < most ? threads : most);
}

static int end_layer(const Layer& l, const void* x, const void* q, const Cached& c, void* to, int level, int threads) {
  const int64_t attended = room(l.heads * l.width), hidden = room(l.hidden), inner = room(2 * l.parts[GATE].rows) + 16;
  // Queries lie where the results of gate and up will.
  const int64_t queries = attended > inner ? attended : inner, scores = c.keys ? l.heads * ((c.length + 7) / 8 * 8) : 0;
  float* all = new_floats(attended + 2 * hidden + queries + scores);
  if (!all) return NO_MEMORY;
  float *normal = all + attended, *y = normal + hidden, *work = y + hidden;
  avx2::to_floats(x, l.type, l.hidden, y);
  avx2::to_floats(q, l.type, l.heads * l.width, c.keys ? work : all);
  if (c.keys) attend(l, c, work, work + queries, all, threads);
  const int result = finish_layer(l, all, normal, work, y, level, threads);
  if (!result) store(y, l.type, l.hidden, to);
  free(all);
  return result;
}
