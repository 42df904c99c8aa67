"""The bench of vLLM with engines that are not: what it asks, refuses and calculates."""

from pathlib import Path
from typing import Any

import pytest

from llmprune.eval.bench import vllm as bench


class FakeEngine:
    """Answers at once, and keeps what it was asked."""

    def __init__(self, name: str, asked: list[tuple[str, dict[str, Any]]], speed: float, off: float = 0.0) -> None:
        self.name, self.asked, self.speed, self.off = name, asked, speed, off
        self.loaded = {"seconds": 1.0, "peak_bytes": 2_000_000_000, "weight_bytes": 10**9, "versions": {"vllm": "0"}}

    def ask(self, **request: Any) -> dict[str, Any]:
        self.asked.append((self.name, request))
        if request["do"] == "logs":
            return {"logs": [-1.0, -2.0 + self.off]}
        return {"seconds": request["new_tokens"] / self.speed}


def measured(*options: str, off: float = 0.0) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    asked: list[tuple[str, dict[str, Any]]] = []
    engines = {"dense": FakeEngine("dense", asked, 10.0), "packed": FakeEngine("packed", asked, 15.0, off)}
    return bench.measure(engines, bench._parse(["dense", "packed", *options])), asked


def test_both_engines_take_turns_after_they_were_compared() -> None:
    result, asked = measured("--requests", "1,8", "--repeats", "2", "--output-tokens", "30")
    assert [request["do"] for _, request in asked[:2]] == ["logs", "logs"]
    timed = [(name, request["requests"], request["new_tokens"], request["seed"]) for name, request in asked[2:]]
    assert timed == [
        (name, requests, tokens, turn + more)
        for requests in (1, 8)
        for turn in range(3)
        for name in ("dense", "packed")
        for tokens, more in ((30, 0), (1, 1000))
    ]
    assert [row["requests"] for row in result["rows"]] == [1, 8]
    eight = result["rows"][1]
    assert eight["dense"]["tokens_per_second"] == pytest.approx(80)
    assert eight["dense"]["seconds"] == [3.0, 3.0]
    assert eight["packed"]["seconds_per_token"] == pytest.approx(1 / 15)
    assert eight["speed_up"] == pytest.approx(1.5)
    assert (
        bench.lines(result)[-1]
        == "8 requests: dense 80.0, packed 120.0 tokens/s (1.50x); TTFT, s: dense 0.100, packed 0.067"
    )


def test_engines_that_differ_are_not_timed() -> None:
    assert measured("--requests", "1", off=0.4)[0]["largest_difference_nats"] == pytest.approx(0.4)
    for off in (0.6, float("nan")):
        with pytest.raises(SystemExit, match=r"differ by (0.6|nan) nats(.|\n)*fix: pack the dense checkpoint again"):
            measured(off=off)


def test_an_engine_that_dies_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.sys, "executable", "/bin/false")
    with pytest.raises(SystemExit, match="an engine has ended with status 1"):
        bench.Engine(tmp_path, bench._parse(["dense", "packed"]))


def test_two_folders_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["dense"])
    assert "two folders are needed" in capsys.readouterr().err
