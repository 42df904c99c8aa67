"""Damaged archives: whatever byte is wrong, a typed error says so, and nothing is left of what was extracted."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from folders import contents
from malformed import NEST
from packed_models import save_packed

from llmprune import archive, extract
from llmprune.errors import FormatError
from llmprune.storage.archives.records import MAGIC

Records = list[tuple[dict[str, Any], bytes]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = save_packed(tmp_path_factory.mktemp("made")) / "dense"
    return archive(folder).archive.read_bytes()


def split(data: bytes) -> Records:
    """The records of an archive and the parts behind each."""
    found, position = [], len(MAGIC)
    while position < len(data):
        start = position + 4
        position = start + int.from_bytes(data[position:start], "little")
        record = json.loads(data[start:position])
        parts = data[position : position + sum(record.get("parts", []))]
        position += len(parts)
        found.append((record, parts))
    return found


def joined(found: Records) -> bytes:
    """An archive of records, with a digest that is right unless the last one has another kind."""
    data = MAGIC
    for record, parts in found:
        if record.get("kind") == "end":
            record = {**record, "sha256": hashlib.sha256(data).hexdigest()}
        text = json.dumps(record).encode()
        data += len(text).to_bytes(4, "little") + text + parts
    return data


def refuse(data: bytes, folder: Path) -> FormatError:
    file = folder / "a.llmprune"
    file.write_bytes(data)
    for dry_run in (True, False):
        with pytest.raises(FormatError) as caught:
            extract(file, dry_run=dry_run)
    assert list(contents(folder)) == ["a.llmprune"]
    assert str(file) in caught.value.what
    assert caught.value.fix
    return caught.value


def test_records_joined_again_are_an_archive(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.llmprune").write_bytes(joined(split(whole)))
    extract(tmp_path / "a.llmprune")
    assert "model.safetensors" in contents(tmp_path / "a")


def test_any_flipped_bit_is_noticed(whole: bytes, tmp_path: Path) -> None:
    step = len(whole) // 60
    for place in (*range(0, len(whole), step), len(whole) - 1):
        refuse(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :], tmp_path)


def test_an_archive_that_ends_early_or_not_is_noticed(whole: bytes, tmp_path: Path) -> None:
    for end in (0, 5, len(MAGIC), len(MAGIC) + 2, 300, len(whole) // 2, len(whole) - 1):
        error = refuse(whole[:end], tmp_path)
        assert "not an archive" in error.what if end < len(MAGIC) else "ends too early" in error.what
    assert "bytes after the end" in refuse(whole + b"x", tmp_path).what
    assert "another version" in refuse(whole.replace(b"archive 1", b"archive 2", 1), tmp_path).what


CONTENTS, FIRST, BLOCK = 0, 1, 2


def changed(place: int, **changes: Any) -> Callable[[Records], Any]:
    return lambda found: found[place][0].update(changes)


def changes() -> Iterator[tuple[str, Callable[[Records], Any]]]:
    names = ("../a", "/etc/a", "a/../../b", "", ".", "..", "a//b", "./a", "a/", "a\0b", "x" * 300, "d/" * 20 + "x")
    yield from ((f"name {name[:20]!r}", changed(FIRST, name=name)) for name in names)
    yield from ((f"name {name!r}", changed(FIRST, name=name)) for name in (5, None, [], "\udce9"))
    yield "twice", lambda found: found[FIRST][0].update(name="generation_config.json")
    yield "file as folder", lambda found: found[FIRST][0].update(name="generation_config.json/x")
    for label, value in {"-1": -1, "huge": 1 << 62, "text": "5", "1.5": 1.5, "true": True, "null": None}.items():
        for place, field in ((CONTENTS, "files"), (CONTENTS, "bytes"), (FIRST, "bytes"), (BLOCK, "bytes")):
            yield f"{place}.{field}={label}", changed(place, **{field: value})
    yield "more files", changed(CONTENTS, files=40)
    yield "fewer files", changed(CONTENTS, files=1)
    yield "more bytes", lambda found: found[CONTENTS][0].update(bytes=found[CONTENTS][0]["bytes"] + 1)
    yield "longer file", lambda found: found[FIRST][0].update(bytes=found[FIRST][0]["bytes"] + 1)
    yield "shorter file", lambda found: found[FIRST][0].update(bytes=found[FIRST][0]["bytes"] - 1)
    yield "long block", changed(BLOCK, bytes=(1 << 24) + 1)
    for value in (0, 3, 16, 2.0, "2", None, 4, 2):
        yield f"word={value!r}", changed(BLOCK, word=value)
    for field in ("floating", "mask", "signs"):
        yield from ((f"{field}={value!r}", changed(BLOCK, **{field: value})) for value in (1, "true", None))
    yield "mask", changed(BLOCK, mask=True)
    yield "signs", changed(BLOCK, signs=True)
    for value in ([], [0], [-1], [1 << 30], [1] * 11, ["5"], 5, None):
        yield f"parts={value!r:.20}", changed(BLOCK, parts=value)
    for value in ("", "0" * 64, "0" * 63, "G" * 64, 5, None):
        yield f"sha256={value!r:.20}", changed(BLOCK, sha256=value)
    for place in (CONTENTS, FIRST, BLOCK, -1):
        yield f"{place} absent", lambda found, place=place: found.pop(place)
        yield f"{place} twice", lambda found, place=place: found.insert(place, found[place])
        yield f"{place} field more", changed(place, more=1)
        yield f"{place} kind", changed(place, kind="other")
        yield f"{place} no kind", lambda found, place=place: found[place][0].pop("kind")


CHANGES = dict(changes())


@pytest.mark.parametrize("change", CHANGES)
def test_wrong_records_are_refused(whole: bytes, tmp_path: Path, change: str) -> None:
    found = split(whole)
    CHANGES[change](found)
    refuse(joined(found), tmp_path)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", NEST.encode(), b"\xff", b"{}" * 40_000])
def test_records_that_are_no_json_are_refused(whole: bytes, tmp_path: Path, text: bytes) -> None:
    refuse(MAGIC + len(text).to_bytes(4, "little") + text + whole[len(MAGIC) :], tmp_path)


def test_a_record_does_not_make_the_reader_take_memory(whole: bytes, tmp_path: Path) -> None:
    assert "a record of 4,294,967,295 B" in refuse(MAGIC + b"\xff" * 4 + whole, tmp_path).what
