import json
import warnings

import pytest
import torch

from llmprune.kernels import configurations
from llmprune.kernels.configurations import cache_file, dispatch_limit, forget, measured, record

CPU = torch.device("cpu")
CHOICE = {"warps": 4, "splits": 2}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache of the test's own, forgotten afterwards."""
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "not yet there"))
    forget()
    yield tmp_path / "not yet there"
    forget()


def test_what_was_recorded_is_found_under_its_exact_shape():
    assert measured("op", CPU, rows=3, tokens=8) is None
    record("op", CPU, CHOICE, rows=3, tokens=8)
    assert measured("op", CPU, tokens=8, rows=3) == CHOICE
    for other in ({"rows": 3}, {"rows": 3, "tokens": 16}, {"rows": 3, "tokens": 8, "columns": 1}):
        assert measured("op", CPU, **other) is None
    assert measured("another", CPU, rows=3, tokens=8) is None


def test_records_add_up_and_the_last_one_counts():
    record("op", CPU, {"warps": 1}, rows=1)
    record("op", CPU, {"warps": 2}, rows=2)
    record("other", CPU, {"microseconds": 1.5, "path": "dense"}, rows=1)
    record("op", CPU, {"warps": 8}, rows=1)
    assert measured("op", CPU, rows=1) == {"warps": 8}
    assert measured("op", CPU, rows=2) == {"warps": 2}
    assert measured("other", CPU, rows=1) == {"microseconds": 1.5, "path": "dense"}


def test_another_device_has_its_own_choices(monkeypatch):
    record("op", CPU, CHOICE, rows=1)
    monkeypatch.setattr(configurations, "device_key", lambda device: "NVIDIA H200")
    assert measured("op", CPU, rows=1) is None


def test_choices_of_other_versions_are_kept_but_not_found(monkeypatch):
    record("op", CPU, CHOICE, rows=1)
    with monkeypatch.context() as patch:
        patch.setattr(configurations, "_versions", lambda: "torch 1, triton 1, kernels 0")
        forget()
        assert measured("op", CPU, rows=1) is None
        record("op", CPU, {"warps": 1}, rows=1)
    forget()
    assert measured("op", CPU, rows=1) == CHOICE


def test_versions_name_all_that_a_measurement_depends_on():
    assert torch.__version__ in configurations._versions()
    assert "triton" in configurations._versions()
    assert f"kernels {configurations.KERNELS_VERSION}" in configurations._versions()


def test_file_is_read_once(folder):
    record("op", CPU, CHOICE, rows=1)
    assert measured("op", CPU, rows=1) == CHOICE
    (folder / "kernels.json").unlink()
    assert measured("op", CPU, rows=1) == CHOICE
    forget()
    assert measured("op", CPU, rows=1) is None


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "3", '{"v": 1}', '{"v": {"cpu": {"op": {"rows=1": 4}}}}', "\0", "[" * 100_000,
        '{"v": {"cpu": {"op": {"rows=1": {"warps": [4]}}}}}', '{"v": {"cpu": {"op": {"rows=1": {"warps": null}}}}}',
    ],
)  # fmt: skip
def test_damaged_file_warns_and_is_replaced_by_the_next_record(folder, content):
    folder.mkdir()
    (folder / "kernels.json").write_text(content.replace('"v"', json.dumps(configurations._versions())))
    with pytest.warns(UserWarning, match=r"kernels\.json cannot be read(.|\n)*fix: delete the file"):
        assert measured("op", CPU, rows=1) is None
    with warnings.catch_warnings():  # once is enough
        warnings.simplefilter("error")
        assert measured("op", CPU, rows=1) is None
    with pytest.warns(UserWarning, match="cannot be read"):
        record("op", CPU, CHOICE, rows=1)
    assert measured("op", CPU, rows=1) == CHOICE


def test_a_folder_in_the_place_of_the_file_warns(folder):
    (folder / "kernels.json").mkdir(parents=True)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert measured("op", CPU, rows=1) is None


