"""Comparing runs: what is comparable, what is not, and the Pareto front."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from synthetic_runs import (
    Page,
    bench,
    header,
    perplexity,
    recovered,
    report,
    row,
    score,
    smaller,
    structure,
    write_bench,
    write_evaluation,
    write_run,
)

from llmprune.errors import CheckpointError, ModelError
from llmprune.pages import RunRow, compare, write_comparison
from llmprune.pages.comparison_page import pareto
from llmprune.storage.hub import checkpoint_digest
from llmprune.storage.report import Report

OTHER = "b" * 64


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A checkpoint that no run was made from, unless a report says so."""
    folder = tmp_path / "org" / "dense"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    save_file({"a.weight": torch.ones(10, 30)}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_row_holds_what_was_measured(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", report(layers=1))
    (found,) = compare([folder]).runs
    assert (found.name, found.folder, found.model, found.recipe) == ("one", str(folder), "org/model", "sparsegpt 0.5")
    assert (found.sparsity, found.parameters, found.nonzeros) == (0.5, 140, 140 - 7 * 20)
    assert found.stored_bytes == 140 * 4
    assert (found.text, found.perplexity, found.kl_divergence, found.agreement) == ("a" * 64, 25.0, 0.125, 0.8125)
    assert (found.prefill_speedup, found.decode_speedup, found.score) == (None, None, None)


def test_a_run_without_weights_is_as_large_as_its_report_says(tmp_path: Path) -> None:
    found = compare([write_run(tmp_path / "a", Report((), smaller(), (structure(0, 32),)), weights=False)]).runs[0]
    assert (found.stored_bytes, found.parameters, found.sparsity) == (4_000_000, 6_000_000, None)
    assert (found.prefill_speedup, found.decode_speedup) == (2.0, pytest.approx(1.5))
    assert found.speed_of == "decoder layers, a CPU"
    assert found.recipe == "budget -25%, depth -1"


def test_packed_checkpoints_have_the_parameters_that_they_stand_for(tmp_path: Path) -> None:
    from packed_models import save_packed

    folder = save_packed(tmp_path / "made")
    counted = [compare([write_report_into(folder / name)]).runs[0] for name in ("dense", "packed")]
    assert counted[0].parameters == counted[1].parameters
    assert (counted[0].stored_bytes or 0) > (counted[1].stored_bytes or 0)


def write_report_into(folder: Path) -> Path:
    report().save(folder)
    return folder


def test_runs_on_different_texts_are_kept_apart(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "a"),
        write_run(tmp_path / "b", report(digest=OTHER)),
        write_run(tmp_path / "c"),
        write_run(tmp_path / "d", report(evaluation=None)),
    ]
    found = compare(folders)
    assert {text: [r.name for r in rows] for text, rows in found.groups.items()} == {
        "a" * 64: ["model", "a", "c"],
        OTHER: ["model", "b"],
        None: ["d"],
    }
    assert "different tokens and are not comparable" in " ".join(found.notes)
    assert found.title(OTHER).startswith("8,160 tokens of self-generated text, in sequences of 256 (sha256 bbb")
    assert compare(folders[:1] + folders[2:]).notes == ()


def test_the_dense_model_is_a_row_of_every_group(tmp_path: Path, dense: Path) -> None:
    source = checkpoint_digest(dense)
    folders = [
        write_run(tmp_path / "a", report(source=source)),
        write_run(tmp_path / "b", report(digest=OTHER)),
    ]
    found = compare(folders, against=dense)
    first, _, second, _ = found.rows
    assert (first.name, first.recipe, first.text, first.perplexity) == ("dense", "dense", "a" * 64, 20.0)
    assert (first.parameters, first.nonzeros, first.kl_divergence, first.agreement) == (300, 300, 0.0, 1.0)
    # Nobody has measured it on the other text.
    assert (second.recipe, second.text, second.perplexity, second.parameters) == ("dense", OTHER, None, 300)
    assert found.notes == ("perplexities of different groups were measured on different tokens and are not comparable",)


def test_what_runs_know_of_their_dense_model_is_a_row(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "a", report(parameters=10_000_000)),
        write_run(tmp_path / "b", Report((row(0, "x"),), smaller(source="f" * 64, model="org/other"))),
        write_run(tmp_path / "c", report(parameters=10_000_000)),
    ]
    first, second, *_ = compare(folders).rows
    assert (first.name, first.model, first.recipe, first.perplexity) == ("model", "org/model", "dense", 20.0)
    assert (first.parameters, first.stored_bytes, first.kl_divergence) == (10_000_000, 6_000_000, 0.0)
    assert (second.name, second.parameters, second.stored_bytes) == ("other", 8_000_000, 16_000_000)
    assert [found.name for found in compare(folders).runs] == ["a", "b", "c"]


def test_a_model_that_no_run_was_made_from_is_said(tmp_path: Path, dense: Path) -> None:
    found = compare([write_run(tmp_path / "a")], against=str(dense))
    assert found.rows[0].perplexity is None
    assert found.notes == (f"no run has measured {dense}, so its perplexity is unknown",)


