import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprune.calibration import TextSpec
from llmprune.errors import CalibrationError, PatternError, RecipeError
from llmprune.methods import METHODS, Magnitude, Random, SparseGPT, Wanda
from llmprune.patterns import NM, Block, Pattern, Unstructured
from llmprune.recipe import Recipe, bundled_recipes, load_recipe

EXPECTED = {
    "demo": (Unstructured(0.5), SparseGPT()),
    "magnitude-50": (Unstructured(0.5), Magnitude()),
    "random-50": (Unstructured(0.5), Random()),
    "sparsegpt-2of4": (NM(2, 4), SparseGPT()),
    "sparsegpt-4of8": (NM(4, 8), SparseGPT()),
    "sparsegpt-50": (Unstructured(0.5), SparseGPT()),
    "sparsegpt-60": (Unstructured(0.6), SparseGPT()),
    "sparsegpt-70": (Unstructured(0.7), SparseGPT()),
    "sparsegpt-attention-2of4-mlp-50": (Unstructured(0.5), SparseGPT()),
    "wanda-2of4": (NM(2, 4), Wanda()),
    "wanda-50": (Unstructured(0.5), Wanda()),
}

SMALL = {"pattern": "2:4", "method": "wanda"}
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


def refusal(recipe: object, *overrides: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides)
    return caught.value


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_bundled_recipes_are_these_and_each_has_one_line_of_description() -> None:
    listed = bundled_recipes()
    assert [name for name, _ in listed] == sorted(EXPECTED)
    for name, description in listed:
        assert description == load_recipe(name).description
        assert description
        assert "\n" not in description


@pytest.mark.parametrize("name", EXPECTED)
def test_bundled_recipe_holds_what_its_name_says(name: str) -> None:
    recipe = load_recipe(name)
    assert (recipe.pattern, recipe.method) == EXPECTED[name]
    calibration = (64, 256) if name == "demo" else (128, 2048)
    assert (recipe.calibration.source, recipe.calibration.samples, recipe.calibration.length) == ("self", *calibration)
    assert recipe.batch_size == (16 if name == "demo" else 8)
    assert load_recipe(Path(__file__).parents[1] / "recipes" / f"{name}.yaml") == recipe


def test_only_the_mixed_recipe_has_rules() -> None:
    mixed = load_recipe("sparsegpt-attention-2of4-mlp-50")
    assert mixed.for_matrix("model.layers.3.self_attn.q_proj") == (NM(2, 4), SparseGPT())
    assert mixed.for_matrix("model.layers.3.mlp.up_proj") == (Unstructured(0.5), SparseGPT())
    assert [name for name in EXPECTED if load_recipe(name).rules] == ["sparsegpt-attention-2of4-mlp-50"]


