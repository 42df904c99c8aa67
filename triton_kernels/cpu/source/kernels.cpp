// Products y = x W^T + bias of packed sparse weights W on a CPU, with float32 sums: few tokens, bound by the bytes of W.
//
// A plain C interface, without any header of torch.
#include "disk.h"
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define HAVE_KERNELS 1
#include <immintrin.h>
#include "avx2.h"
#include "avx512.h"
#else
#define HAVE_KERNELS 0
#endif

#ifndef SOURCE_HASH
#define SOURCE_HASH ""
#endif

// The instruction sets, in ascending order. (AMX, for 16 tokens and more, would be the next.)
enum Level : int { NONE = 0, AVX2 = 1, AVX512 = 2 };

// The form in which the kernels read activations. `pairs`: they stay bfloat16 and are multiplied in pairs; `words`: they
// become 16-bit numbers with a scale for each fold.
struct Activations {
  bool pairs, words;
  int64_t element, unit, columns, scales;  // bytes, elements, columns padded to whole steps, and scales of a token
  Activations(const Matrix& m, int32_t type, int level)
      : pairs(level == AVX512 && m.type == BFLOAT16 && type == BFLOAT16), words(m.type == INT8),
        element(pairs || words ? 2 : 4), unit(m.kind == TWO_OF_FOUR ? 4 : pairs || words ? 2 : 1),
        columns(m.steps * (m.kind == BITMASK ? 2 : COLUMNS)), scales(words ? folds(m) : 0) {}
  int64_t bytes() const { return columns * element + scales * (int64_t)sizeof(float); }  // of one token
};

#if HAVE_KERNELS
#include "columns.h"
#include "dense.h"
#include "gram.h"
#include "groups.h"
#include "reading.h"
#include "rows.h"

typedef void (*Kernel)(const Matrix&, int64_t tile, const void* x, float* out);

// A matrix, or several with the same columns and layout, whose rows follow one another in y.
struct Job {
  const Matrix* const* matrices;
  int64_t count;
  const char* x;       // in blocks of tokens: see `arrange`
  int64_t x_bytes;     // of one token
  int64_t tokens, outputs;
  char* y;
  const char* bias;
  int32_t type;        // of y and the bias
  Kernel kernels[5];   // for 1, 2, 4, 8 and 16 tokens
  int most;            // tokens in a block, as a power of two
};

static int block(int64_t left, int most) {
  int power = most;
  while (INT64_C(1) << power > left) power--;
  return power;
}

// ------------------------------------------------------------------------------------------------- which kernel
template <class Stored512, class Stored2, int M>
static Kernel choose(int level, int32_t kind) {
  if (level == AVX512) return kind == BITMASK ? avx512::mask_floats<Stored512, M> : avx512::group_floats<Stored512, M>;
  if constexpr (M <= 4) return kind == BITMASK ? avx2::mask_floats<Stored2, M> : avx2::group_floats<Stored2, M>;
  return nullptr;
}
template <int M>
static Kernel choose(int level, int32_t kind, int32_t stored, bool pairs) {
  if (stored == INT8) {
    if constexpr (M <= 8)
      if (level == AVX512) return kind == BITMASK ? avx512::mask_bytes<M> : avx512::group_bytes<M>;
    if constexpr (M <= 4) return kind == BITMASK ? avx2::mask_bytes<M> : avx2::group_bytes<M>;
    return nullptr;
  }
  if (pairs) return kind == BITMASK ? avx512::mask_pairs<M> : avx512::group_pairs<M>;
  if (stored == BFLOAT16) return choose<avx512::BFloat16, avx2::BFloat16, M>(level, kind);
  if (stored == FLOAT16) return choose<avx512::Float16, avx2::Float16, M>(level, kind);
  return choose<avx512::Float32, avx2::Float32, M>(level, kind);
}

#include "arranging.h"

// ------------------------------------------------------------------------------------------------- products
static int64_t bytes_before(const Matrix& m, int64_t tile) {
  return tile * m.steps * step_bytes(m) + (m.kind == BITMASK ? first_of(m)[tile] * item(m.type) : 0);
}

// The tile, counted through all matrices, at which a thread's share of the bytes begins.
static int64_t share(const Job& job, int64_t part, int64_t parts) {
  int64_t total = 0, tile = 0;
  for (int64_t i = 0; i < job.count; i++) total += bytes_before(*job.matrices[i], tiles(*job.matrices[i]));
  int64_t wanted = total / parts * part;
  for (int64_t i = 0; i < job.count; i++) {
    const Matrix& m = *job.matrices[i];
    const int64_t all = bytes_before(m, tiles(m));
    if (part == parts || wanted > all) {
      wanted -= all, tile += tiles(m);
      continue;
    }
    int64_t low = 0, high = tiles(m);
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (bytes_before(m, middle) < wanted) low = middle + 1;
      else high = middle;
    }
    return tile + low;
  }
  return tile;
}

