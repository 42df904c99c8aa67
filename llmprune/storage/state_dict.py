"""State dicts that `torch.save` wrote: tensors are read, and no code of the file ever runs (`weights_only`)."""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from llmprune.errors import CheckpointError
from llmprune.storage.files import listed

_EXPECTED = "a state dict: names and tensors, as torch.save(model.state_dict(), FILE) writes them"
_SAVE = "save it again with torch.save(model.state_dict(), FILE), in the program that made it"
# How torch names, in an error, the class or function that a file asks for.
_GLOBAL = re.compile(r"(?:GLOBAL|class|function) `?([\w.]+)`? (?:was not|whose|which|by default)")


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """Read a state dict; where tensors share all their memory (tied weights), only the first is handed on.

    Args:
        file: that `torch.save` wrote. In the format of today it is mapped, and read where it is used.

    Raises:
        CheckpointError: it cannot be read, is damaged, has other objects than tensors, or tensors that are not plain.

    Example:
        >>> read_state_dict(Path("pruned.pt"))["model.norm.weight"].shape  # doctest: +SKIP
        torch.Size([256])
    """
    found = _load(file)
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        what, fix = _description(found, file)
        raise CheckpointError(f"{file} is no state dict, but {what}", expected=_EXPECTED, fix=fix)
    if not found or not all(isinstance(name, str) for name in found):
        what = "its keys are not names" if found else "it is empty"
        raise CheckpointError(f"{file} is no state dict: {what}", expected=_EXPECTED, fix=_SAVE)
    for name, tensor in found.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_meta:
            kind = "no values (device meta)" if tensor.is_meta else f"another form ({tensor.layout}, {tensor.dtype})"
            raise CheckpointError(
                f"{name} in {file} has {kind}", expected="plain dense tensors", fix="save it as tensor.to_dense()"
            )
    return _untied(found)


def _load(file: Path) -> Any:
    try:
        if file.exists() and not file.is_file():  # reading a pipe would hang
            raise OSError("it is not a file")
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}", expected=_EXPECTED, fix="check the path") from error
    except UnpicklingError as error:
        asked = _GLOBAL.search(str(error))
        if asked is None:
            raise _damaged(file, "it is not what torch.save writes") from error
        raise CheckpointError(
            f"{file} is no state dict: it has Python objects ({asked[1]}), as a whole model saved with "
            "torch.save(model, ...) has; reading them would run code, which is never done",
            expected=_EXPECTED,
            fix=_SAVE,
        ) from error
    except Exception as error:  # of damage torch says whatever breaks first: KeyError, ValueError, EOFError, ...
        said = str(error).strip().partition(". ")[0] if isinstance(error, RuntimeError) else type(error).__name__
        raise _damaged(file, said) from error


def _damaged(file: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{file} cannot be read: {why}",
        expected=_EXPECTED,
        fix="check that this is the right file, and copy or download it again: it may be truncated",
    )


def _description(found: object, file: Path) -> tuple[str, str]:
    """What a file holds that is no state dict, and what to do."""
    if not isinstance(found, Mapping):
        return f"a {type(found).__name__}", _SAVE
    names = [repr(key) for key in found]
    inner = [key for key, value in found.items() if isinstance(value, Mapping) and _is_state(value)]
    if not inner:
        odd = next(key for key, value in found.items() if not isinstance(value, Tensor))
        return f"has other values than tensors: {odd!r} is a {type(found[odd]).__name__}", _SAVE
    part = f"torch.load({str(file)!r}, weights_only=True, map_location='cpu')[{inner[0]!r}]"
    return f"a checkpoint of a training with {listed(names)}", f"save its weights alone: torch.save({part}, 'state.pt')"


def _is_state(value: Mapping[Any, Any]) -> bool:
    return bool(value) and all(isinstance(one, Tensor) for one in value.values())


def _untied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    seen: set[tuple[Any, ...]] = set()
    kept = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        kept[name] = tensor.detach()
    return kept
