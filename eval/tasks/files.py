"""Tasks whose data is next to their YAML: lm-eval itself finds files by absolute path, or in the current folder."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from lm_eval.api.task import ConfigurableTask


class LocalTask(ConfigurableTask):
    """A task of lm-eval that reads its JSON lines from this folder.

    Args:
        config: as in the YAML; `dataset_kwargs.data_files` is split -> name of the file.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        """Read the splits, without a copy in the cache of the datasets library."""
        files = (dataset_kwargs or {})["data_files"]
        self.dataset = DatasetDict({split: Dataset.from_list(_rows(name)) for split, name in files.items()})


def _rows(name: str) -> list[dict[str, Any]]:
    text = (Path(__file__).parent / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]