static void multiply_tile(const Job& job, const Matrix& m, int64_t tile, int64_t offset) {
  alignas(64) float out[16 * ROWS], bias[ROWS] = {};
  const int64_t size = item(job.type), row = ROWS * tile, width = m.rows - row < ROWS ? m.rows - row : ROWS;
  if (job.bias) avx2::to_floats(job.bias + (offset + row) * size, job.type, width, bias);
  for (int64_t t0 = 0; t0 < job.tokens;) {
    const int power = block(job.tokens - t0, job.most);
    job.kernels[power](m, tile, job.x + t0 * job.x_bytes, out);
    for (int64_t t = 0; t < INT64_C(1) << power; t++) {
      for (int64_t n = 0; job.bias && n < ROWS; n++) out[ROWS * t + n] += bias[n];
      avx2::from_floats(out + ROWS * t, job.type, width, job.y + ((t0 + t) * job.outputs + offset + row) * size);
    }
    t0 += INT64_C(1) << power;
  }
}

static void multiply_share(void* data) {
  const Job& job = *(const Job*)data;
  int me;
  const int parts = team(&me);
  int64_t tile = share(job, me, parts), offset = 0, before = 0;
  const int64_t end = share(job, me + 1, parts);
  for (int64_t i = 0; i < job.count; i++) {
    const Matrix& m = *job.matrices[i];
    for (; tile < end && tile < before + tiles(m); tile++) multiply_tile(job, m, tile - before, offset);
    before += tiles(m), offset += m.rows;
  }
}
#endif  // HAVE_KERNELS

static bool misaligned(const void* p, int64_t size) { return (uintptr_t)p % size != 0; }

// ------------------------------------------------------------------------------------------------- the interface
extern "C" {
// The hash of the sources that this library was made of.
const char* llmprune_source() { return SOURCE_HASH; }

// The best instruction set of this processor: 0 none, 1 AVX2, 2 AVX-512 with VBMI2, VNNI and BF16.
int llmprune_level() {
#if HAVE_KERNELS
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2")) return NONE;
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16") &&
      __builtin_cpu_supports("avx512vnni"))
    return AVX512;
  return AVX2;
#else
  return NONE;
#endif
}

// Bytes of a packed matrix; -1 if there is no such matrix.
int64_t llmprune_bytes(const Sizes* sizes) {
  Matrix m;
  return describe(m, *sizes) ? m.bytes : -1;
}

// From the tensors on disk, contiguous: `bits` is the mask or the meta; `peaks` of int8 weights, or null. `to` has
// llmprune_bytes bytes.
int llmprune_pack(const Sizes* sizes, const uint8_t* bits, const void* values, const void* peaks, void* to, int threads) {
  Matrix described;
  if (!describe(described, *sizes) || (sizes->type == INT8 && !peaks)) return REFUSED;
  const int64_t kind = sizes->kind, type = sizes->type, rows = sizes->rows, columns = sizes->columns, nonzeros = sizes->nonzeros;
  if (misaligned(to, 64) || misaligned(values, item(type))) return MISALIGNED;
  Matrix& m = *(Matrix*)to = described;
  // What no section covers is zero: equal matrices have equal bytes.
  const int64_t stored = kind == BITMASK ? nonzeros * item(type) : 0, units = m.units + tiles(m) * m.steps * step_bytes(m);
  memset(at(m, m.first), 0, m.units - m.first);
  memset(at(m, units), 0, m.values - units);
  memset(at(m, m.values + stored), 0, m.bytes - m.values - stored);
  int64_t* before = nullptr;
  if (kind == BITMASK) {
    before = (int64_t*)malloc(8 * (rows + 1));
    if (!before) return NO_MEMORY;
    const int result = count_rows(bits, rows, columns, nonzeros, before);
    for (int64_t t = 0; !result && t <= tiles(m); t++) first_of(m)[t] = before[ROWS * t < rows ? ROWS * t : rows];
    if (result) return free(before), result;
  }
  Packing packing{&m, (uint8_t*)bits, (void*)values, (void*)peaks, before, true, DONE};
  in_threads(pack_share, &packing, threads);
  free(before);
  return packing.failed;
}