def test_defaults() -> None:
    recipe = load_recipe(SMALL)
    assert recipe == Recipe(pattern=NM(2, 4), method=Wanda())
    assert recipe.to_dict() == {
        "description": "",
        "pattern": "2:4",
        "method": {"wanda": {}},
        "include": ["*"],
        "exclude": [],
        "rules": [],
        "calibration": asdict(TextSpec()),
        "evaluation": asdict(TextSpec(length=2048, **EVALUATION)),
        "batch_size": 8,
        "held_back": 4,
        "decoder_layers": None,
        "experts": {"min_tokens": 64},
        "device": "auto",
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
    assert recipe.evaluation == TextSpec("wikitext", samples=5, length=64, order="text", seed=12345)
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


@pytest.mark.parametrize("recipe", [FULL, SMALL, *EXPECTED], ids=["full", "small", *EXPECTED])
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
    st.builds(Unstructured, st.floats(0, 1), st.sampled_from([None, "row", "matrix", "layer"])),
    st.integers(1, 64).flatmap(lambda of: st.builds(NM, st.integers(0, of), st.just(of))),
    st.builds(Block, st.floats(0, 1), st.tuples(st.integers(1, 256), st.integers(1, 256))),
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
        "include": "[a*]",
        "exclude": "[a]",
        "rules": "[{match: a, pattern: 0.5}]",
        "calibration": "{samples: 3}",
        "evaluation": "null",
        "batch_size": "3",
        "held_back": "3",
        "decoder_layers": "layers",
        "experts": "{min_tokens: 3}",
        "device": "cpu",
        "compute_dtype": "float32",
        "activation_budget": "3",
    }
    assert set(changes) == set(Recipe.model_fields) - {"description"}
    others = {load_recipe(SMALL, [f"{key}={value}"]).digest for key, value in changes.items()}
    assert len(others | {digest}) == len(changes) + 1
    assert load_recipe(SMALL, ["description=other"]).digest == digest
    assert load_recipe({"method": {"wanda": {}}, "pattern": NM(2, 4), "held_back": 4}).digest == digest
    content = {key: value for key, value in load_recipe(SMALL).to_dict().items() if key != "description"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert digest == hashlib.sha256(canonical.encode()).hexdigest()


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
    ],
)
def test_overrides(override: str, expected: Recipe) -> None:
    base = {"pattern": "4:8", "method": "sparsegpt"}
    assert load_recipe(base, [override]) == expected
    assert load_recipe(load_recipe(base), [override]) == expected
    assert base == {"pattern": "4:8", "method": "sparsegpt"}, "the caller's mapping stays as it was"


def test_order_of_overrides_does_not_matter() -> None:
    overrides = ["method.wanda={}", "calibration.samples=3", "method=wanda", "calibration={length: 16}"]
    recipe = load_recipe("sparsegpt-50", overrides)
    assert recipe == load_recipe("sparsegpt-50", overrides[::-1])
    assert recipe.method == Wanda()
    assert recipe.calibration == TextSpec(samples=3, length=16)


def test_evaluation_follows_the_length_of_calibration() -> None:
    assert load_recipe("sparsegpt-50", ["calibration.length=64"]).evaluation == TextSpec(length=64, **EVALUATION)
    assert load_recipe("sparsegpt-50", ["evaluation.length=64"]).evaluation == TextSpec(length=64, **EVALUATION)
    assert load_recipe("sparsegpt-50", ["evaluation=null"]).evaluation is None


