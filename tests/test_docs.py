"""The documentation: generated parts are complete, links lead somewhere, and what is shown can be typed."""

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import fields
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
import yaml
from tiny_models import build, save

import llmprune
from llmprune.cli import app
from llmprune.errors import RecipeError
from llmprune.recipe.allocation import RULES
from llmprune.recipe.bundled import bundled_recipes
from llmprune.recipe.recipe import Recipe, load_recipe
from llmprune.recipe.reconstruct import Reconstruct
from llmprune.recipe.rotation import RotationOptions
from llmprune.recipe.sections import Experts, Quantise, Rule, StatisticsOptions
from llmprune.recipe.structures import SECTIONS, Structures
from llmprune.text.tokens import EvaluationSpec
from llmprune.training.recipe import load_train_recipe

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
# Also read by newcomers, and made of the same commands and links.
OTHERS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
BUILDERS = ("mkdocs", "material", "mkdocstrings_handlers")

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined] # a group's


@pytest.fixture(scope="module")
def hook() -> Iterator[ModuleType]:
    """docs/hook.py, loaded as mkdocs loads it."""
    spec = importlib.util.spec_from_file_location("docs_hook", DOCS / "hook.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS))
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def texts(hook: ModuleType) -> dict[str, str]:
    """Every page, its generated parts filled in, and the other files as they are."""
    pages = {name: hook.expand((DOCS / name).read_text("utf-8")) for name in PAGES}
    return pages | {name: (ROOT / name).read_text("utf-8") for name in OTHERS}


def section(text: str, heading: str) -> str:
    """What stands below a heading, down to the next of its level or above."""
    _, mark, rest = text.partition(f"\n{heading}\n")
    assert mark, f"no heading {heading!r}"
    return re.split(rf"\n#{{1,{heading.index(' ')}}} ", rest)[0]


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def shell_lines(text: str) -> list[list[str]]:
    """The commands of the fenced bash blocks, split into words; comments, pipes and redirections are left out."""
    lines = [line for block in blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(re.split(r"\s[<|>]\s", line)[0], comments=True) for line in lines]
    return [line for line in words if line]


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, by the rule of Python-Markdown."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE):
        plain = unicodedata.normalize("NFKD", heading.replace("`", "")).encode("ascii", "ignore").decode()
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return found


def rows(text: str) -> set[str]:
    """The first cells of the tables in a text."""
    return set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE))


def test_every_part_is_asked_for_by_some_page(hook: ModuleType) -> None:
    sources = [ROOT / "README.md", *(DOCS / name for name in PAGES)]
    asked = {mark for source in sources for mark in re.findall(r"<!-- generated: (\S+)", source.read_text("utf-8"))}
    assert asked == set(hook.PARTS)


@pytest.mark.parametrize("name", PAGES)
def test_no_mark_is_left(texts: dict[str, str], name: str) -> None:
    assert "generated:" not in texts[name]


def test_the_readme_shows_what_is_generated_now(hook: ModuleType, texts: dict[str, str]) -> None:
    """If not, `python docs/hook.py` fills it in."""
    readme = texts["README.md"]
    assert readme.count("<!-- generated: ") == readme.count("<!-- end -->") > 0
    assert hook.refresh(readme) == readme
    assert hook.refresh(re.sub(r"(generated: first-run -->\n).*", r"\1old", readme)) == readme


def test_the_first_run_is_shown_as_measured(hook: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys.modules["site_parts.figures"], "RESULTS", tmp_path)
    assert "Not measured yet" in hook.PARTS["first-run"]()
    row = {"calibration": "self-generated", "perplexity": 12.346, "sparsity": 0.5, "seconds": 90.0}
    result = {
        "model": "org/model",
        "command": "llmprune prune org/model --output DIR",
        "calibration": {"samples": 3, "length": 24, "dataset": "text.jsonl"},
        "heldout": {"file": "heldout.jsonl", "samples": 5, "length": 24},
        "rows": [{"calibration": "dense", "perplexity": 10.0, "sparsity": 0.0}, row],
        "device": "CPU",
        "versions": {"torch": "2"},
    }
    (tmp_path / "first-run-smollm2.json").write_text(json.dumps(result))
    shown = hook.PARTS["first-run"]()
    assert "| dense | 10.00 | 0% |  |" in shown
    assert "| self-generated | 12.35 | 50% | 1.5 |" in shown
    assert "3 calibration sequences of 24 tokens" in shown


def test_an_unknown_part_stops_the_build(hook: ModuleType) -> None:
    with pytest.raises(KeyError, match="recipe-kyes"):
        hook.on_page_markdown("# Title\n\n<!-- generated: recipe-kyes -->\n", page=None)