def test_a_recovery_was_measured_beside_its_teacher(tmp_path: Path, dense: Path) -> None:
    """And not beside the pruned model that it began with, which has a figure of its own."""
    folder = write_run(tmp_path / "better", Report((row(0, "x"),), recovered(dense=checkpoint_digest(dense))))
    reference, before, run = compare([folder]).rows
    assert (reference.name, reference.recipe, reference.perplexity) == ("model", "dense", 20.0)
    assert (reference.parameters, reference.stored_bytes) == (9_000_000, 18_000_000)
    assert (before.name, before.recipe, before.perplexity) == ("pruned, before better", "wanda 2:4", 40.0)
    assert (before.kl_divergence, before.agreement, before.sparsity, before.model) == (0.5, 0.5, 0.5, "org/model")
    assert (run.name, run.recipe, run.perplexity, run.sparsity) == ("better", "wanda 2:4, recovered", 25.0, 0.5)
    assert compare([folder]).runs == (run,)
    assert compare([folder], against=dense).rows[0].perplexity == 20.0
    assert compare([folder], against=dense).notes == ()


def test_a_pruned_model_that_is_compared_itself_is_no_reference(tmp_path: Path) -> None:
    pruned = write_run(tmp_path / "pruned", report())
    headers = [recovered(str(pruned)), recovered(str(pruned), digest=OTHER)]
    folders = [write_run(tmp_path / name, Report((), found)) for name, found in zip("ab", headers, strict=True)]
    assert [found.name for found in compare([pruned, *folders]).rows] == [
        "model", "pruned", "a", "model", "pruned, before b", "b",
    ]  # fmt: skip


def test_a_recovery_without_a_teacher_is_compared_by_its_own_figures(tmp_path: Path) -> None:
    alone = {
        "teacher": None, "dense": None, "before": None, "measured": perplexity(25.0, OTHER),
        "perplexity": {"pruned": 40.0, "recovered": 25.0},
    }  # fmt: skip
    folder = write_run(tmp_path / "a", Report((), recovered(recovery=alone, evaluation=None)))
    before, run = compare([folder]).rows
    assert (before.perplexity, before.kl_divergence, run.perplexity, run.text) == (40.0, None, 25.0, OTHER)


def test_the_whole_model_s_speed_goes_before_that_of_its_layers(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", Report((row(0, "x"),), smaller()))
    older = bench("an old GPU", finished="2020-01-01T00:00:00Z")
    write_bench(folder, older, bench())
    other = write_run(tmp_path / "b", Report((row(0, "x"),), smaller()))
    found = compare([folder, other])
    assert (found.runs[0].decode_speedup, found.runs[0].prefill_speedup) == (1.2, 2.0)
    assert found.runs[0].tokens_per_second == 120.0
    assert found.runs[0].speed_of == "whole model, batch 1, a GPU"
    assert found.notes[0] == "speed-ups were measured in different ways and are hardly comparable"
    alone = bench()
    del alone["whole_model"]["dense"]
    write_bench(folder, alone)
    assert compare([folder]).runs[0].speed_of == "decoder layers, a CPU"


def test_tasks_count_where_all_have_them(tmp_path: Path, dense: Path) -> None:
    source = checkpoint_digest(dense)
    folders = [write_run(tmp_path / name, report(source=source)) for name in "abc"]
    wikitext = score("wikitext", "word_perplexity", 31.0, 25.0)
    arc = [score("arc", "acc", 0.3, 0.4), score("arc", "acc_norm", 0.5, 0.7)]
    write_evaluation(folders[0], *arc, score("boolq", "acc", 0.7, 0.9), wikitext)
    write_evaluation(folders[1], *arc, score("winogrande", "acc", 0.6, 0.6))
    found = compare(folders, against=dense)
    scores = {r.name: r.score for r in found.rows}
    assert scores == {"dense": 0.7, "a": 0.5, "b": 0.5, "c": None}
    assert dict(found.rows[1].scores) == {"arc (100 documents)": 0.5, "boolq (100 documents)": 0.7}
    assert found.notes[0] == "tasks: mean of arc (100 documents)"
    assert "boolq (100 documents), winogrande (100 documents)" in found.notes[1]


def test_other_numbers_of_documents_are_other_tasks(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name) for name in "ab"]
    write_evaluation(folders[0], score("arc", "acc", 0.3, None), against=None)
    write_evaluation(folders[1], score("arc", "acc", 0.3, None, documents=7), against=None)
    found = compare(folders)
    assert [r.score for r in found.runs] == [None, None]
    assert found.notes[0] == "the runs have no lm-eval task in common"


