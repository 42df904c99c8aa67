"""The front door: every recipe key through `prune`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import contents, same, tensors, untimed, weights_and_texts, zeros
from front_door import DTYPES, LENGTH, on_text, save_dense, unchanged, write_words
from tiny_models import build, recipe, tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmprune import Report, load_recipe, prune
from llmprune.errors import CalibrationError, DeviceError, ModelError, PatternError, RecipeError
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.precision import computed_in, dtype_name
from llmprune.progress import Progress
from llmprune.recipe.recipe import Recipe


@pytest.fixture(scope="module", params=DTYPES)
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with unchanged(save_dense(request.param, tmp_path_factory.mktemp("dense"))) as folder:
        yield folder


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("text") / "words.txt")


def weights(folder: Path, rows: Any) -> dict[str, Tensor]:
    stored = tensors(folder)
    return {row.name: stored[f"{row.name}.weight"] for row in rows}


# --- every key


# key: (value, whether the weights come out the same to the bit as without it).
KEYS: dict[str, tuple[Any, bool]] = {
    "pattern": ("2:4", False),
    "method": ("wanda", False),
    "structures": ({"ffn": {"remove": 0.5}}, False),
    "description": ("in words", True),
    "include": (["*.mlp.*"], False),
    "exclude": (["*.mlp.*"], False),
    "rules": ([{"match": "*.q_proj", "method": "magnitude"}], False),
    "calibration": ({"samples": 5, "length": LENGTH}, False),
    "evaluation": ({"samples": 1}, True),
    "allocation": ("dlp", False),
    "rotation": ({"kind": "hadamard"}, False),
    "reconstruct": ({"epochs": 1}, False),
    "quantise": ({"bits": 4}, False),
    "report_to": (None, True),  # tests/pruning/test_tracking.py has a stand-in for a tracker
    "batch_size": (1, True),
    "held_back": (0, True),
    "decoder_layers": ("model.layers", True),
    "statistics": ({"token_weight": "none"}, False),
    "experts": ({"min_tokens": 1000}, True),
    "device": ("cpu" if torch.cuda.is_available() else "auto", True),
    "format": ("bitmask", True),
    "compute_dtype": ("float32", True),
    "activation_budget": (0, True),
}


@pytest.fixture(scope="module")
def plain(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights that come out if no key is touched."""
    folder = tmp_path_factory.mktemp("plain") / "pruned"
    prune(dense, recipe(calibration={"samples": 6, "length": LENGTH}, held_back=1), folder)
    return tensors(folder)


def test_no_key_is_forgotten() -> None:
    assert set(KEYS) == set(Recipe.model_fields)


@pytest.mark.parametrize("key", KEYS)
def test_a_key_changes_what_it_should(dense: Path, plain: dict[str, Tensor], tmp_path: Path, key: str) -> None:
    value, equal = KEYS[key]
    settings = {**recipe(calibration={"samples": 6, "length": LENGTH}, held_back=1), key: value}
    report = prune(dense, settings, tmp_path / "pruned")
    # A packed checkpoint is read as the dense one that it stands for.
    pruned = {name: stored[...] for name, stored in CheckpointSource(tmp_path / "pruned").stored.items()}
    assert {name: t.dtype for name, t in pruned.items()} == {name: t.dtype for name, t in plain.items()}
    same_shapes = all(tensor.shape == plain[name].shape for name, tensor in pruned.items())
    assert same_shapes is (key != "structures")
    assert report.header["recipe"] == load_recipe(settings).to_dict()
    if key == "batch_size":
        assert_nearly_same_masks(pruned, plain, report)
    elif key == "compute_dtype":
        # "auto" is float32 already on a processor that has no bfloat16.
        computed_alike = computed_in(DTYPES[dense.name], torch.device("cpu")) == torch.float32
        assert all(same(pruned[name], plain[name]) for name in plain) is computed_alike
    else:
        assert (same_shapes and all(same(pruned[name], plain[name]) for name in plain)) is equal


