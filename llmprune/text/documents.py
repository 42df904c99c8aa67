"""Documents, one at a time: from a local file, a folder of data files, or a dataset on the Hugging Face hub."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llmprune.errors import CalibrationError
from llmprune.models.boundary import explained, one_line
from llmprune.paths import user_path
from llmprune.text.chats import CHAT_COLUMNS, Conversation

_COLUMN = "set column to the one that holds the text"
_FOLDER_FIX = (
    "name one .txt, .jsonl or .parquet file, or a folder with such files alone, of the same columns; of a dataset that "
    "was saved to disk, load_from_disk(FOLDER).to_parquet(FILE) writes one; check config and split"
)
_LAST_FIX = "check the name, config and split (datasets.load_dataset may say more), or use a local file"

# A dataset id may contain dots (airoboros-2.2.1), so only these suffixes identify a file.
_FILE_SUFFIXES = (".txt", ".md", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst", ".zip")


def read_documents(source: str, config: str | None, split: str, column: str) -> Iterator[str | Conversation]:
    """Read the documents of a source, one at a time.

    Args:
        source: a .txt file (one document), a .jsonl or .parquet file, a folder of data files, or a dataset id.
        config: configuration of the dataset.
        split: of the dataset.
        column: the field or column that holds the text, or conversations.

    Raises:
        CalibrationError: there is no such source, or it cannot be read.
    """
    require_source(source)
    path = _path(source)
    if path.is_file():
        return _file_documents(path, column)
    return _dataset_documents(str(path), config, split, column)


def require_source(source: str) -> None:
    """Refuse a local path that does not exist or has an unknown suffix; a hub dataset is only checked by reading it.

    Raises:
        CalibrationError: says what can be read.
    """
    path = _path(source)
    if path.is_file() and path.suffix.lower() not in _FILE_READERS:
        raise CalibrationError(
            f"{path}: unknown text format",
            expected=f"a file that ends in {', '.join(_FILE_READERS)}",
            fix="convert it, or give its folder, which the datasets library reads",
        )
    is_path = path.suffix.lower() in _FILE_SUFFIXES or source.startswith((".", "/", "~")) or len(path.parts) > 2
    if is_path and not path.exists():
        raise CalibrationError(
            f"no such file or folder: {source}",
            expected="a file, a folder of data files, or a dataset id",
            fix="check the spelling; relative paths start at the current folder",
        )


def is_single_file(source: str) -> bool:
    """Whether a source is a single file that is read here and not by the datasets library."""
    path = _path(source)
    return path.suffix.lower() in _FILE_READERS and not path.is_dir()


def has_columns(source: str) -> bool:
    """Whether a source has columns to choose from: everything but plain text."""
    return not (is_single_file(source) and Path(source).suffix.lower() == ".txt")


def _path(source: str) -> Path:
    return user_path(source, CalibrationError, expected="a file, a folder of data files, or a dataset id")


def _file_documents(path: Path, column: str) -> Iterator[str | Conversation]:
    suffix = path.suffix.lower()
    encoding = "fix its permissions or its encoding (for example: iconv -f LATIN1 -t UTF-8)"
    with explained(
        f"{path} cannot be read",
        expected="a readable file, with text in UTF-8",
        fix="fix its permissions, or write or download it again" if suffix == ".parquet" else encoding,
        raised=CalibrationError,
    ):
        yield from _FILE_READERS[suffix](path, column)


def _read_text(path: Path, column: str) -> Iterator[str]:
    # A byte-order mark, as Windows writes it, is no text.
    yield path.read_text(encoding="utf-8-sig")


def _read_json_lines(path: Path, column: str) -> Iterator[str | Conversation]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CalibrationError(
                    f"{where} is not JSON: {error}",
                    expected="a JSON object on each line, in UTF-8",
                    fix="fix or remove the line",
                ) from error
            if not isinstance(row, dict):
                raise CalibrationError(
                    f"{where} is a {type(row).__name__}",
                    expected="a JSON object on each line",
                    fix=f'write {{"{column}": "..."}}',
                )
            _check_column(column, list(row), where)
            yield _cell(row[column], column, where)


def _read_parquet(path: Path, column: str) -> Iterator[str | Conversation]:
    import pyarrow.parquet  # type: ignore[import-untyped] # slow to import, and few runs need it

    with pyarrow.parquet.ParquetFile(path) as file:
        _check_column(column, file.schema_arrow.names, str(path))
        batches = (batch.column(0).to_pylist() for batch in file.iter_batches(columns=[column]))
        yield from _rows(batches, column, str(path))


_FILE_READERS: dict[str, Callable[[Path, str], Iterator[str | Conversation]]] = {
    ".txt": _read_text,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
}


def _dataset_documents(name: str, config: str | None, split: str, column: str) -> Iterator[str | Conversation]:
    import datasets  # slow to import, and few runs need it

    try:
        with _quiet_retries():
            dataset = datasets.load_dataset(name, config, split=split, streaming=False)
    except Exception as error:
        fixes = {
            FileNotFoundError: "check the name or path; a gated or private dataset needs accepted terms and a login",
            ConnectionError: "connect to the hub, or use a local file or folder",
            ValueError: "check config and split",
        }
        fix = next((fix for kind, fix in fixes.items() if isinstance(error, kind)), _LAST_FIX)
        # Of a file that it cannot read, the library says what is wrong only in the cause.
        said = one_line(error) + (f": {one_line(error.__cause__)}" if error.__cause__ is not None else "")
        raise CalibrationError(
            f"dataset {name} (config {config}, split {split}) cannot be loaded: {said}",
            fix=_FOLDER_FIX if Path(name).exists() else fix,
        ) from error
    _check_column(column, dataset.column_names, f"dataset {name}, split {split}")
    batches = (batch[column] for batch in dataset.select_columns([column]).iter(1000))
    with explained(f"dataset {name} cannot be read", expected="text", fix=_COLUMN, raised=CalibrationError):
        yield from _rows(batches, column, f"dataset {name}")


@contextmanager
def _quiet_retries() -> Iterator[None]:
    """Silence the hub client's message for each connection attempt: the outcome is reported once."""
    logger = logging.getLogger("huggingface_hub.utils._http")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _rows(batches: Iterable[list[object]], column: str, where: str) -> Iterator[str | Conversation]:
    values = (value for batch in batches for value in batch)
    for number, value in enumerate(values, start=1):
        yield _cell(value, column, f"{where}, row {number}")


def _check_column(column: str, present: list[str], where: str) -> None:
    if column not in present:
        chats = next((name for name in CHAT_COLUMNS if name in present), None)
        fix = f"set column: {chats}; its conversations become text by the model's chat template" if chats else _COLUMN
        raise CalibrationError(
            f"{where}: no column {column!r}", expected=f"one of {', '.join(present) or 'none'}", fix=fix
        )


def _cell(value: object, column: str, where: str) -> str | Conversation:
    """The cell of a column of text or conversations; a null is an empty document."""
    if isinstance(value, list) and value:
        return Conversation.read(value, f"{where}, column {column!r}")
    if value is None or value == []:
        return ""
    if not isinstance(value, str):
        raise CalibrationError(
            f"{where}: column {column!r} holds {type(value).__name__}", expected="text or conversations", fix=_COLUMN
        )
    return value
