"""Who may import whom. Read from the source, without importing it."""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, KERNELS = ROOT / "llmprune", ROOT / "triton_kernels"
FILES = [path for folder in (PACKAGE, KERNELS) for path in sorted(folder.rglob("*.py"))]

# Everything of ours that a module may depend on, directly or through others.
ALLOWED = {
    "errors": set(),
    "version": set(),
    "precision": set(),
    "kernels": set(),
    "patterns": {"errors"},
    "factorisation": {"errors", "precision"},
    "statistics": {"errors", "factorisation", "precision"},
    "methods": {"errors", "factorisation", "kernels", "patterns", "precision", "statistics"},
    "formats": {"errors", "patterns"},
    "forms": {"errors", "formats", "kernels", "patterns"},
    "sparse_linear": {"errors", "formats", "forms", "kernels", "patterns"},
    "fusion": {"errors", "formats", "forms", "kernels", "patterns", "sparse_linear"},
    "documents": {"errors"},
    "calibration": {"documents", "errors"},
    "checkpoint": {"errors"},
    "decoder": {"errors"},
}
# The mathematics reads tensors and nothing else; typing_extensions comes with torch.
LIBRARIES = {
    "errors": set(),
    "precision": {"torch"},
    "kernels": {"torch", "triton"},
    "patterns": {"jaxtyping", "numpy", "torch"},
    "factorisation": {"jaxtyping", "torch"},
    "statistics": {"jaxtyping", "torch"},
    "methods": {"jaxtyping", "numpy", "torch"},
    "formats": {"jaxtyping", "torch"},
    "forms": {"torch"},
    "sparse_linear": {"torch"},
    "fusion": {"torch"},
}
SELECTION = {"topk", "kthvalue", "argsort", "argpartition", "msort", "quantile", "nanquantile"}
ARRAY_SELECTION = {"sort", "partition", "median", "nanmedian"}


def name_of(path: Path) -> str:
    """A file's part in the design: `methods` for all of its files, `kernels` for the folder installed as that."""
    if KERNELS in path.parents:
        return "kernels"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """The dotted names that a file imports, inside functions too, but not those that only type checkers see."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unseen = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # A relative import stays inside its own part; only the kernels use them.
            assert not node.level or name_of(path) == "kernels", f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names if not node.level)


def dependencies() -> dict[str, set[str]]:
    """Part -> the parts that it imports; what is taken from the package itself counts as `__init__`."""
    names = {name_of(path) for path in FILES}
    found: dict[str, set[str]] = {name: set() for name in names}
    for path in FILES:
        for dotted in imports(path):
            top, _, rest = dotted.partition(".")
            part = rest.split(".")[0]
            if top == "llmprune":
                found[name_of(path)].add(part if part in names | {"eval", "recipes"} else "__init__")
    return {name: found[name] - {name} for name in names}


DEPENDENCIES = dependencies()


def reachable(name: str) -> set[str]:
    seen: set[str] = set()
    waiting = {name}
    while waiting:
        seen |= waiting
        waiting = {other for one in waiting for other in DEPENDENCIES.get(one, ())} - seen
    return seen - {name}


def test_the_core_is_found() -> None:
    assert set(ALLOWED) | {"__init__", "stream", "pipeline", "hub", "cli"} <= set(DEPENDENCIES)
    assert {"errors", "patterns", "statistics", "kernels"} <= DEPENDENCIES["methods"]
    assert {"methods", "decoder"} <= reachable("pipeline")


@pytest.mark.parametrize("name", ALLOWED)
def test_the_core_depends_only_on_what_lies_below(name: str) -> None:
    assert reachable(name) <= ALLOWED[name]


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_mathematics_imports_no_other_library(name: str) -> None:
    tops = {dotted.split(".")[0] for path in FILES if name_of(path) == name for dotted in imports(path)}
    assert tops - sys.stdlib_module_names - {"llmprune"} <= LIBRARIES[name]


def test_the_stream_knows_neither_methods_nor_recipes() -> None:
    assert not reachable("stream") & {"methods", "solving", "recipe", "pipeline", "cli"}


def test_no_import_is_circular() -> None:
    order = list(TopologicalSorter({name: DEPENDENCIES[name] - {"__init__"} for name in DEPENDENCIES}).static_order())
    assert order.index("errors") < order.index("patterns") < order.index("methods") < order.index("pipeline")


def test_only_the_command_line_sees_the_command_line() -> None:
    for path in FILES:
        if name_of(path) in ("cli", "__main__"):
            continue
        source = path.read_text(encoding="utf-8")
        assert not {dotted.split(".")[0] for dotted in imports(path)} & {"typer", "click", "argparse"}, path
        assert "sys.argv" not in source, path
        assert "cli" not in DEPENDENCIES[name_of(path)], path


def test_the_core_does_not_import_the_evaluation() -> None:
    """The bundled model and tasks lie there; they are found as resources, by a name in a string."""
    assert [name for name, used in DEPENDENCIES.items() if "eval" in used] == []
    for path in FILES:
        strings = [
            node.value for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Constant)
        ]
        named = any(isinstance(value, str) and value.startswith("llmprune.eval") for value in strings)
        assert not named or name_of(path) in ("hub", "evaluation"), path


def selections(source: str) -> list[str]:
    """Calls that rank numbers: a mask made by one of them would have its own ideas about counts and ties."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, owner = node.func.attr, ast.unparse(node.func.value)
        of_arrays = owner in ("torch", "np", "numpy") and name in ARRAY_SELECTION
        # A list is sorted by keywords only, and never along a dimension.
        of_a_tensor = name == "sort" and (node.args or {k.arg for k in node.keywords} - {"key", "reverse"})
        if name in SELECTION or of_arrays or of_a_tensor:
            found.append(ast.unparse(node))
    return found


def test_only_patterns_selects() -> None:
    for path in FILES:
        if name_of(path) != "patterns":
            assert selections(path.read_text(encoding="utf-8")) == [], path
    assert selections((PACKAGE / "patterns.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        *((call, True) for call in ("x.topk(3)", "torch.kthvalue(x, 2)", "x.abs().sort(dim=1)", "np.partition(x, 3)")),
        *((call, True) for call in ("torch.sort(x)", "x.flatten().sort(0)", "x.argsort()", "np.argpartition(x, 2)")),
        *((call, False) for call in ("names.sort()", "rows.sort(key=len, reverse=True)", "'a=b'.partition('=')")),
    ],
)
def test_selections_are_recognised(source: str, found: bool) -> None:
    assert bool(selections(source)) == found
