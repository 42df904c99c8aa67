"""Short flags for the usual run: each is another way to write `--set KEY=VALUE`, and is checked against the rest."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmprune.cli.layout import TEXT, WHAT
from llmprune.errors import LlmpruneError, PatternError, RecipeError

if TYPE_CHECKING:
    from llmprune.recipe.recipe import Recipe

# The recipe of a command that names none.
DEFAULT_RECIPE = "best-fast"

# The key of the recipe that each flag sets.
_KEYS = {
    "--pattern": "pattern",
    "--sparsity": "pattern",
    "--method": "method",
    "--dataset": "calibration.source",
    "--num-samples": "calibration.samples",
    "--max-seq-length": "calibration.length",
    "--eval-dataset": "evaluation.source",
}

# The keys that say how weights are pruned.
_PRUNING = ("pattern", "method")


def _flag(name: str, metavar: str, panel: str, help_text: str) -> Any:
    return typer.Option(name, metavar=metavar, rich_help_panel=panel, help=help_text)


RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        metavar="RECIPE",
        rich_help_panel=WHAT,
        help=f"A bundled recipe (see `llmprune recipes`) or a YAML file. Default: {DEFAULT_RECIPE}.",
    ),
]
PatternFlag = Annotated[
    str | None, _flag("--pattern", "PATTERN", WHAT, "2:4, another N:M, 0.5 (unstructured) or 0.5@64x64 (blocks).")
]
SparsityFlag = Annotated[
    str | None, _flag("--sparsity", "FRACTION", WHAT, "Prune this fraction of the weights, unstructured: 0.5 or 50%.")
]
MethodFlag = Annotated[
    str | None,
    _flag(
        "--method",
        "METHOD",
        WHAT,
        "How weights are chosen: random, magnitude, wanda, ria, gradient, taylor, fisher, sparsegpt, obs, admm or "
        'alps. Or one of them with steps, such as "[wanda, swaps, refit]".',
    ),
]
Dataset = Annotated[
    str | None,
    _flag(
        "--dataset",
        "TEXT",
        TEXT,
        'Calibration text: a .txt, .jsonl or .parquet file, a folder, a dataset on the hub, or "self" (sampled from '
        "the model).",
    ),
]
Samples = Annotated[str | None, _flag("--num-samples", "N", TEXT, "Number of calibration sequences.")]
Length = Annotated[
    str | None, _flag("--max-seq-length", "N", TEXT, "Tokens in each sequence, also for evaluation unless it is set.")
]
EvalDataset = Annotated[
    str | None, _flag("--eval-dataset", "TEXT", TEXT, "Text on which perplexity is measured, like --dataset.")
]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a command line asks for.

    Attributes:
        recipe: as given; None: the default.
        flags: short flag -> its value, as given.
        overrides: the values of --set.
    """

    recipe: str | None
    flags: Mapping[str, str]
    overrides: Sequence[str]

    @classmethod
    def read(cls, recipe: str | None, overrides: Sequence[str] | None, **flags: str | None) -> "Wanted":
        """From a command's parameters; each flag by its name with underscores."""
        spelled = {f"--{name.replace('_', '-')}": value for name, value in flags.items()}
        return cls(recipe, {flag: value for flag, value in spelled.items() if value is not None}, overrides or ())

    @property
    def name(self) -> str:
        """The recipe to load."""
        return self.recipe or DEFAULT_RECIPE

    def words(self, output: str) -> list[str]:
        """What was typed, to be typed again."""
        recipe = ["--recipe", self.recipe] if self.recipe else []
        flags = [word for flag, value in self.flags.items() for word in (flag, value)]
        return [*recipe, "--output", output, *flags, *(word for one in self.overrides for word in ("--set", one))]

    def settings(self) -> list[str]:
        """All overrides of the recipe.

        Raises:
            RecipeError: flags contradict each other, a --set or the recipe.
            LlmpruneError: the recipe cannot be read.
        """
        flags = _without_agreeing(self.flags)
        if (text := flags.get("--dataset")) not in (None, "self") and text == flags.get("--eval-dataset"):
            _refuse_same_text(str(text), self.overrides)
        given = [f"{_KEYS[flag]}={value}" for flag, value in flags.items() if not self._is_set(flag, value)]
        self._check_recipe()
        return [*self.overrides, *given]

    def described(self, settings: list[str]) -> list[str]:
        """The settings, with a description where those of the default recipe have made its own untrue."""
        changed = any(_KEYS[flag] in _PRUNING for flag in self.flags)
        if self.recipe or not changed or any(one.strip().startswith("description") for one in settings):
            return settings
        from llmprune.methods import method_name
        from llmprune.recipe.recipe import load_recipe

        recipe = load_recipe(self.name, settings)
        assert recipe.method is not None, "the default recipe prunes weights"
        return [*settings, f"description={method_name(recipe.method)}, pattern {recipe.pattern}"]

    @contextlib.contextmanager
    def spelled(self) -> Iterator[None]:
        """Errors name a flag as it was typed, and not as the --set that it stands for."""
        try:
            yield
        except LlmpruneError as error:
            what = error.what
            for flag, value in self.flags.items():
                what = what.replace(f"--set {_KEYS[flag]}={value}", f"{flag} {value}")
            if what == error.what:
                raise
            raise type(error)(what, expected=error.expected, fix=error.fix) from error

    def _is_set(self, flag: str, value: str) -> bool:
        """Whether a --set says the same already; one that says otherwise is refused."""
        key, same = _KEYS[flag], False
        for assignment in self.overrides:
            name, found = assignment.partition("=")[0].strip(), _value(assignment, key)
            if found is None or not (name == key or key.startswith(f"{name}.")):
                continue
            if not _equal(found, _value(f"{key}={value}", key), key):
                raise RecipeError(
                    f"{flag} {value} and --set {assignment} contradict each other",
                    expected=f"one value for {key}",
                    fix="remove one of them",
                )
            same = same or name == key
        return same

    def _check_recipe(self) -> None:
        """Refuse flags about weights that the recipe would ignore or cannot use."""
        from llmprune.recipe.recipe import load_recipe

        flags = {flag: value for flag, value in self.flags.items() if _KEYS[flag] in _PRUNING}
        if not flags:
            return
        try:
            recipe = load_recipe(self.name)
        except RecipeError:
            return  # perhaps only complete with these flags: what is wrong is said when it is loaded with them
        keys = {assignment.partition("=")[0].strip() for assignment in self.overrides}
        if recipe.structures is not None and recipe.pattern is None:
            if not {_KEYS[flag] for flag in flags} | keys >= set(_PRUNING):
                raise _only_structures(self.name, recipe, flags)
        elif "rules" not in keys:
            _refuse_rules(self.name, recipe, flags)


