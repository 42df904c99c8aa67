"""Differences of scores and their errors, beside plain formulas."""

import math
import statistics
from typing import Any

import pytest

from llmprune.measuring.tasks.significance import compare_results, paired_test

BETTER = {"acc": True, "word_perplexity": False, "f1": True, "strange": None}

# (log-likelihood, words) of five documents by two models.
DENSE_PAIRS = [(-31.0, 10), (-62.5, 21), (-18.0, 7), (-90.0, 28), (-44.0, 15)]
PRUNED_PAIRS = [(-33.0, 10), (-66.0, 21), (-19.5, 7), (-95.0, 28), (-47.5, 15)]


def results(value: Any, stderr: Any, samples: list[Any], metric: str = "acc", filtered: str = "none") -> dict[str, Any]:
    """What lm-eval returns for one task."""
    rows = [
        {"doc_id": index, "doc_hash": f"hash{index}", "filter": filtered, metric: sample}
        for index, sample in enumerate(samples)
    ]
    scores = {f"{metric},{filtered}": value, f"{metric}_stderr,{filtered}": stderr, "alias": "t", "sample_len": 5}
    return {
        "results": {"t": scores},
        "samples": {"t": rows},
        "n-samples": {"t": {"original": 9, "effective": len(samples)}},
        "higher_is_better": {"t": {metric: BETTER[metric]}},
    }


def accuracy(samples: list[int]) -> dict[str, Any]:
    mean = statistics.mean(samples)
    return results(mean, statistics.stdev(samples) / math.sqrt(len(samples)), samples)


def perplexity(pairs: list[tuple[float, int]]) -> float:
    return math.exp(-sum(value for value, _ in pairs) / sum(weight for _, weight in pairs))


def test_the_error_of_a_mean_is_that_of_the_differences() -> None:
    dense, pruned = [1, 1, 0, 1, 0, 1, 1, 0, 1, 1], [1, 0, 0, 1, 0, 0, 1, 1, 0, 1]
    (row,) = compare_results(accuracy(pruned), accuracy(dense))
    differences = [one - other for one, other in zip(pruned, dense, strict=True)]
    assert row.delta == pytest.approx(-0.2)
    assert row.delta_stderr == pytest.approx(statistics.stdev(differences) / math.sqrt(10))
    assert (row.test, row.significant, row.verdict) == ("paired", False, "within error")
    assert (row.value, row.dense_value, row.documents) == (0.5, 0.7, 10)
    assert row.stderr == accuracy(pruned)["results"]["t"]["acc_stderr,none"]


def test_pairing_shows_what_two_independent_errors_hide() -> None:
    dense = [1] * 60 + [0] * 40
    pruned = [1] * 52 + [0] * 48
    (paired,) = compare_results(accuracy(pruned), accuracy(dense))
    assert paired.verdict == "worse"
    other = accuracy(dense)
    other["samples"]["t"][3]["doc_hash"] = "another question"
    (row,) = compare_results(accuracy(pruned), other)
    assert (row.test, row.verdict) == ("unpaired", "within error")
    assert row.delta_stderr == pytest.approx(math.hypot(row.stderr or 0, row.dense_stderr or 0))


def test_documents_are_matched_by_what_they_are_and_not_by_their_order() -> None:
    dense, pruned = accuracy([1, 1, 0, 1, 0]), accuracy([1, 0, 0, 1, 0])
    before = compare_results(pruned, dense)
    dense["samples"]["t"].reverse()
    assert compare_results(pruned, dense) == before


def test_the_error_of_a_perplexity_leaves_out_each_document_in_turn() -> None:
    count = len(DENSE_PAIRS)
    without = [
        perplexity(PRUNED_PAIRS[:i] + PRUNED_PAIRS[i + 1 :]) - perplexity(DENSE_PAIRS[:i] + DENSE_PAIRS[i + 1 :])
        for i in range(count)
    ]
    jackknife = math.sqrt((count - 1) / count * sum((d - statistics.mean(without)) ** 2 for d in without))
    pruned, dense = (
        results(perplexity(pairs), "N/A", pairs, "word_perplexity") for pairs in (PRUNED_PAIRS, DENSE_PAIRS)
    )
    (row,) = compare_results(pruned, dense)
    assert row.delta_stderr == pytest.approx(jackknife)
    assert (row.stderr, row.test, row.verdict) == (None, "paired", "worse")
    (back,) = compare_results(dense, pruned)
    assert back.verdict == "better"