def test_the_navigation_has_every_page() -> None:
    def leaves(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        for part in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            yield from leaves(part)

    assert sorted(leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"])) == PAGES


@pytest.mark.parametrize(
    ("heading", "keys"),
    [
        ("## All keys", set(Recipe.model_fields)),
        ("## Rules", set(Rule.model_fields)),
        ("## Calibration and evaluation", {field.name for field in fields(EvaluationSpec)} | {"share"}),
        ("## Statistics", set(StatisticsOptions.model_fields)),
        ("## Experts of MoE models", set(Experts.model_fields)),
        *((f"### `allocation.{name}`", set(rule.model_fields)) for name, rule in RULES.items()),
        ("## Block matching", set(Reconstruct.model_fields)),
        ("## Quantisation", set(Quantise.model_fields)),
        ("## Rotation", set(RotationOptions.model_fields)),
        *((f"### `structures.{name}`", set(model.model_fields)) for name, model in SECTIONS.items()),
    ],
)
def test_every_recipe_key_is_documented(texts: dict[str, str], heading: str, keys: set[str]) -> None:
    assert rows(section(texts["recipes.md"], heading)) == keys


def test_every_section_of_structures_is_documented(texts: dict[str, str]) -> None:
    first = section(texts["recipes.md"], "## Structures").partition("\n### ")[0]
    assert rows(first) == set(Structures.model_fields) == set(SECTIONS)


def test_the_defaults_are_those_of_the_code(texts: dict[str, str]) -> None:
    keys = section(texts["recipes.md"], "## All keys")
    assert f"| `batch_size` | whole number, ≥ 1 | `{Recipe.model_fields['batch_size'].default}` |" in keys
    assert "| `activation_budget` | bytes, or text such as `4GiB` | `4.0GiB` |" in keys
    assert load_recipe({"pattern": 0.5, "method": "wanda", "activation_budget": "4.0GiB"}).activation_budget == 4 << 30
    assert "| `sequential` | `true` or `false` | `false` |" in section(texts["recipes.md"], "## Statistics")
    text = section(texts["recipes.md"], "## Calibration and evaluation")
    assert "| `samples` | whole number | none | `32` |" in text


@pytest.mark.parametrize(("name", "description"), bundled_recipes())
def test_every_bundled_recipe_is_documented(texts: dict[str, str], name: str, description: str) -> None:
    page = texts["bundled-recipes.md"]
    source = (ROOT / "recipes" / f"{name}.yaml").read_text("utf-8")
    (figures,) = re.findall(r"^# Testbed: (.+)$", source, re.MULTILINE)
    assert f"| [{name}](#{name}) | {description} | {figures} |" in page
    (shown,) = blocks(section(page, f"### {name}"), "yaml")
    assert load_recipe(shown) == load_recipe(name)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_is_documented(texts: dict[str, str], name: str) -> None:
    found = section(texts["commands.md"], f"## llmprune {name}").replace("\\*", "*").replace("\\|", "|")
    for param in COMMANDS[name].params:
        assert all(word in found for word in (*param.opts, *param.secondary_opts, param.help or "")), param.name


def test_every_method_and_every_error_is_documented(texts: dict[str, str]) -> None:
    assert set(llmprune.METHODS) <= rows(texts["concepts/methods.md"])
    errors = import_module("llmprune.errors")
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type)}
    assert kinds <= rows(texts["commands.md"])


def test_every_public_name_is_documented(texts: dict[str, str]) -> None:
    documented = re.findall(r"^      heading: llmprune\.(\w+)$", texts["api.md"], re.MULTILINE)
    assert sorted(documented) == sorted(set(llmprune.__all__) - {"__version__"})


def test_figures_are_those_of_the_result_files(hook: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    figures = sys.modules["site_parts.figures"]
    results = json.loads((figures.RESULTS / "quality-testbed-cpu.json").read_text("utf-8"))
    assert f"| {results[0]['perplexity']:.2f} | " in hook.PARTS["quality"]("perplexity")
    results[0]["perplexity"] = 123.456
    (tmp_path / "quality-testbed-cpu.json").write_text(json.dumps(results))
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    assert "| 123.46 | " in hook.PARTS["quality"]("perplexity", "error")
    assert "Not measured yet" in hook.PARTS["structured-speed"]()


def test_what_is_said_of_gpus_is_true(texts: dict[str, str]) -> None:
    """Once a GPU has been measured, these pages have to say so."""
    measured = [path.name for path in (ROOT / "eval" / "bench" / "results").glob("*.json") if "gpu" in path.name]
    denied = [name for name in PAGES if "GPU kernels has run on a GPU yet" in texts[name]]
    assert bool(measured) != bool(denied), (measured, denied)


@pytest.mark.parametrize("name", [*PAGES, *OTHERS])
def test_links_lead_somewhere(texts: dict[str, str], name: str) -> None:
    here = (DOCS / name if name in PAGES else ROOT / name).parent
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(texts[name]))):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (here / path).resolve() if path else (DOCS / name if name in PAGES else ROOT / name).resolve()
        assert file.exists(), target
        if anchor:
            shown = texts[file.relative_to(DOCS).as_posix() if file.is_relative_to(DOCS) else file.name]
            assert anchor in anchors(shown), target


