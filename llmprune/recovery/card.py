"""The model card of a recovered checkpoint: README.md with the Hub's metadata."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from llmprune.pages.cards import auto_class, fenced, loading, measured_on, origin, plain, repeated, save_card
from llmprune.pages.labels import measured_text
from llmprune.pages.recovered import recovered_line
from llmprune.recovery.options import RecoveryOptions
from llmprune.storage.companions import ADAPTER_FOLDER
from llmprune.storage.report import Report
from llmprune.units import quantity


def write_card(folder: Path, report: Report) -> None:
    """Write README.md: what was trained, how, and what it won.

    Args:
        folder: the recovered checkpoint.
        report: of the recovery.
    """
    recovery = report.header["recovery"]
    adapter = recovery["options"]["adapter"]
    tags = ["recovered", "sparse", *([] if adapter == "none" else [adapter])]
    save_card(folder, recovery["teacher"] or "", tags, _body(folder, report.header, recovery))


def _body(folder: Path, header: Mapping[str, Any], recovery: Mapping[str, Any]) -> list[str]:
    name = plain(Path(header["model"]).name)
    return [
        f"# {name}, recovered",
        "",
        f"{plain(recovered_line(header))} By llmprune {header['version']['llmprune']}.",
        loading(folder),
        *(_beside(folder) if recovery["options"]["adapter"] == "low-rank" else []),
        "",
        *_table(header, recovery),
        "## How it was made",
        "",
        f"Trained on {quantity(recovery['sequences'], 'sequence')} of {recovery['length']} tokens of text "
        f"{origin(header['texts']['training'])}:",
        "",
        *fenced("python", _call(recovery)),
        "",
        "`report.json` has the losses of all steps, and a row for every matrix.",
        *repeated(header),
        "",
    ]


def _beside(folder: Path) -> list[str]:
    """How a model is loaded that has a correction beside its weights, in this folder or from the Hub."""
    loader, place = auto_class(folder), ADAPTER_FOLDER
    return [
        f"That alone is the model before its recovery: the correction is in `{place}/`, which peft adds to it:",
        "",
        *fenced(
            "python",
            f"from peft import PeftModel\nfrom transformers import {loader}\n\n"
            f'model = {loader}.from_pretrained("FOLDER")\n'
            f'model = PeftModel.from_pretrained(model, "FOLDER", subfolder="{place}")',
        ),
    ]


def _table(header: Mapping[str, Any], recovery: Mapping[str, Any]) -> list[str]:
    found: Mapping[str, float | None] = recovery.get("perplexity") or {}
    if not found:
        return []
    shown = ["not finite" if value is None else f"{value:.3f}" for value in found.values()]
    measured = measured_text(header)
    return [
        f"| | {' | '.join(found)} |",
        "|---" * (len(found) + 1) + "|",
        f"| perplexity | {' | '.join(shown)} |",
        "",
        *([measured_on(measured), ""] if measured else []),
    ]


def _call(recovery: Mapping[str, Any]) -> str:
    """The options that are not the default, as they are passed to llmprune.recover."""
    defaults = RecoveryOptions()
    changed = {
        field.name: recovery["options"][field.name]
        for field in fields(RecoveryOptions)
        if recovery["options"][field.name] != getattr(defaults, field.name)
    }
    return f"llmprune.RecoveryOptions({', '.join(f'{name}={value!r}' for name, value in changed.items())})"