def test_perplexities_are_held_against_their_error_by_their_logarithms() -> None:
    # Every document a little worse; but they are so unlike one another that nobody knows the level of either.
    dense = [(-1.0, 1), (-2.0, 1), (-3.0, 1), (-9.0, 1)]
    pruned = [(value - 0.1 - 0.01 * index, weight) for index, (value, weight) in enumerate(dense)]
    (row,) = compare_results(
        *(results(perplexity(pairs), "N/A", pairs, "word_perplexity") for pairs in (pruned, dense))
    )
    assert row.delta is not None
    assert row.delta_stderr is not None
    assert row.delta < 2 * row.delta_stderr
    assert row.verdict == "worse"
    noisy = [(value - 0.1 * (-1) ** index, weight) for index, (value, weight) in enumerate(dense)]
    (row,) = compare_results(*(results(perplexity(pairs), "N/A", pairs, "word_perplexity") for pairs in (noisy, dense)))
    assert row.verdict == "within error"


@pytest.mark.parametrize(
    ("score", "samples"),
    [
        (lambda pairs: -sum(v for v, _ in pairs) / sum(w for _, w in pairs) / math.log(2), (PRUNED_PAIRS, DENSE_PAIRS)),
        (lambda values: math.exp(-statistics.mean(values)), ([-1.0, -2.5, -0.5], [-0.9, -2.0, -0.75])),
    ],
    ids=["bits_per_byte", "perplexity"],
)
def test_other_scores_of_sums_are_recognised(score: Any, samples: tuple[list[Any], list[Any]]) -> None:
    found = paired_test((score(samples[0]), score(samples[1])), samples)
    without = [score(samples[0][:i] + samples[0][i + 1 :]) - score(samples[1][:i] + samples[1][i + 1 :]) for i in
               range(len(samples[0]))]  # fmt: skip
    count = len(without)
    assert found is not None
    assert found.error == pytest.approx(
        math.sqrt((count - 1) / count * sum((d - statistics.mean(without)) ** 2 for d in without))
    )


def test_a_score_that_is_no_such_function_is_not_paired() -> None:
    pruned, dense = (
        results(value, error, [(1, 1), (0, 1), (1, 0)], "f1") for value, error in ((0.4, 0.03), (0.5, 0.04))
    )
    (row,) = compare_results(pruned, dense)
    assert (row.test, row.delta_stderr) == ("unpaired", pytest.approx(0.05))
    assert row.verdict == "within error"
    assert paired_test((0.5, 0.5), ([{"a": 1}, {"a": 2}], [{"a": 1}, {"a": 2}])) is None


def test_nothing_is_said_without_an_error() -> None:
    pruned, dense = (results(value, "N/A", ["a", "b"], "strange") for value in (0.4, 0.9))
    (row,) = compare_results(pruned, dense)
    assert (row.test, row.delta_stderr, row.significant, row.verdict) == (None, None, None, "")
    assert row.delta == pytest.approx(-0.5)
    (single,) = compare_results(results(1.0, "N/A", [1]), results(0.0, "N/A", [0]))
    assert (single.test, single.significant) == (None, None)


def test_a_score_that_is_not_finite_is_none() -> None:
    (row,) = compare_results(results(math.inf, "N/A", [1, 2]), accuracy([1, 0]))
    assert (row.value, row.dense_value, row.delta, row.verdict) == (None, 0.5, None, "")


def test_filters_are_scores_of_their_own() -> None:
    content = accuracy([1, 0, 1])
    content["results"]["t"] |= {"acc,strict": 0.25, "acc_stderr,strict": 0.1}
    rows = compare_results(content)
    assert [(row.filter, row.value, row.stderr) for row in rows][1] == ("strict", 0.25, 0.1)
    assert rows[0].delta is None


def test_a_group_has_the_documents_of_its_tasks() -> None:
    pruned, dense = accuracy([1, 0, 1]), accuracy([1, 1, 1])
    for content in (pruned, dense):
        content["results"]["group"] = {"acc,none": 0.5, "acc_stderr,none": 0.3, "alias": "group"}
        content["group_subtasks"] = {"group": ["t"]}
    row = compare_results(pruned, dense)[1]
    assert (row.task, row.documents, row.test) == ("group", 3, "unpaired")
    assert row.delta_stderr == pytest.approx(0.3 * math.sqrt(2))
