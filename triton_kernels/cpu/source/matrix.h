// A packed matrix in memory: one block of bytes, which describes itself.
//
// A header of 128 bytes, then the sections that it points to, each at a multiple of 64 bytes. Rows are padded to tiles
// of 16, since a vector of 16 sums is what the kernels add to.
//
// bitmask   first   int64 [tiles + 1]       the number of stored weights before each tile
//           units   uint32 [tiles][steps]   a bit for each weight of two columns in 16 rows
//           values  [nonzeros]              the stored weights in the order of their bits, and 128 bytes of padding,
//                                           because a load takes a whole register
// 2:4       units   [tiles][steps]          a step is 32 columns: uint32 [16], the codes of its eight groups of four
//                                           (i0 | i1 << 2, the first group lowest), then for each group the two stored
//                                           weights of 16 rows
//
// The order of the 32 weights in two columns, or in a group of 2:4, follows from how a register is converted to float:
// bfloat16 and int8 go row by row (weight 2 r + c), float16 and float32 column by column (weight 16 c + r).
//
// int8 weights have a peak for each group of columns in a row, by which they are scaled (llmprune/storage/formats):
//
// peaks     [tiles][folds][16]    of the type of the dense weights; a fold is 128 columns, or what is left of them.
//
// Their bitmasks have an even number of steps, since a register holds the weights of two.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

enum Kind : int32_t { BITMASK = 0, TWO_OF_FOUR = 1 };
enum Type : int32_t { BFLOAT16 = 0, FLOAT16 = 1, FLOAT32 = 2, INT8 = 3 };
// What the functions of the interface return.
enum Result : int { DONE = 0, REFUSED = 1, CORRUPT = 2, MISALIGNED = 3, NO_MEMORY = 4, UNSUPPORTED = 5 };

constexpr uint64_t MAGIC = 0x32757063'6e75726cULL;
constexpr int64_t ROWS = 16;     // of a tile
constexpr int64_t COLUMNS = 32;  // of a step of 2:4
constexpr int64_t FOLD = 128;    // columns whose products are added up as integers
constexpr int64_t PADDING = 128;
// Bytes before their use at which values are fetched, as measured. Steps of 2:4 are one stream: where few tokens are bound
// by memory, the processor fetches it itself, and asking for it only slows that down.
constexpr int64_t AHEAD = 3072, STEPS_AHEAD = 1152;

struct Matrix {
  uint64_t magic;
  int32_t kind, type;                    // `type`: of the stored weights
  int64_t rows, columns, nonzeros;
  int64_t steps;                         // of each tile
  int64_t first, units, values, bytes;   // where the sections begin, and the size of everything
  int64_t peaks, group, peak_type;       // of int8 weights: the section, columns of a group, and its type
  int64_t unused[3];
};
static_assert(sizeof(Matrix) == 128, "the header is part of the layout");

static inline int64_t item(int32_t type) { return type == FLOAT32 ? 4 : type == INT8 ? 1 : 2; }
static inline int64_t tiles(const Matrix& m) { return (m.rows + ROWS - 1) / ROWS; }
static inline int64_t step_bytes(const Matrix& m) { return m.kind == BITMASK ? 4 : 4 * ROWS + COLUMNS / 2 * ROWS * item(m.type); }
static inline int64_t folds(const Matrix& m) { return (m.columns + FOLD - 1) / FOLD; }
static inline int64_t round_up(int64_t n) { return (n + 63) / 64 * 64; }
static inline char* at(const Matrix& m, int64_t offset) { return (char*)&m + offset; }
static inline int64_t* first_of(const Matrix& m) { return (int64_t*)at(m, m.first); }
static inline uint32_t* bits_of(const Matrix& m, int64_t tile) { return (uint32_t*)at(m, m.units) + tile * m.steps; }
static inline char* step_of(const Matrix& m, int64_t tile, int64_t step) {
  return at(m, m.units) + (tile * m.steps + step) * step_bytes(m);
}
// Where weight (r, c) of two columns, or of the two stored in a group, lies among 32.
static inline bool by_rows(int32_t type) { return type == BFLOAT16 || type == INT8; }
static inline int64_t place(int32_t type, int64_t r, int64_t c) { return by_rows(type) ? 2 * r + c : ROWS * c + r; }

// The sizes that a matrix is described by.
struct Sizes {
  int64_t kind, type, rows, columns, nonzeros, group, peak_type;
};

// The header of a matrix; sizes that would overflow are refused.
static inline bool describe(Matrix& m, const Sizes& s) {
  const int64_t rows = s.rows, columns = s.columns, nonzeros = s.nonzeros;
  const int64_t kind = s.kind, type = s.type;
  const int64_t most = INT64_C(1) << 40;
  if (kind < BITMASK || kind > TWO_OF_FOUR || type < BFLOAT16 || type > INT8) return false;
  if (rows < 0 || columns < 0 || rows > most || columns > most || (columns && rows > most / columns)) return false;
  if (nonzeros < 0 || nonzeros > rows * columns || (kind == TWO_OF_FOUR && columns % 4)) return false;
  if (type == INT8 && (s.peak_type < BFLOAT16 || s.peak_type > FLOAT32)) return false;
  // A group is whole folds, or the row.
  if (type == INT8 && (s.group < 1 || s.group > most || (s.group % FOLD && s.group < columns))) return false;
  if (type != INT8 && (s.group || s.peak_type)) return false;
  memset(&m, 0, sizeof m);
  m.magic = MAGIC, m.kind = kind, m.type = type, m.rows = rows, m.columns = columns, m.nonzeros = nonzeros;
  m.group = s.group, m.peak_type = s.peak_type;
  m.steps = kind == TWO_OF_FOUR ? (columns + COLUMNS - 1) / COLUMNS : type == INT8 ? (columns + 3) / 4 * 2 : (columns + 1) / 2;
  m.first = sizeof(Matrix);
  m.units = m.first + (kind == BITMASK ? round_up(8 * (tiles(m) + 1)) : 0);
  m.values = m.units + round_up(tiles(m) * m.steps * step_bytes(m));
  m.peaks = round_up(m.values + (kind == BITMASK ? nonzeros * item(type) : 0) + PADDING);
  m.bytes = m.peaks + (type == INT8 ? round_up(tiles(m) * folds(m) * ROWS * item(s.peak_type)) : 0);
  return true;
}

// The matrix at an address, if it is one, whole and aligned. What the sections contain was checked when it was packed.
static inline int check(const void* address, int64_t bytes) {
  if ((uintptr_t)address % 64) return MISALIGNED;
  if (bytes < (int64_t)sizeof(Matrix)) return CORRUPT;
  const Matrix& m = *(const Matrix*)address;
  Matrix wanted;
  const Sizes sizes{m.kind, m.type, m.rows, m.columns, m.nonzeros, m.group, m.peak_type};
  if (m.magic != MAGIC || !describe(wanted, sizes)) return CORRUPT;
  return memcmp(&m, &wanted, sizeof m) || m.bytes > bytes ? CORRUPT : DONE;
}
