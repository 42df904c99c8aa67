"""Where transformers reads a checkpoint folder: its code never runs, and whatever fails is one of our errors.

Every call of transformers that could run a checkpoint's own code is made here, with `trust_remote_code=False`: left to
its default, transformers would ask on stdin, where the first line of a piped prompt may answer "y".
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_mistral_common_available

from llmprune.devices import is_shortage
from llmprune.errors import CheckpointError, DeviceError, LlmpruneError, MissingTokenizerError, ModelError
from llmprune.storage.files import read_json
from llmprune.storage.packed_config import without_idle_record

# A model has at most about one parameter for each tensor; fused tensors may become several.
_PARAMETERS_PER_TENSOR, _SLACK = 8, 1000

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")


def read_stock_config(folder: Path) -> PretrainedConfig:
    """Read config.json with transformers' own class for its model type.

    Raises:
        ModelError: there is no such class, or it does not accept the values.
        CheckpointError: it is not a JSON object.
    """
    content = read_json(folder / "config.json")
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise _own_code(folder) if content.get("auto_map") else _unknown_type(folder, kind)
    with explained(
        f"{folder}: config.json cannot be read",
        expected=f"values that transformers accepts for the model type {kind!r}",
        fix="correct the value, or download config.json again",
    ):
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if not isinstance(config.architectures, list | None):
            raise TypeError(f"architectures is {config.architectures!r}, not a list")
        layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 1)
        if layers < 1:
            raise ValueError(f"num_hidden_layers is {layers}")
    return without_idle_record(config)


def build_stock_model(config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """Build a model with new weights; `options` are those of `from_config`."""
    return _auto_class(config).from_config(config, **options, trust_remote_code=False)


def load_stock_model(folder: Path, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """Load a model with its weights.

    Args:
        folder: the checkpoint.
        config: of the model.
        options: those of `from_pretrained`.

    Raises:
        ModelError: transformers cannot load it.
    """
    with explained(
        f"{folder} cannot be loaded",
        expected="a checkpoint that transformers loads",
        fix="check that config.json and the weights belong together, or download the checkpoint again",
    ):
        return _auto_class(config).from_pretrained(folder, config=config, **options, trust_remote_code=False)


def is_classifier(config: PretrainedConfig) -> bool:
    """Whether a config.json describes a sequence classifier."""
    return any(str(name).endswith("ForSequenceClassification") for name in config.architectures or ())


def build_classifier(config: PretrainedConfig) -> PreTrainedModel:
    """Build a sequence classifier with new weights."""
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    return model


def load_classifier(folder: Path) -> PreTrainedModel:
    """Load a sequence classifier with its weights, in float32, from its own files alone.

    Raises:
        ModelError: transformers cannot load it.
    """
    with explained(
        f"{folder} cannot be loaded as a classifier",
        expected="a folder written by save_pretrained",
        fix="save it again with transformers",
    ):
        model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True, local_files_only=True
        )
    return model


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """Read a model's tokenizer.

    Args:
        folder: local, or a hub id; "" for a model that was not loaded from files.

    Raises:
        MissingTokenizerError: there is none.
        ModelError: it cannot be read, needs a package that is not installed, or code of the checkpoint.
    """
    if not str(folder):
        raise _no_tokenizer(folder)
    tekken = Path(folder, "tekken.json").is_file() and not is_mistral_common_available()
    try:
        expected, fix = _tokenizer_advice(Path(folder))
        with explained(f"no tokenizer in {folder}", expected=expected, fix=fix):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except ModelError as error:
        if tekken:
            raise _needs_mistral_common(folder) from error
        raise _no_tokenizer(folder) if _lacks_tokenizer(Path(folder)) else error from error.__cause__
    if _is_invented(tokenizer):
        raise _needs_mistral_common(folder) if tekken else _no_tokenizer(folder)
    return tokenizer


def auto_class_for(config: PretrainedConfig) -> type[AutoModelForCausalLM] | None:
    """The class of transformers that loads a model of this config as a decoder that writes text; None: there is none.

    Wrappers with other towers that AutoModelForCausalLM does not know are loaded whole.
    """
    if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
        return None
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else None


@contextlib.contextmanager
def explained(what: str, *, expected: str, fix: str, raised: type[LlmpruneError] = ModelError) -> Iterator[None]:
    """Turn whatever a library raises while it reads foreign files into an error of ours that names the cause.

    What it raises for a wrong value depends on the value: its own and its libraries' errors, and every built-in one.
    Running out of memory is not the files' fault, and neither is a reader of our output who has left.

    Args:
        what: what failed, for the error.
        expected: for the error.
        fix: for the error.
        raised: the class of the error.
    """
    try:
        yield
    except (LlmpruneError, MemoryError, BrokenPipeError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if is_shortage(error):
            raise DeviceError(
                f"{what}: {one_line(error)}", fix="free memory; check the sizes in config.json"
            ) from error
        raise raised(f"{what}: {one_line(error)}", expected=expected, fix=fix) from error


@contextlib.contextmanager
def bounded(tensors: int) -> Iterator[None]:
    """Stop building a model that has many more parameters than its checkpoint has tensors.

    Args:
        tensors: how many the checkpoint has.

    Raises:
        CheckpointError: config.json describes such a model, for example one with a million layers.
    """
    most, made = _SLACK + _PARAMETERS_PER_TENSOR * tensors, 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal made
        made += parameter is not None
        if made > most:
            raise CheckpointError(
                f"config.json describes a model with over {most} parameters, and the files hold {tensors} tensors",
                expected="about one tensor for each parameter",
                fix="check that config.json and the weights belong together, or download the checkpoint again",
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def one_line(error: BaseException) -> str:
    """The message of an error as one line of at most 300 characters; its class name if empty."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _auto_class(config: PretrainedConfig) -> type[AutoModelForCausalLM]:
    return auto_class_for(config) or AutoModelForCausalLM


