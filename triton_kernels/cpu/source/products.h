// Products of packed matrices and activations: which kernels compute them, and what each thread does of them.
#pragma once

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

// Checks the operands, and chooses the kernels; x is arranged in the scratch if they do not read it as it is.
static int begin(Job& job, const int64_t* bytes, int64_t columns, int64_t outputs, void* scratch, int level) {
  const int32_t type = job.type;
  if (level < AVX2 || level > llmprune_level()) return UNSUPPORTED;
  if (type < BFLOAT16 || type > FLOAT32 || job.count < 1 || job.tokens < 0) return REFUSED;
  for (int64_t i = 0; i < job.count; i++) {
    if (const int result = check(job.matrices[i], bytes[i])) return result;
    const Matrix &m = *job.matrices[i], &first = *job.matrices[0];
    if (m.kind != first.kind || m.type != first.type || m.columns != columns) return REFUSED;
    job.outputs += m.rows;
  }
  if (job.outputs != outputs) return REFUSED;
  if (misaligned(job.x, item(type)) || misaligned(job.y, item(type)) || misaligned(job.bias, item(type)) ||
      misaligned(scratch, 4))
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
  if (scratch_bytes(m, type, job.tokens, level)) {
    if (!scratch) return REFUSED;
    const char* x = job.x;
    job.x = (char*)scratch + a.columns * sizeof(float);
    arrange(job, a, x, m.columns, (float*)scratch, (char*)job.x);
  } else if (misaligned(job.x, 16)) {
    return MISALIGNED;
  }
  return DONE;
}
