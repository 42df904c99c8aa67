"""A dense model, a text for it, and what stock transformers says about both."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from folders import contents
from tiny_models import build, recipe, save
from torch import Tensor
from transformers import AutoModelForCausalLM

LENGTH = 16


SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def save_dense(dtype: str, folder: Path) -> Path:
    """A three-layer Llama in a folder that is named by its dtype."""
    return save(build("llama", DTYPES[dtype], **SIZES), folder / dtype)


@contextmanager
def unchanged(folder: Path) -> Iterator[Path]:
    """No test may change the folder."""
    before = contents(folder)
    yield folder
    assert contents(folder) == before


def write_words(file: Path) -> Path:
    """A text of 320 words, which are 321 tokens with the one that begins it."""
    # From 40 on, because the special tokens w0 to w3 are found inside longer words as well.
    numbers = torch.randint(40, 100, (320,), generator=torch.Generator().manual_seed(5)).tolist()
    file.write_text(" ".join(f"w{number}" for number in numbers))
    return file


def samples(words: Path) -> Tensor:
    """The tokens [20, 16] of that text, read without our code."""
    # The tokenizer of tiny models puts nothing in front.
    ids = [int(word[1:]) for word in words.read_text().split()]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


def on_text(words: Path, **changes: Any) -> Mapping[str, Any]:
    """A recipe that calibrates on the first six samples of the text and holds back two more."""
    calibration = {"source": str(words), "samples": 6, "length": LENGTH, "order": "text"}
    return recipe(**{"calibration": calibration, "held_back": 2, **changes})


def inputs_of(folder: Path, name: str, ids: Tensor, replaced: Mapping[str, Tensor] | None = None) -> Tensor:
    """What a matrix reads [tokens, in], seen by a hook in the stock model, some weights of which are replaced."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.load_state_dict(dict(replaced or {}), strict=False)
    seen: list[Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
    return seen[0].reshape(-1, seen[0].shape[-1]).double()