def test_failed_write_leaves_the_old_file_and_nothing_else(folder, monkeypatch):
    record("op", CPU, CHOICE, rows=1)
    before = (folder / "kernels.json").read_bytes()

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        record("op", CPU, {"warps": 1}, rows=1)
    assert [path.name for path in folder.iterdir()] == ["kernels.json"]
    assert (folder / "kernels.json").read_bytes() == before


@pytest.mark.parametrize("choice", [{"warps": [4]}, {"warps": None}, {4: 4}, [4]])
def test_a_choice_that_could_not_be_read_back_is_refused(choice):
    with pytest.raises(TypeError, match="expected a dict with str keys"):
        record("op", CPU, choice, rows=1)
    assert not cache_file().exists()


def test_dispatch_limit():
    assert dispatch_limit("op", CPU, 64, rows=1) == 65
    record("op.dispatch", CPU, {"limit": 17}, rows=1)
    assert dispatch_limit("op", CPU, 64, rows=1) == 17
    assert dispatch_limit("op", CPU, 64, rows=2) == 65
    record("op.dispatch", CPU, {"limit": 0}, rows=1)
    assert dispatch_limit("op", CPU, 64, rows=1) == 0
    record("op.dispatch", CPU, {"limit": 1000}, rows=1)
    assert dispatch_limit("op", CPU, 64, rows=1) == 65, "more than the decode kernel can take"


@pytest.mark.parametrize("choice", [{}, {"limit": "many"}, {"limit": 3, "more": 4}])
def test_a_limit_that_is_none_is_not_used(choice):
    record("op.dispatch", CPU, choice, rows=1)
    with pytest.warns(UserWarning, match=r"op\.dispatch, rows=1: the measured choice (.|\n)* is not used"):
        assert dispatch_limit("op", CPU, 64, rows=1) == 65


def test_folder_is_under_home_unless_the_environment_says_otherwise(folder, monkeypatch):
    assert cache_file() == folder / "kernels.json"
    monkeypatch.setenv("LLMPRUNE_CACHE", "~/elsewhere")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(cache_file()) == "/home/somebody/elsewhere/kernels.json"
    monkeypatch.delenv("LLMPRUNE_CACHE")
    assert str(cache_file()) == "/home/somebody/.cache/llmprune/kernels.json"


@pytest.mark.parametrize("folder_name", ["", "~no-such-user/cache"])
def test_without_a_home_folder_choices_last_as_long_as_the_process(folder, monkeypatch, folder_name):
    def unknown(*arguments):
        raise KeyError

    monkeypatch.setenv("LLMPRUNE_CACHE", folder_name)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert measured("op", CPU, rows=1) is None
    with pytest.raises(OSError, match="set LLMPRUNE_CACHE"):
        record("op", CPU, CHOICE, rows=1)
    assert measured("op", CPU, rows=1) == CHOICE
    forget()
    assert measured("op", CPU, rows=1) is None


def test_what_cannot_be_written_counts_until_it_is(folder, monkeypatch):
    record("op", CPU, CHOICE, rows=1)
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", lambda *arguments: (_ for _ in ()).throw(PermissionError("read-only")))
        with pytest.raises(OSError, match="read-only"):
            record("op", CPU, {"warps": 1}, rows=1)
    assert measured("op", CPU, rows=1) == {"warps": 1}
    record("op", CPU, {"warps": 2}, rows=1)
    assert measured("op", CPU, rows=1) == {"warps": 2}
    forget()
    assert measured("op", CPU, rows=1) == {"warps": 2}


def test_a_cpu_is_known_by_its_model_and_has_one_multiprocessor(monkeypatch):
    assert configurations.device_key(CPU) == configurations.processor_name() != "cpu"
    record("op", CPU, CHOICE, rows=1)
    configurations.device_key.cache_clear()
    monkeypatch.setattr(configurations, "processor_name", lambda: "another")
    assert measured("op", CPU, rows=1) is None
    configurations.device_key.cache_clear()
    assert configurations.sm_count(CPU) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: its name and size cannot be read")
def test_a_gpu_has_its_name_and_size():
    device = torch.device("cuda", 0)
    assert configurations.device_key(device) == torch.cuda.get_device_name(0)
    assert configurations.sm_count(device) == torch.cuda.get_device_properties(0).multi_processor_count
