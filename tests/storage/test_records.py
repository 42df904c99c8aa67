"""Records on disk, read as what they must be."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from malformed import NEST
from tiny_models import build, recipe, save

from llmprune import prune
from llmprune.errors import CheckpointError, LlmpruneError, ResumeError
from llmprune.pruning.sweep.ledger import RECORD_NAME, read_record
from llmprune.storage.folders import MANIFEST_NAME
from llmprune.storage.output import OutputFolder
from llmprune.storage.records import PlainName, checked, read_as, wrong_type
from llmprune.storage.report import REPORT_NAME, load_report

# What stands in the place of a value, or of the whole.
WRONG: tuple[Any, ...] = (5, "x", None, [], [5], {}, {"x": 5}, -1, 1.5, True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "invalid JSON"), (NEST, "invalid JSON: recursion limit"),
        ("[]", "input should be an object"), ("\udcff", "invalid JSON"),
        ('{"a": "1"}', "a: input should be a valid integer, not '1'"),
        ('{"a": "x", "b": "y"}', r"a: .* \(and 1 more faults\)"), ('{"a": true}', "a: .* not True"),
    ],
)  # fmt: skip
def test_the_fault_and_its_place_are_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ResumeError, match=f"cannot be read: {said}") as caught:
        read_as(file, dict[str, int], expected="numbers", fix="none", raised=ResumeError)
    assert (caught.value.expected, caught.value.fix) == ("numbers", "none")


def test_a_name_leads_nowhere_else() -> None:
    for name in ("", ".", "..", "a/b", "/a", "a\0b", "a" * 300, "ä" * 200):
        with pytest.raises(CheckpointError, match="not a valid name"):
            checked(name, PlainName, "x", expected="", fix="")
    assert checked("model-1.safetensors", PlainName, "x", expected="", fix="") == "model-1.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    text = folder / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": " ".join(f"w{4 + word}" for word in range(40))}) for _ in range(6)))
    settings = recipe(method="magnitude", calibration={"source": str(text), "samples": 2, "length": 16})
    source = save(build("llama"), folder / "source")
    prune(source, settings, folder / "out")
    return folder


def variants(good: dict[str, Any]) -> list[Any]:
    """The record with each of its values, and of those inside, replaced or left out."""
    made: list[Any] = [*WRONG, {**good, "unknown": 5}]
    for key in good:
        made += [{name: value for name, value in good.items() if name != key}]
        made += [{**good, key: value} for value in WRONG]
    return made


def test_no_manifest_leads_to_a_foreign_error(finished: Path, tmp_path: Path) -> None:
    """It is refused, or what it does not vouch for is done again."""
    good = json.loads((finished / "out" / MANIFEST_NAME).read_text())
    name, layer = next(iter(good["layers"].items()))
    inside = [{**good, "layers": {**good["layers"], name: one}} for one in variants(layer)]
    rows = [{**good, "layers": {name: {**layer, "rows": [one]}}} for one in variants(layer["rows"][0])]
    refused = 0
    for number, content in enumerate([*map(json.dumps, (*variants(good), *inside, *rows)), "{", NEST, ""]):
        output = tmp_path / str(number)
        output.mkdir()
        (output / MANIFEST_NAME).write_text(content)
        try:
            OutputFolder.open(output, good["keys"], resume=True, overwrite=False)
        except LlmpruneError:
            refused += 1
    assert refused > 100


def test_no_report_leads_to_a_foreign_error(finished: Path, tmp_path: Path) -> None:
    good = json.loads((finished / "out" / REPORT_NAME).read_text())
    row = {**good, "rows": good["rows"][:1]}
    made = [*variants(good), *({**row, "rows": [one]} for one in variants(row["rows"][0]))]
    refused = 0
    for content in [json.dumps(one) for one in made] + ["{", NEST, ""]:
        (tmp_path / REPORT_NAME).write_text(content)
        try:
            report = load_report(tmp_path)
            assert report.left is not None
            assert report._repr_html_()
        except CheckpointError:
            refused += 1
    assert refused > 100


def test_no_record_of_a_sweep_leads_to_a_foreign_error(tmp_path: Path) -> None:
    run = {"name": "a", "settings": {}, "recipe": {}, "state": "waiting", "error": None}
    good = {"format": 1, "keys": {}, "runs": [run]}
    refused = 0
    for content in [json.dumps(one) for one in (*variants(good), *({**good, "runs": [v]} for v in variants(run)))]:
        (tmp_path / RECORD_NAME).write_text(content)
        try:
            read_record(tmp_path, {})
        except ResumeError:
            refused += 1
    assert refused > 60


@dataclass(frozen=True)
class Knobs:
    steps: int = 1
    rate: float = 0.5
    flag: bool = False
    kind: Literal["a", "b"] = "a"
    names: tuple[str, ...] | None = None


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"steps": 2, "rate": 1, "flag": True, "names": ("x",)}, ""),
        ({"kind": 3, "unknown": 3}, ""),  # which the dataclass itself refuses
        ({"rate": 0.1, "steps": 2.0}, "steps"),
        ({"steps": True}, "steps"),
        ({"rate": "0.1"}, "rate"),
        ({"flag": "no"}, "flag"),
        ({"names": "x"}, "names"),
    ],
)
def test_a_value_of_another_type_is_named(values: dict[str, Any], found: str) -> None:
    name, expected = wrong_type(Knobs, values)
    assert name == found
    assert bool(expected) == bool(found)