def _tokenizer_advice(folder: Path) -> tuple[str, str]:
    """What to expect and to do if the tokenizer in a folder cannot be read."""
    own = False
    with contextlib.suppress(CheckpointError):  # reading the tokenizer says what is wrong with the file
        own = bool(read_json(folder / "tokenizer_config.json").get("auto_map"))
    if own:
        return (
            "a tokenizer that transformers has; this one brings its own code, which llmprune never runs",
            "use a checkpoint of this model with a tokenizer.json for transformers' own classes",
        )
    return (
        "the tokenizer's files next to the weights, and the packages that it needs",
        "install the package that the message names; else save the model's tokenizer into the folder again",
    )


def _lacks_tokenizer(folder: Path) -> bool:
    """Whether a local folder has no file of a tokenizer."""
    return folder.is_dir() and not any(file for name in _TOKENIZER_FILES for file in folder.glob(name))


def _is_invented(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it knows special tokens only: transformers makes such a tokenizer for many models that have no files."""
    return {*tokenizer.all_special_tokens, *tokenizer.added_tokens_decoder.values()} >= set(tokenizer.get_vocab())


def _no_tokenizer(folder: Path | str) -> MissingTokenizerError:
    return MissingTokenizerError(
        f"no tokenizer files in {folder}" if str(folder) else "the model has no tokenizer",
        expected="the tokenizer's files next to the weights",
        fix="save the model's tokenizer into the folder, or pass one from Python",
    )


def _needs_mistral_common(folder: Path | str) -> ModelError:
    return ModelError(
        f"the tokenizer in {folder} is a tekken.json, which needs the package mistral-common",
        expected="mistral-common, or a tokenizer.json",
        fix="pip install mistral-common",
    )


def _own_code(folder: Path) -> ModelError:
    return ModelError(
        f"{folder} uses its own code (auto_map in config.json), which llmprune never runs",
        expected="an architecture that the installed transformers has",
        fix="use a checkpoint of this model for transformers' own class (often named -hf), or upgrade transformers",
    )


def _unknown_type(folder: Path, kind: object) -> ModelError:
    return ModelError(
        f"{folder}/config.json cannot be read: "
        + ("it has no model_type" if kind is None else f"transformers has no model type {kind!r}"),
        expected="the configuration of a model that the installed transformers knows",
        fix="upgrade transformers if the model is new",
    )
