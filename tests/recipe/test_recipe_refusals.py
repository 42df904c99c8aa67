"""Mistakes in recipes: each is shown with its place, what was expected, and a way out."""

from pathlib import Path

import pytest
from recipe_cases import EXPECTED, SMALL, STRUCTURED, refusal, written

from llmprune.errors import CalibrationError, PatternError
from llmprune.recipe.recipe import load_recipe


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
        ("method: []", "3: method is an empty list", "a method and steps"),
        ("method: [3]", "3: method is 3", "one name such as wanda"),
        ("method: [refit]", "3: refit improves the result of a method", "which begins with one of random"),
        (
            "method: [wanda, sparsegpt]",
            "3: sparsegpt is a method, and stands after another one",
            "then steps: one of swaps",
        ),
        ("method: [wanda, refti]", "3: unknown step 'refti'; did you mean 'refit'?", "one of swaps, refit"),
        ("method: [wanda, {refit: {damping: -1}}]", "3: refit.damping is -1", ">= 0"),
        ("reconstruct: {epochs: 0}", "3: reconstruct.epochs is 0", "1"),
        ("reconstruct: {epochs: 99999999999999999999}", "3: reconstruct.epochs is 9999", "2147483647"),
        ("reconstruct: {sequences: 99999999999999999999}", "3: reconstruct.sequences is 9999", "2147483647"),
        ("allocation: {search: {generations: 99999999999}}", "3: allocation.search.generations is 9999", "2147483647"),
        ("allocation: {owl: 0.1}", "3: allocation owl is 0.1, which is no option", "its options: multiple, spread"),
        ("allocation: {uniform: 0.3}", "3: allocation uniform is 0.3", "has no options"),
        ("allocation: {'*.mlp.*': 60%}", "3: '*.mlp.*' is \"60%\" (in allocation", "0.6 for 60 %"),
        ("reconstruct: {train: []}", "3: reconstruct.train is []", "some of weights, norms"),
        ("reconstruct: {target: best}", "3: reconstruct.target is", "'dense', 'local' or 'corrected'"),
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
        ("rules: [{match: '', pattern: 0.5}]", '3: rules.0.match is ""', "text that is not empty"),
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
        ("evaluation: {layout: packed}", '3: evaluation.layout is "packed"', "'pack', 'truncate' or 'pack-bare'"),
        ("evaluation: {temperature: .nan}", "3: temperature nan (in evaluation.temperature)", "above 0"),
        ("evaluation: {seed: 0}", "3: evaluation.seed and calibration.seed are both 0", "two different seeds"),
        ("calibration: {column: x}", "3: column 'x' for self-generated text", "no column"),
        ("calibration: {source: a.txt, split: x}", "3: split 'x' for a single file (a.txt)", "no split"),
        ("evaluation: {source: org/name, temperature: 2}", "3: temperature 2.0 for text that is read", "no temperat"),
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
        ("held_back: 0\nheld_back: 1", "4: key 'held_back' is already set on line 3", "each key once"),
        ("evaluation:\n  seed: 1\n  seed: 2", "5: key 'evaluation.seed' is already set on line 4", "each key once"),
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
        (["allocation.alpha.spread=1", "allocation=owl"], "the allocation is owl, not alpha\nfix: set an option of"),
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


def test_weights_or_structures_are_required(tmp_path: Path) -> None:
    path = written(tmp_path, "description: nothing else\n")
    assert refusal(path).what == f"{path}: pattern and method are missing"
    assert refusal({"pattern": 0.5}).what == "recipe: method is missing"
    assert "structures" in refusal({"method": "wanda"}).expected


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
        "rules": [{"match": "x", "pattern": 0.3}, *({"match": m, "pattern": 0.5} for m in (first, second))],
    }
    if reached:
        assert [rule.match for rule in load_recipe(recipe).rules] == ["x", first, second]
    else:
        error = refusal(recipe)
        assert f"the rule for {second!r} is never reached: the earlier {first!r}" in error.what
        assert "(in rules.2)" in error.what


def test_nothing_left_to_prune_is_refused() -> None:
    assert "exclude covers all" in refusal({**SMALL, "include": ["a.b", "a.c"], "exclude": ["a.*"]}).what
    assert load_recipe({**SMALL, "include": ["a.*", "b"], "exclude": ["a.*"]}).for_matrix("b")


def test_unknown_recipes_are_listed_and_suggested(tmp_path: Path) -> None:
    error = refusal("sparsegtp-50")
    assert error.what == "no recipe 'sparsegtp-50'; did you mean 'sparsegpt-50'?"
    assert error.expected == f"a YAML file, or one of {', '.join(sorted([*EXPECTED, *STRUCTURED]))}"
    assert "did you mean 'demo'?" in refusal("demo.yaml").what
    assert refusal(tmp_path / "demo.yaml").what.startswith(f"no recipe '{tmp_path / 'demo.yaml'}'")


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path).what
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"pattern: \xff")
    assert "UTF-8" in refusal(binary).expected
    for text, shown in (("", "null"), ("- 1", "[1]"), ("2:4", '"2:4"')):
        assert refusal(written(tmp_path, text)).what.endswith(f"recipe.yaml holds {shown}")
    assert "special characters" in refusal("pattern: \x07\n").what


def test_a_number_too_long_to_be_read_is_named_with_its_line() -> None:
    error = refusal("method: wanda\npattern: " + "9" * 5000 + "\n")
    assert error.what.startswith("recipe:2: Exceeds the limit")
