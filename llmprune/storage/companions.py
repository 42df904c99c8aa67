"""The files beside the weights that make a checkpoint usable: which they are, and which of them may be copied."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from llmprune.units import format_size

CONFIG_NAME = "config.json"
# Masks as `keep_zeros` writes them, beside the weights: no part of the checkpoint.
MASKS_NAME = "masks.safetensors"
# A correction of low rank beside the weights, as peft saves it, and its files.
ADAPTER_FOLDER = "adapter"
ADAPTER_NAMES = tuple(f"{ADAPTER_FOLDER}/{name}" for name in ("adapter_config.json", "adapter_model.safetensors"))

# The names that transformers gives to what it loads, apart from config.json and the weights; tekken.json is read by
# mistral-common. A list and not globs: what else lies in a folder may be private, and a pickle can run code.
NAMES = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "audio_tokenizer_config.json", "chat_template.jinja", "chat_template.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tekken.json", "tokenizer.model",
    "tokenizer.model.v3", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "spm.model", "spm_char.model",
    "sentencepiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm", "bpe.codes", "dict.txt", "emoji.json",
    "normalizer.json", "entity_vocab.json", "vocab-src.json", "vocab-tgt.json", "target_vocab.json", "byte_maps.json",
    "word_shape.json", "word_pronunciation.json", "prophetnet.tokenizer",
)  # fmt: skip
_TEMPLATES = "additional_chat_templates"
_TERMS = re.compile(r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)([-_ ][\w -]+)?(\.(txt|md|rst|pdf|html))?", re.IGNORECASE)

# The largest vocabularies take about 40 MB.
_MOST_BYTES = 100_000_000


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, processor, chat template and licence files unchanged, into a folder without them.

    Returns:
        A sentence about each file that was left out: a link that leads out of the checkpoint, or a file that is too
        large to be one of them.
    """
    left_out = []
    for file in _companions(source):
        name = file.relative_to(source)
        if not is_inside(file.resolve(), source.resolve()):
            left_out.append(f"{name} was not copied: it is a link that leads out of {source}")
        elif (size := file.stat().st_size) > _MOST_BYTES:
            left_out.append(f"{name} was not copied: {format_size(size)}, more than {format_size(_MOST_BYTES)}")
        else:
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target / name)
    return left_out


def _companions(source: Path) -> Iterator[Path]:
    templates = sorted(file for file in (source / _TEMPLATES).glob("*.jinja"))
    terms = sorted(file for file in source.iterdir() if _TERMS.fullmatch(file.name))
    return (file for file in (*(source / name for name in NAMES), *templates, *terms) if file.is_file())


def is_inside(file: Path, folder: Path) -> bool:
    """Whether a file belongs to a checkpoint; both paths are resolved.

    The hub's cache keeps every file in REPOSITORY/blobs, and REPOSITORY/snapshots/COMMIT has links to them.
    """
    if file.is_relative_to(folder):
        return True
    snapshots = next((parent for parent in folder.parents if parent.name == "snapshots"), None)
    return snapshots is not None and file.is_relative_to(snapshots.with_name("blobs"))
