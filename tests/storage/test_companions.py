"""What is copied beside the weights, and what is not."""

import ast
import os
import re
from pathlib import Path

import pytest
import torch
import transformers
from folders import contents
from tiny_models import build, recipe, save
from transformers import tokenization_utils_base, utils

from llmprune import prune
from llmprune.progress import Progress
from llmprune.storage import companions
from llmprune.storage.companions import NAMES, copy_companions


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    (tmp_path / "target").mkdir()
    return tmp_path / "source"


def test_all_that_transformers_loads_is_known() -> None:
    """Its source names the vocabularies of each tokenizer, its constants the other files."""
    package = Path(transformers.__file__).parent
    names = set()
    for file in [*package.glob("models/*/tokenization_*.py"), *package.glob("tokenization*.py")]:
        for found in re.findall(r"^VOCAB_FILES_NAMES = (\{.*?\})", file.read_text(), re.MULTILINE | re.DOTALL):
            names |= {node.value for node in ast.walk(ast.parse(found)) if isinstance(node, ast.Constant)}
    vocabularies = {name for name in names if "." in name}
    assert len(vocabularies) > 15
    for module in (utils, tokenization_utils_base):
        found = {name: value for name, value in vars(module).items() if name.endswith(("_NAME", "_FILE"))}
        names |= {value for name, value in found.items() if "WEIGHTS" not in name and "ADAPTER" not in name}
    beside = {"config.json", "modelcard.json", "chat_template.json"}
    assert {name for name in names if isinstance(name, str) and "." in name} - beside <= set(NAMES)


def test_only_known_names_are_copied(source: Path) -> None:
    wanted = {"tekken.json", "processor_config.json", "chat_template.jinja", "LICENSE", "LICENSE-MIT.txt", "NOTICE.md"}
    others = {
        "tokenizer.pkl", "tokenizer.bin", "tokenizer_private.txt", "my.model", "vocab_notes.md", "LICENSE.pt",
        "config.json", "notice_me.py",
    }  # fmt: skip
    for name in wanted | others:
        (source / name).write_text(name)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "a.jinja").write_text("a")
    (source / "tokenizer.json").mkdir()
    assert copy_companions(source, source.with_name("target")) == []
    assert set(contents(source.with_name("target"))) == wanted | {"additional_chat_templates/a.jinja"}


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "additional_chat_templates/a.jinja"])
def test_links_out_of_the_folder_are_not_followed(source: Path, name: str) -> None:
    secret = source.with_name("secret")
    secret.write_text("secret")
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).symlink_to(secret)
    (left_out,) = copy_companions(source, source.with_name("target"))
    assert left_out.startswith(f"{name} was not copied: it is a link that leads out")
    assert contents(source.with_name("target")) == {}


def test_a_folder_that_is_a_link_is_not_followed(source: Path) -> None:
    outside = source.with_name("outside")
    outside.mkdir()
    (outside / "a.jinja").write_text("secret")
    (source / "additional_chat_templates").symlink_to(outside)
    assert len(copy_companions(source, source.with_name("target"))) == 1
    assert contents(source.with_name("target")) == {}


def test_links_inside_the_folder_and_the_hub_s_are_followed(tmp_path: Path) -> None:
    target, snapshot = tmp_path / "target", tmp_path / "models--org--name" / "snapshots" / "abc"
    blobs, other = tmp_path / "models--org--name" / "blobs", tmp_path / "models--org--other" / "blobs"
    for folder in (target, snapshot, blobs, other):
        folder.mkdir(parents=True)
        (folder / "0f").write_text(folder.parent.name)
    (snapshot / "tokenizer.json").symlink_to(Path("../../blobs/0f"))
    (snapshot / "vocab.json").symlink_to("tokenizer.json")
    (snapshot / "merges.txt").symlink_to("0f")
    (snapshot / "LICENSE").symlink_to(other / "0f")
    (target / "0f").unlink()
    assert [line.split()[0] for line in copy_companions(snapshot, target)] == ["LICENSE"]
    name = b"models--org--name"
    assert contents(target) == {"tokenizer.json": name, "vocab.json": name, "merges.txt": b"snapshots"}


def test_large_files_are_left_out_and_the_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(build("llama", torch.bfloat16), tmp_path / "dense")
    (source / "NOTICE").touch()
    os.truncate(source / "NOTICE", companions._MOST_BYTES + 1)
    told: list[Progress] = []
    prune(source, recipe(method="magnitude", evaluation=None), tmp_path / "pruned", watch=told.append)
    assert [one.stage for one in told if "not copied" in one.stage] == [
        "NOTICE was not copied: 100.0 MB, more than 100.0 MB"
    ]
    assert not (tmp_path / "pruned" / "NOTICE").exists()
