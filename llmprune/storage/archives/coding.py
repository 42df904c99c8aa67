"""Code the bytes of a block as zstd frames and back: zeros as a bit each, the other words in planes of bytes."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from llmprune.errors import FormatError, MissingPackageError

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[Any]  # unsigned integers; numpy's types lose that in every shift

# Sequences of weights hardly repeat: searching for them costs time, and short ones take more bits than they save. A
# tiny table and long matches leave little but the coding of single bytes, and still find runs.
_LEVEL, _SHORTEST_MATCH, _TABLE_BITS = 1, 7, 6
# Texts do repeat: tokenizers shrink to a fifth.
_TEXT_LEVEL = 9

# A mask costs a bit per word and saves most of a word per zero; below this gain it is not worth it.
_GAIN = 1.5


@dataclass(frozen=True, slots=True)
class Kind:
    """What a block consists of.

    Attributes:
        word: bytes of each word: 1, 2, 4 or 8.
        floating: the highest bit of each word is a sign.
        text: it is no tensor.
    """

    word: int = 1
    floating: bool = False
    text: bool = True


@dataclass(frozen=True, slots=True)
class Coding:
    """How a block is coded.

    Attributes:
        word: bytes of each word: 1, 2, 4 or 8.
        floating: the highest bit of each word is a sign.
        mask: zeros are a bit each.
        signs: so are the signs of zeros; without it none is negative.
    """

    word: int
    floating: bool
    mask: bool = False
    signs: bool = False


def zstd() -> ModuleType:
    """The zstd module: Python's own, or before Python 3.14 its backport.

    Raises:
        MissingPackageError: there is none.
    """
    if sys.version_info >= (3, 14):
        try:
            from compression import zstd
        except ImportError as error:
            raise MissingPackageError(
                "an archive needs compression.zstd, which this Python was built without",
                fix="use a Python that was built with zstd",
            ) from error
    else:
        try:
            from backports import zstd
        except ImportError as error:
            raise MissingPackageError.of("backports.zstd", "an archive") from error
    return zstd


def encode(raw: bytes, kind: Kind) -> tuple[Coding, list[bytes]]:
    """Code a block.

    Args:
        raw: whole words.
        kind: what they are.

    Returns:
        (coding, parts): a zstd frame for each part.
    """
    words = np.frombuffer(raw, _dtype(kind.word))
    stored = _magnitude(words, kind.floating) != 0
    kept = int(np.count_nonzero(stored))
    mask = 8 * kind.word * (len(words) - kept) > _GAIN * len(words)
    signs = mask and int(np.count_nonzero(words)) > kept
    coding = Coding(kind.word, kind.floating, mask, signs)
    return coding, [_deflated(part, text=kind.text) for part in _parts(coding, words, stored)]


def decode(coding: Coding, nbytes: int, parts: Sequence[bytes]) -> bytes:
    """The bytes of a block; the inverse of `encode`.

    Args:
        coding: as `encode` returned it.
        nbytes: how many they are.
        parts: the zstd frames.

    Raises:
        FormatError: the parts do not belong to that many bytes; nothing is read past them.
    """
    alone = coding.signs and not coding.mask
    if alone or nbytes % coding.word or len(parts) != coding.mask + coding.signs + coding.word:
        raise _damaged(f"{len(parts)} parts for {nbytes} bytes", "whole words, and a part for each plane")
    frames, count = iter(parts), nbytes // coding.word
    if not coding.mask:
        return _from_planes(coding, [_inflated(frame, count) for frame in frames]).tobytes()
    stored = _bits(_inflated(next(frames), -(-count // 8)), count)
    kept = int(np.count_nonzero(stored))
    words = np.zeros(count, _dtype(coding.word))
    if coding.signs:
        negative = _bits(_inflated(next(frames), -(-(count - kept) // 8)), count - kept)
        words[~stored] = negative.astype(words.dtype) << (8 * coding.word - 1)
    # By index, which is several times faster than by a mask.
    words[np.flatnonzero(stored)] = _from_planes(coding, [_inflated(frame, kept) for frame in frames])
    return words.tobytes()


def _parts(coding: Coding, words: Words, stored: npt.NDArray[np.bool_]) -> Iterator[Bytes]:
    if coding.mask:
        yield np.packbits(stored, bitorder="little")
    if coding.signs:
        yield np.packbits(words[~stored] != 0, bitorder="little")
    kept = words.take(np.flatnonzero(stored)) if coding.mask else words
    if coding.floating and coding.word > 1:
        kept = (kept << 1) | (kept >> (8 * coding.word - 1))
    planes = kept.view(np.uint8).reshape(-1, coding.word)
    yield from (np.ascontiguousarray(planes[:, place]) for place in range(coding.word))


def _from_planes(coding: Coding, planes: Sequence[Bytes]) -> Words:
    words: Words = np.stack(planes, axis=1).reshape(-1).view(_dtype(coding.word))
    if coding.floating and coding.word > 1:
        words = (words >> 1) | (words << (8 * coding.word - 1))
    return words


def _dtype(word: int) -> "np.dtype[np.unsignedinteger[Any]]":
    return np.dtype(f"<u{word}")


def _magnitude(words: Words, floating: bool) -> Words:
    return words & words.dtype.type(np.iinfo(words.dtype).max >> 1) if floating else words


def _bits(packed: Bytes, count: int) -> npt.NDArray[np.bool_]:
    bits = np.unpackbits(packed, bitorder="little")
    if bits[count:].any():
        raise _damaged("bits set after the last word", "zeros there")
    return bits[:count].view(np.bool_)


def _deflated(part: Bytes, *, text: bool) -> bytes:
    module = zstd()
    names = module.CompressionParameter
    lean = {names.compression_level: _LEVEL, names.min_match: _SHORTEST_MATCH, names.hash_log: _TABLE_BITS}
    return bytes(module.compress(part.tobytes(), options={names.compression_level: _TEXT_LEVEL} if text else lean))


def _inflated(frame: bytes, size: int) -> Bytes:
    """The content of one frame, which must have this size; never more memory than that."""
    module = zstd()
    decompressor = module.ZstdDecompressor()
    try:
        plain = decompressor.decompress(frame, max_length=size + 1)  # one more, to see that there is none
    except module.ZstdError as error:
        raise _damaged(f"a part that is not a zstd frame: {error}", "what `llmprune archive` wrote") from error
    if len(plain) != size or not decompressor.eof or decompressor.unused_data:
        raise _damaged("a part of another size", f"one zstd frame of {size} bytes")
    return np.frombuffer(plain, np.uint8)


def _damaged(what: str, expected: str) -> FormatError:
    return FormatError(what, expected=expected, fix="copy the archive again, or make it anew")
