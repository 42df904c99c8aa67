"""Pruned matrices as CSR tensors in safetensors files, for `torch.sparse_csr_tensor` and whatever reads three arrays.

Byte specification, for the weight [out, in] of a pruned linear layer with `nonzeros` weights that are not zero:

    <layer>.crow     int32 [out + 1]     number of stored weights before each row; the last entry is `nonzeros`
    <layer>.col      int32 [nonzeros]    column of each stored weight, strictly ascending in a row
    <layer>.values   [nonzeros]          the weights' dtype

All other tensors are as in the checkpoint. The files are named `csr-*.safetensors`; `csr.json` lists them, and has the
shape of each matrix:

    {"version": 1, "files": ["csr-model.safetensors"], "matrices": {"model.layers.0.mlp.up_proj": [1536, 576]}}

In 16-bit dtypes CSR takes 6 bytes for each stored weight: less than dense from 67 % zeros on. On CPUs torch multiplies
CSR tensors of float32 and float64 only, to which `load_csr` converts them if asked to.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from llmprune.errors import FormatError
from llmprune.exporting.tensors import Exported, is_pruned
from llmprune.storage.files import Stored, read_header, write_json
from llmprune.storage.folders import expanded
from llmprune.storage.records import CLOSED, PlainName, read_as

INDEX_NAME = "csr.json"
PREFIX = "csr-"

_VERSION = 1
_PARTS = ("crow", "col", "values")
_FIX = "copy the folder again, or export the checkpoint again"

_Size = Annotated[int, Field(ge=0, lt=1 << 31)]


@dataclass(frozen=True, slots=True)
class _Index:
    """What csr.json holds."""

    __pydantic_config__: ClassVar[ConfigDict] = CLOSED

    version: Annotated[int, Field(ge=_VERSION, le=_VERSION)]
    files: tuple[PlainName, ...]
    matrices: dict[str, tuple[_Size, _Size]]


def write_csr(source: Exported, target: Path) -> dict[str, str]:
    """Write a checkpoint with its pruned matrices as CSR tensors.

    Args:
        source: the checkpoint.
        target: an empty folder.

    Returns:
        Facts for the report.
    """
    matrices: dict[str, list[int]] = {}

    def convert(key: str, tensor: Tensor) -> Mapping[str, Tensor]:
        if key not in source.linear or not is_pruned(tensor):
            return {key: tensor}
        name = key.removesuffix(".weight")
        matrices[name] = list(tensor.shape)
        return {f"{name}.{part}": values for part, values in to_csr(tensor).items()}

    files = source.write(target, convert, PREFIX, "exporting")
    write_json(target / INDEX_NAME, {"version": _VERSION, "files": files, "matrices": matrices})
    return {"matrices": f"{len(matrices)} of {len(source.linear)} as CSR; the others have no zeros"}


def to_csr(weight: Tensor) -> dict[str, Tensor]:
    """The three tensors of a weight [out, in]; -0.0 is not stored."""
    rows, columns = weight.nonzero(as_tuple=True)
    crow = torch.zeros(weight.shape[0] + 1, dtype=torch.int32)
    crow[1:] = torch.bincount(rows, minlength=weight.shape[0]).cumsum(0)
    return {"crow": crow, "col": columns.to(torch.int32), "values": weight[rows, columns]}


def load_csr(folder: str | Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Read what `llmprune export --to csr` wrote, as a state dict whose pruned weights are sparse CSR tensors.

    Args:
        folder: the folder.
        dtype: of the floating-point tensors; None: as they are stored. A product on a CPU needs float32 or float64.

    Returns:
        Tensors by the checkpoint's keys; `weight.to_dense()` is the dense matrix, unless converted bit for bit except
        for -0.0.

    Raises:
        CheckpointError: a file is missing or cannot be read.
        FormatError: csr.json is damaged, or tensors do not match it.

    Example:
        >>> state = load_csr("out/pruned-csr", dtype=torch.float32)  # doctest: +SKIP
        >>> y = state["model.layers.0.mlp.up_proj.weight"] @ torch.ones(576)  # doctest: +SKIP
    """
    path = expanded(folder)
    index = read_as(path / INDEX_NAME, _Index, expected="what `llmprune export` wrote", fix=_FIX, raised=FormatError)
    stored = {tensor.key: tensor for name in index.files for tensor in read_header(path / name)}
    state = {}
    for name, shape in index.matrices.items():
        parts = {part: stored.pop(f"{name}.{part}", None) for part in _PARTS}
        found = {part: one for part, one in parts.items() if one is not None}
        state[f"{name}.weight"] = _sparse(name, found, shape, dtype)
    return state | {key: _converted(tensor[...], dtype) for key, tensor in stored.items()}


def _converted(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _sparse(name: str, parts: Mapping[str, Stored], shape: tuple[int, int], dtype: torch.dtype | None) -> Tensor:
    if set(parts) != set(_PARTS):
        raise _damaged(f"{name} has only {sorted(parts)}", "crow, col and values")
    crow, col, values = (parts[part][...] for part in _PARTS)
    if (crow.dtype, col.dtype) != (torch.int32, torch.int32) or not values.dtype.is_floating_point:
        raise _damaged(f"{name} has indices of {crow.dtype} and {col.dtype}, values of {values.dtype}", "int32, floats")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            # torch checks everything that its products would read by.
            return torch.sparse_csr_tensor(crow, col, _converted(values, dtype), shape, check_invariants=True)
    except (RuntimeError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise _damaged(f"{name} is no CSR matrix of {shape[0]} x {shape[1]}: {first}", "what was exported") from error


def _damaged(what: str, expected: str) -> FormatError:
    return FormatError(what, expected=expected, fix=_FIX)