// Back to the tensors on disk, bit for bit; `bits` is zero before.
int llmprune_unpack(const void* from, int64_t bytes, uint8_t* bits, void* values, void* peaks, int threads) {
  if (const int result = check(from, bytes)) return result;
  Matrix& m = *(Matrix*)from;
  if (m.type == INT8 && !peaks) return REFUSED;
  if (misaligned(values, item(m.type))) return MISALIGNED;
  int64_t* before = nullptr;
  if (m.kind == BITMASK) {
    before = (int64_t*)malloc(8 * (tiles(m) * ROWS + 1));
    if (!before) return NO_MEMORY;
    count_from_tiles(m, before);
  }
  Packing packing{&m, bits, values, peaks, before, false, DONE};
  in_threads(pack_share, &packing, threads);
  free(before);
  return DONE;
}

// Scratch that llmprune_multiply needs for x, in bytes: 0 if it reads x as it is; negative: why the matrix is refused.
int64_t llmprune_scratch(const void* matrix, int64_t bytes, int type, int64_t tokens, int level) {
  if (const int result = check(matrix, bytes)) return -result;
  const Matrix& m = *(const Matrix*)matrix;
  const Activations a(m, type, level);
  if (tokens == 1 && a.columns == m.columns && !a.words && (a.pairs || type == FLOAT32)) return 0;
  return a.columns * (int64_t)sizeof(float) + tokens * a.bytes();
}

// What a packed matrix is.
int llmprune_describe(const void* matrix, int64_t bytes, Sizes* found) {
  if (const int result = check(matrix, bytes)) return result;
  const Matrix& m = *(const Matrix*)matrix;
  *found = {m.kind, m.type, m.rows, m.columns, m.nonzeros, m.group, m.peak_type};
  return DONE;
}

// y [tokens][outputs] = x [tokens][columns] times the transposed matrices, plus the bias [outputs] or null; of one
// type. Several matrices have the same columns, layout and type.
int llmprune_multiply(const void* const* matrices, const int64_t* bytes, int64_t count, int type, const void* x,
                      int64_t tokens, int64_t columns, const void* bias, void* y, int64_t outputs, void* scratch,
                      int level, int threads) {
#if HAVE_KERNELS
  Job job{(const Matrix* const*)matrices, count, (const char*)x, 0, tokens, 0, (char*)y, (const char*)bias, type, {}, 0};
  if (level < AVX2 || level > llmprune_level()) return UNSUPPORTED;
  if (type < BFLOAT16 || type > FLOAT32 || count < 1 || tokens < 0) return REFUSED;
  for (int64_t i = 0; i < count; i++) {
    if (const int result = check(matrices[i], bytes[i])) return result;
    const Matrix &m = *job.matrices[i], &first = *job.matrices[0];
    if (m.kind != first.kind || m.type != first.type || m.columns != columns) return REFUSED;
    job.outputs += m.rows;
  }
  if (job.outputs != outputs) return REFUSED;
  if (misaligned(x, item(type)) || misaligned(y, item(type)) || misaligned(bias, item(type)) || misaligned(scratch, 4))
    return MISALIGNED;
  const Matrix& m = *job.matrices[0];
  const Activations a(m, type, level);
  job.x_bytes = a.bytes();
  job.most = level != AVX512 ? 2 : a.words ? 3 : 4;
  job.kernels[0] = choose<1>(level, m.kind, m.type, a.pairs);
  job.kernels[1] = choose<2>(level, m.kind, m.type, a.pairs);
  job.kernels[2] = choose<4>(level, m.kind, m.type, a.pairs);
  job.kernels[3] = choose<8>(level, m.kind, m.type, a.pairs);
  job.kernels[4] = choose<16>(level, m.kind, m.type, a.pairs);
  if (llmprune_scratch(&m, m.bytes, type, tokens, level)) {
    if (!scratch) return REFUSED;
    job.x = (char*)scratch + a.columns * sizeof(float);
    arrange(job, a, (const char*)x, m.columns, (float*)scratch, (char*)job.x);
  } else if (misaligned(x, 16)) {
    return MISALIGNED;
  }
  if (tokens && job.outputs) in_threads(multiply_share, &job, threads);
  return DONE;
#else
  return UNSUPPORTED;
#endif
}

// y [tokens][rows] = x [tokens][columns] times the transposed weights [rows][columns], bfloat16 or float16, plus the bias
// [rows] or null; floats but for the weights.
int llmprune_rows(const uint16_t* weights, int type, int64_t rows, int64_t columns, const float* x, int64_t tokens,
                  const float* bias, float* y, int threads) {
#if HAVE_KERNELS
  if (llmprune_level() < AVX2) return UNSUPPORTED;
  if ((type != BFLOAT16 && type != FLOAT16) || rows < 0 || columns < 0 || tokens < 0) return REFUSED;
  if (misaligned(weights, 2) || misaligned(x, 4) || misaligned(bias, 4) || misaligned(y, 4)) return MISALIGNED;
  Rows job{weights, type, rows, columns, tokens, x, bias, y};
  if (rows && tokens) in_threads(rows_share, &job, threads);
  return DONE;
#else
  return UNSUPPORTED;
#endif
}

