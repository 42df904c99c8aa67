"""Chains and block matching on the page: a line in the summary, and a chart."""

from dataclasses import replace
from pathlib import Path

from synthetic_runs import Page, header, report, row, write_run

from llmprune.losses import StepLoss
from llmprune.pages import write_report
from llmprune.pages.fitted import chain_line, fitting_facts, match_line, match_parts
from llmprune.storage.report import MatchRow, Report

CHAINED = tuple(
    row(layer, name, method="wanda + swaps + refit", losses=losses)
    for layer, name, losses in (
        (0, "mlp.up_proj", (StepLoss("", 0.3), StepLoss("swaps", 0.2), StepLoss("refit", 0.1))),
        (1, "mlp.up_proj", (StepLoss("", 0.5), StepLoss("swaps", 0.5, undone=0.6), StepLoss("refit", 0.2))),
    )
)
MATCHES = (
    MatchRow("model.layers.0", "corrected", 0.2, 0.1, epochs=4, best=2, seconds=1.5),
    MatchRow("model.layers.1", "corrected", 0.4, 0.4, epochs=2, best=0, seconds=0.5),
)


def test_the_mean_loss_after_each_step_and_how_many_were_undone() -> None:
    said = "wanda 0.4, swaps 0.35 (undone for 1 of 2 matrices), refit 0.15 (means of 2 matrices)"
    assert chain_line(CHAINED) == said
    assert fitting_facts(Report(CHAINED)) == [("loss after each step", said)]


def test_every_chain_has_a_line_and_methods_alone_have_none() -> None:
    other = replace(CHAINED[0], method="alps + refit", losses=(StepLoss("", 0.3), StepLoss("refit", 0.25)))
    facts = fitting_facts(Report((*CHAINED, other, row(2, "mlp.up_proj"))))
    assert [text.partition(" ")[0] for _, text in facts] == ["wanda", "alps"]
    assert "alps 0.3, refit 0.25 (means of 1 matrix)" in facts[1][1]
    assert fitting_facts(report()) == []


def test_the_mean_error_before_and_after_and_where_it_helped() -> None:
    said = "mean error 0.3 before, 0.25 after (corrected); lower in 1 of 2 layers"
    assert match_line(MATCHES) == said
    assert fitting_facts(Report((), matches=MATCHES)) == [("block matching", said)]


def test_the_page_has_both_and_a_chart(tmp_path: Path) -> None:
    found = Report(CHAINED, header(), matches=MATCHES)
    page = Page(write_report(write_run(tmp_path, found)).read_text(encoding="utf-8"))
    assert all(text in page.text for _, text in fitting_facts(found))
    assert "chart-matching" in page.figures
    (chart,) = match_parts(found)
    assert chart.table.rows == (("0", "0.2", "0.1", "2 of 4", "1.50"), ("1", "0.4", "0.4", "0 of 2", "0.50"))
    assert match_parts(report()) == []
