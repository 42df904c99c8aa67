// Products y = x W^T + bias of packed sparse weights W on a CPU, with float32 sums: few tokens, bound by the bytes of W.
//
// A plain C interface, without any header of torch.
#include "disk.h"
#include "layer_sizes.h"
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

extern "C" int llmprune_level();

static bool misaligned(const void* p, int64_t size) { return (uintptr_t)p % size != 0; }

// Bytes of scratch for x; 0 if the kernels read it as it is.
static int64_t scratch_bytes(const Matrix& m, int32_t type, int64_t tokens, int level) {
  const Activations a(m, type, level);
  if (tokens == 1 && a.columns == m.columns && !a.words && (a.pairs || type == FLOAT32)) return 0;
  return a.columns * (int64_t)sizeof(float) + tokens * a.bytes();
}

#if HAVE_KERNELS
#include "columns.h"
#include "dense.h"
#include "gram.h"
#include "groups.h"
#include "reading.h"
#include "rows.h"
#include "products.h"
#include "layer.h"
#endif  // HAVE_KERNELS

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
  return scratch_bytes(*(const Matrix*)matrix, type, tokens, level);
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
  if (const int result = begin(job, bytes, columns, outputs, scratch, level)) return result;
  if (tokens && job.outputs) in_threads(multiply_share, &job, threads);
  return DONE;
#else
  return UNSUPPORTED;
#endif
}

// y [tokens][rows] = x [tokens][columns] times the transposed weights [rows][columns], plus the bias [rows] or null; floats
// but for the weights, which are of 16 bits or floats.
int llmprune_rows(const void* weights, int type, int64_t rows, int64_t columns, const float* x, int64_t tokens,
                  const float* bias, float* y, int threads) {
#if HAVE_KERNELS
  if (llmprune_level() < AVX2) return UNSUPPORTED;
  if (type < BFLOAT16 || type > FLOAT32 || rows < 0 || columns < 0 || tokens < 0) return REFUSED;
  if (misaligned(weights, item(type)) || misaligned(x, 4) || misaligned(bias, 4) || misaligned(y, 4)) return MISALIGNED;
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

// A decoder layer up to its attention, for one token, all of the layer's type: see layer.h. qkv is [q.rows + k.rows + v.rows].
int llmprune_layer_begin(const Layer* layer, const void* x, const void* cos, const void* sin, void* qkv, int level,
                         int threads) {
#if HAVE_KERNELS
  if (const int result = refused(*layer, level)) return result;
  const int64_t size = item(layer->type);
  if (misaligned(x, size) || misaligned(cos, size) || misaligned(sin, size) || misaligned(qkv, size)) return MISALIGNED;
  return begin_layer(*layer, x, cos, sin, qkv, level, threads);
#else
  return UNSUPPORTED;
#endif
}

// The rest of the layer, with its attention if there are keys; otherwise `q` is what attention has made.
int llmprune_layer_end(const Layer* layer, const void* x, const void* q, const void* keys, const void* values,
                       int64_t length, const int64_t* strides, float scale, void* y, int level, int threads) {
#if HAVE_KERNELS
  if (const int result = refused(*layer, level)) return result;
  const void* all[] = {x, q, keys, values, y};
  for (const void* one : all)
    if (misaligned(one, item(layer->type))) return MISALIGNED;
  if (keys && length < 1) return REFUSED;
  return end_layer(*layer, x, q, {(const char*)keys, (const char*)values, length, strides, scale}, y, level, threads);
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