// Rows [from, to) of the dense matrix, of the stored type, into exactly their bytes; `from` and `to` are multiples of 16.
int llmprune_expand(const void* matrix, int64_t bytes, int64_t from, int64_t to, void* out, int64_t out_bytes, int level,
                    int threads) {
#if HAVE_KERNELS
  if (const int result = check(matrix, bytes)) return result;
  const Matrix& m = *(const Matrix*)matrix;
  if (level < AVX2 || level > llmprune_level()) return UNSUPPORTED;
  if (from < 0 || from > to || to > m.rows || from % ROWS || (to % ROWS && to != m.rows)) return REFUSED;
  if (out_bytes != (to - from) * m.columns * item(dense_type(m))) return REFUSED;
  if (misaligned(out, item(dense_type(m)))) return MISALIGNED;
  Dense dense{&m, from / ROWS, (to + ROWS - 1) / ROWS, (char*)out, level};
  in_threads(expand_share, &dense, threads);
  return DONE;
#else
  return UNSUPPORTED;
#endif
}

// Decides the columns of a block one after another: see columns.h. At most 256 columns, and groups of 32.
int llmprune_sweep(float* sums, const float* original, const float* upper, const float* importance, uint8_t* stays,
                   int64_t columns, int64_t rows, int64_t keep, int64_t of, int level, int threads) {
#if HAVE_KERNELS
  if (level < AVX2 || level > llmprune_level()) return UNSUPPORTED;
  if (columns < 0 || columns > MOST_COLUMNS || rows < 0 || of < 0 || of > MOST_GROUP || keep < 0 || keep > of) return REFUSED;
  if (of && columns % of) return REFUSED;
  if (misaligned(sums, 4) || misaligned(original, 4) || misaligned(upper, 4) || misaligned(importance, 4)) return MISALIGNED;
  Columns work{columns, rows, keep, of, sums, original, upper, importance, stays, level};
  if (columns && rows) in_threads(sweep_share, &work, threads);
  return DONE;
#else
  return UNSUPPORTED;
#endif
}

// Which weights of `groups` groups of `of` (at most 32) stay: see groups.h. Scores are numbers.
int llmprune_choose(const float* scores, int64_t groups, int64_t keep, int64_t of, uint8_t* stays, int threads) {
#if HAVE_KERNELS
  if (llmprune_level() < AVX2) return UNSUPPORTED;
  if (groups < 0 || of < 1 || of > MOST_GROUP || keep < 0 || keep > of) return REFUSED;
  if (misaligned(scores, 4)) return MISALIGNED;
  Groups work{scores, groups, keep, of, stays};
  if (groups) in_threads(choose_share, &work, threads);
  return DONE;
#else
  return UNSUPPORTED;
#endif
}

// Scratch of llmprune_gram, in bytes.
int64_t llmprune_gram_scratch(int64_t tokens, int64_t width) {
  return (tokens + 1) / 2 * ((width + 47) / 48 * 48) * (int64_t)sizeof(uint32_t);
}

// Adds the lower triangle of x^T x, x [tokens][width] bfloat16, to total [width][width]: see gram.h. What lies above it
// is left unspecified.
int llmprune_gram(const uint16_t* x, int64_t tokens, int64_t width, float* total, void* scratch, int level, int threads) {
#if HAVE_KERNELS
  if (level != AVX512 || level > llmprune_level()) return UNSUPPORTED;
  if (tokens < 0 || width < 0) return REFUSED;
  if (misaligned(x, 2) || misaligned(total, 4) || misaligned(scratch, 4)) return MISALIGNED;
  Gram gram{x, tokens, width, total, (uint32_t*)scratch};
  if (!tokens || !width) return DONE;
  in_threads(pack_pairs, &gram, threads);
  in_threads(gram_share, &gram, threads);
  return DONE;
#else
  return UNSUPPORTED;
#endif
}

// The sum of n floats: what reading memory as fast as possible costs. For benchmarks.
float llmprune_stream(const float* from, int64_t n, int threads) {
#if HAVE_KERNELS
  Stream stream{from, n, {}};
  in_threads(stream_share, &stream, threads);
  float total = 0;
  for (float sum : stream.sums) total += sum;
  return total;
#else
  return 0;
#endif
}
}
