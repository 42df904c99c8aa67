// What a decoder layer consists of, as layer.h reads it; triton_kernels/cpu/layers.py fills it in.
#pragma once
#include <cstdint>

// A matrix and its bias, of the layer's type, or null. `type` is that of a dense matrix [rows][columns]; of a packed one it
// is -1.
struct Part {
  const void* data;
  int64_t bytes, rows, columns, type;
  const void* bias;
};

struct Layer {
  int64_t hidden, heads, shared, width;  // `shared`: heads of keys and values; `width`: of a head
  int64_t thread_bytes;                  // one thread for each of these bytes
  int64_t type;                          // of tokens, keys, values, norms and biases
  const void* norms[4];                  // [hidden], [hidden]; of heads of q and k, [width] or null
  float eps[4];
  Part parts[7];                         // q, k, v, o, gate, up, down
};
