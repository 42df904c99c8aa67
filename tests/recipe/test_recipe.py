"""Recipes: what they hold, how they are read and written, and what a matrix gets."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_cases import EXPECTED, SMALL, STRUCTURED, written

from llmprune.methods import METHODS, Chain, Random, Refit, SparseGPT, Swaps, Wanda
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.patterns import NM, Block, Pattern, Unstructured
from llmprune.pruning.jobs import plan_jobs
from llmprune.recipe.bundled import bundled_recipes
from llmprune.recipe.grid import read_grid
from llmprune.recipe.recipe import Recipe, load_recipe
from llmprune.storage.hub import resolve_model
from llmprune.text.tokens import PROMPTS, EvaluationSpec, TextSpec

EVALUATION = {"samples": 32, "seed": 12345}


FULL = """\
description: everything at once
pattern: 2:4
method: {sparsegpt: {damping: 1e-3}}
include: ["model.*"]
exclude: ["*.lm_head"]
rules:
  - match: "*.self_attn.*"
    pattern: 4:8
  - match: "*.mlp.*"
    pattern: 0.5@64x64
    method:
      wanda:
calibration: {source: no, config: 2024-01-01, split: test, samples: 3, length: 64, layout: truncate, temperature: 1}
evaluation: {source: wikitext, samples: 5}
batch_size: 2
held_back: 0
decoder_layers: model.layers
experts: {min_tokens: 0}
device: cuda:1
compute_dtype: bfloat16
activation_budget: 512MiB
"""


def test_bundled_recipes_are_these_and_each_has_one_line_of_description() -> None:
    listed = bundled_recipes()
    assert [name for name, _ in listed] == sorted([*EXPECTED, *STRUCTURED])
    for name, description in listed:
        assert description == load_recipe(name).description
        assert description
        assert "\n" not in description


@pytest.mark.parametrize("name", EXPECTED)
def test_bundled_recipe_holds_what_its_name_says(name: str) -> None:
    recipe = load_recipe(name)
    assert (recipe.pattern, recipe.method) == EXPECTED[name]
    calibration = (64, 256) if name == "demo" else (None, None)
    assert (recipe.calibration.source, recipe.calibration.samples, recipe.calibration.length) == ("self", *calibration)
    assert recipe.batch_size == {"demo": 16, "best": 2}.get(name, 8)
    assert (recipe.reconstruct is not None) == (name == "best")
    assert load_recipe(Path(__file__).parents[2] / "recipes" / f"{name}.yaml") == recipe


@pytest.mark.parametrize("name", STRUCTURED)
def test_bundled_recipe_removes_what_its_name_says(name: str) -> None:
    recipe = load_recipe(name)
    sections, weights = STRUCTURED[name]
    assert recipe.structures is not None
    assert set(recipe.to_dict()["structures"]) == sections
    assert (recipe.pattern, recipe.method) == (weights or (None, None))
    fraction = int(name.split("-sparsegpt")[0].removesuffix("-matched").rpartition("-")[2]) / 100
    amounts = [section["remove"] for section in recipe.to_dict()["structures"].values() if section["remove"]]
    assert set(amounts) == {fraction}
    assert (recipe.reconstruct is not None) == name.endswith("-matched")


def test_only_the_mixed_recipe_has_rules() -> None:
    mixed = load_recipe("sparsegpt-attention-2of4-mlp-50")
    for attention in ("model.layers.3.self_attn.q_proj", "transformer.h.3.attn.c_attn", "gpt.layers.3.attention.dense"):
        assert mixed.for_matrix(attention) == (NM(2, 4), SparseGPT())
    assert mixed.for_matrix("model.layers.3.mlp.up_proj") == (Unstructured(0.5), SparseGPT())
    assert [name for name in EXPECTED if load_recipe(name).rules] == ["sparsegpt-attention-2of4-mlp-50"]


def test_every_bundled_recipe_fits_the_bundled_model() -> None:
    source = CheckpointSource(resolve_model("testbed"))
    for name in EXPECTED:
        jobs = plan_jobs(source, load_recipe(name))
        assert [len(layer) for layer in jobs] == [7] * 8, name


def test_defaults() -> None:
    recipe = load_recipe(SMALL)
    assert recipe == Recipe(pattern=NM(2, 4), method=Wanda())
    assert recipe.to_dict() == {
        "description": "",
        "pattern": "2:4",
        "method": {"wanda": {}},
        "structures": None,
        "rotation": None,
        "include": ["*"],
        "exclude": [],
        "rules": [],
        "calibration": asdict(TextSpec()),
        "evaluation": asdict(EvaluationSpec(**EVALUATION)) | {"prompts": list(PROMPTS)},
        "batch_size": 8,
        "held_back": 4,
        "decoder_layers": None,
        "allocation": "uniform",
        "report_to": None,
        "reconstruct": None,
        "quantise": None,
        "statistics": {"token_weight": "normalise", "loss_weight": "none", "sequential": False, "alpha": 0.0},
        "experts": {"min_tokens": 64},
        "device": "auto",
        "format": "dense",
        "compute_dtype": "auto",
        "activation_budget": 4 * 2**30,
    }


def test_every_key_of_a_file_is_read(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, FULL))
    assert recipe.pattern == NM(2, 4), "2:4 without quotes is 124 in YAML 1.1"
    assert recipe.method == SparseGPT(damping=0.001), "1e-3 is text in YAML 1.1"
    assert (recipe.include, recipe.exclude) == (("model.*",), ("*.lm_head",))
    assert [(rule.match, rule.pattern, rule.method) for rule in recipe.rules] == [
        ("*.self_attn.*", NM(4, 8), None),
        ("*.mlp.*", Block(0.5, (64, 64)), Wanda()),
    ]
    assert recipe.calibration == TextSpec("no", "2024-01-01", "test", samples=3, length=64, layout="truncate")
    assert recipe.evaluation == EvaluationSpec("wikitext", samples=5, length=64, order="text", seed=12345)
    assert (recipe.batch_size, recipe.held_back, recipe.decoder_layers) == (2, 0, "model.layers")
    assert (recipe.experts.min_tokens, recipe.device, recipe.compute_dtype) == (0, "cuda:1", "bfloat16")
    assert recipe.activation_budget == 512 * 2**20


def test_each_matrix_gets_the_first_rule_that_matches() -> None:
    recipe = load_recipe(FULL)
    mixed = load_recipe(
        {**SMALL, "rules": [{"match": "*.q_proj", "pattern": 0.7}, {"match": "m*", "method": "random"}]}
    )
    assert recipe.for_matrix("model.layers.3.self_attn.q_proj") == (NM(4, 8), SparseGPT(0.001))
    assert recipe.for_matrix("model.layers.3.mlp.up_proj") == (Block(0.5, (64, 64)), Wanda())
    assert recipe.for_matrix("model.layers.3.other") == (NM(2, 4), SparseGPT(0.001))
    assert recipe.for_matrix("model.lm_head") is None, "excluded"
    assert recipe.for_matrix("Model.layers.3.other") is None, "not included: globs tell cases apart"
    assert mixed.for_matrix("m.q_proj") == (Unstructured(0.7), Wanda())
    assert mixed.for_matrix("m.k_proj") == (NM(2, 4), Random())


@pytest.mark.parametrize(
    ("budget", "size"),
    [("4GiB", 4 * 2**30), ("4GB", 4 * 10**9), ("1.5 MiB", 3 * 2**19), ("4096", 4096), (4096, 4096), (0, 0)],
)
def test_sizes_are_read_as_people_write_them(budget: object, size: int) -> None:
    assert load_recipe({**SMALL, "activation_budget": budget}).activation_budget == size


@pytest.mark.parametrize("recipe", [FULL, SMALL, *EXPECTED, *STRUCTURED], ids=["full", "small", *EXPECTED, *STRUCTURED])
def test_yaml_and_data_round_trip(recipe: str, tmp_path: Path) -> None:
    loaded = load_recipe(recipe)
    assert load_recipe(loaded) is loaded
    assert load_recipe(loaded.to_yaml()) == loaded
    assert load_recipe(written(tmp_path, loaded.to_yaml())).digest == loaded.digest
    assert load_recipe(json.loads(json.dumps(loaded.to_dict()))) == loaded
    assert hash(load_recipe(loaded.to_yaml())) == hash(loaded)


def test_written_yaml_is_resolved_and_means_the_same_to_stock_readers() -> None:
    recipe = load_recipe(FULL)
    data = yaml.safe_load(recipe.to_yaml())
    assert data == recipe.to_dict()
    assert set(data) == set(Recipe.model_fields)
    assert data["method"] == {"sparsegpt": {"damping": 0.001, "block_size": 128}}


words = st.one_of(
    st.text(max_size=12),
    st.from_regex(r"[-+]?[0-9.:_]{1,6}([eE][-+]?[0-9]{1,3})?", fullmatch=True),
    st.sampled_from(
        ["no", "on", "null", "~", "", "1e3", "0x10", "010", "0o7", ".inf", "2024-01-01", "<<", "=", "a: b"]
    ),
)


patterns = st.one_of(
    st.builds(Unstructured, st.floats(0, 0.99), st.sampled_from([None, "row", "matrix", "layer"])),
    st.integers(1, 64).flatmap(lambda of: st.builds(NM, st.integers(1, of), st.just(of))),
    st.builds(Block, st.floats(0, 0.99), st.tuples(st.integers(1, 256), st.integers(1, 256))),
)


@settings(deadline=None, derandomize=True)
@given(words, words.filter(bool), patterns, st.floats(0, 1e300), st.integers(1, 2**40))
def test_any_value_survives_yaml(text: str, source: str, pattern: Pattern, damping: float, block: int) -> None:
    recipe = Recipe(
        description=text,
        pattern=pattern,
        method=SparseGPT(damping, block),
        calibration=TextSpec(source, column=text),
        evaluation=None,
    )
    read = load_recipe(recipe.to_yaml())
    assert read == recipe
    assert read.digest == recipe.digest


def test_digest_depends_on_every_key_but_the_description() -> None:
    digest = load_recipe(SMALL).digest
    changes = {
        "pattern": "0.5",
        "method": "sparsegpt",
        "structures": "{ffn: {remove: 0.5}}",
        "rotation": "{steps: 3}",
        "include": "[a*]",
        "exclude": "[a]",
        "rules": "[{match: a, pattern: 0.5}]",
        "calibration": "{samples: 3}",
        "evaluation": "null",
        "batch_size": "3",
        "held_back": "3",
        "decoder_layers": "layers",
        "allocation": "owl",
        "reconstruct": "{epochs: 3}",
        "quantise": "{bits: 4}",
        "report_to": "wandb",
        "statistics": "{token_weight: clip}",
        "experts": "{min_tokens: 3}",
        "device": "cpu",
        "format": "auto",
        "compute_dtype": "float32",
        "activation_budget": "3",
    }
    assert set(changes) == set(Recipe.model_fields) - {"description"}
    # An allocation needs a pattern whose sparsity may differ.
    further = {"allocation": ["pattern=0.5"]}
    others = {load_recipe(SMALL, [f"{key}={value}", *further.get(key, [])]).digest for key, value in changes.items()}
    assert len(others | {digest}) == len(changes) + 1
    assert load_recipe(SMALL, ["description=other"]).digest == digest
    assert load_recipe({"method": {"wanda": {}}, "pattern": NM(2, 4), "held_back": 4}).digest == digest
    content = {key: value for key, value in load_recipe(SMALL).to_dict().items() if key != "description"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert digest == hashlib.sha256(canonical.encode()).hexdigest()


@pytest.mark.parametrize(
    ("text", "source"),
    [
        *((path, path) for path in (
            "run #3/c.jsonl", "a: b/c.jsonl", "[old] run/c.jsonl", "[old]", "{a}/c.jsonl", "it's/c.jsonl",
            "'a' b.jsonl", '"a".jsonl', "*.jsonl", "&a/c.jsonl", "!a/c.jsonl", "- a.jsonl", "#3.jsonl", "%a", "@a",
            "2024", "a  b.txt",
            "c:/x.txt", "a, b.txt", "true", "~/c.jsonl",
        )),
        ("'run #3/c.jsonl'", "run #3/c.jsonl"), ('"[old]"', "[old]"),
    ],
)  # fmt: skip
def test_a_path_in_an_override_stays_whole(text: str, source: str) -> None:
    assert load_recipe(SMALL, [f"calibration.source={text}"]).calibration.source == source
    assert load_recipe(SMALL, [f"description={text}"]).description == source
    assert read_grid([f"description={text.replace(',', '')}"]) == {"description": [source.replace(",", "")]}


def test_recipe_cannot_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(SMALL).held_back = 1


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("pattern=2:4", Recipe(pattern=NM(2, 4), method=SparseGPT())),
        ("pattern=0.6", Recipe(pattern=Unstructured(0.6), method=SparseGPT())),
        ("method=wanda", Recipe(pattern=NM(4, 8), method=Wanda())),
        ("method.sparsegpt.damping=0.05", Recipe(pattern=NM(4, 8), method=SparseGPT(0.05))),
        ("method={random: {seed: 3}}", Recipe(pattern=NM(4, 8), method=Random(3))),
        ("exclude=[a, '*.b']", Recipe(pattern=NM(4, 8), method=SparseGPT(), exclude=("a", "*.b"))),
        ("experts.min_tokens=1", Recipe(pattern=NM(4, 8), method=SparseGPT(), experts={"min_tokens": 1})),
        ("decoder_layers=", Recipe(pattern=NM(4, 8), method=SparseGPT())),
        ("description=a=b", Recipe(pattern=NM(4, 8), method=SparseGPT(), description="a=b")),
        ("exclude=[a, '*.b #c'] ", Recipe(pattern=NM(4, 8), method=SparseGPT(), exclude=("a", "*.b #c"))),
    ],
)
def test_overrides(override: str, expected: Recipe) -> None:
    base = {"pattern": "4:8", "method": "sparsegpt"}
    assert load_recipe(base, [override]) == expected
    assert load_recipe(load_recipe(base), [override]) == expected
    assert base == {"pattern": "4:8", "method": "sparsegpt"}, "the caller's mapping stays as it was"


def test_an_override_of_an_option_takes_the_bare_name_before_it() -> None:
    bare = {"pattern": 0.5, "method": "wanda", "allocation": "owl"}
    changed = load_recipe({**bare, "allocation": {"owl": {"spread": 0.2}}})
    assert load_recipe(bare, ["allocation.owl.spread=0.2"]) == changed
    assert load_recipe({"pattern": 0.5, "method": "wanda"}, ["allocation.owl.spread=0.2"]) == changed


def test_order_of_overrides_does_not_matter() -> None:
    overrides = ["method.wanda={}", "calibration.samples=3", "method=wanda", "calibration={length: 16}"]
    recipe = load_recipe("sparsegpt-50", overrides)
    assert recipe == load_recipe("sparsegpt-50", overrides[::-1])
    assert recipe.method == Wanda()
    assert recipe.calibration == TextSpec(samples=3, length=16)


def test_evaluation_follows_the_length_of_calibration() -> None:
    assert load_recipe("sparsegpt-50", ["calibration.length=64"]).evaluation == EvaluationSpec(length=64, **EVALUATION)
    assert load_recipe("sparsegpt-50", ["evaluation.length=64"]).evaluation == EvaluationSpec(length=64, **EVALUATION)
    assert load_recipe("sparsegpt-50", ["evaluation=null"]).evaluation is None


def test_a_bundled_name_comes_before_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").write_text("pattern: 0.9\nmethod: random\n", encoding="utf-8")
    assert load_recipe("demo").method == SparseGPT()
    assert load_recipe(Path("demo")).method == Random()


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    assert load_recipe(written(tmp_path, "\ufeffpattern: 0.5\nmethod: wanda\n")).method == Wanda()


def test_every_method_writes_all_its_knobs() -> None:
    for name, method in METHODS.items():
        pattern = "0.5@16x16" if name == "obs" else "2:4"
        recipe = load_recipe({**SMALL, "method": name, "pattern": pattern})
        assert recipe.method == method()
        assert recipe.to_dict()["method"] == {name: asdict(recipe.method)}


def test_a_chain_is_a_list_of_a_method_and_steps() -> None:
    recipe = load_recipe({**SMALL, "method": ["wanda", {"swaps": {"sweeps": 7}}, "refit"]})
    assert recipe.method == Chain(Wanda(), (("swaps", Swaps(sweeps=7)), ("refit", Refit())))
    assert recipe.to_dict()["method"] == [{"wanda": {}}, {"swaps": asdict(Swaps(sweeps=7))}, {"refit": asdict(Refit())}]
    assert load_recipe(recipe.to_dict()) == load_recipe(recipe.to_yaml()) == recipe
    assert load_recipe({**SMALL, "method": ["wanda"]}).method == Wanda()
    assert load_recipe(SMALL, ["method=[sparsegpt, refit]"]).method == Chain(SparseGPT(), (("refit", Refit()),))


def test_a_description_says_what_was_changed() -> None:
    plain = load_recipe("wanda-50")
    assert load_recipe("wanda-50", ["batch_size=2"]).description == plain.description
    changed = load_recipe("wanda-50", ["pattern=2:4", "batch_size=2", "method=magnitude"])
    assert changed.description == f"{plain.description}; changed: method=magnitude, pattern=2:4"
    assert load_recipe("wanda-50", ["pattern=2:4", "description=mine"]).description == "mine"
