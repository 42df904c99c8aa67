"""The rooms of the house and who may import whom. Read from the source, without importing it."""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, KERNELS = ROOT / "llmprune", ROOT / "triton_kernels"
FILES = [path for folder in (PACKAGE, KERNELS) for path in sorted(folder.rglob("*.py"))]

# The rooms in their order. A module imports from its own room, where nothing goes round in a circle, and from the lines
# above it; never from another room of its own line, and never from below.
ROOMS = (
    ("kernels",),
    ("errors", "heartbeat", "precision", "progress", "timing", "torchrun", "units"),
    ("devices", "paths", "patterns", "statistics"),
    ("losses", "ranks"),
    ("storage.formats",),
    ("methods", "rotation", "storage", "training.rules"),
    ("models",),
    ("serving", "text"),
    ("stream", "vllm_plugin"),
    ("recipe",),
    ("structures.find",),
    ("structures.remove",),
    ("structures.describe",),
    ("structures.choose",),
    ("allocation",),
    ("measuring", "structures"),
    ("pages",),
    ("recovery",),
    ("pruning",),
    ("exporting", "training"),
    ("cli",),
    ("__main__",),
    ("evaluation",),  # an old name, until 0.2
)
LEVELS = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
# These two never see each other, not even a room inside the other: what measures a model must not trust what made it.
STRANGERS = {"measuring", "structures"}
# The package itself: its version may be read anywhere; its public names are resolved when they are first used.
FACE = ""

# The mathematics reads tensors and nothing else. What is not listed here may use any library.
LIBRARIES = {
    "allocation": {"torch"},
    "errors": set(),
    "kernels": {"torch", "triton"},
    "losses": {"jaxtyping", "torch"},
    "methods": {"jaxtyping", "numpy", "torch"},
    "patterns": {"jaxtyping", "numpy", "torch"},
    "precision": {"torch"},
    "rotation": {"jaxtyping", "torch"},
    "serving.forms": {"torch"},
    "serving.fusion": {"torch"},
    "serving.sparse_linear": {"torch"},
    "statistics": {"jaxtyping", "torch"},
    "storage.formats": {"jaxtyping", "torch"},
    "structures.remove.block_matrices": {"torch"},
    "structures.remove.exchange": {"torch"},
    "structures.remove.problem": {"jaxtyping", "torch"},
    "structures.remove.solver": {"jaxtyping", "torch"},
    "training.rules": {"torch"},
}
# Rooms that the mathematics must not reach, directly or through others: models and files.
OUTSIDE_MATHEMATICS = ("storage", "models", "stream", "text", "recipe", "pruning")

SELECTION = {"topk", "kthvalue", "argsort", "argpartition", "msort", "quantile", "nanquantile"}
ARRAY_SELECTION = {"sort", "partition", "median", "nanmedian"}


def module_of(path: Path) -> str:
    """Dotted name inside the package: "stream.guard"; the face of a room is the room itself."""
    inside = path.relative_to(PACKAGE) if PACKAGE in path.parents else Path("kernels") / path.relative_to(KERNELS)
    return ".".join(inside.with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = {module_of(path): path for path in FILES}


def room_of(module: str) -> str | None:
    """The innermost room that a module lies in; None for the package itself."""
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in names if name in LEVELS), None)


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
            # A relative import stays inside its own room; only the kernels use them.
            assert not node.level or KERNELS in path.parents, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names if not node.level)


def uses(path: Path) -> set[str]:
    """The modules of ours that a file imports."""
    found = set()
    for dotted in imports(path):
        top, _, inside = dotted.partition(".")
        if top == "llmprune":
            parts = inside.split(".")
            names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
            known = next((name for name in names if name in MODULES), FACE)
            found.add("eval" if parts[0] in ("eval", "recipes") else known)
    return found - {module_of(path)}


USES = {module: uses(path) for module, path in MODULES.items()}


def reachable(module: str) -> set[str]:
    """What a module imports, directly or through others."""
    seen: set[str] = set()
    waiting = {module}
    while waiting:
        seen |= waiting
        waiting = {other for one in waiting for other in USES.get(one, ())} - seen
    return seen - {module}


def allowed(module: str, used: str) -> bool:
    """Whether the order of the rooms lets one module import another."""
    mine, other = room_of(module), room_of(used)
    if mine is None or other is None:
        return used == FACE or module == FACE
    if {mine.split(".")[0], other.split(".")[0]} == STRANGERS:
        return False
    return mine == other or LEVELS[other] < LEVELS[mine]


