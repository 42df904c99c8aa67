"""What a report holds, that it survives JSON, and that its figures follow from its rows."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from folders import contents, tensors, zeros
from report_rows import row
from tiny_models import build, recipe, save

from llmprune import Report, __version__, prune
from llmprune.errors import CheckpointError, MissingPackageError
from llmprune.pages import Comparison
from llmprune.storage.report import load_report
from llmprune.text.tokens import TextSpec


def header(**changes: Any) -> dict[str, Any]:
    """What pages take from a report, in as few words as possible."""
    side = {"perplexity": 1.5, "tokens_digest": "a", "text": {"source": "self"}, "predicted_tokens": 3, "length": 4}
    return {
        "recipe": {"method": "wanda"},
        "seconds": {"total": 1.0},
        "memory": {"predicted_bytes": 1, "measured_bytes": 2, "baseline_bytes": 3},
        "size": {"stored_bytes": 1, "dense_bytes": 2},
        "evaluation": {"dense": dict(side), "pruned": dict(side), "kl_divergence": 0.1, "agreement": 0.9},
        **changes,
    }


def evaluated(dense: float, pruned: float) -> Report:
    return Report((), {"evaluation": {"dense": {"perplexity": dense}, "pruned": {"perplexity": pruned}}})


def test_figures_follow_from_the_rows() -> None:
    nothing = row(shape=(0, 3), zeros=0, error=None)
    report = Report((row(), row(shape=(5, 8), zeros=10, error=1.25), row(shape=(5, 8), zeros=10, error=0.0), nothing))
    assert row().sparsity == 0.5
    assert report.sparsity == 30 / 100
    assert report.mean_error == 0.5
    summary = report.to_dict()["summary"]
    assert summary == {"sparsity": 0.3, "mean_error": 0.5, "matrices": 4}


def test_figures_that_were_not_measured_are_none() -> None:
    assert Report(()).sparsity == 0
    assert Report((row(error=None),)).mean_error is None
    for header in ({}, {"evaluation": None}):
        assert Report((), header).dense_perplexity is None
        assert Report((), header).pruned_perplexity is None
    assert (evaluated(3.5, 4.5).dense_perplexity, evaluated(3.5, 4.5).pruned_perplexity) == (3.5, 4.5)


def test_a_report_survives_json(tmp_path: Path) -> None:
    unmeasured = row(error=None, damping=None, damping_tried=(), dead_inputs=None)
    report = Report((row(), unmeasured), {"model": "x", "n": 0.1})
    assert report.save(tmp_path) == tmp_path / "report.json"
    assert load_report(tmp_path) == report
    assert list(contents(tmp_path)) == ["report.json"]
    assert json.loads((tmp_path / "report.json").read_text())["rows"][0]["shape"] == [2, 10]


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    for folder, what in ((tmp_path, r"has no report\.json"), (tmp_path / "gone", "there is no folder .*gone")):
        with pytest.raises(CheckpointError, match=what) as caught:
            load_report(folder)
        assert caught.value.expected == "the output folder of a finished run"
        assert "--resume" in caught.value.fix


def test_a_folder_of_runs_is_told_from_a_run(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "report.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no report") as caught:
        load_report(tmp_path)
    assert caught.value.fix == f"name the runs in it: {tmp_path}/*"


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"rows": [{}], "summary": {}}', '{"rows": []}'])
def test_a_damaged_report_is_a_typed_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"report\.json cannot be read") as caught:
        load_report(tmp_path)
    assert "--resume" in caught.value.fix


def test_no_nan_enters_a_report(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        Report((row(error=float("nan")),)).save(tmp_path)
    assert contents(tmp_path) == {}


def test_a_run_s_report_says_what_was_done(tmp_path: Path) -> None:
    source = save(build("llama"), tmp_path / "dense")
    settings = recipe(evaluation={"samples": 2}, exclude=["*.o_proj"])
    prune(source, settings, tmp_path / "pruned")
    written = json.loads((tmp_path / "pruned" / "report.json").read_text())
    assert list(written) == [
        "model", "finished", "recipe", "tokens", "source", "version", "device", "compute_dtype",
        "texts", "host", "parameters", "notes", "seconds", "memory", "size", "evaluation", "answers", "summary",
        "structures", "matches", "rows",
    ]  # fmt: skip
    assert written["model"] == str(source)
    weights = tensors(source)
    assert written["parameters"] == sum(weight.numel() for weight in weights.values())
    assert written["host"].keys() == {"cpu", "threads", "memory_bytes", "system", "python"}
    assert written["recipe"]["exclude"] == ["*.o_proj"]
    assert written["version"].keys() == {"llmprune", "torch", "transformers"}
    assert written["version"]["llmprune"] == __version__
    assert all(len(digest) == 64 for digest in (*written["tokens"].values(), written["source"]))
    for name, samples in (("calibration", 6 + 1), ("evaluation", 2)):
        text = written["texts"][name]
        assert text["digest"] == written["tokens"][name]
        assert (text["source"], text["samples"], text["length"]) == ("self", samples, 24)
    assert written["evaluation"]["dense"]["tokens_digest"] == written["tokens"]["evaluation"]
    assert written["evaluation"]["dense"].keys() == written["evaluation"]["pruned"].keys()
    assert written["evaluation"]["dense"]["stride"] == 24
    assert written["recipe"]["evaluation"]["seed"] != TextSpec().seed


def test_seconds_are_booked_once_and_memory_is_measured(tmp_path: Path) -> None:
    source = save(build("llama"), tmp_path / "dense")
    report = prune(source, recipe(evaluation={"samples": 2}), tmp_path / "pruned")
    seconds = dict(report.header["seconds"])
    total = seconds.pop("total")
    stages = {"text", "load", "forward", "gram", "solve", "write", "dense perplexity", "pruned perplexity", "answers"}
    assert set(seconds) == stages
    assert all(value > 0 for value in seconds.values())
    assert sum(seconds.values()) <= total
    assert sum(row.seconds for row in report.rows) <= seconds["solve"] * 1.05
    memory = report.header["memory"]
    assert memory.keys() == {"predicted_bytes", "measured_bytes", "baseline_bytes", "resident_bytes"}
    assert memory["predicted_bytes"] > 0
    assert all(memory["baseline_bytes"] <= row.peak_bytes for row in report.rows)


def test_a_run_s_rows_are_counted_not_copied(tmp_path: Path) -> None:
    source = save(build("llama"), tmp_path / "dense")
    settings = recipe(rules=[{"match": "*.down_proj", "method": "wanda", "pattern": "2:4"}])
    report = prune(source, settings, tmp_path / "pruned")
    before, after = tensors(source), tensors(tmp_path / "pruned")
    assert [row.name for row in report.rows] == [
        f"model.layers.{layer}.{name}_proj"
        for layer in (0, 1)
        for name in (*(f"self_attn.{letter}" for letter in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
    ]
    for found in report.rows:
        weight = after[f"{found.name}.weight"]
        assert found.layer == ".".join(found.name.split(".")[:3])
        assert found.shape == tuple(before[f"{found.name}.weight"].shape)
        assert found.zeros == zeros(weight)
        assert found.tokens == 6 * 24
        assert found.prior_tokens == 0
        wanda = found.name.endswith("down_proj")
        assert (found.pattern, found.method) == (("2:4", "wanda") if wanda else ("0.5", "sparsegpt"))
        assert (found.damping, found.damping_tried) == ((None, ()) if wanda else (0.01, (0.01,)))
        assert found.error is not None
        assert 0 < found.error < 1


def test_sparsity_of_all_weights_stands_beside_that_of_the_pruned_ones() -> None:
    report = Report((row(), row()), {"parameters": 100})
    assert (report.sparsity, report.overall_sparsity) == (0.5, 0.2)
    assert Report((row(),)).overall_sparsity is None
    assert "50.00% of the weights in the pruned matrices, 20.00% of all weights" in report._repr_html_()


def test_a_report_is_one_line_at_the_prompt() -> None:
    evaluation = {"dense": {"perplexity": 20.0}, "pruned": {"perplexity": 25.0}}
    rows = tuple(row() for _ in range(100))
    report = Report(rows, {"model": "org/model", "evaluation": evaluation})
    shown = "Report(org/model, 100 matrices, sparsity 50.0%, perplexity 20.00 -> 25.00 (x1.25))"
    assert repr(report) == str(report) == shown
    assert repr(Report(())) == "Report()"


def test_a_report_of_a_training_says_what_it_changed() -> None:
    recovery = {"perplexity": {"dense": 20.0, "pruned": 40.0, "recovered": 25.0}}
    found = Report((row(),), {"model": "out/pruned", "recovery": recovery})
    change = "40.00 -> 25.00 (x0.62), dense 20.00"
    assert repr(found) == f"Report(out/pruned, recovered, 1 matrix, sparsity 50.0%, perplexity {change})"
    assert f"<td>{change.replace('>', '&gt;')}</td>" in found._repr_html_()
    del recovery["perplexity"]["dense"]
    assert found.change == ("perplexity", "40.00 -> 25.00 (x0.62)")
    classifier = Report((), {"training": {"measure": "accuracy", "before": 0.5, "after": 0.75}})
    assert repr(classifier) == "Report(trained, accuracy 50.0% -> 75.0%)"


def test_a_report_as_a_data_frame() -> None:
    pandas = pytest.importorskip("pandas", reason="the frame is pandas'")
    frame = Report((row(), row(zeros=5, error=None))).to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["sparsity"]) == [0.5, 0.25]
    assert list(frame["shape"]) == [(2, 10)] * 2
    assert frame["error"].isna().tolist() == [False, True]
    assert {"name", "sparsity"} < set(Report(()).to_dataframe().columns)


def test_a_data_frame_without_pandas_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    for frame in (Report(()).to_dataframe, Comparison((), {}, ()).to_frame):
        with pytest.raises(MissingPackageError, match="needs the package pandas") as caught:
            frame()
        assert caught.value.fix == "pip install pandas"


def test_notebooks_show_a_table() -> None:
    evaluation = {"dense": {"perplexity": 20.0}, "pruned": {"perplexity": 25.0}}
    shown = Report((row(),), {"model": "<b>&", "evaluation": evaluation})._repr_html_()
    assert "<th>model</th><td>&lt;b&gt;&amp;</td>" in shown
    assert "<th>perplexity</th><td>20.00 -&gt; 25.00 (x1.25)</td>" in shown
    assert "<th>sparsity</th><td>" in shown
    assert "of the weights in the pruned matrices" in shown
    assert Report((), {})._repr_html_() == "<table><tr><th>model</th><td></td></tr></table>"


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("recipe", "method"), 5),
        (("recipe", "structures"), "ffn"),
        (("recipe", "structures"), {"ffn": 5}),
        (("recipe", "rules"), True),
        (("seconds",), {"load": 1.0}),
        (("memory", "baseline_bytes"), None),
        (("memory", "measured_bytes"), "8 MB"),
        (("size",), {"stored_bytes": 1}),
        (("answers",), {"prompts": ["a"], "dense": [], "pruned": ["b"], "skipped": ""}),
        (("answers",), {"prompts": ["a"], "dense": [5], "pruned": ["b"], "skipped": ""}),
        (("answers",), {"prompts": ["a"]}),
        (("evaluation", "agreement"), None),
        (("evaluation", "kl_divergence"), []),
        (("evaluation", "dense", "text"), {}),
        (("evaluation", "dense", "text"), {"source": "self", "opening": 5}),
        (("evaluation", "dense", "text"), {"mix": []}),
        (("evaluation", "dense", "text"), {"mix": [{"share": 0.5}]}),
        (("evaluation", "sources"), [{"agreement": 0.5}]),
        (("evaluation", "dense", "length"), "long"),
        (("evaluation", "dense", "stderr"), {}),
    ],
    ids=str,
)
def test_a_header_that_no_page_could_show_is_a_typed_error(tmp_path: Path, keys: tuple[str, ...], value: Any) -> None:
    content = header(answers={"prompts": ["a"], "dense": ["b"], "pruned": ["c"], "skipped": ""})
    Report((), content).save(tmp_path)
    load_report(tmp_path)
    part = content
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    Report((), content).save(tmp_path)
    with pytest.raises(CheckpointError, match=rf"report\.json cannot be read: {keys[0]}"):
        load_report(tmp_path)