@pytest.mark.parametrize("name", [*PAGES, *OTHERS])
def test_commands_can_be_typed(texts: dict[str, str], name: str) -> None:
    for words in shell_lines(texts[name]):
        if words[0] == "llmprune" and words[1] != "--version":
            # Parsed by the command itself: unknown options, missing ones and bad values are refused.
            COMMANDS[words[1]].make_context(f"llmprune {words[1]}", words[2:])


@pytest.mark.parametrize("name", [*PAGES, *OTHERS])
def test_commands_in_the_text_exist(texts: dict[str, str], name: str) -> None:
    for span in re.findall(r"`(llmprune [^`]+)`", prose(texts[name])):
        command, *words = span.split()[1:]
        if command.startswith("-"):
            continue
        known = {option for param in COMMANDS[command].params for option in (*param.opts, *param.secondary_opts)}
        assert {word for word in words if word.startswith("-")} <= known, span


@pytest.mark.parametrize("name", [*PAGES, *OTHERS])
def test_modules_that_are_run_exist(texts: dict[str, str], name: str) -> None:
    for module, words in re.findall(r"python -m (llmprune(?:\.\w+)*)([^`\n]*)", texts[name]):
        spec = importlib.util.find_spec(module)
        assert spec is not None, module
        assert spec.origin is not None, module
        source = Path(spec.origin).read_text("utf-8")
        assert all(f'"{word}"' in source for word in words.split() if word.startswith("--")), (module, words)


@pytest.mark.parametrize("name", PAGES)
def test_recipes_can_be_read(texts: dict[str, str], name: str) -> None:
    for block in blocks(texts[name], "yaml"):
        if re.search(r"^schedule:", block, re.MULTILINE):
            load_train_recipe(block)
            continue
        missing = "" if re.search(r"^(pattern|structures):", block, re.MULTILINE) else "pattern: 0.5\n"
        if not re.search(r"^(method|structures):", block, re.MULTILINE):
            missing += "method: wanda\n"
        load_recipe(missing + block)


def test_a_recipe_that_is_wrong_would_be_noticed() -> None:
    with pytest.raises(RecipeError, match="samlpes"):
        load_recipe("pattern: 0.5\nmethod: wanda\ncalibration: {samlpes: 3}\n")


@pytest.mark.parametrize("name", PAGES)
def test_python_compiles_and_names_exist(texts: dict[str, str], name: str) -> None:
    for block in blocks(texts[name], "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("llmprune"):
                assert all(hasattr(import_module(node.module), alias.name) for alias in node.names), block
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "llmprune":
                assert node.attr in llmprune.__all__, block


@pytest.mark.parametrize("masked", [True, False])
def test_the_loop_that_keeps_zeros_keeps_them(
    texts: dict[str, str], tmp_path: Path, monkeypatch: Any, masked: bool
) -> None:
    (shown,) = blocks(section(texts["recovery.md"], "## In a loop of your own"), "python")
    dense = build("llama", torch.float32)
    with torch.no_grad():
        for weight in dense.model.layers.parameters():
            weight[..., ::2] *= 1 if weight.ndim == 1 else 0
    save(dense, tmp_path / "pruned")
    before = [weight.detach().clone() for weight in dense.model.layers.parameters() if weight.ndim > 1]
    code = shown if masked else shown.replace("llmprune.keep_zeros(model)", "torch.enable_grad()")
    ids = [torch.arange(24).view(2, 12) + step for step in range(3)]
    names: dict[str, Any] = {"batches": [{"input_ids": one, "labels": one} for one in ids]}
    monkeypatch.chdir(tmp_path)
    exec(code, names)
    after = [weight for weight in names["model"].model.layers.parameters() if weight.ndim > 1]
    assert all(now[old == 0].eq(0).all() for now, old in zip(after, before, strict=True)) == masked
    assert all(now[old != 0].ne(old[old != 0]).any() for now, old in zip(after, before, strict=True))


def test_changelog_and_citation_name_this_version_and_licence() -> None:
    assert f"## [{llmprune.__version__}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == llmprune.__version__
    licence = re.search(r'^license = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert licence is not None
    assert citation["license"] == licence[1]


class Loaded(HTMLParser):
    """What a page loads from elsewhere; links that a reader may follow are none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = [value or "" for key, value in attrs if key in ("src", "href", "srcset")]
        self.found += [value for value in values if tag != "a" and re.match(r"(https?:)?//", value)]


@pytest.mark.slow
def test_the_site_builds_and_fetches_nothing(tmp_path: Path) -> None:
    absent = [name for name in BUILDERS if importlib.util.find_spec(name) is None]
    if absent:
        pytest.skip(f'not installed: {", ".join(absent)} (pip install -e ".[docs]")')
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*.html")}
    assert {name.replace(".md", ".html") for name in PAGES} <= pages
    for page in pages:
        loaded = Loaded()
        loaded.feed((tmp_path / "site" / page).read_text("utf-8"))
        assert loaded.found == [], page
    assert not list((tmp_path / "site").rglob("*.py"))