@pytest.mark.parametrize(
    ("line", "what", "expected"),
    [
        ("method: {sparsegpt: {damp: 0.01}}", "3: unknown key 'damp' in method.sparsegpt; did you mean 'damping'?", ""),
        ("methd: wanda", "3: unknown key 'methd'; did you mean 'method'?", "one of description, pattern, method"),
        ("calibration: {sample: 3}", "3: unknown key 'sample' in calibration; did you mean 'samples'?", "source, "),
        ("experts: {min_token: 3}", "3: unknown key 'min_token' in experts; did you mean 'min_tokens'?", "min_tokens"),
        ("rules: [{match: a, patern: 1, method: wanda}]", "3: unknown key 'patern' in rules.0; did", "match, pattern"),
        ("1: 2", "3: unknown key '1'", "one of description"),
        ("method: sparsegtp", "3: unknown method 'sparsegtp'; did you mean 'sparsegpt'?", "one of random, magnitude"),
        ("method: [wanda]", '3: method is ["wanda"] (in method)', "one name such as wanda"),
        ("method: {wanda: {}, random: {}}", "3: method is {", "one name such as wanda"),
        ("method: {wanda: 3}", "3: method.wanda is 3", "keys and values"),
        ("method: {sparsegpt: {damping: high}}", '3: method.sparsegpt.damping is "high"', "a valid number"),
        ("method: {sparsegpt: {block_size: 1.5}}", "3: method.sparsegpt.block_size is 1.5", "a valid integer"),
        ("method: {sparsegpt: {block_size: '8'}}", '3: method.sparsegpt.block_size is "8"', "a valid integer"),
        ("method: {sparsegpt: {damping: -1}}", "3: sparsegpt.damping is -1.0 (in method.sparsegpt.damping)", ">= 0"),
        ("pattern: 3;4", "3: pattern '3;4' cannot be read (in pattern)", "N:M such as 2:4"),
        ("pattern: 1.5", "3: sparsity 1.5 (in pattern)", "in [0, 1]"),
        ("pattern: 5:4", "3: pattern 5:4 (in pattern)", "0 <= N <= M"),
        ("rules: [{match: a, pattern: 2;4}]", "3: pattern '2;4' cannot be read (in rules.0.pattern)", "N:M such as"),
        ("rules: [{pattern: 0.5}]", "3: rules.0.match is missing", ""),
        ("rules: [{match: a}]", "3: the rule for 'a' changes nothing (in rules.0)", "pattern, method or both"),
        ("rules: [{match: '', pattern: 1}]", '3: rules.0.match is ""', "text that is not empty"),
        ("rules: {a: 0.5}", '3: rules is {"a": 0.5}', "a list"),
        ("include: a", '3: include is "a"', "a list"),
        ("include: [1]", "3: include.0 is 1", "text"),
        ("include: []", "3: include is empty: nothing would be pruned", ""),
        ("exclude: [a, '*']", "3: exclude covers all of include: nothing would be pruned", ""),
        ("description: 3", "3: description is 3", "text"),
        ("calibration: self", '3: calibration is "self"', "keys and values"),
        ("calibration: {samples: many}", '3: calibration.samples is "many"', "a valid integer"),
        ("calibration: {samples: '3'}", '3: calibration.samples is "3"', "a valid integer"),
        ("calibration: {samples: true}", "3: calibration.samples is true", "a valid integer"),
        ("calibration: {samples: 0}", "3: samples 0 (in calibration.samples)", "at least 1"),
        ("evaluation: {length: 1}", "3: length 1 (in evaluation.length)", "at least 2"),
        ("evaluation: {layout: packed}", '3: evaluation.layout is "packed"', "'pack' or 'truncate'"),
        ("evaluation: {temperature: .nan}", "3: temperature nan (in evaluation.temperature)", "above 0"),
        ("evaluation: {seed: 0}", "3: evaluation.seed and calibration.seed are both 0", "two seeds"),
        ("batch_size: 0", "3: batch_size is 0", "greater than or equal to 1"),
        ("held_back: -1", "3: held_back is -1", "greater than or equal to 0"),
        ("experts: {min_tokens: -1}", "3: experts.min_tokens is -1", "greater than or equal to 0"),
        ("decoder_layers: ''", '3: decoder_layers is ""', "text that is not empty"),
        ("device: gpu", "3: device is 'gpu' (in device)", "auto, cpu, cuda"),
        ("compute_dtype: fp16", '3: compute_dtype is "fp16"', "'auto', 'float32', 'bfloat16' or 'float16'"),
        ("activation_budget: 4 gigs", '3: activation_budget is "4 gigs"', "512MiB or 4GB"),
        ("activation_budget: -1", "3: activation_budget is -1", "512MiB or 4GB"),
        ("held_back: 1.0", "3: held_back is 1.0", "a valid integer"),
        ("batch_size: null", "3: batch_size is null", "a valid integer"),
        ("held_back: 0\nheld_back: 1", "4: key 'held_back' stands in line 3 already", "each key once"),
        ("evaluation:\n  seed: 1\n  seed: 2", "5: key 'evaluation.seed' stands in line 4 already", "each key once"),
        ("include: [*.mlp.*]", "3: expected alphabetic or numeric character, but found '.'", "valid YAML"),
        ("include: &a [x]\nexclude: *a", "4: an alias (*) or a tag (!)", "without aliases"),
        ("? [a]\n: 3", "3: a list or mapping as a key", "valid YAML"),
        ("seed: [", "3: expected the node content", "valid YAML"),
        ("seed: !thing 3", "3: an alias (*) or a tag (!)", "without aliases"),
        ("rules: !!set {a}", "3: an alias (*) or a tag (!)", "without aliases"),
        ("---\nseed: 3", "3: but found another document", "valid YAML"),
    ],
)
def test_mistakes_are_shown_with_their_line(line: str, what: str, expected: str, tmp_path: Path) -> None:
    others = [f"{key}: {value}" for key, value in SMALL.items() if not line.startswith(f"{key}:")]
    text = "\n".join([*others, *["# the mistake stands in line 3"] * (2 - len(others)), line])
    path = written(tmp_path, text)
    error = refusal(path)
    assert error.what.startswith(f"{path}:{what}")
    assert "\n" not in error.what, "nothing else is wrong"
    assert expected in error.expected


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["pattern=2;4"], "pattern '2;4' cannot be read (in pattern)\nexpected: a sparsity"),
        (
            ["method.sparsegpt.damping=-1"],
            "sparsegpt.damping is -1.0 (in method.sparsegpt.damping)\nexpected: a fraction",
        ),
        (["method.sparsegpt.damp=1"], "unknown key 'damp' in method.sparsegpt; did you mean 'damping'?"),
        (["method.wanda.x=1"], "the method is sparsegpt, not wanda"),
        (["method.damping=1"], "the method is sparsegpt, not damping"),
        (["method.sparsegpt.damping=1", "method=wanda"], "the method is wanda, not sparsegpt"),
        (["calibration={samples: 0}"], "samples 0 (in calibration.samples)\nexpected: at least 1"),
        (["calibraton.samples=3"], "unknown key 'calibraton'; did you mean 'calibration'?"),
        (["evaluation.samples=3", "evaluation=null"], "evaluation is null, which has no keys to set"),
        (["evaluation.length=3", "evaluation=null"], "evaluation is null, which has no keys to set"),
        (["pattern.x=3"], 'pattern is "4:8", which has no keys to set'),
        (["include=[*.mlp]"], "expected alphabetic or numeric character, but found '.'\nexpected: valid YAML"),
    ],
)
def test_mistakes_in_overrides_name_the_override(overrides: list[str], what: str) -> None:
    base = {"pattern": "4:8", "method": "sparsegpt", "calibration": {"samples": 8}}
    for recipe in (base, load_recipe(base)):
        assert str(refusal(recipe, *overrides)).startswith(f"--set {overrides[0]}: {what}")


