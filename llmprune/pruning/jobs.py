"""What is done to each matrix: according to the recipe, and to decisions made from the dense model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import MappingProxyType

from llmprune.errors import ModelError, PatternError, RecipeError
from llmprune.methods import Method, method_name
from llmprune.methods.quantise import Quantiser
from llmprune.models.decoder import Matrix, prunable_matrices
from llmprune.models.source import Source
from llmprune.patterns import Block, Pattern, Unstructured
from llmprune.recipe.recipe import Recipe
from llmprune.statistics import ColumnNorm, Gram
from llmprune.storage.packed_config import Format, layout_name
from llmprune.structures.decisions import MatrixChoice


@dataclass(frozen=True, slots=True)
class Job:
    """What to do to one matrix.

    Attributes:
        pattern: which zeros are legal.
        method: chooses which weights become zero, and updates the others.
        method_name: its name in recipes.
        quantiser: rounds the kept weights afterwards; None: they are not quantised.
        late: whether they are rounded only once the layer has been fitted as a whole.
    """

    pattern: Pattern
    method: Method
    method_name: str
    quantiser: Quantiser | None = None
    late: bool = False

    @property
    def needs(self) -> type[ColumnNorm] | type[Gram] | None:
        """The statistics that it reads; None if only the weights."""
        return self.method.needs if self.quantiser is None else Gram

    def work(self, shape: tuple[int, int]) -> float:
        """Floating-point operations for a matrix of this shape (out, in), excluding `shared_work`."""
        return self.method.work(shape, self.pattern) + (self.quantiser.work(shape) if self.quantiser else 0.0)

    def shared_work(self, width: int) -> float:
        """Operations shared by all matrices that read the same input of this width."""
        return max(self.method.shared_work(width), self.quantiser.shared_work(width) if self.quantiser else 0.0)

    def workspace(self, shape: tuple[int, int]) -> int:
        """Peak bytes while a matrix of this shape (out, in) is solved, excluding the statistics."""
        return max(self.method.workspace(shape), self.quantiser.workspace(shape) if self.quantiser else 0)


def plan_jobs(
    source: Source, recipe: Recipe, choices: Mapping[str, MatrixChoice] = MappingProxyType({})
) -> list[dict[str, Job]]:
    """Plan for each layer what is done to each matrix, and check that every pattern fits.

    Args:
        source: the model, at the size that it has when weights are pruned.
        recipe: patterns, methods and rules.
        choices: matrix name -> what was decided for it instead of what the recipe says.

    Returns:
        One mapping per decoder layer: matrix name -> job; matrices that stay dense are omitted (all of them, if the
        recipe has no pattern).

    Raises:
        PatternError: a pattern does not divide a matrix; names the matrix.
        RecipeError: no matrix is selected, a glob matches none, or a choice does not fit the pattern.
    """
    if recipe.pattern is None:
        return [{} for _ in source.layers]
    layers = [
        list(prunable_matrices(layer, f"{source.layers_path}.{index}")) for index, layer in enumerate(source.layers)
    ]
    _check_globs(recipe, [matrix.name for matrices in layers for matrix in matrices])
    return [
        {m.name: job for m in matrices if (job := _job(m, recipe, choices.get(m.name))) is not None}
        for matrices in layers
    ]


def require_packable(jobs: Sequence[Mapping[str, Job]], linear_key: Callable[[str], str | None], form: Format) -> None:
    """Refuse a format that would pack nothing.

    Packed tensors are found by the names of their layers, so that those must be the names in the checkpoint as well.

    Args:
        jobs: for each layer, what is done to its matrices.
        linear_key: from the name of a linear layer to the key that its weight has in the checkpoint; None: it is no
            linear layer, or not stored by itself.
        form: how pruned matrices are to be stored.

    Raises:
        ModelError: no linear layer that is pruned is stored under its own name.
        PatternError: the format has no layout for any of their patterns.
    """
    patterns = {name: job.pattern for layer in jobs for name, job in layer.items()}
    if form == "dense" or not patterns:
        return
    keys = {name: linear_key(name) for name in patterns}
    own = [name for name, key in keys.items() if key == f"{name}.weight"]
    if any(layout_name(form, patterns[name]) for name in own):
        return
    if own:
        raise PatternError(
            f"format is {form}, but it fits none of the patterns {', '.join(sorted({str(patterns[n]) for n in own}))}",
            expected="nm for N:M patterns, block for blocks of a size that kernels serve, or auto or bitmask for any",
            fix="set format to auto",
        )
    stored = next((f" ({name} as {key})" for name, key in keys.items() if key is not None), "")
    raise ModelError(
        f"format is {form}, but this checkpoint stores no linear layer under the name that it has in the model{stored}",
        expected="a checkpoint whose tensors have the names of the model's parameters",
        fix="set format to dense",
    )


def nothing_packed(form: Format) -> str:
    """What is said when a run has packed nothing, which only the values of the weights decide."""
    return f"nothing was packed: no matrix would be smaller in the format {form}, so all are stored dense"


def _job(matrix: Matrix, recipe: Recipe, choice: MatrixChoice | None) -> Job | None:
    ordered = recipe.for_matrix(matrix.name)
    if ordered is None:
        return None
    pattern, method = ordered if choice is None else _chosen(matrix, *ordered, choice)
    try:
        pattern.check(matrix.shape)
    except PatternError as error:
        raise error.at(matrix.name) from error
    quantiser = None if recipe.quantise is None else recipe.quantise.quantiser
    return Job(pattern, method, method_name(method), quantiser, late=recipe.reconstruct is not None)


def _chosen(matrix: Matrix, pattern: Pattern, method: Method, choice: MatrixChoice) -> tuple[Pattern, Method]:
    """The recipe's pattern and method for a matrix, unless others were decided."""
    pattern, method = choice.pattern or pattern, choice.method or method
    if choice.sparsity is None:
        return pattern, method
    if not isinstance(pattern, Unstructured | Block):
        raise RecipeError(
            f"{matrix.name}: sparsity {choice.sparsity} was chosen for the pattern {pattern}",
            expected="a pattern such as 0.5 or 0.5@64x64, whose sparsity may differ between matrices",
            fix="choose patterns, or set pattern to a fraction",
        )
    return replace(pattern, sparsity=choice.sparsity), method


def _check_globs(recipe: Recipe, names: Sequence[str]) -> None:
    globs = [("include", glob) for glob in recipe.include] + [("exclude", glob) for glob in recipe.exclude]
    for key, glob in globs + [("rules", rule.match) for rule in recipe.rules]:
        if not any(fnmatchcase(name, glob) for name in names):
            example = names[0] if names else "none"
            raise RecipeError(
                f"{key}: {glob!r} matches none of the model's {len(names)} matrices",
                expected=f"a shell glob over names such as {example}",
                fix="list the names with: llmprune prune MODEL --recipe RECIPE --output DIR --dry-run",
            )
    if not any(recipe.for_matrix(name) for name in names):
        raise RecipeError(f"the recipe leaves all {len(names)} matrices dense", fix="widen include or narrow exclude")
