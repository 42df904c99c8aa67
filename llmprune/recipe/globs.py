"""Shell globs over the names of matrices."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase


def matches_any(globs: Iterable[str], name: str) -> bool:
    """Whether one of the globs matches."""
    return any(fnmatchcase(name, glob) for glob in globs)


def covers(wide: str, narrow: str) -> bool:
    """Whether `wide` matches everything that `narrow` matches; also False if a [set], or a ? in `wide`, is involved."""
    return wide == narrow or (not re.search(r"[?[]", wide) and "[" not in narrow and fnmatchcase(narrow, wide))