def assert_nearly_same_masks(some: dict[str, Tensor], others: dict[str, Tensor], report: Report) -> None:
    for row in report.rows:
        name = f"{row.name}.weight"
        assert float(((some[name] == 0) == (others[name] == 0)).float().mean()) >= 0.99


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_batches_of_one_and_of_eight_agree(dense: Path, tmp_path: Path, method: str) -> None:
    reports = [
        prune(
            dense,
            recipe(method=method, calibration={"samples": 8, "length": 24}, batch_size=size),
            tmp_path / str(size),
        )
        for size in (1, 8)
    ]
    assert_nearly_same_masks(tensors(tmp_path / "1"), tensors(tmp_path / "8"), reports[0])
    assert [row.error for row in reports[0].rows] == pytest.approx([row.error for row in reports[1].rows], rel=0.05)


def test_include_and_exclude_choose_matrices(dense: Path, tmp_path: Path) -> None:
    settings = recipe(include=["*.layers.0.*", "*.layers.2.*"], exclude=["*.o_proj", "*.2.mlp.*"])
    report = prune(dense, settings, tmp_path / "pruned")
    attention = [f"self_attn.{letter}_proj" for letter in "qkv"]
    mlp = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    expected = [f"model.layers.0.{name}" for name in attention + mlp] + [f"model.layers.2.{name}" for name in attention]
    assert [row.name for row in report.rows] == expected
    before, after = tensors(dense), tensors(tmp_path / "pruned")
    assert before.keys() == after.keys()
    for row in report.rows:
        assert row.zeros == zeros(after[f"{row.name}.weight"]) == row.shape[0] * row.shape[1] // 2
    touched = {f"{row.name}.weight" for row in report.rows}
    assert all(same(before[name], after[name]) for name in before if name not in touched)


def test_rules_give_matrices_their_own_pattern_and_method(dense: Path, tmp_path: Path) -> None:
    rules = [
        {"match": "*.q_proj", "pattern": "2:4"},
        {"match": "*.self_attn.*", "pattern": "0.5@8x8", "method": "wanda"},
        {"match": "*.1.mlp.down_proj", "method": "magnitude"},
    ]
    report = prune(dense, recipe(pattern=0.25, rules=rules), tmp_path / "pruned")
    after = tensors(tmp_path / "pruned")
    kinds = {row.name: (row.pattern, row.method) for row in report.rows}
    for name, kind in kinds.items():
        weight = after[f"{name}.weight"]
        if name.endswith("q_proj"):
            assert kind == ("2:4", "sparsegpt")
            assert bool(((weight.view(-1, 4) == 0).sum(1) == 2).all())
        elif "self_attn" in name:
            assert kind == ("0.5@8x8", "wanda")
            blocks = weight.view(weight.shape[0] // 8, 8, weight.shape[1] // 8, 8).abs().sum((1, 3))
            assert int((blocks == 0).sum()) == blocks.numel() // 2
        else:
            assert kind == ("0.25", "magnitude" if name == "model.layers.1.mlp.down_proj" else "sparsegpt")
            assert zeros(weight) == weight.numel() // 4
    before = tensors(dense)["model.layers.1.mlp.down_proj.weight"]
    kept = after["model.layers.1.mlp.down_proj.weight"] != 0
    assert torch.equal(after["model.layers.1.mlp.down_proj.weight"], before * kept)
    assert before[~kept].abs().max() <= before[kept].abs().min()


def test_the_smallest_pattern_of_all_changes_nothing(dense: Path, tmp_path: Path) -> None:
    prune(dense, recipe(pattern="dense"), tmp_path / "pruned")
    before, after = tensors(dense), tensors(tmp_path / "pruned")
    assert all(same(before[name], after[name]) for name in before)


# --- text


@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet"])
def test_calibration_text_comes_from_files(dense: Path, words: Path, tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"words.{ending}"
    text = words.read_text()
    if ending == "txt":
        file.write_text(text)
    elif ending == "jsonl":
        file.write_text(json.dumps({"body": text}) + "\n")
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"body": [text]}), file)
    column = {} if ending == "txt" else {"column": "body"}
    calibration = {"source": str(file), "samples": 6, "length": LENGTH, "order": "text", **column}
    prune(dense, on_text(words, calibration=calibration), tmp_path / "pruned")
    reference = prune(dense, on_text(words), tmp_path / "reference")
    assert reference.rows[0].tokens == 6 * LENGTH
    shards = {name for name in contents(tmp_path / "pruned") if name.endswith(".safetensors")}
    for name in shards:
        assert (tmp_path / "pruned" / name).read_bytes() == (tmp_path / "reference" / name).read_bytes()


