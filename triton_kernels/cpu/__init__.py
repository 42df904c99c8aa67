"""Products of packed weights on a CPU, in C: bitmask and 2:4, few tokens.

Decode is bound by the bytes of the weights. A bitmask of 50 % sparsity reads 0.5625 of the dense bytes in bfloat16, and
2:4 as much. The weights are packed in memory in tiles of 16 rows (source/matrix.h), which a vector of sums reads in one
pass for up to 16 tokens; sums are float32. What a kernel computes does not depend on the number of threads.

Many tokens are bound by arithmetic: the dense rows are expanded into scratch memory of at most 64 MiB at a time, and
multiplied by torch. From which number of tokens on, is measured for each processor and number of threads: see
`choices`. Since the two ways round differently, so may results of some numbers of tokens on two machines, with another
number of threads, or before and after the measurement.

float32 weights that bfloat16 holds exactly, such as those of a bfloat16 checkpoint on a processor without instructions
for it, are stored as bfloat16: their bytes, not their values, are halved.

int8 weights are multiplied by activations of 16 bits, exactly within 128 columns, whose sums are added up in float32
with the scales of both. x that is not finite gives results that are not a number.

Dense weights of 16 bits are multiplied by float32 activations as they are, on processors that multiply only float32.

The same library has what pruning takes most of its time for on a CPU: the column loop of SparseGPT
(`kernels.obs_sweep`), the choice of weights in N:M groups, and the Gram matrix of bfloat16 inputs where there are
instructions for it.

The weights are constants. Gradients flow to x and the bias, through the dense matrix; so do the transforms of
torch.func and derivatives that are carried forward.
"""

from .choices import dense_from, measured_limit, shape_key
from .finding import library, unavailable
from .gram import add_gram_compiled
from .groups import keep_in_groups_compiled
from .halves import HALVES, halves_linear
from .layers import Norm, TokenLayer, Weights
from .library import FOLD, KINDS, LEVELS, MOST_COLUMNS, MOST_GROUP, TYPES, CorruptMatrixError, new_memory
from .measuring import measure_dense_from
from .operator import dense, expanded_linear, is_plain, is_transformed, linear, pack, unpack

__all__ = [
    "FOLD",
    "HALVES",
    "KINDS",
    "LEVELS",
    "MOST_COLUMNS",
    "MOST_GROUP",
    "TYPES",
    "CorruptMatrixError",
    "Norm",
    "TokenLayer",
    "Weights",
    "add_gram_compiled",
    "dense",
    "dense_from",
    "expanded_linear",
    "halves_linear",
    "is_plain",
    "is_transformed",
    "keep_in_groups_compiled",
    "library",
    "linear",
    "measure_dense_from",
    "measured_limit",
    "new_memory",
    "pack",
    "shape_key",
    "unavailable",
    "unpack",
]