def _without_agreeing(flags: Mapping[str, str]) -> dict[str, str]:
    """The flags, --sparsity only if it says more than --pattern."""
    from llmprune.patterns import parse

    sparsity, pattern = flags.get("--sparsity"), flags.get("--pattern")
    if sparsity is None:
        return dict(flags)
    for piece in sparsity.split(","):
        if not _is_number(piece):
            raise RecipeError(
                f"--sparsity {sparsity}",
                expected="the fraction of the weights to prune, such as 0.5 or 50%",
                fix=f"for other patterns: --pattern {sparsity}",
            )
    if pattern is None:
        return dict(flags)
    with contextlib.suppress(PatternError):
        if parse(pattern).sparsity == parse(sparsity).sparsity:
            return {flag: value for flag, value in flags.items() if flag != "--sparsity"}
    raise RecipeError(
        f"--pattern {pattern} and --sparsity {sparsity} contradict each other",
        expected="one of them, or a pattern of this sparsity",
        fix=f"remove --sparsity; or, to prune {sparsity} of the weights wherever they are, --pattern",
    )


def _refuse_same_text(text: str, overrides: Sequence[str]) -> None:
    keys = {assignment.partition("=")[0].strip() for assignment in overrides}
    if not keys & {"calibration", "calibration.split", "evaluation", "evaluation.split"}:
        raise RecipeError(
            f"--dataset and --eval-dataset are both {text}",
            expected="two texts; perplexity on the calibration text says little",
            fix="give another text, or another split of the same dataset: --set evaluation.split=test",
        )


def _only_structures(name: str, recipe: "Recipe", flags: Mapping[str, str]) -> RecipeError:
    assert recipe.structures is not None
    sections = recipe.structures.model_dump(mode="json", exclude_none=True)
    amounts = [f"--set structures.{key}.remove={value['remove']}" for key, value in sections.items()
               if isinstance(value, dict) and value.get("remove") is not None]  # fmt: skip
    missing = "--method sparsegpt" if "--method" not in flags else "--pattern 2:4"
    return RecipeError(
        f"{_typed(flags)} with the recipe {name}, which removes structures and prunes no single weights",
        expected="a recipe that prunes weights, or both a pattern and a method for the weights that are left",
        fix=f"add {missing}, or use --recipe {DEFAULT_RECIPE}"
        + (f"; what is removed is set by {' '.join(amounts)}" if amounts else ""),
    )


def _refuse_rules(name: str, recipe: "Recipe", flags: Mapping[str, str]) -> None:
    for flag, value in flags.items():
        key = _KEYS[flag]
        ruled = [rule.match for rule in recipe.rules if getattr(rule, key) is not None]
        if ruled:
            raise RecipeError(
                f"{flag} {value} with the recipe {name}, whose rules set another {key} for {', '.join(ruled)}",
                expected=f"one {key} for every matrix, or a change that keeps the rules",
                fix=f"add --set rules=[] to drop the rules, or write --set {key}={value} to keep them",
            )


def _typed(flags: Mapping[str, str]) -> str:
    return " ".join(word for flag in flags.items() for word in flag)


def _is_number(text: str) -> bool:
    try:
        float(text.strip().removesuffix("%"))
    except ValueError:
        return False
    return True


def _value(assignment: str, key: str) -> Any:
    """What an override gives this key; None: nothing."""
    from llmprune.recipe.document import Document, override

    document = Document({}, "--set")
    try:
        override(document, assignment)
    except RecipeError:
        return None  # said when the recipe is loaded
    value = document.data
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _equal(one: Any, other: Any, key: str) -> bool:
    from llmprune.patterns import parse

    if key == "pattern":
        with contextlib.suppress(PatternError):
            return parse(str(one)) == parse(str(other))
    return bool(one == other)