def test_every_module_has_a_room() -> None:
    assert len(MODULES) > 150
    assert [module for module in MODULES if module and room_of(module) is None] == []
    assert [room for room in LEVELS if not any(room_of(module) == room for module in MODULES)] == []


@pytest.mark.parametrize("module", [module for module in MODULES if module])
def test_imports_go_downwards_only(module: str) -> None:
    wrong = sorted(used for used in USES[module] if not allowed(module, used))
    assert not wrong, f"{module} (in {room_of(module)}) imports {wrong}"


@pytest.mark.parametrize(
    ("module", "used", "fits"),
    [
        ("stream.stream", "models.source", True),
        ("stream.stream", "stream.activations", True),
        ("models.source", "stream.stream", False),
        ("text.tokens", "serving.loader", False),
        ("structures.survey", "measuring.perplexity", False),
        ("measuring.perplexity", "structures.find.discovery", False),
        ("storage.formats.nm", "storage.files", False),
        ("structures.find.discovery", "structures.remove.cuts", False),
    ],
)
def test_the_order_is_the_one_that_is_meant(module: str, used: str, fits: bool) -> None:
    assert module in MODULES
    assert used in MODULES
    assert allowed(module, used) == fits


@pytest.mark.parametrize("part", LIBRARIES)
def test_the_mathematics_imports_no_other_library(part: str) -> None:
    modules = [module for module in MODULES if module == part or module.startswith(f"{part}.")]
    tops = {dotted.split(".")[0] for module in modules for dotted in imports(MODULES[module])}
    assert modules
    assert tops - sys.stdlib_module_names - {"llmprune"} <= LIBRARIES[part]


@pytest.mark.parametrize(
    "part",
    ["patterns", "statistics", "losses", "methods", "rotation"]
    + [part for part in LIBRARIES if part.startswith("structures.")],
)
def test_the_mathematics_knows_neither_models_nor_files(part: str) -> None:
    modules = [module for module in MODULES if module == part or module.startswith(f"{part}.")]
    reached = {other for module in modules for other in reachable(module)}
    assert not {module for module in reached if module.split(".")[0] in OUTSIDE_MATHEMATICS}


def test_no_import_is_circular() -> None:
    # Packages hand on the names of their own modules, which may in turn be read from the package.
    graph = {module: {used for used in found if used != FACE} for module, found in USES.items() if module != FACE}
    order = list(TopologicalSorter(graph).static_order())
    assert order.index("errors") < order.index("patterns") < order.index("pruning.pipeline")


def test_only_the_command_line_sees_the_command_line() -> None:
    for module, path in MODULES.items():
        if module.split(".")[0] == "cli" or module == "__main__":
            continue
        tops = {dotted.split(".")[0] for dotted in imports(path)}
        assert not tops & {"argparse", "click", "rich", "typer"}, path
        assert "sys.argv" not in path.read_text(encoding="utf-8"), path


def test_the_core_does_not_import_the_evaluation() -> None:
    """The bundled model and tasks lie there; they are found as resources, by a name in a string."""
    assert [module for module, used in USES.items() if "eval" in used] == []
    for module, path in MODULES.items():
        strings = [
            node.value for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Constant)
        ]
        named = any(isinstance(value, str) and value.startswith("llmprune.eval.") for value in strings)
        assert not named or module in ("storage.hub", "measuring.tasks.tasks"), path


def test_no_code_of_a_checkpoint_is_ever_run() -> None:
    """Every automatic class is told so: left to its default it asks on stdin, where anything may answer."""
    found = 0
    for path in [*FILES, *sorted((ROOT / "eval").rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner, name = ast.unparse(node.func.value), node.func.attr
                if name in ("from_pretrained", "from_config") and ("Auto" in owner or "auto" in owner):
                    options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    quantizer = owner == "AutoHfQuantizer"  # reads no files
                    assert quantizer or options.get("trust_remote_code") == "False", f"{path}:{node.lineno}"
                    found += 1
    assert found > 6


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
    for module, path in MODULES.items():
        if module != "patterns":
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


def test_every_room_is_installed() -> None:
    """An editable installation finds them anyway, a wheel does not."""
    listed = (ROOT / "pyproject.toml").read_text("utf-8")
    rooms = [path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in PACKAGE.rglob("__init__.py")]
    assert [room for room in rooms if f'"{room}"' not in listed] == []
