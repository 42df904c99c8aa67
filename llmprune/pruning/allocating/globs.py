"""Given sparsities: globs set some matrices, and the others share what is left."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from llmprune.errors import RecipeError
from llmprune.pruning.allocating.pool import Pool


def glob_offsets(pool: Pool, globs: Sequence[tuple[str, float]]) -> list[float]:
    """How much sparser each unit is than the recipe says.

    Args:
        pool: the matrices.
        globs: (shell glob over full names, sparsity); the first that matches holds.

    Raises:
        RecipeError: a glob matches nothing, splits the experts of a layer, or the rest cannot make up for the others.
    """
    require_matches(pool, globs)
    names = [[place.name for place in pool.named(unit)] for unit in pool.units]
    given = [[next((value for glob, value in globs if fnmatchcase(n, glob)), None) for n in own] for own in names]
    for unit, found in zip(pool.units, given, strict=True):
        if len(set(found)) > 1:
            raise RecipeError(
                f"allocation: globs set different sparsities for the experts of {unit.kind} in layer {unit.layer}",
                expected="one sparsity for all experts of a layer",
                fix="write * for the number of the expert",
            )
    levels = [found[0] for found in given]
    rest = _rest(pool, levels)
    return [(rest if level is None else level) - unit.sparsity for level, unit in zip(levels, pool.units, strict=True)]


def require_matches(pool: Pool, globs: Sequence[tuple[str, float]]) -> None:
    """Refuse globs that match no matrix of a pool; arguments as for `glob_offsets`.

    Raises:
        RecipeError: a glob matches nothing.
    """
    for glob, _ in globs:
        if not any(fnmatchcase(place.name, glob) for place in pool.places):
            raise RecipeError(
                f"allocation: {glob!r} matches none of the {len(pool.places)} matrices that share the zeros",
                expected=f"a shell glob over names such as {pool.places[0].name}",
                fix="list the names with: llmprune prune MODEL --recipe RECIPE --output DIR --dry-run",
            )


def _rest(pool: Pool, levels: Sequence[float | None]) -> float:
    """The sparsity of the matrices that no glob matches."""
    pairs = list(zip(levels, pool.units, strict=True))
    given = sum(level * unit.size for level, unit in pairs if level is not None)
    free = sum(unit.size for level, unit in pairs if level is None)
    left = pool.zeros - given
    # Rounding to whole rows or blocks makes up for a small difference.
    if (free and 0 <= left <= free) or (not free and abs(left) <= 0.001 * pool.size):
        return left / free if free else 0.0
    raise RecipeError(
        f"allocation: the globs set {given / pool.size:.1%} of all weights to zero, and "
        + (f"the other matrices hold {free / pool.size:.1%}" if free else "match every matrix"),
        expected=f"{pool.sparsity:.1%} of all weights, as the pattern says",
        fix="change the sparsities, leave some matrices to share the rest, or change the pattern",
    )
