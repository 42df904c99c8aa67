"""Tasks of lm-eval, written by hand."""

import json
from pathlib import Path
from typing import Any


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], **config: Any) -> str:
    """Write a task of lm-eval with its data, as anybody would; JSON is YAML."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kwargs = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    file = folder / f"{name}.yaml"
    content = {"task": name, "dataset_path": "json", "dataset_kwargs": kwargs, "test_split": "test", **config}
    file.write_text(json.dumps(content))
    return str(file)


def metric(name: str, aggregation: str = "mean", higher_is_better: bool = True) -> dict[str, Any]:
    """A metric with all that lm-eval would warn of the lack of."""
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher_is_better}