@pytest.mark.parametrize("override", ["held_back", "=3", "experts..x=3"])
def test_overrides_are_key_and_value(override: str) -> None:
    error = refusal(SMALL, override)
    assert error.what == f"--set {override} cannot be read"
    assert error.expected.startswith("KEY=VALUE")


def test_an_override_is_given_once() -> None:
    assert refusal(SMALL, "held_back=3", "held_back = 3").what == "--set held_back is given 2 times"


def test_an_override_may_contradict_what_it_does_not_set() -> None:
    assert "evaluation.seed and calibration.seed are both 12345" in refusal(SMALL, "calibration.seed=12345").what


def test_an_override_leaves_the_lines_of_what_it_does_not_touch(tmp_path: Path) -> None:
    path = written(tmp_path, "pattern: 3;4\nmethod: wanda\ncalibration:\n  samples: many\n  length: 1.5\n")
    error = refusal(path, "calibration.samples=few", "device=gpu")
    assert error.what.splitlines() == [
        f"{path}:1: pattern '3;4' cannot be read (in pattern)",
        '--set calibration.samples=few: calibration.samples is "few"',
        f"{path}:5: calibration.length is 1.5",
        "--set device=gpu: device is 'gpu' (in device)",
    ]
    assert len(error.expected.splitlines()) == 3, "an expectation that two of them share is said once"


def test_an_override_of_a_section_forgets_the_lines_inside_it(tmp_path: Path) -> None:
    path = written(tmp_path, "pattern: 0.5\nmethod: wanda\nevaluation: {seed: 5}\n")
    error = refusal(path, "calibration.seed=12345", "evaluation={samples: 3}")
    assert error.what.startswith("--set evaluation={samples: 3}: evaluation.seed and calibration.seed are both 12345")