def test_too_little_text_leaves_nothing_behind(dense: Path, words: Path, tmp_path: Path) -> None:
    calibration = {"source": str(words), "samples": 19, "length": LENGTH}
    with pytest.raises(CalibrationError, match="20 of 21 sequences of 16 tokens"):
        prune(dense, on_text(words, calibration=calibration), tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize("method", ["random", "wanda", "sparsegpt"])
def test_one_seed_one_result(dense: Path, tmp_path: Path, method: str) -> None:
    folders = [tmp_path / name for name in ("first", "second", "other")]
    reports = []
    for folder, seed in zip(folders, (1, 1, 2), strict=True):
        torch.manual_seed(len(folder.name))
        knobs: Any = {"random": {"seed": seed}} if method == "random" else method
        calibration = {"samples": 4, "length": LENGTH, "seed": seed}
        reports.append(prune(dense, recipe(method=knobs, calibration=calibration), folder))
    assert weights_and_texts(folders[0]) == weights_and_texts(folders[1])
    assert untimed(reports[0]) == untimed(reports[1])
    first, other = tensors(folders[0]), tensors(folders[2])
    assert any(not same(first[name], other[name]) for name in first)


# --- against transformers and plain torch


def test_without_evaluation_there_is_no_perplexity(dense: Path, tmp_path: Path) -> None:
    report = prune(dense, recipe(evaluation=None), tmp_path / "pruned")
    assert report.header["evaluation"] is None
    assert report.dense_perplexity is None
    assert report.pruned_perplexity is None


# --- a model in memory


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_streamed_equals_in_memory(dense: Path, tmp_path: Path, method: str) -> None:
    settings = recipe(method=method, evaluation={"samples": 2})
    streamed = prune(dense, settings, tmp_path / "streamed")
    model = AutoModelForCausalLM.from_pretrained(dense)
    in_memory = prune(model, settings)
    after = tensors(tmp_path / "streamed")
    assert all(same(tensor, after[name]) for name, tensor in model.state_dict().items())
    assert untimed(in_memory)["rows"] == untimed(streamed)["rows"]
    assert in_memory.header["evaluation"] == streamed.header["evaluation"]
    assert in_memory.header["texts"] == streamed.header["texts"]


def test_a_model_in_training_is_calibrated_without_dropout(dense: Path) -> None:
    models: list[PreTrainedModel] = []
    for training in (False, True):
        model = AutoModelForCausalLM.from_pretrained(dense, attention_dropout=0.5).train(training)
        model.lm_head.eval()
        prune(model, recipe(evaluation={"samples": 1}))
        assert model.training is training
        assert model.model.layers[0].training is training
        assert not model.lm_head.training
        models.append(model)
    evaluated, trained = (model.state_dict() for model in models)
    assert all(same(evaluated[name], trained[name]) for name in evaluated)


def test_a_model_in_memory_takes_a_tokenizer(words: Path) -> None:
    model = build("llama")
    with pytest.raises(ModelError, match="no tokenizer"):
        prune(model, on_text(words))
    report = prune(model, on_text(words), tokenizer=tokenizer())
    assert report.header["model"] == "LlamaForCausalLM"
    assert all(zeros(model.get_submodule(row.name).weight) == row.zeros for row in report.rows)


def test_a_model_in_memory_keeps_the_dtype_that_it_has(dense: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense)
    before = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    for compute_dtype in (dtype_name(model.dtype), "float32"):
        report = prune(model, recipe(compute_dtype=compute_dtype))
        assert report.header["compute_dtype"] == compute_dtype
        assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == before
    with pytest.raises(RecipeError, match="compute_dtype: float16 for a model in memory"):
        prune(model, recipe(compute_dtype="float16"))


# --- the door itself


def test_recipes_come_in_every_form(dense: Path, tmp_path: Path) -> None:
    mapping = recipe(method="wanda")
    (tmp_path / "mine.yaml").write_text(load_recipe(mapping).to_yaml())
    forms: dict[str, tuple[Any, list[str]]] = {
        "mapping": (mapping, []),
        "recipe": (load_recipe(mapping), []),
        "file": (tmp_path / "mine.yaml", []),
        "overridden": (recipe(), ["method=wanda"]),
    }
    for name, (form, overrides) in forms.items():
        prune(dense, form, tmp_path / name, overrides=overrides)
        assert weights_and_texts(tmp_path / name) == weights_and_texts(tmp_path / "mapping")


def test_the_bundled_model_is_pruned_by_a_bundled_recipe(tmp_path: Path) -> None:
    small = ["calibration.samples=2", "calibration.length=16", "evaluation.samples=1", "held_back=1", "device=cpu"]
    report = prune("testbed", "wanda-2of4", tmp_path / "pruned", overrides=small)
    assert report.sparsity == 0.5
    assert len(report.rows) == 8 * 7
    assert {row.pattern for row in report.rows} == {"2:4"}


def test_a_watcher_is_told_every_layer_of_every_stage(dense: Path, tmp_path: Path) -> None:
    heard: list[Progress] = []
    report = prune(dense, recipe(evaluation={"samples": 1}), tmp_path / "pruned", watch=heard.append)
    stages = [stage for stage in dict.fromkeys(p.stage for p in heard) if stage != "sampling text"]
    assert stages.pop(2) == "digesting the source"
    assert stages[-1] == "writing the report"
    stages = [stage for stage in stages if not stage.startswith("writing")]
    assert stages[:2] == ["evaluation text", "calibration text"]
    assert stages[2:] == ["dense perplexity", "pruning", "pruned perplexity", "perplexity, head", "answers"]
    for stage in stages[2:5]:
        layers = [progress.layer for progress in heard if progress.stage == stage]
        assert sorted(layers) == layers
        assert set(layers) == {0, 1, 2, 3}
    steps = [progress.step for progress in heard if progress.stage == "pruning" and progress.layer == 1]
    steps = [step for step in steps if ", batch " not in step]
    assert [steps[0], steps[1], *steps[-2:]] == ["statistics", "solving self_attn.q_proj", "writing", "advancing"]
    (last,) = (progress for progress in heard if progress.stage == "pruning" and progress.layer == 3)
    assert last.mean_error == report.mean_error


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"pattern": "3:5"}, PatternError, "model.layers.0.self_attn.q_proj: pattern 3:5 on a matrix of 64 x 64"),
        ({"exclude": ["*.experts.*"]}, RecipeError, "exclude: .* matches none of the model's 21 matrices"),
        ({"include": ["*.k_proj"], "exclude": ["*self*"]}, RecipeError, "leaves all 21 matrices dense"),
        ({"decoder_layers": "model.norm"}, ModelError, "'model.norm' is not a list of modules"),
        ({"calibration": {"length": 65}}, CalibrationError, "64 positions"),
        pytest.param(
            {"device": "cuda:99"}, DeviceError, "CUDA devices are visible",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_anything_is_written(
    dense: Path, tmp_path: Path, changes: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        prune(dense, recipe(**changes), tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()


def test_a_folder_needs_an_output(dense: Path) -> None:
    with pytest.raises(RecipeError, match="no output folder"):
        prune(dense, recipe())
