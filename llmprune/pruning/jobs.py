"""What a run will do, worked out before it does anything."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from llmprune.errors import PatternError, RecipeError
from llmprune.methods import METHODS
from llmprune.models.decoder import Matrix, prunable_matrices
from llmprune.models.source import Source
from llmprune.pruning.solving import Job
from llmprune.recipe.recipe import Recipe


def plan_jobs(source: Source, recipe: Recipe) -> list[dict[str, Job]]:
    """Say for each layer what is done to each matrix, and check that every pattern fits.

    Returns:
        One mapping per decoder layer: matrix name -> job; matrices that stay dense are left out (all of them, where the
        recipe has no pattern).

    Raises:
        PatternError: a pattern does not divide a matrix; names it.
        RecipeError: no matrix is selected, or a glob matches none.
    """
    if recipe.pattern is None:
        return [{} for _ in source.layers]
    layers = [
        list(prunable_matrices(layer, f"{source.layers_path}.{index}")) for index, layer in enumerate(source.layers)
    ]
    _check_globs(recipe, [matrix.name for matrices in layers for matrix in matrices])
    return [{m.name: job for m in matrices if (job := _job(m, recipe)) is not None} for matrices in layers]


def _job(matrix: Matrix, recipe: Recipe) -> Job | None:
    chosen = recipe.for_matrix(matrix.name)
    if chosen is None:
        return None
    pattern, method = chosen
    try:
        pattern.check(matrix.shape)
    except PatternError as error:
        raise error.at(matrix.name) from error
    return Job(pattern, method, next(name for name, kind in METHODS.items() if isinstance(method, kind)))


def _check_globs(recipe: Recipe, names: Sequence[str]) -> None:
    globs = [("include", glob) for glob in recipe.include] + [("exclude", glob) for glob in recipe.exclude]
    for key, glob in globs + [("rules", rule.match) for rule in recipe.rules]:
        if not any(fnmatchcase(name, glob) for name in names):
            example = names[0] if names else "none"
            raise RecipeError(
                f"{key}: {glob!r} matches none of the model's {len(names)} matrices",
                expected=f"a shell glob over names such as {example}",
                fix="see the names with: llmprune prune MODEL --recipe RECIPE --output DIR --dry-run",
            )
    if not any(recipe.for_matrix(name) for name in names):
        raise RecipeError(f"the recipe leaves all {len(names)} matrices dense", fix="widen include or narrow exclude")
