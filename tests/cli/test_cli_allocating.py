"""llmprune sensitivity: its files, its table, its dry run, and recipes that use the result."""

import json
from pathlib import Path

import pytest
import tiny_models
from command_line import SMALL, make_plain, run
from folders import contents

from llmprune.errors import CheckpointError
from llmprune.models.checkpoint_source import CheckpointSource
from llmprune.pruning.allocating.pool import Pool, find_pool
from llmprune.pruning.allocating.scan import read_scan
from llmprune.pruning.jobs import plan_jobs
from llmprune.pruning.sensitivity import sensitivity
from llmprune.recipe.recipe import load_recipe

LEVELS = ("--levels", "0.3,0.7")
TEXT = [part for part in SMALL if "evaluation" not in str(part)]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    make_plain(monkeypatch)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tiny_models.build("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def scanned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("scan")
    result = run("sensitivity", model, "--output", output, *LEVELS, *SMALL)
    assert result.exit_code == 0, result.stderr
    assert "KL, nats/token" in result.stdout
    assert "mlp.down_proj" in result.stdout
    assert "allocation, sensitivity 2 of 2" in result.stderr
    return output


@pytest.fixture
def pool(model: Path) -> Pool:
    source = CheckpointSource(model)
    return find_pool(source, plan_jobs(source, load_recipe(tiny_models.recipe(method="wanda"))))


def test_every_unit_has_a_rising_curve(scanned: Path) -> None:
    content = json.loads((scanned / "sensitivity.json").read_text("utf-8"))
    units = content["units"]
    assert len(units) == 2 * 7
    assert {unit["layer"] for unit in units} == {0, 1}
    for unit in units:
        assert unit["levels"] == [0.3, 0.7]
        assert 0 < unit["errors"][0] < unit["errors"][1] < 1
        assert 0 < unit["divergences"][0] < unit["divergences"][1]
    assert content["tokens"]["divergences"] > 0


def test_the_page_shows_them(scanned: Path) -> None:
    page = (scanned / "sensitivity.html").read_text("utf-8")
    assert "http://" not in page.split('id="plotly"')[0].replace("http://www.w3.org", "")
    assert page.count("<figure>") == 1 + 2 * 7
    assert "self_attn.q_proj: relative output error" in page


def test_a_recipe_uses_the_file(model: Path, scanned: Path, tmp_path: Path) -> None:
    allocation = f"allocation={{sensitivity: {{file: {scanned / 'sensitivity.json'}}}}}"
    arguments = ["prune", model, "--recipe", "wanda-50", "--output", tmp_path / "out", *SMALL, "--set", allocation]
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "sensitivity: KL divergence" in result.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    units = json.loads((scanned / "sensitivity.json").read_text("utf-8"))["units"]
    assert report["allocation"]["evidence"]["units"] == units
    assert "Sparsity of each matrix" in (tmp_path / "out" / "report.html").read_text("utf-8")
    other = run(*arguments[:4], "--output", tmp_path / "other", *SMALL, "--set", "allocation={sensitivity: {file: no}}")
    assert other.exit_code == 1
    assert "no file" in other.stderr


@pytest.mark.parametrize("change", [
    {"layer": []}, {"levels": "0.3"}, {"levels": []}, {"levels": [0.7, 0.3]}, {"levels": [0.3, 1.7]}, {"errors": [0.1]},
    {"errors": [None, 0.1]}, {"divergences": [0.1, "x"]}, None,
])  # fmt: skip
def test_a_damaged_file_is_refused(change: dict[str, object] | None, scanned: Path, tmp_path: Path, pool: Pool) -> None:
    content = json.loads((scanned / "sensitivity.json").read_text("utf-8"))
    content["units"] = [{**unit, **change} for unit in content["units"]] if change else {}
    (tmp_path / "scan.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(CheckpointError, match=r"scan\.json (is damaged|cannot be read)"):
        read_scan(tmp_path / "scan.json", pool)


def test_curves_of_other_weights_are_used_and_said(scanned: Path, pool: Pool) -> None:
    file, said = scanned / "sensitivity.json", []
    digest = json.loads(file.read_text("utf-8"))["source"]
    for known in (digest, None, "other"):
        assert len(read_scan(file, pool, known, lambda progress: said.append(progress.stage))) == 2 * 7
    assert len(said) == 1
    assert "are of other weights than these" in said[0]


def test_a_folder_in_the_place_of_a_result_is_refused_before_the_scan(model: Path, tmp_path: Path) -> None:
    (tmp_path / "sensitivity.html").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot write .*sensitivity\.html"):
        sensitivity(model, tmp_path, watch=pytest.fail)


def test_dry_runs_state_the_cost(model: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    plan = run("sensitivity", model, "--output", tmp_path, "--dry-run", *SMALL)
    assert plan.exit_code == 0, plan.stderr
    assert "4 over" in " ".join(plan.stdout.split())
    found = json.loads(run("sensitivity", model, "--dry-run", "--json", *SMALL).stdout)
    assert (found["passes"], found["variants"]) == (4, 14)
    assert contents(tmp_path) == before
    pruning = run("prune", model, "--recipe", "wanda-50", "--dry-run", *SMALL, "--set", "allocation=search")
    assert "up to 7 variants" in " ".join(pruning.stdout.split())


def test_mistakes_are_refused_before_anything_is_read(model: Path) -> None:
    assert run("sensitivity", model).exit_code == 2
    assert run("sensitivity", model, "--dry-run", "--levels", "half").exit_code == 2
    wrong = run("sensitivity", model, "--dry-run", "--levels", "0.5,1")
    assert wrong.exit_code == 1
    assert "levels are 0.5, 1.0" in wrong.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["pattern=2:4"], "nothing to measure with the pattern 2:4"),
        (["rotation={}"], "sensitivity with a recipe that has rotation"),
        (["structures={ffn: {remove: 0.5}}"], "sensitivity with a recipe that has structures"),
    ],
    ids=str,
)
def test_a_recipe_that_cannot_be_scanned(model: Path, settings: list[str], message: str) -> None:
    refused = run("sensitivity", model, "--dry-run", *(part for one in settings for part in ("--set", one)))
    assert refused.exit_code == 1
    assert message in refused.stderr
    assert "allocation" not in refused.stderr


@pytest.mark.parametrize(
    ("allocation", "message"),
    [
        ("{sensitivity: {file: no.json}}", "no file no.json"),
        ("{sensitivity: {file: SCAN}}", "reach 70.0% zeros, and the pattern asks for"),
        ("{'*.nothing': 0.5}", "'*.nothing' matches none of the 14 matrices"),
        ("{'*.mlp.*': 0.1}", "the globs set 6.0% of all weights to zero"),
    ],
    ids=str,
)
def test_an_allocation_that_does_not_fit_is_refused_before_any_text(
    model: Path, scanned: Path, tmp_path: Path, allocation: str, message: str
) -> None:
    allocation = allocation.replace("SCAN", str(scanned / "sensitivity.json"))
    arguments = ["prune", model, "--recipe", "wanda-50", "--sparsity", "0.8", *SMALL]
    arguments += ["--set", f"allocation={allocation}"]
    for more in (["--dry-run"], ["--output", tmp_path / "out"]):
        refused = run(*arguments, *more)
        assert refused.exit_code == 1
        assert message in " ".join(refused.stderr.split())
        assert "calibration text" not in refused.stderr
    assert not (tmp_path / "out").exists()
