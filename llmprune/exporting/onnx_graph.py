"""The whole model as an ONNX graph in float32, made by torch.onnx and compared in ONNX Runtime.

The graph takes `input_ids`, int64 [batch, tokens], and returns `logits`, float32 [batch, tokens, vocabulary]. It has no
cache of keys and values. Zeros are stored and multiplied like any other weights: only removed structures make it
smaller or faster.
"""

import contextlib
import importlib.util
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.errors import MissingPackageError, ModelError, NumericsError
from llmprune.exporting.tensors import copy_description
from llmprune.models import boundary
from llmprune.progress import Progress, Watcher
from llmprune.pruning.packing import unpack
from llmprune.storage.companions import CONFIG_NAME
from llmprune.storage.files import read_json
from llmprune.storage.folders import writing_to
from llmprune.storage.packed_config import packed_layouts

FILE_NAME = "model.onnx"

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

# Batches and tokens for which logits are compared; the graph is made from the first, and none is special in it.
_SHAPES = ((2, 12), (1, 7), (3, 5))
# The largest difference, as a fraction of the largest logit: sums of float32 in another order stay far below.
_TOLERANCE = 1e-3


def require_onnx() -> None:
    """Refuse to begin where the packages are missing.

    Raises:
        MissingPackageError: one of them is not installed.
    """
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError.of(package, "an ONNX graph (the extra onnx)")


def write_onnx(source: Path, target: Path, watch: Watcher) -> dict[str, str]:
    """Write a model as ONNX, and compare its logits in ONNX Runtime with torch's.

    Takes the memory of the whole model in float32, a few times over.

    Args:
        source: a checkpoint folder, dense or packed.
        target: an empty folder.
        watch: told about every step.

    Returns:
        Facts for the report.

    Raises:
        ModelError: the model cannot be loaded, or torch.onnx cannot translate it.
        NumericsError: the logits differ.
    """
    watch(Progress("loading"))
    with _dense(source, target, watch) as folder:
        config = boundary.read_stock_config(folder)
        model = boundary.load_stock_model(folder, config, dtype=torch.float32).eval()
    if hasattr(model, "set_experts_implementation"):
        with contextlib.suppress(ValueError):  # where there are no experts
            model.set_experts_implementation("batched_mm")  # the others loop over the experts that tokens chose
    logits = _Logits(model)
    watch(Progress("translating to ONNX"))
    with writing_to(target):
        _translated(logits).save(target / FILE_NAME, external_data=True)
    watch(Progress("comparing logits"))
    facts = {"logits": _compared(logits, target / FILE_NAME)}
    copy_description(source, target, watch)
    return facts


class _Logits(nn.Module):
    """Token ids to logits, and nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits

    def ids(self, batch: int, tokens: int) -> Tensor:
        """Random tokens [batch, tokens]."""
        config: Any = self.model.config
        vocabulary = config.get_text_config(decoder=True).vocab_size
        return torch.randint(vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(0))


@contextlib.contextmanager
def _dense(source: Path, target: Path, watch: Watcher) -> Iterator[Path]:
    """The dense checkpoint: the source itself, or for a packed one a temporary folder."""
    if not packed_layouts(read_json(source / CONFIG_NAME)):
        yield source
        return
    folder = target / "dense"
    try:
        unpack(source, folder, watch=watch)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _translated(logits: _Logits) -> Any:
    ids = logits.ids(*_SHAPES[0])
    dynamic = {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    try:
        with _quiet():
            return torch.onnx.export(
                logits, (ids,), dynamo=True, verbose=False, dynamic_shapes=dynamic,
                input_names=["input_ids"], output_names=["logits"],
            )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        cause = boundary.one_line(error.__cause__ or error)
        raise ModelError(
            f"torch.onnx cannot translate this model: {cause}",
            expected="a model whose forward pass torch.export can trace",
            fix="export the dense folder with a tool for this architecture",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch and onnxscript say about themselves."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@torch.no_grad()
def _compared(logits: _Logits, file: Path) -> str:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    difference = largest = 0.0
    for shape in _SHAPES:
        ids = logits.ids(*shape)
        wanted = logits(ids)
        (found,) = session.run(["logits"], {"input_ids": ids.numpy()})
        change, size = float((torch.from_numpy(found) - wanted).abs().max()), float(wanted.abs().max())
        if not change <= _TOLERANCE * size:  # NaN as well
            raise NumericsError(
                f"the logits of ONNX Runtime differ from torch's by {change:.2g}, the largest is {size:.2g}",
                expected=f"at most {_TOLERANCE:g} of the largest",
                fix="check the checkpoint with `llmprune perplexity`; try another version of torch or onnxruntime",
            )
        difference, largest = max(difference, change), max(largest, size)
    return f"those of ONNX Runtime differ from torch's by at most {difference:.1e}; the largest is {largest:.1f}"
