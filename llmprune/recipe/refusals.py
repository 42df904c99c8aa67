"""Methods of a recipe that cannot do what it asks of them."""

from collections.abc import Iterator, Sequence

from llmprune.errors import LlmpruneError, RecipeError
from llmprune.methods import Method, check_pattern, gradient_kind, method_name
from llmprune.patterns import Pattern
from llmprune.recipe.document import refusal
from llmprune.recipe.reconstruct import Reconstruct
from llmprune.recipe.sections import Rule, StatisticsOptions
from llmprune.statistics import Gram

# Options of the statistics, and their values where nothing is asked for.
_UNLESS_READ = {"alpha": 0.0, "loss_weight": "none", "sequential": False}


def check_methods(
    pattern: Pattern | None,
    method: Method | None,
    rules: Sequence[Rule],
    statistics: StatisticsOptions,
    *,
    structures: bool,
) -> None:
    """Refuse patterns that their method cannot work with, and methods that the rest of a recipe leaves without inputs.

    Args:
        pattern: of the recipe.
        method: of the recipe.
        rules: of the recipe; what they leave out is the recipe's.
        statistics: of the recipe.
        structures: whether structures are removed first.

    Raises:
        RecipeError: at the key of the method, or of the rule.
    """
    if statistics.alpha and structures:
        error = RecipeError(
            "statistics.alpha with structures: the inputs of a smaller model have other sizes than the dense model's",
            expected="one of them",
            fix="set statistics.alpha to 0, or remove the structures in a run before this one",
        )
        raise refusal(error, "statistics", "alpha")
    for where, own_pattern, own_method in _used(pattern, method, rules):
        if own_method is None:
            continue
        try:
            if own_pattern is not None:
                check_pattern(own_method, own_pattern)
            if structures:
                _check_structures(own_method)
            if statistics.alpha:
                _check_corrected(own_method)
        except LlmpruneError as error:
            raise refusal(error, *where) from error


def check_validation(reconstruct: Reconstruct | None, held_back: int) -> None:
    """Refuse block matching without the sequences that decide whether a layer is better.

    Args:
        reconstruct: of the recipe.
        held_back: validation sequences.

    Raises:
        RecipeError: there are none.
    """
    if reconstruct is not None and not held_back:
        error = RecipeError(
            "reconstruct without validation sequences",
            expected="held_back of at least 1: they decide whether a fitted layer is better",
            fix="set held_back, for example to 8",
        )
        raise refusal(error, "held_back")


def check_unused_statistics(
    pattern: Pattern | None,
    method: Method | None,
    rules: Sequence[Rule],
    statistics: StatisticsOptions,
    *,
    quantised: bool = False,
) -> None:
    """Refuse statistics that are asked for where neither structures nor methods read them.

    Args:
        pattern: of the recipe; None if it only removes structures.
        method: of the recipe.
        rules: of the recipe.
        statistics: of the recipe.
        quantised: whether weights are quantised, which reads them.

    Raises:
        RecipeError: at the first such key.
    """
    methods = [own for _, _, own in _used(pattern, method, rules) if own is not None]
    asked = [key for key, default in _UNLESS_READ.items() if getattr(statistics, key) != default]
    if not asked or quantised or any(own.needs is not None for own in methods):
        return
    if methods:
        names = " and ".join(dict.fromkeys(map(method_name, methods)))
        error = RecipeError(
            f"statistics.{asked[0]} with {names}, which reads no inputs",
            expected="a method that does, such as wanda or sparsegpt",
            fix="remove the key, or use another method",
        )
    else:
        error = RecipeError(
            f"statistics.{asked[0]} without a pattern and a method: structures do not read these statistics",
            expected="weights to prune",
            fix="remove the key; or remove the structures in this run, and prune the weights of its result in a "
            "second one",
        )
    raise refusal(error, "statistics", asked[0])


def _used(
    pattern: Pattern | None, method: Method | None, rules: Sequence[Rule]
) -> Iterator[tuple[tuple[str | int, ...], Pattern | None, Method | None]]:
    yield ("method",), pattern, method
    for number, rule in enumerate(rules):
        yield ("rules", number), rule.pattern or pattern, rule.method or method


def _check_structures(method: Method) -> None:
    if gradient_kind(method) is not None:
        raise RecipeError(
            f"{method_name(method)} with structures: its gradients are those of the model at full size",
            expected="a method that reads no gradients, after structures are removed",
            fix="use another method, or remove the structures in a run before this one",
        )


def _check_corrected(method: Method) -> None:
    if method.needs is not Gram:
        name = method_name(method)
        raise RecipeError(
            f"{name} with statistics.alpha: the corrected weights are solved for with a Gram matrix, which {name} "
            "does not collect",
            expected="a solver, or a chain with a step such as refit",
            fix=f"set method to [{name}, refit], or statistics.alpha to 0",
        )
