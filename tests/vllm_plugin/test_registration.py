"""The entry point, and what it says where it cannot work."""

import importlib
import importlib.util
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmprune import vllm_plugin
from llmprune.errors import MissingPackageError, ModelError
from llmprune.vllm_plugin import guard

ROOT = Path(__file__).parents[2]
without_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")


def test_the_entry_point_names_the_function() -> None:
    """From its source: an editable installation may be older. Whether vLLM finds it is tested with vLLM."""
    _, found, after = (ROOT / "pyproject.toml").read_text("utf-8").partition('entry-points."vllm.general_plugins"]\n')
    assert found
    name, _, target = after.splitlines()[0].partition(" = ")
    module, _, function = target.strip('"').partition(":")
    assert name == "llmprune"
    assert getattr(importlib.import_module(module), function) is vllm_plugin.register


@without_vllm
def test_an_unknown_vllm_is_named_with_the_versions_that_work() -> None:
    with pytest.raises(MissingPackageError, match=r"No module named 'vllm'(.|\n)*expected: vLLM 0\.32"):
        vllm_plugin.register()


def test_importing_the_plug_in_imports_neither_torch_nor_vllm() -> None:
    code = "import sys, llmprune.vllm_plugin; print(sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_folder_of_kernels_is_no_other_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT])
    assert guard.shadowing() is None
    guard.require_not_shadowed()
    monkeypatch.syspath_prepend(str(ROOT))
    assert guard.shadowing() == ROOT / "triton_kernels"
    with pytest.raises(
        ModelError, match=r"in place of OpenAI's package triton_kernels(.|\n)*start it in another folder"
    ):
        guard.require_not_shadowed()


def test_openais_package_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "triton_kernels").mkdir()
    (tmp_path / "triton_kernels" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert guard.shadowing() is None


def test_the_plug_in_registers_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    calls = []
    module = type(sys)("llmprune.vllm_plugin.method")
    module.register = lambda: calls.append("method")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(vllm_plugin, "method", module, raising=False)
    monkeypatch.setattr(vllm_plugin, "_registered", False)
    monkeypatch.setattr(vllm_plugin, "shadowing", lambda: ROOT)
    with caplog.at_level(logging.WARNING):
        vllm_plugin.register()
        vllm_plugin.register()
    assert calls == ["method"]
    assert caplog.text.count("OpenAI's package") == 1


def test_uneven_layers_are_refused_with_what_to_do() -> None:
    guard.require_even({"model_type": "llama", "per_layer_config": None})
    uneven = {"per_layer_config": {"3": {"intermediate_size": 8}}, "allow_global_per_layer_attribute_access": True}
    for config in (uneven, {"text_config": uneven}):
        with pytest.raises(ModelError, match=r"differ in size or lack a block(.|\n)*fix: serve it with llmprune serve"):
            guard.require_even(config)


ATTENTION, MIXER = "model.layers.0.self_attn", "model.layers.0.mixer"


@pytest.mark.parametrize(
    ("config", "layouts", "what"),
    [
        ({"model_type": "llama4"}, {f"{ATTENTION}.q_proj": "nm"}, "reorders the rows of q_proj and k_proj"),
        ({"text_config": {"model_type": "llama4_text"}}, {f"{ATTENTION}.k_proj": "block"}, "reorders the rows"),
        ({"model_type": "falcon", "multi_query": False}, {"h.0.self_attention.query_key_value": "nm"}, "reorders"),
        (
            {"model_type": "falcon", "multi_query": True, "new_decoder_architecture": True},
            {"h.0.self_attention.query_key_value": "bitmask"},
            "reorders the rows of query_key_value",
        ),
        ({"model_type": "bloom"}, {"h.0.self_attention.query_key_value": "bitmask"}, "reorders"),
        ({"model_type": "mamba"}, {f"{MIXER}.in_proj": "nm"}, "has no packed layers there"),
        ({"model_type": "jamba"}, {"model.layers.0.mamba.in_proj": "nm"}, "has no packed layers there"),
    ],
)
def test_what_vllm_reorders_is_refused(config: dict[str, Any], layouts: dict[str, str], what: str) -> None:
    with pytest.raises(ModelError, match=rf"is packed as \w+, and vLLM's model for \w+ {what}") as caught:
        guard.require_untouched(config, layouts)
    assert "llmprune unpack" in caught.value.fix


@pytest.mark.parametrize(
    ("config", "layouts"),
    [
        ({"model_type": "llama"}, {f"{ATTENTION}.q_proj": "nm"}),
        ({"model_type": "llama4"}, {f"{ATTENTION}.o_proj": "nm"}),
        ({"model_type": "falcon", "multi_query": True}, {"h.0.self_attention.query_key_value": "nm"}),
        ({"model_type": "falcon", "multi_query": False}, {"h.0.self_attention.dense": "nm"}),
        ({"model_type": "bloom"}, {"h.0.self_attention.query_key_value": "nm", "h.0.mlp.dense_h_to_4h": "block"}),
        ({"model_type": "jamba"}, {f"{ATTENTION}.q_proj": "nm"}),
    ],
)
def test_what_vllm_loads_as_it_is_passes(config: dict[str, Any], layouts: dict[str, str]) -> None:
    guard.require_untouched(config, layouts)