def test_no_key_is_required_but_two(tmp_path: Path) -> None:
    path = written(tmp_path, "description: nothing else\n")
    assert refusal(path).what.splitlines() == [f"{path}: pattern is missing", f"{path}: method is missing"]
    assert refusal({}).what.splitlines() == ["recipe: pattern is missing", "recipe: method is missing"]


def test_the_error_of_a_value_is_the_cause() -> None:
    assert isinstance(refusal({**SMALL, "pattern": "3;4"}).__cause__, PatternError)
    assert isinstance(refusal({**SMALL, "calibration": {"samples": 0}}).__cause__, CalibrationError)


def test_numbers_in_place_of_text_are_to_be_quoted() -> None:
    assert "quotes" in refusal({**SMALL, "calibration": {"config": 20220301}}).fix
    assert not refusal({**SMALL, "description": None}).fix


@pytest.mark.parametrize(
    ("first", "second", "reached"),
    [
        ("*", "*.mlp.*", False),
        ("*.mlp.*", "*.mlp.*", False),
        ("*.mlp.*", "*.1?.mlp.up", False),
        ("[ab]", "[ab]", False),
        ("*.mlp.*", "*", True),
        ("*.mlp.up", "*.mlp.*", True),
        ("a?b", "a*b", True),
        ("*]", "[ab]", True),
        ("[*]", "*", True),
    ],
)
def test_a_rule_behind_a_wider_one_is_refused(first: str, second: str, reached: bool) -> None:
    recipe = {
        **SMALL,
        "rules": [{"match": "x", "pattern": 1}, *({"match": m, "pattern": 0.5} for m in (first, second))],
    }
    if reached:
        assert [rule.match for rule in load_recipe(recipe).rules] == ["x", first, second]
    else:
        error = refusal(recipe)
        assert f"the rule for {second!r} is never reached: {first!r}" in error.what
        assert "(in rules.2)" in error.what


def test_nothing_left_to_prune_is_refused() -> None:
    assert "exclude covers all" in refusal({**SMALL, "include": ["a.b", "a.c"], "exclude": ["a.*"]}).what
    assert load_recipe({**SMALL, "include": ["a.*", "b"], "exclude": ["a.*"]}).for_matrix("b")


def test_unknown_recipes_are_listed_and_suggested(tmp_path: Path) -> None:
    error = refusal("sparsegtp-50")
    assert error.what == "no recipe 'sparsegtp-50'; did you mean 'sparsegpt-50'?"
    assert error.expected == f"a YAML file, or one of {', '.join(sorted(EXPECTED))}"
    assert "did you mean 'demo'?" in refusal("demo.yaml").what
    assert refusal(tmp_path / "demo.yaml").what.startswith(f"no recipe '{tmp_path / 'demo.yaml'}'")


def test_a_bundled_name_comes_before_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").write_text("pattern: 0.9\nmethod: random\n", encoding="utf-8")
    assert load_recipe("demo").method == SparseGPT()
    assert load_recipe(Path("demo")).method == Random()


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path).what
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"pattern: \xff")
    assert "UTF-8" in refusal(binary).expected
    for text, shown in (("", "null"), ("- 1", "[1]"), ("2:4", '"2:4"')):
        assert refusal(written(tmp_path, text)).what.endswith(f"recipe.yaml holds {shown}")
    assert "special characters" in refusal("pattern: \x07\n").what


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    assert load_recipe(written(tmp_path, "\ufeffpattern: 0.5\nmethod: wanda\n")).method == Wanda()


def test_every_method_has_a_recipe_and_writes_all_its_knobs() -> None:
    assert {type(method) for _, method in EXPECTED.values()} == set(METHODS.values())
    for name, method in METHODS.items():
        recipe = load_recipe({**SMALL, "method": name})
        assert recipe.method == method()
        assert recipe.to_dict()["method"] == {name: asdict(recipe.method)}
