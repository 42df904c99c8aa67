"""GGUF files: what llama.cpp's converter is given, and what is made of its answer. A stand-in converts."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folders import contents, same, tensors
from packed_models import save_packed
from uneven_models import save_uneven

from llmprune import export
from llmprune.errors import LlmpruneError, ModelError

# Writes a GGUF header, and beside it what it was called with and the tensors that it found.
STAND_IN = """
import shutil, struct, sys
from pathlib import Path
folder, outfile = Path(sys.argv[1]), Path(sys.argv[3])
here = Path(__file__).parent
(here / "called.txt").write_text("\\n".join(sys.argv[1:]))
shutil.copyfile(folder / "model.safetensors", here / "read.safetensors")
outfile.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 21, 5))
"""


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    return save_packed(tmp_path / "made")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    return converter(tmp_path / "llama.cpp", STAND_IN)


def converter(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(text)
    return folder


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_the_converter_reads_a_dense_folder(made: Path, clone: Path, kind: str) -> None:
    before = contents(made)
    report = export(made / kind, "gguf", llama_cpp=clone, gguf_type="q8_0")
    assert report.output == made / f"{kind}.gguf"
    assert (report.bytes, report.facts["tensors"], report.facts["type"]) == (24, "21", "q8_0")
    folder, *options = (clone / "called.txt").read_text().splitlines()
    assert (folder == str(made / kind)) == (kind == "dense")
    assert (options[0], options[2:]) == ("--outfile", ["--outtype", "q8_0"])
    read = tensors(clone)
    assert all(same(read[key] + 0.0, tensor + 0.0) for key, tensor in tensors(made / "dense").items())
    assert contents(made) == {**before, f"{kind}.gguf": report.output.read_bytes()}


def test_it_is_found_by_path_or_by_the_environment(made: Path, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert export(made / "dense", "gguf", made / "a.gguf", llama_cpp=clone / "convert_hf_to_gguf.py")
    monkeypatch.setenv("LLAMA_CPP", str(clone))
    assert export(made / "dense", "gguf", made / "new" / "b.gguf").output.is_file()


def test_an_earlier_file_is_replaced_when_asked(made: Path, clone: Path) -> None:
    (made / "a.gguf").write_text("mine")
    assert export(made / "dense", "gguf", made / "a.gguf", overwrite=True, llama_cpp=clone)
    assert (made / "a.gguf").read_bytes().startswith(b"GGUF")


def test_layers_that_differ_are_refused_before_it_is_called(made: Path, clone: Path, tmp_path: Path) -> None:
    save_uneven(tmp_path / "uneven")
    with pytest.raises(ModelError, match="has decoder layers that differ in size"):
        export(tmp_path / "uneven", "gguf", llama_cpp=clone)
    assert not (clone / "called.txt").exists()
    assert not (tmp_path / "uneven.gguf").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys; print('loading'); sys.exit('Model XForCausalLM is not supported')", "XForCausalLM is not supp"),
        ("raise SystemExit(3)", "exit code 3"),
        ("import missing_package_of_the_converter", "No module named 'missing_package_of_the_converter'"),
        ("pass", "did not write dense.gguf"),
        ("import sys; open(sys.argv[3], 'w').write('no GGUF, but longer than its header')", "or not as GGUF"),
        ("import sys; open(sys.argv[3], 'wb').write(b'GGUF' + bytes(20))", "or not as GGUF"),
    ],
)
def test_what_fails_in_it_is_said_and_leaves_nothing(made: Path, tmp_path: Path, text: str, message: str) -> None:
    before = contents(made)
    with pytest.raises(LlmpruneError, match=message) as caught:
        export(made / "dense", "gguf", llama_cpp=converter(tmp_path / "broken", text))
    assert caught.value.fix
    assert contents(made) == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda made, clone: export(made / "dense", "gguf"), "nothing says where it is"),
        (lambda made, clone: export(made / "dense", "gguf", llama_cpp=made), "converter is not at"),
        (lambda made, clone: export(made / "dense", "gguf", made / "packed", llama_cpp=clone), "exists"),
        (lambda made, clone: export(made / "dense", "gguf", sys.executable, llama_cpp=clone), "exists"),
        (lambda made, clone: export(made / "none", "gguf", llama_cpp=clone), "no folder"),
    ],
)
def test_refusals(made: Path, clone: Path, call: Callable[[Path, Path], Any], message: str) -> None:
    with pytest.raises(LlmpruneError, match=message) as caught:
        call(made, clone)
    assert caught.value.fix
    assert not (clone / "called.txt").exists()
