"""What report.html says, without a browser."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import (
    KINDS,
    NASTY,
    Page,
    bench,
    header,
    large_report,
    perplexity,
    report,
    row,
    score,
    smaller,
    structure,
    write_bench,
    write_evaluation,
    write_run,
)

from llmprune.errors import CheckpointError
from llmprune.pages import write_report
from llmprune.storage.report import Report

LIMIT = 2_000_000


def written(folder: Path, found: Report | None = None, **more: Any) -> Page:
    return Page(write_report(write_run(folder, found, **more)).read_text(encoding="utf-8"))


def test_a_run_is_summed_up(tmp_path: Path) -> None:
    page = written(tmp_path)
    for said in (
        "model, pruned", "sparsegpt 0.5 · half of it", "perplexity 25.00 dense 20.00", "KL divergence 0.1250",
        "top-1 agreement 81.2%", "ECE (expected calibration error) 0.0125 dense 0.0125",
        "sparsity 50.0% in 21 matrices", "relative output error 0.02", "time 10.0 s",
        "8,160 tokens of self-generated text, in sequences of 256",
        "d" * 64, "damping: 0.01",
    ):  # fmt: skip
        assert said in page.text
    # The weights as they are now, not as the report says: 140 float32 numbers.
    assert "checkpoint size 560 B dense 6.0 MB" in page.text


def test_the_answer_comes_first(tmp_path: Path) -> None:
    evaluation = header()["evaluation"]
    for which, stderr in (("dense", 0.25), ("pruned", 0.5)):
        evaluation[which] |= {"nats_stderr": 0.01, "stderr": stderr}
    host = {"cpu": "a processor", "threads": 2, "memory_bytes": 8_000_000_000, "system": "Linux x", "python": "3.99"}
    page = written(tmp_path, report(evaluation=evaluation, host=host, parameters=2100, notes=["no template"]))
    text = page.text
    assert text.index("model was pruned (sparsegpt 0.5): 50.0% of the weights in 21") < text.index("perplexity 25")
    for said in (
        "matrices are zero (20.0% of all weights); perplexity rises: 20.00 -> 25.00 (x1.25).",
        "perplexity 25.00 ± 0.5 dense 20.00 ± 0.25 (x1.25)", "sparsity 50.0% in 21 matrices; 20.0% of all weights",
        "base model org/model", "note no template", "CPU a processor", "memory 8.0 GB", "python 3.99",
        "command llmprune prune org/model --recipe recipe.yaml --output pruned",
        "± of perplexity one standard error, taking sequences",
    ):  # fmt: skip
        assert said in text


def test_the_tile_says_how_much_smaller_the_checkpoint_is(tmp_path: Path) -> None:
    text = written(tmp_path, weights=False).text
    assert "checkpoint size 4.0 MB dense 6.0 MB; compression ratio 1.50x" in text
    same = {"stored_bytes": 6_000_000, "dense_bytes": 6_000_000}
    assert "dense 6.0 MB; as large as dense" in written(tmp_path, report(size=same), weights=False).text


def test_a_chart_of_equal_values_is_a_sentence(tmp_path: Path) -> None:
    page = written(tmp_path)
    assert "chart-sparsity" not in {*page.figures, *page.names}
    assert "Sparsity of each matrix Sparsity 50.0% everywhere. Numbers:" in page.text
    assert "chart-error" in page.figures


def test_sizes_come_from_the_report_where_the_weights_have_gone(tmp_path: Path) -> None:
    assert "checkpoint size 4.0 MB dense 6.0 MB" in written(tmp_path, weights=False).text


def test_what_was_not_measured_is_left_out_or_said(tmp_path: Path) -> None:
    page = written(tmp_path, report(evaluation=None, memory=None, seconds={"total": 1.0}, size=None), weights=False)
    assert "perplexity not measured" in page.text
    assert not {"structures", "decisions", "evaluation", "speed", "resources"} & set(page.names)
    assert {"summary", "layers", "protocol"} <= set(page.names)
    infinite = {**header()["evaluation"], "pruned": perplexity(None, "a" * 64), "kl_divergence": None}
    text = written(tmp_path, report(evaluation=infinite)).text
    assert "perplexity infinite dense 20.00" in text
    assert "KL divergence not finite" in text


def test_every_kind_of_matrix_is_a_line_over_the_layers(tmp_path: Path) -> None:
    page = written(tmp_path)
    error = page.figures["chart-error"]["data"]
    assert [trace["name"] for trace in error] == list(KINDS)
    assert all(trace["x"] == [0, 1, 2] and trace["y"] == [0.01, 0.02, 0.03] for trace in error)
    rows = tuple(row(layer, kind, zeros=10 * (layer + 1)) for layer in range(3) for kind in KINDS)
    zeros = written(tmp_path, Report(rows, header())).figures["chart-sparsity"]["data"]
    assert zeros[0]["y"] == [0.25, 0.5, 0.75]
    assert (zeros[-1]["name"], zeros[-1]["y"]) == ("all matrices", [0.5, 0.5])


def test_experts_are_one_point_that_says_how_far_they_differ(tmp_path: Path) -> None:
    rows = [
        row(0, "mlp.experts.0.up_proj", error=0.1, zeros=10),
        row(0, "mlp.experts.1.up_proj", error=0.3, zeros=30, prior_tokens=5, damping_tried=(0.01, 0.1)),
        row(0, "mlp.experts.2.up_proj", error=None, zeros=20),
    ]
    page = written(tmp_path, Report(tuple(rows), header()))
    (trace,) = page.figures["chart-error"]["data"]
    assert (trace["name"], trace["x"], trace["y"]) == ("mlp.experts.*.up_proj", [0], [0.2])
    (hover,) = trace["text"]
    for said in (
        "3 x 4 x 10",
        "error 0.2, 0.1 to 0.3",
        "sparsity 50.00%",
        "increased for 1",
        "1 with too few tokens",
        "in 1.5 s",
    ):
        assert said in hover
    assert "dampening increased for 1 matrix" in page.text


def test_an_error_that_was_not_measured_is_a_gap(tmp_path: Path) -> None:
    page = written(tmp_path, Report((row(0, "a"), row(1, "a", error=None)), header()))
    assert page.figures["chart-error"]["data"][0]["y"] == [0.01, None]


def test_structures_and_their_evidence(tmp_path: Path) -> None:
    structures = (structure(0, 64 - 16), structure(2, 32, error=None))
    page = written(tmp_path, Report((), smaller(), structures))
    (kept,) = page.figures["chart-kept"]["data"]
    # The layer between lost nothing: no line leads across it.
    assert (kept["name"], kept["x"], kept["y"]) == ("ffn of mlp.down_proj", [0, 1, 2], [0.75, None, 0.5])
    assert "48 of 64 kept" in kept["text"][0]
    assert page.figures["chart-structure-error"]["data"][0]["y"] == [0.02, None, None]
    budget = page.figures["chart-budget"]["data"]
    assert [trace["y"] for trace in budget] == [[0.0, 0.125, 0.25, 0.375], [0.25] * 4]
    assert [trace["line"].get("dash") for trace in budget] == [None, "dash"]
    assert page.figures["chart-sensitivity"]["data"][0]["y"] == [0.01, 0.005, 0.00333333, 0.0025]
    kept, removed = page.figures["chart-depth"]["data"]
    assert (kept["y"], removed["y"]) == ([0.5, None, None], [None, None, 0.1])
    assert page.figures["chart-width"]["data"][0]["y"] == [0.9, 0.95]
    for said in (
        "predicted KL divergence 0.11 nats", "with equal widths 0.15 nats", "parameters 75.0% 6,000,000",
        "lower bound for any choice 0.1 nats", "loses 25% of its groups", "0.005 (-16)",
        "there. ffn: chosen by obs, refitted.",
        "FFN channels 80 of 128 in 2 of 3 layers, 2 different widths", "budget -25%, depth -1",
        "without a chart oracle", "decode, one token 6.00 4.00 1.50", "decoder layers 4 3 75.0%",
        "hidden channels 256 192 75.0%",
    ):  # fmt: skip
        assert said in page.text
    assert "chart-error" not in page.figures


def test_time_and_memory(tmp_path: Path) -> None:
    page = written(tmp_path)
    (time,) = page.figures["chart-time"]["data"]
    assert (time["y"], time["x"]) == (["load", "solve", "write", "other"], [1.0, 6.5, 0.5, 2.0])
    assert "10.0 s in total" in page.text
    assert "Above a baseline of 1.0 MB (on a CPU what the process" in page.text
    (memory,) = page.figures["chart-memory"]["data"]
    assert (memory["y"], memory["x"]) == (["predicted", "measured"], [9.0, 8.0])
    peaks, predicted = page.figures["chart-peaks"]["data"]
    assert peaks["y"] == [2.0, 3.0, 4.0]
    assert predicted["y"] == [9.0, 9.0]
    structures = tuple(structure(layer, 32, peak_bytes=(layer + 4) * 1_000_000) for layer in range(2))
    page = written(tmp_path, Report((), smaller(), structures))
    assert page.figures["chart-peaks"]["data"][0]["y"] == [3.0, 4.0]


def test_comparisons_of_llmprune_eval_are_shown_as_they_were_written(tmp_path: Path) -> None:
    write_run(tmp_path)
    write_evaluation(
        tmp_path,
        score("arc_easy", "acc", 0.5, 0.625),
        score("wikitext", "word_perplexity", 31.0, 25.0, delta_stderr=None, verdict=""),
    )
    page = Page(write_report(tmp_path).read_text())
    assert "arc_easy acc 0.625 ± 0.030 0.500 ± 0.020 -0.125 ± 0.010 worse" in page.text
    assert "wikitext word_perplexity 25.000 ± 0.030 31.000 ± 0.020 +6.000 " in page.text
    assert "for perplexities, of the log-perplexity" in page.text
    dense, pruned = page.figures["chart-tasks"]["data"]
    assert (dense["x"], dense["y"], pruned["y"]) == (["arc_easy: acc"], [0.625], [0.5])
    assert pruned["error_y"]["array"] == [0.02]


@pytest.mark.parametrize(
    ("value", "higher", "verdict"),
    [(0.5, True, "worse"), (0.5, False, "better"), (0.592, True, "within error"), (0.7, None, "differs")],
)
def test_files_of_lm_eval_itself_are_compared_without_pairs(
    tmp_path: Path, value: float, higher: bool | None, verdict: str
) -> None:
    write_run(tmp_path)
    for name, found in (("evaluation", value), ("evaluation-dense", 0.6)):
        content = {
            "results": {"arc": {"alias": "arc", "acc,none": found, "acc_stderr,none": 0.003, "f1,x": "N/A"}},
            "higher_is_better": {"arc": {"acc": higher}},
            "n-shot": {"arc": 5},
            "n-samples": {"arc": {"effective": 1000}},
        }
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    text = Page(write_report(tmp_path).read_text()).text
    numbers = f"0.6000 ± 0.0030 {value:.4f} ± 0.0030 {value - 0.6:+.4f} ± 0.0042"
    line = f"arc (5-shot, 1,000 documents) acc {numbers} {verdict}"
    assert line in text
    assert "f1" not in text


def test_products_that_are_slower_or_wrong_are_named(tmp_path: Path) -> None:
    write_run(tmp_path)
    write_bench(tmp_path, bench())
    page = Page(write_report(tmp_path).read_text())
    trace, dense = page.figures["chart-bench-0"]["data"]
    assert (trace["x"], trace["y"]) == ([1, 64], [1.5, 0.8])
    assert (dense["x"], dense["y"]) == ([1, 512], [1.0, 1.0])
    for said in (
        "nm 64 80.0 100.0 0.80 1.0e-03 slower", "nm 512 inf wrong, not timed", "pruned 1 0.5 120.0 ±0.0 1.20 10.0 20.0",
        "No sparse kernel to measure (it is slower): model.layers.0: mlp.down_proj 64 x 32", "The whole model on a GPU",
    ):  # fmt: skip
        assert said in page.text


@pytest.mark.parametrize("text", ["{", "[]", '{"x": 1}', '{"rows": [{}]}', '{"results": 3}'])
def test_damaged_files_beside_a_report_are_named_not_fatal(tmp_path: Path, text: str) -> None:
    write_run(tmp_path)
    for name in ("evaluation.json", "bench.json"):
        (tmp_path / name).write_text(text)
    page = Page(write_report(tmp_path).read_text())
    assert "evaluation.json is ignored" in page.text
    assert "bench.json is ignored" in page.text


def test_names_from_outside_are_text(tmp_path: Path) -> None:
    rows = tuple(dataclasses.replace(row(0, NASTY), pattern=NASTY, method=NASTY) for _ in range(2))
    recipe = {"description": NASTY, "pattern": NASTY, "method": {NASTY: {}}}
    seconds = {"total": 2.0, NASTY: 1.0}
    device = header(recipe=recipe, seconds=seconds, device=NASTY, model=NASTY, version={NASTY: NASTY})
    write_run(tmp_path, Report(rows, device))
    write_evaluation(tmp_path, score(NASTY, NASTY, 0.5, 0.5))
    write_bench(tmp_path, bench(NASTY))
    page = Page(write_report(tmp_path).read_text())
    assert sum(tag == "script" for tag, _ in page.tags) == 3
    assert not [tag for tag, _ in page.tags if tag == "b" and "alert" in tag]
    assert NASTY in page.text
    assert "<" not in page.scripts["figures"]
    names = [trace["name"] for trace in page.figures["chart-error"]["data"]]
    assert all("<" not in name for name in names)


def test_the_page_fetches_nothing_and_every_chart_has_its_numbers(tmp_path: Path) -> None:
    write_bench(write_run(tmp_path, large_report()), bench())
    page = Page(write_report(tmp_path).read_text())
    for _, attributes in page.tags:
        assert "src" not in attributes
        assert str(attributes.get("href", "#")).startswith("#")
    source = re.sub(r'<script type="text/plain" id="plotly">.*?</script>', "", (tmp_path / "report.html").read_text())
    assert "http" not in source
    assert len(page.figures) >= 9
    assert len(set(page.names)) == len(page.names)
    assert set(page.figures) <= set(page.names)
    assert sum(tag == "figure" for tag, _ in page.tags) == len(page.figures)
    assert sum(tag == "figcaption" for tag, _ in page.tags) == len(page.figures)
    assert sum(tag == "summary" for tag, _ in page.tags) >= len(page.figures)
    labels = [attributes["aria-label"] for _, attributes in page.tags if attributes.get("role") == "img"]
    assert len(labels) == len(page.figures)
    assert all(labels)
    linked = {str(attributes["href"])[1:] for tag, attributes in page.tags if tag == "a"}
    assert linked == {str(a["id"]) for tag, a in page.tags if tag == "section"}
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags


def test_a_large_model_stays_small(tmp_path: Path) -> None:
    write_run(tmp_path, large_report(), weights=False)
    page = Page(write_report(tmp_path).read_text())
    assert (tmp_path / "report.html").stat().st_size < LIMIT
    # Without the library: what the report itself adds.
    assert len(page.scripts["figures"]) < 500_000
    traces = page.figures["chart-error"]["data"]
    assert len(traces) == 7 + 3
    assert sum(len(trace["x"]) for trace in traces) == 80 * 7


def test_all_figures_of_all_pages_are_valid_to_plotly(tmp_path: Path) -> None:
    objects = pytest.importorskip("plotly.graph_objects", reason="the plotting library validates")
    write_run(tmp_path, large_report())
    write_evaluation(tmp_path, score("arc", "acc", 0.5, None), against=None)
    write_bench(tmp_path, bench())
    for figure in Page(write_report(tmp_path).read_text()).figures.values():
        objects.Figure(figure)


def test_the_same_report_gives_the_same_bytes(tmp_path: Path) -> None:
    first = write_report(write_run(tmp_path)).read_bytes()
    assert write_report(tmp_path).read_bytes() == first


def test_a_folder_without_a_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no report\.json|there is no folder"):
        write_report(tmp_path)