def test_parts_of_a_group_do_not_count_twice(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    results = {task: {"acc,none": value} for task, value in (("mmlu", 0.5), ("mmlu_law", 0.1), ("arc", 0.25))}
    content = {"results": results, "group_subtasks": {"mmlu": ["mmlu_law"], "arc": []}}
    (folder / "evaluation.json").write_text(json.dumps(content))
    assert dict(compare([folder]).runs[0].scores) == {"mmlu": 0.5, "arc": 0.25}


def test_names_are_as_long_as_they_have_to_be(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name) for name in ("x/out", "y/out", "z")]
    assert [r.name for r in compare(folders).runs] == ["x/out", "y/out", f"{tmp_path.name}/z"]
    assert [r.name for r in compare(folders[1:]).runs] == ["out", "z"]
    assert [r.name for r in compare([folders[0], folders[0]]).runs] == ["out", "out"]


def test_a_comparison_as_plain_data(tmp_path: Path) -> None:
    evaluation = {**header()["evaluation"], "pruned": perplexity(None, "a" * 64), "kl_divergence": None}
    found = compare([write_run(tmp_path / "a", report(evaluation=evaluation))])
    assert math.isinf(found.runs[0].perplexity or 0)
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (content["rows"][1]["perplexity"], content["rows"][1]["kl_divergence"]) == (None, None)
    assert content["rows"][0]["text"] == "a" * 64
    assert content["texts"].keys() == {"a" * 64}
    assert "infinite" in Page(found._repr_html_()).text


def test_a_comparison_as_a_data_frame(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="the frame is pandas'")
    folder = write_run(tmp_path / "a")
    write_evaluation(folder, score("arc", "acc", 0.25, None), against=None)
    frame = compare([folder, write_run(tmp_path / "b")]).to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["name"]) == ["model", "a", "b"]
    assert frame["arc (100 documents)"][1] == 0.25
    assert math.isnan(frame["arc (100 documents)"][2])


def test_files_beside_the_runs_are_left_out(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    (tmp_path / "sweep.json").write_text("{}")
    assert [row.name for row in compare(sorted(tmp_path.iterdir())).runs] == ["a", "b"]
    with pytest.raises(CheckpointError, match="no folders to compare"):
        compare([tmp_path / "sweep.json"])


def test_mistakes_are_explained(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folders to compare"):
        compare([])
    with pytest.raises(CheckpointError, match=r"has no report\.json|there is no folder"):
        compare([tmp_path])
    with pytest.raises(ModelError, match="missing"):
        compare([write_run(tmp_path / "a")], against="./missing")


def runs(*points: tuple[float | None, float | None]) -> list[RunRow]:
    return [RunRow(str(n), "", "", "", perplexity=y, decode_speedup=x) for n, (x, y) in enumerate(points)]


@pytest.mark.parametrize(
    ("points", "best"),
    [
        ([(1.0, 20.0), (2.0, 25.0), (1.5, 26.0)], ["0", "1"]),
        ([(2.0, 25.0), (1.0, 20.0)], ["1", "0"]),
        ([(1.0, 20.0), (1.0, 20.0)], ["0", "1"]),
        ([(1.0, 20.0), (1.0, 21.0), (2.0, 20.0)], ["2"]),
        # Almost the same speed: no vertical line.
        ([(1.0, 20.0), (1.0001, 21.0), (2.0, 25.0)], ["0", "2"]),
        ([(1.0, None), (None, 20.0), (3.0, 30.0)], ["2"]),
        ([], []),
    ],
)
def test_what_no_other_run_beats(points: Any, best: list[str]) -> None:
    found = pareto(runs(*points), lambda r: r.decode_speedup, lambda r: r.perplexity, larger_x=True, larger_y=False)
    assert [r.name for r in found] == best


def test_quality_against_size_and_speed(tmp_path: Path, dense: Path) -> None:
    source = checkpoint_digest(dense)
    folders = [
        write_run(tmp_path / "a", report(source=source)),
        write_run(tmp_path / "b", Report((row(0, "x"),), smaller(source=source))),
        write_run(tmp_path / "c", report(digest=OTHER)),
    ]
    page = Page(write_comparison(compare(folders, against=dense), tmp_path / "new" / "c.html").read_text())
    # On the other text the dense model's quality is not known, so there is nothing to compare.
    assert set(page.figures) == {f"chart-0-perplexity-{what}" for what in ("size", "nonzero", "speed")}
    front, reference, points = page.figures["chart-0-perplexity-speed"]["data"]
    assert (reference["x"], reference["y"]) == ([1.0], [20.0])
    assert (points["x"], points["y"]) == ([1.5], [25.0])
    assert front["x"] == [1.0, 1.5]
    assert "not comparable" in page.text
    assert "Comparison of 3 runs" in page.text


def test_what_all_runs_share_is_no_chart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, report(size=None), weights=False) for name in "ab"]
    for folder in folders:
        write_bench(folder, bench())
    page = Page(write_comparison(compare(folders), tmp_path / "c.html").read_text())
    assert set(page.figures) == {"chart-0-perplexity-speed"}
    folders = [write_run(tmp_path / name) for name in "cd"]
    page = Page(write_comparison(compare(folders), tmp_path / "c.html").read_text())
    assert "chart-0-perplexity-speed" not in page.figures
