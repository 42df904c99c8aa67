"""A hub imitated on this machine, and small checkpoints for it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch
from safetensors.torch import save_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"


INDEX = "model.safetensors.index.json"


@dataclass
class FakeHub:
    """The routes that a snapshot download asks for: revision, tree, and the files themselves."""

    repositories: dict[str, Path] = field(default_factory=dict)
    statuses: dict[str, tuple[int, str]] = field(default_factory=dict)  # repository -> status and error code
    gated_files: bool = False
    requested: list[str] = field(default_factory=list)
    endpoint: str = ""

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        parts = unquote(urlsplit(path).path).strip("/").split("/")
        self.requested.append("/".join(parts))
        api = parts[:2] == ["api", "models"]
        repository = "/".join(parts[2:4] if api else parts[:2])
        route, revision, *name = parts[4:] if api else parts[2:]
        if repository in self.statuses or repository not in self.repositories:
            status, code = self.statuses.get(repository, (404, "RepoNotFound"))
            return status, {"X-Error-Code": code}, b"{}"
        if revision not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        return self._serve(self.repositories[repository], route, "/".join(name))

    def _serve(self, folder: Path, route: str, name: str) -> tuple[int, dict[str, str], bytes]:
        if route == "revision":
            return 200, {}, json.dumps({"id": "x", "sha": COMMIT, "siblings": []}).encode()
        if route == "tree":
            files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
            entries = [
                {"type": "file", "path": str(p.relative_to(folder)), "size": p.stat().st_size, "oid": f"{n:040x}"}
                for n, p in enumerate(files)
            ]
            return 200, {}, json.dumps(entries).encode()
        if self.gated_files:
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        return 200, {"ETag": f'"{name.replace("/", "-")}"', "X-Repo-Commit": COMMIT}, (folder / name).read_bytes()


def write_checkpoint(folder: Path, *, shards: int = 1, config: dict[str, object] | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **(config or {})}))
    (folder / "tokenizer.json").write_text("{}")
    if shards == 1:
        save_file({"a": torch.arange(6.0)}, folder / "model.safetensors")
    elif shards:
        names = {f"t{n}": f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)}
        for tensor, name in names.items():
            save_file({tensor: torch.ones(4)}, folder / name)
        (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    return folder
