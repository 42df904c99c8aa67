"""The settings of an evaluation, and its result."""

from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from llmprune import __version__
from llmprune.measuring.tasks.significance import STANDARD_ERRORS, ScoreRow


@dataclass(frozen=True, slots=True)
class HarnessSettings:
    """How lm-eval is run; everything else is left at its defaults.

    Attributes:
        limit: documents per task: a number of them, or a fraction below 1; None: all.
        batch_size: requests per forward pass, or "auto" for as many as fit.
        num_fewshot: examples before a question; None: the task's default.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: of the weights: "auto" for the checkpoint's, "float32", "bfloat16" or "float16".
        cache: folder in which answers are stored as they are computed, in one file per checkpoint, dtype and device;
            stored answers are not computed again, whatever the batch size.
        quiet: no progress on stderr.
        include_path: folder with further tasks of lm-eval, as YAML files; None: none.
        apply_chat_template: whether questions go through the chat template of each model's tokenizer.
        gen_kwargs: of generation, for the tasks that generate: "temperature=0.7,do_sample=True", or JSON; None: the
            tasks' own.
        log_samples: whether lm-eval writes each question with the model's answer beside its results.
        device_map: where the layers go, as for `llmprune.load`; None: all of them to `device`.
    """

    limit: float | None = None
    batch_size: int | str = 8
    num_fewshot: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    cache: Path | None = None
    quiet: bool = False
    include_path: Path | None = None
    apply_chat_template: bool = False
    gen_kwargs: str | None = None
    log_samples: bool = False
    device_map: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """A model's scores, compared with the dense model's if one was given.

    Attributes:
        model: as given.
        against: the dense model, as given; None without one.
        rows: one per score.
        settings: how lm-eval was run.
        results: what lm-eval returned, without samples, in its own schema.
        dense_results: the same for the dense model.
        files: the files that lm-eval wrote for both, those of samples last.
    """

    model: str
    against: str | None
    rows: tuple[ScoreRow, ...]
    settings: HarnessSettings
    results: dict[str, Any] = field(repr=False)
    dense_results: dict[str, Any] | None = field(default=None, repr=False)
    files: tuple[Path, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain data, ready for JSON."""
        return {
            "model": self.model,
            "against": self.against,
            "settings": self.settings.to_dict(),
            "significant_from": f"|delta| > {STANDARD_ERRORS:g} delta_stderr; paired perplexities by their logarithms",
            "rows": [row.to_dict() for row in self.rows],
            "files": [str(file) for file in self.files],
            "versions": {"llmprune": __version__, "lm_eval": self.results["lm_eval_version"]},
        }

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        columns = ["task", "metric", "filter", "documents", "value", "stderr"]
        if self.against is not None:
            columns += ["dense_value", "delta", "delta_stderr", "verdict"]
        head = "".join(f"<th>{column}</th>" for column in columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{_cell(getattr(row, column))}</td>" for column in columns) + "</tr>"
            for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else escape(str(value))
